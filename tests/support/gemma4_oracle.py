"""The slow loops of :mod:`oracle` and :mod:`linear_oracle` for Gemma 4 and Llama 4, from transformers' modeling files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from linear_oracle import LinearOracle, Pair, Write
from oracle import Branch, Oracle
from torch import Tensor
from torch.nn import functional

States = list[list[Tensor]]  # by source and position


class Gemma4Oracle(Oracle):
    """Norms on values, shared values, experts beside the MLP with norms of their own, per-layer inputs, a scalar."""

    values: dict[str, list[list[list[Tensor]]]]  # by kind of layer, source, position and head

    def paths(self, layer: int) -> dict[str, str | None]:
        at = f"model.layers.{layer}."
        return {
            **super().paths(layer), "mn": at + "pre_feedforward_layernorm", "ap": at + "post_attention_layernorm",
            "mp": at + "post_feedforward_layernorm",
        }  # fmt: skip

    def attention(self, x: States, layer: int) -> States:
        p, module = self.paths(layer), self.module(f"model.layers.{layer}.self_attn")
        assert p["an"] is not None
        assert p["o"] is not None
        kinds = self.model.config.layer_types
        if module.is_kv_shared_layer:
            values = self.values[kinds[layer]]
        else:
            values = [[self.head_values(p["an"], layer, row[t], t) for t in range(len(self.ids))] for row in x]
            self.values = {**getattr(self, "values", {}), kinds[layer]: values}
        after = [row[:] for row in x]
        for m, q in ((m, q) for m in range(len(x)) for q in range(len(self.ids))):
            pattern = self.patterns[layer][0, :, q]
            mixed = [sum(pattern[h, k] * values[m][k][h] for k in range(q + 1)) for h in range(self.heads)]
            out = self.linear(p["o"], torch.cat(mixed), False)  # type: ignore[arg-type]
            after[m][q] = after[m][q] + self.added(p["ap"], out, q, False)
        return after

    def head_values(self, norm: str, layer: int, x: Tensor, t: int) -> list[Tensor]:
        """The values of all query heads: the keys' projection where there is no other, over the root mean square."""
        at = f"model.layers.{layer}.self_attn."
        module = self.module(at[:-1])
        y = self.linear(at + ("k_proj" if module.v_proj is None else "v_proj"), self.normed(norm, x, t, False), False)
        whole = self.captured[at + "v_norm:in"].view(len(self.ids), -1, module.head_dim)[t]  # [K, d]
        rms = ((whole**2).mean(1, keepdim=True) + module.v_norm.eps).sqrt()
        heads = y.view(-1, module.head_dim) / rms
        return [heads[h * len(heads) // self.heads] for h in range(self.heads)]

    def before_branch(self, layer: int, number: int, x: Tensor, t: int, is_bias: bool) -> Tensor:
        """The MLP, number 0, and the experts behind it have a norm each."""
        norm = f"model.layers.{layer}.pre_feedforward_layernorm"
        return self.normed(norm + ("_2" if number else ""), x, t, is_bias)

    def behind_branch(self, layer: int, number: int, out: Tensor, t: int) -> Tensor:
        """Beside experts, the MLP and they have a norm each before the one of their sum."""
        norm = f"model.layers.{layer}.post_feedforward_layernorm"
        if self.experts(layer) is not None:
            out = self.normed(norm + ("_2" if number else "_1"), out, t, False)
        return self.normed(norm, out, t, False)

    def hidden(self, path: str, e: int, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.both_of(path, e, x, True).chunk(2)
        return functional.gelu(gate, approximate="tanh") * up, gate

    def layer(self, x: States, layer: int, rule: str, tau: float, excluded: int | None) -> States:
        states, at = super().layer(x, layer, rule, tau, excluded), f"model.layers.{layer}."
        if self.model.config.hidden_size_per_layer_input:
            for t in range(len(self.ids)):
                gates = {m: self.linear(at + "per_layer_input_gate", states[m][t], False) for m in self.active(t)}
                hidden, total = (
                    self.captured[at + name][t] for name in ("per_layer_projection:in", "per_layer_input_gate:out")
                )
                for m, alpha in self.shares(gates, total, rule, tau, excluded, t).items():
                    out = self.linear(at + "per_layer_projection", alpha * hidden, False)
                    states[m][t] = states[m][t] + self.normed(at + "post_per_layer_input_norm", out, t, False)
        scalar = self.module(at[:-1]).layer_scalar
        return [[each * scalar for each in row] for row in states]


class Llama4Oracle(Oracle):
    """The sigmoid of the router's logit multiplies an expert's input, and nothing its output."""

    def paths(self, layer: int) -> dict[str, str | None]:
        at, found = f"model.layers.{layer}.feed_forward.", super().paths(layer)
        if self.experts(layer) is None:
            found |= {"g": at + "gate_proj", "d": at + "down_proj"}
        return found

    def experts(self, layer: int) -> str | None:
        path = f"model.layers.{layer}.feed_forward.experts"
        return path if path + ":in" in self.captured else None

    def of_experts(self, path: str, t: int) -> Iterator[Branch]:
        router = path.replace("experts", "router")
        x = self.captured[router + ":in"][t]
        logits = self.module(router).weight @ x
        for e in logits.topk(self.model.config.num_experts_per_tok).indices.tolist():
            weight = logits[e].float().sigmoid().double()  # as in the modeling file
            read = partial(self.first, path, e, weight)
            gate, up = read(x, False).chunk(2)
            yield Branch(gate * gate.sigmoid() * up, gate, read, partial(self.last, path, e))

    def first(self, path: str, e: int, weight: Tensor, x: Tensor, _: bool) -> Tensor:
        return (weight * x) @ self.module(path).gate_up_proj[e]

    def last(self, path: str, e: int, x: Tensor, _: bool) -> Tensor:
        return x @ self.module(path).down_proj[e]


class LinearGemma4Oracle(LinearOracle, Gemma4Oracle):
    """The loop of linear rules for Gemma 4. The branch behind the MLP has one factor: the per-layer input is a constant."""

    def shares(self, gates: dict[int, Tensor], total: Tensor, *_: object) -> dict[int, Tensor]:
        """The branch behind the MLP: its hidden vector is ``h / z``, a constant, times ``z``."""
        return {m: self.ratio(gate, total) for m, gate in gates.items()}


class LinearLlama4Oracle(LinearOracle, Llama4Oracle):
    """The loop of linear rules for Llama 4, in whose experts a part comes times the router's weight."""

    def linear_experts(self, path: str, t: int) -> Iterator[tuple[Pair, Write]]:
        for expert in self.of_experts(path, t):
            yield partial(self.halves, expert), expert.write

    def halves(self, expert: Branch, x: Tensor, is_bias: bool) -> tuple[Tensor, Tensor]:
        gate, up = expert.read(x, is_bias).chunk(2)
        return gate, up
