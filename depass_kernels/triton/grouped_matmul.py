"""grouped_matmul: each group of rows times a weight of its own, in one launch.

A program takes a tile of one group's rows and of the outputs. The host lists the tiles of rows, so no program is launched
for an empty group. Programs that follow each other read the same rows and the same group's weight from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, TYPES, Launch, computing_type, power_of_two


def launch(
    operand: torch.Tensor,  # [R', D]
    weight: torch.Tensor,  # [E, N, D]
    ends: torch.Tensor,  # [E]
    rows: torch.Tensor | None,  # [R]
    out: torch.Tensor,  # [R, N]
) -> Launch:
    """The launch of :func:`depass_kernels.grouped_matmul` with checked arguments."""
    block_r = tall(ends)
    return launch_of_tiles(operand, weight, tiles(ends, block_r).to(operand.device), block_r, rows, out)


def launch_of_tiles(
    operand: torch.Tensor,  # [R', D]
    weight: torch.Tensor,  # [E, N, D]
    tile: torch.Tensor,  # [T, 3]
    block_r: int,
    rows: torch.Tensor | None,  # [R]
    out: torch.Tensor,  # [R, N]
) -> Launch:
    """The launch for a list of :func:`tiles` of ``block_r`` rows, on the device."""
    outputs, inner = weight.shape[1:]
    narrow = operand.dtype in (torch.bfloat16, torch.float16)
    block_n, accumulator = power_of_two(outputs, 16, 128), computing_type(operand)
    return Launch(
        _grouped_matmul,
        len(tile) * triton.cdiv(outputs, block_n),
        (operand, weight, out, rows, tile, outputs, inner, operand.stride(0), *weight.stride(), out.stride(0)),
        {
            "DOT": accumulator if INTERPRETED else TYPES[operand.dtype], "ACC": accumulator, "BLOCK_R": block_r,
            "BLOCK_N": block_n, "BLOCK_K": power_of_two(inner, 16, 64 if narrow else 16),
            "num_warps": 8 if block_r * block_n > 4096 else 4, "num_stages": 3 if narrow else 2,
        },
    )  # fmt: skip


def tall(ends: torch.Tensor) -> int:
    """The rows of a tile: as many as a group has on average, within bounds."""
    counts = ends.diff(prepend=ends.new_zeros(1))
    return power_of_two(triton.cdiv(int(counts.sum()), max(1, int((counts > 0).sum()))), 16, 128)


def tiles(ends: torch.Tensor, block_r: int) -> torch.Tensor:
    """``[T, 3]`` int64 on the CPU: for each tile of rows its group, its first row and the end of the group's rows."""
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    each = (ends - begins + block_r - 1) // block_r  # tiles of each group
    group = torch.arange(len(ends), device="cpu").repeat_interleave(each)
    number = torch.arange(len(group), device="cpu") - (each.cumsum(0) - each)[group]  # of the tile, in its group
    return torch.stack([group, begins[group] + number * block_r, ends[group]], 1)


@triton.jit
def _grouped_matmul(
    operand, weight, out, rows, tiles, outputs, inner, operand_stride, group_stride, weight_stride,
    weight_inner_stride, out_stride,
    DOT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(outputs, BLOCK_N)
    tile = tiles + tl.program_id(0) // across * 3
    i = tl.load(tile + 1) + tl.arange(0, BLOCK_R)
    held = i < tl.load(tile + 2)
    n = (tl.program_id(0) % across * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = i
    if rows is not None:
        row = tl.load(rows + i, mask=held, other=0)
    operand += row[:, None] * operand_stride + k[None, :]
    # the strides of a weight that the model holds transposed, or with the gate's rows between others
    weight += tl.load(tile) * group_stride + n[None, :] * weight_stride + k[:, None] * weight_inner_stride
    total = tl.zeros((BLOCK_R, BLOCK_N), ACC)
    for first in range(0, inner, BLOCK_K):
        inside = first + k < inner
        a = tl.load(operand + first, mask=held[:, None] & inside[None, :], other=0).to(DOT)
        b = tl.load(weight, mask=(n < outputs)[None, :] & inside[:, None], other=0).to(DOT)
        weight += BLOCK_K * weight_inner_stride
        total = tl.dot(a, b, total, input_precision="tf32x3", out_dtype=ACC)
    target = out + i[:, None] * out_stride + n[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=held[:, None] & (n < outputs)[None, :])
