"""Resolves a family's paths on one layer of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import ModelError
from .bound import MLP, Layer, Mixer, Norm, Projection
from .experts import Experts
from .families import Factor, Family
from .paths import (
    has_attention,
    has_experts,
    has_late,
    has_mlp,
    has_recurrence,
    has_shared,
    module_paths,
    shares_values,
)
from .recurrences import recurrence
from .trace import NORMS

_CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)  # in configs


def config_number(config: Any, name: str) -> Any:
    """A number of the config; ``name.i`` is the ``i``-th of several. None where it is missing."""
    name, _, place = name.partition(".")
    found = getattr(config, name, None)
    if not place or found is None:
        return found
    return found[int(place)] if place.isdigit() and int(place) < len(found) else None


def number_of(config: Any, name: str | None) -> float:
    """A factor of the config by its name; 1 without a name."""
    return 1.0 if name is None else float(config_number(config, name))


def bind_layer(layer: Any, family: Family, config: Any) -> Layer:
    """The modules, projections and norms of one layer, at the paths of a family that it has.

    Raises:
        ModelError: its recurrence is not of the family's kind.
    """
    paths = module_paths(layer, family)
    mixers = []
    if has_attention(layer, family):
        mixers.append(_bind_attention(layer, family, config))
    if has_recurrence(layer, family):
        mixers.append(_bind_recurrence(layer, family, config))
    return Layer(
        module=layer,
        mixers=tuple(mixers),
        mlp=_bind_mlp(layer, family, config),
        experts=_bind_experts(layer, family, config),
        late=_bind_late(layer, family),
        scalar_path=family.layer_scalar,
        held={path: layer.get_submodule(path) for path in paths.values()},
        **{part: _bind_norm(layer, family, paths.get(part)) for part in NORMS},
    )


def _bind_norm(layer: Any, family: Family, path: str | None) -> Norm | None:
    """The norm at a path; None without a path, or where an ``nn.Identity`` stands in its place."""
    module = nn.Identity() if path is None else layer.get_submodule(path)
    return None if isinstance(module, nn.Identity) else Norm(module, family.norm, family.epsilon)


def _factor(family: Family, config: Any, part: Factor) -> float:
    """What the model multiplies a part by; what sublayers write has the factor on the residual stream, too."""
    names = [name for each, name in family.factors if each == part]
    if part in ("output", "recurrence_output", "down") and family.residual_factor is not None:
        names.append(family.residual_factor)
    return math.prod(number_of(config, name) for name in names)


def _bind_attention(layer: Any, family: Family, config: Any) -> Mixer:
    """The parts of a layer's attention."""
    heads, module = config.num_attention_heads, layer.get_submodule(family.attention)
    output = Projection(layer.get_submodule(family.output), factor=_factor(family, config, "output"))
    if shares_values(layer, family):
        # the value projection is that of another layer: see share_values
        mix_norm = _bind_norm(layer, family, family.mix_norm)
        return Mixer(module=module, num_heads=heads, value=output, output=output, mix_norm=mix_norm)
    paths = module_paths(layer, family)
    fused, read = layer.get_submodule(paths["value"]), _factor(family, config, "value_input")
    rows: str = family.value_rows
    if rows == "last":  # q has as many rows as the output projection has columns; k and v share the others equally
        rows = f"last:{(Projection(fused).shape[0] - output.shape[1]) // 2}"
    if rows == "end_of_head":
        rows = f"end_of_head:{output.shape[1] // heads}"
    found: dict[str, Any] = {}
    if family.latent is not None:
        first = f"first:{Projection(fused).shape[1]}"
        found["latent"] = Projection(layer.get_submodule(family.latent), first, input_factor=read)
        read = 1.0
    if family.mix_gate is not None:
        found["mix_gate"] = Projection(layer.get_submodule(family.mix_gate), family.mix_gate_rows, heads)
    if family.sinks is not None:
        found["sinks"] = layer.get_parameter(family.sinks)
    return Mixer(
        module=module,
        num_heads=heads,
        value=Projection(fused, rows, heads, input_factor=read),
        output=output,
        latent_norm=_bind_norm(layer, family, family.latent_norm),
        mix_norm=_bind_norm(layer, family, family.mix_norm),
        value_norm=_bind_norm(layer, family, paths.get("value_norm")),
        **found,
    )


def _bind_recurrence(layer: Any, family: Family, config: Any) -> Mixer:
    """The parts of a layer's recurrence."""
    assert family.recurrence is not None
    module = layer.get_submodule(family.recurrence)
    found = recurrence(module, family.recurrence_kind, f"{family.recurrence} of a layer")
    factors = [_factor(family, config, part) for part in ("recurrence_value", "recurrence_input")]
    return Mixer(
        module=module,
        num_heads=found.heads,
        value=Projection(*found.value_projection(), *factors),
        output=Projection(module.out_proj, factor=_factor(family, config, "recurrence_output")),
        recurrence=found,
    )


def _bind_mlp(layer: Any, family: Family, config: Any) -> MLP | None:
    """The MLP that every position goes through; None where a layer has experts alone, or a mixer alone."""
    gate, down, weight = family.gate, family.down, None
    if has_shared(layer, family):
        assert family.shared_gate is not None
        assert family.shared_down is not None
        gate, down = family.shared_gate, family.shared_down
        weight = None if family.shared_weight is None else layer.get_submodule(family.shared_weight)
    elif not has_mlp(layer, family):
        return None
    factors = [_factor(family, config, part) for part in ("gate", "down")]
    return MLP(
        Projection(layer.get_submodule(gate), family.gate_rows, factor=factors[0]),
        Projection(layer.get_submodule(down), factor=factors[1]),
        weight,
    )


def _bind_late(layer: Any, family: Family) -> MLP | None:
    """The branch behind a layer's MLP, if it has one."""
    if family.late_gate is None or family.late_down is None or not has_late(layer, family):
        return None
    return MLP(Projection(layer.get_submodule(family.late_gate)), Projection(layer.get_submodule(family.late_down)))


def share_values(layers: Sequence[Layer], family: Family, config: Any, name: str) -> tuple[Layer, ...]:
    """The layers, with the value projection of an earlier one in those that take its keys and values.

    Args:
        layers: the layers of a model.
        family: its family.
        config: its config.
        name: what to call the model in the error.

    Raises:
        ModelError: no earlier layer of the same kind has keys and values of its own.
    """
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    own: dict[
        Any, tuple[int, Projection]
    ] = {}  # by kind, the last layer with keys and values of its own, and its values
    found = []
    for index, (kind, layer) in enumerate(zip(types, layers, strict=False)):
        if shares_values(layer.module, family) and kind not in own:
            raise ModelError(
                f"layer {index} of {name} takes the keys and values of an earlier layer (shared_values="
                f"{family.shared_values!r}), but none of its kind ({kind}) has its own; DePass needs one"
            )
        if shares_values(layer.module, family):
            lender, value = own[kind]
            taking = (replace(mixer, value=value, values_of=lender) if mixer.recurrence is None else mixer
                      for mixer in layer.mixers)  # fmt: skip
            layer = replace(layer, mixers=tuple(taking))
        elif layer.attention is not None:
            own[kind] = index, layer.attention.value
        found.append(layer)
    return tuple(found)


def _bind_experts(layer: Any, family: Family, config: Any) -> Experts | None:
    """The routed experts of a layer, if it has them."""
    if family.experts is None or not has_experts(layer, family):
        return None
    module = layer.get_submodule(family.experts)
    chosen = next((number for name in _CHOSEN if isinstance(number := getattr(config, name, None), int)), None)
    router = None if family.input_router is None else layer.get_submodule(family.input_router)
    return Experts(module, chosen or len(module.down_proj), _factor(family, config, "down"), router)
