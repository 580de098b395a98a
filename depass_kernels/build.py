"""What csrc was built with, without loading it or torch."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def build_info() -> dict[str, Any]:
    """What csrc was built with: compilers, their versions, CUDA architectures. Empty where it was not built.

    ``cuda_missing`` says why the CUDA kernels were left out, ``cuda_failed`` whether an nvcc was found and failed.
    """
    if find_spec("depass_kernels._build_info") is None:
        return {}
    info: dict[str, Any] = import_module("depass_kernels._build_info").build_info()
    return info


def warn_if_cuda_failed() -> None:
    """The build fell back to the CPU kernels where pip shows nothing, so the first to tell the user is the import."""
    info = build_info()
    if info.get("cuda_failed"):
        warnings.warn(
            f"depass_kernels was built without its CUDA kernels because nvcc failed: {info['cuda_missing']}. On a GPU, "
            "Triton or the reference serves instead. To see the whole error, run this in the source directory: "
            "DEPASS_BUILD_CUDA=1 pip install --force-reinstall --no-deps --no-cache-dir . "
            "To leave the CUDA kernels out without this warning, install with DEPASS_BUILD_CUDA=0.",
            RuntimeWarning,
            stacklevel=3,
        )
