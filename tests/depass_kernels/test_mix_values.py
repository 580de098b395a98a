"""mix_values: every backend against a slow loop in fp64."""

from __future__ import annotations

import pytest
import torch
from layouts import LAYOUTS, cells, poisoned, scale, sliced
from torch import Tensor

from depass_kernels import BackendError, KernelError, SourceLayout, mix_values

HEADS = {"mha": (2, 2, 8), "gqa": (4, 2, 5), "one": (1, 1, 1)}  # H, K, d
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def truth(pattern: Tensor, values: Tensor, layout: SourceLayout, kv: int, key: Tensor, query: Tensor) -> Tensor:
    heads, dim = pattern.shape[1], values.shape[1] // kv
    at = {(staircase, t, source): (position, row) for staircase, t, position, source, row in cells(layout)}
    out = torch.zeros(layout.rows, heads * dim, dtype=torch.float64)
    for staircase, q, position, source, row in cells(layout):
        prompt = int(layout.prompt[staircase])
        for k in range(q + 1):
            if (staircase, k, source) not in at:
                continue
            where, value_row = at[(staircase, k, source)]
            for h in range(heads):
                weight = pattern[prompt, h, q, k].double() * key[where].double() * query[position].double()
                kv_head = h * kv // heads
                out[row, h * dim : (h + 1) * dim] += (
                    weight * values[value_row, kv_head * dim : (kv_head + 1) * dim].double()
                )
    return out


def inputs(layout: SourceLayout, heads: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    h, k, d = HEADS[heads]
    prompts, n = int(layout.prompt.max()) + 1, int(layout.position_start.diff().max())
    pattern = sliced((prompts, h, n, n), dtype, device).tril()
    return pattern, sliced((layout.rows, k * d), dtype, device, seed=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "tokens65-excluded"])
def test_agrees_with_a_loop_over_its_definition(name: str, heads: str, dtype: torch.dtype, device: str) -> None:
    layout = LAYOUTS[name]
    pattern, values = inputs(layout, heads, dtype, device)
    key, query = scale(layout.positions, device), scale(layout.positions, device, seed=3)
    kv = HEADS[heads][1]
    out = poisoned(layout.rows, HEADS[heads][0] * HEADS[heads][2], dtype, device)
    result = mix_values(pattern, values, layout, kv_heads=kv, key_scale=key, query_scale=query, out=out)
    assert result is out
    expected = truth(pattern.cpu(), values.cpu(), layout, kv, key.cpu(), query.cpu())
    # eps times the operations of one sum, and the rounding of the result
    tolerance = torch.finfo(dtype).eps * expected.abs().max() + 1e-6 * (dtype != torch.float64) + 1e-12
    assert (out.cpu().double() - expected).abs().max() <= tolerance
    alone = mix_values(pattern, values, layout, kv_heads=kv, key_scale=key, query_scale=query)
    assert torch.equal(alone, out)


def test_blocks_of_sources_mix_as_the_whole_does(device: str) -> None:
    layout = LAYOUTS["tokens65-excluded"]
    pattern, values = inputs(layout, "gqa", torch.float64, device)
    whole = mix_values(pattern, values, layout, kv_heads=2)
    for first in range(0, 65, 10):
        block, rows = layout.slice_sources(first, min(first + 10, 65))
        part = mix_values(pattern, values[rows.to(device)], block, kv_heads=2)
        assert torch.allclose(part, whole[rows.to(device)], rtol=1e-12, atol=1e-12)


def test_nan_in_gives_nan_out(device: str) -> None:
    layout = SourceLayout.tokens(4)
    pattern, values = inputs(layout, "mha", torch.float32, device)
    values = values.clone()
    values[2] = float("nan")  # source 1 at position 1
    out = mix_values(pattern, values, layout)
    assert out[2].isnan().all()
    assert out[3].isfinite().all()  # source 0 goes its own way


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"values": torch.zeros(9, 16)}, r"values must be floating \[10, any\].*float32 \[9, 16\]"),
        ({"values": torch.zeros(10, 16, dtype=torch.int64)}, "int64"),
        ({"pattern": torch.zeros(2, 4, 4)}, r"\[B, H, N, N\]"),
        ({"pattern": torch.zeros(1, 2, 3, 3)}, ">=4"),
        ({"kv_heads": 3}, "kv_heads=3"),
        ({"key_scale": torch.ones(3)}, r"key_scale must be floating \[4\]"),
        ({"out": torch.zeros(10, 15)}, r"out must be floating \[10, 16\]"),
        ({"query_scale": torch.ones(4, device="meta")}, "one device"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], says: str) -> None:
    arguments = {"pattern": torch.zeros(1, 2, 4, 4), "values": torch.zeros(10, 16), "layout": SourceLayout.tokens(4)}
    with pytest.raises(KernelError, match=says):
        mix_values(**{**arguments, **change})  # type: ignore[arg-type]


def test_a_backend_without_the_op_says_so() -> None:
    with pytest.raises(BackendError, match="'cpu' cannot serve this mix_values: it has no mix_values"):
        mix_values(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1), SourceLayout.tokens(1), backend="cpu")
