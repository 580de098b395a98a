"""The choice of a backend: what was built serves, what was not says why, and nothing falls back silently."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from inspect import isfunction
from typing import Any

import pytest
import torch

import depass_kernels
from depass_kernels import BackendError, KernelError, SourceLayout, backends, mix_values, names, reference, share_hidden

SHARE: dict[str, Any] = {
    "gate": torch.zeros(3, 4), "hidden": torch.zeros(2, 4), "layout": SourceLayout.tokens(2),
    "rule": "softmax", "temperature": 0.1, "gate_total": None, "out": torch.zeros(3, 4),
}  # fmt: skip
MIX: dict[str, Any] = {
    "pattern": torch.eye(2).expand(1, 2, 2, 2).contiguous(), "values": torch.ones(3, 4),
    "layout": SourceLayout.tokens(2), "kv_heads": 2, "query_scale": None, "out": torch.zeros(3, 4),
}  # fmt: skip
NORMED: dict[str, Any] = {
    "state": torch.ones(3, 4), "layout": SourceLayout.tokens(2), "scale": torch.ones(2), "weight": torch.ones(4),
    "centred": False, "rows": None, "out": torch.zeros(3, 4),
}  # fmt: skip
CALLS = {"normed": NORMED, "share_hidden": SHARE, "mix_values": MIX}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def test_this_checkout_has_its_library_built() -> None:
    """`make test` builds it; only DEPASS_TEST_WITHOUT_CSRC=1 says that it is meant to be missing."""
    missing = backends.csrc_missing()
    assert (missing is not None) == (os.environ.get("DEPASS_TEST_WITHOUT_CSRC") == "1"), missing


@pytest.mark.parametrize("op", CALLS)
def test_auto_takes_the_compiled_kernel_where_it_can_serve(op: str) -> None:
    expected = "cpu" if backends.csrc_missing() is None else "triton" if INTERPRETED else "reference"
    assert backends.choose(op, "auto", CALLS[op]).name == expected


def test_auto_takes_the_reference_where_the_kernel_cannot_serve() -> None:
    transposed = {**SHARE, "gate": torch.zeros(4, 3).T}
    assert backends.choose("share_hidden", "auto", transposed).name == "reference"


def test_the_environment_names_a_default_for_the_ops_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPASS_BACKEND", "reference")
    assert backends.choose("share_hidden", "auto", SHARE).name == "reference"
    if backends.csrc_missing() is None:
        monkeypatch.setenv("DEPASS_BACKEND", "cpu")
        update = {"state": torch.zeros(1, 1), "operand": torch.zeros(1, 1), "weight": torch.zeros(1, 1)}
        assert backends.choose("residual_update", "auto", {**update, "rows": None}).name == "reference"
    monkeypatch.setenv("DEPASS_BACKEND", "nonsense")
    with pytest.raises(BackendError, match="unknown backend 'nonsense'"):
        backends.choose("share_hidden", "auto", SHARE)


def test_a_missing_library_is_a_reason_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, *others = backends.BACKENDS
    not_built = replace(cpu, missing=lambda: "csrc was not built")
    monkeypatch.setattr(backends, "BACKENDS", (not_built, *others))
    assert backends.choose("share_hidden", "auto", SHARE).name == ("triton" if INTERPRETED else "reference")
    with pytest.raises(BackendError, match="cannot run this share_hidden: csrc was not built"):
        share_hidden(SHARE["gate"], SHARE["hidden"], SHARE["layout"], backend="cpu")
    assert ("share_hidden", "cpu", "csrc was not built") in backends.table()


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="they serve here")
@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("op", CALLS)
def test_a_gpus_backends_say_why_they_do_not_serve_here(op: str, name: str) -> None:
    with pytest.raises(BackendError, match=r"torch sees no CUDA device|csrc was (not )?built"):
        backends.choose(op, name, CALLS[op])


def test_the_table_names_every_op_and_backend() -> None:
    rows = backends.table()
    assert {op for op, _, _ in rows} == set(backends.OPS)
    assert {name for _, name, _ in rows} == {"cpu", "triton", "cuda", "reference"}
    assert ("mix_values", "reference", None) in rows
    assert ("residual_update", "cuda", "not implemented") in rows


def test_the_reference_has_every_public_op() -> None:
    public = {name for name in depass_kernels.__all__ if isfunction(getattr(depass_kernels, name))}
    assert set(backends.OPS) == public
    assert all(set(backend.ops) <= public for backend in backends.BACKENDS)


def test_the_declared_names_are_those_of_the_backends_and_of_the_rules() -> None:
    assert tuple(backend.name for backend in backends.BACKENDS) == names.NAMES[1:]
    assert (*reference.RULES, "taylor") == names.RULES


def test_a_record_tells_who_served() -> None:
    served: dict[str, set[str]] = {}
    with backends.record(served):
        share_hidden(torch.zeros(3, 4), torch.zeros(2, 4), SourceLayout.tokens(2), backend="reference")
        mix_values(MIX["pattern"], MIX["values"], MIX["layout"])
    assert served["share_hidden"] == {"reference"}
    assert served["mix_values"] == {backends.choose("mix_values", "auto", MIX).name}


@pytest.mark.parametrize("op", CALLS)
def test_torch_accepts_the_registered_op(op: str, device: str) -> None:
    """Schema, fake kernel, mutation and autograd registration, by torch's own check of custom ops."""
    name = "cuda" if device != "cpu" else "cpu"
    reason = next(reason for o, n, reason in backends.table() if (o, n) == (op, name))
    if reason is not None:
        pytest.skip(reason)
    layout = SourceLayout.from_starts([0, 0, 1], 2, excluded=1)
    offsets = layout.to(device)
    if op == "share_hidden":
        arguments: tuple[Any, ...] = (
            torch.randn(5, 8, device=device), torch.randn(2, 8, device=device), offsets.row_start, offsets.skipped,
            layout.most, 0, 0.1, None, torch.empty(5, 8, device=device),
        )  # fmt: skip
    elif op == "normed":
        position, scales = layout.position_of_row(torch.device(device)), torch.ones(2, device=device)
        arguments = (
            torch.randn(5, 8, device=device), position, scales, torch.ones(8, device=device), True, None,
            torch.empty(5, 8, device=device),
        )  # fmt: skip
    else:
        tiles = layout.mix_tiles(64, 1, torch.device(device))
        arguments = (
            torch.rand(1, 2, 2, 2, device=device).tril(), torch.randn(5, 8, device=device), offsets.row_start,
            offsets.position_start, offsets.prompt, tiles, None, 2, torch.empty(5, 8, device=device),
        )  # fmt: skip
    torch.library.opcheck(getattr(torch.ops.depass_kernels, op).default, arguments)


def test_a_layout_moved_by_the_caller_is_refused() -> None:
    moved = SourceLayout.tokens(2).to("meta")
    with pytest.raises(KernelError, match="offsets must be on the CPU, got meta; pass the original layout"):
        share_hidden(torch.zeros(3, 4), torch.zeros(2, 4), moved)
    with pytest.raises(KernelError, match="offsets must be on the CPU, got meta"):
        mix_values(torch.zeros(1, 2, 2, 2), torch.zeros(3, 4), moved)


def test_the_kernels_know_no_model() -> None:
    assert loaded("from depass_kernels import backends, ops", "transformers", "depass") == []


def test_the_names_are_declared_without_torch() -> None:
    assert loaded("from depass_kernels import names", "torch", "triton") == []


def test_triton_is_loaded_only_where_a_call_may_need_it() -> None:
    assert loaded("from depass_kernels import backends, ops", "triton") == []


def loaded(code: str, *packages: str) -> list[str]:
    """Which of these packages a fresh process has loaded after ``code``."""
    code += f"; import sys; print(*(name for name in {packages} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
