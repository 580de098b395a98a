"""grouped_update: the products of groups of rows, added to the state's rows without atomic additions.

The products of some columns are written in fp32, as :mod:`.grouped_matmul` computes them. Then a second kernel adds each
row's places to the state in the order of the places. The columns are as many as the operand has, so the products take no
more memory than fp32 pre-activations of the same neurons.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .grouped_matmul import launch_of_tiles, tall, tiles
from .launch import Launch, power_of_two

COLUMNS = 128  # columns are taken together in multiples of it


def launches(
    state: torch.Tensor,  # [R', D]
    operand: torch.Tensor,  # [R, N]
    weight: torch.Tensor,  # [E, D, N]
    ends: torch.Tensor,  # [E]
    places: torch.Tensor,  # [R', k]
    scale: torch.Tensor | None,  # [D]
) -> Iterator[Launch]:
    """The launches of :func:`depass_kernels.grouped_update` with checked arguments, each to run before the next one."""
    block_r, inner = tall(ends), operand.shape[1]
    tile = tiles(ends, block_r).to(operand.device)
    columns = max(COLUMNS, inner // COLUMNS * COLUMNS)
    parts = state.new_empty(len(operand), min(columns, state.shape[1]))
    for first in range(0, state.shape[1], columns):
        d = slice(first, first + columns)
        some = state[:, d]
        products = parts[:, : some.shape[1]]
        yield launch_of_tiles(operand, weight[:, d], tile, block_r, None, products)
        yield add(some, products, places, None if scale is None else scale[d])


def add(
    state: torch.Tensor,  # [R', D]
    parts: torch.Tensor,  # [R, D]
    places: torch.Tensor,  # [R', k]
    scale: torch.Tensor | None,  # [D]
) -> Launch:
    """The launch of ``state[i] += scale ⊙ Σ_j parts[places[i, j]]``."""
    columns, block = state.shape[1], power_of_two(state.shape[1], 16, 1024)
    return Launch(
        _add,
        len(state) * triton.cdiv(columns, block),
        (state, parts, places, scale, columns, places.shape[1], state.stride(0), parts.stride(0), *places.stride()),
        {"BLOCK_D": block, "num_warps": max(1, block // 256)},
    )


@triton.jit
def _add(
    state, parts, places, scale, columns, count, state_stride, parts_stride, row_stride, place_stride,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, BLOCK_D)
    i = (tl.program_id(0) // across).to(tl.int64)
    d = tl.program_id(0) % across * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), state.dtype.element_ty)
    for j in range(count):
        place = tl.load(places + i * row_stride + j * place_stride)
        total += tl.load(parts + place * parts_stride + d, mask=d < tl.where(place < 0, 0, columns), other=0)
    if scale is not None:
        total *= tl.load(scale + d, mask=d < columns, other=0).to(total.dtype)
    target = state + i * state_stride + d
    tl.store(target, tl.load(target, mask=d < columns, other=0) + total, mask=d < columns)
