"""The benchmark of other tools: its rows, agreement, failures and tables, with none of the tools installed."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

import models
import pytest
import tokens

from benchmarks.machine import BenchmarkError
from benchmarks.peers import __main__ as peers
from benchmarks.peers import environment, report
from benchmarks.peers.common import text_of
from benchmarks.peers.environment import ToolError, Worker
from benchmarks.peers.worker import PLAIN
from benchmarks.report import report as write_report
from depass import baselines

OK = {
    "what": "peer", "status": "ok", "version": "1.0", "model": "tiny", "tokens": 10, "machine": "cpu", "warm": True,
    "cpu": "CPU", "gpu": None, "cpu_capability": "AVX512", "threads": 1, "torch": "2", "transformers": "5",
    "date": "2026-01-01T00:00:00", "commit": "0123456789ab", "changed": False, "peak_bytes": 2_000_000,
    "rounds": 3, "budget": 3.0, "limit": 6.5,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A tiny Llama on disk, with its tokenizer."""
    models.make("llama").save_pretrained(tmp_path / "tiny")
    tokens.make().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("tool", peers.TOOLS)
def test_a_tools_module_needs_no_tool_and_pins_what_it_installs(tool: str) -> None:
    module = import_module(f"benchmarks.peers.{tool}")
    pins = (*module.PINS, *getattr(module, "WITHOUT_DEPENDENCIES", ()))
    assert all("==" in pin for pin in pins if pin != "tqdm")
    assert (tool == "ours") == (not pins)
    assert all(callable(getattr(module, name)) for name in ("load", "scores", "explained"))
    for method in module.METHODS.values():
        assert method.same_as in (None, "published", *peers.ours.METHODS, *baselines.TOKENS)
        assert method.beside in (None, *peers.ours.METHODS)


def test_ours_is_measured_as_any_tool_and_a_missing_tool_is_a_failed_row(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "python_of", lambda *_: sys.executable)  # an environment without the tool
    monkeypatch.setattr(peers, "TEXT", "the cat sat on the mat. " * 3)
    file = tmp_path / "rows.jsonl"
    assert peers.main(["ours", "lxt", "--models", folder, "--lengths", "7", "--rounds", "2", "--out", str(file)]) == 0
    *own, failed = rows_in(file)
    assert [row["method"] for row in own] == [PLAIN, "softmax", "half", "dual_path"]
    for row in own:
        assert (row["tool"], row["status"], row["tokens"], row["threads"]) == ("ours", "ok", 7, 1)
        assert {
            "commit",
            "torch",
            "transformers",
            "cpu",
            "date",
            "machine",
            "model",
            "rounds",
            "budget",
            "limit",
        } <= set(row)
        assert len(row["wall_seconds"]) == len(row["processor_seconds"]) == row["runs"] == 2
        assert row["peak_bytes"] > 0
        assert row["times_plain"] > 0
        if row["method"] != PLAIN:
            assert row["sum"] == pytest.approx(row["explained"], abs=1e-4)
            assert row["explained"] == pytest.approx(row["logit"])
    assert own[0]["times_plain"] == 1
    assert (failed["tool"], failed["version"], failed["status"]) == ("lxt", "2.1", "failed")
    assert failed["error"] == "ModuleNotFoundError: No module named 'lxt'"


def test_the_published_code_needs_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="published needs --published DIR"):
        peers.main(["published", "--out", str(tmp_path / "rows.jsonl")])


def test_a_prompt_is_the_texts_first_tokens_and_the_target_is_the_next(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "TEXT", "the cat sat on the mat.")
    ids = tokens.make()(peers.TEXT).input_ids
    short, long = peers.prompts_of(folder, [4, 2])
    assert (short.ids, short.target, long.ids, long.target) == (tuple(ids[:2]), ids[2], tuple(ids[:4]), ids[4])
    with pytest.raises(BenchmarkError, match=r"must be from 2 to \d+ tokens"):
        peers.prompts_of(folder, [1000])


def test_agreement_is_correlation_and_the_difference_relative_to_our_largest_score() -> None:
    assert peers.agreement([1.0, 2.0, -4.0], [1.0, 2.0, -4.0]) == {"correlation": 1.0, "largest_difference": 0.0}
    found = peers.agreement([1.0, 3.0, -4.0], [1.0, 2.0, -4.0])
    assert found["largest_difference"] == 0.25
    assert 0.9 < found["correlation"] < 1
    assert peers.agreement([-1.0, -2.0], [1.0, 2.0])["correlation"] == pytest.approx(-1)


class Stub:
    """A worker with one answer to every request; it counts what it is asked."""

    def __init__(self, tool: str, **answer: Any) -> None:
        self.tool, self.answer, self.asked = tool, answer, list[str]()

    def ask(self, *, do: str, method: str, **_: Any) -> dict[str, Any]:
        self.asked.append(method)
        return self.answer


def test_a_tool_whose_model_gives_another_logit_fails() -> None:
    worker, beside = Stub("lxt", logit=2.0), Stub("ours", logit=1.0)
    module = import_module("benchmarks.peers.lxt")
    with pytest.raises(ToolError, match="gives the target the logit 2, expected 1"):
        peers.checked(module, "AttnLRP", peers.Prompt((1, 2), 3), worker, beside)  # type: ignore[arg-type]


def test_works_take_turns_and_a_slow_one_gets_no_further_round() -> None:
    fast, slow = Stub("ours", processor=0.1, wall=0.1), Stub("lxt", processor=5.0, wall=5.0)
    works = {(fast, "half"): [], (slow, "AttnLRP"): []}
    timed = peers.in_turn(works, peers.Prompt((1,), 2), Namespace(rounds=3, budget=4.0))  # type: ignore[arg-type]
    assert [len(runs) for runs in timed.values()] == [3, 1]


def test_a_slow_method_gets_no_longer_prompt_and_says_why() -> None:
    slow = {"AttnLRP": "a run over 64 tokens took 50 s"}
    stub, module = Stub("lxt"), import_module("benchmarks.peers.lxt")
    (row,) = peers.cell(module, ["AttnLRP"], peers.Prompt((1,), 2), stub, stub, Namespace(rounds=1, budget=1), slow)  # type: ignore[arg-type]
    assert (row["status"], row["error"], stub.asked) == ("not measured", slow["AttnLRP"], [])


def test_a_process_that_ends_is_a_tools_error(folder: str) -> None:
    with Worker("ours", "/bin/false", folder) as worker, pytest.raises(ToolError, match="ended with exit code 1"):
        worker.ask(do="time", method=PLAIN, ids=[1], target=1, limit=30)


def test_a_tool_that_does_not_answer_is_stopped(folder: str, tmp_path: Path) -> None:
    script = tmp_path / "sleep.sh"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    with Worker("ours", str(script), folder) as worker, pytest.raises(ToolError, match="stopped after 1 s"):
        worker.ask(do="time", method=PLAIN, ids=[1], target=1, limit=1)


def test_an_environment_in_which_pip_replaced_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = iter(("2.13.0+cpu", "2.14.0"))
    monkeypatch.setattr(environment, "BUILD", tmp_path)
    monkeypatch.setattr(environment, "_run", lambda *command: next(versions) if "-c" in command else "")
    with pytest.raises(ToolError, match=r"pip replaced torch 2\.13\.0\+cpu by 2\.14\.0 for lxt"):
        environment.python_of("lxt", import_module("benchmarks.peers.lxt"), "torch==2.13.0")
    assert not (tmp_path / "lxt" / "ready").exists()


def test_text_that_is_tokenised_otherwise_is_refused() -> None:
    tokenizer = tokens.make()
    ids = tokenizer("the cat sat").input_ids
    assert tokenizer(text_of(tokenizer, ids)).input_ids == ids
    with pytest.raises(ValueError, match="other ids"):
        text_of(tokenizer, [*ids, tokenizer.eos_token_id, *ids])  # its text spells no EOS


def table_of(tmp_path: Path, *rows: dict[str, Any]) -> str:
    file = tmp_path / "peers.jsonl"
    file.write_text("".join(json.dumps({**OK, **row}) + "\n" for row in rows))
    return report.section(file)


def test_the_tables_say_times_ratios_sums_agreement_and_failures(tmp_path: Path) -> None:
    own = {"tool": "ours", "version": "", "explains": "the logit", "sum": 2.0, "explained": 2.0, "processor_p50": 0.3}
    tool = {"tool": "lxt", "method": "AttnLRP", "explains": "the logit", "sum": 1.0, "explained": 2.0, "warm": False,
            "processor_p50": 0.6, "times_plain": 6.0, "times_beside": 1.5, "beside": "half", "same_as": "half",
            "why_off": "", "correlation": 0.99, "largest_difference": 0.01}  # fmt: skip
    text = table_of(
        tmp_path,
        {**own, "method": "softmax", "times_plain": 3.0},
        {**own, "method": "half", "times_plain": 2.0},
        {**tool, "processor_p50": 9.0},  # measured again below
        tool,
        {"tool": "lxt", "method": "AttnLRP", "tokens": 64, "status": "not measured", "error": "too slow"},
        {"tool": "gim", "method": "GIM", "status": "failed", "error": "ValueError: no such model"},
    )
    assert "`python -m benchmarks.peers --published DIR` with `--rounds 3 --budget 3 --limit 6.5`" in text
    assert "| tool and method | 10 tokens | 64 tokens |" in text
    assert "| lxt 1.0: AttnLRP | 600 ms* (6.0×) | not measured |" in text
    assert "| lxt 1.0: AttnLRP | 2.0 / 1.5 / not measured | not measured |" in text
    assert "| lxt 1.0: AttnLRP | 10 | the logit | 1.000 | 2.000 | 5.0e-01 | `half` | 0.9900 | 1.0e-02 | 2 MB |" in text
    assert "| gim 1.0: GIM | failed | not measured |" in text
    assert "Failed:\n\n- gim 1.0: GIM: ValueError: no such model" in text


def test_without_rows_the_document_says_that_nothing_was_measured(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("<!-- begin peers -->\nold\n<!-- end peers -->\n")
    list(write_report([], [document], tmp_path / "figures"))
    assert document.read_text() == "<!-- begin peers -->\nNot measured yet.\n<!-- end peers -->\n"
