"""csrc's C++ kernels, for tensors on the CPU of any floating dtype."""

from __future__ import annotations

from torch import Tensor

from . import csrc
from .common import Backend, Op, columns_apart


def _not_on_cpu(tensor: Tensor) -> str | None:
    return None if tensor.device.type == "cpu" else f"it needs tensors on the CPU, got {tensor.device}"


def _refuses_mix(pattern: Tensor, values: Tensor, query_scale: Tensor | None, out: Tensor, **_: object) -> str | None:
    return (
        _not_on_cpu(values)
        or columns_apart(pattern=pattern, values=values, out=out)
        or csrc.not_fp32(query_scale=query_scale)
    )


def _refuses_share(gate: Tensor, hidden: Tensor, gate_total: Tensor | None, out: Tensor, **_: object) -> str | None:
    return _not_on_cpu(gate) or columns_apart(gate=gate, hidden=hidden, gate_total=gate_total, out=out)


def _refuses_normed(
    state: Tensor, scale: Tensor | None, weight: Tensor | None, rows: Tensor | None, out: Tensor, **_: object
) -> str | None:
    return _not_on_cpu(state) or csrc.cannot_norm(state, scale, weight, rows, out)


CPU = Backend(
    "cpu",
    csrc.csrc_missing,
    {
        "normed": Op(csrc.normed, _refuses_normed),
        "mix_values": Op(csrc.mix_values, _refuses_mix),
        "share_hidden": Op(csrc.share_hidden, _refuses_share),
    },
)
