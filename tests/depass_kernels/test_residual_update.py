"""residual_update: every backend against the product in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import sliced
from torch import Tensor

from depass_kernels import BackendError, KernelError, residual_update

OP = "residual_update"
SIZES = [(1, 1, 1), (16, 32, 64), (130, 150, 70), (7, 300, 33), (200, 64, 129)]  # n, D, E


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scattered", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_adds_the_product(
    size: tuple[int, int, int], scattered: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    n, width, inner = size
    state = sliced((2 * n + 1, width), torch.float32, device)
    rows = torch.randperm(2 * n + 1, generator=torch.Generator().manual_seed(5))[:n].to(device) if scattered else None
    state = state if scattered else state[:n]
    operand, weight = sliced((n, inner), dtype, device, seed=1), sliced((width, inner), dtype, device, seed=2)
    before, index = state.double(), torch.arange(n, device=device) if rows is None else rows
    product = operand.double() @ weight.double().T
    expected = before.clone()
    expected[index] += product
    eager = state.clone()
    residual_update(eager, operand, weight, rows=rows, backend="reference")
    assert residual_update(state, operand, weight, rows=rows, backend=backend) is state
    magnitude = torch.zeros_like(before)
    magnitude[index] = operand.double().abs() @ weight.double().abs().T + before[index].abs()
    # eager's own error, or fp32's on a sum of this many terms in another order
    tiny = magnitude * torch.finfo(torch.float32).eps * (2 + inner**0.5)
    off = (eager.double() - expected).abs()
    assert ((state.double() - expected).abs() <= 2 * off + tiny).all()
    # eager itself: a CPU's library leaves the product in the operand's dtype before it is added
    assert (off <= magnitude * torch.finfo(dtype).eps + tiny).all()
    untouched = torch.ones(len(state), dtype=torch.bool, device=device)
    untouched[index] = False
    assert torch.equal(state[untouched].double(), before[untouched])


def test_takes_a_transposed_weight(backend: str, device: str) -> None:
    state, operand = torch.zeros(20, 33, device=device), sliced((20, 40), torch.float32, device)
    weight = sliced((40, 33), torch.float32, device, seed=2).T
    residual_update(state, operand, weight, backend=backend)
    expected = operand.double() @ weight.double().T
    assert ((state.double() - expected).abs() <= 1e-4).all()


def test_nan_stays_in_its_row(backend: str, device: str) -> None:
    state, operand = torch.zeros(3, 20, device=device), torch.ones(3, 20, device=device)
    operand[1, 4] = float("nan")
    residual_update(state, operand, torch.ones(20, 20, device=device), backend=backend)
    assert state[1].isnan().all()
    assert (state[[0, 2]] == 20).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state": torch.zeros(4, 8, dtype=torch.bfloat16)}, r"state must be fp32 or fp64 \[R, D\], got bfloat16"),
        ({"operand": torch.zeros(3, 5)}, r"operand must be floating \[4, any\]"),
        ({"weight": torch.zeros(7, 5)}, r"weight must be floating \[8, 5\]"),
        ({"weight": torch.zeros(8, 5, dtype=torch.bfloat16)}, "must have the same dtype"),
        ({"rows": torch.zeros(4)}, "rows must be an int64 vector, got float32"),
        ({"weight": torch.zeros(8, 5, device="meta")}, "one device"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], says: str) -> None:
    arguments: dict[str, Tensor] = {
        "state": torch.zeros(4, 8), "operand": torch.zeros(4, 5), "weight": torch.zeros(8, 5),
    }  # fmt: skip
    with pytest.raises(KernelError, match=says):
        residual_update(**{**arguments, **change})


def test_a_backend_without_the_op_says_so() -> None:
    with pytest.raises(BackendError, match="'cpu' cannot run this residual_update: not implemented"):
        residual_update(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), backend="cpu")
