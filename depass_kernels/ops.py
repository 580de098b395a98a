"""The public ops: they check their arguments, choose a backend and return the result.

Shapes: ``P`` positions of all staircases, ``R`` rows, ``D`` hidden size, ``H`` query heads, ``K`` key/value heads, ``d``
head dimension, ``F`` MLP neurons, ``E`` groups of rows, each with a weight of its own. ``backend`` is one of
:data:`depass_kernels.names.NAMES`; ``depass backends`` lists which backend runs each op on this machine.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from . import backends
from .errors import KernelError
from .layout import SourceLayout
from .names import RULES

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def normed(
    state: Tensor,
    layout: SourceLayout,
    *,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    centred: bool = False,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalise rows of the state with the whole vector's frozen scale (docs/method.md, equation 2; DePass, section 3.1).

    ``out[i] = scale[t(i)] · weight ⊙ x``, where row ``i`` of the layout belongs to position ``t(i)`` and ``x`` is
    ``state[rows[i]]``, for LayerNorm less its mean. It is the operand of the next product. The norm's bias is not added: it
    belongs to the bias source.

    Args:
        state: ``[R', D]``, the state, of any floating dtype.
        layout: the layout of the ``R`` rows of the result.
        scale: ``[P]``, the frozen ``1/rms`` or ``1/σ``; by default 1.
        weight: ``[D]``, the norm's weight ``γ``; by default 1.
        centred: whether the mean of every row is subtracted (LayerNorm).
        rows: ``[R]`` int64, the rows of the state that the result has, each at most once; by default all in order.
        out: ``[R, D]``, an output tensor of any floating dtype; by default a new tensor in the dtype of the state.
        backend: the backend.

    Returns:
        The normalised rows ``[R, D]``: ``out`` if given.

    Raises:
        KernelError: the shapes, dtypes or devices are inconsistent.
        BackendError: the named backend is unknown or cannot run this call.
    """
    _on_cpu(layout)
    _numbers_of_rows(rows)
    if rows is not None and len(rows) != layout.rows:
        raise KernelError(f"rows must have the layout's {layout.rows} numbers, got {len(rows)}")
    if state.dim() != 2 or state.dtype not in FLOATS or (rows is None and len(state) != layout.rows):
        raise KernelError(
            f"state must be floating [{'any' if rows is not None else layout.rows}, D], got {_says(state)}"
        )
    if weight is not None and (weight.shape != state.shape[1:] or weight.dtype not in FLOATS):
        raise KernelError(f"weight must be floating [{state.shape[1]}], got {_says(weight)}")
    if out is None:
        out = state.new_empty(layout.rows, state.shape[1])
    _matrix("out", out, layout.rows, state.shape[1])
    _scale("scale", scale, layout)
    _same_device(state=state, scale=scale, weight=weight, rows=rows, out=out)
    backends.run(
        "normed", backend, state=state, layout=layout, scale=scale, weight=weight, centred=centred, rows=rows, out=out
    )
    return out


def mix_values(
    pattern: Tensor,
    values: Tensor,
    layout: SourceLayout,
    *,
    kv_heads: int | None = None,
    query_scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mix every source's values with the frozen attention pattern (docs/method.md, equation 3; DePass, section 3.2).

    ``out[q, m, h] = query_scale[q] · Σ_k pattern[h, q, k] · values[k, m, kv(h)]`` over the positions
    ``k ≤ q`` where source ``m`` is active. The output projection comes after it. Rows of ``pattern`` need not sum to one,
    but all entries right of its diagonal must be zero.

    Args:
        pattern: ``[B, H, N, W]``, the attention pattern after the softmax, one per prompt of ``layout``. ``N`` is at least
            the length of the longest staircase. ``W >= N`` keys, those after the ``N``-th zero; a multiple of 16 is faster
            on GPUs.
        values: ``[R, K·d]``, in the layout's rows.
        layout: the layout of the rows.
        kv_heads: ``K``, the number of key/value heads; by default ``H``. Give it for grouped-query attention (GQA).
        query_scale: ``[P]``, the frozen scale of a norm on the attention's output; by default 1.
        out: ``[R, H·d]``, an output tensor of any floating dtype; by default a new tensor in the dtype of ``values``.
        backend: the backend.

    Returns:
        The mixed values ``[R, H·d]``: ``out`` if given.

    Raises:
        KernelError: the shapes, dtypes or devices are inconsistent.
        BackendError: the named backend is unknown or cannot run this call.
    """
    _on_cpu(layout)
    _matrix("values", values, layout.rows, None)
    if pattern.dim() != 4 or pattern.shape[2] > pattern.shape[3] or pattern.dtype not in FLOATS:
        raise KernelError(f"pattern must be floating [B, H, N, W] with W >= N, got {_says(pattern)}")
    prompts, heads, longest = layout.prompts, pattern.shape[1], layout.longest
    if len(pattern) < prompts or pattern.shape[2] < longest:
        raise KernelError(f"pattern must be [>={prompts}, H, >={longest}, ...] for this layout, got {_says(pattern)}")
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads or values.shape[1] % kv_heads:
        raise KernelError(
            f"kv_heads={kv_heads} must divide the {heads} heads of pattern and the {values.shape[1]} columns of values"
        )
    width = values.shape[1] // kv_heads * heads
    if out is None:
        out = values.new_empty(layout.rows, width)
    _matrix("out", out, layout.rows, width)
    _scale("query_scale", query_scale, layout)
    _same_device(pattern=pattern, values=values, query_scale=query_scale, out=out)
    backends.run(
        "mix_values", backend, pattern=pattern, values=values, layout=layout, kv_heads=kv_heads,
        query_scale=query_scale, out=out,
    )  # fmt: skip
    return out


def share_hidden(
    gate: Tensor,
    hidden: Tensor,
    layout: SourceLayout,
    *,
    rule: str = "softmax",
    temperature: float = 0.1,
    gate_total: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Share each neuron's output among the sources of a position (docs/method.md, equation 4; DePass, section 3.3).

    ``out[t, m] = α[t, m] · hidden[t]``. The down projection comes after it. The shares ``α`` follow from
    ``g = gate[t, m]`` by ``rule``:

    - ``softmax``: ``softmax_m(g / temperature)``, the paper's rule;
    - ``max``: 1 for the largest ``g``, the first of equal ones; 0 for the others;
    - ``relu``: in proportion to ``max(g, 0)``; equal shares if no source is positive;
    - ``linear``: in proportion to ``g - min_m g``; equal shares if all are equal;
    - ``taylor``: ``g / gate_total``, or 0 where ``gate_total`` is 0. The excluded source takes part like any other.

    With the first four rules the shares sum to one over the sources active at ``t``, without the excluded source.

    Args:
        gate: ``[R, F]``, the pre-activations, of any floating dtype.
        hidden: ``[P, F]``, the input of the model's down projection, one row per position.
        layout: the layout of the rows.
        rule: the rule, one of :data:`depass_kernels.names.RULES`.
        temperature: the temperature ``τ`` of ``softmax``, positive, in units of the pre-activation.
        gate_total: ``[P, F]``, the model's own pre-activation; required by ``taylor``, not allowed with other rules.
        out: ``[R, F]``, an output tensor of any floating dtype, which may be ``gate`` itself; by default a new tensor in
            the dtype of ``gate``.
        backend: the backend.

    Returns:
        The shared hidden values ``[R, F]``: ``out`` if given.

    Raises:
        KernelError: the shapes, dtypes, devices or options are inconsistent.
        BackendError: the named backend is unknown or cannot run this call.
    """
    _on_cpu(layout)
    _matrix("gate", gate, layout.rows, None)
    _matrix("hidden", hidden, layout.positions, gate.shape[1])
    if rule not in RULES:
        raise KernelError(f"unknown rule {rule!r}; choose one of: {', '.join(RULES)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise KernelError(f"temperature must be a positive number, got {temperature!r}")
    if (gate_total is not None) != (rule == "taylor"):
        raise KernelError(f"rule='taylor' needs gate_total, and no other rule takes it; got rule={rule!r}")
    if gate_total is not None:
        _matrix("gate_total", gate_total, layout.positions, gate.shape[1])
    if out is None:
        out = torch.empty_like(gate)
    _matrix("out", out, layout.rows, gate.shape[1])
    _same_device(gate=gate, hidden=hidden, gate_total=gate_total, out=out)
    backends.run(
        "share_hidden", backend, gate=gate, hidden=hidden, layout=layout, rule=rule, temperature=temperature,
        gate_total=gate_total, out=out,
    )  # fmt: skip
    return out


def residual_update(
    state: Tensor,
    operand: Tensor,
    weight: Tensor,
    *,
    rows: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add a projection's output to the state in place: ``state[rows] += operand · weightᵀ`` (DePass, sections 3.2 and 3.3).

    Args:
        state: ``[R, D]``, the state, fp32 or fp64; changed in place.
        operand: ``[n, E]``, the input of the projection, in the model's dtype.
        weight: ``[D, E]``, the weight of the projection, in the dtype of ``operand``.
        rows: ``[n]`` int64, the rows of the state to update, each at most once; by default all ``R`` in order.
        backend: the backend.

    Returns:
        ``state``.

    Raises:
        KernelError: the shapes, dtypes or devices are inconsistent.
        BackendError: the named backend is unknown or cannot run this call.
    """
    if state.dim() != 2 or state.dtype not in (torch.float32, torch.float64):
        raise KernelError(f"state must be fp32 or fp64 [R, D], got {_says(state)}")
    _numbers_of_rows(rows)
    n = len(state if rows is None else rows)
    _matrix("operand", operand, n, None)
    _matrix("weight", weight, state.shape[1], operand.shape[1])
    if weight.dtype != operand.dtype:
        raise KernelError(f"operand and weight must have the same dtype, got {_says(operand)} and {_says(weight)}")
    _same_device(state=state, operand=operand, weight=weight, rows=rows)
    backends.run("residual_update", backend, state=state, operand=operand, weight=weight, rows=rows)
    return state


def grouped_matmul(
    operand: Tensor,
    weight: Tensor,
    ends: Tensor,
    *,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply each group of rows by a weight of its own: ``out[i] = weight[g(i)] · operand[rows[i]]``.

    It computes the pre-activations of routed experts, whose groups are the rows that go through one expert.

    Args:
        operand: ``[R', D]``, the rows that are read.
        weight: ``[E, N, D]``, a weight for each group, of any floating dtype and any strides. Products are in the dtype of
            ``operand``.
        ends: ``[E]`` int64 on the CPU. Group ``g`` has the rows ``ends[g - 1] ≤ i < ends[g]`` of the result, the first one
            from row 0 on. A group may be empty.
        rows: ``[R]`` int64, the row of ``operand`` that each row of the result reads, any number of times; by default all in
            order.
        out: ``[R, N]``, an output tensor of any floating dtype; by default a new tensor in the dtype of ``operand``. GPUs
            keep the fp32 sums of 16-bit operands if it is fp32.
        backend: the backend.

    Returns:
        The products ``[R, N]``: ``out`` if given.

    Raises:
        KernelError: the shapes, dtypes or devices are inconsistent.
        BackendError: the named backend is unknown or cannot run this call.
    """
    _numbers_of_rows(rows)
    _matrix("operand", operand, None, None)
    count = len(operand if rows is None else rows)
    _groups(weight, ends, count, None, operand.shape[1])
    if out is None:
        out = operand.new_empty(count, weight.shape[1])
    _matrix("out", out, count, weight.shape[1])
    _same_device(operand=operand, weight=weight, rows=rows, out=out)
    backends.run("grouped_matmul", backend, operand=operand, weight=weight, ends=ends, rows=rows, out=out)
    return out


def grouped_update(
    state: Tensor,
    operand: Tensor,
    weight: Tensor,
    ends: Tensor,
    places: Tensor,
    *,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add products of groups of rows to the state in place: ``state[i] += scale ⊙ Σ_j weight[g(p)] · operand[p]``.

    Here ``p`` is ``places[i, j]``. It is the down projection of routed experts, where a row of the state goes through
    several experts. Each sum has a fixed order, so the same call gives the same bits.

    Args:
        state: ``[R', D]``, the state, fp32 or fp64; changed in place.
        operand: ``[R, N]``, the input of the projection, group after group.
        weight: ``[E, D, N]``, a weight for each group, of any floating dtype and any strides. Products are in the dtype of
            ``operand``.
        ends: ``[E]`` int64 on the CPU. Group ``g`` has the rows ``ends[g - 1] ≤ p < ends[g]`` of ``operand``, the first one
            from row 0 on. A group may be empty.
        places: ``[R', k]`` int64, the rows of ``operand`` that are added to each row of the state; -1 for none. Each row of
            ``operand`` occurs exactly once. A row of the state has at most one place in a group.
        scale: ``[D]``, what multiplies the products; by default 1.
        backend: the backend.

    Returns:
        ``state``.

    Raises:
        KernelError: the shapes, dtypes or devices are inconsistent.
        BackendError: the named backend is unknown or cannot run this call.
    """
    if state.dim() != 2 or state.dtype not in (torch.float32, torch.float64):
        raise KernelError(f"state must be fp32 or fp64 [R', D], got {_says(state)}")
    _matrix("operand", operand, None, None)
    _groups(weight, ends, len(operand), state.shape[1], operand.shape[1])
    if places.dim() != 2 or len(places) != len(state) or places.dtype != torch.int64:
        raise KernelError(f"places must be int64 [{len(state)}, k], got {_says(places)}")
    if scale is not None and (scale.shape != state.shape[1:] or scale.dtype not in FLOATS):
        raise KernelError(f"scale must be floating [{state.shape[1]}], got {_says(scale)}")
    _same_device(state=state, operand=operand, weight=weight, places=places, scale=scale)
    backends.run(
        "grouped_update", backend, state=state, operand=operand, weight=weight, ends=ends, places=places, scale=scale
    )
    return state


def _groups(weight: Tensor, ends: Tensor, rows: int, outputs: int | None, inputs: int) -> None:
    if (
        weight.dim() != 3
        or weight.shape[2] != inputs
        or outputs not in (None, weight.shape[1])
        or weight.dtype not in FLOATS
    ):
        raise KernelError(f"weight must be floating [E, {outputs or 'any'}, {inputs}], got {_says(weight)}")
    if ends.shape != weight.shape[:1] or ends.dtype != torch.int64 or ends.device.type != "cpu":
        raise KernelError(
            f"ends must be int64 [{len(weight)}] on the CPU, one end for each weight; got {_says(ends)} on {ends.device}"
        )
    each = [0, *ends.tolist()]
    if each[-1] != rows or any(end < begin for begin, end in pairwise(each)):
        raise KernelError(f"ends must rise from 0 or more to the number of rows, {rows}; got {_abridged(each[1:])}")


def _abridged(numbers: list[int]) -> str:
    return f"[{', '.join(map(str, numbers[:8]))}{', ...' * (len(numbers) > 8)}]"


def _numbers_of_rows(rows: Tensor | None) -> None:
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise KernelError(f"rows must be an int64 vector, got {_says(rows)}")


def _on_cpu(layout: SourceLayout) -> None:
    if layout.row_start.device.type != "cpu":
        raise KernelError(
            f"the layout's offsets must be on the CPU, got {layout.row_start.device}; pass the original layout and not the "
            "result of its to(): the op copies the offsets to the device"
        )


def _matrix(name: str, tensor: Tensor, rows: int | None, columns: int | None) -> None:
    fits = tensor.dim() == 2 and rows in (None, tensor.shape[0]) and columns in (None, tensor.shape[-1])
    if not fits or tensor.dtype not in FLOATS:
        shape = ", ".join("any" if number is None else str(number) for number in (rows, columns))
        raise KernelError(f"{name} must be floating [{shape}], got {_says(tensor)}")


def _scale(name: str, tensor: Tensor | None, layout: SourceLayout) -> None:
    if tensor is not None and (tensor.shape != (layout.positions,) or tensor.dtype not in FLOATS):
        raise KernelError(f"{name} must be floating [{layout.positions}], one per position, got {_says(tensor)}")


def _same_device(**tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise KernelError(f"all tensors must be on one device, got {listed}")


def _says(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
