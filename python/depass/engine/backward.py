"""Linear rules: every part of a model scored by one backward pass, for every target at once.

Where a rule is linear in the residual stream, the score of any part ``x`` of the stream at the input of layer ``l`` is
``G[l] · x``, with one gradient ``G[l]`` for all parts. The pass runs the linearised model, cut at the input of each layer,
and then goes back from the targets, one layer at a time. A layer's gradients are handed on and dropped, so memory does not
grow with layers times neurons.

The scores of all tokens at the input of any layer, plus the biases behind it, plus the balance, add up to the logit. The
balance is what the path weights lose or credit twice (:attr:`depass.rules.PathWeights.balance`), and zero for most rules.
Every score is a gradient times a value, the balance too; none is taken as what is left of the logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..inputs.targets import Asked, Readout, Sum, Target
from ..models import capture
from ..models.alterations import alterations
from ..models.bound import BoundModel, Layer
from ..models.capture import Check
from ..models.linearised import linearised, refuse
from ..models.packing import Packing
from ..models.positions import fresh
from ..rules import PathWeights
from .linear_memory import group_size
from .passes import without_autocast
from .scores import readouts_of
from .segment import Found, Segment

Parts = Literal["heads", "attn", "neurons", "experts", "mlp"]


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
        balance: ``[T, B]``, what the path weights lose behind it, less what they credit twice.
    """

    layer: int
    targets: list[int]
    x: Tensor
    gradient: Tensor
    behind: Tensor
    balance: Tensor

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
        lost_in_mlp: ``[T, P]``, what the path weights lose in the MLP.
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
    lost_in_mlp: Tensor

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

    def balance(self, parts: Parts) -> Tensor:
        """The balance ``[T, B]`` behind the split, where the stream is split into ``parts``."""
        own = self.after.balance
        return (
            own + self.of_prompts(self.lost_in_mlp) if parts in ("heads", "attn") and self.middle is not None else own
        )

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


def _summed(readouts: Sequence[Readout], sums: Sequence[Sum]) -> list[Readout]:
    """The sums of readouts; a sum has no direction, because each of its targets has its own position."""
    targets = [readout.target for readout in readouts]
    return [
        Readout(each.of(targets), readouts[each.begin].w.new_zeros(0), 0.0,
                math.fsum(readout.logit for readout in readouts[each.begin : each.end]))
        for each in sums
    ]  # fmt: skip


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
        at_once: how many targets of a prompt go back together; by default :func:`group_size`.
        tokenizer: the tokenizer for the targets' labels; may be None.
        sums: for each prompt, the sums of targets that go back in their place, each as one; by default none.

    Attributes:
        readouts: after :meth:`run`, the targets of each prompt with the model's own logits; a ``TopK`` gives ``k`` of them,
            and sums stand in place of their targets.
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
        sums: Sequence[Sequence[Sum]] = (),
    ) -> None:
        self.sums = sums or [()] * len(prompts)
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
            flows = stack.enter_context(linearised(bound, self.path_weights))
            stack.enter_context(torch.no_grad())  # segments switch their layers' graphs on
            stack.enter_context(capture.in_one_row(self.packing))
            stack.enter_context(fresh(bound.backbone, bound.switches))
            segments = [Segment(self, index, flows[index]) for index in range(self.start, self.stop)]
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
            check = Check(self.bound, self.prompts if altered else self.prompts[:1], layers)
            with torch.no_grad():
                check.run()
            self.altered = check.altered

    def _seeds(self, segments: Sequence[Segment], output: Tensor) -> list[_Seed]:
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
            if self.sums[b]:
                own = len(seeds) - len(self.readouts[-1])
                seeds[own:] = [seeds[own + j]._replace(target=number)
                               for number, each in enumerate(self.sums[b]) for j in range(each.begin, each.end)]  # fmt: skip
                self.readouts[-1] = _summed(self.readouts[-1], self.sums[b])
        return seeds

    def _probe(self, asked: Asked, segments: Sequence[Segment], at: int) -> Readout:
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

    def _go_back(self, segments: list[Segment], seeds: Sequence[_Seed]) -> None:
        last, count = segments[-1].output, max(len(of_prompt) for of_prompt in self.readouts)
        dtype = self.bound.state_dtype
        gradient = torch.zeros(count, *last.shape, dtype=dtype, device=last.device)
        behind = torch.zeros(2, count, len(self.lengths), dtype=dtype, device=last.device)  # biases, and the balance
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
                    before = self._read(segment, found, group, gradient[at], behind[:, at])
                gradient[at], behind[:, at] = found.leaf.to(dtype), before
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
                behind[0, seed.target, seed.prompt] += seed.constant
        some = sorted({seed.target for seed in seeds if seed.layer >= layer})
        if some:
            chosen = slice(None) if len(some) == len(gradient) else some
            flat = self.packing.flat(x.detach())
            with without_autocast(x.device):
                given = StreamGradient(layer, some, flat, self._flat(gradient[chosen]), *behind[:, chosen])
                self._hand_on(layer, self.stream, given)

    def _read(self, segment: Segment, found: Found, group: list[int], gradient: Tensor, behind: Tensor) -> Tensor:
        """Hand a layer's gradients on; returns the scores of biases and the balance behind its input ``[2, T, B]``."""
        flat, dtype, index = self.packing.flat, self.bound.state_dtype, segment.index
        biases: dict[str, Tensor] = {}
        for (path, _, bias, axis), of_output in zip(segment.biased, found.biased, strict=True):
            if of_output is not None:  # no path leads there, as to the biases of queries where the pattern is frozen
                of_bias = of_output if axis is None else of_output.to(dtype).movedim(axis + 1, 2).sum(3)
                scores = _dot(self._flat(of_bias), bias, dtype)
                biases[path] = biases[path] + scores if path in biases else scores
        lost_in_attention, lost_in_mlp = self._lost(segment, found)
        here = torch.stack([sum(biases.values(), torch.zeros_like(lost_in_mlp)), lost_in_attention + lost_in_mlp])
        before = behind + torch.stack([_of_prompts(scores, self.lengths) for scores in here])
        x, of_x = flat(segment.leaf.detach()), self._flat(found.leaf.to(dtype))
        gradients = LayerGradients(
            bound=self.bound,
            layer=index,
            lengths=self.lengths,
            before=StreamGradient(index, group, x, of_x, *before),
            after=StreamGradient(index + 1, group, flat(segment.output.detach()), self._flat(gradient), *behind),
            middle=None if found.middle is None else self._flat(found.middle),
            mixed=flat(segment.mixed.detach()),
            of_mixed=self._flat(found.mixed),
            hidden=flat(segment.hidden.detach()),
            of_hidden=self._flat(found.hidden),
            biases=biases,
            late_biases=frozenset(path for path, *_ in segment.biased[segment.early :] if path in biases),
            lost_in_mlp=lost_in_mlp,
        )
        self._hand_on(index, self.layer, gradients)
        return before

    def _lost(self, segment: Segment, found: Found) -> tuple[Tensor, Tensor]:
        """What the path weights lose in a layer's attention, less what they credit to steering it, and in its MLP.

        Each ``[T, P]``: the score of the product, less the scores of its factors.
        """
        zero = torch.zeros(len(found.leaf), sum(self.lengths), dtype=self.bound.state_dtype, device=found.leaf.device)
        if self.path_weights.balance is None:
            return zero, zero
        flat, dtype = self.packing.flat, self.bound.state_dtype
        in_attention = zero + (1 - self.path_weights.v) * _dot(
            self._flat(found.mixed), flat(segment.mixed.detach()), dtype
        )
        for x, of_x in zip(segment.flow.steering, found.steering, strict=True):
            own, gradient = x.detach().transpose(1, 2).flatten(2), of_x.transpose(2, 3).flatten(3)  # [T, B, N, H·d]
            in_attention = in_attention - _dot(self._flat(gradient), flat(own), dtype)
        in_mlp = (1 - segment.flow.through_mlp) * _dot(self._flat(found.hidden), flat(segment.hidden.detach()), dtype)
        return in_attention, in_mlp

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
        each = self.at_once or group_size(self.bound, self.lengths, self.path_weights)
        for begin in range(0, len(some), each):
            yield some[begin : begin + each]
