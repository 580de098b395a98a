"""Small random models with a text decoder inside, by name; their vision parts are as small as they can be."""

from __future__ import annotations

from typing import Any

import models
import torch
import transformers as tf

from depass.models.bind import bind

IMAGE, VIDEO = models.VOCABULARY, models.VOCABULARY + 1  # of no prompt of models
PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "head_dim": 8, "image_size": 8, "patch_size": 4,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
}  # fmt: skip
SIGLIP = {
    **{name: value for name, value in CLIP.items() if name != "projection_dim"},
    "model_type": "siglip_vision_model",
}
QWEN2 = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1, "patch_size": 4}
QWEN2_5 = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
    "fullatt_block_indexes": [0],
}  # fmt: skip
QWEN3 = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 3, "vision_end_token_id": 4}
_GLM = {**_IDS, "image_start_token_id": 3, "image_end_token_id": 4, "video_start_token_id": 5, "video_end_token_id": 6}
_INDEX = {"image_token_index": IMAGE}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_MROPE = {("rope_parameters" if int(tf.__version__[0]) >= 5 else "rope_scaling"): _ROPE}

# name: (class prefix, the small model of models.py with the text decoder's config or None, more of that config, vision
# config, more of the whole config)
EVERY: dict[str, tuple[str, str | None, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("Gemma3", "gemma3", {}, SIGLIP, {**_INDEX, "image_token_id": IMAGE, "mm_tokens_per_image": 1}),
    "llava-llama": ("Llava", "llama-biased", {}, CLIP, _INDEX),
    "llava-mistral": ("Llava", "mistral", {}, CLIP, _INDEX),
    "mistral3": ("Mistral3", "mistral", {}, PIXTRAL, _INDEX),
    "qwen2_vl": ("Qwen2VL", None, _MROPE, QWEN2, _IDS),
    "qwen2_5_vl": ("Qwen2_5_VL", None, _MROPE, QWEN2_5, _IDS),
    "glm4v": (
        "Glm4v",
        None,
        {**_MROPE, "pad_token_id": 0},
        {**QWEN2_5, "spatial_merge_size": 1, "image_size": 8},
        _GLM,
    ),
    "qwen3_vl": ("Qwen3VL", None, {**_MROPE, "head_dim": 8}, QWEN3, _IDS),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        None,
        {**_MROPE, **models.EXPERTS, "num_experts": 4, "head_dim": 8},
        QWEN3,
        _IDS,
    ),
    "glm4v_moe": (
        "Glm4vMoe",
        None,
        {
            **models.EXPERTS,
            **models.GROUPED,
            "n_shared_experts": 1,
            "head_dim": 8,
            "rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0},
        },
        {**QWEN2_5, "spatial_merge_size": 1, "image_size": 8},
        _GLM,
    ),
}
NOT_HERE = [
    name for name, (prefix, *_) in EVERY.items() if not (hasattr(tf, f"{prefix}Config") and models.runs(f"{name}_text"))
]
NAMES = [name for name in EVERY if name not in NOT_HERE]


def config_of(name: str, **others: Any) -> Any:
    """The configuration of a model; ``others`` are of its text part."""
    prefix, kind, more, vision, ids = EVERY[name]
    own = models.EVERY[kind][1] if kind else models.SIZES
    sizes = {**own, "vocab_size": models.VOCABULARY + 2, **more, **others}
    if kind:
        sizes["model_type"] = models.make(kind).config.model_type
    config = getattr(tf, f"{prefix}Config")(text_config=sizes, vision_config=dict(vision), **ids)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    return config


def make(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, **others: Any) -> Any:
    """A random model in eval mode, whose text decoder has weights as those of ``models.make``."""
    config = config_of(name, **others)
    config._attn_implementation = "eager"
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # torch's grouped products refuse fp64
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(tf, f"{EVERY[name][0]}ForConditionalGeneration")(config).to(torch.float64)
        models.fill(model, bind(model).family)
    return model.to(dtype).to(device).eval()
