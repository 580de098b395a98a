"""Token faithfulness (DePass, section 4.1.1): does the answer fall without the tokens that score highest, and stay with
them alone?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import baselines
from ..api import DePass
from ..arguments import argument
from ..errors import DePassError, OptionError
from ..inputs.prompt import encode
from ..results.attribution import Attribution
from . import data
from .data import HELP, Pair
from .forward import next_tokens
from .summary import COLOURS, LINES, area, mean, new_figure, save, table
from .task import Item, Row, Task, TaskOptions, failed, skipped

Scorer = Callable[[DePass, Sequence[Pair]], "list[Attribution | DePassError]"]

Asked = tuple[Pair, dict[str, Any]]  # a prompt that is measured, and what its row says already

SHARES = tuple(range(10, 101, 10))  # K, in % of the tokens that may be deleted
CURVES = ("patch", "recover")
OURS = "depass"
METHODS = (OURS, *baselines.TOKENS)
_TOGETHER = 16  # prompts that are scored and asked in the same passes; so much is measured again after a stop
WRONG = "the model's own next token is another than the answer's first"


KEEP_WRONG = argument("measure prompts that the model gets wrong as well")
RETOKENIZE = argument(
    "turn what is left into text and encode it anew, as the published code does, instead of leaving out ids"
)


@dataclass(frozen=True, kw_only=True)
class TokensOptions(TaskOptions):
    """What :class:`Tokens` is told.

    Attributes:
        methods: names of attributions, separated by commas.
        keep_wrong: measure prompts that the model gets wrong as well.
        retokenize: turn what is left of a prompt into text and encode it anew.
    """

    data: str = field(default="facts", metadata=argument(f"{HELP} (default: facts)", metavar="FILE"))
    methods: str = field(
        default=",".join(METHODS), metadata=argument(f"some of {', '.join(METHODS)} (default: all)", metavar="A,B")
    )
    keep_wrong: bool = field(default=False, metadata=KEEP_WRONG)
    retokenize: bool = field(default=False, metadata=RETOKENIZE)


class Tokens(Task[TokensOptions]):
    """Deletes and keeps the tokens that score highest, by DePass and by every baseline."""

    name = "tokens"
    help = "token faithfulness: delete or keep the highest-scoring tokens (paper, section 4.1.1)"
    Options = TokensOptions

    def items(self, options: TokensOptions) -> list[Item]:
        """Prompts with their answers."""
        scorers(options.methods, options.seed)  # refuses what there is not before anything is loaded
        return data.prompts(options.data, options.seed, options.limit)

    def measure(self, dp: DePass, prepared: Any, items: Sequence[Item], options: TokensOptions) -> Iterator[Row]:
        """Every prompt's curves by every method."""
        return curves(dp, items, scorers(options.methods, options.seed), options.keep_wrong, options.retokenize)

    def report(self, rows: Sequence[Row], options: TokensOptions, folder: Path) -> str:
        """One table, and a figure for each of the two curves."""
        if not rows:
            return "No prompt was measured."
        names = options.methods.split(",")
        figures = [_draw(rows, names, curve, options.seed, folder) for curve in CURVES]
        return "\n\n".join([explained(rows, options.retokenize), _table(rows, names, options.seed), *figures])


def scorers(names: str, seed: int) -> dict[str, Scorer]:
    """The methods that were asked for, by name, separated by commas.

    Raises:
        OptionError: there is no such method.
    """
    found: dict[str, Scorer] = {}
    for name in names.split(","):
        if name not in METHODS:
            raise OptionError(f"--methods: unknown method {name!r}; there are: {', '.join(METHODS)}")
        if name in found:
            raise OptionError(f"--methods names {name!r} twice")
        found[name] = depass if name == OURS else partial(_baseline, name=name, seed=seed)
    return found


def depass(dp: DePass, pairs: Sequence[Pair], **options: Any) -> list[Attribution | DePassError]:
    """Scores by DePass; ``options`` as :meth:`DePass.attribute_many` takes them."""
    prompts, targets = [list(pair.ids) for pair in pairs], [pair.answer[0] for pair in pairs]
    return list(dp.attribute_many(prompts, targets=targets, errors="return", **options))


def _baseline(dp: DePass, pairs: Sequence[Pair], name: str, seed: int) -> list[Attribution | DePassError]:
    prompts, targets = [list(pair.ids) for pair in pairs], [pair.answer[0] for pair in pairs]
    try:
        return list(baselines.tokens(dp, name, prompts, targets, seed=seed))
    except DePassError as error:
        if len(pairs) == 1:
            return [error]
        return [found for pair in pairs for found in _baseline(dp, [pair], name, seed)]


# Measuring.


def curves(
    dp: DePass, items: Sequence[Item], methods: Mapping[str, Scorer], keep_wrong: bool, retokenize: bool
) -> Iterator[Row]:
    """A row for each item: how likely the answer's first token is when the top K % of the tokens go, and when they stay.

    The first token where it is a special one, and the last, are always kept. An ``ok`` row has ``clean``, the probability
    after the whole prompt; ``patch`` and ``recover``, by method the probability at each of :data:`SHARES`; ``missed``, by
    how much the scores miss the logit, None for methods that do not promise it.

    Args:
        dp: whose model.
        items: the prompts.
        methods: what scores their tokens, by name.
        keep_wrong: measure prompts that the model gets wrong as well.
        retokenize: turn what is left of a prompt into text and encode it anew.
    """
    pairs = []
    for item in items:
        try:
            pairs.append(data.pair(dp, item))
        except DePassError as error:
            yield failed(item, error)
    going: list[Asked] = []  # most prompts of a set may be skipped: passes are of those that are not
    for first in range(0, len(pairs), _TOGETHER):
        for asked in _asked(dp, pairs[first : first + _TOGETHER], keep_wrong):
            if isinstance(asked, dict):
                yield asked
            else:
                going.append(asked)
        if len(going) >= _TOGETHER:
            yield from _measured(dp, going[:_TOGETHER], methods, retokenize)
            going = going[_TOGETHER:]
    if going:
        yield from _measured(dp, going, methods, retokenize)


def _asked(dp: DePass, pairs: Sequence[Pair], keep_wrong: bool) -> Iterator[Row | Asked]:
    """What the model makes of each whole prompt; the row of one that is not measured."""
    clean, top = next_tokens(dp, [pair.ids for pair in pairs], [pair.answer[0] for pair in pairs])
    for pair, probability, said in zip(pairs, clean.tolist(), top.tolist(), strict=True):
        begun = {
            "tokens": len(pair.ids), "answer_tokens": len(pair.answer), "clean": _short(probability),
            "right": said == pair.answer[0], "said": str(said) if dp.tokenizer is None else dp.tokenizer.decode([said]),
        }  # fmt: skip
        if not math.isfinite(probability) or probability == 0:
            yield failed(pair.item, f"the answer's probability is {probability} in the model's own pass")
        elif not begun["right"] and not keep_wrong:
            yield skipped(pair.item, WRONG, **begun)
        elif not deletable(pair):
            yield skipped(pair.item, "the prompt has no token that could be deleted", **begun)
        else:
            yield pair, begun


def _measured(dp: DePass, going: Sequence[Asked], methods: Mapping[str, Scorer], retokenize: bool) -> Iterator[Row]:
    found = {name: scorer(dp, [pair for pair, _ in going]) for name, scorer in methods.items()}
    asked: dict[tuple[tuple[int, ...], int], int] = {}  # what is left and the answer: many methods leave the same
    plans: list[dict[str, dict[str, list[int]]] | DePassError] = []
    for index, (pair, _) in enumerate(going):
        try:
            plans.append({name: _plan(dp, pair, results[index], asked, retokenize) for name, results in found.items()})
        except DePassError as error:
            plans.append(error)
    probabilities = [_short(p) for p in next_tokens(dp, [ids for ids, _ in asked], [a for _, a in asked])[0].tolist()]
    for index, ((pair, begun), plan) in enumerate(zip(going, plans, strict=True)):
        if isinstance(plan, DePassError):
            yield failed(pair.item, plan, **begun)
            continue
        left = [i for curves_of in plan.values() for curve in curves_of.values() for i in curve]
        if not all(math.isfinite(probabilities[i]) for i in left):
            yield failed(pair.item, "the answer's probability is not finite after what is left of the prompt", **begun)
            continue
        yield {
            "id": pair.item.id, "status": "ok", **begun,
            **{curve: {name: [probabilities[i] for i in plan[name][curve]] for name in plan} for curve in CURVES},
            "missed": {name: _missed(results[index]) for name, results in found.items()},
        }  # fmt: skip


def _plan(
    dp: DePass, pair: Pair, result: Attribution | DePassError, asked: dict[tuple[tuple[int, ...], int], int],
    retokenize: bool,
) -> dict[str, list[int]]:  # fmt: skip
    """By curve, which of ``asked`` each share is; what is new is added to it.

    Raises:
        DePassError: the method could not score the prompt, or what is left of it is no prompt.
    """
    if isinstance(result, DePassError):
        raise result
    ranked, plan = ranking(pair, token_scores(result)), {}
    for curve in CURVES:
        left = [remaining(pair, ranked, share, curve) for share in SHARES]
        texts = [encoded_anew(dp, pair, ids) if retokenize else ids for ids in left]
        plan[curve] = [asked.setdefault((ids, pair.answer[0]), len(asked)) for ids in texts]
    return plan


def deletable(pair: Pair) -> range:
    """The positions that may be deleted: all but a special token at the beginning, and the last."""
    return range(int(pair.begins_special), len(pair.ids) - 1)


def ranking(pair: Pair, scores: Tensor) -> list[int]:
    """The positions that may be deleted, highest score first; the earlier of equals first."""
    there = deletable(pair)
    order = scores[there.start : there.stop].argsort(descending=True, stable=True)
    return [there[i] for i in order.tolist()]


def remaining(pair: Pair, ranked: Sequence[int], share: int, curve: str) -> tuple[int, ...]:
    """The ids that are left without the top ``share`` % of the ranked tokens (``patch``), or with them (``recover``).

    The number is rounded to the nearest, and at least one.
    """
    top = set(ranked[: max(1, (len(ranked) * share + 50) // 100)])
    gone = top if curve == "patch" else set(ranked) - top
    return tuple(token for position, token in enumerate(pair.ids) if position not in gone)


def token_scores(result: Attribution) -> Tensor:
    """``[N]``: the scores of the tokens without those of other sources, as the biases'."""
    return result.scores[0, [i for i, source in enumerate(result.sources) if source.kind == "token"]]


def encoded_anew(dp: DePass, pair: Pair, ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ids of the text that is left, as the published code reads it: tokens that meet anew may become others.

    Raises:
        OptionError: there is no tokenizer.
        PromptError: no text is left.
    """
    if dp.tokenizer is None:
        raise OptionError("--retokenize needs a tokenizer, and the prompts were given as ids")
    text = dp.tokenizer.decode(ids[int(pair.begins_special) :], clean_up_tokenization_spaces=False)
    return encode(text, dp.tokenizer, dp.bound).ids


def _missed(result: Attribution | DePassError) -> float | None:
    error = float("nan") if isinstance(result, DePassError) else float(result.conservation_error.max())
    return _short(error) if math.isfinite(error) else None


def _short(number: float) -> float:
    """Six digits, which is what fp32 holds."""
    return float(f"{number:.6g}")


# Reporting.


def relative(rows: Sequence[Row], curve: str, name: str) -> Tensor:
    """``[prompts, K]``: the answer's probability relative to that after the whole prompt."""
    clean = torch.tensor([row["clean"] for row in rows], dtype=torch.float64)
    return torch.tensor([row[curve][name] for row in rows], dtype=torch.float64) / clean[:, None]


def explained(rows: Sequence[Row], retokenize: bool) -> str:
    """What was measured, of which prompts."""
    several = sum(row["answer_tokens"] > 1 for row in rows)
    wrong = sum(not row["right"] for row in rows)
    lengths = [row["tokens"] for row in rows]
    how = "turned into text and encoded anew" if retokenize else "read as ids"
    return (
        f"{len(rows)} prompts of {min(lengths)} to {max(lengths)} tokens ({sum(lengths) / len(lengths):.1f} on average). "
        f"{several} answers are several tokens, of which the first counts. {wrong} prompts are there though the model's own "
        f"next token is another.\n\n"
        f"Numbers are the probability of the answer's first token relative to that after the whole prompt, the mean over "
        f"prompts with its 95 % bootstrap interval. *Patch-top* deletes the K % of the tokens that score highest: lower is "
        f"better. *Recover-top* keeps only these: higher is better. A first special token and the last token are always "
        f"kept; at least one token counts as K %; what is left is {how}. The area is the mean height of the curve over K "
        f"from {SHARES[0]} to {SHARES[-1]} %."
    )


def _table(rows: Sequence[Row], names: Sequence[str], seed: int) -> str:
    head = ["method", *(f"{curve}-top, {what}" for curve in CURVES for what in (f"K = {SHARES[0]} %", "area"))]
    others = OURS in names and len(names) > 1
    head += [f"{curve}-top, area less {OURS}'s" for curve in CURVES] if others else []
    areas = {name: [area(SHARES, relative(rows, curve, name)) for curve in CURVES] for name in names}
    lines = []
    for name in names:
        cells = [name]
        for curve, of_prompts in zip(CURVES, areas[name], strict=True):
            cells += [str(mean(values.tolist(), seed)) for values in (relative(rows, curve, name)[:, 0], of_prompts)]
        if others:
            differences = [one - ours for one, ours in zip(areas[name], areas[OURS], strict=True)]
            cells += ["" if name == OURS else str(mean(values.tolist(), seed)) for values in differences]
        lines.append(cells)
    return table(head, lines)


def _draw(rows: Sequence[Row], names: Sequence[str], curve: str, seed: int, folder: Path) -> str:
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    for index, name in enumerate(names):
        values = relative(rows, curve, name)
        colour, line = COLOURS[index % len(COLOURS)], LINES[index % len(LINES)]
        ours = name == OURS
        axes.plot(SHARES, values.mean(0).tolist(), line, color=colour, label=name, linewidth=2.4 if ours else 1.3)
        if ours:
            means = [mean(column.tolist(), seed) for column in values.T]
            axes.fill_between(SHARES, [m.low for m in means], [m.high for m in means], color=colour, alpha=0.15)
    does, better = {"patch": ("deleted", "lower"), "recover": ("kept", "higher")}[curve]
    axes.set_title(f"{curve}-top: {better} is better", fontsize=10)
    axes.set_xlabel(f"K, highest-scoring tokens {does} (%)")
    axes.set_ylabel("probability of the answer, relative")
    axes.set_xticks(SHARES)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save(figure, folder / f"{curve}.png")
