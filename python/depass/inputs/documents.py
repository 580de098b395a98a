"""The prompt of a question about documents, and where the sentences of the documents are in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import PromptError, PromptWarning, warn
from ..models.bound import BoundModel
from .prompt import Prompt, encode, with_template

INSTRUCTION = "Answer the question from the documents."
ANSWER = "Answer:"  # ends the prompt of a model without a chat template


@dataclass(frozen=True)
class Passage:
    """A sentence of a document.

    Attributes:
        document: the number of its document, from 0.
        begin: the position of its first token in the prompt.
        end: one past that of its last.
        text: its text.
    """

    document: int
    begin: int
    end: int
    text: str


@dataclass(frozen=True)
class Question:
    """A question about documents.

    Attributes:
        question: the question alone.
        prompt: the prompt, as :func:`encode` takes it.
        text: the question and the documents, as they are in the prompt.
        titles: the documents' titles.
        ranges: the character range of each document in ``text``.
        is_chat: whether the prompt is a chat.
    """

    question: str
    prompt: Any
    text: str
    titles: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    is_chat: bool

    def answer(self, answer: Any) -> Any:
        """An answer to follow the prompt: after :data:`ANSWER`, text begins with a space."""
        begins = isinstance(answer, str) and answer and not answer[0].isspace()
        return f" {answer}" if begins and not self.is_chat else answer

    def passages(self, language: str, tokenizer: Any, bound: BoundModel) -> tuple[Prompt, list[Passage]]:
        """The checked prompt, and the sentences of the documents in their order.

        Raises:
            PromptError: the prompt is too long, the chat template or the tokenizer changes the documents, or the tokenizer
                has no token for one of them.
        """
        encoded = encode(self.prompt, tokenizer, bound)
        at = (encoded.text or "").rfind(self.text)
        if at < 0:
            raise PromptError(
                f"the {'chat template' if self.is_chat else 'tokenizer'} changes the text of the documents; write the "
                "prompt yourself, and call explain(prompt, answer, sources=Spans(...))"
            )
        segments, found = encoded.segments("sentence", language), list[Passage]()
        for document, (begin, end) in enumerate(self.ranges):
            own = _sentences(encoded, segments, at + begin, at + end)
            if not own:
                raise PromptError(
                    f"the tokenizer has no token for the document {self.titles[document]!r}; leave it out"
                )
            found += [Passage(document, *each) for each in own]
            _warn_of_special(encoded, self.titles[document], own)
        return encoded, found


def question(given: Any, documents: Any, tokenizer: Any, template: Mapping[str, Any] | None) -> Question:
    """The prompt of a question and its documents: one message of a chat, or text where there is no chat template.

    Raises:
        PromptError: the question or a document is empty or no text, there are no documents, or there is no tokenizer.
    """
    if not isinstance(given, str):
        raise PromptError(f"the question must be a text, got {type(given).__name__}")
    if not given.strip():
        raise PromptError("the question is empty; give a text")
    named = _documents(documents)
    if tokenizer is None:
        raise PromptError("a question about documents needs a tokenizer; pass one: DePass(model, tokenizer)")
    text, ranges = f"{INSTRUCTION}\n\n", list[tuple[int, int]]()
    for number, (title, document) in enumerate(named.items(), 1):
        text += f"Document {number}\n" if title == f"Document {number}" else f"Document {number}: {title}\n"
        ranges.append((len(text), len(text) + len(document)))
        text += f"{document}\n\n"
    text += f"Question: {given.strip()}"
    is_chat = bool(getattr(tokenizer, "chat_template", None))
    prompt = [{"role": "user", "content": text}] if is_chat else f"{text}\n{ANSWER}"
    return Question(given.strip(), with_template(prompt, template), text, tuple(named), tuple(ranges), is_chat)


def _documents(given: Any) -> dict[str, str]:
    """The texts of documents by title, without the white space around them.

    Raises:
        PromptError: they are something else, there are none, or one of them is empty.
    """
    if isinstance(given, Mapping):
        named = dict(given)
    elif isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        named = {f"Document {number}": text for number, text in enumerate(given, 1)}
    else:
        raise PromptError(
            f"documents must be a list of texts, or a dict from titles to texts; got {type(given).__name__}"
        )
    if not named:
        raise PromptError("there are no documents; give at least one")
    for title, text in named.items():
        if not isinstance(title, str) or not title.strip() or len(title.splitlines()) > 1:
            raise PromptError(f"the title of a document must be a line of text, got {title!r}")
        if not isinstance(text, str):
            raise PromptError(f"the document {title!r} must be a text, got {type(text).__name__}")
        if not text.strip():
            raise PromptError(f"the document {title!r} is empty; leave it out")
    return {title: text.strip() for title, text in named.items()}


def _sentences(prompt: Prompt, segments: Sequence[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int, str]]:
    """The sentences between two characters of a prompt: their token ranges and texts."""
    first, last = prompt.positions(begin, end)
    found = list[tuple[int, int, str]]()
    for a, b in segments:
        a, b = max(a, first), min(b, last)
        if a < b:
            text = (prompt.text or "")[max(prompt.offsets[a][0], begin) : min(prompt.offsets[b - 1][1], end)]
            found.append((a, b, text.strip()))
    return found


def _warn_of_special(prompt: Prompt, title: str, sentences: Sequence[tuple[int, int, str]]) -> None:
    for begin, _, text in sentences:
        if begin in prompt.special:
            warn(
                f"the document {title!r} has the text {text!r}, which the tokenizer reads as a special token: the model may "
                "take what follows for another message; remove it from the document",
                PromptWarning,
            )
            return
