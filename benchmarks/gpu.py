"""Everything that only a GPU can show, in one command of under nine minutes; results as JSON, kept as they come in.

    python benchmarks/gpu.py OUT.json            build, test, sanitize, measure
    python benchmarks/gpu.py OUT.json measure    only measure, with what is built
    python benchmarks/gpu.py OUT.json rehearse   the measurements' code on the CPU with tiny sizes; its times mean nothing

Needs what the tests need and installs nothing. Times are medians of CUDA events after a warm-up, on random numbers. Every
timed call is first compared with the reference; one that is wrong is reported and not timed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "tests" / "support")]

import torch  # noqa: E402

from depass import DePass  # noqa: E402
from depass.files import write_atomically  # noqa: E402
from depass_kernels import (  # noqa: E402
    BackendError,
    SourceLayout,
    backends,
    gate_share,
    mix_values,
    residual_update,
    share_hidden,
)

BACKENDS = ("triton", "cuda", "reference")
MODELS = {  # D, F, H, K, d
    "SmolLM2-135M": (576, 1536, 9, 3, 64),
    "Llama-3.1-8B": (4096, 14336, 32, 8, 128),
    "Llama-2-7B": (4096, 11008, 32, 32, 128),
}


class Report:
    """Rows of results, on disk after each."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[dict[str, Any]]()

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        write_atomically(self.path, json.dumps(self.rows, indent=1).encode())


class Machine:
    """Where things run, and how they are timed there."""

    def __init__(self, device: str) -> None:
        self.device = device

    def seconds(self, work: Callable[[], object], runs: int = 15) -> float:
        """The median of ``runs`` runs after three to warm up."""
        for _ in range(3):
            work()
        times = []
        for _ in range(runs if self.device == "cuda" else 3):
            if self.device == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host gets ahead of the GPU
                begin.record()
                work()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            else:
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, device=self.device)).to(dtype)


def measure(report: Report, machine: Machine, tiny: bool) -> None:
    numbers = 1 << (20 if tiny else 29)
    copy = copy_bandwidth(machine, numbers)
    report.add(what="copy", bytes_per_second=copy)
    for model, sizes in MODELS.items():
        positions = 12 if tiny else 256
        layouts = {
            "tokens": SourceLayout.tokens(positions, excluded=0),
            "33 sources": SourceLayout.dense(33, positions),
        }
        if not tiny:
            layouts["tokens 64"] = SourceLayout.tokens(64, excluded=0)
        for name, layout in layouts.items():
            where = {"model": model, "layout": name, "positions": layout.longest, "rows": layout.rows}
            measure_share(report, machine, where, layout, sizes, copy)
            measure_mix(report, machine, where, layout, sizes)
            measure_update(report, machine, where, layout, sizes)
            measure_gate_share(report, machine, where, layout, sizes)
    end_to_end(report, machine, tiny)


def copy_bandwidth(machine: Machine, numbers: int) -> float:
    """Bytes read and written per second by a copy on the device."""
    source, target = machine.random(numbers), torch.empty(numbers, dtype=torch.bfloat16, device=machine.device)
    return 4 * numbers / machine.seconds(lambda: target.copy_(source))


def agrees(got: torch.Tensor, expected: torch.Tensor) -> bool:
    size = expected.float().abs().max()
    return bool(((got.float() - expected.float()).abs().max() <= 2e-2 * size).item())


def timed(
    report: Report,
    machine: Machine,
    row: dict[str, Any],
    work: Callable[[str], torch.Tensor],
    expected: torch.Tensor,
    out: torch.Tensor,
) -> dict[str, float]:
    """Seconds by backend, of those that serve and write to ``out`` what agrees with ``expected``."""
    seconds = {}
    for backend in BACKENDS:
        try:
            out.fill_(float("nan"))  # a kernel that writes nothing must not pass on what the one before it wrote
            if agrees(work(backend), expected):
                seconds[backend] = machine.seconds(lambda b=backend: work(b))  # type: ignore[misc]
            else:
                report.add(**row, backend=backend, wrong=True)
        except BackendError as error:
            report.add(**row, backend=backend, refused=str(error))
        except Exception as error:  # one kernel that fails must not cost the other measurements
            report.add(**row, backend=backend, failed=f"{type(error).__name__}: {error}"[:2000])
    return seconds


def measure_share(
    report: Report, machine: Machine, where: dict[str, Any], layout: SourceLayout, sizes: tuple[int, ...], copy: float
) -> None:
    neurons = sizes[1]
    gate = machine.random(layout.rows, neurons, dtype=torch.float32, scale=0.3)
    hidden = machine.random(layout.positions, neurons)
    scale = torch.rand(layout.positions, device=machine.device) + 0.5
    out = torch.empty(layout.rows, neurons, dtype=torch.bfloat16, device=machine.device)
    moved = layout.rows * neurons * (4 + 2) + layout.positions * neurons * 2  # gates, out, hidden
    for rule in ("softmax", "taylor") if where["layout"] == "tokens" else ("softmax",):
        total = machine.random(layout.positions, neurons) if rule == "taylor" else None
        call = {"gate_scale": scale, "rule": rule, "gate_total": total}
        expected = share_hidden(gate, hidden, layout, **call, backend="reference")
        row = {"what": "share_hidden", **where, "rule": rule}
        seconds = timed(
            report,
            machine,
            row,
            lambda b, c=call: share_hidden(gate, hidden, layout, **c, out=out, backend=b),
            expected,
            out,
        )
        total_bytes = moved + (0 if total is None else layout.positions * neurons * 2)
        for backend, took in seconds.items():
            report.add(**row, backend=backend, seconds=took, bytes=total_bytes, share_of_copy=total_bytes / took / copy)


def measure_mix(
    report: Report, machine: Machine, where: dict[str, Any], layout: SourceLayout, sizes: tuple[int, ...]
) -> None:
    _, _, heads, kv_heads, d = sizes
    n, sources = layout.longest, layout.most
    pattern = torch.softmax(machine.random(1, heads, n, n, dtype=torch.float32), dim=-1).tril().to(torch.bfloat16)
    values = machine.random(layout.rows, kv_heads * d)
    scale = torch.rand(layout.positions, device=machine.device) + 0.5
    out = torch.empty(layout.rows, heads * d, dtype=torch.bfloat16, device=machine.device)
    expected = mix_values(pattern, values, layout, kv_heads=kv_heads, key_scale=scale, backend="reference")
    row = {"what": "mix_values", **where}
    seconds = timed(
        report, machine, row,
        lambda b: mix_values(pattern, values, layout, kv_heads=kv_heads, key_scale=scale, out=out, backend=b), expected,
        out,
    )  # fmt: skip
    # the library's batched GEMM on what it takes: the whole square, packed beforehand, each head's values by themselves
    square, into = (
        machine.random(heads, n, sources * d),
        torch.empty(heads, n, sources * d, dtype=torch.bfloat16, device=machine.device),
    )
    library = machine.seconds(lambda: torch.bmm(pattern[0], square, out=into))
    rate = 2 * heads * n * n * sources * d / library
    # tokens: Σ over queries q of Σ over keys k <= q of the k + 1 sources that have started
    useful = heads * d * n * (n + 1) * (n + 2) // 3 if sources == n else None
    for backend, took in seconds.items():
        report.add(**row, backend=backend, seconds=took, library_bmm_seconds=library, library_flops=rate,
                   times_as_fast=library / took, useful_flops=None if useful is None else useful / took)  # fmt: skip


def measure_update(
    report: Report, machine: Machine, where: dict[str, Any], layout: SourceLayout, sizes: tuple[int, ...]
) -> None:
    width, _, heads, _, d = sizes
    state = machine.random(layout.rows, width, dtype=torch.float32)
    operand, weight = machine.random(layout.rows, heads * d), machine.random(width, heads * d, scale=0.02)
    cast = torch.empty(layout.rows, width, dtype=torch.bfloat16, device=machine.device)
    expected = residual_update(state.clone(), operand, weight, backend="reference")
    row = {"what": "residual_update", **where}
    serves = {backend for op, backend, reason in backends.table() if op == row["what"] and reason is None}
    flops = 2 * layout.rows * width * heads * d
    for backend in ("triton", "reference"):
        if backend not in serves:
            continue
        cast.fill_(float("nan"))
        got = residual_update(state.clone(), operand, weight, cast=cast, backend=backend)
        if not (agrees(got, expected) and agrees(cast, expected)):
            report.add(**row, backend=backend, wrong=True)
            continue
        took = machine.seconds(lambda b=backend: residual_update(state, operand, weight, cast=cast, backend=b))  # type: ignore[misc]
        report.add(**row, backend=backend, seconds=took, flops=flops / took)


def measure_gate_share(
    report: Report, machine: Machine, where: dict[str, Any], layout: SourceLayout, sizes: tuple[int, ...]
) -> None:
    width, neurons = sizes[:2]
    operand, weight = machine.random(layout.rows, width), machine.random(neurons, width, scale=0.02)
    hidden = machine.random(layout.positions, neurons)
    out = torch.empty(layout.rows, neurons, dtype=torch.bfloat16, device=machine.device)
    expected = gate_share(operand, weight, hidden, layout, temperature=1.0, backend="reference")
    row = {"what": "gate_share", **where}

    def apart(backend: str) -> torch.Tensor:
        gate = backends.reference.matmul(operand, weight)
        return share_hidden(gate, hidden, layout, temperature=1.0, out=out, backend=backend)

    seconds = timed(
        report, machine, row, lambda b: gate_share(operand, weight, hidden, layout, temperature=1.0, out=out, backend=b),
        expected, out,
    )  # fmt: skip
    for backend, took in timed(report, machine, {**row, "apart": True}, apart, expected, out).items():
        report.add(**row, backend=backend, apart=True, seconds=took)
    for backend, took in seconds.items():
        report.add(**row, backend=backend, apart=False, seconds=took)


def end_to_end(report: Report, machine: Machine, tiny: bool) -> None:
    """Token attribution of a Llama-2-7B of random weights at N=256, against the GEMMs that nobody avoids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    config = LlamaConfig(**shape) if tiny else LlamaConfig()  # the defaults are Llama-2-7B's
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(machine.device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    positions = 16 if tiny else 256
    ids = torch.randint(3, config.vocab_size, (positions,), generator=torch.Generator().manual_seed(0))
    rows, D, F = positions * (positions + 1) // 2, config.hidden_size, config.intermediate_size
    shapes = [(D, D), (D, D), (D, F), (F, D)]
    operands = [(machine.random(rows, a), machine.random(b, a)) for a, b in shapes]
    layer = sum(machine.seconds(lambda x=x, w=w: x @ w.T) for x, w in operands)  # type: ignore[misc]
    floor = layer * config.num_hidden_layers
    del operands
    for backend in ("auto", *BACKENDS):
        dp = DePass(model, backend=backend)
        if machine.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            result = dp.attribute(ids, target=5, exclude_bos=True)
        except Exception as error:
            report.add(what="end to end", backend=backend, failed=f"{type(error).__name__}: {error}"[:2000])
            continue
        took = machine.seconds(lambda d=dp: d.attribute(ids, target=5, exclude_bos=True), runs=5)  # type: ignore[misc]
        peak = torch.cuda.max_memory_allocated() if machine.device == "cuda" else None
        report.add(
            what="end to end", model="Llama-2-7B, random weights", positions=positions, rows=rows, backend=backend,
            served=result.settings.backends, seconds=took, floor_seconds=floor, share_of_floor=floor / took,
            conservation_error=float(result.conservation_error.max()), peak_bytes=peak,
        )  # fmt: skip
    short_prompts(report, machine, model, "Llama-2-7B, random weights")
    if tiny:
        return
    del model
    small = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                        num_key_value_heads=3, vocab_size=49152)  # fmt: skip
    short_prompts(report, machine, LlamaForCausalLM(small).bfloat16().to(machine.device).eval(), "SmolLM2-135M's shape")


def short_prompts(report: Report, machine: Machine, model: Any, name: str) -> None:
    """One prompt at a time, its layers launched kernel by kernel and replayed as CUDA graphs."""
    for positions in (8, 16, 32, 44):
        generator = torch.Generator().manual_seed(positions)
        ids = torch.randint(3, model.config.vocab_size, (positions,), generator=generator)
        expected = DePass(model).attribute(ids, target=5, exclude_bos=True).scores
        for graphs in (False, True):
            row = {"what": "short prompt", "model": name, "positions": positions, "cuda_graphs": graphs}
            if graphs and machine.device != "cuda":
                continue
            try:
                dp = DePass(model, cuda_graphs=graphs)
                work = lambda d=dp, i=ids: d.attribute(i, target=5, exclude_bos=True).scores  # noqa: E731
                work(), work()
                if agrees(work(), expected):
                    report.add(**row, seconds=machine.seconds(work))
                else:
                    report.add(**row, failed="differs from the steps without graphs")
            except Exception as error:
                report.add(**row, failed=f"{type(error).__name__}: {error}"[:2000])


def sanitized() -> None:
    """Small calls of the CUDA kernels, for compute-sanitizer to watch."""
    from layouts import LAYOUTS, poisoned, scale, sliced

    for name in ("tokens17-bias-excluded", "several", "dense33"):
        layout = LAYOUTS[name]
        for dtype in (torch.float32, torch.bfloat16):
            for columns in (67, 128):
                gate, hidden = (
                    sliced((layout.rows, columns), dtype, "cuda"),
                    sliced((layout.positions, columns), dtype, "cuda"),
                )
                for rule in backends.RULES:
                    total = hidden if rule == "taylor" else None
                    out = poisoned(layout.rows, columns, dtype, "cuda")
                    share_hidden(gate, hidden, layout, rule=rule, gate_total=total, out=out, backend="cuda")
            for d in (5, 64):
                pattern = sliced((layout.prompts, 4, layout.longest, layout.longest), dtype, "cuda").tril()
                values = sliced((layout.rows, 2 * d), dtype, "cuda")
                mix_values(
                    pattern, values, layout, kv_heads=2, key_scale=scale(layout.positions, "cuda"), backend="cuda"
                )
    torch.cuda.synchronize()


def step(report: Report, name: str, command: list[str], limit: int, **environment: str) -> None:
    begin = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": "python:.", **environment}
    code: int | str
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as running:  # fmt: skip
        try:
            said, code = running.communicate(timeout=limit)[0], running.returncode
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # workers and watched programs with it
            said, code = running.communicate()[0], "timeout"
    report.add(what="step", name=name, code=code, seconds=round(time.monotonic() - begin, 1), said=said[-4000:])


def main() -> None:
    if len(sys.argv) not in (2, 3) or (len(sys.argv) == 3 and sys.argv[2] not in ("measure", "rehearse", "sanitized")):
        sys.exit(__doc__)
    mode = sys.argv[2] if len(sys.argv) == 3 else "all"
    if mode == "sanitized":
        sanitized()
        return
    if mode != "rehearse" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here; `rehearse` runs the measurements' code on the CPU")
    report = Report(Path(sys.argv[1]))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    report.add(what="machine", gpu=gpu, torch=torch.__version__, python=platform.python_version(), commit=commit.strip(),
               date=time.strftime("%Y-%m-%d"), mode=mode, build=backends.build_info())  # fmt: skip
    if mode == "all":
        python, parallel = sys.executable, ["-n", "8"] if importlib.util.find_spec("xdist") else []
        step(
            report,
            "build",
            [python, "setup.py", "-q", "build_ext", "--inplace"],
            110,
            DEPASS_BUILD_CPU="1",
            DEPASS_BUILD_CUDA="1",
        )
        step(report, "measure", [python, __file__, str(report.path.with_suffix(".measured.json")), "measure"], 190)
        step(
            report, "kernel tests", [python, "-m", "pytest", "tests/depass_kernels", "--device", "cuda", *parallel], 80
        )
        step(report, "wrapper tests", [python, "-m", "pytest", "tests/depass", "--device", "cuda", *parallel], 60)
        if shutil.which("compute-sanitizer"):
            for tool in ("memcheck", "racecheck"):
                watch = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
                step(report, f"compute-sanitizer {tool}", [*watch, python, __file__, str(report.path), "sanitized"], 45)
        else:
            report.add(what="step", name="compute-sanitizer", code="not on PATH: not measured")
    else:
        torch.manual_seed(0)
        with torch.no_grad():
            measure(report, Machine("cpu" if mode == "rehearse" else "cuda"), tiny=mode == "rehearse")


if __name__ == "__main__":
    main()
