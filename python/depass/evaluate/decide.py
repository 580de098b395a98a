"""Which method when: a decision table and a figure, from the results of several experiments."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import rules
from ..errors import DataError, OptionError
from . import methods
from .summary import COLOURS, FEWEST, Mean, Result, differences, mean, new_figure, save, table

BUDGETS = (3.0, 10.0, math.inf)  # plain passes of the model
MARKERS = "os^Dvp"
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
RANDOM = "random"
MARGIN = 0.01  # of the distance between random scores and the best: a smaller difference does not matter
QUESTIONS = {  # by how a measure's name ends
    "patch-top, area": "Which tokens does the answer depend on?",
    "disrupt (embeddings zero), area": "Which tokens does the answer depend on?",
    "soft-NC": "Which tokens does the answer depend on?",
    "recover-top, area": "Which tokens suffice for the answer?",
    "recover (embeddings zero), area": "Which tokens suffice for the answer?",
    "soft-NS": "Which tokens suffice for the answer?",
    "RISE": "Which tokens of a long prompt does the answer depend on?",
    "MAS": "Which tokens of a long prompt does the answer depend on?",
    "recovery": "Which tokens of a long prompt hold what decides the answer?",
    "circuits of heads, area": "Which heads suffice for the answer?",
}
DRAWN = ("patch-top, area", "recover-top, area", "circuits of heads, area", "fact, * tokens, recovery")  # in the figure


@dataclass(frozen=True)
class Experiment:
    """What one run found.

    Attributes:
        model: the model's name.
        data: the data set: the file's name without its ending, or the built-in set's name.
        task: the task's name.
        seed: the seed of the run; intervals here are drawn with it, too.
        results: one line for each measure and method.
    """

    model: str
    data: str
    task: str
    seed: int
    results: tuple[Result, ...]

    def measures(self) -> dict[str, list[Result]]:
        """The results of methods with at least :data:`.summary.FEWEST` prompts, by measure."""
        by_measure: dict[str, list[Result]] = {}
        for result in self.results:
            by_measure.setdefault(result.measure, []).append(result)
        enough = {measure: [r for r in of if r.prompts >= FEWEST] for measure, of in by_measure.items()}
        return {measure: of for measure, of in enough.items() if of}


def load(folder: Path) -> Experiment:
    """The experiment of a run's directory.

    Raises:
        DataError: the directory has no ``results.json``, or another program wrote it.
    """
    try:
        content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        settings, lines = content["settings"], content["results"]
        results = tuple(_once([_result(line) for line in lines]))
        data = Path(settings["data"]).stem
        return Experiment(settings["model"], data, content["task"], settings["seed"], results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} has no results of an evaluation ({error}); give the --out of depass evaluate"
        ) from error


def _result(line: dict[str, Any]) -> Result:
    value, against = Mean(*line["value"]), line["against"]
    against = None if against is None else Mean(*against)
    return Result(**{**line, "value": value, "against": against, "values": tuple(line["values"])})


def _once(results: Sequence[Result]) -> list[Result]:
    """Without a mixture that is in the results by another name, too."""
    kept: dict[tuple[str, frozenset[tuple[str, float]]], Result] = {}
    for result in results:
        kept.setdefault((result.measure, _parts(result.method)), result)
    return list(kept.values())


def _parts(method: str) -> frozenset[tuple[str, float]]:
    try:
        return frozenset((rule, round(share, 9)) for rule, share in methods.parts(method))
    except OptionError:  # a ranking of heads
        return frozenset([(method, 1.0)])


# Choosing.


def adds_up(method: str) -> bool:
    """Whether a method's scores add up to what they explain: those of rules do, except where paths carry only a part."""
    try:
        return rules.read(method).balance != "unassigned"
    except OptionError:
        return False


@dataclass(frozen=True)
class Choice:
    """What to take within a budget.

    Attributes:
        best: the result with the best mean.
        level: methods that are not shown to be worse than the best: the lower end of the interval of the difference is at
            most :data:`MARGIN` of the distance between random scores and the best, or 0 without random scores. The cheapest
            first.
        chosen: of the best and the level ones, the cheapest whose scores add up; the best if there is none.
        fallback: where the chosen method's scores do not add up: the best of those whose scores do.
        behind: by how much the fallback is worse than the best.
    """

    best: Result
    level: tuple[Result, ...]
    chosen: Result
    fallback: Result | None
    behind: Mean | None


def choose(measured: Sequence[Result], budget: float, seed: int) -> Choice | None:
    """Choose among the results of one measure; None: no method costs so little."""
    affordable = [r for r in measured if math.isinf(budget) or (r.cost is not None and r.cost <= budget)]
    if not affordable:
        return None
    sign = 1.0 if affordable[0].better == "lower" else -1.0
    best = _best(affordable, sign)

    def behind(result: Result) -> Mean:
        return mean([sign * difference for difference in differences(result.values, best.values)], seed)

    affordable = [r for r in affordable if differences(r.values, best.values)]
    margin = MARGIN * max((behind(r).value for r in measured if r.method == RANDOM), default=0.0)
    level = [r for r in affordable if r is not best and behind(r).low <= margin]
    level.sort(key=lambda r: (math.inf if r.cost is None else r.cost, sign * r.value.value))
    additive = [r for r in (best, *level) if adds_up(r.method)]
    if additive:
        cheapest = min(additive, key=lambda r: (math.inf if r.cost is None else r.cost, sign * r.value.value))
        return Choice(best, tuple(level), cheapest, None, None)
    others = [r for r in affordable if adds_up(r.method)]
    fallback = min(others, key=lambda r: sign * r.value.value) if others else None
    return Choice(best, tuple(level), best, fallback, None if fallback is None else behind(fallback))


def level_with_best(measured: Sequence[Result], seed: int) -> dict[str, bool]:
    """For each method of one measure whether it is the best at any cost, or not shown to be worse than the best."""
    choice = choose(measured, math.inf, seed)
    level = set() if choice is None else {choice.best.method, *(result.method for result in choice.level)}
    return {result.method: result.method in level for result in measured}


def _best(results: Sequence[Result], sign: float) -> Result:
    """The lowest ``sign`` times mean. A method measured on fewer prompts counts only against the others' values there."""
    most = max(result.prompts for result in results)
    best = min((r for r in results if r.prompts == most), key=lambda r: sign * r.value.value)
    fewer = [
        (sign * _average(differences(r.values, best.values)), i) for i, r in enumerate(results) if r.prompts < most
    ]
    ahead, index = min(fewer, default=(0.0, 0))
    return results[index] if ahead < 0 else best


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.inf


# Showing.


def decision_table(experiments: Iterable[Experiment]) -> str:
    """A row for each measure of each experiment, by question; a column for each budget."""
    head = ["question", "measure", "prompts", "model", *(_budget(budget) for budget in BUDGETS)]
    lines = []
    for experiment in experiments:
        for measure, measured in experiment.measures().items():
            most, better = max(r.prompts for r in measured), measured[0].better
            lines.append(
                [
                    question(measure),
                    f"{measure} ({better} is better)",
                    f"{experiment.data}: {most}, {measured[0].tokens:.0f} tokens",
                    experiment.model,
                    *(_cell(choose(measured, budget, experiment.seed)) for budget in BUDGETS),
                ]
            )
    place = {each: i for i, each in enumerate(dict.fromkeys(QUESTIONS.values()))}
    lines.sort(key=lambda line: (place.get(line[0], len(place)), line[1], line[2].split(":")[0], line[3]))
    return table(head, lines)


def tables(experiments: Sequence[Experiment]) -> list[str]:
    """The paragraphs and tables of a page on methods: :func:`standings`, :func:`decision_table`, and how to read them."""
    left_out = too_few(experiments)
    if not any(experiment.measures() for experiment in experiments):
        return [f"Nothing can be decided: {left_out or 'there are no results'}."]
    text = [standings(experiments), COUNTED, decision_table(experiments), EXPLAINED]
    return [*text, f"Left out: {left_out}."] if left_out else text


def too_few(experiments: Iterable[Experiment]) -> str:
    """The experiments or their parts with fewer than :data:`.summary.FEWEST` prompts, and how many they have."""
    counts: dict[str, int] = {}
    for experiment in experiments:
        kept = experiment.measures()
        for result in experiment.results:
            if result.measure not in kept:
                part = result.measure.rpartition(", ")[0] or result.measure
                name = f"{part} ({experiment.model}, {experiment.data})"
                counts[name] = max(counts.get(name, 0), result.prompts)
    return "; ".join(f"{name}: {count} {'prompt' if count == 1 else 'prompts'}" for name, count in counts.items())


@dataclass
class _Standing:
    """How a method did: by question whether it was level with the best, and its cost, for each measure and experiment."""

    level: dict[str, list[bool]] = field(default_factory=dict)
    costs: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        every = [each for of_question in self.level.values() for each in of_question]
        return sum(every) / len(every)


def standings(experiments: Iterable[Experiment]) -> str:
    """A row for each method, a column for each question: in how many measurements it was level with the best."""
    found: dict[str, _Standing] = {}
    for experiment in experiments:
        for measure, measured in experiment.measures().items():
            level = level_with_best(measured, experiment.seed)
            for result in measured:
                standing = found.setdefault(result.method, _Standing())
                standing.level.setdefault(question(measure), []).append(level[result.method])
                standing.costs += [] if result.cost is None else [result.cost]
    asked = [each for each in dict.fromkeys((*QUESTIONS.values(), *(q for s in found.values() for q in s.level)))
             if any(each in standing.level for standing in found.values())]  # fmt: skip
    lines = []
    for method, standing in sorted(found.items(), key=lambda pair: (-pair[1].share, min(pair[1].costs, default=0.0))):
        costs = " to ".join(dict.fromkeys([_times(min(standing.costs)), _times(max(standing.costs))])
                            if standing.costs else [])  # fmt: skip
        counts = [standing.level.get(each, []) for each in asked]
        cells = [f"{sum(of)} of {len(of)}" if of else "" for of in counts]
        lines.append([f"`{method}`", "yes" if adds_up(method) else "", costs, *cells])
    return table(["method", "adds up", "plain passes", *asked], lines)


COUNTED = (
    "Each cell counts measurements, one for each measure, data set and model: in how many of them is the method the best, "
    "or not shown to be worse than the best, at any cost? The methods are in the order of their share over all columns. A "
    "method that was measured on fewer prompts is more likely to be counted."
)

EXPLAINED = (
    "A cell names the method to take within its column's budget: the cheapest whose scores add up, of those that are "
    "not shown to be worse than the best. The best stands in brackets, where it is another one. Where no rule that "
    "adds up is level with the best, the cell names the best, then the best rule that adds up, and how much worse it "
    "is. A method is shown to be worse if the 95 % interval of the difference, prompt by prompt, lies above 1 % of "
    "the distance between random scores and the best. Costs are in plain passes of the model over the same prompts, "
    "measured in the same run. Measures of fewer than five prompts, and methods with fewer in a measure, are left out. "
    "Many methods are compared on the same prompts, so of twenty that are level, one may seem worse by chance."
)

DRAWN_IN_WORDS = (
    "Faithfulness against cost. A filled mark is a method whose scores add up. A line reaches over the 95 % interval of the "
    "mean over prompts. The dashed line is random scores."
)


def question(measure: str) -> str:
    """What a user asks who needs this measure; a measure that is not listed is its own question."""
    return next((asked for end, asked in QUESTIONS.items() if measure.endswith(end)), measure)


def _budget(budget: float) -> str:
    return "any cost" if math.isinf(budget) else f"up to {budget:g} plain passes"


def _cell(choice: Choice | None) -> str:
    if choice is None:
        return "none costs so little"
    chosen, best = choice.chosen, choice.best
    text = f"**{chosen.method}** {_value(chosen)}"
    if chosen is not best:
        return f"{text} (best: {best.method} {_value(best)})"
    if choice.fallback is None or choice.behind is None:
        return text
    worse = choice.behind
    how = f"worse by {worse.value:.3g} [{worse.low:.3g}, {worse.high:.3g}]"
    return f"{text}; adds up: **{choice.fallback.method}** {_value(choice.fallback)}, {how}"


def _value(result: Result) -> str:
    return f"{result.value.value:.3g}" + ("" if result.cost is None else f" at {_times(result.cost)}")


def _times(cost: float) -> str:
    return f"{cost:.0f}×" if cost >= 10 else f"{cost:.1f}×"


def draw(experiments: Sequence[Experiment], path: Path) -> str:
    """A figure of faithfulness against cost: a row of panels for each measure of :data:`DRAWN`, a column for each model.

    Returns:
        The Markdown that shows it in a page of the same directory; empty, and no figure, if there are no such measures.
    """
    panels = {
        (experiment.data, measure, experiment.model): measured
        for experiment in experiments
        for measure, measured in experiment.measures().items()
        if _place(measure) is not None
    }
    if not panels:
        return ""
    rows = sorted(
        {(data, measure) for data, measure, _ in panels}, key=lambda row: (_place(row[1]) or 0, row[1], row[0])
    )
    models = list(dict.fromkeys(model for _, _, model in panels))
    names = list(dict.fromkeys(result.method for measured in panels.values() for result in measured))
    columns = 2 * len(models)  # of names below the panels
    figure = new_figure(4.6 * len(models), 2.6 * len(rows) + 0.18 * math.ceil(len(names) / columns) + 0.4)
    grid: Any = figure.subplots(len(rows), len(models), squeeze=False)
    marks: dict[str, Any] = {}
    for (data, measure), of_models in zip(rows, grid, strict=True):
        for model, axes in zip(models, of_models, strict=True):
            marks |= _panel(axes, panels.get((data, measure, model), []), names, f"{model}, {data}\n{measure}")
    for axes in grid[-1]:
        axes.set_xlabel("cost in plain passes of the model", fontsize=9)
    figure.legend([marks[name] for name in names if name in marks], [name for name in names if name in marks],
                  loc="outside lower center", ncols=columns, fontsize=8, frameon=False)  # fmt: skip
    return save(figure, path)


def _place(measure: str) -> int | None:
    """Where a measure stands in the figure; None if it is not drawn."""
    return next((i for i, pattern in enumerate(DRAWN) if fnmatch.fnmatchcase(measure, pattern)), None)


def _panel(axes: Any, measured: Sequence[Result], names: Sequence[str], title: str) -> dict[str, Any]:
    """Draw one measure of one model; returns the mark of each method."""
    marks = {}
    for result in measured:
        index = names.index(result.method)
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index // len(COLOURS) % len(MARKERS)]}
        if result.method == RANDOM:
            marks[RANDOM] = axes.axhline(result.value.value, color="0.6", linestyle="--", linewidth=1)
        elif result.cost is not None:
            marks[result.method] = _point(axes, result, style)
    better = f"; {measured[0].better} is better" if measured else ": not measured"
    axes.set_title(title + better, fontsize=9)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in TICKS if low <= tick <= high], minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return marks


def _point(axes: Any, result: Result, style: dict[str, str]) -> Any:
    value = result.value
    reach = [[value.value - value.low], [value.high - value.value]]
    filled = {} if adds_up(result.method) else {"markerfacecolor": "none"}
    return axes.errorbar(
        result.cost, value.value, yerr=reach, linestyle="none", elinewidth=0.8, markersize=5, **style, **filled
    )
