"""Parts of the stream that enters a layer: subspaces, and parts of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import SourceError
from ..models.bound import BoundModel
from ..models.trace import Trace
from .parts import _finite, _labelled, _Parts
from .source import Kind


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


def _subspace(spec: Subspace, length: int, bound: BoundModel) -> _Parts:
    given = [name for name in ("basis", "projection", "parts") if getattr(spec, name) is not None]
    if len(given) != 1:
        raise SourceError(f"Subspace takes one of basis, projection and parts, got {', '.join(given) or 'none'}")
    width = bound.hidden_size
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
    width = bound.hidden_size
    parts = _finite(f"parts of {type(spec).__name__}", given, (None, length, width))

    def outputs(trace: Trace, where: Tensor) -> Tensor:
        return parts.to(trace.stream.device, bound.state_dtype)[:, where].transpose(0, 1)

    return _Parts("start", _labelled(spec, len(parts), kind), outputs, lambda trace: trace.stream, has_rest=has_rest)
