"""The model families: the module paths of each, and how its weights are stored. No other module depends on a family.

``bind`` resolves a family's paths on one model and gives projections and norms the same form for every family: it slices
fused weights, transposes those of GPT-2 and adds the 1 of ``1 + w``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "rms_plus_one", "layer"]
ValueRows = Literal["all", "last", "last_of_head"]
GateRows = Literal["all", "first_half"]


@dataclass(frozen=True)
class Family:
    """The module paths of a decoder-only model built from pre- or post-norm residual sublayers.

    The paths of a layer's modules are relative to the layer.

    Attributes:
        backbone: the path of the model without its head.
        layers: the path of the list of layers, relative to the backbone.
        final_norm: the path of the final norm, relative to the backbone.
        attention: the path of the module that calls the attention function.
        value, output: the paths of the attention's value and output projections.
        gate: the path of the projection that computes the pre-activations: the gate of a gated MLP, or the up projection
            of an ungated one.
        down: the path of the MLP's down projection.
        attention_norm, mlp_norm: the paths of the norms on the sublayers' inputs, or None.
        attention_post_norm, mlp_post_norm: the paths of the norms on the sublayers' outputs, or None.
        norm: ``rms``, ``rms_plus_one`` (an RMSNorm that stores ``w`` and multiplies by ``1 + w``) or ``layer``
            (LayerNorm).
        value_rows: the rows of ``value`` that hold the value weights: ``all``, the ``last`` ones of a fused ``q, k, v``,
            or ``last_of_head`` if the ``q, k, v`` of each head are stored together.
        gate_rows: the rows of ``gate`` that hold the gate weights: ``all``, or the ``first_half`` of a fused ``gate, up``.
        parallel: whether attention and MLP both read the layer's input: True, False, or the name of the config's flag.
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
    parallel: str | bool = False


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
