"""A prompt: token ids from text, chat messages or ids, with each token's text and character range."""

from __future__ import annotations

import bisect
import itertools
import operator
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import PromptError, SourceError
from ..models.bound import BoundModel

_UNITS = {
    "word": re.compile(r"\S+"),
    "sentence": re.compile(r"\S[^.!?。！？\n]*[.!?。！？]*"),
}
_CONTEXT = 8  # preceding tokens that can change how a token decodes
_BYTES = 4  # the most bytes of a character in UTF-8


@dataclass(frozen=True)
class Prompt:
    """A prompt of ``N`` tokens and, if a tokenizer is given, its text.

    Attributes:
        ids: ``[N]`` token ids.
        tokens: ``[N]`` pieces of the text, one per token. Where a character is split over several tokens, one of them
            shows it and the others are empty. Without a tokenizer: the ids as text.
        text: the prompt as text, special tokens included, or None without a tokenizer.
        offsets: ``[N]`` half-open character ranges in ``text``, without the space before a word; empty without text.
        special: positions of special tokens.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    text: str | None = None
    offsets: tuple[tuple[int, int], ...] = ()
    special: frozenset[int] = frozenset()

    def segments(self, unit: str) -> list[tuple[int, int]]:
        """Half-open token ranges of the prompt's tokens, words or sentences; a special token has its own range.

        Args:
            unit: ``"token"``, ``"word"`` or ``"sentence"``.

        Raises:
            SourceError: the unit is unknown, or the prompt has no text.
        """
        check_unit(unit)
        if unit == "token":
            return [(t, t + 1) for t in range(len(self.ids))]
        if self.text is None:
            raise SourceError(
                f"{unit}s need text, but the prompt was given as ids without a tokenizer; pass one: DePass(model, tokenizer)"
            )
        # each unit begins with the space before it, where the previous unit ends
        begins = [0, *(match.end() for match in _UNITS[unit].finditer(self.text))][:-1]
        ranges: list[tuple[int, int]] = []
        previous = None
        for index, (_, end) in enumerate(self.offsets):
            # a token belongs to the last word, counted from the space before it, that begins before the token ends
            key = ("special", index) if index in self.special else ("unit", bisect.bisect_left(begins, end))
            if key == previous:
                ranges[-1] = (ranges[-1][0], index + 1)
            else:
                ranges.append((index, index + 1))
            previous = key
        return ranges


def check_unit(unit: str) -> None:
    """Raise a SourceError where the unit is unknown."""
    if unit != "token" and unit not in _UNITS:
        raise SourceError(f"unknown unit {unit!r}; choose one of: token, {', '.join(_UNITS)}")


def encode(prompt: Any, tokenizer: Any, bound: BoundModel) -> Prompt:
    """Make a :class:`Prompt` from a string, chat messages (a list of dicts) or ids (a list of ints or a 1-D tensor).

    Raises:
        PromptError: the prompt is empty, a batch, longer than the model's positions, or text without a tokenizer; or an
            id is outside the vocabulary.
    """
    if isinstance(prompt, str):
        encoded = _from_text(prompt, _needed(tokenizer, "a text prompt"), special=True)
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(message, dict) for message in prompt):
        encoded = _from_chat(prompt, _needed(tokenizer, "a chat prompt"))
    else:
        encoded = _from_ids(_ids(prompt), tokenizer)
    limit = bound.max_positions
    if not encoded.ids:
        raise PromptError("the prompt is empty; give at least one token")
    if limit is not None and len(encoded.ids) > limit:
        raise PromptError(
            f"the prompt has {len(encoded.ids)} tokens, but {bound.name} has {limit} positions; shorten it"
        )
    vocabulary = bound.vocab_size
    for index, token in enumerate(encoded.ids):
        if not 0 <= token < vocabulary:
            raise PromptError(f"id {token} at position {index} is out of range: the vocabulary has {vocabulary} tokens")
    return encoded


def _needed(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise PromptError(f"{what} needs a tokenizer: pass one, DePass(model, tokenizer), or give token ids")
    return tokenizer


def _ids(prompt: Any) -> list[int]:
    if hasattr(prompt, "keys"):
        raise PromptError(
            f"expected one prompt, got a mapping with {', '.join(map(str, prompt.keys()))}; pass the unpadded ids of one "
            "prompt: encoding['input_ids'][0][mask]"
        )
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(values, Sequence) or isinstance(values, bytes):
        raise PromptError(f"expected a string, chat messages or token ids, got {type(prompt).__name__}")
    if any(isinstance(value, (list, tuple, str, torch.Tensor)) and getattr(value, "ndim", 1) for value in values):
        shape = f" of shape {list(prompt.shape)}" if hasattr(prompt, "shape") else ""
        raise PromptError(
            f"expected one prompt, got a batch{shape} with {len(values)} rows; pass one unpadded row at a time"
        )
    ids = []
    for value in values:
        try:
            ids.append(operator.index(value))
        except TypeError:
            raise PromptError(f"token ids must be integers, got {value!r}") from None
        if isinstance(value, bool):
            raise PromptError(f"token ids must be integers, got {value!r}")
    return ids


def _from_chat(messages: Sequence[dict[str, Any]], tokenizer: Any) -> Prompt:
    try:
        # the last message may be the beginning of the model's own turn, which is then continued
        begun = messages[-1].get("role") == "assistant"
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
    except Exception as error:  # a template is code by the model's authors and may raise anything
        raise PromptError(f"the tokenizer's chat template rejected these messages: {error}") from error
    return _from_text(text, tokenizer, special=False)


def _from_text(text: str, tokenizer: Any, special: bool) -> Prompt:
    if not text:
        raise PromptError("the prompt is empty; give at least one token")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptError("the prompt is not text: it contains bytes that are not UTF-8")
    if not getattr(tokenizer, "is_fast", False):
        return _from_ids(tokenizer.encode(text, add_special_tokens=special), tokenizer)
    encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoding["input_ids"]
    marked = set(tokenizer.all_special_ids)
    # tokenizers differ in whether a token includes the space before a word: give each character to the token that ends
    # after it
    tokens, offsets, at = [], [], 0
    for index, (begin, end) in enumerate(encoding["offset_mapping"]):
        if begin == end:  # added by the tokenizer
            tokens.append(tokenizer.decode([ids[index]]))
            offsets.append((at, at))
        elif end <= at:  # a further byte of a character, which its first token shows
            tokens.append("")
            offsets.append((begin, end))
        else:
            tokens.append(text[at:end])
            offsets.append((_skip_space(text, max(begin, at), end), end))
            at = end
    return Prompt(
        tuple(ids), tuple(tokens), text, tuple(offsets), frozenset(i for i, t in enumerate(ids) if t in marked)
    )


def _from_ids(ids: list[int], tokenizer: Any) -> Prompt:
    if tokenizer is None:
        return Prompt(tuple(ids), tuple(str(token) for token in ids))
    tokens: list[str] = []
    unfinished: list[bool] = []
    begins_at = deque([0])  # tokens at which a character begins; the window starts at the first of them
    known, piece, grown = "", "", 0  # grown: the last token that completed a character
    for index, token in enumerate(ids):
        start, done = begins_at[0], begins_at[-1]
        known = _decode(tokenizer, ids[start:done]) + "".join(tokens[done:])
        piece = _decode(tokenizer, ids[start : index + 1])
        # bytes of an incomplete character decode to U+FFFD; the token that completes it gets the character
        whole = piece.rstrip("\ufffd")
        if len(whole) > len(known):
            grown = index
        unfinished.append(whole != piece and index - max(done, grown) < _BYTES - 1)
        if not unfinished[index]:
            whole = piece
            begins_at.append(index + 1)
            while begins_at[1] <= index + 1 - _CONTEXT:
                begins_at.popleft()
        if whole.startswith(known):
            tokens.append(whole[len(known) :])
        else:  # some decoders show nothing of a run of bytes until its last character is complete
            tokens.append("" if unfinished[index] else _decode(tokenizer, [token]))
    if unfinished and unfinished[-1] and piece.startswith(known):  # it is never completed
        tokens[-1] = piece[len(known) :]
    text = "".join(tokens)
    ends = list(itertools.accumulate(len(token) for token in tokens))
    begins = [end - len(piece) for piece, end in zip(tokens, ends, strict=True)]
    for index in reversed(range(len(ids) - 1)):  # the tokens that began a character cover it, too
        if unfinished[index]:
            ends[index] = ends[index + 1]
    offsets = [(_skip_space(text, begin, end), end) for begin, end in zip(begins, ends, strict=True)]
    marked = set(tokenizer.all_special_ids)
    return Prompt(
        tuple(ids), tuple(tokens), text, tuple(offsets), frozenset(i for i, t in enumerate(ids) if t in marked)
    )


def _decode(tokenizer: Any, ids: list[int]) -> str:
    try:
        text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    except (OverflowError, TypeError, IndexError):
        # an id that the tokenizer does not have; the model's vocabulary is checked later
        text = "".join(f"<{token}>" for token in ids)
    return text


def _skip_space(text: str, begin: int, end: int) -> int:
    while begin < end - 1 and text[begin].isspace():
        begin += 1
    return begin
