"""The available memory of a device, and the size of an allocation that failed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from .checks import UNITS


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device: the smallest of its free memory and its limits."""
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
        cached = reserved - torch.cuda.memory_allocated(device)  # by torch, for later allocations
        return max(0, min(int(free), allowed)) + cached
    return max(0, min(_free_on_host()))


def asked_bytes(error: BaseException) -> int | None:
    """The bytes whose allocation failed (0: the error does not say); None for an error other than out of memory."""
    said = str(error)
    if match := re.search(r"tried to allocate ([\d.]+)(?: (bytes)| ([KMGT]iB))", said, re.IGNORECASE):
        return int(float(match[1]) * UNITS[(match[3] or "").upper().removesuffix("B")])
    words = r"out of memory|cannot allocate memory|bad_alloc|_ALLOC_FAILED"
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(words, said, re.IGNORECASE)
    return 0 if memory else None


def shown(count: int) -> str:
    """Format a number of bytes as ``34.36 GB`` or ``512.0 MB``."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _free_on_host() -> Iterator[int]:
    with suppress(OSError, ValueError, StopIteration):  # not on Linux
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
