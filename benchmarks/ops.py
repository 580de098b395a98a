"""The ops at the shapes of real models: what is called, what it writes, and the bytes and operations it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depass_kernels import SourceLayout, gate_share, mix_values, residual_update, share_hidden

from .machine import Machine
from .registry import SHAPES

OPS = ("mix_values", "share_hidden", "taylor", "residual_update", "gate_share")
MODELS = tuple(name for name in SHAPES if name != "tiny")
POSITIONS = {"small": 16, "full": 256}  # tokens of one prompt: 136 and 32896 rows


@dataclass(frozen=True)
class Op:
    """One call.

    Attributes:
        work: given a backend, does it.
        written: the tensors that it leaves its results in.
        clear: fills them with NaN, or with what is added to.
        bytes: that must be read and written, each once.
        operations: multiplications and additions of the matrix products; for the sharing, eight for each gate.
    """

    work: Callable[[str], object]
    written: tuple[Tensor, ...]
    clear: Callable[[], object]
    bytes: int
    operations: int


def kernel_of(op: str) -> str:
    """The op of ``depass_kernels``: the taylor step is a rule of ``share_hidden``."""
    return "share_hidden" if op == "taylor" else op


def prepare(op: str, model: str, size: str, dtype: torch.dtype, machine: Machine) -> Op:
    """Random operands, as a layer of ``model`` would have them with every token a source."""
    D, F, H, K, d, *_ = SHAPES[model]
    n = POSITIONS[size]
    layout = SourceLayout.tokens(n, excluded=0)
    rows, device = layout.rows, machine.device
    torch.manual_seed(0)
    scale = torch.rand(n, device=device) + 0.5

    def random(*shape: int, spread: float = 1.0) -> Tensor:
        return machine.random(*shape, dtype=dtype, scale=spread)

    def made(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    def call(work: Callable[[str], object], out: Tensor, operations: int, *read: Tensor) -> Op:
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (out, *read))
        return Op(work, (out,), lambda: out.fill_(float("nan")), moved, operations)

    if op == "mix_values":
        pattern = torch.softmax(machine.random(1, H, n, n), dim=-1).tril().to(dtype)
        values, out = random(rows, K * d), made(rows, H * d)
        options: dict[str, Any] = {"kv_heads": K, "key_scale": scale, "out": out}
        # a query reads, of every key before it, the sources that have started by then
        useful = 2 * H * d * n * (n + 1) * (n + 2) // 6
        return call(lambda b: mix_values(pattern, values, layout, backend=b, **options), out, useful, pattern, values)
    if op in ("share_hidden", "taylor"):
        gate = machine.random(rows, F, scale=0.3)  # fp32, as a GEMM leaves them where it can
        gate = gate if device == "cuda" else gate.to(dtype)
        hidden, out, total = random(n, F), made(rows, F), random(n, F)
        options = {"gate_scale": scale, "out": out}
        read = [gate, hidden]
        if op == "taylor":
            options.update(rule="taylor", gate_total=total)
            read.append(total)
        return call(lambda b: share_hidden(gate, hidden, layout, backend=b, **options), out, 8 * rows * F, *read)
    if op == "gate_share":
        operand, weight, hidden, out = random(rows, D), random(F, D, spread=0.02), random(n, F), made(rows, F)
        options = {"gate_scale": scale, "temperature": 1.0, "out": out}
        return call(
            lambda b: gate_share(operand, weight, hidden, layout, backend=b, **options), out, 2 * rows * D * F,
            operand, weight, hidden,
        )  # fmt: skip
    assert op == "residual_update"
    start = machine.random(rows, D)
    state, operand, weight = start.clone(), random(rows, H * d), random(D, H * d, spread=0.02)
    cast = made(rows, D) if dtype != torch.float32 else None
    written = (state,) if cast is None else (state, cast)
    moved = sum(t.numel() * t.element_size() for t in (*written, operand, weight)) + state.numel() * 4  # and read

    def clear() -> None:
        state.copy_(start)
        if cast is not None:
            cast.fill_(float("nan"))

    return Op(
        lambda b: residual_update(state, operand, weight, cast=cast, backend=b), written, clear, moved,
        2 * rows * D * H * d,
    )  # fmt: skip


def agrees(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Every number, within a bound relative to the largest."""
    size = expected.float().abs().max()
    bound = 2e-2 if dtype != torch.float32 or got.is_cuda else 1e-4
    return bool(((got.float() - expected.float()).abs().max() <= bound * size).item())
