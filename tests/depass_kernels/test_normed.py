"""normed: every backend against the norm in fp64, one row at a time."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from layouts import LARGE, LAYOUTS, cells, far_into, poisoned, scale, sliced
from torch import Tensor

from depass_kernels import KernelError, SourceLayout, normed

OP = "normed"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COLUMNS = (1, 5, 16, 33, 576)
# A program takes one row, so that many rows show nothing new where each takes the interpreter milliseconds.
EVERY = LAYOUTS if os.environ.get("TRITON_INTERPRET") == "1" else {**LAYOUTS, **LARGE}


def truth(call: dict[str, Any]) -> Tensor:
    """Each row by itself, in fp64."""
    state, layout = call["state"].cpu().double(), call["layout"]
    out = torch.zeros(layout.rows, state.shape[1], dtype=torch.float64)
    for _, _, position, _, row in cells(layout):
        x = state[row if call["rows"] is None else int(call["rows"][row])]
        if call["centred"]:
            x = x - sum(x.tolist()) / len(x)
        if call["scale"] is not None:
            x = x * float(call["scale"][position])
        out[row] = x if call["weight"] is None else x * call["weight"].cpu().double()
    return out


def inputs(
    layout: SourceLayout, columns: int, dtype: torch.dtype, device: str, some: bool = False, centred: bool = False
) -> dict[str, Any]:
    held = 2 * layout.rows + 1 if some else layout.rows
    rows = torch.randperm(held, generator=torch.Generator().manual_seed(5))[: layout.rows].to(device) if some else None
    return {
        "state": sliced((held, columns), dtype, device),
        "layout": layout,
        "scale": scale(layout.positions, device),
        "weight": sliced((1, columns), dtype, device, seed=3)[0].clone(),
        "centred": centred,
        "rows": rows,
    }


def check(call: dict[str, Any], out: Tensor) -> None:
    expected = truth(call)
    eps = torch.finfo(out.dtype).eps + (1e-6 if call["state"].dtype != torch.float64 else 1e-14)
    # the difference from a mean is exact to the size of what is subtracted
    size = expected.abs() + (call["state"].cpu().double().abs().mean() if call["centred"] else 0)
    smallest = torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps  # of subnormal numbers
    assert ((out.cpu().double() - expected).abs() <= 2 * eps * size + smallest).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_agrees_on_every_layout(name: str, dtype: torch.dtype, backend: str, device: str) -> None:
    layout = EVERY[name]
    if dtype == torch.float64 and backend in ("triton", "cuda") and device != "cpu":
        pytest.skip("the GPU kernels compute in fp32")
    for centred in (False, True):
        call = inputs(layout, 9, dtype, device, centred=centred)
        out = poisoned(layout.rows, 9, dtype, device)
        assert normed(**call, out=out, backend=backend) is out
        check(call, out)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("left_out", ["nothing", "scale", "weight", "both"])
@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
def test_gathers_scales_and_casts(
    some: bool, left_out: str, out_dtype: torch.dtype, columns: int, backend: str, device: str
) -> None:
    layout = LAYOUTS["several"]
    for centred in (False, True):
        call = inputs(layout, columns, torch.float32, device, some, centred)
        for name in ("scale", "weight"):
            if left_out in (name, "both"):
                call[name] = None
        check(call, normed(**call, out=poisoned(layout.rows, columns, out_dtype, device), backend=backend))


def test_rows_wider_than_a_program_holds(backend: str, device: str) -> None:
    for centred in (False, True):
        call = inputs(SourceLayout.tokens(2), 8192 + 40, torch.float32, device, centred=centred)
        check(call, normed(**call, backend=backend))


def test_a_plain_call_is_a_copy_of_the_state(backend: str, device: str) -> None:
    state = sliced((3, 20), torch.float32, device)
    found = normed(state, SourceLayout.tokens(2), backend=backend)
    assert torch.equal(found, state)
    assert found.data_ptr() != state.data_ptr()


def test_nan_stays_in_its_row(backend: str, device: str) -> None:
    state = torch.ones(3, 20, device=device)
    state[1, 4] = float("nan")
    found = normed(state, SourceLayout.tokens(2), centred=True, backend=backend)
    assert found[1].isnan().all()
    assert (found[[0, 2]] == 0).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state": torch.zeros(4, 8)}, r"state must be floating \[3, D\], got float32 \[4, 8\]"),
        ({"state": torch.zeros(3, 8, dtype=torch.int32)}, r"state must be floating \[3, D\], got int32"),
        ({"rows": torch.zeros(3)}, "rows must be an int64 vector, got float32"),
        ({"rows": torch.arange(4)}, "rows must have the layout's 3 numbers, got 4"),
        ({"scale": torch.zeros(3)}, r"scale must be floating \[2\], one per position"),
        ({"weight": torch.zeros(7)}, r"weight must be floating \[8\]"),
        ({"out": torch.zeros(3, 7)}, r"out must be floating \[3, 8\]"),
        ({"weight": torch.zeros(8, device="meta")}, "one device"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"state": torch.zeros(3, 8), "layout": SourceLayout.tokens(2)}
    with pytest.raises(KernelError, match=says):
        normed(**{**arguments, **change})


def test_offsets_may_exceed_32_bits(backend: str, device: str) -> None:
    if device == "cpu" and backend != "cpu":
        pytest.skip("8 GB: once, on the compiled kernel, or on a GPU")
    layout, _ = far_into(SourceLayout.tokens(1), 4096)
    assert int(layout.row_start[0]) * 4096 > 1 << 31
    rows = torch.tensor([(1 << 31) // 4096 + 1])
    state = torch.empty(int(rows[0]) + 1, 4096, dtype=torch.bfloat16, device=device)
    state[-1] = 2
    found = normed(state, SourceLayout.tokens(1), rows=rows.to(device), backend=backend)
    assert (found == 2).all()
