"""Runs a case: checks everything first, then times it in turn, and makes a row of results of each method."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depass.device_memory import asked_bytes
from depass.errors import DePassError
from depass.models.bind import bind
from depass_kernels.reference import library_adds_to_fp32

from .machine import ROOT, BenchmarkError, Machine, StoppedError, limit_to_what_is_free, limited, percentile
from .registry import (
    METHODS,
    OTHER_QUESTIONS,
    OURS,
    Case,
    Method,
    Outcome,
    Work,
    count_rows,
    floor_operations,
    floor_shapes,
    load,
    methods_of,
    per_row,
    plain,
)

Row = dict[str, Any]

# How far another's scores may lie from ours, of our norm. In fp32 they agree; that is where a mistake shows. In bf16 each
# lies some hundredths from fp32, and on a prompt here and there much more (τ = 0.1 takes ten times the error of a gate):
# random ids through SmolLM2 put eager up to an eighth from ours, two of our own backends a 25th from each other.
TOLERANCE = {
    "float32": {"naive": 1e-3, "eager": 1e-3, "compiled": 1e-3, "reference": 1e-3},
    "bfloat16": {"naive": 0.5, "eager": 0.35, "compiled": 0.35, "reference": 0.2},
}
CONSERVATION = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        methods: of each case, as far as it has them; all without it.
        backend: of our ops.
        runs: timed ones, after one that warms up and is checked.
        budget_seconds: a method starts no further run after it. The first is always made; of a method for which even that
            is too long, the run that is checked is the one that counts.
        limit_seconds: a method whose first run takes longer is stopped there, and that is its result.
        memory: whether to measure it, in a child process for each method on the CPU.
    """

    methods: tuple[str, ...] | None = None
    backend: str = "auto"
    runs: int = 7
    budget_seconds: float = 60.0
    limit_seconds: float = 1800.0
    memory: bool = True


def run(
    case: Case, machine: Machine, options: Options, methods: Mapping[str, Method] | None = None, model: Any = None
) -> Iterator[Row]:
    """A row for each method: ``ok``, ``oom`` with the bytes asked for, ``stopped`` with the seconds it had, ``refused`` (a
    check failed: not timed) or ``failed`` (it raised). Nothing is timed where ours is wrong. ``model`` is the case's, where
    there is one already.
    """
    there = methods_of(case, machine.device) if methods is None else methods
    chosen = [name for name in there if options.methods is None or name in options.methods]
    rows = {name: new_row(case, name, options) for name in chosen}
    memory = {name: _memory_of(case, name, machine, options) for name in chosen} if options.memory else {}
    works: dict[str, Work] = {}
    long: dict[str, float] = {}  # seconds of the checked run, where that is too long to make another
    outcomes: dict[str, Outcome] = {}
    model = load(case, machine) if model is None else model
    for name in chosen:
        rows[name].update(memory.get(name, {}))
        if rows[name]["status"] != "ok":
            continue
        with _recorded(rows[name], machine):
            work = there[name](model, case, options.backend)
            found: list[Outcome] = []
            with limited(options.limit_seconds):
                first = machine.seconds(lambda w=work, f=found: f.append(w()))  # type: ignore[misc]
            if first > options.budget_seconds and name != "compiled":  # whose first run compiles
                long[name] = first
            works[name], outcomes[name] = work, found[0]
    for name, reason in wrong(case, model, there, outcomes).items():
        rows[name].update(status="refused", reason=reason)
        works.pop(name, None)
    if rows.get(OURS, {}).get("status") == "refused":
        for name in works:
            rows[name].update(status="refused", reason=f"{OURS} is refused: {rows[OURS]['reason']}")
        works = {}
    times = in_turn(works, plain(model, case), case, model, machine, options, rows, long)
    for name in chosen:
        row = rows[name]
        if row["status"] == "ok":
            row.update(figures(case, model, name, times, outcomes, machine.device))
            if machine.device == "cuda" and options.memory:
                with _recorded(row, machine):
                    row.update(peaks(works[name], plain(model, case), machine, limited(options.limit_seconds)))
        yield row


def new_row(case: Case, method: str, options: Options) -> Row:
    return {
        "what": "case", "case": case.name, "question": case.question, "model": case.model, "dtype": case.dtype,
        "size": case.size, "method": method, "asked_backend": options.backend if method == OURS else None, "status": "ok",
    }  # fmt: skip


@contextlib.contextmanager
def _recorded(row: Row, machine: Machine) -> Iterator[None]:
    """What goes wrong within becomes the row's result."""
    try:
        yield
    except Exception as error:  # whatever a rival or its compiler raises must not cost the other measurements
        asked = asked_bytes(error)
        if isinstance(error, StoppedError):
            row.update(status="stopped", seconds_at_least=error.seconds, reason=str(error))
        elif asked is None:
            row.update(status="failed", reason=f"{type(error).__name__}: {error}"[:2000])
        else:
            row.update(status="oom", asked_bytes=asked, reason=str(error)[:500])
        error.__traceback__ = None  # its frames hold the tensors that did fit
        gc.collect()
        if machine.device == "cuda":
            torch.cuda.empty_cache()


# Checks.


def difference(one: Tensor, other: Tensor) -> float:
    """Relative to the norm of ``other``; infinite where one is not finite or they do not match."""
    if one.shape != other.shape or not bool(one.isfinite().all()) or not bool(other.isfinite().all()):
        return math.inf
    return float((one.double() - other.double()).norm() / other.double().norm())


def wrong(case: Case, model: Any, there: Mapping[str, Method], outcomes: Mapping[str, Outcome]) -> dict[str, str]:
    """Why a method's result is not what it must be, by method; what is right is missing."""
    found: dict[str, str] = {}
    ours = outcomes.get(OURS)
    if ours is not None and (reason := _ours_is_wrong(case, model, there, outcomes, ours)) is not None:
        found[OURS] = reason
    for name, outcome in outcomes.items():
        if name == OURS:
            continue
        if not bool(outcome.scores.isfinite().all()) or not bool(outcome.scores.any()):
            found[name] = "its scores are not finite, or all zero"
        elif name in OTHER_QUESTIONS:
            expected = sum(len(ids) for ids in case.prompts)
            if len(outcome.scores) != expected:
                found[name] = f"{len(outcome.scores)} scores for {expected} tokens"
        elif ours is None:
            found[name] = f"{OURS} has no result to hold it against"
        elif name == "naive" and case.question == "heads":  # the published code changes position 0: only sums compare
            sums, logits = outcome.scores.double().sum(1), ours.scores.double().sum(1)
            missed = float(((sums - logits).abs() / outcome.scores.double().abs().sum(1)).max())
            if missed > 10 * CONSERVATION[case.dtype]:
                found[name] = f"its scores miss the logit by {missed:.1e} of their size"
        elif (off := difference(outcome.scores, ours.scores)) > TOLERANCE[case.dtype][name]:
            found[name] = (
                f"its scores differ from ours by {off:.1e} of their norm, allowed {TOLERANCE[case.dtype][name]}"
            )
    return found


def _ours_is_wrong(
    case: Case, model: Any, there: Mapping[str, Method], outcomes: Mapping[str, Outcome], ours: Outcome
) -> str | None:
    """Against its own sums, and against the first of eager, the naive and our plain-torch backend that there is."""
    if ours.conservation_error is None or not ours.conservation_error <= CONSERVATION[case.dtype]:
        return f"its scores miss the logit by {ours.conservation_error} of their size"
    judges = ["eager"] if case.dtype != "float32" or case.question == "heads" else ["eager", "naive"]
    judge = next((name for name in judges if name in outcomes), None)
    if judge is not None:
        expected = outcomes[judge].scores
    else:
        judge = "reference"
        try:
            expected = there[OURS](model, case, "reference")().scores
        except (RuntimeError, DePassError) as error:
            return f"nothing to check it against: the reference backend failed with {error}"[:500]
    off = difference(ours.scores, expected)
    if off <= TOLERANCE[case.dtype][judge]:
        return None
    return f"its scores differ from those of {judge} by {off:.1e} of their norm, allowed {TOLERANCE[case.dtype][judge]}"


# Times.


@dataclass
class Times:
    """Seconds of every run, by method; of the model's plain pass; and of the floor, a number for each round."""

    methods: dict[str, list[float]]
    plain: list[float]
    floor: list[float]


def in_turn(
    works: Mapping[str, Work], plain_pass: Callable[[], object], case: Case, model: Any, machine: Machine,
    options: Options, rows: Mapping[str, Row], long: Mapping[str, float],
) -> Times:  # fmt: skip
    """Everything once in every round, so that what slows the machine down slows all of them; ``long`` is timed already."""
    times = Times({name: [long[name]] if name in long else [] for name in works}, [], [])
    shapes, dtype = floor_shapes(model.config), bind(model).product_dtype
    needed = count_rows(case, model.config)
    going = {name: work for name, work in works.items() if name not in long}
    for turn in range(options.runs):
        if not going and (turn or not long):
            break
        times.floor.append(per_row(needed, machine.gemm_seconds(needed.state, shapes, dtype)))
        times.plain.append(machine.seconds(plain_pass))
        for name, work in list(going.items()):
            with _recorded(rows[name], machine):
                times.methods[name].append(machine.seconds(work))
            spent = sum(times.methods[name])
            if (
                rows[name]["status"] != "ok"
                or spent * (1 + 1 / max(1, len(times.methods[name]))) > options.budget_seconds
            ):
                del going[name]
    return times


def figures(
    case: Case, model: Any, name: str, times: Times, outcomes: Mapping[str, Outcome], device: str
) -> dict[str, Any]:
    """What a row says of the runs of one method."""
    seconds, outcome, ours = times.methods[name], outcomes[name], outcomes.get(OURS)
    median = statistics.median(seconds)
    tokens = sum(len(ids) for ids in case.prompts)
    found: dict[str, Any] = {
        "runs": len(seconds), "seconds": seconds, "seconds_p20": percentile(seconds, 0.2), "seconds_p50": median,
        "seconds_p80": percentile(seconds, 0.8), "prompts_per_second": len(case.prompts) / median,
        "tokens_per_second": tokens / median, "plain_forward_seconds": statistics.median(times.plain), "device": device,
    }  # fmt: skip
    if name in OTHER_QUESTIONS:
        return found
    rows, operations = count_rows(case, model.config), floor_operations(case, model.config)
    floor = statistics.median(times.floor)
    found.update(
        rows=rows.state, rows_per_second=rows.state / median, tflops=operations / median / 1e12, floor_seconds=floor,
        floor_seconds_all=times.floor, gemm_tflops=operations / floor / 1e12,
        share_of_floor=statistics.median(f / s for f, s in zip(times.floor, seconds, strict=False)),
    )  # fmt: skip
    if name == OURS:
        found.update(conservation_error=outcome.conservation_error, backends=dict(outcome.backends or {}))
        if (
            device == "cuda"
        ):  # which way sums are added to the fp32 state: in the product itself, or by a pass of their own
            found["library_adds_to_fp32"] = library_adds_to_fp32(bind(model).device)
    elif ours is not None:
        found["difference"] = difference(outcome.scores, ours.scores)
    return found


# Memory.


def peaks(
    work: Work, plain_pass: Callable[[], object], machine: Machine, limit: contextlib.AbstractContextManager[None]
) -> dict[str, int]:
    """The peaks in bytes, model included: of the plain pass and of the method, which runs within ``limit``."""
    ordinary = machine.peak_bytes(plain_pass)
    with limit:
        peak = machine.peak_bytes(work)
    return {"plain_peak_bytes": ordinary, "peak_bytes": peak, "beyond_plain_bytes": max(0, peak - ordinary)}


def measure_memory(case: Case, method: str, backend: str, limit_seconds: float = Options.limit_seconds) -> Row:
    """In a process of its own, on the CPU: the :func:`peaks`, or what did not fit, or that it was stopped."""
    machine = Machine("cpu")
    row: Row = {"status": "ok"}
    limit_to_what_is_free()
    with _recorded(row, machine):
        model = load(case, machine)
        plain_pass = plain(model, case)
        plain_pass()
        work = METHODS[case.question][method](model, case, backend)
        row.update(peaks(work, plain_pass, machine, _ended(limit_seconds)))
    return row


@contextlib.contextmanager
def _ended(seconds: float) -> Iterator[None]:
    """Ends this process with its row once so many seconds have passed: one operation may take long and lets no signal in."""

    def end() -> None:
        print(
            json.dumps({"status": "stopped", "seconds_at_least": seconds, "reason": f"after {seconds:.4g} s"}),
            flush=True,
        )
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _memory_of(case: Case, method: str, machine: Machine, options: Options) -> Row:
    """What :func:`measure_memory` finds in a child process: peaks never fall within one."""
    if machine.device != "cpu" or method not in methods_of(case, "cpu"):
        return {}
    command = [sys.executable, "-m", "benchmarks", "memory", case.name, method, "--backend", options.backend,
               "--limit", str(options.limit_seconds)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode in (-9, 137):
        return {"status": "oom", "asked_bytes": 0, "reason": "the system ended its process for want of memory"}
    if done.returncode:
        return {
            "status": "failed",
            "reason": done.stderr.strip()[-2000:] or f"its process ended with {done.returncode}",
        }
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


# Rows on disk.


def line(row: Row) -> str:
    """A row for the terminal."""
    if row["what"] == "op":
        shares = f"{row['share_of_copy']:.0%} of the copy, {row['share_of_gemm']:.0%} of the GEMM"
        return f"{row['op']:16} {row['model']:14} {row['backend']:10} {row['seconds_p50'] * 1e6:10.1f} us, {shares}"
    if row["what"] == "profile":
        head = (
            f"{row['case']}: {row['seconds'] * 1e3:.4g} ms under the profiler, {row['launches']} launches, busy for "
            f"{row['busy_seconds'] * 1e3:.4g} ms"
        )
        kernels = (f"  {k['seconds'] * 1e3:9.3f} ms {k['calls']:6} x {k['name'][:80]}" for k in row["kernels"][:15])
        return "\n".join([head, *kernels])
    if row["what"] == "counters":
        return "\n".join([f"{row['op']}: {row['kernel']}", *(f"  {k}: {v}" for k, v in row["metrics"].items())])
    begin = f"{row['case']:40} {row['method']:26}"
    if row["status"] == "oom":
        return f"{begin} out of memory, asked for {row['asked_bytes'] / 1e9:.2f} GB"
    if row["status"] != "ok":
        return f"{begin} {row['status']}: {row['reason'].splitlines()[0]}"
    parts = [f"{row['seconds_p50']:.4g} s ({row['runs']} runs)"]
    if "beyond_plain_bytes" in row:
        parts.append(f"{row['beyond_plain_bytes'] / 1e6:.0f} MB")
    if "share_of_floor" in row:
        parts.append(f"{row['share_of_floor']:.0%} of the floor")
    return f"{begin} {', '.join(parts)}"


def read(paths: Sequence[Path]) -> list[Row]:
    """All rows, oldest first within a file.

    Raises:
        BenchmarkError: there are none, or a line is none.
    """
    rows: list[Row] = []
    for path in paths:
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise BenchmarkError(f"cannot read {path}: {error.strerror or error}") from error
        for number, line in enumerate(lines, 1):
            try:
                if line:
                    rows.append(json.loads(line))
            except ValueError as error:
                raise BenchmarkError(f"{path}, line {number} is no row: {error}; delete the line") from error
    if not rows:
        raise BenchmarkError(f"no rows in {', '.join(map(str, paths)) or 'benchmarks/results'}; make some with `run`")
    return rows
