"""gate_share: the gates in fp64, then the definition of sharing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import LAYOUTS, poisoned, scale, sliced

from depass_kernels import BackendError, KernelError, SourceLayout, gate_share, share_hidden

OP = "gate_share"
RULES = ("softmax", "max", "relu", "linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["tokens17-bias-excluded", "dense33", "several"])
def test_shares_the_gates_of_its_product(name: str, rule: str, dtype: torch.dtype, backend: str, device: str) -> None:
    layout, columns, inner = LAYOUTS[name], 67, 45
    operand = sliced((layout.rows, inner), dtype, device, scale=0.3)
    weight = sliced((columns, inner), dtype, device, scale=0.3, seed=1)
    hidden = sliced((layout.positions, columns), dtype, device, seed=2)
    call: dict[str, Any] = {"gate_scale": scale(layout.positions, device), "rule": rule, "temperature": 0.25}
    out = poisoned(layout.rows, columns, dtype, device)
    assert gate_share(operand, weight, hidden, layout, **call, out=out, backend=backend) is out
    gate = operand.double() @ weight.double().T
    expected = share_hidden(gate, hidden.double(), layout, **call, backend="reference")
    eager = gate_share(operand, weight, hidden, layout, **call, backend="reference").double()
    # where two gates nearly tie, max may choose the other: their product is known to fp32 only
    off, eps = (eager - expected).abs(), torch.finfo(dtype).eps
    assert ((out.double() - expected).abs() <= 2 * off + 2 * eps * expected.abs() + 3e-5).all()
    if dtype == torch.float32:  # eager itself; a CPU's library rounds the gates to bf16
        assert (off <= 2 * eps * expected.abs() + 3e-5).all()


def test_more_sources_than_a_tile_are_refused_by_name(backend: str, device: str) -> None:
    layout = SourceLayout.dense(257, 1)
    call = (torch.ones(257, 16, device=device), torch.ones(8, 16, device=device), torch.ones(1, 8, device=device))
    if backend == "triton":
        with pytest.raises(BackendError, match="must fit its tile of 256, one here has 257"):
            gate_share(*call, layout, backend=backend)
    else:
        assert torch.allclose(gate_share(*call, layout, backend=backend).sum(0), torch.ones(8, device=device))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"operand": torch.zeros(9, 5)}, r"operand must be floating \[10, any\]"),
        ({"weight": torch.zeros(8, 6)}, r"weight must be \[F, 5\]"),
        ({"hidden": torch.zeros(4, 7)}, r"hidden must be floating \[4, 8\]"),
        ({"rule": "taylor"}, "unknown rule 'taylor'; there are: softmax, max, relu, linear"),
        ({"temperature": -1.0}, "positive number, got -1.0"),
        ({"out": torch.zeros(10, 7)}, r"out must be floating \[10, 8\]"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {
        "operand": torch.zeros(10, 5), "weight": torch.zeros(8, 5), "hidden": torch.zeros(4, 8),
        "layout": SourceLayout.tokens(4),
    }  # fmt: skip
    with pytest.raises(KernelError, match=says):
        gate_share(**{**arguments, **change})
