"""A pass whose decomposed states are kept, or handed out, as they enter layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..errors import NonFiniteError
from ..models.health import blame
from .passes import Engine, Pass
from .request import Case, Options


class KeptStates(Pass):
    """A pass over one case.

    Args:
        engine: the model.
        case: the prompt and its sources.
        options: how.
        layers: whose input states are wanted.
        on_state: given each, its state ``[R, D]`` and stream ``[N, D]``; then nothing is kept.

    Attributes:
        rows: by layer, ``[R, D]`` on the CPU.
        residual: by layer, ``[N, D]`` on the CPU.
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
        """Keep a state that is wanted.

        Raises:
            NonFiniteError: it holds NaN or infinity.
        """
        if layer not in self.wanted:
            return
        rows = self.propagation.state
        if not bool(rows.isfinite().all()):
            raise NonFiniteError(f"the state entering layer {layer} is not finite; {blame(self.bound)}")
        if self.on_state is not None:
            self.on_state(layer, rows, stream)
        else:
            self.rows[layer] = rows.to("cpu", copy=True)
            self.residual[layer] = stream.to("cpu", copy=True)
