"""The decomposition in plain PyTorch, in an efficient order, and the same through ``torch.compile``.

A dense state ``[M, N, D]`` in fp32 beside GEMMs in the model's dtype, the norms' weights folded into the projections and
their scales into pattern and gates, values mixed in the head dim before the output projection, one softmax over the
sources, one pass of the model for all targets. This is a careful implementation without custom kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .llama import head_sizes, pattern, rms, run

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MLP = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def attention_step(
    state: Tensor,  # [M, N, D]
    pattern: Tensor,  # [H, N, N]
    key_scale: Tensor,  # [N]
    value: Tensor,  # [K·d, D]
    output: Tensor,  # [D, H·d]
) -> Tensor:
    """Add every source's part of a layer's attention to the state, in place."""
    (m, n, _), heads = state.shape, len(pattern)
    d = output.shape[1] // heads
    kv_heads = len(value) // d
    values = (state.to(value.dtype) @ value.T).view(m, n, kv_heads, d)
    values = values.permute(2, 1, 0, 3).reshape(kv_heads, n, m * d)
    weight = (pattern * key_scale).to(value.dtype).view(kv_heads, -1, n)  # [K, G·N, N]
    mixed = (weight @ values).view(heads, n, m, d).permute(2, 1, 0, 3).reshape(m, n, heads * d)
    return state.add_(mixed @ output.T)


def mlp_step(
    state: Tensor,  # [M, N, D]
    hidden: Tensor,  # [N, F]
    gate_scale: Tensor,  # [N]
    active: Tensor,  # [M, N]
    gate: Tensor,  # [F, D]
    down: Tensor,  # [D, F]
    temperature: float,
) -> Tensor:
    """Add every source's part of a layer's MLP to the state, in place."""
    logits = (state.to(gate.dtype) @ gate.T).float() * (gate_scale / temperature)[:, None]  # [M, N, F]
    share = torch.softmax(logits.masked_fill_(~active[..., None], float("-inf")), dim=0)
    return state.add_((share * hidden).to(down.dtype) @ down.T)


class Eager:
    """The baseline, with its attention and MLP steps eager or compiled."""

    def __init__(self, attention: Attention = attention_step, mlp: MLP = mlp_step) -> None:
        self.attention, self.mlp = attention, mlp

    @torch.no_grad()
    def token_scores(self, model: Any, ids: Tensor, token: int, temperature: float = 0.1) -> Tensor:
        """``[N]``, the contribution of each token to the last position's logit; the first takes no part later on."""
        starts = torch.arange(len(ids), device=model.device)
        active = starts[:, None] <= starts
        active[0, 1:] = False
        return self._from_embeddings(model, ids, token, starts, active, temperature)

    @torch.no_grad()
    def span_scores(
        self, model: Any, ids: Tensor, token: int, ranges: Sequence[tuple[int, int]], temperature: float = 0.1
    ) -> Tensor:
        """``[M]``, the contribution of each span; the spans follow one another and cover the prompt."""
        positions = torch.arange(len(ids), device=model.device)
        source = torch.empty_like(positions)  # of each position
        for index, (begin, end) in enumerate(ranges):
            source[begin:end] = index
        starts = torch.tensor([begin for begin, _ in ranges], device=model.device)
        return self._from_embeddings(model, ids, token, source, starts[:, None] <= positions, temperature)

    @torch.no_grad()
    def head_scores(self, model: Any, ids: Tensor, token: int, temperature: float = 0.1) -> Tensor:
        """``[L, H + 1]``, the contributions of the rest of the stream and of each head, of every layer."""
        kept, (heads, _, d) = run(model, ids), head_sizes(model)
        active = torch.ones(heads + 1, len(ids), dtype=torch.bool, device=model.device)
        found = []
        for first, layer in enumerate(model.model.layers):
            output = layer.self_attn.o_proj.weight.view(-1, heads, d)
            of_heads = torch.einsum("nhd,Dhd->hnD", kept["mixed"][first].view(-1, heads, d), output)  # [H, N, D]
            rest = (kept["middle"][first].float() - of_heads.float().sum(0))[None]
            state = torch.cat([rest, of_heads.float()])  # [H + 1, N, D]
            found.append(self._propagate(model, kept, state, active, token, temperature, first, after_attention=True))
        return torch.stack(found)

    def _from_embeddings(
        self, model: Any, ids: Tensor, token: int, source: Tensor, active: Tensor, temperature: float
    ) -> Tensor:
        kept, n = run(model, ids), len(ids)
        state = torch.zeros(*active.shape, model.config.hidden_size, device=model.device)
        state[source, torch.arange(n, device=model.device)] = kept["stream"][0].float()
        return self._propagate(model, kept, state, active, token, temperature)

    def _propagate(
        self, model: Any, kept: dict[str, Any], state: Tensor, active: Tensor, token: int, temperature: float,
        first: int = 0, after_attention: bool = False,
    ) -> Tensor:  # fmt: skip
        for index, layer in enumerate(model.model.layers[first:], first):
            before, after = layer.input_layernorm, layer.post_attention_layernorm
            if not (after_attention and index == first):
                state = self.attention(
                    state, pattern(model, kept, index), rms(before, kept["stream"][index])[:, 0],
                    layer.self_attn.v_proj.weight * before.weight, layer.self_attn.o_proj.weight,
                )  # fmt: skip
            state = self.mlp(
                state, kept["hidden"][index], rms(after, kept["middle"][index])[:, 0], active,
                layer.mlp.gate_proj.weight * after.weight, layer.mlp.down_proj.weight, temperature,
            )  # fmt: skip
        norm = model.model.norm
        w = model.get_output_embeddings().weight[token].float() * norm.weight.float()
        scores: Tensor = state[:, -1] @ w * rms(norm, kept["stream"][-1][-1:])[0]
        return scores


def compiled(**options: Any) -> Eager:
    """The baseline with both steps compiled by ``torch.compile`` for one size; earlier compilations are discarded."""
    torch._dynamo.reset()  # else a ninth size in one process would run uncompiled
    options = {"dynamic": False, "fullgraph": True, **options}
    return Eager(torch.compile(attention_step, **options), torch.compile(mlp_step, **options))
