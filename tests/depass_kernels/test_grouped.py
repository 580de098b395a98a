"""grouped_matmul and grouped_update: every backend against products in fp64 that are written out row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import poisoned, sliced
from torch import Tensor

from depass_kernels import KernelError, grouped_matmul, grouped_update

OP = "grouped_matmul"
# rows of each group, inputs, outputs
SIZES = [((1,), 1, 1), ((3, 0, 14), 32, 16), ((0, 0, 130, 5), 70, 150), ((17,) * 9 + (0,), 33, 300), ((), 4, 5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ("plain", "transposed", "interleaved")


def weights(form: str, groups: int, outputs: int, inputs: int, dtype: torch.dtype, device: str) -> Tensor:
    """Weights ``[E, outputs, inputs]`` amid NaN, in the ways in which models hold them."""
    if form == "transposed":
        return sliced((groups, inputs, outputs), dtype, device, seed=2).mT
    if form == "interleaved":
        both = sliced((groups, inputs, 2 * outputs), dtype, device, seed=2)
        both[..., 1::2] = float("nan")
        return both.mT[:, ::2]
    return sliced((groups, outputs, inputs), dtype, device, seed=2)


def group_of(counts: tuple[int, ...]) -> list[int]:
    return [group for group, count in enumerate(counts) for _ in range(count)]


def ends_of(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor(counts, dtype=torch.int64).cumsum(0)


def bound(dtype: torch.dtype, inputs: int) -> float:
    """Rounding of the operands' dtype once, and of fp32 on a sum of this many terms, relative to the absolute terms."""
    return torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * (2 + inputs**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gathered", [False, True], ids=["in order", "gathered"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_each_group_has_its_own_weight(
    size: tuple[tuple[int, ...], int, int], gathered: bool, form: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    counts, inputs, outputs = size
    n = sum(counts)
    operand = sliced((n + 3 * gathered, inputs), dtype, device, seed=1)
    weight = weights(form, len(counts), outputs, inputs, dtype, device)
    index = torch.randint(n + 3, (n,), generator=torch.Generator().manual_seed(4)) if gathered else torch.arange(n)
    out = poisoned(n, outputs, torch.float32, device)
    rows = index.to(device) if gathered else None
    assert grouped_matmul(operand, weight, ends_of(counts), rows=rows, out=out, backend=backend) is out
    for i, group in enumerate(group_of(counts)):
        x, w = operand[int(index[i])].double(), weight[group].double()
        assert ((out[i].double() - w @ x).abs() <= bound(dtype, inputs) * (w.abs() @ x.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "size", [(1, 2, 1, 5, 3), (40, 5, 2, 7, 33), (9, 9, 4, 150, 300), (50, 3, 3, 300, 20)], ids=str
)
def test_every_row_gets_what_its_places_add(
    size: tuple[int, int, int, int, int], form: str, scaled: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    n, groups, k, inner, width = size
    state, (places, ends) = sliced((n, width), torch.float32, device), some_places(n, groups, k)
    count = int(ends[-1])
    operand = sliced((count, inner), dtype, device, seed=1)
    weight = weights(form, groups, width, inner, dtype, device)
    scale = sliced((width,), torch.float32, device, seed=3) if scaled else None
    expected, magnitude = state.double(), state.double().abs()
    group = torch.searchsorted(ends, torch.arange(count), right=True).tolist()
    for i in range(n):
        for p in places[i].tolist():
            if p >= 0:
                w = weight[group[p]].double() * (1 if scale is None else scale.double()[:, None])
                expected[i] += w @ operand[p].double()
                magnitude[i] += w.abs() @ operand[p].double().abs()
    arguments: Any = (operand, weight, ends, places.to(device))
    assert grouped_update(state, *arguments, scale=scale, backend=backend) is state
    # of a scaled weight, one more rounding to the operands' dtype
    assert ((state.double() - expected).abs() <= 2 * bound(dtype, inner) * magnitude).all()


def some_places(rows: int, groups: int, k: int) -> tuple[Tensor, Tensor]:
    """Places ``[rows, k]`` of rows that chose up to ``k`` of the groups in any order, and the groups' ends."""
    generator = torch.Generator().manual_seed(rows)
    chosen = torch.stack([torch.randperm(groups, generator=generator)[:k] for _ in range(rows)])
    chosen[torch.rand(chosen.shape, generator=generator) < 0.2] = groups  # none
    flat = chosen.flatten()
    order = flat.argsort(stable=True)[: int((flat < groups).sum())]
    places = torch.full_like(flat, -1)
    places[order] = torch.arange(len(order))
    return places.view(rows, k), torch.bincount(flat[order], minlength=groups).cumsum(0)


def test_the_result_has_the_operands_dtype_by_default(backend: str, device: str) -> None:
    for dtype in DTYPES:
        operand, weight = torch.ones(3, 4, dtype=dtype, device=device), torch.ones(2, 5, 4, device=device)
        out = grouped_matmul(operand, weight, torch.tensor([1, 3]), backend=backend)
        assert (out.dtype, out.tolist()) == (dtype, [[4.0] * 5] * 3)


def test_the_same_update_gives_the_same_bits(backend: str, device: str) -> None:
    places, ends = some_places(200, 6, 4)
    operand, weight = (sliced((int(ends[-1]), 40), torch.float32, device), sliced((6, 70, 40), torch.float32, device))
    states = [torch.ones(200, 70, device=device) for _ in range(3)]
    for state in states:
        grouped_update(state, operand, weight, ends, places.to(device), backend=backend)
    assert all(torch.equal(state, states[0]) for state in states)


def test_nan_stays_in_its_row_and_group(backend: str, device: str) -> None:
    operand, weight = torch.ones(4, 20, device=device), torch.ones(3, 20, 20, device=device)
    operand[1, 4] = float("nan")
    weight[2] = float("nan")
    out = grouped_matmul(operand, weight, torch.tensor([2, 3, 4]), backend=backend)
    assert out.isnan().all(1).tolist() == [False, True, False, True]
    state, places = torch.zeros(3, 20, device=device), torch.tensor([[0, 2], [1, -1], [3, -1]], device=device)
    grouped_update(state, operand, weight, torch.tensor([2, 3, 4]), places, backend=backend)
    assert state.isnan().all(1).tolist() == [False, True, True]
    assert (state[0] == 40).all()


def test_rows_beyond_two_billion_numbers(device: str) -> None:
    if device == "cpu":
        pytest.skip("needs a GPU's memory")
    columns, first = 1 << 14, (1 << 17) + 3
    state = torch.zeros(first + 2, columns, device=device)
    places = torch.full((first + 2, 1), -1, device=device)
    places[-2:, 0] = torch.arange(2, device=device)
    operand, weight = torch.ones(2, 16, device=device), torch.ones(1, columns, 16, device=device)
    grouped_update(state, operand, weight, torch.tensor([2]), places, backend="triton")
    assert bool((state[-2:] == 16).all())
    assert not bool(state[:-2].any())
    rows = torch.arange(first, first + 2, device=device)
    out = grouped_matmul(state, weight.mT, torch.tensor([2]), rows=rows, backend="triton")
    assert bool((out == 16 * columns).all())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"operand": torch.zeros(5)}, r"operand must be floating \[any, any\], got float32 \[5\]"),
        ({"weight": torch.zeros(2, 5, 6)}, r"weight must be floating \[E, any, 4\], got float32 \[2, 5, 6\]"),
        ({"weight": torch.zeros(5, 4)}, r"weight must be floating \[E, any, 4\]"),
        ({"ends": torch.tensor([1, 2, 3])}, r"ends must be int64 \[2\] on the CPU, one end for each .*; got int64 \[3\]"),
        ({"ends": torch.tensor([1.0, 3.0])}, r"ends must be int64 \[2\] on the CPU.*got float32"),
        ({"ends": torch.tensor([2, 4])}, r"ends must rise from 0 or more to the number of rows, 3; got \[2, 4\]"),
        ({"ends": torch.tensor([4, 3])}, r"ends must rise .* got \[4, 3\]"),
        ({"ends": torch.tensor([-1, 3])}, r"ends must rise .* got \[-1, 3\]"),
        ({"rows": torch.zeros(3)}, "rows must be an int64 vector, got float32"),
        ({"rows": torch.zeros(2, dtype=torch.int64)}, "to the number of rows, 2"),
        ({"out": torch.zeros(3, 4)}, r"out must be floating \[3, 5\]"),
        ({"weight": torch.zeros(2, 5, 4, device="meta")}, "one device"),
    ],
)  # fmt: skip
def test_products_that_do_not_fit_are_refused(change: dict[str, Any], says: str) -> None:
    arguments = {"operand": torch.zeros(3, 4), "weight": torch.zeros(2, 5, 4), "ends": torch.tensor([1, 3])}
    with pytest.raises(KernelError, match=says):
        grouped_matmul(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state": torch.zeros(2, 5, dtype=torch.bfloat16)}, r"state must be fp32 or fp64 \[R', D\], got bfloat16"),
        ({"weight": torch.zeros(2, 6, 4)}, r"weight must be floating \[E, 5, 4\], got float32 \[2, 6, 4\]"),
        ({"places": torch.zeros(2, 1)}, r"places must be int64 \[2, k\], got float32 \[2, 1\]"),
        ({"places": torch.zeros(3, 1, dtype=torch.int64)}, r"places must be int64 \[2, k\], got int64 \[3, 1\]"),
        ({"scale": torch.ones(4)}, r"scale must be floating \[5\], got float32 \[4\]"),
        ({"ends": torch.tensor([1, 2])}, "to the number of rows, 3"),
        ({"scale": torch.ones(5, device="meta")}, "one device"),
    ],
)
def test_updates_that_do_not_fit_are_refused(change: dict[str, Any], says: str) -> None:
    arguments = {
        "state": torch.zeros(2, 5), "operand": torch.zeros(3, 4), "weight": torch.zeros(2, 5, 4),
        "ends": torch.tensor([1, 3]), "places": torch.tensor([[0, 2], [1, -1]]),
    }  # fmt: skip
    with pytest.raises(KernelError, match=says):
        grouped_update(**{**arguments, **change})
