"""A slow loop for linear rules with a frozen pattern: parts go through the layers as plain vectors, without autograd.

It differs from the loop of :mod:`oracle` in the MLP alone. There a part ``m`` of the stream has a pre-activation ``g_m``
and, where the MLP is gated, ``u_m``; its share of the hidden vector ``h = act(g) ⊙ u`` is

    gate · h · g_m / g  +  up · act(g) · u_m        (0 for the first where g is 0)

and in an ungated MLP ``h · z_m / z``.
"""

from __future__ import annotations

import torch
from oracle import Oracle
from torch import Tensor
from torch.nn import functional

UNGATED = ("gpt2", "gpt-neox", "starcoder2", "codegen")


class LinearOracle(Oracle):
    """The states of parts ``X[m][t]`` under a rule with the weights ``gate`` and ``up``."""

    gate = 1.0
    up = 0.0

    def weigh(self, gate: float, up: float) -> LinearOracle:
        self.gate, self.up = gate, up
        return self

    def mlp(self, read: list[list[Tensor]], after: list[list[Tensor]], layer: int, *_: object) -> list[list[Tensor]]:  # type: ignore[override]
        p = self.paths(layer)
        result = [row[:] for row in after]
        for t in range(len(self.ids)):
            pairs = [self.pair(read[m][t], p, t, self.bias and m == 0) for m in range(len(read))]
            g, u = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
            for m, (of_gate, of_up) in enumerate(pairs):
                if self.is_ungated:
                    hidden = self.ratio(self.act(g), g) * of_gate
                else:
                    hidden = self.gate * self.ratio(self.act(g) * u, g) * of_gate + self.up * self.act(g) * of_up
                out = self.linear(p["d"], hidden, self.bias and m == 0)
                result[m][t] = result[m][t] + self.added(p["mp"], out, t, False)
        return result

    def pair(self, x: Tensor, p: dict[str, str | None], t: int, is_bias: bool) -> tuple[Tensor, Tensor]:
        """What a part sends to the gate and to the up projection."""
        normed = x if p["mn"] is None else self.normed(p["mn"], x, t, is_bias)
        both = self.linear(p["g"], normed, is_bias)
        if self.is_ungated:
            return both, torch.zeros_like(both)
        if self.name == "phi3":
            return both[: len(both) // 2], both[len(both) // 2 :]
        return both, self.linear(p["g"].replace("gate_proj", "up_proj"), normed, is_bias)

    def act(self, z: Tensor) -> Tensor:
        config = self.model.config
        kind = getattr(config, "hidden_activation", None) or getattr(config, "activation_function", None)
        kind = kind or config.hidden_act
        if kind == "silu":
            return z * torch.sigmoid(z)
        return functional.gelu(z, approximate="none" if kind == "gelu" else "tanh")

    @property
    def is_ungated(self) -> bool:
        return self.name.startswith(UNGATED) or self.name == "phi"

    @staticmethod
    def ratio(of: Tensor, by: Tensor) -> Tensor:
        return torch.where(by == 0, torch.zeros_like(of), of / by)

    def scores(self, x: list[list[Tensor]], t: int, token: int) -> Tensor:
        """The scores of parts of the final stream at a position: the frozen final norm, then the head."""
        head, norm, config = self.model.get_output_embeddings(), self.final_norm, self.model.config
        factor = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)  # Cohere's; Granite's
        scores = []
        for m in range(len(x)):
            is_bias = self.bias and m == 0
            score = head.weight[token] @ self.normed(norm, x[m][t], t, is_bias)
            scores.append(factor * (score + (head.bias[token] if is_bias and head.bias is not None else 0.0)))
        return torch.stack(scores).detach()

    @property
    def final_norm(self) -> str:
        if self.name.startswith("gpt-neox"):
            return "gpt_neox.final_layer_norm"
        own = {"gpt2": "transformer.ln_f", "codegen": "transformer.ln_f", "phi": "model.final_layernorm"}
        return own.get(self.name, "model.norm")
