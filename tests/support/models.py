"""Small random models of every family, whose sharing softmax is neither flat nor one-hot."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from depass import Heads, Modules, Neurons
from depass.models.families import FAMILIES, Family
from depass.rules import PathWeights

VOCABULARY = 101
LAYERS = 3
WINDOW = 5  # shorter than most prompts of the tests

SIZES: dict[str, Any] = {
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
_GEMMA = {**SIZES, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}

_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_inner": 56, "n_layer": LAYERS, "n_head": 4, "n_positions": 320,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPTJ = {**_GPT, "tie_word_embeddings": False}
_BIASED = {**SIZES, "attention_bias": True, "mlp_bias": True}
_NO_GROUPS = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
_WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_FACTORS = {"embedding_multiplier": 0.7, "attention_multiplier": 0.3, "residual_multiplier": 0.4}
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 12, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
}  # fmt: skip

EXPERTS = {**SIZES, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GROUPED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 6, "head_dim": 4, "attention_bias": True,
}  # fmt: skip
_RECURRENT = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_expand": 2,
    "mamba_chunk_size": 8,
}  # fmt: skip
_MAMBA_TYPES = {"layer_types": ["mamba", "attention", "mamba"]}
_NEMOTRON = {  # a layer is a mixer, an MLP or experts
    **_BIASED, "use_bias": True, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2,
    "chunk_size": 8, "head_dim": 8,
}  # fmt: skip
_FALCON = {
    **_BIASED, **_MAMBA, "mamba_d_ssm": 64, "mamba_proj_bias": True, "projectors_bias": True, "embedding_multiplier": 0.7,
    "lm_head_multiplier": 0.6, "key_multiplier": 0.8, "attention_in_multiplier": 1.3, "attention_out_multiplier": 0.7,
    "ssm_in_multiplier": 0.8, "ssm_out_multiplier": 1.2, "ssm_multipliers": [0.9, 1.4, 0.7, 1.2, 0.8],
    "mlp_multipliers": [1.5, 0.6],
}  # fmt: skip
_LOCAL = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}

# keys and values of layer 0 in layer 2, a branch behind the MLP
_GEMMA4 = {
    **SIZES, "head_dim": 8, "global_head_dim": 12, "sliding_window": WINDOW, "tie_word_embeddings": True,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
_LATE = {"hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": VOCABULARY}
_GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
_LLAMA4 = {
    **_LOCAL, "head_dim": 8, "intermediate_size": 24, "intermediate_size_mlp": 56, "moe_layers": [0, 2],
    "no_rope_layers": [1, 0, 1], "attention_chunk_size": WINDOW, "floor_scale": 3, "attn_scale": 0.4,
    "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
}  # fmt: skip

# name: (class prefix, config), of the families that the installed transformers has
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "llama-biased": ("Llama", _BIASED),
    "llama-tied-wide-heads": ("Llama", {**SIZES, "head_dim": 12, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {**SIZES, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {**SIZES, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_GEMMA, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 4.0}),
    "gemma3": ("Gemma3", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "phi3": ("Phi3", {**SIZES, "sliding_window": None}),
    "phi3-sliding": ("Phi3", {**SIZES, "sliding_window": WINDOW}),
    "olmo2": ("Olmo2", SIZES),
    "starcoder2": ("Starcoder2", {**SIZES, "sliding_window": WINDOW}),
    "gpt2": ("GPT2", _GPT),
    "gpt-neox": ("GPTNeoX", {**_NO_GROUPS, "use_parallel_residual": True}),
    "gpt-neox-sequential": ("GPTNeoX", {**_NO_GROUPS, "use_parallel_residual": False}),
    # factors on what sublayers add and on logits; with norms on outputs
    "granite": ("Granite", {**_BIASED, **_FACTORS, "logits_scaling": 3.0}),
    "hyperclovax": ("HyperCLOVAX", {**_BIASED, **_FACTORS, "logits_scaling": 1.7, "use_post_norm": True, "head_dim": 8}),
    "olmo": ("Olmo", SIZES),  # LayerNorms without weight and epsilon
    "nemotron": ("Nemotron", _BIASED),  # LayerNorms that store w and multiply by 1 + w
    # one norm for attention and MLP, biases everywhere; a factor on logits; values in the middle of fused weights
    "phi": ("Phi", {**SIZES, "qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "cohere": ("Cohere", {**SIZES, "attention_bias": True, "use_qk_norm": True, "logit_scale": 0.3}),
    "codegen": ("CodeGen", {**_GPTJ, "n_head": 8, "rotary_dim": 2}),
    # a norm on what the heads mix, and on the hidden vector
    "bitnet": ("BitNet", SIZES),
    # experts with a dense layer between; with a weighted MLP beside; with biases, interleaved weights and sinks; with an
    # MLP beside and values projected twice; with a factor on what sublayers add
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "num_experts": 6, "mlp_only_layers": [1], "head_dim": 8}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32}),
    "gpt_oss": ("GptOss", {**_LOCAL, "intermediate_size": 24, "head_dim": 8, "sliding_window": WINDOW}),
    "deepseek_v3": ("DeepseekV3", {**EXPERTS, **GROUPED, **_LATENT, "num_local_experts": 4}),
    "granitemoeshared": (
        "GraniteMoeShared",
        {**_LOCAL, **_FACTORS, "logits_scaling": 3.0, "intermediate_size": 24, "shared_intermediate_size": 32},
    ),
    # norms on values, shared keys and values, a branch and a factor behind the MLP; experts with norms of their own, keys
    # that are the values; weights on the experts' inputs
    "gemma4": ("Gemma4", {**_GEMMA4, **_LATE, "num_kv_shared_layers": 1, "final_logit_softcapping": 5.0}),
    "gemma4-experts": (
        "Gemma4",
        {**_GEMMA4, **_GEMMA4_EXPERTS, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True,
         "num_global_key_value_heads": 1},
    ),
    "llama4": ("Llama4", _LLAMA4),
    # linear attention in two layers of three: a gated delta rule, with a gate on the other's attention; Mamba-2
    "qwen3_next": (
        "Qwen3Next", {**EXPERTS, **_RECURRENT, "num_experts": 4, "shared_expert_intermediate_size": 32},
    ),
    "granitemoehybrid-mamba": (
        "GraniteMoeHybrid",
        {**_LOCAL, **_FACTORS, **_MAMBA, **_MAMBA_TYPES, "logits_scaling": 3.0, "intermediate_size": 24,
         "shared_intermediate_size": 32},
    ),
    # layers with one sublayer: attention, experts with an MLP beside, Mamba-2; and attention and Mamba-2 side by side,
    # with a factor on each part
    "nemotron_h": (
        "NemotronH",
        {**_NEMOTRON, **EXPERTS, "n_routed_experts": 4, "moe_shared_expert_intermediate_size": 32,
         "layers_block_type": ["full_attention", "moe", "linear_attention"]},
    ),
    "falcon_h1": ("FalconH1", _FALCON),
}  # fmt: skip
# Families that differ from those of CONFIGS by paths, and by switches that CONFIGS have too. The tests that take longest
# leave them out; tests/depass/test_families.py has shorter ones.
SIMILAR: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm3": ("SmolLM3", {**_BIASED, "no_rope_layer_interval": 2}),
    "ministral": ("Ministral", {**SIZES, **_WINDOWS, "head_dim": 8}),
    "ministral3": ("Ministral3", {**SIZES, "head_dim": 8, "sliding_window": None, "rope_parameters": _YARN}),
    "seed_oss": ("SeedOss", {**_BIASED, "head_dim": 12, "attention_out_bias": True}),
    "cwm": ("Cwm", {**SIZES, **_WINDOWS, "head_dim": 8}),
    "ernie4_5": ("Ernie4_5", {**SIZES, "head_dim": 8, "use_bias": True}),
    "helium": ("Helium", {**_BIASED, "head_dim": 8}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {**SIZES, "attention_bias": True, "head_dim": 8}),
    "exaone": ("Exaone", {**SIZES, "mlp_bias": True}),
    "internlm3": ("InternLM3", {**_BIASED, "head_dim": 8}),
    "iquestcoder": ("IQuestCoder", _BIASED),
    "hyperclovax-without-post-norms": ("HyperCLOVAX", {**SIZES, **_FACTORS, "logits_scaling": 1.7, "use_post_norm": False}),
    "gemma": ("Gemma", {**SIZES, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "vaultgemma": ("VaultGemma", {**_GEMMA, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 4.0}),
    "glm": ("Glm", {**SIZES, "head_dim": 8, "attention_bias": True, "partial_rotary_factor": 0.5}),
    "glm4": ("Glm4", {**SIZES, "head_dim": 8, "attention_bias": True, "partial_rotary_factor": 0.5}),
    "olmo3": ("Olmo3", {**SIZES, **_WINDOWS, "attention_bias": True}),
    "exaone4": ("Exaone4", {**SIZES, **_WINDOWS, "head_dim": 8}),
    "arcee": ("Arcee", {**_BIASED, "head_dim": 8}),
    "apertus": ("Apertus", {**SIZES, "attention_bias": True}),
    "nanochat": ("NanoChat", {**SIZES, "attention_bias": True, "final_logit_softcapping": 5.0}),  # norms without weight
    "jais2": ("Jais2", {**_BIASED, "head_dim": 8}),
    "stablelm": ("StableLm", {**SIZES, "use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True}),
    "stablelm-sequential": ("StableLm", {**SIZES, "use_parallel_residual": False, "qk_layernorm": True}),
    "cohere2": ("Cohere2", {**SIZES, **_WINDOWS, "attention_bias": True, "logit_scale": 0.3}),
    "gptj": ("GPTJ", {**_GPTJ, "rotary_dim": 4}),
    "gpt_bigcode": ("GPTBigCode", {**_GPT, "multi_query": True}),
    "persimmon": ("Persimmon", {**_NO_GROUPS, "qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "opt": ("OPT", {**_NO_GROUPS, "ffn_dim": 56, "word_embed_proj_dim": 32}),  # its MLP reads [B·T, D]
    "biogpt": ("BioGpt", _NO_GROUPS),
    "mixtral": ("Mixtral", {**_LOCAL, "intermediate_size": 24, "sliding_window": WINDOW}),
    "olmoe": ("Olmoe", {**EXPERTS, "num_experts": 4, "intermediate_size": 24}),
    "minimax_m2": ("MiniMaxM2", {**_LOCAL, "intermediate_size": 24, "head_dim": 8}),
    "phimoe": ("Phimoe", {**_LOCAL, "intermediate_size": 24, "attention_bias": True, "lm_head_bias": True}),
    "glm4_moe": ("Glm4Moe", {**EXPERTS, **GROUPED, "head_dim": 8, "n_shared_experts": 1}),
    "glm4_moe_lite": ("Glm4MoeLite", {**EXPERTS, **GROUPED, **_LATENT}),
    "dots1": ("Dots1", {**EXPERTS, **GROUPED, "head_dim": 8, "n_shared_experts": 1}),
    "deepseek_v2": ("DeepseekV2", {**EXPERTS, **GROUPED, **_LATENT, "n_shared_experts": 2}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "use_bias": True},
    ),
    "granitemoe": ("GraniteMoe", {**_LOCAL, **_FACTORS, "logits_scaling": 3.0, "intermediate_size": 24}),
    "granite_swa": ("GraniteSWA", {**_BIASED, **_FACTORS, **_WINDOWS, "logits_scaling": 3.0}),
    "granitemoe_swa": (
        "GraniteMoeSWA",
        {**_LOCAL, **_FACTORS, **_WINDOWS, "logits_scaling": 3.0, "intermediate_size": 24, "shared_intermediate_size": 32},
    ),
    "qwen3_5_text": ("Qwen3_5", {**SIZES, **_RECURRENT}),
    "qwen3_5_moe_text": (
        "Qwen3_5Moe", {**EXPERTS, **_RECURRENT, "num_experts": 4, "shared_expert_intermediate_size": 32},
    ),
    "bamba": ("Bamba", {**SIZES, **_MAMBA, "attn_layer_indices": [1], "mamba_proj_bias": True}),
    "nemotron_h-dense": ("NemotronH", {**_NEMOTRON, "layers_block_type": ["linear_attention", "full_attention", "mlp"]}),
    "falcon_h1-normed": ("FalconH1", {**_FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    "falcon_h1-normed-before-gate": ("FalconH1", {**_FALCON, "mamba_rms_norm": True}),
    "granitemoehybrid": (  # without Mamba layers
        "GraniteMoeHybrid",
        {**_LOCAL, **_FACTORS, "logits_scaling": 3.0, "intermediate_size": 24, "shared_intermediate_size": 32,
         "mamba_n_heads": 4, "layer_types": ["full_attention"] * LAYERS},
    ),
    "granitemoehybrid-without-experts": (
        "GraniteMoeHybrid",
        {**SIZES, **_FACTORS, "logits_scaling": 3.0, "num_local_experts": 0, "shared_intermediate_size": 32,
         "mamba_n_heads": 4, "layer_types": ["full_attention"] * LAYERS},
    ),
    "youtu": ("Youtu", {**SIZES, **_LATENT}),
    "flex_olmo": ("FlexOlmo", {**EXPERTS, "num_experts": 4, "intermediate_size": 24}),
    "mellum": (
        "Mellum", {**EXPERTS, **_WINDOWS, "num_experts": 4, "head_dim": 8, "mlp_layer_types": ["sparse", "dense", "sparse"]},
    ),
    "exaone_moe": ("ExaoneMoe", {**EXPERTS, **_WINDOWS, **GROUPED, "num_experts": 4, "head_dim": 8}),
    "solar_open": ("SolarOpen", {**EXPERTS, **GROUPED, "head_dim": 8, "n_shared_experts": 1}),
    "hy_v3": (
        "HYV3", {**EXPERTS, "num_experts": 4, "head_dim": 8, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {**SIZES, "num_experts": 4, "moe_topk": 2, "intermediate_size": 24, "head_dim": 8}),
    "afmoe": ("Afmoe", {**EXPERTS, **_WINDOWS, "num_experts": 4, "num_shared_experts": 1, "head_dim": 8}),
    "cohere2_moe": (
        "Cohere2Moe",
        {**EXPERTS, **_WINDOWS, "num_experts": 4, "head_dim": 8, "logit_scale": 0.3, "intermediate_size": 24,
         "prefix_dense_intermediate_size": 48, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
}  # fmt: skip
# runs in fp32 only: the family's own code refuses other dtypes
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-upcast": (
        "GPT2",
        {**{key: value for key, value in _GPT.items() if key != "n_inner"}, "reorder_and_upcast_attn": True,
         "scale_attn_by_inverse_layer_idx": True},
    ),
}  # fmt: skip
# families with a config of their own, whose model is Llama's
_MODELS = dict.fromkeys(("Exaone", "InternLM3", "IQuestCoder"), "Llama")
# the first transformers with a family whose attention calls the interface; the others are older than OLDEST
SINCE = {
    "ernie4_5": "4.54", "exaone4": "4.54", "gpt_bigcode": "4.54", "apertus": "4.56", "hunyuan_v1_dense": "4.56",
    "seed_oss": "4.56", "qwen3_vl_text": "4.57",
    "ministral": "4.57", "olmo3": "4.57", "vaultgemma": "4.57", "cwm": "5.0", "jais2": "5.0", "ministral3": "5.0",
    "nanochat": "5.0", "stablelm": "5.0", "hyperclovax": "5.9", "nemotron": "5.13", "internlm3": "5.23",
    "iquestcoder": "5.23", "codegen": "5.24", "exaone": "5.24", "gptj": "5.24", "youtu": "5.1",
    # experts, whose modules say since 5.7 how they store their weights
    **dict.fromkeys(
        ("mixtral", "qwen3_moe", "qwen3_vl_moe_text", "olmoe", "flex_olmo", "minimax_m2", "gpt_oss", "phimoe", "qwen2_moe",
         "glm4_moe", "glm4v_moe_text", "dots1", "ernie4_5_moe", "exaone_moe", "solar_open", "hy_v3", "hunyuan_v1_moe",
         "afmoe", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"), "5.7",
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "bamba"), "5.7"),  # older ones: not tried
    **dict.fromkeys(("nemotron_h", "falcon_h1"), "5.24"),  # older ones: not tried
    "cohere2_moe": "5.9", "mellum": "5.10", "granitemoe": "5.13", "granitemoeshared": "5.13", "granitemoehybrid": "5.13",
    "granite_swa": "5.15", "granitemoe_swa": "5.15",
    "gemma4_text": "5.24", "gemma4": "5.24", "llama4_text": "5.24", "llama4": "5.24",  # older ones: not tried
}  # fmt: skip
OLDEST = "4.53"  # of the supported transformers


def since(name: str) -> str:
    """The first supported transformers whose model of this name runs."""
    return next((version for family, version in SINCE.items() if name.split("-")[0] == family), OLDEST)


def runs(name: str) -> bool:
    """Whether the installed transformers runs the model of this name."""
    return _numbers(since(name)) <= _numbers(tf.__version__)


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


NOT_HERE = [name for name in (*CONFIGS, *SIMILAR) if not runs(name)]
CONFIGS = {name: config for name, config in CONFIGS.items() if runs(name)}
SIMILAR = {name: config for name, config in SIMILAR.items() if runs(name)}
EVERY = {**CONFIGS, **SIMILAR}
RECURRENT = [
    name for name, (_, sizes) in EVERY.items() if {"linear_key_head_dim", "mamba_d_state", "ssm_state_size"} & {*sizes}
]
WITH_EXPERTS = [name for name, (_, sizes) in EVERY.items() if {"num_experts_per_tok", "top_k_experts"} & {*sizes}]
LENDING = [name for name, (_, sizes) in EVERY.items() if sizes.get("num_kv_shared_layers")]

# families whose norms compute in fp32 whatever the dtype; in fp64 the others conserve to rounding
_IN_FP64 = (
    "gpt2", "gpt_b", "gpt-", "gptj", "codegen", "nemotron", "phi", "stablelm", "persimmon", "opt", "biogpt", "jais2",
)  # fmt: skip
NORMS_IN_FP32 = tuple(
    name for name in EVERY if not name.startswith(_IN_FP64) or name.startswith(("phi3", "nemotron_h"))
)


def takes(name: str, weights: PathWeights) -> bool:
    """Whether a linear rule is defined for the model: linear attention refuses those that weigh queries, keys or values."""
    return name not in RECURRENT or (not weights.steers and weights.v == 1)


def holds(bound: Any, spec: Any) -> bool:
    """Whether a spec's layer has such components: layers with experts have no neurons, and some have one sublayer."""
    if isinstance(spec, (Heads, Neurons, Modules)):
        layer = bound.layers[spec.layer]
        if isinstance(spec, Neurons):
            return layer.experts is None and layer.mlp is not None
        of_attention = isinstance(spec, Heads) or spec.module == "attn"
        return bool(layer.mixers) if of_attention else layer.has_mlp
    return True


def adds_one(norm: torch.nn.Module) -> bool:
    """Whether an RMSNorm of transformers stores ``w`` and multiplies by ``1 + w``."""
    name = type(norm).__name__
    return "Gemma4" not in name and any(family in name for family in ("Gemma", "Qwen3Next", "Qwen3_5"))


def make(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, **others: Any) -> Any:
    """A random model in eval mode: weights, norm weights and biases all random and nonzero. ``others``: of its config."""
    prefix, sizes = {**EVERY, **OTHERS}[name]
    sizes = {**sizes, **others}
    if prefix == "GPTNeoX":
        sizes.pop("num_key_value_heads", None)
    config_class = {name: f"{name}TextConfig" for name in ("Gemma3", "Gemma4", "Llama4", "Qwen3_5", "Qwen3_5Moe")}.get(
        prefix, f"{prefix}Config"
    )
    model_class = f"{_MODELS.get(prefix, prefix)}ForCausalLM"
    model_class = {"GPT2ForCausalLM": "GPT2LMHeadModel"}.get(model_class, model_class)
    config = getattr(tf, config_class)(**sizes)
    config._attn_implementation = "eager"
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # torch's grouped products refuse fp64
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(tf, model_class)(config).to(torch.float64)
        fill(model, FAMILIES[config.model_type])
    return model.to(dtype).to(device).eval()


def fill(model: Any, family: Family) -> None:
    """Make all parameters random and nonzero, at sizes that suit their places."""
    for path, parameter in model.named_parameters():
        parameter.data.copy_(_values(path, parameter, family))
    for path, buffer in model.named_buffers():
        if path.endswith(".layer_scalar"):
            buffer.copy_(0.6 + torch.rand_like(buffer))


def uncapped(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """A model's logits before its head's soft cap, which is what scores add up to."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.atanh(logits / cap)


def _values(path: str, parameter: torch.Tensor, family: Family) -> torch.Tensor:
    shape, normal = parameter.shape, torch.randn_like(parameter)
    if "norm" in path or ".ln_" in path or "layernorm" in path:
        return 0.2 * normal + (0 if path.endswith("bias") else 1)
    if path.endswith("bias"):
        return 0.1 * normal
    if path.endswith("per_expert_scale"):  # multiplies the router's weights
        return 1 + 0.2 * normal
    if any(part in path for part in ("embed", ".wte", ".wpe", "lm_head", "output_projection")):
        return normal
    inner = shape[0] if ".c_" in path else shape[-1]  # GPT-2 keeps [in, out]
    if family.experts is not None and f".{family.experts}." in path:  # [experts, out, in], gpt_oss [experts, in, out]
        is_first = "up_proj" in path
        return (0.6 if is_first else 0.8) * normal / (32 if is_first else 24) ** 0.5 * (1 if len(shape) == 3 else 0.3)
    # pre-activations of a few times the temperature, so that a softmax over the sources has something to choose
    outputs = (family.output, family.down)
    gain = 0.4 if family.gate in path else 0.8 if any(part in path for part in outputs) else 1.5
    return gain * normal / inner**0.5


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ids, none of them special."""
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
