"""Writes the tables of documents from the results: no number in them is typed by hand.

A document marks where a table goes with ``<!-- begin tokens -->`` and ``<!-- end tokens -->``, each on its own line. The
report replaces the text between the markers and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depass.evaluate.summary import table
from depass.files import write_atomically

from . import experts, report_linear, which, wording
from .figures import COLOURS, draw, shown
from .machine import BenchmarkError
from .ops import OPS
from .peers import report as report_peers
from .predict import CARDS, card_of, load
from .registry import METHODS, OURS, SHAPES, UNITS, all_cases
from .runner import Row
from .wording import NOTHING

OFF = (0.8, 1.25)  # measured over predicted: what lies outside is marked
PLAIN_PYTORCH = "eager"
GRADIENT = "input_x_gradient"
SPEED_ROWS = {  # the cases that the README states in words, by model
    "smollm2": (
        "tokens/smollm2/float32/10", "tokens/smollm2/float32/32", "tokens/smollm2/float32/128",
        "heads/smollm2/float32/10", "prompts/smollm2/float32/64",
    ),
    "llama-2-7b": (
        "tokens/llama-2-7b/bfloat16/10", "tokens/llama-2-7b/bfloat16/128", "tokens/llama-2-7b/bfloat16/512",
        "heads/llama-2-7b/bfloat16/16", "prompts/llama-2-7b/bfloat16/64",
    ),
}  # fmt: skip
CASE_IN_WORDS = {
    "tokens": "a {}-token prompt", "heads": "every head of every layer, {}-token prompt", "prompts": "{} short prompts",
}  # fmt: skip
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_MARKER = re.compile(r"^<!-- (begin|end) ([a-z0-9-]+) -->[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Newest:
    """The newest row of each machine, case, method and backend; the figures drawn from these rows; those of the linear
    rules; and that of the evaluations.
    """

    rows: list[Row]
    figures: list[Path]
    linear_figures: list[Path]
    which_figures: list[Path]


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
    drawn, of_linear, of_which = draw(kept, folder), report_linear.draw(folder), which.draw(folder)
    for path, text in texts.items():
        filled = fill(path, text, Newest(kept, drawn, of_linear, of_which))
        write_atomically(path, filled.encode())
    yield from (*drawn, *of_linear, *of_which, *documents)


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


def _by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by the model and dtype that stand above their table."""
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(f"**{wording.model(row['model'])}, {row['dtype']}**", []).append(row)
    return by_model


def _question(question: str) -> Callable[[Newest, Path], str]:
    def full_tables(newest: Newest, _: Path) -> str:
        rows = [row for row in newest.rows if row.get("question") == question and row["model"] != "tiny"]
        parts = []
        for of_machine in _by_machine(rows).values():
            parts.append(f"Command: `python -m benchmarks run '{question}/*'`. {wording.where(of_machine)}")
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
        return [*_names(row), f"over {wording.seconds(row['seconds_at_least'])}: stopped", "", "", times, "", "", ""]
    if row["status"] != "ok":
        reason = row["status"]
        if reason == "oom":
            asked = row["asked_bytes"]
            reason = "out of memory" + (f": asked for {wording.size(asked)}" if asked else "")
        return [*_names(row), reason, *[""] * 6]
    return [
        *_names(row), wording.seconds(row["seconds_p50"]),
        f"{wording.seconds(row['seconds_p20'])} to {wording.seconds(row['seconds_p80'])}",
        str(row["runs"]), _format(row, "times_ours", "{:.2f}"), _format(row, "share_of_floor", "{:.0%}"),
        _share_with_the_plain_pass(row), _format(row, "beyond_plain_bytes", wording.size),
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
                title = f"{wording.model(model)}, measured on {wording.machine(of_machine[-1])}:\n"
                parts.append("\n".join([title, *lines]))
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
                [
                    _short_case(by[OURS]),
                    wording.seconds(by[OURS]["seconds_p50"]),
                    *(_against(by.get(name)) for name in rivals),
                ]
                for by in by_case.values()
            ]
            if lines:
                tables += [title, table(["case", "depass", *(name.replace("_", " ") for name in rivals)], lines)]
        if tables:
            parts += [*tables, wording.where(of_machine)]
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
        return "" if row["status"] == "ok" else f"over {wording.seconds(row['seconds_at_least'])}"
    times = f"{row['times_ours']:.0f}×" if row["times_ours"] >= 100 else f"{row['times_ours']:.2g}×"
    return times if row["status"] == "ok" else f"over {times}"


def _ops(newest: Newest, _: Path) -> str:
    rows = [row for row in newest.rows if row["what"] == "op"]
    parts = []
    for of_machine in _by_machine(rows).values():
        first = of_machine[-1]
        lines = [
            [row["op"], f"{row['model']}, {row['dtype']}, N={row['positions']}", row["backend"],
             wording.seconds(row["seconds_p50"]), wording.size(row["bytes"]), f"{row['share_of_copy']:.0%}",
             f"{row['operations'] / 1e9:.3g}", f"{row['share_of_gemm']:.0%}"]
            for row in of_machine
        ]  # fmt: skip
        head = ["op", "shape", "backend", "median time", "bytes", "share of the copy rate", "GFLOP",
                "share of the GEMM rate"]  # fmt: skip
        if (card := card_of(first["gpu"])) is not None:
            head.append("predicted time")
            for line, row in zip(lines, of_machine, strict=True):
                line.append(wording.seconds(CARDS[card].seconds(row["operations"], row["bytes"])))
        command = f"Command: `pytest benchmarks/test_ops.py --sizes {first['sizes']} --rows FILE`."
        rates = {row["dtype"]: row for row in of_machine}
        said = "; ".join(
            f"in {dtype}, a copy moved {row['copy_bytes_per_second'] / 1e9:.3g} GB/s and a GEMM did "
            f"{row['gemm_operations_per_second'] / 1e12:.3g} TFLOP/s" for dtype, row in rates.items()
        )  # fmt: skip
        parts.append(f"{command} {wording.where(of_machine)} In the same session, {said}.\n\n{table(head, lines)}")
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
        _short(sum(row["bytes"].values()) / 1e9), f"{row['launches']:,}", wording.seconds(row["seconds"]),
        wording.seconds(row["floor_seconds"]), f"{row['floor_seconds'] / row['seconds']:.0%}",
        "not measured" if ours is None else wording.seconds(ours["seconds_p50"]),
    ]  # fmt: skip


def _judged(row: Row, ours: Row) -> list[str]:
    ratio = ours["seconds_p50"] / row["seconds"]
    mark = "" if OFF[0] <= ratio <= OFF[1] else "off"
    times = [wording.seconds(row["seconds"]), wording.seconds(ours["seconds_p50"])]
    return [_short_case(row), *times, _format(ours, "share_of_floor", "{:.0%}"), f"{ratio:.2f}", mark]


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"


def _figures(newest: Newest, path: Path) -> str:
    return shown(newest.figures, path) or NOTHING


def _linear(newest: Newest, path: Path) -> str:
    return report_linear.section(newest.linear_figures, path)


def _experts(_: Newest, __: Path) -> str:
    return experts.section()


def _peers(_: Newest, __: Path) -> str:
    return report_peers.section()


def _which(results: Newest, document: Path) -> str:
    return which.section(results.which_figures, document)


TABLES: Mapping[str, Callable[[Newest, Path], str]] = {
    "speed": _speed, "comparison": _comparison, **{name: _question(name) for name in METHODS}, "ops": _ops,
    "linear": _linear, "experts": _experts, "peers": _peers, "which-method": _which, "predicted": _predicted,
    "figures": _figures,
}  # fmt: skip
