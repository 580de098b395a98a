"""csrc/*.cu compiled by g++ against the CUDA stand-ins beside this file, with the signatures of the reference."""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import POINTER, Structure, byref, c_bool, c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from depass_kernels import SourceLayout, backends

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLAGS = [
    "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror",
    # a card's fused multiply-adds are the compiler's choice, ours are none; 16-byte accesses must be aligned on a card
    "-ffp-contract=off", "-fno-strict-aliasing", "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error",
]  # fmt: skip


class Matrix(Structure):
    _fields_ = [("data", c_void_p), ("type", c_int), ("stride", c_int64)]


class Normed(Structure):
    _fields_ = [
        ("state", Matrix), ("out", Matrix), ("position", c_void_p), ("rows", c_void_p), ("scale", c_void_p),
        ("weight", c_void_p), ("weight_type", c_int), ("centred", c_bool), ("count", c_int64), ("columns", c_int64),
    ]  # fmt: skip


class ShareHidden(Structure):
    _fields_ = [
        ("gate", Matrix), ("hidden", Matrix), ("gate_total", Matrix), ("out", Matrix), ("row_start", c_void_p),
        ("skipped", c_void_p), ("rule", c_int), ("temperature", c_double), ("positions", c_int64),
        ("columns", c_int64), ("most", c_int64),
    ]  # fmt: skip


class MixValues(Structure):
    _fields_ = [
        ("pattern", c_void_p), ("pattern_type", c_int), ("prompt_stride", c_int64), ("head_stride", c_int64),
        ("query_stride", c_int64), ("values", Matrix), ("out", Matrix), ("row_start", c_void_p),
        ("position_start", c_void_p), ("prompt", c_void_p), ("query_scale", c_void_p),
        ("tiles", c_void_p), ("tile_count", c_int64), ("heads", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64),
    ]  # fmt: skip


class Emulated:
    """The CUDA backend's kernels on CPU tensors. Raises RuntimeError with the CUDA error of a launch."""

    def __init__(self, folder: Path) -> None:
        library = folder / "emulated.so"
        sources = [HERE / "emulation.cpp", "-x", "c++", *sorted(CSRC.glob("*.cu"))]
        subprocess.run(["g++", *FLAGS, f"-I{HERE}", f"-I{CSRC}", *map(str, sources), "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.normed.argtypes = [POINTER(Normed)]
        self._library.share_hidden.argtypes = [POINTER(ShareHidden)]
        self._library.mix_values.argtypes = [POINTER(MixValues)]

    def normed(
        self,
        state: Tensor,  # [R', D]
        layout: SourceLayout,
        scale: Tensor | None,  # [P]
        weight: Tensor | None,  # [D]
        centred: bool,
        rows: Tensor | None,  # [R]
        out: Tensor,  # [R, D]
    ) -> None:
        call = Normed(
            _matrix(state), _matrix(out), _pointer(layout.position_of_row(state.device)), _pointer(rows), _pointer(scale),
            _pointer(weight), 0 if weight is None else TYPES.index(weight.dtype), centred, *out.shape,
        )  # fmt: skip
        _check(self._library.normed(byref(call)))

    def share_hidden(
        self,
        gate: Tensor,  # [R, F]
        hidden: Tensor,  # [P, F]
        layout: SourceLayout,
        rule: str,
        temperature: float,
        gate_total: Tensor | None,  # [P, F]
        out: Tensor,  # [R, F]
    ) -> None:
        call = ShareHidden(
            _matrix(gate), _matrix(hidden), _matrix(gate_total), _matrix(out), _pointer(layout.row_start),
            _pointer(layout.skipped), backends.RULES.index(rule), temperature, layout.positions,
            gate.shape[1], layout.most,
        )  # fmt: skip
        _check(self._library.share_hidden(byref(call)))

    def mix_values(
        self,
        pattern: Tensor,  # [B, H, N, N]
        values: Tensor,  # [R, K·d]
        layout: SourceLayout,
        kv_heads: int,
        query_scale: Tensor | None,  # [P]
        out: Tensor,  # [R, H·d]
    ) -> None:
        tiles = layout.mix_tiles(64, 1, values.device)
        call = MixValues(
            pattern.data_ptr(), TYPES.index(pattern.dtype), *pattern.stride()[:3], _matrix(values), _matrix(out),
            _pointer(layout.row_start), _pointer(layout.position_start), _pointer(layout.prompt), _pointer(query_scale),
            _pointer(tiles), len(tiles), pattern.shape[1], kv_heads, values.shape[1] // kv_heads,
        )  # fmt: skip
        _check(self._library.mix_values(byref(call)))


def _pointer(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor | None) -> Matrix:
    if tensor is None:
        return Matrix()
    assert tensor.stride(1) == 1 or tensor.shape[1] == 1
    return Matrix(tensor.data_ptr(), TYPES.index(tensor.dtype), tensor.stride(0))


def _check(error: int) -> None:
    if error != 0:
        raise RuntimeError(f"CUDA error {error}")
