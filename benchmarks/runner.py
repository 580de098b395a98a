"""Runs a case: checks all methods first, then times them in turn, and makes a row of results for each method."""

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
    GRAPHS,
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

# The largest difference between a method's scores and DePass's, relative to the norm of DePass's. In fp32 they agree, so a
# mistake shows there. In bf16 each differs from fp32 by some hundredths, and by much more on a few prompts (τ = 0.1
# multiplies the error of a gate by ten): with random ids on SmolLM2, eager differs from DePass by up to an eighth, and two
# backends of DePass differ by a 25th.
TOLERANCE = {
    "float32": {"naive": 1e-3, "eager": 1e-3, "compiled": 1e-3, "reference": 1e-3, GRAPHS: 1e-4},
    "bfloat16": {"naive": 0.5, "eager": 0.35, "compiled": 0.35, "reference": 0.2, GRAPHS: 1e-2},
}
CONSERVATION = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Options:
    """Options of a run.

    Attributes:
        methods: the methods to run, where a case has them; None: all.
        backend: the backend of DePass's ops.
        runs: timed runs, after one run that warms up and is checked.
        budget_seconds: a method starts no further run after this time. It always makes one run; if the checked run exceeds
            the budget, that run is the one that counts.
        limit_seconds: a method whose first run takes longer is stopped, and the row says so.
        memory: measure peak memory; on the CPU in a child process per method.
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
    """Yield one row per method.

    Its status is ``ok``, ``oom`` (with the requested bytes), ``stopped`` (with the seconds until then), ``refused`` (a check
    failed, so it was not timed) or ``failed`` (it raised). If DePass's own result is wrong, nothing is timed. ``model`` is
    the case's model, if it is already loaded.
    """
    available = methods_of(case, machine.device) if methods is None else methods
    chosen = [name for name in available if options.methods is None or name in options.methods]
    rows = {name: new_row(case, name, options) for name in chosen}
    memory = {name: _memory_of(case, name, machine, options) for name in chosen} if options.memory else {}
    works: dict[str, Work] = {}
    long: dict[str, float] = {}  # seconds of the checked run, if it takes too long for another one
    outcomes: dict[str, Outcome] = {}
    model = load(case, machine) if model is None else model
    for name in chosen:
        rows[name].update(memory.get(name, {}))
        if rows[name]["status"] != "ok":
            continue
        with _recorded(rows[name], machine):
            work = available[name](model, case, options.backend)
            checked: list[Outcome] = []
            with limited(options.limit_seconds):
                first = machine.seconds(lambda w=work, c=checked: c.append(w()))  # type: ignore[misc]
            if first > options.budget_seconds and name != "compiled":  # its first run compiles
                long[name] = first
            works[name], outcomes[name] = work, checked[0]
    for name, reason in wrong(case, model, available, outcomes).items():
        rows[name].update(status="refused", reason=reason)
        works.pop(name, None)
    if rows.get(OURS, {}).get("status") == "refused":
        for name in works:
            rows[name].update(status="refused", reason=f"the result of {OURS} is wrong: {rows[OURS]['reason']}")
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
    """An error in the block becomes the row's result."""
    try:
        yield
    except Exception as error:  # an error of one method must not end the other measurements
        requested = asked_bytes(error)
        if isinstance(error, StoppedError):
            row.update(status="stopped", seconds_at_least=error.seconds, reason=str(error))
        elif requested is None:
            row.update(status="failed", reason=f"{type(error).__name__}: {error}"[:2000])
        else:
            row.update(status="oom", asked_bytes=requested, reason=str(error)[:500])
        error.__traceback__ = None  # its frames would keep tensors alive
        gc.collect()
        if machine.device == "cuda":
            torch.cuda.empty_cache()


# Checks.


def difference(scores: Tensor, other: Tensor) -> float:
    """The difference relative to the norm of ``other``; infinite if a number is not finite or the shapes differ."""
    if scores.shape != other.shape or not bool(scores.isfinite().all()) or not bool(other.isfinite().all()):
        return math.inf
    return float((scores.double() - other.double()).norm() / other.double().norm())


def wrong(case: Case, model: Any, available: Mapping[str, Method], outcomes: Mapping[str, Outcome]) -> dict[str, str]:
    """The methods with a wrong result, and why it is wrong."""
    reasons: dict[str, str] = {}
    ours = outcomes.get(OURS)
    if ours is not None and (reason := _ours_is_wrong(case, model, available, outcomes, ours)) is not None:
        reasons[OURS] = reason
    for name, outcome in outcomes.items():
        if name == OURS:
            continue
        if not bool(outcome.scores.isfinite().all()) or not bool(outcome.scores.any()):
            reasons[name] = "its scores are not finite, or all zero"
        elif name in OTHER_QUESTIONS:
            expected = sum(len(ids) for ids in case.prompts)
            if len(outcome.scores) != expected:
                reasons[name] = f"{len(outcome.scores)} scores for {expected} tokens"
        elif ours is None:
            reasons[name] = f"{OURS} has no result to compare with"
        elif name == "naive" and case.question == "heads":  # the published code changes position 0: only sums compare
            sums, logits = outcome.scores.double().sum(1), ours.scores.double().sum(1)
            missed = float(((sums - logits).abs() / outcome.scores.double().abs().sum(1)).max())
            if missed > 10 * CONSERVATION[case.dtype]:
                reasons[name] = f"its conservation error is {missed:.1e}, allowed {10 * CONSERVATION[case.dtype]:.0e}"
        elif (off := difference(outcome.scores, ours.scores)) > TOLERANCE[case.dtype][name]:
            reasons[name] = (
                f"its scores differ from those of {OURS} by {off:.1e} of their norm, "
                f"allowed {TOLERANCE[case.dtype][name]}"
            )
    return reasons


def _ours_is_wrong(
    case: Case, model: Any, available: Mapping[str, Method], outcomes: Mapping[str, Outcome], ours: Outcome
) -> str | None:
    """Check DePass's result: its sums, and its difference from eager, the naive method or the reference backend (the first
    of them that has a result).
    """
    if ours.conservation_error is None or not ours.conservation_error <= CONSERVATION[case.dtype]:
        return f"its conservation error is {ours.conservation_error}, allowed {CONSERVATION[case.dtype]:.0e}"
    judges = ["eager"] if case.dtype != "float32" or case.question == "heads" else ["eager", "naive"]
    judge = next((name for name in judges if name in outcomes), None)
    if judge is not None:
        expected = outcomes[judge].scores
    else:
        judge = "reference"
        try:
            expected = available[OURS](model, case, "reference")().scores
        except (RuntimeError, DePassError) as error:
            return f"cannot check it: the reference backend failed with {error}"[:500]
    off = difference(ours.scores, expected)
    if off <= TOLERANCE[case.dtype][judge]:
        return None
    return f"its scores differ from those of {judge} by {off:.1e} of their norm, allowed {TOLERANCE[case.dtype][judge]}"


# Times.


@dataclass
class Times:
    """Seconds of each run: by method, of the model's plain pass, and of the floor (one number per round)."""

    methods: dict[str, list[float]]
    plain: list[float]
    floor: list[float]


def in_turn(
    works: Mapping[str, Work], plain_pass: Callable[[], object], case: Case, model: Any, machine: Machine,
    options: Options, rows: Mapping[str, Row], long: Mapping[str, float],
) -> Times:  # fmt: skip
    """Run everything once per round, so that a slow phase of the machine slows all methods. ``long`` is already timed."""
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
    """The fields of a row that describe one method's runs."""
    seconds, outcome, ours = times.methods[name], outcomes[name], outcomes.get(OURS)
    median = statistics.median(seconds)
    tokens = sum(len(ids) for ids in case.prompts)
    numbers: dict[str, Any] = {
        "runs": len(seconds), "seconds": seconds, "seconds_p20": percentile(seconds, 0.2), "seconds_p50": median,
        "seconds_p80": percentile(seconds, 0.8), "prompts_per_second": len(case.prompts) / median,
        "tokens_per_second": tokens / median, "plain_forward_seconds": statistics.median(times.plain), "device": device,
    }  # fmt: skip
    if name in OTHER_QUESTIONS:
        return numbers
    rows, operations = count_rows(case, model.config), floor_operations(case, model.config)
    floor = statistics.median(times.floor)
    numbers.update(
        rows=rows.state, rows_per_second=rows.state / median, tflops=operations / median / 1e12, floor_seconds=floor,
        floor_seconds_all=times.floor, gemm_tflops=operations / floor / 1e12,
        share_of_floor=statistics.median(f / s for f, s in zip(times.floor, seconds, strict=False)),
    )  # fmt: skip
    if name == OURS:
        numbers.update(conservation_error=outcome.conservation_error, backends=dict(outcome.backends or {}))
        if device == "cuda":  # whether the product itself adds to the fp32 state, or a second pass does
            numbers["library_adds_to_fp32"] = library_adds_to_fp32(bind(model).device)
    elif ours is not None:
        numbers["difference"] = difference(outcome.scores, ours.scores)
    return numbers


# Memory.


def peaks(
    work: Work, plain_pass: Callable[[], object], machine: Machine, limit: contextlib.AbstractContextManager[None]
) -> dict[str, int]:
    """The peak memory in bytes, including the model, of the plain pass and of the method. The method runs in ``limit``."""
    ordinary = machine.peak_bytes(plain_pass)
    with limit:
        peak = machine.peak_bytes(work)
    return {"plain_peak_bytes": ordinary, "peak_bytes": peak, "beyond_plain_bytes": max(0, peak - ordinary)}


def measure_memory(case: Case, method: str, backend: str, limit_seconds: float = Options.limit_seconds) -> Row:
    """The :func:`peaks` on the CPU, or a row that says why there are none. Call it in a process of its own."""
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
    """End this process with its row after so many seconds. A signal cannot interrupt a long operation."""

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
    """The result of :func:`measure_memory` in a child process: within one process a peak never falls."""
    if machine.device != "cpu" or method not in methods_of(case, "cpu"):
        return {}
    command = [sys.executable, "-m", "benchmarks", "memory", case.name, method, "--backend", options.backend,
               "--limit", str(options.limit_seconds)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode in (-9, 137):
        return {"status": "oom", "asked_bytes": 0, "reason": "the system killed its process: out of memory"}
    if done.returncode:
        return {
            "status": "failed",
            "reason": done.stderr.strip()[-2000:] or f"its process ended with exit code {done.returncode}",
        }
    measured: Row = json.loads(done.stdout.splitlines()[-1])
    return measured


# Rows on disk.


def line(row: Row) -> str:
    """A row as text for the terminal."""
    if row["what"] == "op":
        shares = f"{row['share_of_copy']:.0%} of the copy's rate, {row['share_of_gemm']:.0%} of the GEMM's rate"
        return f"{row['op']:16} {row['model']:14} {row['backend']:10} {row['seconds_p50'] * 1e6:10.1f} us, {shares}"
    if row["what"] == "profile":
        head = (
            f"{row['case']}: {row['seconds'] * 1e3:.4g} ms under the profiler, {row['launches']} launches, device busy "
            f"for {row['busy_seconds'] * 1e3:.4g} ms"
        )
        kernels = (f"  {k['seconds'] * 1e3:9.3f} ms {k['calls']:6} x {k['name'][:80]}" for k in row["kernels"][:15])
        return "\n".join([head, *kernels])
    if row["what"] == "counters":
        return "\n".join([f"{row['op']}: {row['kernel']}", *(f"  {k}: {v}" for k, v in row["metrics"].items())])
    begin = f"{row['case']:40} {row['method']:26}"
    if row["status"] == "oom":
        return f"{begin} out of memory, requested {row['asked_bytes'] / 1e9:.2f} GB"
    if row["status"] != "ok":
        return f"{begin} {row['status']}: {row['reason'].splitlines()[0]}"
    parts = [f"{row['seconds_p50']:.4g} s ({row['runs']} runs)"]
    if "beyond_plain_bytes" in row:
        parts.append(f"{row['beyond_plain_bytes'] / 1e6:.0f} MB")
    if "share_of_floor" in row:
        parts.append(f"floor / time {row['share_of_floor']:.0%}")
    return f"{begin} {', '.join(parts)}"


def read(paths: Sequence[Path]) -> list[Row]:
    """All rows; within a file the oldest first.

    Raises:
        BenchmarkError: there are no rows, or a line is not a valid row.
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
                raise BenchmarkError(f"{path}, line {number} is not a valid row: {error}; delete the line") from error
    if not rows:
        where = ", ".join(map(str, paths)) or "benchmarks/results"
        raise BenchmarkError(f"no rows in {where}; make some with `python -m benchmarks run`")
    return rows
