"""Attributes every row of a data set and writes Parquet files. A stopped run resumes where it was."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from .. import arguments, rules
from ..errors import DataError, DePassError, OptionError
from ..files import check_writable, write_atomically
from ..runs import described, hold, progress, recorded_session, say_kept
from .local import local
from .options import DatasetOptions
from .rows import Columns, Data, load_pyarrow, open_data
from .shards import Engine, Shards

FORMAT = "depass-dataset-1"
TASK = "attribute-dataset"
SETTINGS = (
    "model",
    "dtype",
    "quantization",
    "of",
    "sources",
    "language",
    "rule",
    "temperature",
    "backend",
    "subset",
    "split",
    "shard_rows",
)


def run(options: DatasetOptions) -> str:
    """Attribute the rows that are not done yet, and return a line that counts the rows by status.

    Writes ``run.json`` (settings, versions) and the shards, ``rows/``, into ``options.out``.

    Raises:
        DataError: the data cannot be read, or the directory holds something else.
        OptionError: the directory holds a run with other settings.
        OutputError: the directory cannot be written, or another process is using it.
        ModelError: there is no such model.
    """
    load_pyarrow()
    if options.answer_column is not None and options.target_column is not None:
        raise OptionError("--answer-column explains answers and --target-column targets; give one of them")
    columns = Columns(options.prompt_column, options.target_column, options.id_column, options.answer_column)
    data = open_data(options.data, columns, options.subset, options.split)
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings |= {"rule": rules.read(options.rule).name}  # one name, however the rule was written
    settings |= {"columns": vars(columns), "fingerprint": data.fingerprint, "rows": data.count}
    folder = Path(options.out)
    with hold(folder):
        description = described(folder / "run.json", FORMAT, TASK, settings)
        shards = Shards(folder / "rows", data.count, options.shard_rows)
        if not (folder / "run.json").exists() and len(shards.missing()) < len(shards):
            raise DataError(
                f"{shards.folder} has rows, but {folder} has no run.json that describes them; give another --out"
            )
        shards.tidy()
        if shards.missing():
            check_writable(folder / "run.json")  # before the model loads, which may take minutes
            if shards.folder.exists():
                check_writable(shards.path(0))
            engine = _engine(options)
            try:
                with recorded_session(folder / "run.json", description):
                    _fill(shards, data, engine)
            except (DePassError, KeyboardInterrupt) as stop:
                say_kept(stop, shards.done(), data.count, folder)
                raise
        return f"{data.count:,} rows in {shards.folder}: {shards.statuses()}"


def _fill(shards: Shards, data: Data, engine: Engine) -> None:
    """Write the missing shards as the engine makes them."""
    done = shards.done()
    shards.make()
    with progress("rows", data.count) as update:

        def tell(rows: int) -> None:
            update(done + rows)

        tell(0)
        with closing(engine(shards.pending(data), tell)) as finished:  # closing it stops a cluster that it started
            for first, content in finished:
                write_atomically(shards.path(first), content)
                done += shards.length(first)
                tell(0)
    assert not shards.missing(), "an engine must return every shard"


def _engine(options: DatasetOptions) -> Engine:
    """The engine that ``options.engine`` names.

    Raises:
        OptionError: options of the other engine are given, or a library is not installed.
        ModelError: there is no such model.
    """
    if options.engine == "ray":
        from .ray import on_ray

        return on_ray(options)
    if options.ray_address is not None or options.workers != 1:
        raise OptionError("--workers and --ray-address need --engine ray; add it, or leave them out")
    return local(arguments.load_model(options, rule=options.rule, temperature=options.temperature), options)
