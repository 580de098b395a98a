"""The naive decomposition, op for op what the published code does, as a rival to be measured against: our own code, no
short cut and no sabotage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .llama import head_sizes, pattern, rms, run


@torch.no_grad()
def token_scores(model: Any, ids: Tensor, token: int, temperature: float = 0.1) -> Tensor:
    """``[N]``, the contribution of each of the prompt's tokens to the last position's logit of ``token``."""
    n, kept = len(ids), run(model, ids)
    # one row per token, and a last one for what is left of the stream
    state = torch.zeros(n + 1, n, model.config.hidden_size, dtype=model.dtype, device=model.device)  # [M + 1, N, D]
    state[torch.arange(n), torch.arange(n)] = kept["stream"][0]
    state[n] = kept["stream"][0] - state[:n].sum(0)
    for index in range(len(model.model.layers)):
        state = _attention(model, state, kept, index)
        state = _mlp(model, state, kept, index, temperature, drop_first=True)
    return _scores(model, state[:n], kept, token)


@torch.no_grad()
def head_scores(model: Any, ids: Tensor, token: int, layer: int, temperature: float = 0.1) -> Tensor:
    """``[H + 1]``, the contributions of the residual stream and of each head of ``layer``, from a pass of its own."""
    kept = run(model, ids)
    heads, _, d = head_sizes(model)
    output = model.model.layers[layer].self_attn.o_proj.weight.view(-1, heads, d)  # [D, H, d]
    mixed = kept["mixed"][layer].view(-1, heads, d)  # [N, H, d]
    state = torch.cat([kept["stream"][layer][None], torch.einsum("nhd,Dhd->hnD", mixed, output)])  # [H + 1, N, D]
    state = _mlp(model, state, kept, layer, temperature, drop_first=False)
    for index in range(layer + 1, len(model.model.layers)):
        state = _attention(model, state, kept, index)
        state = _mlp(model, state, kept, index, temperature, drop_first=False)
    return _scores(model, state, kept, token)


def _attention(model: Any, state: Tensor, kept: dict[str, Any], index: int) -> Tensor:
    layer, (m, n, _) = model.model.layers[index], state.shape
    heads, kv_heads, d = head_sizes(model)
    weight = pattern(model, kept, index)  # [H, N, N]
    scaled = state * _scale(layer.input_layernorm, kept["stream"][index]) * layer.input_layernorm.weight
    values = (scaled @ layer.self_attn.v_proj.weight.T).view(m, n, kv_heads, d)
    values = values.repeat_interleave(heads // kv_heads, dim=2)  # [M, N, H, d]
    output = layer.self_attn.o_proj.weight.view(-1, heads, d)  # [D, H, d]
    projected = torch.einsum("mkhd,Dhd->mkhD", values, output)  # [M, N, H, D]
    return state + torch.einsum("hqk,mkhD->mqD", weight, projected)


def _mlp(model: Any, state: Tensor, kept: dict[str, Any], index: int, temperature: float, drop_first: bool) -> Tensor:
    layer = model.model.layers[index]
    scaled = state * _scale(layer.post_attention_layernorm, kept["middle"][index])
    scaled = scaled * layer.post_attention_layernorm.weight
    gate = (scaled @ layer.mlp.gate_proj.weight.T).transpose(1, 2)  # [M, F, N]
    if drop_first:  # token mode gives the first token no share
        gate = torch.cat([torch.zeros_like(gate[:1]), gate[1:]])
    gate[0, :, 0] = 1.0
    rest = torch.where(gate[-1].abs() < 1e-5, 0, gate[-1])
    gate = torch.cat([gate[:-1], rest[None]])
    nobody = (gate == 0).all(0)
    gate = torch.cat([gate[:-1], torch.where(nobody, 1.0, gate[-1])[None].to(state.dtype)])
    mask = (gate != 0).float()
    share = torch.softmax((gate / temperature * mask).masked_fill(mask == 0, float("-inf")), dim=0)
    share = share.transpose(1, 2)  # [M, N, F]
    hidden = kept["hidden"][index].expand(len(state), -1, -1)
    added: Tensor = (share * hidden).to(state.dtype) @ layer.mlp.down_proj.weight.T
    return state + added


def _scores(model: Any, state: Tensor, kept: dict[str, Any], token: int) -> Tensor:
    final = state * _scale(model.model.norm, kept["stream"][-1]) * model.model.norm.weight
    everything = final.to("cpu").transpose(0, 1)  # [N, M, D]
    logits: Tensor = everything[-1].to(model.device) @ model.get_output_embeddings().weight.T
    return logits[:, token]


def _scale(norm: Any, stream: Tensor) -> Tensor:  # [N, 1]
    return rms(norm, stream).to(stream.dtype)
