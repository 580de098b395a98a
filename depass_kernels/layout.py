"""The packed (staircase) layout of the decomposed state: the row of each source at each position.

A source cannot reach a position before it starts. With the sources sorted by start, the sources active at position
``t`` are exactly ``0 .. count[t] - 1``, and rows are stored position by position::

    t=0: x              count 1
    t=1: x x            count 2         row(t, m) = row_start[t] + m
    t=2: x x x          count 3         R = row_start[P]

Several staircases (prompts, or decompositions of one prompt) follow one another in the same buffer, with cumulative
offsets in the ``cu_seqlens`` convention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .errors import LayoutError

KEPT_ROWS = 1 << 16  # layouts of at most so many rows are built once and kept


@dataclass(frozen=True, eq=False)
class SourceLayout:
    """The offsets of a state with ``S`` staircases, ``P`` positions in total and ``R`` rows.

    Create a layout with :meth:`from_starts`, :meth:`tokens` or :meth:`dense`, and join several with :meth:`concat`. All
    offsets are int64 (``R * F`` exceeds 2**31 for long prompts) and on the CPU; :meth:`to` copies them to another device.

    Attributes:
        row_start: ``[P + 1]``, the row of each position's first source; the last entry is ``R``.
        position_start: ``[S + 1]``, the first position of each staircase; the last entry is ``P``.
        prompt: ``[S]``, the index of the prompt whose attention pattern a staircase mixes with.
        skipped: ``[P]``, the source that takes no part in the sharing at a position, or -1. It is the ``excluded`` source
            of the staircase, except at that source's first position and where it is the only source.
    """

    row_start: Tensor
    position_start: Tensor
    prompt: Tensor
    skipped: Tensor
    _moved: dict[torch.device, SourceLayout] = field(default_factory=dict, repr=False)
    _tiles: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict, repr=False)
    _position_of_row: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        offsets = (self.row_start, self.position_start, self.prompt, self.skipped)
        if any(offset.dtype != torch.int64 or offset.dim() != 1 for offset in offsets):
            raise LayoutError(f"offsets must be int64 vectors, got {[(o.dtype, list(o.shape)) for o in offsets]}")

    @staticmethod
    def from_starts(starts: Sequence[int], positions: int, excluded: int | None = None) -> SourceLayout:
        """One staircase over ``positions`` positions.

        Args:
            starts: the first position of each source, sorted; sources that are always active start at 0 and come first.
            positions: the number of positions ``N``.
            excluded: the index of a source that takes part in the sharing only at its own first position (a BOS token).

        Raises:
            LayoutError: the starts are unsorted or out of range, no source starts at position 0, or ``excluded`` is out
                of range.
        """
        build = _of_starts if positions * len(starts) <= KEPT_ROWS else _of_starts.__wrapped__
        return build(tuple(starts), positions, excluded)

    @staticmethod
    def tokens(positions: int, always: int = 0, excluded: int | None = None) -> SourceLayout:
        """One source per token, after ``always`` sources that are active everywhere; ``excluded`` counts them all."""
        return SourceLayout.from_starts([0] * always + list(range(positions)), positions, excluded)

    @staticmethod
    def dense(sources: int, positions: int) -> SourceLayout:
        """``sources`` sources that are all active everywhere (heads, neurons, modules, subspaces)."""
        return SourceLayout.from_starts([0] * sources, positions)

    @staticmethod
    def concat(layouts: Sequence[SourceLayout], prompt: Sequence[int] | None = None) -> SourceLayout:
        """Join several layouts in one buffer, one after another.

        Args:
            layouts: the layouts, at least one.
            prompt: for each staircase of the result, the index of the prompt whose pattern it uses; by default every
                staircase has a separate prompt.

        Raises:
            LayoutError: there are no layouts, or ``prompt`` has the wrong length.
        """
        if not layouts:
            raise LayoutError("concat needs at least one layout, got layouts=[]")
        prompts = None if prompt is None else tuple(prompt)
        build = _joined if sum(layout.rows for layout in layouts) <= KEPT_ROWS else _joined.__wrapped__
        return build(tuple(layouts), prompts)

    @cached_property
    def rows(self) -> int:
        """``R``, the number of rows."""
        return int(self.row_start[-1])

    @property
    def positions(self) -> int:
        """``P``, the number of positions of all staircases."""
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
        """The number of prompts, whose attention patterns the staircases mix with."""
        return int(self.prompt.max()) + 1

    @cached_property
    def longest(self) -> int:
        """The largest number of positions in one staircase."""
        return int(self.position_start.diff().max())

    def position_of_row(self, device: torch.device) -> Tensor:
        """``[R]`` int64 on ``device``, the position of each row, computed once and kept."""
        if device not in self._position_of_row:
            positions = torch.arange(self.positions, device=self.row_start.device)
            self._position_of_row[device] = positions.repeat_interleave(self.counts).to(device)
        return self._position_of_row[device]

    def rows_before(self, positions: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Rows, and the rows of the same source one, two, ... ``positions`` positions before, where it was active.

        Returns:
            For each distance, two int64 vectors on ``device`` of the same length.
        """
        where = self.position_of_row(self.row_start.device)
        source = torch.arange(self.rows, device=where.device) - self.row_start[where]
        begin = self.position_start[:-1].repeat_interleave(self.position_start.diff())[where]
        found = []
        for distance in range(1, positions + 1):
            before = where - distance
            is_active = (before >= begin) & (source < self.counts[before.clamp(min=0)])
            rows = is_active.nonzero()[:, 0]
            found.append((rows.to(device), (self.row_start[before[rows]] + source[rows]).to(device)))
        return found

    def mix_tiles(self, queries: int, sources: int, device: torch.device) -> Tensor:
        """The tiles of the mixing, without those that are zero because no source has started.

        A tile is ``queries`` query positions by ``sources`` sources of one staircase. A source has a row at every position
        from its start on, so the tile's first key is the start of its first source.

        Returns:
            ``[T, 3 + sources]`` int32 on ``device``, computed once and kept: staircase, first source, first query, and the
            start of each source, all but the first counted from the staircase's beginning. A source that does not exist
            starts behind the last position. The tiles with the most work come first.
        """
        key = (queries, sources, device)
        if key not in self._tiles:
            self._tiles[key] = self._mix_tiles(queries, sources).to(device)
        return self._tiles[key]

    def _mix_tiles(self, queries: int, sources: int) -> Tensor:
        kept, position_start, counts = [], self.position_start.tolist(), self.counts.cpu()
        for staircase in range(self.staircases):
            count = counts[position_start[staircase] : position_start[staircase + 1]]  # [N]
            source = torch.arange(0, int(count.max()), sources, device="cpu")
            every = source[:, None] + torch.arange(sources, device="cpu")
            starts = torch.searchsorted(count, every, right=True)  # the first position with more sources than that
            start = starts[:, 0]
            query = torch.arange(0, len(count), queries, device="cpu")
            number = torch.arange(len(source), device="cpu")
            s, q = (index.flatten() for index in torch.meshgrid(number, query, indexing="ij"))
            last = (q + queries).clamp(max=len(count))
            tile = torch.cat(
                [torch.stack([last - start[s], torch.full_like(q, staircase), source[s], q], 1), starts[s]], 1
            )
            kept.append(tile[last > start[s]])
        tiles = torch.cat(kept)
        return tiles[tiles[:, 0].argsort(descending=True, stable=True), 1:].to(torch.int32)

    def to(self, device: torch.device | str) -> SourceLayout:
        """The same layout with its offsets on ``device``; the copy is made once and kept."""
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
        """A layout of positions ``first .. last - 1``: rows ``row_start[first] : row_start[last]`` of this layout.

        Sharing couples only the rows of one position, so it can run on such blocks. Use the result for sharing, not for
        mixing: it may be a part of several staircases.
        """
        row_start = self.row_start[first : last + 1] - self.row_start[first]
        return SourceLayout(row_start, _int64([0, last - first]), _int64([0]), self.skipped[first:last])

    def select_positions(self, positions: Sequence[Tensor]) -> tuple[SourceLayout, Tensor]:
        """A layout of some positions of every staircase, and its rows in this layout; for sharing, not for mixing.

        Args:
            positions: for each staircase, int64 positions in ascending order, counted over all staircases.

        Returns:
            The new layout, and ``[R_selected]`` int64: for each of its rows, the row in this layout.
        """
        where = torch.cat(list(positions))
        counts = self.counts[where]
        row_start = _cumulative(counts)
        offset = self.row_start[where] - row_start[:-1]
        rows = torch.arange(int(row_start[-1]), device="cpu") + offset.repeat_interleave(counts)
        lengths = _int64([len(selected) for selected in positions])
        return SourceLayout(row_start, _cumulative(lengths), self.prompt, self.skipped[where]), rows

    def slice_sources(self, first: int, last: int) -> tuple[SourceLayout, Tensor]:
        """A layout of sources ``first .. last - 1`` of every staircase over all positions, and its rows in this layout.

        Mixing treats each source independently, so it can run on such blocks. A block has no rows at positions before its
        first source starts.

        Returns:
            The block's layout, and ``[R_block]`` int64: for each of its rows, the row in this layout.
        """
        counts = (self.counts - first).clamp(0, last - first)  # [P]
        row_start = _cumulative(counts)
        offset = self.row_start[:-1] + first - row_start[:-1]  # [P]
        rows = torch.arange(int(row_start[-1]), device=offset.device) + offset.repeat_interleave(counts)
        return SourceLayout(row_start, self.position_start, self.prompt, torch.full_like(counts, -1)), rows

    def source_blocks(self, max_rows: int) -> Iterator[tuple[int, int]]:
        """Cut the sources into ranges ``(first, last)`` of at most ``max_rows`` rows, or of a single source."""
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
        """Cut the positions into ranges ``(first, last)`` of at most ``max_rows`` rows, or of a single position."""
        starts = self.row_start.tolist()
        first = 0
        for last in range(1, self.positions + 1):
            if last == self.positions or starts[last + 1] - starts[first] > max_rows:
                yield first, last
                first = last


@lru_cache(maxsize=128)  # prompts of one shape share a layout, and with it the copies on their device
def _of_starts(starts: tuple[int, ...], positions: int, excluded: int | None) -> SourceLayout:
    if positions < 1:
        raise LayoutError(f"a layout needs at least one position, got positions={positions}")
    if not starts:
        raise LayoutError("a layout needs at least one source, got starts=[]")
    start = torch.as_tensor(starts, dtype=torch.int64, device="cpu")
    if bool((start[1:] < start[:-1]).any()):
        raise LayoutError(f"starts must be sorted, got {list(starts)}; sort the sources by their first position")
    if int(start[0]) != 0:
        raise LayoutError(f"a source must start at position 0, but the first start is {int(start[0])}")
    if int(start[-1]) >= positions:
        raise LayoutError(f"start {int(start[-1])} is out of range: the positions are 0 to {positions - 1}")
    where = torch.arange(positions, device="cpu")
    counts = torch.searchsorted(start, where, right=True)  # [N]
    skipped = torch.full((positions,), -1, dtype=torch.int64, device="cpu")
    if excluded is not None:
        if not 0 <= excluded < len(start):
            raise LayoutError(f"excluded={excluded} is out of range: the sources are 0 to {len(start) - 1}")
        skipped[(where > start[excluded]) & (counts > 1)] = excluded
    return SourceLayout(_cumulative(counts), _int64([0, positions]), _int64([0]), skipped)


@lru_cache(maxsize=128)
def _joined(layouts: tuple[SourceLayout, ...], prompt: tuple[int, ...] | None) -> SourceLayout:
    counts = torch.cat([layout.counts for layout in layouts])
    lengths = torch.cat([layout.position_start.diff() for layout in layouts])
    if prompt is None:
        prompt = tuple(range(len(lengths)))
    elif len(prompt) != len(lengths):
        raise LayoutError(f"prompt must have one entry per staircase: got {len(prompt)} for {len(lengths)} staircases")
    skipped = torch.cat([layout.skipped for layout in layouts])
    return SourceLayout(_cumulative(counts), _cumulative(lengths), _int64(list(prompt)), skipped)


def forget_kept_layouts() -> None:
    """Drop the layouts that are kept by shape, and with them their copies on devices."""
    _of_starts.cache_clear()
    _joined.cache_clear()


def _int64(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")  # whatever the caller's default device is


def _cumulative(counts: Tensor) -> Tensor:
    """The ``[n + 1]`` offsets of ``[n]`` counts."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
