"""The slow loop for layers with linear attention: each source's own state, one position after the other.

Queries, keys, decays and step sizes are those that the family's own rule was given, recorded while the model ran. Every
source goes through the recurrence alone; nothing here builds the mixing matrix that the package builds.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from oracle import Oracle
from torch import Tensor
from torch.nn import functional

RULES = ("torch_chunk_gated_delta_rule", "mamba2_chunk_scan")  # of the modeling files


class RecurrentOracle(Oracle):
    """Adds Qwen3-Next and Granite 4 (Mamba-2) hybrids to the slow loop."""

    def _capture(self, run: Any) -> None:
        space = sys.modules[type(run).__module__]
        (rule,) = (name for name in RULES if hasattr(space, name))
        own, self.calls = getattr(space, rule), list[tuple[tuple[Any, ...], dict[str, Any]]]()

        def recorded(*args: Any, **options: Any) -> Any:
            self.calls.append((args, options))
            return own(*args, **options)

        setattr(space, rule, recorded)
        try:
            super()._capture(run)
        finally:
            setattr(space, rule, own)
        self.recurrent = [index for index in range(self.layers) if self._module_of(index) is not None]
        assert len(self.recurrent) == len(self.calls)
        attentions = iter(self.patterns)
        self.patterns = [None if index in self.recurrent else next(attentions) for index in range(self.layers)]

    def _module_of(self, layer: int) -> str | None:
        at = f"model.layers.{layer}."
        paths = [at + name for name in ("linear_attn", "mamba") if f"{at}{name}.out_proj:in" in self.captured]
        return paths[0] if paths else None

    def behind_heads(self, of_heads: Tensor, layer: int, t: int, is_bias: bool) -> Tensor:
        """Qwen3-Next's attention has a gate: behind the query of each head."""
        if self.name != "qwen3_next":
            return of_heads
        both = self.captured[f"model.layers.{layer}.self_attn.q_proj:out"][t]
        d = len(both) // (2 * self.heads)
        gate = torch.cat([both[(2 * h + 1) * d : (2 * h + 2) * d] for h in range(self.heads)])
        return of_heads * gate.sigmoid()

    def attention(self, x: list[list[Tensor]], layer: int) -> list[list[Tensor]]:
        if layer not in self.recurrent:
            return super().attention(x, layer)
        p, at = self.paths(layer), str(self._module_of(layer))
        after = [row[:] for row in x]
        for m in range(len(x)):
            is_bias = self.bias and m == 0
            normed = [self.normed(str(p["an"]), x[m][t], t, is_bias) for t in range(len(self.ids))]
            mixed = self.recurrence(at, layer, normed, is_bias)
            for t, vector in enumerate(mixed):
                out = self.linear(at + ".out_proj", vector, is_bias)
                after[m][t] = after[m][t] + self.added(p["ap"], out, t, is_bias)
        return after

    def recurrence(self, at: str, layer: int, x: list[Tensor], is_bias: bool) -> list[Tensor]:
        """What the output projection reads at each position, of one source with the normed parts ``x``."""
        if self.name == "qwen3_next":
            return self.delta_rule(at, layer, self.values_of_delta_rule(at, x))
        return self.state_space(at, layer, self.values_of_state_space(at, x, is_bias))

    def convolved(self, at: str, values: list[Tensor], own: list[Tensor], first: int, is_bias: bool) -> list[Tensor]:
        """The source's share of the convolution's SiLU: its own sum over the last positions, times σ of the model's sum."""
        conv, found = self.module(at + ".conv1d"), []
        weight = conv.weight[first : first + len(values[0]), 0]
        bias = None if conv.bias is None else conv.bias[first : first + len(values[0])]
        for t in range(len(values)):
            sums = []
            for vectors, with_bias in ((values, is_bias), (own, True)):
                total = torch.zeros_like(values[t])
                for back in range(min(t + 1, weight.shape[1])):
                    total = total + weight[:, -1 - back] * vectors[t - back]
                sums.append(total + bias if with_bias and bias is not None else total)
            found.append(sums[0] * sums[1].sigmoid())
        return found

    def values_of_delta_rule(self, at: str, x: list[Tensor]) -> list[Tensor]:
        m = self.module(at)
        values = m.value_dim // m.num_k_heads

        def of(y: Tensor) -> Tensor:  # of each key head: query, key, values, gate
            by_head = y.split(2 * m.head_k_dim + 2 * values)
            return torch.cat([head[2 * m.head_k_dim :][:values] for head in by_head])

        own = [of(y) for y in self.captured[at + ".in_proj_qkvz:out"].double()]
        return self.convolved(at, [of(m.in_proj_qkvz.weight @ part) for part in x], own, 2 * m.key_dim, False)

    def delta_rule(self, at: str, layer: int, values: list[Tensor]) -> list[Tensor]:
        """``S ← γ S``, ``S ← S + k β (v - Sᵀ k)ᵀ``, read by the query; then the norm and the gate of the whole."""
        m, (args, options) = self.module(at), self.calls[self.recurrent.index(layer)]
        query, key, decay, beta = (each[0].double() for each in (args[0], args[1], options["g"], options["beta"]))
        query, key = (each / each.square().sum(-1, keepdim=True).add(1e-6).sqrt() for each in (query, key))
        of_key_head = m.num_v_heads // m.num_k_heads
        whole, gate = self.captured[at + ".norm:in"].double(), self._gate_of_delta_rule(at)
        found = []
        states = [torch.zeros(m.head_k_dim, m.head_v_dim, dtype=torch.float64) for _ in range(m.num_v_heads)]
        for t, v in enumerate(values):
            outs = []
            for h in range(m.num_v_heads):
                k, state = key[t, h // of_key_head], states[h] * decay[t, h].exp()
                own = v[h * m.head_v_dim : (h + 1) * m.head_v_dim]
                states[h] = state + torch.outer(k, beta[t, h] * (own - state.T @ k))
                out = states[h].T @ query[t, h // of_key_head] / m.head_k_dim**0.5
                core = whole[t * m.num_v_heads + h]
                out = m.norm.weight * out / core.square().mean().add(m.norm.variance_epsilon).sqrt()
                outs.append(out * functional.silu(gate[t, h]))
            found.append(torch.cat(outs))
        return found

    def _gate_of_delta_rule(self, at: str) -> Tensor:  # [T, H, d]
        m = self.module(at)
        by_head = self.captured[at + ".in_proj_qkvz:out"].double().unflatten(-1, (m.num_k_heads, -1))
        values = m.value_dim // m.num_k_heads
        return by_head[..., -values:].reshape(len(by_head), m.num_v_heads, -1)

    def values_of_state_space(self, at: str, x: list[Tensor], is_bias: bool) -> list[Tensor]:
        width = self.module(at).intermediate_size

        def of(y: Tensor) -> Tensor:
            return y[width : 2 * width]

        own = [of(y) for y in self.captured[at + ".in_proj:out"].double()]
        return self.convolved(at, [of(self.linear(at + ".in_proj", part, is_bias)) for part in x], own, 0, is_bias)

    def state_space(self, at: str, layer: int, values: list[Tensor]) -> list[Tensor]:
        """``S ← exp(Δ A) S + Δ B vᵀ``, read by ``C``, plus ``D v``; then the gate and the norm of the whole."""
        m, (args, options) = self.module(at), self.calls[self.recurrent.index(layer)]
        step, a, b, c = (each.double() for each in (args[1][0], args[2], args[3][0], args[4][0]))
        step = functional.softplus(step + options["dt_bias"].double()).clamp(*options["dt_limit"])
        gate = functional.silu(self.captured[at + ".in_proj:out"].double()[:, : m.intermediate_size])
        whole, of_group = self.captured[at + ".norm:in"].double() * gate, m.num_heads // m.n_groups
        found, d = [], m.head_dim
        states = [torch.zeros(m.ssm_state_size, d, dtype=torch.float64) for _ in range(m.num_heads)]
        for t, v in enumerate(values):
            outs = []
            for h in range(m.num_heads):
                own = v[h * d : (h + 1) * d]
                written = torch.outer(b[t, h // of_group], step[t, h] * own)
                states[h] = states[h] * (step[t, h] * a[h]).exp() + written
                outs.append(states[h].T @ c[t, h // of_group] + m.D[h] * own)
            groups = whole[t].unflatten(0, (-1, getattr(m.norm, "group_size", m.intermediate_size)))
            scale = groups.square().mean(-1, keepdim=True).add(m.norm.variance_epsilon).rsqrt().expand(groups.shape)
            found.append(m.norm.weight * torch.cat(outs) * gate[t] * scale.flatten())
        return found
