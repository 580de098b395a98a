"""csrc's CUDA kernels, for tensors on a GPU; sums are in fp32."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..build import build_info
from . import csrc
from .common import Backend, Op, columns_apart, head_too_large, not_for_gpu


@cache
def _missing() -> str | None:
    if (missing := csrc.csrc_missing()) is not None:
        return missing
    if not build_info().get("cuda_architectures"):
        return f"csrc was built without its CUDA kernels: {build_info().get('cuda_missing', 'no build_info')}"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _refuses_mix(
    pattern: Tensor, values: Tensor, kv_heads: int, query_scale: Tensor | None, out: Tensor, **_: object
) -> str | None:
    return (
        head_too_large(values, kv_heads, 256)
        or not_for_gpu(pattern, values, out)
        or columns_apart(pattern=pattern, values=values, out=out)
        or csrc.not_fp32(query_scale=query_scale)
    )


def _refuses_share(gate: Tensor, hidden: Tensor, gate_total: Tensor | None, out: Tensor, **_: object) -> str | None:
    return not_for_gpu(gate, hidden, gate_total, out) or columns_apart(
        gate=gate, hidden=hidden, gate_total=gate_total, out=out
    )


def _refuses_normed(
    state: Tensor, scale: Tensor | None, weight: Tensor | None, rows: Tensor | None, out: Tensor, **_: object
) -> str | None:
    return not_for_gpu(state, weight, out) or csrc.cannot_norm(state, scale, weight, rows, out)


CUDA = Backend(
    "cuda",
    _missing,
    {
        "normed": Op(csrc.normed, _refuses_normed),
        "mix_values": Op(csrc.mix_values, _refuses_mix),
        "share_hidden": Op(csrc.share_hidden, _refuses_share),
    },
)
