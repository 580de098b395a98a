"""Shared by long runs: the lock on the output directory, its ``run.json``, and the progress bar."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .errors import DataError, OptionError, OutputError
from .files import write_atomically

_LINE_SECONDS = 30.0  # between two lines of progress where standard error is not a terminal


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Create the directory and lock it, so that two processes do not do the same work.

    The lock is released when the process ends, even if it is killed.

    Raises:
        OutputError: the directory cannot be created or locked, or another process has locked it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write into {folder}: {getattr(error, 'strerror', None) or error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another process is using {folder}; wait until it ends, or choose another --out"
            ) from None
        except OSError as error:
            raise OutputError(f"cannot lock {folder} against other processes: {error.strerror or error}") from error
        yield
    finally:
        os.close(handle)


# The description of a run.


def described(path: Path, kind: str, task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The content of ``run.json``: ``format`` (``kind``), ``task``, ``settings``, ``sessions`` (empty for a new run).

    Raises:
        OptionError: the directory holds a run of another task or with other settings.
        DataError: this command did not write the file.
    """
    if not path.exists():
        return {"format": kind, "task": task, "settings": settings, "sessions": []}
    description = _read_json(path, kind)
    existing: dict[str, Any] = {"task": description["task"], **description["settings"]}
    wanted: dict[str, Any] = {"task": task, **settings}
    for name in sorted(existing.keys() | wanted.keys()):
        if existing.get(name) != wanted.get(name):
            raise OptionError(
                f"{path.parent} holds a run with {name} {existing.get(name)!r}, but this run has "
                f"{wanted.get(name)!r}; use the same options, or choose another --out"
            )
    return description


@contextmanager
def recorded_session(path: Path, description: dict[str, Any]) -> Iterator[None]:
    """Record in ``run.json`` the date, the package versions and the seconds of what runs inside the ``with`` block.

    The seconds are written however the block ends; they are None if the process is killed.

    Raises:
        OutputError: the file cannot be written.
    """
    session = {"date": time.strftime("%Y-%m-%d %H:%M:%S%z"), **_versions(), "seconds": None}
    description["sessions"].append(session)
    write_json(path, description)
    began = time.monotonic()

    def end() -> None:
        session["seconds"] = round(time.monotonic() - began, 1)
        write_json(path, description)

    try:
        yield
    except BaseException:
        with suppress(OutputError):  # the error that ends the block counts
            end()
        raise
    end()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``run.json`` atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def say_kept(stop: BaseException, done: int, of: int, folder: Path) -> None:
    """Add to the error that stops a run how many of its rows are kept, and how to resume."""
    kept = f"{done:,} of {of:,} rows are kept in {folder}; run the same command again to resume"
    stop.args = (f"{str(stop) or 'interrupted'}; {kept}",)


def _read_json(path: Path, kind: str) -> dict[str, Any]:
    try:
        description: dict[str, Any] = json.loads(path.read_text())
        if description["format"] != kind:
            raise ValueError(f"its format is {description['format']!r}")
        _ = description["task"], description["settings"].items(), description["sessions"].append
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} was not written by this command ({error}); choose another --out") from error
    return description


def _versions() -> dict[str, Any]:
    versions: dict[str, Any] = {"python": platform.python_version(), "commit": _commit()}
    for name in ("depass-kernels", "torch", "transformers"):
        with suppress(PackageNotFoundError):  # a checkout on the path is not installed
            versions[name] = version(name)
    return versions


def _commit() -> str | None:
    """The commit of this file's checkout, followed by ``+`` if files have changed; None outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../../depass_kernels")
    return f"{git('rev-parse', 'HEAD')}{'+' if changed else ''}"


# Progress.


@contextmanager
def progress(name: str, of: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of items done and shows the progress on standard error.

    On a terminal it shows a bar with the rate and the remaining time; elsewhere it prints a line every 30 seconds, and one
    at the end.
    """
    rate = _Rate()
    if not sys.stderr.isatty():
        yield _lines(name, of, rate)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task(name, total=of, rate="")
        yield lambda done: bar.update(shown, completed=done, rate=rate.said(done, of))


class _Rate:
    """The rate of this session; items that were done before it do not count."""

    def __init__(self) -> None:
        self.began, self.first = time.monotonic(), -1

    def said(self, done: int, of: int) -> str:
        """Text such as ``31/s, 0:04:10 left``; empty until a rate is known."""
        if self.first < 0:
            self.first = done
        took = time.monotonic() - self.began
        if done == self.first or took < 1:
            return ""
        rate = (done - self.first) / took
        left = round((of - done) / rate)
        shown = f"{rate:.3g}" if rate < 100 else f"{rate:,.0f}"
        return f"{shown}/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


def _lines(name: str, of: int, rate: _Rate) -> Callable[[int], None]:
    last, ended = time.monotonic(), False

    def update(done: int) -> None:
        nonlocal last, ended
        said = rate.said(done, of)
        if done >= of and not ended:
            ended, took = True, round(time.monotonic() - rate.began)
            took_text = f"{took // 3600}:{took // 60 % 60:02}:{took % 60:02}"
            print(f"{name}: {done:,} of {of:,} in {took_text}", file=sys.stderr, flush=True)
        elif said and time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            print(f"{name}: {done:,} of {of:,}, {said}", file=sys.stderr, flush=True)

    return update
