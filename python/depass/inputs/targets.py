"""What is scored: tokens, contrasts of two tokens, directions of one's own, at positions of the prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from depass_kernels.ops import FLOATS

from ..checks import integer
from ..errors import TargetError
from ..models.bound import BoundModel

TargetKind = Literal["token", "contrast", "direction", "probe"]


@dataclass(frozen=True)
class TopK:
    """The model's own ``k`` most likely next tokens at a position."""

    k: int
    position: int = -1


@dataclass(frozen=True)
class Token:
    """One token, as a string or an id, as the next token of a position."""

    token: str | int
    position: int = -1


@dataclass(frozen=True)
class Contrast:
    """The logit of ``token`` minus that of ``other``."""

    token: str | int
    other: str | int
    position: int = -1


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction ``w`` ``[D]`` of one's own: after the final norm, where the unembedding lives, or a layer's linear probe.

    Args:
        w: ``[D]``.
        position: where it is read.
        label: its text.
        layer: None: after the final norm. A layer: on the raw residual stream that enters it, or after the last layer where
            it is the number of layers.
        intercept: a probe's, kept beside the scores: they add up to ``w · x``, and its verdict is ``w · x + intercept``.
    """

    w: Tensor = field(repr=False)
    position: int = -1
    label: str = "direction"
    layer: int | None = None
    intercept: float = 0.0


@dataclass(frozen=True)
class Target:
    """What one row of scores adds up to.

    Attributes:
        label: its text.
        kind: ``token``, ``contrast``, ``direction`` or ``probe``.
        position: the position whose next token is scored, from 0.
        token_ids: the token's id, the two of a contrast, or none.
        layer: a probe's.
        intercept: a probe's; in no score.
    """

    label: str
    kind: TargetKind
    position: int
    token_ids: tuple[int, ...] = ()
    layer: int | None = None
    intercept: float = 0.0


class Asked(NamedTuple):
    """A checked target; ``k`` of them where ``ids`` is None, to be filled from the model's logits."""

    kind: TargetKind
    position: int
    ids: tuple[int, ...] | None = ()
    k: int = 0
    w: Tensor | None = None
    label: str = ""
    layer: int | None = None
    intercept: float = 0.0


def check(target: Any, length: int, layers: range, tokenizer: Any, bound: BoundModel) -> list[Asked]:
    """Turn what a caller asked for into checked targets, before any work is done.

    Args:
        target: what was asked for.
        length: of the prompt.
        layers: those at whose input the state is decomposed, and one past the last.
        tokenizer: for targets given as text; may be None.
        bound: the model.

    Raises:
        TargetError: a string that is not one token, an id out of range, a position that the prompt does not have.
    """
    asked = target if isinstance(target, (list, tuple)) else [target]
    if not asked:
        raise TargetError("target=[] names no target; leave it out for the model's own next token")
    return [_check(one, length, layers, tokenizer, bound) for one in asked]


def _check(target: Any, length: int, layers: range, tokenizer: Any, bound: BoundModel) -> Asked:
    if target is None:
        target = TopK(1)
    elif isinstance(target, str) or (hasattr(target, "__index__") and not isinstance(target, bool)):
        target = Token(target)
    if not isinstance(target, (TopK, Token, Contrast, Direction)):
        raise TargetError(
            f"a target is None, a string, an id, TopK, Token, Contrast or Direction, got {type(target).__name__}"
        )
    position = integer("a position", target.position, TargetError)
    if not -length <= position < length:
        raise TargetError(f"position {position} is outside of the prompt's {length} tokens ({-length} to {length - 1})")
    position %= length
    if isinstance(target, TopK):
        k = integer("k of TopK", target.k, TargetError)
        if not 1 <= k <= bound.vocab_size:
            raise TargetError(f"TopK({k}): k must be from 1 to the vocabulary's {bound.vocab_size}")
        return Asked("token", position, None, k)
    if isinstance(target, Token):
        return Asked("token", position, (token_id(target.token, tokenizer, bound),))
    if isinstance(target, Contrast):
        ids = tuple(token_id(token, tokenizer, bound) for token in (target.token, target.other))
        return Asked("contrast", position, ids)
    return _check_direction(target, position, layers, bound.hidden_size)


def _check_direction(target: Direction, position: int, layers: range, width: int) -> Asked:
    try:
        w = torch.as_tensor(target.w)
    except (TypeError, ValueError, RuntimeError):
        raise TargetError(f"Direction's w must be {width} finite floats, got {type(target.w).__name__}") from None
    dense = w.layout == torch.strided and not w.is_meta and w.dtype in FLOATS
    if not dense or w.shape != (width,) or not bool(w.isfinite().all()):
        raise TargetError(f"Direction's w must be {width} finite floats, got {w.dtype} of shape {list(w.shape)}")
    if (
        isinstance(target.intercept, bool)
        or not isinstance(target.intercept, (int, float))
        or not math.isfinite(target.intercept)
    ):
        raise TargetError(f"Direction(intercept={target.intercept!r}) must be a finite number")
    if target.layer is None:
        if target.intercept:
            raise TargetError(f"Direction(intercept={target.intercept!r}) belongs to a probe; give it a layer")
        return Asked("direction", position, (), 0, w.detach(), str(target.label))
    layer = integer("layer of Direction", target.layer, TargetError)
    if not layers:
        raise TargetError(
            f"Direction(layer={layer}): a sweep reads no probes of inner layers, nor does a baseline; "
            "attribute(sources=...) does"
        )
    if layer not in layers:
        raise TargetError(
            f"Direction(layer={layer}): the stream is decomposed where it enters layers {layers.start} to "
            f"{layers.stop - 1} here"
        )
    return Asked("probe", position, (), 0, w.detach(), str(target.label), layer, float(target.intercept))


def token_id(token: str | int, tokenizer: Any, bound: BoundModel) -> int:
    """The id of a target token.

    Raises:
        TargetError: a string that is not exactly one token, or an id out of range.
    """
    if isinstance(token, str):
        if tokenizer is None:
            raise TargetError(f"target {token!r} needs a tokenizer: DePass(model, tokenizer); or give its token id")
        if any("\ud800" <= character <= "\udfff" for character in token):
            raise TargetError(f"target {token!r} is not text: it holds bytes that are no UTF-8")
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            parts = ", ".join(f"{tokenizer.decode([i])!r} ({i})" for i in ids)
            raise TargetError(
                f"target {token!r} is {len(ids)} tokens, not one: {parts or 'none'}; pass one of them as a string or an id"
            )
        return int(ids[0])
    token = integer("a target id", token, TargetError)
    if not 0 <= token < bound.vocab_size:
        raise TargetError(f"target id {token} is out of range: the vocabulary has {bound.vocab_size} tokens")
    return token


class Readout(NamedTuple):
    """One target's direction and the model's own number for it."""

    target: Target
    w: Tensor  # [D], in the state's dtype
    constant: float  # the head's bias, which belongs to the bias source
    logit: float  # the model's own, before any soft-capping of the head


def fill(asked: Asked, vector: Tensor, logits: Tensor, bound: BoundModel, tokenizer: Any) -> list[Readout]:
    """Give a target, other than a probe, its direction and the model's own logit; a top k comes to k of them.

    Args:
        asked: a checked target.
        vector: ``[D]``, the stream after the final norm at its position, in the state's dtype.
        logits: ``[V]``, the head's output there, in the state's dtype.
        bound: the model.
        tokenizer: for labels; may be None.
    """

    def name(token: int) -> str:
        return str(token) if tokenizer is None else tokenizer.decode([token])

    if asked.w is not None:
        w = asked.w.to(vector)
        return [Readout(Target(asked.label, asked.kind, asked.position), w, 0.0, float(w @ vector))]
    made, rows, bias = [], bound.unembedding.weight, bound.unembedding.bias
    for ids in [asked.ids] if asked.ids is not None else [(int(i),) for i in logits.topk(asked.k).indices]:
        w, logit = rows[ids[0]].to(vector), float(logits[ids[0]])
        constant = 0.0 if bias is None else float(bias[ids[0]])
        if asked.kind == "contrast":
            w, logit = w - rows[ids[1]].to(vector), logit - float(logits[ids[1]])
            constant -= 0.0 if bias is None else float(bias[ids[1]])
        label = " - ".join(name(token) for token in ids)
        made.append(Readout(Target(label, asked.kind, asked.position, ids), w.detach(), constant, logit))
    return made
