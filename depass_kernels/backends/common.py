"""What a backend is, and what several backends ask of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Op:
    """One backend's implementation of one op. Both functions take the op's checked arguments by name.

    Attributes:
        run: does the work and leaves the result in the op's output.
        refuses: why this backend cannot serve a call, or None.
        on_request: ``auto`` does not choose it, because no measurement says that it is faster.
    """

    run: Callable[..., None]
    refuses: Callable[..., str | None]
    on_request: bool = False


@dataclass(frozen=True)
class Backend:
    """One implementation of some of the ops.

    Attributes:
        name: one of :data:`depass_kernels.names.NAMES`.
        missing: why it serves nothing on this machine, or None.
        ops: by name, the ops that it has.
    """

    name: str
    missing: Callable[[], str | None]
    ops: dict[str, Op]


def not_for_gpu(*tensors: Tensor | None) -> str | None:
    """Why our CUDA and Triton kernels cannot take these tensors, or None. They lie on one device."""
    given = [tensor for tensor in tensors if tensor is not None]
    if given[0].device.type != "cuda":
        return f"its tensors lie on {given[0].device}"
    if any(tensor.dtype == torch.float64 for tensor in given):
        return "it computes in fp32 and was given fp64"
    if torch.cuda.get_device_capability(given[0].device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    return None


def head_too_large(values: Tensor, kv_heads: int, largest: int) -> str | None:
    """Why a kernel whose largest head dim is ``largest`` cannot mix these values, or None."""
    head_dim = values.shape[1] // kv_heads
    return f"its largest head dim is {largest}, this one is {head_dim}" if head_dim > largest else None


def columns_apart(**matrices: Tensor | None) -> str | None:
    """Which of these matrices has columns that are not neighbours in memory, or None."""
    for name, tensor in matrices.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name}'s neighbouring columns must lie next to each other (stride 1)"
    return None
