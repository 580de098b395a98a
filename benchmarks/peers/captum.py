"""captum 0.9.0: feature ablation and integrated gradients for language models, both of a log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .common import Loaded, Method, load, log_probability, text_of

__all__ = ["METHODS", "PINS", "explained", "load", "scores"]
PINS = ("captum==0.9.0", "transformers==5.24.0")
ABLATION, GRADIENTS = "feature ablation", "integrated gradients"
BASELINE = 0  # captum's default: this token replaces a token that is taken out
STEPS, AT_ONCE = (
    50,
    2,
)  # captum's default number of steps; points in a pass, since all at once need many GB for the logits
METHODS = {
    ABLATION: Method("the target's log-probability; one replaced token at a time"),
    GRADIENTS: Method("the target's log-probability less that of a prompt of token 0"),
}


def scores(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> Tensor:
    from captum.attr import TextTokenInput

    prompt = TextTokenInput(text_of(loaded.tokenizer, ids), loaded.tokenizer)
    result = _attribute(loaded, method, prompt, torch.tensor([target]))
    return result.token_attr[0].detach()


def _attribute(loaded: Loaded, method: str, prompt: Any, target: Tensor) -> Any:
    from captum.attr import FeatureAblation, LayerIntegratedGradients, LLMAttribution, LLMGradientAttribution

    if method == ABLATION:
        return LLMAttribution(FeatureAblation(loaded.model), loaded.tokenizer).attribute(prompt, target)
    gradients = LayerIntegratedGradients(loaded.model, loaded.model.get_input_embeddings())
    return LLMGradientAttribution(gradients, loaded.tokenizer).attribute(
        prompt, target, n_steps=STEPS, internal_batch_size=AT_ONCE
    )


def explained(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> float | None:
    whole = log_probability(loaded.model, ids, target)
    return whole if method == ABLATION else whole - log_probability(loaded.model, [BASELINE] * len(ids), target)
