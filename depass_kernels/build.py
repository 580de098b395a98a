"""Reads how csrc was built, without loading it or torch."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def build_info() -> dict[str, Any]:
    """The compilers, their versions and the CUDA architectures that csrc was built with; empty if it was not built.

    ``cuda_missing`` says why the CUDA kernels were left out. ``cuda_failed`` says whether nvcc was found but failed.
    """
    if find_spec("depass_kernels._build_info") is None:
        return {}
    info: dict[str, Any] = import_module("depass_kernels._build_info").build_info()
    return info


def warn_if_cuda_failed() -> None:
    """Warn that the CUDA kernels failed to build; pip shows no build output, so the import is the first to tell."""
    info = build_info()
    if info.get("cuda_failed"):
        warnings.warn(
            f"depass_kernels was built without its CUDA kernels because nvcc failed: {info['cuda_missing']}. On a GPU, "
            "Triton or the reference is used instead. To see the whole error, run this in the source directory: "
            "DEPASS_BUILD_CUDA=1 pip install --force-reinstall --no-deps --no-cache-dir . "
            "To leave the CUDA kernels out without this warning, install with DEPASS_BUILD_CUDA=0.",
            RuntimeWarning,
            stacklevel=3,
        )
