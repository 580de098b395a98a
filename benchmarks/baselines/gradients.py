"""Attribution by gradients, the common alternative. It answers another question; its scores do not add up to the logit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def input_x_gradient(model: Any, ids: Tensor, token: int) -> Tensor:
    """``[N]``, ``e_i · ∂logit/∂e_i`` of the input embeddings: one pass forward and one back."""
    embeddings = _embeddings(model, ids)
    return (embeddings[0].float() * _gradient(model, embeddings, token)[0].float()).sum(-1)


def integrated_gradients(model: Any, ids: Tensor, token: int, steps: int, batch: int) -> Tensor:
    """``[N]``, ``e_i · ∫ ∂logit/∂e_i`` along the line from zero embeddings, by the midpoint rule (arXiv 1703.01365).

    ``batch`` of the ``steps`` go through the model at once.
    """
    embeddings = _embeddings(model, ids)  # [1, N, D]
    where = (torch.arange(steps, device=embeddings.device) + 0.5) / steps
    total = torch.zeros_like(embeddings[0], dtype=torch.float32)
    for some in torch.split(where.to(embeddings.dtype), batch):
        total += _gradient(model, some[:, None, None] * embeddings, token).float().sum(0)
    return (embeddings[0].float() * total / steps).sum(-1)


def _embeddings(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.get_input_embeddings()(ids[None].to(model.device))  # type: ignore[no-any-return]


def _gradient(model: Any, embeddings: Tensor, token: int) -> Tensor:
    """``[B, N, D]``, of the last position's logit in each of a batch."""
    embeddings = embeddings.detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=1).logits[:, -1, token]
    (gradient,) = torch.autograd.grad(logits.float().sum(), embeddings)
    return gradient
