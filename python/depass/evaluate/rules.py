"""Compares the rules: faithfulness and conservation of all rules, temperatures and mixtures, with and without the first
token (DePass, section 3 and its ablations).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import rules
from ..api import DePass
from ..arguments import argument
from ..errors import DePassError
from . import data
from .data import HELP, Pair
from .measures import FAMILIES, SHARES, relative
from .methods import Outcome, by_rule
from .summary import COLOURS, Mean, area, mean, new_figure, save, table
from .task import Item, Row, Task, TaskOptions
from .tokens import KEEP_WRONG, RETOKENIZE, curves, explained

CURVES = FAMILIES["deletion"]
TEMPERATURES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
OTHERS = ("max", "relu", "linear", *rules.LINEAR, "softmax+half", "steered")


@dataclass(frozen=True)
class Variant:
    """A rule, its temperature (None: it has none, or that of the default), and whether the first token is excluded."""

    rule: str
    temperature: float | None
    excluded: bool

    @property
    def name(self) -> str:
        """The variant's key in the rows."""
        degree = "" if self.temperature is None else f" {self.temperature:g}"
        return f"{self.rule}{degree}{' excluded' if self.excluded else ''}"


def _is_linear(rule: str) -> bool:
    return all(part.paths is not None for part in rules.read(rule).parts)


VARIANTS = (
    *(Variant("softmax", temperature, excluded) for excluded in (False, True) for temperature in TEMPERATURES),
    *(
        Variant(rule, None, excluded)
        for rule in OTHERS
        for excluded in (False, True)
        if not excluded or (rule in rules.FORWARD and not _is_linear(rule))
    ),
)
USUAL = Variant("softmax", 0.1, False)  # the others are compared with it


@dataclass(frozen=True, kw_only=True)
class RulesOptions(TaskOptions):
    """The options of :class:`Rules`.

    Attributes:
        keep_wrong: also measure prompts that the model answers wrong.
        retokenize: decode the remaining tokens of a prompt to text and encode it again.
    """

    data: str = field(default="facts", metadata=argument(f"{HELP} (default: facts)", metavar="FILE"))
    keep_wrong: bool = field(default=False, metadata=KEEP_WRONG)
    retokenize: bool = field(default=False, metadata=RETOKENIZE)


class Rules(Task[RulesOptions]):
    """Measures every variant of DePass as :class:`.tokens.Tokens` measures methods."""

    name = "rules"
    help = "compare the rules and their temperatures: faithfulness and conservation (paper, section 3)"
    Options = RulesOptions

    def items(self, options: RulesOptions) -> list[Item]:
        """Prompts with their answers."""
        return data.prompts(options.data, options.seed, options.needed)

    def measure(self, dp: DePass, prepared: Any, items: Sequence[Item], options: RulesOptions) -> Iterator[Row]:
        """Each prompt's curves for each variant."""
        return curves(dp, items, partial(_scored, dp), CURVES, options.keep_wrong, options.retokenize, options.seed)

    def report(self, rows: Sequence[Row], options: RulesOptions, folder: Path) -> str:
        """One table and one figure."""
        if not rows:
            return "No prompt was measured."
        areas = {
            (variant, curve): area(SHARES, relative(rows, curve, variant.name))
            for variant in VARIANTS
            for curve in CURVES
        }
        about = (
            "*Patch-top* deletes the highest-scoring K % of the tokens and *recover-top* keeps only these. A number is the "
            "answer's probability, divided by its probability after the whole prompt; the area is the mean height over "
            f"K.\n\n*Against {USUAL.name}* is the mean over prompts of the variant's area less that of {USUAL.name} for the "
            "same prompt; an interval without zero is a difference that these prompts show. *Conservation error* is the "
            "largest over prompts of |sum of the scores - logit|, relative to the larger of the logit and the sum of the "
            "scores' absolute values."
        )
        introduction = explained(rows, options.retokenize)
        means = {key: mean(values.tolist(), options.seed) for key, values in areas.items()}
        return "\n\n".join([introduction, about, _table(rows, areas, means, options.seed), _draw(means, folder)])


def _scored(dp: DePass, pairs: Sequence[Pair]) -> list[dict[str, Outcome]]:
    prompts, targets = [list(pair.ids) for pair in pairs], [pair.answer[0] for pair in pairs]
    outcomes = {
        variant.name: by_rule(
            dp, prompts, targets, rule=variant.rule, temperature=variant.temperature, exclude_bos=variant.excluded
        )
        for variant in VARIANTS
    }
    by_prompt = [{name: of_prompts[i] for name, of_prompts in outcomes.items()} for i in range(len(pairs))]
    return [_all_or_none(of_prompt) for of_prompt in by_prompt]


def _all_or_none(outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    """A prompt counts for every variant or for none: the first error stands for all."""
    error = next((outcome for outcome in outcomes.values() if isinstance(outcome, DePassError)), None)
    return outcomes if error is None else dict.fromkeys(outcomes, error)


def _table(
    rows: Sequence[Row], areas: dict[tuple[Variant, str], Tensor], means: dict[tuple[Variant, str], Mean], seed: int
) -> str:
    against = [f"{curve}-top against {USUAL.name}" for curve in CURVES]
    head = ["rule", "τ", "first token", *(f"{curve}-top, area" for curve in CURVES), *against, "conservation error"]
    lines = [
        [
            variant.rule,
            "" if variant.temperature is None else f"{variant.temperature:g}",
            "excluded" if variant.excluded else "included",
            *(str(means[variant, curve]) for curve in CURVES),
            *(
                "" if variant == USUAL else str(mean((areas[variant, curve] - areas[USUAL, curve]).tolist(), seed))
                for curve in CURVES
            ),
            f"{max(row['missed'][variant.name] for row in rows):.1e}",
        ]
        for variant in VARIANTS
    ]
    return table(head, lines)


def _draw(areas: dict[tuple[Variant, str], Mean], folder: Path) -> str:
    figure = new_figure(9, 4)
    panels = figure.subplots(1, len(CURVES))
    for axes, curve in zip(panels, CURVES, strict=True):
        for excluded, line in ((False, "-"), (True, "--")):
            along = [areas[Variant("softmax", temperature, excluded), curve] for temperature in TEMPERATURES]
            label = f"softmax{', first token excluded' if excluded else ''}"
            axes.plot(TEMPERATURES, [m.value for m in along], line, marker="o", color=COLOURS[0], label=label)
            if not excluded:
                axes.fill_between(
                    TEMPERATURES, [m.low for m in along], [m.high for m in along], color=COLOURS[0], alpha=0.15
                )
        for rule, colour in zip(OTHERS, cycle(COLOURS[1:]), strict=False):
            own = ":" if _is_linear(rule) else "-." if rule not in rules.FORWARD else "-"
            for excluded, line in ((False, own), (True, "--")):
                if (area_of_rule := areas.get((Variant(rule, None, excluded), curve))) is not None:
                    shown = None if excluded else rule
                    axes.axhline(area_of_rule.value, linestyle=line, color=colour, linewidth=1.2, label=shown)
        axes.set_xscale("log")
        axes.set_xlabel(
            "temperature τ of softmax, pre-activation units\n(dashed lines: first token excluded)", fontsize=9
        )
        axes.set_ylabel(
            "probability of the answer,\nrelative to the whole prompt" if curve == CURVES[0] else "", fontsize=9
        )
        better = "lower" if curve == "patch" else "higher"
        axes.set_title(f"{curve}-top, area under the curve; {better} is better", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=-(-len(labels) // 2), fontsize=8, frameon=False)
    return save(figure, folder / "rules.png")
