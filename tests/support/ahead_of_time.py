"""Compiling a Triton kernel for GPUs that are not there, and reading what it would use."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from depass_kernels.triton.launch import Launch

SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448}  # bytes that a block may have
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class _Target:
    """Stands in for the CUDA driver: knows the GPU to compile for and nothing else."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:  # compiled kernels are kept by device: each target is one of its own
        return int(self.target.arch)

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> None:
        return None

    @classmethod
    def is_active(cls) -> bool:
        return True

    @property
    def launcher_cls(self) -> Any:
        return lambda *args, **options: None


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: bytes of shared memory, registers and bytes of stack a thread, instructions."""

    shared: int
    registers: int
    stack: int
    sass: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.sass))


def compile_for(launch: Launch, capability: int, folder: Path) -> Usage:
    """Compile a launch for sm_<capability>. The stand-in driver stays: no kernel can run in this process any more."""
    driver.set_active(_Target(capability))
    compiled = launch.kernel.warmup(*launch.args, grid=(1, 1, 1), **launch.options)
    compiled = compiled if hasattr(compiled, "asm") else compiled.result()
    cubin = folder / f"sm_{capability}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def dump(flag: str) -> str:
        return subprocess.run([_TOOLS / "cuobjdump", flag, cubin], capture_output=True, text=True, check=True).stdout

    usage = dump("--dump-resource-usage")

    def read(name: str) -> int:
        found = re.search(rf"{name}:(\d+)", usage)
        assert found is not None, usage
        return int(found.group(1))

    return Usage(int(compiled.metadata.shared), read("REG"), read("STACK") + read("LOCAL"), dump("-sass"))
