"""The Triton kernels, for tensors on a GPU; sums are in fp32. For tests, Triton's interpreter also takes CPU tensors.

``depass_kernels.triton``, and with it triton, is imported only to run a kernel or to check that it can run.
"""

from __future__ import annotations

import os
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .common import Backend, Op, columns_apart, head_too_large, not_for_gpu


@cache
def _missing() -> str | None:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "torch sees no CUDA device (TRITON_INTERPRET=1 runs it slowly on the CPU, for tests)"
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        import_module("depass_kernels.triton.launch")
    except Exception as error:  # another version of triton may lack anything
        return f"triton cannot be loaded: {type(error).__name__}: {error}"
    return None if torch.version.hip is None else "it supports NVIDIA GPUs only"


def _cannot_take(*tensors: Tensor | None) -> str | None:
    return None if import_module("depass_kernels.triton.launch").INTERPRETED else not_for_gpu(*tensors)


def _refuses_mix(pattern: Tensor, values: Tensor, kv_heads: int, out: Tensor, **_: object) -> str | None:
    return (
        head_too_large(values, kv_heads, 256)
        or _cannot_take(pattern, values, out)
        or columns_apart(pattern=pattern, values=values, out=out)
    )


def _refuses_share(gate: Tensor, hidden: Tensor, gate_total: Tensor | None, out: Tensor, **_: object) -> str | None:
    return _cannot_take(gate, hidden, gate_total, out) or columns_apart(
        gate=gate, hidden=hidden, gate_total=gate_total, out=out
    )


def _refuses_normed(state: Tensor, weight: Tensor | None, out: Tensor, **_: object) -> str | None:
    given = [tensor for tensor in (state, weight, out) if tensor is not None]
    return _cannot_take(*given) or columns_apart(state=state, out=out)


def _refuses_update(state: Tensor, operand: Tensor, weight: Tensor, **_: object) -> str | None:
    if state.dtype != torch.float32:
        return f"it needs an fp32 state, got {str(state.dtype).removeprefix('torch.')}"
    return _cannot_take(state, operand, weight) or columns_apart(state=state, operand=operand)


def _refuses_grouped(operand: Tensor, weight: Tensor, out: Tensor, **_: object) -> str | None:
    return _cannot_take(operand, weight, out) or columns_apart(operand=operand, out=out)


def _refuses_grouped_update(state: Tensor, operand: Tensor, weight: Tensor, **_: object) -> str | None:
    return _cannot_take(state, operand, weight) or columns_apart(state=state, operand=operand)


def _launch(kernel: str, **arguments: Any) -> None:
    import_module(f"depass_kernels.triton.{kernel}").launch(**arguments).run()


def _share_hidden(rule: str, temperature: float, gate_total: Tensor | None, **arguments: Any) -> None:
    if rule == "taylor":
        _launch("taylor", gate_total=gate_total, **arguments)
    else:
        _launch("share_hidden", rule=rule, temperature=temperature, **arguments)


def _grouped_update(**arguments: Any) -> None:
    for launch in import_module("depass_kernels.triton.grouped_update").launches(**arguments):
        launch.run()


TRITON = Backend(
    "triton",
    _missing,
    {
        "normed": Op(partial(_launch, "normed"), _refuses_normed),
        "mix_values": Op(partial(_launch, "mix_values"), _refuses_mix),
        "share_hidden": Op(_share_hidden, _refuses_share),
        "residual_update": Op(partial(_launch, "residual_update"), _refuses_update, on_request=True),
        "grouped_matmul": Op(partial(_launch, "grouped_matmul"), _refuses_grouped),
        "grouped_update": Op(_grouped_update, _refuses_grouped_update),
    },
)
