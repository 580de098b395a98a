"""Checks that a model can be decomposed, and resolves its family's module paths."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from ..errors import ModelError
from . import weights
from .alterations import refuse_compiled
from .bind_layer import bind_layer, config_number, number_of, share_values
from .bound import BoundModel, Norm, Projection, epsilon_of
from .experts import refuse_experts, refuse_other_experts
from .families import FAMILIES, UNSUPPORTED, Factor, Family, Origin
from .infer import InferenceError, compare, infer, known_layers
from .multimodal import is_wrapped, located, placeholders, text_config
from .nearest import nearest
from .packing import counts_positions, takes_positions
from .paths import WRITING, has, has_attention, has_experts, linear_paths, module_paths
from .positions import switches
from .shapes import refuse_shapes

_FACTORS = ("residual_factor", "logit_factor", "logit_divisor")
_TOGETHER = (  # fields that mean nothing without another
    ("shared_gate", "shared_down"), ("shared_down", "shared_gate"), ("shared_weight", "shared_gate"),
    ("shared_gate", "experts"), ("latent_norm", "latent"), ("input_router", "experts"), ("experts_norm", "experts"),
    ("experts_post_norm", "experts"), ("shared_post_norm", "shared_gate"), ("late_gate", "late_down"),
    ("late_down", "late_gate"), ("late_post_norm", "late_gate"),
)  # fmt: skip


def bind(model: Any, family: Family | None = None, empty: bool = False) -> BoundModel:
    """Check that ``model`` can be decomposed, then resolve its family's paths on it.

    Args:
        model: a causal language model of HuggingFace transformers, or a model with one as its text decoder.
        family: the family to use; by default the one of the ``model_type`` of the text decoder's config or, where the list
            has none, the one that a trial pass shows (:mod:`depass.models.infer`).
        empty: whether the weights may be on the meta device, as shapes only; such a model can be planned but not run.

    Raises:
        ModelError: the model is not a decoder-only language model, its family is unknown and cannot be inferred, or it
            lacks a path of its family.
    """
    _refuse_model(model)
    if family is not None:
        return resolve(model, check(model, family, empty), "given")
    family = _listed(model)
    return _inferred(model, empty) if family is None else resolve(model, check(model, family, empty), "declared")


def _inferred(model: Any, empty: bool) -> BoundModel:
    """A model of an unknown type with the family that a trial pass shows, compared on every layer."""
    try:
        if empty:
            raise InferenceError("a trial pass needs its weights")
        if is_wrapped(model.config):
            raise InferenceError("its text decoder is a part of another model")
        if getattr(model.config, "num_hidden_layers", None) == 0:
            raise InferenceError("it has no layers")
        refuse_other_experts(model)
        bound = resolve(model, check(model, infer(model)), "inferred")
        compare(bound)
    except (InferenceError, ModelError) as error:
        evaluate = "; it is in training mode: call model.eval()" if model.training else ""
        near = nearest(model, known_layers(model))
        raise ModelError(
            f"unknown model family {text_config(model.config).model_type!r} ({type(model).__name__}), and it cannot be "
            f"inferred: {error}{evaluate}. {near.said()}. If a depass.Family describes the model, pass "
            f"family={near.written()}"
        ) from error
    return bound


def _refuse_model(model: Any) -> None:
    """Raise a ModelError where a model is not a decoder-only language model of transformers."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"expected a HuggingFace causal language model, got {type(model).__name__}{_inside(model)}")
    name = type(model).__name__
    _refuse_other_kinds(model.config, name)
    if model.get_output_embeddings() is None:
        raise ModelError(f"{name} has no language-model head; load it with AutoModelForCausalLM")


def check(model: Any, family: Family, empty: bool = False) -> Family:
    """Check that a language model can be decomposed, and return its family with the config's flags resolved.

    Arguments and errors as for :func:`bind`.
    """
    config, name, head = model.config, type(model).__name__, model.get_output_embeddings()
    _refuse_declaration(family)
    _refuse_config(config, family, name)
    family = located(model, as_configured(family, text_config(config)))
    _refuse_missing(model, family)
    if not empty:
        _refuse_absent(model, name)
    refuse_compiled(model, family)
    blocks = _blocks(model, family)
    if len(set(map(id, blocks))) < len(blocks):
        raise ModelError(f"{name} uses one module for several layers; DePass needs a separate module for each layer")
    if not empty:
        _refuse_unreadable(blocks, head, family, config, name)
    _refuse_norms(model, family)
    _refuse_width(blocks, head, family, name)
    return family


def as_configured(family: Family, config: Any) -> Family:
    """The family of one model: ``parallel`` is True or False, and ``mlp_norm`` the norm that belongs to it."""
    parallel = bool(getattr(config, family.parallel)) if isinstance(family.parallel, str) else family.parallel
    mlp_norm = family.parallel_mlp_norm if parallel and family.parallel_mlp_norm else family.mlp_norm
    return replace(family, parallel=parallel, mlp_norm=mlp_norm)


def _inside(model: Any) -> str:
    """What to pass instead of an object that holds a model."""
    from transformers import PreTrainedModel

    if isinstance(model, (str, os.PathLike)):
        return f"; load it: DePass.from_pretrained({os.fspath(model)!r})"
    if hasattr(model, "merge_and_unload"):
        return "; merge its adapters first: DePass(model.merge_and_unload())"
    for name in ("_orig_mod", "module", "model"):  # of torch.compile, DataParallel, a pipeline
        if isinstance(getattr(model, name, None), PreTrainedModel):
            return f"; pass the model inside of it: DePass(model.{name})"
    return ""


def resolve(model: Any, family: Family, origin: Origin) -> BoundModel:
    """The modules at a family's paths, for a model and a family that :func:`check` returned.

    Raises:
        ModelError: projections of the family do not fit each other.
    """
    config, head = model.config, model.get_output_embeddings()
    text = text_config(config)
    backbone: Any = model.get_submodule(family.backbone)
    name = getattr(config, "name_or_path", "") or type(model).__name__
    layers = tuple(bind_layer(layer, family, text) for layer in _blocks(model, family))
    layers = share_values(layers, family, text, name)
    refuse_shapes(layers, family, name)
    final_norm = Norm(backbone.get_submodule(family.final_norm), family.norm, family.epsilon)
    biased, found = any(layer.has_bias() for layer in layers), switches(backbone)
    dynamic = any(switch.kind == "dynamic" for switch in found)  # made for prompts beyond the config's positions
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return BoundModel(
        model=model,
        family=family,
        origin=origin,
        name=name,
        backbone=backbone,
        layers=layers,
        final_norm=final_norm,
        parallel=bool(family.parallel),
        has_bias=biased or final_norm.beta() is not None or getattr(head, "bias", None) is not None,
        logit_factor=number_of(text, family.logit_factor),
        logit_divisor=number_of(text, family.logit_divisor),
        logit_cap=getattr(text, "final_logit_softcapping", None),
        max_positions=None if dynamic else getattr(text, "max_position_embeddings", None),
        switches=found,
        is_wrapped=is_wrapped(config),
        placeholders=placeholders(config) if is_wrapped(config) else {},
        # a recurrence does not tell the prompts of one row apart
        takes_positions=takes_positions(backbone)
        and not any(
            mixer.recurrence is not None or counts_positions(mixer.module) for layer in layers for mixer in layer.mixers
        ),
        forwards={type(module): type(module).forward for module in (*backbone.modules(), head)},
        configs=tuple(configs.values()),
    )


def _blocks(model: Any, family: Family) -> list[Any]:
    """The layers' modules, from the first to the last."""
    return list(model.get_submodule(f"{family.backbone}.{family.layers}"))


def _listed(model: Any) -> Family | None:
    """The family of the ``model_type`` of the text decoder's config, or None.

    Raises:
        ModelError: no family describes such models.
    """
    kind = text_config(model.config).model_type
    for each in (model.config.model_type, kind):
        if each in UNSUPPORTED:
            raise ModelError(f"{each!r} models ({type(model).__name__}) are not supported: {UNSUPPORTED[each]}")
    return FAMILIES.get(kind)


def _refuse_declaration(family: Any) -> None:
    """Raise a ModelError where the family is not a Family or has an invalid value."""
    if not isinstance(family, Family):
        raise ModelError(f"family must be a depass.Family, got {type(family).__name__}")
    if not isinstance(family.parallel, (str, bool)):
        raise ModelError(f"Family(parallel={family.parallel!r}): give True, False, or the name of the config's flag")
    for part, needed in _TOGETHER:
        if getattr(family, part) is not None and getattr(family, needed) is None:
            raise ModelError(f"Family({part}={getattr(family, part)!r}) without {needed}: name that too")
    if family.epsilon is not None and not _is_positive(family.epsilon):
        raise ModelError(f"Family(epsilon={family.epsilon!r}): give a positive number, or None")
    pairs = family.requires if isinstance(family.requires, tuple) else (None,)
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise ModelError(f"Family(requires={family.requires!r}): give a tuple of pairs (name in the config, value)")
    _refuse_factors(family)
    hints = get_type_hints(Family).items()
    for field_name, choices in ((name, get_args(hint)) for name, hint in hints if get_origin(hint) is Literal):
        if getattr(family, field_name) not in choices:
            raise ModelError(
                f"Family({field_name}={getattr(family, field_name)!r}): choose one of {', '.join(map(repr, choices))}"
            )


def _refuse_factors(family: Family) -> None:
    """Raise a ModelError where the family's factors are no pairs of a part and a name."""
    parts, pairs = get_args(Factor), family.factors if isinstance(family.factors, tuple) else (None,)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and pair[0] in parts and isinstance(pair[1], str)):
            raise ModelError(
                f"Family(factors={family.factors!r}): give a tuple of pairs (part, name in the config); the parts are "
                f"{', '.join(map(repr, parts))}"
            )


def _is_positive(number: object) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf


def _refuse_missing(model: Any, family: Family) -> None:
    """Raise a ModelError where the model lacks a path of its family, or the family's norms are not supported."""
    _refuse_layers_without_attention(model, family)
    missing = _missing_paths(model, family)
    if missing:
        if family.experts is not None:
            refuse_other_experts(model)
        raise ModelError(
            f"{type(model).__name__} ({model.config.model_type}) lacks modules that its family names; pass a depass.Family "
            f"with the right paths. Missing: {', '.join(missing)}"
        )
    late = [name for name in vars(family) if name.endswith("_post_norm") or name in ("mix_norm", "value_norm")]
    if family.norm.startswith("layer") and any(getattr(family, name) is not None for name in late):
        raise ModelError("a LayerNorm on a sublayer's or the heads' output is not supported; it must be an RMSNorm")


def _refuse_layers_without_attention(model: Any, family: Family) -> None:
    """Raise a ModelError where some layers have something else in place of attention, as those of hybrid models."""
    if family.single:
        return
    blocks = _blocks(model, family) if has(model, f"{family.backbone}.{family.layers}") else []
    mixing = [path for path in (family.attention, family.recurrence) if path is not None]
    lacking = [index for index, block in enumerate(blocks) if not any(has(block, path) for path in mixing)]
    if 0 < len(lacking) < len(blocks):
        raise ModelError(
            f"layer {lacking[0]} of {type(model).__name__} has no attention ({' or '.join(mixing)}), which other layers "
            "have; DePass needs it in every layer"
        )


def _refuse_config(config: Any, family: Family, name: str) -> None:
    """Raise a ModelError where the config enables a feature that the decomposition does not support."""
    text = text_config(config)
    for key, value in family.requires:
        if getattr(text, key, None) != value:
            raise ModelError(
                f"{name} has {key}={getattr(text, key, None)!r}; DePass supports it only with {key}={value!r}"
            )
    declared = {key: getattr(family, key) for key in _FACTORS if getattr(family, key) is not None}
    for key, factor in (*declared.items(), *(("factors", factor) for _, factor in family.factors)):
        if not _is_positive(config_number(text, factor)):
            raise ModelError(
                f"Family({key}={factor!r}): the config of {name} has {factor}={config_number(text, factor)!r}; it must be "
                "a positive number"
            )
    for factor in ("logits_scaling", "logit_scale", "lm_head_multiplier", "residual_multiplier"):
        if factor not in declared.values() and getattr(text, factor, None) not in (None, 1, 1.0):
            raise ModelError(
                f"{name} has {factor}={getattr(text, factor)}, which its family does not declare; name it in "
                f"depass.Family({', '.join(f'{key}=...' for key in _FACTORS)})"
            )
    if isinstance(family.parallel, str) and not hasattr(text, family.parallel):
        raise ModelError(f"Family(parallel={family.parallel!r}): the config of {name} has no such flag")
    if getattr(text, "add_cross_attention", False):
        raise ModelError(
            f"{name} has cross-attention, which DePass does not support: its inputs are not in the residual stream"
        )
    # "vision" is causal in text
    if getattr(text, "use_bidirectional_attention", None) not in (None, False, "vision"):
        raise ModelError(
            f"{name} has bidirectional attention (use_bidirectional_attention); DePass needs causal attention"
        )


def _refuse_norms(model: Any, family: Family) -> None:
    """Raise a ModelError where a norm has no epsilon, or a weight under another name."""
    paths = [(block, path) for block in _blocks(model, family) for part, path in module_paths(block, family).items()
             if part.endswith("_norm")]  # fmt: skip
    norms = [block.get_submodule(path) for block, path in paths]
    norms = [module for module in norms if not isinstance(module, nn.Identity)]
    for module in (*norms, model.get_submodule(f"{family.backbone}.{family.final_norm}")):
        said = f"a norm of {type(model).__name__} ({type(module).__name__})"
        if epsilon_of(module, family.epsilon) is None:
            raise ModelError(f"{said} has no eps; declare it: depass.Family(epsilon=...)")
        others = [name for name, _ in module.named_parameters() if name not in ("weight", "bias")]
        has_weight = getattr(module, "weight", None) is not None
        if others or (family.norm.endswith("plus_one") and not has_weight):
            held = f"holds {', '.join(others)}" if others else "has no weight"
            raise ModelError(f"{said} {held}; a norm of the kind {family.norm!r} has weight and bias")


def _refuse_width(blocks: Sequence[Any], head: Any, family: Family, name: str) -> None:
    """Raise a ModelError where the head reads vectors of another width than the layers write."""
    paths = ((block, linear_paths(block, family)) for block in blocks)
    block, output = next((block, paths[part]) for block, paths in paths for part in WRITING if part in paths)
    written, read = Projection(block.get_submodule(output)).shape[0], Projection(head).shape[1]
    if written != read:
        raise ModelError(
            f"the layers of {name} write vectors of width {written}, but its head reads width {read}; DePass does not "
            "support a projection between the final norm and the head"
        )


_LOAD_DENSE = (
    f"DePass reads weights quantised by {' or '.join(weights.QUANTIZATIONS)} that are not offloaded; otherwise load the "
    "unquantised weights, with quantization='4bit' if memory is short"
)


def _refuse_absent(model: Any, name: str) -> None:
    """Raise a ModelError where weights are on the meta device and no hook loads them when they are needed."""
    for path, module in model.named_modules():
        if not weights.is_offloaded(module) and any(tensor.is_meta for tensor in weights.own_tensors(module)):
            raise ModelError(
                f"the weights of {path} of {name} are offloaded, but no hook of accelerate loads them; load the model with "
                "from_pretrained(device_map=...)"
            )


def _refuse_unreadable(blocks: Sequence[Any], head: Any, family: Family, config: Any, name: str) -> None:
    """Raise a ModelError where weights cannot be read as numbers, or a layer's weights are on several devices."""
    for index, block in enumerate(blocks):
        devices = set()
        for part, path in linear_paths(block, family).items():
            module = block.get_submodule(path)
            _refuse_adapter(module, f"the {part} projection of layer {index} of {name}")
            if not weights.is_readable(module):
                said = _said_of(module, config)
                raise ModelError(f"the {part} projection of layer {index} of {name} holds {said}; {_LOAD_DENSE}")
            devices.add(str(weights.device_of(module)))
        if family.experts is not None and has_experts(block, family):
            experts = block.get_submodule(family.experts)
            refuse_experts(experts, f"the experts of layer {index} of {name}", family.input_router is not None)
            devices.add(str(weights.device_of(experts)))
        if len(devices) > 1:
            where = " and ".join(sorted(devices))
            raise ModelError(
                f"layer {index} of {name} is on {where}; give each layer a single device in the device_map"
            )
    _refuse_adapter(head, f"the head of {name}")
    if not weights.is_readable(head):
        raise ModelError(f"the head of {name} holds {_said_of(head, config)}; {_LOAD_DENSE}")


def _refuse_adapter(module: Any, which: str) -> None:
    """Raise a ModelError where a module has an adapter, which its weight does not include."""
    if hasattr(module, "base_layer"):
        raise ModelError(f"{which} has an adapter ({type(module).__name__}); merge it first: model.merge_and_unload()")


def _said_of(module: Any, config: Any) -> str:
    """Describe the weights of a module that cannot be read."""
    method = quantization_method(getattr(config, "quantization_config", None))
    weight = getattr(module, "weight", None)
    held = f"{weight.dtype} weights of shape {list(weight.shape)}" if isinstance(weight, Tensor) else "no weight"
    return f"{held} ({type(module).__name__}{f', quantised by {method}' if method else ''})"


def quantization_method(given: Any) -> str | None:
    """The method of a transformers quantisation config (``gptq``), or None without a config."""
    if given is None:
        return None
    entries = given if isinstance(given, dict) else getattr(given, "__dict__", {})
    method = entries.get("quant_method")
    if method is None:  # early configs of bitsandbytes have no method
        return "bitsandbytes" if any(str(key).startswith("load_in_") for key in entries) else "an unnamed method"
    return str(getattr(method, "value", method))


def _refuse_other_kinds(config: Any, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} ({kind}) is an encoder-decoder model; DePass needs a decoder-only language model")
    if kind not in FAMILIES and kind in MASKED and not getattr(config, "is_decoder", False):
        raise ModelError(f"{name} ({kind}) is an encoder-only model; DePass needs a decoder-only language model")


def _missing_paths(model: Any, family: Family) -> list[str]:
    """The paths of a family that a model lacks: those outside of its layers or of the first layer that lacks some."""
    outside = [f"{family.backbone}.{path}" for path in (family.final_norm, family.layers)]
    missing = [path for path in outside if not has(model, path)]
    if missing:
        return missing
    for index, block in enumerate(_blocks(model, family)):
        missing = [path for path in module_paths(block, family).values() if not has(block, path)]
        if (
            family.sinks is not None
            and has_attention(block, family)
            and not any(path == family.sinks for path, _ in block.named_parameters())
        ):
            missing.append(family.sinks)
        if missing:
            return [f"{family.backbone}.{family.layers}.{index}.{path}" for path in missing]
    return []
