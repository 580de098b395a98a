"""The linearised model: it computes what it always does, and its gradients flow as path weights say.

Each nonlinear place of a model is a product of factors. A rule says how much of the product's gradient each factor carries;
the other factors are frozen. Inside :func:`linearised` the model's outputs stay bit for bit those of eager attention (up to
rounding where it goes by blocks of queries, see :mod:`depass.models.query_blocks`), and

* a norm ``γ ⊙ x · r`` passes the gradient of ``x`` on, with ``r`` frozen (the centred ``x`` in a LayerNorm). This holds
  for the norms of layers, of queries and keys, on outputs, and for the final one;
* attention passes on ``v`` of the gradient of its values, ``q`` of its queries' and ``k`` of its keys';
* a gated MLP ``act(g) ⊙ u`` passes ``gate`` of the gradient through ``g`` with ``act(g) ⊙ u / g`` frozen (0 where ``g`` is
  0), and ``up`` of it through ``u`` with ``act(g)`` frozen. An ungated MLP passes all of it through ``act(z) / z · z``.
  These are secants of the activation; its tangent, the derivative, can take their place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..errors import ModelError
from ..rules import PathWeights
from . import weights
from .bound import BoundModel, Layer, Norm, epsilon_of
from .capture import eager_with_patterns, of_this_thread, refuse_nested, running
from .health import refuse_dropout
from .trace import NORMS

Slope = Literal["secant", "tangent"]


@contextmanager
def linearised(bound: BoundModel, path_weights: PathWeights, slope: Slope = "secant") -> Iterator[list[LayerPaths]]:
    """Inside the ``with`` block this thread's passes compute what they always do; gradients flow as the weights say.

    Yields the paths of each layer.

    Gradients are on inside, also in a caller's ``torch.inference_mode()`` or ``torch.no_grad()``. Other threads' passes
    stay as they are. The parameters' ``requires_grad`` flags are left alone, because other threads may train the model
    meanwhile; take gradients with ``torch.autograd.grad``, which writes no ``.grad``.

    Args:
        bound: the model.
        path_weights: how much of the gradient each factor of a product carries.
        slope: what an activation passes on: ``secant`` is ``act(g) / g`` and ``tangent`` the derivative ``act'(g)``.

    Raises:
        ModelError: the model's gradients cannot be taken (see :func:`refuse`), or an attribution is already running in
            this thread.
    """
    refuse(bound)
    layers = [LayerPaths(bound, index, path_weights, slope) for index in range(len(bound.layers))]
    of_attention = {each.layer.attention: each for each in layers}

    def carried(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        paths = of_attention.get(module)
        return (query, key, value) if paths is None else paths.attention(query, key, value)

    with running, torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:  # threads take turns
        refuse_nested()
        stack.enter_context(eager_with_patterns(bound, carried))
        for norm in _norms(bound):
            stack.callback(norm.norm.module.register_forward_hook(norm.hook).remove)
        for each in layers:
            stack.callback(each.layer.gate.module.register_forward_hook(each.gate).remove)
            stack.callback(each.layer.down.module.register_forward_pre_hook(each.hidden).remove)
        yield layers


def refuse(bound: BoundModel) -> None:
    """Check that a model's gradients can be taken.

    Raises:
        ModelError: dropout or gradient checkpointing is at work; weights were made in inference mode, are quantised,
            offloaded or streamed; or a norm inside a layer has no epsilon.
    """
    refuse_dropout(bound)
    name = bound.name
    if any(parameter.is_inference() for parameter in bound.model.parameters()):
        raise ModelError(
            f"the weights of {name} were made in torch.inference_mode(), where autograd cannot use them; load the model "
            "outside of it"
        )
    for path, module in bound.model.named_modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise ModelError(
                f"{path or name} is in training mode with gradient checkpointing, which runs layers again on its own; "
                "call model.eval()"
            )
        if weights.is_offloaded(module):
            raise ModelError(
                f"the weights of {path} of {name} are offloaded, so they are gone when the backward pass needs them; load "
                "the model onto its devices"
            )
    if bound.is_quantized or weights.is_packed(bound.head):
        raise ModelError(
            f"{name} has quantised weights, which the backward pass of linear rules does not support; load the unquantised "
            "weights"
        )
    if bound.stream_to is not None:
        raise ModelError(
            f"the layers of {name} are streamed to {bound.stream_to}, so their weights are gone when the backward pass "
            "needs them; load the model onto its device"
        )
    _norms(bound)


class _Scaled(torch.autograd.Function):
    """A tensor, with ``weight`` times its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.weight, None


class _Normed(torch.autograd.Function):
    """A norm's own output, with the gradient of ``γ ⊙ x · r`` for a frozen ``r``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, own: tuple[Tensor], scale: Tensor, gamma: Tensor | None, is_centred: bool
    ) -> Tensor:
        ctx.save_for_backward(scale, gamma)
        ctx.dtype, ctx.is_centred = x.dtype, is_centred
        return own[0]  # in a tuple, so that it is no input and the output no view of one

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        scale, gamma = ctx.saved_tensors
        of_x = gradient.to(scale.dtype)
        of_x = of_x * scale if gamma is None else of_x * gamma * scale
        if ctx.is_centred:
            of_x = of_x - of_x.mean(-1, keepdim=True)
        return of_x.to(ctx.dtype), None, None, None, None


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


def _only(x: Tensor, weight: float) -> Tensor:
    """``x`` with ``weight`` times its gradient."""
    if weight == 0:
        return x.detach()
    if weight == 1 or not x.requires_grad:
        return x
    scaled: Tensor = _Scaled.apply(x, weight)  # type: ignore[no-untyped-call]
    return scaled


def _norms(bound: BoundModel) -> list[_FrozenNorm]:
    """The norms of all layers, those on queries and keys too, and the final norm, each module once.

    Raises:
        ModelError: a norm has no epsilon.
    """
    found, epsilon = [], bound.family.epsilon
    for index, layer in enumerate(bound.layers):
        # attention and MLP may read the stream through one norm
        declared = {id(norm.module): norm for name in NORMS if (norm := getattr(layer, name)) is not None}
        found += [_FrozenNorm(bound, norm) for norm in declared.values()]
        for path, module in layer.module.named_modules():
            if id(module) in declared or "norm" not in type(module).__name__.lower() or next(module.children(), None):
                continue
            if epsilon_of(module, epsilon) is None:
                raise ModelError(
                    f"{path} of layer {index} of {bound.name} ({type(module).__name__}) has no eps, which linear rules "
                    "need; declare it: depass.Family(epsilon=...)"
                )
            kind = "layer" if isinstance(module, nn.LayerNorm) else bound.final_norm.kind
            found.append(_FrozenNorm(bound, Norm(module, kind, epsilon), f"{path} of layer {index}"))
    return [*found, _FrozenNorm(bound, bound.final_norm)]


class _FrozenNorm:
    """A norm whose scale is frozen for gradients. One that no family declares is compared with its formula first."""

    def __init__(self, bound: BoundModel, norm: Norm, undeclared: str | None = None) -> None:
        self.bound, self.norm, self.undeclared = bound, norm, undeclared
        self.thread = threading.get_ident()

    @of_this_thread
    def hook(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """The norm's own output with the gradient of ``γ ⊙ x · r``."""
        if not torch.is_grad_enabled():
            return None
        x, dtype = args[0], self.bound.state_dtype
        with torch.no_grad():
            scale = self.norm.scale(x, dtype)[..., None]
            self._check(x, scale, output)
            gamma = self.norm.gamma(dtype)
        return _Normed.apply(x, (output.detach(),), scale, gamma, self.norm.is_centred)  # type: ignore[no-untyped-call, no-any-return]

    def _check(self, x: Tensor, scale: Tensor, output: Tensor) -> None:
        if self.undeclared is None:
            return
        gamma, beta = self.norm.gamma(), self.norm.beta()
        of_weight = 1 if gamma is None else gamma.dim()  # 2 where each head has a weight of its own
        first = (0,) * (x.dim() - of_weight)
        expected = self.norm.of_parts(x[first].to(scale), scale[first])
        expected = expected if beta is None else expected + beta.to(expected)
        missed, size = (expected - output[first].to(expected)).norm(), expected.norm()
        allowed = 5e-2 if output.dtype in (torch.float16, torch.bfloat16) else 1e-4
        if bool(missed > allowed * size):
            raise ModelError(
                f"{self.undeclared} of {self.bound.name} ({type(self.norm.module).__name__}) does not compute what a "
                f"{self.norm.kind} norm does (relative difference {float(missed / size):.1e}, limit {allowed:.0e}), so "
                "linear rules cannot freeze its scale"
            )
        self.undeclared = None


class LayerPaths:
    """How gradients flow through one layer's attention and MLP, in the model's latest call of the layer.

    Attributes:
        steering: the queries and keys, each ``[B, H, N, d]``, as far as the attention's pattern passes them a gradient.
        through_mlp: how much of the hidden vector's gradient the MLP's factors carry together.
    """

    def __init__(self, bound: BoundModel, index: int, path_weights: PathWeights, slope: Slope) -> None:
        self.bound, self.index, self.path_weights, self.slope = bound, index, path_weights, slope
        self.layer: Layer = bound.layers[index]
        self.thread = threading.get_ident()
        self.steering: list[Tensor] = []
        self.through_mlp = 1.0
        self.kept: Tensor | None = None  # the gate's output, which carries its path
        self.passed: Tensor | None = None  # the same, detached, from which the MLP makes its hidden vector
        self.source: Any = None  # where in autograd's graph the gate's input comes from

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values with the gradients that they carry."""
        w = self.path_weights
        self.steering = [x for x, weight in ((query, w.q), (key, w.k)) if weight != 0 and x.requires_grad]
        return _only(query, w.q), _only(key, w.k), _only(value, w.v)

    @of_this_thread
    def gate(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Keep the gate's output and pass it on detached, so that the hidden vector's own gradient is the up path's."""
        if not torch.is_grad_enabled() or not output.requires_grad:
            return None
        self.source = get_gradient_edge(args[0]).node if args[0].requires_grad else None
        self.kept, *up = (output,) if self.layer.gate.rows == "all" else output.chunk(2, -1)
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
                f"the gate of layer {self.index} of {self.bound.name} did not run before its down projection, as its "
                "depass.Family says it does; correct the family"
            )
        hidden, w = args[0], self.path_weights
        is_gated = _reaches(hidden, self.source, passed)
        of_gate, of_up = (w.gate, w.up) if is_gated else (1.0, 0.0)
        self.through_mlp = of_gate + of_up
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
            return weight * derivative.to(self.bound.state_dtype)
        with torch.no_grad():
            g = passed.to(self.bound.state_dtype)
            return torch.where(g == 0, 0, weight * hidden.to(g) / g)


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
