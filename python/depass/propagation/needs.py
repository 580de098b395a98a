"""How much memory there is, what a run needs of it, and what an allocation that failed asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..device_memory import free_memory
from ..models import weights
from ..models.bound import BoundModel
from ..models.streaming import arriving_bytes
from .blocks import rows_at_once, workspace
from .propagate import KEYS


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
    patterns = bound.num_heads * padded * max(lengths)
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
