"""Helpers for the reports: intervals, areas, tables and figures."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DePassError
from ..files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESAMPLES = 2000
FEWEST = 5  # prompts of a measure; fewer decide nothing
# DePass first; a method keeps its colour in every figure of a report
COLOURS = ("#0b62a4", "#c43d3d", "#d98b19", "#5d8a3a", "#8a5cb8", "#57a69a", "#b0649a", "#7a5c3e", "#4f4f9f", "#8c8c8c")
LINES = ("-", "--", ":", "-.")


class Mean(NamedTuple):
    """A mean and its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean(values: Sequence[float], seed: int) -> Mean:
    """The mean with its 95 % percentile bootstrap interval, from :data:`RESAMPLES` resamples of the values."""
    sample = torch.tensor(values, dtype=torch.float64)
    chance = torch.Generator().manual_seed(seed)
    means = sample[torch.randint(len(sample), (RESAMPLES, len(sample)), generator=chance)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Mean(float(sample.mean()), low, high)


@dataclass(frozen=True)
class Result:
    """What one method does in one experiment: a line of a run's ``results.json``.

    Attributes:
        measure: what is measured, in words: ``"patch-top, area"``. All methods of one measure can be compared.
        better: ``"lower"`` or ``"higher"``.
        method: the method's name.
        value: the mean over prompts.
        prompts: how many prompts.
        against: the mean of this method's value less that of the reference, over the prompts that have both; None for the
            reference itself.
        reference: the method that all others are compared with.
        tokens: the prompts' mean length.
        cost: the median over prompts of the time that the method takes, in plain passes of the model over the same prompts;
            None: not measured.
        values: the method's value for each of the experiment's prompts, in one order for all methods, to five digits; None
            where the method was not measured.
    """

    measure: str
    better: str
    method: str
    value: Mean
    prompts: int
    against: Mean | None
    reference: str
    tokens: float
    cost: float | None
    values: tuple[float | None, ...]


def results(
    measure: str,
    better: str,
    values: Mapping[str, Sequence[float | None]],
    reference: str,
    seed: int,
    tokens: Sequence[int],
    costs: Mapping[str, Sequence[float]] | None = None,
) -> list[Result]:
    """One result per method, from each method's value for each prompt, the prompts' lengths and perhaps the methods' costs.

    All methods must have values for the same prompts in the same order; None where a method was not measured.
    """
    found = []
    for name, of in values.items():
        known = [value for value in of if value is not None]
        compared = name != reference and reference in values
        both = differences(of, values[reference]) if compared else []
        found.append(
            Result(
                measure=measure,
                better=better,
                method=name,
                value=mean(known, seed),
                prompts=len(known),
                against=mean(both, seed) if both else None,
                reference=reference,
                tokens=sum(tokens) / len(tokens),
                cost=statistics.median(costs[name]) if costs is not None and name in costs else None,
                values=tuple(None if value is None else float(f"{value:.5g}") for value in of),
            )
        )
    return found


def differences(values: Sequence[float | None], others: Sequence[float | None]) -> list[float]:
    """The differences of two methods' values, over the prompts that have both."""
    pairs = zip(values, others, strict=True)
    return [value - other for value, other in pairs if value is not None and other is not None]


def area(x: Sequence[float], y: Tensor) -> Tensor:
    """The mean height of curves ``y`` ``[..., K]`` over ``x``: their area by trapezoids, divided by the width of ``x``."""
    at = torch.tensor(x, dtype=y.dtype)
    return torch.trapezoid(y, at) / (at[-1] - at[0])


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; width and height are in inches.

    Raises:
        DePassError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DePassError("the report's figures need matplotlib: pip install 'depass-kernels[evaluate]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def prompts_in_words(lengths: Sequence[int], kind: str = "") -> str:
    """How many prompts, and how long they are in tokens: ``2 prompts of 193 to 200 tokens``."""
    low, high = min(lengths), max(lengths)
    plural = "prompt" if len(lengths) == 1 else "prompts"
    return (
        f"{len(lengths)} {plural} of {f'{kind}, ' if kind else ''}{low if low == high else f'{low} to {high}'} tokens"
    )


def style(index: int) -> dict[str, Any]:
    """The colour and the line of the ``index``-th method of a figure; the first forty differ."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[index // len(COLOURS) % len(LINES)]}


def save(figure: Figure, path: Path) -> str:
    """Write a figure as PNG, and return the Markdown that shows it in a report of the same directory."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_atomically(path, image.getvalue())
    return f"![{path.stem}]({path.name})"
