"""What a model's own parts put into the stream, as sources: heads, neurons, modules, subspaces, and parts of one's own.

Each names a layer and decomposes the stream there once; from there on its sources go through the model like any others
(design: component sources). What a decomposition does not name is its source ``rest``, so that the parts add up to the
stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from depass_kernels import SourceLayout
from depass_kernels.ops import FLOATS

from .checks import integer, integers
from .errors import OptionError, SourceError
from .families import BoundModel, Layer, Norm, Projection, into_stream
from .lockstep import Trace
from .propagate import COMPONENT_BYTES
from .sources import Decomposition, Kind, Moment, Source, check_labels

_NUMBERS = COMPONENT_BYTES // 32  # of a block of outputs, of which a few exist at a time


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


@dataclass(frozen=True, eq=False)
class Subspace:
    """The stream that enters a layer, projected onto subspaces, and ``rest``, what lies outside of them.

    Args:
        layer: from 0.
        basis: ``[k, D]`` vectors that span one subspace, in any scale and angle; projected orthogonally.
        projection: ``[D, D]`` or ``[S, D, D]``, linear maps ``P`` of one's own; a source is ``P x``.
        parts: ``[S, N, D]``, the sources themselves.
        labels: one for each source.
    """

    layer: int
    basis: Tensor | None = field(default=None, repr=False)
    projection: Tensor | None = field(default=None, repr=False)
    parts: Tensor | None = field(default=None, repr=False)
    labels: Sequence[str] | None = None


@dataclass(frozen=True, eq=False)
class Custom:
    """The stream that enters a layer, split as one likes. There is no ``rest``: the parts must add up to the stream.

    Args:
        parts: ``[M, N, D]``.
        layer: from 0.
        labels: one for each part.
    """

    parts: Tensor = field(repr=False)
    layer: int = 0
    labels: Sequence[str] | None = None


def _keep_iterators(spec: Any) -> None:
    """A spec may be used for many layers and prompts, and an iterator is used up by the first."""
    for name in ("ids", "positions"):
        if isinstance(getattr(spec, name, None), Iterator):
            object.__setattr__(spec, name, tuple(getattr(spec, name)))


class _Parts(NamedTuple):
    """What a component spec comes to."""

    moment: Moment
    sources: list[Source]
    outputs: Callable[[Trace, Tensor], Tensor]  # trace, positions [p] -> [p, sources, D] in the state's dtype
    whole: Callable[[Trace], Tensor]  # the stream that the parts and rest add up to, [N, D]
    bias: Callable[[Trace], Tensor | None] = lambda trace: None  # what belongs to the bias source, [N, D]
    has_rest: bool = True


def decompose_components(spec: Any, length: int, bound: BoundModel) -> Decomposition:
    """Lay out the sources of a component spec over a prompt of ``length`` tokens.

    Raises:
        OptionError: a layer that the model does not have.
        SourceError: heads, neurons, positions or shapes that do not fit.
    """
    layer = check_layer(spec, bound)
    spec = replace(spec, layer=layer)
    made = _MAKERS[type(spec)](spec, length, bound)
    positions = _indices(_named("positions", spec), getattr(spec, "positions", None), length, negative=True)
    first = positions[0]
    always = [Source("bias", "bias")] if bound.has_bias else []
    rest = len(always)
    if made.has_rest:
        always.append(Source("rest", "rest"))
    sources = (*always, *made.sources)
    layout = SourceLayout.from_starts([0] * len(always) + [first] * len(made.sources), length)

    def fill(rows: Tensor, trace: Trace) -> None:
        width = rows.shape[1]
        below = first * len(always)  # rows of the positions at which the components have not started
        early, late = (
            rows[:below].view(first, len(always), width),
            rows[below:].view(length - first, len(sources), width),
        )
        missing = made.whole(trace).to(rows)
        bias = made.bias(trace)
        if bias is not None:
            early[:, 0], late[:, 0] = bias[:first], bias[first:]
            missing = missing - bias
        at_once = max(1, _NUMBERS // (len(made.sources) * width))
        for begin in range(0, len(positions), at_once):
            where = torch.tensor(positions[begin : begin + at_once], device=rows.device)
            parts = made.outputs(trace, where)
            late[where - first, len(always) :] = parts
            missing = missing.index_add(0, where, parts.sum(1), alpha=-1)
        if made.has_rest:
            early[:, rest], late[:, rest] = missing[:first], missing[first:]
        else:
            _must_vanish(missing, made.whole(trace), spec, bound)

    return Decomposition(sources, layout, False, layer, made.moment, fill)


def check_layer(spec: Any, bound: BoundModel) -> int:
    """The layer that a component spec names.

    Raises:
        OptionError: the model does not have it.
    """
    depth = len(bound.layers)
    layer = integer(f"layer of {type(spec).__name__}", spec.layer, OptionError)
    if not 0 <= layer < depth:
        raise OptionError(f"{type(spec).__name__}(layer={layer!r}): {bound.name} has layers 0 to {depth - 1}")
    return layer


def _named(what: str, spec: Any) -> str:
    return f"{what} of {type(spec).__name__}(layer={spec.layer})"


def _heads(spec: Heads, length: int, bound: BoundModel) -> _Parts:
    layer = bound.layers[spec.layer]
    ids = _indices(_named("ids", spec), spec.ids, bound.heads)

    def outputs(trace: Trace, where: Tensor) -> Tensor:
        assert trace.mixed is not None
        weight = into_stream(layer.output.weight, layer.attention_post_norm, bound.state_dtype)
        mixed = trace.mixed[where].to(weight).view(len(where), bound.heads, -1)  # [p, H, d]
        weight = weight.reshape(len(weight), bound.heads, -1)
        if len(ids) < bound.heads:
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


def _subspace(spec: Subspace, length: int, bound: BoundModel) -> _Parts:
    given = [name for name in ("basis", "projection", "parts") if getattr(spec, name) is not None]
    if len(given) != 1:
        raise SourceError(f"Subspace takes one of basis, projection and parts, got {', '.join(given) or 'none'}")
    width = bound.width
    if spec.basis is not None:
        basis = _finite("basis of Subspace", spec.basis, (None, width)).double()
        lengths = basis.norm(dim=1, keepdim=True)
        if not bool(lengths.all()):
            raise SourceError(
                f"basis of Subspace: vector {int(lengths.argmin())} is zero and spans nothing; leave it out"
            )
        left, sizes, _ = torch.linalg.svd((basis / lengths).T, full_matrices=False)
        span = left[:, sizes > sizes.max() * 1e-6]  # [D, rank]
        maps = (span @ span.T)[None]
    elif spec.projection is not None:
        several = getattr(spec.projection, "ndim", 2) == 3
        shape = (None, width, width) if several else (width, width)
        maps = _finite("projection of Subspace", spec.projection, shape).reshape(-1, width, width)
    else:
        return _given(spec, spec.parts, "subspace", length, bound, has_rest=True)

    def outputs(trace: Trace, where: Tensor) -> Tensor:
        stream = trace.stream[where].to(bound.state_dtype)
        return torch.einsum("px,syx->psy", stream, maps.to(stream))

    return _Parts("start", _labelled(spec, len(maps), "subspace"), outputs, lambda trace: trace.stream)


def _given(spec: Any, given: Any, kind: Kind, length: int, bound: BoundModel, has_rest: bool) -> _Parts:
    width = bound.width
    parts = _finite(f"parts of {type(spec).__name__}", given, (None, length, width))

    def outputs(trace: Trace, where: Tensor) -> Tensor:
        return parts.to(trace.stream.device, bound.state_dtype)[:, where].transpose(0, 1)

    return _Parts("start", _labelled(spec, len(parts), kind), outputs, lambda trace: trace.stream, has_rest=has_rest)


_MAKERS: dict[type, Callable[[Any, int, BoundModel], _Parts]] = {
    Heads: _heads,
    Neurons: _neurons,
    Modules: _modules,
    Subspace: _subspace,
    Custom: lambda spec, length, bound: _given(spec, spec.parts, "part", length, bound, has_rest=False),
}
COMPONENTS = tuple(_MAKERS)


def _labelled(spec: Any, count: int, kind: Kind) -> list[Source]:
    labels = check_labels(spec.labels, count, type(spec).__name__)
    if labels is None:
        labels = [f"L{spec.layer}.{kind}{i if count > 1 else ''}" for i in range(count)]
    return [Source(label, kind, layer=spec.layer, index=i) for i, label in enumerate(labels)]


def _after(trace: Trace) -> Tensor:
    assert trace.after is not None
    return trace.after


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


def _must_vanish(missing: Tensor, stream: Tensor, spec: Any, bound: BoundModel) -> None:
    """Position by position: the first one's stream may be hundreds of times as large as the others'."""
    errors, sizes = missing.abs().amax(1), stream.to(missing).abs().amax(1)
    if not bool((errors <= bound.tolerance * sizes).all()):
        position = int((errors / sizes).argmax())
        raise SourceError(
            f"the parts of {type(spec).__name__} miss the stream that enters layer {spec.layer} by "
            f"{float(errors[position]):.1e} at position {position} (its largest number: {float(sizes[position]):.1e}); "
            "add what is missing as a part, or use Subspace(parts=...)"
        )


def _finite(name: str, given: Any, shape: tuple[int | None, ...]) -> Tensor:
    tensor: Tensor | None
    try:
        tensor = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
    got = type(given).__name__ if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    fits = (
        tensor is not None
        and tensor.dtype in FLOATS
        and tensor.dim() == len(shape)
        and all(n in (None, size) for n, size in zip(shape, tensor.shape, strict=True))
        and tensor.numel() > 0
    )
    if tensor is None or not fits:
        raise SourceError(f"{name} must be floats {wanted} for this prompt and model, got {got}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise SourceError(
            f"{name} must be a dense tensor with numbers, got one of layout {tensor.layout} on {tensor.device}"
        )
    if not bool(tensor.isfinite().all()):
        raise SourceError(f"{name} must be finite, got NaN or infinity")
    return tensor


def _indices(name: str, given: Any, count: int, negative: bool = False) -> list[int]:
    """Checked, sorted indices below ``count``; all of them where none are given."""
    if given is None:
        return list(range(count))
    found, lowest = integers(name, given, SourceError), -count if negative else 0
    for index in found:
        if not lowest <= index < count:
            raise SourceError(f"{name}: {index} is out of range, there are {lowest} to {count - 1}")
    found = [index % count for index in found]
    if not found or len(set(found)) < len(found):
        raise SourceError(f"{name} must name each once and at least one")
    return sorted(found)
