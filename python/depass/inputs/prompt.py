"""A prompt: token ids from text, chat messages or ids, with each token's text and character range."""

from __future__ import annotations

import bisect
import itertools
import operator
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..errors import OptionError, PromptError, PromptWarning, SourceError, first_line, warn
from ..models.bound import BoundModel

UNITS = ("token", "word", "sentence")
_CONTEXT = 8  # preceding tokens that can change how a token decodes
_OF_THE_CALL = ("tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length")
_MEDIA = ("pixel_values", "image", "video", "audio", "input_features", "input_values")  # how names of inputs begin
_MARK = "Depassmark{}Z"
_BYTES = 4  # the most bytes of a character in UTF-8


@dataclass(frozen=True)
class Section:
    """A message of a chat or a document in a prompt.

    Attributes:
        kind: ``message`` or ``document``.
        label: the message's role, or the document's title or text.
        begin: the position of its first token.
        end: one past that of its last.
    """

    kind: Literal["message", "document"]
    label: str
    begin: int
    end: int


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
        sections: the messages of a chat, and the documents that its template was given, where the template keeps their
            texts.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    text: str | None = None
    offsets: tuple[tuple[int, int], ...] = ()
    special: frozenset[int] = frozenset()
    sections: tuple[Section, ...] = field(default=(), compare=False)

    def part(self, begin: int, end: int) -> Prompt:
        """The tokens from position ``begin`` to ``end``, and their text, as a prompt of their own."""
        special = frozenset(index - begin for index in self.special if begin <= index < end)
        ids, tokens = self.ids[begin:end], self.tokens[begin:end]
        if self.text is None:
            return Prompt(ids, tokens, special=special)
        first = self.offsets[begin - 1][1] if begin else 0
        last = self.offsets[end - 1][1] if end else 0
        offsets = tuple((max(a - first, 0), b - first) for a, b in self.offsets[begin:end])
        return Prompt(ids, tokens, self.text[first:last], offsets, special)

    def positions(self, begin: int, end: int) -> tuple[int, int]:
        """The half-open token range that overlaps a character range of the text; ``(0, 0)`` if there is none."""
        touched = [index for index, (a, b) in enumerate(self.offsets) if a < end and begin < b]
        return (touched[0], touched[-1] + 1) if touched else (0, 0)

    def segments(self, unit: str, language: str = "en") -> list[tuple[int, int]]:
        """Half-open token ranges of the prompt's tokens, words or sentences; a special token has its own range.

        A line break ends a sentence, too.

        Args:
            unit: ``"token"``, ``"word"`` or ``"sentence"``.
            language: the language of sentences, as its code: ``"en"``, ``"de"``, ``"hi"``. It decides which full stops are
                those of abbreviations and numbers.

        Raises:
            SourceError: the unit is unknown, or the prompt has no text.
            OptionError: sentences need a package that is not installed.
        """
        check_unit(unit)
        if unit == "token":
            return [(t, t + 1) for t in range(len(self.ids))]
        if self.text is None:
            raise SourceError(
                f"{unit}s need text, but the prompt was given as ids without a tokenizer; pass one: DePass(model, tokenizer)"
            )
        ends = (
            [match.end() for match in re.finditer(r"\S+", self.text)] if unit == "word" else self._sentences(language)
        )
        begins = [0, *ends][:-1]  # each unit begins with the space before it, where the previous unit ends
        ranges: list[tuple[int, int]] = []
        previous = None
        for index, (begin, end) in enumerate(self.offsets):
            # a token belongs to the word, counted from the space before it, of its first character that is no space
            unit_at = bisect.bisect_left(begins, min(begin + 1, end))
            key = ("special", index) if index in self.special else ("unit", unit_at)
            if key == previous:
                ranges[-1] = (ranges[-1][0], index + 1)
            else:
                ranges.append((index, index + 1))
            previous = key
        return ranges

    def _sentences(self, language: str) -> list[int]:
        """Where the text's sentences end; line breaks and special tokens are never inside of one."""
        try:
            from sentencex import get_sentence_boundaries
        except ImportError as error:
            raise OptionError("sentences need the package sentencex: pip install sentencex") from error
        text = self.text or ""
        cuts = {0, len(text), *(match.end() for match in re.finditer("\n", text))}
        cuts.update(*(self.offsets[index] for index in self.special))
        ends = []
        for begin, end in itertools.pairwise(sorted(cuts)):
            for sentence in get_sentence_boundaries(language, text[begin:end]):
                if sentence["text"].strip():
                    ends.append(begin + sentence["start_index"] + len(sentence["text"].rstrip()))
        return ends


def check_unit(unit: str, units: Sequence[str] = UNITS) -> None:
    """Raise a SourceError where the unit is unknown."""
    if unit not in units:
        raise SourceError(f"unknown unit {unit!r}; choose one of: {', '.join(units)}")


def encode(prompt: Any, tokenizer: Any, bound: BoundModel, generated: bool = False) -> Prompt:
    """Make a :class:`Prompt` from a string, chat messages (a list of dicts), ids or what a tokenizer returns.

    Ids are a list of ints or a tensor; a tokenizer returns those or a ``BatchEncoding``, whose padding is left out. A batch
    dimension must have size one. In ids that the model ``generated`` may be any of its tokens.

    Raises:
        PromptError: the prompt is empty, a batch, longer than the model's positions, or text without a tokenizer; it has
            an image, a video or a sound; or an id is outside the vocabulary.
    """
    template: Mapping[str, Any] = {}
    if isinstance(prompt, Chat):
        prompt, template = prompt.messages, prompt.template
        if not is_chat(prompt):
            raise PromptError(
                f"chat_template_kwargs need a prompt of chat messages (a list of dicts), got {type(prompt).__name__}"
            )
    if isinstance(prompt, str):
        encoded = _from_text(prompt, needed(tokenizer, "a text prompt"), special=True)
    elif is_chat(prompt):
        encoded = _from_chat(prompt, template, needed(tokenizer, "a chat prompt"))
    else:
        encoded = _from_ids(token_ids(prompt), tokenizer)
    return checked(encoded, bound, generated)


def checked(encoded: Prompt, bound: BoundModel, generated: bool = False) -> Prompt:
    """A prompt whose ids the model takes.

    Raises:
        PromptError: it is empty, longer than the model's positions, or an id is outside the vocabulary or no text's.
    """
    limit = bound.max_positions
    if not encoded.ids:
        raise PromptError("the prompt is empty; give at least one token")
    if limit is not None and len(encoded.ids) > limit:
        raise PromptError(
            f"the prompt has {len(encoded.ids)} tokens, but {bound.name} has {limit} positions; shorten it"
        )
    vocabulary = bound.vocab_size
    for index, token in enumerate(encoded.ids):
        if token in bound.placeholders and not generated:
            raise PromptError(
                f"id {token} at position {index} stands for {bound.placeholders[token]} in {bound.name}; DePass attributes "
                "text alone: leave it out"
            )
        if not 0 <= token < vocabulary:
            raise PromptError(f"id {token} at position {index} is out of range: the vocabulary has {vocabulary} tokens")
    return encoded


@dataclass(frozen=True)
class Chat:
    """Chat messages with keyword arguments for the tokenizer's chat template (``tools``, ``enable_thinking`` ...)."""

    messages: Any
    template: Mapping[str, Any]


def with_template(prompt: Any, template: Any) -> Any:
    """A prompt with the ``chat_template_kwargs`` of a call; without any, the prompt itself.

    Raises:
        OptionError: they are no dict, or DePass sets one of them itself.
    """
    if template is None:
        return prompt
    if not isinstance(template, Mapping):
        raise OptionError(f"chat_template_kwargs must be a dict, got {type(template).__name__}")
    ours = [name for name in template if name in _OF_THE_CALL]
    if ours:
        raise OptionError(f"chat_template_kwargs: {ours[0]} is set by DePass; leave it out")
    return Chat(prompt, template)


def refuse_encoding(name: str, prompts: Any) -> None:
    """Raise an OptionError where prompts are what a tokenizer returns for a batch, whose items are not prompts."""
    if hasattr(prompts, "keys"):
        raise OptionError(f"{name} must be an iterable of prompts, got {type(prompts).__name__}; {_rows_of(prompts)}")


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is chat messages."""
    return isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(message, dict) for message in prompt)


def needed(tokenizer: Any, what: str) -> Any:
    """The tokenizer, which ``what`` needs.

    Raises:
        PromptError: there is none.
    """
    if tokenizer is None:
        raise PromptError(f"{what} needs a tokenizer: pass one, DePass(model, tokenizer), or give token ids")
    return tokenizer


def token_ids(prompt: Any) -> list[int]:
    """The ids of a list, a tensor, or what a tokenizer returns for one text, without its padding.

    Raises:
        PromptError: they are something else, or several rows.
    """
    mask = None
    if hasattr(prompt, "keys"):
        _refuse_media(name for name in prompt if prompt[name] is not None)
        if "input_ids" not in prompt:
            raise PromptError(f"expected one prompt, got a mapping with {', '.join(map(str, prompt.keys()))}")
        rows, masks = _listed(prompt["input_ids"]), _listed(prompt.get("attention_mask"))
        if _is_batch(rows) and len(rows) > 1:
            raise PromptError(f"expected one prompt, got a batch with {len(rows)} rows; {_rows_of(prompt)}")
        mask = _listed(masks[0]) if _is_batch(masks) else masks
    else:
        rows = _listed(prompt)
    if not isinstance(rows, Sequence) or isinstance(rows, (str, bytes)):
        raise PromptError(f"expected a string, chat messages or token ids, got {type(prompt).__name__}")
    if _is_batch(rows) and (len(rows) > 1 or isinstance(rows[0], str)):
        shape = f" of shape {list(prompt.shape)}" if hasattr(prompt, "shape") else ""
        raise PromptError(
            f"expected one prompt, got a batch{shape} with {len(rows)} rows; pass them to attribute_many(), each without "
            "padding"
        )
    values = _listed(rows[0]) if _is_batch(rows) else rows
    if isinstance(mask, Sequence) and len(mask) == len(values):
        values = [value for value, kept in zip(values, mask, strict=True) if kept]
    ids = []
    for value in values:
        try:
            ids.append(operator.index(value))
        except TypeError:
            raise PromptError(f"token ids must be integers, got {value!r}") from None
        if isinstance(value, bool):
            raise PromptError(f"token ids must be integers, got {value!r}")
    return ids


def _refuse_media(names: Iterable[Any]) -> None:
    """Raise a PromptError where one of the names of what a processor returns, or of a message's parts, is not of text."""
    for name in names:
        if str(name).startswith(_MEDIA):
            raise PromptError(
                f"the prompt has {name}; DePass attributes text alone: give text, chat messages or token ids without "
                "images, videos and sound"
            )


def _listed(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values


def _is_batch(values: Any) -> bool:
    """Whether the first of some values is a row, and not a number."""
    if not isinstance(values, Sequence) or not values:
        return False
    first = values[0]
    return isinstance(first, (list, tuple, str)) or (hasattr(first, "tolist") and getattr(first, "ndim", 0) > 0)


def _rows_of(encoding: Any) -> str:
    """How to pass the rows of a tokenizer's batch ``encoding``."""
    masks = _listed(encoding.get("attention_mask")) or []
    if all(all(row) for row in masks):
        return "pass its rows: attribute_many(encoding['input_ids'])"
    return (
        "pass its rows without padding: attribute_many([[i for i, kept in zip(*row) if kept] for row in "
        "zip(encoding['input_ids'], encoding['attention_mask'])])"
    )


def _from_chat(messages: Sequence[dict[str, Any]], template: Mapping[str, Any], tokenizer: Any) -> Prompt:
    return from_rendered(rendered(messages, template, tokenizer), messages, template, tokenizer)


def from_rendered(text: str, messages: Sequence[dict[str, Any]], template: Mapping[str, Any], tokenizer: Any) -> Prompt:
    """The prompt of chat messages, from their text by :func:`rendered`."""
    prompt = _from_text(text, tokenizer, special=False)
    sections = list[Section]()
    for kind, label, begin, end in _sections(text, messages, template, tokenizer):
        sections.append(Section(kind, label, *prompt.positions(begin, end)))
    return replace(prompt, sections=tuple(sections))


def content(message: Mapping[str, Any]) -> str:
    """The text of a message, without the white space around it."""
    return "".join(_texts(message.get("content"))).strip()


def _texts(said: Any) -> list[str]:
    """The texts of a message's content: one, or those of its parts."""
    if isinstance(said, list):
        return [part["text"] for part in said if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return [said] if isinstance(said, str) else []


def _sections(
    text: str, messages: Sequence[dict[str, Any]], template: Mapping[str, Any], tokenizer: Any
) -> list[tuple[Literal["message", "document"], str, int, int]]:
    """The kind, label and character range of the messages and documents in their rendered ``text``.

    The template renders them once more with a mark in place of each text. What lies between the marks must then lie between
    the texts, too; where it does not, as when the template changes a text, there are no sections.
    """
    marks = _Marks()
    spoken = [{**message, "content": marks.of(message.get("content"), "message", str(message.get("role")))}
              for message in messages]  # fmt: skip
    documents = [marks.document(each) for each in template.get("documents") or ()]
    try:
        marked = rendered(spoken, {**template, "documents": documents} if documents else template, tokenizer)
    except PromptError:
        return []
    between = re.split(_MARK.format("([0-9]+)"), marked)
    found = list[tuple[Literal["message", "document"], str, int, int]]()
    if not text.startswith(between[0]):
        return []
    at = len(between[0])
    for number, after in zip(between[1::2], between[2::2], strict=True):
        kind, label, original = marks.known[int(number)]
        tried = (original, original.strip(), original.rstrip())  # a template may cut white space
        its = next((its for its in tried if text.startswith(its + after, at)), None)
        if its is None:
            return []
        if its.strip():
            found.append((kind, label, at, at + len(its)))
        at += len(its) + len(after)
    return found if at == len(text) else []


class _Marks:
    """Marks that stand for the texts of messages and documents; ``known`` has the kind, label and text of each."""

    def __init__(self) -> None:
        self.known: list[tuple[Literal["message", "document"], str, str]] = []

    def of(self, said: Any, kind: Literal["message", "document"], label: str) -> Any:
        """A text, or a list of parts, with a mark in place of every text that is not empty."""
        if isinstance(said, list):
            return [{**part, "text": self.of(part["text"], kind, label)} if _texts([part]) else part for part in said]
        if not isinstance(said, str) or not said.strip():
            return said
        self.known.append((kind, label, said))
        return _MARK.format(len(self.known) - 1)

    def document(self, document: Any) -> Any:
        """A document, as chat templates take them, with a mark in place of its text."""
        if not isinstance(document, Mapping):
            return self.of(document, "document", str(document))
        of_text = "text" if "text" in document else "content"
        text = document.get(of_text)
        return {**document, of_text: self.of(text, "document", str(document.get("title") or text))}


def rendered(messages: Sequence[dict[str, Any]], template: Mapping[str, Any], tokenizer: Any) -> str:
    """Chat messages as text, by the tokenizer's template.

    Raises:
        PromptError: the template refuses them, or they have an image, a video or a sound.
    """
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    _refuse_media(part.get("type") for part in parts if isinstance(part, dict))
    try:
        # the last message may be the beginning of the model's own turn, which is then continued
        begun = messages[-1].get("role") == "assistant"
        turn = {"add_generation_prompt": not begun, "continue_final_message": begun}
        if turn.keys() & template.keys():
            turn = dict.fromkeys(turn, False)
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **{**turn, **template})
    except Exception as error:  # a template is code by the model's authors and may raise anything
        raise PromptError(f"the tokenizer's chat template rejected these messages: {first_line(error)}") from error
    return text


def _from_text(text: str, tokenizer: Any, special: bool) -> Prompt:
    if not text:
        raise PromptError("the prompt is empty; give at least one token")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptError("the prompt is not text: it contains bytes that are not UTF-8")
    if not getattr(tokenizer, "is_fast", False):
        of_slow: list[int] = tokenizer.encode(text, add_special_tokens=special)
        if special:
            _warn_of_two(text, of_slow, tokenizer)
        return _from_ids(of_slow, tokenizer)
    encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoding["input_ids"]
    if special:
        _warn_of_two(text, ids, tokenizer)
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


def _warn_of_two(text: str, ids: list[int], tokenizer: Any) -> None:
    """Warn where the text has the special token that the tokenizer adds: a chat rendered as text, most often."""
    marked = set(tokenizer.all_special_ids)
    twice = {where for where, (first, second) in {"begins": ids[:2], "ends": ids[-2:]}.items()
             if first == second and first in marked} if len(ids) > 1 else set()  # fmt: skip
    if not twice:
        return
    own = list(tokenizer.encode(text, add_special_tokens=False))
    in_front = ids[len(ids) - len(own) :] == own
    added = {"begins": len(own) < len(ids) and (in_front or ids[1 : len(own) + 1] == own),
             "ends": len(own) < len(ids) and not in_front}  # fmt: skip
    for where in sorted(twice):
        if added[where]:
            token = tokenizer.decode(ids[:1] if where == "begins" else ids[-1:])
            warn(
                f"the prompt {where} with {token!r}, and the tokenizer adds another; to have one, pass chat messages, or "
                "the ids tokenizer(prompt, add_special_tokens=False)['input_ids']",
                PromptWarning
            )  # fmt: skip


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


def shown(tokenizer: Any, token: int) -> str:
    """A token as text: ``<id>`` where the tokenizer does not have the id, and the id without a tokenizer."""
    return str(token) if tokenizer is None else _decode(tokenizer, [token])


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text = ""
    for known, run in itertools.groupby(ids, lambda token: _is_known(tokenizer, token)):
        if known:
            text += tokenizer.decode(list(run), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        else:
            text += "".join(f"<{token}>" for token in run)
    return text


def _is_known(tokenizer: Any, token: int) -> bool:
    """Whether a tokenizer has an id; models have more ids than their tokenizers where their vocabulary is padded."""
    try:
        return not hasattr(tokenizer, "convert_ids_to_tokens") or tokenizer.convert_ids_to_tokens(token) is not None
    except (OverflowError, TypeError, IndexError, KeyError, ValueError):
        return False


def _skip_space(text: str, begin: int, end: int) -> int:
    while begin < end - 1 and text[begin].isspace():
        begin += 1
    return begin
