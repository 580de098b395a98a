"""mix_values: the frozen pattern times every source's values, only where sources are active.

A program takes ``QUERIES`` query positions of ``SOURCES`` sources for one head. It loops over the keys from the start of
its first source to its last query. The programs follow from the layout's list of tiles, so no program is launched for
sources that have not started. Query heads that share values (GQA) read the same rows, in consecutive programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..layout import SourceLayout
from .launch import INTERPRETED, TYPES, Launch, computing_type, power_of_two

LARGEST_HEAD = 256


def launch(
    pattern: torch.Tensor,  # [B, H, N, W]
    values: torch.Tensor,  # [R, K·d]
    layout: SourceLayout,
    kv_heads: int,
    query_scale: torch.Tensor | None,  # [P]
    out: torch.Tensor,  # [R, H·d]
) -> Launch:
    """The launch of :func:`depass_kernels.mix_values` with checked arguments."""
    heads, head_dim = pattern.shape[1], values.shape[1] // kv_heads
    block_d = power_of_two(head_dim, 16, LARGEST_HEAD)
    operand = torch.promote_types(pattern.dtype, values.dtype)
    narrow = operand in (torch.bfloat16, torch.float16)
    sources = max(1, min(128 // block_d, power_of_two(layout.most, 1, 8)))
    queries = power_of_two(layout.longest, 16, 128 if narrow and block_d * sources == 128 else 64)
    tiles = layout.mix_tiles(queries, sources, values.device)
    offsets = layout.to(values.device)
    accumulator = computing_type(pattern, values)
    return Launch(
        _mix_values,
        len(tiles) * heads,
        (pattern, values, out, query_scale, tiles, offsets.row_start, offsets.position_start, offsets.prompt,
         heads, pattern.shape[3], pattern.stride(0), pattern.stride(1), pattern.stride(2), values.stride(0), out.stride(0)),
        {
            # the interpreter computes on bf16's bits as if they were integers
            "DOT": accumulator if INTERPRETED else TYPES[operand], "ACC": accumulator, "GROUP": heads // kv_heads,
            "HEAD_DIM": head_dim, "BLOCK_D": block_d, "SOURCES": sources, "QUERIES": queries,
            "KEYS": power_of_two(layout.longest, 16, 64 if narrow else 16),
            "num_warps": 8 if block_d * sources > 128 or queries > 64 or not narrow else 4, "num_stages": 3 if narrow else 2,
        },
    )  # fmt: skip


@triton.jit
def _mix_values(
    pattern, values, out, query_scale, tiles, row_start, position_start, prompt, heads, width,
    prompt_stride, head_stride, query_stride, values_stride, out_stride,
    DOT: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SOURCES: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    tile = tiles + tl.program_id(0) // heads * (3 + SOURCES)
    staircase = tl.load(tile)
    position = tl.load(position_start + staircase)
    length = (tl.load(position_start + staircase + 1) - position).to(tl.int32)
    row_start += position

    column = tl.arange(0, SOURCES * BLOCK_D)  # source by source, each padded to BLOCK_D
    m = tl.load(tile + 1) + column // BLOCK_D
    start = tl.load(tile + 3 + column // BLOCK_D)  # a source has a row at every position from its start on
    e = column % BLOCK_D
    q = tl.load(tile + 2) + tl.arange(0, QUERIES)
    pattern += tl.load(prompt + staircase) * prompt_stride + head.to(tl.int64) * head_stride
    values += head // GROUP * HEAD_DIM
    mixed = tl.zeros((QUERIES, SOURCES * BLOCK_D), ACC)
    for first in range(tl.load(tile + 3) // KEYS * KEYS, min(tl.load(tile + 2) + QUERIES, length), KEYS):
        k = first + tl.arange(0, KEYS)
        # the zeros right of the diagonal are read too: a mask of k <= q would split the runs of keys into single numbers
        seen = (k < width)[None, :] & (q < length)[:, None]
        weight = tl.load(pattern + q.to(tl.int64)[:, None] * query_stride + k[None, :], mask=seen, other=0).to(DOT)
        value_row = tl.load(row_start + k, mask=k < length, other=0)[:, None] + m[None, :]
        active = (k[:, None] >= start[None, :]) & (k < length)[:, None] & (e < HEAD_DIM)[None, :]
        value = tl.load(values + value_row * values_stride + e[None, :], mask=active, other=0).to(DOT)
        mixed = tl.dot(weight, value, mixed, input_precision="tf32x3", out_dtype=ACC)
    if query_scale is not None:
        scale = tl.load(query_scale + position + q, mask=q < length, other=0)
        mixed *= scale.to(ACC)[:, None]
    out_row = tl.load(row_start + q, mask=q < length, other=0)[:, None] + m[None, :]
    active = (q[:, None] >= start[None, :]) & (q < length)[:, None] & (e < HEAD_DIM)[None, :]
    target = out + out_row * out_stride + head * HEAD_DIM + e[None, :]
    tl.store(target, mixed.to(out.dtype.element_ty), mask=active)
