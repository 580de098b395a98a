"""share_hidden: every backend against a slow loop in fp64, and against what the definition promises of shares."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import EXAMPLES, LARGE, LAYOUTS, cells, far_into, poisoned, sliced
from torch import Tensor

from depass_kernels import BackendError, KernelError, SourceLayout, backends, share_hidden

OP = "share_hidden"
RULES = ("softmax", "max", "relu", "linear", "taylor")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def truth(gate: Tensor, hidden: Tensor, layout: SourceLayout, rule: str, tau: float, total: Tensor) -> Tensor:
    """α ⊙ h, one number at a time."""
    out = torch.zeros(gate.shape, dtype=torch.float64)
    rows: dict[int, list[tuple[int, int]]] = {}
    for _, _, position, source, row in cells(layout):
        rows.setdefault(position, []).append((source, row))
    for position, here in rows.items():
        part = [(m, row) for m, row in here if m != int(layout.skipped[position])]
        for f in range(gate.shape[1]):
            g = {row: float(gate[row, f]) for _, row in here}
            if rule == "taylor":
                whole = float(total[position, f])
                weight = {row: value / whole if whole else 0.0 for row, value in g.items()}
                norm = 1.0
            else:
                values = [g[row] for _, row in part]
                if rule == "softmax":
                    weight = {row: math.exp((g[row] - max(values)) / tau) for _, row in part}
                elif rule == "max":
                    first = next(row for _, row in part if g[row] == max(values))
                    weight = {first: 1.0}
                elif rule == "relu":
                    weight = {row: max(g[row], 0.0) for _, row in part}
                else:
                    weight = {row: g[row] - min(values) for _, row in part}
                if sum(weight.values()) == 0:
                    weight = {row: 1.0 for _, row in part}
                norm = sum(weight.values())
            for row, w in weight.items():
                out[row, f] = w / norm * float(hidden[position, f])
    return out


def arguments(layout: SourceLayout, columns: int, dtype: torch.dtype, device: str, rule: str) -> dict[str, Any]:
    total = sliced((layout.positions, columns), dtype, device, seed=4)
    total[:, 0] = 0
    return {
        "gate": sliced((layout.rows, columns), dtype, device, scale=0.3),
        "hidden": sliced((layout.positions, columns), dtype, device, seed=2),
        "layout": layout,
        "rule": rule,
        "gate_total": total if rule == "taylor" else None,
    }


def check(call: dict[str, Any], out: Tensor) -> None:
    gate, hidden = call["gate"].cpu().double(), call["hidden"].cpu().double()
    total = hidden if call["gate_total"] is None else call["gate_total"].cpu().double()
    expected = truth(gate, hidden, call["layout"], call["rule"], 0.1, total)
    eager = share_hidden(**call, out=torch.empty_like(out), backend="reference").cpu().double()
    error = (out.cpu().double() - expected).abs()
    # twice eager's own error, a rounding of the result, and of exponents of up to some tens
    eps = torch.finfo(out.dtype).eps
    wide = 1e-12 if call["gate"].dtype == torch.float64 else 4e-6
    assert (error <= 2 * (eager - expected).abs() + (eps + wide) * expected.abs() + wide * eps).all()
    # eager itself: computed in fp32 or better from these very inputs, rounded once
    assert ((eager - expected).abs() <= (eps + wide) * expected.abs() + wide).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_agrees_with_a_loop_over_its_definition(
    name: str, rule: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    if dtype == torch.float64 and device != "cpu" and backend != "reference":
        pytest.skip("it computes in fp32")
    layout, columns = LAYOUTS[name], 67
    call = arguments(layout, columns, dtype, device, rule)
    out = poisoned(layout.rows, columns, dtype, device)
    assert share_hidden(**call, out=out, backend=backend) is out
    check(call, out)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LARGE)
def test_agrees_with_a_loop_over_its_definition_on_large_layouts(
    name: str, rule: str, backend: str, device: str
) -> None:
    call = arguments(LARGE[name], 3, torch.float32, device, rule)
    out = poisoned(LARGE[name].rows, 3, torch.bfloat16, device)
    check(call, share_hidden(**call, out=out, backend=backend))


@pytest.mark.parametrize("columns", [1, 16, 63, 128, 257, 1024])
def test_takes_any_number_of_columns(columns: int, backend: str, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = arguments(LAYOUTS["excluded-alone"], columns, dtype, device, "softmax")
        check(
            call,
            share_hidden(**call, out=poisoned(LAYOUTS["excluded-alone"].rows, columns, dtype, device), backend=backend),
        )


@pytest.mark.parametrize("rule", RULES)
def test_may_write_over_its_input(rule: str, backend: str, device: str) -> None:
    call = arguments(LAYOUTS["several"], 65, torch.float32, device, rule)
    apart = share_hidden(**call, backend=backend)
    assert torch.equal(share_hidden(**call, out=call["gate"], backend=backend), apart)


@pytest.mark.parametrize("rule", RULES[:-1])
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("tau", [1e-3, 1.0, 1e3])
def test_shares_sum_to_one(rule: str, magnitude: float, tau: float, backend: str, device: str) -> None:
    layout = LAYOUTS["tokens17-bias-excluded"]
    gate = magnitude * sliced((layout.rows, 70), torch.float32, device)
    out = share_hidden(gate, torch.ones(17, 70, device=device), layout, rule=rule, temperature=tau, backend=backend)
    assert (out >= 0).all()
    for position in range(17):
        total = out[int(layout.row_start[position]) : int(layout.row_start[position + 1])].sum(0)
        assert (total - 1).abs().max() <= 18 * 1.2e-7
        if position > 0:
            assert (out[int(layout.row_start[position]) + 1] == 0).all()  # the excluded source


@pytest.mark.parametrize("rule", RULES[:-1])
def test_minus_infinity_gets_no_share_of_a_softmax_and_nan_stays_nan(rule: str, backend: str, device: str) -> None:
    layout = SourceLayout.dense(3, 1)
    gate = torch.tensor([[0.1, 0.1, 1.0], [-math.inf, 0.3, 2.0], [0.2, math.nan, -5.0]], device=device)
    out = share_hidden(gate, torch.ones(1, 3, device=device), layout, rule=rule, backend=backend)
    assert out[:, 1].isnan().all()
    assert (out[:, 2].sum() - 1).abs() < 1e-6
    if rule != "linear":  # g - min g is infinite there
        assert out[1, 0] == 0
        assert (out[:, 0].sum() - 1).abs() < 1e-6


@pytest.mark.parametrize("rule", RULES[:-1])
@pytest.mark.parametrize("sources", [16, 32, 256, 257, 300])
def test_nan_stays_nan_also_alone_in_the_last_block(sources: int, rule: str, backend: str, device: str) -> None:
    gate = torch.zeros(sources, 2, device=device)
    gate[256:] = -math.inf  # no source of its block has a share
    gate[-1, 1] = math.nan
    layout = SourceLayout.dense(sources, 1)
    out = share_hidden(gate, torch.ones(1, 2, device=device), layout, rule=rule, backend=backend)
    assert out[:, 1].isnan().all()
    if rule != "linear" or sources <= 256:  # g - min g is infinite there
        assert not out[:, 0].isnan().any()


def test_max_gives_ties_to_the_first(backend: str, device: str) -> None:
    gate = torch.tensor([[1.0], [2.0], [2.0]], device=device)
    out = share_hidden(gate, torch.ones(1, 1, device=device), SourceLayout.dense(3, 1), rule="max", backend=backend)
    assert out[:, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("rule", ["softmax", "max", "relu"])  # linear's g - min g is infinite there
def test_minus_infinity_in_a_whole_block_of_sources_takes_nothing(rule: str, backend: str, device: str) -> None:
    gate = torch.full((300, 2), -math.inf, device=device)
    gate[[5, 290]] = 1.0
    out = share_hidden(gate, torch.ones(1, 2, device=device), SourceLayout.dense(300, 1), rule=rule, backend=backend)
    assert out[5].tolist() == ([1, 1] if rule == "max" else [0.5, 0.5])
    assert (out.sum(0) == 1).all()


@pytest.mark.parametrize("rule", RULES[:-1])
def test_two_thousand_sources_share_as_the_reference_does(rule: str, backend: str, device: str) -> None:
    layout = SourceLayout.from_starts([0] * 2000, 1)
    gate = 0.3 * sliced((2000, 5), torch.float32, device)
    out = share_hidden(gate, torch.ones(1, 5, device=device), layout, rule=rule, backend=backend)
    expected = share_hidden(
        gate.double(), torch.ones(1, 5, device=device).double(), layout, rule=rule, backend="reference"
    )
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-9)


def test_finds_rows_beyond_two_to_the_31_numbers(backend: str, device: str) -> None:
    layout, rows = far_into(SourceLayout.tokens(3), columns=1 << 16)
    near = sliced((rows, 40), torch.bfloat16, device)
    gate = torch.empty(layout.rows, 1 << 16, dtype=torch.bfloat16, device=device)[:, :40]
    gate[-rows:] = near
    hidden = torch.ones(3, 40, device=device)
    share_hidden(gate, hidden, layout, out=gate, backend=backend)
    expected = share_hidden(near, hidden, SourceLayout.tokens(3), backend=backend)
    assert torch.equal(gate[-rows:], expected)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    starts=st.lists(st.integers(0, 11), max_size=12),
    positions=st.integers(1, 12),
    columns=st.integers(1, 130),
    rule=st.sampled_from(RULES[:-1]),
    exclude=st.booleans(),
)
def test_agrees_on_random_layouts(
    starts: list[int], positions: int, columns: int, rule: str, exclude: bool, backend: str, device: str
) -> None:
    sources = sorted([0, *(start % positions for start in starts)])
    layout = SourceLayout.from_starts(sources, positions, excluded=len(sources) // 2 if exclude else None)
    call = arguments(layout, columns, torch.float32, device, rule)
    check(call, share_hidden(**call, backend=backend))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gate": torch.zeros(9, 4)}, r"gate must be floating \[10, any\]"),
        ({"hidden": torch.zeros(4, 5)}, r"hidden must be floating \[4, 4\].*float32 \[4, 5\]"),
        ({"rule": "mean"}, "unknown rule 'mean'; choose one of: softmax, max, relu, linear, taylor"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"temperature": math.nan}, "got nan"),
        ({"rule": "taylor"}, "rule='taylor' needs gate_total, and no other rule takes it"),
        ({"gate_total": torch.zeros(4, 4)}, "rule='taylor' needs gate_total, and no other rule takes it"),
        ({"out": torch.zeros(10, 3)}, r"out must be floating \[10, 4\]"),
        ({"backend": "metal"}, "unknown backend 'metal'; choose one of: auto, cpu, triton, cuda, reference"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], says: str) -> None:
    call = {"gate": torch.zeros(10, 4), "hidden": torch.zeros(4, 4), "layout": SourceLayout.tokens(4)}
    with pytest.raises(KernelError, match=says):
        share_hidden(**{**call, **change})


def test_a_forced_backend_says_why_it_cannot_serve() -> None:
    if backends.csrc_missing() is not None:
        pytest.skip(str(backends.csrc_missing()))
    gate = torch.zeros(4, 10).T
    with pytest.raises(BackendError, match="gate must have stride 1 in its last dimension, got stride 10"):
        share_hidden(gate, torch.zeros(4, 4), SourceLayout.tokens(4), backend="cpu")
