"""What is scored: tokens, contrasts of two tokens, directions of one's own, at positions of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .errors import TargetError
from .families import BoundModel


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
    """A direction ``w`` ``[D]`` of one's own, which lives where the unembedding does: after the final norm."""

    w: Tensor = field(repr=False)
    position: int = -1
    label: str = "direction"


@dataclass(frozen=True)
class Target:
    """What one row of scores adds up to.

    Attributes:
        label: its text.
        kind: ``token``, ``contrast`` or ``direction``.
        position: the position whose next token is scored, from 0.
        token_ids: the token's id, the two of a contrast, or none.
    """

    label: str
    kind: Literal["token", "contrast", "direction"]
    position: int
    token_ids: tuple[int, ...] = ()


class Asked(NamedTuple):
    """A checked target; ``k`` of them where ``ids`` is None, to be filled from the model's logits."""

    kind: Literal["token", "contrast", "direction"]
    position: int
    ids: tuple[int, ...] | None = ()
    k: int = 0
    w: Tensor | None = None
    label: str = ""


def check(target: Any, length: int, tokenizer: Any, bound: BoundModel) -> list[Asked]:
    """Turn what a caller asked for into checked targets, before any work is done.

    Raises:
        TargetError: a string that is not one token, an id out of range, a position that the prompt does not have.
    """
    asked = target if isinstance(target, (list, tuple)) else [target]
    if not asked:
        raise TargetError("target=[] names no target; leave it out for the model's own next token")
    return [_check(one, length, tokenizer, bound) for one in asked]


def _check(target: Any, length: int, tokenizer: Any, bound: BoundModel) -> Asked:
    if target is None:
        target = TopK(1)
    elif isinstance(target, str) or (isinstance(target, int) and not isinstance(target, bool)):
        target = Token(target)
    if not isinstance(target, (TopK, Token, Contrast, Direction)):
        raise TargetError(
            f"a target is None, a string, an id, TopK, Token, Contrast or Direction, got {type(target).__name__}"
        )
    position = target.position
    if not isinstance(position, int) or isinstance(position, bool):
        raise TargetError(f"a position is an integer, got {position!r}")
    if not -length <= position < length:
        raise TargetError(f"position {position} is outside of the prompt's {length} tokens ({-length} to {length - 1})")
    position %= length
    if isinstance(target, TopK):
        if not isinstance(target.k, int) or isinstance(target.k, bool) or not 1 <= target.k <= bound.vocabulary:
            raise TargetError(f"TopK({target.k!r}): k must be an integer from 1 to the vocabulary's {bound.vocabulary}")
        return Asked("token", position, None, target.k)
    if isinstance(target, Token):
        return Asked("token", position, (token_id(target.token, tokenizer, bound),))
    if isinstance(target, Contrast):
        ids = tuple(token_id(token, tokenizer, bound) for token in (target.token, target.other))
        return Asked("contrast", position, ids)
    width = bound.head.weight.shape[1]
    try:
        w = torch.as_tensor(target.w)
    except (TypeError, ValueError, RuntimeError):
        raise TargetError(f"Direction's w must be {width} finite floats, got {type(target.w).__name__}") from None
    if w.shape != (width,) or not w.is_floating_point() or not bool(w.isfinite().all()):
        raise TargetError(f"Direction's w must be {width} finite floats, got {w.dtype} of shape {list(w.shape)}")
    return Asked("direction", position, (), 0, w.detach(), str(target.label))


def token_id(token: str | int, tokenizer: Any, bound: BoundModel) -> int:
    """The id of a target token.

    Raises:
        TargetError: a string that is not exactly one token, or an id out of range.
    """
    if isinstance(token, str):
        if tokenizer is None:
            raise TargetError(f"target {token!r} needs a tokenizer: DePass(model, tokenizer); or give its token id")
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            parts = ", ".join(f"{tokenizer.decode([i])!r} ({i})" for i in ids)
            raise TargetError(
                f"target {token!r} is {len(ids)} tokens, not one: {parts or 'none'}; pass one of them as a string or an id"
            )
        return int(ids[0])
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < bound.vocabulary:
        raise TargetError(f"target id {token!r} is out of range: the vocabulary has {bound.vocabulary} tokens")
    return token


class Readout(NamedTuple):
    """One target's direction and the model's own number for it."""

    target: Target
    w: Tensor  # [D], in the state's dtype
    constant: float  # the head's bias, which belongs to the bias source
    logit: float  # the model's own, before any soft-capping of the head


def fill(asked: Sequence[Asked], normed: Tensor, bound: BoundModel, tokenizer: Any) -> list[Readout]:
    """Give every target its direction and the model's own logit.

    Args:
        asked: checked targets.
        normed: ``[P, D]``, the stream after the final norm, in the model's dtype; read at the targets' positions only.
        bound: the model.
        tokenizer: for labels; may be None.
    """
    dtype, head = bound.state_dtype, bound.head
    bias = getattr(head, "bias", None)
    positions = sorted({one.position for one in asked})
    vectors = normed[positions].to(head.weight.device)
    logits = dict(zip(positions, head(vectors).to(dtype), strict=True))  # [V] each
    vectors_at = dict(zip(positions, vectors.to(dtype), strict=True))

    def name(token: int) -> str:
        return str(token) if tokenizer is None else tokenizer.decode([token])

    made = []
    for one in asked:
        row = logits[one.position]
        if one.w is not None:
            w = one.w.to(row)
            made.append(Readout(Target(one.label, one.kind, one.position), w, 0.0, float(w @ vectors_at[one.position])))
            continue
        for ids in [one.ids] if one.ids is not None else [(int(i),) for i in row.topk(one.k).indices]:
            w, logit = head.weight[ids[0]].to(dtype), float(row[ids[0]])
            constant = 0.0 if bias is None else float(bias[ids[0]])
            if one.kind == "contrast":
                w, logit = w - head.weight[ids[1]].to(dtype), logit - float(row[ids[1]])
                constant -= 0.0 if bias is None else float(bias[ids[1]])
            label = " - ".join(name(token) for token in ids)
            made.append(Readout(Target(label, one.kind, one.position, ids), w.detach(), constant, logit))
    return made
