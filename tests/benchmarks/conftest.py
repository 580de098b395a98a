"""The benchmarks are no installed package: they lie beside the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True)
def no_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results that the report reads by itself are a test's own, and there are none yet."""
    from benchmarks import experts, linear, which
    from benchmarks.peers import report as peers

    monkeypatch.setattr(linear, "RESULTS", tmp_path)
    monkeypatch.setattr(experts, "FILE", tmp_path / "experts.json")
    monkeypatch.setattr(peers, "FILE", tmp_path / "peers.jsonl")
    monkeypatch.setattr(which, "FOLDER", tmp_path / "evaluation")
