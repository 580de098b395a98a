"""Writing files: whole or not at all, and found out beforehand where it is not possible; results and rows of results."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before the work whether a file can be written.

    Raises:
        OutputError: it cannot, and why.
    """
    target = _resolved(path)
    if target.is_dir():
        raise OutputError(f"cannot write {target}: it is a folder")
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
    """Write a file whole or not at all. Links are followed; a pipe or device is written to as it is.

    Raises:
        OutputError: it cannot be written.
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
                os.fsync(file.fileno())  # else a crash of the machine could leave the name with nothing behind it
            os.replace(name, target)
        except BaseException:
            with suppress(FileNotFoundError):  # it has its name already
                os.unlink(name)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error


def append_row(path: str | os.PathLike[str], row: dict[str, Any]) -> None:
    """Add a row to a JSONL file as one whole line: all of it or, where the disk is full, none.

    Several processes may add to one file. A torn last line is left behind.

    Raises:
        OutputError: it cannot be written.
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
            os.stat(resolved)  # refuses a name that no file can have
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {os.fspath(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    return resolved


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def save_result(path: str | os.PathLike[str], said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a result as safetensors: its tensors, and what else its ``to_dict()`` has ``said`` as metadata.

    Raises:
        OutputError: the path cannot be written.
    """
    from safetensors.torch import save

    described = {key: value for key, value in said.items() if key not in tensors}
    metadata = {key: value if key == "format" else json.dumps(value) for key, value in described.items()}
    write_atomically(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def load_result(
    path: str | os.PathLike[str],
    kind: str,
    names: Sequence[str],
    make: Callable[[dict[str, Any], dict[str, Any]], Result],
) -> Result:
    """Read what :func:`save_result` wrote as format ``kind``, and ``make`` a result of its tensors and what else was said.

    Raises:
        OutputError: the file cannot be read or is something else.
    """
    from safetensors import SafetensorError, safe_open

    if saved_format(path) != kind:
        raise OutputError(f"{os.fspath(path)} is no saved {kind.split('-')[1]} ({kind})")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in names}
        return make(tensors, {key: json.loads(value) for key, value in metadata.items() if key != "format"})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise OutputError(f"cannot read {os.fspath(path)}: {error}") from error


def saved_format(path: str | os.PathLike[str]) -> str | None:
    """Which format :func:`save_result` wrote a file in; None where it was not written by it.

    Raises:
        OutputError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found: str | None = (file.metadata() or {}).get("format")
            return found
    except (OSError, SafetensorError, ValueError) as error:
        raise OutputError(f"cannot read {os.fspath(path)}: {error}") from error
