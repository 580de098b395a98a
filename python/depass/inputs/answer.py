"""A given answer: split from its prompt, and as the token ids that follow the prompt's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import PromptError, PromptWarning, warn
from ..models.bound import BoundModel
from .prompt import Chat, Prompt, checked, content, encode, from_rendered, is_chat, needed, rendered, token_ids

_OF_THE_TURN = ("add_generation_prompt", "continue_final_message")  # keyword arguments of a chat template
_BEFORE = ("\n", "|", "a")  # texts that may precede an answer, so that a tokenizer adds no space to it


def with_answer(prompt: Any, answer: Any, tokenizer: Any, bound: BoundModel) -> tuple[Prompt, list[int]]:
    """The checked prompt, and the ids of the answer that follows it.

    Args:
        prompt: a prompt as for :meth:`depass.DePass.attribute`. Without an answer: chat messages, the last of which is the
            answer.
        answer: text or token ids, or None.
        tokenizer: the tokenizer; may be None if both are ids.
        bound: the model.

    Raises:
        PromptError: the prompt or the answer is unusable, empty, or longer than the model's positions.
    """
    if answer is None:
        encoded, ids = _last_message(prompt, tokenizer, bound)
    else:
        encoded = encode(prompt, tokenizer, bound)
        ids = _text(encoded, answer, tokenizer) if isinstance(answer, str) else token_ids(answer)
    if not ids:
        raise PromptError("the answer is empty; give at least one token")
    limit = bound.max_positions
    if limit is not None and len(encoded.ids) + len(ids) > limit:
        raise PromptError(
            f"the prompt has {len(encoded.ids)} tokens and the answer {len(ids)}, but {bound.name} has {limit} positions; "
            "shorten one of them"
        )
    for index, token in enumerate(ids):
        if not 0 <= token < bound.vocab_size:
            raise PromptError(
                f"id {token} at position {index} of the answer is out of range: the vocabulary has {bound.vocab_size} tokens"
            )
    return encoded, ids


def continued(prompt: Prompt, new: Sequence[int], tokenizer: Any, bound: BoundModel) -> Prompt:
    """The prompt followed by new ids; the prompt's own tokens and offsets do not change."""
    whole, length = encode([*prompt.ids, *new], tokenizer, bound, generated=True), len(prompt.ids)
    if prompt.text is None or whole.text is None:
        return whole
    tokens = whole.tokens[length:]
    text, offsets = prompt.text + "".join(tokens), list(prompt.offsets)
    shift = len(prompt.text) - sum(map(len, whole.tokens[:length]))
    offsets += [(begin + shift, end + shift) for begin, end in whole.offsets[length:]]
    special = prompt.special | {index for index in whole.special if index >= length}
    return Prompt((*prompt.ids, *new), (*prompt.tokens, *tokens), text, tuple(offsets), special, prompt.sections)


def _last_message(prompt: Any, tokenizer: Any, bound: BoundModel) -> tuple[Prompt, list[int]]:
    """The messages before the assistant's last one, and the ids of its text."""
    messages, template = (prompt.messages, prompt.template) if isinstance(prompt, Chat) else (prompt, {})
    if not is_chat(messages) or messages[-1].get("role") != "assistant":
        raise PromptError(
            "without an answer, the prompt must be chat messages, and the last of them the assistant's; give "
            "explain(prompt, answer)"
        )
    if len(messages) == 1:
        raise PromptError("the answer is the only message; give the messages before it, too")
    template = {name: value for name, value in template.items() if name not in _OF_THE_TURN}
    said, whole = content(messages[-1]), rendered(messages, template, needed(tokenizer, "a chat prompt"))
    if not said:
        return encode(messages[:-1], tokenizer, bound), []
    if not whole.endswith(said):
        raise PromptError(
            "the chat template changes the text of the answer; give the prompt and the answer separately: "
            "explain(messages, answer)"
        )
    begin = len(whole) - len(said)
    before = checked(from_rendered(whole[:begin], messages[:-1], template, tokenizer), bound)
    return before, _text(before, whole[begin:], tokenizer)


def _text(prompt: Prompt, answer: str, tokenizer: Any) -> list[int]:
    """The ids of a text that follows a prompt: those of the whole text, where the prompt keeps its own; else its own ids."""
    tokenizer = needed(tokenizer, "an answer given as text")
    if any("\ud800" <= character <= "\udfff" for character in answer):
        raise PromptError("the answer is not text: it contains bytes that are not UTF-8")
    if not answer:
        return []
    before = _ids_of(prompt.text or "", tokenizer)
    whole = _ids_of((prompt.text or "") + answer, tokenizer)
    if whole[: len(before)] == before and list(prompt.ids[len(prompt.ids) - len(before) :]) == before:
        return whole[len(before) :]
    warn(
        f"the tokenizer joins the end of the prompt ({prompt.tokens[-1]!r}) and the beginning of the answer "
        f"({answer[:20]!r}); the answer was tokenized on its own, as if the model had continued the prompt",
        PromptWarning
    )  # fmt: skip
    for text in _BEFORE:
        alone, joined = _ids_of(text, tokenizer), _ids_of(text + answer, tokenizer)
        if joined[: len(alone)] == alone:
            return joined[len(alone) :]
    return _ids_of(answer, tokenizer)


def _ids_of(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
