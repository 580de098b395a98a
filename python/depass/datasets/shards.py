"""The Parquet shards that ``depass attribute-dataset`` writes.

Each shard holds a range of the data's rows; all ranges but the last have the same length. A file is written whole or not
at all, and its name is the number of its first row. So the names show which rows are done, however a run ended.
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
Engine = Callable[[Iterator[Shard], Callable[[int], None]], Work]  # may report how many rows of a shard are done


class Shards:
    """The files of a run. A shard is named by the number of its first row.

    Args:
        folder: the directory of the files.
        rows: number of rows of the data.
        size: rows per shard; the last one may have fewer.
    """

    def __init__(self, folder: Path, rows: int, size: int) -> None:
        self.folder, self.rows, self.size = folder, rows, size

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def path(self, first: int) -> Path:
        """The path of the shard that begins with row ``first``. The names sort in the order of the rows."""
        return self.folder / f"{first:012}.parquet"

    def length(self, first: int) -> int:
        """The number of rows of the shard that begins with row ``first``."""
        return min(self.size, self.rows - first)

    def missing(self) -> list[int]:
        """The first rows of the shards that do not exist yet."""
        return [first for first in range(0, self.rows, self.size) if not self.path(first).exists()]

    def done(self) -> int:
        """The number of rows that are written."""
        return self.rows - sum(map(self.length, self.missing()))

    def pending(self, data: Data) -> Iterator[Shard]:
        """The missing shards with their rows, in order."""
        missing, rows = set(self.missing()), data.read()
        for first in range(0, self.rows, self.size):
            shard = list(islice(rows, self.length(first)))
            if first in missing:
                yield first, shard

    def make(self) -> None:
        """Create the directory.

        Raises:
            OutputError: it cannot be created.
        """
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write into {self.folder}: {error.strerror or error}") from error

    def tidy(self) -> None:
        """Delete unfinished files of a killed process. The caller must hold the run's directory.

        Raises:
            OutputError: the directory cannot be written.
        """
        try:
            for torn in [*self.folder.glob(".depass-*"), *self.folder.parent.glob(".depass-*")]:
                torn.unlink()
        except OSError as error:
            raise OutputError(f"cannot write into {self.folder}: {error.strerror or error}") from error

    def statuses(self) -> str:
        """The number of rows with each status.

        Raises:
            DataError: a shard cannot be read, or has lost rows.
        """
        arrow, ok = load_pyarrow(), 0
        for first in range(0, self.rows, self.size):
            path = self.path(first)
            try:
                statuses = arrow.parquet.read_table(path, columns=["status"])["status"].to_pylist()
            except (arrow.ArrowException, OSError) as error:
                raise DataError(f"cannot read {path}: {error}; delete it and run again") from error
            if len(statuses) != self.length(first):
                raise DataError(
                    f"{path} has {len(statuses)} rows, expected {self.length(first)}; delete it and run again"
                )
            ok += statuses.count("ok")
        errors = self.rows - ok
        return f"{ok:,} ok, {errors:,} error{'s' if errors != 1 else ''}"
