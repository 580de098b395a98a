"""The stages that ``benchmarks/gpu.py`` runs, each in a process of its own: ``python -m benchmarks.stages STAGE``.

A stage is a list of items, the most important first. A row is written as soon as it is measured. An error of an item becomes
a row too, and the next items follow; if the error broke the CUDA context, they run in a new process.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from depass.errors import ConservationWarning
from depass.files import append_row
from depass_kernels import backends

from .machine import ROOT, BenchmarkError, Machine, commit
from .ops import GROUPED, LIBRARY, TORCH, checked, missing, prepare, row_of
from .registry import GRAPHS, METHODS, OURS, Case, random_model
from .runner import Options, Row, line, run

# The most important first.
OPS = ("normed", "mix_values", "share_hidden", *GROUPED, *LIBRARY, "residual_update", "taylor")
OP_MODELS = ("llama-2-7b", "llama-3.1-8b", "smollm2-135m")
MODEL = "llama-2-7b"
CASES = ("tokens/128", "tokens/10", "tokens/64", "prompts/64", "tokens/256", "heads/16", "tokens/512")
PROFILED = ("tokens/128", "prompts/64", "heads/16")
RIVALS = ("naive", "eager")
DRY_MODEL, DRY_CASES, DRY_PROFILED = "tiny", ("tokens/10", "prompts/8", "heads/10"), ("tokens/10",)
COUNTED = ("mix_values", "share_hidden")
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")  # of ncu: every version has them
KERNELS = 30  # kernels that the row of a profile keeps

Item = tuple[str, Callable[[], Iterator[Row]]]


class Stage:
    """A stage's file of rows, and the fields that describe this machine."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.dry: bool = options.dry
        self.machine = look(self.dry)
        self.rows: Path = options.rows
        self.stamp = {
            **described(self.machine, options.commit),
            "session": options.session,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def write(self, row: Row) -> None:
        append_row(self.rows, {**row, **self.stamp})

    def each(self, items: Sequence[Item], first: int) -> int:
        """Run the items from number ``first`` on; returns how many failed."""
        failed = 0
        for index, (name, work) in enumerate(items[first:], first):
            try:
                for row in work():
                    self.write(row)
                    print(line(row), flush=True)
                    failed += row.get("status", "ok") in ("refused", "failed")
            except Exception as error:  # an error of one item must not end the other measurements
                failed += 1
                reason = f"{type(error).__name__}: {error}"
                self.write({"what": "failed", "item": name, "reason": reason[:2000]})
                print(f"{name}: {reason.splitlines()[0]}", flush=True)
                error.__traceback__ = None  # its frames hold tensors
                if not self._device_works():
                    again = [sys.executable, "-m", "benchmarks.stages", *sys.argv[1:], "--first", str(index + 1)]
                    os.execv(sys.executable, again)
        return failed

    def _device_works(self) -> bool:
        try:
            torch.ones(1, device=self.machine.device).sum().item()
            self.machine.synchronize()
        except RuntimeError:
            return False
        return True


def look(dry: bool) -> Machine:
    if not dry and not torch.cuda.is_available():
        raise BenchmarkError(
            "torch sees no CUDA device here; `make bench` measures the CPU, and DRY=1 tests this command on the CPU"
        )
    return Machine("cpu" if dry else "cuda")


def described(machine: Machine, code: str | None) -> dict[str, Any]:
    return {**commit(code), **machine.describe()}


# Ops.


def ops(stage: Stage) -> list[Item]:
    """Check each op once on Triton and on the compiled kernels, and time it; also time the library's products and a copy."""
    machine = stage.machine
    compiled = "cpu" if stage.dry else "cuda"
    size, models = ("small", ("tiny",)) if stage.dry else ("full", OP_MODELS)
    dtype = torch.bfloat16
    rates: list[tuple[float, float]] = []

    def measured(op: str, model: str, backend: str) -> Iterator[Row]:
        if not rates:
            small = (1 << 24, 256) if stage.dry else (None, None)
            rates.append((machine.copy_bandwidth(small[0]), machine.gemm_rate(dtype, small[1])))
        if (reason := missing(op, backend)) is not None:
            raise BenchmarkError(reason)
        call = prepare(op, model, size, dtype, machine)
        if not checked(call, backend, dtype):
            raise BenchmarkError("differs from the reference: not timed")
        seconds = machine.seconds_each(lambda: call.work(backend), runs=2 if stage.dry else 7)
        yield row_of(op, model, backend, dtype, size, call, seconds, rates[0])

    def backends_of(op: str) -> tuple[str, ...]:
        if op in LIBRARY:
            return (TORCH,)
        if op in GROUPED:
            return ("triton", "reference")
        wanted = ("triton", compiled)
        return tuple(
            name for name in wanted if name != compiled or op in ("normed", "mix_values", "share_hidden", "taylor")
        )

    return [
        (f"{op} of {model} on {backend}", partial(measured, op, model, backend))
        for model in models
        for op in OPS
        for backend in backends_of(op)
        if not (stage.dry and op in LIBRARY and "fp32" in op)  # a CPU's products have no out_dtype
    ]


# DePass on one model.


class Model:
    """A model with random weights, created at the first call."""

    def __init__(self, stage: Stage) -> None:
        self.shape, self.device = DRY_MODEL if stage.dry else MODEL, stage.machine.device
        self._model: Any = None

    def __call__(self) -> Any:
        if self._model is None:
            self._model = random_model(self.shape, "bfloat16", self.device)
        return self._model

    def case(self, name: str) -> Case:
        question, size = name.split("/")
        return Case(question, self.shape, "bfloat16", size)


def ours(stage: Stage) -> list[Item]:
    """DePass on one 7B model at many sizes, short ones with CUDA graphs, too; then a profile of some of these cases."""
    model = Model(stage)
    options = Options(methods=(OURS, GRAPHS), runs=5, budget_seconds=6, limit_seconds=45, memory=not stage.dry)

    def measured(case: Case) -> Iterator[Row]:
        yield from run(case, stage.machine, options, model=model())

    def profiled(case: Case) -> Iterator[Row]:
        work = METHODS[case.question][OURS](model(), case, "auto")
        work()
        yield profile(case, work, stage.machine)

    cases, tables = (DRY_CASES, DRY_PROFILED) if stage.dry else (CASES, PROFILED)
    return [
        *((name, partial(measured, model.case(name))) for name in cases),
        *((f"profile of {name}", partial(profiled, model.case(name))) for name in tables),
    ]


def profile(case: Case, work: Callable[[], object], machine: Machine) -> Row:
    """The kernels of one run by their time on the device, and the time of the whole run."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if machine.device == "cuda" else [])
    with profile(activities=activities) as profiler:
        seconds = machine.seconds(work)
    averages = profiler.key_averages()
    if machine.device == "cuda":
        kernels = [event for event in averages if event.device_type == torch.autograd.DeviceType.CUDA]
        took = [(event.key, event.count, event.self_device_time_total) for event in kernels]
    else:
        took = [(event.key, event.count, event.self_cpu_time_total) for event in averages]
    took.sort(key=lambda kernel: -kernel[2])
    return {
        "what": "profile", "case": case.name, "seconds": seconds, "launches": sum(count for _, count, _ in took),
        "busy_seconds": sum(micro for _, _, micro in took) / 1e6,
        "kernels": [{"name": name[:120], "calls": count, "seconds": micro / 1e6} for name, count, micro in took[:KERNELS]],
    }  # fmt: skip


# Rivals.


def rivals(stage: Stage) -> list[Item]:
    """DePass and one rival in turn at 128 tokens, for each rival."""
    model = Model(stage)
    case = model.case("tokens/10" if stage.dry else "tokens/128")

    def measured(rival: str) -> Iterator[Row]:
        options = Options(methods=(OURS, rival), runs=3, budget_seconds=15, limit_seconds=40, memory=not stage.dry)
        yield from run(case, stage.machine, options, model=model())

    return [(f"{rival} at {case.name}", partial(measured, rival)) for rival in RIVALS]


# Hardware counters.


def counters(stage: Stage) -> list[Item]:
    """The counters that ncu reads for one ``mix_values`` and one ``share_hidden``."""

    def counted(op: str) -> Iterator[Row]:
        tool = [sys.executable, "benchmarks/gpu.py", "stand-in-for-ncu"] if stage.dry else ["ncu"]
        sections = [word for section in SECTIONS for word in ("--section", section)]
        command = [
            *tool, "--csv", "--page", "details", *sections, "--clock-control", "none",  # the card's clocks stay as they are
            "--kernel-name", f"regex:_{op}", "--launch-skip", "2", "--launch-count", "1",
            sys.executable, "-m", "benchmarks.stages", "one", "--op", op, *(["--dry"] if stage.dry else []),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=40)
        except FileNotFoundError as error:
            raise BenchmarkError("ncu is not on the PATH") from error
        if done.returncode != 0:
            raise BenchmarkError(f"ncu ended with exit code {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
        kernel, metrics = of_ncu(done.stdout)
        yield {"what": "counters", "op": op, "model": OP_MODELS[0], "kernel": kernel, "metrics": metrics}

    return [(f"counters of {op}", partial(counted, op)) for op in COUNTED]


def of_ncu(said: str) -> tuple[str, dict[str, str]]:
    """The kernel and ``{metric: value and unit}``, from ncu's CSV output.

    Raises:
        BenchmarkError: ncu profiled no kernel.
    """
    lines = said.splitlines()
    begin = next((index for index, text in enumerate(lines) if text.startswith('"ID"')), None)
    rows = [] if begin is None else list(csv.DictReader(io.StringIO("\n".join(lines[begin:]))))
    if not rows:
        raise BenchmarkError(f"ncu profiled no kernel: {said[-300:]}")
    metrics = {
        row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".strip() for row in rows if row["Metric Name"]
    }
    return rows[0]["Kernel Name"], metrics


def one(op: str, dry: bool) -> None:
    """Run an op on Triton a few times, for ncu to profile."""
    machine = look(dry)
    call = prepare(op, DRY_MODEL if dry else OP_MODELS[0], "small" if dry else "full", torch.bfloat16, machine)
    for _ in range(4):
        call.work("reference" if dry else "triton")
    machine.synchronize()


STAGES: dict[str, Callable[[Stage], list[Item]]] = {"ops": ops, "ours": ours, "counters": counters, "rivals": rivals}


def main(arguments: Sequence[str]) -> int:
    """Run a stage. Returns 0: everything was measured; 1: something failed; 2: the stage could not start."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stage", choices=(*STAGES, "look", "one"),
        help="look prints this machine's description; one runs a single op for ncu; the others measure",
    )  # fmt: skip
    parser.add_argument("--rows", type=Path, metavar="FILE", help="file to append the rows to")
    parser.add_argument("--session", default="", help="id that all rows of one run share")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first item (default: 0)")
    parser.add_argument("--op", choices=COUNTED, help="the op of the stage `one`")
    parser.add_argument("--dry", action="store_true", help="run on the CPU, with tiny shapes")
    parser.add_argument("--commit", help="commit of the code, if this is not a git checkout")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", ConservationWarning)  # the check refuses such a result
    try:
        if options.stage == "look":
            print(json.dumps(described(look(options.dry), options.commit)))
            return 0
        if options.stage == "one":
            one(options.op, options.dry)
            return 0
        stage = Stage(options)
        print(f"{stage.stamp['machine']}: torch {torch.__version__}; csrc: {backends.build_info()}", flush=True)
        return 1 if stage.each(STAGES[options.stage](stage), options.first) else 0
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
