"""Tensors in, tensors out: the ops of a decomposed forward pass over staircases of sources. Knows no model."""

from .backends import _warn_if_cuda_failed
from .errors import BackendError, KernelError, LayoutError
from .layout import SourceLayout
from .ops import gate_share, mix_values, residual_update, share_hidden

__all__ = [
    "BackendError", "KernelError", "LayoutError", "SourceLayout", "gate_share", "mix_values", "residual_update",
    "share_hidden",
]  # fmt: skip

_warn_if_cuda_failed()
