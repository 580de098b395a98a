"""Converts the GGUF file of the default model, SmolLM2-135M-Instruct, into the format that transformers loads.

transformers' own GGUF loader gives the same weights bit for bit, but another tokenizer: it does not know this model's way
to split text, so white space before digits becomes other tokens, and before its version 5.23 every text gets a BOS token.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import ModelError, OptionError


def require(what: str) -> None:
    """Check that the package that the conversion needs is installed.

    Raises:
        OptionError: it is missing.
    """
    if find_spec("gguf") is None:
        raise OptionError(f"{what} needs gguf: pip install 'depass-kernels[demo]'")


def convert(source: Path, target: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer's files from a llama GGUF."""
    import gguf
    import torch
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(source)

    def read(key: str) -> Any:
        return reader.get_field(key).contents()

    heads, kv_heads = read("llama.attention.head_count"), read("llama.attention.head_count_kv")
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    parts = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    for layer in range(read("llama.block_count")):
        for short, long in parts.items():
            names[f"blk.{layer}.{short}.weight"] = f"model.layers.{layer}.{long}.weight"
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:  # GGUF interleaves the two halves of a rotary pair
            count = heads if ".attn_q." in tensor.name else kv_heads
            weight = weight.reshape(count, -1, 2, weight.shape[1]).swapaxes(1, 2).flatten(0, 2).contiguous()
        weights[names.pop(tensor.name)] = weight
    if names:
        raise ModelError(f"the default model's file lacks {', '.join(names)}")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})

    bos, eos = read("tokenizer.ggml.bos_token_id"), read("tokenizer.ggml.eos_token_id")
    vocabulary = read("tokenizer.ggml.tokens")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "torch_dtype": "float32",
        "vocab_size": len(vocabulary), "hidden_size": read("llama.embedding_length"),
        "intermediate_size": read("llama.feed_forward_length"), "num_hidden_layers": read("llama.block_count"),
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_act": "silu",
        "max_position_embeddings": read("llama.context_length"), "rope_theta": read("llama.rope.freq_base"),
        "rms_norm_eps": read("llama.attention.layer_norm_rms_epsilon"), "tie_word_embeddings": True,
        "bos_token_id": bos, "eos_token_id": eos,
    }  # fmt: skip
    _save_tokenizer(vocabulary, read("tokenizer.ggml.merges"), read("tokenizer.ggml.token_type"), target)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": vocabulary[bos], "eos_token": vocabulary[eos],
        "chat_template": read("tokenizer.chat_template"), "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }  # fmt: skip
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1))
    (target / "config.json").write_text(json.dumps(config, indent=1))


def _save_tokenizer(vocabulary: list[str], merges: list[str], types: list[int], target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    control = 3  # GGUF's token type of special tokens
    pairs = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(vocabulary, types, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(target / "tokenizer.json"))
