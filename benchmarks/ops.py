"""The ops at the shapes of real models: the call, its outputs, and the bytes and operations that it needs.

For comparison, the library's matrix products of the same shapes, and a copy of the tensors that ``share_hidden`` reads and
writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depass_kernels import (
    SourceLayout,
    backends,
    grouped_matmul,
    grouped_update,
    mix_values,
    normed,
    residual_update,
    share_hidden,
)

from .machine import Machine, percentile
from .registry import SHAPES

GROUPED = ("grouped_matmul", "grouped_update")  # their reference is one product for each expert
OURS = ("normed", "mix_values", "share_hidden", "taylor", "residual_update", *GROUPED)
EXPERTS, CHOSEN = 64, 8  # each expert has an eighth of the model's neurons
PRODUCTS = ("mm", "mm_fp32", "addmm_fp32")  # the last two with out_dtype=: the sums are in fp32
PROJECTIONS = ("value", "output", "gate", "down")
LIBRARY = ("copy", *(f"{product}_{projection}" for projection in PROJECTIONS for product in PRODUCTS))
OPS = (*OURS, *LIBRARY)
TORCH = "torch"  # the backend of the library's products
MODELS = tuple(name for name in SHAPES if name != "tiny")
POSITIONS = {"small": 16, "full": 256}  # tokens of one prompt: 136 and 32896 rows


@dataclass(frozen=True)
class Op:
    """One call of an op.

    Attributes:
        work: runs the op on a backend, one of :func:`backends_of` or ``"reference"``.
        written: the output tensors.
        clear: fills the outputs with NaN, or with the values that the op adds to.
        bytes: the bytes that must be read and written, each counted once.
        operations: multiplications and additions of the matrix products; for ``share_hidden`` eight per gate value.
    """

    work: Callable[[str], object]
    written: tuple[Tensor, ...]
    clear: Callable[[], object]
    bytes: int
    operations: int


def kernel_of(op: str) -> str:
    """The op of ``depass_kernels`` that this op calls: ``taylor`` is a rule of ``share_hidden``."""
    return "share_hidden" if op == "taylor" else op


def backends_of(op: str) -> tuple[str, ...]:
    """The backends that can run an op on some machine."""
    return (TORCH,) if op in LIBRARY else tuple(name for name in backends.NAMES if name != "auto")


def missing(op: str, backend: str) -> str | None:
    """Why a backend can never run an op on this machine, or None. (torch's products raise when they are called.)"""
    if op in LIBRARY:
        return None
    return next(reason for of, name, reason in backends.table() if (of, name) == (kernel_of(op), backend))


def prepare(op: str, model: str, size: str, dtype: torch.dtype, machine: Machine) -> Op:
    """The call with random operands, in the shapes of a layer of ``model`` with every token as a source."""
    D, F, H, K, d, *_ = SHAPES[model]
    n = POSITIONS[size]
    layout = SourceLayout.tokens(n, excluded=0)
    rows, device = layout.rows, machine.device
    torch.manual_seed(0)

    def random(*shape: int, spread: float = 1.0) -> Tensor:
        return machine.random(*shape, dtype=dtype, scale=spread)

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    def gates() -> Tensor:
        gate = machine.random(rows, F, scale=0.3)  # fp32, as on CUDA, where the GEMM can return fp32
        return gate if device == "cuda" else gate.to(dtype)

    def call(work: Callable[[str], object], out: Tensor, operations: int, *read: Tensor) -> Op:
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (out, *read))
        return Op(work, (out,), lambda: out.fill_(float("nan")), moved, operations)

    if op == "normed":
        state, weight, out = machine.random(rows, D), random(D), empty(rows, D)
        options: dict[str, Any] = {"scale": torch.rand(n, device=device) + 0.5, "weight": weight, "out": out}
        return call(lambda b: normed(state, layout, backend=b, **options), out, 0, state, weight)
    if op == "mix_values":
        pattern = torch.softmax(machine.random(1, H, n, n), dim=-1).tril().to(dtype)
        values, out = random(rows, K * d), empty(rows, H * d)
        options = {"kv_heads": K, "out": out}
        # a query reads, for each key up to its own position, the sources that have started by that key
        useful = 2 * H * d * n * (n + 1) * (n + 2) // 6
        return call(lambda b: mix_values(pattern, values, layout, backend=b, **options), out, useful, pattern, values)
    if op in ("share_hidden", "taylor"):
        gate, hidden, out, total = gates(), random(n, F), empty(rows, F), random(n, F)
        options = {"out": out}
        read = [gate, hidden]
        if op == "taylor":
            options.update(rule="taylor", gate_total=total)
            read.append(total)
        return call(lambda b: share_hidden(gate, hidden, layout, backend=b, **options), out, 8 * rows * F, *read)
    if op == "copy":
        gate, out = gates(), empty(rows, F)
        return call(lambda _: out.copy_(gate), out, 0, gate)
    if op == "residual_update":
        start = machine.random(rows, D)
        state, operand, weight = start.clone(), random(rows, H * d), random(D, H * d, spread=0.02)
        moved = sum(t.numel() * t.element_size() for t in (state, operand, weight)) + state.numel() * 4  # and read
        return Op(
            lambda b: residual_update(state, operand, weight, backend=b), (state,), lambda: state.copy_(start), moved,
            2 * rows * D * H * d,
        )  # fmt: skip
    if op in GROUPED:
        return _grouped(op, layout, SHAPES[model], dtype, machine)
    product, _, projection = op.rpartition("_")
    outputs, inputs = {"value": (K * d, D), "output": (D, H * d), "gate": (F, D), "down": (D, F)}[projection]
    operand, weight = random(rows, inputs), random(outputs, inputs, spread=0.02)
    begin = machine.random(rows, outputs) if product == "addmm_fp32" else None
    out = empty(rows, outputs) if product == "mm" else torch.empty(rows, outputs, device=device)
    moved = sum(t.numel() * t.element_size() for t in (operand, weight, out, *([] if begin is None else [begin])))
    return Op(
        lambda b: _multiply(product if b == TORCH else b, operand, weight, out), (out,),
        lambda: out.fill_(float("nan")) if begin is None else out.copy_(begin), moved, 2 * rows * inputs * outputs,
    )  # fmt: skip


def _grouped(op: str, layout: SourceLayout, shape: tuple[int, ...], dtype: torch.dtype, machine: Machine) -> Op:
    """A call with the places of positions that choose ``CHOSEN`` experts at random, of all positions' rows."""
    (D, F, *_), device = shape, machine.device
    neurons = max(1, F // CHOSEN)
    chosen = torch.stack([torch.randperm(EXPERTS, device="cpu")[:CHOSEN] for _ in range(layout.positions)])
    expert = chosen.repeat_interleave(layout.counts, 0).flatten()  # of each place of each row
    order = expert.argsort(stable=True)
    ends = torch.bincount(expert, minlength=EXPERTS).cumsum(0)
    operations = 2 * len(order) * D * neurons
    if op == "grouped_matmul":
        operand = machine.random(layout.rows, D, dtype=dtype)
        weight = machine.random(EXPERTS, 2 * neurons, D, dtype=dtype, scale=0.02)[:, :neurons]
        rows, out = (order // CHOSEN).to(device), torch.empty(len(order), neurons, device=device)
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (operand, weight, rows, out))
        return Op(
            lambda b: grouped_matmul(operand, weight, ends, rows=rows, out=out, backend=b), (out,),
            lambda: out.fill_(float("nan")), moved, operations,
        )  # fmt: skip
    start, hidden = machine.random(layout.rows, D), machine.random(len(order), neurons, dtype=dtype)
    state, weight = start.clone(), machine.random(EXPERTS, D, neurons, dtype=dtype, scale=0.02)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device="cpu")
    held = places.view(-1, CHOSEN).to(device)
    moved = sum(t.numel() * t.element_size() for t in (state, hidden, weight, held)) + state.numel() * 4  # and read
    return Op(
        lambda b: grouped_update(state, hidden, weight, ends, held, backend=b), (state,), lambda: state.copy_(start),
        moved, operations,
    )  # fmt: skip


def _multiply(product: str, operand: Tensor, weight: Tensor, out: Tensor) -> None:
    if product == "mm":
        torch.mm(operand, weight.T, out=out)
    elif product == "mm_fp32":
        torch.mm(operand, weight.T, out_dtype=torch.float32, out=out)
    elif product == "addmm_fp32":
        torch.addmm(out, operand, weight.T, out_dtype=torch.float32, out=out)
    else:
        exact = operand.float() @ weight.float().T
        out.copy_(exact if bool(out.isnan().any()) else out + exact)  # addmm: clear has filled in the addend


def agrees(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether all numbers agree, within a bound relative to the largest number."""
    size = expected.float().abs().max()
    bound = 2e-2 if dtype != torch.float32 or got.is_cuda else 1e-4
    return bool(((got.float() - expected.float()).abs().max() <= bound * size).item())


def checked(op: Op, backend: str, dtype: torch.dtype) -> bool:
    """Run an op once on the reference and once on a backend: whether the results agree."""
    op.clear()
    op.work("reference")
    expected = [tensor.clone() for tensor in op.written]
    op.clear()
    op.work(backend)
    return all(agrees(got, wanted, dtype) for got, wanted in zip(op.written, expected, strict=True))


def row_of(
    name: str, model: str, backend: str, dtype: torch.dtype, size: str, op: Op, seconds: Sequence[float],
    rates: tuple[float, float],
) -> dict[str, Any]:  # fmt: skip
    """A row of results, with the ``rates`` of a copy (bytes per second) and of a GEMM (operations per second)."""
    copy, gemm = rates
    took = percentile(seconds, 0.5)
    return {
        "what": "op", "op": name, "model": model, "backend": backend, "dtype": str(dtype).removeprefix("torch."),
        "positions": POSITIONS[size], "sizes": size, "bytes": op.bytes, "operations": op.operations,
        "seconds_p20": percentile(seconds, 0.2), "seconds_p50": took, "seconds_p80": percentile(seconds, 0.8),
        "runs": len(seconds), "copy_bytes_per_second": copy, "gemm_operations_per_second": gemm,
        "share_of_copy": op.bytes / took / copy, "share_of_gemm": op.operations / took / gemm,
    }  # fmt: skip
