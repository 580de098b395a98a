"""How much memory there is, what a run needs of it, and what an allocation that failed asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from . import weights
from .checks import UNITS
from .families import BoundModel
from .propagate import KEYS, rows_at_once, workspace
from .streaming import arriving_bytes


@dataclass(frozen=True)
class Needs:
    """Bytes that a run takes beside the model's weights.

    Attributes:
        state_bytes: the decomposed state ``[R, D]``.
        pass_bytes: of the model's own pass over the prompts, at its largest: patterns and hidden vectors of one layer.
        buffer_bytes: blocks of values and gates, a weight while it is folded, and of a layer with offloaded or quantised
            weights the copies that are made of them.
    """

    state_bytes: int
    pass_bytes: int
    buffer_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it together, at its largest."""
        return self.state_bytes + self.pass_bytes + self.buffer_bytes


def needs(
    bound: BoundModel, rows: int, lengths: Sequence[int], workspace_bytes: int | None, device: torch.device
) -> Needs:
    """What a state of so many rows takes, on its way through the model with prompts of these lengths.

    From shapes alone: no weight is read.
    """
    layer = bound.widest_layer
    (neurons, width), values, heads = layer.gate.shape, layer.value.shape[0], layer.output.shape[1]
    number, product, own = (d.itemsize for d in (bound.state_dtype, bound.product_dtype_on(device), bound.dtype))
    attention, mlp = rows_at_once(bound, layer, workspace(workspace_bytes, device))
    blocks = max(min(rows, attention) * (product * (values + heads + width) + number * width),
                 min(rows, mlp) * (neurons * (product + number) + width * product))  # fmt: skip
    folded = max(neurons, values) * width * (number + product)
    folded += max(sum(weights.lent_bytes(part.module, bound.dtype) for part in one.projections) for one in bound.layers)
    padded = len(lengths) * max(lengths)
    patterns = bound.heads * padded * max(lengths)
    scores = patterns * (2 * own + 4)  # the eager attention's: before and after its softmax in fp32
    activations = padded * (4 * neurons + 8 * width) * own
    kept = patterns * own * (2 if device.type in KEYS else 1)  # and once more with longer rows
    with_rows = 3 * 8 * rows  # offsets: in blocks of sources, and while they are made
    if bound.parallel:
        with_rows += rows * values * product
    return Needs(
        state_bytes=rows * width * number,
        pass_bytes=scores + activations,
        buffer_bytes=max(0, kept + blocks + folded - scores) + with_rows,
    )


def room(bound: BoundModel) -> int:
    """Bytes that a run may take beside the model's weights, on the device with the least of those where layers work."""
    return min(free_memory(device) for device in bound.devices) - arriving_bytes(bound)


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
