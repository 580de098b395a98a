"""The paths of a family in one layer of a model: which sublayers the layer has, and the modules of these."""

from __future__ import annotations

from typing import Any

from .families import Family
from .trace import NORMS

_OF_ATTENTION = ["attention", "latent_norm", "mix_norm", "value_norm"]
_OF_EXPERTS = ("experts_norm", "experts_post_norm", "shared_post_norm")
# the linear layers that write to the residual stream
WRITING = ("output", "recurrence_output", "down", "shared_down", "late_down")


def linear_paths(layer: Any, family: Family) -> dict[str, str]:
    """The paths of a layer's linear layers that the decomposition reads, by the field of the family.

    Those of a recurrence are ``recurrence_value`` and ``recurrence_output``.
    """
    parts = ["value", "output", "latent", "mix_gate"] if has_attention(layer, family) else []
    if has_shared(layer, family):
        parts += ["shared_gate", "shared_down"]
    elif has_mlp(layer, family):
        parts += ["gate", "down"]
    if has_late(layer, family):
        parts += ["late_gate", "late_down"]
    found = {**_named(family, parts), **(_of_recurrence(layer, family) if has_recurrence(layer, family) else {})}
    if shares_values(layer, family):
        del found["value"]
    elif "value" in found and family.value_of_keys is not None and not has(layer, family.value):
        found["value"] = family.value_of_keys
    return found


def module_paths(layer: Any, family: Family) -> dict[str, str]:
    """The paths of all modules of a layer that its family names, by the field of the family."""
    attends, recurs = has_attention(layer, family), has_recurrence(layer, family)
    routes = has_experts(layer, family)
    parts = [*(_OF_ATTENTION if attends else []), *(["recurrence"] if recurs else [])]
    parts += ["experts", "input_router"] if routes else []
    if has_shared(layer, family):
        parts.append("shared_weight")
    parts += [norm for norm in NORMS if attends or recurs or not norm.startswith("attention")]
    without = {*(() if routes else _OF_EXPERTS), *(() if has_late(layer, family) else ("late_post_norm",))}
    without |= {"value_norm"} if shares_values(layer, family) else set()
    if not (routes or has_mlp(layer, family)):
        without |= {"mlp_norm", "mlp_post_norm"}
    return {**_named(family, [part for part in parts if part not in without]), **linear_paths(layer, family)}


def has_attention(layer: Any, family: Family) -> bool:
    """Whether a layer has attention: all do but those with a recurrence in its place, or another only sublayer."""
    if not family.single:
        return not has_recurrence(layer, family) or has(layer, family.attention)
    others = has_recurrence(layer, family) or has_experts(layer, family) or has(layer, family.gate)
    return has(layer, family.value) or not others  # a layer without any lacks the modules of attention


def has_recurrence(layer: Any, family: Family) -> bool:
    """Whether a layer has the recurrence that its family names; a layer's only sublayer may be another one."""
    return family.recurrence is not None and has(layer, f"{family.recurrence}{'.conv1d' if family.single else ''}")


def has_mlp(layer: Any, family: Family) -> bool:
    """Whether a layer has the MLP of layers without experts."""
    return not has_experts(layer, family) and (not family.single or has(layer, family.gate))


def _of_recurrence(layer: Any, family: Family) -> dict[str, str]:
    names = ("in_proj",) if family.recurrence_kind == "state_space" else ("in_proj_qkv", "in_proj_qkvz")
    found = [name for name in names if has(layer, f"{family.recurrence}.{name}")]
    at = family.recurrence
    return {"recurrence_value": f"{at}.{(found or names)[0]}", "recurrence_output": f"{at}.out_proj"}


def has_experts(layer: Any, family: Family) -> bool:
    """Whether a layer has the routed experts that its family names; the others have one MLP."""
    return family.experts is not None and has(layer, family.experts)


def has_shared(layer: Any, family: Family) -> bool:
    """Whether a layer with experts has an MLP beside them."""
    return has_experts(layer, family) and family.shared_gate is not None and has(layer, family.shared_gate)


def has_late(layer: Any, family: Family) -> bool:
    """Whether a layer has the branch behind its MLP that its family names."""
    return family.late_gate is not None and has(layer, family.late_gate)


def shares_values(layer: Any, family: Family) -> bool:
    """Whether a layer takes the keys and values of an earlier layer."""
    if family.shared_values is None or not has(layer, family.attention):
        return False
    return bool(getattr(layer.get_submodule(family.attention), family.shared_values, False))


def has(model: Any, path: str) -> bool:
    """Whether a model has a module at a path."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _named(family: Family, parts: list[str]) -> dict[str, str]:
    return {part: path for part in parts if (path := getattr(family, part)) is not None}
