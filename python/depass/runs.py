"""What long runs share: a folder that one process holds, ``run.json``, which says what is in it, and the progress bar."""

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

_LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal for a bar


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make the folder and hold it: two processes would do the same work. The lock ends with the process, however it ends.

    Raises:
        OutputError: it cannot be made, or another process holds it.
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
            raise OutputError(f"another process is at work in {folder}; wait for it or give another --out") from None
        except OSError as error:
            raise OutputError(f"cannot lock {folder} against other processes: {error.strerror or error}") from error
        yield
    finally:
        os.close(handle)


# What a run is of.


def described(path: Path, kind: str, task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What ``run.json`` says: ``format`` (``kind``), ``task``, ``settings`` and ``sessions``, of which a new run has none.

    Raises:
        OptionError: a run is there, of another task or with other settings.
        DataError: the file is none of this command.
    """
    if not path.exists():
        return {"format": kind, "task": task, "settings": settings, "sessions": []}
    found = _read_json(path, kind)
    there: dict[str, Any] = {"task": found["task"], **found["settings"]}
    wanted: dict[str, Any] = {"task": task, **settings}
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise OptionError(
                f"{path.parent} holds a run with {name} {there.get(name)!r}, this one has {wanted.get(name)!r}; "
                "give the same options, or another --out"
            )
    return found


def session() -> dict[str, Any]:
    """When and with what a run goes on; ``seconds`` stay None where it is stopped."""
    return {"date": time.strftime("%Y-%m-%d %H:%M:%S%z"), **_versions(), "seconds": None}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``run.json``, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def say_kept(stop: BaseException, done: int, of: int, folder: Path) -> None:
    """Add to the text of what stops a run how many of its rows are kept, and that it can go on."""
    kept = f"{done:,} of {of:,} rows are kept in {folder}, the same command goes on from there"
    stop.args = (f"{str(stop) or 'interrupted'}; {kept}",)


def _read_json(path: Path, kind: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if found["format"] != kind:
            raise ValueError(f"its format is {found['format']!r}")
        _ = found["task"], found["settings"].items(), found["sessions"].append
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no run of this command ({error}); give another --out") from error
    read: dict[str, Any] = found
    return read


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "commit": _commit()}
    for name in ("depass-kernels", "torch", "transformers"):
        with suppress(PackageNotFoundError):  # a checkout on the path is not installed
            found[name] = version(name)
    return found


def _commit() -> str | None:
    """Of the checkout that this file belongs to, ``+`` behind it where files are changed; None where it is in none."""

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
    """A function that is told how many items are done.

    On standard error it shows a bar with the rate and the remaining time, or where that is no terminal a line now and then.
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
    """How fast it goes, without what was done before."""

    def __init__(self) -> None:
        self.began, self.first = time.monotonic(), -1

    def said(self, done: int, of: int) -> str:
        """``31/s, 0:04:10 left``; nothing before there is a rate."""
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
    last = time.monotonic()

    def update(done: int) -> None:
        nonlocal last
        said = rate.said(done, of)
        if said and time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            print(f"{name}: {done:,} of {of:,}, {said}", file=sys.stderr, flush=True)

    return update
