"""Runs a task: rows are kept as they come, so that a run which was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..api import DePass
from ..errors import DataError, OutputError
from ..files import append_row, write_atomically
from ..models.health import dtype_name
from ..runs import described, hold, progress, say_kept, session, write_json
from .task import Item, Row, Task, Told, failed

_FORMAT = "depass-evaluation-1"
_REASONS = 20  # that a report lists


def run(
    task: Task[Told],
    dp: DePass,
    options: Told,
    folder: str | os.PathLike[str],
    *,
    quantization: str | None = None,
) -> Path:
    """Measure what has no row yet, and report.

    ``folder`` gets ``run.json`` (settings, seed, versions), ``rows.jsonl`` (a row for each item, as they come), and at the
    end ``report.md`` with its figures.

    Args:
        task: what is measured.
        dp: the model.
        options: an instance of ``task.Options``.
        folder: where everything goes; it is made.
        quantization: with which the model was loaded, as :meth:`DePass.from_pretrained` takes it.

    Returns:
        The report's path.

    Raises:
        OptionError: the folder holds a run of another task or with other settings.
        DataError: the data set cannot be read or has no items, or the rows cannot be read.
        OutputError: the folder cannot be written, or another process is at work in it.
        DePassError: what the task cannot do at all.
    """
    folder, settings = Path(folder), _settings(task, dp, options, quantization)
    items = task.items(options)[: options.limit]
    if not items:
        raise DataError(f"{options.data}: there is nothing to measure in it; give a data set with rows")
    assert len({item.id for item in items}) == len(items), "an item's id names it"
    with hold(folder):
        made = described(folder / "run.json", _FORMAT, task.name, settings)
        rows = _read(folder / "rows.jsonl")
        if any(item.id not in rows for item in items):
            began = time.monotonic()
            now = session()
            made["sessions"].append(now)
            write_json(folder / "run.json", made)
            try:
                _measure(task, dp, items, rows, options, folder)
            except (OutputError, KeyboardInterrupt) as stop:
                say_kept(stop, sum(item.id in rows for item in items), len(items), folder)
                raise
            now["seconds"] = round(time.monotonic() - began, 1)
            write_json(folder / "run.json", made)
        return _report(task, [rows[item.id] for item in items], made, options, folder)


def _measure(
    task: Task[Told], dp: DePass, items: Sequence[Item], rows: dict[str, Row], options: Told, folder: Path
) -> None:
    """Add the rows that are missing, on disk and to ``rows``."""

    def add(row: Row) -> None:
        assert row["id"] not in rows, f"two rows of item {row['id']}"
        assert row["status"] == "ok" or (row["status"] in ("skipped", "error") and row["reason"])
        append_row(folder / "rows.jsonl", row)
        rows[row["id"]] = row

    whole = [item for item in items if item.broken is None]
    for item in items:
        if item.broken is not None and item.id not in rows:
            add(failed(item, item.broken))
    missing = [item for item in whole if item.id not in rows]
    if not missing:
        return
    prepared = task.prepare(dp, whole, options)
    with progress(task.name, len(items)) as update:
        update(len(rows))
        for row in task.measure(dp, prepared, missing, options):
            add(row)
            update(len(rows))
    lost = [item.id for item in missing if item.id not in rows]
    assert not lost, f"no rows of the items {', '.join(lost)}"


# What a run is of.


def _settings(task: Task[Told], dp: DePass, options: Told, quantization: str | None) -> dict[str, Any]:
    """All that rows depend on, as JSON has it; where the model lies changes no answer."""
    given = dict(vars(options))
    for name in task.files:
        if given.get(name) is not None and Path(given[name]).is_file():
            given[f"{name}_sha256"] = hashlib.sha256(_bytes(given[name])).hexdigest()
    defaults = dp.engine.defaults
    settings = {
        "dtype": dtype_name(dp.bound.dtype),
        "quantization": quantization,
        "backend": defaults.backend,
        **given,
        "model": dp.name,
        "mlp_rule": defaults.rule,
        "temperature": defaults.temperature,
        "exclude_bos": defaults.exclude_bos,
    }
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


# Files.


def _read(path: Path) -> dict[str, Row]:
    """The rows by id. What a killed process left of a last line is cut off: its item has no row."""
    if not path.exists():
        return {}
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    rows: dict[str, Row] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            rows[row["id"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number} is no row ({error}); delete the line") from error
    return rows


# The report.


def _report(task: Task[Told], rows: Sequence[Row], said: dict[str, Any], options: Told, folder: Path) -> Path:
    good = [row for row in rows if row["status"] == "ok"]
    text = "\n\n".join([f"# {task.name}: {task.help}", _head(said), counts(rows), task.report(good, options, folder)])
    path = folder / "report.md"
    write_atomically(path, (text.rstrip() + "\n").encode())
    return path


def counts(rows: Sequence[Row]) -> str:
    """How many rows are what, and why, in a sentence or a list."""
    kinds = Counter(row["status"] for row in rows)
    why = Counter((row["status"], row["reason"]) for row in rows if row["status"] != "ok")
    said = f"{len(rows)} items: {kinds['ok']} ok, {kinds['skipped']} skipped, {kinds['error']} errors."
    lines = [f"- {count} {status}: {reason}" for (status, reason), count in why.most_common(_REASONS)]
    if len(why) > _REASONS:
        rest = sum(count for _, count in why.most_common()[_REASONS:])
        lines.append(f"- {rest} more, for {len(why) - _REASONS} other reasons: see rows.jsonl")
    return "\n".join([said, "", *lines]).rstrip()


def _head(said: dict[str, Any]) -> str:
    """Settings, when, with what, and how long the sessions took that were not stopped."""
    shown = [f"{name} `{value}`" for name, value in said["settings"].items() if value is not None]
    sessions = said["sessions"]
    last = {name: value for name, value in sessions[-1].items() if value is not None}
    took = sum(one["seconds"] or 0.0 for one in sessions)
    stopped = sum(one["seconds"] is None for one in sessions)
    made = [f"{name} {value}" for name, value in last.items() if name not in ("date", "seconds")]
    besides = f" and {stopped} sessions that were stopped" if stopped else ""
    return f"{', '.join(shown)}.\n\n{last['date']}: {took:.0f} s{besides}; {', '.join(made)}."
