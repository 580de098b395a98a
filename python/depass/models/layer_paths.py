"""How gradients flow through one layer of the linearised model: its attention, its MLP and its experts.

Hooks give the layer's tensors the gradients of :mod:`depass.models.linearised`; their numbers stay the model's own.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..errors import ModelError
from ..rules import PathWeights
from .bound import MLP, BoundModel, Layer, Projection
from .capture import of_this_thread, routing_of
from .experts import Experts, ExpertWeights, Places
from .recurrence_paths import RecurrencePaths

Slope = Literal["secant", "tangent"]


class LayerPaths:
    """How gradients flow through one layer, in the model's latest call of the layer.

    Attributes:
        steering: the queries and keys, each ``[B, H, N, d]``, as far as the attention's pattern passes them a gradient.
        mlp: the paths of the MLP that every position goes through, or None.
        experts: the paths of the routed experts, or None.
        recurrence: the paths of the recurrence, or None.
        late: the paths of the branch behind the MLP, or None.
        lent: in a layer whose keys and values others take, the latest ones, each ``[B, K, N, d]``.
        taken: in a layer that takes those of another one, leaves in their place, where ``cuts`` is set.
        cuts: whether gradients of taken keys and values end in ``taken``; otherwise they go on to their layer.
    """

    def __init__(self, bound: BoundModel, index: int, path_weights: PathWeights, slope: Slope) -> None:
        self.path_weights = path_weights
        self.layer: Layer = bound.layers[index]
        self.thread = threading.get_ident()
        self.steering: list[Tensor] = []
        mlp, experts, at = self.layer.mlp, self.layer.experts, f"layer {index} of {bound.name}"
        options = (bound.state_dtype, path_weights, slope)
        self.mlp = None if mlp is None else MLPPaths(mlp, at, *options)
        self.experts = None if experts is None else ExpertPaths(experts, *options)
        recurrent = (
            RecurrencePaths(mixer, mixer.recurrence) for mixer in self.layer.mixers if mixer.recurrence is not None
        )
        self.recurrence = next(recurrent, None)
        late = self.layer.late
        self.late = (
            None if late is None else MLPPaths(late, f"the branch behind the MLP of {at}", *options, is_gated=False)
        )
        self.lends, self.cuts = index in bound.lending, False
        self.lent: list[Tensor] = []
        self.taken: list[Tensor] = []

    @property
    def prepended(self) -> set[nn.Module]:
        """The modules whose output a hook detaches; what reads their output in autograd's graph must run before."""
        layer, found = self.layer, set[nn.Module]()
        if layer.mlp is not None:
            found |= {layer.mlp.gate.module, layer.mlp.weight}
        if layer.late is not None:
            found.add(layer.late.gate.module)
        return found | {mixer.mix_gate.module for mixer in layer.mixers if mixer.mix_gate is not None}

    def hook(self, stack: ExitStack) -> None:
        """Register the hooks; they are removed when the stack closes."""
        hooks, mlp = [], self.layer.mlp
        for gate in (mixer.mix_gate for mixer in self.layer.mixers if mixer.mix_gate is not None):
            hooks.append(gate.module.register_forward_hook(partial(self.mix_gate, gate)))
        if self.mlp is not None and mlp is not None:
            hooks.append(mlp.gate.module.register_forward_hook(self.mlp.gate))
            hooks.append(mlp.down.module.register_forward_pre_hook(self.mlp.hidden))
            if mlp.weight is not None:
                hooks.append(mlp.weight.register_forward_hook(self.frozen))
        if self.late is not None and self.layer.late is not None:
            hooks.append(self.layer.late.gate.module.register_forward_hook(self.late.gate))
            hooks.append(self.layer.late.down.module.register_forward_pre_hook(self.late.hidden))
        if self.experts is not None and self.layer.experts is not None:
            module, router = self.layer.experts.module, self.layer.experts.router
            if router is not None:
                hooks.append(router.register_forward_hook(self.experts.route))
            hooks.append(module.register_forward_pre_hook(self.experts.begin, with_kwargs=True))
            # a caller's hook on the experts changes the output that has a gradient
            hooks.append(module.register_forward_hook(self.experts.end, prepend=True))
        if self.recurrence is not None:
            mixer = self.recurrence.mixer
            hooks.append(mixer.module.register_forward_pre_hook(self.recurrence.begin, with_kwargs=True))
            hooks.append(mixer.output.module.register_forward_pre_hook(self.recurrence.mixed))
        for hook in hooks:
            stack.callback(hook.remove)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values with the gradients that they carry."""
        w = self.path_weights
        if self.lends:
            self.lent = [key, value]
            key, value = (x.view_as(x) for x in self.lent)  # whose gradients are those of this layer's own use
        if self.layer.values_of is not None and self.cuts and torch.is_grad_enabled():
            self.taken = [x.detach().requires_grad_() for x in (key, value)]
            key, value = (x.view_as(x) for x in self.taken)  # autograd gives each tensor one gradient
        self.steering = [x for x, weight in ((query, w.q), (key, w.k)) if weight != 0 and x.requires_grad]
        return _only(query, w.q), _only(key, w.k), _only(value, w.v)

    @of_this_thread
    def frozen(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Freeze what multiplies the output of the MLP beside the experts."""
        return output.detach() if torch.is_grad_enabled() else None

    @of_this_thread
    def mix_gate(self, gate: Projection, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Freeze the gate on what the heads mix; queries that the same projection computes keep their gradient."""
        return _without(gate, output) if torch.is_grad_enabled() and output.requires_grad else None


def _without(gate: Projection, output: Tensor) -> Tensor:
    """A module's output ``[..., all]``, in which the projection's columns have no gradient."""
    if gate.rows == "all":
        return output.detach()
    columns = gate.select_output(torch.arange(output.shape[-1], device=output.device)[None])[0]
    is_gate = torch.zeros(output.shape[-1], dtype=torch.bool, device=output.device)
    is_gate[columns] = True
    return torch.where(is_gate, output.detach(), output)


class MLPPaths:
    """How gradients flow through the MLP that every position goes through, in the model's latest call of the layer.

    Attributes:
        through: how much of the hidden vector's gradient the MLP's factors carry together.
    """

    def __init__(
        self,
        mlp: MLP,
        at: str,
        dtype: torch.dtype,
        path_weights: PathWeights,
        slope: Slope,
        is_gated: bool | None = None,
    ) -> None:
        self.mlp, self.at, self.dtype, self.path_weights, self.slope = mlp, at, dtype, path_weights, slope
        self.is_gated = is_gated  # None: as autograd's graph says
        self.thread = threading.get_ident()
        self.through = 1.0
        self.kept: Tensor | None = None  # the gate's output, which carries its path
        self.passed: Tensor | None = None  # the same, detached, from which the MLP makes its hidden vector
        self.source: Any = None  # where in autograd's graph the gate's input comes from

    @of_this_thread
    def gate(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Keep the gate's output and pass it on detached, so that the hidden vector's own gradient is the up path's."""
        if not torch.is_grad_enabled() or not output.requires_grad:
            return None
        self.source = get_gradient_edge(args[0]).node if args[0].requires_grad else None
        self.kept, *up = (output,) if self.mlp.gate.rows == "all" else output.chunk(2, -1)
        self.passed = self.kept.detach().requires_grad_(self.slope == "tangent")
        return torch.cat([self.passed, *up], -1) if up else self.passed

    @of_this_thread
    def hidden(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Give the down projection a hidden vector whose gradient both paths carry by their weights."""
        if not torch.is_grad_enabled():
            return None
        gate, passed, self.kept, self.passed = self.kept, self.passed, None, None
        if gate is None or passed is None:
            raise ModelError(
                f"the gate of {self.at} did not run before its down projection, as its depass.Family says it does; correct "
                "the family"
            )
        hidden, w = args[0], self.path_weights
        is_gated = _reaches(hidden, self.source, passed) if self.is_gated is None else self.is_gated
        of_gate, of_up = (w.gate, w.up) if is_gated else (1.0, 0.0)
        self.through = of_gate + of_up
        slope = self._slope(hidden, passed, of_gate) if of_gate else None
        if not of_up:
            hidden = hidden.detach()
        if slope is None:
            return (_only(hidden, of_up), *args[1:])
        return (_Hidden.apply(hidden, gate, slope, of_up), *args[1:])  # type: ignore[no-untyped-call]

    def _slope(self, hidden: Tensor, passed: Tensor, weight: float) -> Tensor:
        """``weight`` times what the hidden vector gains by the gate's output, neuron by neuron, in the shape of both."""
        if self.slope == "tangent":
            (derivative,) = torch.autograd.grad(hidden, passed, torch.ones_like(hidden), retain_graph=True)
            return weight * derivative.to(self.dtype)
        return weight * _secant(hidden, passed, self.dtype)


@dataclass(frozen=True)
class ExpertsCall:
    """One call of a layer's experts, for ``R`` rows of the model, padding included, and their ``S`` places.

    Attributes:
        weights: the experts' weights.
        places: the places of the rows.
        first: the edge in autograd's graph of the first projections' outputs ``[S, F or 2·F]``; their numbers are dropped.
        hidden: ``[S, F]``, the hidden vectors, in the graph; what they add is theirs times the router's weight.
        output: ``[R, D]``, the module's own output, in the graph.
        constant: ``[S, F]``, what a hidden vector holds that does not come from its gate or up, times the weight of ``up``;
            None where that is nothing but rounding.
    """

    weights: ExpertWeights
    places: Places
    first: GradientEdge
    hidden: Tensor
    output: Tensor
    constant: Tensor | None


class _Slopes(NamedTuple):
    hidden: Tensor  # [S, F]
    slope: Tensor  # [S, F or 2·F], what the hidden vector's gradient is multiplied by
    constant: Tensor | None  # [S, F]


class ExpertPaths:
    """How gradients flow through a layer's experts, in the model's latest call of the layer.

    The module computes its output without a graph. The output then gets the gradient of a graph from the experts' input
    over the places: their first projections, their hidden vectors, and the down projections times the router's weights.

    Attributes:
        through: how much of the hidden vectors' gradient the factors carry together.
        call: the latest call with a graph, or None.
    """

    def __init__(self, experts: Experts, dtype: torch.dtype, path_weights: PathWeights, slope: Slope) -> None:
        self.experts = replace(experts, factor=1.0)  # the model multiplies what the module adds
        self.dtype, self.slope, self.thread = dtype, slope, threading.get_ident()
        is_gated = experts.first == "gate_up_proj"
        self.of_gate, self.of_up = (path_weights.gate, path_weights.up) if is_gated else (1.0, 0.0)
        self.through = self.of_gate + self.of_up
        self.call: ExpertsCall | None = None
        self._routing: tuple[Tensor, Tensor, Tensor] | None = None  # while the module runs
        self._chosen: Tensor | None = None  # [P, E] bool, by a router whose weights multiply the inputs

    @of_this_thread
    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the module run without a graph."""
        if not torch.is_grad_enabled():
            self._routing = None
        elif self.experts.router is None:
            self._routing = routing_of(args, kwargs)
        else:
            self._routing = self._by_expert(args[0])
        if self._routing is not None:
            torch.set_grad_enabled(False)

    @of_this_thread
    def route(self, _: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Freeze the weights ``[P, E]`` that multiply the experts' inputs."""
        if not torch.is_grad_enabled():
            return None
        self._chosen = output[0].detach() != 0
        return (output[0].detach(), *output[1:])

    def _by_expert(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The routing of inputs ``[E·P, D]``, those of one expert after another: each row has one expert, or none."""
        count, chosen = self.experts.count, self._chosen
        assert chosen is not None
        expert = torch.arange(count, device=x.device)[:, None].expand(count, len(chosen))
        return x, torch.where(chosen.T, expert, -1).reshape(-1, 1), x.new_ones(len(x), 1)

    @of_this_thread
    def end(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Give the module's output its gradient."""
        routing, self._routing, self.call = self._routing, None, None
        if routing is None:
            return None
        torch.set_grad_enabled(True)
        x, chosen, weight = routing
        if not x.requires_grad:
            return None
        read = self.experts.read()
        read = ExpertWeights(read.experts, {name: tensor.detach() for name, tensor in read.tensors.items()})
        places = Places.of(chosen, weight.detach(), self.experts.count)
        first = _first(read, places, _AtPlaces.apply(x, places, chosen.shape[1]))  # type: ignore[no-untyped-call]
        hidden, slope, constant = self._slopes(read, first.detach())
        hidden = _OfPlaces.apply(first, (hidden,), slope, read)  # type: ignore[no-untyped-call]
        added: Tensor = _Added.apply(hidden, (output.detach(),), places, read)  # type: ignore[no-untyped-call]
        self.call = ExpertsCall(read, places, get_gradient_edge(first), hidden, added, constant)
        return added

    def _slopes(self, read: ExpertWeights, first: Tensor) -> _Slopes:
        """The hidden vectors, and what their gradient is multiplied by on its way to the first projection's outputs."""
        first = first.requires_grad_()
        hidden = read.hidden(first)
        (derivative,) = torch.autograd.grad(hidden, first, torch.ones_like(hidden))
        with torch.no_grad():
            hidden = hidden.detach()
            (gate, up), (by_gate, by_up) = read.halves(first), read.halves(derivative.to(self.dtype))
            of_gate = self.of_gate * (by_gate if self.slope == "tangent" else _secant(hidden, gate, self.dtype))
            if up is None or by_up is None:
                return _Slopes(hidden, of_gate, None)
            constant = None if self.of_up == 0 else _constant(hidden, up, by_up)
            return _Slopes(
                hidden,
                read.joined(of_gate, self.of_up * by_up),
                None if constant is None else self.of_up * constant,
            )


def _secant(hidden: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
    """``h / g`` neuron by neuron, and 0 where ``g`` is 0."""
    with torch.no_grad():
        g = gate.to(dtype)
        return torch.where(g == 0, 0, hidden.to(g) / g)


def _constant(hidden: Tensor, up: Tensor, by_up: Tensor) -> Tensor | None:
    """What hidden vectors ``[S, F]`` hold besides the product of their up and its derivative; None if it is rounding."""
    whole = hidden.to(by_up)
    rest = whole - by_up * up.to(by_up)
    rest = torch.where(rest.abs() <= 8 * torch.finfo(hidden.dtype).eps * whole.abs(), 0, rest)
    return rest if bool(rest.any()) else None


def _first(read: ExpertWeights, places: Places, x: Tensor) -> Tensor:
    """The outputs ``[S, F or 2·F]`` of the first projections for their inputs ``[S, D]``."""
    sizes = [run.stop - run.start for _, run in places.each()]
    pieces = [
        read.first(expert, piece) for (expert, _), piece in zip(places.each(), torch.split(x, sizes), strict=True)
    ]
    return torch.cat(pieces) if pieces else read.first(0, x)


def _reaches(x: Tensor, node: Any, besides: Tensor) -> bool:
    """Whether ``x`` was computed from the output of a node of autograd's graph, or from another leaf than a parameter.

    An ungated MLP's hidden vector was not, once its pre-activation is detached, even where its activation has parameters.
    The detached pre-activation, ``besides``, may be a leaf itself and does not count.
    """
    waiting: list[Any] = [get_gradient_edge(x).node] if x.requires_grad else []
    seen: set[Any] = set()
    while waiting:
        current = waiting.pop()
        leaf = getattr(current, "variable", None)
        is_foreign = leaf is not None and leaf is not besides and not isinstance(leaf, nn.Parameter)
        if (current is not None and current is node) or is_foreign:
            return True
        if current is not None and current not in seen:
            seen.add(current)
            waiting += [each for each, _ in current.next_functions]
    return False


class _Scaled(torch.autograd.Function):
    """A tensor, with ``weight`` times its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.weight, None


class _Hidden(torch.autograd.Function):
    """The hidden vector: ``slope`` times its gradient goes to the gate's output, ``up`` times to the hidden vector."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gate: Tensor, slope: Tensor, up: float) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.dtype, ctx.up = gate.dtype, up
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        of_hidden = gradient * ctx.up if ctx.needs_input_grad[0] else None
        return of_hidden, (gradient.to(slope.dtype) * slope).to(ctx.dtype), None, None


class _AtPlaces(torch.autograd.Function):
    """The rows ``[S, D]`` of ``[R, D]`` at places. The gradient is a sum of gathered rows, so it has one order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places, chosen: int) -> Tensor:
        place = torch.full((len(x) * chosen,), len(places), dtype=torch.int64, device=x.device)
        place[places.position * chosen + places.rank] = torch.arange(len(places), device=x.device)
        ctx.place = place.view(len(x), chosen)  # the number behind the last place where a row chose no expert
        return x[places.position]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        padded = torch.cat([gradient, gradient.new_zeros(1, gradient.shape[-1])])
        return padded[ctx.place].sum(1), None, None


class _OfPlaces(torch.autograd.Function):
    """Hidden vectors ``[S, F]``; ``slope`` times their gradient goes to the outputs of the first projections."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, own: tuple[Tensor], slope: Tensor, read: ExpertWeights) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.dtype, ctx.read = first.dtype, read
        return own[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        gradient = gradient.to(slope.dtype)
        return (slope * ctx.read.joined(gradient, gradient)).to(ctx.dtype), None, None, None


class _Added(torch.autograd.Function):
    """The experts' own output ``[R, D]``, with the gradient of the router's weights times the down projections."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, own: tuple[Tensor], places: Places, read: ExpertWeights) -> Tensor:
        ctx.dtype, ctx.places, ctx.read = hidden.dtype, places, read
        return own[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        places, read = ctx.places, ctx.read
        at_places = (gradient[places.position] * places.weight[:, None]).to(gradient.dtype)
        # mm and not matmul: autograd's batches of targets have a product of their own for it
        pieces = [torch.mm(at_places[run], read.downs[expert].to(gradient.dtype)) for expert, run in places.each()]
        of_hidden = torch.cat(pieces) if pieces else torch.mm(at_places, read.downs[0].to(gradient.dtype))
        return of_hidden.to(ctx.dtype), None, None, None


def _only(x: Tensor, weight: float) -> Tensor:
    """``x`` with ``weight`` times its gradient."""
    if weight == 0:
        return x.detach()
    if weight == 1 or not x.requires_grad:
        return x
    scaled: Tensor = _Scaled.apply(x, weight)  # type: ignore[no-untyped-call]
    return scaled
