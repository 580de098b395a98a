"""The memory that a run needs, and the memory available for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..device_memory import free_memory
from ..models import weights
from ..models.bound import BoundModel, Layer, Norm, Projection
from ..models.recurrences import HEADS_NUMBERS
from ..models.streaming import arriving_bytes
from .blocks import Blocks, RowBytes, blocks_of, traits


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


def needs(bound: BoundModel, rows: int, lengths: Sequence[int], blocks: Blocks, device: torch.device) -> Needs:
    """The bytes that a state of ``rows`` rows needs, for prompts of these lengths, if it moves in these blocks.

    They follow from shapes; no weight is read.
    """
    layer, row = bound.widest_layer, RowBytes.of(bound, device)
    neurons, width, values = layer.neurons, bound.hidden_size, bound.most_values
    number, product, own = (d.itemsize for d in (bound.state_dtype, bound.product_dtype_on(device), bound.dtype))
    attention = min(rows, blocks.attention)
    scattered = min(attention, blocks.run) * width * number * (attention < rows)
    buffers = max(attention * row.attention + min(attention, blocks.run) * row.run + scattered,
                  min(rows, blocks.mlp) * row.mlp)  # fmt: skip
    folded = max(_copied_weights(bound, each, device) for each in bound.layers)
    folded += max(_lent(bound, layer) for layer in bound.layers)
    padded = len(lengths) * max(lengths)
    patterns = bound.most_heads * padded * max(lengths)
    scores = patterns * (2 * own + 4)  # the eager attention's: before and after its softmax in fp32
    if bound.has_recurrence:
        own_pattern = max(number, 4)  # computed for some heads at a time, with seven more such matrices
        together = min(patterns, max(padded * max(lengths), HEADS_NUMBERS))
        scores = max(scores, own_pattern * (patterns + 7 * together))
    chosen, of_experts = _places(bound)
    activations = padded * (4 * neurons + (8 + 3 * chosen) * width) * own
    in_pattern = max(own, 4) if bound.has_recurrence else own
    kept = patterns * in_pattern * (2 if traits(device).keys > 1 else 1)  # a second copy with padded rows
    buffers += padded * of_experts * (2 * own + number)  # hidden vectors and pre-activations, made again
    with_rows = 3 * 8 * rows  # offsets: in blocks of sources, and while they are computed
    if bound.parallel:
        with_rows += rows * values * product
    attentions = (bound.layers[index].attention for index in bound.lending)
    lent = sum(mixer.value.shape[0] for mixer in attentions if mixer is not None)
    with_rows += rows * product * lent  # kept for later layers
    return Needs(
        state_bytes=rows * width * number,
        pass_bytes=scores + activations,
        buffer_bytes=max(0, kept + buffers + folded - scores) + with_rows,
    )


def fitting(
    bound: BoundModel,
    rows: int,
    lengths: Sequence[int],
    workspace_bytes: int | None,
    device: torch.device,
    budget: int,
    beside_pass: int | None = None,
) -> tuple[Blocks, Needs]:
    """The blocks for a state, and what it needs with them; more than ``budget`` bytes if it does not fit.

    Where the device gains by it, ``workspace_bytes`` is not given and the budget allows, the attention takes one block.
    ``beside_pass`` limits the bytes of the state and the buffers alone.
    """
    blocks = blocks_of(bound, workspace_bytes, device)
    if workspace_bytes is None and traits(device).one_block:
        one = replace(blocks, attention=rows)
        needed = needs(bound, rows, lengths, one, device)
        held = needed.state_bytes + needed.buffer_bytes
        if needed.total_bytes <= budget and (beside_pass is None or held <= beside_pass):
            return one, needed
    return blocks, needs(bound, rows, lengths, blocks, device)


def _places(bound: BoundModel) -> tuple[int, int]:
    """How many experts a position chooses at most, and how many neurons they have together."""
    layers = [layer.experts for layer in bound.layers if layer.experts is not None]
    return max((each.chosen for each in layers), default=0), max(
        (each.chosen * each.neurons for each in layers), default=0
    )


def _lent(bound: BoundModel, layer: Layer) -> int:
    """The bytes of the copies of a layer's offloaded or quantised weights; of experts, those of all."""
    lent = sum(weights.lent_bytes(projection.module, bound.dtype) for projection in layer.projections)
    if layer.experts is None or not weights.is_offloaded(layer.experts.module):
        return lent
    return lent + sum(tensor.nbytes for tensor in layer.experts.tensors.values())


def _copied_weights(bound: BoundModel, layer: Layer, device: torch.device) -> int:
    """The bytes of the copies of a layer's weights in its attention or its MLP, whichever has more."""
    dtype = bound.product_dtype_on(device)
    number = bound.state_dtype.itemsize

    def copied(projection: Projection, post_norm: Norm | None = None) -> int:
        size = projection.shape.numel()
        if post_norm is not None or projection.is_scaled:
            return size * (number + dtype.itemsize)
        sliced = projection.rows in ("last_of_head", "middle_of_four")  # not a view
        return size * dtype.itemsize * (dtype != bound.dtype) + size * bound.dtype.itemsize * sliced

    attention = 0
    for mixer in layer.mixers:
        attention += copied(mixer.output, layer.attention_post_norm)
        attention += 0 if mixer.values_of is not None else copied(mixer.value)
        attention += 0 if mixer.latent is None else copied(mixer.latent)
    mlp, late, of_mlp, of_late = layer.mlp, layer.late, 0, 0
    if mlp is not None:
        of_mlp = copied(mlp.gate) + copied(mlp.down, layer.mlp_post_norm or layer.shared_post_norm)
    if late is not None:
        of_late = copied(late.gate) + copied(late.down, layer.late_post_norm)
    return max(attention, of_late, of_mlp + _copied_of_an_expert(bound, layer, device))


def _copied_of_an_expert(bound: BoundModel, layer: Layer, device: torch.device) -> int:
    """The bytes of the copies of one expert's weights, which exist one after the other."""
    if layer.experts is None:
        return 0
    dtype, size = bound.product_dtype_on(device), layer.experts.neurons * bound.hidden_size
    if (layer.mlp_post_norm or layer.experts_post_norm) is not None or layer.experts.factor != 1:
        return size * (bound.state_dtype.itemsize + dtype.itemsize)
    return size * dtype.itemsize * (dtype != bound.dtype)


def room(bound: BoundModel) -> int:
    """The bytes available to a run besides the model's weights, on the layers' device that has the least."""
    return min(free_memory(device) for device in bound.devices) - arriving_bytes(bound)
