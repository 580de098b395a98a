"""`depass evaluate all`: every protocol in one command, resumable, and the page that it ends with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from depass import DataError, DePass, MemoryLimitError, ModelError, OptionError, cli
from depass.evaluate import TASKS, SuiteOptions, methods, run, run_all, suite, summary
from depass.evaluate.needles import NeedlesOptions
from depass.evaluate.suite import Protocol, protocols
from depass.evaluate.task import Item, Task, TaskOptions
from tests.support import models, tokens


@pytest.fixture(scope="module")
def dp() -> DePass:
    return DePass(models.make("llama"))


class Lengths(Task[TaskOptions]):
    """A protocol that takes no time: two methods whose values are known."""

    name, help = "lengths", "how long prompts are"
    Options = TaskOptions

    def items(self, options: TaskOptions) -> list[Item]:
        return [Item(str(i)) for i in range(5)]

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
    assert text.count("| **softmax** 3 at 2.0× |") == 2  # in two experiments, up to 3 passes
    assert text.count("| **leave_one_out** 1 at 9.0×; adds up: **softmax** 3 at 2.0×, worse by 2") == 4
    assert "[one](one/report.md)" in text
    assert (page.parent / "which-method.png").read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "out" / "one" / "rows.jsonl").read_text()
    assert run_all(dp, SuiteOptions(), tmp_path / "out").read_text() == text
    assert (tmp_path / "out" / "one" / "rows.jsonl").read_text() == rows  # nothing is measured a second time


class Refusing(Lengths):
    """Of its methods, this model can be scored by those that are not refused."""

    Options = NeedlesOptions

    def refused(self, dp: DePass, options: Any) -> dict[str, str]:
        return {name: "it has no gate" for name in options.methods.split(",") if name in ("up", "steer")}

    def results(self, rows: Any, options: Any) -> Any:
        values = {name: [1.0] * len(rows) for name in options.methods.split(",")}
        return summary.results("patch-top, area", "lower", values, "softmax", 0, [7] * len(rows), {})


@pytest.mark.parametrize(("methods", "left"), [("softmax,up,half,steer", ["softmax", "half"]), ("up,steer", [])])
def test_methods_that_cannot_score_the_model_are_left_out_with_the_reason(
    methods: str, left: list[str], dp: DePass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [Protocol("one", Refusing(), NeedlesOptions(methods=methods), 1.0)]
    monkeypatch.setattr(suite, "protocols", lambda options: runs)
    monkeypatch.setattr(Refusing, "measure", lambda self, dp, prepared, items, options: good(items))
    text = run_all(dp, SuiteOptions(), tmp_path / "out").read_text()
    assert "- in one: up, steer: it has no gate" in text
    if left:
        results = json.loads((tmp_path / "out" / "one" / "results.json").read_text())["results"]
        assert [result["method"] for result in results] == left
    else:
        assert not (tmp_path / "out" / "one").exists()
        assert "No prompt was measured" in text


def good(items: Any) -> Any:
    for item in items:
        yield {"id": item.id, "status": "ok"}


STEERED = {"steer", "dual_path", "steered"}  # what linear attention refuses


@pytest.mark.parametrize(("family", "task", "refused"), [
    ("llama", "tokens", set()), ("llama", "needles", set()), ("llama", "circuits", set()),
    ("gemma3", "tokens", {"depass_dpa"}),
    ("qwen3_next", "tokens", STEERED | {"softmax+dual_path", "gim", "depass_dpa"}),
    ("qwen3_next", "needles", STEERED | {"gim"}), ("qwen3_next", "circuits", STEERED),
    ("nemotron_h", "circuits", STEERED),
])  # fmt: skip
def test_what_a_model_refuses_is_known_before_anything_is_measured(family: str, task: str, refused: set[str]) -> None:
    if not models.runs(family):
        pytest.skip(f"this transformers has no {family} that is supported")
    options = {"methods": "all,depass_dpa"} if task == "tokens" else {}
    found = TASKS[task].refused(DePass(models.make(family), tokens.make()), TASKS[task].Options(**options))
    assert found.keys() == refused
    assert all(found.values())


def test_a_model_without_gradients_is_scored_by_what_needs_none() -> None:
    """As with quantised weights: the linear rules and the gradient baselines are refused, the sharing rules are not."""
    with torch.inference_mode():
        dp = DePass(models.make("llama"), tokens.make())
    for task in ("tokens", "needles", "circuits"):
        options = TASKS[task].Options()
        refused = TASKS[task].refused(dp, options)
        assert {"half", "up", "steer", "dual_path", "steered"} <= refused.keys()
        assert not {"softmax", "taylor", "random", "max"} & refused.keys()


def test_a_lack_of_memory_is_not_the_models_refusal(dp: DePass, monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(dp: DePass, name: str, *_: Any) -> Any:
        raise MemoryLimitError("10 GB more") if name == "softmax" else ModelError("it has no gate")

    monkeypatch.setattr(methods, "_scored", scored)
    assert methods.refused(dp, ["softmax", "up", "steered"], 0) == {"up": "it has no gate"}


def test_a_run_with_methods_that_cannot_score_the_model_names_them_all(dp: DePass, tmp_path: Path) -> None:
    options = NeedlesOptions(methods="softmax,up,half,steer")
    with pytest.raises(OptionError, match=r"^up, steer: it has no gate; or leave out with --methods .*: up, steer$"):
        run(Refusing(), dp, options, tmp_path / "out")


def test_a_protocol_that_the_model_cannot_run_is_left_out_with_the_reason(dp: DePass, tmp_path: Path) -> None:
    """A model without a tokenizer reads neither the long contexts nor the sentences; the page is written all the same."""
    path = tmp_path / "ids.jsonl"
    rows = [{"prompt": models.prompt(7, i), "target": 5} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    text = run_all(dp, SuiteOptions(facts=str(path), ioi=str(path), quick=True), tmp_path / "out").read_text()
    assert "- in needles: the prompts of needles are texts, but the model has no tokenizer; give one" in text
    assert "[tokens](tokens/report.md)" in text


def test_a_data_set_that_cannot_be_read_is_found_before_anything_is_measured(dp: DePass, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the data set 'typo\.json'"):
        run_all(dp, SuiteOptions(ioi="typo.json"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_page_of_too_few_prompts_says_which(dp: DePass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("good", monkeypatch)
    monkeypatch.setattr(Lengths, "items", lambda self, options: [Item(str(i)) for i in range(3)])
    text = run_all(dp, SuiteOptions(), tmp_path / "out").read_text()
    assert f"Nothing can be decided: patch-top ({dp.name}, good): 3 prompts." in text
    assert "| question |" not in text


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


def test_a_protocol_that_took_longer_leaves_the_later_ones_less(
    dp: DePass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, given, clock = Lengths(), [], [0.0]
    shares = {"one": 0.5, "two": 0.3, "three": 0.2}
    runs = tuple(Protocol(name, task, TaskOptions(data="good"), share) for name, share in shares.items())

    def run(*_: Any, seconds: float, **__: Any) -> Path:
        given.append(seconds)
        clock[0] += 400  # longer than its share
        return tmp_path / "out" / "report.md"

    monkeypatch.setattr(suite, "protocols", lambda options: runs)
    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(suite.time, "monotonic", lambda: clock[0])
    run_all(dp, SuiteOptions(quick=True), tmp_path / "out")
    assert given == pytest.approx([0.5 * suite.QUICK, 0.6 * (suite.QUICK - 400), 0])


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
