"""The blocks in which a layer's attention and MLP are computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from depass_kernels import SourceLayout
from depass_kernels.layout import KEPT_ROWS

from ..models.bound import BoundModel

NEURONS = 128  # blocks of neurons are multiples of it
RUN = 64  # fewer rows make products slow and save next to nothing


@dataclass(frozen=True)
class Traits:
    """What a kind of device asks of the blocks.

    Attributes:
        workspace: the bytes of a block's buffers, from which on larger blocks no longer make the GEMMs faster.
        one_block: whether the attention takes all sources in one block where there is room: several blocks scatter their
            results into the state, which reads and writes its rows twice more.
        fp32_sums: whether the library returns the fp32 sums of half-precision products, and adds them to the state.
        keys: the pattern's rows are padded to a multiple of it.
    """

    workspace: int
    one_block: bool
    fp32_sums: bool
    keys: int


TRAITS = {"cpu": Traits(16 << 20, False, False, 1), "cuda": Traits(512 << 20, True, True, 16)}


def traits(device: torch.device) -> Traits:
    """The traits of a device; those of a CPU for a kind that is not listed."""
    return TRAITS.get(device.type, TRAITS["cpu"])


@dataclass(frozen=True)
class Blocks:
    """How many rows the steps of a layer take at once.

    Attributes:
        attention: the rows of a block of sources, whose values and mixed values exist together.
        run: the rows of such a block that are normed, or added to the state, together.
        mlp: the rows of a block of positions, whose pre-activations exist together.
        gates: the pre-activations that exist together; a single position with more takes blocks of neurons.
    """

    attention: int
    run: int
    mlp: int
    gates: int


@dataclass(frozen=True)
class RowBytes:
    """The bytes of a layer's buffers for one row of the state.

    Attributes:
        attention: its values and mixed values.
        run: the normed row, and the product that waits to be added to the state.
        gate: one pre-activation and, where it has another dtype than the products, its shared hidden value.
        mlp: all of the MLP's.
    """

    attention: int
    run: int
    gate: int
    mlp: int

    @staticmethod
    def of(bound: BoundModel, device: torch.device) -> RowBytes:
        """Those of the widest layer, in the dtypes of products on ``device``."""
        layer, width = bound.widest_layer, bound.hidden_size
        product, state = bound.product_dtype_on(device).itemsize, bound.state_dtype.itemsize
        in_fp32 = traits(device).fp32_sums
        # where experts' pre-activations are shared in place, the products of their down projections take memory of their own
        in_place = product == state and (layer.experts is None or not in_fp32)
        gate = product if in_place or not in_fp32 else state + product
        run = width * (product if product == state or in_fp32 else 2 * product)
        # the rows of one expert, at most all of them, and where its and the others' rows are
        of_places = 0 if layer.experts is None else width * product + 24 * layer.experts.chosen
        # the values of a recurrence behind its convolution, those of an earlier position, and where these are
        mixers = [mixer for each in bound.layers for mixer in each.mixers]
        recurrent = (mixer.value.shape[0] for mixer in mixers if mixer.recurrence is not None)
        of_values = max((3 * values * product + 64 for values in recurrent), default=0)
        latent = max((mixer.latent.shape[0] for mixer in mixers if mixer.latent is not None), default=0)
        mixed = max((mixer.output.shape[1] for mixer in mixers), default=0)
        return RowBytes(
            attention=max(1, (bound.most_values + mixed) * product + of_values),
            run=run + latent * (product + state),
            gate=gate,
            mlp=layer.neurons * gate + run + of_places,
        )


def blocks_of(bound: BoundModel, workspace_bytes: int | None, device: torch.device) -> Blocks:
    """The blocks whose buffers take ``workspace_bytes``, or the device's default: an attention's, an MLP's, four runs'."""
    row, allowed = RowBytes.of(bound, device), workspace_bytes or traits(device).workspace
    return Blocks(
        attention=max(1, allowed // row.attention),
        run=max(RUN, allowed // 4 // row.run),
        mlp=max(1, allowed // row.mlp),
        gates=max(1, allowed // row.gate),
    )


def neurons_at_once(neurons: int, fit: int) -> int:
    """How many neurons of an MLP a block takes if ``fit`` of them fit into its buffers.

    Slices of the weights begin at a multiple of 16 bytes, which the fast matrix products of the libraries need.
    """
    if fit >= neurons:
        return neurons
    run = next((run for run in (NEURONS, 8) if fit >= run), 1)
    return max(1, fit // run * run)


@dataclass(frozen=True)
class _PositionBlock:
    layout: SourceLayout
    first: int  # positions
    last: int
    begin: int  # rows
    end: int

    @staticmethod
    def of(layout: SourceLayout, max_rows: int) -> list[_PositionBlock]:
        """The blocks of at most so many rows, or of a single position."""
        start = layout.row_start.tolist()
        return [_PositionBlock(layout.slice_positions(first, last), first, last, start[first], start[last])
                for first, last in layout.position_blocks(max_rows)]  # fmt: skip


@dataclass(frozen=True)
class _SourceBlock:
    layout: SourceLayout
    rows: Tensor | None  # [R_block], their rows in the state; None: all of them
    has_bias_source: bool
    runs: list[_PositionBlock]  # of its rows
    _moved: dict[torch.device, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(layout: SourceLayout, blocks: Blocks) -> list[_SourceBlock]:
        """The blocks of sources."""
        cuts = list(layout.source_blocks(blocks.attention))
        parts = [layout.slice_sources(*cut) for cut in cuts] if len(cuts) > 1 else [(layout, None)]
        return [_SourceBlock(part, rows, first == 0, _PositionBlock.of(part, blocks.run))
                for (first, _), (part, rows) in zip(cuts, parts, strict=True)]  # fmt: skip

    def rows_on(self, device: torch.device) -> Tensor | None:
        """:attr:`rows` on a device, copied only once: each copy makes the host wait for the device."""
        if self.rows is not None and device not in self._moved:
            self._moved[device] = self.rows.to(device)
        return self._moved.get(device)


@dataclass(frozen=True, eq=False)
class Cut:
    """A layout's blocks, computed when they are first asked for."""

    layout: SourceLayout
    blocks: Blocks

    @cached_property
    def of_sources(self) -> list[_SourceBlock]:
        """The blocks of sources, for the attention."""
        return _SourceBlock.of(self.layout, self.blocks)

    @cached_property
    def of_positions(self) -> list[_PositionBlock]:
        """The blocks of positions, for the MLP."""
        return _PositionBlock.of(self.layout, self.blocks.mlp)


def cut(layout: SourceLayout, blocks: Blocks) -> Cut:
    """The blocks of a layout; those of a small one are kept for all prompts of its shape."""
    return (_kept_cut if layout.rows <= KEPT_ROWS else Cut)(layout, blocks)


@lru_cache(maxsize=128)
def _kept_cut(layout: SourceLayout, blocks: Blocks) -> Cut:
    return Cut(layout, blocks)


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
