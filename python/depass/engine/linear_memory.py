"""The memory that a backward pass needs, from shapes alone, and whether it keeps its activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..device_memory import shown
from ..errors import MemoryLimitError
from ..models.bound import BoundModel
from ..models.query_blocks import queries_at_once
from ..rules import PathWeights

BATCH_NUMBERS = 1 << 24  # numbers in the gradients of one layer that are computed at a time, for several targets


@dataclass(frozen=True)
class LinearNeeds:
    """The bytes that a backward pass needs besides the model's weights.

    Attributes:
        layer_bytes: the activations of one layer that its gradients need.
        working_bytes: what is held for a short time while one layer runs there and back.
        held_bytes: the layers' inputs, and the targets' gradients.
    """

    layer_bytes: int
    working_bytes: int
    held_bytes: int

    def total(self, layers: int) -> int:
        """The peak where the activations of so many layers are kept at a time."""
        return self.layer_bytes * layers + self.working_bytes + self.held_bytes


def linear_needs(
    bound: BoundModel, lengths: Sequence[int], layers: int, targets: int, path_weights: PathWeights
) -> LinearNeeds:
    """The needs of a pass over prompts of these lengths, through so many layers and back from so many targets."""
    number, state = bound.dtype.itemsize, bound.state_dtype.itemsize
    wide, tokens, heads = bound.widest_layer, sum(lengths), bound.num_heads * len(lengths)
    (neurons, width), mixed, values = wide.gate.shape, wide.output.shape[1], wide.value.shape[0]
    at_once, longest = queries_at_once(bound.device, heads, max(lengths)), max(lengths)
    pattern, is_kept = heads * longest * at_once, at_once == longest  # in blocks it is computed again on the way back
    in_fp32 = 4 * (number < 4)  # a softmax of half precision computes in fp32, and then rounds
    layer = tokens * (neurons * (2 * number + state) + (3 * width + mixed) * number)
    layer += pattern * number if is_kept else tokens * (mixed + 2 * values) * number  # or queries, keys and values
    together = min(targets, group_size(bound, lengths, path_weights))
    back = together * tokens * (4 * neurons + 8 * width) * max(number, state) * 3 // 5  # measured: not all at once
    ahead = pattern * (number + in_fp32 * 3 // 2)
    working = max(ahead, back)
    if path_weights.steers:  # the softmax's derivative needs its output, and two gradients of the pattern
        layer += (tokens * 4 * mixed * number + pattern * in_fp32) * is_kept
        working = together * pattern * (number + 4) + back
    held = tokens * width * (number * layers + 2 * targets * state)
    return LinearNeeds(layer, working, held)


def group_size(bound: BoundModel, lengths: Sequence[int], path_weights: PathWeights) -> int:
    """How many targets of a prompt go back together, so that their gradients have at most :data:`BATCH_NUMBERS`."""
    width = 4 * bound.widest_layer.gate.shape[0] + 8 * bound.hidden_size
    if path_weights.steers:
        width += 3 * bound.num_heads * max(lengths)
    return max(1, BATCH_NUMBERS // (width * sum(lengths)))


def recomputes(needed: LinearNeeds, layers: int, available: int) -> bool:
    """Whether layers are run again, because the activations of all do not fit into half of the available memory.

    Where they fit, keeping them is faster on a CPU, too. It was not while patterns were kept, whatever their size: at 2,048
    tokens of SmolLM2 fresh memory took longer than another run (:mod:`depass.models.query_blocks`).
    """
    return needed.total(layers) > available // 2


def must_fit(needed: LinearNeeds, tokens: int, targets: int, available: int) -> None:
    """Check that a pass fits that keeps the activations of one layer at a time.

    Raises:
        MemoryLimitError: it does not.
    """
    if needed.total(1) > available:
        raise MemoryLimitError(
            f"{tokens:,} tokens and {targets:,} targets need {shown(needed.total(1))} besides the model's weights under a "
            f"linear rule, {shown(max(0, available))} are available; use fewer tokens or targets"
        )
