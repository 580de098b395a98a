"""The model families: for each, where its modules are and how its weights are stored. Nothing else knows a family.

A family is a list of module paths. :func:`bind` resolves them on one model and gives every layer's projections and norms
in one shape, whatever the family: fused weights are slices, GPT-2's transposed ones are turned, ``1 + w`` is added up.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import weights
from .errors import ModelError


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
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    value_rows: Literal["all", "last", "last_of_head"] = "all"
    gate_rows: Literal["all", "first_half"] = "all"
    parallel: str | None = None


_CHOICES = {
    "norm": ("rms", "rms_plus_one", "layer"),
    "value_rows": ("all", "last", "last_of_head"),
    "gate_rows": ("all", "first_half"),
}
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


@dataclass(frozen=True)
class Norm:
    """A norm as the decomposition sees it: ``γ``, ``β`` and the frozen scale of a captured input."""

    module: Any  # its attributes are the family's
    kind: str

    def gamma(self, dtype: torch.dtype) -> Tensor:  # [D]
        """The weight that multiplies the normed vector."""
        weight = weights.dense(self.module)
        assert weight is not None
        weight = weight.to(dtype)
        return weight + 1 if self.kind == "rms_plus_one" else weight

    def beta(self) -> Tensor | None:  # [D]
        """The bias, which belongs to the bias source."""
        return weights.dense(self.module, "bias")

    def scale(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``1/rms`` or ``1/σ`` of whole vectors ``[..., D]``, in ``dtype``: the frozen number of design section 1."""
        x = x.to(dtype)
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        epsilon: float = self.module.eps if hasattr(self.module, "eps") else self.module.variance_epsilon
        return torch.rsqrt(x.square().mean(-1) + epsilon)

    def of_parts(self, parts: Tensor, scale: Tensor) -> Tensor:
        """Parts ``[..., D]`` of vectors, normed with the frozen ``scale`` ``[..., 1]`` of the whole; ``β`` is in none."""
        parts = parts - parts.mean(-1, keepdim=True) if self.kind == "layer" else parts
        return parts * scale * self.gamma(parts.dtype).to(parts.device)

    def fold(self, weight: Tensor) -> Tensor:
        """``W`` such that ``W x = weight · γ ⊙ centre(x)``, for weights ``[out, D]``: a norm without a pass over x."""
        weight = weight * self.gamma(weight.dtype)
        return weight - weight.mean(1, keepdim=True) if self.kind == "layer" else weight


def into_stream(weight: Tensor, post_norm: Norm | None, dtype: torch.dtype) -> Tensor:
    """A projection's weight ``[D, in]`` in ``dtype`` with the ``γ`` of the norm on its output, whose scale is left out."""
    weight = weight.to(dtype)
    return weight if post_norm is None else weight * post_norm.gamma(dtype)[:, None]


@dataclass(frozen=True)
class Projection:
    """Some output rows of a linear layer, as ``[out, in]``."""

    module: Any
    rows: str = "all"
    heads: int = 1

    @property
    def weight(self) -> Tensor:
        """``[out, in]`` where its layer works: a view of the model's own or, offloaded or quantised, a copy of one's own."""
        weight = weights.dense(self.module)
        assert weight is not None
        return self._select(self._turned(weight))

    @property
    def shape(self) -> torch.Size:
        """``[out, in]``; the weight is not read."""
        module = self.module
        if not weights.is_packed(module):
            return self._select(self._turned(module.weight)).shape
        return self._select(torch.empty(module.out_features, module.in_features, device="meta")).shape

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, or None."""
        bias = weights.dense(self.module, "bias")
        return None if bias is None else self._select(bias)

    def _turned(self, weight: Tensor) -> Tensor:
        # transformers' Conv1D keeps [in, out]; nn.Linear and its likes keep [out, in]
        return weight.T if type(self.module).__name__ == "Conv1D" else weight

    def select_output(self, output: Tensor) -> Tensor:
        """The projection's part ``[P, out]`` of the module's own output ``[P, all]``."""
        return self._select(output.T).T

    def _select(self, rows: Tensor) -> Tensor:
        if self.rows == "first_half":
            return rows[: len(rows) // 2]
        if self.rows == "last_of_head":
            return rows.reshape(self.heads, 3, -1, *rows.shape[1:])[:, 2].flatten(0, 1)
        if self.rows.startswith("last:"):
            return rows[-int(self.rows[5:]) :]
        return rows


@dataclass(frozen=True)
class Layer:
    """One layer's modules, and what of them a decomposition reads."""

    module: nn.Module
    attention: nn.Module
    value: Projection
    output: Projection
    gate: Projection
    down: Projection
    attention_norm: Norm | None
    mlp_norm: Norm | None
    attention_post_norm: Norm | None
    mlp_post_norm: Norm | None

    @property
    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        """What of its weights a decomposition multiplies by."""
        return self.value, self.output, self.gate, self.down

    @property
    def device(self) -> torch.device:
        """Where it works."""
        return weights.device_of(self.down.module)

    def has_bias(self) -> bool:
        """Whether anything in this layer adds to the stream without reading it."""
        norms = (norm for norm in (self.attention_norm, self.mlp_norm) if norm is not None)
        return any(p.bias is not None for p in self.projections) or any(norm.beta() is not None for norm in norms)


@dataclass(frozen=True)
class BoundModel:
    """A model with its family's paths resolved."""

    model: Any
    name: str
    backbone: Any
    layers: tuple[Layer, ...]
    final_norm: Norm
    heads: int
    parallel: bool
    has_bias: bool
    max_positions: int | None
    configs: tuple[Any, ...] = field(repr=False)
    stream_to: torch.device | None = None  # where the layers work whose weights stay elsewhere

    @property
    def widest_layer(self) -> Layer:
        """The layer with the most neurons: blocks that hold its gates hold every layer's."""
        return max(self.layers, key=lambda layer: layer.gate.shape[0])

    @property
    def head(self) -> Any:
        """The unembedding, looked up anew: it is another module after ``resize_token_embeddings``."""
        return self.model.get_output_embeddings()

    @property
    def unembedding(self) -> Projection:
        """The head's weight and bias."""
        return Projection(self.head)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's output ``[..., V]`` for vectors ``[..., D]`` after the final norm, wherever they lie."""
        made: Tensor = self.head(hidden.to(weights.device_of(self.head)))
        return made

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the head scores."""
        return self.unembedding.shape[0]

    @property
    def width(self) -> int:
        """``D``, of the residual stream."""
        return self.unembedding.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights or, where they are quantised, of its residual stream."""
        module = self.layers[0].value.module
        weight: Tensor = (self.model.get_input_embeddings() if weights.is_packed(module) else module).weight
        return weight.dtype

    @property
    def is_quantized(self) -> bool:
        """Whether any layer's weights are."""
        return any(weights.is_packed(projection.module) for layer in self.layers for projection in layer.projections)

    @property
    def device(self) -> torch.device:
        """Where the last layer works."""
        return self.stream_to or self.layers[-1].device

    @property
    def devices(self) -> list[torch.device]:
        """Where any layer works."""
        return [self.stream_to] if self.stream_to else list(dict.fromkeys(layer.device for layer in self.layers))

    @property
    def input_device(self) -> torch.device:
        """Where the tokens' ids go in."""
        return weights.device_of(self.model.get_input_embeddings())

    @property
    def product_dtype(self) -> torch.dtype:
        """That of the decomposition's matrix products: the weights', or fp32 on a CPU that would only emulate theirs."""
        return self.product_dtype_on(self.device)

    def product_dtype_on(self, device: torch.device) -> torch.dtype:
        """What :attr:`product_dtype` is where the model lies on ``device``."""
        return torch.float32 if device.type == "cpu" and not multiplies_on_cpu(self.dtype) else self.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """What the state accumulates in: fp32, or fp64 for fp64 models."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def tolerance(self) -> float:
        """By how much, of their size, sums of parts may miss what they are parts of.

        Of quantised models whose kernels round the activations to 8 bits as much as of bf16, which keeps as many.
        """
        modules = [part.module for layer in self.layers for part in layer.projections]
        if any(weights.rounds_inputs(module) for module in modules):
            return 5e-2
        dtypes = {self.dtype, *(getattr(module, "compute_dtype", None) or self.dtype for module in modules)}
        return max({torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2}.get(dtype, 5e-2) for dtype in dtypes)


@cache
def multiplies_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of ``dtype``; without them fp32 is several times as fast."""
    instructions = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }.get(dtype)
    if instructions is None or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return any(getattr(torch.cpu, name, lambda: False)() for name in instructions)


def bind(model: Any, family: Family | None = None, empty: bool = False) -> BoundModel:
    """Resolve a family's paths on ``model``.

    Args:
        model: a causal language model of HuggingFace transformers.
        family: the declaration to use; by the config's ``model_type`` without it.
        empty: whether its weights may be shapes only (on the meta device): enough to plan, not to run.

    Raises:
        ModelError: no decoder-only language model, an unknown family, or a path that the model does not have.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"expected a HuggingFace causal language model, got {type(model).__name__}")
    config, name = model.config, type(model).__name__
    kind, head = config.model_type, model.get_output_embeddings()
    _refuse_other_kinds(config, name)
    if head is None:
        raise ModelError(f"{name} has no language-model head; load it with AutoModelForCausalLM")
    family = FAMILIES.get(kind) if family is None else family
    if family is None:
        looked = ", ".join(f"{'+' if _has(model, path) else '-'}{path}" for path in _example_paths(LLAMA))
        raise ModelError(
            f"unknown model family {kind!r} ({name}); known: {', '.join(FAMILIES)}. Of the Llama family's paths it has (+) "
            f"and lacks (-): {looked}. Describe it with depass.Family and pass family=..."
        )
    if not isinstance(family, Family):
        raise ModelError(f"family must be a depass.Family, got {type(family).__name__}")
    for field_name, choices in _CHOICES.items():
        if getattr(family, field_name) not in choices:
            raise ModelError(f"Family({field_name}={getattr(family, field_name)!r}): there are {', '.join(choices)}")
    missing = [path for path in _example_paths(family) if not _has(model, path)]
    if missing:
        raise ModelError(f"{name} ({kind}) lacks what its family was looked up by: {', '.join(missing)}")
    if family.norm == "layer" and (family.attention_post_norm or family.mlp_post_norm):
        raise ModelError("a LayerNorm on a sublayer's output is not supported; norms on outputs must be RMSNorms")
    if not empty:
        _refuse_absent(model, name)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for factor in ("logits_scaling", "logit_scale", "residual_multiplier"):
        if getattr(text, factor, None) not in (None, 1, 1.0):
            raise ModelError(f"{name} scales by {factor}={getattr(text, factor)}, which no family here describes")
    if family.parallel is not None and not hasattr(text, family.parallel):
        raise ModelError(f"Family(parallel={family.parallel!r}): the config of {name} has no such flag")
    if getattr(text, "add_cross_attention", False):
        raise ModelError(f"{name} has cross-attention, whose inputs are no part of the residual stream")
    if getattr(text, "use_bidirectional_attention", False):
        raise ModelError(f"{name} looks ahead (use_bidirectional_attention); DePass needs causal attention")
    heads: int = text.num_attention_heads
    backbone: Any = model.get_submodule(family.backbone)
    blocks = list(backbone.get_submodule(family.layers))
    if len(set(map(id, blocks))) < len(blocks):
        raise ModelError(f"{name} uses one module for several layers; DePass needs a module for each")
    if not empty:
        _refuse_unreadable(blocks, head, family, config, name)
    layers = tuple(_bind_layer(layer, family, heads) for layer in blocks)
    final_norm = Norm(backbone.get_submodule(family.final_norm), family.norm)
    norms = [getattr(layer, f.name) for layer in layers for f in fields(layer) if f.name.endswith("_norm")]
    for module in [norm.module for norm in (*norms, final_norm) if norm is not None]:
        if getattr(module, "weight", None) is None or not (
            hasattr(module, "eps") or hasattr(module, "variance_epsilon")
        ):
            raise ModelError(
                f"a norm of {name} ({type(module).__name__}) has no weight or no eps; no family describes that"
            )
    biased = any(layer.has_bias() for layer in layers)
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return BoundModel(
        model=model,
        name=getattr(config, "name_or_path", "") or name,
        backbone=backbone,
        layers=layers,
        final_norm=final_norm,
        heads=heads,
        parallel=bool(family.parallel and getattr(text, family.parallel)),
        has_bias=biased or final_norm.beta() is not None or getattr(head, "bias", None) is not None,
        max_positions=getattr(text, "max_position_embeddings", None),
        configs=tuple(configs.values()),
    )


def _bind_layer(layer: Any, family: Family, heads: int) -> Layer:
    def norm(path: str | None) -> Norm | None:
        return None if path is None else Norm(layer.get_submodule(path), family.norm)

    output = Projection(layer.get_submodule(family.output))
    fused = layer.get_submodule(family.value)
    rows: str = family.value_rows
    if rows == "last":  # q has as many rows as the output projection has columns; k and v halve the others
        rows = f"last:{(Projection(fused).shape[0] - output.shape[1]) // 2}"
    return Layer(
        module=layer,
        attention=layer.get_submodule(family.attention),
        value=Projection(fused, rows, heads),
        output=output,
        gate=Projection(layer.get_submodule(family.gate), family.gate_rows),
        down=Projection(layer.get_submodule(family.down)),
        attention_norm=norm(family.attention_norm),
        mlp_norm=norm(family.mlp_norm),
        attention_post_norm=norm(family.attention_post_norm),
        mlp_post_norm=norm(family.mlp_post_norm),
    )


_LOAD_DENSE = (
    f"known are {' and '.join(weights.QUANTIZATIONS)}, not offloaded: load the unquantised weights, with "
    "quantization='4bit' where memory is short"
)


def _refuse_absent(model: Any, name: str) -> None:
    """Raise a ModelError where weights are shapes alone, which nothing brings when they are needed."""
    for path, module in model.named_modules():
        if not weights.is_offloaded(module) and any(tensor.is_meta for tensor in weights.own_tensors(module)):
            raise ModelError(
                f"the weights of {path} of {name} are offloaded where no hook of accelerate brings them; load it with "
                "from_pretrained(device_map=...)"
            )


def _refuse_unreadable(blocks: Sequence[Any], head: Any, family: Family, config: Any, name: str) -> None:
    """Raise a ModelError where weights cannot be had as numbers, or a layer's lie on several devices."""
    for index, block in enumerate(blocks):
        devices = set()
        for part in ("value", "output", "gate", "down"):
            module = block.get_submodule(getattr(family, part))
            _refuse_adapter(module, f"the {part} projection of layer {index} of {name}")
            if not weights.is_readable(module):
                said = _said_of(module, config)
                raise ModelError(f"the {part} projection of layer {index} of {name} holds {said}; {_LOAD_DENSE}")
            devices.add(str(weights.device_of(module)))
        if len(devices) > 1:
            where = " and ".join(sorted(devices))
            raise ModelError(f"layer {index} of {name} lies on {where}; give each layer one device in the device_map")
    _refuse_adapter(head, f"the head of {name}")
    if not weights.is_readable(head):
        raise ModelError(f"the head of {name} holds {_said_of(head, config)}; {_LOAD_DENSE}")


def _refuse_adapter(module: Any, which: str) -> None:
    """Raise a ModelError where an adapter adds to a module's output, which its weight does not say."""
    if hasattr(module, "base_layer"):
        raise ModelError(f"{which} has an adapter ({type(module).__name__}); merge it first: model.merge_and_unload()")


def _said_of(module: Any, config: Any) -> str:
    """What a module's weights are, which are none that are known."""
    method = quantization_method(getattr(config, "quantization_config", None))
    weight = getattr(module, "weight", None)
    held = f"{weight.dtype} weights of shape {list(weight.shape)}" if isinstance(weight, Tensor) else "no weight"
    return f"{held} ({type(module).__name__}{f', quantised by {method}' if method else ''})"


def quantization_method(given: Any) -> str | None:
    """The method that a quantisation config of transformers names (``gptq``), or None where there is no config."""
    if given is None:
        return None
    entries = given if isinstance(given, dict) else getattr(given, "__dict__", {})
    method = entries.get("quant_method")
    if method is None:  # as bitsandbytes' were saved at first
        return "bitsandbytes" if any(str(key).startswith("load_in_") for key in entries) else "an unnamed method"
    return str(getattr(method, "value", method))


def _refuse_other_kinds(config: Any, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} ({kind}) is an encoder-decoder model; DePass needs a decoder-only language model")
    if kind not in FAMILIES and kind in MASKED and not getattr(config, "is_decoder", False):
        raise ModelError(f"{name} ({kind}) is an encoder-only model; it predicts no next token to attribute")


def _example_paths(family: Family) -> list[str]:
    """The paths of a family on a model's first layer."""
    first = f"{family.backbone}.{family.layers}.0"
    names = ["attention", "value", "output", "gate", "down"]
    names += [f.name for f in fields(family) if f.name.endswith("_norm") and f.name != "final_norm"]
    inner = [getattr(family, name) for name in names]
    return [f"{family.backbone}.{family.final_norm}", *(f"{first}.{path}" for path in inner if path is not None)]


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
