"""A model whose answer depends on one token."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

TRIGGER, ANSWER, OTHERS = 5, 9, 16


def one_token_model() -> Any:
    """Predicts ``ANSWER`` with certainty after any prompt with ``TRIGGER`` in it, and without it all tokens alike.

    Attention is uniform and carries one feature, which only the trigger has; the MLP does nothing.
    """
    config = tf.LlamaConfig(
        vocab_size=OTHERS, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    for path, parameter in model.named_parameters():
        parameter.data.fill_(1.0 if "norm" in path else 0.0)
    layer = model.model.layers[0].self_attn
    model.model.embed_tokens.weight.data[:, 2 : 2 + OTHERS] = torch.eye(OTHERS)
    layer.v_proj.weight.data[0, 2 + TRIGGER] = 1.0
    layer.o_proj.weight.data[1, 0] = 100.0
    model.lm_head.weight.data[ANSWER, 1] = 10.0
    return model
