"""A layer's MLP in the decomposed pass: the branches that its positions go through, and what they add to the state.

A branch is an MLP that every position goes through, or the layer's experts. Both read the state before the MLP. A
position goes through each expert that it chose, so a pair of both, a *place*, is shared out like a position of its own.
A third branch of some layers, :func:`late_branch`, reads the state behind the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from depass_kernels import SourceLayout, backends, grouped_matmul, grouped_update, share_hidden
from depass_kernels.reference import matmul

from ..models.bound import MLP, Layer, Norm
from ..models.experts import ExpertGate, Experts, ExpertWeights, hidden_vectors, summed_bias
from ..models.trace import Trace
from .blocks import _PositionBlock, neurons_at_once, traits
from .projections import add_constant, constant_of, folded, output_scale

if TYPE_CHECKING:
    from .propagate import Propagation


class Branch(Protocol):
    """One of the branches of a layer's MLP.

    Attributes:
        norm: the norm on its input, or None.
        scale: ``[P]``, the frozen scale of that norm, by position of the layout; or None.
    """

    norm: Norm | None
    scale: Tensor | None

    def add(self, block: _PositionBlock, operand: Tensor, in_trace: slice | Tensor) -> None:
        """Add what a block of positions gets from this branch to the state.

        Args:
            block: the positions, and their rows of the state.
            operand: these rows after the norm, ``[rows, D]``.
            in_trace: the positions in the trace.
        """

    def add_bias(self) -> None:
        """Add the branch's output bias to the bias source, at all positions."""


def branches(propagation: Propagation, layer: Layer, trace: Trace) -> Iterator[Branch]:
    """The branches of a layer, each with its weights in the dtype of the products."""
    if layer.experts is not None:
        yield _Routed(propagation, layer, layer.experts, trace)
    if layer.mlp is not None:
        assert trace.hidden is not None
        frozen = _Frozen(trace.hidden, trace.gate_total, _factor(trace, trace.mlp_weight, "shared_post_norm"))
        norms = layer.mlp_norm, propagation.at(trace.scales.get("mlp_norm")), layer.mlp_post_norm
        yield _Every(propagation, layer.mlp, frozen, *norms, layer.shared_post_norm)


def late_branch(propagation: Propagation, layer: Layer, trace: Trace) -> Branch | None:
    """The branch behind a layer's MLP, if it has one; it reads the state as it is."""
    if layer.late is None:
        return None
    assert trace.late_hidden is not None
    frozen = _Frozen(trace.late_hidden, trace.late_total, trace.scales.get("late_post_norm"))
    return _Every(propagation, layer.late, frozen, None, None, layer.late_post_norm)


class _Frozen(NamedTuple):
    """What a branch that every position goes through freezes."""

    hidden: Tensor  # [P, F]
    total: Tensor | None  # [P, F], the pre-activations, for the taylor rule
    factor: Tensor | None  # [P], what multiplies the output


class _Every:
    """An MLP that every position goes through."""

    def __init__(
        self,
        propagation: Propagation,
        mlp: MLP,
        frozen: _Frozen,
        norm: Norm | None,
        scale: Tensor | None,
        post_norm: Norm | None,
        inner: Norm | None = None,  # a norm on the output, before post_norm
    ) -> None:
        self.propagation, self.mlp, self.total = propagation, mlp, frozen.total
        self.norm, self.scale, self.post_norm, self.inner = norm, scale, post_norm, inner
        dtype, state_dtype = propagation.product_dtype, propagation.state.dtype
        self.factor = None if frozen.factor is None else frozen.factor.to(state_dtype)
        self.hidden = frozen.hidden if self.factor is None else frozen.hidden.to(state_dtype) * self.factor[:, None]
        self.gate_weight = mlp.gate.weight.to(dtype)  # [F, D]
        self.down_weight = folded(mlp.down.weight, post_norm, dtype, inner)  # [D, F]
        self.constant = constant_of(mlp.gate, norm, state_dtype)  # [F]

    def add(self, block: _PositionBlock, operand: Tensor, in_trace: slice | Tensor) -> None:
        neurons, total = len(self.gate_weight), self.total
        at_once = neurons_at_once(neurons, self.propagation.blocks.gates // (block.end - block.begin))
        for f in range(0, neurons, at_once):
            n = slice(f, min(f + at_once, neurons))
            gate = matmul(operand, self.gate_weight[n])  # [rows, n]
            if self.constant is not None:
                add_constant(gate, self.constant[n], block.layout)
            shared = share(
                self.propagation,
                gate,
                self.hidden[in_trace, n],
                block.layout,
                None if total is None else total[in_trace, n],
            )
            self.propagation.add(shared, self.down_weight[:, n], self.propagation.state[block.begin : block.end])

    def add_bias(self) -> None:
        bias = self.mlp.down.bias
        if bias is not None:
            bias = _weighted(bias.to(self.propagation.state.dtype), self.inner, self.post_norm)
            self.propagation.add_bias(bias if self.factor is None else bias * self.factor[:, None])


class _Routed:
    """The experts of a layer."""

    def __init__(self, propagation: Propagation, layer: Layer, experts: Experts, trace: Trace) -> None:
        assert trace.chosen is not None
        assert trace.chosen_weights is not None
        assert trace.routed is not None
        self.propagation, self.layer, self.experts = propagation, layer, experts
        self.norm, norm_name = layer.read_by_experts, "mlp_norm" if layer.experts_norm is None else "experts_norm"
        self.scale = propagation.at(trace.scales.get(norm_name))
        state_dtype = propagation.state.dtype
        self.read: ExpertWeights = experts.read()  # fetched once for all experts and blocks
        self.chosen = trace.chosen
        self.weight = trace.chosen_weights.to(state_dtype)  # [P, k]
        places = experts.places(trace.chosen, self.weight)
        hidden, total = hidden_vectors(self.read, places, trace.routed)  # [S, F]
        factor = _factor(trace, None, "experts_post_norm")
        factor = None if factor is None else factor.to(state_dtype)[places.position]
        self.places = places if factor is None else replace(places, weight=places.weight * factor)
        self.hidden = hidden.to(state_dtype) * self.places.weight[:, None]
        self.total = total if propagation.sharing.rule == "taylor" else None
        self.place = torch.empty(trace.chosen.shape, dtype=torch.int64, device=trace.chosen.device)  # [P, k], of S
        self.place[places.position, places.rank] = torch.arange(len(places), device=trace.chosen.device)
        self.output_scale = output_scale(
            experts.factor, self.read.downs, layer.experts_post_norm, layer.mlp_post_norm
        )  # [D]
        self.constants = self._constants()  # [E, F]

    def add(self, block: _PositionBlock, operand: Tensor, in_trace: slice | Tensor) -> None:
        places = self.experts.places(self.chosen[in_trace], self.weight[in_trace])
        layout, rows = block.layout.select_positions([places.position.cpu()])
        rows, ends = rows.to(operand.device), layout.row_start[places.ends(self.experts.count)]
        of_row = layout.position_of_row(rows.device)  # the place of each row
        times = None if places.on_input is None else places.on_input[of_row, None]  # of the experts' inputs
        in_layer = self.place[in_trace][places.position, places.rank]  # [S_block]
        hidden, total = self.hidden[in_layer], None if self.total is None else self.total[in_layer]
        state = self.propagation.state[block.begin : block.end]
        held = rows.new_full((len(state), self.chosen.shape[1]), -1)  # the rows of the places of each row of the state
        held[rows, places.rank[of_row]] = torch.arange(len(rows), device=rows.device)
        sums_are_fp32 = traits(operand.device).fp32_sums and operand.dtype.itemsize == 2
        gate_dtype = torch.float32 if sums_are_fp32 else operand.dtype
        at_once = neurons_at_once(self.experts.neurons, self.propagation.blocks.gates // max(1, len(rows)))
        for f in range(0, self.experts.neurons, at_once):
            n = slice(f, min(f + at_once, self.experts.neurons))
            gate = operand.new_empty(len(rows), n.stop - n.start, dtype=gate_dtype)
            grouped_matmul(
                operand, self.read.gates[:, n], ends, rows=rows, out=gate, backend=self._backend("grouped_matmul")
            )
            if self.constants is not None:
                add_constant(gate, self.constants[places.expert, n], layout)
            if times is not None:
                gate *= times
            shared = share(self.propagation, gate, hidden[:, n], layout, None if total is None else total[:, n])
            del gate  # its memory takes the products of the down projection
            down, backend = self.read.downs[..., n], self._backend("grouped_update")
            grouped_update(state, shared, down, ends, held, scale=self.output_scale, backend=backend)

    def _backend(self, op: str) -> str:
        return backends.named_for(op, self.propagation.sharing.backend)

    def _constants(self) -> Tensor | None:
        """The constant part of the pre-activations of the experts that were chosen, ``[E, F]``, or None."""
        dtype, constants = self.propagation.state.dtype, None
        for expert, _ in self.places.each():
            constant = constant_of(ExpertGate(self.read, expert), self.norm, dtype)
            if constant is not None:
                if constants is None:
                    constants = constant.new_zeros(self.experts.count, len(constant))
                constants[expert] = constant
        return constants

    def add_bias(self) -> None:
        if not self.experts.has_bias:
            return
        bias = summed_bias(self.read, self.places, len(self.chosen), self.propagation.state.dtype)  # [P, D]
        self.propagation.add_bias(_weighted(bias, self.layer.experts_post_norm, self.layer.mlp_post_norm))


def _factor(trace: Trace, weight: Tensor | None, inner: str) -> Tensor | None:
    """What multiplies a branch's output at each position ``[P]``: its weight, and the scales of the norms behind.

    They have the dtype of scales, the state's. ``inner`` names the branch's own norm.
    """
    scales = [scale for name in (inner, "mlp_post_norm") if (scale := trace.scales.get(name)) is not None]
    factors = scales if weight is None else [weight, *scales]
    return math.prod(factors[1:], start=factors[0]) if factors else None


def _weighted(x: Tensor, *norms: Norm | None) -> Tensor:
    """Vectors ``[..., D]`` times the ``γ`` of the norms that there are."""
    for norm in norms:
        x = x if norm is None else norm.weighted(x)
    return x


def share(propagation: Propagation, gate: Tensor, hidden: Tensor, layout: SourceLayout, total: Tensor | None) -> Tensor:
    """The hidden vectors ``[P', n]`` shared out by the pre-activations ``[R', n]``, in the dtype of the products."""
    dtype, sharing = propagation.product_dtype, propagation.sharing
    return share_hidden(
        gate,
        hidden,
        layout,
        rule=sharing.rule,
        temperature=sharing.temperature,
        gate_total=total,
        out=gate if gate.dtype == dtype else gate.new_empty(gate.shape, dtype=dtype),
        backend=sharing.backend,
    )
