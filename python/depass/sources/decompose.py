"""Lays out the sources of a component spec; finds out whether something can be sources at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from depass_kernels import SourceLayout

from ..errors import SourceError
from ..inputs.prompt import check_unit
from ..models.bound import BoundModel
from ..models.trace import Trace
from .components import Heads, Modules, Neurons, _heads, _modules, _neurons
from .parts import _indices, _named, _Parts, check_layer
from .source import Decomposition, Source
from .spans import Spans
from .subspaces import Custom, Subspace, _given, _subspace

COMPONENT_BYTES = 32 << 20  # while components' outputs are made
_NUMBERS = COMPONENT_BYTES // 32  # of a block of outputs, of which a few exist at a time


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


_MAKERS: dict[type, Callable[[Any, int, BoundModel], _Parts]] = {
    Heads: _heads,
    Neurons: _neurons,
    Modules: _modules,
    Subspace: _subspace,
    Custom: lambda spec, length, bound: _given(spec, spec.parts, "part", length, bound, has_rest=False),
}
COMPONENTS = tuple(_MAKERS)


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


def check_kind(sources: Any) -> None:
    """Find out without a prompt whether something can be its sources.

    Raises:
        SourceError: it is nothing of the kind.
    """
    if isinstance(sources, str):
        check_unit(sources)
    elif not isinstance(sources, (Spans, *COMPONENTS)):
        raise SourceError(
            "sources must be 'token', 'word', 'sentence', Spans([...]) or one of Heads, Neurons, Modules, Subspace and "
            f"Custom, got {sources!r}"
        )
