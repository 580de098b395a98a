"""`depass evaluate all`: every protocol in one command, resumable, and the page that it ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from depass import DePass, OptionError, cli
from depass.evaluate import SuiteOptions, run_all, suite, summary
from depass.evaluate.suite import Protocol, protocols
from depass.evaluate.task import Item, Task, TaskOptions
from tests.support import models


@pytest.fixture(scope="module")
def dp() -> DePass:
    return DePass(models.make("llama"))


class Lengths(Task[TaskOptions]):
    """A protocol that takes no time: two methods whose values are known."""

    name, help = "lengths", "how long prompts are"
    Options = TaskOptions

    def items(self, options: TaskOptions) -> list[Item]:
        return [Item(str(i)) for i in range(4)]

    def measure(self, dp: DePass, prepared: Any, items: Any, options: TaskOptions) -> Any:
        for item in items:
            yield {"id": item.id, "status": "ok" if options.data == "good" else "skipped", "reason": "it is not good"}

    def report(self, rows: Any, options: TaskOptions, folder: Path) -> str:
        return f"{len(rows)} prompts"

    def results(self, rows: Any, options: TaskOptions) -> Any:
        values = {"softmax": [3.0] * len(rows), "leave_one_out": [1.0] * len(rows)}
        costs = {"softmax": [2.0], "leave_one_out": [9.0]}
        return summary.results("patch-top, area", "lower", values, "softmax", 0, [7] * len(rows), costs)


def fake(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Lengths()
    runs = tuple(Protocol(name, task, TaskOptions(data=data), 0.5) for name in ("one", "two"))
    monkeypatch.setattr(suite, "protocols", lambda options: runs)


def test_the_page_names_a_method_for_every_experiment(
    dp: DePass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("good", monkeypatch)
    page = run_all(dp, SuiteOptions(), tmp_path / "out")
    text = page.read_text()
    assert page == tmp_path / "out" / "which-method.md"
    assert text.count("| **softmax** 3.000 at 2.0× |") == 2  # in two experiments, up to 3 passes
    assert text.count("| **leave_one_out** 1.000 at 9.0×; adds up: **softmax** 3.000 at 2.0×, worse by 2.000") == 4
    assert "[one](one/report.md)" in text
    assert (page.parent / "which-method.png").read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "out" / "one" / "rows.jsonl").read_text()
    assert run_all(dp, SuiteOptions(), tmp_path / "out").read_text() == text
    assert (tmp_path / "out" / "one" / "rows.jsonl").read_text() == rows  # nothing is measured a second time


def test_a_suite_that_measured_nothing_says_so(dp: DePass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("bad", monkeypatch)
    assert "No prompt was measured" in run_all(dp, SuiteOptions(), tmp_path / "out").read_text()


@pytest.mark.parametrize("quick", [False, True])
def test_the_shares_of_a_quick_run_add_up(quick: bool) -> None:
    found = protocols(SuiteOptions(quick=quick, facts="a.json", ioi="b.json", seed=5))
    assert sum(protocol.share for protocol in found) == pytest.approx(1)
    assert len({protocol.name for protocol in found}) == len(found)
    assert {protocol.options.seed for protocol in found} == {5}
    assert {"a.json", "b.json"} <= {protocol.options.data for protocol in found}


def test_the_command_passes_its_options_on(dp: DePass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def run(dp: DePass, options: SuiteOptions, folder: Path, quantization: str | None) -> Path:
        given.append((options, folder, quantization))
        return folder / "which-method.md"

    monkeypatch.setattr("depass.cli.evaluate.load_model", lambda _: dp)
    monkeypatch.setattr("depass.cli.evaluate.run_all", run)
    assert cli.main(["evaluate", "all", "--quick", "--seed", "4", "--out", str(tmp_path / "out")]) == 0
    assert given == [(SuiteOptions(quick=True, seed=4), tmp_path / "out", None)]


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="seed"):
        SuiteOptions(seed=-1)
