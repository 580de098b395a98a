"""What the tools' modules share: a method's description, a loaded model, and the numbers that scores explain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Method:
    """A way to score tokens.

    Attributes:
        explains: the number that the scores explain, in words.
        same_as: the name of our method with the same definition, whose scores are compared; None without one.
        why_off: where our method differs in a part of the definition, in words.
        beside: the name of our rule that is timed in the same rounds, as the plain pass always is; None without one.
    """

    explains: str
    same_as: str | None = None
    why_off: str = ""
    beside: str | None = None


@dataclass
class Loaded:
    """A model and its tokenizer as transformers loads them, and what a tool wraps around them, by method."""

    model: Any
    tokenizer: Any = None
    wrappers: dict[str, Any] = field(default_factory=dict)

    def wrapper(self, method: str, make: Callable[[], Any]) -> Any:
        """A tool's wrapper for a method, made at the first call: a user makes it once, so its time is not a run's."""
        if method not in self.wrappers:
            self.wrappers[method] = make()
        return self.wrappers[method]


def load(folder: str) -> Loaded:
    """The model of a directory in fp32, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    return Loaded(model, AutoTokenizer.from_pretrained(folder))


def text_of(tokenizer: Any, ids: Sequence[int], special_tokens: bool = False) -> str:
    """The text of a prompt, for tools that take no ids.

    Args:
        tokenizer: the tokenizer that the tool calls.
        ids: the prompt.
        special_tokens: whether the text shall spell BOS out, for a tool that lets the tokenizer add none.

    Raises:
        ValueError: the tokenizer makes other ids of the text.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=not special_tokens, clean_up_tokenization_spaces=False)
    again = tokenizer(text, add_special_tokens=not special_tokens).input_ids
    if list(again) != list(ids):
        raise ValueError(f"the tokenizer turns the prompt's text into {len(again)} other ids, expected {len(ids)}")
    return text


@torch.no_grad()
def logits(model: Any, ids: Sequence[int], embedding: Tensor | None = None) -> Tensor:
    """The last position's logits ``[vocab_size]``, in fp64; ``embedding`` ``[D]`` or ``[N, D]`` replaces the tokens'."""
    if embedding is None:
        output = model(torch.tensor([list(ids)]), use_cache=False)
    else:
        output = model(inputs_embeds=embedding.expand(1, len(ids), -1), use_cache=False)
    last: Tensor = output.logits[0, -1].double()
    return last


def log_probability(model: Any, ids: Sequence[int], target: int) -> float:
    """The natural logarithm of the target's probability after the prompt."""
    return float(logits(model, ids).log_softmax(0)[target])
