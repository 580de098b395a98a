"""The ops on every backend at the shapes of real models, with pytest-benchmark; wrong results are not timed.

pytest benchmarks/test_ops.py [--sizes small|full] [--rows FILE.jsonl] [-k "mix_values and llama-2-7b"]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.machine import Machine
from benchmarks.ops import MODELS, OPS, POSITIONS, agrees, kernel_of, prepare
from benchmarks.runner import percentile
from depass_kernels import BackendError, backends


def after_the_device() -> float:
    """The time when the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


CALLS = [(op, backend) for op in OPS for backend in backends.NAMES if backend != "auto"]


@pytest.mark.benchmark(timer=after_the_device)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("op", "backend"), CALLS, ids=[f"{op}-{backend}" for op, backend in CALLS])
def test_op(
    op: str, backend: str, model: str, benchmark: Any, machine: Machine, size: str, dtype: torch.dtype,
    rates: Callable[[torch.dtype], tuple[float, float]], keep: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    reasons = {(of, name): reason for of, name, reason in backends.table()}
    if (reason := reasons[kernel_of(op), backend]) is not None:
        pytest.skip(reason)
    call = prepare(op, model, size, dtype, machine)
    call.clear()
    call.work("reference")
    expected = [tensor.clone() for tensor in call.written]
    call.clear()
    try:
        call.work(backend)
    except BackendError as error:
        pytest.skip(str(error))
    for got, wanted in zip(call.written, expected, strict=True):
        assert agrees(got, wanted, dtype), "differs from the reference: not timed"
    at_once = 10 if machine.device == "cuda" else 1  # the host gets ahead of the GPU
    rounds = 20 if machine.device == "cuda" else 5
    benchmark.pedantic(call.work, (backend,), iterations=at_once, rounds=rounds, warmup_rounds=2)
    seconds = benchmark.stats.stats.data
    copy, gemm = rates(dtype)
    took = percentile(seconds, 0.5)
    row = {
        "what": "op", "op": op, "model": model, "backend": backend, "dtype": str(dtype).removeprefix("torch."),
        "positions": POSITIONS[size], "sizes": size, "bytes": call.bytes, "operations": call.operations,
        "seconds_p20": percentile(seconds, 0.2), "seconds_p50": took, "seconds_p80": percentile(seconds, 0.8),
        "runs": len(seconds), "copy_bytes_per_second": copy, "gemm_operations_per_second": gemm,
        "share_of_copy": call.bytes / took / copy, "share_of_gemm": call.operations / took / gemm,
    }  # fmt: skip
    benchmark.extra_info.update(row)
    keep(row)
