"""Many prompts, several per forward pass; an error in one prompt does not affect the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..errors import DePassError, OptionError
from ..inputs.answer import with_answer
from ..models.bound import BoundModel
from ..results.attribution import Attribution
from ..results.generation import Generation
from ..sources.spans import Sentences
from .attribute import attribute
from .generate import case_of_answer
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
    answers: bool = False
    by: str | Sentences = "token"

    def results(self, pairs: Iterable[tuple[Any, Any]]) -> Iterator[Attribution | Generation | DePassError]:
        """The results of pairs of prompt and target, or of prompt and answer, in order.

        Raises:
            OptionError: there are no prompts.
            DePassError: with ``errors="raise"``, the error of a prompt, after the results of all prompts before it.
        """
        batch, index, taken = _Batch(), -1, iter(pairs)
        while True:
            try:
                prompt, second = next(taken)
            except StopIteration:
                break
            except Exception:  # from the caller's iterable; the prompts before it still get their results
                yield from self._of(batch)
                raise
            index += 1
            try:
                checked: Case | DePassError = self._case(prompt, second)
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

    def _case(self, prompt: Any, second: Any) -> Case:
        """The case of a prompt and its target or answer, checked."""
        bound, tokenizer = self.engine.bound, self.engine.tokenizer
        if not self.answers:
            return case(bound, tokenizer, prompt, second, self.sources, self.options)
        encoded, ids = with_answer(prompt, second, tokenizer, bound)
        return case_of_answer(bound, tokenizer, encoded, ids, self.sources, self.options, self.by)

    def _of(self, batch: _Batch) -> Iterator[Attribution | Generation | DePassError]:
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
            if isinstance(checked, Case) and checked.answer is not None and isinstance(result, Attribution):
                yield Generation(checked.answer, result)
            else:
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


def paired(
    prompts: Iterable[Any], name: str, seconds: Iterable[Any] | None, default: Any = None
) -> Iterator[tuple[Any, Any]]:
    """Pair each prompt with its target or answer, of which ``name`` says which; without any, with the default.

    Raises:
        OptionError: there are more prompts than targets or answers, or fewer.
    """
    if seconds is None:
        for prompt in prompts:
            yield prompt, default
        return
    nothing = object()
    for index, (prompt, second) in enumerate(itertools.zip_longest(prompts, seconds, fillvalue=nothing)):
        if prompt is nothing or second is nothing:
            shorter, longer = ("prompts", name) if prompt is nothing else (name, "prompts")
            raise OptionError(
                f"{shorter} ends after {index}, but {longer} has more; give one {name.removesuffix('s')} per prompt"
            )
        yield prompt, second
