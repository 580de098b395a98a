"""Which rule shares out the MLPs best: faithfulness and conservation of all rules, temperatures, and with or without the
first token (DePass, section 3 and its ablations).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..api import DePass
from ..arguments import argument
from . import data
from .data import HELP
from .summary import COLOURS, Mean, area, mean, new_figure, save, table
from .task import Item, Row, Task, TaskOptions
from .tokens import CURVES, KEEP_WRONG, RETOKENIZE, SHARES, curves, depass, explained, relative

TEMPERATURES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
OTHERS = ("max", "relu", "linear", "taylor")


@dataclass(frozen=True)
class Variant:
    """A rule, its temperature where it has one, and whether the first token is excluded (taylor: never)."""

    rule: str
    temperature: float | None
    excluded: bool

    @property
    def name(self) -> str:
        """In the rows."""
        degree = "" if self.temperature is None else f" {self.temperature:g}"
        return f"{self.rule}{degree}{' excluded' if self.excluded else ''}"


VARIANTS = (
    *(Variant("softmax", temperature, excluded) for excluded in (False, True) for temperature in TEMPERATURES),
    *(
        Variant(rule, None, excluded)
        for rule in OTHERS
        for excluded in (False, True)
        if (rule, excluded) != ("taylor", True)
    ),
)


@dataclass(frozen=True, kw_only=True)
class RulesOptions(TaskOptions):
    """What :class:`Rules` is told.

    Attributes:
        keep_wrong: measure prompts that the model gets wrong as well.
        retokenize: turn what is left of a prompt into text and encode it anew.
    """

    data: str = field(default="facts", metadata=argument(f"{HELP} (default: facts)", metavar="FILE"))
    keep_wrong: bool = field(default=False, metadata=KEEP_WRONG)
    retokenize: bool = field(default=False, metadata=RETOKENIZE)


class Rules(Task[RulesOptions]):
    """Measures what :class:`.tokens.Tokens` does, of every variant of DePass."""

    name = "rules"
    help = "rules and temperatures of sharing MLPs: faithfulness and conservation"
    Options = RulesOptions

    def items(self, options: RulesOptions) -> list[Item]:
        """Prompts with their answers."""
        return data.prompts(options.data, options.seed, options.limit)

    def measure(self, dp: DePass, prepared: Any, items: Sequence[Item], options: RulesOptions) -> Iterator[Row]:
        """Every prompt's curves by every variant."""
        scorers = {
            variant.name: partial(
                depass, mlp_rule=variant.rule, temperature=variant.temperature, exclude_bos=variant.excluded
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
            "*Misses the logit by*: the largest over prompts of |sum of the scores - logit|, relative to the larger of the "
            "logit and the sum of the scores' absolute values."
        )
        said = explained(rows, options.retokenize)
        return "\n\n".join([said, about, _table(rows, areas, options.seed), _draw(areas, folder)])


def _table(rows: Sequence[Row], areas: dict[tuple[Variant, str], Mean], seed: int) -> str:
    head = ["rule", "τ", "first token", f"patch-top, K = {SHARES[0]} %", *(f"{curve}-top, area" for curve in CURVES),
            "misses the logit by"]  # fmt: skip
    lines = [
        [
            variant.rule,
            "" if variant.temperature is None else f"{variant.temperature:g}",
            "excluded" if variant.excluded else "takes part",
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
                if (found := areas.get((Variant(rule, None, excluded), curve))) is not None:
                    shown = None if excluded else rule
                    axes.axhline(found.value, linestyle=line, color=colour, linewidth=1.2, label=shown)
        axes.set_xscale("log")
        axes.set_xlabel("τ of softmax")
        axes.set_ylabel(f"{curve}-top, area")
        axes.set_title(f"{'lower' if curve == 'patch' else 'higher'} is better", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return save(figure, folder / "rules.png")
