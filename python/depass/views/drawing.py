"""What the terminal's views, the pages and the figures have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from ..inputs.prompt import Prompt
from ..inputs.settings import Settings
from ..inputs.targets import Target
from ..sources.source import Source

NUMBERED = 16  # columns of a sweep whose cells have room for their numbers
GRID = 64  # columns of a sweep that are drawn one by one; more of them (neurons) are summed up or listed


class Explained(Protocol):
    """What every result has: targets, and scores ``[targets, ...]`` of each."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def scores(self) -> Tensor: ...  # noqa: D102
    @property
    def targets(self) -> tuple[Target, ...]: ...  # noqa: D102
    @property
    def target_logits(self) -> Tensor: ...  # noqa: D102
    @property
    def conservation_error(self) -> Tensor: ...  # noqa: D102
    @property
    def prompt(self) -> Prompt: ...  # noqa: D102
    @property
    def settings(self) -> Settings: ...  # noqa: D102


class Scored(Explained, Protocol):
    """Scores ``[targets, sources]`` of one decomposition."""

    @property
    def sources(self) -> tuple[Source, ...]: ...  # noqa: D102


class Grid(Explained, Protocol):
    """Scores ``[targets, layers, columns]`` of a decomposition for each layer."""

    @property
    def rest(self) -> Tensor: ...  # noqa: D102
    @property
    def bias(self) -> Tensor: ...  # noqa: D102
    @property
    def layers(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def columns(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    def source(self, row: int, column: int) -> Source: ...  # noqa: D102
    def top(self, k: int, target: int) -> list[tuple[Source, float]]: ...  # noqa: D102


AnyScored = TypeVar("AnyScored", bound=Scored)


def components(res: Scored) -> list[int]:
    """The columns whose sources are the model's own parts and lie nowhere in the prompt."""
    return [
        index
        for index, source in enumerate(res.sources)
        if source.start is None and source.kind not in ("rest", "bias")
    ]


def scale(res: Scored, row: int) -> float:
    """The score that is drawn in full colour: the largest; beside components, whose ``rest`` would drown them, theirs."""
    scores = res.scores[row]
    among = components(res)
    return float((scores[among] if among else scores).abs().max()) or 1.0


def abridged(res: AnyScored, sizes: Tensor, most: int) -> AnyScored:
    """The ``most`` components with the largest ``sizes`` ``[sources]``, largest first, and the others as one sum."""
    among = components(res)
    order = [among[rank] for rank in sizes[among].argsort(descending=True, stable=True).tolist()]
    others = order[most:]
    if not others:
        return res
    kept = [*sorted(set(range(len(res.sources))) - set(among)), *order[:most]]
    return replace(
        res,
        scores=torch.cat([res.scores[:, kept], res.scores[:, others].sum(1, keepdim=True)], 1),
        sources=(*(res.sources[index] for index in kept), Source(f"[{len(others)} others]", "part")),
    )


def headings(sweep: Grid) -> list[str]:
    """What stands over a sweep's columns."""
    return ["attention", "MLP"] if sweep.kind == "modules" else [str(column) for column in sweep.columns]


def beside(sweep: Grid) -> list[tuple[str, Tensor]]:
    """What stands beside a sweep's components: ``rest``, and ``bias`` where there is any; ``[targets, layers]`` each.

    Nothing beside a baseline's, which has none.
    """
    found: list[tuple[str, Tensor]] = []
    if not sweep.settings.adds_up:
        return found
    for what, scores in (("rest", sweep.rest), ("bias", sweep.bias)):
        if what == "bias" and not bool(scores.any()):
            continue
        if sweep.kind == "modules":  # each of the two is a decomposition of its own
            found += [(f"{what} of {of}", scores[:, :, index]) for index, of in enumerate(("attn", "MLP"))]
        else:
            found.append((what, scores))
    return found
