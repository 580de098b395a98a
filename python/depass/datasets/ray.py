"""The Ray engine: makes a data set's shards on a Ray cluster. Each worker is an actor with its own copy of the model."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from .. import arguments
from ..errors import OptionError, WorkerError, first_line
from .local import attributed, batch_tokens
from .options import DatasetOptions
from .rows import Row, load_pyarrow
from .shards import Engine, Shard, Work

_INSTALL = "--engine ray needs Ray Data: pip install 'depass-kernels[ray]'"


def on_ray(options: DatasetOptions) -> Engine:
    """The engine that makes shards on ``options.workers`` actors of the cluster at ``options.ray_address``.

    Without an address it starts a cluster on this machine. A worker that dies is replaced, and its shard is made once
    more; a shard that ends a second worker ends the run. Only the caller writes files, so no shard is written twice.

    Raises:
        OptionError: Ray is not installed, there is no cluster at the address, or the workers cannot share the device.
    """
    try:
        import ray.data
    except ImportError as error:
        raise OptionError(_INSTALL) from error
    if options.device_map is not None:
        raise OptionError(
            f"--device-map {options.device_map}: with --engine ray each worker uses one device; leave out --device-map"
        )
    if options.device not in ("cpu", "cuda"):
        raise OptionError(f"--device {options.device}: with --engine ray each worker has its own GPU; write cuda")

    def work(shards: Iterator[Shard], tell: Callable[[int], None]) -> Work:
        _connect(options.ray_address)
        try:
            if options.device == "cuda" and ray.cluster_resources().get("GPU", 0) < 1:
                raise OptionError("--device cuda: the cluster has no GPU; write --device cpu, or give another cluster")
            # Ray moves blocks to disk when memory is full
            blocks = [ray.put(_block(first, rows)) for first, rows in shards]
            finished = ray.data.from_arrow_refs(blocks).map_batches(
                Worker,
                fn_constructor_args=(options,),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=options.workers, max_tasks_in_flight_per_actor=1),
                num_cpus=_cpus(options),
                num_gpus=int(options.device == "cuda"),
                max_restarts=-1,
                max_task_retries=1,
            )
            for row in finished.iter_rows():
                yield row["first"], row["content"]
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise WorkerError(f"a worker failed: {lines[-1].strip()}") from error
        finally:
            ray.shutdown()

    return work


class Worker:
    """An actor with a model, which makes one shard after another."""

    def __init__(self, options: DatasetOptions) -> None:
        self.dp = arguments.load_model(options, mlp_rule=options.mlp_rule, temperature=options.temperature)
        self.sources = options.sources
        processes = 1 if options.device == "cuda" else options.workers  # at most so many share this machine's memory
        self.tokens = options.batch_tokens or batch_tokens(self.dp, processes)

    def __call__(self, block: Any) -> Any:
        """Turn a table with one shard's rows into a table with its Parquet file."""
        rows = [Row(**row) for row in json.loads(block["rows"][0].as_py())]
        content = attributed(self.dp, rows, self.sources, self.tokens)
        return load_pyarrow().table({"first": block["first"], "content": [content]})


def _block(first: int, rows: list[Row]) -> Any:
    return load_pyarrow().table({"first": [first], "rows": [f"[{','.join(map(_described, rows))}]"]})


def _described(row: Row) -> str:
    # a value that JSON cannot hold is not a prompt; its text form is refused with the same error
    try:
        return json.dumps(vars(row), default=str)
    except RecursionError:
        return json.dumps({"id": row.id, "broken": "the prompt is nested too deep"})


def _connect(address: str | None) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics
    on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray replaces it
    alone: dict[str, Any] = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **alone)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = (
            f"--ray-address {address}: cannot connect to a cluster there"
            if address
            else "cannot start a Ray cluster on this machine"
        )
        raise OptionError(f"{where}: {first_line(error)}") from error
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def _cpus(options: DatasetOptions) -> int:
    """CPUs per worker: an equal part of the cluster's, at most those of one machine; one where the worker has a GPU."""
    import ray

    if options.device == "cuda":
        return 1
    of_machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(1, min(sum(of_machines) // options.workers, max(of_machines)))
