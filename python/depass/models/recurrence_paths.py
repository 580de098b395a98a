"""How gradients flow through a layer's recurrence: through its values alone."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .bound import Mixer
from .capture import of_this_thread, unmasked
from .recurrences import Recurrence


class RecurrenceCall(NamedTuple):
    """The latest call of a recurrence with a graph: its values before and behind the convolution, ``[B, T, H·d]``."""

    values: Tensor
    convolved: Tensor


class RecurrencePaths:
    """How gradients flow through a layer's recurrence, in the model's latest call of the layer.

    The module computes its output without a graph. The input of its output projection then gets the gradient of the values'
    way there: projection, convolution, the frozen ``σ`` of the SiLU, the frozen pattern, the frozen norm and gate.

    Attributes:
        call: the latest call with a graph, or None.
    """

    def __init__(self, mixer: Mixer, recurrence: Recurrence) -> None:
        self.mixer, self.recurrence, self.thread = mixer, recurrence, threading.get_ident()
        self.call: RecurrenceCall | None = None
        self._input: Tensor | None = None  # while the module runs

    @of_this_thread
    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the module's input, and let the module run without a graph."""
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        self.call, self._input = None, x if torch.is_grad_enabled() and x.requires_grad else None
        if self._input is not None:
            torch.set_grad_enabled(False)

    @of_this_thread
    def mixed(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Give the input of the output projection its gradient."""
        x, self._input = self._input, None
        if x is None:
            return None
        frozen = self.recurrence.frozen(x.detach())
        torch.set_grad_enabled(True)
        value = self.mixer.value
        bias = value.bias
        weight = value.weight.detach()
        values = functional.linear(x.to(weight), weight, None if bias is None else bias.detach().to(weight))
        convolved = _convolved(values.to(frozen.pattern), self.recurrence.taps().detach().to(frozen.pattern))
        of_taps = self.recurrence.taps_bias()
        if of_taps is not None:
            convolved = convolved + of_taps.detach().to(convolved)
        by_head = (convolved * frozen.value_scale).reshape(*x.shape[:2], self.mixer.num_heads, -1).transpose(1, 2)
        mixed = (unmasked(self.mixer, frozen.pattern) @ by_head).transpose(1, 2).flatten(2) * frozen.mix_scale
        self.call = RecurrenceCall(values, convolved)
        return (_Own.apply(mixed, (args[0].detach(),)), *args[1:])  # type: ignore[no-untyped-call]


def _convolved(x: Tensor, taps: Tensor) -> Tensor:
    """The causal convolution of ``[B, T, C]`` over positions by taps ``[C, k]``, the last of a position itself."""
    length, count = x.shape[1], taps.shape[1]
    padded = functional.pad(x, (0, 0, count - 1, 0))
    shifted = [padded[:, tap : tap + length] * taps[:, tap] for tap in range(count)]
    return torch.stack(shifted).sum(0)


class _Own(torch.autograd.Function):
    """A tensor that the model computed itself, with the gradient of another one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: tuple[Tensor]) -> Tensor:
        ctx.dtype = x.dtype
        return own[0]  # in a tuple, so that it is no input and the output no view of one

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.to(ctx.dtype), None
