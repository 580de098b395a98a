"""A slow loop for linear rules with a frozen pattern: parts go through the layers as plain vectors, without autograd.

It differs from the loop of :mod:`oracle` in the MLP alone. There a part ``m`` of the stream has a pre-activation ``g_m``
and, where the MLP is gated, ``u_m``; its share of the hidden vector ``h = act(g) ⊙ u`` is

    gate · h · g_m / g  +  up · act(g) · u_m        (0 for the first where g is 0)

and in an ungated MLP ``h · z_m / z``. The experts that a position chose are such MLPs, each times the router's weight.
gpt_oss has ``h = act(g) ⊙ (u + 1)``: its 1 belongs to the bias source, with the weight ``up``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from oracle import Oracle
from torch import Tensor
from torch.nn import functional

UNGATED = ("gpt2", "gpt-neox", "starcoder2", "codegen", "nemotron_h")


Pair = Callable[[Tensor, bool], tuple[Tensor, Tensor]]  # what a part sends to the gate and to the up projection
Write = Callable[[Tensor, bool], Tensor]  # what its share of the hidden vector adds to the stream


class LinearOracle(Oracle):
    """The states of parts ``X[m][t]`` under a rule with the weights ``gate`` and ``up``."""

    gate = 1.0
    up = 0.0

    def weigh(self, gate: float, up: float) -> LinearOracle:
        self.gate, self.up = gate, up
        return self

    def mlp(self, read: list[list[Tensor]], after: list[list[Tensor]], layer: int, *_: object) -> list[list[Tensor]]:  # type: ignore[override]
        result = [row[:] for row in after]
        is_bias = [self.bias and m == 0 for m in range(len(read))]
        for t in range(len(self.ids)):
            for number, (pair, write) in enumerate(self.linear_branches(layer, t)):
                normed = [self.before_branch(layer, number, row[t], t, is_bias[m]) for m, row in enumerate(read)]
                shares = self.hidden_of([pair(x, is_bias[m]) for m, x in enumerate(normed)])
                for m, share in enumerate(shares):
                    out = write(share, is_bias[m])
                    result[m][t] = result[m][t] + self.behind_branch(layer, number, out, t)
        return result

    def hidden_of(self, pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The shares of all parts in the hidden vector."""
        g, u = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        if self.is_ungated:
            return [self.ratio(self.act(g), g) * of_gate for of_gate, _ in pairs]
        is_clamped = self.name == "gpt_oss"
        limit, one = (self.model.config.swiglu_limit, 1.0) if is_clamped else (torch.inf, 0.0)
        act, inside = self.act(g), (u.abs() < limit).to(u)
        hidden = act * (u.clamp(-limit, limit) + one)
        shares = [
            self.gate * self.ratio(hidden, g) * of_gate + self.up * act * inside * of_up for of_gate, of_up in pairs
        ]
        if is_clamped:
            shares[0] = shares[0] + self.up * (hidden - act * inside * u)
        return shares

    def linear_branches(self, layer: int, t: int) -> Iterator[tuple[Pair, Write]]:
        """The MLP of a position, and each expert that it chose."""
        p, path = self.paths(layer), self.experts(layer)
        if p["d"] is not None:
            yield partial(self.pair, p["g"]), partial(self.written, p["d"], layer, t)
        if path is not None:
            yield from self.linear_experts(path, t)

    def linear_experts(self, path: str, t: int) -> Iterator[tuple[Pair, Write]]:
        """Each expert that a position chose."""
        weights = self.captured[path + ":weight"][t]
        for e, weight in zip(self.captured[path + ":chosen"][t].tolist(), weights, strict=True):
            yield partial(self.expert_pair, path, e), partial(self.down_of, path, e, weight)

    def written(self, path: str, layer: int, t: int, hidden: Tensor, is_bias: bool) -> Tensor:
        """What the MLP that every position goes through writes of a hidden vector."""
        if self.name == "bitnet":
            hidden = self.normed(f"model.layers.{layer}.mlp.ffn_sub_norm", hidden, t, is_bias)
        out = self.linear(path, hidden, is_bias)
        if self.name == "qwen2_moe":
            out = out * self.captured[f"model.layers.{layer}.mlp.shared_expert_gate:out"][t].sigmoid()
        return out

    def expert_pair(self, path: str, e: int, x: Tensor, is_bias: bool) -> tuple[Tensor, Tensor]:
        both = self.both_of(path, e, x, is_bias)
        if self.name == "gpt_oss":
            return both[::2], both[1::2]
        if self.is_ungated:
            return both, torch.zeros_like(both)
        return both[: len(both) // 2], both[len(both) // 2 :]

    def pair(self, path: str, x: Tensor, is_bias: bool) -> tuple[Tensor, Tensor]:
        both = self.linear(path, x, is_bias)
        if self.is_ungated:
            return both, torch.zeros_like(both)
        if self.name in ("phi3", "granitemoeshared"):
            return both[: len(both) // 2], both[len(both) // 2 :]
        return both, self.linear(path.replace("gate_proj", "up_proj"), x, is_bias)

    def act(self, z: Tensor) -> Tensor:
        config = self.model.config
        kind = getattr(config, "hidden_activation", None) or getattr(config, "activation_function", None)
        kind = kind or getattr(config, "mlp_hidden_act", None) or config.hidden_act  # the first is Nemotron-H's
        if self.name == "gpt_oss":
            z = z.clamp(max=config.swiglu_limit)
            return z * torch.sigmoid(config.swiglu_alpha * z)
        if kind == "silu":
            return z * torch.sigmoid(z)
        if kind == "relu2":
            return z.relu() ** 2
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
        factor *= getattr(config, "lm_head_multiplier", 1.0)  # Falcon-H1's
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
        own = {"gpt2": "transformer.ln_f", "codegen": "transformer.ln_f", "phi": "model.final_layernorm",
               "falcon_h1": "model.final_layernorm", "nemotron_h": "model.norm_f"}  # fmt: skip
        return own.get(self.name, "model.norm")
