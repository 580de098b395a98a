"""Compares the MLP rules: faithfulness and conservation of all rules and temperatures, with and without the first token
(DePass, section 3 and its ablations).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..api import DePass
from ..arguments import argument
from ..rules import LINEAR
from . import data
from .data import HELP
from .summary import COLOURS, Mean, area, mean, new_figure, save, table
from .task import Item, Row, Task, TaskOptions
from .tokens import CURVES, KEEP_WRONG, RETOKENIZE, SHARES, curves, depass, explained, relative

TEMPERATURES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
OTHERS = ("max", "relu", "linear", *LINEAR)


@dataclass(frozen=True)
class Variant:
    """A rule, its temperature (None: it has none), and whether the first token is excluded (never with a linear rule)."""

    rule: str
    temperature: float | None
    excluded: bool

    @property
    def name(self) -> str:
        """The variant's key in the rows."""
        degree = "" if self.temperature is None else f" {self.temperature:g}"
        return f"{self.rule}{degree}{' excluded' if self.excluded else ''}"


VARIANTS = (
    *(Variant("softmax", temperature, excluded) for excluded in (False, True) for temperature in TEMPERATURES),
    *(
        Variant(rule, None, excluded)
        for rule in OTHERS
        for excluded in (False, True)
        if not (excluded and rule in LINEAR)
    ),
)


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
    help = "compare the MLP rules and their temperatures: faithfulness and conservation (paper, section 3)"
    Options = RulesOptions

    def items(self, options: RulesOptions) -> list[Item]:
        """Prompts with their answers."""
        return data.prompts(options.data, options.seed, options.limit)

    def measure(self, dp: DePass, prepared: Any, items: Sequence[Item], options: RulesOptions) -> Iterator[Row]:
        """Each prompt's curves for each variant."""
        scorers = {
            variant.name: partial(
                depass, rule=variant.rule, temperature=variant.temperature, exclude_bos=variant.excluded
            )
            for variant in VARIANTS
        }
        return curves(dp, items, scorers, options.keep_wrong, options.retokenize)

    def report(self, rows: Sequence[Row], options: RulesOptions, folder: Path) -> str:
        """One table and one figure."""
        if not rows:
            return "No prompt was measured."
        areas = {
            (variant, curve): mean(area(SHARES, relative(rows, curve, variant.name)).tolist(), options.seed)
            for variant in VARIANTS
            for curve in CURVES
        }
        about = (
            "*Conservation error* is the largest over prompts of |sum of the scores - logit|, relative to the larger of the "
            "logit and the sum of the scores' absolute values."
        )
        introduction = explained(rows, options.retokenize)
        return "\n\n".join([introduction, about, _table(rows, areas, options.seed), _draw(areas, folder)])


def _table(rows: Sequence[Row], areas: dict[tuple[Variant, str], Mean], seed: int) -> str:
    head = ["rule", "τ", "first token", f"patch-top, K = {SHARES[0]} %", *(f"{curve}-top, area" for curve in CURVES),
            "conservation error"]  # fmt: skip
    lines = [
        [
            variant.rule,
            "" if variant.temperature is None else f"{variant.temperature:g}",
            "excluded" if variant.excluded else "included",
            str(mean(relative(rows, "patch", variant.name)[:, 0].tolist(), seed)),
            *(str(areas[variant, curve]) for curve in CURVES),
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
        for rule, colour in zip(OTHERS, COLOURS[1:], strict=False):
            for excluded, line in ((False, "-"), (True, "--")):
                if (area_of_rule := areas.get((Variant(rule, None, excluded), curve))) is not None:
                    shown = None if excluded else rule
                    axes.axhline(area_of_rule.value, linestyle=line, color=colour, linewidth=1.2, label=shown)
        axes.set_xscale("log")
        axes.set_xlabel("temperature τ of the softmax rule (pre-activation units)")
        axes.set_ylabel(
            "probability of the answer, relative to the whole prompt" if curve == CURVES[0] else "", fontsize=9
        )
        better = "lower" if curve == "patch" else "higher"
        axes.set_title(f"{curve}-top, area under the curve; {better} is better", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return save(figure, folder / "rules.png")
