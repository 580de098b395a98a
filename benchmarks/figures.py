"""Draws the figures of the rows: time and memory against prompt length, and a roofline of the ops."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import wording
from .machine import BenchmarkError
from .ops import TORCH
from .registry import OURS
from .runner import Row

# fixed order, ours first: a method keeps its colour in every figure
COLOURS = {
    OURS: "#0b62a4", "naive": "#c43d3d", "eager": "#d98b19", "compiled": "#8a5cb8", "input_x_gradient": "#5d8a3a",
    "integrated_gradients_20": "#57a69a", "integrated_gradients_50": "#1f7a6d", "ablation": "#8c8c8c",
}  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Time and memory against prompt length for each model with two or more sizes, and a roofline of our ops.

    Raises:
        BenchmarkError: matplotlib is not installed.
    """
    series: dict[tuple[str, str, str], list[Row]] = {}
    rooflines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["what"] == "op" and row["backend"] == TORCH:
            continue  # what the library does is in the table
        if row["what"] == "op":
            rooflines.setdefault((row["machine"], row["dtype"], row["sizes"]), []).append(row)
        elif row["question"] == "tokens" and row["model"] != "tiny":
            series.setdefault((row["machine"], row["model"], row["dtype"]), []).append(row)
    series = {key: of for key, of in series.items() if len({r["size"] for r in of if r["status"] == "ok"}) > 1}
    if not series and not rooflines:
        return []
    drawn = [_draw_series(of, folder / f"tokens-{'-'.join(key)}.png") for key, of in series.items()]
    return drawn + [_draw_roofline(of, folder / f"roofline-{'-'.join(key)}.png") for key, of in rooflines.items()]


def pyplot() -> Any:
    """matplotlib's pyplot, set to draw into files.

    Raises:
        BenchmarkError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise BenchmarkError("the figures need matplotlib: pip install 'depass-kernels[plots]'") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
    return path


def shown(figures: Sequence[Path], document: Path) -> str:
    """The Markdown that shows figures in a document."""
    return "\n\n".join(f"![{figure.stem}]({os.path.relpath(figure, document.parent)})" for figure in figures)


def _draw_series(rows: Sequence[Row], path: Path) -> Path:
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    sizes = sorted({int(row["size"]) for row in rows})
    for index, (method, colour) in enumerate(COLOURS.items()):
        of = sorted((r for r in rows if r["method"] == method and r["status"] == "ok"), key=lambda r: int(r["size"]))
        style: dict[str, Any] = {
            "color": colour, "marker": _MARKERS[index], "label": method.replace("_", " "), "markersize": 5,
            "linewidth": 2.4 if method == OURS else 1.3, "zorder": 3 if method == OURS else 2,
        }  # fmt: skip
        if of:
            low, high = [r["seconds_p20"] for r in of], [r["seconds_p80"] for r in of]
            x = [int(r["size"]) for r in of]
            left.plot(x, [r["seconds_p50"] for r in of], **style)
            left.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        # ours may differ between plain passes by less than a page: a log scale has no place for nothing
        held = [(int(r["size"]), r["beyond_plain_bytes"] / 1e6) for r in of if r.get("beyond_plain_bytes")]
        if held:
            right.plot(*zip(*held, strict=True), **style)
        for row in rows:  # an out-of-memory is a result: a cross at what was asked for
            if row["method"] == method and row["status"] == "oom" and row.get("asked_bytes"):
                right.plot(int(row["size"]), row["asked_bytes"] / 1e6, "x", color=colour, markersize=11, mew=2.5)
            if row["method"] == method and row["status"] == "stopped":
                left.plot(int(row["size"]), row["seconds_at_least"], "^", color=colour, markersize=11, fillstyle="none")
    ours = sorted((r for r in rows if r["method"] == OURS and r["status"] == "ok"), key=lambda r: int(r["size"]))
    if ours:
        left.plot(
            [int(r["size"]) for r in ours], [r["floor_seconds"] for r in ours], "k--", linewidth=1.2,
            label="floor: the GEMMs alone, measured",
        )  # fmt: skip
    for axes, what in (
        (left, "time, s (band: p20 to p80; hollow: stopped)"),
        (right, "extra memory, MB (x: did not fit)"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="prompt length N, tokens", ylabel=what)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    first = rows[-1]
    model = wording.model(first["model"])
    figure.suptitle(f"Token attribution, {model}, {first['dtype']}: {wording.device(first)}", fontsize=11)
    return save(figure, path)


def _draw_roofline(rows: Sequence[Row], path: Path) -> Path:
    figure, axes = pyplot().subplots(figsize=(8, 6.2), layout="constrained")
    copy, gemm = rows[-1]["copy_bytes_per_second"], rows[-1]["gemm_operations_per_second"]
    intensity = [row["operations"] / row["bytes"] for row in rows]
    ends = [min(*intensity, gemm / copy) / 3, max(*intensity, gemm / copy) * 3]
    axes.plot([ends[0], gemm / copy, ends[1]], [ends[0] * copy / 1e9, gemm / 1e9, gemm / 1e9], "k-", linewidth=1.2,
              label=f"copy {copy / 1e9:.0f} GB/s, GEMM {gemm / 1e9:.0f} GFLOP/s, measured")  # fmt: skip
    colours = dict(zip(dict.fromkeys(row["op"] for row in rows), COLOURS.values(), strict=False))
    shapes = dict(zip(dict.fromkeys(row["backend"] for row in rows), _MARKERS, strict=False))
    for (op, backend), of in _grouped(rows).items():
        axes.plot([r["operations"] / r["bytes"] for r in of], [r["operations"] / r["seconds_p50"] / 1e9 for r in of],
                  shapes[backend], color=colours[op], label=f"{op}, {backend}", linestyle="none", alpha=0.85)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="rate, GFLOP/s")
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    models = sorted({row["model"] for row in rows})
    of = models[0] if len(models) == 1 else f"{len(models)} models"
    what = f"Kernels at the shapes of {of}, {rows[-1]['dtype']}, N={rows[-1]['positions']}"
    axes.set_title(f"{what}: {wording.device(rows[-1])}", fontsize=10)
    return save(figure, path)


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["op"], row["backend"]), []).append(row)
    return found
