"""The public ops: they check what they are given, choose a backend and return the result.

``P`` positions over all staircases, ``R`` rows, ``D`` hidden size, ``H`` query heads, ``K`` key/value heads, ``d`` head
dim, ``F`` MLP width. ``backend`` is ``"auto"`` or one of :data:`depass_kernels.names.NAMES`; ``depass backends`` tells
which of them serve on this machine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backends
from .errors import KernelError
from .layout import SourceLayout
from .names import RULES

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def mix_values(
    pattern: Tensor,
    values: Tensor,
    layout: SourceLayout,
    *,
    kv_heads: int | None = None,
    key_scale: Tensor | None = None,
    query_scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mix every source's values with the frozen attention pattern (DePass section 3.2, before the output projection).

    ``out[q, m, h] = query_scale[q] · Σ_k pattern[h, q, k] · key_scale[k] · values[k, m, kv(h)]`` over the positions
    ``k`` where source ``m`` is active. Rows of ``pattern`` need not sum to one, and nothing right of its diagonal may be
    nonzero: a source's rows end where it starts.

    Args:
        pattern: ``[B, H, N, W]``, attention after softmax, one per prompt of ``layout``; ``N`` positions or more, and
            ``W`` keys, ``N`` or more, the further ones zero. Where ``W`` is a multiple of 16, GPUs read runs of keys.
        values: ``[R, K·d]`` in the layout's rows.
        layout: where the rows lie.
        kv_heads: ``K``, which no shape tells where query heads share values (GQA); ``H`` without it.
        key_scale: ``[P]``, the frozen ``1/rms`` or ``1/σ`` of the norm before the attention.
        query_scale: ``[P]``, the same of a norm on the attention's output.
        out: ``[R, H·d]`` to write to, of any floating dtype; made in the dtype of ``values`` without it.
        backend: who does it.

    Returns:
        ``[R, H·d]``, ``out`` where given.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together.
        BackendError: the named backend cannot serve this call.
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
    _scale("key_scale", key_scale, layout)
    _scale("query_scale", query_scale, layout)
    _same_device(pattern=pattern, values=values, key_scale=key_scale, query_scale=query_scale, out=out)
    backends.run(
        "mix_values", backend, pattern=pattern, values=values, layout=layout, kv_heads=kv_heads, key_scale=key_scale,
        query_scale=query_scale, out=out,
    )  # fmt: skip
    return out


def share_hidden(
    gate: Tensor,
    hidden: Tensor,
    layout: SourceLayout,
    *,
    gate_scale: Tensor | None = None,
    rule: str = "softmax",
    temperature: float = 0.1,
    gate_total: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Share each neuron's output out among the sources of a position (DePass section 3.3, before the down projection).

    ``out[t, m] = α[t, m] · hidden[t]``, with shares ``α`` from ``g = gate_scale[t] · gate[t, m]`` by ``rule``:

    - ``softmax``: ``softmax_m(g / temperature)``, the paper's;
    - ``max``: all to the largest, ties to the first;
    - ``relu``: in proportion to ``max(g, 0)``, equally where no source is positive;
    - ``linear``: in proportion to ``g - min_m g``, equally where all are equal;
    - ``taylor``: ``g / gate_total``, 0 where that is 0; the layout's excluded source takes part like any other.

    The first four sum to one over the sources that take part: those active at ``t`` but the layout's excluded one.

    Args:
        gate: ``[R, F]`` pre-activations, any floating dtype.
        hidden: ``[P, F]``, the input of the model's down projection, one row a position.
        layout: where the rows lie.
        gate_scale: ``[P]``, the frozen ``1/rms`` or ``1/σ`` of the norm before the MLP.
        rule: see above.
        temperature: ``τ`` of ``softmax``, in units of the pre-activation; positive.
        gate_total: ``[P, F]``, the model's own pre-activation; needed by ``taylor`` and refused by the others.
        out: ``[R, F]`` to write to, of any floating dtype, and may be ``gate`` itself; made in ``gate``'s dtype without it.
        backend: who does it.

    Returns:
        ``[R, F]``, ``out`` where given.

    Raises:
        KernelError: shapes, dtypes, devices or options that do not fit together.
        BackendError: the named backend cannot serve this call.
    """
    _on_cpu(layout)
    _matrix("gate", gate, layout.rows, None)
    _matrix("hidden", hidden, layout.positions, gate.shape[1])
    if rule not in RULES:
        raise KernelError(f"unknown rule {rule!r}; there are: {', '.join(RULES)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise KernelError(f"temperature must be a positive number, got {temperature!r}")
    if (gate_total is not None) != (rule == "taylor"):
        raise KernelError(f"gate_total goes with rule='taylor' and with no other, got rule={rule!r}")
    if gate_total is not None:
        _matrix("gate_total", gate_total, layout.positions, gate.shape[1])
    if out is None:
        out = torch.empty_like(gate)
    _matrix("out", out, layout.rows, gate.shape[1])
    _scale("gate_scale", gate_scale, layout)
    _same_device(gate=gate, hidden=hidden, gate_scale=gate_scale, gate_total=gate_total, out=out)
    backends.run(
        "share_hidden", backend, gate=gate, hidden=hidden, layout=layout, gate_scale=gate_scale, rule=rule,
        temperature=temperature, gate_total=gate_total, out=out,
    )  # fmt: skip
    return out


def residual_update(
    state: Tensor,
    operand: Tensor,
    weight: Tensor,
    *,
    rows: Tensor | None = None,
    cast: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add a projection's output to the state, ``state[rows] += operand · weightᵀ`` (DePass sections 3.2 and 3.3).

    Args:
        state: ``[R, D]``, fp32 or wider than the operand; changed in place.
        operand: ``[n, E]`` in the model's dtype.
        weight: ``[D, E]`` in the operand's dtype.
        rows: ``[n]`` int64, the rows of the state to add to, none of them twice; all ``R`` in order without it.
        cast: ``[n, D]`` of any floating dtype, to be left holding the rows as they then are: the next GEMM's operand.
        backend: who does it.

    Returns:
        ``state``.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together.
        BackendError: the named backend cannot serve this call.
    """
    if state.dim() != 2 or state.dtype not in (torch.float32, torch.float64):
        raise KernelError(f"state must be fp32 or fp64 [R, D], got {_says(state)}")
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise KernelError(f"rows must be an int64 vector, got {_says(rows)}")
    n = len(state if rows is None else rows)
    _matrix("operand", operand, n, None)
    _matrix("weight", weight, state.shape[1], operand.shape[1])
    if weight.dtype != operand.dtype:
        raise KernelError(f"operand and weight must have one dtype, got {_says(operand)} and {_says(weight)}")
    if cast is not None:
        _matrix("cast", cast, n, state.shape[1])
    _same_device(state=state, operand=operand, weight=weight, rows=rows, cast=cast)
    backends.run("residual_update", backend, state=state, operand=operand, weight=weight, rows=rows, cast=cast)
    return state


def _on_cpu(layout: SourceLayout) -> None:
    if layout.row_start.device.type != "cpu":
        raise KernelError(
            f"layout's offsets lie on {layout.row_start.device}; give the layout itself, not what its to() made: the op "
            "moves and keeps what it needs"
        )


def _matrix(name: str, tensor: Tensor, rows: int, columns: int | None) -> None:
    fits = tensor.dim() == 2 and tensor.shape[0] == rows and columns in (None, tensor.shape[-1])
    if not fits or tensor.dtype not in FLOATS:
        raise KernelError(f"{name} must be floating [{rows}, {columns or 'any'}], got {_says(tensor)}")


def _scale(name: str, tensor: Tensor | None, layout: SourceLayout) -> None:
    if tensor is not None and (tensor.shape != (layout.positions,) or tensor.dtype not in FLOATS):
        raise KernelError(f"{name} must be floating [{layout.positions}], one per position, got {_says(tensor)}")


def _same_device(**tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise KernelError(f"all tensors must lie on one device, got {listed}")


def _says(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
