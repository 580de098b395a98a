"""Figures of results, drawn with matplotlib."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from ..errors import DePassError, OutputError
from ..files import write_atomically
from .drawing import GRID, NUMBERED, Grid, headings

SUFFIXES = (".png", ".svg", ".pdf")
_RAISES, _LOWERS = "#da6662", "#6283da"  # the pages' red and blue on white
_TICKS = 40  # up to so many layers or columns, each has a tick label
_LISTED = 20  # neurons listed by name


def heat_map(sweep: Grid, path: str | os.PathLike[str], target: int) -> None:
    """Draw a sweep: layers down, components across; red raises the logit, blue lowers it.

    A sweep with too many components for a map (neurons) becomes two bar charts: the positive and negative sums of each
    layer, and the components with the largest scores.

    Raises:
        OutputError: the path cannot be written, or its suffix is not that of an image format.
        DePassError: matplotlib is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise OutputError(f"cannot draw {os.fspath(path)}: the file name must end in one of {', '.join(SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DePassError("plot needs matplotlib: pip install 'depass-kernels[plots]'") from error
    figure = Figure(layout="constrained")
    explained = sweep.targets[target]
    logit = float(sweep.target_logits[target])
    title = f"Target {explained.label!r} after token {explained.position + 1}: logit {logit:.2f}"
    figure.suptitle(title, fontsize=10, parse_math=False)
    if len(sweep.columns) <= GRID:
        _map(figure, sweep, target)
    else:
        _sums(figure, sweep, target)
    image = io.BytesIO()
    figure.savefig(image, format=suffix[1:], dpi=150)
    write_atomically(path, image.getvalue())


def _map(figure: Any, sweep: Grid, target: int) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    scores, names = sweep.scores[target], headings(sweep)
    rows, columns = scores.shape
    numbered = columns <= NUMBERED
    largest = float(scores.abs().max()) or 1.0
    cell = 0.9 if sweep.kind == "modules" else 0.46 if numbered else 0.24
    figure.set_size_inches(max(4.2, 1.6 + cell * columns), max(2.8, 1.2 + 0.22 * rows))
    axes = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("scores", [_LOWERS, "white", _RAISES])
    image = axes.imshow(
        scores.numpy(), cmap=colours, vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest"
    )
    figure.colorbar(image, ax=axes, label=f"score ({_unit(sweep)})", aspect=40, pad=0.02)
    if numbered:
        for row, line in enumerate(scores.tolist()):
            for column, score in enumerate(line):
                axes.text(column, row, f"{score:+.2f}", ha="center", va="center", fontsize=6.5)
    every = -(-columns // _TICKS)
    axes.set_xticks(
        range(0, columns, every), names[::every], fontsize=8, rotation=90 if max(map(len, names)) > 9 else 0
    )
    axes.set_xlabel({"heads": "attention head", "neurons": "neuron", "modules": "module"}[sweep.kind])
    _layers(axes, sweep)


def _sums(figure: Any, sweep: Grid, target: int) -> None:
    scores = sweep.scores[target]
    figure.set_size_inches(9, max(4.2, 1.2 + 0.22 * len(scores)))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for sums, colour in ((scores.clamp(min=0).sum(1), _RAISES), (scores.clamp(max=0).sum(1), _LOWERS)):
        left.barh(range(len(scores)), sums.tolist(), color=colour)
    left.set_ylim(len(scores) - 0.5, -0.5)
    left.set_title(f"positive and negative sums over each layer's {scores.shape[1]} {sweep.kind}", fontsize=9)
    left.set_xlabel(f"sum of scores ({_unit(sweep)})")
    _layers(left, sweep)
    top = sweep.top(_LISTED, target)
    values = [score for _, score in top]
    right.barh(range(len(top)), values, color=[_RAISES if score > 0 else _LOWERS for score in values])
    right.set_yticks(range(len(top)), [source.label for source, _ in top], fontsize=8)
    right.set_ylim(len(top) - 0.5, -0.5)
    right.set_title(f"the {len(top)} largest scores by absolute value", fontsize=9)
    right.set_xlabel(f"score ({_unit(sweep)})")
    for axes in (left, right):
        axes.axvline(0, color="black", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)


def _unit(sweep: Grid) -> str:
    return "logits" if sweep.settings.adds_up else f"unit of {sweep.settings.method}"


def _layers(axes: Any, sweep: Grid) -> None:
    every = -(-len(sweep.layers) // _TICKS)
    axes.set_yticks(range(0, len(sweep.layers), every), [str(layer) for layer in sweep.layers[::every]], fontsize=8)
    axes.set_ylabel("layer")
