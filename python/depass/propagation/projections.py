"""Projections as the decomposed pass uses them: weights with norms folded in, and constants for the bias source."""

from __future__ import annotations

import torch
from torch import Tensor

from depass_kernels import SourceLayout

from ..models.bound import Norm, Projection, into_stream
from ..models.experts import ExpertGate


def folded(weight: Tensor, norm: Norm | None, dtype: torch.dtype, inner: Norm | None = None) -> Tensor:
    """A projection's weight ``[D, in]``; with the ``γ`` of the norm on its output folded in, where there is one.

    ``inner`` is a norm before that one.
    """
    if norm is None and inner is None:
        return weight.to(dtype)
    wide = at_least_fp32(dtype)
    return into_stream(into_stream(weight, inner, wide), norm, wide).to(dtype)


def output_scale(factor: float, like: Tensor, *norms: Norm | None) -> Tensor | None:
    """What multiplies a projection's outputs, ``[D]`` in at least fp32 on the device of ``like`` ``[..., D, in]``; or None.

    It is a factor of the model and the ``γ`` of the norms on the output, where there are such.
    """
    present = [norm for norm in norms if norm is not None]
    if not present and factor == 1:
        return None
    scale = like.new_full(like.shape[-2:-1], factor, dtype=at_least_fp32(like.dtype))
    for norm in present:
        scale = norm.weighted(scale)
    return scale


def constant_of(projection: Projection | ExpertGate, norm: Norm | None, dtype: torch.dtype) -> Tensor | None:
    """The constant part of a projection's output, ``W β + b``, which belongs to the bias source; or None.

    The weight is read only where the norm has a ``β``: of a quantised one that makes a copy.
    """
    beta, bias = None if norm is None else norm.beta(), projection.bias
    parts = [] if beta is None else [projection.weight.to(dtype) @ beta.to(dtype)]
    if bias is not None:
        parts.append(bias.to(dtype))
    return sum(parts[1:], start=parts[0]) if parts else None


def add_constant(rows: Tensor, constant: Tensor, layout: SourceLayout) -> None:
    """Add a constant to the bias source's rows."""
    rows[bias_rows(layout, rows)] += constant.to(rows.dtype)


def bias_rows(layout: SourceLayout, rows: Tensor) -> Tensor:
    """The rows of the bias source, which is source 0 and active everywhere."""
    return layout.to(rows.device).row_start[:-1]


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, and fp32 for others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
