"""A pass that keeps the decomposed states at the inputs of layers, or passes them to a callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..errors import NonFiniteError
from ..models.health import blame
from .passes import Engine, Pass
from .request import Case, Options


class KeptStates(Pass):
    """A pass over one case, for its states.

    Args:
        engine: the model and its settings.
        case: the prompt and its sources.
        options: the options of the pass.
        layers: the layers whose input states are wanted.
        on_state: a function that is called with each layer, its state ``[R, D]`` and its residual stream ``[N, D]``; then
            no state is kept.

    Attributes:
        rows: by layer, the state ``[R, D]`` on the CPU.
        residual: by layer, the residual stream ``[N, D]`` on the CPU.
    """

    def __init__(
        self,
        engine: Engine,
        case: Case,
        options: Options,
        layers: Sequence[int],
        on_state: Callable[[int, Tensor, Tensor], None] | None,
    ) -> None:
        super().__init__(engine, [case.prompt], [(case.parts, 0)], options)
        self.wanted, self.on_state = layers, on_state
        self.rows: dict[int, Tensor] = {}
        self.residual: dict[int, Tensor] = {}

    def state(self, layer: int, stream: Tensor) -> None:
        """Keep a state, or pass it to the callback, if its layer is wanted.

        Raises:
            NonFiniteError: the state contains NaN or infinity.
        """
        if layer not in self.wanted:
            return
        rows = self.propagation.state
        if not bool(rows.isfinite().all()):
            raise NonFiniteError(f"the state at the input of layer {layer} is not finite; {blame(self.bound)}")
        if self.on_state is not None:
            self.on_state(layer, rows, stream)
        else:
            self.rows[layer] = rows.to("cpu", copy=True)
            self.residual[layer] = stream.to("cpu", copy=True)
