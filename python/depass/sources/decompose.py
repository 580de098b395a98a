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


def decompose_components(spec: Any, length: int, bound: BoundModel, routing: Tensor | None = None) -> Decomposition:
    """Lay out the sources of a component spec over a prompt of ``length`` tokens.

    Args:
        spec: the component spec.
        length: the number of tokens.
        bound: the model.
        routing: the experts ``[N, k]`` that each position chose in the layer of :class:`RoutedExperts`. Without it all
            experts are sources, as for linear rules: there a source that is zero takes nothing from others.

    Raises:
        OptionError: the layer is out of range.
        SourceError: heads, neurons, experts or positions are out of range, the layer has none of them, or a tensor has the
            wrong shape.
    """
    layer = check_layer(spec, bound)
    spec = replace(spec, layer=layer)
    if isinstance(spec, RoutedExperts):
        parts = _routed_experts(spec, length, bound, routing)
    else:
        parts = _MAKERS[type(spec)](spec, length, bound)
    _refuse_values_without_rest(spec, bound, parts)
    positions = _indices(_named("positions", spec), getattr(spec, "positions", None), length, negative=True)
    starts = [positions[0]] * len(parts.sources) if parts.starts is None else parts.starts
    always = [Source("bias", "bias")] if bound.has_bias else []
    rest = len(always)
    if parts.has_rest:
        always.append(Source("rest", "rest"))
    sources = (*always, *parts.sources)
    layout = SourceLayout.from_starts([0] * len(always) + starts, length)

    def fill(rows: Tensor, trace: Trace) -> None:
        room = _Room(rows, layout, len(always), None if parts.starts is not None else positions[0])
        missing = parts.whole(trace).to(rows)  # may be the trace's own
        bias = parts.bias(trace)
        if bias is not None:
            room.everywhere(0, bias)
            missing = missing - bias
        blocks = parts.blocks(trace, torch.tensor(positions, device=rows.device), _NUMBERS)
        for index, (own, where, outputs) in enumerate(blocks):
            room.components(own, where, outputs)
            subtract = missing.index_add_ if index else missing.index_add
            missing = subtract(0, where, outputs.sum(1), alpha=-1)
        if parts.has_rest:
            room.everywhere(rest, missing)
        else:
            _must_vanish(missing, parts.whole(trace), spec, bound)

    return Decomposition(sources, layout, False, layer, parts.moment, fill, spec)


def _refuse_values_without_rest(spec: Any, bound: BoundModel, parts: _Parts) -> None:
    """Raise a SourceError where no source could hold the values that later layers take from earlier ones."""
    lent = [index for index in bound.lending if index < spec.layer]
    if lent and not parts.has_rest:
        raise SourceError(
            f"{type(spec).__name__}(layer={spec.layer}) has no remainder, but later layers of {bound.name} take the values "
            f"of layer {lent[0]}, which are not in the residual stream; use Subspace(parts=...), which has one"
        )


class _Room:
    """The rows ``[R, D]`` of a decomposition, to write the sources' parts to.

    Args:
        rows: the rows.
        layout: their layout.
        always: how many sources are there at all positions; they are the first.
        first: the position where all components start; None if each starts at its own. With one start the rows are two
            dense tensors, and nothing is scattered.
    """

    def __init__(self, rows: Tensor, layout: SourceLayout, always: int, first: int | None) -> None:
        self.rows, self.always, self.first = rows, always, first
        if first is None:
            self.begins = layout.to(rows.device).row_start[:-1]  # [N], the row of source 0 at each position
        else:
            below, width = first * always, rows.shape[1]
            self.early = rows[:below].view(first, always, width)
            self.late = rows[below:].view(layout.positions - first, -1, width)

    def everywhere(self, source: int, values: Tensor) -> None:
        """Write the part ``[N, D]`` of one of the sources that are there at all positions."""
        if self.first is None:
            self.rows[self.begins + source] = values.to(self.rows)
        else:
            self.early[:, source], self.late[:, source] = values[: self.first], values[self.first :]

    def components(self, own: slice, where: Tensor, outputs: Tensor) -> None:
        """Write the parts ``[q, n, D]`` of ``n`` consecutive components at the positions ``where`` ``[q]``."""
        sources = slice(self.always + own.start, self.always + own.stop)
        if self.first is None:
            held = torch.arange(sources.start, sources.stop, device=self.rows.device)
            self.rows[self.begins[where][:, None] + held] = outputs
        else:
            self.late[where - self.first, sources] = outputs


_MAKERS: dict[type, Callable[[Any, int, BoundModel], _Parts]] = {
    Heads: _heads,
    Neurons: _neurons,
    Modules: _modules,
    Subspace: _subspace,
    Custom: lambda spec, length, bound: _given(spec, spec.parts, "part", length, bound, has_rest=False),
}
COMPONENTS = (*_MAKERS, RoutedExperts)


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
