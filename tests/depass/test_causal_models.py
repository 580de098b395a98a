"""The list of transformers' causal models in the documents: complete, and a sample of it still comes out the same."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import causal_models
import pytest
import transformers as tf
from causal_models import OUTCOMES, Row

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
VERSION, ROWS = causal_models.read(DOCUMENT.read_text(encoding="utf-8"))
same_version = pytest.mark.skipif(tf.__version__ != VERSION, reason=f"the list was made with transformers {VERSION}")


def sample() -> list[Row]:
    """Three rows of each outcome; of those that are refused, one for each of the most frequent reasons too."""
    chosen: dict[str, Row] = {}
    draw = random.Random(22)
    for outcome in OUTCOMES:
        those = [row for row in ROWS if row.outcome == outcome]
        chosen |= {row.kind: row for row in draw.sample(those, min(3, len(those)))}
    for reason in dict.fromkeys(row.reason for row in ROWS if row.outcome == "refused"):
        those = [row for row in ROWS if row.reason == reason]
        if len(those) > 3:
            chosen |= {row.kind: row for row in draw.sample(those, 1)}
    return list(chosen.values())


@same_version
def test_the_list_has_every_type_of_the_installed_transformers() -> None:
    assert sorted(row.kind for row in ROWS) == sorted(causal_models.kinds())


def test_the_list_says_its_numbers_and_nothing_in_it_is_wrong() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    counts = {outcome: sum(row.outcome == outcome for row in ROWS) for outcome in OUTCOMES}
    working = counts["declared"] + counts["inferred"]
    assert working >= 90
    said = f"{len(ROWS)} types of causal models. {working} of them work: {counts['declared']} declared and"
    assert f"transformers {VERSION} has {said} {counts['inferred']} inferred." in text
    assert counts["wrong"] == 0
    assert all(row.reason for row in ROWS if row.outcome in ("refused", "not made"))


@same_version
@pytest.mark.parametrize("row", sample(), ids=lambda row: f"{row.kind}-{row.outcome}")
def test_a_sample_comes_out_as_the_list_says(row: Row) -> None:
    assert causal_models.row(row.kind) == row


def test_a_type_that_crashes_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import json, os, sys\n"
        "for kind in sys.argv[1:]:\n"
        "    if kind == 'crashing': os.abort()\n"
        "    print(json.dumps({'kind': kind, 'outcome': 'declared', 'reason': ''}), flush=True)\n"
    )
    monkeypatch.setattr(causal_models, "COMMAND", [sys.executable, "-c", program])
    found = list(causal_models.rows(["gpt2", "crashing", "llama", "crashing"]))
    assert [row.kind for row in found] == ["gpt2", "crashing", "llama", "crashing"]
    assert [row.outcome for row in found] == ["declared", "not made", "declared", "not made"]
    assert found[1].reason == "the process ended with signal 6"
