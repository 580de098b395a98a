"""Token faithfulness (DePass, section 4.1.1): is the answer less likely without the highest-scoring tokens, and as likely
with only them?
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from ..api import DePass
from ..arguments import argument
from ..errors import DePassError, OptionError
from ..inputs.prompt import encode
from . import data, methods
from .data import HELP, Pair
from .forward import next_tokens
from .measures import BUDGETS, DRAWS, FAMILIES, MEASURES, NOTHING, SHARES, families, plan, relative, value
from .methods import DPA, GROUPS, METHODS, REFERENCE, SLOW, Outcome
from .questions import Asked, Question
from .summary import FEWEST, Result, area, differences, mean, new_figure, results, save, style, table
from .task import Item, Row, Task, TaskOptions, failed, skipped

Score = Callable[[Sequence[Pair]], "list[dict[str, Outcome]]"]  # for each prompt its scores by each method

Begun = tuple[Pair, dict[str, Any]]  # a prompt to measure, and the first fields of its row

ALWAYS_DRAWN = (REFERENCE, "random")
_DRAWN = 8  # the methods of a figure besides these; a table has all
_FAILURES = 20  # messages that a report lists
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
        methods: names of attribution methods or groups of methods, separated by commas.
        measures: names of families of measures, separated by commas.
        slow_limit: measure slow methods only on the first ``slow_limit`` of the run's items; None: on all.
        keep_wrong: also measure prompts that the model answers wrong.
        retokenize: decode the remaining tokens of a prompt to text and encode it again.
    """

    data: str = field(default="facts", metadata=argument(f"{HELP} (default: facts)", metavar="FILE"))
    methods: str = field(
        default="all",
        metadata=argument(
            f"attribution methods, separated by commas: {', '.join((*METHODS, DPA))}; a mixture such as "
            f"2*softmax+1*half; or a group: {', '.join(GROUPS)} (default: all)",
            metavar="A,B",
        ),
    )
    measures: str = field(
        default=",".join(FAMILIES),
        metadata=argument(
            f"families of measures, separated by commas: {', '.join(FAMILIES)} (default: all)", metavar="A,B"
        ),
    )
    slow_limit: int | None = field(
        default=None,
        metadata=argument(f"measure slow methods ({', '.join(SLOW)}) on the first N items only", metavar="N", least=1),
    )
    keep_wrong: bool = field(default=False, metadata=KEEP_WRONG)
    retokenize: bool = field(default=False, metadata=RETOKENIZE)


class Tokens(Task[TokensOptions]):
    """Takes the highest-scoring tokens away or keeps only them, for every rule and each baseline."""

    name = "tokens"
    help = "take away or keep the highest-scoring tokens and measure the answer's probability (paper, section 4.1.1)"
    Options = TokensOptions
    together = FEWEST  # with fewer prompts nothing can be decided

    def items(self, options: TokensOptions) -> list[Item]:
        """Prompts with their answers."""
        methods.named(options.methods)  # refuses unknown methods before any data are loaded
        families(options.measures)
        return data.prompts(options.data, options.seed, options.needed)

    def measure(self, dp: DePass, prepared: Any, items: Sequence[Item], options: TokensOptions) -> Iterator[Row]:
        """Each prompt's curves for each method."""
        score = partial(_scored, dp, methods.named(options.methods), options)
        return curves(
            dp, items, score, families(options.measures), options.keep_wrong, options.retokenize, options.seed
        )

    def refused(self, dp: DePass, options: TokensOptions) -> dict[str, str]:
        """The methods that cannot score this model."""
        return methods.refused(dp, methods.named(options.methods), options.seed)

    def report(self, rows: Sequence[Row], options: TokensOptions, folder: Path) -> str:
        """A table for each family of measures, and a figure for each curve of deletions."""
        if not rows:
            return "No prompt was measured."
        names, chosen = methods.named(options.methods), families(options.measures)
        text = [explained(rows, options.retokenize), *_failures(rows)]
        for family, of_family in FAMILIES.items():
            if of_family[0] in chosen:
                text += [_ABOUT[family], _table(rows, names, of_family, options.seed)]
        if set(methods.MIXTURES) <= set(names) and "patch" in chosen:
            text.append(_best_mixture(rows))
        if "patch" in chosen:
            text += [_draw(rows, names, curve, options.seed, folder) for curve in FAMILIES["deletion"]]
        return "\n\n".join(text)

    def results(self, rows: Sequence[Row], options: TokensOptions) -> list[Result]:
        """Every measure of every method."""
        names, found = methods.named(options.methods), []
        for measure in MEASURES:
            if measure.curve not in families(options.measures):
                continue
            values = {name: [value(row, measure.curve, name) for row in rows] for name in names}
            values = {name: of for name, of in values.items() if any(each is not None for each in of)}
            costs = {name: methods.costs(rows, name) for name in values}
            lengths = [row["tokens"] for row in rows]
            found += results(measure.name, measure.better, values, REFERENCE, options.seed, lengths, costs)
        return found


def _scored(
    dp: DePass, names: Sequence[str], options: TokensOptions, pairs: Sequence[Pair]
) -> list[dict[str, Outcome]]:
    """Scores by every method that each prompt is for: slow ones only for the run's first items, by their numbers."""
    most = math.inf if options.slow_limit is None else options.skip + options.slow_limit
    found: list[dict[str, Outcome]] = [{} for _ in pairs]
    fast = [name for name in names if name not in SLOW]
    some = [i for i, pair in enumerate(pairs) if int(pair.item.id) < most]
    for which, chosen in ((range(len(pairs)), fast), (some, [name for name in names if name in SLOW])):
        if which and chosen:
            prompts, targets = [list(pairs[i].ids) for i in which], [pairs[i].answer[0] for i in which]
            of_prompts = methods.scored(dp, chosen, prompts, targets, options.seed)
            for i, outcomes in zip(which, of_prompts, strict=True):
                found[i] |= outcomes
    return [{name: outcomes[name] for name in names if name in outcomes} for outcomes in found]


# Measuring.


def curves(
    dp: DePass,
    items: Sequence[Item],
    score: Score,
    chosen: Sequence[str],
    keep_wrong: bool,
    retokenize: bool,
    seed: int,
) -> Iterator[Row]:
    """Yield one row per item: the probability of the answer's first token after the prompt is changed.

    An ``ok`` row holds ``clean``, the probability after the whole prompt; for each curve (``patch``, ``recover`` and the
    others of :mod:`.measures`) and each method the probabilities at each of its points; ``missed``, the conservation error
    of each method (None: its scores need not add up); ``seconds``, each method's time for one prompt;
    ``plain_seconds``, that of a plain pass of the model over the same prompts; and where methods could not score the
    prompt, ``failed``, their errors.

    Args:
        dp: the model.
        items: the prompts.
        score: scores prompts by the attribution methods.
        chosen: the curves, as from :func:`.measures.families`.
        keep_wrong: also measure prompts that the model answers wrong.
        retokenize: decode the remaining tokens of a prompt to text and encode it again.
        seed: the seed of random changes.
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
            yield from _measured(dp, waiting[:_TOGETHER], score, chosen, retokenize, seed)
            waiting = waiting[_TOGETHER:]
    if waiting:
        yield from _measured(dp, waiting, score, chosen, retokenize, seed)


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
        elif not pair.deletable:
            yield skipped(pair.item, "the prompt has no token that may be deleted", **begun)
        else:
            yield pair, begun


def _measured(
    dp: DePass, waiting: Sequence[Begun], score: Score, chosen: Sequence[str], retokenize: bool, seed: int
) -> Iterator[Row]:
    pairs = [pair for pair, _ in waiting]
    seconds = _plain_seconds(dp, pairs)
    scores, asked = score(pairs), Asked()
    plans: list[dict[str, dict[str, list[int]]] | DePassError] = []
    for pair, outcomes in zip(pairs, scores, strict=True):
        try:
            plans.append(_plan(dp, pair, outcomes, chosen, asked, retokenize))
        except DePassError as error:
            plans.append(error)
    probabilities = asked.answered(dp, seed)
    for (pair, begun), outcomes, of_curves in zip(waiting, scores, plans, strict=True):
        if isinstance(of_curves, DePassError):
            yield failed(pair.item, of_curves, **begun)
            continue
        left = [i for of_methods in of_curves.values() for indices in of_methods.values() for i in indices]
        if not all(math.isfinite(probabilities[i]) for i in left):
            yield failed(pair.item, "the answer's probability after the prompt is changed is not finite", **begun)
            continue
        found: Row = {
            curve: {name: [probabilities[i] for i in indices] for name, indices in of_methods.items()}
            for curve, of_methods in of_curves.items()
        }
        if NOTHING in found:
            (found[NOTHING],) = found[NOTHING][NOTHING]
        scored = {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, DePassError)}
        if len(scored) < len(outcomes):
            found["failed"] = {name: str(outcome) for name, outcome in outcomes.items() if name not in scored}
        yield {
            "id": pair.item.id, "status": "ok", **begun, **found,
            "missed": {name: _missed(each.missed) for name, each in scored.items()},
            "seconds": {name: _short(each.seconds) for name, each in scored.items()}, "plain_seconds": _short(seconds),
        }  # fmt: skip


def _plain_seconds(dp: DePass, pairs: Sequence[Pair]) -> float:
    """The time of one prompt in a plain pass of the model over all."""
    began = time.perf_counter()
    next_tokens(dp, [pair.ids for pair in pairs], [pair.answer[0] for pair in pairs])
    return (time.perf_counter() - began) / len(pairs)


def _plan(
    dp: DePass, pair: Pair, outcomes: dict[str, Outcome], chosen: Sequence[str], asked: Asked, retokenize: bool
) -> dict[str, dict[str, list[int]]]:
    """By curve and method, the indices of its questions in ``asked``.

    Raises:
        DePassError: no method could score the prompt, or the remaining tokens are not a valid prompt.
    """
    encoded = partial(encoded_anew, dp, pair) if retokenize else tuple
    found: dict[str, dict[str, list[int]]] = {curve: {} for curve in chosen}
    errors = [outcome for outcome in outcomes.values() if isinstance(outcome, DePassError)]
    if errors and len(errors) == len(outcomes):
        raise errors[0]
    for name, outcome in outcomes.items():
        if isinstance(outcome, DePassError):
            continue
        for curve, indices in plan(dp, pair, outcome.tokens, chosen, asked, encoded).items():
            found[curve][name] = indices
    if "soft_nc" in chosen:
        nothing = Question(pair.ids, pair.answer[0], zeroed=tuple(pair.deletable))
        found[NOTHING] = {NOTHING: [asked.add(nothing)]}
    return found


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


def _missed(error: float | None) -> float | None:
    return None if error is None else _short(error)


def _short(number: float) -> float:
    """Rounded to six digits, the precision of fp32."""
    return float(f"{number:.6g}")


# Reporting.


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
        f"Each number is the mean over prompts with its 95 % bootstrap interval. A special first token is never taken away. "
        f"After deletion, the remaining tokens are {how}. *Cost* is the time of a method in plain passes of the model over "
        f"the same prompts, the median over prompts."
    )


def _failures(rows: Sequence[Row]) -> list[str]:
    """How many prompts each method could not score; nothing if all could score all."""
    counts = Counter(f"{name}: {reason}" for row in rows for name, reason in row.get("failed", {}).items())
    if not counts:
        return []
    lines = [f"- {said}: {count}" for said, count in counts.most_common(_FAILURES)]
    if len(counts) > _FAILURES:
        lines.append(f"- {len(counts) - _FAILURES} more messages: see rows.jsonl")
    return ["Prompts that a method could not score, and that do not count for it:", "\n".join(lines)]


_ABOUT = {
    "deletion": (
        "## Deletion\n\n"
        "The probability of the answer's first token, divided by its probability after the whole prompt. *Patch-top* "
        "deletes the highest-scoring K % of the tokens: lower is better. *Recover-top* keeps only these: higher is better. "
        "The last token is always kept. K % is at least one token. The area is the mean height of the curve over K from "
        f"{SHARES[0]} to {SHARES[-1]} %."
    ),
    "zeroing": (
        "## Zeroing\n\n"
        "As Dual Path Attribution measures it. *Disrupt* sets the embeddings of the highest-scoring K % of the tokens to "
        "zero: lower is better. *Recover* sets all others to zero: higher is better. The last token counts, and K % is "
        "rounded up. The area is that of the remaining probability in %, over the share of tokens: from 0 to 1 for disrupt, "
        "from 0.1 to 1 for recover."
    ),
    "soft": (
        "## Soft\n\n"
        "Soft normalised comprehensiveness and sufficiency, higher is better. Each dimension of a word's embeddings is kept "
        "(soft-NS) or dropped (soft-NC) at random, the more probably the higher the word's score. All methods keep or drop "
        f"the same share of the dimensions on average: {', '.join(map(str, BUDGETS))}. A number is over these shares, with "
        f"{DRAWS} draws for each."
    ),
}


def _table(rows: Sequence[Row], names: Sequence[str], of_family: Sequence[str], seed: int) -> str:
    """Each method's measures, its differences from the reference, and its cost."""
    chosen = [measure for measure in MEASURES if measure.curve in of_family]
    others = REFERENCE in names and len(names) > 1
    head = ["method", *(measure.name for measure in chosen)]
    head += [f"{measure.name}, minus that of {REFERENCE}" for measure in chosen] if others else []
    lines = []
    for name in names:
        values = [[value(row, measure.curve, name) for row in rows] for measure in chosen]
        compared = [[value(row, measure.curve, REFERENCE) for row in rows] for measure in chosen] if others else []
        cells = [_mean([each for each in of if each is not None], seed) for of in values]
        for of, reference in zip(values if others else [], compared, strict=True):
            cells.append("" if name == REFERENCE else _mean(differences(of, reference), seed))
        costs = methods.costs(rows, name)
        count = sum(name in row["seconds"] for row in rows)
        lines.append([f"{name}", str(count), *cells, f"{median(costs):.1f}" if costs else ""])
    return table([head[0], "prompts", *head[1:], "cost"], lines)


def _mean(values: Sequence[float], seed: int) -> str:
    return str(mean(values, seed)) if values else "not measured"


def _best_mixture(rows: Sequence[Row]) -> str:
    """Which mixture to report on other prompts: the one with the largest mean of recover-top less patch-top."""
    rows = [row for row in rows if all(name in row["patch"] for name in methods.MIXTURES)]
    if not rows:
        return "No prompt was scored by all mixtures of softmax and steer."
    gains = {
        name: sum((value(row, "recover", name) or 0.0) - (value(row, "patch", name) or 0.0) for row in rows) / len(rows)
        for name in methods.MIXTURES
    }
    best = max(gains, key=gains.__getitem__)
    return (
        f"Of the mixtures of softmax and steer, `{best}` has the largest recover-top area less patch-top area "
        f"({gains[best]:.3f}). Report it on other prompts than these, with `--skip`."
    )


def _draw(rows: Sequence[Row], names: Sequence[str], curve: str, seed: int, folder: Path) -> str:
    """A figure of the methods with the best areas, of softmax and of random scores."""
    having = {name: [row for row in rows if name in row[curve]] for name in names}
    heights = {name: relative(of, curve, name) for name, of in having.items() if of}
    does, better = {"patch": ("deleted", "lower"), "recover": ("kept", "higher")}[curve]
    sign = 1 if better == "lower" else -1
    areas = {name: sign * float(area(SHARES, values.mean(0))) for name, values in heights.items()}
    best = sorted((name for name in areas if name not in ALWAYS_DRAWN), key=areas.__getitem__)[:_DRAWN]
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    drawn = [name for name in heights if name in best or name in ALWAYS_DRAWN]
    for index, name in enumerate(drawn):
        values, ours = heights[name], name == REFERENCE
        axes.plot(SHARES, values.mean(0).tolist(), label=name, linewidth=2.4 if ours else 1.3, **style(index))
        if ours:
            means = [mean(column.tolist(), seed) for column in values.T]
            low, high = [m.low for m in means], [m.high for m in means]
            axes.fill_between(SHARES, low, high, color=style(index)["color"], alpha=0.15)
    others = len(heights) - len(drawn)
    left_out = f"\n({others} methods with worse areas are not drawn)" if others else ""
    axes.set_title(f"{curve}-top: {better} is better{left_out}", fontsize=10)
    axes.set_xlabel(f"highest-scoring tokens {does}, K (%)")
    axes.set_ylabel("probability of the answer,\nrelative to the whole prompt")
    axes.set_xticks(SHARES)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save(figure, folder / f"{curve}.png")
