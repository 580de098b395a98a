"""The check that conservation cannot make: whether a model computes what its family says.

Any shares add up, so a family that misreads what an MLP reads conserves and gives other scores. At one position of a
captured pass, or at all of them where the model has hooks, this check computes each step of a layer from the model's own
input of that step and the declared weights, and compares it with what the model computed. A position's difference is the
norm of the two vectors' difference, relative to the largest vector that the step adds or computes.

Kernels that round their inputs to 8 bits compute the steps themselves, from the inputs that they had in the pass. What they
get is compared, and so is how their weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import weights
from .bound import MLP, BoundModel, Layer, Mixer, Norm, Projection
from .experts import ExpertWeights, outputs
from .paths import WRITING, linear_paths
from .trace import MixerTrace, Trace

# by step: what differs, with the paths of the family
STEPS = {
    "input": "the residual stream at its input is not that after the layer before",
    "values": "the values that its attention gets are not those of {value} on the stream after {attention_norm}{normed}",
    "lent": "the values that its attention gets are not those of the layer whose values it takes (shared_values)",
    "mix": "the input of {output} is not the attention pattern times the values, nor that times its gate or norm",
    "sinks": "its attention sinks act on the pattern in another way: name them where they act behind the softmax only",
    "routed": "the input of {experts} is not the stream after {read_by_experts}",
    "halves": "the activation of {experts} takes other rows of its first projection for the gate",
    "experts": "the output of {experts} is not the sum of its experts' outputs times the router's weights",
    "block": "the output of the module around {experts} is not the sum of the outputs inside of it",
    "gate": "the output of {gate} is not that of its weights on the stream after {mlp_norm}",
    "activation": "its activation function does not get the output of {gate}",
    "late": "the output of {late_gate} is not that of its weights on the stream after the MLP",
    "stream": "the residual stream after it is not the stream before it plus the outputs of {adding}{times}",
    "weights": "the products of {value}, {output}, {gate} or {down} are not those of their weights",
}
LAST_STEPS = {
    "norm": "the output of the final norm {final_norm} is not that of its weights",
    "head": "the logits of the head are not those of its weights",
}


@dataclass
class SeenMixer:
    """What the check reads of one mixer besides its trace, at all positions."""

    values: Tensor | None = None  # [P, K·d], which the attention function gets
    lent: Tensor | None = None  # [P, K·d], which that of the layer whose values this one takes got
    mixed: Tensor | None = None  # [P, H·d], the attention pattern times the values
    sinks_differ: bool | None = None  # whether sinks act where the family does not say; None without sinks
    read_by_value: Tensor | None = None  # [P, D], the input of the value projection where its kernel rounds it
    convolved: Tensor | None = None  # [P, K·d], which the convolution of a recurrence reads


@dataclass
class Seen:
    """What the check reads besides the trace, at all positions."""

    before: Tensor | None = None  # [P, D], the stream after the layer before
    mixers: tuple[SeenMixer, ...] = ()  # of bound.Layer.mixers
    experts: Tensor | None = None  # [P, D], the output of the experts
    block: Tensor | None = None  # [P, D], the output of the module around the experts
    gate: Tensor | None = None  # [P, F]
    read_by_gate: Tensor | None = None  # [P, D]
    late_gate: Tensor | None = None  # [P, F']
    read_late: Tensor | None = None  # [P, D], the input of the projection that computes it
    activated: list[Tensor] = field(default_factory=list)  # [P, F], which the MLP's activation functions get


class Miss(NamedTuple):
    """The first step that differs by more than the limit."""

    step: str
    difference: float
    limit: float

    def said(self, bound: BoundModel, index: int) -> str:
        """The difference in words, of a layer or, behind the last, of the end of the model."""
        family = bound.family
        paths = {name: path or "no norm" for name, path in vars(family).items()}
        if index < len(bound.layers):
            layer = bound.layers[index]
            own = linear_paths(layer.module, family)
            paths |= own
            for part in ("value", "output"):
                paths[part] = (
                    " or ".join(own[each] for each in (part, f"recurrence_{part}") if each in own) or "no mixer"
                )
            gate, down = ("gate", "down") if layer.experts is None else ("shared_gate", "shared_down")
            paths["gate"], paths["down"] = own.get(gate, "no MLP"), own.get(down, "no MLP")
            adding = [own[part] for part in WRITING if part in own]
            adding += [str(family.experts)] if layer.experts is not None else []
            normed = any(mixer.value_norm is not None for mixer in layer.mixers)
            paths["read_by_experts"] = family.experts_norm or paths["mlp_norm"]
            paths["normed"] = f", after {family.value_norm}" if normed else ""
            paths["times"] = "" if layer.scalar_path is None else f", times {family.layer_scalar}"
            paths["adding"] = " and ".join(filter(None, [", ".join(adding[:-1]), adding[-1]]))
        text = {**STEPS, **LAST_STEPS}[self.step].format(**paths)
        return f"{text} (relative difference {self.difference:.1e}, limit {self.limit:.0e})"


def limit(layer: Layer, *seen: Tensor | None) -> float:
    """The largest difference that rounding explains, for a layer's weights and the dtypes that its pass had.

    No right declaration in ``docs/models.md`` reaches a third of it.
    """
    modules = [part.module for part in layer.projections]
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


def differences(bound: BoundModel, index: int, trace: Trace, seen: Seen, positions: Tensor) -> dict[str, Tensor]:
    """The difference of each step of a layer, by step: fp64 ``[n]`` on the CPU.

    Args:
        bound: the model.
        index: the layer.
        trace: its trace.
        seen: what the check reads besides.
        positions: ``[n]`` int64, the positions of the pass that are compared.
    """
    layer, family = bound.layers[index], bound.family
    with torch.no_grad(), torch.autocast(layer.device.type, enabled=False):
        at = positions.to(layer.device)
        steps = _Steps(bound, layer, trace, at)
        found = (
            {} if seen.before is None else {"input": _difference(seen.before.to(layer.device)[at], steps.trace.stream)}
        )
        for of_mixer in zip(layer.mixers, steps.trace.mixers, seen.mixers, strict=True):
            for step, of_step in steps.compare_mixer(*of_mixer).items():
                found[step] = torch.maximum(found[step], of_step) if step in found else of_step
        middle = steps.middle()
        if layer.experts is not None:
            found |= steps.compare_experts(seen, middle)
        if seen.gate is not None:
            gate = seen.gate.to(layer.device)[at]
            found["gate"] = steps.compare_gate(seen, middle)
            given = [each.to(layer.device)[at] for each in seen.activated]
            if given and not any(torch.equal(each, gate) for each in given):
                found["activation"] = torch.stack([_difference(gate, each) for each in given]).amin(0)
        if seen.block is not None:
            around = str(family.experts).rpartition(".")[0]
            found["block"] = steps.compare_block(seen, str(family.shared_down).startswith(f"{around}."))
        assert steps.trace.after is not None
        late = steps.behind_mlp(seen, middle)
        if layer.late is not None:
            found["late"] = steps.compare_late(seen, late)
        found["stream"] = _difference(
            steps.after(late), steps.trace.after, *map(steps.times, (steps.stream, middle, late))
        )
        rounding = [part for part in layer.projections if weights.rounds_inputs(part.module)]
        if rounding:
            found["weights"] = torch.stack([_reading(part, _like(trace)) for part in rounding]).amax(0).expand(len(at))
    return found


def last_differences(bound: BoundModel, stream: Tensor, normed: Tensor) -> dict[str, Tensor]:
    """The differences of the final norm and of the head, by step, at the positions of ``[n, D]``."""
    device = weights.device_of(bound.head)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        own = normed.to(device)
        x = stream.to(device, bound.state_dtype)
        scale = bound.final_norm.scale(x, x.dtype)[:, None]
        found = {"norm": _difference(_normed(bound.final_norm, x, scale), own)}
        found["head"] = _difference(bound.scaled(_projected(bound.unembedding, own)), bound.logits(own))
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
    """The steps of a layer at ``n`` positions, each from the model's own input of the step."""

    def __init__(self, bound: BoundModel, layer: Layer, trace: Trace, at: Tensor) -> None:
        self.layer, self.parallel, self.dtype = layer, bound.parallel, bound.state_dtype
        self.trace = trace.without_patterns().map(lambda tensor: tensor.to(at.device).index_select(0, at))
        self.stream = self.trace.stream.to(self.dtype)
        self.at = at

    def compare_mixer(self, mixer: Mixer, trace: MixerTrace, seen: SeenMixer) -> dict[str, Tensor]:  # each [n]
        """The differences of a mixer's values, of what it mixes, and of how its sinks act."""
        found = {}
        if seen.values is not None and mixer.values_of is not None:
            own = self.of(seen.values)
            found["lent"] = _difference(torch.zeros_like(own) if seen.lent is None else self.of(seen.lent), own)
        elif seen.values is not None:
            found["values"] = self._compare_values(mixer, trace, seen, self.of(seen.values))
        if seen.mixed is not None:
            assert trace.mixed is not None
            mixed_values, scale = self.of(seen.mixed), trace.mix_scale
            found["mix"] = _difference(
                mixed_values if scale is None else mixed_values * scale.to(mixed_values), trace.mixed
            )
        if seen.sinks_differ is not None:
            found["sinks"] = torch.full((len(self.at),), float(seen.sinks_differ), dtype=torch.float64, device="cpu")
        return found

    def _compare_values(self, mixer: Mixer, trace: MixerTrace, seen: SeenMixer, values: Tensor) -> Tensor:  # [n]
        """The difference of the values; where a kernel rounds its inputs, that of the inputs or of the kernel's output."""
        declared = self._normed("attention_norm", self.stream)
        if mixer.latent is not None:
            declared = _projected(mixer.latent, declared).to(self.dtype)
            if mixer.latent_norm is not None and trace.latent_scale is not None:
                declared = _normed(mixer.latent_norm, declared, trace.latent_scale[:, None])
        if seen.read_by_value is None:
            missed = _difference(_scaled(mixer, trace, _projected(mixer.value, declared)), values)
            return missed if seen.convolved is None else missed.maximum(_difference(values, self.of(seen.convolved)))
        read = self.of(seen.read_by_value)
        given, own = declared * mixer.value.input_factor, _scaled(mixer, trace, _by_kernel(mixer.value, read))
        return torch.maximum(_difference(given, read), _difference(own, values))

    def compare_late(self, seen: Seen, late: Tensor) -> Tensor:  # [n]
        """The difference of the pre-activations behind the MLP; where a kernel rounds its inputs, that of the inputs."""
        assert seen.late_gate is not None
        assert seen.read_late is not None
        assert self.layer.late is not None
        gate = self.layer.late.gate
        if weights.rounds_inputs(gate.module):
            return _difference(late, self.of(seen.read_late))
        return _difference(_projected(gate, late), self.of(seen.late_gate))

    def compare_gate(self, seen: Seen, middle: Tensor) -> Tensor:  # [n]
        """The difference of the pre-activations; where a kernel rounds its inputs, that of the inputs."""
        assert seen.gate is not None
        assert seen.read_by_gate is not None
        assert self.layer.mlp is not None
        declared, gate = self._read_by_mlp(middle), self.layer.mlp.gate
        if weights.rounds_inputs(gate.module):
            return _difference(declared, self.of(seen.read_by_gate))
        return _difference(_projected(gate, declared), self.of(seen.gate))

    def compare_experts(self, seen: Seen, middle: Tensor) -> dict[str, Tensor]:  # each [n]
        """The differences of the experts' input, of what their activation takes for the gate, and of their output."""
        trace, experts = self.trace, self.layer.experts
        assert experts is not None
        assert trace.routed is not None
        assert trace.chosen is not None
        assert trace.chosen_weights is not None
        assert seen.experts is not None
        read, own = experts.read(), self.of(seen.experts).to(self.dtype)
        found = {"routed": _difference(self._read_by_experts(middle), trace.routed)}
        found["halves"] = _curvature(read, trace.routed).expand(len(self.at))
        places, summed = experts.places(trace.chosen, trace.chosen_weights), torch.zeros_like(own)
        for _, run, output in outputs(read, places, trace.routed, self.dtype):
            summed.index_add_(0, places.position[run], output)
        found["experts"] = _difference(summed, own * experts.factor)
        return found

    def _read_by_mlp(self, middle: Tensor) -> Tensor:
        return self._normed("mlp_norm", self.stream if self.parallel else middle)

    def _read_by_experts(self, middle: Tensor) -> Tensor:
        name = "mlp_norm" if self.layer.experts_norm is None else "experts_norm"
        return self._normed(name, self.stream if self.parallel else middle)

    def of(self, seen: Tensor) -> Tensor:
        """The compared positions of what the check saw."""
        return seen.to(self.at.device)[self.at]

    def middle(self) -> Tensor:  # [n, D], the stream between attention and MLP
        added = torch.zeros_like(self.stream)
        for mixer, trace in zip(self.layer.mixers, self.trace.mixers, strict=True):
            assert trace.mixed is not None
            added = added + _by_kernel(mixer.output, trace.mixed).to(self.dtype)
        return self.stream + self._normed("attention_post_norm", added)

    def compare_block(self, seen: Seen, holds_mlp: bool) -> Tensor:  # [n]
        """The difference of the output of the module around the experts, which may hold the MLP beside them."""
        assert seen.experts is not None
        assert seen.block is not None
        assert self.layer.experts is not None
        summed = self.of(seen.experts).to(self.dtype)
        if holds_mlp and self.layer.mlp is not None:
            summed = summed + self._of_mlp(self.layer.mlp) / self.layer.experts.factor
        return _difference(summed, self.of(seen.block))

    def behind_mlp(self, seen: Seen, middle: Tensor) -> Tensor:  # [n, D]
        added = torch.zeros_like(middle)
        if self.layer.experts is not None:
            assert seen.experts is not None
            of_experts = self.of(seen.experts).to(self.dtype) * self.layer.experts.factor
            added = added + self._normed("experts_post_norm", of_experts)
        if self.layer.mlp is not None:
            added = added + self._normed("shared_post_norm", self._of_mlp(self.layer.mlp))
        return middle + self._normed("mlp_post_norm", added)

    def after(self, late: Tensor) -> Tensor:  # [n, D], from the stream behind the MLP
        if self.layer.late is not None:
            assert self.trace.late_hidden is not None
            added = _by_kernel(self.layer.late.down, self.trace.late_hidden).to(self.dtype)
            late = late + self._normed("late_post_norm", added)
        return self.times(late)

    def times(self, stream: Tensor) -> Tensor:
        """The stream, or a part of it, times the number at the layer's end."""
        scalar = self.layer.scalar
        return stream if scalar is None else stream * scalar.to(stream)

    def _of_mlp(self, mlp: MLP) -> Tensor:  # [n, D], what the MLP that every position goes through adds
        assert self.trace.hidden is not None
        of_mlp, weight = _by_kernel(mlp.down, self.trace.hidden).to(self.dtype), self.trace.mlp_weight
        return of_mlp if weight is None else of_mlp * weight[:, None].to(self.dtype)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        norm: Norm | None = getattr(self.layer, name)
        x = x.to(self.dtype)
        return x if norm is None else _normed(norm, x, self.trace.scales[name][:, None])


def _scaled(mixer: Mixer, trace: MixerTrace, values: Tensor) -> Tensor:
    """Values after the norm on each head's; what scales a recurrence's comes behind what is compared."""
    scale = trace.value_scale
    if mixer.value_norm is None or scale is None or scale.shape != values.shape:  # declared rows of another width
        return values
    return values * scale.to(values)


def _normed(norm: Norm, x: Tensor, scale: Tensor) -> Tensor:
    beta = norm.beta()
    normed = norm.of_parts(x, scale)
    return normed if beta is None else normed + beta.to(normed)


def _projected(projection: Projection, x: Tensor) -> Tensor:
    """``W x + b`` in the weight's dtype."""
    weight, bias = projection.weight, projection.bias
    return functional.linear(x.to(weight), weight, None if bias is None else bias.to(weight))


def _by_kernel(projection: Projection, x: Tensor) -> Tensor:
    """The same of what the module gets, factor included; where the kernel rounds it to 8 bits, what the kernel computes.

    The size of this rounding has no bound: a few large numbers in ``x`` leave few bits to all others. ``x`` has the dtype
    that the model gives the kernel.
    """
    if not weights.rounds_inputs(projection.module):
        return _projected(replace(projection, input_factor=1.0), x)
    return projection.select_output(projection.module.forward(x))  # forward runs no hooks


def _reading(projection: Projection, like: Tensor | None) -> Tensor:
    """The difference between what a kernel that rounds its inputs computes and the product with the weight as it is read.

    The input is random: in numbers of one size, rounding to 8 bits is about a hundredth.
    """
    assert like is not None
    random = torch.randn(1, projection.weight.shape[1], generator=torch.Generator().manual_seed(0), device="cpu")
    random = random.to(like)
    return _difference(_projected(replace(projection, input_factor=1.0), random), _by_kernel(projection, random))


def _like(trace: Trace) -> Tensor | None:
    """A tensor with the dtype and the device of what a layer's projections read."""
    return trace.mixers[0].mixed if trace.mixers else trace.hidden


def _curvature(read: ExpertWeights, like: Tensor) -> Tensor:
    """How far a hidden vector is from being affine in the rows that are not the gate's: 0, or a tenth in the gate's own."""
    if read.experts.first != "gate_up_proj":
        return torch.zeros((), dtype=torch.float64, device="cpu")
    width, generator = 2 * read.experts.neurons, torch.Generator().manual_seed(0)
    first, step = (torch.rand(1, width, generator=generator, device="cpu").to(like) for _ in range(2))
    is_gate = read.pre_activations(torch.arange(width, device=like.device)[None])[0]
    step = step.index_fill(1, is_gate, 0)
    low, middle, high = (read.hidden(first + by * step).double() for by in (-1, 0, 1))
    bent: Tensor = (low + high - 2 * middle).norm() / (high - low).norm()
    return bent.cpu()


def mixed(pattern: Tensor, values: Tensor) -> Tensor:
    """The pattern ``[B, H, T, T]`` times the values ``[B, K, T, d]``: ``[B, T, H·d]``."""
    prompts, kv_heads = values.shape[:2]
    groups = pattern.to(values).reshape(prompts, kv_heads, -1, *pattern.shape[2:])  # [B, K, H / K, T, T]
    by_head: Tensor = (groups @ values[:, :, None]).flatten(1, 2)
    return by_head.transpose(1, 2).flatten(2)


def _difference(declared: Tensor, own: Tensor, *added: Tensor) -> Tensor:
    """The differences ``[n]`` of vectors ``[n, ...]``; ``added`` are vectors whose sum ``own`` is, and which round too."""
    if declared.shape != own.shape:
        return torch.ones(len(own), dtype=torch.float64, device="cpu")
    declared, own = declared.to("cpu", torch.float64), own.to("cpu", torch.float64)
    sizes = [vector.to("cpu", torch.float64).norm(dim=-1) for vector in (own, *added)]
    size, missed = torch.stack(sizes).amax(0), (declared - own).norm(dim=-1)
    return torch.where(size == 0, (missed > 0).double(), missed / size)
