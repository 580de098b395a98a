"""Linear rules: every part of a model scored by one backward pass, for every target at once.

Where a rule is linear in the residual stream, the score of any part ``x`` of the stream at the input of layer ``l`` is
``G[l] · x``, with one gradient ``G[l]`` for all parts. The pass runs the linearised model, cut at the input of each layer,
and then goes back from the targets, one layer at a time. A layer's gradients are handed on and dropped, so memory does not
grow with layers times neurons.

The scores of all tokens at the input of any layer, plus the biases behind it, add up to the logit (if the rule adds up).
Every score is a gradient times a value; none is taken as what is left of the logit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..errors import ModelError
from ..inputs.targets import Asked, Readout, Target
from ..models import capture
from ..models.alterations import alterations, said_of, within
from ..models.bound import BoundModel, Layer
from ..models.capture import Capture, of_this_thread
from ..models.linearised import PathWeights, linearised, refuse
from ..models.packing import Packing
from ..models.positions import fresh
from ..models.trace import Trace
from ..models.weights import dense
from .passes import without_autocast
from .scores import readouts_of

BATCH_NUMBERS = 1 << 24  # numbers in the gradients of one layer that are computed at a time, for several targets
Parts = Literal["heads", "attn", "neurons", "mlp"]


@dataclass(frozen=True)
class StreamGradient:
    """The residual stream between two layers, and its gradients for ``T`` of the targets.

    Targets are numbered within their prompt: target ``j`` stands for the ``j``-th of each of the ``B`` prompts. Positions
    ``P`` are those of all prompts, one prompt after another. Scores have the state's dtype.

    Attributes:
        layer: the layer whose input it is; the number of layers stands for the output of the last.
        targets: the numbers of the ``T`` targets.
        x: ``[P, D]``, the stream in the model's dtype.
        gradient: ``[T, P, D]``, its gradients. Any part of the stream scores the product with them.
        behind: ``[T, B]``, the scores of all biases behind it, those of the final norm and the head included.
    """

    layer: int
    targets: list[int]
    x: Tensor
    gradient: Tensor
    behind: Tensor

    def scores(self) -> Tensor:
        """The scores of the whole stream by position, ``[T, P]``."""
        return _dot(self.gradient, self.x, self.behind.dtype)


@dataclass(frozen=True)
class LayerGradients:
    """What a backward pass finds in one layer, for ``T`` of the targets; it may be read only during the call.

    Attributes:
        bound: the model.
        layer: the layer.
        lengths: the prompts' numbers of tokens.
        before, after: the stream at the layer's input and at its output.
        middle: ``[T, P, D]``, the gradient of the stream between attention and MLP; None where they are parallel.
        mixed, of_mixed: the input of the attention's output projection ``[P, H·d]``, and its gradients ``[T, P, H·d]``.
        hidden, of_hidden: the input of the down projection ``[P, F]``, and its gradients ``[T, P, F]``.
        biases: the scores ``[T, P]`` of the layer's biases, by the path of their module in the layer.
        late_biases: the paths of those that the layer adds behind its middle.
    """

    bound: BoundModel
    layer: int
    lengths: list[int]
    before: StreamGradient
    after: StreamGradient
    middle: Tensor | None
    mixed: Tensor
    of_mixed: Tensor
    hidden: Tensor
    of_hidden: Tensor
    biases: dict[str, Tensor]
    late_biases: frozenset[str]

    @property
    def targets(self) -> list[int]:
        """The numbers of the ``T`` targets."""
        return self.after.targets

    def of_prompts(self, scores: Tensor) -> Tensor:
        """Scores ``[T, P, ...]`` summed over each prompt's positions, ``[T, B, ...]``."""
        return _of_prompts(scores, self.lengths)

    def heads(self) -> Tensor:
        """The scores of the heads' outputs by position, ``[T, P, H]``."""
        of_mixed, mixed, heads = self.of_mixed, self.mixed, self.bound.num_heads
        by_head = mixed.reshape(len(mixed), heads, -1)
        return _dot(of_mixed.reshape(len(of_mixed), *by_head.shape), by_head, self._dtype)

    def neurons(self, positions: Tensor | None = None) -> Tensor:
        """The scores of the neurons' outputs, summed over each prompt's positions, ``[T, B, F]``.

        Args:
            positions: ``[P]`` bool, true where an output counts; by default everywhere.
        """
        hidden = self.hidden.to(self._dtype)
        hidden = hidden if positions is None else hidden * positions[:, None].to(hidden)
        of_hidden = torch.split(self.of_hidden.to(self._dtype), self.lengths, 1)
        pairs = zip(of_hidden, torch.split(hidden, self.lengths), strict=True)
        return torch.stack([torch.einsum("tpf,pf->tf", gradient, own) for gradient, own in pairs], 1)

    def attention(self) -> Tensor:
        """The scores of the attention's output by position ``[T, P]``, its output bias included."""
        return _dot(self.of_mixed, self.mixed, self._dtype) + self._bias_of(self._modules.output.module)

    def mlp(self) -> Tensor:
        """The scores of the MLP's output by position ``[T, P]``, its output bias included."""
        return _dot(self.of_hidden, self.hidden, self._dtype) + self._bias_of(self._modules.down.module)

    def rest(self, parts: Parts) -> Tensor:
        """The scores of the remainder by position ``[T, P]``, where the stream is split into ``parts`` and the remainder.

        ``heads`` and ``attn`` split it where the attention adds to it, which leaves the layer's input as the remainder. In
        parallel layers, and for ``neurons`` and ``mlp``, it is split after the layer.
        """
        if parts in ("heads", "attn"):
            return self.after.scores() - self.attention() if self.middle is None else self._rest_of_middle(self.middle)
        own = self.mlp() if parts == "mlp" else _dot(self.of_hidden, self.hidden, self._dtype)
        return self.after.scores() - own

    def bias(self, parts: Parts) -> Tensor:
        """The scores of the bias source ``[T, B]``, where the stream is split into ``parts``.

        It holds the biases behind the split; for ``heads`` also the attention's output bias, which belongs to no head.
        """
        own = self.after.behind
        if parts in ("heads", "attn") and self.middle is not None:
            own = own + self._sum_of(self.late_biases)
        if parts == "heads":
            own = own + self.of_prompts(self._bias_of(self._modules.output.module))
        return own

    def _rest_of_middle(self, middle: Tensor) -> Tensor:
        return _dot(middle, self.before.x, self._dtype)

    def _sum_of(self, paths: Iterable[str]) -> Tensor:
        zero = torch.zeros_like(self.after.behind)
        return sum((self.of_prompts(self.biases[path]) for path in paths), zero)

    @property
    def _modules(self) -> Layer:
        return self.bound.layers[self.layer]

    @property
    def _dtype(self) -> torch.dtype:
        return self.bound.state_dtype

    def _bias_of(self, module: nn.Module) -> Tensor:
        """The scores ``[T, P]`` of one module's bias, zero if it has none."""
        path = next(path for path, each in self._modules.module.named_modules() if each is module)
        zero = torch.zeros(self.of_mixed.shape[:2], dtype=self._dtype, device=self.of_mixed.device)
        return self.biases.get(path, zero)


def _of_prompts(scores: Tensor, lengths: list[int]) -> Tensor:
    return torch.stack([of_prompt.sum(1) for of_prompt in torch.split(scores, lengths, 1)], 1)


def _dot(gradient: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[T, ...]`` of gradients ``[T, ..., n]`` and values ``[..., n]``."""
    return torch.einsum("t...n,...n->t...", gradient.to(dtype), x.to(dtype))


class _Seed(NamedTuple):
    """Where a target starts the backward pass: a gradient of one position of the stream."""

    target: int
    prompt: int
    position: int
    layer: int  # at whose input; the number after the last layer gone through stands for its output
    gradient: Tensor  # [D], in the state's dtype
    constant: float  # the biases behind that stream


class Backward:
    """One pass of the linearised model over prompts, and back from their targets.

    A subclass reads scores in :meth:`stream` and :meth:`layer`. Prompts of different lengths lie in one row, as in
    :class:`depass.models.capture.Capture`. The ``j``-th targets of all prompts go back together, because prompts do not
    interact. A probe of an inner layer goes back from that layer.

    Args:
        bound: the model.
        prompts: the token ids of ``B`` prompts.
        asked: the checked targets of each prompt, at least one.
        path_weights: how gradients flow.
        start, stop: the layers ``start .. stop - 1`` are gone through, by default all. The stream after the last of them
            is read through the final norm and the head.
        recompute: whether each layer is run again from its stored input on the way back, instead of keeping activations.
        at_once: how many targets of a prompt go back together; by default as many as :data:`BATCH_NUMBERS` allows.
        tokenizer: the tokenizer for the targets' labels; may be None.

    Attributes:
        readouts: after :meth:`run`, the targets of each prompt with the model's own logits; a ``TopK`` gives ``k`` of them.
        altered: by prompt, what makes the model compute something else than its weights say.
    """

    readouts: list[list[Readout]]

    def __init__(
        self,
        bound: BoundModel,
        prompts: Sequence[Sequence[int]],
        asked: Sequence[Sequence[Asked]],
        path_weights: PathWeights,
        start: int = 0,
        stop: int | None = None,
        recompute: bool = False,
        at_once: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.bound, self.prompts, self.asked, self.path_weights = bound, prompts, asked, path_weights
        self.start, self.stop = start, len(bound.layers) if stop is None else stop
        self.recompute, self.at_once, self.tokenizer = recompute, at_once, tokenizer
        with torch.inference_mode(False):  # autograd keeps its indices
            self.packing = Packing(prompts, bound.takes_positions)
        self.lengths = self.packing.lengths
        self.altered: dict[int, str] = {}
        self.reading: int | None = None  # the layer whose gradients are being read

    def stream(self, gradient: StreamGradient) -> None:
        """Called for the stream at the output of the last layer, and then at the input of each, from the last to the first.

        Targets whose probe lies before it are left out.
        """

    def layer(self, gradients: LayerGradients) -> None:
        """Called for each layer from the last to the first, once for each group of targets that went back together.

        Targets whose probe lies before the layer's output are left out.
        """

    def passed(self, layer: int) -> None:
        """Called after each layer, from the last to the first."""

    def run(self) -> None:
        """Run the pass.

        Raises:
            ModelError: the model cannot be linearised (see :func:`depass.models.linearised.refuse`), a layer does not
                compute what its family says, or an attribution is already running in this thread.
        """
        bound = self.bound
        refuse(bound)
        with capture.running, ExitStack() as stack:
            self._check()
            stack.enter_context(linearised(bound, self.path_weights))
            stack.enter_context(torch.no_grad())  # segments switch their layers' graphs on
            stack.enter_context(capture.in_one_row(self.packing))
            stack.enter_context(fresh(bound.backbone, bound.switches))
            segments = [_Segment(self, index) for index in range(self.start, self.stop)]
            for segment in segments:
                segment.hook(stack)
            inputs = self.packing.inputs(bound.input_device)
            output = bound.backbone(**inputs, use_cache=False, return_dict=True).last_hidden_state
            for segment in segments:
                segment.must_have_run()
            with without_autocast(bound.device):
                seeds = self._seeds(segments, output)
            self._go_back(segments, seeds)

    def _check(self) -> None:
        """Compare layers with the family, at their first run; those of a model with hooks, at every run."""
        layers, altered = range(self.start, self.stop), bool(alterations(self.bound))
        if altered or not self.bound.checked.issuperset(layers):
            check = _Check(self.bound, self.prompts if altered else self.prompts[:1], layers)
            with torch.no_grad():
                check.run()
            self.altered = check.altered

    def _seeds(self, segments: Sequence[_Segment], output: Tensor) -> list[_Seed]:
        """Where the targets start; sets :attr:`readouts`."""
        bound, flat = self.bound, self.packing.flat
        last = flat(segments[-1].output.detach())
        if self.stop == len(bound.layers):
            normed = flat(output)
        else:
            normed = bound.final_norm.module(last[None].to(bound.final_device))[0]
        begins = [sum(self.lengths[:b]) for b in range(len(self.lengths))]
        filled = readouts_of(self.asked, normed, begins, bound, self.tokenizer)
        self.readouts, seeds = [], []
        for b, (of_prompt, begin) in enumerate(zip(self.asked, begins, strict=True)):
            self.readouts.append([])
            for asked, of_target in zip(of_prompt, filled[b], strict=True):
                at = begin + asked.position
                for readout in of_target or [self._probe(asked, segments, at)]:
                    seeds.append(self._seed(readout, b, last[at]))
                    self.readouts[-1].append(readout)
        return seeds

    def _probe(self, asked: Asked, segments: Sequence[_Segment], at: int) -> Readout:
        assert asked.w is not None
        assert asked.layer is not None
        index = asked.layer - self.start
        x = segments[index].leaf if index < len(segments) else segments[-1].output
        x = self.packing.flat(x.detach())[at].to(self.bound.state_dtype)
        w = asked.w.to(x)
        target = Target(asked.label, asked.kind, asked.position, layer=asked.layer, intercept=asked.intercept)
        return Readout(target, w, 0.0, float(w @ x))

    def _seed(self, readout: Readout, prompt: int, x: Tensor) -> _Seed:
        """The start of a target, for the stream ``x`` ``[D]`` that the final norm reads at its position."""
        number, position, layer = len(self.readouts[-1]), readout.target.position, readout.target.layer
        if layer is not None:
            return _Seed(number, prompt, position, layer, readout.w, 0.0)
        norm = self.bound.final_norm
        w = readout.w.to(self.bound.final_device)
        gradient = norm.fold(w[None])[0] * norm.scale(x.to(w.device), w.dtype)
        beta = norm.beta()
        constant = readout.constant + (0.0 if beta is None else float(w @ beta.to(w)))
        return _Seed(number, prompt, position, self.stop, gradient.detach(), constant)

    def _go_back(self, segments: list[_Segment], seeds: Sequence[_Seed]) -> None:
        last, count = segments[-1].output, max(len(of_prompt) for of_prompt in self.readouts)
        dtype = self.bound.state_dtype
        gradient = torch.zeros(count, *last.shape, dtype=dtype, device=last.device)
        behind = torch.zeros(count, len(self.lengths), dtype=dtype, device=last.device)
        furthest = [max(seed.layer for seed in seeds if seed.target == j) for j in range(count)]
        self._arrive(self.stop, last, gradient, behind, seeds)
        del last
        while segments:
            segment = segments.pop()
            some = [j for j in range(count) if furthest[j] > segment.index]
            gradient, behind = gradient.to(segment.leaf.device), behind.to(segment.leaf.device)
            if some and self.recompute:
                segment.run_again()
            for group in self._groups(some):
                at = torch.tensor(group, device=gradient.device)
                found = segment.go_back(gradient[at], is_last=group[-1] == some[-1])
                with without_autocast(gradient.device):
                    before = self._read(segment, found, group, gradient[at], behind[at])
                gradient[at], behind[at] = found.leaf.to(dtype), before
                del found
            self._arrive(segment.index, segment.leaf, gradient, behind, seeds)
            segment.drop()
            self.passed(segment.index)

    def _arrive(self, layer: int, x: Tensor, gradient: Tensor, behind: Tensor, seeds: Sequence[_Seed]) -> None:
        """Start the targets of a layer's input, and hand the stream there on."""
        rows = gradient.flatten(1, -2)  # [T, B·N or P, D], of the same memory
        for seed in seeds:
            if seed.layer == layer:
                at = self.packing.row_of(seed.prompt, seed.position)
                rows[seed.target, at] += seed.gradient.to(rows.device)
                behind[seed.target, seed.prompt] += seed.constant
        some = sorted({seed.target for seed in seeds if seed.layer >= layer})
        if some:
            chosen = slice(None) if len(some) == len(gradient) else some
            flat = self.packing.flat(x.detach())
            with without_autocast(x.device):
                self._hand_on(
                    layer, self.stream, StreamGradient(layer, some, flat, self._flat(gradient[chosen]), behind[chosen])
                )

    def _read(self, segment: _Segment, found: _Found, group: list[int], gradient: Tensor, behind: Tensor) -> Tensor:
        """Hand a layer's gradients on; returns the scores of the biases behind its input ``[T, B]``."""
        flat, dtype = self.packing.flat, self.bound.state_dtype
        biases: dict[str, Tensor] = {}
        for (path, _, bias, axis), of_output in zip(segment.biased, found.biased, strict=True):
            if of_output is not None:  # no path leads there, as to the biases of queries where the pattern is frozen
                of_bias = of_output if axis is None else of_output.to(dtype).movedim(axis + 1, 2).sum(3)
                scores = _dot(self._flat(of_bias), bias, dtype)
                biases[path] = biases[path] + scores if path in biases else scores
        zero = gradient.new_zeros(len(group), sum(self.lengths))
        before = behind + _of_prompts(sum(biases.values(), zero), self.lengths)
        gradients = LayerGradients(
            bound=self.bound,
            layer=segment.index,
            lengths=self.lengths,
            before=StreamGradient(
                segment.index, group, flat(segment.leaf.detach()), self._flat(found.leaf.to(dtype)), before
            ),
            after=StreamGradient(segment.index + 1, group, flat(segment.output.detach()), self._flat(gradient), behind),
            middle=None if found.middle is None else self._flat(found.middle),
            mixed=flat(segment.mixed.detach()),
            of_mixed=self._flat(found.mixed),
            hidden=flat(segment.hidden.detach()),
            of_hidden=self._flat(found.hidden),
            biases=biases,
            late_biases=frozenset(path for path, *_ in segment.biased[segment.early :] if path in biases),
        )
        self._hand_on(segment.index, self.layer, gradients)
        return before

    def _hand_on(self, layer: int, to: Callable[[Any], None], given: Any) -> None:
        self.reading = layer
        try:
            to(given)
        finally:
            self.reading = None

    def _flat(self, gradient: Tensor) -> Tensor:
        """``[T, P, n]`` of a gradient ``[T, B, N, n]``, ``[T, 1, P, n]`` or ``[T, B·N, n]`` of the model."""
        gradient = gradient[:, None] if gradient.dim() == 3 else gradient
        return self.packing.flat(gradient.movedim(0, 2)).movedim(1, 0)

    def _groups(self, some: list[int]) -> Iterator[list[int]]:
        """The targets in groups that go back together."""
        each = self.at_once
        if each is None:
            width = 4 * self.bound.widest_layer.gate.shape[0] + 8 * self.bound.hidden_size
            if self.path_weights.steers:
                width += 3 * self.bound.num_heads * max(self.lengths)
            each = max(1, BATCH_NUMBERS // (width * sum(self.lengths)))
        for begin in range(0, len(some), each):
            yield some[begin : begin + each]


class _Check(Capture):
    """A pass that only compares layers with the family."""

    def layer(self, index: int, trace: Trace) -> None:
        """Nothing is read of a layer."""


class _Found(NamedTuple):
    """Gradients of ``t`` targets, each ``[t, ...]`` of the tensor that it belongs to."""

    leaf: Tensor
    mixed: Tensor
    hidden: Tensor
    middle: Tensor | None
    biased: list[Tensor | None]


class _Segment:
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

    def __init__(self, run: Backward, index: int) -> None:
        self.run, self.index, self.modules = run, index, run.bound.layers[index]
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

    def run_again(self) -> None:
        """Run the layer again from its stored input, now with a graph."""
        assert self.call is not None
        args, kwargs = self.call
        self.has_graph = True
        self.modules.module(*args, **kwargs)

    def go_back(self, gradient: Tensor, is_last: bool) -> _Found:
        """The gradients for those of the layer's output, ``[t, ...]``; the graph is freed after the last."""
        self._must_carry(self.output)
        inputs: list[Tensor | GradientEdge] = [self.leaf, self.mixed, self.hidden]
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
        end = 3 + len(self.biased)
        # the gradient of what the attention adds to the stream is its output's by the factor between them
        middle = None if self.middle is None else found[end] / self.modules.output.factor
        return _Found(found[0], found[1], found[2], middle, list(found[3:end]))


def _axis_of_positions(x: Tensor, count: int) -> int | None:
    """Whether ``[B, N, H, d]`` or ``[B, H, N, d]`` is the form of a tensor with ``count`` positions: 1 or 2; or None.

    It is a view of a projection's output, where positions are further apart than heads.
    """
    fitting = [axis for axis in (1, 2) if x.shape[axis] == count]
    return max(fitting, key=x.stride, default=None)


def _in_graph(x: Tensor) -> Tensor:
    """``x``, or a leaf in its place where no path leads to it."""
    return x if x.requires_grad else x.detach().requires_grad_()


@dataclass(frozen=True)
class Everything:
    """All scores of one prompt, for ``T`` targets; ``L`` layers from the first that was gone through, ``N`` tokens.

    At every layer's input tokens, biases and what is missing add up to the logit. They are zero behind a probe's layer.

    Attributes:
        readouts: the targets, with the model's own logits.
        tokens: ``[T, L + 1, N]``, of the stream at the input of each layer and at the output of the last.
        biases: ``[T, L + 1]``, of the biases behind it.
        missing: ``[T, L + 1]``, the logit minus both; see :attr:`depass.models.linearised.PathWeights.remainder`.
        heads: ``[T, L, H]``.
        neurons: by layer, ``[T, F]``.
        modules: ``[T, L, 2]``, of attention and MLP.
        rest, bias: by kind of parts, the scores ``[T, L]`` of these sources; see :meth:`LayerGradients.rest`.
    """

    readouts: list[Readout]
    tokens: Tensor
    biases: Tensor
    missing: Tensor
    heads: Tensor
    neurons: list[Tensor]
    modules: Tensor
    rest: dict[Parts, Tensor]
    bias: dict[Parts, Tensor]


def everything(
    bound: BoundModel,
    prompts: Sequence[Sequence[int]],
    asked: Sequence[Sequence[Asked]],
    path_weights: PathWeights,
    **options: Any,
) -> list[Everything]:
    """Score all tokens, heads, neurons and modules of all layers; holds ``T·L·F`` numbers, so for small models.

    Args:
        bound: the model.
        prompts: the token ids of each prompt.
        asked: the checked targets of each prompt.
        path_weights: how gradients flow.
        options: the other arguments of :class:`Backward`.

    Raises:
        ModelError: as for :meth:`Backward.run`.
    """
    run = _Everything(bound, prompts, asked, path_weights, **options)
    run.run()
    return [run.of(prompt) for prompt in range(len(prompts))]


class _Everything(Backward):
    """Keeps every score by layer, as rows ``[T, ...]`` in which targets that were left out are zero."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kept: dict[tuple[str, int], Tensor] = {}  # by name and layer: [T, P, ...] or [T, B, ...]

    def stream(self, gradient: StreamGradient) -> None:
        self._keep("tokens", gradient.layer, gradient.targets, gradient.scores())
        self._keep("biases", gradient.layer, gradient.targets, gradient.behind)

    def layer(self, gradients: LayerGradients) -> None:
        sums = gradients.of_prompts
        scores = {"heads": sums(gradients.heads()), "neurons": gradients.neurons()}
        scores["modules"] = torch.stack([sums(gradients.attention()), sums(gradients.mlp())], -1)
        for parts in get_args(Parts):
            scores[f"rest {parts}"] = sums(gradients.rest(parts))
            scores[f"bias {parts}"] = gradients.bias(parts)
        for name, each in scores.items():
            self._keep(name, gradients.layer, gradients.targets, each)

    def _keep(self, name: str, layer: int, some: list[int], scores: Tensor) -> None:
        count = max(len(of_prompt) for of_prompt in self.readouts)
        rows = self.kept.setdefault((name, layer), scores.new_zeros(count, *scores.shape[1:], device="cpu"))
        rows[some] = scores.cpu()

    def of(self, prompt: int) -> Everything:
        """The scores of one prompt."""
        readouts, begin = self.readouts[prompt], sum(self.lengths[:prompt])
        count, layers = len(readouts), range(self.start, self.stop)

        def by_layer(name: str) -> list[Tensor]:
            return [self.kept[name, layer][:count, prompt] for layer in layers]

        def by_parts(name: str) -> dict[Parts, Tensor]:
            return {parts: torch.stack(by_layer(f"{name} {parts}"), 1) for parts in get_args(Parts)}

        places, tokens = range(self.start, self.stop + 1), slice(begin, begin + self.lengths[prompt])
        of_tokens = torch.stack([self.kept["tokens", layer][:count, tokens] for layer in places], 1)
        biases = torch.stack([self.kept["biases", layer][:count, prompt] for layer in places], 1)
        logits = torch.tensor([readout.logit for readout in readouts], dtype=biases.dtype)
        return Everything(
            readouts=readouts,
            tokens=of_tokens,
            biases=biases,
            missing=logits[:, None] - of_tokens.sum(-1) - biases,
            heads=torch.stack(by_layer("heads"), 1),
            neurons=by_layer("neurons"),
            modules=torch.stack(by_layer("modules"), 1),
            rest=by_parts("rest"),
            bias=by_parts("bias"),
        )
