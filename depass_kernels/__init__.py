"""The ops of a decomposed forward pass over a packed (staircase) layout of sources: tensors in, tensors out, no model."""

from importlib import import_module
from typing import TYPE_CHECKING

from .build import warn_if_cuda_failed
from .errors import BackendError, KernelError, LayoutError

if TYPE_CHECKING:
    from .layout import SourceLayout
    from .ops import grouped_matmul, grouped_update, mix_values, normed, residual_update, share_hidden

__all__ = [
    "BackendError", "KernelError", "LayoutError", "SourceLayout", "grouped_matmul", "grouped_update", "mix_values",
    "normed", "residual_update", "share_hidden",
]  # fmt: skip

# Loaded on first use: torch takes seconds to import, and depass_kernels.names must not.
_OPS = ("grouped_matmul", "grouped_update", "mix_values", "normed", "residual_update", "share_hidden")
_HOME = {"SourceLayout": "layout", **dict.fromkeys(_OPS, "ops")}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


warn_if_cuda_failed()
