"""What the runner times and what it refuses, the rows on disk, the comparison and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.compare import compare
from benchmarks.machine import BenchmarkError, Machine
from benchmarks.registry import (
    GRAPHS,
    METHODS,
    OTHER_QUESTIONS,
    OURS,
    Case,
    Method,
    Outcome,
    Work,
    all_cases,
    count_rows,
    find,
    methods_of,
    random_model,
)
from benchmarks.runner import TOLERANCE, Options, Row, read, run
from depass import OptionError
from depass.checks import byte_count
from depass.device_memory import asked_bytes
from depass.files import append_row

CASE = Case("tokens", "tiny", "float32", "10")
QUICK = Options(runs=2, memory=False)
CPU = Machine("cpu")


def rows_of(methods: dict[str, Method], options: Options = QUICK, case: Case = CASE) -> dict[str, Row]:
    return {row["method"]: row for row in run(case, CPU, options, methods)}


def altered(method: Method, change: Callable[[Outcome], Outcome], calls: list[int] | None = None) -> Method:
    def prepare(model: Any, case: Case, backend: str) -> Work:
        work = method(model, case, backend)

        def broken() -> Outcome:
            if calls is not None:
                calls.append(1)
            return change(work())

        return broken

    return prepare


def test_every_question_is_answered_alike_by_those_that_compute_the_same() -> None:
    for name in (
        "tokens/tiny/float32/10",
        "heads/tiny/float32/10",
        "neurons/tiny/float32/10",
        "prompts/tiny/float32/8",
    ):
        (case,) = find([name])
        wanted = {method: made for method, made in methods_of(case, "cpu").items() if method != "compiled"}
        for row in rows_of(wanted, Options(runs=1, memory=False), case).values():
            assert row["status"] == "ok", row
            assert row["seconds_p20"] <= row["seconds_p50"] <= row["seconds_p80"]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_method_that_is_compared_has_a_tolerance(dtype: str) -> None:
    """Also those that only a GPU has."""
    compared = {name for methods in METHODS.values() for name in methods} - {OURS, *OTHER_QUESTIONS}
    assert compared <= TOLERANCE[dtype].keys()


def test_a_row_says_what_was_measured() -> None:
    rows = rows_of({name: METHODS["tokens"][name] for name in (OURS, "naive")})
    ours = rows[OURS]
    assert ours["rows"] == 55
    assert ours["runs"] == len(ours["seconds"]) == len(ours["floor_seconds_all"]) == 2
    assert ours["conservation_error"] < 1e-4
    assert set(ours["backends"]) >= {"mix_values", "share_hidden"}
    assert ours["tokens_per_second"] == pytest.approx(10 / ours["seconds_p50"])
    assert rows["naive"]["difference"] < 1e-3


def test_rows_are_those_of_the_layouts() -> None:
    config = random_model("tiny", "float32", "cpu").config
    tokens = count_rows(CASE, config)  # the last layer's only at the last position
    assert (tokens.state, tokens.value, tokens.output, tokens.mlp) == (55, 55 * 3, 55 * 2 + 10, 55 * 2 + 10)
    heads = count_rows(Case("heads", "tiny", "float32", "10"), config)  # a layer's skip what lies before it
    assert (heads.state, heads.value, heads.output, heads.mlp) == (150, 150, 50 + 2 * 5, 50 + 100 + 3 * 5)
    spans = Case("spans", "tiny", "float32", "512x16")
    assert count_rows(spans, config).state == sum(512 - 32 * i for i in range(16))


def test_a_case_that_is_wrong_is_not_timed() -> None:
    calls: list[int] = []
    half = altered(
        METHODS["tokens"][OURS], lambda o: Outcome(o.scores.flip(0), o.conservation_error, o.backends), calls
    )
    rows = rows_of({OURS: half, "eager": METHODS["tokens"]["eager"]})
    assert rows[OURS]["status"] == rows["eager"]["status"] == "refused"
    assert "differ from those of eager" in rows[OURS]["reason"]
    assert "seconds" not in rows[OURS]
    assert "seconds" not in rows["eager"]
    assert len(calls) == 1  # the one that was checked


def test_scores_that_do_not_add_up_are_not_timed() -> None:
    leaky = altered(METHODS["tokens"][OURS], lambda o: Outcome(o.scores, 0.1, o.backends))
    rows = rows_of({OURS: leaky})
    assert rows[OURS]["status"] == "refused"
    assert "conservation error is 0.1, allowed 1e-04" in rows[OURS]["reason"]


@pytest.mark.parametrize("change", [lambda s: 1.01 * s, lambda s: s * torch.nan, torch.zeros_like])
def test_a_rival_that_is_wrong_is_refused_by_itself(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    rows = rows_of(
        {OURS: METHODS["tokens"][OURS], "naive": METHODS["tokens"]["naive"],
         "compiled": altered(METHODS["tokens"]["eager"], lambda o: Outcome(change(o.scores)))}
    )  # fmt: skip
    assert {name: row["status"] for name, row in rows.items()} == {OURS: "ok", "naive": "ok", "compiled": "refused"}


def too_large(message: str) -> Method:
    def work() -> Outcome:
        raise torch.OutOfMemoryError(message)

    return lambda model, case, backend: work


def test_an_out_of_memory_is_a_row_with_what_was_asked_for() -> None:
    said = "CUDA out of memory. Tried to allocate 64.50 GiB. GPU 0 has a total capacity of 79.19 GiB"
    rows = rows_of({OURS: METHODS["tokens"][OURS], "naive": too_large(said)})
    assert rows["naive"]["status"] == "oom"
    assert rows["naive"]["asked_bytes"] == int(64.5 * 2**30)
    assert rows[OURS]["status"] == "ok"


def test_the_cpus_own_out_of_memory_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert asked_bytes(caught.value) == 1 << 60
    assert asked_bytes(RuntimeError("shapes do not match")) is None
    assert asked_bytes(torch.OutOfMemoryError("CUDA out of memory.")) == 0
    assert asked_bytes(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")) == 0


def test_what_raises_is_a_row_and_the_others_go_on() -> None:
    def broken(model: Any, case: Case, backend: str) -> Work:
        raise ValueError("no compiler here")

    rows = rows_of({OURS: METHODS["tokens"][OURS], "compiled": broken})
    assert rows["compiled"]["status"] == "failed"
    assert "no compiler here" in rows["compiled"]["reason"]
    assert rows[OURS]["status"] == "ok"


def test_what_is_asked_of_which_device() -> None:
    short, long = find(["tokens/smollm2/float32/32,64"])
    assert GRAPHS in methods_of(short, "cuda")
    assert GRAPHS not in methods_of(long, "cuda")  # too long to be recorded
    assert GRAPHS not in methods_of(short, "cpu")
    (on_host,) = find(["tokens/tiny@host/bfloat16/10"])  # ours alone, with weights that come layer by layer
    assert list(methods_of(on_host, "cuda")) == [OURS]
    (row,) = rows_of(methods_of(on_host, "cpu"), Options(runs=1, memory=False), on_host).values()
    assert row["status"] == "ok", row


def test_a_run_that_is_too_long_is_checked_and_timed_at_once() -> None:
    calls: list[int] = []

    def counted(model: Any, case: Case, backend: str) -> Work:
        work = METHODS["tokens"]["naive"](model, case, backend)

        def slow() -> Outcome:
            calls.append(1)
            return work()

        return slow

    rows = rows_of(
        {OURS: METHODS["tokens"][OURS], "naive": counted}, Options(runs=5, budget_seconds=1e-6, memory=False)
    )
    assert len(calls) == 1
    assert rows["naive"]["status"] == "ok"
    assert rows["naive"]["runs"] == 1
    assert rows["naive"]["share_of_floor"] > 0


def test_a_slow_method_stops_at_its_budget_and_has_one_run_at_least() -> None:
    rows = rows_of({OURS: METHODS["tokens"][OURS]}, Options(runs=5, budget_seconds=0.0, memory=False))
    assert rows[OURS]["runs"] == 1


def endless(model: Any, case: Case, backend: str) -> Work:
    def work() -> Outcome:
        while True:
            torch.ones(10).sum()

    return work


def test_what_takes_too_long_is_stopped_and_the_others_go_on() -> None:
    rows = rows_of(
        {OURS: METHODS["tokens"][OURS], "naive": endless, "eager": METHODS["tokens"]["eager"]},
        Options(runs=1, limit_seconds=0.5, memory=False),
    )
    assert {name: row["status"] for name, row in rows.items()} == {OURS: "ok", "naive": "stopped", "eager": "ok"}
    assert 0.5 <= rows["naive"]["seconds_at_least"] < 5
    assert "seconds" not in rows["naive"]


def test_the_process_that_measures_memory_is_stopped_as_well_and_the_method_not_tried_again() -> None:
    calls: list[int] = []
    naive = altered(METHODS["tokens"]["naive"], lambda o: o, calls)
    rows = rows_of(
        {OURS: METHODS["tokens"][OURS], "naive": naive}, Options(methods=("naive",), runs=1, limit_seconds=1e-4)
    )
    assert rows["naive"]["status"] == "stopped", rows["naive"]
    assert 1e-4 <= rows["naive"]["seconds_at_least"] < 5
    assert not calls


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "memory", CASE.name, "integrated_gradients_50"], cwd=root, text=True,
        capture_output=True, check=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    row = json.loads(done.stdout)
    assert row["status"] == "ok"
    assert 0 <= row["beyond_plain_bytes"] < row["peak_bytes"]


# Rows on disk.


def test_rows_are_appended_as_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "results" / "here.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_row(path, {"i": i, "text": "é" * 5000}), range(40)))
    assert sorted(row["i"] for row in read([path])) == list(range(40))


def test_a_row_behind_a_torn_line_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"i": 0}\n{"i":')
    append_row(path, {"i": 1})
    assert path.read_text().splitlines()[-1] == '{"i": 1}'
    with pytest.raises(BenchmarkError, match="line 2 is not a valid row"):
        read([path])


def test_no_rows_is_said(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="no rows in benchmarks/results; make some"):
        read([])
    with pytest.raises(BenchmarkError, match="cannot read"):
        read([tmp_path / "none.jsonl"])


# Comparison.


def timed(commit: str, seconds: list[float], **more: Any) -> Row:
    return {
        "machine": "here",
        "case": CASE.name,
        "method": OURS,
        "status": "ok",
        "commit": commit,
        "seconds": seconds,
        **more,
    }


QUIET = [1.0, 1.01, 0.99, 1.02, 1.0]


@pytest.mark.parametrize(("factor", "verdict"), [(2.0, "SLOWER"), (0.5, "faster"), (1.015, "same"), (0.99, "same")])
def test_compare_flags_changes_and_not_noise(factor: float, verdict: str) -> None:
    (change,) = compare([timed("aaa", QUIET), timed("bbb", [factor * s for s in QUIET])], "aaa", "bbb")
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(factor)


def test_compare_knows_noisy_runs_and_a_slower_machine() -> None:
    noisy = [1.0, 1.5, 0.8, 1.9, 1.2]
    (change,) = compare([timed("aaa", noisy), timed("bbb", [1.2 * s for s in noisy])], "aaa")
    assert change.verdict == "same"
    slow = [timed("aaa", QUIET, floor_seconds=0.5), timed("bbb", [1.3 * s for s in QUIET], floor_seconds=0.65)]
    (change,) = compare(slow, "aaa")
    assert change.verdict == "same"


def test_compare_does_not_judge_single_runs_nor_other_machines() -> None:
    (change,) = compare([timed("aaa", [1.0]), timed("bbb", [2.0])], "aaa")
    assert change.verdict.startswith("not judged")
    with pytest.raises(BenchmarkError, match="no case in common"):
        compare([timed("aaa", QUIET), timed("bbb", QUIET, machine="there")], "aaa")
    with pytest.raises(BenchmarkError, match="no timed rows of commit 'ccc'; there are rows of aaa"):
        compare([timed("aaa", QUIET)], "ccc")


# The command.


def test_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [case.name for case in all_cases()]
    assert main(["list", "tokens/smollm2/float32/10,256"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_run_appends_rows_that_compare_finds_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    arguments = ["run", CASE.name, "--methods", OURS, "--runs", "3", "--no-memory", "--device", "cpu"]
    assert main([*arguments, "--results", str(path), "--commit", "aaa"]) == 0
    (row,) = read([path])
    assert row["commit"] == "aaa"
    assert {"torch", "transformers", "gpu", "driver", "cpu", "threads", "date", "machine"} <= set(row)
    append_row(path, {**row, "commit": "bbb", "seconds": [3 * max(row["seconds"])] * 3})
    capsys.readouterr()
    assert main(["compare", "aaa", "bbb", "--results", str(path)]) == 1
    assert "SLOWER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "tokens/tiny/float32/11"], "no case is named 'tokens/tiny/float32/11'"),
        (["run", "tokens/gpt-9/float32/10"], "unknown model 'gpt-9'; choose from smollm2"),
        (["run", CASE.name, "--methods", "magic"], "unknown method 'magic'; these cases have: ablation"),
        (["run", CASE.name, "--runs", "0"], "--runs 0: must be at least 1"),
        (["run", CASE.name, "--limit", "0"], "--limit 0: must be a positive number of seconds"),
        (["run", CASE.name, "--limit", "nan"], "--limit nan: must be a positive number of seconds"),
        (["run", CASE.name, "--device", "cpu", "--memory-limit", "48GB"], "caps the CUDA allocator"),
        (["memory", CASE.name, "magic"], "unknown method 'magic'"),
    ],
)
def test_errors_say_what_is_there(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_sizes_are_read() -> None:
    assert (byte_count("48GB"), byte_count("1.5 MiB"), byte_count("512")) == (48 * 10**9, 3 << 19, 512)
    for wrong in ("many", "-1GB", "0GB", "3XB"):
        with pytest.raises(OptionError):
            byte_count(wrong)
