"""Attributes every row of a data set, into Parquet shards: the command ``depass attribute-dataset``.

The data's rows are cut into ranges of equal length, and each range becomes one file. A file is written whole or not at
all, under a name that says which row it begins with. So what is done can be seen from the names, whenever a run ends and
however it does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from itertools import islice
from pathlib import Path

from ..errors import DataError, OutputError
from .rows import Data, Row, load_pyarrow

Shard = tuple[int, list[Row]]  # the number of its first row in the data, and its rows
Finished = tuple[int, bytes]  # the same number, and the shard's Parquet file
Work = Generator[Finished, None, None]
Engine = Callable[[Iterator[Shard], Callable[[int], None]], Work]  # may tell how many rows of a shard are done


class Shards:
    """The files of a run, by the number of the first row of each.

    Args:
        folder: where they lie.
        rows: of the data.
        size: rows of each shard but the last.
    """

    def __init__(self, folder: Path, rows: int, size: int) -> None:
        self.folder, self.rows, self.size = folder, rows, size

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def path(self, first: int) -> Path:
        """Of the shard that begins with a row; names sort as the rows do."""
        return self.folder / f"{first:012}.parquet"

    def length(self, first: int) -> int:
        """How many rows it has."""
        return min(self.size, self.rows - first)

    def missing(self) -> list[int]:
        """The first rows of the shards that are not there."""
        return [first for first in range(0, self.rows, self.size) if not self.path(first).exists()]

    def done(self) -> int:
        """How many rows are there."""
        return self.rows - sum(map(self.length, self.missing()))

    def pending(self, data: Data) -> Iterator[Shard]:
        """The missing shards' rows out of the data, in order."""
        missing, rows = set(self.missing()), data.read()
        for first in range(0, self.rows, self.size):
            shard = list(islice(rows, self.length(first)))
            if first in missing:
                yield first, shard

    def make(self) -> None:
        """Make the folder.

        Raises:
            OutputError: it cannot be made.
        """
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write into {self.folder}: {error.strerror or error}") from error

    def tidy(self) -> None:
        """Delete what a killed process left of a file; for who holds the run's folder.

        Raises:
            OutputError: the folder cannot be written.
        """
        try:
            for torn in [*self.folder.glob(".depass-*"), *self.folder.parent.glob(".depass-*")]:
                torn.unlink()
        except OSError as error:
            raise OutputError(f"cannot write into {self.folder}: {error.strerror or error}") from error

    def statuses(self) -> str:
        """How many rows are what.

        Raises:
            DataError: a shard that is not as it was written.
        """
        arrow, ok = load_pyarrow(), 0
        for first in range(0, self.rows, self.size):
            path = self.path(first)
            try:
                statuses = arrow.parquet.read_table(path, columns=["status"])["status"].to_pylist()
            except (arrow.ArrowException, OSError) as error:
                raise DataError(f"cannot read {path}: {error}; delete it and run again") from error
            if len(statuses) != self.length(first):
                raise DataError(f"{path} has {len(statuses)} rows, not {self.length(first)}; delete it and run again")
            ok += statuses.count("ok")
        errors = self.rows - ok
        return f"{ok:,} ok, {errors:,} error{'s' if errors != 1 else ''}"
