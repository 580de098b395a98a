"""The reference implementation of the ops in plain torch, which every other backend is tested against.

It runs on any device and with any floating dtype. It computes in fp32, or in fp64 if an input is fp64; the matrix products
of ``residual_update`` and of the grouped ops are the library's own, in the dtype of their operands. The arguments are not
checked here but by the public ops in :mod:`depass_kernels.ops`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from .layout import SourceLayout

UPDATED_ROWS = 1024  # of a group's: those of the state that are read out and written back together


def normed(
    state: Tensor,  # [R', D]
    layout: SourceLayout,
    scale: Tensor | None,  # [P]
    weight: Tensor | None,  # [D]
    centred: bool,
    rows: Tensor | None,  # [R]
    out: Tensor,  # [R, D]
) -> None:
    """``out[i] = scale[t(i)] · weight ⊙ x``, ``x = state[rows[i]]``, less its mean if ``centred`` (DePass, section 3.1)."""
    dtype = _computing_dtype(state)
    x = (state if rows is None else state.index_select(0, rows)).to(dtype)
    if centred:
        x = x - x.mean(1, keepdim=True)
    if scale is not None:
        x = x * scale.to(dtype).index_select(0, layout.position_of_row(state.device))[:, None]
    out.copy_(x if weight is None else x * weight.to(dtype))


def mix_values(
    pattern: Tensor,  # [B, H, N, W]
    values: Tensor,  # [R, K·d]
    layout: SourceLayout,
    kv_heads: int,
    query_scale: Tensor | None,  # [P]
    out: Tensor,  # [R, H·d]
) -> None:
    """``out[q, m] = query_scale[q] · Σ_k pattern[q, k] · values[k, m]`` per head (DePass, section 3.2)."""
    dtype = _computing_dtype(pattern, values)
    heads = pattern.shape[1]
    head_dim = values.shape[1] // kv_heads
    positions, counts, rows = layout.position_start.tolist(), layout.counts, layout.row_start.tolist()
    for staircase, prompt in enumerate(layout.prompt.tolist()):
        begin, end = positions[staircase], positions[staircase + 1]
        count = counts[begin:end]
        empty = int((count == 0).sum())  # a block of sources has no rows before its first source starts
        n, sources = end - begin - empty, int(count.max())
        if sources == 0:
            continue
        weight = pattern[prompt, :, empty : end - begin, empty : end - begin].to(dtype)  # [H, n, n]
        if query_scale is not None:
            weight = weight * query_scale[begin + empty : end, None].to(dtype)
        weight = weight.reshape(kv_heads, -1, n)  # [K, G·n, n]: G query heads share the values of a key/value head
        active = (torch.arange(sources) < count[empty:, None]).to(values.device)  # [n, M]
        block = slice(rows[begin], rows[end])
        square = values.new_zeros(n, sources, kv_heads, head_dim, dtype=dtype)
        square[active] = values[block].view(-1, kv_heads, head_dim).to(dtype)
        mixed = weight @ square.permute(2, 0, 1, 3).reshape(kv_heads, n, -1)  # [K, G·n, M·d]
        mixed = mixed.view(heads, n, sources, head_dim).permute(1, 2, 0, 3)  # [n, M, H, d]
        out[block] = mixed[active].flatten(1).to(out.dtype)


def share_hidden(
    gate: Tensor,  # [R, F]
    hidden: Tensor,  # [P, F]
    layout: SourceLayout,
    rule: str,
    temperature: float,
    gate_total: Tensor | None,  # [P, F]
    out: Tensor,  # [R, F]
) -> None:
    """``out[t, m] = α[t, m] · hidden[t]``, with shares ``α`` by the rule (DePass, section 3.3)."""
    dtype = _computing_dtype(gate, hidden)
    rows, skipped = layout.row_start.tolist(), layout.skipped.tolist()
    for t in range(layout.positions):
        if rows[t] == rows[t + 1]:
            continue
        block = slice(rows[t], rows[t + 1])
        g = gate[block].to(dtype)  # [M, F]
        if rule == "taylor":
            assert gate_total is not None
            share = taylor(g, gate_total[t].to(dtype))
        else:
            share = torch.zeros_like(g)
            part = [m for m in range(len(g)) if m != skipped[t]] if skipped[t] >= 0 else slice(None)
            share[part] = RULES[rule](g[part], temperature)
        out[block] = (share * hidden[t].to(dtype)).to(out.dtype)


def residual_update(
    state: Tensor,  # [R, D]
    operand: Tensor,  # [n, E]
    weight: Tensor,  # [D, E]
    rows: Tensor | None,  # [n]
) -> None:
    """``state[rows] += operand · weightᵀ`` (DePass, sections 3.2 and 3.3)."""
    target = state if rows is None else state.index_select(0, rows)
    if target.dtype == operand.dtype:
        target.addmm_(operand, weight.T)
    elif operand.is_cuda and library_adds_to_fp32(operand.device):
        torch.addmm(target, operand, weight.T, out_dtype=target.dtype, out=target)
    else:
        target += matmul(operand, weight)
    if rows is not None:
        state.index_copy_(0, rows, target)


def grouped_matmul(
    operand: Tensor,  # [R', D]
    weight: Tensor,  # [E, N, D]
    ends: Tensor,  # [E]
    rows: Tensor | None,  # [R]
    out: Tensor,  # [R, N]
) -> None:
    """``out[i] = weight[g(i)] · operand[rows[i]]``, one product for each group."""
    for group, held in _groups(ends):
        read = operand[held] if rows is None else operand.index_select(0, rows[held])
        out[held] = matmul(read, weight[group].to(operand.dtype))


def grouped_update(
    state: Tensor,  # [R', D]
    operand: Tensor,  # [R, N]
    weight: Tensor,  # [E, D, N]
    ends: Tensor,  # [E]
    places: Tensor,  # [R', k]
    scale: Tensor | None,  # [D]
) -> None:
    """``state[i] += scale ⊙ Σ_j weight[g(p)] · operand[p]``, ``p = places[i, j]``; one product for each group."""
    row, rank = (places >= 0).nonzero(as_tuple=True)
    rows = row.new_empty(len(operand))  # of the state, for each row of the operand
    rows[places[row, rank]] = row
    for group, held in _groups(ends):
        own = weight[group]
        if scale is not None:
            own = own.to(_computing_dtype(state)) * scale.to(_computing_dtype(state))[:, None]
        own = own.to(operand.dtype)
        for begin in range(held.start, held.stop, UPDATED_ROWS):
            run = slice(begin, min(begin + UPDATED_ROWS, held.stop))
            residual_update(state, operand[run], own, rows[run])


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have rows, each with its rows."""
    each = [0, *ends.tolist()]
    for group, (begin, end) in enumerate(pairwise(each)):
        if begin < end:
            yield group, slice(begin, end)


def matmul(operand: Tensor, weight: Tensor) -> Tensor:
    """``operand · weightᵀ``; in fp32 where the library can return the fp32 sums of a half-precision product (CUDA)."""
    if operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(operand, weight.T, out_dtype=torch.float32)
    return operand @ weight.T


@cache
def library_adds_to_fp32(device: torch.device) -> bool:
    """Whether this torch can add the product of bf16 matrices to an fp32 matrix (not every version from 2.10 on can)."""
    total = torch.ones(16, 16, device=device, dtype=torch.float32)
    operand = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    try:
        torch.addmm(total, operand, operand, out_dtype=torch.float32, out=total)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def softmax(g: Tensor, temperature: float) -> Tensor:
    """The paper's rule, ``softmax_m(g / τ)``. It maps ``[M, F]`` to ``[M, F]``, as every rule below."""
    return torch.softmax(g / temperature, dim=0)


def largest(g: Tensor, _: float) -> Tensor:
    """1 for the source with the largest ``g``, the first of equal ones; 0 for the others."""
    # argmax may return any of equal entries, so take the smallest index of a maximum; NaN stays NaN
    top = g.amax(dim=0)
    index = torch.arange(len(g), device=g.device)[:, None].expand_as(g)
    first = torch.where(g == top, index, len(g)).amin(dim=0)
    return torch.where(top.isnan(), top, (index == first).to(g.dtype))


def relu(g: Tensor, _: float) -> Tensor:
    """Shares in proportion to ``max(g, 0)``; equal shares if no source is positive."""
    return _in_proportion(g.clamp(min=0))


def linear(g: Tensor, _: float) -> Tensor:
    """Shares in proportion to ``g - min_m g``; equal shares if all are equal."""
    return _in_proportion(g - g.amin(dim=0))


RULES = {"softmax": softmax, "max": largest, "relu": relu, "linear": linear}


def taylor(g: Tensor, total: Tensor) -> Tensor:
    """``g / g_tot`` with the model's own ``g_tot``, or 0 where that is 0; it is linear in the state."""
    return torch.where(total == 0, 0, g / torch.where(total == 0, 1, total))


def _in_proportion(weight: Tensor) -> Tensor:
    top = weight.amax(dim=0)
    # dividing by the largest first keeps a sum of large or tiny weights finite and nonzero
    scaled = weight / torch.where(top == 0, 1, top)
    total = scaled.sum(dim=0)
    return torch.where(top == 0, 1 / len(weight), scaled / torch.where(top == 0, 1, total))


def _computing_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
