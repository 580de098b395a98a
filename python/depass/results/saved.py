"""Saving results as safetensors files, and loading them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import OutputError
from ..files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor


Result = TypeVar("Result")


def save_result(path: str | os.PathLike[str], said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a result as safetensors: its tensors, and the other values of its ``to_dict()`` (``said``) as metadata.

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
    """Read a file of :func:`save_result` in format ``kind``; ``make`` takes its tensors and its metadata.

    Raises:
        OutputError: the file cannot be read or has another format.
    """
    from safetensors import SafetensorError, safe_open

    if saved_format(path) != kind:
        raise OutputError(f"{os.fspath(path)} is not a saved {kind_of(kind)} (format {kind})")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in names}
        return make(tensors, {key: json.loads(value) for key, value in metadata.items() if key != "format"})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise OutputError(f"cannot read {os.fspath(path)}: {error}") from error


def saved_format(path: str | os.PathLike[str]) -> str | None:
    """The format of a file that :func:`save_result` wrote; None for another safetensors file.

    Raises:
        OutputError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said: str | None = (file.metadata() or {}).get("format")
            return said
    except (OSError, SafetensorError, ValueError) as error:
        raise OutputError(f"cannot read {os.fspath(path)}: {error}") from error


def kind_of(said: str) -> str:
    """The kind of result in a format: ``sweep`` for ``depass-sweep-1``."""
    return said.removeprefix("depass-").partition("-")[0]
