"""A softmax that computes what it always does, with the gradient of a softmax at another temperature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)


class TemperedSoftmax(TorchFunctionMode):
    """Inside the ``with`` block every softmax that this thread computes has the gradient of one at another temperature.

    Its values stay as they are, bit for bit. With ``p = softmax(scores / temperature)``, the gradient with respect to the
    scores is that of ``temperature · p``. So its Jacobian is ``diag(p) - p pᵀ``, without a factor ``1 / temperature``.

    Args:
        temperature: a positive number.

    Attributes:
        count: the number of softmaxes computed so far.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature, self.count = temperature, 0

    def __torch_function__(
        self, func: Callable[..., Any], _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for every function of torch."""
        others = dict(kwargs or {})
        if func not in _SOFTMAX:
            return func(*args, **others)
        self.count += 1
        scores, *rest = args or (others.pop("input"),)
        with torch.no_grad():
            values = func(scores, *rest, **others)
        tempered = func(scores / self.temperature, *rest, **others)
        return values + self.temperature * (tempered - tempered.detach())  # what is added is zero
