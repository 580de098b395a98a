"""mix_values: every backend against sums written from the definition in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import EXAMPLES, LARGE, LAYOUTS, cells, far_into, poisoned, scale, sliced
from torch import Tensor

from depass_kernels import BackendError, KernelError, SourceLayout, backends, mix_values

OP = "mix_values"
HEADS = {"mha": (2, 2, 8), "gqa": (4, 2, 5), "one": (1, 1, 1)}  # H, K, d
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def truth(pattern: Tensor, values: Tensor, layout: SourceLayout, kv: int, query: Tensor) -> tuple[Tensor, Tensor]:
    """The sums, and the sums of the products' absolute values, in fp64: one source and head at a time."""
    heads, dim = pattern.shape[1], values.shape[1] // kv
    rows: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for staircase, t, position, source, row in cells(layout):
        rows.setdefault((staircase, source), []).append((t, position, row))
    out = torch.zeros(2, layout.rows, heads * dim, dtype=torch.float64)
    for (staircase, _), here in rows.items():
        t, position, row = (torch.tensor(column) for column in zip(*here, strict=True))
        prompt = int(layout.prompt[staircase])
        for h in range(heads):
            kv_head = h * kv // heads
            weight = pattern[prompt, h].double()[t][:, t] * query.double()[position][:, None]
            value = values.double()[row, kv_head * dim : (kv_head + 1) * dim]
            out[0, row, h * dim : (h + 1) * dim] = weight @ value
            out[1, row, h * dim : (h + 1) * dim] = weight.abs() @ value.abs()
    return out[0], out[1]


def inputs(layout: SourceLayout, heads: tuple[int, int, int], dtype: torch.dtype, device: str) -> dict[str, Any]:
    h, k, d = heads
    pattern = sliced((layout.prompts, h, layout.longest, layout.longest), dtype, device)
    pattern.copy_(pattern.tril())  # in place: the strides of a slice stay
    return {
        "pattern": pattern,
        "values": sliced((layout.rows, k * d), dtype, device, seed=2),
        "layout": layout,
        "kv_heads": k,
        "query_scale": scale(layout.positions, device, seed=3),
    }


def check(call: dict[str, Any], out: Tensor) -> None:
    expected, magnitude = truth(
        call["pattern"].cpu(), call["values"].cpu(), call["layout"], call["kv_heads"],
        call["query_scale"].cpu(),
    )  # fmt: skip
    eager = mix_values(**call, out=torch.empty_like(out), backend="reference")
    dtype = call["values"].dtype
    # twice eager's error, and one rounding of each product
    wide = 1e-6 if dtype != torch.float64 else 1e-14
    tiny = (torch.finfo(dtype).eps + wide) * magnitude + torch.finfo(out.dtype).smallest_normal * torch.finfo(
        out.dtype
    ).eps
    off = (eager.cpu().double() - expected).abs()
    assert ((out.cpu().double() - expected).abs() <= 2 * off + tiny).all()
    assert (off <= tiny).all()  # eager itself


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_agrees_with_its_definition(name: str, heads: str, dtype: torch.dtype, backend: str, device: str) -> None:
    if dtype == torch.float64 and device != "cpu" and backend != "reference":
        pytest.skip("it computes in fp32")
    call = inputs(LAYOUTS[name], HEADS[heads], dtype, device)
    out = poisoned(LAYOUTS[name].rows, HEADS[heads][0] * HEADS[heads][2], dtype, device)
    assert mix_values(**call, out=out, backend=backend) is out
    check(call, out)
    assert torch.equal(mix_values(**call, backend=backend), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_agrees_with_its_definition_on_large_layouts(name: str, dtype: torch.dtype, backend: str, device: str) -> None:
    call = inputs(LARGE[name], (2, 1, 9), dtype, device)
    out = poisoned(LARGE[name].rows, 18, dtype, device)
    check(call, mix_values(**call, out=out, backend=backend))


@pytest.mark.parametrize("head_dim", [1, 16, 31, 32, 64, 80, 96, 128, 200, 256])
def test_takes_any_head_dim(head_dim: int, backend: str, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = inputs(LAYOUTS["tokens17-bias-excluded"], (2, 1, head_dim), dtype, device)
        check(call, mix_values(**call, backend=backend))


@pytest.mark.parametrize("pattern_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_takes_a_pattern_of_another_dtype_than_the_values(
    pattern_dtype: torch.dtype, backend: str, device: str
) -> None:
    call = inputs(LAYOUTS["several"], (4, 2, 16), torch.bfloat16, device)
    call["pattern"] = call["pattern"].to(pattern_dtype)
    check(call, mix_values(**call, out=poisoned(LAYOUTS["several"].rows, 64, torch.float32, device), backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*LAYOUTS, "tokens63", "tokens65-excluded", "mixed"])
def test_rows_of_a_pattern_may_be_longer_than_its_prompts(
    name: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    layout = {**LAYOUTS, **LARGE}[name]
    call = inputs(layout, (4, 2, 16), dtype, device)
    narrow = mix_values(**call, backend=backend)
    longer = -(-layout.longest // 16) * 16
    buffer = torch.full((layout.prompts, 4, layout.longest + 1, longer + 16), float("nan"), dtype=dtype, device=device)
    wide = buffer[:, :, : layout.longest, :longer]  # zeros behind the prompt, NaN behind the pattern
    wide.zero_()[..., : layout.longest] = call["pattern"]
    call["pattern"] = wide
    out = poisoned(layout.rows, 64, dtype, device)
    mix_values(**call, out=out, backend=backend)
    assert torch.equal(out, narrow)


def test_blocks_of_sources_mix_as_the_whole_does(backend: str, device: str) -> None:
    layout = LARGE["tokens65-excluded"]
    call = inputs(layout, (4, 2, 5), torch.float32, device)
    whole = mix_values(**call, backend=backend)
    for first in range(0, 65, 30):
        block, rows = layout.slice_sources(first, min(first + 30, 65))
        part = {**call, "values": call["values"][rows.to(device)], "layout": block}
        assert torch.allclose(mix_values(**part, backend=backend), whole[rows.to(device)], rtol=1e-5, atol=1e-5)


def test_a_block_without_rows_has_no_output(backend: str, device: str) -> None:
    nothing = SourceLayout.from_starts([0], 4).slice_sources(1, 2)[0]
    out = mix_values(torch.zeros(1, 2, 4, 4, device=device), torch.zeros(0, 6, device=device), nothing, backend=backend)
    assert out.shape == (0, 6)


def test_nan_in_gives_nan_out(backend: str, device: str) -> None:
    call = inputs(SourceLayout.tokens(4), HEADS["mha"], torch.float32, device)
    call["values"][2] = float("nan")  # source 1 at position 1
    out = mix_values(**call, backend=backend)
    assert out[2].isnan().all()
    assert out[3].isfinite().all()  # source 0 goes its own way


def test_finds_rows_beyond_two_to_the_31_numbers(backend: str, device: str) -> None:
    layout, rows = far_into(SourceLayout.tokens(3), columns=1 << 16)
    values = torch.empty(layout.rows, 1 << 16, dtype=torch.bfloat16, device=device)[:, : 2 * 8]
    near = inputs(SourceLayout.tokens(3), HEADS["mha"], torch.bfloat16, device)
    values[-rows:] = near["values"]
    out = torch.empty(layout.rows, 1 << 16, dtype=torch.bfloat16, device=device)[:, : 2 * 8]
    mix_values(**{**near, "values": values, "layout": layout}, out=out, backend=backend)
    assert torch.equal(out[-rows:], mix_values(**near, backend=backend))


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    starts=st.lists(st.integers(0, 11), max_size=12),
    positions=st.integers(1, 12),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 70),
)
def test_agrees_on_random_layouts(
    starts: list[int], positions: int, group: int, head_dim: int, backend: str, device: str
) -> None:
    layout = SourceLayout.from_starts(sorted([0, *(start % positions for start in starts)]), positions)
    call = inputs(layout, (2 * group, 2, head_dim), torch.float32, device)
    check(call, mix_values(**call, backend=backend))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"values": torch.zeros(9, 16)}, r"values must be floating \[10, any\].*float32 \[9, 16\]"),
        ({"values": torch.zeros(10, 16, dtype=torch.int64)}, "int64"),
        ({"pattern": torch.zeros(2, 4, 4)}, r"\[B, H, N, W\]"),
        ({"pattern": torch.zeros(1, 2, 5, 4)}, r"W >= N, got float32 \[1, 2, 5, 4\]"),
        ({"pattern": torch.zeros(1, 2, 3, 3)}, ">=4"),
        ({"kv_heads": 3}, "kv_heads=3"),
        ({"query_scale": torch.ones(3)}, r"query_scale must be floating \[4\]"),
        ({"out": torch.zeros(10, 15)}, r"out must be floating \[10, 16\]"),
        ({"query_scale": torch.ones(4, device="meta")}, "one device"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], says: str) -> None:
    arguments = {"pattern": torch.zeros(1, 2, 4, 4), "values": torch.zeros(10, 16), "layout": SourceLayout.tokens(4)}
    with pytest.raises(KernelError, match=says):
        mix_values(**{**arguments, **change})  # type: ignore[arg-type]


def test_a_forced_backend_says_why_it_cannot_serve() -> None:
    if backends.csrc_missing() is not None:
        pytest.skip(str(backends.csrc_missing()))
    values = torch.zeros(4, 1).T.expand(4, 4).T
    with pytest.raises(BackendError, match="values must have stride 1 in its last dimension"):
        mix_values(torch.zeros(1, 1, 1, 1), values[:1], SourceLayout.tokens(1), kv_heads=1, backend="cpu")
