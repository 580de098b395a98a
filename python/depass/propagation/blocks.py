"""The blocks in which a layer's attention and MLP are computed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from depass_kernels import SourceLayout

from ..models.bound import BoundModel, Layer

WORKSPACE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}  # where larger blocks no longer make the GEMMs faster
NEURONS = 128  # blocks of neurons are multiples of it


def workspace(workspace_bytes: int | None, device: torch.device) -> int:
    """The bytes of a block's buffers: as given, or the device's default."""
    return workspace_bytes or WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cpu"])


def rows_at_once(bound: BoundModel, layer: Layer, workspace: int) -> tuple[int, int]:
    """How many rows a block holds in the attention and in the MLP, including the copies that casts make."""
    numbers, width = workspace // (2 * torch.finfo(bound.state_dtype).bits // 8), bound.hidden_size
    attention = layer.value.shape[0] + layer.output.shape[1] + width
    return max(1, numbers // attention), max(1, numbers // (layer.gate.shape[0] + width))


def neurons_at_once(neurons: int, fit: int) -> int:
    """How many neurons of an MLP a block takes if ``fit`` of them fit into its buffers.

    Slices of the weights begin at a multiple of 16 bytes, which the fast matrix products of the libraries need.
    """
    if fit >= neurons:
        return neurons
    run = next((run for run in (NEURONS, 8) if fit >= run), 1)
    return max(1, fit // run * run)


@dataclass(frozen=True)
class _SourceBlock:
    layout: SourceLayout
    rows: Tensor | None  # [R_block], their rows in the state; None: all of them
    has_bias_source: bool
    _moved: dict[torch.device, Tensor] = field(default_factory=dict)

    def rows_on(self, device: torch.device) -> Tensor | None:
        """:attr:`rows` on a device, copied only once: each copy makes the host wait for the device."""
        if self.rows is not None and device not in self._moved:
            self._moved[device] = self.rows.to(device)
        return self._moved.get(device)


@dataclass(frozen=True)
class _PositionBlock:
    layout: SourceLayout
    first: int  # positions
    last: int
    begin: int  # rows
    end: int
    neurons: int  # how many at once


@dataclass(frozen=True)
class _Kept:
    """The part of a state that is read after the last layer."""

    layout: SourceLayout
    rows: Tensor  # [R_kept], rising, of the state before
    positions: list[Tensor]  # by staircase

    def of(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows of a block that are kept, and their indices among the kept rows; None means a block of all rows."""
        if rows is None:
            return self.rows, torch.arange(len(self.rows), device=self.rows.device)
        place = torch.searchsorted(rows, self.rows).clamp(max=len(rows) - 1)
        which = (rows[place] == self.rows).nonzero()[:, 0]
        return place[which], which
