"""The figures and the tables of the linear rules, from the rows that ``python -m benchmarks.linear`` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from depass.evaluate.summary import table

from . import linear, wording
from .figures import COLOURS, pyplot, save, shown
from .registry import OURS, REAL
from .runner import Row
from .wording import NOTHING

LINES = {  # the methods of the figure: colour and marker; those that are in other figures look the same there
    "half": ("#c2255c", "h"), "dual_path": ("#3b3b3b", ">"), "steer": ("#e8710a", "<"),
    linear.GRADIENT: (COLOURS[linear.GRADIENT], "v"), "softmax": (COLOURS[OURS], "o"),
}  # fmt: skip
NAMES = {linear.PLAIN: "plain eager pass", linear.GRADIENT: "input x gradient"}
TICKS = (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500)  # of the ratios, as far as they reach


def read() -> list[Row]:
    """The row of each machine, model and dtype, by their names."""
    return [json.loads(path.read_text()) for path in sorted(linear.RESULTS.glob("linear-*.json"))]


def section(figures: Sequence[Path], document: Path) -> str:
    """For each row the figure, what was measured and where, and the table: methods down, lengths across."""
    parts = [part for row, figure in zip(read(), figures, strict=True) for part in _of(row, figure, document)]
    return "\n\n".join(parts) or NOTHING


def _of(row: Row, figure: Path, document: Path) -> list[str]:
    lengths = " ".join(map(str, row["lengths"]))
    defaults = {"device": "cpu", "model": REAL, "dtype": linear.DTYPE}
    on = "".join(f" --{name} {row[name]}" for name, default in defaults.items() if row[name] != default)
    threads = f" --threads {row['threads']}" if row["device"] == "cpu" else ""
    command = f"python -m benchmarks.linear{on} --lengths {lengths} --runs {row['runs']}{threads}"
    runs = [each["runs"] for each in row["measured"]]
    rounds = " to ".join(dict.fromkeys((str(min(runs)), str(max(runs)))))
    caption = (
        f"Command: `{command}`. {wording.model(row['model'])}, {row['dtype']}. Times are medians; runs of each method: "
        f"{rounds}. {wording.where([row])}"
    )
    return [shown([figure], document), caption, _table(row)]


def _table(row: Row) -> str:
    found = {(each["method"], each["length"]): each for each in row["measured"]}
    head = ["method", *(f"{length} tokens" for length in row["lengths"])]
    lines = []
    for method in dict.fromkeys(each["method"] for each in row["measured"]):
        of = [found.get((method, length)) for length in row["lengths"]]
        cells = ["" if each is None else _cell(each) for each in of]
        lines.append([NAMES.get(method, method), *cells])
    return table(head, lines)


def _cell(measured: Row) -> str:
    if measured["method"] == linear.PLAIN:
        return wording.seconds(measured["seconds_p50"])
    times = measured["times_plain"]
    return f"{times:.0f}×" if times >= 10 else f"{times:.1f}×"


def draw(folder: Path) -> list[Path]:
    """For each row the time relative to a plain eager pass against prompt length.

    Raises:
        BenchmarkError: matplotlib is not installed.
    """
    return [_drawn(row, folder) for row in read()]


def _drawn(row: Row, folder: Path) -> Path:
    figure, axes = pyplot().subplots(figsize=(8, 5), layout="constrained")
    passes = {each["length"]: each["seconds_p50"] for each in row["measured"] if each["method"] == linear.PLAIN}
    heights = []
    for method, (colour, marker) in LINES.items():
        of = [each for each in row["measured"] if each["method"] == method]
        low, high = ([each[key] / passes[each["length"]] for each in of] for key in ("seconds_p20", "seconds_p80"))
        lengths = [each["length"] for each in of]
        axes.plot(lengths, [each["times_plain"] for each in of], color=colour, marker=marker, markersize=6,
                  linewidth=1.3 if method == linear.GRADIENT else 2, label=NAMES.get(method, method))  # fmt: skip
        axes.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
        heights += [*low, *high]
    axes.axhline(1, color="black", linestyle="--", linewidth=1.2, label=NAMES[linear.PLAIN])
    axes.set(xscale="log", yscale="log", xlabel="prompt length N, tokens",
             ylabel="time, plain eager passes (band: p20 to p80)")  # fmt: skip
    axes.set_xticks(row["lengths"], map(str, row["lengths"]))
    ticks = [tick for tick in TICKS if min(1, *heights) / 1.5 <= tick <= 1.5 * max(1, *heights)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    model = wording.model(row["model"])
    figure.suptitle(f"Token attribution, {model}, {row['dtype']}: {wording.device(row)}", fontsize=11)
    return save(figure, folder / f"linear-{row['machine']}-{row['model']}-{row['dtype']}.png")
