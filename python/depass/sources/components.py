"""What a model's own parts put into the stream, as sources: heads, neurons, modules, subspaces, and parts of one's own.

Each names a layer and decomposes the stream there once; from there on its sources go through the model like any others.
What a decomposition does not name is its source ``rest``, so that the parts add up to the stream (docs/sources.md).
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
    """The attention heads of a layer: each one's output, and ``rest``, the residual stream without them.

    They join the stream where the attention adds to it, and so go through the same layer's MLP (where attention and MLP
    stand side by side: after the layer). The output projection's bias belongs to the bias source.

    Args:
        layer: from 0.
        ids: which heads; all without it, the others are in ``rest``.
        positions: where their outputs count; elsewhere they are in ``rest``. All positions without it. This asks another
            question, it does not save memory on the same one: the sharing softmax sees other sources.
    """

    layer: int
    ids: Sequence[int] | None = None
    positions: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _keep_iterators(self)


@dataclass(frozen=True)
class Neurons:
    """The MLP neurons of a layer: each one's column of the down projection times its hidden value, and ``rest``.

    They join after the layer; ``rest`` is the stream after the MLP without them.

    Args:
        layer: from 0.
        ids: which neurons; all without it.
        positions: where their outputs count, as for :class:`Heads`. For the last position alone all neurons of a layer
            take one row each.
    """

    layer: int
    ids: Sequence[int] | None = None
    positions: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _keep_iterators(self)


@dataclass(frozen=True)
class Modules:
    """A layer's attention or MLP output as one source, biases included, and ``rest``.

    Args:
        layer: from 0.
        module: ``"attn"`` or ``"mlp"``.
        positions: where its output counts, as for :class:`Heads`.
    """

    layer: int
    module: Literal["attn", "mlp"]
    positions: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _keep_iterators(self)


def _keep_iterators(spec: Any) -> None:
    """A spec may be used for many layers and prompts, and an iterator is used up by the first."""
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
        made = torch.einsum("phd,xhd->phx", mixed, weight)
        return _post_scaled(made, trace.scales.get("attention_post_norm"), where)

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
        made = hidden.to(weight)[:, :, None] * weight.T
        return _post_scaled(made, trace.scales.get("mlp_post_norm"), where)

    sources = [Source(f"L{spec.layer}N{n}", "neuron", layer=spec.layer, index=n) for n in ids]
    return _Parts("end", sources, outputs, _after)


def _modules(spec: Modules, length: int, bound: BoundModel) -> _Parts:
    if not isinstance(spec.module, str) or spec.module not in ("attn", "mlp"):
        raise SourceError(f"module={spec.module!r} of Modules; there are: 'attn', 'mlp'")
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
    """What a sublayer adds to the stream, made of what its output projection ``read`` ``[N, in]``."""
    assert read is not None
    weight = into_stream(projection.weight, norm, bound.state_dtype)
    made = read.to(weight) @ weight.T
    made = made if scale is None else made * scale[:, None]
    bias = _output_bias(projection, norm, scale, trace)
    return made if bias is None else made + bias


def _output_bias(projection: Projection, norm: Norm | None, scale: Tensor | None, trace: Trace) -> Tensor | None:
    """A sublayer's output bias at every position ``[N, D]``, through the norm on the output where there is one."""
    bias = projection.bias
    if bias is None:
        return None
    bias = bias.to(torch.float64 if bias.dtype == torch.float64 else torch.float32)
    if norm is not None and scale is not None:
        return bias * norm.gamma(bias.dtype) * scale[:, None]
    return bias.expand(len(trace.stream), -1)


def _post_scaled(parts: Tensor, scale: Tensor | None, where: Tensor) -> Tensor:
    return parts if scale is None else parts * scale[where, None, None]
