"""Which backend serves a call, and why the others cannot. An op never changes its backend silently: it asks here.

A backend has a file here. It says why it serves nothing on this machine (or None), and per op what does the work and why
it cannot serve a call (or None). ``auto`` takes the first of :data:`BACKENDS` that can; a name forces that backend or
raises with its reason. ``DEPASS_BACKEND`` names one for all calls that say ``auto`` and whose op it has. :func:`record`
tells who served.
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

BACKENDS = (CPU, TRITON, CUDA, REFERENCE)  # in the order in which auto asks them
OPS = tuple(REFERENCE.ops)  # it has every one

_served: ContextVar[dict[str, set[str]] | None] = ContextVar("served", default=None)


@contextmanager
def record(served: dict[str, set[str]]) -> Iterator[None]:
    """Within it, ``served`` fills with the names of the backends that serve each op."""
    token = _served.set(served)
    try:
        yield
    finally:
        _served.reset(token)


def run(op: str, backend: str, /, **arguments: Any) -> None:
    """Do ``op`` with these (checked) arguments on the backend that :func:`choose` names."""
    chosen = choose(op, backend, arguments)
    chosen.ops[op].run(**arguments)
    served = _served.get()
    if served is not None:
        served.setdefault(op, set()).add(chosen.name)


def choose(op: str, backend: str, arguments: dict[str, Any]) -> Backend:
    """The backend that serves ``op`` with these (checked) arguments.

    Raises:
        BackendError: ``backend`` is no backend, or cannot serve the call; the message says why.
    """
    if backend == "auto":
        backend = named_for(op, os.environ.get("DEPASS_BACKEND") or "auto")
    if backend == "auto":
        return next(
            b for b in BACKENDS if op in b.ops and not b.ops[op].on_request and _refuses(b, op, arguments) is None
        )
    chosen = _named(backend)
    reason = _refuses(chosen, op, arguments) if op in chosen.ops else f"it has no {op}"
    if reason is not None:
        raise BackendError(f"backend {backend!r} cannot serve this {op}: {reason}")
    return chosen


def named_for(op: str, backend: str) -> str:
    """``backend`` where it has the op, else ``auto``: for one name that stands for a whole propagation's ops."""
    return backend if backend == "auto" or op in _named(backend).ops else "auto"


def table() -> list[tuple[str, str, str | None]]:
    """``(op, backend, reason)`` for this machine: the reason it can never serve here, or None."""
    return [(op, b.name, b.missing() if op in b.ops else f"it has no {op}") for op in OPS for b in BACKENDS]


def _named(backend: str) -> Backend:
    for candidate in BACKENDS:
        if candidate.name == backend:
            return candidate
    raise BackendError(f"unknown backend {backend!r}; there are: {', '.join(NAMES)}")


def _refuses(backend: Backend, op: str, arguments: dict[str, Any]) -> str | None:
    reason = backend.missing()
    return backend.ops[op].refuses(**arguments) if reason is None else reason
