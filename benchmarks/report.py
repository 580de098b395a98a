"""Draws the figures and writes the tables of documents from the results: no number in them is typed by hand.

A document marks where a table goes with ``<!-- begin tokens -->`` and ``<!-- end tokens -->``, each on its own line. The
report replaces the text between the markers and nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depass.evaluate.summary import table
from depass.files import write_atomically

from .machine import BenchmarkError
from .ops import OPS, TORCH
from .predict import CARDS, card_of, load
from .registry import METHODS, OURS, SHAPES, UNITS, all_cases
from .runner import Row

NOTHING = "Not measured yet."
OFF = (0.8, 1.25)  # measured over predicted: what lies outside is marked
PLAIN_PYTORCH = "eager"
GRADIENT = "input_x_gradient"
SPEED_ROWS = {  # the cases that the README states in words, by model
    "smollm2": (
        "tokens/smollm2/float32/10", "tokens/smollm2/float32/32", "tokens/smollm2/float32/128",
        "heads/smollm2/float32/10", "prompts/smollm2/float32/64",
    ),
    "llama-2-7b": (
        "tokens/llama-2-7b/bfloat16/16", "tokens/llama-2-7b/bfloat16/64", "tokens/llama-2-7b/bfloat16/256",
        "heads/llama-2-7b/bfloat16/16", "prompts/llama-2-7b/bfloat16/64",
    ),
}  # fmt: skip
CASE_IN_WORDS = {
    "tokens": "a {}-token prompt", "heads": "every head of every layer, {}-token prompt", "prompts": "{} short prompts",
}  # fmt: skip
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_MARKER = re.compile(r"^<!-- (begin|end) ([a-z0-9-]+) -->[ \t]*$", re.MULTILINE)
# fixed order, ours first: a method keeps its colour in every figure
COLOURS = {
    OURS: "#0b62a4", "naive": "#c43d3d", "eager": "#d98b19", "compiled": "#8a5cb8", "input_x_gradient": "#5d8a3a",
    "integrated_gradients_20": "#57a69a", "integrated_gradients_50": "#1f7a6d", "ablation": "#8c8c8c",
}  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Newest:
    """The newest row of each machine, case, method and backend; and the figures drawn from these rows."""

    rows: list[Row]
    figures: list[Path]


def report(rows: Sequence[Row], documents: Sequence[Path], folder: Path) -> Iterator[Path]:
    """Draw the figures into ``folder`` and fill in the documents. Yields the paths written.

    Raises:
        BenchmarkError: a document cannot be read; its markers are missing, unknown or unpaired; or matplotlib is not
            installed. No document is written in these cases.
    """
    texts = {path: _read(path) for path in documents}
    for path, text in texts.items():
        _marked(path, text)
    kept = newest(rows)
    drawn = draw(kept, folder)
    for path, text in texts.items():
        filled = fill(path, text, Newest(kept, drawn))
        write_atomically(path, filled.encode())
    yield from drawn
    yield from documents


def newest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each machine, case, method and backend, in the registry's order.

    ``times_ours`` is added where the same session also measured ours: the row's time divided by the time of ours. Runs on
    GPUs also write rows of other kinds; these are left out, and so are rows of an op that no longer exists.
    """
    found: dict[tuple[Any, ...], Row] = {}
    ours: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["what"] not in ("case", "op") or (row["what"] == "op" and row["op"] not in OPS):
            continue
        names = ("machine", "case", "method", "op", "model", "dtype", "backend", "asked_backend", "sizes",
                 "memory_limit_bytes")  # fmt: skip
        beside = (row.get("machine"), row.get("session"), row.get("case"))
        if row.get("method") == OURS and row["status"] == "ok":
            ours[beside] = row["seconds_p50"]
        found[tuple(row.get(name) for name in names)] = {**row, "beside": beside}
    for row in found.values():
        seconds = row.get("seconds_p50", row.get("seconds_at_least"))  # the latter of a run that was stopped
        if row.get("method") not in (None, OURS) and seconds is not None and row["beside"] in ours:
            row["times_ours"] = seconds / ours[row["beside"]]
    order = {case.name: index for index, case in enumerate(all_cases())}
    models = list(SHAPES)

    def rank(row: Row) -> tuple[Any, ...]:
        if row["what"] == "op":
            return (row["machine"], 1, row["op"], models.index(row["model"]), row["backend"])
        methods = list(METHODS[row["question"]])
        method = methods.index(row["method"]) if row["method"] in methods else len(methods)
        return (row["machine"], 0, order.get(row["case"], len(order)), method, str(row.get("asked_backend")))

    return sorted(found.values(), key=rank)


# Documents.


def fill(path: Path, text: str, results: Newest) -> str:
    """The text with every table between its markers."""
    out, last = [], 0
    for name, begin, end in _marked(path, text):
        out += [text[last:begin], "\n", TABLES[name](results, path), "\n"]
        last = end
    return "".join([*out, text[last:]])


def _marked(path: Path, text: str) -> list[tuple[str, int, int]]:
    """Each table's name, and where the text between its markers begins and ends."""
    tables: list[tuple[str, int, int]] = []
    open_at: tuple[str, int] | None = None
    for match in _MARKER.finditer(text):
        kind, name = match.groups()
        if name not in TABLES:
            raise BenchmarkError(f"{path}: unknown table {name!r}; choose from: {', '.join(TABLES)}")
        if (kind == "end") != (open_at is not None) or (open_at is not None and open_at[0] != name):
            raise BenchmarkError(
                f"{path}: {match[0].strip()!r} has no partner; markers come in pairs, begin NAME then end NAME"
            )
        if open_at is not None:
            tables.append((name, open_at[1], match.start()))
            open_at = None
        else:
            open_at = (name, match.end())
    if open_at is not None:
        raise BenchmarkError(f"{path}: 'begin {open_at[0]}' has no 'end {open_at[0]}' after it")
    if not tables:
        raise BenchmarkError(
            f"{path} has no markers; add <!-- begin NAME --> and <!-- end NAME --> where a table goes. Nothing was written"
        )
    return tables


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"cannot read {path}: {error}") from error


# Tables.


def _by_machine(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["machine"], []).append(row)
    return found


def _where(rows: Sequence[Row]) -> str:
    """The machine, the versions, the commits and the dates of a table's rows."""
    row = rows[-1]
    commits = sorted(
        {f"{str(r.get('commit'))[:10]}{' with uncommitted changes' if r.get('changed') else ''}" for r in rows}
    )
    dates = sorted({r["date"][:10] for r in rows})
    cpu = f"{row['threads']} threads, {row['cpu_capability']}"
    driver = f", driver {row['driver']}" if row.get("driver") else ""
    limit = sorted({r["memory_limit_bytes"] for r in rows if r.get("memory_limit_bytes")})
    capped = f", memory capped at {', '.join(f'{b / 1e9:g} GB' for b in limit)}" if limit else ""
    return (
        f"Measured on {_machine(row)} ({'GPU' if row['gpu'] else cpu}{driver}{capped}) with torch {row['torch']} and "
        f"transformers {row['transformers']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. "
        f"{'Commit' if len(commits) == 1 else 'Commits'}: {', '.join(commits)}."
    )


def _machine(row: Row) -> str:
    return str(row["gpu"] or row["cpu"])


def _seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.3g} µs"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def _bytes(value: float) -> str:
    return f"{value / 1e6:.0f} MB" if value < 1e9 else f"{value / 1e9:.1f} GB"


def _model(name: str) -> str:
    return "SmolLM2-135M-Instruct" if name == "smollm2" else f"{name}, random weights"


def _by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by the model and dtype that stand above their table."""
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(f"**{_model(row['model'])}, {row['dtype']}**", []).append(row)
    return by_model


def _question(question: str) -> Callable[[Newest, Path], str]:
    def full_tables(newest: Newest, _: Path) -> str:
        rows = [row for row in newest.rows if row.get("question") == question and row["model"] != "tiny"]
        parts = []
        for of_machine in _by_machine(rows).values():
            parts.append(f"Command: `python -m benchmarks run '{question}/*'`. {_where(of_machine)}")
            for title, of_model in _by_model(of_machine).items():
                parts += [title, *_times_and_rates(UNITS[question], of_model)]
        return "\n\n".join(parts) or NOTHING

    return full_tables


def _times_and_rates(unit: str, rows: Sequence[Row]) -> list[str]:
    """Two tables, because one would be wider than a page, and the backends that ours used."""
    times = [unit, "method", "median time", "20th to 80th percentile", "runs", "time relative to depass",
             "share of the floor", "share of floor and plain pass", "extra memory"]  # fmt: skip
    rates = [unit, "method", "prompts/s", "tokens/s", "rows/s", "TFLOP/s", "conservation error",
             "difference from depass"]  # fmt: skip
    parts = [table(times, [_times(row) for row in rows])]
    measured = [_rates(row) for row in rows if row["status"] == "ok"]
    if measured:
        parts.append(table(rates, measured))
    used = sorted({f"{op} {name}" for row in rows for op, name in row.get("backends", {}).items()})
    if used:
        parts.append(f"Backends used: {', '.join(used)}.")
    return parts


def _names(row: Row) -> list[str]:
    return [row["size"], row["method"].replace("_", " ")]


def _times(row: Row) -> list[str]:
    if row["status"] == "stopped":
        times = _format(row, "times_ours", "over {:.2f}")
        return [*_names(row), f"over {_seconds(row['seconds_at_least'])}: stopped", "", "", times, "", "", ""]
    if row["status"] != "ok":
        reason = row["status"]
        if reason == "oom":
            reason = "out of memory" + (f": asked for {_bytes(row['asked_bytes'])}" if row["asked_bytes"] else "")
        return [*_names(row), reason, *[""] * 6]
    return [
        *_names(row), _seconds(row["seconds_p50"]), f"{_seconds(row['seconds_p20'])} to {_seconds(row['seconds_p80'])}",
        str(row["runs"]), _format(row, "times_ours", "{:.2f}"), _format(row, "share_of_floor", "{:.0%}"),
        _share_with_the_plain_pass(row), _format(row, "beyond_plain_bytes", _bytes),
    ]  # fmt: skip


def _share_with_the_plain_pass(row: Row) -> str:
    """The floor of short prompts: the model's own pass and head, which run as well, and the GEMMs; relative to the time."""
    if "floor_seconds" not in row:
        return ""
    return f"{(row['floor_seconds'] + row['plain_forward_seconds']) / row['seconds_p50']:.0%}"


def _rates(row: Row) -> list[str]:
    return [
        *_names(row), _format(row, "prompts_per_second", "{:.3g}"), _format(row, "tokens_per_second", "{:.3g}"),
        _format(row, "rows_per_second", "{:.3g}"), _format(row, "tflops", "{:.3g}"),
        _format(row, "conservation_error", "{:.0e}"), _format(row, "difference", "{:.0e}"),
    ]  # fmt: skip


def _format(row: Row, key: str, how: str | Callable[[float], str]) -> str:
    value = row.get(key)
    if value is None:
        return ""
    return how.format(value) if isinstance(how, str) else how(value)


def _speed(newest: Newest, _: Path) -> str:
    """A few cases of each machine and model in plain words, for the README."""
    parts = []
    for of_machine in _by_machine([row for row in newest.rows if row["what"] == "case"]).values():
        by_case = _by_case(of_machine)
        for model, cases in SPEED_ROWS.items():
            lines = [_in_words(by_case[case]) for case in cases if _measured(by_case.get(case, {}))]
            if lines:
                parts.append("\n".join([f"{_model(model)}, measured on {_machine(of_machine[-1])}:\n", *lines]))
    return "\n\n".join(parts) or NOTHING


def _in_words(of_case: Mapping[str, Row]) -> str:
    """What ours took, and how plain PyTorch and one gradient compare."""
    ours, plain, gradient = of_case[OURS], of_case.get(PLAIN_PYTORCH), of_case.get(GRADIENT)
    case = CASE_IN_WORDS[ours["question"]].format(ours["size"])
    cores = "" if ours["gpu"] else f", {ours['threads']} cores"
    words = [f"- {case[0].upper()}{case[1:]}, {SHORT_DTYPES[ours['dtype']]}{cores}: {_rounded(ours['seconds_p50'])} s"]
    if plain is not None and plain["status"] == "oom":
        words.append("plain PyTorch runs out of memory")
    elif plain is not None and plain["status"] in ("ok", "stopped") and "times_ours" in plain:
        more_than = "more than " if plain["status"] == "stopped" else ""
        words.append(f"{more_than}{_rounded(plain['times_ours'])} times as fast as plain PyTorch")
    if gradient is not None and gradient["status"] == "ok":
        words.append(f"input × gradient takes {_rounded(gradient['seconds_p50'])} s")
    return "; ".join(words)


def _rounded(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _measured(of_case: Mapping[str, Row]) -> bool:
    return OURS in of_case and of_case[OURS]["status"] == "ok"


def _by_case(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Rows by case, then by method."""
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["method"]] = row
    return by_case


def _comparison(newest: Newest, _: Path) -> str:
    """Ours and the time of every other method relative to it, one line a case."""
    rows = [row for row in newest.rows if row["what"] == "case" and row["model"] != "tiny"]
    rows = [row for row in rows if row["question"] in ("tokens", "heads", "prompts")]
    parts = []
    for of_machine in _by_machine(rows).values():
        tables = []
        for title, of_model in _by_model(of_machine).items():
            by_case = {case: by for case, by in _by_case(of_model).items() if _measured(by)}
            rivals = [name for name in COLOURS if name != OURS and any(name in by for by in by_case.values())]
            lines = [
                [_short_case(by[OURS]), _seconds(by[OURS]["seconds_p50"]), *(_against(by.get(name)) for name in rivals)]
                for by in by_case.values()
            ]
            if lines:
                tables += [title, table(["case", "depass", *(name.replace("_", " ") for name in rivals)], lines)]
        if tables:
            parts += [*tables, _where(of_machine)]
    return "\n\n".join(parts) or NOTHING


def _short_case(row: Row) -> str:
    """A case below a title that names its model and dtype."""
    return f"`{row['question']}/{row['size']}`"


def _against(row: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] not in ("ok", "stopped"):
        return "out of memory" if row["status"] == "oom" else row["status"]
    if "times_ours" not in row:
        return "" if row["status"] == "ok" else f"over {_seconds(row['seconds_at_least'])}"
    times = f"{row['times_ours']:.0f}×" if row["times_ours"] >= 100 else f"{row['times_ours']:.2g}×"
    return times if row["status"] == "ok" else f"over {times}"


def _ops(newest: Newest, _: Path) -> str:
    rows = [row for row in newest.rows if row["what"] == "op"]
    parts = []
    for of_machine in _by_machine(rows).values():
        first = of_machine[-1]
        lines = [
            [row["op"], f"{row['model']}, {row['dtype']}, N={row['positions']}", row["backend"],
             _seconds(row["seconds_p50"]), _bytes(row["bytes"]), f"{row['share_of_copy']:.0%}",
             f"{row['operations'] / 1e9:.3g}", f"{row['share_of_gemm']:.0%}"]
            for row in of_machine
        ]  # fmt: skip
        head = ["op", "shape", "backend", "median time", "bytes", "share of the copy rate", "GFLOP",
                "share of the GEMM rate"]  # fmt: skip
        if (card := card_of(first["gpu"])) is not None:
            head.append("predicted time")
            for line, row in zip(lines, of_machine, strict=True):
                line.append(_seconds(CARDS[card].seconds(row["operations"], row["bytes"])))
        command = f"Command: `pytest benchmarks/test_ops.py --sizes {first['sizes']} --rows FILE`."
        rates = {row["dtype"]: row for row in of_machine}
        said = "; ".join(
            f"in {dtype}, a copy moved {row['copy_bytes_per_second'] / 1e9:.3g} GB/s and a GEMM did "
            f"{row['gemm_operations_per_second'] / 1e12:.3g} TFLOP/s" for dtype, row in rates.items()
        )  # fmt: skip
        parts.append(f"{command} {_where(of_machine)} In the same session, {said}.\n\n{table(head, lines)}")
    return "\n\n".join(parts) or NOTHING


def _predicted(newest: Newest, _: Path) -> str:
    """What each case should take on each card; and, for the cases that were measured there, how far off that is."""
    measured: dict[tuple[str, str | None], Row] = {}
    for row in sorted((row for row in newest.rows if row["what"] == "case"), key=lambda row: str(row["date"])):
        if row["method"] == OURS and row["status"] == "ok" and row.get("asked_backend") in (None, "auto"):
            measured[row["case"], card_of(row["gpu"])] = row
    predictions: dict[str, list[Row]] = {}
    for row in load():
        dtype = row["case"].split("/")[2]
        predictions.setdefault(f"**{CARDS[row['card']].name}, {row['model']}, {dtype}**", []).append(row)
    rates = "; ".join(
        f"{card.name} {card.operations_per_second / 1e12:g} TFLOP/s and {card.bytes_per_second / 1e12:g} TB/s"
        for card in CARDS.values()
    )
    parts = [f"Command: `python -m benchmarks predict`. Assumed rates: {rates}."]
    head = ["case", "rows", "TFLOP", "GB moved", "kernel launches", "predicted time", "floor", "share of the floor",
            "measured time"]  # fmt: skip
    judged = ["case", "predicted time", "measured time", "share of the measured floor", "measured over predicted",
              f"outside {OFF[0]:g} to {OFF[1]:g}"]  # fmt: skip
    for title, rows in predictions.items():
        pairs = [(row, measured.get((row["case"], row["card"]))) for row in rows]
        parts += [title, table(head, [_prediction(row, ours) for row, ours in pairs])]
        lines = [_judged(row, ours) for row, ours in pairs if ours is not None]
        if lines:
            parts.append(table(judged, lines))
    return "\n\n".join(parts)


def _prediction(row: Row, ours: Row | None) -> list[str]:
    return [
        _short_case(row), f"{row['rows']:,}", _short(sum(row["operations"].values()) / 1e12),
        _short(sum(row["bytes"].values()) / 1e9), f"{row['launches']:,}", _seconds(row["seconds"]),
        _seconds(row["floor_seconds"]), f"{row['floor_seconds'] / row['seconds']:.0%}",
        "not measured" if ours is None else _seconds(ours["seconds_p50"]),
    ]  # fmt: skip


def _judged(row: Row, ours: Row) -> list[str]:
    ratio = ours["seconds_p50"] / row["seconds"]
    mark = "" if OFF[0] <= ratio <= OFF[1] else "off"
    times = [_seconds(row["seconds"]), _seconds(ours["seconds_p50"]), _format(ours, "share_of_floor", "{:.0%}")]
    return [_short_case(row), *times, f"{ratio:.2f}", mark]


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"


def _figures(newest: Newest, path: Path) -> str:
    links = [f"![{figure.stem}]({os.path.relpath(figure, path.parent)})" for figure in newest.figures]
    return "\n\n".join(links) or NOTHING


TABLES: Mapping[str, Callable[[Newest, Path], str]] = {
    "speed": _speed, "comparison": _comparison, **{name: _question(name) for name in METHODS}, "ops": _ops,
    "predicted": _predicted, "figures": _figures,
}  # fmt: skip


# Figures.


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
    try:
        import matplotlib
    except ImportError as error:
        raise BenchmarkError("the figures need matplotlib: pip install 'depass-kernels[plots]'") from error
    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_draw_series(of, folder / f"tokens-{'-'.join(key)}.png") for key, of in series.items()]
    return drawn + [_draw_roofline(of, folder / f"roofline-{'-'.join(key)}.png") for key, of in rooflines.items()]


def _draw_series(rows: Sequence[Row], path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
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
    figure.suptitle(f"Token attribution, {_model(first['model'])}, {first['dtype']}: {_device(first)}", fontsize=11)
    return _save(figure, path)


def _draw_roofline(rows: Sequence[Row], path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.4), layout="constrained")
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
    axes.legend(fontsize=8, frameon=False)
    models = sorted({row["model"] for row in rows})
    of = models[0] if len(models) == 1 else f"{len(models)} models"
    what = f"Kernels at the shapes of {of}, {rows[-1]['dtype']}, N={rows[-1]['positions']}"
    axes.set_title(f"{what}: {_device(rows[-1])}", fontsize=10)
    return _save(figure, path)


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["op"], row["backend"]), []).append(row)
    return found


def _device(row: Row) -> str:
    return row["gpu"] or f"{row['cpu']}, {row['threads']} threads"


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
