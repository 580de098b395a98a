"""One layer of a backward pass, on an autograd graph of its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..errors import ModelError
from ..models.alterations import alterations, said_of, within
from ..models.capture import of_this_thread
from ..models.linearised import LayerPaths
from ..models.weights import dense

if TYPE_CHECKING:
    from .backward import Backward


class Found(NamedTuple):
    """Gradients of ``t`` targets, each ``[t, ...]`` of the tensor that it belongs to."""

    leaf: Tensor
    mixed: Tensor
    hidden: Tensor
    steering: list[Tensor]
    middle: Tensor | None
    biased: list[Tensor | None]


class Segment:
    """One layer on an autograd graph of its own, cut at its input, and the places where gradients are read.

    Attributes:
        leaf: the residual stream at the layer's input, in the model's shape.
        output: the residual stream at its output.
        mixed, hidden: the inputs of the attention's output projection and of the down projection.
        biased: the layer's modules with a bias in the order of their calls: the path, the output's edge, the bias and, of
            an output with heads, the axis of its positions.
        early: how many of them come before the middle of the layer.
    """

    leaf: Tensor
    output: Tensor
    mixed: Tensor
    hidden: Tensor

    def __init__(self, run: Backward, index: int, flow: LayerPaths) -> None:
        self.run, self.index, self.modules, self.flow = run, index, run.bound.layers[index], flow
        self.thread = threading.get_ident()
        self.has_graph = not run.recompute  # of the model's next call of the layer
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.middle: GradientEdge | None = None
        self.biased: list[tuple[str, GradientEdge, Tensor, int | None]] = []
        self.early = 0
        self.ran: set[str] = set()
        self.paths = {module: path for path, module in self.modules.module.named_modules()}

    def hook(self, stack: ExitStack) -> None:
        """Register the hooks, after those of the linearised model; they are removed when the stack closes."""
        modules = self.modules
        hooks = [
            modules.module.register_forward_pre_hook(self.begin, with_kwargs=True),
            modules.output.module.register_forward_pre_hook(self.at_mixed),
            modules.down.module.register_forward_pre_hook(self.at_hidden),
        ]
        for module in self.paths:
            if isinstance(getattr(module, "bias", None), Tensor):
                # the linearised model detaches the gate's output, and gives a norm's output another gradient
                hooks.append(module.register_forward_hook(self.at_bias, prepend=module is modules.gate.module))
        if not self.run.bound.parallel:
            norm = modules.attention_post_norm
            written = modules.output.module if norm is None else norm.module
            hooks.append(written.register_forward_hook(self.at_middle))
        hooks.append(modules.module.register_forward_hook(self.end))
        for hook in hooks:
            stack.callback(hook.remove)

    @of_this_thread
    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cut the graph at the layer's input."""
        if self.run.reading is not None:
            raise ModelError(
                f"a callback ran {self.run.bound.name} while gradients of layer {self.run.reading} were read; run the model "
                "after the attribution"
            )
        x = (args[0] if args else kwargs["hidden_states"]).detach().to(self.modules.device)
        self.leaf = x.requires_grad_() if self.has_graph else x
        args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
        self.call = (args, kwargs) if self.run.recompute else None
        torch.set_grad_enabled(self.has_graph)
        return args, kwargs

    @of_this_thread
    def at_mixed(self, _: nn.Module, args: tuple[Tensor, ...]) -> Any:
        """Keep the input of the attention's output projection."""
        self.ran.add("output projection")
        if not torch.is_grad_enabled():
            return None
        self.mixed = _in_graph(args[0])
        return (self.mixed, *args[1:])

    @of_this_thread
    def at_hidden(self, _: nn.Module, args: tuple[Tensor, ...]) -> Any:
        """Keep the input of the down projection."""
        self.ran.add("down projection")
        if not torch.is_grad_enabled():
            return None
        self.hidden = _in_graph(args[0])
        return (self.hidden, *args[1:])

    @of_this_thread
    def at_bias(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep the place where a module adds its bias."""
        if not torch.is_grad_enabled():
            return
        bias = dense(module, "bias")
        self._must_carry(output)
        fits = isinstance(output, Tensor) and bias is not None and output.shape[-1:] == bias.shape
        axis = _axis_of_positions(args[0], self.leaf.shape[1]) if fits and output.dim() == 4 else None
        if not fits or bias is None or (output.dim() == 4 and axis is None):
            raise ModelError(
                f"{self.paths[module]} of layer {self.index} of {self.run.bound.name} has a bias, but its output is not a "
                "tensor of that width, so the bias's score cannot be measured"
            )
        self.biased.append((self.paths[module], get_gradient_edge(output), bias.detach(), axis))

    @of_this_thread
    def at_middle(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Keep the place where the attention adds to the stream."""
        if torch.is_grad_enabled():
            self._must_carry(output)
            self.middle, self.early = get_gradient_edge(output), len(self.biased)

    @of_this_thread
    def end(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep the stream at the layer's output."""
        self.output = output[0] if isinstance(output, tuple) else output
        torch.set_grad_enabled(False)

    def _must_carry(self, output: Any) -> None:
        """Raise a ModelError where a gradient ends: a hook returned a tensor of its own."""
        if isinstance(output, Tensor) and output.requires_grad:
            return
        bound = self.run.bound
        found = within(alterations(bound), bound, self.modules.module)
        why = f": {said_of(found)}" if found else ""
        raise ModelError(
            f"layer {self.index} of {bound.name} passes no gradient on, which linear rules need{why}; remove what replaces "
            "its outputs, or take another rule"
        )

    def must_have_run(self) -> None:
        """Raise a ModelError where a part of the layer did not run."""
        for part in ("output projection", "down projection"):
            if part not in self.ran:
                raise ModelError(
                    f"{self.run.bound.name} did not run the {part} of layer {self.index}, which DePass needs; correct the "
                    "model's depass.Family"
                )

    def drop(self) -> None:
        """Free the layer's tensors; its hooks hold the segment until the pass ends."""
        for name in ("leaf", "output", "mixed", "hidden"):
            self.__dict__.pop(name, None)
        self.call, self.middle = None, None
        self.biased.clear()
        self.flow.steering.clear()

    def run_again(self) -> None:
        """Run the layer again from its stored input, now with a graph."""
        assert self.call is not None
        args, kwargs = self.call
        self.has_graph = True
        self.modules.module(*args, **kwargs)

    def go_back(self, gradient: Tensor, is_last: bool) -> Found:
        """The gradients for those of the layer's output, ``[t, ...]``; the graph is freed after the last."""
        self._must_carry(self.output)
        inputs: list[Tensor | GradientEdge] = [self.leaf, self.mixed, self.hidden, *self.flow.steering]
        first = len(inputs)
        inputs += [edge for _, edge, *_ in self.biased]
        inputs += [] if self.middle is None else [self.middle]
        gradient, is_batch = gradient.to(self.output.dtype), len(gradient) > 1
        found: Sequence[Any] = torch.autograd.grad(
            self.output, inputs, gradient if is_batch else gradient[0], retain_graph=not is_last, allow_unused=True,  # type: ignore[arg-type]
            is_grads_batched=is_batch,
        )  # fmt: skip
        if found[0] is None or found[1] is None or found[2] is None:
            self._must_carry(None)
        if not is_batch:
            found = [None if each is None else each[None] for each in found]
        end = first + len(self.biased)
        # the gradient of what the attention adds to the stream is its output's by the factor between them
        middle = None if self.middle is None else found[end] / self.modules.output.factor
        return Found(found[0], found[1], found[2], list(found[3:first]), middle, list(found[first:end]))


def _axis_of_positions(x: Tensor, count: int) -> int | None:
    """Whether ``[B, N, H, d]`` or ``[B, H, N, d]`` is the form of a tensor with ``count`` positions: 1 or 2; or None.

    It is a view of a projection's output, where positions are further apart than heads.
    """
    fitting = [axis for axis in (1, 2) if x.shape[axis] == count]
    return max(fitting, key=x.stride, default=None)


def _in_graph(x: Tensor) -> Tensor:
    """``x``, or a leaf in its place where no path leads to it."""
    return x if x.requires_grad else x.detach().requires_grad_()
