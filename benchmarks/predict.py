"""Predicts the times of the benchmark cases on GPUs. A later measurement then shows which part of the prediction is wrong.

Counts: the timed method runs on a model that has only shapes (torch's meta device). Each tensor operation counts as one
kernel that reads its inputs once and writes its outputs once, so the counts follow the code. Five operations differ on a
GPU and are counted by hand below: ``normed``, ``mix_values``, ``share_hidden``, ``residual_update`` and the product with an
fp32 output. The cases have no routed experts.

Seconds: a kernel takes ``max(operations / rate, bytes / bandwidth, KERNEL_SECONDS)`` on the device, and
``LAUNCH_SECONDS`` on the host. Device and host work at the same time, so the prediction is the larger of their sums. The
rates, the bandwidths and the two constants are assumed, not measured. Memory is assumed to suffice (``depass plan`` checks
that).

Not counted: bytes that a product or ``mix_values`` reads again, the second read of the gates where a position has more
than 256 sources, padding to whole tiles, and waits of the host for the device.

The decomposition has these parts: ``products`` (the value, output, gate and down products; the bytes of their weights are
counted as ``weights``), ``copies`` (of weights), ``normed`` (rows of the state into operands), ``gather`` and ``scatter``
(rows of the state read and written), ``casts``, ``mix`` (values in and out; the bytes of the pattern are counted as
``pattern``), ``share`` (gates in, shares out) and ``others``. Two more parts are ``model``, the model's own pass with its
capture, and ``scoring``.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from depass.files import write_atomically
from depass.models.bind import bind
from depass.propagation import mlp, propagate
from depass.propagation.blocks import TRAITS
from depass_kernels import SourceLayout, backends
from depass_kernels.layout import forget_kept_layouts

from .machine import ROOT
from .registry import METHODS, OURS, SHAPES, Case, count_rows, floor_operations, floor_shapes, per_row, random_model

PATH = ROOT / "benchmarks" / "results" / "predicted.json"
MODELS = ("llama-2-7b", "llama-3.1-8b")
SIZES = {
    "tokens": ("10", "16", "32", "64", "128", "256", "512", "1024", "2048"),
    "heads": ("16",),
    "prompts": ("64",),
}
KERNEL_SECONDS = 5e-6  # the shortest time of a kernel on the device
LAUNCH_SECONDS = 28e-6  # the host's time for a kernel and the Python code around it


@dataclass(frozen=True)
class Card:
    """Assumed rates of a GPU; ``name`` is part of the name that the driver reports."""

    name: str
    operations_per_second: float  # of bf16 matrix products
    bytes_per_second: float

    def seconds(self, operations: float, moved: float) -> float:
        """The shortest time for this work, given by the slower of the two rates."""
        return max(operations / self.operations_per_second, moved / self.bytes_per_second)


CARDS = {"a6000": Card("A6000", 120e12, 0.65e12), "h100": Card("H100", 700e12, 3.0e12)}


def card_of(gpu: str | None) -> str | None:
    """The key of the card whose driver reports the name ``gpu``, or None."""
    return next((key for key, card in CARDS.items() if gpu is not None and card.name in gpu), None)


@dataclass(frozen=True)
class Kernel:
    """One launch: its part of the work, its operations, and its bytes by kind."""

    part: str
    operations: int
    moved: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.moved)


def predict() -> Path:
    """Write :func:`predictions` to :data:`PATH`, one row per line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in predictions())
    write_atomically(PATH, f"[\n{lines}\n]\n".encode())
    return PATH


def load() -> list[dict[str, Any]]:
    """Read the rows that :func:`predict` wrote."""
    rows: list[dict[str, Any]] = json.loads(PATH.read_text())
    return rows


def predictions() -> list[dict[str, Any]]:
    """One row per card, model, question and size, sorted. Seconds have four digits."""
    rows = []
    for name in MODELS:
        config = random_model(name, "bfloat16", "meta").config
        for question, sizes in SIZES.items():
            for size in sizes:
                case = Case(question, name, "bfloat16", size)
                kernels = count(case, config.num_hidden_layers)
                rows += [{"card": card, **row_of(case, config, kernels, CARDS[card])} for card in CARDS]
    return sorted(rows, key=lambda row: (row["card"], row["model"], row["question"], int(row["size"])))


def row_of(case: Case, config: Any, kernels: Mapping[Kernel, int], card: Card) -> dict[str, Any]:
    """The predicted row of a case on a card, from the case's kernels."""
    seconds: dict[str, float] = defaultdict(float)
    moved: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    for kernel, times in kernels.items():
        seconds[kernel.part] += times * max(card.seconds(kernel.operations, kernel.bytes), KERNEL_SECONDS)
        operations[kernel.part] += times * kernel.operations
        for name, size in kernel.moved:
            moved[name] += times * size
    launches = sum(kernels.values())
    device, host = sum(seconds.values()), launches * LAUNCH_SECONDS
    rounded = {name: float(f"{value:.4g}") for name, value in sorted(seconds.items())}
    return {
        "case": case.name, "model": case.model, "question": case.question, "size": case.size,
        "rows": count_rows(case, config).state, "operations": dict(sorted((+operations).items())),
        "floor_operations": int(floor_operations(case, config)), "bytes": dict(sorted(moved.items())), "launches": launches,
        "seconds_by_part": rounded, "device_seconds": float(f"{device:.4g}"), "host_seconds": float(f"{host:.4g}"),
        "seconds": float(f"{max(device, host):.4g}"), "floor_seconds": float(f"{_floor_seconds(case, config, card):.4g}"),
    }  # fmt: skip


def _floor_seconds(case: Case, config: Any, card: Card) -> float:
    """The floor that the runner measures: the bf16 products of all rows at once."""
    rows = count_rows(case, config)
    products = [
        card.seconds(2 * rows.state * a * b, 2 * (a * b + rows.state * (a + b))) for a, b in floor_shapes(config)
    ]
    return per_row(rows, [seconds / rows.state for seconds in products])


def count(case: Case, layers: int) -> Counter[Kernel]:
    """How often a case launches each kernel, on its model with so many layers.

    All layers between the first and the last do the same work, unless sources join there. Then only one of them runs.
    """
    forget_kept_layouts()  # the first prompt of a shape copies its layout to the device
    D, F, H, K, d, _, vocabulary = SHAPES[case.model]
    shape = D, F, H, K, d, layers if case.question == "heads" else min(3, layers), vocabulary
    with mock.patch.dict(SHAPES, {case.model: shape}):
        model = random_model(case.model, case.dtype, "meta")
    with ExitStack() as stack:
        # the tensors of indices are small, so more threads would only wait for each other
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        stack.enter_context(mock.patch("depass.api.bind", partial(bind, empty=True)))
        stack.enter_context(mock.patch("depass.propagation.needs.free_memory", return_value=1 << 60))
        # the meta device has no autocast to leave
        stack.enter_context(mock.patch.object(torch, "autocast", return_value=nullcontext()))
        stack.enter_context(mock.patch.dict(TRAITS, {"meta": TRAITS["cuda"]}))
        work = METHODS[case.question][OURS](model, case, "auto")
        counting = _Counting(model)
        stack.enter_context(mock.patch.object(backends, "run", counting.run_op))
        for module in (mlp, propagate):  # of the pre-activations, and of latent values
            stack.enter_context(mock.patch.object(module, "matmul", counting.product_in_fp32))
        _name_parts(stack, counting, model, layers)
        with counting:
            work()
    return counting.kernels


def _name_parts(stack: ExitStack, counting: _Counting, model: Any, layers: int) -> None:
    """Tell the counter which part of the work runs, and count the model's second layer for all layers that were left out."""
    moves = propagate.Propagation
    join, attention, mlp_of, forward = moves.join, moves.attention, moves.mlp, model.model.forward
    before: Counter[Kernel] = Counter()  # up to the last layer's end

    def named_join(self: propagate.Propagation, *given: Any) -> None:
        with counting.part("decomposition"):
            join(self, *given)

    def named_attention(self: propagate.Propagation, *given: Any) -> None:
        with counting.part("decomposition"):
            attention(self, *given)

    def named_mlp(self: propagate.Propagation, index: int, *given: Any) -> None:
        nonlocal before
        with counting.part("decomposition"):
            mlp_of(self, index, *given)
        if index == 1:  # the first layer also copies the layouts to the device
            for kernel, times in (counting.kernels - before).items():
                counting.kernels[kernel] += times * (layers - len(model.model.layers))
        before = counting.kernels.copy()

    def named_forward(*given: Any, **options: Any) -> Any:
        with counting.part("model"):
            return forward(*given, **options)

    stack.enter_context(mock.patch.object(propagate.Propagation, "join", named_join))
    stack.enter_context(mock.patch.object(propagate.Propagation, "attention", named_attention))
    stack.enter_context(mock.patch.object(propagate.Propagation, "mlp", named_mlp))
    stack.enter_context(mock.patch.object(model.model, "forward", named_forward))


aten = torch.ops.aten
_MAKES_ROOM = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.lift_fresh}
_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.mv, aten.dot, aten.addmv}
_SELECTS = {aten.index_select, aten.index, aten.embedding, aten.gather}
_PUTS = {aten.index_copy_, aten.index_put_, aten.index_copy, aten.index_put}
_COPIES = {aten._to_copy, aten.copy_, aten.clone}
_WRITES_ALONE = {aten.copy_, aten.fill_, aten.zero_}  # do not read what they write to


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the kernels launched on the meta device.

    Attributes:
        kernels: the number of launches of each kernel.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[Kernel] = Counter()
        self._part = "scoring"
        for parameter in model.parameters():
            _mark(parameter, of_weights=parameter.dim() == 2)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Launches in the block belong to this part."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def launched(self, part: str, operations: int = 0, **moved: int) -> None:
        """Count one kernel; ``moved`` gives its bytes by kind."""
        self.kernels[Kernel(part, operations, tuple(moved.items()))] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        read = {name: value for name, value in options.items() if name != "out"}
        given, device = [*_tensors(args), *_tensors(read.values())], options.get("device")
        if not any(tensor.is_meta for tensor in given) and (device is None or torch.device(device).type != "meta"):
            return func(*args, **options)
        op = func.overloadpacket
        if op is aten._local_scalar_dense or (op is aten._to_copy and device == torch.device("cpu")):
            self._count(op, given, given)
            return func(self._on_host(given[0]), **options)
        numbers: Any = None
        if all(not t.is_meta or _numbers(t) is not None for t in given) and (given or op is aten.arange):
            on_host = {name: self._on_host(value) for name, value in options.items()}
            numbers = func(*map(self._on_host, args), **on_host)
        if numbers is None or func.is_view or func._schema.is_mutable:
            result = func(*args, **options)
        else:  # its shape may depend on the numbers
            result = numbers.to("meta") if isinstance(numbers, Tensor) else tuple(part.to("meta") for part in numbers)
        outputs = list(_tensors([result]))
        of_weights = self._part == "decomposition" and op not in _PRODUCTS | _SELECTS and any(map(_of_weights, given))
        held = _tensors([numbers]) if numbers is not None else itertools.repeat(None, len(outputs))
        for tensor, its_numbers in zip(outputs, held, strict=True):
            _mark(tensor, of_weights, its_numbers)
        if op not in _MAKES_ROOM and not func.is_view and op is not aten._unsafe_view:
            self._count(op, given, outputs)
        return result

    def _on_host(self, value: Any) -> Any:
        """A tensor's numbers (zeros if they are unknown); for a device, the host."""
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, (list, tuple)):
            return [self._on_host(element) for element in value]
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        numbers = _numbers(value)
        return torch.zeros(value.shape, dtype=value.dtype, device="cpu") if numbers is None else numbers

    def _count(self, op: Any, given: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        written = sum(map(_bytes, outputs))
        if op in _SELECTS:
            moved = 2 * written + sum(map(_bytes, given[1:]))
        elif op in _PUTS:
            moved = sum(map(_bytes, given[1:])) + _bytes(given[-1])
        else:
            moved = written + sum(map(_bytes, given[1:] if op in _WRITES_ALONE else given))
        operations = _operations(given, outputs[0]) if op in _PRODUCTS else 0
        if self._part != "decomposition":
            self.launched(self._part, operations, **{self._part: moved})
        elif op in _PRODUCTS:
            weights = sum(_bytes(tensor) for tensor in given if _of_weights(tensor))
            self.launched("products", operations, weights=weights, products=moved - weights)
        else:
            of_weights = any(map(_of_weights, given))
            kinds = {"gather": _SELECTS, "scatter": _PUTS, "casts": _COPIES}
            kind = next((name for name, ops in kinds.items() if op in ops), "others")
            self.launched("copies" if of_weights else kind, **{"copies" if of_weights else kind: moved})

    # Counted by hand, because a GPU does them in another way.

    def product_in_fp32(self, operand: Tensor, weight: Tensor) -> Tensor:
        """:func:`depass_kernels.reference.matmul` on CUDA."""
        out = operand.new_empty(len(operand), len(weight), dtype=torch.float32)
        rows = _bytes(operand) + _bytes(out)
        self.launched("products", 2 * out.numel() * weight.shape[1], weights=_bytes(weight), products=rows)
        return out

    def run_op(self, op: str, _: str, /, **arguments: Any) -> None:
        """:func:`depass_kernels.backends.run` with the backend that ``auto`` chooses on a GPU."""
        getattr(self, op)(**arguments)

    def mix_values(
        self, pattern: Tensor, values: Tensor, layout: SourceLayout, kv_heads: int, out: Tensor, **_: Any
    ) -> None:
        layout.to(values.device)  # the kernel's offsets
        heads, head_dim = pattern.shape[1], values.shape[1] // kv_heads
        pairs = products = 0  # pairs of a query and a key with sources; and the sum of the keys' sources over the pairs
        starts = layout.position_start.tolist()
        for first, last in itertools.pairwise(starts):
            counts = layout.counts[first:last]
            keys = int((counts > 0).sum())
            pairs += keys * (keys + 1) // 2
            products += int(counts.cumsum(0).sum())
        self.launched(
            "mix", 2 * heads * head_dim * products,
            mix=_bytes(values) + _bytes(out), pattern=heads * pairs * pattern.element_size(),
        )  # fmt: skip

    def share_hidden(
        self, gate: Tensor, hidden: Tensor, layout: SourceLayout, gate_total: Tensor | None, out: Tensor, **_: Any
    ) -> None:
        layout.to(gate.device)
        self.launched("share", share=sum(_bytes(t) for t in (gate, hidden, gate_total, out) if t is not None))

    def normed(
        self, state: Tensor, layout: SourceLayout, scale: Tensor | None, rows: Tensor | None, out: Tensor, **_: Any
    ) -> None:
        if scale is not None:
            layout.position_of_row(state.device)
        held = 0 if scale is None else 8 * len(out)
        read = len(out) * state.shape[1] * state.element_size() + (0 if rows is None else _bytes(rows)) + held
        self.launched("normed", normed=read + _bytes(out))

    def residual_update(self, state: Tensor, operand: Tensor, weight: Tensor, rows: Tensor | None) -> None:
        """:func:`depass_kernels.reference.residual_update`, where the library's product adds to fp32."""
        n, width = len(operand), state.shape[1]
        target = n * width * state.element_size()
        if rows is not None:
            for _ in range(2):  # rows are read out and written back
                self.launched("scatter", scatter=2 * target + _bytes(rows))
        products = _bytes(operand) + 2 * target
        self.launched("products", 2 * n * width * operand.shape[1], weights=_bytes(weight), products=products)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _mark(tensor: Tensor, of_weights: bool, numbers: Tensor | None = None) -> None:
    """Note whether a tensor was computed from a weight, and its numbers if they come from the host (indices of rows)."""
    vars(tensor).update(of_weights=of_weights, numbers=numbers)


def _of_weights(tensor: Tensor) -> bool:
    return bool(vars(tensor).get("of_weights"))


def _numbers(tensor: Tensor) -> Tensor | None:
    return vars(tensor).get("numbers")


def _bytes(tensor: Tensor) -> int:
    """A tensor's bytes in memory. Numbers that a view repeats count once."""
    if 0 not in tensor.stride():
        return tensor.nbytes
    return math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) * tensor.itemsize


def _operations(given: Sequence[Tensor], output: Tensor) -> int:
    """Multiplications and additions of a product; its left operand is the last argument but one."""
    return 2 * output.numel() * given[-2].shape[-1]
