"""What ``make gpu`` leaves however it ends: rows that were measured stay, and the table says what is there."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, stages
from benchmarks.__main__ import main as benchmarks
from benchmarks.machine import BenchmarkError, Machine
from benchmarks.ops import TORCH, Op, checked, prepare, row_of
from benchmarks.runner import Row

ROOT = Path(__file__).parents[2]
STAMP = {"machine": "here", "session": "s", "commit": "abc", "date": "2026-01-02T03:04:05"}
APPEND = "import sys; print('measured', flush=True); open({path!r}, 'a').write({line!r} + '\\n')"


def stage(name: str, code: str, seconds: float = 20) -> gpu.Stage:
    return gpu.Stage(name, seconds, [sys.executable, "-c", code])


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stages_run_in_turn_and_each_leaves_how_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    todo = [
        stage("good", "print('hello')"),
        stage("bad", "raise SystemExit(3)"),
        gpu.Stage("none", 9, ["no-such-tool"]),
    ]
    assert not gpu.drive(todo, rows, 60, STAMP)
    assert [(row["stage"], row["ended"]) for row in rows_of(rows)] == [
        ("good", 0), ("bad", 3), ("none", "no-such-tool is not on the PATH"),
    ]  # fmt: skip
    assert rows_of(rows)[0]["said"] == "hello\n"
    assert "hello" in capsys.readouterr().out
    assert gpu.drive(todo[:1], rows, 60, STAMP)


def test_a_stage_that_takes_too_long_ends_with_all_it_started_and_keeps_its_rows(tmp_path: Path) -> None:
    rows, pid = tmp_path / "rows.jsonl", tmp_path / "pid"
    started = (
        f"import subprocess, sys; p = subprocess.Popen(['sleep', '600']); open({str(pid)!r}, 'w').write(str(p.pid))"
    )
    measured = APPEND.format(path=str(rows), line='{"what": "failed", "item": "x", "reason": "y", "session": "s"}')
    todo = [stage("slow", f"{measured}; {started}; import time; time.sleep(600)", 4), stage("next", "pass")]
    begin = time.monotonic()
    gpu.drive(todo, rows, 60, STAMP)
    assert time.monotonic() - begin < 30
    assert [row.get("ended", row["what"]) for row in rows_of(rows)] == ["failed", "timeout", 0]
    child = Path(f"/proc/{pid.read_text()}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


SLOW_TESTS = """
import time

import pytest


@pytest.mark.parametrize("number", range(60))
def test_something(number: int) -> None:
    time.sleep(1)
    assert number != {wrong}
"""


@pytest.mark.parametrize(("wrong", "code"), [(-1, 0), (0, 1)])
def test_a_stage_of_several_processes_stops_at_its_deadline(tmp_path: Path, wrong: int, code: int) -> None:
    """With nothing failed it has succeeded; a test that was reached and failed still fails it."""
    (tmp_path / "test_slow.py").write_text(SLOW_TESTS.format(wrong=wrong))
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", str(tmp_path), f"--rootdir={tmp_path}", "-c", os.devnull, "-n", "2",
               "--deadline", "8" if wrong < 0 else "40", "-p", "no:cacheprovider"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}:{ROOT / 'tests/support'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    if code == 0:
        assert "reached" in done.stdout
        assert "60 passed" not in done.stdout


def test_what_finds_no_time_left_says_so(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    gpu.drive([stage("long", "import time; time.sleep(600)"), stage("late", "pass")], rows, 2.5, STAMP)
    assert [row["ended"] for row in rows_of(rows)] == ["timeout", "no time left"]


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGKILL])
def test_rows_are_there_and_the_report_reads_them_when_the_command_is_killed(tmp_path: Path, name: int) -> None:
    """In the middle of a stage that has measured something: SIGTERM still prints the table."""
    command = [sys.executable, "benchmarks/gpu.py", str(tmp_path), "--dry", "--seconds", "300"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, preexec_fn=os.setpgrp) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("mix_values "):  # the first op is measured, and the next one at work
                break
        process.send_signal(name)
        said = process.stdout.read() if name == signal.SIGTERM else ""
    assert process.returncode != 0
    (rows,) = tmp_path.glob("*.jsonl")
    assert [row["what"] for row in rows_of(rows)][:2] == ["stage", "op"]
    if name == signal.SIGTERM:
        assert "mix_values  tiny   triton" in said
    document = tmp_path / "page.md"
    document.write_text("<!-- begin ops -->\n<!-- end ops -->\n")
    arguments = ["report", str(document), "--results", str(rows), "--figures", str(tmp_path / "figures")]
    assert benchmarks(arguments) == 0
    assert "| mix_values | tiny, bfloat16, N=16 | triton |" in document.read_text()


def made(tmp_path: Path) -> stages.Stage:
    return stages.Stage(argparse.Namespace(dry=True, rows=tmp_path / "rows.jsonl", session="s", commit="abc"))


OP = {
    "what": "op", "op": "mix_values", "model": "tiny", "backend": "cpu", "seconds_p50": 1e-3, "share_of_copy": 0.5,
    "share_of_gemm": 0.25, "copy_bytes_per_second": 3e12, "gemm_operations_per_second": 7e14,
}  # fmt: skip


def good() -> Iterator[Row]:
    yield OP


def broken() -> Iterator[Row]:
    raise RuntimeError("an illegal memory access\nand more")
    yield {}


def test_what_an_item_raises_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    stage = made(tmp_path)
    assert stage.each([("a", good), ("b", broken), ("c", good)], 0) == 1
    found = rows_of(stage.rows)
    assert [row["what"] for row in found] == ["op", "failed", "op"]
    assert found[1]["reason"] == "RuntimeError: an illegal memory access\nand more"
    assert all(row["commit"] == "abc" and row["session"] == "s" for row in found)
    table = gpu.table(gpu.read(stage.rows, "s"))
    assert "a copy reached 3 TB/s, a square GEMM 700 TFLOP/s" in table
    assert "NOT measured: b: RuntimeError: an illegal memory access" in table


def test_a_broken_device_context_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call works after an illegal access: the items that are left go to a fresh process."""

    class Replaced(Exception):  # noqa: N818  # execv does not return
        pass

    def execv(program: str, arguments: list[str]) -> None:
        raise Replaced(arguments[-2:])

    stage = made(tmp_path)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(stages.Stage, "_device_works", lambda self: False)
    with pytest.raises(Replaced, match="--first', '2"):
        stage.each([("a", good), ("b", broken), ("c", good)], 0)
    assert [row["what"] for row in rows_of(stage.rows)] == ["op", "failed"]


def test_an_op_that_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_a_tenth(*given: Any) -> Op:
        call = prepare(*given)

        def wrong(backend: str) -> None:
            call.work(backend)
            if backend != "reference":
                call.written[0].mul_(1.1)

        return replace(call, work=wrong)

    monkeypatch.setattr(stages, "prepare", off_by_a_tenth)
    monkeypatch.setattr(stages, "OPS", ("copy", "mm_gate"))
    stage = made(tmp_path)
    assert stage.each(stages.ops(stage), 0) == 2
    assert ["differs from the reference" in row["reason"] for row in rows_of(stage.rows)] == [True, True]


SAID = """==PROF== Connected to process 12
measured
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","_mix_values","GPU Speed Of Light Throughput","DRAM Throughput","%","81.2"
"0","_mix_values","Launch Statistics","Registers Per Thread","register/thread","122"
"0","_mix_values","Occupancy","","",""
"""


def test_counters_are_read_from_what_ncu_writes() -> None:
    kernel, metrics = stages.of_ncu(SAID)
    assert kernel == "_mix_values"
    assert metrics == {"DRAM Throughput": "81.2 %", "Registers Per Thread": "122 register/thread"}
    with pytest.raises(BenchmarkError, match="ncu profiled no kernel: ==ERROR=="):
        stages.of_ncu("==ERROR== no permission")


def test_a_gpu_is_asked_for_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([str(tmp_path)]) == 2
    assert "torch sees no CUDA device here; `make bench` measures the CPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("op", ["copy", "mm_value", "mm_down"])
def test_the_librarys_calls_are_held_against_the_product_in_fp32(op: str) -> None:
    call = prepare(op, "tiny", "small", torch.float32, Machine("cpu"))
    assert checked(call, TORCH, torch.float32)
    row = row_of(op, "tiny", TORCH, torch.float32, "small", call, [1.0, 2.0, 3.0], (1e9, 1e12))
    assert (row["seconds_p50"], row["share_of_copy"]) == (2.0, call.bytes / 2e9)
