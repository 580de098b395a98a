"""The choice of a backend: what was built serves, what was not says why, and nothing falls back silently."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import depass_kernels
from depass_kernels import BackendError, SourceLayout, backends, share_hidden

CALL = {
    "gate": torch.zeros(3, 4), "hidden": torch.zeros(2, 4), "layout": SourceLayout.tokens(2), "gate_scale": None,
    "rule": "softmax", "temperature": 0.1, "gate_total": None, "out": torch.zeros(3, 4),
}  # fmt: skip


def test_this_checkout_has_its_library_built() -> None:
    """`make test` builds it; only DEPASS_TEST_WITHOUT_CSRC=1 says that it is meant to be missing."""
    missing = backends.csrc_missing()
    assert (missing is not None) == (os.environ.get("DEPASS_TEST_WITHOUT_CSRC") == "1"), missing


def test_auto_takes_the_compiled_kernel_where_it_can_serve() -> None:
    expected = "reference" if backends.csrc_missing() else "cpu"
    assert backends.choose("share_hidden", "auto", CALL).name == expected


def test_auto_takes_the_reference_where_the_kernel_cannot_serve() -> None:
    transposed = {**CALL, "gate": torch.zeros(4, 3).T}
    assert backends.choose("share_hidden", "auto", transposed).name == "reference"


def test_the_environment_names_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPASS_BACKEND", "reference")
    assert backends.choose("share_hidden", "auto", CALL).name == "reference"
    monkeypatch.setenv("DEPASS_BACKEND", "nonsense")
    with pytest.raises(BackendError, match="unknown backend 'nonsense'"):
        backends.choose("share_hidden", "auto", CALL)


def test_a_missing_library_is_a_reason_and_not_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(backends, "csrc_missing", lambda: "csrc was not built")
    assert backends.choose("share_hidden", "auto", CALL).name == "reference"
    with pytest.raises(BackendError, match="cannot serve this share_hidden: csrc was not built"):
        share_hidden(CALL["gate"], CALL["hidden"], CALL["layout"], backend="cpu")  # type: ignore[arg-type]
    assert ("share_hidden", "cpu", "csrc was not built") in backends.table()


def test_the_table_names_every_op_and_backend() -> None:
    rows = backends.table()
    assert {op for op, _, _ in rows} == {"mix_values", "share_hidden"}
    assert ("mix_values", "reference", None) in rows


def test_the_kernels_know_no_model() -> None:
    code = "import sys, depass_kernels; sys.exit('transformers' in sys.modules or 'depass' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert depass_kernels.__all__
