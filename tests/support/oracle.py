"""A slow loop, straight from the method's definition and written without the package's code, agrees with the state.

It shares with the package only what the model's own run is captured to have: attention patterns, norm inputs, hidden
vectors and gate outputs, all taken by this file's own hooks. Any shares that sum to one conserve; only this (and the
published outputs) tests which shares they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

WITHOUT_BIAS = (
    "llama", "olmo2", "gemma2", "phi3", "olmo", "bitnet", "qwen3_moe", "granitemoeshared", "qwen3_next", "gemma4",
    "gemma4-experts", "llama4",
)  # fmt: skip
PARALLEL = ("gpt-neox", "phi", "cohere", "codegen")  # both sublayers read the layer's input
# by name: the experts, and the projections of the MLP beside them
EXPERTS: dict[str, tuple[str, str | None, str | None]] = {
    "qwen3_moe": ("mlp.experts", None, None),
    "qwen2_moe": ("mlp.experts", "mlp.shared_expert.gate_proj", "mlp.shared_expert.down_proj"),
    "qwen3_next": ("mlp.experts", "mlp.shared_expert.gate_proj", "mlp.shared_expert.down_proj"),
    "nemotron_h": ("mixer.experts", "mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"),
    "granitemoehybrid": ("block_sparse_moe.experts", "shared_mlp.input_linear", "shared_mlp.output_linear"),
    "gpt_oss": ("mlp.experts", None, None),
    "gemma4-experts": ("experts", "mlp.gate_proj", "mlp.down_proj"),
    "llama4": (
        "feed_forward.experts",
        "feed_forward.shared_expert.gate_proj",
        "feed_forward.shared_expert.down_proj",
    ),
    "deepseek_v3": ("mlp.experts", "mlp.shared_experts.gate_proj", "mlp.shared_experts.down_proj"),
    "granitemoeshared": ("block_sparse_moe.experts", "shared_mlp.input_linear", "shared_mlp.output_linear"),
}


class Branch(NamedTuple):
    """An MLP that a position goes through: its only one, one of its experts, or the one beside them."""

    hidden: Tensor  # [F], the model's own
    total: Tensor  # [F], the model's own pre-activations
    read: Callable[[Tensor, bool], Tensor]  # what one part of the normed stream [D] adds to them [F or 2·F]
    write: Callable[[Tensor, bool], Tensor]  # what a share of the hidden vector [F] adds to the stream [D]


class Oracle:
    """X[m][t] as D-vectors in Python lists; one method per sentence of the definition."""

    def __init__(self, name: str, run: Any, ids: list[int], starts: list[int], owner: list[int], bias: bool) -> None:
        self.name, self.ids = name, ids
        self.model = copy.deepcopy(run).to("cpu", torch.float64)  # the loop itself runs on the CPU
        config = run.config
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        # Gemma 4's differ by layer, and its loop reads them off the values
        self.groups = 0 if name.startswith("gemma4") else getattr(config, "num_key_value_heads", self.heads)
        self.starts, self.owner, self.bias = starts, owner, bias
        self.captured: dict[str, Tensor] = {}
        self._capture(run)

    def _capture(self, run: Any) -> None:
        handles = []
        for path, module in run.named_modules():

            def keep(module: Any, args: Any, output: Any, path: str = path) -> None:
                if args and isinstance(args[0], Tensor):  # [1, T, D], or [T, D] inside of some MLPs
                    self.captured[path + ":in"] = args[0].flatten(0, -2).cpu()
                if path.endswith(".experts") and len(args) > 1:
                    self.captured[path + ":chosen"], self.captured[path + ":weight"] = (each.cpu() for each in args[1:])
                if isinstance(output, Tensor):
                    self.captured[path + ":out"] = output.flatten(0, -2).cpu()

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
        return (norm.weight + (1 if self.name in ("gemma2", "qwen3_next") else 0)) * x / rms

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
        if self.experts(layer) is not None:
            _, gate, down = EXPERTS[self.name]
            found |= {"g": None if gate is None else at + gate, "d": None if down is None else at + down}
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

    def experts(self, layer: int) -> str | None:
        """The path of the experts of a layer, or None: some layers have one MLP."""
        path = f"model.layers.{layer}.{EXPERTS[self.name][0]}" if self.name in EXPERTS else ""
        return path if path + ":chosen" in self.captured else None

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

    def latent_value(self, layer: int, x: Tensor, t: int, bias_source: bool) -> list[Tensor]:
        """DeepSeek's value vectors: of the normed first numbers of a projection, and behind each head's keys."""
        at, config = f"model.layers.{layer}.self_attn.", self.model.config
        latent = self.linear(at + "kv_a_proj_with_mqa", x, bias_source)[: config.kv_lora_rank]
        latent = self.normed(at + "kv_a_layernorm", latent, t, bias_source)
        y, keys = self.linear(at + "kv_b_proj", latent, bias_source), config.qk_nope_head_dim
        by_head = y.split(keys + config.v_head_dim)
        return [head[keys:] for head in by_head]

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
        return out * self.model.config.residual_multiplier if self.name.startswith("granite") else out

    def attention(self, x: list[list[Tensor]], layer: int) -> list[list[Tensor]]:
        p = self.paths(layer)
        after = [row[:] for row in x]
        for m in range(len(x)):
            is_bias = self.bias and m == 0
            values = []
            for t in range(len(self.ids)):
                normed = x[m][t] if p["an"] is None else self.normed(p["an"], x[m][t], t, is_bias)
                if self.name == "deepseek_v3":
                    values.append(self.latent_value(layer, normed, t, is_bias))
                else:
                    values.append(self.value(p["v"], normed, is_bias))
            for q in range(len(self.ids)):
                mixed = []
                for h in range(self.heads):
                    total = torch.zeros_like(values[0][h])
                    for k in range(q + 1):
                        total = total + self.patterns[layer][0, h, q, k] * values[k][h]
                    mixed.append(total)
                of_heads = torch.cat(mixed)
                of_heads = self.behind_heads(of_heads, layer, q, is_bias)
                out = self.linear(p["o"], of_heads, is_bias)
                after[m][q] = after[m][q] + self.added(p["ap"], out, q, is_bias)
        return after

    def behind_heads(self, of_heads: Tensor, layer: int, t: int, is_bias: bool) -> Tensor:
        """What the output projection reads of what the heads mix."""
        if self.name == "bitnet":
            return self.normed(f"model.layers.{layer}.self_attn.attn_sub_norm", of_heads, t, is_bias)
        return of_heads

    def mlp(
        self,
        read: list[list[Tensor]],
        after: list[list[Tensor]],
        layer: int,
        rule: str = "softmax",
        tau: float = 0.1,
        excluded: int | None = None,
    ) -> list[list[Tensor]]:
        result = [row[:] for row in after]
        for t in range(len(self.ids)):
            for number, branch in enumerate(self.branches(layer, t)):
                neurons, gates = len(branch.hidden), {}  # some projections hold the up rows behind those of the gate
                for m in self.active(t):
                    is_bias = self.bias and m == 0
                    gates[m] = branch.read(self.before_branch(layer, number, read[m][t], t, is_bias), is_bias)[:neurons]
                for m, alpha in self.shares(gates, branch.total, rule, tau, excluded, t).items():
                    out = branch.write(alpha * branch.hidden, self.bias and m == 0)
                    result[m][t] = result[m][t] + self.behind_branch(layer, number, out, t)
        return result

    def before_branch(self, layer: int, number: int, x: Tensor, t: int, is_bias: bool) -> Tensor:
        """What a layer's branch of this number, in the order of :meth:`branches`, reads of a part of the stream."""
        norm = self.paths(layer)["mn"]
        return x if norm is None else self.normed(norm, x, t, is_bias)

    def behind_branch(self, layer: int, number: int, out: Tensor, t: int) -> Tensor:
        """What a branch's output adds to the stream."""
        return self.added(self.paths(layer)["mp"], out, t, False)

    def branches(self, layer: int, t: int) -> Iterator[Branch]:
        """The MLP of a position, and each expert that it chose."""
        p = self.paths(layer)
        if p["d"] is not None:
            hidden, weight = self.captured[p["d"] + ":in"][t], 1.0
            if self.name in ("qwen2_moe", "qwen3_next"):
                weight = self.captured[f"model.layers.{layer}.mlp.shared_expert_gate:out"][t, 0].sigmoid()
            yield Branch(
                hidden, self.pre_activations(p["g"], t)[: len(hidden)], partial(self.linear, p["g"]),
                lambda x, is_bias: weight * self.linear(p["d"], x, is_bias),
            )  # fmt: skip
        path = self.experts(layer)
        if path is not None:
            yield from self.of_experts(path, t)

    def of_experts(self, path: str, t: int) -> Iterator[Branch]:
        """Each expert that a position chose."""
        for e, weight in zip(
            self.captured[path + ":chosen"][t].tolist(), self.captured[path + ":weight"][t], strict=True
        ):
            hidden, total = self.hidden(path, e, self.captured[path + ":in"][t])
            yield Branch(hidden, total, partial(self.gate_of, path, e), partial(self.down_of, path, e, weight))

    def pre_activations(self, path: str, t: int) -> Tensor:
        """The model's own, of the projection at a path."""
        return self.captured[path + ":out"][t]

    def gate_of(self, path: str, e: int, x: Tensor, is_bias: bool) -> Tensor:
        """The gate's rows of expert ``e``'s first projection."""
        both = self.both_of(path, e, x, is_bias)
        if self.name == "nemotron_h":  # without an up projection
            return both
        return both[::2] if self.name == "gpt_oss" else both[: len(both) // 2]

    def both_of(self, path: str, e: int, x: Tensor, is_bias: bool) -> Tensor:
        experts = self.module(path)
        if self.name == "nemotron_h":
            return experts.up_proj[e] @ x
        if self.name != "gpt_oss":
            return experts.gate_up_proj[e] @ x
        both = x @ experts.gate_up_proj[e]
        return both + experts.gate_up_proj_bias[e] if is_bias else both

    def hidden(self, path: str, e: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden vector and the pre-activations of expert ``e`` for its own input ``[D]``."""
        experts, both, total = self.module(path), self.both_of(path, e, x, True), self.gate_of(path, e, x, True)
        if self.name == "nemotron_h":
            return total.relu() ** 2, total
        if self.name != "gpt_oss":
            return total * total.sigmoid() * both[len(both) // 2 :], total
        gate, up = total.clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
        return (up + 1) * gate * (gate * experts.alpha).sigmoid(), total

    def down_of(self, path: str, e: int, weight: Tensor, x: Tensor, is_bias: bool) -> Tensor:
        """What expert ``e`` adds to the stream, with the router's weight."""
        experts = self.module(path)
        if self.name != "gpt_oss":
            return weight * (experts.down_proj[e] @ x)
        out = x @ experts.down_proj[e]
        return weight * (out + experts.down_proj_bias[e] if is_bias else out)

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
