"""What is asked of a pass, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..inputs.prompt import Prompt
from ..inputs.targets import Asked
from ..propagation.propagate import Propagation
from ..propagation.sharing import MLPSharing
from ..sources.source import Decomposition

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """What holds of a whole pass."""

    start: int
    stop: int
    sharing: MLPSharing
    exclude: bool | Literal["auto"]


@dataclass(frozen=True)
class Case:
    """A prompt, its decomposition and what is asked of it, all checked."""

    prompt: Prompt
    parts: Decomposition
    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class Pass:
    """What one pass of the model comes to.

    Attributes:
        propagation: with its final state.
        stream: ``[P, D]``, the residual stream there.
        normed: the same after the final norm.
        dtype: of the model's weights, as results name it.
    """

    propagation: Propagation
    stream: Tensor
    normed: Tensor
    dtype: str


def decomposed_layers(parts: Decomposition, stop: int) -> range:
    """The layers whose input is decomposed, and one past the last, where the final state is."""
    return range(parts.layer + (parts.moment != "start"), stop + 1)
