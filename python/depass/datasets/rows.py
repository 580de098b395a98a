"""Reads prompts one row at a time: from JSONL, CSV and Parquet files, and from data sets of the library ``datasets``."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError, OptionError, first_line

Record = dict[str, Any] | str  # a row's cells by column, or why the row is broken
SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")
_AT_ONCE = 256  # rows of a Parquet file that are in memory at once
_BUFFER = 1 << 20  # bytes of a Parquet file that are read at once


@dataclass(frozen=True)
class Columns:
    """The names of the columns. None: ``target`` and ``id``, if the data have such columns; no answers."""

    prompt: str = "prompt"
    target: str | None = None
    id: str | None = None
    answer: str | None = None

    @property
    def names(self) -> list[str]:
        """The columns that are named."""
        return [name for name in vars(self).values() if name is not None]


@dataclass(frozen=True)
class Row:
    """One prompt of a data set.

    Attributes:
        id: its id in the data, or its row number, counted from 0.
        prompt: a prompt for :meth:`depass.DePass.attribute`.
        target: a token's text or id; None: the model's own next token.
        answer: an answer's text or token ids; None: a target is explained.
        broken: why the row has no prompt; None if it has one.
    """

    id: str
    prompt: Any = None
    target: str | int | None = None
    answer: Any = None
    broken: str | None = None


@dataclass(frozen=True)
class Data:
    """An open data set.

    Attributes:
        count: number of rows.
        fingerprint: a hash of the content.
        read: a function that returns an iterator over all rows, in order.
    """

    count: int
    fingerprint: str
    read: Callable[[], Iterator[Row]]


def open_data(source: str, columns: Columns, subset: str | None = None, split: str | None = None) -> Data:
    """Find a data set and read through it once. A file's suffix gives its format; the library ``datasets`` reads the rest.

    Args:
        source: a file, a directory that ``datasets`` can read, or a name on the Hugging Face Hub.
        columns: the names of the columns.
        subset: the configuration of a data set on the Hub.
        split: the split of a data set that ``datasets`` reads; None: ``train``.

    Raises:
        DataError: the data set cannot be read, has no rows, or lacks a named column.
        OptionError: a subset or split is given for a file.
    """
    path = Path(source)
    if path.suffix not in SUFFIXES and not path.is_file():
        return _library(source, columns, subset, split)
    if subset is not None or split is not None:
        raise OptionError(f"{source} is a file; leave out --subset and --split, which are for Hugging Face data sets")
    if path.suffix not in SUFFIXES:
        raise DataError(f"cannot tell the format of {source}; give a file that ends in {', '.join(SUFFIXES)}")
    try:
        before = _stamp(path)
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {source}: {_first_line(error)}") from error
    if path.suffix == ".parquet":
        count, names = _parquet_head(path)
        records = partial(_parquet, path, _wanted(source, columns, names).names)
    else:
        lists = [name for name in (columns.prompt, columns.answer) if name is not None]
        records = partial(_csv, path, lists) if path.suffix == ".csv" else partial(_jsonl, path)
        count, names = _looked_through(records())

    def check() -> None:
        if _stamp(path) != before:
            raise DataError(f"{source} changed during the run; do not change it while the run reads it")

    return _data(source, columns, count, names, digest.hexdigest(), records, check)


def _stamp(path: Path) -> tuple[int, ...]:
    """Numbers that change when the file's content changes."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _data(
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
    wanted = _wanted(source, columns, names)

    def read() -> Iterator[Row]:
        number = -1
        try:
            check()
            for number, record in enumerate(itertools.islice(records(), count)):
                yield _row(number, record, wanted)
            check()
        except OSError as error:
            raise DataError(f"cannot read {source}: {_first_line(error)}") from error
        if number + 1 < count:
            raise DataError(
                f"{source} had {count} rows and now has {number + 1}; do not change it while the run reads it"
            )

    return Data(count, fingerprint, read)


def _looked_through(records: Iterator[Record]) -> tuple[int, list[str]]:
    """The number of rows, and every column that occurs in one of them."""
    count, names = 0, dict[str, None]()
    for count, record in enumerate(records, 1):  # noqa: B007
        if isinstance(record, dict):
            names.update(dict.fromkeys(record))
    return count, list(names)


def _wanted(source: str, columns: Columns, names: Sequence[str]) -> Columns:
    """The columns that the data have; None for one that they do not have.

    Raises:
        DataError: the data lack a column that was named.
    """
    for option, name in vars(columns).items():
        if name is not None and name not in names:
            existing = ", ".join(map(repr, names)) or "none"
            raise DataError(
                f"{source} has no column {name!r}; its columns: {existing}; name one of them with --{option}-column"
            )
    target = columns.target or ("target" if "target" in names and columns.answer is None else None)
    return replace(columns, target=target, id=columns.id or ("id" if "id" in names else None))


def _row(number: int, record: Record, columns: Columns) -> Row:
    if isinstance(record, str):
        return Row(str(number), broken=record)
    prompt, target, given, answer = (record.get(name) if name else None for name in vars(columns).values())
    name = str(number) if given is None else str(given)
    if prompt is None:
        return Row(name, broken=f"no {columns.prompt!r} in this row")
    if not isinstance(prompt, (str, list)):
        return Row(name, broken=f"a prompt must be text, chat messages or token ids, got {type(prompt).__name__}")
    if isinstance(target, bool) or not isinstance(target, (str, int, type(None))):
        return Row(name, broken=f"a target must be a token's text or id, got {type(target).__name__}")
    if isinstance(target, str) and (match := re.fullmatch(r"id:(\d{1,18})", target)):
        target = int(match[1])  # as the command's --target reads it
    if columns.answer is not None and not isinstance(answer, (str, list)):
        had = f"no {columns.answer!r} in this row" if answer is None else f"got {type(answer).__name__}"
        return Row(name, broken=f"an answer must be text or token ids, {had}")
    return Row(name, _messages(prompt) or prompt, target, answer)


def _messages(prompt: Any) -> list[dict[str, Any]] | None:
    """Chat messages that a text holds as JSON, or None."""
    messages = _list(prompt) if isinstance(prompt, str) else None
    chat = messages and all(isinstance(message, dict) and "role" in message for message in messages)
    return messages if chat else None


def _ids(cell: str) -> list[int] | None:
    """Token ids that a cell holds as JSON, or None."""
    ids = _list(cell)
    return ids if ids and all(type(token) is int for token in ids) else None


def _list(text: str) -> list[Any] | None:
    if not text.lstrip().startswith("["):
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, list) else None


# Files.


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                torn = "" if line.endswith(b"\n") else "; the file ends in the middle of it"
                yield f"line {number} is not valid JSON{torn}"
                continue
            yield row if isinstance(row, dict) else f"line {number} is not a JSON object"


def _csv(path: Path, lists: Sequence[str]) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    # bytes that are not UTF-8 become surrogates; the prompt's check then reports them as the row's error
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
                    raise DataError(f"{path} has no header line with column names: {error}") from error
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
                # CSV has no lists and no null: a list of ids is text, and an empty cell is a missing one
                row: dict[str, Any] = {name: cell or None for name, cell in zip(names, cells, strict=True)}
                yield row | {name: _ids(row[name]) or row[name] for name in lists if row.get(name) is not None}


def load_pyarrow() -> Any:
    """Import pyarrow with its Parquet module.

    Raises:
        DataError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet  # makes it an attribute of pyarrow
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
        with arrow.parquet.ParquetFile(path, buffer_size=_BUFFER) as file:  # a whole row group may not fit in memory
            for batch in file.iter_batches(batch_size=_AT_ONCE, columns=names):
                for index in range(batch.num_rows):
                    try:
                        yield batch.slice(index, 1).to_pylist()[0]
                    except (ValueError, OverflowError) as error:  # not UTF-8, or a date that Python cannot hold
                        yield f"cannot read a cell: {_first_line(error)}"
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: {_first_line(error)}") from error


def _library(source: str, columns: Columns, subset: str | None, split: str | None) -> Data:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source!r} is not a file that ends in {', '.join(SUFFIXES)}; to read a Hugging Face data set, install "
            "`datasets`: pip install 'depass-kernels[data]'"
        ) from error
    datasets.disable_progress_bars()
    try:
        if any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json")):  # save_to_disk's
            dataset = datasets.load_from_disk(source)
            has_splits = isinstance(dataset, datasets.DatasetDict)
            if subset is not None or (split is not None and not has_splits):
                option = "--subset" if has_splits else "--subset and --split"
                kinds = "subsets" if has_splits else "subsets or splits"
                raise OptionError(f"{source} is a data set without {kinds}; leave out {option}")
            dataset = dataset[split or "train"] if has_splits else dataset
        else:
            dataset = datasets.load_dataset(source, subset, split=split or "train")
    except OptionError:
        raise
    except Exception as error:  # a data set's own code may raise anything
        raise DataError(f"cannot read the data set {source!r}: {_first_line(error)}") from error
    names = _wanted(source, columns, dataset.column_names).names

    def records() -> Iterator[Record]:
        try:
            yield from dataset.select_columns(names)
        except Exception as error:  # as above
            raise DataError(f"cannot read the data set {source!r}: {_first_line(error)}") from error

    return _data(source, columns, len(dataset), names, dataset._fingerprint, records)


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
