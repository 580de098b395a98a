"""The published DePass code, from a checkout on the path, with the release of transformers that its README names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .common import Method, logits

PINS = ("transformers==4.44.2", "tqdm")
METHODS = {"DePass": Method("the target's logit", same_as="published", beside="softmax")}


@dataclass
class Loaded:
    """A model and the published manager over it, with the manager's defaults."""

    model: Any
    manager: Any


class _Ids:
    """A tokenizer for prompts that are ids already; the manager calls nothing else of it."""

    def encode(self, ids: Sequence[int]) -> list[int]:
        return list(ids)


def load(folder: str) -> Loaded:
    from DePass import decomposed_state_manager
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    return Loaded(model, decomposed_state_manager(model, _Ids()))


@torch.no_grad()
def scores(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> Tensor:
    state, _ = loaded.manager.get_last_layer_decomposed_state(ids)
    return loaded.manager.compute_attribute_score(state, -1, target)


def explained(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> float | None:
    return float(logits(loaded.model, ids)[target])
