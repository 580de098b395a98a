"""The model families: the module paths of each, and how its weights are stored. No other module depends on a family.

``bind`` resolves a family's paths on one model and gives projections and norms the same form for every family: it slices
fused weights, transposes those of GPT-2 and adds the 1 of ``1 + w``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

NormKind = Literal["rms", "rms_plus_one", "layer", "layer_plus_one"]
ValueRows = Literal["all", "last", "last_of_head", "middle_of_four", "end_of_head"]
GateRows = Literal["all", "first_half"]
MixGateRows = Literal["all", "second_of_head"]
RecurrenceKind = Literal["delta_rule", "state_space"]
Factor = Literal[
    "value_input", "output", "recurrence_input", "recurrence_value", "recurrence_output", "gate", "down"
]  # fmt: skip
Origin = Literal["declared", "inferred", "given"]  # by the list, by a trial pass, by the caller


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
        attention_norm, mlp_norm: the paths of the norms on the sublayers' inputs, or None. Both may be the same norm.
        parallel_mlp_norm: the path of the norm on the MLP's input in models whose config sets the flag ``parallel``, if
            it is another one there.
        attention_post_norm, mlp_post_norm: the paths of the norms on the sublayers' outputs, or None. An ``nn.Identity``
            in their place is no norm.
        norm: ``rms``, ``layer`` (LayerNorm), or one of these that stores ``w`` and multiplies by ``1 + w``:
            ``rms_plus_one``, ``layer_plus_one``. A norm without a weight multiplies by 1.
        epsilon: the epsilon of norms whose modules hold none.
        value_rows: the rows of ``value`` that hold the value weights: ``all``, the ``last`` ones of a fused ``q, k, v``,
            ``last_of_head`` if the ``q, k, v`` of each head are stored together, ``middle_of_four`` if four blocks
            hold ``q, v, k`` each, or ``end_of_head`` if the keys and values of each head are stored together and have
            other widths.
        gate_rows: the rows of ``gate`` that hold the gate weights: ``all``, or the ``first_half`` of a fused ``gate, up``.
        value_of_keys: the path of the key projection, whose output is the values too in layers without ``value``; or None.
        value_norm: the path of an RMSNorm on each head's values, or None.
        shared_values: the name of the flag of the module ``attention`` that is true in layers that take the keys and values
            of an earlier layer: of the last one with the same entry in the config's ``layer_types`` that has its own.
        latent, latent_norm: the paths of the projection, and of the norm on its first outputs, whose result ``value`` reads
            in place of the residual stream (multi-head latent attention), or None.
        mix_gate: the path of the projection the sigmoid of whose output multiplies what the heads mix, number by number or
            head by head, or None.
        mix_gate_rows: the rows of ``mix_gate`` that hold this gate: ``all``, or ``second_of_head`` if the query and the
            gate of each head are stored together.
        mix_norm: the path of an RMSNorm on what the heads mix, or None.
        sinks: the path of the attention sinks, one a head, that scale what the heads mix; or None. Sinks inside the
            softmax are part of the pattern and are not declared.
        recurrence: the path of the module that some layers have in the place of attention or beside it, whose mixing is
            linear in its values (linear attention); or None. Its parts have the names that transformers gives them.
        recurrence_kind: what it computes: a gated ``delta_rule``, or a ``state_space`` (Mamba-2).
        experts: the path of the routed experts, in the layers that have them; other layers have ``gate`` and ``down``.
        shared_gate, shared_down: the paths of the projections of the MLP beside the experts that every position goes
            through, where a layer has one; ``gate_rows`` holds for it too.
        shared_weight: the path of the projection the sigmoid of whose output, one number a position, multiplies that MLP's
            output, or None.
        experts_norm: the path of the norm on the experts' input; None where they read what ``mlp_norm`` gives.
        experts_post_norm, shared_post_norm: the paths of norms on the output of the experts and on that of the MLP beside
            them, before their sum; or None.
        input_router: the path of the router whose first output ``[P, E]``, zero where a position did not choose an expert,
            multiplies each expert's input; None where a router's weights multiply the experts' outputs.
        late_gate, late_down, late_post_norm: the paths of the projections of a branch behind the MLP, where a layer has it,
            and of the norm on its output: ``down(act(gate(x)) ⊙ e)``, added to the stream ``x``, where ``e`` is a frozen
            vector of each token (per-layer embeddings).
        layer_scalar: the path of the number that multiplies the residual stream at a layer's end, or None.
        parallel: whether attention and MLP both read the layer's input: True, False, or the name of the config's flag.
        single: whether a layer has one sublayer alone: attention, a recurrence, an MLP or experts. A layer has the one whose
            modules it has, and the norms of that one.
        factors: pairs of a part and the config's number by which the model multiplies it (``mlp_multipliers.0`` is the first
            of several). ``value_input`` and ``recurrence_input`` are what attention and recurrence read,
            ``recurrence_value`` the recurrence's values before their convolution, ``gate`` the pre-activations, and
            ``output``, ``recurrence_output`` and ``down`` what the sublayers write.
        residual_factor: the name of the config's number that multiplies what a sublayer adds to the residual stream.
        logit_factor, logit_divisor: the names of the config's numbers that the head's output is multiplied and divided by.
        requires: pairs of a name and the value that it must have in the config; models with another are refused.
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
    parallel_mlp_norm: str | None = None
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    norm: NormKind = "rms"
    epsilon: float | None = None
    value_rows: ValueRows = "all"
    gate_rows: GateRows = "all"
    value_of_keys: str | None = None
    value_norm: str | None = None
    shared_values: str | None = None
    latent: str | None = None
    latent_norm: str | None = None
    mix_gate: str | None = None
    mix_gate_rows: MixGateRows = "all"
    mix_norm: str | None = None
    sinks: str | None = None
    recurrence: str | None = None
    recurrence_kind: RecurrenceKind = "delta_rule"
    experts: str | None = None
    shared_gate: str | None = None
    shared_down: str | None = None
    shared_weight: str | None = None
    experts_norm: str | None = None
    experts_post_norm: str | None = None
    shared_post_norm: str | None = None
    input_router: str | None = None
    late_gate: str | None = None
    late_down: str | None = None
    late_post_norm: str | None = None
    layer_scalar: str | None = None
    parallel: str | bool = False
    single: bool = False
    factors: tuple[tuple[Factor, str], ...] = ()
    residual_factor: str | None = None
    logit_factor: str | None = None
    logit_divisor: str | None = None
    requires: tuple[tuple[str, object], ...] = ()


def written(family: Family) -> str:
    """A family as Python code, with the fields that differ from Llama's, one a line."""
    differing = [each.name for each in fields(family) if getattr(family, each.name) != each.default]
    lines = "".join(f"    {name}={getattr(family, name)!r},\n" for name in differing)
    return f"Family(\n{lines})" if lines else "Family()"


LLAMA = Family()
GEMMA = Family(
    mlp_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    norm="rms_plus_one",
)
GEMMA4 = replace(
    GEMMA, norm="rms", value_of_keys="self_attn.k_proj", value_norm="self_attn.v_norm", layer_scalar="layer_scalar",
    experts="experts", shared_gate="mlp.gate_proj", shared_down="mlp.down_proj",
    experts_norm="pre_feedforward_layernorm_2", experts_post_norm="post_feedforward_layernorm_2",
    shared_post_norm="post_feedforward_layernorm_1", shared_values="is_kv_shared_layer",
    late_gate="per_layer_input_gate", late_down="per_layer_projection", late_post_norm="post_per_layer_input_norm",
)  # fmt: skip
OLMO2 = Family(
    attention_norm=None,
    mlp_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
GLM4 = Family(
    gate="mlp.gate_up_proj", gate_rows="first_half", attention_post_norm="post_self_attn_layernorm",
    mlp_post_norm="post_mlp_layernorm",
)  # fmt: skip
COHERE = Family(mlp_norm="input_layernorm", norm="layer", parallel=True, logit_factor="logit_scale")
GPT2 = Family(
    backbone="transformer", layers="h", final_norm="ln_f", attention="attn", value="attn.c_attn", value_rows="last",
    output="attn.c_proj", gate="mlp.c_fc", down="mlp.c_proj", attention_norm="ln_1", mlp_norm="ln_2", norm="layer",
)  # fmt: skip
GPTJ = Family(
    backbone="transformer", layers="h", final_norm="ln_f", attention="attn", value="attn.v_proj", output="attn.out_proj",
    gate="mlp.fc_in", down="mlp.fc_out", attention_norm="ln_1", mlp_norm="ln_1", norm="layer", parallel=True,
)  # fmt: skip
OPT = Family(
    backbone="model.decoder", final_norm="final_layer_norm", output="self_attn.out_proj", gate="fc1", down="fc2",
    attention_norm="self_attn_layer_norm", mlp_norm="final_layer_norm", norm="layer",
)  # fmt: skip
EXPERTS = Family(experts="mlp.experts")
SHARED = replace(EXPERTS, shared_gate="mlp.shared_experts.gate_proj", shared_down="mlp.shared_experts.down_proj")
LLAMA4 = Family(
    gate="feed_forward.gate_proj", down="feed_forward.down_proj", experts="feed_forward.experts",
    input_router="feed_forward.router", shared_gate="feed_forward.shared_expert.gate_proj",
    shared_down="feed_forward.shared_expert.down_proj",
)  # fmt: skip
QWEN2_MOE = Family(
    experts="mlp.experts", shared_gate="mlp.shared_expert.gate_proj", shared_down="mlp.shared_expert.down_proj",
    shared_weight="mlp.shared_expert_gate",
)  # fmt: skip
DEEPSEEK = replace(
    SHARED, latent="self_attn.kv_a_proj_with_mqa", latent_norm="self_attn.kv_a_layernorm", value="self_attn.kv_b_proj",
    value_rows="end_of_head",
)  # fmt: skip
GRANITE = Family(residual_factor="residual_multiplier", logit_divisor="logits_scaling")
GRANITE_MOE = replace(GRANITE, experts="block_sparse_moe.experts")
GRANITE_SHARED = replace(
    GRANITE_MOE, gate_rows="first_half", shared_gate="shared_mlp.input_linear", shared_down="shared_mlp.output_linear"
)
QWEN3_NEXT = replace(
    QWEN2_MOE, norm="rms_plus_one", mix_gate="self_attn.q_proj", mix_gate_rows="second_of_head", recurrence="linear_attn",
)  # fmt: skip
FAMILIES: dict[str, Family] = {  # by the model_type of the text decoder's config
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "ministral": LLAMA,
    "ministral3": LLAMA,
    "seed_oss": LLAMA,
    "cwm": LLAMA,
    "ernie4_5": LLAMA,
    "helium": LLAMA,
    "hunyuan_v1_dense": LLAMA,
    "exaone": LLAMA,
    "internlm3": LLAMA,
    "iquestcoder": LLAMA,
    "qwen2_vl_text": LLAMA,
    "qwen2_5_vl_text": LLAMA,
    "qwen3_vl_text": LLAMA,
    "granite": GRANITE,
    "granite_swa": replace(GRANITE, sinks="self_attn.sinks"),
    "hyperclovax": Family(
        attention_post_norm="post_norm1", mlp_post_norm="post_norm2", residual_factor="residual_multiplier",
        logit_factor="logits_scaling",
    ),
    "gemma": Family(norm="rms_plus_one"),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gemma4_text": GEMMA4,
    "vaultgemma": Family(mlp_norm="pre_feedforward_layernorm", norm="rms_plus_one"),
    "phi3": Family(
        value="self_attn.qkv_proj", value_rows="last", gate="mlp.gate_up_proj", gate_rows="first_half"
    ),
    "glm": Family(gate="mlp.gate_up_proj", gate_rows="first_half"),
    "glm4": GLM4,
    "glm4v_text": GLM4,
    "olmo": Family(norm="layer", epsilon=1e-5, requires=(("clip_qkv", None),)),
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "exaone4": OLMO2,
    "arcee": Family(gate="mlp.up_proj"),
    "apertus": Family(gate="mlp.up_proj", attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm"),
    "nanochat": Family(gate="mlp.fc1", down="mlp.fc2"),
    "nemotron": Family(gate="mlp.up_proj", norm="layer_plus_one"),
    "jais2": Family(gate="mlp.up_proj", norm="layer"),
    "starcoder2": Family(gate="mlp.c_fc", down="mlp.c_proj", norm="layer"),
    "stablelm": Family(norm="layer", parallel="use_parallel_residual", parallel_mlp_norm="input_layernorm"),
    "cohere": COHERE,
    "cohere2": COHERE,
    "phi": Family(
        final_norm="final_layernorm", output="self_attn.dense", gate="mlp.fc1", down="mlp.fc2",
        mlp_norm="input_layernorm", norm="layer", parallel=True,
    ),
    "persimmon": Family(
        final_norm="final_layernorm", value="self_attn.query_key_value", value_rows="last_of_head",
        output="self_attn.dense", gate="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", norm="layer",
    ),
    "gpt2": GPT2,
    "gpt_bigcode": replace(GPT2, requires=(("multi_query", True),)),
    "gpt_neox": Family(
        backbone="gpt_neox", final_norm="final_layer_norm", attention="attention", value="attention.query_key_value",
        value_rows="last_of_head", output="attention.dense", gate="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
        norm="layer", parallel="use_parallel_residual",
    ),
    "gptj": GPTJ,
    "codegen": replace(GPTJ, value="attn.qkv_proj", value_rows="middle_of_four"),
    "opt": replace(OPT, requires=(("do_layer_norm_before", True), ("_remove_final_layer_norm", False))),
    "biogpt": replace(OPT, backbone="biogpt", final_norm="layer_norm"),
    "bitnet": Family(mix_norm="self_attn.attn_sub_norm"),
    "youtu": replace(DEEPSEEK, experts=None, shared_gate=None, shared_down=None),
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "qwen3_vl_moe_text": EXPERTS,
    "olmoe": replace(EXPERTS, requires=(("clip_qkv", None),)),
    "flex_olmo": replace(OLMO2, experts="mlp.experts"),
    "minimax_m2": EXPERTS,
    "mellum": EXPERTS,
    "gpt_oss": EXPERTS,
    "phimoe": replace(EXPERTS, norm="layer"),
    "qwen2_moe": QWEN2_MOE,
    "llama4_text": LLAMA4,
    "glm4_moe": SHARED,
    "glm4v_moe_text": SHARED,
    "dots1": SHARED,
    "ernie4_5_moe": SHARED,
    "exaone_moe": SHARED,
    "solar_open": SHARED,
    "hy_v3": SHARED,
    "hunyuan_v1_moe": replace(
        EXPERTS, shared_gate="mlp.shared_mlp.gate_proj", shared_down="mlp.shared_mlp.down_proj"
    ),
    "afmoe": replace(
        SHARED, mix_gate="self_attn.gate_proj", attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_mlp_layernorm", mlp_post_norm="post_mlp_layernorm",
    ),
    "cohere2_moe": replace(
        COHERE, experts="mlp.experts", requires=(("num_shared_experts", 0), ("rms_norm_eps", None)),
    ),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "glm4_moe_lite": DEEPSEEK,
    "granitemoe": GRANITE_MOE,
    "granitemoeshared": GRANITE_SHARED,
    "granitemoe_swa": replace(GRANITE_SHARED, sinks="self_attn.sinks"),
    "granitemoehybrid": replace(
        GRANITE_SHARED, gate="shared_mlp.input_linear", down="shared_mlp.output_linear", recurrence="mamba",
        recurrence_kind="state_space",
    ),
    "bamba": Family(
        final_norm="final_layernorm", gate="feed_forward.gate_proj", down="feed_forward.down_proj",
        mlp_norm="pre_ff_layernorm", recurrence="mamba", recurrence_kind="state_space",
    ),
    "nemotron_h": Family(
        final_norm="norm_f", attention="mixer", value="mixer.v_proj", output="mixer.o_proj", gate="mixer.up_proj",
        down="mixer.down_proj", attention_norm="norm", mlp_norm="norm", recurrence="mixer",
        recurrence_kind="state_space", experts="mixer.experts", shared_gate="mixer.shared_experts.up_proj",
        shared_down="mixer.shared_experts.down_proj", single=True, requires=(("moe_latent_size", None),),
    ),
    "falcon_h1": Family(
        final_norm="final_layernorm", gate="feed_forward.gate_proj", down="feed_forward.down_proj",
        mlp_norm="pre_ff_layernorm", recurrence="mamba", recurrence_kind="state_space",
        factors=(
            ("value_input", "attention_in_multiplier"), ("output", "attention_out_multiplier"),
            ("recurrence_input", "ssm_in_multiplier"), ("recurrence_value", "ssm_multipliers.1"),
            ("recurrence_output", "ssm_out_multiplier"), ("gate", "mlp_multipliers.0"), ("down", "mlp_multipliers.1"),
        ),
        logit_factor="lm_head_multiplier",
    ),
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5_moe_text": QWEN3_NEXT,
    "qwen3_5_text": replace(QWEN3_NEXT, experts=None, shared_gate=None, shared_down=None, shared_weight=None),
}  # fmt: skip

_NO_INTERFACE = "its attention does not call transformers' AttentionInterface, which gives DePass the attention pattern"
UNSUPPORTED: dict[str, str] = {  # by model_type: why no declaration fits
    "falcon": _NO_INTERFACE,
    "gpt_neo": _NO_INTERFACE,
    "bloom": _NO_INTERFACE,
    "mpt": _NO_INTERFACE,
    "xglm": _NO_INTERFACE,
    "diffllama": "its heads subtract two attention patterns, and a norm stands between them and the output projection",
    "lfm2": "some of its layers have a convolution in place of attention",
    "gemma3n_text": "its layers carry several residual streams, which they mix",
    "doge": "its layers scale the residual stream itself",
    "paligemma": "its attention looks ahead in the prompt, whose tokens all read each other",
    "minicpm3": "it scales the vectors that its head reads",
}
