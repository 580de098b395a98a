"""Times the ops on every backend at the shapes of real models, with pytest-benchmark. Wrong results are not timed.

pytest benchmarks/test_ops.py [--sizes small|full] [--rows FILE.jsonl] [-k "mix_values and llama-2-7b"]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.machine import Machine
from benchmarks.ops import LIBRARY, MODELS, OPS, backends_of, checked, missing, prepare, row_of
from depass_kernels import BackendError


def after_the_device() -> float:
    """The time, once the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


CALLS = [(op, backend) for op in OPS for backend in backends_of(op)]


@pytest.mark.benchmark(timer=after_the_device)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("op", "backend"), CALLS, ids=[f"{op}-{backend}" for op, backend in CALLS])
def test_op(
    op: str, backend: str, model: str, benchmark: Any, machine: Machine, size: str, dtype: torch.dtype,
    rates: Callable[[torch.dtype], tuple[float, float]], keep: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    if (reason := missing(op, backend)) is not None:
        pytest.skip(reason)
    call = prepare(op, model, size, dtype, machine)
    try:
        assert checked(call, backend, dtype), "differs from the reference: not timed"
    except BackendError as error:
        pytest.skip(str(error))
    except RuntimeError as error:
        if op not in LIBRARY:
            raise
        pytest.skip(f"the library does not support this here: {error}")
    at_once = 10 if machine.device == "cuda" else 1  # the host runs ahead of the GPU
    rounds = 20 if machine.device == "cuda" else 5
    benchmark.pedantic(call.work, (backend,), iterations=at_once, rounds=rounds, warmup_rounds=2)
    row = row_of(op, model, backend, dtype, size, call, benchmark.stats.stats.data, rates(dtype))
    benchmark.extra_info.update(row)
    keep(row)
