"""Small random models of every family, whose sharing softmax is neither flat nor one-hot."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

VOCABULARY = 101
LAYERS = 3
WINDOW = 5  # shorter than most prompts of the tests

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 320,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {**_SIZES, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (class prefix, config)
    "llama": ("Llama", _SIZES),
    "llama-biased": ("Llama", {**_SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama-tied-wide-heads": ("Llama", {**_SIZES, "head_dim": 12, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {**_SIZES, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {**_SIZES, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**_SIZES, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_GEMMA, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 4.0}),
    "gemma3": ("Gemma3", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "phi3": ("Phi3", {**_SIZES, "sliding_window": None}),
    "phi3-sliding": ("Phi3", {**_SIZES, "sliding_window": WINDOW}),
    "olmo2": ("Olmo2", _SIZES),
    "starcoder2": ("Starcoder2", {**_SIZES, "sliding_window": WINDOW}),
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_inner": 56, "n_layer": LAYERS, "n_head": 4, "n_positions": 320,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt-neox": ("GPTNeoX", {**_SIZES, "use_parallel_residual": True}),
    "gpt-neox-sequential": ("GPTNeoX", {**_SIZES, "use_parallel_residual": False}),
}  # fmt: skip
# runs in fp32 only: the family's own code refuses other dtypes
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-upcast": (
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 320, "bos_token_id": 1,
         "eos_token_id": 2, "reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    ),
}  # fmt: skip

# families whose norms compute in fp32 whatever the dtype; in fp64 the others conserve to rounding
NORMS_IN_FP32 = tuple(name for name in CONFIGS if not name.startswith("gpt"))


def make(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, **others: Any) -> Any:
    """A random model in eval mode: weights, norm weights and biases all random and nonzero. ``others``: of its config."""
    prefix, sizes = {**CONFIGS, **OTHERS}[name]
    sizes = {**sizes, **others}
    if prefix == "GPTNeoX":
        sizes.pop("num_key_value_heads")
    config_class = {"Gemma3": "Gemma3TextConfig"}.get(prefix, f"{prefix}Config")
    model_class = {"GPT2": "GPT2LMHeadModel"}.get(prefix, f"{prefix}ForCausalLM")
    config = getattr(tf, config_class)(**sizes)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(tf, model_class)(config).to(torch.float64)
        for path, parameter in model.named_parameters():
            parameter.data.copy_(_values(path, parameter))
    return model.to(dtype).to(device).eval()


def _values(path: str, parameter: torch.Tensor) -> torch.Tensor:
    shape, normal = parameter.shape, torch.randn_like(parameter)
    if "norm" in path or ".ln_" in path or "layernorm" in path:
        return 0.2 * normal + (0 if path.endswith("bias") else 1)
    if path.endswith("bias"):
        return 0.1 * normal
    if "embed" in path or ".wte" in path or ".wpe" in path or "lm_head" in path:
        return normal
    inner = shape[0] if ".c_" in path else shape[-1]  # GPT-2 keeps [in, out]
    # pre-activations of a few times the temperature, so that a softmax over the sources has something to choose
    gates = ("gate", "c_fc", "dense_h_to_4h")
    outputs = ("o_proj", "down_proj", "c_proj", "attention.dense", "dense_4h_to_h")
    gain = 0.4 if any(part in path for part in gates) else 0.8 if any(part in path for part in outputs) else 1.5
    return gain * normal / inner**0.5


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ids, none of them special."""
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
