"""The taylor rule of share_hidden: ``g / g_tot · h``, in one pass over the gates; each source is independent."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..layout import SourceLayout
from .launch import Launch, computing_type, power_of_two


def launch(
    gate: torch.Tensor,  # [R, F]
    hidden: torch.Tensor,  # [P, F]
    layout: SourceLayout,
    gate_total: torch.Tensor,  # [P, F]
    out: torch.Tensor,  # [R, F]
) -> Launch:
    """The launch of ``share_hidden(..., rule="taylor")`` with checked arguments."""
    columns = gate.shape[1]
    block = power_of_two(columns, 16, 256)
    offsets = layout.to(gate.device)
    return Launch(
        _taylor,
        layout.positions * triton.cdiv(columns, block),
        (gate, hidden, gate_total, out, offsets.row_start, columns, gate.stride(0), hidden.stride(0),
         gate_total.stride(0), out.stride(0)),
        {"ACC": computing_type(gate, hidden), "SOURCES": power_of_two(layout.most, 1, 16), "BLOCK_F": block},
    )  # fmt: skip


@triton.jit
def _taylor(
    gate, hidden, gate_total, out, row_start, columns, gate_stride, hidden_stride, total_stride, out_stride,
    ACC: tl.constexpr, SOURCES: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(columns, BLOCK_F)
    # the last positions have the most sources: they go first
    t = tl.num_programs(0).to(tl.int64) // blocks - 1 - tl.program_id(0) // blocks
    f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    begin = tl.load(row_start + t)
    count = (tl.load(row_start + t + 1) - begin).to(tl.int32)
    h = tl.load(hidden + t * hidden_stride + f, mask=f < columns, other=0).to(ACC)
    total = tl.load(gate_total + t * total_stride + f, mask=f < columns, other=1).to(ACC)
    divisor = tl.where(total == 0, 1, total)[None, :]
    for first in range(0, count, SOURCES):
        m = first + tl.arange(0, SOURCES)
        row = (begin + m)[:, None]
        inside = (m < count)[:, None] & (f < columns)[None, :]
        x = tl.load(gate + row * gate_stride + f[None, :], mask=inside, other=0).to(ACC)
        part = tl.where(total[None, :] == 0, 0, x / divisor) * h[None, :]
        tl.store(out + row * out_stride + f[None, :], part.to(out.dtype.element_ty), mask=inside)
