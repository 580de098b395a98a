"""The check that conservation cannot make: whether a model computes what its family says.

Any shares add up, so a family that misreads what an MLP reads conserves and gives other scores. At one position of a
captured pass, this check computes each step of a layer from the model's own input of that step and the declared weights,
and compares it with what the model computed. A step's difference is relative: ``|declared - own| / |own|``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import weights
from .bound import BoundModel, Layer, Norm, Projection
from .trace import Trace

# by step: what differs, with the paths of the family
STEPS = {
    "input": "the residual stream at its input is not that after the layer before",
    "values": "the values that its attention gets are not those of {value} on the stream after {attention_norm}",
    "mix": "the input of {output} is not the attention pattern times the values",
    "gate": "the output of {gate} is not that of its weights on the stream after {mlp_norm}",
    "activation": "its activation function does not get the output of {gate}",
    "stream": "the residual stream after it is not the stream before it plus the outputs of {output} and {down}",
}
LAST_STEPS = {
    "norm": "the output of the final norm {final_norm} is not that of its weights",
    "head": "the logits of the head are not those of its weights",
}


@dataclass
class Seen:
    """What the check reads besides the trace, at all positions."""

    before: Tensor | None = None  # [P, D], the stream after the layer before
    values: Tensor | None = None  # [B, K, T, d], which the attention function gets
    gate: Tensor | None = None  # [P, F]
    activated: list[Tensor] = field(default_factory=list)  # [P, F], which the MLP's activation functions get


class Miss(NamedTuple):
    """The first step that differs by more than the limit."""

    step: str
    difference: float
    limit: float

    def said(self, bound: BoundModel) -> str:
        """The difference in words."""
        paths = {name: path or "no norm" for name, path in vars(bound.family).items()}
        text = {**STEPS, **LAST_STEPS}[self.step].format(**paths)
        return f"{text} (relative difference {self.difference:.1e}, limit {self.limit:.0e})"


def limit(layer: Layer, *seen: Tensor | None) -> float:
    """The largest difference that rounding explains, for a layer's weights and the dtypes that its pass had.

    No right declaration in ``docs/models.md`` reaches a quarter of it.
    """
    modules = [part.module for part in layer.projections]
    if any(weights.rounds_inputs(module) for module in modules):
        return 0.2
    halves = [tensor for tensor in seen if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16)]
    if halves or any(map(weights.is_packed, modules)) or _products_are_rounded():
        return 5e-2
    return 1e-4


def _products_are_rounded() -> bool:
    """Whether fp32 products run in TF32 or bf16."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set through torch's newer settings, which differ by device
        return True


def differences(bound: BoundModel, index: int, trace: Trace, seen: Seen, position: int) -> dict[str, float]:
    """The difference of each step of a layer, by step.

    Args:
        bound: the model.
        index: the layer.
        trace: its trace, of a pass whose first prompt ends at ``position``.
        seen: what the check reads besides.
        position: the position that is compared.
    """
    layer = bound.layers[index]
    with torch.no_grad(), torch.autocast(layer.device.type, enabled=False):
        steps = _Steps(bound, layer, trace, position)
        found = {} if seen.before is None else {"input": _difference(seen.before[position], trace.stream[position])}
        assert trace.pattern is not None
        assert trace.mixed is not None
        if seen.values is not None:
            found["values"] = _difference(steps.values(), seen.values[0, :, position].flatten())
            found["mix"] = _difference(_mixed(trace.pattern[0, :, position], seen.values[0]), trace.mixed[position])
        middle = steps.middle()
        if seen.gate is not None:
            found["gate"] = _difference(steps.gate(middle), seen.gate[position])
            if seen.activated and not any(torch.equal(each[position], seen.gate[position]) for each in seen.activated):
                found["activation"] = min(_difference(seen.gate[position], each[position]) for each in seen.activated)
        assert trace.after is not None
        found["stream"] = _difference(steps.after(middle), trace.after[position])
    return found


def last_differences(bound: BoundModel, stream: Tensor, normed: Tensor, position: int) -> dict[str, float]:
    """The differences of the final norm and of the head at one position of ``[P, D]``."""
    device = weights.device_of(bound.head)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        own = normed[position].to(device)
        x = stream[position].to(device, bound.state_dtype)
        found = {"norm": _difference(_normed(bound.final_norm, x, bound.final_norm.scale(x, x.dtype)), own)}
        found["head"] = _difference(_projected(bound.unembedding, own), bound.logits(own[None])[0])
    return found


def first_miss(found: dict[str, float], allowed: float) -> Miss | None:
    """The first step that differs by more than ``allowed``; numbers that are not finite are not judged."""
    for step, difference in found.items():
        if allowed < difference < float("inf"):
            return Miss(step, difference, allowed)
    return None


def activations(module: nn.Module) -> list[nn.Module]:
    """The activation functions of torch and transformers inside a module."""
    places = ("torch.nn.modules.activation", "transformers.activations")
    return [each for each in module.modules() if type(each).__module__ in places]


class _Steps:
    """The steps of a layer at one position, each from the model's own input of the step."""

    def __init__(self, bound: BoundModel, layer: Layer, trace: Trace, position: int) -> None:
        self.layer, self.parallel, self.dtype = layer, bound.parallel, bound.state_dtype
        self.trace = trace.of(position, position + 1).map(lambda tensor: tensor[0].to(layer.device))
        self.stream = self.trace.stream.to(self.dtype)

    def values(self) -> Tensor:  # [K·d]
        return _projected(self.layer.value, self._normed("attention_norm", self.stream))

    def middle(self) -> Tensor:  # [D], the stream between attention and MLP
        assert self.trace.mixed is not None
        return self.stream + self._normed("attention_post_norm", _projected(self.layer.output, self.trace.mixed))

    def gate(self, middle: Tensor) -> Tensor:  # [F]
        return _projected(self.layer.gate, self._normed("mlp_norm", self.stream if self.parallel else middle))

    def after(self, middle: Tensor) -> Tensor:  # [D]
        assert self.trace.hidden is not None
        return middle + self._normed("mlp_post_norm", _projected(self.layer.down, self.trace.hidden))

    def _normed(self, name: str, x: Tensor) -> Tensor:
        norm: Norm | None = getattr(self.layer, name)
        x = x.to(self.dtype)
        return x if norm is None else _normed(norm, x, self.trace.scales[name])


def _normed(norm: Norm, x: Tensor, scale: Tensor) -> Tensor:
    beta = norm.beta()
    normed = norm.of_parts(x, scale)
    return normed if beta is None else normed + beta.to(normed)


def _projected(projection: Projection, x: Tensor) -> Tensor:
    """``W x + b`` in the weight's dtype."""
    weight, bias = projection.weight, projection.bias
    return functional.linear(x.to(weight), weight, None if bias is None else bias.to(weight))


def _mixed(pattern: Tensor, values: Tensor) -> Tensor:
    """A row of the pattern ``[H, T]`` times the values ``[K, T, d]``: ``[H·d]``."""
    groups = pattern.to(values).reshape(len(values), -1, pattern.shape[1])  # [K, H / K, T]
    return (groups @ values).flatten()


def _difference(declared: Tensor, own: Tensor) -> float:
    declared, own = declared.to("cpu", torch.float64), own.to("cpu", torch.float64)
    if declared.shape != own.shape:
        return 1.0
    size = own.norm()
    return float((declared - own).norm() / size) if size > 0 else float(declared.norm() > 0)
