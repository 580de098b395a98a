"""Finds why a model's numbers are not finite, and refuses models with active dropout."""

from __future__ import annotations

import torch

from depass_kernels.ops import FLOATS

from ..errors import ModelError
from .bound import BoundModel

# of modules that call torch.nn.functional.dropout, or skip layers, while they train
_RATES = ("attention_dropout", "residual_dropout", "dropout", "activation_dropout", "attn_dropout", "layerdrop")


def blame(bound: BoundModel) -> str:
    """Explain why a model's numbers are not finite: names a weight that is not, or else the dtype."""
    unseen = False
    for name, weight in bound.model.named_parameters():
        plain = type(weight) is torch.nn.Parameter and weight.dtype in FLOATS and not weight.is_meta
        unseen = unseen or not plain
        if plain and weight.numel() and not all(bool(edge.isfinite()) for edge in weight.detach().aminmax()):
            return f"the model's weight {name} contains NaN or infinity; load the model from an intact file"
    overflow = f"a value is outside the range of {dtype_name(bound.dtype)}"
    if unseen:
        return f"either an offloaded or quantised weight contains NaN or infinity, or {overflow}; try another dtype"
    return f"the model's weights are finite, so {overflow}; use another dtype"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype: ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def refuse_dropout(bound: BoundModel) -> None:
    """Raise a ModelError where dropout is active."""
    training = [module for module in bound.model.modules() if module.training]
    rates = [module.p for module in training if isinstance(module, torch.nn.Dropout)]
    rates += [getattr(module, name, 0.0) for module in training for name in _RATES]
    if any(isinstance(rate, (int, float)) and rate > 0 for rate in rates):
        raise ModelError(f"{bound.name} is in training mode with dropout, so its logits are random; call model.eval()")
