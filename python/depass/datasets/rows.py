"""Prompts out of data sets: JSONL, CSV and Parquet files, and what the library ``datasets`` reads. One row at a time."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError, OptionError, first_line

Record = dict[str, Any] | str  # a row's cells by column, or what is broken about it
SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")
_AT_ONCE = 256  # rows of a Parquet file that are in memory
_BUFFER = 1 << 20  # bytes of one that are read together


@dataclass(frozen=True)
class Columns:
    """Where a row's parts stand. None: ``target`` and ``id``, where the data have them."""

    prompt: str = "prompt"
    target: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Row:
    """One prompt of a data set.

    Attributes:
        id: what the data call it, or its number, from 0.
        prompt: as :meth:`depass.DePass.attribute` takes it.
        target: a token's text or id, or None, the model's own next token.
        broken: why there is no prompt; None where there is one.
    """

    id: str
    prompt: Any = None
    target: str | int | None = None
    broken: str | None = None


@dataclass(frozen=True)
class Data:
    """A data set that can be read.

    Attributes:
        count: of its rows.
        fingerprint: of what is in it; other data have another.
        read: its rows in order, from the first, whenever it is called.
    """

    count: int
    fingerprint: str
    read: Callable[[], Iterator[Row]]


def open_data(source: str, columns: Columns, subset: str | None = None, split: str | None = None) -> Data:
    """Find a data set and look through it once: a file by its suffix, anything else through the library ``datasets``.

    Args:
        source: a file, a folder that ``datasets`` knows, or a name on the hub.
        columns: where a row's parts stand.
        subset: of a hub's data set, its configuration.
        split: of what ``datasets`` reads; ``train`` without it.

    Raises:
        DataError: it cannot be read, has no rows, or none of the named columns.
        OptionError: a subset or split of a file.
    """
    path = Path(source)
    if path.suffix not in SUFFIXES and not path.is_file():
        return _library(source, columns, subset, split)
    if subset is not None or split is not None:
        raise OptionError(f"{source} is a file; --subset and --split are of what the library `datasets` reads")
    if path.suffix not in SUFFIXES:
        raise DataError(f"cannot tell what {source} is; give a file that ends in {', '.join(SUFFIXES)}")
    try:
        before = _stamp(path)
        with path.open("rb") as file:
            found = hashlib.sha256()
            while block := file.read(1 << 20):
                found.update(block)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {source}: {_first_line(error)}") from error
    if path.suffix == ".parquet":
        count, names = _parquet_head(path)
        records = partial(_parquet, path, [name for name in _wanted(source, columns, names) if name is not None])
    else:
        records = partial(_csv, path, columns.prompt) if path.suffix == ".csv" else partial(_jsonl, path)
        count, names = _looked_through(records())

    def check() -> None:
        if _stamp(path) != before:
            raise DataError(f"{source} was changed since the run began; leave it alone while it is read")

    return _made(source, columns, count, names, found.hexdigest(), records, check)


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes with a file's content."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _made(
    source: str,
    columns: Columns,
    count: int,
    names: Sequence[str],
    fingerprint: str,
    records: Callable[[], Iterator[Record]],
    check: Callable[[], None] = lambda: None,
) -> Data:
    if not count:
        raise DataError(f"{source} has no rows")
    of_prompt, of_target, of_id = _wanted(source, columns, names)

    def read() -> Iterator[Row]:
        number = -1
        try:
            check()
            for number, record in enumerate(itertools.islice(records(), count)):
                yield _row(number, record, of_prompt, of_target, of_id)
            check()
        except OSError as error:
            raise DataError(f"cannot read {source}: {_first_line(error)}") from error
        if number + 1 < count:
            raise DataError(f"{source} had {count} rows and has {number + 1} now; leave it alone while it is read")

    return Data(count, fingerprint, read)


def _looked_through(records: Iterator[Record]) -> tuple[int, list[str]]:
    """How many rows, and all columns that any of them has."""
    count, names = 0, dict[str, None]()
    for count, record in enumerate(records, 1):  # noqa: B007
        if isinstance(record, dict):
            names.update(dict.fromkeys(record))
    return count, list(names)


def _wanted(source: str, columns: Columns, names: Sequence[str]) -> tuple[str, str | None, str | None]:
    """The names of the columns of prompts, targets and ids, None where there is none.

    Raises:
        DataError: one that was named is not there.
    """
    for option, name in (("prompt", columns.prompt), ("target", columns.target), ("id", columns.id)):
        if name is not None and name not in names:
            there = ", ".join(map(repr, names)) or "none"
            raise DataError(f"{source} has no column {name!r}; its columns: {there}; name yours with --{option}-column")
    target = columns.target or ("target" if "target" in names else None)
    return columns.prompt, target, columns.id or ("id" if "id" in names else None)


def _row(number: int, record: Record, of_prompt: str, of_target: str | None, of_id: str | None) -> Row:
    if isinstance(record, str):
        return Row(str(number), broken=record)
    given = record.get(of_id) if of_id else None
    name = str(number) if given is None else str(given)
    prompt, target = record.get(of_prompt), record.get(of_target) if of_target else None
    if prompt is None:
        return Row(name, broken=f"no {of_prompt!r} in this row")
    if not isinstance(prompt, (str, list)):
        return Row(name, broken=f"a prompt is a text, chat messages or ids, got {type(prompt).__name__}")
    if isinstance(target, bool) or not isinstance(target, (str, int, type(None))):
        return Row(name, broken=f"a target is a token's text or id, got {type(target).__name__}")
    if isinstance(target, str) and (match := re.fullmatch(r"id:(\d{1,18})", target)):
        target = int(match[1])  # as at the command's --target
    return Row(name, _messages(prompt) or prompt, target)


def _messages(prompt: Any) -> list[dict[str, Any]] | None:
    """Chat messages that stand as JSON in a text; None: the text is none of that kind."""
    found = _list(prompt) if isinstance(prompt, str) else None
    chat = found and all(isinstance(one, dict) and "role" in one for one in found)
    return found if chat else None


def _ids(cell: str) -> list[int] | None:
    """A list of ids that stands as JSON in a cell; None: it is none."""
    found = _list(cell)
    return found if found and all(type(one) is int for one in found) else None


def _list(text: str) -> list[Any] | None:
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


# Files.


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                torn = "" if line.endswith(b"\n") else "; the file ends within it"
                yield f"line {number} is no JSON{torn}"
                continue
            yield row if isinstance(row, dict) else f"line {number} is no JSON object"


def _csv(path: Path, of_prompt: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    # bytes that are no UTF-8 pass as surrogates: they are one row's error, and it is the prompt's check that says so
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        names: list[str] | None = None
        while True:
            began = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if names is None:
                    raise DataError(f"{path} has no header of columns: {error}") from error
                lines = f"line {began}" if reader.line_num <= began else f"lines {began} to {reader.line_num}, one row"
                yield f"{lines}: {error}"
                continue
            if not cells:
                continue
            if names is None:
                names = cells
            elif len(cells) != len(names):
                yield f"line {reader.line_num} has {len(cells)} cells, the header has {len(names)}"
            else:
                # a CSV file has neither lists nor empty cells of their own
                row: dict[str, Any] = {name: cell or None for name, cell in zip(names, cells, strict=True)}
                prompt = row.get(of_prompt)
                yield row if prompt is None else {**row, of_prompt: _ids(prompt) or prompt}


def load_pyarrow() -> Any:
    """The library with its Parquet part.

    Raises:
        DataError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet  # an attribute of pyarrow from now on
    except ImportError as error:
        raise DataError("Parquet needs pyarrow: pip install 'depass-kernels[data]'") from error
    return pyarrow


def _parquet_head(path: Path) -> tuple[int, list[str]]:
    arrow = load_pyarrow()
    try:
        with arrow.parquet.ParquetFile(path) as file:
            return file.metadata.num_rows, file.schema_arrow.names
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: {_first_line(error)}") from error


def _parquet(path: Path, names: list[str]) -> Iterator[Record]:
    arrow = load_pyarrow()
    try:
        with arrow.parquet.ParquetFile(path, buffer_size=_BUFFER) as file:  # not a row group at once
            for batch in file.iter_batches(batch_size=_AT_ONCE, columns=names):
                for index in range(batch.num_rows):
                    try:
                        yield batch.slice(index, 1).to_pylist()[0]
                    except (ValueError, OverflowError) as error:  # bytes that are no UTF-8, dates that Python lacks
                        yield f"a cell that cannot be read: {_first_line(error)}"
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: {_first_line(error)}") from error


def _library(source: str, columns: Columns, subset: str | None, split: str | None) -> Data:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source!r} is no file that ends in {', '.join(SUFFIXES)}, and other data are read with `datasets`: "
            "pip install 'depass-kernels[data]'"
        ) from error
    datasets.disable_progress_bars()
    try:
        if any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json")):  # save_to_disk's
            found = datasets.load_from_disk(source)
            several = isinstance(found, datasets.DatasetDict)
            if subset is not None or (split is not None and not several):
                raise OptionError(
                    f"{source} holds one data set without {'subsets' if several else 'subsets or splits'}"
                )
            found = found[split or "train"] if several else found
        else:
            found = datasets.load_dataset(source, subset, split=split or "train")
    except OptionError:
        raise
    except Exception as error:  # runs other people's code, which raises what it likes
        raise DataError(f"cannot read the data set {source!r}: {_first_line(error)}") from error
    names = [name for name in _wanted(source, columns, found.column_names) if name is not None]

    def records() -> Iterator[Record]:
        try:
            yield from found.select_columns(names)
        except Exception as error:  # as above
            raise DataError(f"cannot read the data set {source!r}: {_first_line(error)}") from error

    return _made(source, columns, len(found), names, found._fingerprint, records)


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
