"""The machine: its description, its rates of copying and multiplying, and how time and memory are measured on it."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

ROOT = Path(__file__).parents[1]


class BenchmarkError(Exception):
    """A request that the benchmarks cannot carry out; the message is for the user."""


class StoppedError(Exception):
    """A run exceeded its time limit; ``seconds`` is the time until it stopped."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"after {seconds:.4g} s")
        self.seconds = seconds


@dataclass(frozen=True)
class Machine:
    """``cpu`` or ``cuda``; ``limit_bytes`` caps the CUDA allocator."""

    device: str
    limit_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise BenchmarkError(f"device {self.device!r}: must be 'cpu' or 'cuda'")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BenchmarkError("torch sees no CUDA device here; give --device cpu to measure the CPU")
        if self.limit_bytes is None:
            return
        if self.device == "cpu":
            raise BenchmarkError("--memory-limit caps the CUDA allocator; on the CPU leave it out")
        total = torch.cuda.get_device_properties(0).total_memory
        if self.limit_bytes > total:
            raise BenchmarkError(f"--memory-limit {self.limit_bytes} bytes: the GPU has only {total} bytes")
        torch.cuda.set_per_process_memory_fraction(self.limit_bytes / total)

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Wall-clock time of one run, up to the device's last operation."""
        self.synchronize()
        begin = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - begin

    def median_seconds(self, work: Callable[[], object], runs: int = 5) -> float:
        """The median time of ``runs`` runs, after one warm-up run."""
        work()
        return statistics.median(self.seconds(work) for _ in range(runs))

    def seconds_each(self, work: Callable[[], object], runs: int = 7, least: float = 5e-3) -> list[float]:
        """Seconds per call in each of ``runs`` runs, after two warm-up calls. A run repeats calls for ``least`` seconds."""
        work()
        calls = min(100, max(1, math.ceil(least / max(1e-9, self.seconds(work)))))

        def several() -> None:
            for _ in range(calls):
                work()

        return [self.seconds(several) / calls for _ in range(runs)]

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normal random numbers."""
        return (scale * torch.randn(shape, device=self.device)).to(dtype)

    def copy_bandwidth(self, size: int | None = None) -> float:
        """Bytes per second that a copy in the device's memory reads and writes. The buffer is larger than any cache."""
        size = size or (1 << 30 if self.device == "cuda" else 1 << 28)
        source = self.random(size // 4)
        target = torch.empty_like(source)
        return 2 * size / self.median_seconds(lambda: target.copy_(source))

    def gemm_rate(self, dtype: torch.dtype, size: int | None = None) -> float:
        """Operations per second of the library's square matrix product."""
        size = size or (8192 if self.device == "cuda" else 1024)
        a, b = self.random(size, size, dtype=dtype), self.random(size, size, dtype=dtype)
        out = torch.empty_like(a)
        return 2 * size**3 / self.median_seconds(lambda: torch.mm(a, b, out=out))

    def gemm_seconds(self, rows: int, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[float]:
        """Seconds per row of the library's product with each ``[outputs, inputs]`` weight.

        This is the better of two ways: all rows at once, and blocks whose operands stay in a CPU's cache. Each is the
        median of three runs, on ``rows`` rows, but at most some thousands.
        """
        rows = min(rows, 32768 if self.device == "cuda" else 8192)
        # without repeats, the time of a few rows would be mostly kernel launch and synchronisation
        repeats = min(20, max(1, 4096 // rows))
        seconds = []
        for outputs, inputs in shapes:
            a = self.random(rows, inputs, dtype=dtype)
            weight = self.random(outputs, inputs, dtype=dtype)
            out = torch.empty(rows, outputs, dtype=dtype, device=self.device)

            def multiply(at_once: int, a: Tensor = a, weight: Tensor = weight, out: Tensor = out) -> None:
                for _ in range(repeats):
                    for x, y in zip(torch.split(a, at_once), torch.split(out, at_once), strict=True):
                        torch.mm(x, weight.T, out=y)

            ways = {rows, min(rows, 2048)}
            best = min(self.median_seconds(lambda n=n: multiply(n), runs=3) for n in ways)  # type: ignore[misc]
            seconds.append(best / rows / repeats)
        return seconds

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """The peak memory while ``work`` runs: of the CUDA allocator, or of the process's resident set.

        The resident set's peak counts from now only if Linux lets the process reset it; otherwise from the process's start.
        """
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            work()
            self.synchronize()
            return torch.cuda.max_memory_allocated()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        work()
        return _peak_rss()

    def describe(self) -> dict[str, Any]:
        """The fields of a row that describe the machine."""
        gpu = torch.cuda.get_device_name() if self.device == "cuda" else None
        threads = torch.get_num_threads()
        name = gpu or f"{_cpu_name()} {threads} threads"
        return {
            "machine": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
            "gpu": gpu,
            "driver": _driver() if gpu else None,
            "cpu": _cpu_name(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": threads,
            "memory_limit_bytes": self.limit_bytes,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }


def percentile(values: Sequence[float], share: float) -> float:
    """A percentile, interpolated between the two nearest values."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def here() -> str:
    """The device to measure by default."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def limit_to_what_is_free() -> None:
    """Limit this process's memory to the available memory: an allocation then fails with its size, and Linux does not kill
    the process.
    """
    memory = {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()
    }
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = held + memory["MemAvailable"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise :class:`StoppedError` in the block at Python's next step after so many seconds. Main thread only."""
    begin = time.perf_counter()

    def stop(*_: object) -> None:
        raise StoppedError(time.perf_counter() - begin)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@cache
def commit(given: str | None = None) -> dict[str, Any]:
    """The checkout's commit, and whether the code has changed since; both None without a checkout.

    ``given`` stands in the place of the commit: it names the code where this is no checkout.
    """
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs/figures")
    return {"commit": given or head or None, "changed": None if head is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.split("\n")[0].strip() or None


def _version(module: str) -> str | None:
    try:
        version: str = __import__(module).__version__
    except ImportError:
        return None
    return version


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _peak_rss() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
