"""The naive decomposition, op for op what the published code does (design: the naive baseline), as a rival
to be measured against: our own code, no short cut and no sabotage. Llama-like models without biases (SmolLM2, Llama).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@torch.no_grad()
def token_scores(model: Any, ids: Tensor, token: int, temperature: float = 0.1) -> Tensor:
    """``[N]``, the contribution of each of the prompt's tokens to the last position's logit of ``token``."""
    n, kept = len(ids), _run(model, ids)
    # one row per token, and a last one for what is left of the stream
    state = torch.zeros(n + 1, n, model.config.hidden_size, dtype=model.dtype)  # [M + 1, N, D]
    state[torch.arange(n), torch.arange(n)] = kept["stream"][0]
    state[n] = kept["stream"][0] - state[:n].sum(0)
    for index in range(len(model.model.layers)):
        state = _attention(model, state, kept, index)
        state = _mlp(model, state, kept, index, temperature, drop_first=True)
    return _scores(model, state[:n], kept, token)


@torch.no_grad()
def head_scores(model: Any, ids: Tensor, token: int, layer: int, temperature: float = 0.1) -> Tensor:
    """``[H + 1]``, the contributions of the residual stream and of each head of ``layer``, from a pass of its own."""
    config, kept = model.config, _run(model, ids)
    heads = config.num_attention_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // heads
    output = model.model.layers[layer].self_attn.o_proj.weight.view(-1, heads, d)  # [D, H, d]
    mixed = kept["mixed"][layer].view(-1, heads, d)  # [N, H, d]
    state = torch.cat([kept["stream"][layer][None], torch.einsum("nhd,Dhd->hnD", mixed, output)])  # [H + 1, N, D]
    state = _mlp(model, state, kept, layer, temperature, drop_first=False)
    for index in range(layer + 1, len(model.model.layers)):
        state = _attention(model, state, kept, index)
        state = _mlp(model, state, kept, index, temperature, drop_first=False)
    return _scores(model, state, kept, token)


def _attention(model: Any, state: Tensor, kept: dict[str, Any], index: int) -> Tensor:
    config, layer, (m, n, _) = model.config, model.model.layers[index], state.shape
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // heads
    pattern = _pattern(model, layer, kept["stream"][index], kept["rotary"], heads, kv_heads, d)  # [H, N, N]
    scaled = state * _rms(layer.input_layernorm, kept["stream"][index]) * layer.input_layernorm.weight
    values = (scaled @ layer.self_attn.v_proj.weight.T).view(m, n, kv_heads, d)
    values = values.repeat_interleave(heads // kv_heads, dim=2)  # [M, N, H, d]
    output = layer.self_attn.o_proj.weight.view(-1, heads, d)  # [D, H, d]
    projected = torch.einsum("mkhd,Dhd->mkhD", values, output)  # [M, N, H, D]
    return state + torch.einsum("hqk,mkhD->mqD", pattern, projected)


def _mlp(model: Any, state: Tensor, kept: dict[str, Any], index: int, temperature: float, drop_first: bool) -> Tensor:
    layer = model.model.layers[index]
    scaled = state * _rms(layer.post_attention_layernorm, kept["middle"][index])
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
    return state + (share * hidden).to(state.dtype) @ layer.mlp.down_proj.weight.T


def _scores(model: Any, state: Tensor, kept: dict[str, Any], token: int) -> Tensor:
    final = state * _rms(model.model.norm, kept["stream"][-1]) * model.model.norm.weight
    everything = final.to("cpu").transpose(0, 1)  # [N, M, D]
    return (everything[-1] @ model.get_output_embeddings().weight.T)[:, token]


def _run(model: Any, ids: Tensor) -> dict[str, Any]:
    """The model's own pass, with every layer's streams and hidden vectors kept."""
    kept: dict[str, Any] = {"middle": [], "mixed": [], "hidden": [], "rotary": None, "last": None}
    hooks = [
        model.model.norm.register_forward_pre_hook(lambda _, args: kept.update(last=args[0][0])),
        model.model.rotary_emb.register_forward_hook(lambda _, args, out: kept.update(rotary=out)),
    ]
    for layer in model.model.layers:
        hooks.append(
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: kept["middle"].append(args[0][0]))
        )
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: kept["mixed"].append(args[0][0])))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: kept["hidden"].append(args[0][0])))
    try:
        out = model(ids[None], output_hidden_states=True, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    kept["stream"] = [stream[0] for stream in out.hidden_states[:-1]] + [kept["last"]]
    return kept


def _pattern(model: Any, layer: Any, stream: Tensor, rotary: Any, heads: int, kv_heads: int, d: int) -> Tensor:
    n, attention = len(stream), layer.self_attn
    normed = layer.input_layernorm(stream)
    query = (normed @ attention.q_proj.weight.T).view(1, n, heads, d).transpose(1, 2)
    key = (normed @ attention.k_proj.weight.T).view(1, n, kv_heads, d).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    scores = query[0] @ key[0].repeat_interleave(heads // kv_heads, dim=0).transpose(1, 2) * d**-0.5
    causal = torch.ones(n, n, dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(causal, float("-inf")), dim=-1, dtype=torch.float32).to(model.dtype)


def _rms(norm: Any, stream: Tensor) -> Tensor:  # [N, 1]
    return torch.rsqrt(stream.float().square().mean(-1, keepdim=True) + norm.variance_epsilon).to(stream.dtype)
