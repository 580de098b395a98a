"""share_hidden: shares each neuron's output among the sources of a position.

A program takes one position and ``BLOCK_F`` neurons. If the position's sources fit one tile, they are read once, shared in
registers and written once; few sources take a half or a quarter of the tile. Otherwise a first pass over blocks of sources
computes the running maximum and the sum relative to it, as an online softmax does, and a second pass writes the shares. A
program reads every value before it overwrites it, so ``out`` may be ``gate``.

The tiles are those that were fastest on an H200. Few warps with many numbers each exchange little in reductions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..layout import SourceLayout
from .launch import Launch, computing_type, power_of_two

WIDEST = 256  # the most sources of a tile that holds all of a position's sources
BLOCK = 128  # sources of a tile where a position needs several
TILE = 4096  # fp32 numbers of a tile: for two warps, 64 per thread


def launch(
    gate: torch.Tensor,  # [R, F]
    hidden: torch.Tensor,  # [P, F]
    layout: SourceLayout,
    rule: str,
    temperature: float,
    out: torch.Tensor,  # [R, F]
) -> Launch:
    """The launch of :func:`depass_kernels.share_hidden` with checked arguments."""
    columns = gate.shape[1]
    accumulator = computing_type(gate, hidden)
    online = layout.most > WIDEST
    sources = BLOCK if online else power_of_two(layout.most, 16, WIDEST)
    tile = (TILE // 4 if sources == 16 else TILE) * 32 // accumulator.primitive_bitwidth
    block = power_of_two(columns, 16, max(32, tile // sources))
    warps = 1 if sources == 16 else 4 if online or sources * block > tile else 2
    offsets = layout.to(gate.device)
    return Launch(
        _share_hidden,
        layout.positions * triton.cdiv(columns, block),
        (gate, hidden, out, offsets.row_start, offsets.skipped, columns, gate.stride(0), hidden.stride(0),
         out.stride(0), min(1 / temperature, 3e38)),
        {
            "RULE": rule, "ACC": accumulator, "SOURCES": sources, "HALF": max(16, sources // 2),
            "QUARTER": max(16, sources // 4), "ONLINE": online, "BLOCK_F": block,
            "num_warps": warps, "maxnreg": 240,
        },
    )  # fmt: skip


@triton.jit
def _share_hidden(
    gate, hidden, out, row_start, skipped, columns, gate_stride, hidden_stride, out_stride,
    per_temperature: tl.float64, RULE: tl.constexpr, ACC: tl.constexpr, SOURCES: tl.constexpr, HALF: tl.constexpr,
    QUARTER: tl.constexpr, ONLINE: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    per_temperature = tl.full((), per_temperature, ACC)
    blocks = tl.cdiv(columns, BLOCK_F)
    # the last positions have the most sources: they go first
    t = tl.num_programs(0).to(tl.int64) // blocks - 1 - tl.program_id(0) // blocks
    f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    begin = tl.load(row_start + t)
    count = (tl.load(row_start + t + 1) - begin).to(tl.int32)
    skip = tl.load(skipped + t).to(tl.int32)
    h = tl.load(hidden + t * hidden_stride + f, mask=f < columns, other=0).to(ACC)
    gate += begin * gate_stride
    out += begin * out_stride
    if QUARTER == SOURCES:
        _share_tile(gate, out, f, h, count, skip, columns, gate_stride, out_stride, per_temperature,
                    RULE, ACC, SOURCES)  # fmt: skip
    elif count <= QUARTER:
        _share_tile(gate, out, f, h, count, skip, columns, gate_stride, out_stride, per_temperature,
                    RULE, ACC, QUARTER)  # fmt: skip
    elif QUARTER == HALF:  # 32 sources
        _share_tile(gate, out, f, h, count, skip, columns, gate_stride, out_stride, per_temperature,
                    RULE, ACC, SOURCES)  # fmt: skip
    elif count <= HALF:
        _share_tile(gate, out, f, h, count, skip, columns, gate_stride, out_stride, per_temperature,
                    RULE, ACC, HALF)  # fmt: skip
    elif count <= SOURCES:
        _share_tile(gate, out, f, h, count, skip, columns, gate_stride, out_stride, per_temperature,
                    RULE, ACC, SOURCES)  # fmt: skip
    elif ONLINE:
        _share_online(gate, out, f, h, count, skip, columns, gate_stride, out_stride, per_temperature,
                      RULE, ACC, SOURCES, BLOCK_F)  # fmt: skip


@triton.jit
def _share_tile(
    gate, out, f, h, count, skip, columns, gate_stride, out_stride, per_temperature,
    RULE: tl.constexpr, ACC: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, SOURCES)
    inside = (m < count)[:, None] & (f < columns)[None, :]
    part = ((m < count) & (m != skip))[:, None]
    x = tl.load(gate + m.to(tl.int64)[:, None] * gate_stride + f[None, :], mask=inside, other=0).to(ACC)
    high, low, total, broken = _measure(x, part, m, per_temperature, RULE, True)
    weight = _weight(x, m, high, low, total, per_temperature, RULE)
    shared = tl.where(part, weight * _per_weight(h, total, broken, RULE)[None, :], 0)
    tl.store(out + m.to(tl.int64)[:, None] * out_stride + f[None, :], shared.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _share_online(
    gate, out, f, h, count, skip, columns, gate_stride, out_stride, per_temperature,
    RULE: tl.constexpr, ACC: tl.constexpr, SOURCES: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    high = tl.full((BLOCK_F,), float("-inf"), ACC)
    low = tl.full((BLOCK_F,), float("inf"), ACC)
    total = tl.zeros((BLOCK_F,), ACC)
    broken = tl.zeros((BLOCK_F,), ACC)
    seen = tl.zeros((), ACC)  # how many have been measured
    for first in range(0, count, SOURCES):
        m = first + tl.arange(0, SOURCES)
        inside = (m < count)[:, None] & (f < columns)[None, :]
        part = ((m < count) & (m != skip))[:, None]
        x = tl.load(gate + m.to(tl.int64)[:, None] * gate_stride + f[None, :], mask=inside, other=0).to(ACC)
        high2, low2, total2, broken2 = _measure(x, part, m, per_temperature, RULE, False)
        more = tl.sum(part.to(ACC))
        high, low, total = _join(high, low, total, seen, high2, low2, total2, more, per_temperature, RULE)
        broken += broken2
        seen += more
    unit = _per_weight(h, total, broken, RULE)[None, :]
    for first in range(0, count, SOURCES):
        m = first + tl.arange(0, SOURCES)
        inside = (m < count)[:, None] & (f < columns)[None, :]
        part = ((m < count) & (m != skip))[:, None]
        x = tl.load(gate + m.to(tl.int64)[:, None] * gate_stride + f[None, :], mask=inside, other=0).to(ACC)
        shared = tl.where(part, _weight(x, m, high, low, total, per_temperature, RULE) * unit, 0)
        tl.store(out + m.to(tl.int64)[:, None] * out_stride + f[None, :], shared.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _measure(x, part, m, per_temperature, RULE: tl.constexpr, ALL: tl.constexpr):
    """The largest and smallest gate, the sum of the weights (``max``: the first maximum), and NaN if a gate is NaN.

    Each is ``[F]``. With ``ALL`` the tile has all sources of the position.
    """
    high = tl.max(tl.where(part, x, float("-inf")), 0)
    low = tl.min(tl.where(part, x, float("inf")), 0)
    if RULE == "max":
        at_top = tl.where(part & (x == high[None, :]), m[:, None].to(x.dtype), float("inf"))
        total = tl.min(at_top, 0)
    else:
        total = tl.sum(tl.where(part, _weight(x, m, high, low, low, per_temperature, RULE), 0), 0)
    # under softmax the sum is NaN by itself; but a block's sum is left out of that of all where its maximum is -inf
    needless: tl.constexpr = ALL and RULE == "softmax"
    broken = tl.zeros_like(high) if needless else tl.sum(tl.where(part & (x != x), x, 0), 0)
    return high, low, total, broken


@triton.jit
def _weight(x, m, high, low, total, per_temperature, RULE: tl.constexpr):
    """The weight of each source, ``[M, F]``, scaled so that the sum is finite and nonzero."""
    if RULE == "softmax":
        weight = tl.exp((x - high[None, :]) * per_temperature)
    elif RULE == "max":
        weight = (m[:, None].to(x.dtype) == total[None, :]).to(x.dtype)
    elif RULE == "relu":
        top = tl.where(high > 0, high, 1)[None, :]
        weight = tl.where(high[None, :] > 0, tl.where(x > 0, x, 0) / top, 1)
    else:
        span = (high - low)[None, :]
        weight = tl.where(span != 0, (x - low[None, :]) / tl.where(span != 0, span, 1), 1)
    return weight


@triton.jit
def _per_weight(h, total, broken, RULE: tl.constexpr):
    """The part of ``h`` for a weight of one."""
    return h + broken if RULE == "max" else (h + broken) / total


@triton.jit
def _join(high1, low1, total1, n1, high2, low2, total2, n2, per_temperature, RULE: tl.constexpr):
    """The values of :func:`_measure` for two blocks of ``n1`` and ``n2`` sources together."""
    high = tl.maximum(high1, high2)
    low = tl.minimum(low1, low2)
    if RULE == "softmax":
        # a block whose gates are all -inf weighs nothing beside another; its own sum is NaN
        nothing = float("-inf")
        total = tl.where(high1 == nothing, 0, total1 * tl.exp((high1 - high) * per_temperature))
        total += tl.where(high2 == nothing, 0, total2 * tl.exp((high2 - high) * per_temperature))
    elif RULE == "max":
        total = tl.where(high2 > high1, total2, tl.minimum(total1, tl.where(high2 == high1, total2, float("inf"))))
        total = tl.where(n1 == 0, total2, total)
    elif RULE == "relu":
        top = tl.where(high > 0, high, 1)
        total = total1 * (tl.where(high1 > 0, high1, 0) / top) + total2 * (tl.where(high2 > 0, high2, 0) / top)
        total = tl.where(high > 0, total, n1 + n2)
    else:
        span = tl.where(high != low, high - low, 1)
        first = tl.where(n1 == 0, 0, total1 * ((high1 - low1) / span) + n1 * ((low1 - low) / span))
        second = tl.where(n2 == 0, 0, total2 * ((high2 - low2) / span) + n2 * ((low2 - low) / span))
        total = tl.where(high != low, first + second, n1 + n2)
    return high, low, total
