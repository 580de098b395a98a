"""Chooses the backend that runs a call. There is no silent fallback: a named backend that cannot run a call raises.

Each backend has a file here, with the reason that it cannot run on this machine (or None), and for each op a function and
the reason that it cannot run a call (or None). ``auto`` takes the first of :data:`BACKENDS` that can run the call. The
environment variable ``DEPASS_BACKEND`` overrides ``auto`` for the ops that the backend implements. :func:`record` collects
the backends used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..build import build_info
from ..errors import BackendError
from ..names import NAMES, RULES
from .common import Backend, Op
from .cpu import CPU
from .csrc import csrc_missing
from .cuda import CUDA
from .reference import REFERENCE
from .triton import TRITON

__all__ = [
    "BACKENDS", "NAMES", "OPS", "RULES", "Backend", "Op", "build_info", "choose", "csrc_missing", "named_for", "record",
    "run", "table",
]  # fmt: skip

BACKENDS = (CPU, TRITON, CUDA, REFERENCE)  # in the order in which auto tries them
OPS = tuple(REFERENCE.ops)  # the reference implements every op

_NOT_IMPLEMENTED = "not implemented"
_served: ContextVar[dict[str, set[str]] | None] = ContextVar("served", default=None)


@contextmanager
def record(served: dict[str, set[str]]) -> Iterator[None]:
    """Inside the ``with`` block, add the names of the backends used to ``served``, by op."""
    token = _served.set(served)
    try:
        yield
    finally:
        _served.reset(token)


def run(op: str, backend: str, /, **arguments: Any) -> None:
    """Run ``op`` with checked arguments on the backend that :func:`choose` returns."""
    chosen = choose(op, backend, arguments)
    chosen.ops[op].run(**arguments)
    served = _served.get()
    if served is not None:
        served.setdefault(op, set()).add(chosen.name)


def choose(op: str, backend: str, arguments: dict[str, Any]) -> Backend:
    """The backend that runs ``op`` with checked arguments.

    Raises:
        BackendError: ``backend`` is unknown or cannot run the call; the message says why.
    """
    if backend == "auto":
        backend = named_for(op, os.environ.get("DEPASS_BACKEND") or "auto")
    if backend == "auto":
        return next(
            b for b in BACKENDS if op in b.ops and not b.ops[op].on_request and _refuses(b, op, arguments) is None
        )
    chosen = _named(backend)
    reason = _refuses(chosen, op, arguments) if op in chosen.ops else _NOT_IMPLEMENTED
    if reason is not None:
        raise BackendError(f"backend {backend!r} cannot run this {op}: {reason}")
    return chosen


def named_for(op: str, backend: str) -> str:
    """``backend`` if it implements the op, else ``auto``: one name applies to all ops of a propagation."""
    return backend if backend == "auto" or op in _named(backend).ops else "auto"


def table() -> list[tuple[str, str, str | None]]:
    """``(op, backend, reason)`` for this machine: the reason why the backend cannot run the op here, or None."""
    return [(op, b.name, b.missing() if op in b.ops else _NOT_IMPLEMENTED) for op in OPS for b in BACKENDS]


def _named(backend: str) -> Backend:
    for candidate in BACKENDS:
        if candidate.name == backend:
            return candidate
    raise BackendError(f"unknown backend {backend!r}; choose one of: {', '.join(NAMES)}")


def _refuses(backend: Backend, op: str, arguments: dict[str, Any]) -> str | None:
    reason = backend.missing()
    return backend.ops[op].refuses(**arguments) if reason is None else reason
