"""A slow loop, straight from the method's definition and written without the package's code, agrees with the state.

It shares with the package only what the model's own run is captured to have: attention patterns, norm inputs, hidden
vectors and gate outputs, all taken by this file's own hooks. Any shares that sum to one conserve; only this (and the
published outputs) tests which shares they are.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

WITHOUT_BIAS = ("llama", "olmo2", "gemma2", "phi3", "olmo")
PARALLEL = ("gpt-neox", "phi", "cohere", "codegen")  # both sublayers read the layer's input


class Oracle:
    """X[m][t] as D-vectors in Python lists; one method per sentence of the definition."""

    def __init__(self, name: str, run: Any, ids: list[int], starts: list[int], owner: list[int], bias: bool) -> None:
        self.name, self.ids = name, ids
        self.model = copy.deepcopy(run).to("cpu", torch.float64)  # the loop itself runs on the CPU
        config = run.config
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.groups = getattr(config, "num_key_value_heads", self.heads)
        self.starts, self.owner, self.bias = starts, owner, bias
        self.captured: dict[str, Tensor] = {}
        self._capture(run)

    def _capture(self, run: Any) -> None:
        handles = []
        for path, module in run.named_modules():

            def keep(module: Any, args: Any, output: Any, path: str = path) -> None:
                if args and isinstance(args[0], Tensor):
                    self.captured[path + ":in"] = args[0][0].cpu()
                if isinstance(output, Tensor):
                    self.captured[path + ":out"] = output[0].cpu()

            handles.append(module.register_forward_hook(keep))
        with torch.no_grad():
            out = run(torch.tensor([self.ids], device=run.device), output_attentions=True, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        self.patterns = [pattern.cpu() for pattern in out.attentions]
        self.streams = [stream.cpu() for stream in out.hidden_states]

    def module(self, path: str) -> Any:
        return self.model.get_submodule(path)

    def normed(self, path: str, x: Tensor, t: int, bias_source: bool) -> Tensor:
        """x̂[m,t] of one component; the frozen scale is of the whole captured vector."""
        norm, whole = self.module(path), self.captured[path + ":in"][t]
        if type(norm).__name__ == "OlmoLayerNorm":  # F.layer_norm without weight and bias
            return (x - x.mean()) / ((whole - whole.mean()) ** 2).mean().add(1e-5).sqrt()
        if type(norm).__name__ == "CohereLayerNorm":  # a weight, no bias
            return norm.weight * (x - x.mean()) / ((whole - whole.mean()) ** 2).mean().add(norm.variance_epsilon).sqrt()
        if isinstance(norm, torch.nn.LayerNorm):
            sigma = ((whole - whole.mean()) ** 2).mean().add(norm.eps).sqrt()
            result = norm.weight * (x - x.mean()) / sigma
            return result + norm.bias if bias_source else result
        rms = (whole**2).mean().add(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon).sqrt()
        return (norm.weight + (1 if self.name == "gemma2" else 0)) * x / rms

    def paths(self, layer: int) -> dict[str, str | None]:
        if self.name.startswith("gpt2"):
            at = f"transformer.h.{layer}."
            return {
                "an": at + "ln_1",
                "mn": at + "ln_2",
                "ap": None,
                "mp": None,
                "o": at + "attn.c_proj",
                "g": at + "mlp.c_fc",
                "d": at + "mlp.c_proj",
                "v": at + "attn.c_attn",
            }
        if self.name.startswith("gpt-neox"):
            at = f"gpt_neox.layers.{layer}."
            return {
                "an": at + "input_layernorm",
                "mn": at + "post_attention_layernorm",
                "ap": None,
                "mp": None,
                "o": at + "attention.dense",
                "g": at + "mlp.dense_h_to_4h",
                "d": at + "mlp.dense_4h_to_h",
                "v": at + "attention.query_key_value",
            }
        if self.name == "codegen":
            at = f"transformer.h.{layer}."
            return {
                "an": at + "ln_1",
                "mn": at + "ln_1",
                "ap": None,
                "mp": None,
                "o": at + "attn.out_proj",
                "g": at + "mlp.fc_in",
                "d": at + "mlp.fc_out",
                "v": at + "attn.qkv_proj",
            }
        at = f"model.layers.{layer}."
        found = {
            "an": at + "input_layernorm",
            "mn": at + "post_attention_layernorm",
            "ap": None,
            "mp": None,
            "o": at + "self_attn.o_proj",
            "g": at + "mlp.gate_proj",
            "d": at + "mlp.down_proj",
            "v": at + "self_attn.v_proj",
        }
        if self.name == "phi3":
            found |= {"v": at + "self_attn.qkv_proj", "g": at + "mlp.gate_up_proj"}
        if self.name == "starcoder2":
            found |= {"g": at + "mlp.c_fc", "d": at + "mlp.c_proj"}
        if self.name == "phi":
            found |= {
                "mn": at + "input_layernorm",
                "o": at + "self_attn.dense",
                "g": at + "mlp.fc1",
                "d": at + "mlp.fc2",
            }
        if self.name == "cohere":
            found |= {"mn": at + "input_layernorm"}
        if self.name == "olmo2":
            found |= {
                "an": None,
                "mn": None,
                "ap": at + "post_attention_layernorm",
                "mp": at + "post_feedforward_layernorm",
            }
        if self.name == "gemma2":
            found |= {
                "mn": at + "pre_feedforward_layernorm",
                "ap": at + "post_attention_layernorm",
                "mp": at + "post_feedforward_layernorm",
            }
        return found

    def linear(self, path: str, x: Tensor, bias_source: bool) -> Tensor:
        module = self.module(path)
        y = x @ module.weight if self.name.startswith("gpt2") else module.weight @ x
        return y + module.bias if bias_source and module.bias is not None else y

    def value(self, path: str, x: Tensor, bias_source: bool) -> list[Tensor]:
        """The value vectors of all query heads, one after another."""
        heads, groups = self.heads, self.groups
        y = self.linear(path, x, bias_source)
        if self.name.startswith("gpt-neox"):
            d = len(y) // (3 * heads)
            return [y[h * 3 * d + 2 * d : (h + 1) * 3 * d] for h in range(heads)]
        if self.name == "codegen":  # four blocks of queries, values and keys, each of some heads
            d, in_block = len(y) // (3 * heads), heads // 4
            return [y[(3 * (h // in_block) + 1) * in_block * d + h % in_block * d :][:d] for h in range(heads)]
        if self.name.startswith("gpt2") or self.name == "phi3":  # queries, keys and values in one
            y = y[len(y) // (heads + 2 * groups) * (heads + groups) :]
        d = len(y) // groups
        return [y[h * groups // heads * d : (h * groups // heads + 1) * d] for h in range(heads)]

    def active(self, t: int) -> list[int]:
        return [m for m, start in enumerate(self.starts) if start <= t]

    def run(self, rule: str, tau: float, excluded: int | None) -> list[list[list[Tensor]]]:
        zero = torch.zeros_like(self.streams[0][0, 0])
        x = [
            [self.streams[0][0, t] if self.owner[t] == m else zero for t in range(len(self.ids))]
            for m in range(len(self.starts))
        ]
        return self.on(x, 0, rule, tau, excluded)

    def on(
        self, x: list[list[Tensor]], first: int, rule: str = "softmax", tau: float = 0.1, excluded: int | None = None
    ) -> list[list[list[Tensor]]]:
        """The states from ``x``, which enters layer ``first``, to the end."""
        states = [x]
        for layer in range(first, self.layers):
            with torch.no_grad():
                x = self.layer(x, layer, rule, tau, excluded)
            states.append(x)
        return states

    def layer(
        self, x: list[list[Tensor]], layer: int, rule: str, tau: float, excluded: int | None
    ) -> list[list[Tensor]]:
        after = self.attention(x, layer)
        return self.mlp(x if self.name in PARALLEL else after, after, layer, rule, tau, excluded)

    def added(self, path: str | None, out: Tensor, t: int, bias_source: bool) -> Tensor:
        """What a sublayer's output adds to the stream: through a norm, and in Granite times a multiplier."""
        out = out if path is None else self.normed(path, out, t, bias_source)
        return out * self.model.config.residual_multiplier if self.name == "granite" else out

    def attention(self, x: list[list[Tensor]], layer: int) -> list[list[Tensor]]:
        p = self.paths(layer)
        after = [row[:] for row in x]
        for m in range(len(x)):
            is_bias = self.bias and m == 0
            values = []
            for t in range(len(self.ids)):
                normed = x[m][t] if p["an"] is None else self.normed(p["an"], x[m][t], t, is_bias)
                values.append(self.value(p["v"], normed, is_bias))
            for q in range(len(self.ids)):
                mixed = []
                for h in range(self.heads):
                    total = torch.zeros_like(values[0][h])
                    for k in range(q + 1):
                        total = total + self.patterns[layer][0, h, q, k] * values[k][h]
                    mixed.append(total)
                out = self.linear(p["o"], torch.cat(mixed), is_bias)
                after[m][q] = after[m][q] + self.added(p["ap"], out, q, is_bias)
        return after

    def mlp(
        self,
        read: list[list[Tensor]],
        after: list[list[Tensor]],
        layer: int,
        rule: str = "softmax",
        tau: float = 0.1,
        excluded: int | None = None,
    ) -> list[list[Tensor]]:
        p = self.paths(layer)
        result = [row[:] for row in after]
        for t in range(len(self.ids)):
            gates = {}
            for m in self.active(t):
                is_bias = self.bias and m == 0
                normed = read[m][t] if p["mn"] is None else self.normed(p["mn"], read[m][t], t, is_bias)
                gates[m] = self.linear(p["g"], normed, is_bias)
                if self.name == "phi3":
                    gates[m] = gates[m][: len(gates[m]) // 2]
            hidden = self.captured[p["d"] + ":in"][t]
            total = self.captured[p["g"] + ":out"][t][: len(hidden)]
            for m, alpha in self.shares(gates, total, rule, tau, excluded, t).items():
                out = self.linear(p["d"], alpha * hidden, self.bias and m == 0)
                result[m][t] = result[m][t] + self.added(p["mp"], out, t, False)
        return result

    def shares(
        self, gates: dict[int, Tensor], total: Tensor, rule: str, tau: float, excluded: int | None, t: int
    ) -> dict[int, Tensor]:
        neurons = len(total)
        alpha = {m: torch.zeros_like(total) for m in gates}
        if rule == "taylor":
            for m, gate in gates.items():
                for f in range(neurons):
                    alpha[m][f] = gate[f] / total[f] if total[f] != 0 else 0.0
            return alpha
        part = [m for m in gates if m != excluded or t == self.starts[m]]
        for f in range(neurons):
            g = [float(gates[m][f]) for m in part]
            if rule == "softmax":
                top = max(g)
                weight = [torch.tensor((v - top) / tau, dtype=torch.float64).exp().item() for v in g]
            elif rule == "max":
                weight = [1.0 if i == g.index(max(g)) else 0.0 for i in range(len(g))]
            else:
                weight = [max(v, 0.0) if rule == "relu" else v - min(g) for v in g]
                if sum(weight) == 0:
                    weight = [1.0] * len(g)
            for m, w in zip(part, weight, strict=True):
                alpha[m][f] = w / sum(weight)
        return alpha
