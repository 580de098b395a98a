"""Which backend serves a call, and why the others cannot. An op never changes its backend silently: it asks here.

A backend says why it serves nothing on this machine (or None), and per op why it cannot serve a call (or None) and what
does the work. ``auto`` takes the first of :data:`BACKENDS` that can; a name forces that backend or raises with its reason.
``DEPASS_BACKEND`` names one for all calls that say ``auto`` and whose op it has. :func:`record` tells who served.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference
from .errors import BackendError
from .layout import SourceLayout

OPS = ("mix_values", "share_hidden", "residual_update", "gate_share")
RULES = (*reference.RULES, "taylor")
_LIBRARY = Path(__file__).with_name("_csrc.so")


@dataclass(frozen=True)
class Backend:
    """One implementation of some of the ops."""

    name: str
    missing: Callable[[], str | None]
    refuses: dict[str, Callable[..., str | None]]
    run: dict[str, Callable[..., None]]
    on_request: frozenset[str] = frozenset()  # ops that auto does not give it: nobody has measured that they are faster


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
    chosen.run[op](**arguments)
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
            b for b in BACKENDS if op in b.run and op not in b.on_request and _refuses(b, op, arguments) is None
        )
    chosen = _named(backend)
    reason = _refuses(chosen, op, arguments) if op in chosen.run else f"it has no {op}"
    if reason is not None:
        raise BackendError(f"backend {backend!r} cannot serve this {op}: {reason}")
    return chosen


def named_for(op: str, backend: str) -> str:
    """``backend`` where it has the op, else ``auto``: for one name that stands for a whole propagation's ops."""
    return backend if backend == "auto" or op in _named(backend).run else "auto"


def table() -> list[tuple[str, str, str | None]]:
    """``(op, backend, reason)`` for this machine: the reason it can never serve here, or None."""
    return [(op, b.name, b.missing() if op in b.run else f"it has no {op}") for op in OPS for b in BACKENDS]


def _named(backend: str) -> Backend:
    for candidate in BACKENDS:
        if candidate.name == backend:
            return candidate
    raise BackendError(f"unknown backend {backend!r}; there are: {', '.join(NAMES)}")


def _refuses(backend: Backend, op: str, arguments: dict[str, Any]) -> str | None:
    reason = backend.missing()
    return backend.refuses[op](**arguments) if reason is None else reason


# What several backends ask of a call.


def _spread(**matrices: Tensor | None) -> str | None:
    for name, tensor in matrices.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name}'s neighbouring columns must lie next to each other (stride 1)"
    return None


def _wide_scale(**scales: Tensor | None) -> str | None:
    for name, scale in scales.items():
        if scale is not None and scale.dtype != torch.float32:
            return f"{name} must be fp32, it is {str(scale.dtype).removeprefix('torch.')}"
        if scale is not None and not scale.is_contiguous():
            return f"{name} must be contiguous, its stride is {scale.stride(0)}"
    return None


Refusal = Callable[..., str | None]


def _refuses_mix(device: Refusal, fp32_scales: bool = True, largest_head: int | None = None) -> Refusal:
    def refuses(
        pattern: Tensor, values: Tensor, kv_heads: int, key_scale: Tensor | None, query_scale: Tensor | None, out: Tensor,
        **_: object,
    ) -> str | None:  # fmt: skip
        head_dim = values.shape[1] // kv_heads
        if largest_head is not None and head_dim > largest_head:
            return f"its largest head dim is {largest_head}, this one is {head_dim}"
        reason = device(pattern, values, out) or _spread(pattern=pattern, values=values, out=out)
        return reason or (_wide_scale(key_scale=key_scale, query_scale=query_scale) if fp32_scales else None)

    return refuses


def _refuses_share(device: Refusal, fp32_scales: bool = True) -> Refusal:
    def refuses(
        gate: Tensor, hidden: Tensor, gate_scale: Tensor | None, gate_total: Tensor | None, out: Tensor, **_: object
    ) -> str | None:
        reason = device(gate, hidden, gate_total, out)
        reason = reason or _spread(gate=gate, hidden=hidden, gate_total=gate_total, out=out)
        return reason or (_wide_scale(gate_scale=gate_scale) if fp32_scales else None)

    return refuses


# csrc, on the CPU and on CUDA.


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
    for op in ("mix_values", "share_hidden"):  # they write to `out` and return nothing
        torch.library.register_fake(f"depass_kernels::{op}", lambda *_: None)
    return None


def build_info() -> dict[str, Any]:
    """What csrc was built with: compilers, their versions, CUDA architectures. Empty where it was not built.

    ``cuda_missing`` says why the CUDA kernels were left out, ``cuda_failed`` whether an nvcc was found and failed.
    """
    if find_spec("depass_kernels._build_info") is None:
        return {}
    info: dict[str, Any] = import_module("depass_kernels._build_info").build_info()
    return info


def _warn_if_cuda_failed() -> None:
    """The build fell back to the CPU kernels where pip shows nothing, so the first to tell the user is the import."""
    info = build_info()
    if info.get("cuda_failed"):
        warnings.warn(
            f"depass_kernels was built without its CUDA kernels because nvcc failed: {info['cuda_missing']}. On a GPU, "
            "Triton or the reference serves instead. To see the whole error, run this in the source directory: "
            "DEPASS_BUILD_CUDA=1 pip install --force-reinstall --no-deps --no-cache-dir . "
            "To leave the CUDA kernels out without this warning, install with DEPASS_BUILD_CUDA=0.",
            RuntimeWarning,
            stacklevel=3,
        )


def _cpu_refuses(*tensors: Tensor | None) -> str | None:
    given = [tensor for tensor in tensors if tensor is not None]
    return None if given[0].device.type == "cpu" else f"its tensors lie on {given[0].device}"


@cache
def _cuda_missing() -> str | None:
    if (missing := csrc_missing()) is not None:
        return missing
    if not build_info().get("cuda_architectures"):
        return f"csrc was built without its CUDA kernels: {build_info().get('cuda_missing', 'no build_info')}"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _cuda_refuses(*tensors: Tensor | None) -> str | None:
    given = [tensor for tensor in tensors if tensor is not None]
    if given[0].device.type != "cuda":
        return f"its tensors lie on {given[0].device}"
    if any(tensor.dtype == torch.float64 for tensor in given):
        return "it computes in fp32 and was given fp64"
    if torch.cuda.get_device_capability(given[0].device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    return None


def _csrc_mix_values(
    pattern: Tensor, values: Tensor, layout: SourceLayout, kv_heads: int, key_scale: Tensor | None,
    query_scale: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    queries = 64 if values.is_cuda else layout.longest  # csrc/mix_values.h
    tiles = layout.mix_tiles(queries, 1, values.device)
    offsets = layout.to(values.device)
    torch.ops.depass_kernels.mix_values(
        pattern, values, offsets.row_start, offsets.position_start, offsets.prompt, tiles, key_scale, query_scale,
        kv_heads, out,
    )  # fmt: skip


def _csrc_share_hidden(
    gate: Tensor, hidden: Tensor, layout: SourceLayout, gate_scale: Tensor | None, rule: str, temperature: float,
    gate_total: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    offsets = layout.to(gate.device)
    torch.ops.depass_kernels.share_hidden(
        gate, hidden, offsets.row_start, offsets.skipped, gate_scale, layout.most, RULES.index(rule), temperature,
        gate_total, out,
    )  # fmt: skip


# Triton.


@cache
def _triton_missing() -> str | None:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "torch sees no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly, to test it)"
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        import_module("depass_kernels.triton.launch")
    except Exception as error:  # another version of triton may lack anything
        return f"triton does not load: {type(error).__name__}: {error}"
    return None if torch.version.hip is None else "its launch options are those of NVIDIA GPUs"


def _triton_refuses(*tensors: Tensor | None) -> str | None:
    given = [tensor for tensor in tensors if tensor is not None]
    if import_module("depass_kernels.triton.launch").INTERPRETED:
        return None
    return _cuda_refuses(*given)


def _triton_refuses_update(
    state: Tensor, operand: Tensor, weight: Tensor, cast: Tensor | None, **_: object
) -> str | None:
    if state.dtype != torch.float32:
        return f"its state is fp32, this one is {state.dtype}"
    return _triton_refuses(state, operand, weight, cast) or _spread(
        state=state, operand=operand, weight=weight, cast=cast
    )


def _triton_refuses_gate_share(
    operand: Tensor, weight: Tensor, hidden: Tensor, layout: SourceLayout, out: Tensor, **_: object
) -> str | None:
    if layout.most > 256:
        return f"all sources of a position must fit its tile of 256, one here has {layout.most}"
    if operand.dtype == torch.float64:
        return "it computes in fp32 and was given fp64"
    return _triton_refuses(operand, weight, hidden, out) or _spread(
        operand=operand, weight=weight, hidden=hidden, out=out
    )


def _triton(kernel: str, **arguments: Any) -> None:
    import_module(f"depass_kernels.triton.{kernel}").launch(**arguments).run()


def _triton_share_hidden(rule: str, temperature: float, gate_total: Tensor | None, **arguments: Any) -> None:
    if rule == "taylor":
        _triton("taylor", gate_total=gate_total, **arguments)
    else:
        _triton("share_hidden", rule=rule, temperature=temperature, **arguments)


CPU = Backend(
    "cpu",
    lambda: csrc_missing(),
    {"mix_values": _refuses_mix(_cpu_refuses), "share_hidden": _refuses_share(_cpu_refuses)},
    {"mix_values": _csrc_mix_values, "share_hidden": _csrc_share_hidden},
)
TRITON = Backend(
    "triton",
    _triton_missing,
    {
        "mix_values": _refuses_mix(_triton_refuses, fp32_scales=False, largest_head=256),
        "share_hidden": _refuses_share(_triton_refuses, fp32_scales=False),
        "residual_update": _triton_refuses_update,
        "gate_share": _triton_refuses_gate_share,
    },
    {
        "mix_values": lambda **arguments: _triton("mix_values", **arguments),
        "share_hidden": _triton_share_hidden,
        "residual_update": lambda **arguments: _triton("residual_update", **arguments),
        "gate_share": lambda **arguments: _triton("gate_share", **arguments),
    },
    on_request=frozenset({"residual_update", "gate_share"}),
)
CUDA = Backend(
    "cuda",
    _cuda_missing,
    {"mix_values": _refuses_mix(_cuda_refuses, largest_head=256), "share_hidden": _refuses_share(_cuda_refuses)},
    {"mix_values": _csrc_mix_values, "share_hidden": _csrc_share_hidden},
)
REFERENCE = Backend(
    "reference",
    lambda: None,
    {op: lambda **_: None for op in OPS},
    {op: getattr(reference, op) for op in OPS},
)
BACKENDS = (CPU, TRITON, CUDA, REFERENCE)  # in the order in which auto asks them
NAMES = ("auto", *(backend.name for backend in BACKENDS))
