"""Baselines that attribute a logit to heads, neurons and experts. They return sweeps."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..api import DePass
from ..checks import integer
from ..errors import OptionError
from ..masking import Kind, checked_means, layers_with, means_by_module, num_components, read_by
from ..models import attention, capture
from ..models.bound import BoundModel, Layer, into_stream
from ..models.capture import Capture, routing_of
from ..models.experts import outputs
from ..models.trace import Trace
from ..results.sweep import Sweep
from .common import (
    _Case,
    _case,
    _clean,
    _embedded,
    _must_be_finite,
    _named,
    _settings,
    _value,
    cut,
    every_path_carries_gradients,
    refuse_inference_mode,
)

Read = Callable[[Layer, Trace, list[int]], Tensor | None]  # of positions [p]: [p, C]


def heads(
    dp: DePass, name: str, prompt: Any, target: Any = None, *, seed: int = 0, means: Sequence[Tensor] | None = None
) -> Sweep:
    """Score every attention head of the model with a baseline.

    ========================  ===============================================================================================
    ``attribution_patching``  the logit's gradient with respect to the head's output *before* the output projection, times
                              that output, summed over positions: a first-order estimate of setting it to zero; with
                              ``means``, times the output less the mean: of setting it to the mean
    ``output_norm``           the norm of the head's output in the residual stream at the target's position, after the output
                              projection (without its bias) and the post-norm, if the model has one
    ``random``                normally distributed random numbers
    ========================  ===============================================================================================

    Args:
        dp: the model.
        name: one of :data:`HEADS`.
        prompt: as for :meth:`DePass.attribute`.
        target: as for :meth:`DePass.attribute`.
        seed: seed of ``random``.
        means: for each layer ``[H·d]``, as :func:`depass.masking.head_means` returns them, for ``attribution_patching``.

    Returns:
        A sweep with scores ``[targets, layers, heads]``, as from ``dp.sweep("heads", ...)``.

    Raises:
        OptionError: an unknown name; means that do not fit the layers, or for a baseline that takes none.
        PromptError, TargetError, ModelError, NonFiniteError: see :func:`tokens`.
    """
    method = _named(name, HEADS, "heads")
    if means is not None:
        if name != "attribution_patching":
            raise OptionError(f"only attribution_patching takes means, got means for {name!r}; leave them out")
        method = partial(_attribution_patching, "heads", False, means=checked_means(dp.bound, means))
    return _sweep(dp, "heads", method, name, prompt, target, seed)


def neurons(dp: DePass, name: str, prompt: Any, target: Any = None, *, seed: int = 0) -> Sweep:
    """Score every MLP neuron of the model with a baseline.

    ============================= ==========================================================================================
    ``attribution_patching``      the logit's gradient with respect to the neuron's hidden value (the input of the down
                                  projection), times that value, summed over positions
    ``attribution_patching_last`` the same, only at the target's position
    ``activation``                the hidden value at the target's position (signed)
    ``activation_x_norm``         the hidden value times the norm of the neuron's column of the down projection, after the
                                  post-norm, if the model has one
    ``random``                    normally distributed random numbers
    ============================= ==========================================================================================

    Args:
        dp: the model.
        name: one of :data:`NEURONS`.
        prompt: as for :meth:`DePass.attribute`.
        target: as for :meth:`DePass.attribute`.
        seed: seed of ``random``.

    Returns:
        A sweep with scores ``[targets, layers, neurons]``, as from ``dp.sweep("neurons", ...)``.

    Raises:
        OptionError: an unknown name; or the model has routed experts (see :func:`experts`).
        PromptError, TargetError, ModelError, NonFiniteError: see :func:`tokens`.
    """
    return _sweep(dp, "neurons", _named(name, NEURONS, "neurons"), name, prompt, target, seed)


def experts(dp: DePass, name: str, prompt: Any, target: Any = None, *, seed: int = 0) -> Sweep:
    """Score every routed expert of the model with a baseline.

    ========================  ===============================================================================================
    ``attribution_patching``  the logit's gradient with respect to the router's weight of the expert, times that weight,
                              summed over the positions that chose the expert: a first-order estimate of setting it to zero
    ``output_norm``           the norm of the expert's output in the residual stream at the target's position, with the
                              router's weight (without the expert's output bias), after the post-norm, if the model has one
    ``router_weight``         the router's weight of the expert at the target's position
    ``random``                normally distributed random numbers
    ========================  ===============================================================================================

    Where a position did not choose an expert, its weight and output are zero.

    Args:
        dp: the model.
        name: one of :data:`EXPERTS`.
        prompt: as for :meth:`DePass.attribute`.
        target: as for :meth:`DePass.attribute`.
        seed: seed of ``random``.

    Returns:
        A sweep with scores ``[targets, layers with experts, experts]``, as from ``dp.sweep("experts", ...)``.

    Raises:
        OptionError: an unknown name; the model has no routed experts, or different numbers of them in its layers.
        PromptError, TargetError, ModelError, NonFiniteError: see :func:`tokens`.
    """
    return _sweep(dp, "experts", _named(name, EXPERTS, "experts"), name, prompt, target, seed)


def _sweep(dp: DePass, kind: Kind, method: Any, name: str, prompt: Any, target: Any, seed: int) -> Sweep:
    bound, count = dp.bound, num_components(dp.bound, kind)
    seed = integer("seed", seed, OptionError)
    (case,) = _clean(dp, [_case(dp, prompt, target)])
    scores: Tensor = method(bound, case, seed)  # [targets, layers, C]
    _must_be_finite(bound, float(scores.abs().max()), f"a score by {name}")
    undefined = scores.new_full(scores.shape[:2], math.nan)
    return Sweep(
        scores=scores.float(),
        rest=undefined,
        bias=undefined.clone(),
        balance=undefined.clone(),
        layers=layers_with(bound, kind),
        columns=tuple(range(count)),
        kind=kind,
        targets=tuple(readout.target for readout in case.readouts),
        target_logits=torch.tensor(
            [readout.logit for readout in case.readouts], dtype=torch.float64, device="cpu"
        ).float(),
        conservation_error=undefined.clone(),
        prompt=case.prompt,
        settings=_settings(dp, name),
    )


# --- heads, neurons and experts ---------------------------------------------------------------------------------------


class _Inputs:
    """The inputs ``[1, N, C·d]`` of modules in this thread's pass, in the order of their calls; of experts, the weights.

    ``means`` are what components are set to instead of zero, by module.
    """

    def __init__(self, means: Mapping[nn.Module, Tensor] | None = None) -> None:
        self.thread, self.means = threading.get_ident(), means
        self.inputs: list[Tensor] = []  # or the router's weights [N, k]
        self.modules: list[nn.Module] = []  # that read these
        self.chosen: list[Tensor] = []  # [N, k], with these; [N, E] of a router of inputs

    @capture.of_this_thread
    def keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.modules.append(module)
        self.inputs.append(args[0])

    def differences(self) -> list[Tensor]:
        """The inputs in fp32, less the values that they are set to."""
        values = [x.detach().float() for x in self.inputs]
        if self.means is None:
            return values
        return [x - self.means[module].to(x) for module, x in zip(self.modules, values, strict=True)]

    @capture.of_this_thread
    def keep_weights(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen, weight = routing_of(args, kwargs)[1:]
        self.chosen.append(chosen)
        self.inputs.append(weight)

    @capture.of_this_thread
    def keep_weights_on_input(self, _: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        weight = output[0]  # [N, E]
        self.chosen.append(torch.arange(weight.shape[1], device=weight.device).expand(weight.shape))
        self.inputs.append(weight)


def _attribution_patching(
    kind: Kind, last: bool, bound: BoundModel, case: _Case, _: int, means: Sequence[Tensor] | None = None
) -> Tensor:
    """``[targets, layers, C]``: gradient times value of the inputs of the output or down projections.

    They are summed over positions, or with ``last`` taken only at the targets' own positions. Of heads, ``means`` are
    subtracted from the values.
    """
    count = num_components(bound, kind)
    by_layer = map(means_by_module, bound.layers, means or ())
    kept = _Inputs(None if means is None else {module: mean for found in by_layer for module, mean in found.items()})
    read = [each for layer in layers_with(bound, kind) for each in read_by(bound.layers[layer], kind)]
    place = {each.module: number for number, (each, _) in enumerate(read)}

    def of_target(products: list[Tensor], position: int) -> Tensor:
        counted = slice(position, position + 1) if last else slice(None)
        by_module: dict[int, Tensor] = {}
        for module, product in zip(kept.modules, products, strict=True):
            number = place[module]
            own = read[number][1]
            by_module[number] = product[0, counted].sum(0).cpu().view(own.stop - own.start, -1).sum(1)
        return torch.cat([by_module[number] for number in range(len(read))]).view(-1, count)

    modules = list(place)
    hooks = (module.register_forward_pre_hook(kept.keep) for module in modules)
    return _gradient_times_value(bound, case, hooks, kept, of_target)


def _router_patching(bound: BoundModel, case: _Case, _: int) -> Tensor:
    """``[targets, layers, E]``: gradient times value of the router's weights, summed over positions."""
    kept, count = _Inputs(), num_components(bound, "experts")

    def of_target(products: list[Tensor], _: int) -> Tensor:
        by_expert = [
            _of_experts(chosen, product, count).sum(0).cpu()
            for chosen, product in zip(kept.chosen, products, strict=True)
        ]
        return torch.stack(by_expert)

    found = [layer.experts for layer in bound.layers if layer.experts is not None]
    hooks = (experts.module.register_forward_pre_hook(kept.keep_weights, with_kwargs=True) if experts.router is None else
             experts.router.register_forward_hook(kept.keep_weights_on_input) for experts in found)  # fmt: skip
    return _gradient_times_value(bound, case, hooks, kept, of_target)


def _gradient_times_value(
    bound: BoundModel,
    case: _Case,
    hooks: Iterable[RemovableHandle],
    kept: _Inputs,
    of_target: Callable[[list[Tensor], int], Tensor],
) -> Tensor:
    """``[targets, layers, C]``: what ``of_target`` makes of each target's products of gradients and values.

    Args:
        bound: the model.
        case: the prompt with its targets.
        hooks: they fill ``kept`` during the model's pass, and are registered and removed here.
        kept: the tensors that gradients are taken of.
        of_target: takes the products in fp32, in the shapes of ``kept.inputs``, and the target's position; returns
            ``[layers, C]``.
    """
    refuse_inference_mode(bound)
    with torch.enable_grad(), attention.running, ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        # the graph starts at the embeddings, so it works for frozen weights as well
        embedded = _embedded(bound, case)[None].detach().requires_grad_()
        with every_path_carries_gradients(bound, embedded):
            normed = capture.normed_at(bound, [case.prompt.ids], embedded)[0]
        if not all(x.requires_grad for x in (normed, *kept.inputs)):
            raise cut(bound)
        by_target = []
        for j, readout in enumerate(case.readouts):
            more = j + 1 < len(case.readouts)
            gradients = torch.autograd.grad(_value(normed, readout), kept.inputs, retain_graph=more, allow_unused=True)
            if any(gradient is None for gradient in gradients):
                raise cut(bound)
            products = [g.float() * x for g, x in zip(gradients, kept.differences(), strict=True)]
            by_target.append(of_target(products, readout.target.position))
    return torch.stack(by_target)


def _of_experts(chosen: Tensor, values: Tensor, count: int) -> Tensor:
    """Values ``[N, k]`` of the chosen experts as values ``[N, count]`` of all; those of the others are zero."""
    is_expert = (chosen >= 0) & (chosen < count)  # some routers choose "none" by another number
    every = values.new_zeros(len(values), count)
    return every.scatter_add(1, chosen.clamp(0, count - 1), values.masked_fill(~is_expert, 0))


@torch.no_grad()
def _at_the_target(read: Read, bound: BoundModel, case: _Case, _: int) -> Tensor:
    """``[targets, layers, C]``: the values ``[targets, C]`` that ``read`` computes from the layers' traces."""
    capturing = _ReadLayers(bound, case, read)
    capturing.run()
    return torch.stack(capturing.layers_read, 1)


class _ReadLayers(Capture):
    """Calls ``read`` on each layer's trace, at the targets' positions; it gives None for layers without such components."""

    def __init__(self, bound: BoundModel, case: _Case, read: Read) -> None:
        super().__init__(bound, [case.prompt.ids], range(len(bound.layers)))
        self.positions = [readout.target.position for readout in case.readouts]
        self.read, self.layers_read = read, list[Tensor]()

    def layer(self, index: int, trace: Trace) -> None:
        values = self.read(self.bound.layers[index], trace, self.positions)
        if values is not None:
            self.layers_read.append(values.cpu())


def _output_norm(layer: Layer, trace: Trace, positions: list[int]) -> Tensor | None:
    if not layer.mixers:
        return None
    by_mixer = []
    for mixer, own in zip(layer.mixers, trace.mixers, strict=True):
        assert own.mixed is not None
        mixed = own.mixed[positions].float().view(len(positions), mixer.num_heads, -1)  # [targets, H, d]
        weight = into_stream(mixer.output.weight, layer.attention_post_norm, torch.float32)
        weight = weight.reshape(len(weight), mixer.num_heads, -1)  # [D, H, d]
        by_mixer.append(torch.linalg.vector_norm(torch.einsum("thd,ohd->tho", mixed, weight), dim=-1))
    sizes = torch.cat(by_mixer, 1)
    scale = trace.scales.get("attention_post_norm")
    return sizes if scale is None else sizes * scale[positions, None]


def _activation(_: Layer, trace: Trace, positions: list[int]) -> Tensor | None:
    return None if trace.hidden is None else trace.hidden[positions].float()


def _activation_x_norm(layer: Layer, trace: Trace, positions: list[int]) -> Tensor | None:
    activation = _activation(layer, trace, positions)
    if activation is None:
        return None
    weight = into_stream(layer.only_mlp.down.weight, layer.mlp_post_norm, torch.float32)
    columns: Tensor = torch.linalg.vector_norm(weight, dim=0)  # [F]
    sizes = activation * columns
    scale = trace.scales.get("mlp_post_norm")
    return sizes if scale is None else sizes * scale[positions, None]


def _router_weight(layer: Layer, trace: Trace, positions: list[int]) -> Tensor | None:
    if layer.experts is None:
        return None
    assert trace.chosen is not None
    assert trace.chosen_weights is not None
    return _of_experts(trace.chosen[positions], trace.chosen_weights[positions].float(), layer.experts.count)


def _expert_norm(layer: Layer, trace: Trace, positions: list[int]) -> Tensor | None:
    if layer.experts is None:
        return None
    assert trace.chosen is not None
    assert trace.chosen_weights is not None
    assert trace.routed is not None
    places = layer.experts.places(trace.chosen[positions], trace.chosen_weights[positions])
    sizes = torch.zeros(len(positions), layer.experts.count, device=trace.routed.device)
    norms = [name for name in ("experts_post_norm", "mlp_post_norm") if getattr(layer, name) is not None]
    added = outputs(layer.experts.read(), places, trace.routed[positions], torch.float32, with_bias=False)
    for expert, run, output in added:
        for name in norms:
            output = getattr(layer, name).weighted(output)
        sizes[places.position[run], expert] = torch.linalg.vector_norm(output, dim=-1)
    for name in norms:
        sizes = sizes * trace.scales[name][positions, None]
    return sizes


def _random(kind: Kind, bound: BoundModel, case: _Case, seed: int) -> Tensor:
    shape = (len(case.readouts), len(layers_with(bound, kind)), num_components(bound, kind))
    return torch.randn(shape, generator=case.generator(seed), device="cpu")


HEADS: dict[str, Callable[[BoundModel, _Case, int], Tensor]] = {
    "attribution_patching": partial(_attribution_patching, "heads", False),
    "output_norm": partial(_at_the_target, _output_norm),
    "random": partial(_random, "heads"),
}
NEURONS: dict[str, Callable[[BoundModel, _Case, int], Tensor]] = {
    "attribution_patching": partial(_attribution_patching, "neurons", False),
    "attribution_patching_last": partial(_attribution_patching, "neurons", True),
    "activation": partial(_at_the_target, _activation),
    "activation_x_norm": partial(_at_the_target, _activation_x_norm),
    "random": partial(_random, "neurons"),
}
EXPERTS: dict[str, Callable[[BoundModel, _Case, int], Tensor]] = {
    "attribution_patching": _router_patching,
    "output_norm": partial(_at_the_target, _expert_norm),
    "router_weight": partial(_at_the_target, _router_weight),
    "random": partial(_random, "experts"),
}
