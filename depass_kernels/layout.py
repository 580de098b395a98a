"""Where each source's row lies: the staircase layout of the decomposed state.

A source cannot reach a position before it starts. With the sources sorted by start, the sources active at position
``t`` are exactly ``0 .. count[t] - 1``, and rows are stored position by position::

    t=0: x              count 1
    t=1: x x            count 2         row(t, m) = row_start[t] + m
    t=2: x x x          count 3         R = row_start[P]

Several staircases (prompts, or decompositions of one prompt) stand behind one another in the same buffer, with
cumulative offsets in the ``cu_seqlens`` convention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .errors import LayoutError


@dataclass(frozen=True, eq=False)
class SourceLayout:
    """Offsets of a state of ``S`` staircases, ``P`` positions over all of them and ``R`` rows.

    Build one with :meth:`from_starts`, :meth:`tokens` or :meth:`dense`, and put several behind one another with
    :meth:`concat`. All offsets are int64 (``R * F`` passes 2**31 on long prompts) and live on the CPU;
    :meth:`to` gives the same layout with its offsets on another device.

    Attributes:
        row_start: ``[P + 1]``, row of each position's first source; the last entry is ``R``.
        position_start: ``[S + 1]``, first position of each staircase; the last entry is ``P``.
        prompt: ``[S]``, which prompt's attention pattern a staircase mixes with.
        skipped: ``[P]``, the one source that takes no part in the sharing at a position, or -1. Set from the
            ``excluded`` source of a staircase: everywhere but at its own first position and where it is alone.
    """

    row_start: Tensor
    position_start: Tensor
    prompt: Tensor
    skipped: Tensor
    _moved: dict[torch.device, SourceLayout] = field(default_factory=dict, repr=False)
    _tiles: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        offsets = (self.row_start, self.position_start, self.prompt, self.skipped)
        if any(offset.dtype != torch.int64 or offset.dim() != 1 for offset in offsets):
            raise LayoutError(f"offsets must be int64 vectors, got {[(o.dtype, list(o.shape)) for o in offsets]}")

    @staticmethod
    def from_starts(starts: Sequence[int], positions: int, excluded: int | None = None) -> SourceLayout:
        """One staircase over ``positions`` positions.

        Args:
            starts: the position each source starts at, sorted; always-active sources start at 0 and so come first.
            positions: number of positions ``N``.
            excluded: a source that takes part in the sharing at its own first position only (a BOS token).

        Raises:
            LayoutError: unsorted or out-of-range starts, no source at position 0, or an ``excluded`` that is no source.
        """
        if positions < 1:
            raise LayoutError(f"a layout needs at least one position, got positions={positions}")
        if not starts:
            raise LayoutError("a layout needs at least one source, got starts=[]")
        start = torch.as_tensor(starts, dtype=torch.int64, device="cpu")
        if bool((start[1:] < start[:-1]).any()):
            raise LayoutError(f"starts must be sorted, got {list(starts)}; sort the sources by their first position")
        if int(start[0]) != 0:
            raise LayoutError(f"some source must start at position 0, the first start is {int(start[0])}")
        if int(start[-1]) >= positions:
            raise LayoutError(f"start {int(start[-1])} is outside of the {positions} positions (0 to {positions - 1})")
        where = torch.arange(positions, device="cpu")
        counts = torch.searchsorted(start, where, right=True)  # [N]
        skipped = torch.full((positions,), -1, dtype=torch.int64, device="cpu")
        if excluded is not None:
            if not 0 <= excluded < len(start):
                raise LayoutError(f"excluded={excluded} is no source, there are {len(start)} (0 to {len(start) - 1})")
            skipped[(where > start[excluded]) & (counts > 1)] = excluded
        return SourceLayout(_cumulative(counts), _int64([0, positions]), _int64([0]), skipped)

    @staticmethod
    def tokens(positions: int, always: int = 0, excluded: int | None = None) -> SourceLayout:
        """One source per token, behind ``always`` sources that are active everywhere. ``excluded`` counts from 0."""
        return SourceLayout.from_starts([0] * always + list(range(positions)), positions, excluded)

    @staticmethod
    def dense(sources: int, positions: int) -> SourceLayout:
        """``sources`` sources, all active everywhere (heads, neurons, modules, subspaces)."""
        return SourceLayout.from_starts([0] * sources, positions)

    @staticmethod
    def concat(layouts: Sequence[SourceLayout], prompt: Sequence[int] | None = None) -> SourceLayout:
        """Several layouts behind one another in one buffer.

        Args:
            layouts: what to join.
            prompt: for each staircase of the result, the prompt whose pattern it uses; without it every staircase is
                a prompt of its own.
        """
        if not layouts:
            raise LayoutError("nothing to join, got layouts=[]")
        counts = torch.cat([layout.counts for layout in layouts])
        lengths = torch.cat([layout.position_start.diff() for layout in layouts])
        if prompt is None:
            prompt = range(len(lengths))
        elif len(prompt) != len(lengths):
            raise LayoutError(f"prompt names {len(prompt)} staircases, the joined layouts have {len(lengths)}")
        skipped = torch.cat([layout.skipped for layout in layouts])
        return SourceLayout(_cumulative(counts), _cumulative(lengths), _int64(list(prompt)), skipped)

    @cached_property
    def rows(self) -> int:
        """``R``, the number of rows."""
        return int(self.row_start[-1])

    @property
    def positions(self) -> int:
        """``P``, the number of positions over all staircases."""
        return len(self.row_start) - 1

    @property
    def staircases(self) -> int:
        """``S``, the number of staircases."""
        return len(self.prompt)

    @property
    def counts(self) -> Tensor:
        """``[P]``, the number of sources active at each position."""
        return self.row_start.diff()

    @cached_property
    def most(self) -> int:
        """The largest number of sources at one position."""
        return int(self.counts.max())

    @cached_property
    def prompts(self) -> int:
        """How many attention patterns the staircases mix with."""
        return int(self.prompt.max()) + 1

    @cached_property
    def longest(self) -> int:
        """The largest number of positions in one staircase."""
        return int(self.position_start.diff().max())

    def mix_tiles(self, queries: int, sources: int, device: torch.device) -> Tensor:
        """The pieces that mixing falls into, without those that are zero by structure.

        A piece is ``queries`` query positions by ``sources`` sources of one staircase. Sources that have not started by
        the piece's last query are left out with it, and no key before the piece's first source starts is named.

        Returns:
            ``[T, 4]`` int32 on ``device``, made once and kept: staircase, first source, first query, first key,
            each counted from the staircase's own beginning; the pieces with the most work first.
        """
        key = (queries, sources, device)
        if key not in self._tiles:
            self._tiles[key] = self._mix_tiles(queries, sources).to(device)
        return self._tiles[key]

    def _mix_tiles(self, queries: int, sources: int) -> Tensor:
        found, position_start, counts = [], self.position_start.tolist(), self.counts.cpu()
        for staircase in range(self.staircases):
            count = counts[position_start[staircase] : position_start[staircase + 1]]  # [N]
            source = torch.arange(0, int(count.max()), sources, device="cpu")
            start = torch.searchsorted(count, source, right=True)  # the first position with more sources than that
            query = torch.arange(0, len(count), queries, device="cpu")
            number = torch.arange(len(source), device="cpu")
            s, q = (index.flatten() for index in torch.meshgrid(number, query, indexing="ij"))
            last = (q + queries).clamp(max=len(count))
            tile = torch.stack([torch.full_like(q, staircase), source[s], q, start[s], last - start[s]], dim=1)
            found.append(tile[last > start[s]])
        tiles = torch.cat(found)
        return tiles[tiles[:, 4].argsort(descending=True, stable=True), :4].to(torch.int32)

    def to(self, device: torch.device | str) -> SourceLayout:
        """The same layout with its offsets on ``device``, copied once and kept."""
        device = torch.device(device)
        if device == self.row_start.device:
            return self
        if device not in self._moved:
            self._moved[device] = SourceLayout(
                self.row_start.to(device),
                self.position_start.to(device),
                self.prompt.to(device),
                self.skipped.to(device),
            )
        return self._moved[device]

    def slice_positions(self, first: int, last: int) -> SourceLayout:
        """The rows of positions ``first .. last - 1``, which are ``row_start[first] : row_start[last]`` of this layout.

        Sharing couples the rows of one position only, so it may run on such blocks. The result is one staircase or a
        part of several and is meant for sharing, not for mixing.
        """
        row_start = self.row_start[first : last + 1] - self.row_start[first]
        return SourceLayout(row_start, _int64([0, last - first]), _int64([0]), self.skipped[first:last])

    def select_positions(self, positions: Sequence[Tensor]) -> tuple[SourceLayout, Tensor]:
        """Some positions of every staircase, as a layout, and their rows here. Meant for sharing, not for mixing.

        Args:
            positions: for each staircase the positions of this layout (all staircases' counted through), rising, int64.

        Returns:
            The layout, and ``[R_selected]`` int64: the row of this layout that each of its rows is.
        """
        where = torch.cat(list(positions))
        counts = self.counts[where]
        row_start = _cumulative(counts)
        offset = self.row_start[where] - row_start[:-1]
        rows = torch.arange(int(row_start[-1]), device="cpu") + offset.repeat_interleave(counts)
        lengths = _int64([len(some) for some in positions])
        return SourceLayout(row_start, _cumulative(lengths), self.prompt, self.skipped[where]), rows

    def slice_sources(self, first: int, last: int) -> tuple[SourceLayout, Tensor]:
        """Sources ``first .. last - 1`` of every staircase, as a layout over the same positions, and their rows here.

        Mixing takes each source its own way, so it may run on such blocks. Positions before a block's first start have
        no rows in it.

        Returns:
            The block's layout, and ``[R_block]`` int64: the row of this layout that each of its rows is.
        """
        counts = (self.counts - first).clamp(0, last - first)  # [P]
        row_start = _cumulative(counts)
        offset = self.row_start[:-1] + first - row_start[:-1]  # [P]
        rows = torch.arange(int(row_start[-1]), device=offset.device) + offset.repeat_interleave(counts)
        return SourceLayout(row_start, self.position_start, self.prompt, torch.full_like(counts, -1)), rows

    def source_blocks(self, max_rows: int) -> Iterator[tuple[int, int]]:
        """Cut the sources into runs ``(first, last)`` of at most ``max_rows`` rows over all positions, or of one source."""
        ending = torch.bincount(self.counts.cpu(), minlength=self.most + 1)  # positions by their number of sources
        # of each source: the positions with more sources than its number
        rows = ending.flip(0).cumsum(0).flip(0)[1:].tolist()
        first = held = 0
        for last in range(1, self.most + 1):
            held += rows[last - 1]
            if last == self.most or held + rows[last] > max_rows:
                yield first, last
                first, held = last, 0

    def position_blocks(self, max_rows: int) -> Iterator[tuple[int, int]]:
        """Cut the positions into runs ``(first, last)`` of at most ``max_rows`` rows, or of one position."""
        starts = self.row_start.tolist()
        first = 0
        for last in range(1, self.positions + 1):
            if last == self.positions or starts[last + 1] - starts[first] > max_rows:
                yield first, last
                first = last


def _int64(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")  # whatever the caller's default device is


def _cumulative(counts: Tensor) -> Tensor:
    """``[n]`` counts to ``[n + 1]`` offsets."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
