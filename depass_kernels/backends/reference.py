"""Plain torch, for every op on any device. Its ops are the list of all ops (:data:`depass_kernels.backends.OPS`)."""

from __future__ import annotations

from .. import reference
from .common import Backend, Op


def _never(**_: object) -> None:
    """It can run every call."""


REFERENCE = Backend(
    "reference",
    lambda: None,
    {
        "normed": Op(reference.normed, _never),
        "mix_values": Op(reference.mix_values, _never),
        "share_hidden": Op(reference.share_hidden, _never),
        "residual_update": Op(reference.residual_update, _never),
        "grouped_matmul": Op(reference.grouped_matmul, _never),
        "grouped_update": Op(reference.grouped_update, _never),
    },
)
