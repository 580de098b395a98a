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


def on_cpu(given: Any) -> Any:
    """A tensor where the loop's own weights lie; anything else as it is."""
    return given.cpu() if isinstance(given, Tensor) else given


class RecurrentOracle(Oracle):
    """Adds hybrids to the slow loop: Qwen3-Next, and with Mamba-2 Granite 4, Nemotron-H and Falcon-H1."""

    def _capture(self, run: Any) -> None:
        space = sys.modules[type(run).__module__]
        (rule,) = (name for name in RULES if hasattr(space, name))
        own, self.calls = getattr(space, rule), list[tuple[tuple[Any, ...], dict[str, Any]]]()

        def recorded(*args: Any, **options: Any) -> Any:
            self.calls.append((tuple(map(on_cpu, args)), {name: on_cpu(each) for name, each in options.items()}))
            return own(*args, **options)

        setattr(space, rule, recorded)
        try:
            super()._capture(run)
        finally:
            setattr(space, rule, own)
        self.recurrent = [index for index in range(self.layers) if self._module_of(index) is not None]
        assert len(self.recurrent) == len(self.calls)
        attentions = iter(self.patterns)
        self.attentive = [index for index in range(self.layers) if f"{self.paths(index)['o']}:in" in self.captured]
        self.patterns = [next(attentions) if index in self.attentive else None for index in range(self.layers)]
        assert next(attentions, None) is None

    def paths(self, layer: int) -> dict[str, str | None]:
        at, p = f"model.layers.{layer}.", super().paths(layer)
        if self.name == "nemotron_h":  # a layer has one of these
            beside = self.experts(layer) is not None
            p |= {"an": at + "norm", "mn": at + "norm", "o": at + "mixer.o_proj", "v": at + "mixer.v_proj"}
            if not beside:
                has_mlp = at + "mixer.down_proj:in" in self.captured
                p |= {"g": at + "mixer.up_proj", "d": at + "mixer.down_proj"} if has_mlp else {"g": None, "d": None}
        if self.name == "falcon_h1":
            p |= {"mn": at + "pre_ff_layernorm", "g": at + "feed_forward.gate_proj", "d": at + "feed_forward.down_proj"}
        return p

    def linear(self, path: str, x: Tensor, bias_source: bool) -> Tensor:
        before, behind = self.factors(path)
        return super().linear(path, x * before, bias_source) * behind

    def factors(self, path: str) -> tuple[float, Any]:
        """What Falcon-H1 multiplies the input and the output of a projection by, as its modeling file says."""
        config, name = self.model.config, path.partition(".layers.")[2].partition(".")[2]
        if self.name != "falcon_h1":
            return 1.0, 1.0
        behind = {
            "self_attn.o_proj": config.attention_out_multiplier, "mamba.out_proj": config.ssm_out_multiplier,
            "feed_forward.gate_proj": config.mlp_multipliers[0], "feed_forward.down_proj": config.mlp_multipliers[1],
        }  # fmt: skip
        if name == "mamba.in_proj":
            m = self.module(path.removesuffix(".in_proj"))
            states = m.n_groups * m.ssm_state_size
            sizes = [m.intermediate_size, m.intermediate_size, states, states, m.num_heads]  # z, x, B, C, dt
            pairs = zip(sizes, config.ssm_multipliers, strict=True)
            return config.ssm_in_multiplier, torch.cat([torch.full((size,), by).double() for size, by in pairs])
        return config.attention_in_multiplier if name == "self_attn.v_proj" else 1.0, behind.get(name, 1.0)

    def pre_activations(self, path: str, t: int) -> Tensor:
        return super().pre_activations(path, t) * self.factors(path)[1]

    def projected(self, at: str) -> Tensor:  # [T, z + x + B + C + dt]
        """What Mamba-2's first projection wrote, times its factors."""
        return self.captured[at + ".in_proj:out"].double() * self.factors(at + ".in_proj")[1]

    def _module_of(self, layer: int) -> str | None:
        at = f"model.layers.{layer}."
        paths = [at + name for name in ("linear_attn", "mamba", "mixer") if f"{at}{name}.out_proj:in" in self.captured]
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
        after = super().attention(x, layer) if layer in self.attentive else [row[:] for row in x]
        if layer not in self.recurrent:
            return after
        p, at = self.paths(layer), str(self._module_of(layer))
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

        own = [of(y) for y in self.projected(at)]
        return self.convolved(at, [of(self.linear(at + ".in_proj", part, is_bias)) for part in x], own, 0, is_bias)

    def state_space(self, at: str, layer: int, values: list[Tensor]) -> list[Tensor]:
        """``S ← exp(Δ A) S + Δ B vᵀ``, read by ``C``, plus ``D v``; then the gate and the norm of the whole."""
        m, (args, options) = self.module(at), self.calls[self.recurrent.index(layer)]
        step, a, b, c = (each.double() for each in (args[1][0], args[2], args[3][0], args[4][0]))
        step = functional.softplus(step + options["dt_bias"].double()).clamp(*options["dt_limit"])
        gate = functional.silu(self.projected(at)[:, : m.intermediate_size])
        of_group, found, d = m.num_heads // m.n_groups, [], m.head_dim
        states = [torch.zeros(m.ssm_state_size, d, dtype=torch.float64) for _ in range(m.num_heads)]
        for t, v in enumerate(values):
            outs = []
            for h in range(m.num_heads):
                own = v[h * d : (h + 1) * d]
                written = torch.outer(b[t, h // of_group], step[t, h] * own)
                states[h] = states[h] * (step[t, h] * a[h]).exp() + written
                outs.append(states[h].T @ c[t, h // of_group] + m.D[h] * own)
            found.append(torch.cat(outs) * gate[t] * self.scale_of_state_space(at, gate, t))
        return found

    def scale_of_state_space(self, at: str, gate: Tensor, t: int) -> Tensor | float:
        """The norm's weight and scale, by groups of channels; Falcon-H1 may have none, or one before the gate."""
        norm, config = self.module(at + ".norm"), self.model.config
        if self.name == "falcon_h1" and not config.mamba_rms_norm:
            return 1.0
        whole = self.captured[at + ".norm:in"].double()[t]
        whole = whole if self.name == "falcon_h1" and config.mamba_norm_before_gate else whole * gate[t]
        groups = (
            config.mamba_n_groups if self.name == "falcon_h1" else len(whole) // getattr(norm, "group_size", len(whole))
        )
        by_group = whole.unflatten(0, (groups, -1))
        root = by_group.square().mean(-1, keepdim=True).add(norm.variance_epsilon).rsqrt().expand(by_group.shape)
        return norm.weight * root.flatten()
