"""gim-explain 0.1.4: Gradient Interaction Modifications on transformers' model, with the package's defaults."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import common
from .common import Loaded, Method, logits

PINS = ("gim-explain==0.1.4", "transformers==5.24.0")
METHODS = {
    "GIM": Method(
        "the target's logit less the logit of a prompt of spaces",
        same_as="gim",
        why_off="subtracts a space's embedding; on transformers' models it neither freezes RMSNorm nor tempers the softmax",
    )
}


def load(folder: str) -> Loaded:
    loaded = common.load(folder)
    loaded.model.requires_grad_(False)  # else the tool also computes the gradients of all weights
    return loaded


def scores(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> Tensor:
    import gim

    return gim.explain(loaded.model, torch.tensor(list(ids)), target_token_id=target, tokenizer=loaded.tokenizer)


def explained(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> float | None:
    space = loaded.tokenizer.encode(" ", add_special_tokens=False)[0]
    both = logits(loaded.model, ids), logits(loaded.model, [space] * len(ids))
    return float((both[0] - both[1])[target])
