"""gate_share: the gate GEMM with the sharing in its epilogue, so that the pre-activations never leave registers.

A program takes all sources of one position and ``BLOCK_F`` neurons. The weight's tile is the left operand of the product:
there a tile has at least 64 rows on the newest tensor cores, and on the right 16 sources are enough.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..layout import SourceLayout
from .launch import INTERPRETED, TYPES, Launch, power_of_two
from .share_hidden import WIDEST, share


def launch(
    operand: torch.Tensor,  # [R, D]
    weight: torch.Tensor,  # [F, D]
    hidden: torch.Tensor,  # [P, F]
    layout: SourceLayout,
    gate_scale: torch.Tensor | None,  # [P]
    rule: str,
    temperature: float,
    out: torch.Tensor,  # [R, F]
) -> Launch:
    """How :func:`depass_kernels.gate_share` is launched for these (checked) arguments."""
    columns, inner = weight.shape
    narrow = operand.dtype != torch.float32
    sources = power_of_two(layout.most, 16, WIDEST)
    block = power_of_two(columns, 16, min(128, (16384 if narrow else 8192) // sources))
    offsets = layout.to(operand.device)
    return Launch(
        _gate_share,
        layout.positions * triton.cdiv(columns, block),
        (operand, weight, hidden, out, gate_scale, offsets.row_start, offsets.skipped, layout.positions, columns, inner,
         operand.stride(0), weight.stride(0), hidden.stride(0), out.stride(0), min(1 / temperature, 3e38)),
        {
            "RULE": rule, "DOT": tl.float32 if INTERPRETED else TYPES[operand.dtype], "SOURCES": sources,
            "FEW": max(16, sources // 4), "BLOCK_F": block,
            "BLOCK_D": power_of_two(inner, 16, 64 if narrow else 16), "num_warps": 8 if sources > 64 else 4,
            "num_stages": 3 if narrow else 2,
        },
    )  # fmt: skip


@triton.jit
def _gate_share(
    operand, weight, hidden, out, gate_scale, row_start, skipped, positions, columns, inner,
    operand_stride, weight_stride, hidden_stride, out_stride, per_temperature: tl.float64,
    RULE: tl.constexpr, DOT: tl.constexpr, SOURCES: tl.constexpr, FEW: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    per_temperature = tl.full((), per_temperature, tl.float32)
    t = (tl.program_id(0) % positions).to(tl.int64)  # neighbours read the same tile of the weight
    f = tl.program_id(0) // positions * BLOCK_F + tl.arange(0, BLOCK_F)
    begin = tl.load(row_start + t)
    count = (tl.load(row_start + t + 1) - begin).to(tl.int32)
    skip = tl.load(skipped + t).to(tl.int32)
    h = tl.load(hidden + t * hidden_stride + f, mask=f < columns, other=0).to(tl.float32)
    scale = tl.full((), 1, tl.float32)
    if gate_scale is not None:
        scale = tl.load(gate_scale + t).to(tl.float32)
    operand += begin * operand_stride
    out += begin * out_stride
    if count > 0:
        if count <= FEW:
            _gate_share_tile(operand, weight, out, f, h, scale, count, skip, columns, inner, operand_stride,
                             weight_stride, out_stride, per_temperature, RULE, DOT, FEW, BLOCK_F, BLOCK_D)  # fmt: skip
        else:
            _gate_share_tile(operand, weight, out, f, h, scale, count, skip, columns, inner, operand_stride,
                             weight_stride, out_stride, per_temperature, RULE, DOT, SOURCES, BLOCK_F, BLOCK_D)  # fmt: skip


@triton.jit
def _gate_share_tile(
    operand, weight, out, f, h, scale, count, skip, columns, inner, operand_stride, weight_stride, out_stride,
    per_temperature, RULE: tl.constexpr, DOT: tl.constexpr, SOURCES: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, SOURCES)
    d = tl.arange(0, BLOCK_D)
    left = weight + f.to(tl.int64)[:, None] * weight_stride + d[None, :]
    right = operand + m.to(tl.int64)[None, :] * operand_stride + d[:, None]
    gate = tl.zeros((BLOCK_F, SOURCES), tl.float32)
    for first in range(0, inner, BLOCK_D):
        inside = first + d < inner
        a = tl.load(left + first, mask=(f < columns)[:, None] & inside[None, :], other=0).to(DOT)
        b = tl.load(right + first, mask=(m < count)[None, :] & inside[:, None], other=0).to(DOT)
        gate = tl.dot(a, b, gate, input_precision="tf32x3")
    part = ((m < count) & (m != skip))[:, None]
    shared = share(tl.trans(gate) * scale, part, m, h, per_temperature, RULE)
    inside = (m < count)[:, None] & (f < columns)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * out_stride + f[None, :], shared.to(out.dtype.element_ty), mask=inside)
