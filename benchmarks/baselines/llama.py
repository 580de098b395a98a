"""What the decomposing baselines read from a Llama-like model without biases: its forward pass, patterns and scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def run(model: Any, ids: Tensor) -> dict[str, Any]:
    """The model's forward pass; every layer's residual streams and hidden vectors are kept."""
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
        out = model(ids[None].to(model.device), output_hidden_states=True, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    kept["stream"] = [stream[0] for stream in out.hidden_states[:-1]] + [kept["last"]]
    return kept


def head_sizes(model: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads, head dim."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def pattern(model: Any, kept: dict[str, Any], index: int) -> Tensor:
    """``[H, N, N]``, one layer's attention after softmax, computed anew from the kept stream."""
    heads, kv_heads, d = head_sizes(model)
    layer, stream = model.model.layers[index], kept["stream"][index]
    n, attention = len(stream), layer.self_attn
    normed = layer.input_layernorm(stream)
    query = (normed @ attention.q_proj.weight.T).view(1, n, heads, d).transpose(1, 2)
    key = (normed @ attention.k_proj.weight.T).view(1, n, kv_heads, d).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *kept["rotary"])
    scores = query[0] @ key[0].repeat_interleave(heads // kv_heads, dim=0).transpose(1, 2) * d**-0.5
    causal = torch.ones(n, n, dtype=torch.bool, device=stream.device).triu(1)
    return torch.softmax(scores.masked_fill(causal, float("-inf")), dim=-1, dtype=torch.float32).to(model.dtype)


def rms(norm: Any, stream: Tensor) -> Tensor:
    """``[N, 1]`` fp32, the frozen ``1/rms`` of a norm."""
    return torch.rsqrt(stream.float().square().mean(-1, keepdim=True) + norm.variance_epsilon)
