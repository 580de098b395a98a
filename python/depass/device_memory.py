"""How much memory there is, and what an allocation that failed asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from .checks import UNITS


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on a device: the least of what is free and what its limits leave."""
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        free, there = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        allowed = int(there * torch.cuda.get_per_process_memory_fraction(device)) - reserved
        kept = reserved - torch.cuda.memory_allocated(device)  # by torch, for what comes next
        return max(0, min(int(free), allowed)) + kept
    return max(0, min(_free_on_host()))


def asked_bytes(error: BaseException) -> int | None:
    """The bytes that an out-of-memory error was asked for (0: it does not say); None: it is another error."""
    said = str(error)
    if match := re.search(r"tried to allocate ([\d.]+)(?: (bytes)| ([KMGT]iB))", said, re.IGNORECASE):
        return int(float(match[1]) * UNITS[(match[3] or "").upper().removesuffix("B")])
    words = r"out of memory|cannot allocate memory|bad_alloc|_ALLOC_FAILED"
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(words, said, re.IGNORECASE)
    return 0 if memory else None


def shown(count: int) -> str:
    """``34.36 GB`` of a number of bytes."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _free_on_host() -> Iterator[int]:
    with suppress(OSError, ValueError, StopIteration):  # no Linux
        yield _line("/proc/meminfo", "MemAvailable:") * 1024
    with suppress(OSError, ValueError, StopIteration):  # no limit of a container
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        held = int(Path("/sys/fs/cgroup/memory.current").read_text())
        yield limit - held + _line("/sys/fs/cgroup/memory.stat", "inactive_file")
    with suppress(ImportError, OSError, ValueError, StopIteration):  # no limit of the process
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - _line("/proc/self/status", "VmSize:") * 1024
    yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _line(path: str, name: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(next(line for line in file if line.startswith(name)).split()[1])
