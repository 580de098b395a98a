"""Needles: do the scores of a long prompt's tokens find the few that decide the answer (:mod:`.haystacks`)?

RISE and MAS delete the tokens in the order of their scores, as FlashTrace reports them; recovery is the share of the
needles' tokens among the highest-scoring tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import baselines, rules
from ..api import DePass
from ..arguments import argument
from ..errors import DePassError, NonFiniteError, OptionError
from ..inputs.prompt import encode
from ..inputs.targets import Token
from ..sources.spans import Spans, token_ranges
from . import data, methods
from .forward import continuations, greedy
from .haystacks import KINDS, Copy, Haystack, haystack
from .methods import Outcome, Scores
from .planted import Range
from .summary import Result, area, mean, new_figure, prompts_in_words, results, save, style, table
from .task import Item, Row, Task, TaskOptions, chosen, failed, skipped

EVERY = "needles"
COUNT = 20  # prompts of each kind and length
LENGTHS = (200, 500, 1000, 2000)
STEPS = 20
RULES = ("softmax", *rules.LINEAR, "steered")
LEFT_OUT = "leave_one_out"
BASELINES = (
    "gradient_norm", "input_x_gradient", "integrated_gradients_20", "gim", "mean_attention", "last_attention",
    "attention_rollout", "random",
)  # fmt: skip
METHODS = (*RULES, *BASELINES, LEFT_OUT)
REFERENCE = "half"
MEASURES = {"RISE": "lower", "MAS": "lower", "recovery": "higher"}
WRONG = "the model's own answer is wrong"
UNMOVED = "with another word in a needle, the model does not give the other answer"
NO_FALL = "the answer is as likely without the context"


@dataclass(frozen=True, kw_only=True)
class NeedlesOptions(TaskOptions):
    """The options of :class:`Needles`.

    Attributes:
        data: the kind of prompts, or ``needles`` for all.
        tokens: lengths of prompts.
        steps: the number of steps in which all tokens are deleted.
        methods: names of attribution methods, separated by commas.
    """

    data: str = field(
        default=EVERY,
        metadata=argument(f"the kind of prompts (default: {EVERY}, all kinds)", choices=(EVERY, *KINDS)),
    )
    tokens: tuple[int, ...] = field(
        default=LENGTHS,
        metadata=argument(
            f"lengths of prompts, in tokens (default: {' '.join(map(str, LENGTHS))})", metavar="N", least=100
        ),
    )
    steps: int = field(
        default=STEPS,
        metadata=argument(f"steps in which all tokens are deleted (default: {STEPS})", metavar="K", least=1),
    )
    methods: str = field(
        default=",".join(METHODS),
        metadata=argument(
            f"attribution methods, separated by commas: {', '.join(METHODS)} (default: all)",
            metavar="A,B", check=partial(chosen, METHODS),
        ),
    )  # fmt: skip


class Needles(Task[NeedlesOptions]):
    """Deletes the tokens of long prompts in the order of their scores, and looks for the needles among the highest."""

    name = "needles"
    help = "delete the tokens of long contexts by score (RISE, MAS), and find the needles that decide the answer"
    Options = NeedlesOptions
    files = ()
    edition = 2  # since 2: recovery counts ties as their chance

    def items(self, options: NeedlesOptions) -> list[Item]:
        """Kinds and lengths of prompts; they alternate."""
        kinds = list(KINDS) if options.data == EVERY else [options.data]
        groups = [(kind, tokens) for tokens in dict.fromkeys(options.tokens) for kind in kinds]
        count = COUNT if options.needed is None else math.ceil(options.needed / len(groups))
        return [
            Item(f"{kind}-{tokens}-{index}", {"kind": kind, "length": tokens, "index": index})
            for index in range(count)
            for kind, tokens in groups
        ]

    def measure(self, dp: DePass, prepared: Any, items: Sequence[Item], options: NeedlesOptions) -> Iterator[Row]:
        """The curves and the recovery of every method, for each prompt whose needles decide the answer.

        Raises:
            OptionError: the model has no tokenizer, or the tokenizer has neither a padding nor an EOS token.
        """
        blank = blank_id(dp)
        for item in items:
            try:
                yield _measured(dp, item, blank, options)
            except DePassError as error:
                yield failed(item, error)

    def refused(self, dp: DePass, options: NeedlesOptions) -> dict[str, str]:
        """The methods that cannot score this model; leave_one_out can score every model."""
        blank_id(dp)
        return methods.refused(dp, [name for name in _named(options) if name != LEFT_OUT], options.seed)

    def report(self, rows: Sequence[Row], options: NeedlesOptions, folder: Path) -> str:
        """One table for each kind and length, and one figure."""
        if not rows:
            return "No prompt was measured."
        text = [_explained(options), _draw(rows, options, folder)]
        for (kind, length), of_group in groups(rows).items():
            text += [f"## {kind}, {length} tokens", _table(of_group, options)]
        return "\n\n".join(text)

    def results(self, rows: Sequence[Row], options: NeedlesOptions) -> list[Result]:
        """RISE, MAS and recovery for each kind and length, of the methods that scored all its prompts."""
        lines = []
        for (kind, length), of_group in groups(rows).items():
            names = scored(of_group)
            costs = {name: [row["seconds"][name] / row["plain_seconds"] for row in of_group] for name in names}
            lengths = [row["tokens"] for row in of_group]
            for measure, better in MEASURES.items():
                values = {name: [values_of(row, name)[measure] for row in of_group] for name in names}
                lines += results(
                    f"{kind}, {length} tokens, {measure}", better, values, REFERENCE, options.seed, lengths, costs
                )
        return lines


def _named(options: NeedlesOptions) -> list[str]:
    return chosen(METHODS, options.methods)


# The measures.


def deletion_order(scores: Tensor, steps: int) -> list[Tensor]:
    """The indices of scores ``[P]`` in groups, highest first; of equal scores the earlier first.

    There are ``min(steps, P)`` groups. Their sizes differ by at most one, and the larger ones come first.
    """
    order = scores.argsort(descending=True, stable=True)
    return list(torch.tensor_split(order, min(steps, len(order))))


def density(scores: Tensor, order: Sequence[Tensor]) -> Tensor:
    """``[K + 1]``: the share of the scores' sum that is left before and after each of ``K`` groups is deleted.

    Where the sum is not positive it falls in equal steps, as in FlashTrace's code.
    """
    total = scores.double().sum()
    if total <= 0:
        return torch.linspace(1, 0, len(order) + 1, dtype=torch.float64)
    gone = torch.stack([scores[group].double().sum() for group in order]).cumsum(0) / total
    return torch.cat([gone.new_ones(1), 1 - gone])


def response(log_probabilities: Tensor) -> Tensor:
    """``[K + 1]``: the answer's log-probability from 1, with all tokens, to 0, without any; it never rises again.

    Args:
        log_probabilities: ``[K + 1]``, the first larger than the last.
    """
    first, last = log_probabilities[0], log_probabilities[-1]
    return ((log_probabilities - last) / (first - last)).clamp(0, 1).cummin(0).values


def rise(log_probabilities: Tensor) -> float:
    """The area under :func:`response`: low if the first tokens to go are those that the answer needs."""
    return _area(response(log_probabilities))


def mas(log_probabilities: Tensor, left: Tensor) -> float:
    """RISE with a penalty (Magnitude Aligned Scoring): the area under the response plus its distance from the density.

    The sum is cut at 1, then scaled to reach from 0 to 1, as in FlashTrace's code.

    Args:
        log_probabilities: ``[K + 1]``.
        left: ``[K + 1]``, the density.
    """
    curve = response(log_probabilities)
    penalised = (curve + (curve - left).abs()).clamp(0, 1)
    low, high = penalised.min(), penalised.max()
    if high == low:
        return _area(torch.linspace(1, 0, len(curve), dtype=torch.float64))
    return _area((penalised - low) / (high - low))


def recovery(scores: Tensor, needle: Sequence[int]) -> float:
    """The share of the needle's ``k`` tokens among the ``k`` highest of scores ``[P]``; ties count as their chance."""
    of_needle = scores[list(needle)]
    lowest = scores.sort(descending=True).values[len(needle) - 1]
    above, ties = int((scores > lowest).sum()), int((scores == lowest).sum())
    chance = (len(needle) - above) / ties
    return (int((of_needle > lowest).sum()) + chance * int((of_needle == lowest).sum())) / len(needle)


def _area(curve: Tensor) -> float:
    return float(area(range(len(curve)), curve))


# Measuring.


@dataclass(frozen=True)
class Asked:
    """A prompt as the model reads it.

    Attributes:
        ids: ids of the prompt.
        answer: ids of the answer.
        deletable: the range of the positions that may be deleted: all sentences.
        sentences: token ranges of the sentences.
        needle: the positions of the needles' tokens, counted from ``deletable``'s begin.
        right: whether the model's greedy answer is the right one.
        moved: whether the model gives the other answer to every changed copy.
    """

    ids: list[int]
    answer: list[int]
    deletable: Range
    sentences: list[Range]
    needle: list[int]
    right: bool
    moved: bool


def asked(dp: DePass, hay: Haystack) -> Asked:
    """Let the model answer a prompt and its changed copies.

    Raises:
        PromptError: the model cannot read the prompt.
        TargetError: the answer merges with the prompt's end.
        SourceError: a sentence has no token.
    """
    encoded = encode(hay.whole.prompt, dp.tokenizer, dp.bound)
    pairs = [_pair(dp, copy) for copy in (hay.whole, *hay.changed)]
    right, *moved = greedy(dp, [pair.ids for pair in pairs], [pair.answer for pair in pairs])
    shift = max(0, (encoded.text or "").find(hay.whole.prompt))  # a text made of ids begins with the special tokens

    def tokens(characters: Sequence[Range]) -> list[Range]:
        return token_ranges(encoded, Spans([(b + shift, e + shift) for b, e in characters], unit="char"))

    sentences = tokens(hay.sentences)
    begin, end = sentences[0][0], sentences[-1][1]
    needle = [position - begin for first, last in tokens(hay.needles) for position in range(first, last)]
    return Asked(list(encoded.ids), list(pairs[0].answer), (begin, end), sentences, needle, right, all(moved))


def _pair(dp: DePass, copy: Copy) -> data.Pair:
    return data.pair(dp, Item("", {"prompt": copy.prompt, "target": copy.answer}))


def blank_id(dp: DePass) -> int:
    """The id that replaces a deleted token: the tokenizer's padding token or, if there is none, its EOS token.

    Raises:
        OptionError: there is no tokenizer, or it has neither.
    """
    if dp.tokenizer is None:
        raise OptionError("the prompts of needles are texts, but the model has no tokenizer; give one")
    for token in (dp.tokenizer.pad_token_id, dp.tokenizer.eos_token_id):
        if (
            token is not None and token < dp.bound.vocab_size
        ):  # some tokenizers have tokens that the model has no row for
            return int(token)
    raise OptionError(
        "needles replaces deleted tokens by a padding or EOS token, but the tokenizer has neither that the model knows; "
        "set one"
    )


def _measured(dp: DePass, item: Item, blank: int, options: NeedlesOptions) -> Row:
    kind, length = item.data["kind"], item.data["length"]

    def count(text: str) -> int:
        return len(dp.tokenizer.encode(text, add_special_tokens=False))

    prompt = asked(dp, haystack(kind, item.data["index"], options.seed, length, count))
    if not (prompt.right and prompt.moved):
        return skipped(item, f"{kind}, {length} tokens: {UNMOVED if prompt.right else WRONG}")
    outcomes = scores_of(dp, prompt, blank, options)
    scored = {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, DePassError)}
    orders = {name: deletion_order(of.tokens, options.steps) for name, of in scored.items()}
    curves = _curves(dp, prompt, orders, blank)
    if any(curve[0] <= curve[-1] for curve in curves.values()):
        return skipped(item, f"{kind}, {length} tokens: {NO_FALL}")
    began = time.perf_counter()
    continuations(dp, [prompt.ids], [prompt.answer])
    return {
        "id": item.id, "status": "ok", "kind": kind, "length": length, "tokens": len(prompt.ids),
        "answer_tokens": len(prompt.answer), "needle_tokens": len(prompt.needle),
        "conservation_error": max((of.missed for of in scored.values() if of.missed is not None), default=0.0),
        "log_probabilities": curves,
        "density": {name: _short(density(of.tokens, orders[name])) for name, of in scored.items()},
        "recovery": {name: recovery(of.tokens, prompt.needle) for name, of in scored.items()},
        "not_positive": [name for name, of in scored.items() if float(of.tokens.double().sum()) <= 0],
        "too_large": {name: str(outcome) for name, outcome in outcomes.items() if name not in scored},
        "seconds": {name: of.seconds for name, of in scored.items()}, "plain_seconds": time.perf_counter() - began,
    }  # fmt: skip


def scores_of(dp: DePass, prompt: Asked, blank: int, options: NeedlesOptions) -> dict[str, Outcome]:
    """Each method's scores ``[P]`` of the deletable tokens for the whole answer; an error for a rule that is too large.

    Raises:
        DePassError: a method cannot score the prompt, a score is not finite, or no method fits into memory.
    """

    def score(name: str) -> list[Outcome]:
        if name in rules.RULES and (too_much := _too_large(dp, prompt, name)) is not None:
            return [OptionError(too_much)]
        began, missed = time.perf_counter(), None
        if name in rules.RULES:
            tokens, missed = _by_rule(dp, prompt, name)
        else:
            tokens = _left_out(dp, prompt, blank) if name == LEFT_OUT else _by_baseline(dp, prompt, name, options.seed)
        if not bool(tokens.isfinite().all()):
            raise NonFiniteError(f"a score by {name} is not finite")
        return [Scores(tokens[prompt.deletable[0] : prompt.deletable[1]], missed, time.perf_counter() - began)]

    (outcomes,) = methods.mixed(_named(options), score)
    if all(isinstance(outcome, DePassError) for outcome in outcomes.values()):
        reasons = "; ".join(map(str, outcomes.values()))
        raise OptionError(f"no method fits into memory: {reasons}; choose others with --methods")
    return outcomes


def _too_large(dp: DePass, prompt: Asked, rule: str) -> str | None:
    plan = dp.plan(len(prompt.ids) + len(prompt.answer) - 1, rule=rule, measure=False)
    return None if plan.fits else f"{rule} needs {plan.total_bytes} bytes of memory for {plan.positions} tokens"


def _by_rule(dp: DePass, prompt: Asked, rule: str) -> tuple[Tensor, float]:
    """Scores ``[N]`` for the sum of the answer's logits, and the conservation error."""
    result = dp.explain(prompt.ids, prompt.answer, by="answer", rule=rule).attribution
    scores = torch.zeros(len(prompt.ids))
    for source, score in zip(result.sources, result.scores[0], strict=True):
        if source.start is not None and source.start < len(prompt.ids):
            scores[source.start] = score
    return scores, float(result.conservation_error.max())


def _by_baseline(dp: DePass, prompt: Asked, name: str, seed: int) -> Tensor:
    """Scores ``[N]``, summed over the answer's tokens."""
    read = [*prompt.ids, *prompt.answer[:-1]]
    targets = [Token(token, len(prompt.ids) - 1 + i) for i, token in enumerate(prompt.answer)]
    (result,) = baselines.tokens(dp, name, [read], [targets], seed=seed)
    return result.scores.sum(0)[: len(prompt.ids)]


def _left_out(dp: DePass, prompt: Asked, blank: int) -> Tensor:
    """Scores ``[N]``: the fall of the answer's log-probability without a sentence, shared evenly by its tokens."""
    prompts = [prompt.ids, *(_without(prompt.ids, range(begin, end), blank) for begin, end in prompt.sentences)]
    whole, *left = continuations(dp, prompts, [prompt.answer] * len(prompts))[0].tolist()
    scores = torch.zeros(len(prompt.ids))
    for (begin, end), without in zip(prompt.sentences, left, strict=True):
        scores[begin:end] = (whole - without) * len(prompt.answer) / (end - begin)
    return scores


def _curves(dp: DePass, prompt: Asked, orders: Mapping[str, Sequence[Tensor]], blank: int) -> dict[str, list[float]]:
    """For each order of deletion ``[K + 1]`` mean log-probabilities of the answer: with all tokens, then after each group.

    Raises:
        NonFiniteError: a log-probability is not finite.
    """
    asked_once: dict[tuple[int, ...], int] = {}  # many orders leave the same ids at their ends
    at: dict[str, list[int]] = {}
    for name, order in orders.items():
        gone, at[name] = list[int](), [asked_once.setdefault(tuple(prompt.ids), 0)]
        for group in order:
            gone += [prompt.deletable[0] + position for position in group.tolist()]
            left = tuple(_without(prompt.ids, gone, blank))
            at[name].append(asked_once.setdefault(left, len(asked_once)))
    found = continuations(dp, list(asked_once), [prompt.answer] * len(asked_once))[0]
    if not bool(found.isfinite().all()):
        raise NonFiniteError("the answer's log-probability after a deletion is not finite")
    numbers = _short(found)
    return {name: [numbers[i] for i in indices] for name, indices in at.items()}


def _without(ids: Sequence[int], gone: Sequence[int], blank: int) -> list[int]:
    left = list(ids)
    for position in gone:
        left[position] = blank
    return left


def _short(numbers: Tensor) -> list[float]:
    """Rounded to six digits, the precision of fp32."""
    return [float(f"{number:.6g}") for number in numbers.tolist()]


# Reporting.


def groups(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """The rows of each kind and length."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (list(KINDS).index(row["kind"]), row["length"])):
        found.setdefault((row["kind"], row["length"]), []).append(row)
    return found


def scored(rows: Sequence[Row]) -> list[str]:
    """The methods that scored all these prompts."""
    return [name for name in rows[0]["recovery"] if all(name in row["recovery"] for row in rows)]


def values_of(row: Row, name: str) -> dict[str, float]:
    """A method's value of each of :data:`MEASURES` for one prompt."""
    curve, left = (torch.tensor(row[key][name], dtype=torch.float64) for key in ("log_probabilities", "density"))
    return {"RISE": rise(curve), "MAS": mas(curve, left), "recovery": row["recovery"][name]}


def _explained(options: NeedlesOptions) -> str:
    return (
        "All tokens of the context and the question are replaced by the padding token, the highest-scoring first, in "
        f"{options.steps} steps; the text that leads to the answer stays. *RISE* is the area under the answer's "
        "log-probability, scaled from 1 (nothing deleted) to 0 (all deleted): lower is better. *MAS* adds the distance of "
        "this curve from the share of the scores that is left: lower is better. *Recovery* is the share of the needles' k "
        "tokens among the k highest-scoring ones: higher is better. Scores are for all tokens of the answer. Numbers are "
        f"means over prompts with 95 % bootstrap intervals; *minus {REFERENCE}* compares prompt by prompt."
    )


def _table(rows: Sequence[Row], options: NeedlesOptions) -> str:
    names, lines = scored(rows), []
    values = {name: [values_of(row, name) for row in rows] for name in names}
    for name in names:
        cells = [f"`{name}`"]
        for measure in MEASURES:
            own = [of[measure] for of in values[name]]
            cells.append(str(mean(own, options.seed)))
            if REFERENCE in names:
                other = [of[measure] for of in values[REFERENCE]]
                differences = [a - b for a, b in zip(own, other, strict=True)]
                cells.append("" if name == REFERENCE else str(mean(differences, options.seed)))
        lines.append(cells)
    head = ["method"]
    for measure in MEASURES:
        head += [measure, f"minus {REFERENCE}"] if REFERENCE in names else [measure]
    return "\n\n".join([_counted(rows), table(head, lines)])


def _counted(rows: Sequence[Row]) -> str:
    """How many prompts, and which methods' scores are special."""
    text = [
        f"{prompts_in_words([row['tokens'] for row in rows])}. The largest conservation error of the rules is "
        f"{max(row['conservation_error'] for row in rows):.0e}."
    ]
    negative = {name: count for name in scored(rows) if (count := sum(name in row["not_positive"] for row in rows))}
    if negative:
        counts = ", ".join(f"`{name}` {count}" for name, count in negative.items())
        text.append(f"Prompts whose scores do not have a positive sum, so that MAS takes equal steps: {counts}.")
    left = dict.fromkeys(name for row in rows for name in row["too_large"])
    for name in left:
        text.append(f"`{name}` did not fit into memory for {sum(name in row['too_large'] for row in rows)} prompts.")
    return " ".join(text)


def _draw(rows: Sequence[Row], options: NeedlesOptions, folder: Path) -> str:
    """A row of panels for each kind, a panel for each measure: values over lengths, or by method if there is one length."""
    by_kind: dict[str, dict[int, list[Row]]] = {}
    for (kind, length), of_group in groups(rows).items():
        by_kind.setdefault(kind, {})[length] = of_group
    several = len({length for _, length in groups(rows)}) > 1
    names = _named(options)
    height = 2.6 if several else 0.6 + 0.17 * len(names)
    figure = new_figure(11, 1.2 + height * len(by_kind))
    panels: Any = figure.subplots(
        len(by_kind), len(MEASURES), squeeze=False, sharex=several or "col", sharey="col" if several else True
    )
    for line, (kind, of_kind) in zip(panels, by_kind.items(), strict=True):
        for axes, (measure, better) in zip(line, MEASURES.items(), strict=True):
            axes.set_title(f"{kind}: {measure}, {better} is better", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            draw = _draw_lengths if several else _draw_methods
            draw(axes, of_kind, measure, names, options)
    if several:
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return save(figure, folder / "needles.png")


def _draw_lengths(
    axes: Any, of_kind: Mapping[int, Sequence[Row]], measure: str, names: Sequence[str], options: NeedlesOptions
) -> None:
    for name in names:
        points = {n: [values_of(row, name)[measure] for row in of] for n, of in of_kind.items() if name in scored(of)}
        means = [sum(of) / len(of) for of in points.values()]
        axes.plot(list(points), means, marker="o", markersize=3, label=name, **style(METHODS.index(name)))
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(options.tokens)), [str(n) for n in sorted(set(options.tokens))])
    axes.minorticks_off()
    axes.set_xlabel("length of the prompt (tokens)")


def _draw_methods(
    axes: Any, of_kind: Mapping[int, Sequence[Row]], measure: str, names: Sequence[str], options: NeedlesOptions
) -> None:
    """The means of all methods with their intervals, one below the other."""
    ((length, rows),) = of_kind.items()
    for at, name in enumerate(names):
        if name in scored(rows):
            value = mean([values_of(row, name)[measure] for row in rows], options.seed)
            reach = [[value.value - value.low], [value.high - value.value]]
            axes.errorbar(value.value, at, xerr=reach, marker="o", markersize=4, color=style(0)["color"])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"mean over {len(rows)} prompts of {length} tokens")
