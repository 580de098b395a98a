"""interpreto 0.5.2: saliency, integrated gradients and occlusion of the target's logit, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .common import Loaded, Method, load, logits

__all__ = ["METHODS", "PINS", "explained", "load", "scores"]
PINS = ("interpreto==0.5.2", "transformers==5.24.0")
GRADIENTS, OCCLUSION, SALIENCY = "integrated gradients", "occlusion", "saliency"
STEPS, AT_ONCE = 50, 2  # as for the other tools
METHODS = {
    GRADIENTS: Method("no number: the mean size of embedding times gradient on a line from zero"),
    OCCLUSION: Method("the target's logit; one replaced token at a time"),
    SALIENCY: Method("no number: the mean size of embedding times gradient"),
}


def scores(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> Tensor:
    from transformers import BatchEncoding

    explainer = loaded.wrapper(method, lambda: _explainer(loaded, method))
    of_ids = torch.tensor([list(ids)])
    prompt = BatchEncoding({"input_ids": of_ids, "attention_mask": torch.ones_like(of_ids)})
    (result,) = explainer.explain(prompt, torch.tensor([[target]]))
    return result.attributions[0, : len(ids)]


def _explainer(loaded: Loaded, method: str) -> Any:
    from interpreto import Granularity, IntegratedGradients, Occlusion, Saliency

    options = {"batch_size": AT_ONCE, "granularity": Granularity.ALL_TOKENS}
    if method == GRADIENTS:
        return IntegratedGradients(loaded.model, loaded.tokenizer, n_perturbations=STEPS, **options)
    return (Occlusion if method == OCCLUSION else Saliency)(loaded.model, loaded.tokenizer, **options)


def explained(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> float | None:
    return float(logits(loaded.model, ids)[target]) if method == OCCLUSION else None
