"""Layouts and tensors that the ops' tests share: inputs out of larger NaN-filled buffers, poisoned outputs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from depass_kernels import SourceLayout

# of a random test; the interpreter is slow
EXAMPLES = int(os.environ.get("DEPASS_TEST_EXAMPLES") or (8 if os.environ.get("TRITON_INTERPRET") == "1" else 60))

LAYOUTS: dict[str, SourceLayout] = {
    "tokens1": SourceLayout.tokens(1),
    "tokens2": SourceLayout.tokens(2),
    "tokens3-excluded": SourceLayout.tokens(3, excluded=0),
    "tokens17": SourceLayout.tokens(17),
    "tokens17-bias-excluded": SourceLayout.tokens(17, always=1, excluded=1),
    "dense1": SourceLayout.dense(1, 5),
    "dense2": SourceLayout.dense(2, 4),
    "dense33": SourceLayout.dense(33, 3),
    "spans": SourceLayout.from_starts([0, 0, 0, 4, 9], 12),
    "excluded-alone": SourceLayout.from_starts([0, 3], 6, excluded=0),
    "several": SourceLayout.concat(
        [SourceLayout.tokens(5, excluded=0), SourceLayout.dense(3, 5), SourceLayout.from_starts([0, 0, 2], 4)]
    ),
    "two-of-one-prompt": SourceLayout.concat([SourceLayout.tokens(6), SourceLayout.dense(4, 6)], prompt=[0, 0]),
}
LARGE: dict[str, SourceLayout] = {
    "tokens63": SourceLayout.tokens(63),
    "tokens64": SourceLayout.tokens(64),
    "tokens65-excluded": SourceLayout.tokens(65, excluded=0),
    "tokens129": SourceLayout.tokens(129),
    "dense100": SourceLayout.dense(100, 2),
    "dense257": SourceLayout.dense(257, 2),
    **{f"dense{sources}": SourceLayout.dense(sources, 2) for sources in (16, 32, 256)},  # whole tiles
    "mixed": SourceLayout.concat([SourceLayout.dense(70, 3), SourceLayout.from_starts([0] * 30 + [2, 40, 66], 70)]),
}


def sliced(shape: tuple[int, ...], dtype: torch.dtype, device: str, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Random numbers in the middle of a larger buffer of NaN: rows are strided, neighbours are poison."""
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    larger = torch.full((*(n + 2 for n in shape[:-1]), shape[-1] + 5), float("nan"), dtype=dtype)
    inner = larger[tuple([slice(1, n + 1) for n in shape[:-1]] + [slice(2, shape[-1] + 2)])]
    inner.copy_(values)
    return larger.to(device)[tuple([slice(1, n + 1) for n in shape[:-1]] + [slice(2, shape[-1] + 2)])]


def poisoned(rows: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """An output of NaN with strided rows."""
    return torch.full((rows, columns + 3), float("nan"), dtype=dtype, device=device)[:, :columns]


def scale(positions: int, device: str, seed: int = 1) -> Tensor:
    """``[P]`` fp32, between 0.5 and 1.5."""
    return (0.5 + torch.rand(positions, generator=torch.Generator().manual_seed(seed))).to(device)


def cells(layout: SourceLayout) -> Iterator[tuple[int, int, int, int, int]]:
    """``(staircase, t in it, position, source, row)`` of every row, by counting."""
    row = 0
    for staircase in range(layout.staircases):
        for position in range(int(layout.position_start[staircase]), int(layout.position_start[staircase + 1])):
            for source in range(int(layout.counts[position])):
                yield staircase, position - int(layout.position_start[staircase]), position, source, row
                row += 1


def far_into(layout: SourceLayout, columns: int) -> tuple[SourceLayout, int]:
    """The same rows at the end of a buffer of more than 2**31 numbers, of which nothing else is touched; how many."""
    first = (1 << 31) // columns + 1
    moved = SourceLayout(layout.row_start + first, layout.position_start, layout.prompt, layout.skipped)
    return moved, layout.rows
