"""The attention function of the package's own passes: the family's eager attention, whose pattern is kept.

While a pass runs, the configs of the model's modules name this function, in this thread alone. Context variables say what
the pass wants of it: prompts in one row, other gradients, or a look at each call.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import eager_mask

from ..errors import ModelError
from . import query_blocks
from .bound import BoundModel
from .packing import Packing, first_positions

if TYPE_CHECKING:
    from .capture import Lender, MixerCapture

ATTENTION = "depass"
at_work: dict[nn.Module, MixerCapture | Lender] = {}  # by attention module, while a pass runs
running = threading.RLock()  # held during a pass
Carry = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # of queries, keys and values
# of the values [B, K, T, d], the output [B, T, H, d] and the pattern [B, H, T, T]
Watch = Callable[[nn.Module, Tensor, Tensor, Tensor], None]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The family's own eager attention; its pattern is captured for the current layer.

    With gradients of our own it may go by blocks of queries; then there is no pattern.
    """
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
        in_blocks = None if carry is None else query_blocks.attend(eager, module, (query, key, value), mask, options)
        output, pattern = eager(module, query, key, value, mask, **options) if in_blocks is None else (in_blocks, None)
    if module in at_work:
        mixer, sinks = at_work[module], at_work[module].mixer.sinks
        given = options.get("s_aux") if sinks is None else sinks
        if mixer.seen is not None and given is not None:
            inside = sinks_inside(query, key, mask, pattern, given, options["scaling"])
            mixer.seen.sinks_differ = inside is not None and inside != (sinks is None)
        if sinks is not None:
            pattern = pattern * sink_scale(query, key, mask, pattern, sinks, options["scaling"])
        mixer.attention(pattern, value)
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


def captures_in_this_thread() -> bool:
    """Whether this thread's pass is that of an attribution, which reads attention patterns or changes gradients."""
    return bool(_captured.get())


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
    if at_work or _carry.get() is not None:
        raise ModelError("an attribution is already running in this thread; start the next one after it ends")
