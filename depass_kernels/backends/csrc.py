"""The compiled library; torch runs its C++ or its CUDA kernel of an op, depending on the tensors' device."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..layout import SourceLayout
from ..names import RULES
from .common import columns_apart

LIBRARY = Path(__file__).parents[1] / "_csrc.so"


@cache
def csrc_missing() -> str | None:
    """None if the compiled library is loaded, else the reason why it is not."""
    if not LIBRARY.exists():
        return (
            "csrc was not built; reinstall with a C++ compiler and torch present (DEPASS_BUILD_CPU=1 shows the error)"
        )
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"csrc cannot be loaded: {error}"
    for op in ("normed", "mix_values", "share_hidden"):  # they write to `out` and return nothing
        torch.library.register_fake(f"depass_kernels::{op}", lambda *_: None)
    return None


def not_fp32(**scales: Tensor | None) -> str | None:
    """The reason why a kernel cannot take these scales: one is not a contiguous fp32 vector. Or None."""
    for name, scale in scales.items():
        if scale is not None and scale.dtype != torch.float32:
            return f"{name} must be fp32, got {str(scale.dtype).removeprefix('torch.')}"
        if scale is not None and not scale.is_contiguous():
            return f"{name} must be contiguous, got stride {scale.stride(0)}"
    return None


def cannot_norm(
    state: Tensor, scale: Tensor | None, weight: Tensor | None, rows: Tensor | None, out: Tensor
) -> str | None:
    """The reason why the kernels cannot take these arguments of ``normed``, or None."""
    if weight is not None and not weight.is_contiguous():
        return f"weight must be contiguous, got stride {weight.stride(0)}"
    if rows is not None and not rows.is_contiguous():
        return f"rows must be contiguous, got stride {rows.stride(0)}"
    return columns_apart(state=state, out=out) or not_fp32(scale=scale)


def normed(
    state: Tensor, layout: SourceLayout, scale: Tensor | None, weight: Tensor | None, centred: bool,
    rows: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """:func:`depass_kernels.normed` with checked arguments."""
    position = None if scale is None else layout.position_of_row(state.device)
    torch.ops.depass_kernels.normed(state, position, scale, weight, centred, rows, out)


def mix_values(
    pattern: Tensor, values: Tensor, layout: SourceLayout, kv_heads: int, query_scale: Tensor | None, out: Tensor
) -> None:
    """:func:`depass_kernels.mix_values` with checked arguments."""
    queries = 64 if values.is_cuda else layout.longest  # csrc/mix_values.h
    tiles = layout.mix_tiles(queries, 1, values.device)
    offsets = layout.to(values.device)
    torch.ops.depass_kernels.mix_values(
        pattern, values, offsets.row_start, offsets.position_start, offsets.prompt, tiles, query_scale, kv_heads,
        out,
    )  # fmt: skip


def share_hidden(
    gate: Tensor, hidden: Tensor, layout: SourceLayout, rule: str, temperature: float, gate_total: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """:func:`depass_kernels.share_hidden` with checked arguments."""
    offsets = layout.to(gate.device)
    torch.ops.depass_kernels.share_hidden(
        gate, hidden, offsets.row_start, offsets.skipped, layout.most, RULES.index(rule), temperature, gate_total,
        out,
    )  # fmt: skip
