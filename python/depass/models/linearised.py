"""The linearised model: it computes what it always does, and its gradients flow as path weights say.

Each nonlinear place of a model is a product of factors. A rule says how much of the product's gradient each factor carries;
the other factors are frozen. Inside :func:`linearised` the model's outputs stay bit for bit those of eager attention (up to
rounding where it goes by blocks of queries, see :mod:`depass.models.query_blocks`), and

* a norm ``γ ⊙ x · r`` passes the gradient of ``x`` on, with ``r`` frozen (the centred ``x`` in a LayerNorm). This holds
  for the norms of layers, of queries and keys, on outputs, and for the final one;
* attention passes on ``v`` of the gradient of its values, ``q`` of its queries' and ``k`` of its keys';
* a gated MLP ``act(g) ⊙ u`` passes ``gate`` of the gradient through ``g`` with ``act(g) ⊙ u / g`` frozen (0 where ``g`` is
  0), and ``up`` of it through ``u`` with ``act(g)`` frozen. An ungated MLP passes all of it through ``act(z) / z · z``.
  These are secants of the activation; its tangent, the derivative, can take their place;
* an expert that a position chose is such an MLP. Which experts it chose and the router's weights are frozen, and so are
  the sigmoids that multiply what the heads mix or the output of the MLP beside the experts.

:mod:`depass.models.layer_paths` has the paths through attention and MLPs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..rules import PathWeights
from . import weights
from .attention import eager_with_patterns, refuse_nested, running
from .bound import BoundModel, Norm, epsilon_of
from .capture import of_this_thread
from .health import refuse_dropout
from .layer_paths import LayerPaths, Slope
from .trace import NORMS


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
    _refuse_steering(bound, path_weights)
    layers = [LayerPaths(bound, index, path_weights, slope) for index in range(len(bound.layers))]
    of_attention = {mixer.module: each for each in layers for mixer in each.layer.mixers}

    def carried(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        paths = of_attention.get(module)
        return (query, key, value) if paths is None else paths.attention(query, key, value)

    with running, torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:  # threads take turns
        refuse_nested()
        stack.enter_context(eager_with_patterns(bound, carried))
        for norm in _norms(bound):
            stack.callback(norm.norm.module.register_forward_hook(norm.hook).remove)
        for each in layers:
            each.hook(stack)
        yield layers


def _refuse_steering(bound: BoundModel, path_weights: PathWeights) -> None:
    """Raise a ModelError where weights lead to what steers a recurrence."""
    layers = [index for index, layer in enumerate(bound.layers) if layer.recurrence is not None]
    if layers and (path_weights.steers or path_weights.v != 1):
        raise ModelError(
            f"layer {layers[0]} of {bound.name} has linear attention, for which the rules steer, dual_path and weights of "
            "queries, keys and values are not defined: more than queries and keys steers it; take rule='half', 'up' or "
            "'taylor'"
        )


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


def _norms(bound: BoundModel) -> list[_FrozenNorm]:
    """The norms of all layers, those on queries and keys too, and the final norm, each module once.

    Raises:
        ModelError: a norm has no epsilon.
    """
    found, epsilon = [], bound.family.epsilon
    for index, layer in enumerate(bound.layers):
        # attention and MLP may read the stream through one norm
        norms = [getattr(layer, name) for name in NORMS]
        norms += [norm for mixer in layer.mixers for norm in (mixer.latent_norm, mixer.mix_norm)]
        declared = {id(norm.module): norm for norm in norms if norm is not None}
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
