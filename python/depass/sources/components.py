"""Components of a layer as sources: the outputs of heads, neurons and modules.

Each spec names a layer and decomposes the residual stream there. From there on, its sources go through the model like any
others. The remainder is the source ``rest``, so that the sources add up to the residual stream (docs/sources.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import SourceError
from ..models.bound import BoundModel, Layer, Norm, Projection, into_stream
from ..models.trace import Trace
from .parts import _after, _indices, _named, _Parts
from .source import Source


@dataclass(frozen=True)
class Heads:
    """The outputs of a layer's attention heads as sources; the remainder of the residual stream is the source ``rest``.

    They start where the attention adds to the residual stream, and so go through the same layer's MLP. In a model with
    parallel attention and MLP they start after the layer. The output projection's bias belongs to the bias source.

    Args:
        layer: the layer, from 0.
        ids: the heads; by default all. Other heads are part of the remainder.
        positions: the positions whose outputs count; by default all. Outputs at other positions are part of the
            remainder. Fewer positions do not only save memory: other sources compete for each neuron, so the scores
            change.
    """

    layer: int
    ids: Sequence[int] | None = None
    positions: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _keep_iterators(self)


@dataclass(frozen=True)
class Neurons:
    """The outputs of a layer's MLP neurons as sources: ``W_down[:, f] · h[t, f]`` for neuron ``f`` at position ``t``.

    They start after the layer; the source ``rest`` is the remainder of the residual stream there.

    Args:
        layer: the layer, from 0.
        ids: the neurons; by default all.
        positions: the positions whose outputs count, as for :class:`Heads`. With the last position only, each neuron takes
            one row of state.
    """

    layer: int
    ids: Sequence[int] | None = None
    positions: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _keep_iterators(self)


@dataclass(frozen=True)
class Modules:
    """The output of a layer's attention or MLP as one source, biases included; the remainder is the source ``rest``.

    Args:
        layer: the layer, from 0.
        module: ``"attn"`` or ``"mlp"``.
        positions: the positions whose output counts, as for :class:`Heads`.
    """

    layer: int
    module: Literal["attn", "mlp"]
    positions: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _keep_iterators(self)


def _keep_iterators(spec: Any) -> None:
    """Turn iterators into tuples: a spec may be used for many layers and prompts."""
    for name in ("ids", "positions"):
        if isinstance(getattr(spec, name, None), Iterator):
            object.__setattr__(spec, name, tuple(getattr(spec, name)))


def _heads(spec: Heads, length: int, bound: BoundModel) -> _Parts:
    layer = bound.layers[spec.layer]
    ids = _indices(_named("ids", spec), spec.ids, bound.num_heads)

    def outputs(trace: Trace, where: Tensor) -> Tensor:
        assert trace.mixed is not None
        weight = into_stream(layer.output.weight, layer.attention_post_norm, bound.state_dtype)
        mixed = trace.mixed[where].to(weight).view(len(where), bound.num_heads, -1)  # [p, H, d]
        weight = weight.reshape(len(weight), bound.num_heads, -1)
        if len(ids) < bound.num_heads:
            weight, mixed = weight[:, ids], mixed[:, ids]
        head_outputs = torch.einsum("phd,xhd->phx", mixed, weight)
        return _post_scaled(head_outputs, trace.scales.get("attention_post_norm"), where)

    def bias(trace: Trace) -> Tensor | None:
        return _output_bias(layer.output, layer.attention_post_norm, trace.scales.get("attention_post_norm"), trace)

    sources = [Source(f"L{spec.layer}H{h}", "head", layer=spec.layer, index=h) for h in ids]
    if bound.parallel:
        return _Parts("end", sources, outputs, _after, bias)
    return _Parts("middle", sources, outputs, lambda trace: _after_attention(trace, layer, bound), bias)


def _neurons(spec: Neurons, length: int, bound: BoundModel) -> _Parts:
    layer = bound.layers[spec.layer]
    count = layer.down.shape[1]
    ids = _indices(_named("ids", spec), spec.ids, count)

    def outputs(trace: Trace, where: Tensor) -> Tensor:
        assert trace.hidden is not None
        weight, hidden = layer.down.weight, trace.hidden[where]  # [D, F], [p, F]
        if len(ids) < count:
            chosen = torch.tensor(ids, device=hidden.device)
            weight, hidden = weight[:, chosen], hidden[:, chosen]
        weight = into_stream(weight, layer.mlp_post_norm, bound.state_dtype)
        neuron_outputs = hidden.to(weight)[:, :, None] * weight.T
        return _post_scaled(neuron_outputs, trace.scales.get("mlp_post_norm"), where)

    sources = [Source(f"L{spec.layer}N{n}", "neuron", layer=spec.layer, index=n) for n in ids]
    return _Parts("end", sources, outputs, _after)


def _modules(spec: Modules, length: int, bound: BoundModel) -> _Parts:
    if not isinstance(spec.module, str) or spec.module not in ("attn", "mlp"):
        raise SourceError(f"Modules(module={spec.module!r}): the module must be 'attn' or 'mlp'")
    layer = bound.layers[spec.layer]
    source = Source(f"L{spec.layer}.{spec.module}", "module", layer=spec.layer)
    if spec.module == "attn":

        def attention(trace: Trace, where: Tensor) -> Tensor:
            return _attention_output(trace, layer, bound)[where, None]

        if bound.parallel:
            return _Parts("end", [source], attention, _after)
        return _Parts("middle", [source], attention, lambda trace: _after_attention(trace, layer, bound))

    def mlp(trace: Trace, where: Tensor) -> Tensor:
        scale = trace.scales.get("mlp_post_norm")
        return _output(trace.hidden, layer.down, layer.mlp_post_norm, scale, trace, bound)[where, None]

    return _Parts("end", [source], mlp, _after)


def _after_attention(trace: Trace, layer: Layer, bound: BoundModel) -> Tensor:
    return trace.stream.to(bound.state_dtype) + _attention_output(trace, layer, bound)


def _attention_output(trace: Trace, layer: Layer, bound: BoundModel) -> Tensor:  # [N, D]
    scale = trace.scales.get("attention_post_norm")
    return _output(trace.mixed, layer.output, layer.attention_post_norm, scale, trace, bound)


def _output(
    read: Tensor | None,
    projection: Projection,
    norm: Norm | None,
    scale: Tensor | None,
    trace: Trace,
    bound: BoundModel,
) -> Tensor:  # [N, D]
    """The output that a sublayer adds to the residual stream, from the input ``read`` ``[N, in]`` of its projection."""
    assert read is not None
    weight = into_stream(projection.weight, norm, bound.state_dtype)
    output = read.to(weight) @ weight.T
    output = output if scale is None else output * scale[:, None]
    bias = _output_bias(projection, norm, scale, trace)
    return output if bias is None else output + bias


def _output_bias(projection: Projection, norm: Norm | None, scale: Tensor | None, trace: Trace) -> Tensor | None:
    """A sublayer's output bias at every position ``[N, D]``, after the norm on the output if there is one."""
    bias = projection.bias
    if bias is None:
        return None
    bias = bias.to(torch.float64 if bias.dtype == torch.float64 else torch.float32)
    if norm is not None and scale is not None:
        return norm.weighted(bias) * scale[:, None]
    return bias.expand(len(trace.stream), -1)


def _post_scaled(parts: Tensor, scale: Tensor | None, where: Tensor) -> Tensor:
    return parts if scale is None else parts * scale[where, None, None]
