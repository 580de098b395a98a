"""The values that a decomposed pass freezes in one layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

NORMS = (  # of a families.Layer
    "attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm", "latent_norm", "experts_norm",
    "experts_post_norm", "shared_post_norm", "late_post_norm",
)  # fmt: skip


@dataclass
class Trace:
    """The frozen values of one layer at ``P`` positions of ``B`` prompts.

    Scales have the state's dtype, the other tensors the model's.
    """

    stream: Tensor  # [P, D], the residual stream at the layer's input
    pattern: Tensor | None = None  # [B, H, T, T], where T is the length of the longest prompt
    scales: dict[str, Tensor] = field(default_factory=dict)  # by norm of families.Layer: [P]
    values: Tensor | None = None  # [P, K·d], those that the layer takes from an earlier one
    value_scale: Tensor | None = (
        None  # [P, K·d], what multiplies values: a norm's, or behind a recurrence's convolution
    )
    mix_scale: Tensor | None = None  # [P, H·d], what multiplies the mixed values before the output projection
    mixed: Tensor | None = None  # [P, H·d], the input of the attention's output projection
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
        changed: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scales"}
        changed = {name: None if tensor is None else change(tensor) for name, tensor in changed.items()}
        return Trace(**changed, scales={name: change(scale) for name, scale in self.scales.items()})

    def of(self, first: int, last: int) -> Trace:
        """The trace at positions ``first .. last - 1``, without the pattern."""
        return replace(self, pattern=None).map(lambda tensor: tensor[first:last])

    def copy_from(self, other: Trace) -> None:
        """Overwrite every tensor with that of another trace of the same layer and length."""
        for f in fields(self):
            mine = getattr(self, f.name)
            if isinstance(mine, Tensor):
                mine.copy_(getattr(other, f.name))
        for name, scale in self.scales.items():
            scale.copy_(other.scales[name])
