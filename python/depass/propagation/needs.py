"""The memory that a run needs, and the memory available for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..device_memory import free_memory
from ..models import weights
from ..models.bound import BoundModel, Layer, Norm, Projection
from ..models.streaming import arriving_bytes
from .blocks import rows_at_once, workspace
from .propagate import KEYS


@dataclass(frozen=True)
class Needs:
    """The bytes that a run needs besides the model's weights.

    Attributes:
        state_bytes: the decomposed state ``[R, D]``.
        pass_bytes: the peak of the model's own pass over the prompts: patterns and hidden vectors of one layer.
        buffer_bytes: blocks of normed rows, values and gates, and the copies of a layer's weights that are offloaded,
            quantised, of another dtype than the products, or multiplied by the weight of a norm on the output.
    """

    state_bytes: int
    pass_bytes: int
    buffer_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum of these bytes."""
        return self.state_bytes + self.pass_bytes + self.buffer_bytes


def needs(
    bound: BoundModel, rows: int, lengths: Sequence[int], workspace_bytes: int | None, device: torch.device
) -> Needs:
    """The bytes that a state of ``rows`` rows needs, for prompts of these lengths.

    They follow from shapes; no weight is read.
    """
    layer = bound.widest_layer
    (neurons, width), values, heads = layer.gate.shape, layer.value.shape[0], layer.output.shape[1]
    number, product, own = (d.itemsize for d in (bound.state_dtype, bound.product_dtype_on(device), bound.dtype))
    attention, mlp = rows_at_once(bound, layer, workspace(workspace_bytes, device))
    blocks = max(min(rows, attention) * (product * (values + heads + width) + number * width),
                 min(rows, mlp) * (neurons * (product + number) + width * product))  # fmt: skip
    folded = _copied_weights(bound, layer, device)
    folded += max(sum(weights.lent_bytes(p.module, bound.dtype) for p in layer.projections) for layer in bound.layers)
    padded = len(lengths) * max(lengths)
    patterns = bound.num_heads * padded * max(lengths)
    scores = patterns * (2 * own + 4)  # the eager attention's: before and after its softmax in fp32
    activations = padded * (4 * neurons + 8 * width) * own
    kept = patterns * own * (2 if device.type in KEYS else 1)  # on CUDA a second copy with padded rows
    with_rows = 3 * 8 * rows  # offsets: in blocks of sources, and while they are computed
    if bound.parallel:
        with_rows += rows * values * product
    return Needs(
        state_bytes=rows * width * number,
        pass_bytes=scores + activations,
        buffer_bytes=max(0, kept + blocks + folded - scores) + with_rows,
    )


def _copied_weights(bound: BoundModel, layer: Layer, device: torch.device) -> int:
    """The bytes of the copies of a layer's weights in its attention or its MLP, whichever has more."""
    dtype = bound.product_dtype_on(device)
    number = bound.state_dtype.itemsize

    def copied(projection: Projection, post_norm: Norm | None = None) -> int:
        size = projection.shape.numel()
        if post_norm is not None:
            return size * (number + dtype.itemsize)
        sliced = projection.rows == "last_of_head"  # not a view
        return size * dtype.itemsize * (dtype != bound.dtype) + size * bound.dtype.itemsize * sliced

    attention = copied(layer.value) + copied(layer.output, layer.attention_post_norm)
    return max(attention, copied(layer.gate) + copied(layer.down, layer.mlp_post_norm))


def room(bound: BoundModel) -> int:
    """The bytes available to a run besides the model's weights, on the layers' device that has the least."""
    return min(free_memory(device) for device in bound.devices) - arriving_bytes(bound)
