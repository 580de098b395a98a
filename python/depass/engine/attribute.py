"""Attributions and sweeps by the engine that their rule needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..errors import DePassError
from ..inputs.prompt import Prompt
from ..inputs.targets import Asked
from ..results.attribution import Attribution
from ..results.sweep import Sweep
from ..sources.source import Decomposition
from . import linear, scores, sweeps
from .passes import Engine
from .request import Case, Options, Progress


def attribute(
    engine: Engine, cases: Sequence[Case], options: Options, progress: Progress | None = None
) -> list[Attribution | DePassError]:
    """Attribute cases in one pass; returns an error in place of the result of a case that fails."""
    by = linear.attribute if options.linear else scores.attribute
    return by(engine, cases, options, progress)


def sweep(
    engine: Engine,
    prompt: Prompt,
    layers: Sequence[Sequence[Decomposition]],
    asked: Sequence[Asked],
    options: Options,
    kind: Literal["heads", "neurons", "modules"],
    budget: int,
    progress: Progress | None = None,
) -> Sweep:
    """Score the components of layers, in one pass or, for rules with rows, in groups of layers that fit ``budget`` bytes."""
    if options.linear:
        return linear.sweep(engine, prompt, layers, asked, options, kind, progress)
    groups = list(sweeps.grouped(layers, len(prompt.ids), budget, engine.bound, engine.workspace_bytes))
    return sweeps.sweep(engine, prompt, groups, asked, options, kind, budget, progress)
