"""The result for an answer, generated or given: its tokens, the attribution of each, and sums and chains of these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

import torch
from torch import Tensor

from ..checks import integer
from ..errors import TargetError
from ..inputs.prompt import Prompt
from ..inputs.targets import Target
from ..sources.source import Source
from ..views.page import View, generation_view
from .attribution import Attribution
from .common import Result, conservation_error, prompt_values, read_prompt


@dataclass(frozen=True, eq=False)
class Generation(Result):
    """An answer that a model generated or that was given, and the attribution of its parts.

    Attributes:
        answer: the answer's ids, tokens and text, special tokens included.
        attribution: the attribution, with one target per part of the answer, in order: its tokens, or what ``by=`` named.
            Its sources are the prompt's tokens or spans and all tokens of the answer except the last, which no other token
            follows. Logits are the model's own, before a temperature or any other change by sampling. Each target has the
            model's own probability of the part, and of a token its rank.
    """

    answer: Prompt
    attribution: Attribution

    FORMAT = "depass-generation-1"
    TENSORS = Attribution.TENSORS

    def __repr__(self) -> str:
        return f"Generation({self.text!r}, {self.attribution!r})"

    @property
    def text(self) -> str:
        """The answer as text, special tokens included; without a tokenizer, its ids."""
        return "".join(self.answer.tokens)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens' pieces of the text."""
        return self.answer.tokens

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens' ids."""
        return self.answer.ids

    @property
    def probabilities(self) -> Tensor:
        """``[parts]`` fp64, the model's own probability of each part of the answer, after the tokens before it."""
        return torch.tensor([target.probability for target in self.attribution.targets], dtype=torch.float64)

    @property
    def ranks(self) -> Tensor:
        """``[parts]``, the rank of each token among all tokens by probability, from 1; 0 for a part of several tokens."""
        return torch.tensor([target.rank or 0 for target in self.attribution.targets])

    @property
    def parts(self) -> list[tuple[int, int]]:
        """The half-open token ranges of the answer's parts, counted from 0 in the answer."""
        ranges = []
        for target in self.attribution.targets:
            end = target.position - self._begin + 2  # the token after the position
            ranges.append((end - (len(target.token_ids) if target.kind == "sum" else 1), end))
        return ranges

    def phrase(self, phrase: str | slice, occurrence: int = 0) -> Attribution:
        """The attribution of a phrase of the answer: one target, the sum over the phrase's tokens.

        A source's score is the sum of its scores for these tokens, and the logit is the sum of their logits. So tokens of
        the phrase are sources of its later tokens.

        Args:
            phrase: a text of the answer, or a slice of its tokens. A token that holds only a part of the text counts.
            occurrence: which occurrence of the text, from 0.

        Raises:
            TargetError: the phrase does not occur, the slice is empty, or the phrase ends inside a part.
        """
        begin, end = self._range(phrase, occurrence)
        return self._sums([(begin, end)])

    def total(self) -> Attribution:
        """The attribution of the whole answer: :meth:`phrase` over all its tokens."""
        return self.phrase(slice(None))

    def matrix(self, rows: str = "sentence", columns: str | None = None, language: str = "en") -> Attribution:
        """Scores between parts of the answer and parts of the text before: one target for each part of the answer.

        A part's scores are the sums over its tokens, as in :meth:`phrase`. Parts never cross the border between the prompt
        and the answer.

        Args:
            rows: the parts of the answer: ``"token"``, ``"word"`` or ``"sentence"``.
            columns: the parts to sum sources to, of the prompt and of the answer. None keeps the sources. Where the sources
                are not tokens, the prompt's stay as they are.
            language: the language of sentences; see :class:`Sentences`.

        Raises:
            SourceError: a unit is unknown, or the prompt has no text.
            TargetError: the answer's parts are larger than the rows.
        """
        sums = self._sums(self.answer.segments(rows, language))
        return sums if columns is None else self._columns(sums, columns, language)

    def through(
        self, target: str | slice | int | None = None, occurrence: int = 0, keep: str | slice = "prompt"
    ) -> Attribution:
        """Follow a part of the answer back to the prompt through the answer's earlier tokens.

        What a part owes to an earlier token of the answer is passed on to that token's own sources, in proportion to their
        scores, until it reaches the prompt. A token passes on at most its whole amount: its scores are divided by the sum of
        their absolute values, and what its scores do not carry on, because signs cancel or the score belongs to the bias or
        the rest, stays at the token. So the scores of the prompt's parts, what stays at each token of the answer, and the
        part's own bias and rest add up to its logit. In symbols, for the answer's scores by row, divided as said, ``A`` over
        the prompt's parts and ``B`` over the answer's tokens, and the part's own scores ``x_A`` and ``x_B``: the prompt gets
        ``x_A + x_B (I - B)⁻¹ A``, and at the tokens stays ``x_B (I - B)⁻¹ (1 - A·1 - B·1)``.

        Args:
            target: a text of the answer, a slice of its tokens, or the index of one; by default the whole answer.
            occurrence: which occurrence of the text, from 0.
            keep: where the way ends: ``"prompt"``, or also at a slice of the answer's tokens, such as a step of reasoning. A
                kept token passes nothing on, so its score is all that reaches it.

        Returns:
            One target, with the same sources as :attr:`attribution`.

        Raises:
            TargetError: the text does not occur, a slice is empty, the answer's parts are not its tokens, or ``keep`` is
                something else.
        """
        if any(end - begin > 1 for begin, end in self.parts):
            raise TargetError(
                "a chain runs through the answer's tokens, but its parts are larger; explain it by='token'"
            )
        if target is None:
            target = slice(None)
        elif not isinstance(target, (str, slice)):
            token, count = integer("target", target, TargetError), len(self.ids)
            if not -count <= token < count:
                raise TargetError(f"token {token} is out of range: the answer has {count} tokens")
            target = slice(token % count, token % count + 1)
        if keep != "prompt" and not isinstance(keep, slice):
            raise TargetError(f"keep must be 'prompt' or a slice of the answer's tokens, got {keep!r}")
        kept = range(*self._range(keep, 0)) if isinstance(keep, slice) else range(0)
        part = self.phrase(target, occurrence)
        begins = {i: source.start - self._begin for i, source in enumerate(part.sources) if source.start is not None}
        own = [i for i, at in begins.items() if at >= 0 and at not in kept]
        given = [i for i in begins if i not in set(own)]
        rows, x = self.attribution.scores[[begins[i] for i in own]].double(), part.scores[0].double()
        rows = rows / rows.abs().sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        a, b = rows[:, given], rows[:, own]
        identity = torch.eye(len(own), dtype=torch.float64)
        flow = torch.linalg.solve_triangular(identity - b, x[None, own], upper=False, left=False)[0]  # x_B (I - B)⁻¹
        x[given] += flow @ a
        x[own] = flow * (1 - a.sum(1) - b.sum(1))
        (of_part,) = part.targets
        error = conservation_error(x[None], part.target_logits.double()).float() if part.settings.adds_up else None
        return replace(
            part,
            scores=x[None].float(),
            targets=(replace(of_part, label=f"{of_part.label} (through the answer)"),),
            conservation_error=part.conservation_error if error is None else error,
        )

    def show(self, file: TextIO | None = None, width: int | None = None) -> None:
        """Print the answer's tokens with probabilities and largest sources, and the prompt with the scores of their sum."""
        from ..views.terminal import show_answer

        texts = ["".join(self.tokens[begin:end]) for begin, end in self.parts]
        show_answer(self.attribution, texts, self.total(), file, width)

    def page_view(self) -> View:
        """See :meth:`Result.page_view`: a click on a part of the answer shows its sources."""
        return generation_view(self.attribution, self.tokens, self.parts)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the attribution, by name."""
        return self.attribution.tensors()

    def to_dict(self) -> dict[str, Any]:
        """The attribution as a dict of plain values, with the answer."""
        return {**self.attribution.to_dict(), "format": self.FORMAT, "answer": prompt_values(self.answer)}

    @classmethod
    def from_saved(cls, tensors: dict[str, Any], said: dict[str, Any]) -> Generation:
        """See :meth:`Result.from_saved`."""
        return cls(read_prompt(said["answer"]), Attribution.from_saved(tensors, said))

    @property
    def _begin(self) -> int:
        """The number of the prompt's tokens."""
        return len(self.attribution.prompt.ids) + 1 - len(self.ids)

    def _is_of_answer(self, source: Source) -> bool:
        return source.start is not None and source.start >= self._begin

    def _range(self, phrase: str | slice, occurrence: int) -> tuple[int, int]:
        """The tokens of a phrase, from 0 in the answer."""
        if isinstance(phrase, slice):
            chosen = range(len(self.ids))[phrase]
            if chosen.step != 1 or not chosen:
                raise TargetError(
                    f"{phrase} takes no token of the answer, or not every one; it has {len(self.ids)} tokens"
                )
            return chosen.start, chosen.stop
        if not isinstance(phrase, str) or not phrase:
            raise TargetError(f"a phrase must be a text of the answer or a slice of its tokens, got {phrase!r}")
        if self.answer.text is None:
            raise TargetError(
                f"the phrase {phrase!r} needs text, but there is no tokenizer; give a slice of the answer's tokens"
            )
        at = -1
        for _ in range(occurrence + 1):
            at = self.answer.text.find(phrase, at + 1)
            if at < 0:
                count = self.answer.text.count(phrase)
                raise TargetError(
                    f"the phrase {phrase!r} occurs {count} times in the answer {self.answer.text!r}, so it has no "
                    f"occurrence {occurrence}"
                )
        return self.answer.positions(at, at + len(phrase))

    def _sums(self, ranges: Sequence[tuple[int, int]]) -> Attribution:
        """An attribution with one target for each range of the answer's tokens: the sum over its parts."""
        of, found = self.attribution, [self._parts_in(*tokens) for tokens in ranges]
        logits = torch.stack([of.target_logits[a:b].double().sum() for a, b in found])
        scores = torch.stack([of.scores[a:b].double().sum(0) for a, b in found])
        targets = [
            Target(
                "".join(self.tokens[begin:end]), "sum", of.targets[b - 1].position, self.ids[begin:end],
                probability=math.prod(target.probability or 0.0 for target in of.targets[a:b]),
            )
            for (begin, end), (a, b) in zip(ranges, found, strict=True)
        ]  # fmt: skip
        missing = torch.full((len(ranges),), float("nan"))
        return replace(
            of,
            scores=scores.float(),
            targets=tuple(targets),
            target_logits=logits.float(),
            conservation_error=conservation_error(scores, logits).float() if of.settings.adds_up else missing,
        )

    def _parts_in(self, begin: int, end: int) -> tuple[int, int]:
        """The parts that a range of tokens consists of.

        Raises:
            TargetError: it begins or ends inside a part.
        """
        first, last = {a: i for i, (a, _) in enumerate(self.parts)}, {b: i for i, (_, b) in enumerate(self.parts)}
        if begin not in first or end not in last:
            raise TargetError(
                f"tokens {begin} to {end} of the answer begin or end inside one of its parts; explain it by='token'"
            )
        return first[begin], last[end] + 1

    def _columns(self, sums: Attribution, unit: str, language: str) -> Attribution:
        """Sources summed to units of the prompt and of the answer."""
        begin, sources = self._begin, sums.sources
        units = [(a + begin, b + begin) for a, b in self.answer.segments(unit, language)]
        if any(source.kind == "token" for source in sources):
            units = sums.prompt.part(0, begin).segments(unit, language) + units
        else:
            units = [
                (s.start, s.end or 0) for s in sources if s.start is not None and not self._is_of_answer(s)
            ] + units
        labels = {source.start: source.label for source in sources if not self._is_of_answer(source)}
        tokens = sums.prompt.tokens
        grouped = list[tuple[Source, list[int]]]()
        for a, b in units:
            members = [i for i, s in enumerate(sources) if s.start is not None and a <= s.start < b]
            if members:
                whole = sources[members[0]].end == b and len(members) == 1
                label = labels.get(a, "") if whole and a < begin else "".join(tokens[a:b])
                grouped.append((Source(label, "span", a, min(b, len(tokens))), members))
        apart = [(source, [i]) for i, source in enumerate(sources) if source.start is None]
        last = [each for each in apart if each[0].kind in ("pattern", "unassigned")]
        columns = [*(each for each in apart if each not in last), *grouped, *last]
        scores = torch.stack([sums.scores[:, members].sum(1) for _, members in columns], 1)
        settings = replace(sums.settings, aggregated=unit)
        return replace(sums, scores=scores, sources=tuple(source for source, _ in columns), settings=settings)
