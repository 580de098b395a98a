"""FlashTrace 0.1.1: its default method, on the prompt's text and the target's text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .common import Loaded, Method, text_of

PINS = ("flashtrace==0.1.1", "transformers==5.24.0")
METHODS = {"FlashTrace": Method("no number: shares of the information that reaches the target's position")}


def load(folder: str) -> Loaded:
    from flashtrace import load_model_and_tokenizer

    return Loaded(*load_model_and_tokenizer(folder, device_map="cpu", dtype="float32", attn_implementation="eager"))


def scores(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> Tensor:
    from flashtrace import FlashTrace

    tool = loaded.wrapper(method, lambda: FlashTrace(loaded.model, loaded.tokenizer))
    trace = tool.trace(
        prompt=text_of(loaded.tokenizer, ids, special_tokens=True),
        target=loaded.tokenizer.decode([target]),
        output_span=(0, 0),
    )
    return torch.tensor(trace.scores)


def explained(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> float | None:
    return None
