"""Decomposed states as a result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from depass_kernels import SourceLayout

from ..checks import integer
from ..errors import OptionError
from ..sources.source import Source


@dataclass(frozen=True, eq=False)
class States:
    """The decomposed state itself, as it enters one or several layers.

    Attributes:
        rows: by layer, ``[R, D]`` in the staircase's rows, in the state's dtype, on the CPU.
        residual: by layer, ``[N, D]``, the model's own residual stream, which the sources add up to.
        layout: where the rows lie.
        sources: what the sources are.
    """

    rows: dict[int, Tensor]
    residual: dict[int, Tensor]
    layout: SourceLayout
    sources: tuple[Source, ...]

    def dense(self, layer: int) -> Tensor:
        """The state entering ``layer`` as ``[M, N, D]``, zeros where a source cannot reach."""
        if integer("layer", layer, OptionError) not in self.rows:
            raise OptionError(f"layer {layer} was not kept; there are {sorted(self.rows)}")
        rows, layout = self.rows[layer], self.layout
        active = torch.arange(len(self.sources), device="cpu") < layout.counts[:, None]  # [N, M]
        full = rows.new_zeros(layout.positions, len(self.sources), rows.shape[1])
        full[active] = rows
        return full.transpose(0, 1)
