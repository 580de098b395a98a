"""Attributing cases by the engine that their rule needs."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import DePassError
from ..results.attribution import Attribution
from . import linear, scores
from .passes import Engine
from .request import Case, Options, Progress


def attribute(
    engine: Engine, cases: Sequence[Case], options: Options, progress: Progress | None = None
) -> list[Attribution | DePassError]:
    """Attribute cases in one pass; returns an error in place of the result of a case that fails."""
    by = linear.attribute if options.linear else scores.attribute
    return by(engine, cases, options, progress)
