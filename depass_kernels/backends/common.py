"""The declaration of a backend, and checks that several backends share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Op:
    """One backend's implementation of one op; both functions take the op's checked arguments by name.

    Attributes:
        run: runs the op and writes the result to the op's output.
        refuses: returns the reason why this backend cannot run a call, or None.
        on_request: whether ``auto`` skips it, because no measurement shows that it is faster.
    """

    run: Callable[..., None]
    refuses: Callable[..., str | None]
    on_request: bool = False


@dataclass(frozen=True)
class Backend:
    """One implementation of some or all of the ops.

    Attributes:
        name: one of :data:`depass_kernels.names.NAMES`.
        missing: returns the reason why the backend cannot run on this machine, or None.
        ops: the ops that it implements, by name.
    """

    name: str
    missing: Callable[[], str | None]
    ops: dict[str, Op]


def not_for_gpu(*tensors: Tensor | None) -> str | None:
    """The reason why our CUDA and Triton kernels cannot take these tensors, which are on one device, or None."""
    given = [tensor for tensor in tensors if tensor is not None]
    if given[0].device.type != "cuda":
        return f"it needs tensors on a CUDA device, got {given[0].device}"
    if any(tensor.dtype == torch.float64 for tensor in given):
        return "it computes in fp32, got fp64 tensors"
    if torch.cuda.get_device_capability(given[0].device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    return None


def head_too_large(values: Tensor, kv_heads: int, largest: int) -> str | None:
    """The reason why a kernel for head dimensions up to ``largest`` cannot mix these values, or None."""
    head_dim = values.shape[1] // kv_heads
    return f"it supports head dimensions up to {largest}, got {head_dim}" if head_dim > largest else None


def columns_apart(**matrices: Tensor | None) -> str | None:
    """The reason why a kernel cannot take these matrices: neighbouring columns are apart in memory. Or None."""
    for name, tensor in matrices.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} must have stride 1 in its last dimension, got stride {tensor.stride(-1)}"
    return None
