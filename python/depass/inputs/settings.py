"""How an attribution was made: part of every result."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """How an attribution was made.

    Attributes:
        model: its name or path.
        dtype: of its weights.
        rule: how the MLP was shared out; of a baseline, which shares out nothing, ``none``.
        temperature: of the softmax rule, in units of the pre-activation.
        exclude_bos: whether the first token took no part in later positions' MLPs.
        start_layer: the layer whose input was decomposed.
        stop_layer: one past the last layer; before the model's last, scores are read from the stream there through the
            final norm and head (a logit lens).
        aggregated: units that the sources were summed up to afterwards, or None.
        backends: by op of ``depass_kernels``, which backend did it (``"cpu+reference"`` where two did parts of it).
        method: ``depass``, or the name of a baseline (:mod:`depass.baselines`), whose scores promise no sum.
    """

    model: str
    dtype: str
    rule: str
    temperature: float
    exclude_bos: bool
    start_layer: int
    stop_layer: int
    aggregated: str | None = None
    backends: dict[str, str] = field(default_factory=dict)
    method: str = "depass"

    @property
    def adds_up(self) -> bool:
        """Whether the method promises scores that add up to the target's logit."""
        return self.method == "depass"
