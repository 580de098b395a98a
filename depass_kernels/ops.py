"""The public ops: they check what they are given, choose a backend and return the result.

``P`` positions over all staircases, ``R`` rows, ``H`` query heads, ``K`` key/value heads, ``d`` head dim, ``F`` MLP width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backends
from .errors import KernelError
from .layout import SourceLayout

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
    ``k`` where source ``m`` is active. Rows of ``pattern`` need not sum to one, and nothing above its diagonal may be
    nonzero: a source's rows end where it starts.

    Args:
        pattern: ``[B, H, N, N]``, attention after softmax, one per prompt of ``layout``; ``N`` positions or more.
        values: ``[R, K·d]`` in the layout's rows.
        layout: where the rows lie.
        kv_heads: ``K``, which no shape tells where query heads share values (GQA); ``H`` without it.
        key_scale: ``[P]``, the frozen ``1/rms`` or ``1/σ`` of the norm before the attention.
        query_scale: ``[P]``, the same of a norm on the attention's output.
        out: ``[R, H·d]`` to write to, of any floating dtype; made in the dtype of ``values`` without it.
        backend: ``"auto"`` or the name of one of :data:`depass_kernels.backends.BACKENDS`.

    Returns:
        ``[R, H·d]``, ``out`` where given.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together.
        BackendError: the named backend cannot serve this call.
    """
    _matrix("values", values, layout.rows, None)
    if pattern.dim() != 4 or pattern.shape[2] != pattern.shape[3] or pattern.dtype not in FLOATS:
        raise KernelError(f"pattern must be floating [B, H, N, N], got {_says(pattern)}")
    prompts, heads, longest = int(layout.prompt.max()) + 1, pattern.shape[1], int(layout.position_start.diff().max())
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
    arguments = {
        "pattern": pattern, "values": values, "layout": layout, "kv_heads": kv_heads, "key_scale": key_scale,
        "query_scale": query_scale, "out": out,
    }  # fmt: skip
    backends.choose("mix_values", backend, arguments).run["mix_values"](**arguments)
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
        backend: ``"auto"`` or the name of one of :data:`depass_kernels.backends.BACKENDS`.

    Returns:
        ``[R, F]``, ``out`` where given.

    Raises:
        KernelError: shapes, dtypes, devices or options that do not fit together.
        BackendError: the named backend cannot serve this call.
    """
    _matrix("gate", gate, layout.rows, None)
    _matrix("hidden", hidden, layout.positions, gate.shape[1])
    if rule not in backends.RULES:
        raise KernelError(f"unknown rule {rule!r}; there are: {', '.join(backends.RULES)}")
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
    arguments = {
        "gate": gate, "hidden": hidden, "layout": layout, "gate_scale": gate_scale, "rule": rule,
        "temperature": temperature, "gate_total": gate_total, "out": out,
    }  # fmt: skip
    backends.choose("share_hidden", backend, arguments).run["share_hidden"](**arguments)
    return out


def _matrix(name: str, tensor: Tensor, rows: int, columns: int | None) -> None:
    fits = tensor.dim() == 2 and tensor.shape[0] == rows and columns in (None, tensor.shape[-1])
    if not fits or tensor.dtype not in FLOATS:
        raise KernelError(f"{name} must be floating [{rows}, {columns or 'any'}] for this layout, got {_says(tensor)}")


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
