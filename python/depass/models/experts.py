"""The routed experts of a layer: their weights, and which of them each position chose.

transformers holds all experts of a layer in one module with a tensor for each projection. A position's hidden vector has a
part for each expert that it chose; such a pair of a position and an expert is a *place*. Places are sorted by expert, so
the places of one expert are a run, and a product with its weights is one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from depass_kernels.ops import FLOATS

from ..errors import ModelError
from . import weights

_INTERFACE = ("is_transposed", "is_concatenated", "has_bias")  # attributes of the modules of the experts interface


@dataclass(frozen=True)
class Experts:
    """The experts of a layer.

    Attributes:
        module: the module that holds them, of a class that transformers' ``use_experts_implementation`` decorates.
        chosen: how many of them a position chooses.
        factor: what the model multiplies by what they add to the residual stream; it is part of the down projections.
        router: the router whose weights multiply the experts' inputs, or None where they multiply their outputs. Its
            experts are of Llama 4's form: the interface's attributes are not there, and the weights are ``[E, in, out]``.
    """

    module: Any
    chosen: int
    factor: float = 1.0
    router: Any = None

    @property
    def is_transposed(self) -> bool:
        """Whether the weights are ``[E, in, out]``."""
        return self.router is not None or bool(self.module.is_transposed)

    @property
    def is_concatenated(self) -> bool:
        """Whether the gate's rows come before the up's, rather than between them."""
        return self.router is not None or bool(self.module.is_concatenated)

    def places(self, chosen: Tensor, weight: Tensor) -> Places:
        """The places of positions that chose ``chosen`` ``[P, k]``, with the router's weights ``[P, k]``."""
        places = Places.of(chosen, weight, self.count)
        if self.router is None:
            return places
        return replace(places, weight=torch.ones_like(places.weight), on_input=places.weight)

    @property
    def count(self) -> int:
        """The number of experts."""
        return len(getattr(self.module, self.first))

    @property
    def first(self) -> str:
        """The name of the tensor that computes the pre-activations."""
        return "gate_up_proj" if getattr(self.module, "has_gate", True) else "up_proj"

    @property
    def neurons(self) -> int:
        """The number of neurons ``F`` of one expert."""
        shape = self.module.down_proj.shape
        return int(shape[1] if self.is_transposed else shape[2])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The module's own tensors by name: offloaded ones hold no numbers."""
        return {name: getattr(self.module, name) for name in self.names}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors."""
        return (self.first, "down_proj", *((f"{self.first}_bias", "down_proj_bias") if self.has_bias else ()))

    @property
    def has_bias(self) -> bool:
        """Whether the experts' projections have biases."""
        return self.router is None and bool(self.module.has_bias)

    def read(self, *names: str) -> ExpertWeights:
        """The weights as numbers on their device; offloaded ones are copied there, once for all experts.

        Args:
            names: of :attr:`tensors`, those that are needed; by default all.
        """
        tensors = {name: weights.dense(self.module, name) for name in names or self.tensors}
        return ExpertWeights(self, {name: tensor for name, tensor in tensors.items() if tensor is not None})


def holds_experts(module: Any) -> bool:
    """Whether a module is one of transformers' experts interface."""
    return all(hasattr(module, name) for name in _INTERFACE)


def refuse_other_experts(model: Any) -> None:
    """Check that no module of a model holds experts in another form than that of transformers' experts interface.

    Raises:
        ModelError: one does.
    """
    inside: list[str] = []  # of the interface
    for path, module in model.named_modules():
        if holds_experts(module):
            inside.append(f"{path}.")
        kind = type(module).__name__.lower()
        is_named = path.rpartition(".")[2] == "experts" or (
            kind.endswith("experts") and not kind.endswith("sharedexperts")
        )
        if is_named and not f"{path}.".startswith(tuple(inside)):
            refuse_experts(module, f"the experts {path} of {type(model).__name__}")


def refuse_experts(module: Any, which: str, on_input: bool = False) -> None:
    """Check that a module's experts can be decomposed; ``which`` names them in the error.

    With ``on_input``, a router's weights multiply the experts' inputs, and the module is of Llama 4's form.

    Raises:
        ModelError: they are no tensors of numbers in the form that transformers' experts interface declares, are spread
            over devices, or have a norm on their outputs.
    """
    lacking = [name for name in _INTERFACE if not hasattr(module, name)]
    if on_input and not lacking:
        raise ModelError(
            f"{which} ({type(module).__name__}) are of transformers' experts interface, in which the router's weights "
            "multiply the experts' outputs; leave input_router out"
        )
    if on_input:
        lacking = [name for name in ("gate_up_proj", "down_proj", "act_fn") if not hasattr(module, name)]
    if lacking:
        raise ModelError(
            f"{which} ({type(module).__name__}) are not of transformers' experts interface (5.7 and later), whose modules "
            f"hold one tensor for each projection of all experts (lacking: {', '.join(lacking)}); DePass supports no others"
        )
    if getattr(module, "_is_expert_parallel", False):
        raise ModelError(f"{which} are spread over processes (expert parallelism); load the model in one process")
    if getattr(module, "has_post_expert_norm", False):
        raise ModelError(f"{which} have a norm on their outputs, which DePass does not support")
    experts = Experts(module, 1, router=module if on_input else None)
    absent = [name for name in experts.names if not isinstance(getattr(module, name, None), Tensor)]
    if absent:
        raise ModelError(f"{which} ({type(module).__name__}) have no {', '.join(absent)}; load unquantised weights")
    for name, tensor in experts.tensors.items():
        if tensor.dim() != (2 if name.endswith("bias") else 3) or tensor.dtype not in FLOATS:
            raise ModelError(
                f"{which} hold {tensor.dtype} weights of shape {list(tensor.shape)} as {name}, which DePass cannot read as "
                "numbers; load unquantised weights"
            )


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of a layer's experts; an expert is named by its index."""

    experts: Experts
    tensors: dict[str, Tensor]

    @property
    def gates(self) -> Tensor:
        """The weights ``[E, F, D]`` of the pre-activations, a view."""
        return self.halves(self._turned(self.tensors[self.experts.first]).mT)[0].mT

    @property
    def downs(self) -> Tensor:
        """The weights ``[E, D, F]`` of the module's own down projections, without the factor, a view."""
        return self._turned(self.tensors["down_proj"])

    def gate_bias(self, expert: int) -> Tensor | None:
        """The bias ``[F]`` of the pre-activations, or None."""
        bias = self.tensors.get(f"{self.experts.first}_bias")
        return None if bias is None else self.halves(bias[expert])[0]

    def down(self, expert: int) -> Tensor:
        """The weight ``[D, F]`` of the down projection; with a factor it is a copy in at least fp32."""
        return self._multiplied(self.downs[expert])

    def down_bias(self, expert: int) -> Tensor | None:
        """The bias ``[D]`` of the down projection, or None."""
        bias = self.tensors.get("down_proj_bias")
        return None if bias is None else self._multiplied(bias[expert])

    def first(self, expert: int, x: Tensor) -> Tensor:
        """The output ``[p, F or 2·F]`` of an expert's first projection for inputs ``[p, D]``: the gate's and the up's."""
        first = torch.nn.functional.linear(x, self._turned(self.tensors[self.experts.first][expert]))
        bias = self.tensors.get(f"{self.experts.first}_bias")
        return first if bias is None else first + bias[expert]

    def hidden(self, first: Tensor) -> Tensor:
        """The hidden vectors ``[p, F]`` for the first projection's outputs, by the module's own activation."""
        module = self.experts.module
        if self.experts.router is not None:
            gate, up = first.chunk(2, -1)
            return up * module.act_fn(gate)  # type: ignore[no-any-return]
        has_gate = self.experts.first == "gate_up_proj"
        hidden: Tensor = module._apply_gate(first) if has_gate else module.act_fn(first)
        return hidden

    def pre_activations(self, first: Tensor) -> Tensor:
        """The pre-activations ``[p, F]`` among the first projection's outputs."""
        return self.halves(first)[0]

    def halves(self, first: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gate's and the up's part ``[..., F]`` of the first projection's outputs; ungated experts have no up."""
        if self.experts.first != "gate_up_proj":
            return first, None
        if self.experts.is_concatenated:
            gate, up = first.chunk(2, -1)
            return gate, up
        return first[..., ::2], first[..., 1::2]

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        """The opposite of :meth:`halves`: ``[..., F]`` and ``[..., F]`` in the order of the first projection's outputs."""
        if self.experts.first != "gate_up_proj":
            return gate
        if self.experts.is_concatenated:
            return torch.cat([gate, up], -1)
        return torch.stack([gate, up], -1).reshape(*gate.shape[:-1], 2 * gate.shape[-1])

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.mT if self.experts.is_transposed else weight

    def _multiplied(self, rows: Tensor) -> Tensor:
        if self.experts.factor == 1:
            return rows
        return rows.to(torch.promote_types(rows.dtype, torch.float32)) * self.experts.factor


@dataclass(frozen=True)
class ExpertGate:
    """The projection of one expert that computes its pre-activations."""

    read: ExpertWeights
    expert: int

    @property
    def weight(self) -> Tensor:
        """``[F, D]``."""
        return self.read.gates[self.expert]

    @property
    def bias(self) -> Tensor | None:
        """``[F]``, or None."""
        return self.read.gate_bias(self.expert)


@dataclass(frozen=True)
class Places:
    """The ``S`` places of some positions, sorted by expert.

    Attributes:
        position: ``[S]`` int64, the index of the place's position.
        rank: ``[S]`` int64, which of the position's choices the place is.
        weight: ``[S]``, what multiplies the expert's output: the router's weight, or 1 where that multiplies its input.
        runs: by expert that was chosen, the place where its run begins and the one behind its end.
        on_input: ``[S]``, the router's weight where it multiplies the expert's input, or None.
    """

    position: Tensor
    rank: Tensor
    weight: Tensor
    runs: dict[int, tuple[int, int]]
    on_input: Tensor | None = None

    @staticmethod
    def of(chosen: Tensor, weight: Tensor, count: int) -> Places:
        """The places of positions that chose ``chosen`` ``[P, k]`` of ``count`` experts, with the router's weights."""
        each = chosen.to("cpu", torch.int64).flatten()
        order = each.argsort(stable=True)
        order = order[(each[order] >= 0) & (each[order] < count)]  # some routers choose "none" by another number
        ends = [0, *torch.bincount(each[order], minlength=count).cumsum(0).tolist()]
        runs = {expert: (ends[expert], ends[expert + 1]) for expert in range(count) if ends[expert] < ends[expert + 1]}
        order = order.to(chosen.device)
        position = order // chosen.shape[1]
        return Places(position, order % chosen.shape[1], weight.flatten()[order], runs)

    def __len__(self) -> int:
        return len(self.position)

    def inputs(self, x: Tensor, run: slice) -> Tensor:
        """The inputs ``[p, D]`` of an expert at its places, for the vectors ``[P, D]`` of the positions."""
        inputs = x[self.position[run]]
        return inputs if self.on_input is None else inputs * self.on_input[run, None].to(inputs)

    @property
    def expert(self) -> Tensor:
        """``[S]`` int64, the expert of each place."""
        device = self.position.device
        counts = torch.tensor([end - begin for begin, end in self.runs.values()], dtype=torch.int64, device=device)
        return torch.tensor(list(self.runs), dtype=torch.int64, device=device).repeat_interleave(counts)

    def ends(self, count: int) -> Tensor:
        """``[E]`` int64 on the CPU: for each of ``count`` experts the place behind its run, which may be empty."""
        counts = torch.zeros(count, dtype=torch.int64, device="cpu")
        for expert, (begin, end) in self.runs.items():
            counts[expert] = end - begin
        return counts.cumsum(0)

    def each(self) -> Iterator[tuple[int, slice]]:
        """The chosen experts, each with its places."""
        for expert, (begin, end) in self.runs.items():
            yield expert, slice(begin, end)


def hidden_vectors(read: ExpertWeights, places: Places, x: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden vectors and the pre-activations ``[S, F]`` of all places, made again from the experts' input ``[P, D]``."""
    neurons = read.experts.neurons
    hidden, gate = (x.new_empty(len(places), neurons) for _ in range(2))
    for expert, run in places.each():
        first = read.first(expert, places.inputs(x, run))
        hidden[run], gate[run] = read.hidden(first), read.pre_activations(first)
    return hidden, gate


def outputs(
    read: ExpertWeights, places: Places, x: Tensor, dtype: torch.dtype, with_bias: bool = True
) -> Iterator[tuple[int, slice, Tensor]]:
    """What each chosen expert adds at its places, ``[p, D]`` with the router's weight and its bias, in ``dtype``."""
    for expert, run in places.each():
        hidden = read.hidden(read.first(expert, places.inputs(x, run))).to(dtype)
        output = hidden @ read.down(expert).to(dtype).T
        bias = read.down_bias(expert) if with_bias else None
        output = output if bias is None else output + bias.to(dtype)
        yield expert, run, output * places.weight[run, None].to(dtype)


def summed_bias(read: ExpertWeights, places: Places, positions: int, dtype: torch.dtype) -> Tensor:
    """The down projections' biases of all experts that each position chose, ``[P, D]`` with the router's weights."""
    weight = places.weight.to(dtype)
    total = weight.new_zeros(positions, read.tensors["down_proj_bias"].shape[1])
    for expert, run in places.each():
        bias = read.down_bias(expert)
        assert bias is not None
        total.index_add_(0, places.position[run], weight[run, None] * bias.to(dtype))
    return total
