"""What a prompt is decomposed into: tokens, words, sentences or given spans, and where their rows lie."""

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


@dataclass(frozen=True)
class Spans:
    """Spans of a prompt as sources, half-open and in any order; what none of them covers is the source ``rest``.

    ``rest`` is active everywhere: like the bias source it takes a part in every MLP, also before its first token.

    Args:
        ranges: ``(begin, end)`` each, ``begin`` included and ``end`` not.
        unit: whether they count ``"token"``\\ s or characters (``"char"``) of the prompt. A token belongs to the
            character span that it overlaps.
        labels: one for each; without it the span's text.
    """

    ranges: Sequence[tuple[int, int]]
    unit: Literal["token", "char"] = "token"
    labels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Keep what an iterator gives, for all of the prompts that the spans are of."""
        if isinstance(self.ranges, Iterator):
            object.__setattr__(self, "ranges", tuple(self.ranges))


def decompose_prompt(
    prompt: Prompt, sources: Any, layer: int, has_bias: bool, exclude: bool | Literal["auto"], bos: int | None
) -> Decomposition:
    """Lay out the sources of a prompt's own parts.

    Args:
        prompt: ``N`` tokens.
        sources: ``"token"``, ``"word"``, ``"sentence"`` or :class:`Spans`.
        layer: the layer whose input stream is decomposed.
        has_bias: whether the model has biases, and so a bias source.
        exclude: whether the first token takes no part in the MLPs of later positions; ``"auto"``: where it is ``bos`` and
            a source of its own.
        bos: the tokenizer's BOS id, or None.

    Raises:
        SourceError: unknown sources; spans that are empty, overlap, or lie outside of the prompt.
    """
    length = len(prompt.ids)
    kind: Literal["token", "span"] = "span"
    labels: Sequence[str] | None = None
    if isinstance(sources, Spans):
        ranges = token_ranges(prompt, sources)
        labels = check_labels(sources.labels, len(ranges), "Spans")
    elif isinstance(sources, str) and sources == "token":
        ranges, kind = [(t, t + 1) for t in range(length)], "token"
    else:
        ranges = prompt.segments(sources)

    order = sorted(range(len(ranges)), key=lambda i: ranges[i])
    for before, after in pairwise(order):
        if ranges[after][0] < ranges[before][1]:
            raise SourceError(
                f"spans {ranges[before]} and {ranges[after]} (tokens) overlap; a token belongs to one source"
            )
    made = [Source("bias", "bias")] if has_bias else []
    covered = sum(end - begin for begin, end in ranges)
    if covered < length:
        made.append(Source("rest", "rest"))
    owner = torch.full((length,), len(made) - 1, device="cpu")
    always = len(made)
    for index in order:
        begin, end = ranges[index]
        owner[begin:end] = len(made)
        label = "".join(prompt.tokens[begin:end]) if labels is None else labels[index]
        made.append(Source(label, kind, begin, end))

    own = next((i for i, source in enumerate(made) if (source.start, source.end) == (0, 1)), None)
    if exclude == "auto":
        excluded = own is not None and bos is not None and prompt.ids[0] == bos
    elif exclude and own is None:
        raise SourceError("exclude_bos=True needs the first token as a source of its own; give it a span (0, 1)")
    else:
        excluded = bool(exclude)
    starts = [0] * always + [source.start or 0 for source in made[always:]]
    layout = SourceLayout.from_starts(starts, length, own if excluded else None)
    where = layout.row_start[:-1] + owner

    def fill(rows: Tensor, trace: Trace) -> None:
        rows[where.to(rows.device)] = trace.stream.to(rows.dtype)

    return Decomposition(tuple(made), layout, excluded, layer, "start", fill)


def token_ranges(prompt: Prompt, spans: Spans) -> list[tuple[int, int]]:
    """The token ranges of given spans, checked.

    Raises:
        SourceError: spans that are empty or lie outside of the prompt.
    """
    if spans.unit not in ("token", "char"):
        raise SourceError(f"unit={spans.unit!r} of Spans; there are: 'token', 'char'")
    if spans.unit == "char" and prompt.text is None:
        raise SourceError("character spans need text: the prompt was given as ids and there is no tokenizer")
    length = len(prompt.ids) if spans.unit == "token" else len(prompt.text or "")
    if not isinstance(spans.ranges, Iterable):
        raise SourceError(f"Spans takes a list of pairs (begin, end), got {spans.ranges!r}")
    found = []
    for span in spans.ranges:
        try:
            begin, end = integers("a span", span, SourceError)
        except (SourceError, ValueError):
            raise SourceError(f"a span is a pair of integers (begin, end), got {span!r}") from None
        inside = 0 <= begin < end <= length
        if not inside:
            raise SourceError(f"span ({begin}, {end}) is empty or lies outside of the prompt's {length} {spans.unit}s")
        if spans.unit == "char":
            touched = [i for i, (a, b) in enumerate(prompt.offsets) if a < end and begin < b]
            if not touched:
                raise SourceError(f"no token lies in the characters ({begin}, {end})")
            begin, end = touched[0], touched[-1] + 1
        found.append((begin, end))
    if not found:
        raise SourceError("Spans([]) names no span; give at least one")
    return found
