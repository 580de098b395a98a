"""Planning an attribution under any rule: its rows, bytes, operations and, with a measured rate, seconds.

The plan follows from shapes. No weight is read, so the model may be on the meta device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from ..checks import integer
from ..device_memory import shown
from ..errors import OptionError
from ..models.bound import BoundModel
from ..models.streaming import weight_bytes
from ..models.weights import numbers
from ..propagation.blocks import Blocks
from ..propagation.needs import fitting
from ..rules import PathWeights
from .linear_memory import linear_needs, recomputes
from .request import Options

SOURCES = ("token", "heads", "neurons", "experts")
_MARGIN = 1.15  # measured: the time end to end, relative to that of the matrix products
_MARGIN_BACK = 1.5  # the same of a backward pass; assumed, not measured


@dataclass(frozen=True)
class Plan:
    """The memory and time that an attribution of one prompt needs.

    A mixture needs the memory of the part that needs the most, and the time of all.

    Attributes:
        model: the model's name.
        device: the device that it runs on.
        dtype: the dtype of the weights.
        rule: the rule.
        positions: the number of tokens, ``N``.
        sources: the number of sources, ``M``, the bias source included.
        rows: the number of rows of the state, ``R``; 0 under linear rules, which have no state.
        weights_bytes: the model's weights, those that are on its devices at once.
        state_bytes: the decomposed state ``[R, D]``; under linear rules, the layers' inputs and the gradients.
        pass_bytes: the peak of the model's own pass over the prompt: patterns and hidden vectors of one layer. Under linear
            rules it includes the activations that are kept for the way back.
        buffer_bytes: blocks of normed rows, values and gates, and the copies of a layer's offloaded or
            quantised weights.
        recomputed: whether a linear rule keeps the activations of one layer at a time, and runs each layer again.
        source_block_rows: the rows of an attention block.
        position_block_rows: the rows of an MLP block.
        operations: the floating-point operations of all matrix products of the decomposition, for targets at the last
            position; under a linear rule, those of the pass there and back for one target.
        seconds: the estimated time at the measured rate, or None.
        budget_bytes: the bytes available.
        largest: the most tokens, with the same kind of sources, that fit into the budget; 0 if none do.
    """

    model: str
    device: str
    dtype: str
    rule: str
    positions: int
    sources: int
    rows: int
    weights_bytes: int
    state_bytes: int
    pass_bytes: int
    buffer_bytes: int
    recomputed: bool
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
        twice = "  one layer at a time, each run twice" if self.recomputed else ""
        lines = [
            f"{self.model}, {self.dtype}, on {self.device}: {self.positions:,} tokens, {self.sources:,} sources, "
            f"rule {self.rule}",
            f"  rows           {self.rows:>18,}",
            f"  weights        {shown(self.weights_bytes):>18}",
            f"  state          {shown(self.state_bytes):>18}",
            f"  model's pass   {shown(self.pass_bytes):>18}{twice}",
            f"  buffers        {shown(self.buffer_bytes):>18}",
            f"  total          {shown(self.total_bytes):>18}  {verdict} into {shown(self.budget_bytes)}",
            f"  operations     {self.operations / 1e12:>13.3f} Tera",
        ]
        if self.seconds is not None:
            lines.append(f"  time           {self.seconds:>16.2f} s  at this machine's measured rate")
        if self.rows:
            lines.append(
                f"  blocks         {self.source_block_rows:,} rows of attention, {self.position_block_rows:,} of MLP"
            )
        lines.append(f"  largest prompt {self.largest:>12,} tokens")
        return "\n".join(lines)


def make(
    bound: BoundModel,
    positions: int,
    sources: Any,
    device: torch.device,
    budget: int,
    workspace_bytes: int | None,
    operations_per_second: float | None = None,
    chosen: Options | None = None,
    targets: int = 1,
) -> Plan:
    """Plan an attribution.

    Args:
        bound: the model; its weights are not read.
        positions: the number of tokens, ``N``.
        sources: ``"token"``, a number of spans of equal length, or ``"heads"``, ``"neurons"`` or ``"experts"`` of one
            layer.
        device: the device that it runs on.
        budget: the bytes available, the weights' included.
        workspace_bytes: as for :class:`depass.DePass`.
        operations_per_second: the rate of matrix products on the device, as :func:`measured_rate` returns it.
        chosen: the options of the attribution, which say what rule runs and on which engine; None: softmax.
        targets: the number of targets. A backward pass goes back once for each.

    Raises:
        OptionError: the sources or the number of tokens or targets are invalid.
    """
    if integer("targets", targets, OptionError) < 1:
        raise OptionError(f"targets must be positive, got {targets}")
    if integer("tokens", positions, OptionError) < 1:
        raise OptionError(f"tokens must be positive, got {positions}")
    if bound.max_positions is not None and positions > bound.max_positions:
        raise OptionError(
            f"tokens must be at most {bound.max_positions}, the positions of {bound.name}, got {positions}"
        )
    sized = partial(
        _sized, bound, sources=sources, device=device, budget=budget, workspace_bytes=workspace_bytes, targets=targets,
        rule="softmax" if chosen is None else chosen.sharing.rule,
        paths=(None,) if chosen is None else tuple(one.paths for _, one in chosen.rules),
    )  # fmt: skip
    plan = sized(positions, rate=operations_per_second)
    low, high = 0, bound.max_positions or 1 << 20
    while low < high:  # the largest that fits
        middle = (low + high + 1) // 2
        if sized(middle, rate=None).fits:
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
            named = bound.most_heads if sources == "heads" else _most(bound, sources)
            return (named + 1 + bias) * positions, named + 1 + bias
        raise OptionError(f"unknown sources {sources!r} of a plan; choose {', '.join(SOURCES)} or a number of spans")
    count = min(integer("sources", sources, OptionError), positions)
    if count < 1:
        raise OptionError(f"sources must be at least one span, got {sources}")
    begins = (span * positions // count for span in range(count))
    return sum(positions - begin for begin in begins) + bias * positions, count + bias


def _most(bound: BoundModel, sources: str) -> int:
    """The number of neurons, or of experts, of the layer that has most of them."""
    if sources == "experts":
        counts = [layer.experts.count for layer in bound.layers if layer.experts is not None]
        lacking = "has no experts"
    else:
        counts = [layer.mlp.down.shape[1] for layer in bound.layers if layer.mlp is not None and layer.experts is None]
        has_experts = "has experts in every layer, whose neurons are no sources; choose 'experts'"
        lacking = has_experts if bound.has_experts else "has no layer with an MLP; choose 'heads'"
    if not counts:
        raise OptionError(f"sources={sources!r} of a plan: {bound.name} {lacking}")
    return max(counts)


def measured_rate(bound: BoundModel, device: torch.device) -> float:
    """The operations per second of this device's matrix products, in the shapes of the model's MLP or of an expert.

    A model without an MLP has those of its output projections.
    """
    layer, width = bound.widest_layer, bound.hidden_size
    neurons = layer.neurons if layer.experts is None else layer.experts.neurons
    neurons = neurons or bound.most_mixed
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


class _Cost(NamedTuple):
    """What one rule needs; see :class:`Plan`."""

    rows: int
    state_bytes: int
    pass_bytes: int
    buffer_bytes: int
    operations: int
    seconds_of_operations: (
        float  # at one operation a second: these and the model's own pass, with all that is no product
    )
    recomputed: bool = False
    blocks: Blocks | None = None

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.pass_bytes + self.buffer_bytes


def _sized(
    bound: BoundModel,
    positions: int,
    *,
    sources: Any,
    device: torch.device,
    budget: int,
    workspace_bytes: int | None,
    targets: int,
    rule: str,
    paths: Sequence[PathWeights | None],
    rate: float | None,
) -> Plan:
    rows, count = rows_and_sources(bound, positions, sources)
    weights = weight_bytes(bound)
    costs = [
        _forward(bound, positions, rows, count, device, budget - weights, workspace_bytes)
        if each is None
        else _backward(bound, positions, budget - weights, each, targets)
        for each in paths
    ]
    largest = max(costs, key=lambda cost: cost.total_bytes)
    blocks = next((cost.blocks for cost in costs if cost.blocks is not None), None)
    return Plan(
        model=bound.name,
        device=str(device),
        dtype=str(bound.dtype).removeprefix("torch."),
        rule=rule,
        positions=positions,
        sources=count,
        rows=0 if blocks is None else rows,
        weights_bytes=weights,
        state_bytes=largest.state_bytes,
        pass_bytes=largest.pass_bytes,
        buffer_bytes=largest.buffer_bytes,
        recomputed=any(cost.recomputed for cost in costs),
        source_block_rows=0 if blocks is None else min(rows, blocks.attention),
        position_block_rows=0 if blocks is None else min(rows, blocks.mlp),
        operations=sum(cost.operations for cost in costs),
        seconds=None if rate is None else sum(cost.seconds_of_operations for cost in costs) / rate,
        budget_bytes=budget,
        largest=0,
    )


def _forward(
    bound: BoundModel,
    positions: int,
    rows: int,
    count: int,
    device: torch.device,
    room: int,
    workspace_bytes: int | None,
) -> _Cost:
    """What a decomposed state of ``rows`` rows and ``count`` sources needs."""
    projections = [projection for layer in bound.layers for mixer in layer.mixers for projection in mixer.projections]
    outputs = [sum(mixer.output.shape.numel() for mixer in layer.mixers) for layer in bound.layers]
    before = 2 * (sum(projection.shape.numel() for projection in projections) - sum(outputs))  # values, latent ones too
    others = [2 * (output + 2 * layer.neurons * bound.hidden_size)
              for output, layer in zip(outputs, bound.layers, strict=True)]  # fmt: skip
    # of the last layer only the last position's rows
    operations = rows * (before + sum(others[:-1])) + count * others[-1]
    own = 2 * positions * (numbers(bound.backbone) - sum(layer.idle_numbers for layer in bound.layers))
    blocks, needed = fitting(bound, rows, [positions], workspace_bytes, device, room)
    return _Cost(
        rows, needed.state_bytes, needed.pass_bytes, needed.buffer_bytes, operations, _MARGIN * (operations + own),
        blocks=blocks,
    )  # fmt: skip


def _backward(bound: BoundModel, positions: int, room: int, path_weights: PathWeights, targets: int) -> _Cost:
    """What a backward pass from so many targets needs."""
    depth = len(bound.layers)
    needed = linear_needs(bound, [positions], depth, targets, path_weights)
    recomputed = recomputes(needed, depth, room)
    kept = 1 if recomputed else depth
    products = 2 * positions * sum(numbers(layer.module) - layer.idle_numbers for layer in bound.layers)
    # one product of patterns and vectors in every layer
    mixing = 2 * positions**2 * sum(layer.mixed for layer in bound.layers)
    back = products + mixing * (4 if path_weights.steers else 1)
    operations = (2 if recomputed else 1) * (products + 2 * mixing) + targets * back
    return _Cost(
        0,
        needed.held_bytes,
        needed.total(kept) - needed.held_bytes,
        0,
        operations,
        _MARGIN_BACK * operations,
        recomputed,
    )
