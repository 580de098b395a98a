"""The paths of a family in one layer of a model: a layer has experts or one MLP, and some modules that others lack."""

from __future__ import annotations

from typing import Any

from .families import Family
from .trace import NORMS

_OF_ATTENTION = ("attention", "latent_norm", "mix_norm", "value_norm")
_OF_EXPERTS = ("experts_norm", "experts_post_norm", "shared_post_norm")
_LATE = ("late_gate", "late_down", "late_post_norm")


def linear_paths(layer: Any, family: Family) -> dict[str, str]:
    """The paths of a layer's linear layers that the decomposition reads, by the field of the family."""
    of_mlp = ["gate", "down"]
    if has_experts(layer, family):
        of_mlp = ["shared_gate", "shared_down"] if has_shared(layer, family) else []
    if has_late(layer, family):
        of_mlp += _LATE[:2]
    if has_recurrence(layer, family):
        return {**_of_recurrence(layer, family), **_named(family, of_mlp)}
    found = _named(family, ["value", "output", "latent", "mix_gate", *of_mlp])
    if shares_values(layer, family):
        del found["value"]
    elif family.value_of_keys is not None and not has(layer, family.value):
        found["value"] = family.value_of_keys
    return found


def module_paths(layer: Any, family: Family) -> dict[str, str]:
    """The paths of all modules of a layer that its family names, by the field of the family."""
    others = _named(family, ["attention", *NORMS, "mix_norm", "value_norm"])
    if not has_late(layer, family):
        others.pop("late_post_norm", None)
    if shares_values(layer, family):
        others.pop("value_norm", None)
    if has_recurrence(layer, family):
        others = {part: path for part, path in others.items() if part not in _OF_ATTENTION}
        others |= _named(family, ["recurrence"])
    if has_experts(layer, family):
        of_shared = ("shared_weight",) if has_shared(layer, family) else ()
        others |= _named(family, ["experts", "input_router", *of_shared])
    else:
        others = {part: path for part, path in others.items() if part not in _OF_EXPERTS}
    return {**others, **linear_paths(layer, family)}


def has_recurrence(layer: Any, family: Family) -> bool:
    """Whether a layer has the recurrence that its family names in the place of attention."""
    return family.recurrence is not None and has(layer, family.recurrence)


def _of_recurrence(layer: Any, family: Family) -> dict[str, str]:
    names = ("in_proj",) if family.recurrence_kind == "state_space" else ("in_proj_qkv", "in_proj_qkvz")
    found = [name for name in names if has(layer, f"{family.recurrence}.{name}")]
    return {"value": f"{family.recurrence}.{(found or names)[0]}", "output": f"{family.recurrence}.out_proj"}


def has_experts(layer: Any, family: Family) -> bool:
    """Whether a layer has the routed experts that its family names; the others have one MLP."""
    return family.experts is not None and has(layer, family.experts)


def has_shared(layer: Any, family: Family) -> bool:
    """Whether a layer with experts has an MLP beside them."""
    return family.shared_gate is not None and has(layer, family.shared_gate)


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
