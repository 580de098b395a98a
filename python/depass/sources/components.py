"""Components of a layer as sources: the outputs of heads, neurons, routed experts and modules.

Each spec names a layer and decomposes the residual stream there. From there on, its sources go through the model like any
others. The remainder is the source ``rest``, so that the sources add up to the residual stream (docs/sources.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import listed
from ..errors import SourceError
from ..models.bound import BoundModel, Layer, Mixer, Norm, Projection, into_stream
from ..models.experts import Places, outputs, summed_bias
from ..models.trace import MixerTrace, Trace
from .parts import _after, _indices, _named, _Parts
from .source import Source


@dataclass(frozen=True)
class Heads:
    """The outputs of a layer's attention heads as sources; the remainder of the residual stream is the source ``rest``.

    They start where the attention adds to the residual stream, and so go through the same layer's MLP. In a model with
    parallel attention and MLP they start after the layer. The output projection's bias belongs to the bias source. Where
    attention and a recurrence stand side by side, the recurrence's heads follow those of the attention.

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

    They start after the layer, or before what some layers have behind the MLP (Gemma 4's per-layer inputs). The source
    ``rest`` is the remainder of the residual stream there. Layers with routed experts are refused;
    :class:`RoutedExperts` scores them expert by expert.

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
class RoutedExperts:
    """The outputs of a layer's routed experts as sources; the remainder of the residual stream is the source ``rest``.

    At a position that chose expert ``e``, its output is ``w[t, e] · W_down[e] · h[t, e]`` with the router's weight ``w``,
    after the norm on the MLP's output if the model has one. At other positions it is zero. The sources start after the
    layer, each at the first position that chose the expert; an expert that none chose is no source. The remainder holds
    the output of the MLP beside the experts (the shared experts), if there is one. The experts' output biases belong to
    the bias source.

    Args:
        layer: the layer, from 0. It must have routed experts.
        ids: the experts; by default all. Other experts are part of the remainder.
        positions: the positions whose outputs count, as for :class:`Heads`.
    """

    layer: int
    ids: Sequence[int] | None = None
    positions: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _keep_iterators(self)


@dataclass(frozen=True)
class Modules:
    """The output of a layer's attention or MLP as one source, biases included; the remainder is the source ``rest``.

    A recurrence in the place of attention counts as attention. So does one beside it: the sum of both is one source. The
    MLP's output includes the layer's routed experts and the MLP beside them.

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


def refuse_absent(spec: Heads | Neurons | Modules, bound: BoundModel) -> None:
    """Check that a layer with one sublayer has the one that a spec asks for.

    Raises:
        SourceError: it has the other one.
    """
    layer = bound.layers[spec.layer]
    of_attention = isinstance(spec, Heads) or (isinstance(spec, Modules) and spec.module == "attn")
    if of_attention and not layer.mixers:
        raise SourceError(
            f"{type(spec).__name__}(layer={spec.layer}): this layer of {bound.name} has no attention, only an MLP; take "
            f"Modules({spec.layer}, 'mlp')"
        )
    if not of_attention and not layer.has_mlp:
        raise SourceError(
            f"{type(spec).__name__}(layer={spec.layer}): this layer of {bound.name} has no MLP, only attention or a "
            f"recurrence; take Heads({spec.layer}) or Modules({spec.layer}, 'attn')"
        )


def component_ids(spec: Heads | Neurons | RoutedExperts, bound: BoundModel) -> list[int]:
    """The heads, neurons or experts of a spec, whose layer has them."""
    layer = bound.layers[spec.layer]
    if isinstance(spec, RoutedExperts):
        assert layer.experts is not None
        count = layer.experts.count
    else:
        count = layer.num_heads if isinstance(spec, Heads) else layer.only_mlp.down.shape[1]
    return _indices(_named("ids", spec), spec.ids, count)


def _heads(spec: Heads, length: int, bound: BoundModel) -> _Parts:
    layer = bound.layers[spec.layer]
    refuse_absent(spec, bound)
    ids = _indices(_named("ids", spec), spec.ids, layer.num_heads)

    def outputs(trace: Trace, where: Tensor) -> Tensor:
        by_mixer = []
        for (mixer, own), of_mixer in zip(layer.heads, trace.mixers, strict=True):
            heads = [head - own.start for head in ids if own.start <= head < own.stop]
            by_mixer.append(_of_heads(mixer, layer, of_mixer, where, heads, bound))
        added = by_mixer[0] if len(by_mixer) == 1 else torch.cat(by_mixer, 1)  # one is not copied
        return _post_scaled(added, trace.scales.get("attention_post_norm"), where)

    def bias(trace: Trace) -> Tensor | None:
        return _attention_bias(trace, layer)

    sources = [Source(f"L{spec.layer}H{h}", "head", layer=spec.layer, index=h) for h in ids]
    if bound.parallel:
        return _Parts("end", sources, outputs, _after, bias)
    return _Parts("middle", sources, outputs, lambda trace: _after_attention(trace, layer, bound), bias)


def _of_heads(
    mixer: Mixer, layer: Layer, trace: MixerTrace, where: Tensor, heads: list[int], bound: BoundModel
) -> Tensor:  # [p, h, D]
    """What heads of a mixer add to the residual stream at some positions, before the scale of a norm on it."""
    assert trace.mixed is not None
    weight = into_stream(mixer.output.weight, layer.attention_post_norm, bound.state_dtype)
    mixed = trace.mixed[where].to(weight).view(len(where), mixer.num_heads, -1)  # [p, H, d]
    weight = weight.reshape(len(weight), mixer.num_heads, -1)
    if heads != list(range(mixer.num_heads)):
        weight, mixed = weight[:, heads], mixed[:, heads]
    return torch.einsum("phd,xhd->phx", mixed, weight)


def _neurons(spec: Neurons, length: int, bound: BoundModel) -> _Parts:
    layer = bound.layers[spec.layer]
    refuse_absent(spec, bound)
    if layer.experts is not None:
        raise SourceError(
            f"Neurons(layer={spec.layer}): this layer of {bound.name} has routed experts, whose neurons are no sources; "
            f"take the experts, RoutedExperts({spec.layer}), or the whole MLP, Modules({spec.layer}, 'mlp')"
        )
    down = layer.only_mlp.down
    count = down.shape[1]
    ids = _indices(_named("ids", spec), spec.ids, count)

    def outputs(trace: Trace, where: Tensor) -> Tensor:
        assert trace.hidden is not None
        weight, hidden = down.weight, trace.hidden[where]  # [D, F], [p, F]
        if len(ids) < count:
            chosen = torch.tensor(ids, device=hidden.device)
            weight, hidden = weight[:, chosen], hidden[:, chosen]
        weight = into_stream(weight, layer.mlp_post_norm, bound.state_dtype)
        neuron_outputs = hidden.to(weight)[:, :, None] * weight.T
        return _post_scaled(neuron_outputs, trace.scales.get("mlp_post_norm"), where)

    sources = [Source(f"L{spec.layer}N{n}", "neuron", layer=spec.layer, index=n) for n in ids]
    return _behind_mlp(layer, bound, sources, outputs)


def _routed_experts(spec: RoutedExperts, length: int, bound: BoundModel, routing: Tensor | None = None) -> _Parts:
    layer = bound.layers[spec.layer]
    experts = layer.experts
    if experts is None:
        those = f"; its layers with experts are {listed(bound.expert_layers)}" if bound.has_experts else ""
        raise SourceError(
            f"RoutedExperts(layer={spec.layer}): this layer of {bound.name} has no routed experts{those}; take "
            f"Neurons({spec.layer}) or Modules({spec.layer}, 'mlp')"
        )
    ids = _indices(_named("ids", spec), spec.ids, experts.count)
    starts = None
    if routing is not None:
        ids, starts = _first_choices(
            ids, _indices(_named("positions", spec), spec.positions, length, negative=True), routing
        )
    numbers = {expert: number for number, expert in enumerate(ids)}

    def each(trace: Trace, where: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        assert trace.routed is not None
        places = _places(trace, layer, where, ids)
        added = outputs(experts.read(), places, trace.routed[where], bound.state_dtype, with_bias=False)
        for expert, run, output in added:
            at = where[places.position[run]]
            yield numbers[expert], at, _normed(layer, trace, output, ("experts_post_norm", "mlp_post_norm"), at)

    def bias(trace: Trace) -> Tensor | None:
        if not experts.has_bias:
            return None
        places, length = _places(trace, layer), len(trace.stream)
        summed = summed_bias(experts.read("down_proj_bias"), places, length, bound.state_dtype)
        return _normed(layer, trace, summed, ("experts_post_norm", "mlp_post_norm"))

    sources = [Source(f"L{spec.layer}E{e}", "expert", layer=spec.layer, index=e) for e in ids]
    return _behind_mlp(layer, bound, sources, None, bias=bias, each=each, starts=starts)


def _first_choices(ids: list[int], positions: list[int], routing: Tensor) -> tuple[list[int], list[int]]:
    """The experts that some of the positions chose by ``routing`` ``[N, k]``, and where each was first chosen, rising."""
    first: dict[int, int] = {}
    for position in positions:
        for expert in routing[position].tolist():
            first.setdefault(expert, position)
    chosen = sorted((start, expert) for expert, start in first.items() if expert in set(ids))
    return [expert for _, expert in chosen], [start for start, _ in chosen]


def _places(trace: Trace, layer: Layer, where: Tensor | None = None, ids: Sequence[int] | None = None) -> Places:
    """The places of a layer's experts at some positions, by default at all; with ``ids`` only those of some experts."""
    assert layer.experts is not None
    assert trace.chosen is not None
    assert trace.chosen_weights is not None
    chosen, weight = trace.chosen, trace.chosen_weights
    if where is not None:
        chosen, weight = chosen[where], weight[where]
    if ids is not None:
        chosen = chosen.masked_fill(~torch.isin(chosen, torch.tensor(ids, device=chosen.device)), -1)
    return layer.experts.places(chosen, weight)


def _modules(spec: Modules, length: int, bound: BoundModel) -> _Parts:
    if not isinstance(spec.module, str) or spec.module not in ("attn", "mlp"):
        raise SourceError(f"Modules(module={spec.module!r}): the module must be 'attn' or 'mlp'")
    layer = bound.layers[spec.layer]
    is_there = layer.mixers if spec.module == "attn" else layer.has_mlp
    sources = [Source(f"L{spec.layer}.{spec.module}", "module", layer=spec.layer)] if is_there else []
    if spec.module == "attn":

        def attention(trace: Trace, where: Tensor) -> Tensor:
            return _attention_output(trace, layer, bound)[where, None][:, : len(sources)]

        if bound.parallel:
            return _Parts("end", sources, attention, _after)
        return _Parts("middle", sources, attention, lambda trace: _after_attention(trace, layer, bound))

    def mlp(trace: Trace, where: Tensor) -> Tensor:
        return _mlp_output(trace, layer, bound)[where, None][:, : len(sources)]

    return _behind_mlp(layer, bound, sources, mlp)


def _behind_mlp(layer: Layer, bound: BoundModel, sources: list[Source], outputs: Any, **others: Any) -> _Parts:
    """Parts that start behind a layer's MLP; what some layers have there, they go through.

    ``outputs`` and ``others`` as for :class:`_Parts`.
    """
    if layer.late is None and layer.scalar_path is None:
        return _Parts("end", sources, outputs, _after, **others)

    def whole(trace: Trace) -> Tensor:
        return _after_attention(trace, layer, bound) + _mlp_output(trace, layer, bound)

    return _Parts("late", sources, outputs, whole, **others)


def _after_attention(trace: Trace, layer: Layer, bound: BoundModel) -> Tensor:
    return trace.stream.to(bound.state_dtype) + _attention_output(trace, layer, bound)


def _attention_output(trace: Trace, layer: Layer, bound: BoundModel) -> Tensor:  # [N, D]
    scale, added = trace.scales.get("attention_post_norm"), torch.zeros_like(trace.stream, dtype=bound.state_dtype)
    for mixer, own in zip(layer.mixers, trace.mixers, strict=True):
        added += _output(own.mixed, mixer.output, layer.attention_post_norm, scale, trace, bound)
    return added


def _attention_bias(trace: Trace, layer: Layer) -> Tensor | None:
    """The output biases of a layer's mixers at every position ``[N, D]``, or None."""
    norm, scale = layer.attention_post_norm, trace.scales.get("attention_post_norm")
    biases = [_output_bias(mixer.output, norm, scale, trace) for mixer in layer.mixers]
    found = [bias for bias in biases if bias is not None]
    return sum(found[1:], start=found[0]) if found else None


def _mlp_output(trace: Trace, layer: Layer, bound: BoundModel) -> Tensor:  # [N, D]
    """What the MLP adds to the residual stream: that of the experts, and of the MLP that every position goes through."""
    if layer.experts is None and layer.mlp is not None:
        scale = trace.scales.get("mlp_post_norm")
        return _output(trace.hidden, layer.mlp.down, layer.mlp_post_norm, scale, trace, bound)
    added = torch.zeros_like(trace.stream, dtype=bound.state_dtype)
    if layer.experts is None:
        return added
    assert trace.routed is not None
    places = _places(trace, layer)
    for _, run, output in outputs(layer.experts.read(), places, trace.routed, bound.state_dtype):
        added.index_add_(0, places.position[run], output)
    added = _normed(layer, trace, added, ("experts_post_norm",))
    if layer.mlp is not None:
        of_mlp = _output(trace.hidden, layer.mlp.down, None, None, trace, bound)
        of_mlp = of_mlp if trace.mlp_weight is None else of_mlp * trace.mlp_weight[:, None].to(of_mlp)
        added += _normed(layer, trace, of_mlp, ("shared_post_norm",))
    return _normed(layer, trace, added, ("mlp_post_norm",))


def _normed(layer: Layer, trace: Trace, x: Tensor, names: Sequence[str], at: Tensor | None = None) -> Tensor:
    """Vectors ``[p, D]`` at positions ``at`` ``[p]``, by default all, after those of the named norms that the layer has."""
    for name in names:
        norm: Norm | None = getattr(layer, name)
        if norm is not None:
            scale = trace.scales[name]
            x = norm.weighted(x) * (scale if at is None else scale[at])[:, None]
    return x


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
