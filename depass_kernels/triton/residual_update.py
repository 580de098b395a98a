"""residual_update: a projection's GEMM that adds its result to the state, ``state[rows] += operand · weightᵀ``.

The sums stay in registers until they are added to the fp32 state. A library GEMM needs separate passes to gather and
scatter the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, TYPES, Launch, power_of_two

GROUP = 8  # row tiles that share a column tile of the weight while it is in the cache


def launch(
    state: torch.Tensor,  # [R, D]
    operand: torch.Tensor,  # [n, E]
    weight: torch.Tensor,  # [D, E]
    rows: torch.Tensor | None,  # [n]
) -> Launch:
    """The launch of :func:`depass_kernels.residual_update` with checked arguments."""
    n, inner = operand.shape
    narrow = operand.dtype != torch.float32
    block_n, block_d = power_of_two(n, 16, 128), power_of_two(len(weight), 16, 128)
    return Launch(
        _residual_update,
        triton.cdiv(n, block_n) * triton.cdiv(len(weight), block_d),
        (state, operand, weight, rows, n, len(weight), inner, state.stride(0), operand.stride(0),
         weight.stride(0), weight.stride(1)),
        {
            "DOT": tl.float32 if INTERPRETED else TYPES[operand.dtype], "BLOCK_N": block_n, "BLOCK_D": block_d,
            "BLOCK_E": power_of_two(inner, 16, 64 if narrow else 16), "GROUP": GROUP, "num_warps": 8,
            "num_stages": 3 if narrow else 2,
        },
    )  # fmt: skip


@triton.jit
def _residual_update(
    state, operand, weight, rows, n, columns, inner, state_stride, operand_stride, weight_stride,
    weight_inner_stride,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(n, BLOCK_N), tl.cdiv(columns, BLOCK_D)
    group = tl.program_id(0) // (GROUP * column_tiles)
    tall = min(row_tiles - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * column_tiles)
    i = ((group * GROUP + within % tall) * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)
    d = (within // tall * BLOCK_D).to(tl.int64) + tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    operand += i[:, None] * operand_stride + e[None, :]
    weight += d[None, :] * weight_stride + e[:, None] * weight_inner_stride  # GPT-2 stores its weights transposed
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, inner, BLOCK_E):
        inside = first + e < inner
        a = tl.load(operand + first, mask=(i < n)[:, None] & inside[None, :], other=0).to(DOT)
        b = tl.load(weight + first * weight_inner_stride, mask=(d < columns)[None, :] & inside[:, None], other=0).to(
            DOT
        )
        total = tl.dot(a, b, total, input_precision="tf32x3")
    inside = (i < n)[:, None] & (d < columns)[None, :]
    row = i
    if rows is not None:
        row = tl.load(rows + i, mask=i < n, other=0)
    place = state + row[:, None] * state_stride + d[None, :]
    total += tl.load(place, mask=inside, other=0)
    tl.store(place, total, mask=inside)
