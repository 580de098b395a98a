"""Leave one token out and measure how much the logit falls. This answers another question and needs a pass per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def leave_one_out(model: Any, ids: Tensor, token: int, batch: int) -> Tensor:
    """``[N]``, the last logit of ``token`` less that without token ``i``; ``batch`` of the prompts at once. N >= 2."""
    n = len(ids)
    if n < 2:
        raise ValueError(f"leaving one token out needs two or more, got {n}")
    others = ~torch.eye(n, dtype=torch.bool)
    shorter = ids.cpu().expand(n, n)[others].view(n, n - 1).to(model.device)  # [N, N - 1]
    without = [last_logits(model, some)[:, token] for some in torch.split(shorter, batch)]
    return last_logits(model, ids[None].to(model.device))[0, token] - torch.cat(without)


def last_logits(model: Any, ids: Tensor) -> Tensor:
    """``[B, V]`` fp32, of ids ``[B, N]``."""
    logits: Tensor = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    return logits
