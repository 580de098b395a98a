"""The staircase: which row belongs to which source at which position."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from layouts import LAYOUTS, cells

from depass_kernels import LayoutError, SourceLayout
from depass_kernels.layout import KEPT_ROWS, forget_kept_layouts


def test_tokens_store_half_of_the_square() -> None:
    layout = SourceLayout.tokens(4)
    assert layout.counts.tolist() == [1, 2, 3, 4]
    assert layout.row_start.tolist() == [0, 1, 3, 6, 10]
    assert (layout.rows, layout.positions, layout.staircases) == (10, 4, 1)


def test_always_active_sources_stand_before_the_tokens() -> None:
    assert SourceLayout.tokens(3, always=2).counts.tolist() == [3, 4, 5]


def test_spans_count_what_has_begun() -> None:
    assert SourceLayout.from_starts([0, 0, 2, 2, 5], 6).counts.tolist() == [2, 2, 4, 4, 4, 5]


def test_the_excluded_source_sits_out_after_its_own_position() -> None:
    assert SourceLayout.tokens(4, excluded=0).skipped.tolist() == [-1, 0, 0, 0]
    assert SourceLayout.from_starts([0, 1, 2], 4, excluded=1).skipped.tolist() == [-1, -1, 1, 1]


def test_the_excluded_source_takes_part_where_it_is_alone() -> None:
    assert SourceLayout.from_starts([0, 3], 5, excluded=0).skipped.tolist() == [-1, -1, -1, 0, 0]


def test_several_staircases_stand_behind_one_another() -> None:
    both = SourceLayout.concat([SourceLayout.tokens(2, excluded=0), SourceLayout.dense(3, 2)])
    assert both.counts.tolist() == [1, 2, 3, 3]
    assert both.position_start.tolist() == [0, 2, 4]
    assert both.prompt.tolist() == [0, 1]
    assert both.skipped.tolist() == [-1, 0, -1, -1]
    assert SourceLayout.concat([both, both], prompt=[0, 0, 1, 1]).prompt.tolist() == [0, 0, 1, 1]


def test_offsets_pass_two_to_the_31() -> None:
    layout = SourceLayout.dense(70_000, 40_000)
    assert layout.row_start.dtype == torch.int64
    assert layout.rows == 70_000 * 40_000 > 2**31
    assert int(layout.slice_positions(39_999, 40_000).rows) == 70_000


@pytest.mark.parametrize("name", LAYOUTS)
def test_some_positions_of_every_staircase(name: str) -> None:
    layout = LAYOUTS[name]
    begins = layout.position_start.tolist()
    picked = [torch.arange(begin, end)[::2] for begin, end in itertools.pairwise(begins)]
    some, rows = layout.select_positions(picked)
    where = torch.cat(picked).tolist()
    assert rows.tolist() == [row for _, _, position, _, row in cells(layout) if position in where]
    assert some.counts.tolist() == layout.counts[where].tolist()
    assert some.skipped.tolist() == layout.skipped[where].tolist()
    assert some.position_start.diff().tolist() == [len(positions) for positions in picked]
    assert some.prompt.tolist() == layout.prompt.tolist()


@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_of_sources_cover_every_row_once(name: str) -> None:
    layout = LAYOUTS[name]
    most, seen = int(layout.counts.max()), []
    where = {row: (position, source) for _, _, position, source, row in cells(layout)}
    for first in range(0, most, 3):
        block, rows = layout.slice_sources(first, min(first + 3, most))
        assert block.positions == layout.positions
        assert block.rows == len(rows)
        seen += rows.tolist()
        for _, _, position, source, row in cells(block):
            assert where[int(rows[row])] == (position, source + first)
    assert sorted(seen) == list(range(layout.rows))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("max_rows", [1, 7, 10**9])
def test_blocks_of_positions_cover_every_position_once(name: str, max_rows: int) -> None:
    layout = LAYOUTS[name]
    blocks = list(layout.position_blocks(max_rows))
    assert [first for first, _ in blocks] == [0, *(last for _, last in blocks[:-1])]
    assert blocks[-1][1] == layout.positions
    for first, last in blocks:
        part = layout.slice_positions(first, last)
        assert part.rows <= max_rows or last == first + 1
        assert part.counts.tolist() == layout.counts[first:last].tolist()
        assert part.skipped.tolist() == layout.skipped[first:last].tolist()


def test_to_a_device_is_the_same_layout(device: str) -> None:
    moved = LAYOUTS["several"].to(device)
    assert moved.row_start.device.type == device
    assert moved.row_start.tolist() == LAYOUTS["several"].row_start.tolist()
    assert LAYOUTS["several"].to(device) is moved


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SourceLayout.tokens(0), "positions=0"),
        (lambda: SourceLayout.from_starts([], 3), r"starts=\[\]"),
        (lambda: SourceLayout.from_starts([0, 2, 1], 3), "must be sorted"),
        (lambda: SourceLayout.from_starts([1, 2], 3), "first start is 1"),
        (lambda: SourceLayout.from_starts([0, 3], 3), "start 3 is out of range: the positions are 0 to 2"),
        (lambda: SourceLayout.tokens(3, excluded=3), "excluded=3"),
        (lambda: SourceLayout.concat([]), "concat needs at least one layout"),
        (lambda: SourceLayout.concat([SourceLayout.tokens(2)], prompt=[0, 1]), "got 2 for 1 staircases"),
    ],
)
def test_what_is_no_staircase_is_refused(make: Callable[[], SourceLayout], says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        make()


def test_prompts_of_one_shape_share_a_layout_and_its_copies() -> None:
    forget_kept_layouts()
    first = SourceLayout.tokens(7, always=1, excluded=1)
    assert SourceLayout.tokens(7, always=1, excluded=1) is first
    assert SourceLayout.tokens(7, always=1) is not first
    assert SourceLayout.tokens(8, always=1, excluded=1) is not first
    together = SourceLayout.concat([first, SourceLayout.tokens(3)])
    assert SourceLayout.concat([first, SourceLayout.tokens(3)]) is together
    assert SourceLayout.concat([first, SourceLayout.tokens(3)], [0, 0]) is not together
    assert first.position_of_row(torch.device("cpu")) is first.position_of_row(torch.device("cpu"))
    forget_kept_layouts()
    assert SourceLayout.tokens(7, always=1, excluded=1) is not first
    large = KEPT_ROWS // 300 + 1
    assert SourceLayout.dense(300, large) is not SourceLayout.dense(300, large)  # its memory is given back
