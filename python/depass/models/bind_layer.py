"""Resolves a family's paths on one layer of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import ModelError
from .bound import MLP, Layer, Norm, Projection
from .experts import Experts
from .families import Family
from .paths import has_experts, has_late, has_recurrence, has_shared, module_paths, shares_values
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


def number_of(config: Any, name: str | None) -> float:
    """A factor of the config by its name; 1 without a name."""
    return 1.0 if name is None else float(getattr(config, name))


def bind_layer(layer: Any, family: Family, config: Any) -> Layer:
    """The modules, projections and norms of one layer, at the paths of a family that it has.

    Raises:
        ModelError: its recurrence is not of the family's kind.
    """
    factor = number_of(config, family.residual_factor)
    paths = module_paths(layer, family)

    norms: dict[str, Any] = {}
    for part in (*NORMS, "mix_norm", "value_norm"):
        module = layer.get_submodule(paths[part]) if part in paths else nn.Identity()
        norms[part] = None if isinstance(module, nn.Identity) else Norm(module, family.norm, family.epsilon)
    bind_mixing = _bind_recurrence if has_recurrence(layer, family) else _bind_attention
    return Layer(
        module=layer,
        output=Projection(layer.get_submodule(paths["output"]), factor=factor),
        mlp=_bind_mlp(layer, family, factor),
        experts=_bind_experts(layer, family, factor, config),
        late=_bind_late(layer, family),
        scalar_path=family.layer_scalar,
        held={path: layer.get_submodule(path) for path in paths.values()},
        **norms,
        **bind_mixing(layer, family, config),
    )


def _bind_attention(layer: Any, family: Family, config: Any) -> dict[str, Any]:
    """The parts of a layer's attention, by the field of :class:`Layer`."""
    heads, output = config.num_attention_heads, Projection(layer.get_submodule(family.output))
    if shares_values(layer, family):
        # the value projection is that of another layer: see share_values
        return {"num_heads": heads, "attention": layer.get_submodule(family.attention), "value": output}
    fused = layer.get_submodule(module_paths(layer, family)["value"])
    rows: str = family.value_rows
    if rows == "last":  # q has as many rows as the output projection has columns; k and v share the others equally
        rows = f"last:{(Projection(fused).shape[0] - output.shape[1]) // 2}"
    if rows == "end_of_head":
        rows = f"end_of_head:{output.shape[1] // heads}"
    found = {
        "num_heads": heads,
        "attention": layer.get_submodule(family.attention),
        "value": Projection(fused, rows, heads),
    }
    if family.latent is not None:
        found["latent"] = Projection(layer.get_submodule(family.latent), f"first:{Projection(fused).shape[1]}")
    if family.mix_gate is not None:
        found["mix_gate"] = Projection(layer.get_submodule(family.mix_gate), family.mix_gate_rows, heads)
    if family.sinks is not None:
        found["sinks"] = layer.get_parameter(family.sinks)
    return found


def _bind_recurrence(layer: Any, family: Family, config: Any) -> dict[str, Any]:
    """The parts of a recurrence that a layer has in the place of attention, by the field of :class:`Layer`."""
    module = layer.get_submodule(family.recurrence)
    found = recurrence(module, family.recurrence_kind, f"{family.recurrence} of a layer")
    return {
        "num_heads": found.heads,
        "attention": module,
        "value": Projection(*found.value_projection()),
        "recurrence": found,
    }


def _bind_mlp(layer: Any, family: Family, factor: float) -> MLP | None:
    """The MLP that every position goes through; None where a layer has experts alone."""
    gate, down, weight = family.gate, family.down, None
    if has_experts(layer, family):
        if family.shared_gate is None or family.shared_down is None or not has_shared(layer, family):
            return None
        gate, down = family.shared_gate, family.shared_down
        weight = None if family.shared_weight is None else layer.get_submodule(family.shared_weight)
    down_projection = Projection(layer.get_submodule(down), factor=factor)
    return MLP(Projection(layer.get_submodule(gate), family.gate_rows), down_projection, weight)


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
    own: dict[Any, int] = {}  # by kind, the last layer with keys and values of its own
    found = []
    for index, (kind, layer) in enumerate(zip(types, layers, strict=False)):
        if not shares_values(layer.module, family):
            own[kind] = index
            found.append(layer)
        elif kind in own:
            found.append(replace(layer, value=layers[own[kind]].value, values_of=own[kind]))
        else:
            raise ModelError(
                f"layer {index} of {name} takes the keys and values of an earlier layer (shared_values="
                f"{family.shared_values!r}), but none of its kind ({kind}) has its own; DePass needs one"
            )
    return tuple(found)


def _bind_experts(layer: Any, family: Family, factor: float, config: Any) -> Experts | None:
    """The routed experts of a layer, if it has them."""
    if family.experts is None or not has_experts(layer, family):
        return None
    module = layer.get_submodule(family.experts)
    chosen = next((number for name in _CHOSEN if isinstance(number := getattr(config, name, None), int)), None)
    router = None if family.input_router is None else layer.get_submodule(family.input_router)
    return Experts(module, chosen or len(module.down_proj), factor, router)
