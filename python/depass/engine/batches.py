"""Many prompts, several per forward pass; an error in one prompt does not affect the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..errors import DePassError, OptionError
from ..models.bound import BoundModel
from ..results.attribution import Attribution
from .attribute import attribute
from .passes import Engine
from .request import Case, Options, case
from .scores import judge


@dataclass
class _Batch:
    """The prompts of one pass: ``begin`` is the index of the first, ``longest`` the number of tokens of the longest."""

    begin: int = 0
    longest: int = 0
    cases: list[Case | DePassError] = field(default_factory=list)

    def has_room_for(self, length: int, tokens: int, bound: BoundModel) -> bool:
        """Whether a pass of ``tokens``, padding included, has room for a prompt of ``length`` tokens (0: none runs)."""
        together = max(self.longest, length, 1) * (len(self.cases) + 1)
        alike = 0 in (length, self.longest) or bound.regime(length) == bound.regime(self.longest)
        return together <= tokens and alike


@dataclass(frozen=True)
class Many:
    """The arguments of an attribution of many prompts; see :meth:`depass.DePass.attribute_many`."""

    engine: Engine
    sources: Any
    batch_tokens: int
    errors: Literal["raise", "return"]
    options: Options
    strict: bool

    def results(self, pairs: Iterable[tuple[Any, Any]]) -> Iterator[Attribution | DePassError]:
        """The results of pairs of prompt and target, in order.

        Raises:
            OptionError: there are no prompts.
            DePassError: with ``errors="raise"``, the error of a prompt, after the results of all prompts before it.
        """
        batch, index, taken = _Batch(), -1, iter(pairs)
        while True:
            try:
                prompt, target = next(taken)
            except StopIteration:
                break
            except Exception:  # from the caller's iterable; the prompts before it still get their results
                yield from self._of(batch)
                raise
            index += 1
            try:
                checked: Case | DePassError = case(
                    self.engine.bound, self.engine.tokenizer, prompt, target, self.sources, self.options
                )
            except Exception as error:  # a tokenizer's code, for example, may raise anything
                checked = _of_one_prompt(error)
            length = len(checked.prompt.ids) if isinstance(checked, Case) else 0
            if batch.cases and not batch.has_room_for(length, self.batch_tokens, self.engine.bound):
                yield from self._of(batch)
                batch = _Batch(index)
            batch.cases.append(checked)
            batch.longest = max(batch.longest, length)
            if isinstance(checked, DePassError) and self.errors == "raise":
                break
        if index < 0:
            raise OptionError("prompts is empty; give at least one")
        yield from self._of(batch)

    def _of(self, batch: _Batch) -> Iterator[Attribution | DePassError]:
        """The results of one pass."""
        results = iter(self._together([checked for checked in batch.cases if isinstance(checked, Case)]))
        tolerance = self.engine.bound.tolerance
        for index, checked in enumerate(batch.cases, batch.begin):
            result = next(results) if isinstance(checked, Case) else checked
            if isinstance(result, Attribution):
                try:
                    judge(result, self.strict, tolerance)
                except Warning:  # that the caller has made an error of
                    raise
                except Exception as error:
                    result = _of_one_prompt(error)
            if isinstance(result, DePassError) and self.errors == "raise":
                raise type(result)(f"prompt {index}: {result}") from result
            yield result

    @torch.no_grad()
    def _together(self, cases: Sequence[Case]) -> list[Attribution | DePassError]:
        """The cases' results from one pass; if an error stops it, from one pass per case."""
        if not cases:
            return []
        try:
            return attribute(self.engine, cases, self.options)
        except Exception as error:  # one of the cases raised it
            if len(cases) == 1:
                return [_of_one_prompt(error)]
        return [result for each in cases for result in self._together([each])]


def _of_one_prompt(error: Exception) -> DePassError:
    """An error as a prompt's result: a DePassError unchanged, any other wrapped in one that names its type."""
    if isinstance(error, DePassError):
        return error
    unexpected = DePassError(f"{type(error).__name__}: {error}")
    unexpected.__cause__ = error
    return unexpected


def with_targets(prompts: Iterable[Any], target: Any, targets: Iterable[Any] | None) -> Iterator[tuple[Any, Any]]:
    """Pair each prompt with its target.

    Raises:
        OptionError: there are more prompts than targets, or fewer.
    """
    if targets is None:
        for prompt in prompts:
            yield prompt, target
        return
    nothing = object()
    for index, (prompt, own_target) in enumerate(itertools.zip_longest(prompts, targets, fillvalue=nothing)):
        if prompt is nothing or own_target is nothing:
            shorter, longer = ("prompts", "targets") if prompt is nothing else ("targets", "prompts")
            raise OptionError(f"{shorter} ends after {index}, but {longer} has more; give one target per prompt")
        yield prompt, own_target
