"""Scores and targets' logits out of a pass, and how far they miss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs.targets import Asked
from ..propagation.propagate import Propagation
from .request import Case


def _as_it_is(device: torch.device) -> torch.autocast:
    """Within it our own products keep their dtype; a caller's autocast holds of the model's pass alone."""
    return torch.autocast(device.type, enabled=False)


def conservation_error(scores: Tensor, logits: Tensor) -> Tensor:
    """``|Σ scores - logit| / max(|logit|, Σ |scores|)`` over the last dimension of ``scores``, in fp64."""
    total, spread = scores.double().sum(-1), scores.double().abs().sum(-1)
    size = torch.maximum(logits.abs().expand_as(spread), spread).clamp(min=torch.finfo(torch.float64).tiny)
    return (total - logits).abs() / size


def _padded(scores: Tensor, sources: int) -> Tensor:
    """Zeros for the sources that have not started."""
    return torch.cat([scores, scores.new_zeros(sources - len(scores))])


def _probe(propagation: Propagation, stream: Tensor, index: int, case: Case, asked: Asked) -> tuple[Tensor, float]:
    """``score[m] = w · X[m, q]`` of the raw stream, of the sources active at ``q``, on the CPU; and ``w · x[q]``."""
    assert asked.w is not None
    rows = propagation.rows_at(index, asked.position)
    w = asked.w.to(rows)
    own = stream[propagation.prompt_start[index] + asked.position].to(rows)
    return (rows @ w).cpu(), float(own @ w)
