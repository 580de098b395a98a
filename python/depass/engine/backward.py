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
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import SourceError
from ..inputs.targets import Asked, Readout, Sum, Target
from ..models import attention
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
        beside: ``[T, P]``, the scores of the keys and values of earlier layers that later ones take; None where there are
            none. They belong to the position that they are of.
    """

    layer: int
    targets: list[int]
    x: Tensor
    gradient: Tensor
    behind: Tensor
    balance: Tensor
    beside: Tensor | None = None

    def scores(self) -> Tensor:
        """The scores of the whole stream by position, ``[T, P]``, and of what goes beside it."""
        return self.plus_beside(_dot(self.gradient, self.x, self.behind.dtype))

    def plus_beside(self, scores: Tensor) -> Tensor:
        """Scores ``[T, P]`` of the stream plus those of the keys and values beside it."""
        return scores if self.beside is None else scores + self.beside


@dataclass(frozen=True)
class RoutedGradients:
    """The hidden vectors of a layer's experts, and their gradients, at ``S`` places: pairs of a position and an expert.

    Attributes:
        hidden, of_hidden: ``[S, F]``, and their gradients ``[T, S, F]``, the router's weight included.
        position: ``[S]`` int64, the position among the ``P`` of the pass; ``P`` itself stands for padding.
        expert: ``[S]`` int64.
        count: the number of experts ``E``.
        dtype: the dtype of scores.
    """

    hidden: Tensor
    of_hidden: Tensor
    position: Tensor
    expert: Tensor
    count: int
    dtype: torch.dtype

    def scores(self) -> Tensor:
        """The scores of what the experts add, their output biases left out, by place ``[T, S]``."""
        return _dot(self.of_hidden, self.hidden, self.dtype)

    def by_position(self, scores: Tensor, positions: int) -> Tensor:
        """Scores ``[T, S]`` of places, summed over the places of each of the positions: ``[T, P]``."""
        into = scores.new_zeros(len(scores), positions + 1)
        return into.index_add_(1, self.position, scores)[:, :positions]


@dataclass(frozen=True)
class LayerGradients:
    """What a backward pass finds in one layer, for ``T`` of the targets; it may be read only during the call.

    Attributes:
        bound: the model.
        layer: the layer.
        lengths: the prompts' numbers of tokens.
        before, after: the stream at the layer's input and at its output.
        middle: ``[T, P, D]``, the gradient of the stream between attention and MLP; None where they are parallel, or where
            the layer has no attention.
        late, of_late: the stream that the branch behind the MLP reads ``[P, D]``, and its gradients ``[T, P, D]``; None in a
            layer without.
        mixed, of_mixed: by mixer, the input of its output projection ``[P, H·d]``, and its gradients ``[T, P, H·d]``.
        hidden, of_hidden: the input of the MLP's down projection ``[P, F]``, and its gradients ``[T, P, F]``; None where the
            layer has experts or a mixer alone.
        routed: the experts' hidden vectors and gradients; None in a layer without experts.
        biases: the scores ``[T, P]`` of the layer's biases, by the path of their module in the layer.
        late_biases: the paths of those that the layer adds behind its middle.
        last_biases: the paths of those that it adds in the branch behind the MLP.
        lost_in_mlp: ``[T, P]``, what the path weights lose in the MLP.
    """

    bound: BoundModel
    layer: int
    lengths: list[int]
    before: StreamGradient
    after: StreamGradient
    middle: Tensor | None
    late: Tensor | None
    of_late: Tensor | None
    mixed: list[Tensor]
    of_mixed: list[Tensor]
    hidden: Tensor | None
    of_hidden: Tensor | None
    routed: RoutedGradients | None
    biases: dict[str, Tensor]
    late_biases: frozenset[str]
    last_biases: frozenset[str]
    lost_in_mlp: Tensor

    @property
    def targets(self) -> list[int]:
        """The numbers of the ``T`` targets."""
        return self.after.targets

    def of_prompts(self, scores: Tensor) -> Tensor:
        """Scores ``[T, P, ...]`` summed over each prompt's positions, ``[T, B, ...]``."""
        return _of_prompts(scores, self.lengths)

    def heads(self) -> Tensor:
        """The scores of the heads' outputs by position, ``[T, P, H]``, one mixer's after the other's."""
        by_mixer = [self._zero[..., None][..., :0]]  # of a layer without attention
        for mixer, mixed, of_mixed in zip(self._modules.mixers, self.mixed, self.of_mixed, strict=True):
            by_head = mixed.reshape(len(mixed), mixer.num_heads, -1)
            by_mixer.append(_dot(of_mixed.reshape(len(of_mixed), *by_head.shape), by_head, self._dtype))
        return torch.cat(by_mixer, -1)

    def neurons(self, positions: Tensor | None = None) -> Tensor:
        """The scores of the neurons' outputs, summed over each prompt's positions, ``[T, B, F]``.

        Args:
            positions: ``[P]`` bool, true where an output counts; by default everywhere.

        Raises:
            SourceError: the layer has routed experts, or no MLP.
        """
        if self.routed is None and self.hidden is None:
            raise SourceError(
                f"layer {self.layer} of {self.bound.name} has no MLP; take its heads: Heads({self.layer})"
            )
        if self.routed is not None or self.hidden is None or self.of_hidden is None:
            raise SourceError(
                f"layer {self.layer} of {self.bound.name} has routed experts, whose neurons are not the same at every "
                f"position; take experts instead: RoutedExperts({self.layer}) or sweep('experts')"
            )
        hidden = self.hidden.to(self._dtype)
        hidden = hidden if positions is None else hidden * positions[:, None].to(hidden)
        of_hidden = torch.split(self.of_hidden.to(self._dtype), self.lengths, 1)
        pairs = zip(of_hidden, torch.split(hidden, self.lengths), strict=True)
        return torch.stack([torch.einsum("tpf,pf->tf", gradient, own) for gradient, own in pairs], 1)

    def experts(self, positions: Tensor | None = None) -> Tensor:
        """The scores of the routed experts' outputs, summed over each prompt's positions, ``[T, B, E]``.

        An expert's output is its down projection's times the router's weight, without its bias; an expert that no position
        chose scores zero.

        Args:
            positions: ``[P]`` bool, true where an output counts; by default everywhere.

        Raises:
            SourceError: the layer has no routed experts.
        """
        routed = self._routed
        scores = routed.scores()  # [T, S]
        total, count = sum(self.lengths), routed.count
        counts = scores.new_ones(total) if positions is None else positions.to(scores)
        counts = torch.cat([counts, counts.new_zeros(1)])  # padding counts nowhere
        prompt = torch.arange(len(self.lengths) + 1, device="cpu")
        prompt = prompt.repeat_interleave(torch.tensor([*self.lengths, 1], device="cpu")).to(routed.position.device)
        into = scores.new_zeros(len(scores), (len(self.lengths) + 1) * count)
        into.index_add_(1, prompt[routed.position] * count + routed.expert, scores * counts[routed.position])
        return into.view(len(scores), -1, count)[:, :-1]

    def attention(self) -> Tensor:
        """The scores of the attention's output by position ``[T, P]``, its output bias included."""
        dots = (_dot(of_mixed, mixed, self._dtype) for of_mixed, mixed in zip(self.of_mixed, self.mixed, strict=True))
        return sum(dots, self._zero) + self._biases_of_attention()

    def mlp(self) -> Tensor:
        """The scores of the MLP's output by position ``[T, P]``, its output biases included.

        In a layer with experts it is the sum of theirs and of the MLP beside them.
        """
        mlp = self._modules.mlp
        own = self._added() + self._bias_of_experts()
        return own if mlp is None else own + self._bias_of(mlp.down.module)

    def rest(self, parts: Parts) -> Tensor:
        """The scores of the remainder by position ``[T, P]``, where the stream is split into ``parts`` and the remainder.

        ``heads`` and ``attn`` split it where the attention adds to it, which leaves the layer's input as the remainder. In
        parallel layers, and for the other parts, it is split after the layer.

        Raises:
            SourceError: the parts are experts, and the layer has none.
        """
        if parts in ("heads", "attn"):
            return self.after.scores() - self.attention() if self.middle is None else self._rest_of_middle(self.middle)
        whole = self.after.scores()
        if self.late is not None and self.of_late is not None:
            whole = self.after.plus_beside(_dot(self.of_late, self.late, self._dtype))
        if parts == "experts":
            return whole - self._of_experts() - self._bias_of_experts()
        return whole - (self.mlp() if parts == "mlp" else self._added())

    def bias(self, parts: Parts) -> Tensor:
        """The scores of the bias source ``[T, B]``, where the stream is split into ``parts``.

        It holds the biases behind the split; for ``heads`` and ``experts`` also the output bias of attention or experts,
        which belongs to none of them.
        """
        own = self.after.behind
        if parts in ("heads", "attn") and self.middle is not None:
            own = own + self._sum_of(self.late_biases)
        if parts not in ("heads", "attn"):
            own = own + self._sum_of(self.last_biases)
        if parts == "heads":
            own = own + self.of_prompts(self._biases_of_attention())
        return own + self.of_prompts(self._bias_of_experts()) if parts == "experts" else own

    def balance(self, parts: Parts) -> Tensor:
        """The balance ``[T, B]`` behind the split, where the stream is split into ``parts``."""
        own = self.after.balance
        return (
            own + self.of_prompts(self.lost_in_mlp) if parts in ("heads", "attn") and self.middle is not None else own
        )

    @property
    def _routed(self) -> RoutedGradients:
        if self.routed is None:
            raise SourceError(
                f"layer {self.layer} of {self.bound.name} has no routed experts; take its neurons: Neurons({self.layer})"
            )
        return self.routed

    def _of_experts(self) -> Tensor:
        """The scores of what the experts add by position ``[T, P]``, their output biases left out."""
        return self._routed.by_position(self._routed.scores(), sum(self.lengths))

    def _added(self) -> Tensor:
        """The scores of what MLP and experts add by position ``[T, P]``, their output biases left out."""
        own = self._zero if self.routed is None else self._of_experts()
        if self.hidden is None or self.of_hidden is None:
            return own
        return own + _dot(self.of_hidden, self.hidden, self._dtype)

    def _rest_of_middle(self, middle: Tensor) -> Tensor:
        return self.after.plus_beside(_dot(middle, self.before.x, self._dtype))

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
        return self.biases.get(self._path_of(module), self._zero)

    def _biases_of_attention(self) -> Tensor:
        """The scores ``[T, P]`` of the mixers' output biases, zero if there are none."""
        return sum((self._bias_of(mixer.output.module) for mixer in self._modules.mixers), self._zero)

    def _bias_of_experts(self) -> Tensor:
        """The scores ``[T, P]`` of the experts' output biases, zero if there are none."""
        experts = self._modules.experts
        if experts is None:
            return self._zero
        return self.biases.get(f"{self._path_of(experts.module)}.down_proj_bias", self._zero)

    def _path_of(self, module: nn.Module) -> str:
        paths: dict[nn.Module, str] = {each: path for path, each in self._modules.module.named_modules()}
        return paths[module]

    @property
    def _zero(self) -> Tensor:  # [T, P]
        gradient = self.after.gradient
        return torch.zeros(gradient.shape[:2], dtype=self._dtype, device=gradient.device)


def _of_prompts(scores: Tensor, lengths: list[int]) -> Tensor:
    return torch.stack([of_prompt.sum(1) for of_prompt in torch.split(scores, lengths, 1)], 1)


def _dot(gradient: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[T, ...]`` of gradients ``[T, ..., n]`` and values ``[..., n]``."""
    return torch.einsum("t...n,...n->t...", gradient.to(dtype), x.to(dtype))


class _Shared(NamedTuple):
    """Keys or values that later layers take, and the gradients that these gave them so far."""

    x: Tensor  # [B, K, N, d]
    gradient: Tensor  # [T, B, K, N, d]


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
        refuse(bound)  # before the check, which would call it the family's fault
        with attention.running, ExitStack() as stack:
            self._check()
            flows = stack.enter_context(linearised(bound, self.path_weights))
            stack.enter_context(torch.no_grad())  # segments switch their layers' graphs on
            stack.enter_context(attention.in_one_row(self.packing))
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
        self._shared: dict[int, list[_Shared]] = {}
        self._arrive(self.stop, last, gradient, behind, seeds)
        del last
        together = self.at_once or group_size(self.bound, self.lengths, self.path_weights)
        while segments:
            segment = segments.pop()
            some = [j for j in range(count) if furthest[j] > segment.index]
            gradient, behind = gradient.to(segment.leaf.device), behind.to(segment.leaf.device)
            if some and self.recompute:
                segment.run_again()
            for group in (some[begin : begin + together] for begin in range(0, len(some), together)):
                at = torch.tensor(group, device=gradient.device)
                of_lent = [each.gradient[at] for each in self._shared.get(segment.index, ())]
                found = segment.go_back(gradient[at], group[-1] == some[-1], of_lent)
                with without_autocast(gradient.device):
                    after = self._beside(segment.index + 1, at)
                    self._keep_taken(segment, found, at, count)
                    beside = after, self._beside(segment.index, at)
                    before = self._read(segment, found, group, gradient[at], behind[:, at], beside)
                gradient[at], behind[:, at] = found.leaf.to(dtype), before
                del found
            self._shared.pop(segment.index, None)
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
                beside = self._beside(layer, torch.tensor(some, device=x.device))
                own = self._flat(gradient[chosen])
                given = StreamGradient(layer, some, flat, own, behind[0, chosen], behind[1, chosen], beside)
                self._hand_on(layer, self.stream, given)

    def _beside(self, layer: int, targets: Tensor) -> Tensor | None:
        """The scores ``[T, P]`` of keys and values of layers before this one that go to layers gone back through."""
        shared = [each for lender, of_layer in self._shared.items() if lender < layer for each in of_layer]
        scores: Tensor | None = None
        for each in shared:
            own = each.x.transpose(1, 2).flatten(2).to(targets.device)  # [B, N, K·d]
            gradient = each.gradient.to(targets.device)[targets].transpose(2, 3).flatten(3)  # [T, B, N, K·d]
            of_each = _dot(self._flat(gradient), self.packing.flat(own), self.bound.state_dtype)
            scores = of_each if scores is None else scores + of_each
        return scores

    def _keep_taken(self, segment: Segment, found: Found, at: Tensor, count: int) -> None:
        """Add up the gradients of the keys and values that a layer takes from an earlier one."""
        lender = segment.modules.values_of
        if lender is None:
            return
        if lender not in self._shared:
            self._shared[lender] = [_Shared(x.detach(), x.new_zeros(count, *x.shape, dtype=self.bound.state_dtype))
                                    for x in segment.flow.taken]  # fmt: skip
        for each, gradient in zip(self._shared[lender], found.taken, strict=True):
            each.gradient[at] += gradient.to(each.gradient)

    def _read(
        self,
        segment: Segment,
        found: Found,
        group: list[int],
        gradient: Tensor,
        behind: Tensor,
        beside: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        """Hand a layer's gradients on; returns the scores of biases and the balance behind its input ``[2, T, B]``."""
        flat, dtype, index = self.packing.flat, self.bound.state_dtype, segment.index
        routed = self._routed(segment, found)
        biases = self._biases(segment, found, routed)
        lost_in_attention, lost_in_mlp = self._lost(segment, found, routed)
        here = torch.stack([sum(biases.values(), torch.zeros_like(lost_in_mlp)), lost_in_attention + lost_in_mlp])
        before = behind + torch.stack([_of_prompts(scores, self.lengths) for scores in here])
        x, of_x = flat(segment.leaf.detach()), self._flat(found.leaf.to(dtype))
        gradients = LayerGradients(
            bound=self.bound,
            layer=index,
            lengths=self.lengths,
            before=StreamGradient(index, group, x, of_x, before[0], before[1], beside[1]),
            after=StreamGradient(
                index + 1, group, flat(segment.output.detach()), self._flat(gradient), behind[0], behind[1], beside[0]
            ),
            late=None if segment.late is None else flat(segment.late.detach()),
            of_late=None if found.late is None else self._flat(found.late),
            middle=None if found.middle is None else self._flat(found.middle),
            mixed=[flat(mixed.detach()) for mixed in segment.mixed],
            of_mixed=[self._flat(mixed) for mixed in found.mixed],
            hidden=None if segment.hidden is None else flat(segment.hidden.detach()),
            of_hidden=None if found.hidden is None else self._flat(found.hidden),
            routed=routed,
            biases=biases,
            late_biases=frozenset(each.path for each in segment.biased[segment.early :] if each.path in biases),
            last_biases=self._last_biases(segment, biases),
            lost_in_mlp=lost_in_mlp,
        )
        self._hand_on(index, self.layer, gradients)
        return before

    def _last_biases(self, segment: Segment, biases: dict[str, Tensor]) -> frozenset[str]:
        if segment.late is None:
            return frozenset()
        return frozenset(each.path for each in segment.biased[segment.before_late :] if each.path in biases)

    def _routed(self, segment: Segment, found: Found) -> RoutedGradients | None:
        """The gradients of the experts' hidden vectors; None in a layer without experts."""
        if segment.routed is None or found.routed is None:
            return None
        call, experts = segment.routed, self.bound.layers[segment.index].experts
        assert experts is not None
        rows = len(call.output) if experts.router is None else len(call.output) // experts.count
        at = call.places.position % rows  # a router of inputs gives each expert rows of its own
        position = self.packing.position_of_row(rows, at.device)[at]
        return RoutedGradients(
            call.hidden.detach(), found.routed, position, call.places.expert, experts.count, self.bound.state_dtype
        )

    def _biases(self, segment: Segment, found: Found, routed: RoutedGradients | None) -> dict[str, Tensor]:
        """The scores ``[T, P]`` of a layer's biases, by their path in the layer."""
        biases: dict[str, Tensor] = {}
        dtype, flat = self.bound.state_dtype, self.packing.flat
        for each, of_output in segment.measured(found):
            bias = each.bias
            assert bias is not None
            if each.at_places:
                assert routed is not None
                scores = routed.by_position(_dot(of_output, bias, dtype), sum(self.lengths))
            else:
                of_bias = of_output if each.axis is None else of_output.to(dtype).movedim(each.axis + 1, 2).sum(3)
                scores = _dot(self._flat(of_bias), bias if bias.dim() == 1 else flat(bias), dtype)
            biases[each.path] = biases[each.path] + scores if each.path in biases else scores
        return biases

    def _lost(self, segment: Segment, found: Found, routed: RoutedGradients | None) -> tuple[Tensor, Tensor]:
        """What the path weights lose in a layer's attention, less what they credit to steering it, and in its MLP.

        Each ``[T, P]``: the score of the product, less the scores of its factors.
        """
        zero = torch.zeros(len(found.leaf), sum(self.lengths), dtype=self.bound.state_dtype, device=found.leaf.device)
        if self.path_weights.balance is None:
            return zero, zero
        flat, dtype = self.packing.flat, self.bound.state_dtype
        pairs = zip(found.mixed, segment.mixed, strict=True)
        of_mixed = sum((_dot(self._flat(of), flat(mixed.detach()), dtype) for of, mixed in pairs), zero)
        in_attention = zero + (1 - self.path_weights.v) * of_mixed
        for x, of_x in zip(segment.flow.steering, found.steering, strict=True):
            own, gradient = x.detach().transpose(1, 2).flatten(2), of_x.transpose(2, 3).flatten(3)  # [T, B, N, H·d]
            in_attention = in_attention - _dot(self._flat(gradient), flat(own), dtype)
        in_mlp, flow = zero, segment.flow
        if flow.mlp is not None and segment.hidden is not None and found.hidden is not None:
            of_mlp = _dot(self._flat(found.hidden), flat(segment.hidden.detach()), dtype)
            in_mlp = in_mlp + (1 - flow.mlp.through) * of_mlp
        if flow.experts is not None and routed is not None:
            in_mlp = in_mlp + (1 - flow.experts.through) * routed.by_position(routed.scores(), zero.shape[1])
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
