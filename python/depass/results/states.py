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
    """The decomposed state at the input of one or several layers: ``Σ_m X[m, t] = x[t]`` (docs/method.md, equation 1).

    Attributes:
        rows: by layer, the state ``[R, D]`` in the packed (staircase) layout, in the state's dtype, on the CPU.
        residual: by layer, ``[N, D]``, the model's own residual stream, which the sources add up to.
        layout: the layout of the rows.
        sources: the ``M`` sources.
    """

    rows: dict[int, Tensor]
    residual: dict[int, Tensor]
    layout: SourceLayout
    sources: tuple[Source, ...]

    def dense(self, layer: int) -> Tensor:
        """The state at the input of ``layer`` as ``[M, N, D]``, zero at positions before a source starts.

        Raises:
            OptionError: the state of the layer was not kept.
        """
        if integer("layer", layer, OptionError) not in self.rows:
            raise OptionError(f"the state of layer {layer} was not kept; the kept layers are {sorted(self.rows)}")
        rows, layout = self.rows[layer], self.layout
        active = torch.arange(len(self.sources), device="cpu") < layout.counts[:, None]  # [N, M]
        full = rows.new_zeros(layout.positions, len(self.sources), rows.shape[1])
        full[active] = rows
        return full.transpose(0, 1)
