"""Which backend serves a call, and why the others cannot. An op never changes its backend silently: it asks here.

A backend declares, per op, a function that says why it cannot serve a call (or None where it can) and one that does the
work. ``auto`` takes the first of :data:`BACKENDS` that can; a name forces that backend or raises with its reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import reference
from .errors import BackendError
from .layout import SourceLayout

RULES = (*reference.RULES, "taylor")
_LIBRARY = Path(__file__).with_name("_csrc.so")


@dataclass(frozen=True)
class Backend:
    """One implementation of some of the ops: for each, why it cannot serve given arguments, and the work."""

    name: str
    refuses: dict[str, Callable[..., str | None]]
    run: dict[str, Callable[..., None]]


def choose(op: str, backend: str, arguments: dict[str, Any]) -> Backend:
    """The backend that serves ``op`` with these (checked) arguments.

    Raises:
        BackendError: ``backend`` is no backend, or cannot serve the call; the message says why.
    """
    if backend == "auto":
        backend = os.environ.get("DEPASS_BACKEND", "auto")
    if backend == "auto":
        return next(b for b in BACKENDS if op in b.run and b.refuses[op](**arguments) is None)
    for candidate in BACKENDS:
        if candidate.name == backend:
            reason = candidate.refuses[op](**arguments) if op in candidate.run else f"it has no {op}"
            if reason is not None:
                raise BackendError(f"backend {backend!r} cannot serve this {op}: {reason}")
            return candidate
    raise BackendError(f"unknown backend {backend!r}; there are: auto, {', '.join(b.name for b in BACKENDS)}")


@cache
def csrc_missing() -> str | None:
    """None where the compiled library is loaded, else why it is not."""
    if not _LIBRARY.exists():
        return (
            "csrc was not built; reinstall with a C++ compiler and torch present (DEPASS_BUILD_CPU=1 shows what fails)"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"csrc does not load: {error}"
    return None


def table() -> list[tuple[str, str, str | None]]:
    """``(op, backend, reason)`` for this machine: the reason it can never serve here, or None."""
    rows = []
    for op in ("mix_values", "share_hidden"):
        for backend in BACKENDS:
            reason = None if op in backend.run else f"it has no {op}"
            if reason is None and backend.name == "cpu":
                reason = csrc_missing()
            rows.append((op, backend.name, reason))
    return rows


def _cpu_refuses_share(
    gate: torch.Tensor,
    hidden: torch.Tensor,
    gate_scale: torch.Tensor | None,
    gate_total: torch.Tensor | None,
    out: torch.Tensor,
    **_: object,
) -> str | None:
    matrices = [tensor for tensor in (gate, hidden, gate_total, out) if tensor is not None]
    if gate.device.type != "cpu":
        return f"its tensors lie on {gate.device}"
    if (missing := csrc_missing()) is not None:
        return missing
    if any(tensor.shape[1] > 1 and tensor.stride(1) != 1 for tensor in matrices):
        return "neighbouring columns of every matrix must lie next to each other (stride 1)"
    if any(tensor.dtype == torch.float16 for tensor in matrices) and not torch.ops.depass_kernels.has_half():
        return "it was built by a compiler without fp16 (GCC 12 has it)"
    if gate_scale is not None and (gate_scale.dtype != torch.float32 or not gate_scale.is_contiguous()):
        return f"gate_scale must be contiguous fp32, it is {gate_scale.dtype}"
    return None


def _cpu_share_hidden(
    gate: torch.Tensor,
    hidden: torch.Tensor,
    layout: SourceLayout,
    gate_scale: torch.Tensor | None,
    rule: str,
    temperature: float,
    gate_total: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    # contiguous() copies offsets only where a layout is a slice with strides; they are a few bytes a position
    torch.ops.depass_kernels.share_hidden(
        gate, hidden, layout.row_start.contiguous(), layout.skipped.contiguous(), gate_scale, layout.most,
        RULES.index(rule), temperature, gate_total, out,
    )  # fmt: skip


CPU = Backend("cpu", {"share_hidden": _cpu_refuses_share}, {"share_hidden": _cpu_share_hidden})
REFERENCE = Backend(
    "reference",
    {"mix_values": lambda **_: None, "share_hidden": lambda **_: None},
    {"mix_values": reference.mix_values, "share_hidden": reference.share_hidden},
)
BACKENDS = (CPU, REFERENCE)
