"""Running a model once and handing out, layer by layer, what a decomposed pass freezes.

Hooks only fill a small trace of the layer at hand; when the layer is done its trace is handed on and dropped, so nothing
of the size of a pattern or a hidden vector outlives its layer. Whatever happens, the hooks are taken out and the attention
implementation is put back.
"""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import eager_mask

from ..errors import ModelError
from .bound import BoundModel, Norm
from .streaming import streamed
from .trace import NORMS, Trace

ATTENTION = "depass"
_at_work: dict[nn.Module, LayerCapture] = {}  # by attention module, while a pass runs
running = threading.RLock()  # held while a pass runs: attributions of several threads take turns
Hook = TypeVar("Hook", bound=Callable[..., None])


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The family's own eager attention, whose pattern is kept for the layer at hand."""
    if mask is None:  # made for an implementation that takes "no mask" for a causal one
        mask = _causal(module, query, key)
    if getattr(module, "reorder_and_upcast_attn", False):  # GPT-2's other eager attention
        upcast: Any = module._upcast_and_reordered_attn
        output, pattern = upcast(query, key, value, mask)
    else:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        output, pattern = eager(module, query, key, value, mask, **options)
    if module in _at_work:
        _at_work[module].attention(pattern)
    return output, pattern


def _causal(module: nn.Module, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask ``[1, 1, Tq, Tk]`` that implementations without an explicit one apply, or None for a single query."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == 1 or not getattr(module, "is_causal", True):
        return None
    lowest = torch.full((queries, keys), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
    return lowest.triu(keys - queries + 1)[None, None]


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)

_captured: ContextVar[frozenset[int]] = ContextVar("captured", default=frozenset())  # this thread's configs, by id


def _implementation_of_this_thread(theirs: property) -> property:
    """A config's ``_attn_implementation``: ours where this thread captures the model, else what it is.

    Setting the attribute instead would change it in the middle of other threads' passes, whose masks were made for another
    implementation.
    """

    def implementation(config: Any) -> Any:
        assert theirs.fget is not None
        return ATTENTION if id(config) in _captured.get() else theirs.fget(config)

    return property(implementation, theirs.fset, theirs.fdel, theirs.__doc__)


PretrainedConfig._attn_implementation = _implementation_of_this_thread(PretrainedConfig._attn_implementation)


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
    """``[B, T, D]``: the residual stream after the final norm, of the model's own pass alone."""
    output: Tensor = bound.backbone(**inputs, use_cache=False, return_dict=True).last_hidden_state
    return output


@contextmanager
def eager_with_patterns(bound: BoundModel) -> Iterator[None]:
    """Within it, in this thread, the model runs on our attention function, whose outputs are exactly the eager ones."""
    token = _captured.set(_captured.get() | {id(config) for config in bound.configs})
    try:
        yield
    finally:
        _captured.reset(token)


def of_this_thread(hook: Hook) -> Hook:
    """A hook that passes by unseen where another thread runs its module than the one that made the hook's owner."""

    @wraps(hook)
    def guarded(self: Any, *args: Any) -> None:  # torch may drop the keyword arguments while a hook is taken out
        if threading.get_ident() == self.thread:
            hook(self, *args)

    return guarded  # type: ignore[return-value]


# ``[B, H]`` by output projection and thread: heads that depass.masking has switched off, of each prompt of a pass or of all
masked_heads: dict[tuple[nn.Module, int], Tensor] = {}


class Capture(ABC):
    """One run of a model's backbone on prompts. A subclass says what it does with each layer's trace.

    The prompts are padded on the right, where causal attention sees no padding, and ``P`` counts none of it.

    Args:
        bound: the model.
        prompts: ``B`` prompts' token ids.
        layers: a run of layers, at least one; of these :meth:`layer` is called.
        with_gate_total: whether traces hold the model's own pre-activations.

    Attributes:
        stream: after :meth:`run`, the residual stream after the last of ``layers``, ``[P, D]``.
        normed: after :meth:`run`, the backbone's output after its final norm, ``[P, D]``.
    """

    stream: Tensor
    normed: Tensor

    def __init__(
        self, bound: BoundModel, prompts: Sequence[Sequence[int]], layers: range, with_gate_total: bool = False
    ) -> None:
        self.bound, self.layers, self.with_gate_total = bound, layers, with_gate_total
        self.ids, self.pack = padded(prompts), _Packer([len(prompt) for prompt in prompts])
        self.reading: int | None = None  # the layer whose trace is being looked at

    @abstractmethod
    def layer(self, index: int, trace: Trace) -> None:
        """A layer is done. The trace may be read only during the call."""

    def run(self) -> None:
        """Run the model.

        Raises:
            ModelError: an attribution is already at work in this thread, or the model does not call transformers' attention
                interface.
        """
        bound = self.bound
        with (
            running,
            ExitStack() as stack,
        ):  # other threads' attributions wait
            if _at_work:
                raise ModelError("an attribution is already at work in this thread; start another one after it")
            stack.enter_context(eager_with_patterns(bound))
            for index in self.layers:
                LayerCapture(self, index).hook(stack)
            if bound.stream_to is not None:
                stack.enter_context(streamed(bound, bound.stream_to))
            output = bound.backbone(
                input_ids=self.ids.to(bound.input_device), use_cache=False, return_dict=True
            ).last_hidden_state
        self.normed = self.pack(output)


class LayerCapture:
    """The hooks of one layer, which fill its trace; when the layer is done the trace is handed on and dropped."""

    def __init__(self, run: Capture, index: int) -> None:
        self.run, self.index, self.modules = run, index, run.bound.layers[index]
        self.thread = threading.get_ident()  # other threads may run the model meanwhile
        self._trace: Trace | None = None

    def hook(self, stack: ExitStack) -> None:
        """Put the hooks in until the stack closes."""
        modules = self.modules
        norms = {name: norm for name in NORMS if (norm := getattr(modules, name)) is not None}
        _at_work[modules.attention] = self
        stack.callback(_at_work.pop, modules.attention)
        hooks = [
            modules.module.register_forward_pre_hook(self.begin, with_kwargs=True),
            modules.module.register_forward_hook(self.end),
            modules.output.module.register_forward_pre_hook(self.mixed),
            modules.down.module.register_forward_pre_hook(self.hidden),
            *(norm.module.register_forward_pre_hook(partial(self.norm, name, norm)) for name, norm in norms.items()),
        ]
        if self.run.with_gate_total:
            hooks.append(modules.gate.module.register_forward_hook(self.gate))
        for hook in hooks:
            stack.callback(hook.remove)

    @property
    def trace(self) -> Trace:
        """Of the layer at work."""
        assert self._trace is not None
        return self._trace

    @of_this_thread
    def begin(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        """The stream comes in."""
        if self.run.reading is not None:
            raise ModelError(
                f"{self.run.bound.name} is run by what is called after layer {self.run.reading}; run it after the "
                "attribution"
            )
        self._trace = Trace(self.run.pack(args[0] if args else kwargs["hidden_states"]))

    @of_this_thread
    def norm(self, name: str, norm: Norm, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """A norm reads its input, whose scale is frozen."""
        self.trace.scales[name] = norm.scale(self.run.pack(args[0]), self.run.bound.state_dtype)

    def attention(self, pattern: Tensor) -> None:
        """The attention has its pattern ``[B, H, T, T]``. A module that is called on its own is no layer at work."""
        if self._trace is None or threading.get_ident() != self.thread:
            return
        off = masked_heads.get((self.modules.output.module, self.thread))
        if off is not None:  # a head without an output passes no values on
            pattern = pattern.masked_fill(off.to(pattern.device)[:, :, None, None], 0)
        self._trace.pattern = pattern

    @of_this_thread
    def mixed(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """The attention's output projection reads."""
        self.trace.mixed = self.run.pack(args[0])

    @of_this_thread
    def hidden(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """The down projection reads."""
        self.trace.hidden = self.run.pack(args[0])

    @of_this_thread
    def gate(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """The gate has its pre-activations."""
        self.trace.gate_total = self.modules.gate.select_output(self.run.pack(output))

    @of_this_thread
    def end(self, _: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        """The layer is done."""
        trace, self._trace = self.trace, None
        self._must_be_whole(trace)
        trace.after = self.run.pack(output[0] if isinstance(output, tuple) else output)
        if self.index == self.run.layers[-1]:
            self.run.stream = trace.after
        self.run.reading = self.index
        try:
            self.run.layer(self.index, trace)
        finally:
            self.run.reading = None

    def _must_be_whole(self, trace: Trace) -> None:
        name, index = self.run.bound.name, self.index
        if trace.pattern is None:
            raise ModelError(f"{name}: the attention of layer {index} does not call transformers' AttentionInterface")
        if trace.hidden is None:
            raise ModelError(f"{name}: the down projection of layer {index} did not run")
        silent = [norm for norm in NORMS if getattr(self.modules, norm) is not None and norm not in trace.scales]
        if silent:
            raise ModelError(f"{name}: the {silent[0]} of layer {index} did not run")


class _Packer:
    """Turns padded ``[B, T, ...]`` or ``[B·T, ...]`` into packed ``[P, ...]``."""

    def __init__(self, lengths: Sequence[int]) -> None:
        longest = max(lengths)
        self.where = torch.cat([b * longest + torch.arange(n, device="cpu") for b, n in enumerate(lengths)])
        self._moved: dict[torch.device, Tensor] = {}

    def __call__(self, padded: Tensor) -> Tensor:
        flat = padded if padded.dim() == 2 else padded.flatten(0, 1)
        if len(self.where) == len(flat):
            return flat
        if flat.device not in self._moved:
            self._moved[flat.device] = self.where.to(flat.device)
        return flat.index_select(0, self._moved[flat.device])
