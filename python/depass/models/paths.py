"""The paths of a family in one layer of a model: which sublayers the layer has, and the modules of these."""

from __future__ import annotations

from typing import Any

from .families import Family
from .trace import NORMS

_OF_ATTENTION = ["attention", "latent_norm", "mix_norm"]
WRITING = ("output", "recurrence_output", "down", "shared_down")  # the linear layers that write to the residual stream


def linear_paths(layer: Any, family: Family) -> dict[str, str]:
    """The paths of a layer's linear layers that the decomposition reads, by the field of the family.

    Those of a recurrence are ``recurrence_value`` and ``recurrence_output``.
    """
    parts = ["value", "output", "latent", "mix_gate"] if has_attention(layer, family) else []
    if has_shared(layer, family):
        parts += ["shared_gate", "shared_down"]
    elif has_mlp(layer, family):
        parts += ["gate", "down"]
    return {**_named(family, parts), **(_of_recurrence(layer, family) if has_recurrence(layer, family) else {})}


def module_paths(layer: Any, family: Family) -> dict[str, str]:
    """The paths of all modules of a layer that its family names, by the field of the family."""
    attends, recurs = has_attention(layer, family), has_recurrence(layer, family)
    routes = has_experts(layer, family)
    parts = [*(_OF_ATTENTION if attends else []), *(["recurrence"] if recurs else []), *(["experts"] if routes else [])]
    if has_shared(layer, family):
        parts.append("shared_weight")
    parts += [norm for norm in NORMS if attends or recurs or not norm.startswith("attention")]
    if not (routes or has_mlp(layer, family)):
        parts = [part for part in parts if not part.startswith("mlp")]
    return {**_named(family, parts), **linear_paths(layer, family)}


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


def has(model: Any, path: str) -> bool:
    """Whether a model has a module at a path."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _named(family: Family, parts: list[str]) -> dict[str, str]:
    return {part: path for part in parts if (path := getattr(family, part)) is not None}
