"""Measures of token scores: how likely is the answer without the tokens that score highest, and with only them?

*Deletion* (DePass, section 4.1.1): tokens are deleted. *Zeroing* (Dual Path Attribution, arXiv 2603.19742): their embeddings
are zero. *Soft* (Zhao and Aletras 2023, arXiv 2305.10496): dimensions of embeddings are dropped at random, more of them
where a score is higher or lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..api import DePass
from ..errors import OptionError
from ..inputs.prompt import encode
from .data import Pair
from .questions import FIXED, Asked, Question
from .summary import area
from .task import Row

SHARES = tuple(range(10, 101, 10))  # K, in % of the tokens that are ranked
BUDGETS = (0.2, 0.5, 0.8)  # of the dimensions, which a soft measure keeps or drops on average
DRAWS = 2  # random draws for each of these
FAMILIES = {"deletion": ("patch", "recover"), "zeroing": ("disrupt", "restore"), "soft": ("soft_nc", "soft_ns")}
NOTHING = "nothing"  # the answer's probability where all embeddings that may be changed are zero


@dataclass(frozen=True)
class Measure:
    """What one curve of a row says.

    Attributes:
        curve: its name in the rows.
        name: its name in reports and results.
        better: ``"lower"`` or ``"higher"``.
    """

    curve: str
    name: str
    better: str


MEASURES = (
    Measure("patch", "patch-top, area", "lower"),
    Measure("recover", "recover-top, area", "higher"),
    Measure("disrupt", "disrupt (embeddings zero), area", "lower"),
    Measure("restore", "recover (embeddings zero), area", "higher"),
    Measure("soft_nc", "soft-NC", "higher"),
    Measure("soft_ns", "soft-NS", "higher"),
)


def families(text: str) -> tuple[str, ...]:
    """The curves of the families of measures that ``text`` names, separated by commas.

    Raises:
        OptionError: there is no such family, or one is named twice.
    """
    names = text.split(",")
    for name in names:
        if name not in FAMILIES:
            raise OptionError(f"--measures: unknown measures {name!r}; choose from {', '.join(FAMILIES)}")
    if len(set(names)) < len(names):
        raise OptionError(f"--measures names one of {text!r} twice; name each once")
    return tuple(curve for name, curves in FAMILIES.items() if name in names for curve in curves)


# What is asked of the model.


def ranking(pair: Pair, scores: Tensor) -> list[int]:
    """The positions that may be deleted, highest score first; of equal scores the earlier first."""
    return _ranked(pair.deletable, scores)


def remaining(pair: Pair, ranked: Sequence[int], share: int, curve: str) -> tuple[int, ...]:
    """The remaining ids without the top ``share`` % of the ranked tokens (``patch``), or with only them (``recover``).

    The number of tokens is rounded to the nearest integer, and at least one.
    """
    top = set(ranked[: max(1, (len(ranked) * share + 50) // 100)])
    gone = top if curve == "patch" else set(ranked) - top
    return tuple(token for position, token in enumerate(pair.ids) if position not in gone)


def zeroed(pair: Pair, scores: Tensor, share: int, curve: str) -> tuple[int, ...]:
    """The positions whose embeddings are zero: the top ``share`` % of the tokens (``disrupt``), or all but these
    (``restore``).

    The last token counts, as in their code; a special first token does not. The number of tokens is rounded up.
    """
    ranked = _ranked(range(int(pair.begins_special), len(pair.ids)), scores)
    count = -(-len(ranked) * share // 100)
    return tuple(sorted(ranked[:count] if curve == "disrupt" else ranked[count:]))


def _ranked(positions: range, scores: Tensor) -> list[int]:
    order = scores[positions.start : positions.stop].argsort(descending=True, stable=True)
    return [positions[i] for i in order.tolist()]


def words(dp: DePass, pair: Pair) -> list[range]:
    """The positions of each word, without a special first token and the last token; without text each token is a word."""
    prompt = encode(list(pair.ids), dp.tokenizer, dp.bound)
    ranges = prompt.segments("token" if prompt.text is None else "word")
    allowed = pair.deletable
    cut = [range(max(begin, allowed.start), min(end, allowed.stop)) for begin, end in ranges]
    return [word for word in cut if word]


def kept(scores: Sequence[float], sizes: Sequence[int], budget: float) -> list[float]:
    """For each word the probability ``a`` that a dimension of its tokens is kept: higher for a higher score.

    ``a = min(1, c u)``, where ``u`` is the word's score less the lowest. The factor ``c`` makes the expected number of kept
    tokens, the sum of ``a`` times the words' sizes, ``budget`` times all tokens. So every method keeps equally much,
    whatever the size of its scores. Where all words above the lowest are whole, the lowest share what is left of the
    budget. Words of equal scores are kept alike.

    Args:
        scores: the words' scores.
        sizes: the words' numbers of tokens.
        budget: a number between 0 and 1.
    """
    values, widths = torch.tensor(scores, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    above, total = values - values.min(), budget * float(widths.sum())
    whole = torch.zeros(len(values), dtype=torch.bool)
    while True:
        left = total - float(widths[whole].sum())
        rest = ~whole & (above > 0)
        if not bool(rest.any()):
            lowest = ~whole
            probability = torch.where(lowest, left / float(widths[lowest].sum()), 1.0)
            return [float(value) for value in probability]
        factor = left / float((widths * above)[rest].sum())
        fresh = rest & (above * factor >= 1)
        if not bool(fresh.any()):
            return [float(value) for value in torch.where(whole, 1.0, above * factor)]
        whole |= fresh


def soft(pair: Pair, groups: Sequence[range], scores: Tensor, budget: float) -> tuple[float, ...]:
    """``[N]`` for each token the probability that a dimension of its embedding is kept; ``FIXED`` for tokens in no word."""
    of_word = [float(scores[list(word)].double().sum()) for word in groups]
    of_words = kept(of_word, [len(word) for word in groups], budget)
    of_tokens = [FIXED] * len(pair.ids)
    for word, probability in zip(groups, of_words, strict=True):
        for position in word:
            of_tokens[position] = probability
    return tuple(of_tokens)


def plan(
    dp: DePass, pair: Pair, scores: Tensor, curves: Sequence[str], asked: Asked, encoded: Any
) -> dict[str, list[int]]:
    """For each curve, the indices of its questions in ``asked``, which gets the new ones.

    Args:
        dp: the model.
        pair: the prompt.
        scores: ``[N]`` the tokens' scores.
        curves: the curves, as from :func:`families`.
        asked: all questions.
        encoded: takes the remaining ids of a prompt; returns the ids that the model reads.
    """
    ranked, answer, found = ranking(pair, scores), pair.answer[0], {}
    groups = words(dp, pair) if "soft_nc" in curves else []
    for curve in curves:
        if curve in FAMILIES["deletion"]:
            questions = [Question(encoded(remaining(pair, ranked, share, curve)), answer) for share in SHARES]
        elif curve in FAMILIES["zeroing"]:
            questions = [Question(pair.ids, answer, zeroed(pair, scores, share, curve)) for share in SHARES]
        else:
            questions = [
                Question(
                    pair.ids, answer, kept=soft(pair, groups, scores, budget), draw=draw, turned=curve == "soft_nc"
                )
                for budget in BUDGETS
                for draw in range(DRAWS)
            ]
        found[curve] = [asked.add(question) for question in questions]
    return found


# What the answers say.


def relative(rows: Sequence[Row], curve: str, name: str) -> Tensor:
    """``[prompts, K]``: the answer's probability, divided by its probability after the whole prompt."""
    clean = torch.tensor([row["clean"] for row in rows], dtype=torch.float64)
    return torch.tensor([row[curve][name] for row in rows], dtype=torch.float64) / clean[:, None]


def value(row: Row, curve: str, name: str) -> float | None:
    """A row's value of a measure by a method; None where the method was not measured, or the measure has no scale.

    The area of ``disrupt`` and ``restore`` is the one of their table: that of the remaining probability, in % of the whole
    prompt's, over the share of tokens from 0 (``disrupt``) or 0.1 (``restore``) to 1.
    """
    if name not in row[curve]:
        return None
    if curve in FAMILIES["soft"]:
        return _soft_value(row, curve, name)
    heights = torch.tensor(row[curve][name], dtype=torch.float64) / row["clean"]
    if curve in FAMILIES["deletion"]:
        return float(area(SHARES, heights))
    if curve == "disrupt":  # their curve begins at the whole prompt
        return 100 * float(torch.trapezoid(torch.cat([heights.new_ones(1), heights]), dx=0.1))
    return 100 * float(torch.trapezoid(heights, dx=0.1))


def _soft_value(row: Row, curve: str, name: str) -> float | None:
    """Soft-NC: how far the answer's probability drops, as a part of its drop where all embeddings that may be changed are
    zero; the mean over budgets and draws, where a rise counts as no drop. Soft-NS: 1 minus this part.
    """
    most: float = row["clean"] - row[NOTHING]
    if most <= 0:
        return None
    drops = [max(0.0, row["clean"] - probability) / most for probability in row[curve][name]]
    part: float = sum(drops) / len(drops)
    return part if curve == "soft_nc" else 1 - part
