"""normed: the state's rows times the frozen scale of their position and the norm's weight, in the dtype of the next product.

A program takes one row: it gathers it, centres it for LayerNorm, scales it and writes it, each number read once. Rows wider
than ``WIDEST`` numbers are read twice where they are centred.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..layout import SourceLayout
from .launch import Launch, computing_type, power_of_two

WIDEST = 8192  # numbers of a row that stay in registers


def launch(
    state: torch.Tensor,  # [R', D]
    layout: SourceLayout,
    scale: torch.Tensor | None,  # [P]
    weight: torch.Tensor | None,  # [D]
    centred: bool,
    rows: torch.Tensor | None,  # [R]
    out: torch.Tensor,  # [R, D]
) -> Launch:
    """The launch of :func:`depass_kernels.normed` with checked arguments."""
    columns = state.shape[1]
    block = power_of_two(columns, 16, WIDEST)
    position = None if scale is None else layout.position_of_row(state.device)
    return Launch(
        _normed,
        layout.rows,
        (state, out, position, scale, weight, rows, columns, state.stride(0), out.stride(0)),
        {
            "ACC": computing_type(state), "CENTRED": centred, "BLOCK_D": block, "ONCE": block >= columns,
            "num_warps": min(8, max(1, block // 512)),
        },
    )  # fmt: skip


@triton.jit
def _normed(
    state, out, position, scale, weight, rows, columns, state_stride, out_stride,
    ACC: tl.constexpr, CENTRED: tl.constexpr, BLOCK_D: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = i
    if rows is not None:
        row = tl.load(rows + i)
    state += row * state_stride
    out += i * out_stride
    factor = tl.full((), 1, ACC)
    if scale is not None:
        factor = tl.load(scale + tl.load(position + i)).to(ACC)
    d = tl.arange(0, BLOCK_D)
    if ONCE:
        x = tl.load(state + d, mask=d < columns, other=0).to(ACC)
        if CENTRED:
            x -= tl.sum(x, 0) / columns
        _keep(out, weight, d, x * factor, columns)
    else:
        mean = tl.full((), 0, ACC)
        if CENTRED:
            for first in range(0, columns, BLOCK_D):
                mean += tl.sum(tl.load(state + first + d, mask=first + d < columns, other=0).to(ACC), 0)
            mean /= columns
        for first in range(0, columns, BLOCK_D):
            x = tl.load(state + first + d, mask=first + d < columns, other=0).to(ACC)
            _keep(out, weight, first + d, (x - mean) * factor, columns)


@triton.jit
def _keep(out, weight, d, x, columns):
    if weight is not None:
        x *= tl.load(weight + d, mask=d < columns, other=0).to(x.dtype)
    tl.store(out + d, x.to(out.dtype.element_ty), mask=d < columns)
