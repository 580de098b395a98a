"""The paths of a family in one layer of a model: a layer has experts or one MLP, and some modules that others lack."""

from __future__ import annotations

from typing import Any

from .families import Family
from .trace import NORMS

_ALWAYS = ("value", "output", "latent", "mix_gate")


def linear_paths(layer: Any, family: Family) -> dict[str, str]:
    """The paths of a layer's linear layers that the decomposition reads, by the field of the family."""
    parts = [*_ALWAYS]
    if not has_experts(layer, family):
        parts += ["gate", "down"]
    elif has_shared(layer, family):
        parts += ["shared_gate", "shared_down"]
    return _named(family, parts)


def module_paths(layer: Any, family: Family) -> dict[str, str]:
    """The paths of all modules of a layer that its family names, by the field of the family."""
    others = _named(family, ["attention", *NORMS, "mix_norm"])
    if has_experts(layer, family):
        others |= _named(family, ["experts", *(("shared_weight",) if has_shared(layer, family) else ())])
    return {**others, **linear_paths(layer, family)}


def has_experts(layer: Any, family: Family) -> bool:
    """Whether a layer has the routed experts that its family names; the others have one MLP."""
    return family.experts is not None and has(layer, family.experts)


def has_shared(layer: Any, family: Family) -> bool:
    """Whether a layer with experts has an MLP beside them."""
    return family.shared_gate is not None and has(layer, family.shared_gate)


def has(model: Any, path: str) -> bool:
    """Whether a model has a module at a path."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _named(family: Family, parts: list[str]) -> dict[str, str]:
    return {part: path for part in parts if (path := getattr(family, part)) is not None}
