"""Options and fixtures of ``pytest benchmarks/test_ops.py``, and the table that it prints at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.machine import Machine, here
from depass.models.bound import multiplies_on_cpu

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("depass ops")
    group.addoption(
        "--sizes", choices=("small", "full"), help="small: 16 tokens (default on a CPU); full: 256 (default on a GPU)"
    )
    group.addoption("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    group.addoption("--rows", type=Path, metavar="FILE.jsonl", help="append one row per measurement to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def machine() -> Machine:
    return Machine(here())


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> str:
    given: str | None = request.config.getoption("--sizes")
    return given or {"cuda": "full", "cpu": "small"}[here()]


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    given = request.config.getoption("--dtype")
    chosen: torch.dtype = getattr(torch, given or {"cuda": "bfloat16", "cpu": "float32"}[here()])
    return chosen


@pytest.fixture(scope="session")
def rates(machine: Machine) -> Callable[[torch.dtype], tuple[float, float]]:
    """Bytes per second of a copy, and operations per second of a GEMM, measured in this session.

    Where a CPU only emulates the dtype the GEMM is in fp32, as in the decomposition.
    """

    def measured(dtype: torch.dtype) -> tuple[float, float]:
        emulated = machine.device == "cpu" and not multiplies_on_cpu(dtype)
        return machine.copy_bandwidth(), machine.gemm_rate(torch.float32 if emulated else dtype)

    return cache(measured)


@pytest.fixture
def keep(request: pytest.FixtureRequest, machine: Machine) -> Callable[[dict[str, Any]], None]:
    """A function that keeps a row for the table, and appends it to the file of ``--rows``."""
    import time

    from benchmarks.machine import commit
    from depass.files import append_row

    def kept(row: dict[str, Any]) -> None:
        request.config.stash[ROWS].append(row)
        path: Path | None = request.config.getoption("--rows")
        if path is not None:
            append_row(path, {**row, **commit(), **machine.describe(), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

    return kept


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section(
        f"percentages: of the rate of a copy ({rows[0]['copy_bytes_per_second'] / 1e9:.1f} GB/s) and of a GEMM "
        f"({rows[0]['gemm_operations_per_second'] / 1e12:.3f} TFLOP/s), both measured in this run"
    )
    for row in sorted(rows, key=lambda r: (r["op"], r["model"], r["seconds_p50"])):
        terminalreporter.write_line(
            f"{row['op']:16} {row['model']:14} {row['backend']:10} {row['seconds_p50'] * 1e6:11.1f} us  "
            f"{row['bytes'] / 1e6:9.1f} MB {row['share_of_copy']:7.1%}  {row['operations'] / 1e9:9.2f} GFLOP "
            f"{row['share_of_gemm']:7.1%}"
        )
