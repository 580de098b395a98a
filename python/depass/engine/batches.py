"""Many prompts, several in one pass of the model; what is wrong with one of them harms no other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..errors import DePassError, OptionError
from ..results.attribution import Attribution
from .passes import Engine
from .request import Case, Options, case
from .scores import attribute, judge


@dataclass
class _Batch:
    """Prompts of one pass: ``begin`` is the index of the first, ``longest`` the tokens of the longest."""

    begin: int = 0
    longest: int = 0
    cases: list[Case | DePassError] = field(default_factory=list)

    def tokens_with(self, length: int) -> int:
        """Of a pass with one more prompt of ``length`` tokens, padding included."""
        return max(self.longest, length) * (len(self.cases) + 1)


@dataclass(frozen=True)
class Many:
    """How many prompts are attributed: see :meth:`depass.DePass.attribute_many`."""

    engine: Engine
    sources: Any
    batch_tokens: int
    errors: Literal["raise", "return"]
    options: Options
    strict: bool

    def results(self, pairs: Iterable[tuple[Any, Any]]) -> Iterator[Attribution | DePassError]:
        """Of prompts with their targets, in order.

        Raises:
            OptionError: no prompts.
            DePassError: with ``errors="raise"``, what is wrong with a prompt, at its turn.
        """
        batch, index, taken = _Batch(), -1, iter(pairs)
        while True:
            try:
                prompt, target = next(taken)
            except StopIteration:
                break
            except Exception:  # of the caller's iterable, whose prompts up to there have their results
                yield from self._of(batch)
                raise
            index += 1
            try:
                one: Case | DePassError = case(
                    self.engine.bound, self.engine.tokenizer, prompt, target, self.sources, self.options
                )
            except Exception as error:  # a tokenizer, for one, runs code that raises what it likes
                one = _of_one_prompt(error)
            length = len(one.prompt.ids) if isinstance(one, Case) else 1
            if batch.cases and batch.tokens_with(length) > self.batch_tokens:
                yield from self._of(batch)
                batch = _Batch(index)
            batch.cases.append(one)
            batch.longest = max(batch.longest, length)
            if isinstance(one, DePassError) and self.errors == "raise":
                break
        if index < 0:
            raise OptionError("prompts is empty; give at least one")
        yield from self._of(batch)

    def _of(self, batch: _Batch) -> Iterator[Attribution | DePassError]:
        """The results of one pass."""
        found = iter(self._together([one for one in batch.cases if isinstance(one, Case)]))
        tolerance = self.engine.bound.tolerance
        for index, one in enumerate(batch.cases, batch.begin):
            result = next(found) if isinstance(one, Case) else one
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
        """The cases' results from one pass, or where something in one of them stops it, from a pass each."""
        if not cases:
            return []
        try:
            return attribute(self.engine, cases, self.options)
        except Exception as error:  # whatever it is, it is of one of them
            if len(cases) == 1:
                return [_of_one_prompt(error)]
        return [result for one in cases for result in self._together([one])]


def _of_one_prompt(error: Exception) -> DePassError:
    """An error as a prompt's result: our own as it is, any other with its kind and the error itself as its cause."""
    if isinstance(error, DePassError):
        return error
    unexpected = DePassError(f"{type(error).__name__}: {error}")
    unexpected.__cause__ = error
    return unexpected


def with_targets(prompts: Iterable[Any], target: Any, targets: Iterable[Any] | None) -> Iterator[tuple[Any, Any]]:
    """Each prompt with its target.

    Raises:
        OptionError: more of the one than of the other.
    """
    if targets is None:
        for prompt in prompts:
            yield prompt, target
        return
    nothing = object()
    for index, (prompt, asked) in enumerate(itertools.zip_longest(prompts, targets, fillvalue=nothing)):
        if prompt is nothing or asked is nothing:
            raise OptionError(f"prompts and targets are not equally many: one of them ends after {index}")
        yield prompt, asked
