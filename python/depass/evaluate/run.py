"""Runs a task and writes each row when it is measured. A stopped run resumes where it was."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import rules
from ..api import DePass
from ..errors import DataError, OptionError, OutputError
from ..files import append_row, write_atomically
from ..models.health import dtype_name
from ..runs import described, hold, progress, recorded_session, say_kept, write_json
from .task import AnyTaskOptions, Item, Row, Task, by_reason, failed

_FORMAT = "depass-evaluation-1"
_REASONS = 20  # the most reasons that a report lists


def run(
    task: Task[AnyTaskOptions],
    dp: DePass,
    options: AnyTaskOptions,
    folder: str | os.PathLike[str],
    *,
    quantization: str | None = None,
    seconds: float | None = None,
    refused: Mapping[str, str] | None = None,
) -> Path:
    """Measure the items that have no row yet, and write the report.

    Writes into ``folder``: ``run.json`` (settings, seed, versions), ``rows.jsonl`` (one row per item, written when it is
    measured), and at the end ``results.json`` (see :class:`.summary.Result`) and ``report.md`` with its figures.

    Args:
        task: the task to run.
        dp: the model.
        options: an instance of ``task.Options``.
        folder: the output directory; it is created if needed.
        quantization: the model's quantization, as given to :meth:`DePass.from_pretrained`.
        seconds: measure no further item after so much time; the report is on the items measured by then. None: all items.
        refused: what ``task.refused`` says, where it has been asked; by default it is asked.

    Returns:
        The report's path.

    Raises:
        OptionError: the directory holds a run of another task or with other settings; or methods cannot score this model.
        DataError: the data set or the rows cannot be read, or the data set is empty.
        OutputError: the directory cannot be written, or another process is using it.
        DePassError: the task cannot run at all.
    """
    folder, settings = Path(folder), _settings(task, dp, options, quantization)
    items = task.items(options)[options.skip :][: options.limit]
    if not items:
        raise DataError(f"{options.data} has no rows to measure; give a data set with rows")
    assert len({item.id for item in items}) == len(items), "two items have the same id"
    with hold(folder):
        description = described(folder / "run.json", _FORMAT, task.name, settings)
        rows = _read(folder / "rows.jsonl")
        if rows and not description["sessions"]:
            raise DataError(
                f"{folder} has rows.jsonl but no run.json that says how the rows were measured; bring it back, or choose "
                "another --out"
            )
        missing = [item for item in items if item.id not in rows]
        if missing:
            if any(item.broken is None for item in missing):
                _must_score(task, dp, options, refused)
            try:
                with recorded_session(folder / "run.json", description):
                    _measure(task, dp, items, rows, options, folder, seconds)
            except (OutputError, KeyboardInterrupt) as stop:
                say_kept(stop, sum(item.id in rows for item in items), len(items), folder)
                raise
        return _report(task, items, rows, description, options, folder)


def _must_score(
    task: Task[AnyTaskOptions], dp: DePass, options: AnyTaskOptions, refused: Mapping[str, str] | None
) -> None:
    """Raise an OptionError that names the methods which cannot score this model."""
    refused = task.refused(dp, options) if refused is None else refused
    if not refused:
        return
    names = ", ".join(refused)
    raise OptionError(f"{'; '.join(by_reason(refused))}; or leave out with --methods what the model refuses: {names}")


def _measure(
    task: Task[AnyTaskOptions],
    dp: DePass,
    items: Sequence[Item],
    rows: dict[str, Row],
    options: AnyTaskOptions,
    folder: Path,
    seconds: float | None,
) -> None:
    """Add the missing rows, on disk and to ``rows``, until the time is up."""
    began = time.monotonic()

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
        at_once = len(missing) if seconds is None else task.together
        for first in range(0, len(missing), at_once):
            for row in task.measure(dp, prepared, missing[first : first + at_once], options):
                add(row)
                update(len(rows))
            if seconds is not None and time.monotonic() - began > seconds:
                return
    lost = [item.id for item in missing if item.id not in rows]
    assert not lost, f"no rows of the items {', '.join(lost)}"


# The settings of a run.


def _settings(
    task: Task[AnyTaskOptions], dp: DePass, options: AnyTaskOptions, quantization: str | None
) -> dict[str, Any]:
    """Everything that the rows depend on, as JSON. The model's device is not part of it."""
    task_options = dict(vars(options))
    if not options.skip:
        del task_options["skip"]  # runs that began before there was this option have no such setting
    if task.edition > 1:
        task_options["edition"] = task.edition
    for name in task.files:
        if task_options.get(name) is not None and _is_file(task_options[name]):
            task_options[f"{name}_sha256"] = hashlib.sha256(_bytes(task_options[name])).hexdigest()
    defaults = dp.engine.defaults
    settings = {
        "dtype": dtype_name(dp.bound.dtype),
        "quantization": quantization,
        "backend": defaults.backend,
        **task_options,
        "model": dp.name,
        "rule": rules.read(defaults.rule).name,
        "temperature": defaults.temperature,
        "exclude_bos": defaults.exclude_bos,
    }
    as_json: dict[str, Any] = json.loads(json.dumps(settings))
    return as_json


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError as error:  # such as a name that is too long
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


# Files.


def _read(path: Path) -> dict[str, Row]:
    """The rows by id. An unfinished last line, which a killed process can leave, is cut off; its item is measured again."""
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
            raise DataError(f"{path}, line {number} is not a valid row ({error}); delete the line") from error
    return rows


# The report.


def _report(
    task: Task[AnyTaskOptions],
    items: Sequence[Item],
    rows: dict[str, Row],
    description: dict[str, Any],
    options: AnyTaskOptions,
    folder: Path,
) -> Path:
    measured = [rows[item.id] for item in items if item.id in rows]
    good = [row for row in measured if row["status"] == "ok"]
    parts = [f"# {task.name}: {task.help}", _head(description), counts(measured)]
    if len(measured) < len(items):
        parts.append(f"{len(items) - len(measured)} more items were not measured: the time was up.")
    text = "\n\n".join([*parts, task.report(good, options, folder)])
    if good:
        lines = [asdict(result) for result in task.results(good, options)]
        write_json(folder / "results.json", {"task": task.name, "settings": description["settings"], "results": lines})
    path = folder / "report.md"
    write_atomically(path, (text.rstrip() + "\n").encode())
    return path


def counts(rows: Sequence[Row]) -> str:
    """The number of rows with each status, and a list of the reasons."""
    statuses = Counter(row["status"] for row in rows)
    reasons = Counter((row["status"], row["reason"]) for row in rows if row["status"] != "ok")
    summary = f"{len(rows)} items: {statuses['ok']} ok, {statuses['skipped']} skipped, {statuses['error']} errors."
    lines = [f"- {count} {status}: {reason}" for (status, reason), count in reasons.most_common(_REASONS)]
    if len(reasons) > _REASONS:
        others = sum(count for _, count in reasons.most_common()[_REASONS:])
        lines.append(f"- {others} more, for {len(reasons) - _REASONS} other reasons: see rows.jsonl")
    return "\n".join([summary, "", *lines]).rstrip()


def _head(description: dict[str, Any]) -> str:
    """The settings, the date, the versions, and the time of the sessions that were not killed."""
    settings = [f"{name} `{value}`" for name, value in description["settings"].items() if value is not None]
    sessions = description["sessions"]
    last = {name: value for name, value in sessions[-1].items() if value is not None}
    seconds = sum(past["seconds"] or 0.0 for past in sessions)
    killed = sum(past["seconds"] is None for past in sessions)
    versions = [f"{name} {value}" for name, value in last.items() if name not in ("date", "seconds")]
    besides = f", and the time of {killed} killed sessions" if killed else ""
    return f"{', '.join(settings)}.\n\n{last['date']}: {seconds:.0f} s{besides}; {', '.join(versions)}."
