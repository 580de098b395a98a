"""Targets: logits or log-probabilities of tokens, differences of two logits, or directions, at positions of the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from depass_kernels.ops import FLOATS

from ..checks import Of, integer
from ..errors import TargetError
from ..models.bound import BoundModel
from .prompt import shown

TargetKind = Literal["token", "logprob", "contrast", "direction", "probe", "sum"]
_KINDS: dict[Of, TargetKind] = {"logit": "token", "logprob": "logprob", "contrast": "contrast"}
_AT_ONCE = 8192  # rows of the unembedding that are converted at once


@dataclass(frozen=True)
class TopK:
    """The model's own ``k`` most likely next tokens after ``position``."""

    k: int
    position: int = -1


@dataclass(frozen=True)
class Token:
    """The logit of one token, a string or an id, as the next token after ``position``."""

    token: str | int
    position: int = -1


@dataclass(frozen=True)
class Contrast:
    """The logit of ``token`` minus that of ``other``, as the next token after ``position``."""

    token: str | int
    other: str | int
    position: int = -1


@dataclass(frozen=True, eq=False)
class Direction:
    """A custom direction ``w``: applied after the final norm, as the unembedding is, or as a linear probe of a layer.

    Args:
        w: the direction, ``[D]``.
        position: the position at which it is applied.
        label: the text that results show for it.
        layer: None applies it after the final norm. A number applies it to the raw residual stream at the input of that
            layer, or, for the number of layers, at the output of the last layer.
        intercept: the intercept of a probe. The scores add up to ``w · x`` without it; the probe's output is
            ``w · x + intercept``.
    """

    w: Tensor = field(repr=False)
    position: int = -1
    label: str = "direction"
    layer: int | None = None
    intercept: float = 0.0


@dataclass(frozen=True)
class Target:
    """The target of one row of scores.

    Attributes:
        label: the text that results show for it.
        kind: ``token`` for a token's logit, ``logprob`` for its logit less the mean logit under the model's probabilities,
            ``contrast``, ``direction`` or ``probe``; ``sum`` for the sum over several tokens of a generated or given answer.
        position: the position whose next token is scored, from 0; of a sum, that of its last token.
        token_ids: the id of the token, the two ids of a contrast, the ids of a sum, or empty.
        layer: the layer of a probe, else None.
        intercept: the intercept of a probe, which is not part of the scores.
        probability: the model's own probability of the token, or of the first token of a contrast; of a sum, the product.
            None for directions and probes.
        rank: the token's rank among all tokens by probability, from 1; None for sums, directions and probes.
    """

    label: str
    kind: TargetKind
    position: int
    token_ids: tuple[int, ...] = ()
    layer: int | None = None
    intercept: float = 0.0
    probability: float | None = field(default=None, compare=False)
    rank: int | None = field(default=None, compare=False)


class Sum(NamedTuple):
    """A sum of neighbouring targets: the text that it is shown by, and the range of targets."""

    label: str
    begin: int
    end: int

    def of(self, targets: Sequence[Target]) -> Target:
        """The target that stands for the sum of its range of ``targets``, each of one token."""
        own = targets[self.begin : self.end]
        ids = tuple(target.token_ids[0] for target in own)
        probability = math.prod(target.probability or 0.0 for target in own)
        return Target(self.label, "sum", own[-1].position, ids, probability=probability)


class Asked(NamedTuple):
    """A checked target.

    If ``ids`` is None it stands for ``k`` targets, which the model's logits determine. A contrast with one id has the
    likeliest other token as its second.
    """

    kind: TargetKind
    position: int
    ids: tuple[int, ...] | None = ()
    k: int = 0
    w: Tensor | None = None
    label: str = ""
    layer: int | None = None
    intercept: float = 0.0


def check(target: Any, length: int, layers: range, tokenizer: Any, bound: BoundModel, of: Of = "logit") -> list[Asked]:
    """Check the targets of a call before the model runs.

    Args:
        target: one target, or a list of them, as :meth:`DePass.attribute` takes them.
        length: the number of tokens of the prompt.
        layers: the layers at whose input the state is decomposed, and one past the last.
        tokenizer: the tokenizer for targets given as text; may be None.
        bound: the model.
        of: what is explained of a token: its logit, its log-probability, or its contrast with the likeliest other token.

    Raises:
        TargetError: a string is not one token, or an id, a position or a probe's layer is out of range.
    """
    targets = target if isinstance(target, (list, tuple)) else [target]
    if not targets:
        raise TargetError("target is an empty list; leave it out to explain the model's own next token")
    return [_check(each, length, layers, tokenizer, bound, of) for each in targets]


def _check(target: Any, length: int, layers: range, tokenizer: Any, bound: BoundModel, of: Of) -> Asked:
    if target is None:
        target = TopK(1)
    elif isinstance(target, str) or (hasattr(target, "__index__") and not isinstance(target, bool)):
        target = Token(target)
    if not isinstance(target, (TopK, Token, Contrast, Direction)):
        raise TargetError(
            "a target must be None, a string, a token id, TopK, Token, Contrast or Direction, got "
            f"{type(target).__name__}"
        )
    position = integer("a position", target.position, TargetError)
    if not -length <= position < length:
        raise TargetError(
            f"position {position} is out of range: the prompt has {length} tokens, positions {-length} to {length - 1}"
        )
    position %= length
    if isinstance(target, TopK):
        k = integer("k of TopK", target.k, TargetError)
        if not 1 <= k <= bound.vocab_size:
            raise TargetError(f"TopK({k}): k must be from 1 to {bound.vocab_size}, the size of the vocabulary")
        return Asked(_KINDS[of], position, None, k)
    if isinstance(target, Token):
        return Asked(_KINDS[of], position, (token_id(target.token, tokenizer, bound),))
    if isinstance(target, Contrast):
        ids = tuple(token_id(token, tokenizer, bound) for token in (target.token, target.other))
        return Asked("contrast", position, ids)
    if of != "logit":
        raise TargetError(f"of={of!r} needs tokens as targets, got a Direction; leave of out")
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
        raise TargetError(f"Direction(intercept={target.intercept!r}): the intercept must be a finite number")
    if target.layer is None:
        if target.intercept:
            raise TargetError(
                f"Direction(intercept={target.intercept!r}): only a probe has an intercept; give it a layer"
            )
        return Asked("direction", position, (), 0, w.detach(), str(target.label))
    layer = integer("layer of Direction", target.layer, TargetError)
    if not layers:
        raise TargetError(
            f"Direction(layer={layer}): probe targets are not supported in sweeps, surveys and baselines; use "
            "attribute(sources=...), or leave the layer out"
        )
    if layer not in layers:
        raise TargetError(
            f"Direction(layer={layer}): layer {layer} has no decomposed state; choose from {layers.start} to "
            f"{layers.stop - 1}"
        )
    return Asked("probe", position, (), 0, w.detach(), str(target.label), layer, float(target.intercept))


def token_id(token: str | int, tokenizer: Any, bound: BoundModel) -> int:
    """The id of a target token.

    Raises:
        TargetError: a string is not exactly one token, or an id is out of range.
    """
    if isinstance(token, str):
        if tokenizer is None:
            raise TargetError(
                f"target {token!r} needs a tokenizer: pass one, DePass(model, tokenizer), or give a token id"
            )
        if any("\ud800" <= character <= "\udfff" for character in token):
            raise TargetError(f"target {token!r} is not text: it contains bytes that are not UTF-8")
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            parts = ", ".join(f"{tokenizer.decode([i])!r} ({i})" for i in ids)
            raise TargetError(
                f"target {token!r} is {len(ids)} tokens, not one: {parts or 'none'}; {_suggestion(token, tokenizer)}"
            )
        if _is_unknown(ids, token, tokenizer):
            raise TargetError(
                f"target {token!r} is not in the tokenizer's vocabulary, it would become {tokenizer.unk_token!r}; pass a "
                "token of the vocabulary, or an id"
            )
        token = int(ids[0])
    token = integer("a target id", token, TargetError)
    if not 0 <= token < bound.vocab_size:
        raise TargetError(f"target id {token} is out of range: the vocabulary has {bound.vocab_size} tokens")
    return token


def _suggestion(token: str, tokenizer: Any) -> str:
    """What to pass instead of a string that is not one token."""
    spaced = f" {token}"
    if token and not token[0].isspace():
        ids = tokenizer.encode(spaced, add_special_tokens=False)
        if len(ids) == 1 and not _is_unknown(ids, spaced, tokenizer):
            return f"{spaced!r} with a space in front is one token, pass that"
    return "pass one token, as a string or an id"


def _is_unknown(ids: list[int], text: str, tokenizer: Any) -> bool:
    """Whether a text's one id stands for any text that the tokenizer does not know."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    return unknown is not None and ids == [unknown] and text.strip() != tokenizer.unk_token


class Readout(NamedTuple):
    """A target's direction and the model's own value for it."""

    target: Target
    w: Tensor  # [D], in the state's dtype
    constant: float  # the head's bias times the factor on logits, which belongs to the bias source
    logit: float  # the model's own value of the target, before any soft-capping of the head


def fill(
    asked: Sequence[Asked], vectors: Tensor, logits: Tensor, bound: BoundModel, tokenizer: Any
) -> list[list[Readout]]:
    """The directions and the model's own logits of targets other than probes; a top-k target has ``k`` of them.

    Args:
        asked: ``n`` checked targets.
        vectors: ``[n, D]``, the residual stream after the final norm at each target's position, in the state's dtype.
        logits: ``[n, V]``, the head's output at each target's position, in the state's dtype.
        bound: the model.
        tokenizer: the tokenizer for labels; may be None.

    Returns:
        The readouts of each target.
    """
    ids = _ids(asked, logits)
    flat = [(row, token) for row, of_row in enumerate(ids) for its in of_row for token in its]
    rows, tokens, unembedding = [row for row, _ in flat], [token for _, token in flat], bound.unembedding
    directions = bound.scaled(unembedding.weight[tokens].detach().to(vectors))  # [tokens, D]
    own = logits[rows, tokens]
    bias = torch.zeros_like(own) if unembedding.bias is None else bound.scaled(unembedding.bias[tokens].to(own))
    logprobs = bound.log_probabilities(logits)
    rank = 1 + (logits[rows] > own[:, None]).sum(1)
    found = torch.stack([bias, own, logprobs[rows, tokens].exp(), rank.to(own)])
    numbers = iter(zip(directions, *found.tolist(), strict=True))  # one copy to the host
    means = _means(asked, logprobs, bound)
    readouts: list[list[Readout]] = []
    for row, (each, of_row, vector) in enumerate(zip(asked, ids, vectors, strict=True)):
        readouts.append([])
        for its in of_row:
            label = " - ".join(shown(tokenizer, token) for token in its) or each.label
            target = Target(label, each.kind, each.position, its)
            if each.w is not None:
                w, constant, logit = each.w.to(vector), 0.0, float(each.w.to(vector) @ vector)
            else:
                w, constant, logit, probability, place = next(numbers)
                target = replace(target, probability=probability, rank=int(place))
            if each.kind == "contrast":
                other, its_constant, its_logit, _, _ = next(numbers)
                w, constant, logit = w - other, constant - its_constant, logit - its_logit
            elif each.kind == "logprob":  # its small value would drown in the rounding of two large logits
                w, constant = w - means[row][0], constant - means[row][1]
                logit = float(w @ vector) + constant
            readouts[-1].append(Readout(target, w, constant, logit))
    return readouts


def _means(asked: Sequence[Asked], logprobs: Tensor, bound: BoundModel) -> dict[int, tuple[Tensor, float]]:
    """For every log-probability by its row: the means, under the model's probabilities, of directions and biases."""
    rows = [row for row, each in enumerate(asked) if each.kind == "logprob"]
    if not rows:
        return {}
    p, unembedding = logprobs[rows].exp(), bound.unembedding
    weight = unembedding.weight.detach()
    w = p.new_zeros(len(rows), weight.shape[1])
    for begin in range(0, len(weight), _AT_ONCE):  # in the state's dtype the whole weight may not fit
        some = weight[begin : begin + _AT_ONCE].to(p)
        w += p[:, begin : begin + len(some)] @ some
    zero = p.new_zeros(len(rows))
    bias = zero if unembedding.bias is None else bound.scaled(p @ unembedding.bias.detach().to(p))
    return dict(zip(rows, zip(bound.scaled(w), bias.tolist(), strict=True), strict=True))


def _ids(asked: Sequence[Asked], logits: Tensor) -> list[list[tuple[int, ...]]]:
    """The token ids of every readout of each target: one, the two of a contrast, or none of a direction."""
    top = _top(asked, logits)
    return [[its if _is_complete(each) else (*its, _likeliest_other(its[0], logits[row]))
             for its in ([(token,) for token in top[row]] if each.ids is None else [each.ids])]
            for row, each in enumerate(asked)]  # fmt: skip


def _is_complete(asked: Asked) -> bool:
    """Whether a contrast has its second id, which the model's logits may have to determine."""
    return asked.kind != "contrast" or (asked.ids is not None and len(asked.ids) == 2)


def _likeliest_other(token: int, logits: Tensor) -> int:
    """The token with the largest logit besides one."""
    first, second = logits.topk(2).indices.tolist()
    return int(second if first == token else first)


def _top(asked: Sequence[Asked], logits: Tensor) -> dict[int, list[int]]:
    """The ids of the most likely tokens of every target that asks for them, by its row."""
    by_k: dict[int, list[int]] = {}  # rows of equal k: where logits tie, another k may order them otherwise
    for row, each in enumerate(asked):
        if each.ids is None:
            by_k.setdefault(each.k, []).append(row)
    if not by_k:
        return {}
    # of all rows at once: reading the ids makes the host wait for the device
    best = [logits[rows].topk(k).indices.flatten() for k, rows in by_k.items()]
    read = iter(torch.cat(best).tolist())
    return {row: [next(read) for _ in range(k)] for k, rows in by_k.items() for row in rows}
