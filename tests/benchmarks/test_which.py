"""Which method when: every committed evaluation is in the table, but those that chose the weights of mixtures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import which
from benchmarks.report import report
from benchmarks.wording import NOTHING
from depass.evaluate.summary import results

pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib, of the extra [plots]")

TEXT = "# Title\n\n<!-- begin which-method -->\nold\n<!-- end which-method -->\n"
METHODS = {"softmax": 5.0, "half": 2.0, "random": 0.1}  # and their costs


def evaluated(name: str, model: str) -> None:
    """A run's directory, in which softmax scores lowest."""
    values = {method: [10.0 * i + shift for i in range(20)] for shift, method in enumerate(METHODS)}
    found = results("patch-top, area", "lower", values, "softmax", 0, [8] * 20, {m: [c] for m, c in METHODS.items()})
    folder = which.FOLDER / name
    folder.mkdir(parents=True)
    settings = {"model": model, "data": "known_1000.json", "seed": 0}
    content = {"task": "tokens", "settings": settings, "results": [asdict(result) for result in found]}
    (folder / "results.json").write_text(json.dumps(content))


def filled(tmp_path: Path) -> str:
    document = tmp_path / "page.md"
    document.write_text(TEXT)
    written = list(report([], [document], tmp_path / "figures"))
    assert all(path.exists() for path in written)
    return document.read_text()


def test_the_table_and_the_figure_are_made_of_the_evaluations(tmp_path: Path) -> None:
    for name, model in (("tokens", "one"), ("tokens-other", "other"), ("weights", "left out")):
        evaluated(name, model)
    text = filled(tmp_path)
    assert [text.count(f"| {model} |") for model in ("one", "other", "left out")] == [1, 1, 0]
    assert "**half**" in text  # the best of those that take up to three plain passes
    assert "(figures/which-method.png)" in text
    assert (tmp_path / "figures" / "which-method.png").stat().st_size > 0


def test_without_evaluations_the_document_says_that_nothing_was_measured(tmp_path: Path) -> None:
    assert filled(tmp_path).splitlines()[3] == NOTHING
    assert not (tmp_path / "figures").exists()
