"""TransformerLens: attribute the model behind a bridge.

::

    bridge = TransformerBridge.boot_transformers("gpt2")
    res = from_bridge(bridge).attribute("The Colosseum is in", target=" Rome")

A bridge wraps the model's modules in place and does the attention itself, so the model that it was booted from no longer
runs as HuggingFace wrote it. What is attributed is that model with the wrappers taken off again: other module objects
around the very same weights. The bridge stays as it is. Tried with TransformerLens 4.3.0.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..api import DePass
from ..errors import DePassError, ModelError

_PROBE = 4  # tokens on which a bridge and its model are compared


def from_bridge(bridge: Any, **options: Any) -> DePass:
    """A :class:`DePass` of the model behind a ``TransformerBridge``; it shares the bridge's weights.

    Args:
        bridge: as ``boot_transformers`` makes it, without compatibility mode.
        options: of :class:`DePass`; ``tokenizer`` is the bridge's without it.

    Raises:
        DePassError: TransformerLens is not installed.
        ModelError: no bridge; one in compatibility mode, which rewrites weights; one with hooks, which would be left out;
            one whose logits are not those of its model; a model that DePass cannot attribute.
    """
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise DePassError(
            f"from_bridge needs TransformerLens 4 ({error}): pip install 'depass-kernels[transformer-lens]'"
        ) from error
    if not isinstance(bridge, TransformerBridge):
        raise ModelError(
            f"expected a TransformerBridge, got {type(bridge).__name__}; TransformerBridge.boot_transformers(name) makes one"
        )
    if bridge.compatibility_mode or bridge._weights_processed:
        raise ModelError(
            "the bridge is in compatibility mode, which rewrites the model's weights; boot another one without it"
        )
    hooked = [name for name, point in bridge.hook_dict.items() if point.has_hooks(including_permanent=False)]
    if hooked:
        raise ModelError(
            f"the bridge has hooks ({', '.join(hooked[:3])}), which would be left out; call bridge.reset_hooks() first"
        )
    model = _unwrapped(bridge.original_model, {})
    made = DePass(model, options.pop("tokenizer", bridge.tokenizer), **options)
    _must_agree(bridge, made)
    return made


def _unwrapped(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """The module and all below it without TransformerLens's wrappers: new objects around the same parameters."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    while isinstance(module, GeneralizedComponent):
        inner = module.original_component
        if inner is None:
            raise ModelError(f"the bridge's {type(module).__name__} wraps nothing that HuggingFace wrote")
        module = inner
    if id(module) not in done:
        if "forward" in vars(module):
            raise ModelError(
                f"the forward of a {type(module).__name__} was replaced; it cannot be read from the bridge"
            )
        made = done[id(module)] = copy.copy(module)
        for name, value in vars(module).items():
            if isinstance(value, dict):  # of parameters, buffers, hooks: what is put in later stays with one of them
                vars(made)[name] = copy.copy(value)
        if isinstance(made, nn.Linear) and "bias" in made._buffers:  # zeros, which the bridge gave a module without
            del made._buffers["bias"]  # a bias would be a source, and have a share in the MLPs
            made.register_parameter("bias", None)
        for name, child in module._modules.items():
            made._modules[name] = None if child is None else _unwrapped(child, done)
    return done[id(module)]


@torch.no_grad()
def _must_agree(bridge: Any, made: DePass) -> None:
    """Refuse a bridge that computes something else than the model that was read from it."""
    bound = made.bound
    ids = torch.arange(_PROBE, device=made.model.get_input_embeddings().weight.device)[None] % bound.vocab_size
    theirs, ours = bridge(ids, return_type="logits"), made.model(ids, use_cache=False).logits
    difference, size = float((theirs - ours).abs().max()), float(ours.abs().max())
    if not difference <= bound.tolerance * size:
        raise ModelError(
            f"the bridge's logits differ from its model's by {difference:.1e} of {size:.1e}; its weights were edited in the "
            "bridge alone, or this version of TransformerLens computes them otherwise"
        )
