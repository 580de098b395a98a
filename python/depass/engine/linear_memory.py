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
    widest = bound.widest_layer
    neurons, width, mixed = widest.neurons, bound.hidden_size, bound.most_mixed
    tokens, of_query = sum(lengths), bound.most_heads * len(lengths) * max(lengths)  # numbers in patterns
    at_once = max(lengths)
    if not bound.has_recurrence:
        at_once = queries_at_once(bound.device, bound.most_heads * len(lengths), max(lengths))
    pattern, is_kept = of_query * at_once, at_once == max(lengths)  # in blocks it is computed again
    in_fp32 = 4 * (number < 4)  # a softmax of half precision computes in fp32, and then rounds
    of_neuron = 2 * number + state if widest.experts is None else number + 2 * state
    layer = tokens * (neurons * of_neuron + (3 * width + mixed) * number) + pattern * number * is_kept
    if not is_kept:  # queries, keys and values
        layer += tokens * (mixed + 2 * bound.most_values) * number
    together = min(targets, group_size(bound, lengths, path_weights))
    back = together * tokens * _numbers_back(bound) * max(number, state) * 3 // 5  # measured: not all at once
    ahead = pattern * (number + in_fp32 * 3 // 2)
    if widest.experts is not None:  # of each place: its rows, and its neurons' derivatives, measured
        in_state = 5 if number == state else 7
        rows = 3 * width * number + in_state * widest.experts.neurons * state
        ahead = max(ahead, tokens * widest.experts.chosen * rows)
    working = max(ahead, back)
    if path_weights.steers:  # the softmax's derivative needs its output, and two gradients of the pattern
        layer += (tokens * 4 * mixed * number + pattern * in_fp32) * is_kept
        working = max(ahead, together * pattern * (number + 4) + back)
    held = tokens * width * (number * layers + 2 * targets * state)
    return LinearNeeds(layer, working, held)


def group_size(bound: BoundModel, lengths: Sequence[int], path_weights: PathWeights) -> int:
    """How many targets of a prompt go back together, so that their gradients have at most :data:`BATCH_NUMBERS`."""
    width = _numbers_back(bound)
    if path_weights.steers:
        width += 3 * bound.most_heads * max(lengths)
    return max(1, BATCH_NUMBERS // (width * sum(lengths)))


def _numbers_back(bound: BoundModel) -> int:
    """The numbers of one layer's gradients for a token and a target; each chosen expert has copies of the token's rows."""
    layer = bound.widest_layer
    copies = 0 if layer.experts is None else 4 * layer.experts.chosen
    return 4 * layer.neurons + (8 + copies) * bound.hidden_size


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
