"""Lays out the sources of a component spec, and checks the ``sources`` argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from depass_kernels import SourceLayout

from ..errors import SourceError
from ..inputs.prompt import UNITS, check_unit
from ..models.bound import BoundModel
from ..models.trace import Trace
from .components import Heads, Modules, Neurons, RoutedExperts, _heads, _modules, _neurons, _routed_experts
from .parts import _indices, _named, _Parts, check_layer
from .source import Decomposition, Source
from .spans import SECTIONS, Sentences, Spans
from .subspaces import Custom, Subspace, _given, _subspace

COMPONENT_BYTES = 32 << 20  # of temporary memory while the outputs of components are computed
_NUMBERS = COMPONENT_BYTES // 32  # numbers in a block of outputs; a few blocks exist at a time


def decompose_components(spec: Any, length: int, bound: BoundModel) -> Decomposition:
    """Lay out the sources of a component spec over a prompt of ``length`` tokens.

    Raises:
        OptionError: the layer is out of range.
        SourceError: heads, neurons, experts or positions are out of range, the layer has none of them, or a tensor has the
            wrong shape.
    """
    layer = check_layer(spec, bound)
    spec = replace(spec, layer=layer)
    parts = _MAKERS[type(spec)](spec, length, bound)
    positions = _indices(_named("positions", spec), getattr(spec, "positions", None), length, negative=True)
    first = positions[0]
    always = [Source("bias", "bias")] if bound.has_bias else []
    rest = len(always)
    if parts.has_rest:
        always.append(Source("rest", "rest"))
    sources = (*always, *parts.sources)
    layout = SourceLayout.from_starts([0] * len(always) + [first] * len(parts.sources), length)

    def fill(rows: Tensor, trace: Trace) -> None:
        width = rows.shape[1]
        below = first * len(always)  # rows of the positions at which the components have not started
        early, late = (
            rows[:below].view(first, len(always), width),
            rows[below:].view(length - first, len(sources), width),
        )
        missing = parts.whole(trace).to(rows, copy=True)
        bias = parts.bias(trace)
        if bias is not None:
            early[:, 0], late[:, 0] = bias[:first], bias[first:]
            missing -= bias
        for own, where, outputs in parts.blocks(trace, torch.tensor(positions, device=rows.device), _NUMBERS):
            late[where - first, len(always) + own.start : len(always) + own.stop] = outputs
            missing.index_add_(0, where, outputs.sum(1), alpha=-1)
        if parts.has_rest:
            early[:, rest], late[:, rest] = missing[:first], missing[first:]
        else:
            _must_vanish(missing, parts.whole(trace), spec, bound)

    return Decomposition(sources, layout, False, layer, parts.moment, fill, spec)


_MAKERS: dict[type, Callable[[Any, int, BoundModel], _Parts]] = {
    Heads: _heads,
    Neurons: _neurons,
    RoutedExperts: _routed_experts,
    Modules: _modules,
    Subspace: _subspace,
    Custom: lambda spec, length, bound: _given(spec, spec.parts, "part", length, bound, has_rest=False),
}
COMPONENTS = tuple(_MAKERS)


def _must_vanish(missing: Tensor, stream: Tensor, spec: Any, bound: BoundModel) -> None:
    """Check each position separately: at the first, the residual stream may be hundreds of times as large as elsewhere."""
    errors, sizes = missing.abs().amax(1), stream.to(missing).abs().amax(1)
    if not bool((errors <= bound.tolerance * sizes).all()):
        position = int((errors / sizes).argmax())
        raise SourceError(
            f"the parts of {type(spec).__name__} do not add up to the residual stream at the input of layer {spec.layer}: "
            f"at position {position} they miss it by {float(errors[position]):.1e} (its largest absolute value is "
            f"{float(sizes[position]):.1e}); add the difference as a part, or use Subspace(parts=...)"
        )


def check_kind(sources: Any) -> None:
    """Check the kind of the ``sources`` argument, which needs no prompt.

    Raises:
        SourceError: the argument is not a unit, :class:`Spans` or a component spec.
    """
    if isinstance(sources, str):
        check_unit(sources, UNITS + SECTIONS)
    elif not isinstance(sources, (Spans, Sentences, *COMPONENTS)):
        raise SourceError(
            f"sources must be {', '.join(map(repr, UNITS + SECTIONS))}, Sentences(language), Spans([...]), or an instance "
            f"of Heads, Neurons, RoutedExperts, Modules, Subspace or Custom, got {sources!r}"
        )
