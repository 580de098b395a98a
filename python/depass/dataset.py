"""Attributes every row of a data set, into Parquet shards: the command ``depass attribute-dataset``.

The data's rows are cut into ranges of equal length, and each range becomes one file. A file is written whole or not at
all, under a name that says which row it begins with. So what is done can be seen from the names, whenever a run ends and
however it does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cli
from .errors import DataError, DePassError, OptionError, OutputError
from .files import check_writable, write_atomically
from .rows import Columns, Data, Row, load_pyarrow, open_data
from .runs import described, hold, progress, say_kept, session, write_json

if TYPE_CHECKING:
    from .api import DePass
    from .result import Attribution

Shard = tuple[int, list[Row]]  # the number of its first row in the data, and its rows
Finished = tuple[int, bytes]  # the same number, and the shard's Parquet file
Work = Generator[Finished, None, None]
Engine = Callable[[Iterator[Shard], Callable[[int], None]], Work]  # may tell how many rows of a shard are done

FORMAT = "depass-dataset-1"
TASK = "attribute-dataset"
SETTINGS = (
    "model",
    "dtype",
    "quantization",
    "sources",
    "mlp_rule",
    "temperature",
    "backend",
    "subset",
    "split",
    "shard_rows",
)
_MOST_TOKENS = 1024  # of one pass
_LONGEST_ERROR = 500  # characters


def run(options: argparse.Namespace) -> str:
    """Attribute what has no row yet, and say how many rows there are of which status.

    ``options.out`` gets ``run.json`` (settings, versions) and ``rows/``, the shards.

    Raises:
        DataError: the data cannot be read, or the folder holds something else.
        OptionError: the folder holds a run with other settings.
        OutputError: the folder cannot be written, or another process is at work in it.
        ModelError: there is no such model.
    """
    load_pyarrow()
    columns = Columns(options.prompt_column, options.target_column, options.id_column)
    data = open_data(options.data, columns, options.subset, options.split)
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings |= {"columns": vars(columns), "fingerprint": data.fingerprint, "rows": data.count}
    folder = Path(options.out)
    with hold(folder):
        made = described(folder / "run.json", FORMAT, TASK, settings)
        shards = Shards(folder / "rows", data.count, options.shard_rows)
        if not (folder / "run.json").exists() and len(shards.missing()) < len(shards):
            raise DataError(f"{shards.folder} has rows, and {folder} no run.json that says what of; give another --out")
        shards.tidy()
        if shards.missing():
            check_writable(folder / "run.json")  # before the model is loaded, which may take minutes
            if shards.folder.exists():
                check_writable(shards.path(0))
            engine, began, now = _engine(options), time.monotonic(), session()
            made["sessions"].append(now)
            write_json(folder / "run.json", made)
            try:
                _fill(shards, data, engine)
            except (DePassError, KeyboardInterrupt) as stop:
                say_kept(stop, shards.done(), data.count, folder)
                raise
            now["seconds"] = round(time.monotonic() - began, 1)
            write_json(folder / "run.json", made)
        return f"{data.count:,} rows in {shards.folder}: {shards.statuses()}"


def _fill(shards: Shards, data: Data, engine: Engine) -> None:
    """Write the shards that are missing, as the engine makes them."""
    done = shards.done()
    shards.make()
    with progress("rows", data.count) as update:

        def tell(rows: int) -> None:
            update(done + rows)

        tell(0)
        with closing(engine(shards.pending(data), tell)) as finished:  # ends a cluster that it began
            for first, content in finished:
                write_atomically(shards.path(first), content)
                done += shards.length(first)
                tell(0)
    assert not shards.missing(), "an engine gives back every shard"


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


def _engine(options: argparse.Namespace) -> Engine:
    """What makes shards, as asked for.

    Raises:
        OptionError: options of the other engine, or what it needs is not there.
        ModelError: there is no such model.
    """
    if options.engine == "ray":
        from .ray_engine import on_ray

        return on_ray(options)
    if options.ray_address is not None or options.workers != 1:
        raise OptionError("--workers and --ray-address are of --engine ray; give it, or leave them out")
    return local(cli.load_model(options, mlp_rule=options.mlp_rule, temperature=options.temperature), options)


def local(dp: DePass, options: argparse.Namespace) -> Engine:
    """Makes shards one by one in this process."""
    tokens = options.batch_tokens or batch_tokens(dp)

    def work(shards: Iterator[Shard], tell: Callable[[int], None]) -> Work:
        for first, rows in shards:
            yield first, attributed(dp, rows, options.sources, tokens, tell)

    return work


def batch_tokens(dp: DePass, beside: int = 1) -> int:
    """How many tokens go in one pass: so many that a prompt of them all would take at most half of what memory is free.

    Of that half each of ``beside`` processes that share the memory has an equal part.
    """
    from .memory import needs, room
    from .plan import rows_and_sources

    bound, tokens = dp._bound, _MOST_TOKENS
    free = room(bound)

    def taken(count: int) -> int:
        rows, _ = rows_and_sources(bound, count, "token")
        return needs(bound, rows, [count], dp.workspace_bytes, bound.device).total_bytes

    while tokens > 1 and taken(tokens) > free // (2 * beside):
        tokens //= 2
    return tokens


def attributed(
    dp: DePass, rows: Sequence[Row], sources: str, tokens: int, tell: Callable[[int], None] = lambda done: None
) -> bytes:
    """The rows' Parquet file: ``id``, ``tokens``, ``scores``, ``target``, ``target_logit``, ``conservation_error``,
    ``status`` and ``error`` of each, in order.

    Args:
        dp: the model.
        rows: the prompts; one that is broken or cannot be attributed is a row with its error.
        sources: ``"token"``, ``"word"`` or ``"sentence"``.
        tokens: of one pass, padding included.
        tell: called with the number of rows that are done.
    """
    made = [_failed(row, row.broken) for row in rows]
    whole = [index for index, row in enumerate(rows) if row.broken is None]
    whole.sort(key=lambda index: len(str(rows[index].prompt)))  # prompts of like length need little padding
    found = dp.attribute_many(
        [rows[index].prompt for index in whole],
        targets=[rows[index].target for index in whole],
        sources=sources,
        batch_tokens=tokens,
        errors="return",
    ) if whole else ()  # fmt: skip
    for done, (index, result) in enumerate(zip(whole, found, strict=True), len(rows) - len(whole) + 1):
        made[index] = _failed(rows[index], result) if isinstance(result, DePassError) else _ok(rows[index], result)
        tell(done)
    return _parquet(made)


def _ok(row: Row, result: Attribution) -> dict[str, Any]:
    return {
        "id": _clean(row.id),
        "tokens": [_clean(source.label) for source in result.sources],
        "scores": result.scores[0].tolist(),
        "target": _clean(result.targets[0].label),
        "target_logit": float(result.target_logits[0]),
        "conservation_error": float(result.conservation_error[0]),
        "status": "ok",
    }


def _failed(row: Row, why: object) -> dict[str, Any]:
    said = _clean(" ".join(str(why).split()))
    if len(said) > _LONGEST_ERROR:
        said = f"{said[:_LONGEST_ERROR]}..."
    return {"id": _clean(row.id), "status": "error", "error": said}


def _clean(text: str) -> str:
    """The text as UTF-8 can hold it, with escapes for halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode()


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    arrow = load_pyarrow()
    schema = arrow.schema(
        {
            "id": arrow.string(),
            "tokens": arrow.list_(arrow.string()),
            "scores": arrow.list_(arrow.float32()),
            "target": arrow.string(),
            "target_logit": arrow.float32(),
            "conservation_error": arrow.float32(),
            "status": arrow.string(),
            "error": arrow.string(),
        }
    )
    sink = arrow.BufferOutputStream()
    arrow.parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content
