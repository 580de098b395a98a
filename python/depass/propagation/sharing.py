"""How an MLP's output is shared among the sources."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MLPSharing:
    """The rule that shares an MLP neuron's output among the sources (docs/method.md, equation 4), and the backend."""

    rule: str = "softmax"
    temperature: float = 0.1
    backend: str = "auto"
