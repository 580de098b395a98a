"""The values that a decomposed pass freezes in one layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

NORMS = (  # of a bound.Layer
    "attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm", "experts_norm", "experts_post_norm",
    "shared_post_norm", "late_post_norm",
)  # fmt: skip


@dataclass
class MixerTrace:
    """The frozen values of one mixer of a layer."""

    pattern: Tensor | None = None  # [B, H, T, T], where T is the length of the longest prompt
    latent_scale: Tensor | None = None  # [P], of the norm on the latent vectors
    values: Tensor | None = None  # [P, K·d], those that the mixer takes from an earlier layer
    value_scale: Tensor | None = (
        None  # [P, K·d], what multiplies values: a norm's, or behind a recurrence's convolution
    )
    mix_scale: Tensor | None = None  # [P, H·d], what multiplies the mixed values before the output projection
    mixed: Tensor | None = None  # [P, H·d], the input of the output projection

    def map(self, change: Callable[[Tensor], Tensor]) -> MixerTrace:
        """A trace with ``change`` applied to every tensor."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return MixerTrace(**{name: None if tensor is None else change(tensor) for name, tensor in own.items()})


@dataclass
class Trace:
    """The frozen values of one layer at ``P`` positions of ``B`` prompts.

    Scales have the state's dtype, the other tensors the model's.
    """

    stream: Tensor  # [P, D], the residual stream at the layer's input
    mixers: tuple[MixerTrace, ...] = ()  # of bound.Layer.mixers
    scales: dict[str, Tensor] = field(default_factory=dict)  # by norm of bound.Layer: [P]
    hidden: Tensor | None = None  # [P, F], of the MLP that every position goes through
    gate_total: Tensor | None = None  # [P, F], for the taylor rule
    mlp_weight: Tensor | None = None  # [P], what multiplies the output of that MLP
    routed: Tensor | None = None  # [P, D], the input of the experts
    chosen: Tensor | None = None  # [P, k] int64, the experts that each position chose
    chosen_weights: Tensor | None = None  # [P, k], the router's weights of these
    late_hidden: Tensor | None = None  # [P, F'], of the branch behind the MLP
    late_total: Tensor | None = None  # [P, F'], its pre-activations, for the taylor rule
    after: Tensor | None = None  # [P, D], the residual stream at the layer's output

    def map(self, change: Callable[[Tensor], Tensor]) -> Trace:
        """A trace with ``change`` applied to every tensor."""
        changed: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        del changed["scales"], changed["mixers"]
        changed = {name: None if tensor is None else change(tensor) for name, tensor in changed.items()}
        scales = {name: change(scale) for name, scale in self.scales.items()}
        return Trace(**changed, mixers=tuple(mixer.map(change) for mixer in self.mixers), scales=scales)

    def without_patterns(self) -> Trace:
        """The trace without the mixers' patterns, which have no positions of their own."""
        return replace(self, mixers=tuple(replace(mixer, pattern=None) for mixer in self.mixers))

    def of(self, first: int, last: int) -> Trace:
        """The trace at positions ``first .. last - 1``, without the pattern."""
        return self.without_patterns().map(lambda tensor: tensor[first:last])

    def copy_from(self, other: Trace) -> None:
        """Overwrite every tensor with that of another trace of the same layer and length."""
        pairs: list[tuple[Any, Any]] = [(self, other), *zip(self.mixers, other.mixers, strict=True)]
        for own, new in pairs:
            for f in fields(own):
                mine = getattr(own, f.name)
                if isinstance(mine, Tensor):
                    mine.copy_(getattr(new, f.name))
        for name, scale in self.scales.items():
            scale.copy_(other.scales[name])
