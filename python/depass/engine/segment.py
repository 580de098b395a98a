"""One layer of a backward pass, on an autograd graph of its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..errors import ModelError
from ..models.alterations import alterations, said_of, within
from ..models.bound import Mixer
from ..models.capture import of_this_thread
from ..models.layer_paths import ExpertsCall, LayerPaths
from ..models.weights import dense

if TYPE_CHECKING:
    from .backward import Backward


class Found(NamedTuple):
    """Gradients of ``t`` targets, each ``[t, ...]`` of the tensor that it belongs to."""

    leaf: Tensor
    mixed: list[Tensor]
    hidden: Tensor | None
    routed: Tensor | None
    steering: list[Tensor]
    middle: Tensor | None
    biased: list[Tensor | None]
    late: Tensor | None
    taken: list[Tensor]


class Biased(NamedTuple):
    """A place where a layer adds a bias.

    Attributes:
        path: its name in the layer.
        output: the output that it adds to.
        bias: the bias, of the output's last dimension or of all of them; None where its score cannot be measured, because
            the output is no tensor of its width.
        axis: of an output with heads, the axis of its positions.
        at_places: whether the output has a row for each place of the experts.
    """

    path: str
    output: GradientEdge
    bias: Tensor | None
    axis: int | None = None
    at_places: bool = False


class Segment:
    """One layer on an autograd graph of its own, cut at its input, and the places where gradients are read.

    Attributes:
        leaf: the residual stream at the layer's input, in the model's shape.
        output: the residual stream at its output.
        mixed: the inputs of the mixers' output projections.
        hidden: the input of the MLP's down projection, None in a layer that has none beside experts, or a mixer alone.
        routed: the call of the experts, None in a layer without.
        biased: the places where the layer adds biases, in the order of its calls.
        early: how many of them come before the middle of the layer.
        late: the residual stream that the branch behind the MLP reads, None in a layer without.
        before_late: how many of the biases come before it.
    """

    leaf: Tensor
    output: Tensor
    mixed: list[Tensor]
    hidden: Tensor | None = None
    routed: ExpertsCall | None = None
    late: Tensor | None = None

    def __init__(self, run: Backward, index: int, flow: LayerPaths) -> None:
        self.run, self.index, self.modules, self.flow = run, index, run.bound.layers[index], flow
        self.thread = threading.get_ident()
        self.has_graph = not run.recompute  # of the model's next call of the layer
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.middle: tuple[GradientEdge, float] | None = None  # with what multiplies that output before it is added
        self.biased: list[Biased] = []
        self.early, self.before_late = 0, 0
        flow.cuts = True
        self.ran: set[nn.Module] = set()
        self.paths = {module: path for path, module in self.modules.module.named_modules()}

    def hook(self, stack: ExitStack) -> None:
        """Register the hooks, after those of the linearised model; they are removed when the stack closes."""
        modules = self.modules
        hooks = [modules.module.register_forward_pre_hook(self.begin, with_kwargs=True)]
        for number, mixer in enumerate(modules.mixers):
            hooks.append(mixer.output.module.register_forward_pre_hook(partial(self.at_mixed, number)))
        if modules.mlp is not None:
            hooks.append(modules.mlp.down.module.register_forward_pre_hook(self.at_hidden))
        if modules.late is not None:
            hooks.append(modules.late.gate.module.register_forward_pre_hook(self.at_late))
        if modules.experts is not None:
            hooks.append(modules.experts.module.register_forward_hook(self.at_experts))
        detached = self.flow.prepended
        for module in self.paths:
            if isinstance(getattr(module, "bias", None), Tensor):
                # the linearised model detaches the gate's output, and gives a norm's output another gradient
                hooks.append(module.register_forward_hook(self.at_bias, prepend=module in detached))
        if not self.run.bound.parallel:
            norm = modules.attention_post_norm
            for output in (mixer.output for mixer in modules.mixers):
                written = output.module if norm is None else norm.module
                hooks.append(written.register_forward_hook(partial(self.at_middle, output.factor)))
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
        self.mixed = [x.new_empty(0) for _ in self.modules.mixers]
        torch.set_grad_enabled(self.has_graph)
        return args, kwargs

    @of_this_thread
    def at_mixed(self, number: int, module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        """Keep the input of a mixer's output projection."""
        self.ran.add(module)
        if not torch.is_grad_enabled():
            return None
        self._keep_biases_of_recurrence(self.modules.mixers[number])
        self.mixed[number] = _in_graph(args[0])
        return (self.mixed[number], *args[1:])

    def _keep_biases_of_recurrence(self, mixer: Mixer) -> None:
        """Keep the places where a recurrence adds the biases of its values and of their convolution."""
        recurrence, flow = mixer.recurrence, self.flow.recurrence
        if recurrence is None or flow is None:
            return
        if flow.call is None:
            self._must_carry(None)
            return
        path, of_values, of_taps = self.paths[recurrence.module], mixer.value.bias, recurrence.taps_bias()
        if of_values is not None:
            self.biased.append(Biased(f"{path}.values", get_gradient_edge(flow.call.values), of_values.detach()))
        if of_taps is not None:
            self.biased.append(Biased(f"{path}.conv1d", get_gradient_edge(flow.call.convolved), of_taps.detach()))

    @of_this_thread
    def at_hidden(self, module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        """Keep the input of the down projection."""
        self.ran.add(module)
        if not torch.is_grad_enabled():
            return None
        self.hidden = _in_graph(args[0])
        return (self.hidden, *args[1:])

    @of_this_thread
    def at_late(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep the stream that the branch behind the MLP reads."""
        self.ran.add(module)
        if torch.is_grad_enabled():
            self._must_carry(args[0])
            self.late, self.before_late = args[0], len(self.biased)

    @of_this_thread
    def at_experts(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep the experts' hidden vectors, and the places where they add their biases."""
        self.ran.add(module)
        if not torch.is_grad_enabled():
            return
        assert self.flow.experts is not None
        call = self.flow.experts.call
        if call is None:
            self._must_carry(None)
            return
        path, places, tensors = self.paths[module], call.places, call.weights.tensors
        self.routed = call
        if call.constant is not None:
            # what the up's path leaves out, as the 1 of gpt_oss's up + 1
            edge = get_gradient_edge(call.hidden)
            self.biased.append(Biased(f"{path}.constant", edge, call.constant, at_places=True))
        if call.weights.experts.has_bias:
            first = f"{call.weights.experts.first}_bias"
            of_first, of_down = tensors[first][places.expert], tensors["down_proj_bias"][places.expert]
            self.biased.append(Biased(f"{path}.{first}", call.first, of_first, at_places=True))
            weighted = of_down.to(self.run.bound.state_dtype) * places.weight[:, None].to(self.run.bound.state_dtype)
            bias = weighted.new_zeros(call.output.shape).index_add_(0, places.position, weighted)
            self.biased.append(Biased(f"{path}.down_proj_bias", get_gradient_edge(call.output), bias))

    @of_this_thread
    def at_bias(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep the place where a module adds its bias."""
        if not torch.is_grad_enabled():
            return
        path, bias = self.paths[module], dense(module, "bias")
        if not isinstance(output, Tensor):  # a router's, through which no gradient goes
            tensors = [each for each in output if isinstance(each, Tensor) and each.requires_grad]
            self.biased += [Biased(path, get_gradient_edge(each), None) for each in tensors]
            return
        self._must_carry(output)
        fits = bias is not None and output.shape[-1:] == bias.shape
        axis = _axis_of_positions(args[0], self.leaf.shape[1]) if fits and output.dim() == 4 else None
        is_measured = fits and (output.dim() != 4 or axis is not None)
        self.biased.append(
            Biased(path, get_gradient_edge(output), None if bias is None or not is_measured else bias.detach(), axis)
        )

    def measured(self, found: Found) -> list[tuple[Biased, Tensor]]:
        """The biases that a gradient reaches, with those of their outputs ``[t, ...]``.

        No path leads to the biases of a router, nor to those of queries where the pattern is frozen.

        Raises:
            ModelError: a module has a bias, and its output is not a tensor of that width.
        """
        reached = [(biased, of) for biased, of in zip(self.biased, found.biased, strict=True) if of is not None]
        for biased, _ in reached:
            if biased.bias is None:
                raise ModelError(
                    f"{biased.path} of layer {self.index} of {self.run.bound.name} has a bias, but its output is not a "
                    "tensor of that width, so the bias's score cannot be measured"
                )
        return reached

    @of_this_thread
    def at_middle(self, factor: float, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Keep the place where the attention, ``factor`` times, adds to the stream; of several mixers, the last's."""
        if torch.is_grad_enabled():
            self._must_carry(output)
            self.middle, self.early = (get_gradient_edge(output), factor), len(self.biased)

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
        layer = self.modules
        parts = [("output projection", mixer.output.module) for mixer in layer.mixers]
        parts += [] if layer.mlp is None else [("down projection", layer.mlp.down.module)]
        parts += [] if layer.experts is None else [("experts", layer.experts.module)]
        parts += [] if layer.late is None else [("branch behind the MLP", layer.late.gate.module)]
        for part, module in parts:
            if module not in self.ran:
                raise ModelError(
                    f"{self.run.bound.name} did not run the {part} of layer {self.index}, which DePass needs; correct the "
                    "model's depass.Family"
                )

    def drop(self) -> None:
        """Free the layer's tensors; its hooks hold the segment until the pass ends."""
        for name in ("leaf", "output", "mixed", "hidden", "routed", "late"):
            self.__dict__.pop(name, None)
        if self.flow.experts is not None:
            self.flow.experts.call = None
        if self.flow.recurrence is not None:
            self.flow.recurrence.call = None
        self.call, self.middle = None, None
        self.biased.clear()
        self.flow.steering, self.flow.lent, self.flow.taken = [], [], []

    def run_again(self) -> None:
        """Run the layer again from its stored input, now with a graph."""
        assert self.call is not None
        args, kwargs = self.call
        self.has_graph = True
        self.modules.module(*args, **kwargs)

    def go_back(self, gradient: Tensor, is_last: bool, of_lent: Sequence[Tensor] = ()) -> Found:
        """The gradients for those of the layer's output, ``[t, ...]``; the graph is freed after the last.

        ``of_lent`` are the gradients ``[t, ...]`` of the keys and values that later layers took.
        """
        self._must_carry(self.output)
        own = [self.hidden, None if self.routed is None else self.routed.hidden, self.late]
        tensors = [self.leaf, *self.mixed, *(each for each in own if each is not None)]
        steering, edges, taken = self.flow.steering, [each.output for each in self.biased], self.flow.taken
        inputs = [*tensors, *steering, *edges, *taken, *(() if self.middle is None else (self.middle[0],))]
        outputs = [self.output, *(self.flow.lent if len(of_lent) else ())]
        given, is_batch = [gradient, *of_lent], len(gradient) > 1
        given = [each.to(output.dtype) for each, output in zip(given, outputs, strict=True)]
        found: Sequence[Any] = torch.autograd.grad(
            outputs, inputs, given if is_batch else [each[0] for each in given], retain_graph=not is_last,
            allow_unused=True, is_grads_batched=is_batch,
        )  # fmt: skip
        if any(each is None for each in found[: len(tensors)]):
            self._must_carry(None)
        remaining = iter(found if is_batch else [None if each is None else each[None] for each in found])
        leaf, mixed = next(remaining), [next(remaining) for _ in self.mixed]
        hidden, routed, late = (None if each is None else next(remaining) for each in own)
        of_steering, of_edges, of_taken = ([next(remaining) for _ in some] for some in (steering, edges, taken))
        # a key has no gradient where the pattern is frozen
        of_taken = [x.new_zeros(len(gradient), *x.shape) if of is None else of
                    for x, of in zip(taken, of_taken, strict=True)]  # fmt: skip
        # the gradient of what the attention adds to the stream is its output's by the factor between them
        middle = None if self.middle is None else next(remaining) / self.middle[1]
        return Found(leaf, mixed, hidden, routed, of_steering, middle, of_edges, late, of_taken)


def _axis_of_positions(x: Tensor, count: int) -> int | None:
    """Whether ``[B, N, H, d]`` or ``[B, H, N, d]`` is the form of a tensor with ``count`` positions: 1 or 2; or None.

    It is a view of a projection's output, where positions are further apart than heads.
    """
    fitting = [axis for axis in (1, 2) if x.shape[axis] == count]
    return max(fitting, key=x.stride, default=None)


def _in_graph(x: Tensor) -> Tensor:
    """``x``, or a leaf in its place where no path leads to it."""
    return x if x.requires_grad else x.detach().requires_grad_()
