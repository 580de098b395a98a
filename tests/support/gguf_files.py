"""Small GGUF files, written with the gguf package from the random models as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import gguf
import models
import numpy as np
import tokens

# what a GGUF file cannot say of these models is what transformers assumes
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # architecture, and the random model's config
    "llama": ("llama", {}),
    "llama-tied-wide-heads": ("llama", {}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 256}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 256, "num_hidden_layers": 7, "layer_types": None}),
    "phi3-sliding": ("phi3", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "gpt2": ("gpt2", {"n_inner": 128, "n_positions": 1024}),
}
NORMAL, CONTROL = 1, 3  # types of tokens


def write(
    path: str | os.PathLike[str],
    name: str = "llama",
    *,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    architecture: str | None = None,
    tokenizer: bool = True,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    without: str | None = None,
) -> Any:
    """Write a random model, whose tokenizer is that of ``tokens.make``, and return the model.

    ``change`` may add to the file. ``architecture`` is written instead of the true one. ``kind``: how matrices are stored.
    ``without``: a tensor that is left out.
    """
    true, others = MODELS[name]
    model = models.make(name, **others)
    writer = gguf.GGUFWriter(os.fspath(path), architecture or true)
    _add_sizes(writer, model.config)
    if tokenizer:
        _add_tokenizer(writer, tokens.make())
    change(writer)
    for key, tensor in tensors(model, true).items():
        if key == without:
            continue
        matrix = tensor.ndim > 1 and tensor.shape[-1] % 32 == 0
        stored = kind if matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(key, gguf.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def tensors(model: Any, architecture: str) -> dict[str, np.ndarray[Any, Any]]:
    """The weights under their names in GGUF, as llama.cpp stores them."""
    config = model.config
    kinds = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    stored = {}
    for path, parameter in model.state_dict().items():
        if path == "lm_head.weight" and config.tie_word_embeddings:
            continue
        key = names.get_name(path, try_suffixes=(".weight", ".bias"))
        assert key is not None, path
        weight = parameter.float().numpy().copy()
        if architecture == "llama" and (
            "q_proj" in path or "k_proj" in path
        ):  # the two halves of a rotary pair alternate
            heads = config.num_attention_heads if "q_proj" in path else config.num_key_value_heads
            weight = weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        if architecture.startswith("gemma") and path.endswith("norm.weight"):
            weight = weight + 1
        if architecture == "gpt2" and ".c_" in path and path.endswith(".weight"):
            weight = weight.T
        stored[key] = np.ascontiguousarray(weight)
    return stored


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.n_inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-6))
    writer.add_layer_norm_eps(getattr(config, "norm_epsilon", getattr(config, "layer_norm_epsilon", 1e-5)))
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(rope.get("rope_theta") or rope.get("full_attention", {}).get("rope_theta", 10000.0))
    if getattr(config, "sliding_window", None) is not None:
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "final_logit_softcapping", None) is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    pieces += [f"[PAD{index}]" for index in range(len(pieces), models.VOCABULARY)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([CONTROL if piece in ("<pad>", "<bos>", "<eos>") else NORMAL for piece in pieces])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(pieces.index("<bos>"))
    writer.add_eos_token_id(pieces.index("<eos>"))
    writer.add_pad_token_id(pieces.index("<pad>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
