"""How the MLP's output is shared out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MLPSharing:
    """How the MLP's output is shared out among the sources, and what does the work."""

    rule: str = "softmax"
    temperature: float = 0.1
    backend: str = "auto"
