"""Which experts a prompt chooses, by a pass of the model: sources are laid out before the pass that decomposes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.bound import BoundModel
from ..models.capture import Capture
from ..models.trace import Trace


def chosen_experts(bound: BoundModel, ids: Sequence[int], layers: Sequence[int]) -> dict[int, Tensor]:
    """The experts ``[N, k]`` that each position of a prompt chooses, on the CPU, by layer; -1 where the weight is zero.

    Layers without experts are left out; where none has any, the model does not run.

    Args:
        bound: the model.
        ids: the prompt's token ids.
        layers: the layers.

    Raises:
        ModelError: see :meth:`depass.models.capture.Capture.run`.
    """
    wanted = set(layers) & set(bound.expert_layers)
    if not wanted:
        return {}
    routing = _Routing(bound, [ids], range(min(wanted), max(wanted) + 1))
    with torch.no_grad():
        routing.run()
    return {index: routing.chosen[index] for index in wanted}


class _Routing(Capture):
    """A pass that keeps which experts each position chose."""

    def __init__(self, bound: BoundModel, prompts: Sequence[Sequence[int]], layers: range) -> None:
        super().__init__(bound, prompts, layers)
        self.chosen: dict[int, Tensor] = {}

    def layer(self, index: int, trace: Trace) -> None:
        """Keep the layer's choices."""
        if trace.chosen is not None and trace.chosen_weights is not None:
            self.chosen[index] = trace.chosen.masked_fill(trace.chosen_weights == 0, -1).cpu()
