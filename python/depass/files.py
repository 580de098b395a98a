"""Writing files atomically, and checking beforehand that a file can be written."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import OutputError


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check before a run that its output file can be written.

    Raises:
        OutputError: the file cannot be written; the message says why.
    """
    target = _resolved(path)
    if target.is_dir():
        raise OutputError(f"cannot write {target}: it is a directory")
    try:
        if _is_special(target):
            writable = os.access(target, os.W_OK)
        else:
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".depass-"):
                writable = not target.exists() or os.access(target, os.W_OK)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    if not writable:
        raise OutputError(f"cannot write {target}: permission denied")


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically: it holds either the old content or the new, never a part.

    Links are followed. A pipe or a device is written to directly.

    Raises:
        OutputError: the file cannot be written.
    """
    check_writable(path)
    target = _resolved(path)
    try:
        if _is_special(target):
            with target.open("wb") as file:
                file.write(content)
            return
        name = target.parent / f".depass-{os.urandom(8).hex()}"
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # without it a crash of the machine could leave an empty file
            os.replace(name, target)
        except BaseException:
            with suppress(FileNotFoundError):  # it has been renamed
                os.unlink(name)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error


def append_row(path: str | os.PathLike[str], row: dict[str, Any]) -> None:
    """Append a row to a JSONL file as one line; where the disk is full, nothing is appended.

    Several processes may append to one file. An incomplete last line stays, and the row starts on a new line.

    Raises:
        OutputError: the row cannot be written.
    """
    import fcntl

    path, line = Path(path), (json.dumps(row, allow_nan=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, 2)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            if file.write(line) != len(line):
                file.truncate(size)
                raise OutputError(f"cannot add a row to {path}: the disk is full")
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot add a row to {path}: {error.strerror or error}") from error


def _resolved(path: str | os.PathLike[str]) -> Path:
    try:
        resolved = Path(path).resolve()
        with suppress(FileNotFoundError):
            os.stat(resolved)  # raises for an invalid file name
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {os.fspath(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    return resolved


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()
