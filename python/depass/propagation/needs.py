"""The memory that a run needs, and the memory available for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

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


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model from which the bytes of any run follow; counts, unless bytes are named.

    Attributes:
        row: the bytes of a layer's buffers for one row of the state.
        weight_bytes, product_bytes, state_bytes: those of one number of the model's weights, of products and of the state.
        width: of the residual stream.
        neurons, heads, values: of the layer that has most.
        copied_bytes: those of the copies of a layer's weights.
        chosen_experts, expert_neurons: the experts that a position chooses, and their neurons.
        lent_values: the values that are kept for later layers.
        is_recurrent, is_parallel: whether a layer has a recurrence; whether attention and MLP are parallel.
        pattern_copies: of a layer's patterns: a second one where their rows are padded.
    """

    row: RowBytes
    weight_bytes: int
    product_bytes: int
    state_bytes: int
    width: int
    neurons: int
    heads: int
    values: int
    copied_bytes: int
    chosen_experts: int
    expert_neurons: int
    lent_values: int
    is_recurrent: bool
    is_parallel: bool
    pattern_copies: int

    @staticmethod
    def of(bound: BoundModel, device: torch.device) -> Sizes:
        """Those of a model on ``device``. They follow from shapes; no weight is read."""
        dtypes, width = _Dtypes(bound.dtype, bound.product_dtype_on(device), bound.state_dtype), bound.hidden_size
        chosen, of_experts = _places(bound)
        attentions = (bound.layers[index].attention for index in bound.lending)
        copied = max(_copied_weights(each, width, dtypes) for each in bound.layers)
        return Sizes(
            row=RowBytes.of(bound, device),
            weight_bytes=dtypes.own.itemsize,
            product_bytes=dtypes.product.itemsize,
            state_bytes=dtypes.state.itemsize,
            width=width,
            neurons=bound.widest_layer.neurons,
            heads=bound.most_heads,
            values=bound.most_values,
            copied_bytes=copied + max(_lent(each, dtypes.own) for each in bound.layers),
            chosen_experts=chosen,
            expert_neurons=of_experts,
            lent_values=sum(mixer.value.shape[0] for mixer in attentions if mixer is not None),
            is_recurrent=bound.has_recurrence,
            is_parallel=bound.parallel,
            pattern_copies=2 if traits(device).keys > 1 else 1,
        )

    def needs(self, rows: int, lengths: Sequence[int], blocks: Blocks) -> Needs:
        """The bytes that a state of ``rows`` rows needs, for prompts of these lengths, if it moves in these blocks."""
        row, longest, padded = self.row, max(lengths), len(lengths) * max(lengths)
        attention = min(rows, blocks.attention)
        scattered = min(attention, blocks.run) * self.width * self.state_bytes * (attention < rows)
        buffers = max(attention * row.attention + min(attention, blocks.run) * row.run + scattered,
                      min(rows, blocks.mlp) * row.mlp)  # fmt: skip
        numbers = self.heads * padded * longest  # of a layer's patterns
        scores = numbers * (2 * self.weight_bytes + 4)  # the eager attention's: before and after its softmax in fp32
        if self.is_recurrent:
            own_pattern = max(self.state_bytes, 4)  # computed for some heads at a time, with seven more such matrices
            scores = max(scores, own_pattern * (numbers + 7 * min(numbers, max(padded * longest, HEADS_NUMBERS))))
        activations = padded * (4 * self.neurons + (8 + 3 * self.chosen_experts) * self.width) * self.weight_bytes
        kept = numbers * (max(self.weight_bytes, 4) if self.is_recurrent else self.weight_bytes) * self.pattern_copies
        # the hidden vectors and pre-activations of experts are made again
        buffers += padded * self.expert_neurons * (2 * self.weight_bytes + self.state_bytes)
        with_rows = 3 * 8 * rows  # offsets: in blocks of sources, and while they are computed
        with_rows += (
            rows * self.values * self.product_bytes * self.is_parallel + rows * self.product_bytes * self.lent_values
        )
        return Needs(
            state_bytes=rows * self.width * self.state_bytes,
            pass_bytes=scores + activations,
            buffer_bytes=max(0, kept + buffers + self.copied_bytes - scores) + with_rows,
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
    blocks, sizes = blocks_of(bound, workspace_bytes, device), Sizes.of(bound, device)
    if workspace_bytes is None and traits(device).one_block:
        one = replace(blocks, attention=rows)
        needed = sizes.needs(rows, lengths, one)
        held = needed.state_bytes + needed.buffer_bytes
        if needed.total_bytes <= budget and (beside_pass is None or held <= beside_pass):
            return one, needed
    return blocks, sizes.needs(rows, lengths, blocks)


def _places(bound: BoundModel) -> tuple[int, int]:
    """How many experts a position chooses at most, and how many neurons they have together."""
    layers = [layer.experts for layer in bound.layers if layer.experts is not None]
    return max((each.chosen for each in layers), default=0), max(
        (each.chosen * each.neurons for each in layers), default=0
    )


class _Dtypes(NamedTuple):
    own: torch.dtype  # of the model's weights
    product: torch.dtype
    state: torch.dtype


def _lent(layer: Layer, own: torch.dtype) -> int:
    """The bytes of the copies of a layer's offloaded or quantised weights; of experts, those of all."""
    lent = sum(weights.lent_bytes(projection.module, own) for projection in layer.projections)
    if layer.experts is None or not weights.is_offloaded(layer.experts.module):
        return lent
    return lent + sum(tensor.nbytes for tensor in layer.experts.tensors.values())


def _copied_weights(layer: Layer, width: int, dtypes: _Dtypes) -> int:
    """The bytes of the copies of a layer's weights in its attention or its MLP, whichever has more."""
    own, product = dtypes.own, dtypes.product

    def copied(projection: Projection, post_norm: Norm | None = None) -> int:
        size = projection.shape.numel()
        if post_norm is not None or projection.is_scaled:
            return size * (dtypes.state.itemsize + product.itemsize)
        sliced = projection.rows in ("last_of_head", "middle_of_four")  # not a view
        return size * product.itemsize * (product != own) + size * own.itemsize * sliced

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
    return max(attention, of_late, of_mlp + _copied_of_an_expert(layer, width, dtypes))


def _copied_of_an_expert(layer: Layer, width: int, dtypes: _Dtypes) -> int:
    """The bytes of the copies of one expert's weights, which exist one after the other."""
    if layer.experts is None:
        return 0
    product, size = dtypes.product, layer.experts.neurons * width
    if (layer.mlp_post_norm or layer.experts_post_norm) is not None or layer.experts.factor != 1:
        return size * (dtypes.state.itemsize + product.itemsize)
    return size * product.itemsize * (product != dtypes.own)


def room(bound: BoundModel) -> int:
    """The bytes available to a run besides the model's weights, on the layers' device that has the least."""
    return min(free_memory(device) for device in bound.devices) - arriving_bytes(bound)
