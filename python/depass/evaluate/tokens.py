"""Token faithfulness (DePass, section 4.1.1): is the answer less likely without the highest-scoring tokens, and as likely
with only them?
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
from ..errors import DePassError, ModelError, OptionError
from ..inputs.prompt import encode
from ..models.linearised import refuse
from ..results.attribution import Attribution
from . import data
from .data import HELP, Pair
from .forward import next_tokens
from .summary import COLOURS, LINES, area, mean, new_figure, save, table
from .task import Item, Row, Task, TaskOptions, failed, skipped

Scorer = Callable[[DePass, Sequence[Pair]], "list[Attribution | DePassError]"]

Begun = tuple[Pair, dict[str, Any]]  # a prompt to measure, and the first fields of its row

SHARES = tuple(range(10, 101, 10))  # K, in % of the tokens that may be deleted
CURVES = ("patch", "recover")
OURS = "depass"
METHODS = (OURS, *baselines.TOKENS)
_TOGETHER = 16  # prompts that are measured together; a resumed run repeats at most so many
WRONG = "the model's own next token is not the answer's first token"


KEEP_WRONG = argument("also measure prompts that the model answers wrong")
RETOKENIZE = argument(
    "decode the remaining tokens to text and encode it again, as the published code does (default: remove ids only)"
)


@dataclass(frozen=True, kw_only=True)
class TokensOptions(TaskOptions):
    """The options of :class:`Tokens`.

    Attributes:
        methods: names of attribution methods, separated by commas.
        keep_wrong: also measure prompts that the model answers wrong.
        retokenize: decode the remaining tokens of a prompt to text and encode it again.
    """

    data: str = field(default="facts", metadata=argument(f"{HELP} (default: facts)", metavar="FILE"))
    methods: str = field(
        default=",".join(METHODS),
        metadata=argument(
            f"attribution methods, separated by commas: {', '.join(METHODS)} (default: all)", metavar="A,B"
        ),
    )
    keep_wrong: bool = field(default=False, metadata=KEEP_WRONG)
    retokenize: bool = field(default=False, metadata=RETOKENIZE)


class Tokens(Task[TokensOptions]):
    """Deletes or keeps the highest-scoring tokens, for DePass and for each baseline."""

    name = "tokens"
    help = "delete or keep the highest-scoring tokens and measure the answer's probability (paper, section 4.1.1)"
    Options = TokensOptions

    def items(self, options: TokensOptions) -> list[Item]:
        """Prompts with their answers."""
        scorers(options.methods, options.seed)  # refuses unknown methods before any data are loaded
        return data.prompts(options.data, options.seed, options.needed)

    def measure(self, dp: DePass, prepared: Any, items: Sequence[Item], options: TokensOptions) -> Iterator[Row]:
        """Each prompt's curves for each method.

        Raises:
            OptionError: the model takes no gradients, which gim needs.
        """
        if "gim" in options.methods.split(","):
            try:
                refuse(dp.bound)
            except ModelError as error:
                raise OptionError(f"{error}; or leave gim out: --methods A,B") from error
        return curves(dp, items, scorers(options.methods, options.seed), options.keep_wrong, options.retokenize)

    def report(self, rows: Sequence[Row], options: TokensOptions, folder: Path) -> str:
        """One table, and one figure for each of the two curves."""
        if not rows:
            return "No prompt was measured."
        names = options.methods.split(",")
        figures = [_draw(rows, names, curve, options.seed, folder) for curve in CURVES]
        return "\n\n".join([explained(rows, options.retokenize), _table(rows, names, options.seed), *figures])


def scorers(names: str, seed: int) -> dict[str, Scorer]:
    """The named methods; ``names`` are separated by commas.

    Raises:
        OptionError: there is no such method, or one is named twice.
    """
    methods: dict[str, Scorer] = {}
    for name in names.split(","):
        if name not in METHODS:
            raise OptionError(f"--methods: unknown method {name!r}; choose from {', '.join(METHODS)}")
        if name in methods:
            raise OptionError(f"--methods names {name!r} twice; name each method once")
        methods[name] = depass if name == OURS else partial(_baseline, name=name, seed=seed)
    return methods


def depass(dp: DePass, pairs: Sequence[Pair], **options: Any) -> list[Attribution | DePassError]:
    """Scores by DePass; ``options`` go to :meth:`DePass.attribute_many`."""
    prompts, targets = [list(pair.ids) for pair in pairs], [pair.answer[0] for pair in pairs]
    return list(dp.attribute_many(prompts, targets=targets, errors="return", **options))


def _baseline(dp: DePass, pairs: Sequence[Pair], name: str, seed: int) -> list[Attribution | DePassError]:
    prompts, targets = [list(pair.ids) for pair in pairs], [pair.answer[0] for pair in pairs]
    try:
        return list(baselines.tokens(dp, name, prompts, targets, seed=seed))
    except DePassError as error:
        if len(pairs) == 1:
            return [error]
        return [result for pair in pairs for result in _baseline(dp, [pair], name, seed)]


# Measuring.


def curves(
    dp: DePass, items: Sequence[Item], methods: Mapping[str, Scorer], keep_wrong: bool, retokenize: bool
) -> Iterator[Row]:
    """Yield one row per item: the probability of the answer's first token without the top K % of the tokens, and with
    only them.

    A special first token and the last token are always kept. An ``ok`` row holds ``clean``, the probability after the
    whole prompt; ``patch`` and ``recover``, for each method the probabilities at each of :data:`SHARES`; and ``missed``,
    the conservation error of each method (None: its scores need not add up).

    Args:
        dp: the model.
        items: the prompts.
        methods: the attribution methods, by name.
        keep_wrong: also measure prompts that the model answers wrong.
        retokenize: decode the remaining tokens of a prompt to text and encode it again.
    """
    pairs = []
    for item in items:
        try:
            pairs.append(data.pair(dp, item))
        except DePassError as error:
            yield failed(item, error)
    waiting: list[Begun] = []  # most prompts may be skipped; the others are collected to fill the passes
    for first in range(0, len(pairs), _TOGETHER):
        for row_or_prompt in _begun(dp, pairs[first : first + _TOGETHER], keep_wrong):
            if isinstance(row_or_prompt, dict):
                yield row_or_prompt
            else:
                waiting.append(row_or_prompt)
        if len(waiting) >= _TOGETHER:
            yield from _measured(dp, waiting[:_TOGETHER], methods, retokenize)
            waiting = waiting[_TOGETHER:]
    if waiting:
        yield from _measured(dp, waiting, methods, retokenize)


def _begun(dp: DePass, pairs: Sequence[Pair], keep_wrong: bool) -> Iterator[Row | Begun]:
    """The model's answer to each whole prompt; for a prompt that is not measured, its row."""
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
            yield skipped(pair.item, "the prompt has no token that may be deleted", **begun)
        else:
            yield pair, begun


def _measured(dp: DePass, waiting: Sequence[Begun], methods: Mapping[str, Scorer], retokenize: bool) -> Iterator[Row]:
    attributions = {name: scorer(dp, [pair for pair, _ in waiting]) for name, scorer in methods.items()}
    questions: dict[tuple[tuple[int, ...], int], int] = {}  # remaining ids and answer; many methods leave the same ids
    plans: list[dict[str, dict[str, list[int]]] | DePassError] = []
    for index, (pair, _) in enumerate(waiting):
        try:
            plans.append({name: _plan(dp, pair, of[index], questions, retokenize) for name, of in attributions.items()})
        except DePassError as error:
            plans.append(error)
    prompts, answers = [ids for ids, _ in questions], [answer for _, answer in questions]
    probabilities = [_short(p) for p in next_tokens(dp, prompts, answers)[0].tolist()]
    for index, ((pair, begun), plan) in enumerate(zip(waiting, plans, strict=True)):
        if isinstance(plan, DePassError):
            yield failed(pair.item, plan, **begun)
            continue
        left = [i for curves_of in plan.values() for curve in curves_of.values() for i in curve]
        if not all(math.isfinite(probabilities[i]) for i in left):
            yield failed(pair.item, "the answer's probability after the remaining tokens is not finite", **begun)
            continue
        yield {
            "id": pair.item.id, "status": "ok", **begun,
            **{curve: {name: [probabilities[i] for i in plan[name][curve]] for name in plan} for curve in CURVES},
            "missed": {name: _missed(results[index]) for name, results in attributions.items()},
        }  # fmt: skip


def _plan(
    dp: DePass, pair: Pair, result: Attribution | DePassError, questions: dict[tuple[tuple[int, ...], int], int],
    retokenize: bool,
) -> dict[str, list[int]]:  # fmt: skip
    """For each curve, the indices in ``questions`` of its shares. New questions are added.

    Raises:
        DePassError: the method could not score the prompt, or the remaining tokens are not a valid prompt.
    """
    if isinstance(result, DePassError):
        raise result
    ranked, plan = ranking(pair, token_scores(result)), {}
    for curve in CURVES:
        left = [remaining(pair, ranked, share, curve) for share in SHARES]
        texts = [encoded_anew(dp, pair, ids) if retokenize else ids for ids in left]
        plan[curve] = [questions.setdefault((ids, pair.answer[0]), len(questions)) for ids in texts]
    return plan


def deletable(pair: Pair) -> range:
    """The positions that may be deleted: all but a special first token and the last token."""
    return range(int(pair.begins_special), len(pair.ids) - 1)


def ranking(pair: Pair, scores: Tensor) -> list[int]:
    """The positions that may be deleted, highest score first; of equal scores the earlier first."""
    positions = deletable(pair)
    order = scores[positions.start : positions.stop].argsort(descending=True, stable=True)
    return [positions[i] for i in order.tolist()]


def remaining(pair: Pair, ranked: Sequence[int], share: int, curve: str) -> tuple[int, ...]:
    """The remaining ids without the top ``share`` % of the ranked tokens (``patch``), or with only them (``recover``).

    The number of tokens is rounded to the nearest integer, and at least one.
    """
    top = set(ranked[: max(1, (len(ranked) * share + 50) // 100)])
    gone = top if curve == "patch" else set(ranked) - top
    return tuple(token for position, token in enumerate(pair.ids) if position not in gone)


def token_scores(result: Attribution) -> Tensor:
    """``[N]``: the scores of the tokens, without those of other sources (``bias``, ``pattern``, ``unassigned``)."""
    return result.scores[0, [i for i, source in enumerate(result.sources) if source.kind == "token"]]


def encoded_anew(dp: DePass, pair: Pair, ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ids of the remaining text, as the published code reads it. Tokens that become neighbours may merge.

    Raises:
        OptionError: there is no tokenizer.
        PromptError: no text is left.
    """
    if dp.tokenizer is None:
        raise OptionError("--retokenize needs a tokenizer, but the model has none; leave it out")
    text = dp.tokenizer.decode(ids[int(pair.begins_special) :], clean_up_tokenization_spaces=False)
    return encode(text, dp.tokenizer, dp.bound).ids


def _missed(result: Attribution | DePassError) -> float | None:
    error = float("nan") if isinstance(result, DePassError) else float(result.conservation_error.max())
    return _short(error) if math.isfinite(error) else None


def _short(number: float) -> float:
    """Rounded to six digits, the precision of fp32."""
    return float(f"{number:.6g}")


# Reporting.


def relative(rows: Sequence[Row], curve: str, name: str) -> Tensor:
    """``[prompts, K]``: the answer's probability, divided by its probability after the whole prompt."""
    clean = torch.tensor([row["clean"] for row in rows], dtype=torch.float64)
    return torch.tensor([row[curve][name] for row in rows], dtype=torch.float64) / clean[:, None]


def explained(rows: Sequence[Row], retokenize: bool) -> str:
    """The report's introduction: which prompts were measured, and what the numbers mean."""
    several = sum(row["answer_tokens"] > 1 for row in rows)
    wrong = sum(not row["right"] for row in rows)
    lengths = [row["tokens"] for row in rows]
    how = "decoded to text and encoded again" if retokenize else "passed to the model as ids"
    return (
        f"{len(rows)} prompts of {min(lengths)} to {max(lengths)} tokens ({sum(lengths) / len(lengths):.1f} on average). "
        f"{several} answers have several tokens; only the first is measured. {wrong} prompts are included although the "
        f"model's own next token is not the answer.\n\n"
        f"Each number is the probability of the answer's first token, divided by its probability after the whole prompt: "
        f"the mean over prompts with its 95 % bootstrap interval. *Patch-top* deletes the highest-scoring K % of the "
        f"tokens: lower is better. *Recover-top* keeps only these: higher is better. A special first token and the last "
        f"token are always kept. K % is at least one token. The remaining tokens are {how}. The area is the mean height of "
        f"the curve over K from {SHARES[0]} to {SHARES[-1]} %."
    )


def _table(rows: Sequence[Row], names: Sequence[str], seed: int) -> str:
    head = ["method", *(f"{curve}-top, {what}" for curve in CURVES for what in (f"K = {SHARES[0]} %", "area"))]
    others = OURS in names and len(names) > 1
    head += [f"{curve}-top, area minus that of {OURS}" for curve in CURVES] if others else []
    areas = {name: [area(SHARES, relative(rows, curve, name)) for curve in CURVES] for name in names}
    lines = []
    for name in names:
        cells = [name]
        for curve, of_prompts in zip(CURVES, areas[name], strict=True):
            cells += [str(mean(values.tolist(), seed)) for values in (relative(rows, curve, name)[:, 0], of_prompts)]
        if others:
            differences = [area - ours for area, ours in zip(areas[name], areas[OURS], strict=True)]
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
    axes.set_xlabel(f"highest-scoring tokens {does}, K (%)")
    axes.set_ylabel("probability of the answer,\nrelative to the whole prompt")
    axes.set_xticks(SHARES)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save(figure, folder / f"{curve}.png")
