"""Sweeps in groups of layers that fit the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import OptionError
from ..models.bound import BoundModel
from ..propagation.needs import needs
from ..sources.decompose import COMPONENT_BYTES
from ..sources.source import Decomposition


def grouped(
    parts: Sequence[Sequence[Decomposition]],
    positions: int,
    budget: int,
    bound: BoundModel,
    workspace_bytes: int | None,
) -> Iterator[list[Sequence[Decomposition]]]:
    """Runs of a sweep's layers whose states and buffers fit a budget in bytes.

    Raises:
        OptionError: one layer alone does not fit.
    """

    def taken(rows: int) -> int:
        needed = needs(bound, rows, [positions], workspace_bytes, bound.device)
        return needed.state_bytes + needed.buffer_bytes + COMPONENT_BYTES

    group: list[Sequence[Decomposition]] = []
    held = 0
    for of_layer in parts:
        rows = sum(one.layout.rows for one in of_layer)
        if taken(rows) > budget:
            raise OptionError(
                f"layer {of_layer[0].layer} alone takes {taken(rows)} bytes for its {rows} rows, more than the {budget} "
                "there are (memory_bytes=, or half of what is free); ask for fewer components (ids=) or positions"
            )
        if group and taken(held + rows) > budget:
            yield group
            group, held = [], 0
        group.append(of_layer)
        held += rows
    yield group
