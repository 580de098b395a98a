"""Planning an attribution: its rows, bytes, operations and, with a measured rate, seconds.

The plan follows from shapes. No weight is read, so the model may be on the meta device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..checks import integer
from ..device_memory import shown
from ..errors import OptionError
from ..models.bound import BoundModel
from ..models.streaming import weight_bytes
from ..models.weights import numbers
from ..propagation.needs import fitting

SOURCES = ("token", "heads", "neurons")
_MARGIN = 1.15  # measured: the time end to end, relative to that of the matrix products


@dataclass(frozen=True)
class Plan:
    """The memory and time that a decomposition of one prompt needs.

    Attributes:
        model: the model's name.
        device: the device that it runs on.
        dtype: the dtype of the weights.
        positions: the number of tokens, ``N``.
        sources: the number of sources, ``M``, the bias source included.
        rows: the number of rows of the state, ``R``.
        weights_bytes: the model's weights, those that are on its devices at once.
        state_bytes: the decomposed state ``[R, D]``.
        pass_bytes: the peak of the model's own pass over the prompt: patterns and hidden vectors of one layer.
        buffer_bytes: blocks of normed rows, values and gates, and the copies of a layer's offloaded or
            quantised weights.
        source_block_rows: the rows of an attention block.
        position_block_rows: the rows of an MLP block.
        operations: the floating-point operations of all matrix products of the decomposition, for targets at the last
            position.
        seconds: the estimated time at the measured rate, or None.
        budget_bytes: the bytes available.
        largest: the most tokens, with the same kind of sources, that fit into the budget; 0 if none do.
    """

    model: str
    device: str
    dtype: str
    positions: int
    sources: int
    rows: int
    weights_bytes: int
    state_bytes: int
    pass_bytes: int
    buffer_bytes: int
    source_block_rows: int
    position_block_rows: int
    operations: int
    seconds: float | None
    budget_bytes: int
    largest: int

    @property
    def total_bytes(self) -> int:
        """The sum of these bytes, at the peak."""
        return self.weights_bytes + self.state_bytes + self.pass_bytes + self.buffer_bytes

    @property
    def fits(self) -> bool:
        """Whether the total is within the budget."""
        return self.total_bytes <= self.budget_bytes

    def __str__(self) -> str:
        verdict = "fits" if self.fits else "does NOT fit"
        lines = [
            f"{self.model}, {self.dtype}, on {self.device}: {self.positions:,} tokens, {self.sources:,} sources",
            f"  rows           {self.rows:>18,}",
            f"  weights        {shown(self.weights_bytes):>18}",
            f"  state          {shown(self.state_bytes):>18}",
            f"  model's pass   {shown(self.pass_bytes):>18}",
            f"  buffers        {shown(self.buffer_bytes):>18}",
            f"  total          {shown(self.total_bytes):>18}  {verdict} into {shown(self.budget_bytes)}",
            f"  operations     {self.operations / 1e12:>13.3f} Tera",
            f"  blocks         {self.source_block_rows:,} rows of attention, {self.position_block_rows:,} of MLP",
            f"  largest prompt {self.largest:>12,} tokens",
        ]
        if self.seconds is not None:
            lines.insert(8, f"  time           {self.seconds:>16.2f} s  at this machine's measured rate")
        return "\n".join(lines)


def make(
    bound: BoundModel,
    positions: int,
    sources: Any,
    device: torch.device,
    budget: int,
    workspace_bytes: int | None,
    operations_per_second: float | None = None,
) -> Plan:
    """Plan a decomposition.

    Args:
        bound: the model; its weights are not read.
        positions: the number of tokens, ``N``.
        sources: ``"token"``, a number of spans of equal length, or ``"heads"`` or ``"neurons"`` of one layer.
        device: the device that it runs on.
        budget: the bytes available, the weights' included.
        workspace_bytes: as for :class:`depass.DePass`.
        operations_per_second: the rate of matrix products on the device, as :func:`measured_rate` returns it.

    Raises:
        OptionError: the sources or the number of tokens are invalid.
    """
    if integer("tokens", positions, OptionError) < 1:
        raise OptionError(f"tokens must be positive, got {positions}")
    if bound.max_positions is not None and positions > bound.max_positions:
        raise OptionError(
            f"tokens must be at most {bound.max_positions}, the positions of {bound.name}, got {positions}"
        )
    plan = _sized(bound, positions, sources, device, budget, workspace_bytes, operations_per_second)
    low, high = 0, bound.max_positions or 1 << 20
    while low < high:  # the largest that fits
        middle = (low + high + 1) // 2
        if _sized(bound, middle, sources, device, budget, workspace_bytes, None).fits:
            low = middle
        else:
            high = middle - 1
    return replace(plan, largest=low)


def rows_and_sources(bound: BoundModel, positions: int, sources: Any) -> tuple[int, int]:
    """The number of rows ``R`` and of sources ``M``, the bias source included.

    Raises:
        OptionError: the sources are unknown.
    """
    bias = int(bound.has_bias)
    if isinstance(sources, str):
        if sources == "token":
            return positions * (positions + 1) // 2 + bias * positions, positions + bias
        if sources in SOURCES:
            named = bound.num_heads if sources == "heads" else bound.layers[0].down.shape[1]
            return (named + 1 + bias) * positions, named + 1 + bias
        raise OptionError(f"unknown sources {sources!r} of a plan; choose {', '.join(SOURCES)} or a number of spans")
    count = min(integer("sources", sources, OptionError), positions)
    if count < 1:
        raise OptionError(f"sources must be at least one span, got {sources}")
    begins = (span * positions // count for span in range(count))
    return sum(positions - begin for begin in begins) + bias * positions, count + bias


def measured_rate(bound: BoundModel, device: torch.device) -> float:
    """The operations per second of this device's matrix products, measured in the shapes of the model's MLP."""
    neurons, width = bound.layers[0].gate.shape
    dtype = bound.product_dtype_on(device)
    rows = 4096 if device.type == "cuda" else 256
    a = torch.randn(rows, width, device=device).to(dtype)
    w = torch.randn(neurons, width, device=device).to(dtype)
    best = 0.0
    for _ in range(4):
        began = time.perf_counter()
        product = a @ w.T
        float(product[0, 0])  # waits for the device
        best = max(best, 2 * rows * neurons * width / (time.perf_counter() - began))
    return best


def _sized(
    bound: BoundModel,
    positions: int,
    sources: Any,
    device: torch.device,
    budget: int,
    workspace_bytes: int | None,
    rate: float | None,
) -> Plan:
    rows, count = rows_and_sources(bound, positions, sources)
    layer = bound.layers[0]
    value, output, gate, down = (2 * part.shape.numel() for part in layer.projections)
    others = rows * (len(bound.layers) - 1) + count  # of the last layer only the last position's rows
    operations = rows * len(bound.layers) * value + others * (output + gate + down)
    forward = 2 * positions * numbers(bound.backbone)
    weights = weight_bytes(bound)
    blocks, needed = fitting(bound, rows, [positions], workspace_bytes, device, budget - weights)
    return Plan(
        model=bound.name,
        device=str(device),
        dtype=str(bound.dtype).removeprefix("torch."),
        positions=positions,
        sources=count,
        rows=rows,
        weights_bytes=weights,
        state_bytes=needed.state_bytes,
        pass_bytes=needed.pass_bytes,
        buffer_bytes=needed.buffer_bytes,
        source_block_rows=min(rows, blocks.attention),
        position_block_rows=min(rows, blocks.mlp),
        operations=operations,
        seconds=None if rate is None else _MARGIN * (operations + forward) / rate,
        budget_bytes=budget,
        largest=0,
    )
