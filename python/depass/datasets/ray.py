"""The Ray engine: makes a data set's shards on a Ray cluster. Each worker is an actor with its own copy of the model."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..checks import check_of
from ..errors import DePassError, OptionError, WorkerError, first_line
from .local import attributed, batch_tokens
from .options import DatasetOptions
from .rows import Row
from .shards import Engine, Finished, Shard, Work

if TYPE_CHECKING:
    from ..api import DePass

_INSTALL = "--engine ray needs Ray: pip install 'depass-kernels[ray]'"


def on_ray(options: DatasetOptions) -> Engine:
    """The engine that makes shards on ``options.workers`` actors of the cluster at ``options.ray_address``.

    Without an address it starts a cluster on this machine. A worker that dies is replaced, and its shard is made once
    more; a shard that ends a second worker ends the run. Only the caller writes files, so no shard is written twice.

    Raises:
        OptionError: Ray is not installed, there is no cluster at the address, or the workers cannot share the device.
    """
    try:
        import ray
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
            if options.device == "cuda" and ray.cluster_resources().get("GPU", 0) < options.workers:
                raise OptionError(
                    f"--workers {options.workers} --device cuda: the cluster has "
                    f"{ray.cluster_resources().get('GPU', 0):g} GPUs, one per worker; use fewer workers, --device cpu, or "
                    "another cluster"
                )
            yield from _finished(options, shards)
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise WorkerError(f"a worker failed: {lines[-1].strip()}") from error
        finally:
            ray.shutdown()

    return work


def _finished(options: DatasetOptions, shards: Iterator[Shard]) -> Work:
    """The shards as the workers make them; each worker has one at a time, and no worker starts without one."""
    import ray
    from ray.util import ActorPool

    actor = ray.remote(Worker).options(
        num_cpus=_cpus(options), num_gpus=int(options.device == "cuda"), max_restarts=-1, max_task_retries=1
    )
    pool, started = ActorPool([]), 0
    for first, rows in shards:
        if not pool.has_free() and started < options.workers:
            pool.push(actor.remote(options))
            started += 1
        if not pool.has_free():
            yield _checked(*pool.get_next_unordered())
        pool.submit(lambda worker, shard: worker.make.remote(*shard), (first, _described(rows)))
    while pool.has_next():
        yield _checked(*pool.get_next_unordered())


def _checked(first: int, content: bytes | DePassError) -> Finished:
    if isinstance(content, DePassError):
        raise content
    return first, content


class Worker:
    """An actor with a model, which makes one shard after another."""

    def __init__(self, options: DatasetOptions) -> None:
        self.options = options

    @cached_property
    def dp(self) -> DePass:
        """The model, loaded with the first shard: a worker that dies meanwhile has died on its shard."""
        options = self.options
        return arguments.load_model(options, rule=options.rule, temperature=options.temperature)

    @cached_property
    def tokens(self) -> int:
        """The most tokens of one pass."""
        options = self.options
        processes = 1 if options.device == "cuda" else options.workers  # at most so many share this machine's memory
        return options.batch_tokens or batch_tokens(self.dp, processes)

    def make(self, first: int, described: str) -> tuple[int, bytes | DePassError]:
        """Make a shard's Parquet file from the text of :func:`_described`, or return the error that stops the run."""
        from ..sources.spans import named  # needs torch

        rows = [Row(**row) for row in json.loads(described)]
        try:
            sources = named(self.options.sources, self.options.language)
            return first, attributed(self.dp, rows, sources, self.tokens, check_of(self.options.of))
        except DePassError as error:
            return first, error


def _described(rows: list[Row]) -> str:
    """A shard's rows as JSON."""
    return f"[{','.join(map(_described_row, rows))}]"


def _described_row(row: Row) -> str:
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


def _cpus(options: DatasetOptions) -> float:
    """CPUs per worker: the most with which all workers fit on the cluster's machines; one where the worker has a GPU."""
    import ray

    if options.device == "cuda":
        return 1
    of_machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    for each in range(max(of_machines), 0, -1):
        if sum(cpus // each for cpus in of_machines) >= options.workers:
            return each
    return 1 / -(-options.workers // sum(of_machines))
