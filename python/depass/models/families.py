"""The model families: for each, where its modules are and how its weights are stored. Nothing else knows a family.

A family is a list of module paths. ``bind`` resolves them on one model and gives every layer's projections and norms in
one shape, whatever the family: fused weights are slices, GPT-2's transposed ones are turned, ``1 + w`` is added up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "rms_plus_one", "layer"]
ValueRows = Literal["all", "last", "last_of_head"]
GateRows = Literal["all", "first_half"]


@dataclass(frozen=True)
class Family:
    """Where a decoder-only model keeps what the decomposition needs. Paths in a layer are relative to the layer.

    Attributes:
        backbone: the model without its head.
        layers: the list of layers, relative to the backbone.
        final_norm: relative to the backbone.
        attention: the module that calls the attention function.
        value, output: the attention's projections.
        gate: what makes the pre-activations: the gate of a gated MLP, the up projection of an ungated one.
        down: the MLP's output projection.
        attention_norm, mlp_norm: norms on a sublayer's input, or None.
        attention_post_norm, mlp_post_norm: norms on a sublayer's output, or None.
        norm: ``rms``, ``rms_plus_one`` (weights stored as ``w`` for ``1 + w``) or ``layer`` (LayerNorm).
        value_rows: where the value weights lie: ``all`` of a projection of their own, the ``last`` rows of a fused
            ``q, k, v``, or the ``last_of_head`` where every head's ``q, k, v`` lie together.
        gate_rows: ``all``, or the ``first_half`` of a fused ``gate, up``.
        parallel: name of the config's flag that puts attention and MLP side by side, or None.
    """

    backbone: str = "model"
    layers: str = "layers"
    final_norm: str = "norm"
    attention: str = "self_attn"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    down: str = "mlp.down_proj"
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    norm: NormKind = "rms"
    value_rows: ValueRows = "all"
    gate_rows: GateRows = "all"
    parallel: str | None = None


LLAMA = Family()
GEMMA = Family(
    mlp_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    norm="rms_plus_one",
)
FAMILIES: dict[str, Family] = {  # by the config's model_type
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": Family(
        value="self_attn.qkv_proj", value_rows="last", gate="mlp.gate_up_proj", gate_rows="first_half"
    ),
    "olmo2": Family(
        attention_norm=None,
        mlp_norm=None,
        attention_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    ),
    "starcoder2": Family(gate="mlp.c_fc", down="mlp.c_proj", norm="layer"),
    "gpt2": Family(
        backbone="transformer", layers="h", final_norm="ln_f", attention="attn", value="attn.c_attn", value_rows="last",
        output="attn.c_proj", gate="mlp.c_fc", down="mlp.c_proj", attention_norm="ln_1", mlp_norm="ln_2", norm="layer",
    ),
    "gpt_neox": Family(
        backbone="gpt_neox", final_norm="final_layer_norm", attention="attention", value="attention.query_key_value",
        value_rows="last_of_head", output="attention.dense", gate="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
        norm="layer", parallel="use_parallel_residual",
    ),
}  # fmt: skip
