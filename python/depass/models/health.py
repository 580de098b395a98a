"""What makes a model's numbers random or not finite."""

from __future__ import annotations

import torch

from depass_kernels.ops import FLOATS

from ..errors import ModelError
from .bound import BoundModel


def blame(bound: BoundModel) -> str:
    """What makes numbers of a model not finite: a weight that is so itself, which is named, or else its dtype."""
    unseen = False
    for name, weight in bound.model.named_parameters():
        plain = type(weight) is torch.nn.Parameter and weight.dtype in FLOATS and not weight.is_meta
        unseen = unseen or not plain
        if plain and weight.numel() and not all(bool(edge.isfinite()) for edge in weight.detach().aminmax()):
            return f"the model's weight {name} holds NaN or infinity: load it from a file that is whole"
    small = f"{dtype_name(bound.dtype)} has too small a range for this"
    if unseen:
        return f"a weight that is offloaded or quantised holds NaN or infinity, or {small}"
    return f"the model's weights are, so {small}; give another dtype"


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def refuse_dropout(bound: BoundModel) -> None:
    """Raise a ModelError where the model would drop out at random."""
    training = [module for module in bound.model.modules() if module.training]
    rates = [module.p for module in training if isinstance(module, torch.nn.Dropout)]
    rates += [getattr(module, name, 0.0) for module in training for name in ("attention_dropout", "residual_dropout")]
    if any(isinstance(rate, (int, float)) and rate > 0 for rate in rates):
        raise ModelError(f"{bound.name} is in training mode with dropout, so its logits are random; call model.eval()")
