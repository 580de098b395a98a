"""The command in a process of its own that dies, or is asked to end, at a chosen moment."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# a server that has imported all this forks each process in milliseconds
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "depass.api",
        "depass.cli",
        "depass.datasets.run",
        "pyarrow.parquet",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
    ]
)

Moment = tuple[str, int, bool]  # a function of os, which call of it from 1, and whether before or after it


def run(
    arguments: Sequence[str],
    said: Path,
    *,
    at: Moment | None = None,
    after: float | None = None,
    send: int = signal.SIGKILL,
    largest_file: int | None = None,
    memory: int | None = None,
) -> int:
    """Run ``depass`` and return its exit code, negative where a signal ended it; ``said`` gets what it prints.

    Args:
        arguments: of the command.
        said: a file for standard output and error.
        at: the moment at which it sends itself the signal.
        after: or the seconds after which it does.
        send: the signal.
        largest_file: bytes that a file of it may have.
        memory: bytes of addresses that it may take beside those that it begins with.
    """
    process = _SERVER.Process(target=_child, args=(list(arguments), str(said), at, after, send, largest_file, memory))
    process.start()
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def _child(
    arguments: list[str],
    said: str,
    at: Moment | None,
    after: float | None,
    send: int,
    largest_file: int | None,
    memory: int | None,
) -> None:
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from depass import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if memory is not None:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory, resource.RLIM_INFINITY))
    if at is not None:
        name, number, before = at
        setattr(os, name, _dying(getattr(os, name), number, before, send))
    if after is not None:
        timer = threading.Timer(after, os.kill, (os.getpid(), send))
        timer.daemon = True
        timer.start()
    sys.exit(cli.main(arguments))


def _dying(function: Callable[..., Any], number: int, before: bool, send: int) -> Callable[..., Any]:
    calls = 0

    def call(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and before:
            os.kill(os.getpid(), send)
        result = function(*given, **named)
        if calls == number and not before:
            os.kill(os.getpid(), send)
        return result

    return call
