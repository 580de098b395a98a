"""TransformerLens: attribute the model behind a bridge.

::

    bridge = TransformerBridge.boot_transformers("gpt2")
    res = from_bridge(bridge).attribute("The Colosseum is in", target=" Rome")

A bridge wraps the model's modules in place and computes the attention itself. DePass needs the model as Hugging Face wrote
it, so this module builds the model again without the wrappers: new module objects that share the bridge's weights. The
bridge does not change. Tested with TransformerLens 4.3.0.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..api import DePass
from ..errors import DePassError, ModelError

_PROBE = 4  # tokens for comparing a bridge with its model


def from_bridge(bridge: Any, **options: Any) -> DePass:
    """A :class:`DePass` for the model behind a ``TransformerBridge``. It shares the bridge's weights.

    Args:
        bridge: a bridge from ``boot_transformers``, without compatibility mode.
        options: options of :class:`DePass`. The default ``tokenizer`` is the bridge's.

    Raises:
        DePassError: TransformerLens is not installed.
        ModelError: ``bridge`` is not a bridge, is in compatibility mode (which rewrites weights), has hooks (which DePass
            would not run), or computes other logits than its model; or DePass does not support the model.
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
            "the bridge is in compatibility mode, which rewrites the model's weights; boot a bridge without it"
        )
    hooked = [name for name, point in bridge.hook_dict.items() if point.has_hooks(including_permanent=False)]
    if hooked:
        raise ModelError(
            f"the bridge has hooks ({', '.join(hooked[:3])}), which DePass would not run; call bridge.reset_hooks() first"
        )
    model = _unwrapped(bridge.original_model, {})
    dp = DePass(model, options.pop("tokenizer", bridge.tokenizer), **options)
    _must_agree(bridge, dp)
    return dp


def _unwrapped(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """The module and its submodules without TransformerLens's wrappers: new objects that share the parameters."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    while isinstance(module, GeneralizedComponent):
        inner = module.original_component
        if inner is None:
            raise ModelError(
                f"the bridge's {type(module).__name__} does not wrap a Hugging Face module; "
                "load the model with transformers, and use DePass(model)"
            )
        module = inner
    if id(module) not in done:
        if "forward" in vars(module):
            raise ModelError(
                f"the forward of a {type(module).__name__} was replaced, so the model cannot be read from the bridge; "
                "load the model with transformers, and use DePass(model)"
            )
        unwrapped = done[id(module)] = copy.copy(module)
        for name, value in vars(module).items():
            if isinstance(value, dict):  # parameters, buffers, hooks: later entries must not appear in both modules
                vars(unwrapped)[name] = copy.copy(value)
        if isinstance(unwrapped, nn.Linear) and "bias" in unwrapped._buffers:  # zeros that the bridge added
            del unwrapped._buffers["bias"]  # DePass would treat it as a source and give it a share in the MLPs
            unwrapped.register_parameter("bias", None)
        for name, child in module._modules.items():
            unwrapped._modules[name] = None if child is None else _unwrapped(child, done)
    return done[id(module)]


@torch.no_grad()
def _must_agree(bridge: Any, dp: DePass) -> None:
    """Refuse a bridge whose logits differ from those of the model that was read from it."""
    bound = dp.bound
    ids = torch.arange(_PROBE, device=dp.model.get_input_embeddings().weight.device)[None] % bound.vocab_size
    theirs, ours = bridge(ids, return_type="logits"), dp.model(ids, use_cache=False).logits
    difference, size = float((theirs - ours).abs().max()), float(ours.abs().max())
    if not difference <= bound.tolerance * size:
        raise ModelError(
            f"the bridge's logits differ from its model's by {difference:.1e} (largest logit {size:.1e}); the weights were "
            "edited only in the bridge, or this version of TransformerLens computes something else; boot a new bridge, or "
            "install TransformerLens 4.3.0"
        )
