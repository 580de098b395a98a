"""Running a model once and handing out, layer by layer, what a decomposed pass freezes (design: lock-step).

Hooks only fill a small trace of the layer at hand; when the layer is done its trace is handed on and dropped, so nothing
of the size of a pattern or a hidden vector outlives its layer. Whatever happens, the hooks are taken out and the attention
implementation is put back.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ..errors import ModelError
from .bound import BoundModel, Layer, Norm
from .streaming import streamed
from .trace import NORMS, Trace

ATTENTION = "depass"
_traces: dict[nn.Module, list[Trace]] = {}  # by attention module, while a pass runs
running = threading.RLock()  # held while hooks are in: other threads' passes would call them


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


def padded(prompts: Sequence[Sequence[int]]) -> Tensor:
    """Prompts as ids ``[B, T]``, padded on the right, where causal attention does not see it."""
    longest = max(map(len, prompts))
    return torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in prompts], device="cpu")


def batches(lengths: Sequence[int], tokens: int, each: int = 1, prompts: int | None = None) -> Iterator[list[int]]:
    """The indices of prompts that go together in one pass, shortest first.

    Args:
        lengths: of the prompts.
        tokens: of one pass at most, padding included; a longer prompt goes alone.
        each: how often a prompt stands in it.
        prompts: of one pass at most.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == prompts or lengths[index] * each * (len(batch) + 1) > tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def normed(bound: BoundModel, **inputs: Tensor) -> Tensor:
    """``[B, T, D]``: the stream after the final norm, of the model's own pass alone."""
    with running:  # another thread's hooks would take this pass for their own
        found: Tensor = bound.backbone(**inputs, use_cache=False, return_dict=True).last_hidden_state
    return found


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
    prompts: Sequence[Sequence[int]],
    on_layer: Callable[[int, Trace], None],
    layers: range,
    with_gate_total: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the model's backbone on prompts and call ``on_layer`` after each of ``layers``.

    The prompts are padded on the right, where causal attention sees no padding, and ``P`` counts none of it.

    Args:
        bound: the model.
        prompts: ``B`` prompts' token ids.
        on_layer: given a layer's index and its trace, which it may read only during the call.
        layers: a run of layers, at least one.
        with_gate_total: whether the trace holds the model's own pre-activations.

    Raises:
        ModelError: an attribution is already at work in this thread, or the model does not call transformers' attention
            interface.

    Returns:
        The residual stream after the last of ``layers`` ``[P, D]``, and the backbone's output after its final norm.
    """
    ids = padded(prompts)
    pack = _packer([len(prompt) for prompt in prompts])
    last: list[Tensor] = []
    busy: list[int] = []  # the layer whose trace is being looked at
    with running, ExitStack() as stack:  # other threads wait: hooks and the attention implementation belong to a model
        if _traces:
            raise ModelError("an attribution is already at work in this thread; start another one after it")
        stack.enter_context(eager_with_patterns(bound))
        for index in layers:
            final = last if index == layers[-1] else None
            _hook_layer(stack, bound, index, on_layer, pack, with_gate_total, final, busy)
        if bound.stream_to is not None:
            stack.enter_context(streamed(bound, bound.stream_to))
        output = bound.backbone(
            input_ids=ids.to(bound.input_device), use_cache=False, return_dict=True
        ).last_hidden_state
    return last[0], pack(output)


def _packer(lengths: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """What turns padded ``[B, T, ...]`` or ``[B·T, ...]`` into packed ``[P, ...]``."""
    longest = max(lengths)
    where = torch.cat([b * longest + torch.arange(length, device="cpu") for b, length in enumerate(lengths)])
    moved: dict[torch.device, Tensor] = {}

    def pack(padded: Tensor) -> Tensor:
        flat = padded if padded.dim() == 2 else padded.flatten(0, 1)
        if len(where) == len(flat):
            return flat
        if flat.device not in moved:
            moved[flat.device] = where.to(flat.device)
        return flat.index_select(0, moved[flat.device])

    return pack


def _hook_layer(
    stack: ExitStack,
    bound: BoundModel,
    index: int,
    on_layer: Callable[[int, Trace], None],
    pack: Callable[[Tensor], Tensor],
    with_gate_total: bool,
    last: list[Tensor] | None,
    busy: list[int],
) -> None:
    layer: Layer = bound.layers[index]
    open_trace: list[Trace] = []  # empty, or the one trace of the layer at work

    def begin(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        if busy:
            raise ModelError(
                f"{bound.name} is run by what is called after layer {busy[0]}; run it after the attribution"
            )
        stream = args[0] if args else kwargs["hidden_states"]
        open_trace[:] = [Trace(pack(stream))]

    def norm(name: str, norm: Norm) -> Callable[..., None]:
        def capture(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            open_trace[0].scales[name] = norm.scale(pack(args[0]), bound.state_dtype)

        return capture

    def hidden(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        open_trace[0].hidden = pack(args[0])

    def mixed(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        open_trace[0].mixed = pack(args[0])

    def gate(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        open_trace[0].gate_total = layer.gate.select_output(pack(output))

    def end(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        trace = open_trace.pop()
        if trace.pattern is None:
            raise ModelError(
                f"{bound.name}: the attention of layer {index} does not call transformers' AttentionInterface"
            )
        if trace.hidden is None:
            raise ModelError(f"{bound.name}: the down projection of layer {index} did not run")
        silent = [name for name in NORMS if getattr(layer, name) is not None and name not in trace.scales]
        if silent:
            raise ModelError(f"{bound.name}: the {silent[0]} of layer {index} did not run")
        trace.after = pack(output[0] if isinstance(output, tuple) else output)
        busy.append(index)
        try:
            on_layer(index, trace)
        finally:
            busy.pop()
        if last is not None:
            last.append(trace.after)

    def forget() -> None:
        del _traces[layer.attention]

    _traces[layer.attention] = open_trace
    stack.callback(forget)
    stack.callback(layer.module.register_forward_pre_hook(begin, with_kwargs=True).remove)
    stack.callback(layer.module.register_forward_hook(end).remove)
    stack.callback(layer.output.module.register_forward_pre_hook(mixed).remove)
    stack.callback(layer.down.module.register_forward_pre_hook(hidden).remove)
    for name in NORMS:
        bound_norm = getattr(layer, name)
        if bound_norm is not None:
            stack.callback(bound_norm.module.register_forward_pre_hook(norm(name, bound_norm)).remove)
    if with_gate_total:
        stack.callback(layer.gate.module.register_forward_hook(gate).remove)
