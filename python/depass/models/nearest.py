"""Which listed family comes nearest to a model that none describes, and what differs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from torch import nn

from ..errors import ModelError
from .families import FAMILIES, Family
from .multimodal import located
from .paths import has

_OUTSIDE = ("layers", "final_norm")
_INSIDE = (
    "attention", "recurrence", "latent", "latent_norm", "value", "value_norm", "mix_gate", "mix_norm", "output", "experts",
    "input_router", "shared_gate", "shared_down", "shared_weight", "gate", "down", "attention_norm", "mlp_norm",
    "attention_post_norm", "mlp_post_norm", "experts_norm", "experts_post_norm", "shared_post_norm", "late_gate",
    "late_down", "late_post_norm",
)  # fmt: skip
_DENSE = ("gate", "down")  # which no layer has where all have experts
_MOST = 4  # names of a list that a message holds


class Nearest(NamedTuple):
    """A listed family beside a model, with the paths that the family names: those of a layer's modules begin there.

    A module counts as held if one of the layers has it: layers with experts and layers with an MLP may take turns.

    Attributes:
        name: of the family.
        held: the paths that the model has.
        lacking: by field of the family, those that it lacks.
        instead: what the first layer has where the model lacks them.
    """

    name: str
    held: list[str]
    lacking: dict[str, str]
    instead: list[str]

    def said(self) -> str:
        """The family and the difference, in a sentence."""
        count = len(self.held) + len(set(self.lacking.values()))
        if not self.lacking:
            return f"The nearest listed family is {self.name!r}: the model has all {count} modules that it names"
        absent = list(dict.fromkeys(self.lacking.values()))
        place = "their place" if len(absent) > 1 else "its place"
        there = f"; in {place} it has {_listed(self.instead)}" if self.instead else ""
        return (
            f"The nearest listed family is {self.name!r}: of the {count} modules that it names, the model lacks "
            f"{_listed(absent)}{there}"
        )

    def written(self) -> str:
        """The start of a declaration, as Python code."""
        if len(self.lacking) > len(self.held):
            return "depass.Family(...)"
        changed = "".join(f", {field}=..." for field in self.lacking)
        return f"dataclasses.replace(depass.FAMILIES[{self.name!r}]{changed or ', ...'})"


def nearest(model: nn.Module, layers: Sequence[nn.Module]) -> Nearest:
    """The listed family that names most of a model's modules; of several, the one that names fewest others, then the first.

    Args:
        model: the model.
        layers: its layers; none where they are not known.
    """
    found = [_beside(name, family, model, layers) for name, family in FAMILIES.items()]
    best = min(found, key=lambda each: (-len(each.held), len(each.lacking)))  # the first of equals
    return best._replace(instead=_instead(best, layers[0]) if layers else [])


def _beside(name: str, family: Family, model: nn.Module, layers: Sequence[nn.Module]) -> Nearest:
    with suppress(ModelError):  # several parts could be the decoder
        family = located(model, family)
    held: list[str] = []
    lacking: dict[str, str] = {}
    for field in (*_OUTSIDE, *_INSIDE):
        path = getattr(family, field)
        if path is None or (
            field == "mix_gate" and family.mix_gate_rows != "all"
        ):  # then it is the queries' projection
            continue
        places: Sequence[nn.Module] = [model]
        if field in _OUTSIDE:
            path = f"{family.backbone}.{path}"
        elif layers:
            places = layers
        if any(has(place, path) for place in places):
            held.append(path)
        elif field not in _DENSE or family.experts not in held:
            whole = field == "layers" and not has(model, family.backbone)
            lacking["backbone" if whole else field] = path
    return Nearest(name, list(dict.fromkeys(held)), lacking, [])


def _instead(beside: Nearest, layer: nn.Module) -> list[str]:
    """The modules of a layer that stand beside those that it lacks, and that the family does not name."""
    found: list[str] = []
    for field, path in beside.lacking.items():
        parent = path.rpartition(".")[0]
        while parent and not has(layer, parent):
            parent = parent.rpartition(".")[0]
        if field in _INSIDE:
            children = layer.get_submodule(parent).named_children()
            found += [f"{parent}.{child}" if parent else child for child, _ in children]
    named = [f"{path}." for path in beside.held]
    return [path for path in dict.fromkeys(found) if not any(each.startswith(f"{path}.") for each in named)]


def _listed(names: list[str]) -> str:
    """``a, b and c``, shortened where there are many."""
    if len(names) > _MOST + 1:
        return f"{', '.join(names[:_MOST])} and {len(names) - _MOST} others"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
