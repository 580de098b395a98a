"""Runs every measurement and test that needs a GPU, within a given time: ``make gpu OUT=directory``.

    python benchmarks/gpu.py FOLDER [--seconds 540] [--dry] [--large] [--commit COMMIT]

Each stage runs in a process of its own; the most important ones come first. Rows are written to FOLDER/MACHINE.jsonl as
soon as they are measured, so a run that is cut short keeps its results. A stage that takes too long is stopped. At the end
a table of the results is printed. Nothing is installed; csrc is built in place.

--dry runs every stage on the CPU: tiny shapes, Triton's interpreter, and stand-ins for the tools that need a GPU.
--large runs longer measurements instead: larger models, 2048 tokens under 48 GB, a thousand prompts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from depass.files import append_row  # noqa: E402  # loads no torch, so this process holds no GPU

KERNEL_TESTS = [
    f"tests/depass_kernels/test_{op}.py"
    for op in ("normed", "mix_values", "share_hidden", "residual_update", "grouped")
]
MOST_WORKERS = 12  # each holds a CUDA context
MODEL_TESTS = [
    f"tests/depass/test_{what}.py"
    for what in ("served", "oracle", "conservation", "graphs", "batches", "streaming", "linear")
]
LARGE = (
    ("tokens/llama-2-7b/bfloat16/1024", 60), ("tokens/llama-3.1-8b/bfloat16/10,64,128,256,512", 90),
    ("tokens/llama-2-7b@host/bfloat16/2048", 280), ("tokens/llama-2-13b/bfloat16/128,256", 90),
    ("prompts/llama-2-7b/bfloat16/1000", 60), ("spans/llama-2-7b/bfloat16/8192x64", 60),
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One process. It may take ``seconds``, or less if less time is left."""

    name: str
    seconds: float
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


def stages(rows: Path, session: str, dry: bool, large: bool, commit: str | None) -> list[Stage]:
    """The stages, the most important first."""
    python = sys.executable
    common = ["--rows", str(rows), "--session", session, *(["--dry"] if dry else [])]
    of_code = ["--commit", commit] if commit else []
    common += of_code
    interpreted = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry else {}
    device = "cpu" if dry else "cuda"

    def measured(name: str, seconds: float, **environment: str) -> Stage:
        return Stage(name, seconds, [python, "-m", "benchmarks.stages", name, *common], environment)

    def tested(name: str, seconds: float, files: Sequence[str], *options: str, **environment: str) -> Stage:
        # at the deadline pytest stops by itself and says what failed; a process counts from when it has begun
        seconds, deadline = (45, 10) if dry else (seconds, seconds - 30)
        command = [
            python,
            "-m",
            "pytest",
            *files,
            "--device",
            device,
            "--deadline",
            str(deadline),
            "--tb=short",
            *options,
        ]
        if not dry and importlib.util.find_spec("xdist"):  # most of a test's time is the host's, or a compiler's
            command += [f"--numprocesses={min(MOST_WORKERS, os.cpu_count() or 1)}", "--dist=worksteal"]
        return Stage(name, seconds, command, {"DEPASS_TEST_EXAMPLES": "5", "OMP_NUM_THREADS": "1", **environment})

    build = {"DEPASS_BUILD_CPU": "1", **({} if dry else {"DEPASS_BUILD_CUDA": "1"})}
    built = Stage("build", 90, [python, "setup.py", "-q", "build_ext", "--inplace"], build)
    if large:
        cap = [] if dry else ["--memory-limit", "48GB"]
        run = [python, "-m", "benchmarks", "run", "--methods", "depass", "--runs", "5", "--budget", "20", *cap]
        cases = (("tokens/tiny/float32/16", 60),) if dry else LARGE
        return [
            built,
            *(Stage(name, limit, [*run, name, "--results", str(rows), "--session", session]) for name, limit in cases),
            Stage("racecheck", 100, sanitizer("racecheck", dry)),
        ]
    return [
        built,
        measured("ops", 75, **interpreted),
        measured("ours", 150),
        measured("counters", 60),
        measured("rivals", 70),
        linear_rules(rows, dry, of_code),
        Stage("memcheck", 70, sanitizer("memcheck", dry)),
        tested("tests of the compiled kernels", 50, KERNEL_TESTS, "-k", "cpu" if dry else "cuda"),
        tested("tests of the Triton kernels", 80, KERNEL_TESTS, "-k", "triton", **interpreted),
        tested("tests through whole models", 120, MODEL_TESTS),
    ]


def linear_rules(rows: Path, dry: bool, of_code: Sequence[str]) -> Stage:
    """The linear rules beside a plain pass, into a file of their own."""
    of = "--device cpu --model tiny --dtype float32 --lengths 10 12 --runs 1"
    of = of if dry else "--device cuda --model llama-2-7b --dtype bfloat16 --lengths 10 128 512 2048 --runs 3"
    command = [sys.executable, "-m", "benchmarks.linear", *of.split(), "--folder", str(rows.parent), *of_code]
    return Stage("linear rules", 80, command)


def sanitizer(tool: str, dry: bool) -> list[str]:
    watched = [sys.executable, "benchmarks/memcheck.py", "cpu" if dry else "cuda"]
    if dry:
        return watched
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *watched]


@dataclass
class Ended:
    """How a stage ended: its exit code, ``timeout``, ``no time left``, or why it did not start."""

    how: int | str
    seconds: float
    said: str


def run(stage: Stage, seconds: float) -> Ended:
    """Run a stage for at most so many seconds, and print its output line by line. Processes that it starts end with it."""
    begin = time.monotonic()
    if shutil.which(stage.command[0]) is None:
        return Ended(f"{stage.command[0]} is not on the PATH", 0.0, "")
    environment = {**os.environ, "PYTHONPATH": "python:.", "PYTHONUNBUFFERED": "1", **stage.environment}
    lines: list[str] = []
    with _process_group(stage.command, environment) as process:

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                print(line, end="", flush=True)

        reader = threading.Thread(target=listen, daemon=True)
        reader.start()
        try:
            how: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            how = "timeout"
            os.killpg(process.pid, signal.SIGKILL)  # with its workers and watched programs
        reader.join(5)
    return Ended(how, round(time.monotonic() - begin, 1), "".join(lines)[-4000:])


@contextlib.contextmanager
def _process_group(command: Sequence[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that ends, with everything that it started, when this process ends (unless SIGKILL ends it)."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace", preexec_fn=os.setpgrp,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def drive(todo: Sequence[Stage], rows: Path, seconds: float, stamp: dict[str, Any]) -> bool:
    """Run the stages one after the other within so many seconds, and write a row for each. True if all succeeded."""
    deadline = time.monotonic() + seconds
    well = True
    for stage in todo:
        left = deadline - time.monotonic()
        print(f"\n== {stage.name}: at most {min(stage.seconds, max(0.0, left)):.0f} s", flush=True)
        ended = run(stage, min(stage.seconds, left)) if left > 1 else Ended("no time left", 0.0, "")
        row = {"what": "stage", "stage": stage.name, "ended": ended.how, "seconds": ended.seconds, "said": ended.said}
        append_row(rows, {**row, **stamp})
        print(f"== {stage.name}: {ended.how} after {ended.seconds} s", flush=True)
        well = well and ended.how == 0
    return well


# The table of results.


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of one session as text: stages, cases compared with their floor, ops compared with a copy and a GEMM."""
    parts: list[str] = []
    of = {kind: [row for row in rows if row["what"] == kind] for kind in ("stage", "case", "op", "failed", "counters")}
    if of["stage"]:
        parts.append(
            _lines(["stage", "ended", "seconds"], [[r["stage"], r["ended"], r["seconds"]] for r in of["stage"]])
        )
    if of["case"]:
        head = ["case", "method", "p50", "floor, same process", "floor / p50", "memory", "conservation error", "status"]
        parts.append(_lines(head, [_case(row) for row in of["case"]]))
    if of["op"]:
        copy, gemm = of["op"][-1]["copy_bytes_per_second"], of["op"][-1]["gemm_operations_per_second"]
        parts.append(f"a copy reached {copy / 1e12:.3g} TB/s, a square GEMM {gemm / 1e12:.4g} TFLOP/s")
        head = ["op", "model", "backend", "p50", "% of the copy's rate", "% of the GEMM's rate"]
        lines = [[r["op"], r["model"], r["backend"], _ms(r["seconds_p50"]), f"{r['share_of_copy']:.0%}",
                  f"{r['share_of_gemm']:.0%}"] for r in of["op"]]  # fmt: skip
        parts.append(_lines(head, lines))
    parts += [f"{row['op']} in ncu: {row['kernel']}, {row['metrics']}" for row in of["counters"]]
    parts += [f"NOT measured: {row['item']}: {row['reason'].splitlines()[0][:200]}" for row in of["failed"]]
    return "\n\n".join(parts) or "nothing was measured"


def _case(row: dict[str, Any]) -> list[str]:
    begin = [row["case"], row["method"]]
    if row["status"] != "ok":
        return [*begin, "", "", "", "", "", f"{row['status']}: {row.get('reason', '')[:120]}"]
    floor = _ms(row["floor_seconds"]) if "floor_seconds" in row else ""
    share = f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else ""
    memory = f"{row['beyond_plain_bytes'] / 1e6:.0f} MB" if "beyond_plain_bytes" in row else ""
    missed = f"{row['conservation_error']:.0e}" if "conservation_error" in row else ""
    return [*begin, _ms(row["seconds_p50"]), floor, share, memory, missed, "ok"]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def _lines(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def read(path: Path, session: str) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the line that a killed process left half written
            rows.append(json.loads(line))
    return [row for row in rows if row.get("session") == session]


def stand_in_for_ncu(arguments: Sequence[str]) -> int:
    """Run the command that ncu would run, and print output of ncu's form. This tests the stage without ncu."""
    process = subprocess.run(arguments[arguments.index(sys.executable) :], cwd=ROOT, check=False)
    kernel = arguments[arguments.index("--kernel-name") + 1].removeprefix("regex:")
    print('==PROF== Connected\n"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"')
    print(f'"0","{kernel}","GPU Speed Of Light Throughput","Duration","us","1,234.5"')
    print(f'"0","{kernel}","Launch Statistics","Registers Per Thread","register/thread","122"')
    return process.returncode


def main(arguments: Sequence[str]) -> int:
    """Run the stages. Returns 0: all succeeded; 1: some failed, and their rows say why; 2: the run could not start."""
    if arguments[:1] == ["stand-in-for-ncu"]:
        return stand_in_for_ncu(arguments[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="directory for the rows")
    parser.add_argument(
        "--seconds", type=float, default=540, help="time for all stages together (default: %(default)s)"
    )
    parser.add_argument("--dry", action="store_true", help="run every stage on the CPU, with tiny shapes")
    parser.add_argument("--large", action="store_true", help="run the longer measurements instead")
    parser.add_argument("--commit", help="commit of the code, if this is not a git checkout")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"--seconds {options.seconds:g}: must be a positive number")
    begin = time.monotonic()
    session = uuid.uuid4().hex[:12]
    of_code = ["--commit", options.commit] if options.commit else []
    look = [sys.executable, "-m", "benchmarks.stages", "look", *(["--dry"] if options.dry else []), *of_code]
    looked = subprocess.run(
        look, cwd=ROOT, env={**os.environ, "PYTHONPATH": "python:."}, capture_output=True, text=True, check=False
    )
    if looked.returncode != 0:
        print(looked.stderr.strip() or f"{' '.join(look)} ended with exit code {looked.returncode}", file=sys.stderr)
        return 2
    stamp = {**json.loads(looked.stdout), "session": session, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    rows = options.folder.resolve() / f"{stamp['machine']}.jsonl"
    for name in (signal.SIGTERM, signal.SIGHUP):  # end the running stage, and print the table
        signal.signal(name, lambda *_: sys.exit(1))
    todo = stages(rows, session, options.dry, options.large, options.commit)
    try:
        well = drive(todo, rows, options.seconds - (time.monotonic() - begin), stamp)
    finally:
        print(f"\n{table(read(rows, session))}\n\nrows in {rows}", flush=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
