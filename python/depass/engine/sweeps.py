"""Sweeps: one decomposition per layer, in groups of layers that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import NonFiniteError, OptionError
from ..inputs.prompt import Prompt
from ..inputs.settings import Settings
from ..inputs.targets import Asked, Readout
from ..models import attention
from ..models.bound import BoundModel
from ..models.health import blame
from ..propagation.blocks import blocks_of
from ..propagation.needs import Sizes
from ..results.common import conservation_error
from ..results.sweep import Sweep, SweepKind
from ..sources.components import component_ids
from ..sources.decompose import COMPONENT_BYTES
from ..sources.source import Decomposition
from .passes import Engine, Pass
from .request import Options, Progress
from .scores import must_be_finite, readouts_in, scores_of, settings


def grouped(
    parts: Sequence[Sequence[Decomposition]],
    positions: int,
    budget: int,
    bound: BoundModel,
    workspace_bytes: int | None,
) -> Iterator[list[Sequence[Decomposition]]]:
    """Group consecutive layers of a sweep so that the states and buffers of each group fit a budget in bytes.

    Raises:
        OptionError: a single layer does not fit.
    """

    blocks, sizes = blocks_of(bound, workspace_bytes, bound.device), Sizes.of(bound, bound.device)

    def taken(rows: int) -> int:
        needed = sizes.needs(rows, [positions], blocks)
        return needed.state_bytes + needed.buffer_bytes + COMPONENT_BYTES

    group: list[Sequence[Decomposition]] = []
    held = 0
    for of_layer in parts:
        rows = sum(part.layout.rows for part in of_layer)
        if taken(rows) > budget:
            raise OptionError(
                f"layer {of_layer[0].layer} alone needs {taken(rows)} bytes for its {rows} rows, but the budget is {budget} "
                "bytes (memory_bytes=, by default half of the available memory); choose fewer components (ids=) or positions"
            )
        if group and taken(held + rows) > budget:
            yield group
            group, held = [], 0
        group.append(of_layer)
        held += rows
    yield group


class _Told:
    """Reports the progress of one of several passes as a part of all of them."""

    def __init__(self, progress: Progress | None, before: int, of: int) -> None:
        self.progress, self.before, self.of = progress, before, of

    def __call__(self, done: int, _: int) -> None:
        if self.progress is not None:
            self.progress(self.before + done, self.of)


@dataclass(frozen=True)
class Swept:
    """What an engine found for the components of layers.

    Attributes:
        readouts: the ``T`` targets, with the model's own logits.
        rows: the scores ``[T, sources]`` of each decomposition, in the order of the layers.
        balance: ``[T, decompositions]``; see :attr:`depass.rules.PathWeights.balance`.
        settings: the settings of the passes.
    """

    readouts: Sequence[Readout]
    rows: list[Tensor]
    balance: Tensor
    settings: Settings


def swept(
    engine: Engine,
    prompt: Prompt,
    groups: Sequence[Sequence[Sequence[Decomposition]]],
    asked: Sequence[Asked],
    options: Options,
    budget: int,
    progress: Progress | None = None,
) -> Swept:
    """Run one pass per group of layers; a layer has one decomposition, or for modules two (attention and MLP)."""
    of = sum(options.stop - group[0][0].layer for group in groups)
    began, served = 0, dict[str, set[str]]()
    readouts: list[Readout] = []
    rows: list[Tensor] = []  # [targets, sources], of each decomposition
    for group in groups:
        flat = [parts for layer in group for parts in layer]
        read = [[target.position for target in asked]] * len(flat)
        with attention.running:  # as in scores.scored
            told, joining = _Told(progress, began, of), [(parts, 0) for parts in flat]
            done = Pass(engine, [prompt], joining, options, told, read, budget=budget - COMPONENT_BYTES)
            done.run()
            began += options.stop - flat[0].layer
            if not readouts:
                (by_target,) = readouts_in(done, [asked])
                readouts = [readout for of_target in by_target for readout in of_target]
                for readout in readouts:
                    must_be_finite(readout.target, readout.logit, engine.bound)
            rows += scores_of(done, [readouts], [len(parts.sources) for parts in flat])
        for op, names in done.propagation.served.items():
            served.setdefault(op, set()).update(names)
        how = settings(done, groups[0][0][0].layer, False, served)
        del done  # frees its state before the next group's
    return Swept(readouts, rows, rows[0].new_zeros(len(readouts), len(rows)), how)


def stacked(
    found: Swept,
    layers: Sequence[Sequence[Decomposition]],
    kind: SweepKind,
    prompt: Prompt,
    bound: BoundModel,
) -> Sweep:
    """A sweep's result.

    Raises:
        NonFiniteError: a logit or a score is not finite.
    """
    readouts, rows = found.readouts, found.rows
    for readout in readouts:
        must_be_finite(readout.target, readout.logit, bound)
    if not all(bool(row.isfinite().all()) for row in (*rows, found.balance)):
        raise NonFiniteError(f"the scores are not finite; {blame(bound)}")
    parts = [part for layer in layers for part in layer]
    always = [len([s for s in part.sources if s.kind in ("bias", "rest")]) for part in parts]
    per_layer = len(layers[0])
    columns = (0, 1) if kind == "modules" else component_ids(parts[0].spec, bound)
    named = torch.stack(
        [_by_column(row[:, first:], part, columns, kind) for row, first, part in zip(rows, always, parts, strict=True)],
        1,
    )  # [T, L·per, C]
    rest = torch.stack([row[:, first - 1] for row, first in zip(rows, always, strict=True)], 1)
    bias = torch.stack([row[:, : first - 1].sum(1) for row, first in zip(rows, always, strict=True)], 1)
    logits = torch.tensor([readout.logit for readout in readouts], dtype=torch.float64, device="cpu")
    shape = (len(readouts), -1, per_layer) if per_layer > 1 else (len(readouts), -1)
    most = max(row.shape[1] for row in rows)
    padded = [functional.pad(row, (0, most - row.shape[1])) for row in rows]
    every = torch.cat([torch.stack(padded, 1), found.balance[..., None]], -1)
    return Sweep(
        scores=named.reshape(len(readouts), len(layers), -1).float(),
        rest=rest.reshape(shape).float(),
        bias=bias.reshape(shape).float(),
        balance=found.balance.reshape(shape).float(),
        layers=tuple(layer[0].layer for layer in layers),
        columns=tuple(columns),
        kind=kind,
        targets=tuple(readout.target for readout in readouts),
        target_logits=logits.float(),
        conservation_error=conservation_error(every, logits[:, None]).reshape(shape).float(),
        prompt=prompt,
        settings=found.settings,
    )


def _by_column(scores: Tensor, parts: Decomposition, columns: Sequence[int], kind: SweepKind) -> Tensor:
    """The scores ``[T, C]`` of components from a decomposition; a missing one has 0.

    An expert that no position chose is missing, and a module that the layer lacks.
    """
    if kind == "modules":
        return scores if scores.shape[1] else scores.new_zeros(len(scores), 1)
    if kind != "experts":
        return scores
    place = {expert: column for column, expert in enumerate(columns)}
    chosen = [place[source.index or 0] for source in parts.sources if source.kind == "expert"]
    by_column = scores.new_zeros(len(scores), len(columns))
    by_column[:, chosen] = scores
    return by_column
