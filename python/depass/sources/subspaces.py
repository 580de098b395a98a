"""Parts of the residual stream at the input of a layer: subspaces and custom parts."""

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
    """Projections of the residual stream at the input of a layer; the remainder is the source ``rest``.

    Give exactly one of ``basis``, ``projection`` and ``parts``.

    Args:
        layer: the layer, from 0.
        basis: ``[k, D]``, vectors that span one subspace; they need not be orthogonal or of unit length. The projection
            onto the subspace is orthogonal.
        projection: ``[D, D]`` or ``[S, D, D]``, one or several linear maps ``P``; a source is ``P x``.
        parts: ``[S, N, D]``, the sources themselves.
        labels: one string per source.
    """

    layer: int
    basis: Tensor | None = field(default=None, repr=False)
    projection: Tensor | None = field(default=None, repr=False)
    parts: Tensor | None = field(default=None, repr=False)
    labels: Sequence[str] | None = None


@dataclass(frozen=True, eq=False)
class Custom:
    """A custom split of the residual stream at the input of a layer; the parts must add up to the residual stream.

    Args:
        parts: ``[M, N, D]``, the ``M`` parts. There is no source ``rest``.
        layer: the layer, from 0.
        labels: one string per part.
    """

    parts: Tensor = field(repr=False)
    layer: int = 0
    labels: Sequence[str] | None = None


def _subspace(spec: Subspace, length: int, bound: BoundModel) -> _Parts:
    given = [name for name in ("basis", "projection", "parts") if getattr(spec, name) is not None]
    if len(given) != 1:
        raise SourceError(
            f"Subspace takes exactly one of basis, projection and parts, got {' and '.join(given) or 'none of them'}"
        )
    width = bound.hidden_size
    if spec.basis is not None:
        basis = _finite("basis of Subspace", spec.basis, (None, width)).double()
        lengths = basis.norm(dim=1, keepdim=True)
        if not bool(lengths.all()):
            raise SourceError(f"basis of Subspace: vector {int(lengths.argmin())} is zero; leave it out")
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
