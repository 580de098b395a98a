"""Figures of results, drawn with matplotlib."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DePassError, OutputError
from .files import write_atomically

if TYPE_CHECKING:
    from .sweep import Sweep

SUFFIXES = (".png", ".svg", ".pdf")
_LABELLED = 40  # columns that have room for a number each


def heat_map(sweep: Sweep, path: str | os.PathLike[str], target: int) -> None:
    """Layers down, components across, red for what raises the logit and blue for what lowers it.

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
    scores = sweep.scores[target]
    rows, columns = scores.shape
    largest = float(scores.abs().max()) or 1.0
    figure = Figure(
        figsize=(max(4.5, min(14.0, 2.2 + 0.32 * columns)), max(2.8, 1.4 + 0.22 * rows)), layout="constrained"
    )
    axes = figure.add_subplot()
    image = axes.imshow(
        scores.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest"
    )
    figure.colorbar(image, ax=axes, label="score (logits)")
    said = sweep.targets[target]
    axes.set_title(f"{said.label!r}: logit {float(sweep.target_logits[target]):.2f}", fontsize=10)
    if sweep.kind == "modules":
        axes.set_xticks(range(columns), ["attention", "MLP"])
    else:
        axes.set_xlabel(sweep.kind.removesuffix("s"))
        if columns <= _LABELLED:
            axes.set_xticks(range(columns), [str(column) for column in sweep.columns], fontsize=8)
    axes.set_ylabel("layer")
    shown = range(0, rows, 1 if rows <= _LABELLED else -(-rows // _LABELLED))
    axes.set_yticks(shown, [str(sweep.layers[row]) for row in shown], fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=suffix[1:], dpi=150)
    write_atomically(path, drawn.getvalue())
