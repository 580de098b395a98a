"""Capture: one forward pass of the model, which yields layer by layer the values that a decomposed pass freezes.

Hooks fill a trace of the current layer. When the layer ends, its trace is passed on and dropped, so no attention pattern
or hidden vector outlives its layer. The hooks are always removed and the attention implementation is always restored.
"""

from __future__ import annotations

import inspect
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import eager_mask

from ..errors import ModelError
from . import weights
from .alterations import Alteration, alterations, likely, said_of, within
from .bound import MLP, BoundModel, Norm
from .check import Seen, activations, differences, first_miss, last_differences, limit, mixed
from .multimodal import must_read_ids_alone
from .packing import Packing, first_positions
from .positions import fresh
from .streaming import streamed
from .trace import NORMS, Trace

ATTENTION = "depass"
_at_work: dict[nn.Module, LayerCapture] = {}  # by attention module, while a pass runs
running = threading.RLock()  # held during a pass
Hook = TypeVar("Hook", bound=Callable[..., Any])
Carry = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # of queries, keys and values
# of the values [B, K, T, d], the output [B, T, H, d] and the pattern [B, H, T, T]
Watch = Callable[[nn.Module, Tensor, Tensor, Tensor], None]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The family's own eager attention; its pattern is captured for the current layer."""
    packing, carry, mask = _packing.get(), _carry.get(), attention_mask
    if carry is not None:
        query, key, value = carry(module, query, key, value)
    _refuse_chosen_keys(module, options)
    if packing is not None:
        query, key, value = (packing.spread(each) for each in (query, key, value))
        mask = None if mask is None else packing.mask(mask)
    if mask is None:  # made for an implementation that reads a missing mask as a causal one
        mask = _causal(module, query, key)
    if getattr(module, "reorder_and_upcast_attn", False):  # GPT-2's other eager attention
        upcast: Any = module._upcast_and_reordered_attn
        output, pattern = upcast(query, key, value, mask)
    else:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        _refuse_unknown_extras(eager, module)
        output, pattern = eager(module, query, key, value, mask, **options)
    if module in _at_work:
        layer, sinks = _at_work[module], _at_work[module].modules.sinks
        given = options.get("s_aux") if sinks is None else sinks
        if layer.seen is not None and given is not None:
            inside = sinks_inside(query, key, mask, pattern, given, options["scaling"])
            layer.seen.sinks_differ = inside is not None and inside != (sinks is None)
        if sinks is not None:
            pattern = pattern * sink_scale(query, key, mask, pattern, sinks, options["scaling"])
        layer.attention(pattern, value)
    watch = _watch.get()
    if watch is not None:
        watch(module, value, output, pattern)
    return output if packing is None else packing.gather(output), pattern


# what eager attention functions take besides queries, keys, values and the mask: all of it is part of the pattern
_KNOWN = {"scaling", "dropout", "softcap", "sliding_window", "position_bias", "head_mask"}


def _refuse_unknown_extras(eager: Callable[..., Any], module: nn.Module) -> None:
    """Raise a ModelError where a family's attention function takes something that may act behind the pattern."""
    unknown = _extras(eager) - _KNOWN
    if unknown:
        raise ModelError(
            f"the attention function of {type(module).__name__} takes {', '.join(sorted(unknown))}, of which DePass does "
            "not know what it does to the pattern"
        )


def _refuse_chosen_keys(module: nn.Module, options: dict[str, Any]) -> None:
    """Raise a ModelError where a model chooses each query's keys (sparse attention).

    It puts them into the mask of transformers' own implementations; any other one gets their indices and has to do it.
    """
    given = [name for name, value in options.items() if name.endswith("indices") and value is not None]
    if given:
        raise ModelError(
            f"the attention of {type(module).__name__} chooses some keys for each query ({', '.join(given)}: sparse "
            "attention), which DePass does not support"
        )


@cache
def _extras(eager: Callable[..., Any]) -> frozenset[str]:
    """The named parameters of an attention function behind the first five."""
    parameters = list(inspect.signature(eager).parameters.values())[5:]
    return frozenset(each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD)


def sink_scale(
    query: Tensor, key: Tensor, mask: Tensor | None, pattern: Tensor, sinks: Tensor, scaling: float
) -> Tensor:
    """What an attention sink behind the pattern leaves of a head's output, ``σ(logsumexp(logits) - sink)`` ``[B, H, T, 1]``.

    Args:
        query, key: ``[B, H, T, d]`` and ``[B, K, T, d]``.
        mask: what is added to the logits, ``[B, 1, T, T]``, or None.
        pattern: the attention pattern ``[B, H, T, T]``, without the sink.
        sinks: ``[H]``.
        scaling: the factor on the logits.
    """
    log_sum = _log_sum(query, key, mask, pattern, scaling)
    return (log_sum - sinks.to(log_sum).view(1, -1, 1, 1)).sigmoid().to(pattern.dtype)


def sinks_inside(
    query: Tensor, key: Tensor, mask: Tensor | None, pattern: Tensor, sinks: Tensor, scaling: float
) -> bool | None:
    """Whether the softmax that made a pattern has the sinks as one more logit; None where rounding hides it.

    The rows of a pattern then sum to one less the share of the sink, and otherwise to one. Arguments as for
    :func:`sink_scale`.
    """
    log_sum = _log_sum(query, key, mask, pattern, scaling)
    share = (sinks.to(log_sum).view(1, -1, 1, 1) - log_sum).exp()
    lacking = 1 - pattern.to(log_sum).sum(-1, keepdim=True)
    as_inside, as_behind = float((lacking - share).norm()), float(lacking.norm())
    if max(as_inside, as_behind) < 4 * min(as_inside, as_behind):
        return None
    return as_inside < as_behind


def _log_sum(query: Tensor, key: Tensor, mask: Tensor | None, pattern: Tensor, scaling: float) -> Tensor:
    """The logarithm of the softmax's denominator ``[B, H, T, 1]``: a logit less the logarithm of its share.

    The key with the largest share is taken. Arguments as for :func:`sink_scale`.
    """
    most, at = pattern.float().max(-1, keepdim=True)  # [B, H, T, 1]
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    chosen = keys.gather(2, at.expand(-1, -1, -1, keys.shape[-1])).to(torch.promote_types(key.dtype, torch.float32))
    logit = (query.to(chosen) * chosen).sum(-1, keepdim=True) * scaling
    if mask is not None:
        logit = logit + mask.expand(*pattern.shape).gather(3, at).to(logit)
    return logit - most.to(logit).log()


def _mask(**arguments: Any) -> Tensor | None:
    """The mask of eager attention; for prompts in one row that of padded prompts."""
    packing = _packing.get()
    mask: Tensor | None = eager_mask(**(arguments if packing is None else first_positions(packing, arguments)))
    return mask


def _causal(module: nn.Module, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask ``[1, 1, Tq, Tk]`` that implementations without an explicit one apply, or None for a single query."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == 1 or not getattr(module, "is_causal", True):
        return None
    lowest = torch.full((queries, keys), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
    return lowest.triu(keys - queries + 1)[None, None]


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)

_packing: ContextVar[Packing | None] = ContextVar("packing", default=None)  # of this thread's pass over one row
_carry: ContextVar[Carry | None] = ContextVar("carry", default=None)  # how gradients of this thread's pass flow
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)  # sees the attention of this thread's trial pass
_captured: ContextVar[frozenset[int]] = ContextVar("captured", default=frozenset())  # this thread's configs, by id


def _implementation_of_this_thread(theirs: property) -> property:
    """A config's ``_attn_implementation``: our function while this thread captures the model, otherwise the config's own.

    Setting the attribute would change it during other threads' passes, whose masks were made for another implementation.
    """

    def implementation(config: Any) -> Any:
        assert theirs.fget is not None
        return ATTENTION if id(config) in _captured.get() else theirs.fget(config)

    return property(implementation, theirs.fset, theirs.fdel, theirs.__doc__)


PretrainedConfig._attn_implementation = _implementation_of_this_thread(PretrainedConfig._attn_implementation)


def batches(
    bound: BoundModel, lengths: Sequence[int], tokens: int, each: int = 1, prompts: int | None = None
) -> Iterator[list[int]]:
    """Group prompts into passes, shortest first; yields the indices of each pass.

    Prompts whose lengths give the model another position encoding do not share a pass.

    Args:
        bound: the model.
        lengths: the prompts' numbers of tokens.
        tokens: the most tokens of one pass, padding included; a longer prompt runs alone.
        each: how many copies of a prompt a pass holds.
        prompts: the most prompts of one pass.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        full = len(batch) == prompts or length * each * (len(batch) + 1) > tokens
        if batch and (full or bound.regime(length) != bound.regime(lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def normed(bound: BoundModel, **inputs: Tensor) -> Tensor:
    """The residual stream after the final norm, ``[B, T, D]``, from a plain forward pass of the model."""
    with fresh(bound.backbone, bound.switches):
        output: Tensor = bound.backbone(**inputs, use_cache=False, return_dict=True).last_hidden_state
    return output


def packing_of_this_thread() -> Packing | None:
    """How prompts lie in the row of this thread's pass, or None where they do not lie in one row."""
    return _packing.get()


@contextmanager
def eager_with_patterns(bound: BoundModel, carry: Carry | None = None) -> Iterator[None]:
    """Inside the ``with`` block this thread's passes use our attention function, whose outputs equal eager attention's.

    Args:
        bound: the model.
        carry: a function that takes an attention module, its queries, keys and values, and gives these other gradients;
            their values stay as they are.
    """
    token = _captured.set(_captured.get() | {id(config) for config in bound.configs})
    before = _carry.set(carry)
    try:
        yield
    finally:
        _carry.reset(before)
        _captured.reset(token)


@contextmanager
def watched(configs: Sequence[Any], watch: Watch) -> Iterator[None]:
    """Inside the ``with`` block this thread's passes use our attention function, and ``watch`` sees each call.

    Args:
        configs: the configs of a model's modules.
        watch: a function that is called with the attention module, its values, its output and its pattern.
    """
    refuse_nested()
    token = _captured.set(_captured.get() | {id(config) for config in configs})
    before = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(before)
        _captured.reset(token)


@contextmanager
def in_one_row(packing: Packing) -> Iterator[None]:
    """Inside the ``with`` block this thread's passes are over the row of ``packing``, if its prompts lie in one."""
    token = _packing.set(packing if packing.packed else None)
    try:
        yield
    finally:
        _packing.reset(token)


def refuse_nested() -> None:
    """Raise a ModelError where an attribution is already running in this thread."""
    if _at_work or _carry.get() is not None:
        raise ModelError("an attribution is already running in this thread; start the next one after it ends")


def of_this_thread(hook: Hook) -> Hook:
    """A hook that ignores calls from other threads than the one that created its owner."""

    @wraps(hook)
    def guarded(self: Any, *args: Any) -> Any:  # torch may drop the keyword arguments while the hook is removed
        return hook(self, *args) if threading.get_ident() == self.thread else None

    return guarded  # type: ignore[return-value]


# heads that depass.masking switches off, by output projection and thread: ``[B, H]``, per prompt of a pass or B = 1 for all
masked_heads: dict[tuple[nn.Module, int], Tensor] = {}


class Capture(ABC):
    """One forward pass of a model's backbone over prompts; a subclass implements :meth:`layer`.

    Prompts of different lengths lie in one row, if the model takes positions; otherwise they are padded on the right, where
    causal attention ignores the padding. ``P`` does not count it.

    Args:
        bound: the model.
        prompts: the token ids of ``B`` prompts.
        layers: the layers, consecutive and at least one, for which :meth:`layer` is called.
        with_gate_total: whether traces hold the model's own pre-activations.

    Attributes:
        stream: after :meth:`run`, the residual stream ``[P, D]`` at the output of the last of ``layers``.
        normed: after :meth:`run`, the backbone's output ``[P, D]`` after its final norm.
        altered: by prompt, what makes the model compute something else than its weights say.
    """

    stream: Tensor
    normed: Tensor
    altered: dict[int, str]
    alterations: list[Alteration]

    def __init__(
        self, bound: BoundModel, prompts: Sequence[Sequence[int]], layers: range, with_gate_total: bool = False
    ) -> None:
        self.bound, self.layers, self.with_gate_total = bound, layers, with_gate_total
        self.packing = Packing(prompts, bound.takes_positions)
        self.lengths = self.packing.lengths
        self.reading: int | None = None  # the layer whose trace is being read

    @abstractmethod
    def layer(self, index: int, trace: Trace) -> None:
        """Called when a layer ends; the trace may be read only during the call."""

    def run(self) -> None:
        """Run the model. Layers are checked at their first run; those of a model with hooks, at every run.

        Raises:
            ModelError: an attribution is already running in this thread, the model does not call transformers' attention
                interface, or a layer does not compute what the family says.
        """
        bound = self.bound
        with running, ExitStack() as stack:  # attributions of several threads take turns
            refuse_nested()
            self.altered, self.alterations = {}, alterations(bound)
            if bound.is_wrapped and not self.alterations and self.is_checked(0):
                with nullcontext() if bound.stream_to is None else streamed(bound, bound.stream_to):
                    must_read_ids_alone(bound)
            stack.enter_context(eager_with_patterns(bound))
            layers = [LayerCapture(self, index, self.is_checked(index)) for index in self.layers]
            for layer in layers:
                layer.hook(stack)
            if bound.stream_to is not None:
                stack.enter_context(streamed(bound, bound.stream_to))
            stack.enter_context(in_one_row(self.packing))
            output = normed(bound, **self.packing.inputs(bound.input_device))
        self._must_have_ended(layers)
        self.normed = self.packing.flat(output)
        if self.layers[-1] + 1 == len(bound.layers):
            self.check_the_end()

    def check_the_end(self) -> None:
        """Compare the final norm and the head where there are hooks; elsewhere the scores' sum shows a difference."""
        if self.alterations:
            at, bound = self.checked_positions(), self.bound
            found = last_differences(
                bound, self.stream[at.to(self.stream.device)], self.normed[at.to(self.normed.device)]
            )
            self.judge(len(bound.layers), found, limit(bound.layers[-1], self.stream, self.normed))

    def checked_positions(self) -> Tensor:
        """The positions that the check compares: the first prompt's last or, where there are hooks, all."""
        if self.alterations:
            return torch.arange(sum(self.lengths), device="cpu")
        return torch.tensor([self.lengths[0] - 1], device="cpu")

    def is_checked(self, index: int) -> bool:
        """Whether this run checks a layer."""
        has_numbers = self.bound.device.type != "meta"
        return has_numbers and (bool(self.alterations) or index not in self.bound.checked)

    def judge(self, index: int, found: dict[str, Tensor], allowed: float) -> None:
        """Note the prompts at which a layer's steps differ from the family's, where the model has hooks.

        The number of layers stands for the final norm and the head.

        Raises:
            ModelError: the steps differ, and the model has no hooks.
        """
        bound, inside = self.bound, index < len(self.bound.layers)
        of_prompts = [found]
        if self.alterations:
            of_prompts = [dict(zip(found, each, strict=True)) for each in
                          zip(*(torch.split(steps, self.lengths) for steps in found.values()), strict=True)]  # fmt: skip
        for prompt, steps in enumerate(of_prompts):
            miss = first_miss({step: float(each.max()) for step, each in steps.items()}, allowed)
            if miss is None:
                continue
            said = f"{f'layer {index}' if inside else 'the model'}: {miss.said(bound, index)}"
            if not self.alterations:
                raise ModelError(f"{bound.name} is not what its depass.Family says; {said}; correct the family")
            if prompt not in self.altered:
                cause = likely(self.alterations, bound, index if inside else None)
                self.altered[prompt] = f"{said}, which may come from this: {cause}"
        if not self.altered and all(bool(steps.isfinite().all()) for steps in found.values()):
            bound.checked.add(index)

    def _must_have_ended(self, layers: Sequence[LayerCapture]) -> None:
        silent = [layer.index for layer in layers if not layer.ended]
        if silent:
            if self.alterations:
                raise ModelError(
                    f"{self.bound.name} did not run layer {silent[0]} past DePass's hooks; {said_of(self.alterations)}"
                )
            count = getattr(self.bound.model.config.get_text_config(), "num_hidden_layers", None)
            raise ModelError(
                f"{self.bound.name} did not run layer {silent[0]}: it holds {len(self.bound.layers)} layers, and its config "
                f"says num_hidden_layers={count}; set model.config.num_hidden_layers, or remove the layers that do not run"
            )


def routing_of(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of an experts module: its input ``[P, D]``, the chosen experts ``[P, k]``, and the router's weights."""
    x, *others = (*args, *kwargs.values())
    chosen, weight = sorted(others[:2], key=torch.is_floating_point)
    return x, chosen, weight


class Check(Capture):
    """A pass that only compares layers with the family."""

    def layer(self, index: int, trace: Trace) -> None:
        """Nothing is read of a layer."""


class LayerCapture:
    """The hooks of one layer: they fill its trace, which is passed on and dropped when the layer ends."""

    def __init__(self, run: Capture, index: int, checked: bool) -> None:
        self.run, self.index, self.modules = run, index, run.bound.layers[index]
        self.seen = Seen() if checked else None  # what the check reads, until the layer ends
        self.ended = False
        self.thread = threading.get_ident()  # other threads may run the model meanwhile
        self._trace: Trace | None = None

    def hook(self, stack: ExitStack) -> None:
        """Register the hooks; they are removed when the stack closes."""
        modules = self.modules
        norms = {name: norm for name in NORMS if (norm := getattr(modules, name)) is not None}
        _at_work[modules.attention] = self
        stack.callback(_at_work.pop, modules.attention)
        hooks = [
            modules.module.register_forward_pre_hook(self.begin, with_kwargs=True),
            modules.module.register_forward_hook(self.end),
            modules.output.module.register_forward_pre_hook(self.mixed),
            *(norm.module.register_forward_pre_hook(partial(self.norm, name, norm)) for name, norm in norms.items()),
        ]
        if modules.mix_gate is not None:
            hooks.append(modules.mix_gate.module.register_forward_hook(self.mix_gate))
        if modules.mix_norm is not None:
            hooks.append(modules.mix_norm.module.register_forward_pre_hook(self.mix_norm))
        if modules.mlp is not None:
            hooks += self._of_mlp(modules.mlp)
        if modules.experts is not None:
            hooks.append(modules.experts.module.register_forward_pre_hook(self.routed, with_kwargs=True))
            if self.seen is not None:
                hooks.append(modules.experts.module.register_forward_hook(self.experts))
                around = str(self.run.bound.family.experts).rpartition(".")[0]
                if around:
                    hooks.append(modules.module.get_submodule(around).register_forward_hook(self.block))
        if self.seen is not None and weights.rounds_inputs(modules.value.module):
            hooks.append(modules.value.module.register_forward_pre_hook(self.read_by_value))
        for hook in hooks:
            stack.callback(hook.remove)

    def _of_mlp(self, mlp: MLP) -> list[RemovableHandle]:
        hooks = [mlp.down.module.register_forward_pre_hook(self.hidden)]
        if mlp.weight is not None:
            hooks.append(mlp.weight.register_forward_hook(self.mlp_weight))
        if self.run.with_gate_total or self.seen is not None:
            hooks.append(mlp.gate.module.register_forward_hook(self.gate))
        if self.seen is not None:
            experts = self.modules.experts
            inside = set() if experts is None else set(activations(experts.module))
            hooks += [
                each.register_forward_pre_hook(self.activation, with_kwargs=True)
                for each in activations(self.modules.module) if each not in inside
            ]  # fmt: skip
        return hooks

    @property
    def trace(self) -> Trace:
        """The trace of the current layer."""
        assert self._trace is not None
        return self._trace

    @of_this_thread
    def begin(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        """Capture the residual stream at the layer's input."""
        if self.run.reading is not None:
            raise ModelError(
                f"a callback (progress= or on_state=) ran {self.run.bound.name} after layer {self.run.reading}; run the "
                "model after the attribution"
            )
        self._trace = Trace(self.run.packing.flat(args[0] if args else kwargs["hidden_states"]))

    @of_this_thread
    def norm(self, name: str, norm: Norm, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Capture the scale of a norm's input."""
        self.trace.scales[name] = norm.scale(self.run.packing.flat(args[0]), self.run.bound.state_dtype)

    def attention(self, pattern: Tensor, values: Tensor) -> None:
        """Capture the attention pattern ``[B, H, T, T]``; a call of the module outside its layer is ignored."""
        if self._trace is None or threading.get_ident() != self.thread:
            return
        off = masked_heads.get((self.modules.output.module, self.thread))
        if off is not None:  # a masked head passes no values on
            pattern = pattern.masked_fill(off.to(pattern.device)[:, :, None, None], 0)
        self._trace.pattern = pattern
        if self.seen is not None:
            self.seen.values = self.run.packing.of_padded(values.transpose(1, 2)).flatten(1)
            self.seen.mixed = self.run.packing.of_padded(mixed(pattern, values))

    @of_this_thread
    def mixed(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Capture the input of the attention's output projection."""
        self.trace.mixed = self.run.packing.flat(args[0])

    @of_this_thread
    def mix_gate(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Capture the gate on what the heads mix."""
        assert self.modules.mix_gate is not None
        gate = self.modules.mix_gate.select_output(self.run.packing.flat(output)).sigmoid()
        mixed = self.modules.output.shape[1]
        self._scale_mix(gate.repeat_interleave(mixed // gate.shape[1], 1))  # one number a head, or one a channel

    @of_this_thread
    def mix_norm(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Capture the scale and the weight of the norm on what the heads mix."""
        norm, x = self.modules.mix_norm, self.run.packing.flat(args[0])
        assert norm is not None
        scale = norm.scale(x, self.run.bound.state_dtype)[:, None].expand(-1, x.shape[1])
        self._scale_mix(norm.weighted(scale))

    def _scale_mix(self, scale: Tensor) -> None:
        before = self.trace.mix_scale
        self.trace.mix_scale = scale if before is None else before * scale

    @of_this_thread
    def hidden(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Capture the input of the down projection."""
        self.trace.hidden = self.run.packing.flat(args[0])

    @of_this_thread
    def mlp_weight(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Capture what multiplies the output of the MLP beside the experts."""
        self.trace.mlp_weight = self.run.packing.flat(output).sigmoid()[:, 0]

    @of_this_thread
    def routed(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture the input of the experts, which ones each position chose, and the router's weights."""
        x, chosen, weight = routing_of(args, kwargs)
        trace, flat = self.trace, self.run.packing.flat
        trace.routed, trace.chosen, trace.chosen_weights = flat(x), flat(chosen), flat(weight)

    @of_this_thread
    def experts(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Capture the output of the experts."""
        if self.seen is not None:
            self.seen.experts = self.run.packing.flat(output)

    @of_this_thread
    def block(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Capture the output of the module around the experts."""
        output = output[0] if isinstance(output, tuple) else output
        if self.seen is not None and isinstance(output, Tensor) and output.shape[-1] == self.modules.output.shape[0]:
            self.seen.block = self.run.packing.flat(output)

    @of_this_thread
    def gate(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Capture the pre-activations."""
        gate = self._mlp.gate.select_output(self.run.packing.flat(output))
        if self.run.with_gate_total:
            self.trace.gate_total = gate
        if self.seen is not None:
            self.seen.gate, self.seen.read_by_gate = gate, self.run.packing.flat(args[0])

    @property
    def _mlp(self) -> MLP:
        assert self.modules.mlp is not None
        return self.modules.mlp

    @of_this_thread
    def read_by_value(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Capture the input of the value projection, whose kernel rounds it."""
        if self.seen is not None:
            self.seen.read_by_value = self.run.packing.flat(
                args[0].flatten(0, -2)
            )  # latent vectors are [B, 1, T, rank]

    @of_this_thread
    def activation(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        """Capture the input of an activation function, if it has the width of the pre-activations."""
        given = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        if self.seen is not None and given is not None and given.shape[-1] == self._mlp.gate.shape[0]:
            self.seen.activated.append(self.run.packing.flat(given))

    @of_this_thread
    def end(self, _: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        """Capture the residual stream at the layer's output, and pass the trace on."""
        trace, self._trace = self.trace, None
        self._must_be_whole(trace)
        trace.after = self.run.packing.flat(output[0] if isinstance(output, tuple) else output)
        self._check(trace)
        self.ended = True
        self.run.stream = trace.after
        self.run.reading = self.index
        try:
            self.run.layer(self.index, trace)
        finally:
            self.run.reading = None

    def _check(self, trace: Trace) -> None:
        """Compare the layer with its family; see :mod:`depass.models.check`."""
        seen, self.seen = self.seen, None
        if seen is None:
            return
        if self.index > self.run.layers[0]:
            seen.before = self.run.stream
        at = self.run.checked_positions()
        allowed = limit(self.modules, trace.stream, trace.hidden, seen.values, seen.gate)
        self.run.judge(self.index, differences(self.run.bound, self.index, trace, seen, at), allowed)

    def _must_be_whole(self, trace: Trace) -> None:
        name, index = self.run.bound.name, self.index
        found = self.run.alterations
        why = f"; {said_of(likely_here)}" if (likely_here := within(found, self.run.bound, self.modules.module)) else ""
        if trace.pattern is None:
            raise ModelError(
                f"{name}: the attention of layer {index} does not call transformers' AttentionInterface, which DePass "
                f"needs{why}"
            )
        if trace.hidden is None and self.modules.mlp is not None:
            raise ModelError(f"{name}: the down projection of layer {index} did not run, which DePass needs{why}")
        if trace.chosen is None and self.modules.experts is not None:
            raise ModelError(f"{name}: the experts of layer {index} did not run, which DePass needs{why}")
        silent = [norm for norm in NORMS if getattr(self.modules, norm) is not None and norm not in trace.scales]
        silent += ["mix_norm" for norm in (self.modules.mix_norm,) if norm is not None and trace.mix_scale is None]
        if silent:
            raise ModelError(f"{name}: the {silent[0]} of layer {index} did not run; correct the model's depass.Family")
