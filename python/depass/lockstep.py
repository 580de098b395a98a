"""Running a model once and handing out, layer by layer, what a decomposed pass freezes (design: lock-step).

Hooks only fill a small trace of the layer at hand; when the layer is done its trace is handed on and dropped, so nothing
of the size of a pattern or a hidden vector outlives its layer. Whatever happens, the hooks are taken out and the attention
implementation is put back.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from .errors import ModelError
from .families import BoundModel, Layer, Norm

ATTENTION = "depass"


@dataclass
class Trace:
    """What is frozen in one layer. ``P`` positions of one prompt; scales in the state's dtype, the rest in the model's."""

    stream: Tensor  # [P, D], the residual stream at the layer's input
    pattern: Tensor | None = None  # [1, H, P, P]
    scales: dict[str, Tensor] = field(default_factory=dict)  # by norm of families.Layer: [P]
    hidden: Tensor | None = None  # [P, F]
    gate_total: Tensor | None = None  # [P, F], where asked for

    def to(self, device: torch.device) -> Trace:
        """The same trace with everything on ``device``."""
        moved = [None if t is None else t.to(device) for t in (self.pattern, self.hidden, self.gate_total)]
        scales = {name: scale.to(device) for name, scale in self.scales.items()}
        return Trace(self.stream.to(device), moved[0], scales, moved[1], moved[2])

    def copy(self) -> Trace:
        """The same numbers in memory of their own."""
        copied = [None if t is None else t.clone() for t in (self.pattern, self.hidden, self.gate_total)]
        scales = {name: scale.clone() for name, scale in self.scales.items()}
        return Trace(self.stream.clone(), copied[0], scales, copied[1], copied[2])

    def copy_from(self, other: Trace) -> None:
        """Overwrite every tensor with that of a trace of the same layer and length."""
        self.stream.copy_(other.stream)
        for mine, its in (
            (self.pattern, other.pattern),
            (self.hidden, other.hidden),
            (self.gate_total, other.gate_total),
        ):
            if mine is not None and its is not None:
                mine.copy_(its)
        for name, scale in self.scales.items():
            scale.copy_(other.scales[name])


_traces: dict[nn.Module, list[Trace]] = {}  # by attention module, while a pass runs
_running = threading.RLock()


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The family's own eager attention, whose pattern is kept for the layer at hand."""
    if getattr(module, "reorder_and_upcast_attn", False):  # GPT-2's other eager attention
        upcast: Any = module._upcast_and_reordered_attn
        output, pattern = upcast(query, key, value, mask)
    else:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        output, pattern = eager(module, query, key, value, mask, **options)
    if _traces.get(module):
        _traces[module][-1].pattern = pattern
    return output, pattern


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


@contextmanager
def eager_with_patterns(bound: BoundModel) -> Iterator[None]:
    """Within it the model runs on our attention function, whose outputs are exactly the eager ones."""
    before = [config._attn_implementation for config in bound.configs]
    try:
        for config in bound.configs:
            config._attn_implementation = ATTENTION
        yield
    finally:
        for config, implementation in zip(bound.configs, before, strict=True):
            config._attn_implementation = implementation


def run(
    bound: BoundModel,
    ids: Tensor,
    on_layer: Callable[[int, Trace], None],
    layers: range,
    with_gate_total: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the model's backbone on one prompt and call ``on_layer`` after each of ``layers``.

    Args:
        bound: the model.
        ids: ``[P]`` token ids.
        on_layer: given a layer's index and its trace, which it may read only during the call.
        layers: a run of layers, at least one.
        with_gate_total: whether the trace holds the model's own pre-activations.

    Raises:
        ModelError: an attribution is already at work in this thread, or the model does not call transformers' attention
            interface.

    Returns:
        The residual stream after the last of ``layers`` ``[P, D]``, and the backbone's output after its final norm.
    """
    last: list[Tensor] = []
    with _running, ExitStack() as stack:  # other threads wait: hooks and the attention implementation belong to a model
        if _traces:
            raise ModelError("an attribution is already at work in this thread; start another one after it")
        stack.enter_context(eager_with_patterns(bound))
        for index in layers:
            final = last if index == layers[-1] else None
            _hook_layer(stack, bound, index, on_layer, with_gate_total, final)
        device = bound.model.get_input_embeddings().weight.device
        output = bound.backbone(input_ids=ids.to(device)[None], use_cache=False, return_dict=True).last_hidden_state
    return last[0], output[0]


def _hook_layer(
    stack: ExitStack,
    bound: BoundModel,
    index: int,
    on_layer: Callable[[int, Trace], None],
    with_gate_total: bool,
    last: list[Tensor] | None,
) -> None:
    layer: Layer = bound.layers[index]
    open_trace: list[Trace] = []  # empty, or the one trace of the layer at work

    def begin(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        open_trace[:] = [Trace(stream[0])]

    def norm(name: str, norm: Norm) -> Callable[..., None]:
        def capture(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            open_trace[0].scales[name] = norm.scale(args[0][0], bound.state_dtype)

        return capture

    def hidden(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        open_trace[0].hidden = args[0].reshape(-1, args[0].shape[-1])

    def gate(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        open_trace[0].gate_total = layer.gate.select_output(output.reshape(-1, output.shape[-1]))

    def end(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        trace = open_trace.pop()
        if trace.pattern is None:
            raise ModelError(
                f"{bound.name}: the attention of layer {index} does not call transformers' AttentionInterface"
            )
        if trace.hidden is None:
            raise ModelError(f"{bound.name}: the down projection of layer {index} did not run")
        on_layer(index, trace)
        if last is not None:
            last.append((output[0] if isinstance(output, tuple) else output)[0])

    def forget() -> None:
        del _traces[layer.attention]

    _traces[layer.attention] = open_trace
    stack.callback(forget)
    stack.callback(layer.module.register_forward_pre_hook(begin, with_kwargs=True).remove)
    stack.callback(layer.module.register_forward_hook(end).remove)
    stack.callback(layer.down.module.register_forward_pre_hook(hidden).remove)
    for name in ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm"):
        bound_norm = getattr(layer, name)
        if bound_norm is not None:
            stack.callback(bound_norm.module.register_forward_pre_hook(norm(name, bound_norm)).remove)
    if with_gate_total:
        stack.callback(layer.gate.module.register_forward_hook(gate).remove)
