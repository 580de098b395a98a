"""Evaluations: runs that lose nothing, data sets, and token faithfulness on models whose answer is known."""

from __future__ import annotations

import hashlib
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import pytest
import tokens as tokenizers
import torch
from one_token import ANSWER, OTHERS, TRIGGER, one_token_model

from depass import DataError, DePass, NonFiniteError, OptionError, OutputError, cli
from depass.evaluate import TASKS, data, measures, rules, run, summary, tokens
from depass.evaluate.forward import next_tokens
from depass.evaluate.run import counts
from depass.evaluate.task import Item, Row, Task, TaskOptions, failed, skipped

FAST = "softmax,leave_one_out,random"


# Models and data sets.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    models.make("llama").save_pretrained(path)
    tokenizers.make().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def dp(folder: str) -> DePass:
    return DePass.from_pretrained(folder)


def jsonl(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def ids_data(path: Path, count: int) -> str:
    return jsonl(path, [{"prompt": models.prompt(4 + i % 7, i), "target": 3 + i % 90} for i in range(count)])


def rows_of(folder: Path) -> dict[str, Row]:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


@dataclass(frozen=True, kw_only=True)
class LengthsOptions(TaskOptions):
    data: str = "facts"
    unit: str = "characters"


class Lengths(Task[LengthsOptions]):
    """Measures how long prompts are, last first."""

    name, help = "lengths", "how long prompts are"
    Options = LengthsOptions

    def items(self, options: LengthsOptions) -> list[Item]:
        return [*data.prompts(options.data, options.seed, options.limit), Item("broken", broken="it is broken")]

    def prepare(self, dp: DePass, items: Sequence[Item], options: LengthsOptions) -> int:
        return len(items)

    def measure(self, dp: DePass, prepared: int, items: Sequence[Item], options: LengthsOptions) -> Iterator[Row]:
        for item in reversed(items):
            if item.id == "0":
                yield skipped(item, "it is the first")
            elif item.id == "1":
                yield failed(item, "it is the second")
            else:
                yield {"id": item.id, "status": "ok", "length": len(item.data["prompt"]), "of": prepared}

    def report(self, rows: Sequence[Row], options: LengthsOptions, folder: Path) -> str:
        return f"{sum(row['length'] for row in rows)} {options.unit}"


# Runs.


def test_a_run_writes_rows_and_a_report_that_counts_everything(dp: DePass, tmp_path: Path) -> None:
    options = LengthsOptions(limit=100, seed=3)
    report = run(Lengths(), dp, options, tmp_path / "deep" / "out").read_text()
    count = len(data.FACTS)
    assert f"{count + 1} items: {count - 2} ok, 1 skipped, 2 errors." in report
    assert "- 1 skipped: it is the first" in report
    assert "- 1 error: it is broken" in report
    assert f"{sum(len(prompt) for prompt, _ in data.FACTS[2:])} characters" in report
    described = json.loads((tmp_path / "deep" / "out" / "run.json").read_text())
    assert described["settings"]["seed"] == 3
    assert described["settings"]["dtype"] == "float32"
    assert described["sessions"][0]["torch"] == torch.__version__
    assert {row["of"] for row in rows_of(tmp_path / "deep" / "out").values() if row["status"] == "ok"} == {count}


def test_a_run_that_is_whole_is_only_reported_again(dp: DePass, tmp_path: Path) -> None:
    options = LengthsOptions()
    first = run(Lengths(), dp, options, tmp_path).read_text()
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert run(Lengths(), dp, options, tmp_path).read_text() == first
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_what_a_killed_write_left_is_measured_again(dp: DePass, tmp_path: Path) -> None:
    options = LengthsOptions()
    run(Lengths(), dp, options, tmp_path)
    whole, path = rows_of(tmp_path), tmp_path / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:20]) + lines[20][:15])
    run(Lengths(), dp, options, tmp_path)
    assert rows_of(tmp_path) == whole


def test_a_killed_process_loses_no_row_and_measures_none_twice(folder: str, dp: DePass, tmp_path: Path) -> None:
    source, out = ids_data(tmp_path / "data.jsonl", 160), tmp_path / "out"
    arguments = ["-m", folder, "--data", source, "--keep-wrong", "--methods", FAST]
    command = [sys.executable, "-m", "depass", "evaluate", "tokens", *arguments, "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not ((out / "rows.jsonl").exists() and (out / "rows.jsonl").stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    lines = (out / "rows.jsonl").read_bytes().split(b"\n")[:-1]
    assert 0 < len(lines) < 160
    assert cli.main(["evaluate", "tokens", *arguments, "--out", str(out)]) == 0
    assert (out / "rows.jsonl").read_bytes().split(b"\n")[: len(lines)] == lines
    alone = tmp_path / "alone"
    options = tokens.TokensOptions(data=source, keep_wrong=True, methods=FAST)
    run(TASKS["tokens"], dp, options, alone)
    resumed, uninterrupted = rows_of(out), rows_of(alone)
    assert resumed.keys() == uninterrupted.keys() == {str(i) for i in range(160)}
    for name, row in uninterrupted.items():
        for method, curve in row["patch"].items():
            assert resumed[name]["patch"][method] == pytest.approx(curve, rel=1e-4)
    assert "and the time of 1 killed sessions" in (out / "report.md").read_text()


def test_a_run_leaves_out_the_first_items_and_then_counts_its_limit(dp: DePass, tmp_path: Path) -> None:
    run(Lengths(), dp, LengthsOptions(skip=7, limit=3), tmp_path)
    assert sorted(rows_of(tmp_path)) == ["7", "8", "9"]


def test_a_run_whose_time_is_up_reports_what_it_has_and_goes_on_later(dp: DePass, tmp_path: Path) -> None:
    class Together(Lengths):
        together = 4

    options = LengthsOptions(limit=9)
    report = run(Together(), dp, options, tmp_path, seconds=0.0).read_text()
    assert sorted(rows_of(tmp_path)) == ["0", "1", "2", "3"]  # what was measured together is kept
    assert "4 items: 2 ok" in report
    assert "5 more items were not measured: the time was up." in report
    assert "the time was up" not in run(Together(), dp, options, tmp_path).read_text()
    assert len(rows_of(tmp_path)) == 9


def test_rows_of_another_edition_are_not_continued(dp: DePass, tmp_path: Path) -> None:
    class Changed(Lengths):
        edition = 2

    run(Lengths(), dp, LengthsOptions(), tmp_path)
    with pytest.raises(OptionError, match="holds a run with edition None, but this run has 2"):
        run(Changed(), dp, LengthsOptions(), tmp_path)


def test_a_run_that_is_refused_leaves_nothing_behind(dp: DePass, tmp_path: Path) -> None:
    """So the same directory takes the run without the methods that the model refuses."""

    class Refusing(Lengths):
        def refused(self, dp: DePass, options: LengthsOptions) -> dict[str, str]:
            return {"up": "it has no gate"} if options.unit == "characters" else {}

    with pytest.raises(OptionError, match="up: it has no gate"):
        run(Refusing(), dp, LengthsOptions(), tmp_path)
    assert not (tmp_path / "run.json").exists()
    assert "stopped" not in run(Refusing(), dp, LengthsOptions(unit="bytes"), tmp_path).read_text()


def test_methods_that_share_no_prompt_are_not_compared() -> None:
    own = {"softmax": [1.0, None], "leave_one_out": [None, 2.0]}
    _, other = summary.results("area", "lower", own, "softmax", 0, [3, 4])
    assert (other.value.value, other.against) == (2.0, None)


def test_rows_without_their_settings_are_not_continued(dp: DePass, tmp_path: Path) -> None:
    run(Lengths(), dp, LengthsOptions(), tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(DataError, match=r"has rows\.jsonl but no run\.json"):
        run(Lengths(), dp, LengthsOptions(seed=1), tmp_path)


@pytest.mark.parametrize("named", ["x" * 300, "a/" * 3000])
def test_a_data_set_whose_name_is_too_long_is_one_line(named: str, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["evaluate", "tokens", "--data", named, "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot read" in line
    assert "File name too long" in line


def test_rows_are_lines_whatever_their_texts_hold_and_editors_put_first(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    prompts = ["one\u2028two", "three\u0085four", "five"]
    lines = [json.dumps({"prompt": prompt, "target": " x"}, ensure_ascii=False) for prompt in prompts]
    path.write_bytes(("\ufeff" + "\n\n".join(lines) + "\r\n").encode())
    items = data.prompts(str(path), 0, None)
    assert [(item.id, item.data.get("prompt")) for item in items] == [(str(i), text) for i, text in enumerate(prompts)]


def test_a_method_that_fails_on_a_prompt_loses_only_its_own_number(
    dp: DePass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tokens.methods.scored

    def scored(dp: DePass, names: Sequence[str], *arguments: Any) -> Any:
        found = original(dp, names, *arguments)
        found[1]["half"] = NonFiniteError("it overflows")
        return found

    monkeypatch.setattr(tokens.methods, "scored", scored)
    options = tokens.TokensOptions(
        data=ids_data(tmp_path / "data.jsonl", 4), keep_wrong=True, methods="softmax,half,random"
    )
    report = run(TASKS["tokens"], dp, options, tmp_path / "out").read_text()
    assert "4 items: 4 ok" in report
    assert "- half: it overflows: 1" in report
    rows = rows_of(tmp_path / "out")
    assert [sorted(row["patch"]) for row in rows.values()].count(["random", "softmax"]) == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    counts = {line["method"]: line["prompts"] for line in results if line["measure"].startswith("patch")}
    assert counts == {"softmax": 4, "half": 3, "random": 4}


def test_results_compare_methods_prompt_by_prompt(dp: DePass, tmp_path: Path) -> None:
    """A shift that all prompts share is found whatever the prompts' own spread."""
    own = {"ours": [0.0, 10.0, 100.0], "theirs": [1.0, 11.0, 101.0], "slow": [None, 12.0, None]}
    costs = {"theirs": [3.0, 1.0, 2.0]}
    ours, theirs, slow = summary.results("area", "lower", own, "ours", 0, [4, 5, 9], costs)
    assert ours.against is None
    assert ours.cost is None
    assert theirs.against == (1.0, 1.0, 1.0)
    assert theirs.value.value == pytest.approx(113 / 3)
    assert theirs.value.low < 2 < 100 < theirs.value.high
    assert (theirs.prompts, theirs.tokens, theirs.cost, theirs.reference) == (3, 6, 2, "ours")
    assert (slow.prompts, slow.value.value, slow.against, slow.values) == (1, 12, (2, 2, 2), (None, 12, None))

    class Compared(Lengths):
        def results(self, rows: Sequence[Row], options: LengthsOptions) -> list[summary.Result]:
            return [ours, theirs]

    run(Compared(), dp, LengthsOptions(limit=4), tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["settings"]["model"] == dp.name
    assert [line["method"] for line in written["results"]] == ["ours", "theirs"]
    assert written["results"][1]["against"] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "holds a run with seed 0, but this run has 1; use the same options, or choose another --out"),
        ({"limit": 5}, "limit None, but this run has 5"),
        ({"skip": 5}, "skip None, but this run has 5"),
        ({"unit": "bytes"}, "unit 'characters', but this run has 'bytes'"),
    ],
)
def test_other_settings_are_refused_by_name(dp: DePass, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    run(Lengths(), dp, LengthsOptions(), tmp_path)
    with pytest.raises(OptionError, match=re.escape(said)):
        run(Lengths(), dp, LengthsOptions(**changed), tmp_path)


def test_the_command_writes_every_setting_by_the_name_that_begun_runs_have(
    dp: DePass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("depass.cli.evaluate.load_model", lambda _: dp)
    source, out = ids_data(tmp_path / "data.jsonl", 2), tmp_path / "out"
    more = ["--quantization", "4bit", "--seed", "2", "--methods", "random", "--keep-wrong"]
    assert cli.main(["evaluate", "tokens", "--data", source, "--out", str(out), *more]) == 0
    assert json.loads((out / "run.json").read_text())["settings"] == {
        "dtype": "float32", "quantization": "4bit", "backend": "auto", "data": source, "seed": 2, "limit": None,
        "methods": "random", "measures": "deletion,zeroing,soft", "slow_limit": None, "keep_wrong": True,
        "retokenize": False,
        "data_sha256": hashlib.sha256(Path(source).read_bytes()).hexdigest(),
        "model": dp.name, "rule": "softmax", "temperature": 0.1, "exclude_bos": "auto",
    }  # fmt: skip
    options = tokens.TokensOptions(data=source, seed=2, methods="random", keep_wrong=True)
    run(TASKS["tokens"], dp, options, out, quantization="4bit")
    with pytest.raises(OptionError, match="holds a run with quantization '4bit', but this run has None"):
        run(TASKS["tokens"], dp, options, out)


def test_a_data_set_that_changed_is_refused(dp: DePass, tmp_path: Path) -> None:
    options = LengthsOptions(data=ids_data(tmp_path / "data.jsonl", 3))
    run(Lengths(), dp, options, tmp_path / "out")
    ids_data(tmp_path / "data.jsonl", 4)
    with pytest.raises(OptionError, match="data_sha256"):
        run(Lengths(), dp, options, tmp_path / "out")


def test_two_processes_do_not_measure_into_one_folder(dp: DePass, tmp_path: Path) -> None:
    code = (
        "import fcntl, os, sys\n"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print(flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(OutputError, match="another process is using"):
            run(Lengths(), dp, LengthsOptions(), tmp_path)
        other.communicate()
    run(Lengths(), dp, LengthsOptions(), tmp_path)


def test_what_is_no_run_is_refused(dp: DePass, tmp_path: Path) -> None:
    options = LengthsOptions()
    for content in ("[]", "{", '{"format": "else"}', '{"format": "depass-evaluation-1"}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(DataError, match="was not written by this command"):
            run(Lengths(), dp, options, tmp_path)
    (tmp_path / "run.json").unlink()
    (tmp_path / "rows.jsonl").write_text('{"id": "0", "status": "ok", "length": 1}\nno row\n')
    with pytest.raises(DataError, match="line 2 is not a valid row"):
        run(Lengths(), dp, options, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write into"):
        run(Lengths(), dp, options, tmp_path / "file")


def test_a_report_lists_the_most_common_reasons_and_counts_the_others() -> None:
    rows: list[Row] = [failed(Item(str(i)), f"reason {i % 30}") for i in range(90)]
    said = [line for line in counts(rows).splitlines() if line]
    assert said[0] == "90 items: 0 ok, 0 skipped, 90 errors."
    assert len(said) == 22
    assert said[-1] == "- 30 more, for 10 other reasons: see rows.jsonl"


# The command.


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nonsense"], 2, "invalid choice: 'nonsense'"),
        (["tokens", "--limit", "0"], 2, "'0' is not an integer of at least 1"),
        (["tokens", "--seed", "-1"], 2, "'-1' is not an integer of at least 0"),
        (["tokens", "--methods", "softmax,magic"], 2, "unknown method 'magic'; choose from softmax, max"),
        (["tokens", "--methods", "softmax,softmax"], 2, "--methods names 'softmax' twice"),
        (["tokens", "--measures", "soft,hard"], 2, "unknown measures 'hard'; choose from deletion, zeroing, soft"),
        (["tokens", "--measures", "soft,soft"], 2, "--measures names one of 'soft,soft' twice"),
        (["tokens", "--data", "/no/such/file.json"], 1, "cannot read the data set '/no/such/file.json'"),
        (["tokens", "--out", "/proc/nothing"], 1, "cannot write into /proc/nothing"),
        (["tokens", "--device", "toaster"], 2, "there is no such device"),
    ],
)
def test_wrong_use_is_said_without_a_traceback(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    given = [arguments[0], "-m", folder, "--out", str(tmp_path), *arguments[1:]]
    try:
        found = cli.main(["evaluate", *given])
    except SystemExit as error:
        found = int(error.code or 0)
    assert found == code
    assert said in capsys.readouterr().err


# Data sets.


def test_data_sets_are_told_by_their_keys(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "attribute": "b", "known_id": 0}, {"prompt": "a", "target_token": "b"},
        {"prompt": "a", "answer": "b"}, {"prompt": "a", "target": "b"}, {"prompt": [4, 5], "target": 6},
    ]  # fmt: skip
    path = tmp_path / "set.json"
    path.write_text(json.dumps(rows))
    listed = data.prompts(str(path), 0, None)
    assert [item.data["target"] for item in listed] == [" b", " b", " b", "b", 6]
    assert data.prompts(jsonl(tmp_path / "set.jsonl", rows), 0, None) == listed


def test_broken_rows_become_items_that_say_so(tmp_path: Path) -> None:
    rows = ['{"prompt": "a"', "[1]", {"prompt": "a"}, {"target": "a"}, {"prompt": "", "target": "b"},
            {"prompt": "a", "target": ""}, {"prompt": "a", "attribute": " "}, {"prompt": [True], "target": 1},
            {"prompt": "a", "target": 3}, {"prompt": [], "target": 3}, {"prompt": None, "target": "a"}]  # fmt: skip
    items = data.prompts(jsonl(tmp_path / "set.jsonl", [*rows, {"prompt": "a", "target": " b"}]), 0, None)
    assert [bool(item.broken) for item in items] == [True] * len(rows) + [False]
    assert [item.id for item in items] == [str(i) for i in range(len(rows) + 1)]


def test_files_that_are_no_data_sets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1, 2")
    with pytest.raises(DataError, match="is not a valid JSON list"):
        data.read(str(tmp_path / "list.json"))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "bytes.jsonl", tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="cannot read the data set"):
            data.read(str(path))


@pytest.mark.parametrize(("name", "rows", "key"), [("known_1000", 1209, "attribute"), ("ioi", 841, "target_token")])
def test_the_papers_data_sets_are_read(published_data: Path, name: str, rows: int, key: str) -> None:
    items = data.prompts(str(published_data / f"{name}.json"), 0, None)
    raw = json.loads((published_data / f"{name}.json").read_text())
    assert len(items) == rows
    assert all(item.broken is None for item in items)
    assert [item.data["target"] for item in items] == [f" {row[key]}" for row in raw]


def test_an_answers_tokens_are_those_behind_the_prompts(dp: DePass) -> None:
    made = data.pair(dp, Item("0", {"prompt": "the cat", "target": " cat sat"}))
    assert dp.tokenizer.decode(made.ids) == "the cat"
    assert dp.tokenizer.decode(made.answer[:1]) == " cat"
    assert len(made.answer) > 1
    assert not made.begins_special
    assert data.pair(dp, Item("0", {"prompt": "<bos>the cat", "target": " cat"})).begins_special


def test_facts_are_whole_and_different() -> None:
    assert len(data.FACTS) >= 60
    assert len({prompt for prompt, _ in data.FACTS}) == len(data.FACTS)
    for prompt, answer in data.FACTS:
        assert prompt == prompt.strip()
        assert re.fullmatch(r"[A-Za-z]+", answer)
        assert answer.lower() not in re.findall(r"[a-z]+", prompt.lower())


def test_smollm2_knows_most_of_the_facts(smollm2_dp: Any) -> None:
    pairs = [data.pair(smollm2_dp, item) for item in data.prompts("facts", 0, None)]
    tops = next_tokens(smollm2_dp, [pair.ids for pair in pairs], [pair.answer[0] for pair in pairs])[1].tolist()
    assert sum(top == pair.answer[0] for top, pair in zip(tops, pairs, strict=True)) >= 40
    assert all(len(pair.answer) == 1 for pair in pairs)


def test_ioi_sentences_are_whole_and_name_the_answer_once() -> None:
    made = data.ioi(400, 0)
    for row in made:
        names = [word for word in re.findall(r"[A-Za-z]+", row["prompt"]) if word in data.NAMES]
        answer, giver = row["target"].removeprefix(" "), row["giver"]
        assert row["target"] == f" {answer}"
        assert sorted(names) == sorted([answer, giver, giver])
        assert names[2] == giver  # who gives is named last, so the other is who receives
        assert re.search(rf"\b{giver} \w+ (a [^aeiou]|an [aeiou])\w+ to$", row["prompt"])
        assert row["prompt"][0].isupper()
        assert not re.search(r"[{}]|  ", row["prompt"])
    assert sum(row["prompt"].find(row["target"].strip()) < row["prompt"].find(row["giver"]) for row in made) == 200
    assert data.ioi(400, 0) == made
    assert data.ioi(10, 0) == made[:10]
    assert data.ioi(400, 1) != made


# Statistics.


def test_the_bootstrap_interval_is_that_of_a_mean() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    found, spread = summary.mean(values, 0), torch.tensor(values).std().item() / math.sqrt(500)
    assert found.value == pytest.approx(sum(values) / 500)
    assert found.low == pytest.approx(found.value - 1.96 * spread, abs=0.1 * spread)
    assert found.high == pytest.approx(found.value + 1.96 * spread, abs=0.1 * spread)
    assert summary.mean(values, 0) == found
    assert summary.mean(values, 1) != found
    assert summary.mean([0.25], 0) == summary.Mean(0.25, 0.25, 0.25)


def test_the_bootstrap_interval_is_scipys_for_skewed_values() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with scikit-learn, of the extra [evaluate]")
    values = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64).pow(6)
    theirs = stats.bootstrap(
        (values.numpy(),), lambda x, axis: x.mean(axis), method="percentile", n_resamples=20000, rng=0
    ).confidence_interval
    ours = summary.mean(values.tolist(), 0)
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.06 * width)


def test_the_area_is_the_mean_height() -> None:
    assert summary.area((10, 50, 100), torch.tensor([[3.0, 3.0, 3.0], [10.0, 50.0, 100.0]])).tolist() == [3.0, 55.0]
    assert float(summary.area((0, 1, 4), torch.tensor([0.0, 1.0, 0.0]))) == pytest.approx((0.5 + 1.5) / 4)


# Predictions.


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mistral"])
def test_predictions_together_are_the_models_own(name: str) -> None:
    model = models.make(name)
    prompts = [models.prompt(1 + i % 9, i) for i in range(30)]
    answers = [(7 * i) % models.VOCABULARY for i in range(30)]
    found, tops = next_tokens(DePass(model), prompts, answers)
    for i, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].softmax(0)
        assert float(found[i]) == pytest.approx(float(expected[answer]), rel=1e-4)
        assert int(tops[i]) == int(expected.argmax())


# Token faithfulness.


def pair(ids: Sequence[int], special: bool = False) -> data.Pair:
    return data.Pair(Item("0"), tuple(ids), (1,), special)


def test_tokens_are_deleted_and_kept_by_score() -> None:
    made = pair([10, 11, 12, 13, 14, 15])
    ranked = measures.ranking(made, torch.tensor([0.5, -1.0, 3.0, 0.5, 2.0, 99.0]))
    assert ranked == [2, 4, 0, 3, 1]  # the last token is kept, and of equals the earlier comes first
    assert measures.remaining(made, ranked, 10, "patch") == (10, 11, 13, 14, 15)  # 0.5 tokens are one
    assert measures.remaining(made, ranked, 10, "recover") == (12, 15)
    assert measures.remaining(made, ranked, 40, "patch") == (10, 11, 13, 15)
    assert measures.remaining(made, ranked, 40, "recover") == (12, 14, 15)
    assert measures.remaining(made, ranked, 100, "patch") == (15,)
    assert measures.remaining(made, ranked, 100, "recover") == made.ids


def test_a_first_special_token_is_always_kept() -> None:
    made = pair([1, 11, 12, 13], special=True)
    ranked = measures.ranking(made, torch.tensor([9.0, 0.0, 1.0, 9.0]))
    assert ranked == [2, 1]
    assert measures.remaining(made, ranked, 100, "patch") == (1, 13)
    assert measures.remaining(made, ranked, 10, "recover") == (1, 12, 13)


@pytest.mark.parametrize("at", [0, 3, 8])
def test_the_one_token_that_matters_is_found(at: int, tmp_path: Path) -> None:
    dp = DePass(one_token_model())
    prompt = [token for token in range(OTHERS) if token not in (TRIGGER, ANSWER)][:10]
    prompt[at] = TRIGGER
    source = jsonl(tmp_path / "data.jsonl", [{"prompt": prompt, "target": ANSWER}])
    task = TASKS["tokens"]
    run(task, dp, tokens.TokensOptions(data=source, methods="softmax"), tmp_path / "out")
    row = rows_of(tmp_path / "out")["0"]
    assert row["clean"] == pytest.approx(1.0)
    assert row["patch"]["softmax"] == pytest.approx([1 / OTHERS] * 10)
    assert row["recover"]["softmax"] == pytest.approx([1.0] * 10)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| softmax | 1 | 0.062 [0.062, 0.062] | 1.000 [1.000, 1.000] |" in report


def test_curves_are_those_of_a_loop_over_methods_and_shares(dp: DePass, tmp_path: Path) -> None:
    task, source = TASKS["tokens"], ids_data(tmp_path / "data.jsonl", 5)
    run(task, dp, tokens.TokensOptions(data=source, keep_wrong=True, methods=FAST), tmp_path / "out")
    for name, row in rows_of(tmp_path / "out").items():
        made = data.pair(dp, data.prompts(source, 0, None)[int(name)])
        scores = dp.attribute(list(made.ids), made.answer[0]).scores[0]
        order = sorted(range(len(made.ids) - 1), key=lambda t, scores=scores: -float(scores[t]))  # type: ignore[misc]
        for k, share in enumerate(measures.SHARES):
            count = max(1, math.floor(len(order) * share / 100 + 0.5))
            for curve, gone in (("patch", order[:count]), ("recover", order[count:])):
                ids = [token for t, token in enumerate(made.ids) if t not in gone]
                with torch.no_grad():
                    expected = dp.model(torch.tensor([ids])).logits[0, -1].softmax(0)[made.answer[0]]
                assert row[curve]["softmax"][k] == pytest.approx(float(expected), rel=1e-4)


def test_wrong_and_long_and_unreadable_answers_are_counted(dp: DePass, tmp_path: Path) -> None:
    def top(ids: list[int]) -> int:
        return int(next_tokens(dp, [ids], [0])[1][0])

    def said(prompt: str) -> str:
        text: str = dp.tokenizer.decode([top(dp.tokenizer.encode(prompt))])
        return text

    words = [f"the cat {letter}" for letter in "bdfgijklmnopqruvwxyzABDEFGHIJ"]
    right = next(word for word in words if re.fullmatch(r"[a-zA-Z0-9!?]", said(word)))
    rows = [
        {"prompt": right, "target": said(right)},  # ok
        {"prompt": right, "target": said(right) + "!"},  # ok, two tokens
        {"prompt": right, "target": "Q" if said(right) != "Q" else "Z"},  # wrong
        {"prompt": "the c", "target": "at"},  # one token with the prompt's end
        {"prompt": [500], "target": 3},  # no id of the model
        {"prompt": [20], "target": top([20])},  # nothing to delete
        "no row",
    ]
    source, task = jsonl(tmp_path / "data.jsonl", rows), TASKS["tokens"]
    report = run(task, dp, tokens.TokensOptions(data=source, methods=FAST), tmp_path / "out").read_text()
    assert [rows_of(tmp_path / "out")[str(i)]["status"] for i in range(7)] == [
        "ok", "ok", "skipped", "error", "error", "skipped", "error"
    ]  # fmt: skip
    assert "7 items: 2 ok, 2 skipped, 3 errors." in report
    assert f"- 1 skipped: {tokens.WRONG}" in report
    assert "- 1 skipped: the prompt has no token that may be deleted" in report
    assert "- 1 error: the line is not valid JSON" in report
    assert "the prompt's end and the answer's beginning form one token" in report
    assert "1 answers have several tokens" in report
    options = tokens.TokensOptions(data=source, keep_wrong=True, methods=FAST)
    kept = run(task, dp, options, tmp_path / "kept").read_text()
    assert "7 items: 3 ok, 1 skipped, 3 errors." in kept
    assert "1 prompts are included although the model's own" in kept


def test_what_is_left_can_be_encoded_anew_as_text(dp: DePass) -> None:
    parts = dp.tokenizer.encode("b cat!")
    (cat,) = dp.tokenizer.encode(" cat", add_special_tokens=False)
    split = (*dp.tokenizer.encode(" ca", add_special_tokens=False), *dp.tokenizer.encode("t", add_special_tokens=False))
    assert len(split) == 2
    assert tokens.encoded_anew(dp, pair([]), split) == (cat,)
    assert tokens.encoded_anew(dp, pair([]), tuple(parts)) == tuple(parts)
    with pytest.raises(OptionError, match="--retokenize needs a tokenizer"):
        tokens.encoded_anew(DePass(models.make("llama")), pair([]), split)


def test_no_prompt_left_makes_a_report_all_the_same(dp: DePass, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "data.jsonl", ["no row"])
    for name in ("tokens", "rules"):
        options = TASKS[name].Options(data=source)
        assert "No prompt was measured." in run(TASKS[name], dp, options, tmp_path / name).read_text()
    empty = tokens.TokensOptions(data=jsonl(tmp_path / "empty.jsonl", []))
    with pytest.raises(DataError, match="has no rows to measure"):
        run(TASKS["tokens"], dp, empty, tmp_path / "empty")


# Rules.


def test_every_rule_is_measured_and_adds_up(tmp_path: Path) -> None:
    dp = DePass(models.make("llama", torch.float64))
    task, source = TASKS["rules"], ids_data(tmp_path / "data.jsonl", 3)
    report = run(task, dp, rules.RulesOptions(data=source, keep_wrong=True), tmp_path / "out").read_text()
    rows = rows_of(tmp_path / "out")
    names = {variant.name for variant in rules.VARIANTS}
    assert len(names) == len(rules.VARIANTS) == 2 * len(rules.TEMPERATURES) + 13
    for name, row in rows.items():
        assert row["patch"].keys() == row["missed"].keys() == names
        assert max(row["missed"].values()) < 1e-6
        made = data.pair(dp, data.prompts(source, 0, None)[int(name)])
        for variant in (rules.Variant("relu", None, True), rules.Variant("softmax", 3.0, False)):
            found = dp.attribute(
                list(made.ids), made.answer[0], rule=variant.rule, temperature=variant.temperature,
                exclude_bos=variant.excluded,
            )  # fmt: skip
            gone = int(found.scores[0, :-1].argmax())
            left = [token for t, token in enumerate(made.ids) if t != gone]
            expected = float(next_tokens(dp, [left], [made.answer[0]])[0][0])
            assert row["patch"][variant.name][0] == pytest.approx(expected, rel=1e-4)
    assert report.count("| softmax |") == 2 * len(rules.TEMPERATURES)
    assert (tmp_path / "out" / "rules.png").read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_with_gim_of_a_model_that_takes_no_gradients_ends_at_once(tmp_path: Path) -> None:
    with torch.inference_mode():
        dp = DePass(models.make("llama"))
    options: dict[str, Any] = {"data": ids_data(tmp_path / "data.jsonl", 1), "keep_wrong": True}
    with pytest.raises(OptionError, match=r"gim: .*inference_mode.*; or leave out .*--methods.*: half.* gim"):
        run(TASKS["tokens"], dp, tokens.TokensOptions(**options), tmp_path / "out")
    run(TASKS["tokens"], dp, tokens.TokensOptions(**options, methods="random"), tmp_path / "others")
