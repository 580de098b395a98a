"""Baselines that attribute a logit to heads and neurons. They return sweeps."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..api import DePass
from ..checks import integer
from ..errors import OptionError
from ..masking import Kind, num_components
from ..models import capture
from ..models.bound import BoundModel, Layer, into_stream
from ..models.capture import Capture
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
    refuse_inference_mode,
)


def heads(dp: DePass, name: str, prompt: Any, target: Any = None, *, seed: int = 0) -> Sweep:
    """Score every attention head of the model with a baseline.

    ========================  ===============================================================================================
    ``attribution_patching``  the logit's gradient with respect to the head's output *before* the output projection, times
                              that output, summed over positions: a first-order estimate of setting it to zero
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

    Returns:
        A sweep with scores ``[targets, layers, heads]``, as from ``dp.sweep("heads", ...)``.

    Raises:
        OptionError: an unknown name.
        PromptError, TargetError, ModelError, NonFiniteError: see :func:`tokens`.
    """
    return _sweep(dp, "heads", _named(name, HEADS, "heads"), name, prompt, target, seed)


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
        OptionError: an unknown name.
        PromptError, TargetError, ModelError, NonFiniteError: see :func:`tokens`.
    """
    return _sweep(dp, "neurons", _named(name, NEURONS, "neurons"), name, prompt, target, seed)


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
        layers=tuple(range(len(bound.layers))),
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


# --- heads and neurons --------------------------------------------------------------------------------------------------


class _Inputs:
    """The inputs ``[1, N, C·d]`` of modules in this thread's pass, in the order of their calls."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.inputs: list[Tensor] = []

    @capture.of_this_thread
    def keep(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.inputs.append(args[0])


def _attribution_patching(kind: Kind, last: bool, bound: BoundModel, case: _Case, _: int) -> Tensor:
    """``[targets, layers, C]``: gradient times value of the inputs of the output or down projections.

    They are summed over positions, or with ``last`` taken only at the targets' own positions.
    """
    refuse_inference_mode(bound)
    kept = _Inputs()
    with torch.enable_grad(), capture.running, ExitStack() as stack:
        for layer in bound.layers:
            module = (layer.output if kind == "heads" else layer.down).module
            stack.callback(module.register_forward_pre_hook(kept.keep).remove)
        # the graph starts at the embeddings, so it works for frozen weights as well
        normed = capture.normed(bound, inputs_embeds=_embedded(bound, case)[None].requires_grad_())[0]
        by_target = []
        for j, readout in enumerate(case.readouts):
            more = j + 1 < len(case.readouts)
            gradients = torch.autograd.grad(_value(normed, readout), kept.inputs, retain_graph=more)
            counted = slice(readout.target.position, readout.target.position + 1) if last else slice(None)
            parts = [
                (g.float() * x.detach().float())[0, counted].sum(0).cpu()
                for g, x in zip(gradients, kept.inputs, strict=True)
            ]
            by_target.append(torch.stack([part.view(num_components(bound, kind), -1).sum(1) for part in parts]))
    return torch.stack(by_target)


@torch.no_grad()
def _at_the_target(read: Callable[[Layer, Trace, list[int]], Tensor], bound: BoundModel, case: _Case, _: int) -> Tensor:
    """``[targets, layers, C]``: the values ``[targets, C]`` that ``read`` computes from each layer's trace."""
    capturing = _ReadLayers(bound, case, read)
    capturing.run()
    return torch.stack(capturing.layers_read, 1)


class _ReadLayers(Capture):
    """Calls ``read`` on each layer's trace, at the targets' positions."""

    def __init__(self, bound: BoundModel, case: _Case, read: Callable[[Layer, Trace, list[int]], Tensor]) -> None:
        super().__init__(bound, [case.prompt.ids], range(len(bound.layers)))
        self.positions = [readout.target.position for readout in case.readouts]
        self.read, self.layers_read = read, list[Tensor]()

    def layer(self, index: int, trace: Trace) -> None:
        self.layers_read.append(self.read(self.bound.layers[index], trace, self.positions).cpu())


def _output_norm(heads: int, layer: Layer, trace: Trace, positions: list[int]) -> Tensor:
    assert trace.mixed is not None
    mixed = trace.mixed[positions].float().view(len(positions), heads, -1)  # [targets, H, d]
    weight = into_stream(layer.output.weight, layer.attention_post_norm, torch.float32)
    weight = weight.reshape(len(weight), heads, -1)  # [D, H, d]
    sizes: Tensor = torch.linalg.vector_norm(torch.einsum("thd,ohd->tho", mixed, weight), dim=-1)
    scale = trace.scales.get("attention_post_norm")
    return sizes if scale is None else sizes * scale[positions, None]


def _activation(_: Layer, trace: Trace, positions: list[int]) -> Tensor:
    assert trace.hidden is not None
    return trace.hidden[positions].float()


def _activation_x_norm(layer: Layer, trace: Trace, positions: list[int]) -> Tensor:
    weight = into_stream(layer.down.weight, layer.mlp_post_norm, torch.float32)
    columns: Tensor = torch.linalg.vector_norm(weight, dim=0)  # [F]
    sizes = _activation(layer, trace, positions) * columns
    scale = trace.scales.get("mlp_post_norm")
    return sizes if scale is None else sizes * scale[positions, None]


def _output_norms(bound: BoundModel, case: _Case, seed: int) -> Tensor:
    return _at_the_target(partial(_output_norm, bound.num_heads), bound, case, seed)


def _random(kind: Kind, bound: BoundModel, case: _Case, seed: int) -> Tensor:
    shape = (len(case.readouts), len(bound.layers), num_components(bound, kind))
    return torch.randn(shape, generator=case.generator(seed), device="cpu")


HEADS: dict[str, Callable[[BoundModel, _Case, int], Tensor]] = {
    "attribution_patching": partial(_attribution_patching, "heads", False),
    "output_norm": _output_norms,
    "random": partial(_random, "heads"),
}
NEURONS: dict[str, Callable[[BoundModel, _Case, int], Tensor]] = {
    "attribution_patching": partial(_attribution_patching, "neurons", False),
    "attribution_patching_last": partial(_attribution_patching, "neurons", True),
    "activation": partial(_at_the_target, _activation),
    "activation_x_norm": partial(_at_the_target, _activation_x_norm),
    "random": partial(_random, "neurons"),
}
