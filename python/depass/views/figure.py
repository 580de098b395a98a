"""Figures of results, drawn with matplotlib."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DePassError, OutputError
from ..files import write_atomically
from .drawing import (
    GRID,
    NUMBERED,
    SINGULAR,
    Explained,
    Grid,
    Layered,
    headings,
    largest_elsewhere,
    numbers,
    quantity,
    spans,
    summed,
)

SUFFIXES = (".png", ".svg", ".pdf")
_RAISES, _LOWERS = "#da6662", "#6283da"  # the pages' red and blue on white
_TICKS = 40  # up to so many layers or columns, each has a tick label
_LISTED = 20  # neurons listed by name
_LONGEST = 14  # characters of a token's name; longer names are cut


def heat_map(sweep: Grid, path: str | os.PathLike[str], target: int) -> None:
    """Draw a sweep: layers down, components across; red raises the logit, blue lowers it.

    A sweep with too many components for a map (neurons) becomes two bar charts: the positive and negative sums of each
    layer, and the components with the largest scores.

    Raises:
        OutputError: the path cannot be written, or its suffix is not that of an image format.
        DePassError: matplotlib is not installed.
    """
    _write(path, sweep, target, partial(_map if len(sweep.columns) <= GRID else _sums, sweep=sweep, target=target))


def survey_maps(survey: Layered, path: str | os.PathLike[str], target: int) -> None:
    """Draw a survey's two maps side by side: layers by tokens, and layers by heads.

    Of a long prompt, neighbouring tokens are summed.

    Raises:
        OutputError: the path cannot be written, or its suffix is not that of an image format.
        DePassError: matplotlib is not installed.
    """
    _write(path, survey, target, partial(_two_maps, survey=survey, target=target))


def _write(path: str | os.PathLike[str], res: Explained, target: int, draw: Callable[[Any], None]) -> None:
    """Write what ``draw`` draws on a figure, under a title that names the target."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise OutputError(f"cannot draw {os.fspath(path)}: the file name must end in one of {', '.join(SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DePassError("plot needs matplotlib: pip install 'depass-kernels[plots]'") from error
    figure = Figure(layout="constrained")
    explained = res.targets[target]
    logit = float(res.target_logits[target])
    after = f"after token {explained.position + 1}"
    if explained.kind == "sum":
        after = f"over {len(explained.token_ids)} tokens"
    title = f"Target {explained.label!r} {after}: {quantity(res, target)} {logit:.2f}"
    figure.suptitle(title, fontsize=10, parse_math=False)
    draw(figure)
    image = io.BytesIO()
    figure.savefig(image, format=suffix[1:], dpi=150)
    write_atomically(path, image.getvalue())


def _map(figure: Any, sweep: Grid, target: int) -> None:
    scores, names = sweep.scores[target], headings(sweep)
    rows, columns = scores.shape
    numbered = columns <= NUMBERED
    cell = 0.9 if sweep.kind == "modules" else 0.46 if numbered else 0.24
    figure.set_size_inches(max(4.2, 1.6 + cell * columns), max(2.8, 1.2 + 0.22 * rows))
    axes = figure.add_subplot()
    _cells(figure, axes, scores, float(scores.abs().max()) or 1.0, _unit(sweep))
    if numbered:
        for row, line in enumerate(scores.tolist()):
            for column, score in enumerate(line):
                axes.text(column, row, f"{score:+.2f}", ha="center", va="center", fontsize=6.5)
    _columns(axes, names, SINGULAR[sweep.kind])
    _layers(axes, sweep.layers)


def _two_maps(figure: Any, survey: Layered, target: int) -> None:
    columns = spans(len(survey.prompt.tokens))
    tokens, heads = summed(survey.tokens, columns)[target], survey.heads[target]
    widths = [1.5 + min(9.0, max(1.5, 0.18 * scores.shape[1])) for scores in (tokens, heads)]
    figure.set_size_inches(sum(widths), max(2.8, 1.8 + 0.18 * len(tokens)))
    left, right = figure.subplots(1, 2, width_ratios=widths)
    largest = largest_elsewhere(tokens, columns, survey.targets[target].position)
    _cells(figure, left, tokens, largest, "logits")
    _cells(figure, right, heads, float(heads.abs().max()) or 1.0, "logits")
    size = columns[0][1]
    names = [_named(survey.prompt.tokens[begin]) if size == 1 else numbers(begin, end) for begin, end in columns]
    _columns(left, names, "token" if size == 1 else f"sum of {size} neighbouring tokens", upright=True)
    _columns(right, [str(head) for head in range(heads.shape[1])], "attention head")
    _layers(left, [*survey.layers, "out"])
    _layers(right, survey.layers)
    right.set_ylim(left.get_ylim())  # the two maps' layers lie side by side


def _cells(figure: Any, axes: Any, scores: Tensor, largest: float, unit: str) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("scores", [_LOWERS, "white", _RAISES])
    image = axes.imshow(
        scores.numpy(), cmap=colours, vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest"
    )
    beyond = ("neither", "min", "max", "both")[(float(scores.min()) < -largest) + 2 * (float(scores.max()) > largest)]
    figure.colorbar(image, ax=axes, label=f"score ({unit})", aspect=40, pad=0.02, extend=beyond)


def _columns(axes: Any, names: Sequence[str], label: str, upright: bool = False) -> None:
    every = -(-len(names) // _TICKS)
    turned = 90 if upright or max(map(len, names)) > 9 else 0
    ticks = range(0, len(names), every)
    axes.set_xticks(ticks, names[::every], fontsize=8, rotation=turned, parse_math=False)
    axes.set_xlabel(label)


def _named(token: str) -> str:
    """A token on one line, without characters that change the others' direction."""
    text = repr(token.strip() or token)[1:-1]
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _sums(figure: Any, sweep: Grid, target: int) -> None:
    scores = sweep.scores[target]
    figure.set_size_inches(9, max(4.2, 1.2 + 0.22 * len(scores)))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for sums, colour in ((scores.clamp(min=0).sum(1), _RAISES), (scores.clamp(max=0).sum(1), _LOWERS)):
        left.barh(range(len(scores)), sums.tolist(), color=colour)
    left.set_ylim(len(scores) - 0.5, -0.5)
    left.set_title(f"positive and negative sums over each layer's {scores.shape[1]} {sweep.kind}", fontsize=9)
    left.set_xlabel(f"sum of scores ({_unit(sweep)})")
    _layers(left, sweep.layers)
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


def _layers(axes: Any, layers: Sequence[int | str]) -> None:
    every = -(-len(layers) // _TICKS)
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=8)
    axes.set_ylabel("layer")
