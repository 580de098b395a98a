"""Parts of a prompt as sources: tokens, words, sentences or given spans, and the layout of their rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from depass_kernels import SourceLayout

from ..checks import integers
from ..errors import SourceError
from ..inputs.prompt import Prompt
from .source import Decomposition, Source, check_labels

if TYPE_CHECKING:
    from ..models.trace import Trace


SECTIONS = ("message", "document")  # the sources that a chat has
_NEEDS = {
    "message": "a prompt of chat messages whose texts the chat template keeps",
    "document": "documents in chat_template_kwargs whose texts the chat template keeps",
}


@dataclass(frozen=True)
class Spans:
    """Spans of a prompt as sources, half-open and in any order; the tokens outside all spans are the source ``rest``.

    The source ``rest`` is active at every position: like the bias source it shares in every MLP, even before its first
    token.

    Args:
        ranges: a pair ``(begin, end)`` per span; ``begin`` is included and ``end`` is not.
        unit: whether the ranges count tokens (``"token"``) or characters (``"char"``) of the prompt. A token belongs to
            the character span that it overlaps.
        labels: one string per span; by default the span's text.
    """

    ranges: Sequence[tuple[int, int]]
    unit: Literal["token", "char"] = "token"
    labels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Turn an iterator into a tuple, because the spans may be used for several prompts."""
        if isinstance(self.ranges, Iterator):
            object.__setattr__(self, "ranges", tuple(self.ranges))


@dataclass(frozen=True)
class Sentences:
    """The sentences of a prompt in a known language as sources; ``"sentence"`` stands for ``Sentences("en")``.

    Args:
        language: the language's code, as ``"de"`` or ``"hi"``. It decides which full stops end no sentence, such as those
            of abbreviations. The ends of all scripts count in every language.

    Raises:
        SourceError: the language is not a string of letters.
    """

    language: str = "en"

    def __post_init__(self) -> None:
        """Check the language."""
        if not isinstance(self.language, str) or not self.language.replace("-", "").isalpha():
            raise SourceError(f"language must be a code such as 'en' or 'pt-br', got {self.language!r}")


def named(sources: str, language: str) -> Any:
    """The sources that the command's options name: a unit, where sentences have a language.

    Raises:
        SourceError: the language is not a code.
    """
    return Sentences(language) if sources == "sentence" else sources


def decompose_prompt(
    prompt: Prompt, sources: Any, layer: int, has_bias: bool, exclude: bool | Literal["auto"], bos: int | None
) -> Decomposition:
    """Lay out the parts of a prompt as sources.

    Args:
        prompt: a prompt of ``N`` tokens.
        sources: ``"token"``, ``"word"``, ``"sentence"``, :class:`Sentences`, ``"message"``, ``"document"`` or
            :class:`Spans`.
        layer: the layer whose input is decomposed.
        has_bias: whether the model has biases, and so a bias source.
        exclude: whether the first token is excluded from the MLPs of later positions. ``"auto"`` excludes it if it is
            ``bos`` and a separate source.
        bos: the tokenizer's BOS id, or None.

    Raises:
        SourceError: the sources are unknown, or spans are empty, overlap or are outside the prompt.
    """
    length = len(prompt.ids)
    kind: Literal["token", "span"] = "token" if isinstance(sources, str) and sources == "token" else "span"
    ranges, labels = named_ranges(prompt, sources)

    order = sorted(range(len(ranges)), key=lambda i: ranges[i])
    for before, after in pairwise(order):
        if ranges[after][0] < ranges[before][1]:
            raise SourceError(
                f"token spans {ranges[before]} and {ranges[after]} overlap; a token can belong to one source only"
            )
    parts = [Source("bias", "bias")] if has_bias else []
    covered = sum(end - begin for begin, end in ranges)
    if covered < length:
        parts.append(Source("rest", "rest"))
    owner = torch.full((length,), len(parts) - 1, device="cpu")
    always = len(parts)
    for index in order:
        begin, end = ranges[index]
        owner[begin:end] = len(parts)
        parts.append(Source(labels[index], kind, begin, end))

    own = next((i for i, source in enumerate(parts) if (source.start, source.end) == (0, 1)), None)
    if exclude == "auto":
        excluded = own is not None and bos is not None and prompt.ids[0] == bos
    elif exclude and own is None:
        raise SourceError("exclude_bos=True needs the first token as a separate source; add the token span (0, 1)")
    else:
        excluded = bool(exclude)
    starts = [0] * always + [source.start or 0 for source in parts[always:]]
    layout = SourceLayout.from_starts(starts, length, own if excluded else None)
    where = layout.row_start[:-1] + owner

    def fill(rows: Tensor, trace: Trace) -> None:
        rows[where.to(rows.device)] = trace.stream.to(rows.dtype)

    return Decomposition(tuple(parts), layout, excluded, layer, "start", fill)


def named_ranges(prompt: Prompt, sources: Any) -> tuple[list[tuple[int, int]], Sequence[str]]:
    """The token ranges of a prompt's parts, and a label for each.

    Raises:
        SourceError: the sources are unknown or not there, or spans are empty or outside the prompt.
    """
    labels: Sequence[str] | None = None
    if isinstance(sources, Spans):
        ranges = token_ranges(prompt, sources)
        labels = check_labels(sources.labels, len(ranges), "Spans")
    elif isinstance(sources, str) and sources in SECTIONS:
        sections = [section for section in prompt.sections if section.kind == sources]
        if not sections:
            raise SourceError(f"sources={sources!r} needs {_NEEDS[sources]}; give token or character Spans instead")
        ranges = [(section.begin, section.end) for section in sections]
        labels = [section.label for section in sections]
    else:
        ranges = unit_ranges(prompt, sources)
    return ranges, labels or ["".join(prompt.tokens[begin:end]) for begin, end in ranges]


def unit_ranges(prompt: Prompt, unit: str | Sentences) -> list[tuple[int, int]]:
    """The token ranges of a prompt's tokens, words or sentences.

    Raises:
        SourceError: the unit is unknown, or the prompt has no text.
    """
    return prompt.segments("sentence", unit.language) if isinstance(unit, Sentences) else prompt.segments(unit)


def token_ranges(prompt: Prompt, spans: Spans) -> list[tuple[int, int]]:
    """The checked token ranges of given spans.

    Raises:
        SourceError: a span is empty or outside the prompt.
    """
    if spans.unit not in ("token", "char"):
        raise SourceError(f"Spans(unit={spans.unit!r}): the unit must be 'token' or 'char'")
    if spans.unit == "char" and prompt.text is None:
        raise SourceError(
            "character spans need text, but the prompt was given as ids without a tokenizer; pass one: "
            "DePass(model, tokenizer)"
        )
    length = len(prompt.ids) if spans.unit == "token" else len(prompt.text or "")
    if not isinstance(spans.ranges, Iterable):
        raise SourceError(f"Spans takes a list of pairs (begin, end), got {spans.ranges!r}")
    ranges = []
    for span in spans.ranges:
        try:
            begin, end = integers("a span", span, SourceError)
        except (SourceError, ValueError):
            raise SourceError(f"a span must be a pair of integers (begin, end), got {span!r}") from None
        inside = 0 <= begin < end <= length
        if not inside:
            raise SourceError(
                f"span ({begin}, {end}) is empty or outside the prompt, which has {length} {spans.unit}s (0 to {length})"
            )
        if spans.unit == "char":
            touched = prompt.positions(begin, end)
            if touched == (0, 0):
                raise SourceError(f"no token overlaps the character span ({begin}, {end}); choose another span")
            begin, end = touched
        ranges.append((begin, end))
    if not ranges:
        raise SourceError("Spans([]) is empty; give at least one span")
    return ranges
