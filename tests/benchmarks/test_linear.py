"""The linear rules' times: what is timed, what is checked before, and what the report makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import linear
from benchmarks.machine import Machine
from benchmarks.registry import TARGET, Case, load
from benchmarks.report import report
from benchmarks.wording import NOTHING
from depass import DePass
from depass.engine.backward import Backward
from depass.rules import LINEAR

CPU = Machine("cpu")
SHORT, LONG = (Case("tokens", "tiny", "float32", size) for size in ("10", "128"))
TEXT = "# Title\n\n<!-- begin linear -->\nold\n<!-- end linear -->\n"


@pytest.fixture(scope="module")
def dp() -> DePass:
    return DePass(load(SHORT, CPU))


@pytest.fixture(autouse=True)
def file(no_committed_results: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own file of results, and the tiny model."""
    monkeypatch.setattr(linear, "MODEL", "tiny")
    return linear.RESULTS / "linear-a-cpu-2-threads-smollm2-float32.json"


def filled(tmp_path: Path) -> str:
    document = tmp_path / "page.md"
    document.write_text(TEXT)
    list(report([], [document], tmp_path / "figures"))
    return document.read_text()


def test_the_command_writes_a_row_that_the_report_reads(tmp_path: Path, file: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib, of the extra [plots]")
    linear.main(["--lengths", "12", "10", "--runs", "2"])
    (path,) = linear.RESULTS.glob("linear-*-tiny-float32.json")
    row = json.loads(path.read_text())
    assert (row["what"], row["model"], row["dtype"], row["lengths"]) == ("linear", "tiny", "float32", [10, 12])
    assert {"commit", "changed", "torch", "transformers", "cpu", "threads", "date"} <= set(row)
    assert [each["method"] for each in row["measured"] if each["length"] == 10] == [
        "plain", *LINEAR, "half, recomputed", "survey", "sweep heads", "input_x_gradient", "softmax",
    ]  # fmt: skip
    for each in row["measured"]:
        assert each["runs"] == len(each["seconds"]) == 2
        assert 0 < each["seconds_p20"] <= each["seconds_p50"] <= each["seconds_p80"]
        assert each["method"] != "plain" or each["times_plain"] == 1
    assert "| method | 10 tokens | 12 tokens |" in filled(tmp_path)


def test_a_commit_that_is_given_stands_in_the_row(tmp_path: Path) -> None:
    linear.main(["--lengths", "10", "--runs", "1", "--commit", "abc", "--folder", str(tmp_path / "rows")])
    (path,) = (tmp_path / "rows").glob("linear-*-tiny-float32.json")
    assert json.loads(path.read_text())["commit"] == "abc"


def test_many_targets_are_timed_at_one_length_and_the_softmax_rule_on_short_prompts(dp: DePass) -> None:
    longer = Case("tokens", "tiny", "float32", "129")
    several = {case.size: set(linear.works(dp, case)) for case in (SHORT, LONG, longer)}
    assert several["128"] - several["10"] == {"half, 32 targets"}
    assert several["10"] - several["129"] == {"softmax"}
    assert linear.works(dp, LONG)["half, 32 targets"]().scores.shape == (32, 128)


def test_the_plain_pass_is_the_models_eager_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(SHORT, CPU)
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(linear, "load", lambda *_: model)
    linear.main(["--lengths", "10", "--runs", "1"])
    assert list(linear.RESULTS.glob("linear-*.json"))
    assert model.config._attn_implementation == "eager"


def test_prompts_are_random_and_the_same_in_every_session() -> None:
    ids = LONG.prompts[0]
    assert len(ids.unique()) > 50
    assert ids.tolist() == Case("tokens", "tiny", "float32", "128").prompts[0].tolist()


def test_layers_are_run_again_where_that_is_asked_for(dp: DePass, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    run = Backward.run

    def noted(self: Backward) -> None:
        seen.append(self.recompute)
        run(self)

    monkeypatch.setattr(Backward, "run", noted)
    works = linear.works(dp, SHORT)
    works["half"](), works["half, recomputed"](), works["half"]()
    assert seen == [False, True, False]


def test_a_slow_method_gets_fewer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"fast": 1.0, "slow": 25.0, "slower": 100.0}
    monkeypatch.setattr(Machine, "seconds", lambda self, work: work())
    seconds = linear.timed({name: lambda name=name: spent[name] for name in spent}, CPU, 7)  # type: ignore[misc]
    assert {name: len(of) for name, of in seconds.items()} == {"fast": 7, "slow": 2, "slower": 1}


# Checks.


@pytest.fixture
def results(dp: DePass) -> dict[str, Any]:
    return {name: work() for name, work in linear.works(dp, SHORT).items()}


def test_right_results_pass(dp: DePass, results: dict[str, Any]) -> None:
    linear.check(results, "float32")
    linear.check_engines(dp, SHORT)


@pytest.mark.parametrize("name", [*LINEAR, "half, recomputed", "survey", "sweep heads", "softmax"])
@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_scores_that_do_not_add_up_are_not_timed(name: str, error: float, results: dict[str, Any]) -> None:
    wrong = replace(results[name], conservation_error=torch.full_like(results[name].conservation_error, error))
    with pytest.raises(SystemExit, match=f"the conservation error of {name} is"):
        linear.check({**results, name: wrong}, "float32")


def test_scores_that_two_ways_give_differently_are_not_timed(dp: DePass, results: dict[str, Any]) -> None:
    wrong = replace(results["half"], scores=1.001 * results["half"].scores)
    with pytest.raises(
        SystemExit, match=r"half, recomputed and of half differ by 1\.0e-03 of their norm, allowed 1e-04"
    ):
        linear.check({**results, "half, recomputed": wrong}, "float32")
    with pytest.raises(SystemExit, match="taylor"):
        linear.check_same(
            "taylor", dp.attribute(SHORT.prompts[0], TARGET, rule="up"), "taylor", results["taylor"], linear.SAME
        )


def test_zeros_of_the_gradient_are_not_timed(results: dict[str, Any]) -> None:
    gradient = results[linear.GRADIENT]
    with pytest.raises(SystemExit, match="all scores of input_x_gradient are zero"):
        linear.check(
            {**results, linear.GRADIENT: replace(gradient, scores=torch.zeros_like(gradient.scores))}, "float32"
        )


def test_memory_for_the_activations_is_needed(dp: DePass, monkeypatch: pytest.MonkeyPatch) -> None:
    linear.refuse_scarce_memory(dp, [10])
    monkeypatch.setattr("depass.engine.plan.recomputes", lambda *_: True)
    with pytest.raises(SystemExit, match="too little free memory to keep the activations of 10 tokens under taylor"):
        linear.refuse_scarce_memory(dp, [10])


@pytest.mark.parametrize("option", ["--lengths", "--runs", "--threads"])
@pytest.mark.parametrize("value", ["0", "-3", "two"])
def test_options_are_positive_integers(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        linear.main([f"{option}={value}"])
    assert f"{value!r} is not a positive integer" in capsys.readouterr().err


# The report.

ROW = {
    "what": "linear", "model": "smollm2", "dtype": "float32", "lengths": [10, 128], "runs": 7, "machine": "a-cpu-2-threads",
    "device": "cpu",
    "gpu": None, "driver": None, "cpu": "A CPU", "cpu_capability": "AVX2", "threads": 2, "memory_limit_bytes": None,
    "torch": "2", "transformers": "5", "commit": "abcdef0123456", "changed": False, "date": "2026-01-02T03:04:05",
    "measured": [
        {"method": method, "length": length, "runs": runs, "seconds_p20": 0.9 * seconds, "seconds_p50": seconds,
         "seconds_p80": 1.1 * seconds, "times_plain": seconds / plain}
        for length, plain, runs, of in (
            (10, 0.1, 7, {"plain": 0.1, "half": 0.21, "input_x_gradient": 0.25, "softmax": 0.3}),
            (128, 0.4, 5, {"plain": 0.4, "half": 0.8, "input_x_gradient": 0.96, "half, 32 targets": 9.8, "softmax": 12.0}),
        )
        for method, seconds in of.items()
    ],
}  # fmt: skip


def test_the_report_makes_a_table_of_passes_with_the_figure_above(tmp_path: Path, file: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib, of the extra [plots]")
    file.write_text(json.dumps(ROW))
    figure = "linear-a-cpu-2-threads-smollm2-float32"
    assert filled(tmp_path).splitlines() == [
        "# Title",
        "",
        "<!-- begin linear -->",
        f"![{figure}](figures/{figure}.png)",
        "",
        "Command: `python -m benchmarks.linear --lengths 10 128 --runs 7 --threads 2`. SmolLM2-135M-Instruct, float32. "
        "Times are medians; runs of each method: 5 to 7. Measured on A CPU (2 threads, AVX2) with torch 2 and "
        "transformers 5, 2026-01-02. Commit: abcdef0123.",
        "",
        "| method | 10 tokens | 128 tokens |",
        "| --- | ---: | ---: |",
        "| plain eager pass | 100 ms | 400 ms |",
        "| half | 2.1× | 2.0× |",
        "| input x gradient | 2.5× | 2.4× |",
        "| softmax | 3.0× | 30× |",
        "| half, 32 targets |  | 24× |",
        "<!-- end linear -->",
    ]
    assert (tmp_path / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_a_gpus_row_has_a_table_of_its_own(tmp_path: Path, file: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib, of the extra [plots]")
    of_gpu = {"model": "llama-2-7b", "dtype": "bfloat16", "machine": "nvidia-x", "device": "cuda", "gpu": "NVIDIA X"}
    file.write_text(json.dumps(ROW))
    (linear.RESULTS / "linear-nvidia-x-llama-2-7b-bfloat16.json").write_text(
        json.dumps({**ROW, **of_gpu, "cuda": "13.0", "triton": "3"})
    )
    text = filled(tmp_path)
    assert text.count("| method | 10 tokens | 128 tokens |") == 2
    assert (
        "--device cuda --model llama-2-7b --dtype bfloat16 --lengths 10 128 --runs 7`. llama-2-7b, random weights"
        in text
    )
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "linear-a-cpu-2-threads-smollm2-float32.png", "linear-nvidia-x-llama-2-7b-bfloat16.png",
    }  # fmt: skip


def test_what_is_not_measured_is_said(tmp_path: Path) -> None:
    assert filled(tmp_path).splitlines()[3] == NOTHING
    assert not (tmp_path / "figures").exists()
