"""A layer's MLP in the decomposed pass: the branches that its positions go through, and what they add to the state.

A branch is an MLP that every position goes through, or the layer's experts. All branches read the state before the MLP. A
position goes through each expert that it chose, so a pair of both, a *place*, is shared out like a position of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from depass_kernels import SourceLayout, backends, grouped_matmul, grouped_update, share_hidden
from depass_kernels.reference import matmul

from ..models.bound import MLP, Layer
from ..models.experts import ExpertGate, Experts, ExpertWeights, Places, hidden_vectors, summed_bias
from ..models.trace import Trace
from .blocks import _PositionBlock, neurons_at_once, traits
from .projections import add_constant, constant_of, folded, output_scale

if TYPE_CHECKING:
    from .propagate import Propagation


class Branch(Protocol):
    """One of the branches of a layer's MLP."""

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
        yield _Every(propagation, layer, layer.mlp, trace)


class _Every:
    """The MLP that every position goes through."""

    def __init__(self, propagation: Propagation, layer: Layer, mlp: MLP, trace: Trace) -> None:
        assert trace.hidden is not None
        self.propagation, self.layer, self.mlp, self.trace = propagation, layer, mlp, trace
        dtype, state_dtype = propagation.bound.product_dtype, propagation.state.dtype
        self.factor = _factor(trace, trace.mlp_weight, state_dtype)  # [P]
        self.hidden = trace.hidden if self.factor is None else trace.hidden.to(state_dtype) * self.factor[:, None]
        self.gate_weight = mlp.gate.weight.to(dtype)  # [F, D]
        self.down_weight = folded(mlp.down.weight, layer.mlp_post_norm, dtype)  # [D, F]
        self.constant = constant_of(mlp.gate, layer.mlp_norm, state_dtype)  # [F]

    def add(self, block: _PositionBlock, operand: Tensor, in_trace: slice | Tensor) -> None:
        neurons, total = len(self.gate_weight), self.trace.gate_total
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
        bias, norm = self.mlp.down.bias, self.layer.mlp_post_norm
        if bias is not None:
            bias = bias.to(self.propagation.state.dtype)
            bias = bias if norm is None else norm.weighted(bias)
            self.propagation.add_bias(bias if self.factor is None else bias * self.factor[:, None])


class _Routed:
    """The experts of a layer."""

    def __init__(self, propagation: Propagation, layer: Layer, experts: Experts, trace: Trace) -> None:
        assert trace.chosen is not None
        assert trace.chosen_weights is not None
        assert trace.routed is not None
        self.propagation, self.layer, self.experts = propagation, layer, experts
        state_dtype = propagation.state.dtype
        self.read: ExpertWeights = experts.read()  # fetched once for all experts and blocks
        self.chosen = trace.chosen
        factor, weight = _factor(trace, None, state_dtype), trace.chosen_weights.to(state_dtype)
        self.weight = weight if factor is None else weight * factor[:, None]  # [P, k]
        self.places = places = Places.of(trace.chosen, self.weight, experts.count)
        hidden, total = hidden_vectors(self.read, places, trace.routed)  # [S, F]
        self.hidden = hidden.to(state_dtype) * places.weight[:, None]
        self.total = total if propagation.sharing.rule == "taylor" else None
        self.place = torch.empty(trace.chosen.shape, dtype=torch.int64, device=trace.chosen.device)  # [P, k], of S
        self.place[places.position, places.rank] = torch.arange(len(places), device=trace.chosen.device)
        self.scale = output_scale(layer.mlp_post_norm, experts.factor, self.read.downs)  # [D]
        self.constants = self._constants()  # [E, F]

    def add(self, block: _PositionBlock, operand: Tensor, in_trace: slice | Tensor) -> None:
        places = Places.of(self.chosen[in_trace], self.weight[in_trace], self.experts.count)
        layout, rows = block.layout.select_positions([places.position.cpu()])
        rows, ends = rows.to(operand.device), layout.row_start[places.ends(self.experts.count)]
        in_layer = self.place[in_trace][places.position, places.rank]  # [S_block]
        hidden, total = self.hidden[in_layer], None if self.total is None else self.total[in_layer]
        state = self.propagation.state[block.begin : block.end]
        held = rows.new_full((len(state), self.chosen.shape[1]), -1)  # the rows of the places of each row of the state
        held[rows, places.rank[layout.position_of_row(rows.device)]] = torch.arange(len(rows), device=rows.device)
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
            shared = share(self.propagation, gate, hidden[:, n], layout, None if total is None else total[:, n])
            del gate  # its memory takes the products of the down projection
            down, backend = self.read.downs[..., n], self._backend("grouped_update")
            grouped_update(state, shared, down, ends, held, scale=self.scale, backend=backend)

    def _backend(self, op: str) -> str:
        return backends.named_for(op, self.propagation.sharing.backend)

    def _constants(self) -> Tensor | None:
        """The constant part of the pre-activations of the experts that were chosen, ``[E, F]``, or None."""
        dtype, constants = self.propagation.state.dtype, None
        for expert, _ in self.places.each():
            constant = constant_of(ExpertGate(self.read, expert), self.layer.mlp_norm, dtype)
            if constant is not None:
                if constants is None:
                    constants = constant.new_zeros(self.experts.count, len(constant))
                constants[expert] = constant
        return constants

    def add_bias(self) -> None:
        if not self.experts.has_bias:
            return
        state, norm = self.propagation.state, self.layer.mlp_post_norm
        bias = summed_bias(self.read, self.places, len(self.chosen), state.dtype)  # [P, D]
        self.propagation.add_bias(bias if norm is None else norm.weighted(bias))


def _factor(trace: Trace, weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What multiplies a branch's output at each position ``[P]``: its weight, and the scale of the norm behind."""
    factors = [each.to(dtype) for each in (weight, trace.scales.get("mlp_post_norm")) if each is not None]
    return factors[0] if len(factors) == 1 else factors[0] * factors[1] if factors else None


def share(propagation: Propagation, gate: Tensor, hidden: Tensor, layout: SourceLayout, total: Tensor | None) -> Tensor:
    """The hidden vectors ``[P', n]`` shared out by the pre-activations ``[R', n]``, in the dtype of the products."""
    dtype, sharing = propagation.bound.product_dtype, propagation.sharing
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
