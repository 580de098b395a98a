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
_TICKS = 40  # layers or columns that have room for a label each
_LISTED = 20  # neurons that are named


def heat_map(sweep: Grid, path: str | os.PathLike[str], target: int) -> None:
    """Layers down, components across, red for what raises the logit and blue for what lowers it.

    For more components than a map can show (neurons): their positive and negative sums by layer, and the largest.

    Raises:
        OutputError: the path cannot be written, or its suffix names no picture.
        DePassError: matplotlib is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise OutputError(f"cannot draw {os.fspath(path)}: its suffix must be one of {', '.join(SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DePassError("plot needs matplotlib: pip install 'depass-kernels[plots]'") from error
    figure = Figure(layout="constrained")
    said = sweep.targets[target]
    title = f"{said.label!r} after token {said.position + 1}: logit {float(sweep.target_logits[target]):.2f}"
    figure.suptitle(title, fontsize=10, parse_math=False)
    if len(sweep.columns) <= GRID:
        _map(figure, sweep, target)
    else:
        _sums(figure, sweep, target)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=suffix[1:], dpi=150)
    write_atomically(path, drawn.getvalue())


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
    figure.colorbar(image, ax=axes, label=_unit(sweep), aspect=40, pad=0.02)
    if numbered:
        for row, line in enumerate(scores.tolist()):
            for column, score in enumerate(line):
                axes.text(column, row, f"{score:+.2f}", ha="center", va="center", fontsize=6.5)
    every = -(-columns // _TICKS)
    axes.set_xticks(
        range(0, columns, every), names[::every], fontsize=8, rotation=90 if max(map(len, names)) > 9 else 0
    )
    if sweep.kind != "modules":
        axes.set_xlabel(sweep.kind.removesuffix("s"))
    _layers(axes, sweep)


def _sums(figure: Any, sweep: Grid, target: int) -> None:
    scores = sweep.scores[target]
    figure.set_size_inches(9, max(4.2, 1.2 + 0.22 * len(scores)))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for sums, colour in ((scores.clamp(min=0).sum(1), _RAISES), (scores.clamp(max=0).sum(1), _LOWERS)):
        left.barh(range(len(scores)), sums.tolist(), color=colour)
    left.set_ylim(len(scores) - 0.5, -0.5)
    left.set_title(f"all {scores.shape[1]} {sweep.kind} of a layer: positive and negative scores", fontsize=9)
    _layers(left, sweep)
    top = sweep.top(_LISTED, target)
    values = [score for _, score in top]
    right.barh(range(len(top)), values, color=[_RAISES if score > 0 else _LOWERS for score in values])
    right.set_yticks(range(len(top)), [source.label for source, _ in top], fontsize=8)
    right.set_ylim(len(top) - 0.5, -0.5)
    right.set_title(f"the {len(top)} largest", fontsize=9)
    for axes in (left, right):
        axes.set_xlabel(_unit(sweep))
        axes.axvline(0, color="black", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)


def _unit(sweep: Grid) -> str:
    return f"score ({'logits' if sweep.settings.adds_up else sweep.settings.method})"


def _layers(axes: Any, sweep: Grid) -> None:
    every = -(-len(sweep.layers) // _TICKS)
    axes.set_yticks(range(0, len(sweep.layers), every), [str(layer) for layer in sweep.layers[::every]], fontsize=8)
    axes.set_ylabel("layer")
