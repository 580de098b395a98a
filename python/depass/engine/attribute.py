"""Attributions and sweeps by the engine that each rule needs; a mixture is the weighted mean of what the engines find."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ..errors import DePassError
from ..inputs.prompt import Prompt
from ..inputs.settings import Settings
from ..inputs.targets import Asked, Target
from ..results.attribution import Attribution
from ..results.sweep import Sweep
from ..sources.source import Decomposition
from . import linear, scores, sweeps
from .passes import Engine
from .request import Case, Options, Progress
from .scores import Scored
from .sweeps import Swept

Found = TypeVar("Found", Scored, Swept)


def attribute(
    engine: Engine, cases: Sequence[Case], options: Options, progress: Progress | None = None
) -> list[Attribution | DePassError]:
    """Attribute cases in one pass per rule; returns an error in place of the result of a case that fails."""
    found: list[list[Scored]] = []  # by rule and case
    for told, one in _each(options, progress):
        same = [replace(case, asked=_fixed(case.asked, of_case.targets))
                for case, of_case in zip(cases, found[0], strict=True)] if found else cases  # fmt: skip
        by = scores.scored if one.paths is None else linear.scored
        found.append(by(engine, same, one, told))
    return [
        scores.attribution(case, _mean(of_case, options), engine.bound)
        for case, *of_case in zip(cases, *found, strict=True)
    ]


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
    found: list[Swept] = []  # by rule
    for told, one in _each(options, progress):
        same = _fixed(asked, tuple(readout.target for readout in found[0].readouts)) if found else asked
        if one.paths is None:
            groups = list(sweeps.grouped(layers, len(prompt.ids), budget, engine.bound, engine.workspace_bytes))
            found.append(sweeps.swept(engine, prompt, groups, same, one, budget, told))
        else:
            found.append(linear.swept(engine, prompt, layers, same, one, told))
    return sweeps.stacked(_mean(found, options), layers, kind, prompt, engine.bound)


def _each(options: Options, progress: Progress | None) -> Iterator[tuple[Progress | None, Options]]:
    """The options of every rule of a mixture, or of the only rule, and how its pass reports its progress."""
    rules = options.mixture or ((1.0, options),)
    for number, (_, one) in enumerate(rules):
        yield None if progress is None else partial(_tell, progress, number, len(rules)), one


def _tell(progress: Progress, number: int, count: int, done: int, of: int) -> None:
    progress(number * of + done, count * of)


def _fixed(asked: Sequence[Asked], targets: Sequence[Target]) -> tuple[Asked, ...]:
    """The targets that were found, so that every rule of a mixture explains the same tokens."""
    found, fixed = iter(targets), list[Asked]()
    for each in asked:
        own = [next(found) for _ in range(each.k or 1)]
        fixed += [each] if each.ids is not None else [Asked("token", t.position, t.token_ids) for t in own]
    return tuple(fixed)


def _mean(found: Sequence[Found], options: Options) -> Found:
    """The weighted mean of what the rules of a mixture found."""
    if not options.mixture:
        return found[0]
    shares = [share for share, _ in options.mixture]

    def mean(values: Iterable[Tensor]) -> Tensor:
        return sum((share * value for share, value in zip(shares, values, strict=True)), torch.zeros(()))

    by_rule = [each.rows for each in found]
    rows = [mean(of_decomposition) for of_decomposition in zip(*by_rule, strict=True)]
    settings = _settings([each.settings for each in found], options)
    return replace(found[0], rows=rows, balance=mean(each.balance for each in found), settings=settings)


def _settings(found: Sequence[Settings], options: Options) -> Settings:
    """The settings of a mixture's result, from those of its rules."""
    engines = {each.engine for each in found}
    return replace(
        found[0],
        rule=options.sharing.rule,
        engine="+".join(sorted(engines, reverse=True)),  # forward before backward
        exclude_bos=any(each.exclude_bos for each in found),
        backends={op: backend for each in found for op, backend in each.backends.items()},
        altered=next((each.altered for each in found if each.altered is not None), None),
        padded=any(each.padded for each in found),
    )
