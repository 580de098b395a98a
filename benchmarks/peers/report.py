"""The tables of the other tools, from the rows of ``python -m benchmarks.peers``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from depass.evaluate.summary import table

from .. import wording
from ..runner import Row
from . import ours

FILE = Path(__file__).parents[1] / "results" / "peers.jsonl"
TITLES = {"smollm2": "SmolLM2-135M-Instruct, without BOS", "gemma3-270m": "Gemma 3 270M, with BOS"}
KEYS = ("tool", "version", "method", "model", "tokens")
Cell = Callable[[Row], str]


def section(file: Path | None = None) -> str:
    """What was measured and where, and three tables a model; from a file of rows, by default the committed one."""
    file = file or FILE
    rows = newest(file)
    if not rows:
        return wording.NOTHING
    own = [row for row in rows if row["tool"] == "ours" and row["status"] == "ok"] or rows
    with_options = " and ".join(dict.fromkeys(
        f"`--rounds {row['rounds']} --budget {row['budget']:g} --limit {row['limit']:g}`" for row in rows
    ))  # fmt: skip
    caption = (
        f"Command: `python -m benchmarks.peers --published DIR` with {with_options}. fp32, one thread. Times are medians of "
        "processor time after one untimed run; * marks a method whose first run is its only one. "
        f"{wording.where(own) if 'torch' in own[-1] else ''}"
    )
    return "\n\n".join([caption.strip(), *(part for model in _of(rows, "model") for part in _model(model, rows))])


def newest(file: Path) -> list[Row]:
    """The last row of each tool, version, method, model and length, in the order of the first rows; none without a file."""
    found: dict[tuple[str, ...], Row] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        row = json.loads(line)
        found[tuple(str(row[key]) for key in KEYS)] = row
    return list(found.values())


def _of(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _model(model: str, rows: Sequence[Row]) -> list[str]:
    """The title, the tables and the errors of a model."""
    rows = [row for row in rows if row["model"] == model]
    lengths = sorted({row["tokens"] for row in rows})
    parts = [
        f"**{TITLES.get(model, model)}.** Processor time, and how many plain passes it takes:",
        _by_length(rows, lengths, _time),
        "Time relative to this package's `softmax` / `half` / `dual_path`, each in plain passes:",
        _by_length([row for row in rows if row["tool"] != "ours"], lengths, lambda row: _relative(row, rows)),
        "What is scored, at the longest prompt that was measured. *off* is the difference between the scores' sum and the "
        "number that they explain, relative to that number:",
        _scores(rows),
    ]
    errors = {f"- {_name(row)}: {row['error']}" for row in rows if row["status"] == "failed"}
    return [*parts, "Failed:\n\n" + "\n".join(sorted(errors))] if errors else parts


def _name(row: Row) -> str:
    tool = "depass" if row["tool"] == "ours" else f"{row['tool']} {row['version']}"
    return f"{tool}: {row['method']}"


def _by_length(rows: Sequence[Row], lengths: Sequence[int], cell: Cell) -> str:
    found = {(_name(row), row["tokens"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(_name(row) for row in rows):
        of = [found.get((name, length)) for length in lengths]
        lines.append([name, *("not measured" if row is None else _state(row, cell) for row in of)])
    return table(["tool and method", *(f"{length} tokens" for length in lengths)], lines)


def _state(row: Row, cell: Cell) -> str:
    return cell(row) if row["status"] == "ok" else str(row["status"])


def _time(row: Row) -> str:
    mark = "" if row["warm"] else "*"
    times = f" ({_short(row['times_plain'])}×)" if "times_plain" in row else ""
    return f"{wording.seconds(row['processor_p50'])}{mark}{times}"


def _relative(row: Row, rows: Sequence[Row]) -> str:
    """The ratios to our rules. A rule that ran in the same rounds is compared directly, others by way of the plain pass."""
    rules = {
        each["method"]: each["times_plain"]
        for each in rows
        if each["tool"] == "ours" and each["tokens"] == row["tokens"] and "times_plain" in each
    }
    cells = []
    for rule in ours.METHODS:
        if row.get("beside") == rule and "times_beside" in row:
            cells.append(_short(row["times_beside"]))
        elif rule in rules and "times_plain" in row:
            cells.append(_short(row["times_plain"] / rules[rule]))
        else:
            cells.append("not measured")
    return " / ".join(cells)


def _scores(rows: Sequence[Row]) -> str:
    longest = {_name(row): row for row in rows if row["status"] == "ok" and "explains" in row}
    head = ["tool and method", "tokens", "explains", "sum", "explained", "off", "same as ours", "correlation",
            "largest difference", "peak memory"]  # fmt: skip
    return table(head, [_scored(name, row) for name, row in longest.items()])


def _scored(name: str, row: Row) -> list[str]:
    known = row["explained"] is not None
    same = row.get("same_as")
    why = f", but it {row['why_off']}" if same and row["why_off"] else ""
    return [
        name, str(row["tokens"]), row["explains"], f"{row['sum']:.3f}", f"{row['explained']:.3f}" if known else "",
        f"{abs(row['sum'] - row['explained']) / abs(row['explained']):.1e}" if known else "",
        f"`{same}`{why}" if same else "", f"{row['correlation']:.4f}" if same else "",
        f"{row['largest_difference']:.1e}" if same else "", wording.size(row["peak_bytes"]),
    ]  # fmt: skip


def _short(number: float) -> str:
    return f"{number:.1f}" if number < 10 else f"{number:.0f}"
