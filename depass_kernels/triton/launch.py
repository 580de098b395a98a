"""The description of a kernel launch, used to launch the kernel and to compile it ahead of time."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run as numpy programs on CPU tensors
TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Launch:
    """One launch: ``args`` are a kernel's runtime arguments, ``options`` its constants and compiler options."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        """Launch the kernel on the current stream of its tensors' device."""
        if self.programs == 0:
            return
        device = next(arg.device for arg in self.args if isinstance(arg, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[(self.programs,)](*self.args, **self.options)


def power_of_two(number: int, least: int, most: int) -> int:
    """The smallest power of two that is ``number`` or more, between ``least`` and ``most``."""
    return max(least, min(most, int(triton.next_power_of_2(number))))


def computing_type(*tensors: Tensor) -> tl.dtype:
    """The type that a kernel computes in: fp64 if a tensor is fp64, else fp32."""
    return tl.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else tl.float32
