"""Refuses families whose projections do not fit each other: no run is needed to see that."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ModelError
from .bound import Layer, Mixer, Projection
from .families import Family
from .trace import NORMS


def refuse_shapes(layers: Sequence[Layer], family: Family, name: str) -> None:
    """Check that each projection of every layer has the rows and the columns that its place needs.

    Args:
        layers: the layers of a model.
        family: its family.
        name: what to call the model in the error.

    Raises:
        ModelError: two projections of a layer do not fit each other.
    """
    for index, layer in enumerate(layers):
        of_mixers = (_of_mixer(mixer, family) for mixer in layer.mixers)
        said = next(filter(None, of_mixers), None) or _of_mlp(layer, family) or _of_norms(layer, family)
        if said is not None:
            raise ModelError(f"layer {index} of {name} does not fit its depass.Family: {said}")


def _of_mixer(mixer: Mixer, family: Family) -> str | None:
    value = family.value if mixer.recurrence is None else f"the values of {family.recurrence}"
    return _of_values(mixer, family, value) or _of_mixing(mixer, family)


def _of_values(mixer: Mixer, family: Family, value: str) -> str | None:
    if mixer.values_of is not None:
        return None
    rows, latent = _shape(mixer.value), mixer.latent
    if rows is None:
        held = mixer.value.module.weight.shape
        return f"{value} has weights {list(held)}, of which value_rows={family.value_rows!r} takes no whole heads"
    width = mixer.output.shape[0]
    first, path = (mixer.value, value) if latent is None else (latent, family.latent)
    if first.shape[1] != width:
        name = "; name what projects it before: latent=..." if latent is None else ""
        return f"{path} reads vectors of width {first.shape[1]}, but the residual stream has width {width}{name}"
    if latent is not None and latent.shape[0] < rows[1]:
        return f"{value} reads vectors of width {rows[1]}, but {family.latent} writes {latent.shape[0]} numbers"
    return None


def _of_mixing(mixer: Mixer, family: Family) -> str | None:
    mixed, num_heads = mixer.output.shape[1], mixer.num_heads
    if mixer.mix_gate is not None:
        rows = _shape(mixer.mix_gate)
        if rows is None or rows[0] not in (num_heads, mixed):
            held = mixer.mix_gate.module.weight.shape[0]
            return (
                f"mix_gate={family.mix_gate!r} has {held if rows is None else rows[0]} rows with "
                f"mix_gate_rows={family.mix_gate_rows!r}; a gate has {num_heads}, one a head, or {mixed}, one a number"
            )
    if mixer.sinks is not None and mixer.sinks.shape != (num_heads,):
        return f"sinks={family.sinks!r} has shape {list(mixer.sinks.shape)}; sinks have [{num_heads}], one a head"
    return None


def _of_mlp(layer: Layer, family: Family) -> str | None:
    of_mlp = (family.gate, family.down) if layer.experts is None else (family.shared_gate, family.shared_down)
    late = family.late_gate, family.late_down
    for mlp, (gate, down), of_gate in ((layer.mlp, of_mlp, family.gate_rows), (layer.late, late, "all")):
        if mlp is not None and mlp.gate.shape[0] != mlp.down.shape[1]:
            return (
                f"{gate} has {mlp.gate.shape[0]} rows with gate_rows={of_gate!r}, but {down} reads {mlp.down.shape[1]} "
                "numbers; each neuron has one row"
            )
    return None


def _of_norms(layer: Layer, family: Family) -> str | None:
    written = [mixer.output for mixer in layer.mixers] + ([] if layer.mlp is None else [layer.mlp.down])
    widths = [(name, getattr(layer, name), projection.shape[0]) for name in NORMS for projection in written[:1]]
    for mixer in layer.mixers:
        widths.append(("mix_norm", mixer.mix_norm, mixer.output.shape[1]))
        widths.append(("latent_norm", mixer.latent_norm, mixer.value.shape[1]))
        widths.append(("value_norm", mixer.value_norm, mixer.output.shape[1] // mixer.num_heads))
    for name, norm, width in widths:
        weight = None if norm is None else getattr(norm.module, "weight", None)
        if weight is not None and weight.shape != (width,):
            return f"{name}={getattr(family, name)!r} has a weight of shape {list(weight.shape)}; here it has [{width}]"
    if layer.attention_post_norm is not None and len(layer.mixers) > 1:
        return (
            f"attention_post_norm={family.attention_post_norm!r} stands behind {family.attention} and {family.recurrence}, "
            "side by side; DePass supports no norm on their sum"
        )
    return None


def _shape(projection: Projection) -> torch.Size | None:
    """The shape of a projection; None where its rows cannot be split as the family says."""
    try:
        return projection.shape
    except RuntimeError:  # of a reshape
        return None
