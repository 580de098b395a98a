"""Attributions and sweeps by the engine that each rule needs; a mixture is the weighted mean of what the engines find."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import DePassError
from ..inputs.prompt import Prompt
from ..inputs.settings import Settings
from ..inputs.targets import Asked, Target
from ..results.attribution import Attribution
from ..results.sweep import Sweep, SweepKind
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
    layers = options.stop - min(case.parts.layer for case in cases)
    for (_, one), told in zip(options.rules, _told(progress, [layers] * len(options.rules)), strict=True):
        same = [case if case.sums else replace(case, asked=_fixed(case.asked, of_case.targets))
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
    kind: SweepKind,
    budget: int,
    progress: Progress | None = None,
) -> Sweep:
    """Score the components of layers, in one pass or, for rules with rows, in groups of layers that fit ``budget`` bytes."""
    found: list[Swept] = []  # by rule
    groups: list[list[Sequence[Decomposition]]] = []
    if any(one.paths is None for _, one in options.rules):
        groups = list(sweeps.grouped(layers, len(prompt.ids), budget, engine.bound, engine.workspace_bytes))
    ahead, back = sum(options.stop - group[0][0].layer for group in groups), options.stop - layers[0][0].layer
    totals = [ahead if one.paths is None else back for _, one in options.rules]
    for (_, one), told in zip(options.rules, _told(progress, totals), strict=True):
        same = _fixed(asked, tuple(readout.target for readout in found[0].readouts)) if found else asked
        if one.paths is None:
            found.append(sweeps.swept(engine, prompt, groups, same, one, budget, told))
        else:
            found.append(linear.swept(engine, prompt, layers, same, one, told))
    return sweeps.stacked(_mean(found, options), layers, kind, prompt, engine.bound)


def _told(progress: Progress | None, totals: Sequence[int]) -> list[Progress | None]:
    """For passes that follow one another, how each reports its progress as a part of all."""
    if progress is None:
        return [None] * len(totals)
    return [partial(_tell, progress, sum(totals[:number]), sum(totals)) for number in range(len(totals))]


def _tell(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _fixed(asked: Sequence[Asked], targets: Sequence[Target]) -> tuple[Asked, ...]:
    """The targets that were found, so that every rule of a mixture explains the same tokens."""
    found, fixed = iter(targets), list[Asked]()
    for each in asked:
        own = [next(found) for _ in range(each.k or 1)]
        fixed += [each] if each.w is not None else [Asked(each.kind, t.position, t.token_ids) for t in own]
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
        backends=_joined([each.backends for each in found]),
        altered=next((each.altered for each in found if each.altered is not None), None),
        padded=any(each.padded for each in found),
    )


def _joined(backends: Sequence[dict[str, str]]) -> dict[str, str]:
    """The backends that ran each op, under any of the rules."""
    names: dict[str, set[str]] = {}
    for of_rule in backends:
        for op, backend in of_rule.items():
            names.setdefault(op, set()).update(backend.split("+"))
    return {op: "+".join(sorted(own)) for op, own in names.items()}
