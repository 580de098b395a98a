"""Baselines that attribute a logit to a prompt's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..api import DePass
from ..checks import integer
from ..errors import DePassError, ModelError, OptionError, PromptError
from ..models import capture
from ..models.bound import BoundModel
from ..models.capture import Capture, Check
from ..models.linearised import linearised
from ..models.tempered import TemperedSoftmax
from ..models.trace import Trace
from ..results.attribution import Attribution
from ..rules import PathWeights
from ..sources.source import Source
from .common import (
    BATCH_TOKENS,
    _Case,
    _case,
    _clean,
    _embedded,
    _must_be_finite,
    _named,
    _normed,
    _settings,
    _value,
    cut,
    every_path_carries_gradients,
    refuse_inference_mode,
)

_SHAP_SAMPLES = 20
_SHAP_NOISE = 0.1  # relative to the standard deviation of the prompt's embeddings
_GIM = PathWeights(q=0.25, k=0.25, v=0.5, gate=0.5, up=0.5)
_GIM_TEMPERATURE = 2.0


def tokens(dp: DePass, name: str, prompts: Sequence[Any], target: Any = None, *, seed: int = 0) -> list[Attribution]:
    """Score the tokens of prompts with a baseline. Several prompts share a pass, which changes results only by rounding.

    =========================== =============================================================================================
    ``gradient_norm``           the norm of the logit's gradient with respect to each token's embedding
    ``input_x_gradient``        that gradient times the embedding (signed)
    ``integrated_gradients_20`` the embedding times the mean gradient along the line from zero embeddings, by the midpoint
                                rule with 20 steps (Sundararajan et al. 2017, arXiv 1703.01365); ``_50`` with 50
    ``gradient_shap``           the same at 20 random points, each on a line from zero to embeddings with Gaussian noise of a
                                tenth of their standard deviation (Lundberg and Lee 2017, as in captum)
    ``gim``                     the embedding times a modified gradient, described below (Gradient Interaction Modifications,
                                Edin et al. 2025, arXiv 2505.17630)
    ``mean_attention``          the attention weights of the target's position, averaged over layers and heads
    ``last_attention``          the attention weights of the target's position in the last layer, averaged over heads
    ``attention_rollout``       the product of ``A/2 + 1/2`` over layers, ``A`` the mean over heads (Abnar and Zuidema 2020,
                                arXiv 2005.00928)
    ``leave_one_out``           the logit minus the logit without the token, from one model pass per token; 0 for tokens
                                after the target's position
    ``random``                  normally distributed random numbers
    =========================== =============================================================================================

    ``gim`` is the gradient of the model with three changes. The scales of all norms are constants. The factors of a product
    share its gradient evenly: values carry a half of attention's, queries and keys a quarter each, the gate and the up
    projection of a gated MLP a half each. The softmax in attention has the Jacobian ``diag(p) - p pᵀ``, where ``p`` is the
    softmax at temperature 2; there is no further factor 1/2, as in the authors' code. Activations and soft-caps keep their
    derivatives. The authors subtract a neutral token's embedding from each embedding; here nothing is subtracted.

    Args:
        dp: the model.
        name: one of :data:`TOKENS`.
        prompts: a list of prompts, each as for :meth:`DePass.attribute`.
        target: one target for all prompts, as for :meth:`DePass.attribute`; or a list with one target per prompt.
        seed: seed of ``random`` and ``gradient_shap``.

    Raises:
        OptionError: an unknown name, no prompts, or a list of targets of another length than the prompts.
        PromptError, TargetError: a prompt or target is invalid; the message gives the prompt's index.
        ModelError: the model is in training mode with dropout. For ``gim`` also: weights are quantised, offloaded or
            streamed; a norm has no weight; a layer does not compute what the family says; or attention does not call
            torch's softmax.
        NonFiniteError: a logit of the model or a score is not finite.
    """
    method = _named(name, TOKENS, "tokens")
    seed = integer("seed", seed, OptionError)
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence) or not prompts:
        raise OptionError(
            f"prompts must be a list of one or more prompts, got {type(prompts).__name__} {prompts!r:.40}"
        )
    several = isinstance(target, (list, tuple))
    if several and len(target) != len(prompts):
        raise OptionError(
            f"a list of targets must have one per prompt, got {len(target)} targets for {len(prompts)} prompts"
        )
    cases = []
    for index, prompt in enumerate(prompts):
        try:
            cases.append(_case(dp, prompt, target[index] if several else target))
        except DePassError as error:
            raise type(error)(f"prompt {index}: {error}") from error
    cases = _clean(dp, cases)
    all_scores = method(dp.bound, cases, seed)
    return [_attribution(dp, name, case, scores) for case, scores in zip(cases, all_scores, strict=True)]


def _attribution(dp: DePass, name: str, case: _Case, scores: Tensor) -> Attribution:
    _must_be_finite(dp.bound, float(scores.abs().max()), f"a score by {name}")
    logits = torch.tensor([readout.logit for readout in case.readouts], dtype=torch.float64, device="cpu").float()
    return Attribution(
        scores=scores.float(),
        sources=tuple(Source(token, "token", t, t + 1) for t, token in enumerate(case.prompt.tokens)),
        targets=tuple(readout.target for readout in case.readouts),
        target_logits=logits,
        conservation_error=torch.full_like(logits, math.nan),
        prompt=case.prompt,
        settings=_settings(dp, name),
    )


# --- tokens: gradients --------------------------------------------------------------------------------------------------

Points = Callable[[_Case, Tensor, int], tuple[Tensor, Tensor]]


Within = Callable[[BoundModel], AbstractContextManager[Any]]


def _by_gradients(
    points: Points,
    samples: int,
    combine: Callable[[Tensor, Tensor], Tensor],
    bound: BoundModel,
    cases: Any,
    seed: int,
    within: Within = nullcontext,
) -> list[Tensor]:
    """Scores ``[targets, N]``: the mean over the points of ``combine(gradients, factors)``.

    Args:
        points: takes a case, its embeddings ``[N, D]`` and the seed; returns the points where gradients are taken, and
            their factors, both ``[samples, N, D]``.
        samples: number of points.
        combine: takes gradients and factors ``[..., N, D]``; returns ``[..., N]``.
        bound: the model.
        cases: the prompts.
        seed: seed for ``points``.
        within: takes the model; returns a context inside which gradients are taken.
    """
    totals: list[Tensor] = [torch.zeros(len(case.readouts), len(case.prompt.ids), device="cpu") for case in cases]
    for some in capture.batches(bound, [len(case.prompt.ids) for case in cases], BATCH_TOKENS, samples):
        longest = max(len(cases[i].prompt.ids) for i in some)
        at, by = zip(*(points(cases[i], _embedded(bound, cases[i]), seed) for i in some), strict=True)
        owners = [i for i in some for _ in range(samples)]
        where, factors = (
            torch.cat([nn.functional.pad(tensor, (0, 0, 0, longest - tensor.shape[1])) for tensor in tensors])
            for tensors in (at, by)
        )  # [B·samples, T, D]
        rows = max(1, BATCH_TOKENS // longest)
        for begin in range(0, len(owners), rows):
            block = slice(begin, begin + rows)
            gradients = _gradients(bound, where[block], [cases[i] for i in owners[block]], within)
            for i, gradient, factor in zip(owners[block], gradients, factors[block], strict=True):
                scores = combine(gradient.float(), factor.float()) / samples  # [targets, T]
                totals[i] += scores[:, : totals[i].shape[1]].cpu()
    return totals


def _gradients(bound: BoundModel, embeddings: Tensor, cases: Sequence[_Case], within: Within) -> list[Tensor]:
    """Each case's gradients ``[targets, T, D]`` at embeddings ``[B, T, D]``: one forward pass, one backward per target."""
    refuse_inference_mode(bound)
    with torch.enable_grad(), within(bound):
        embeddings = embeddings.detach().requires_grad_()
        with every_path_carries_gradients(bound, embeddings):
            normed = capture.normed_at(bound, [case.prompt.ids for case in cases], embeddings)
        most = max(len(case.readouts) for case in cases)
        by_target = []
        for j in range(most):
            logits = [_value(normed[b], case.readouts[j]) for b, case in enumerate(cases) if j < len(case.readouts)]
            total = torch.stack(logits).sum()
            if not total.requires_grad:
                raise cut(bound)
            (gradient,) = torch.autograd.grad(total, embeddings, retain_graph=j + 1 < most, allow_unused=True)
            if gradient is None:
                raise cut(bound)
            by_target.append(gradient)
    stacked = torch.stack(by_target, 1)  # [B, targets, T, D]
    return [stacked[b, : len(case.readouts)] for b, case in enumerate(cases)]


def _at_embeddings(_: _Case, embedded: Tensor, __: int) -> tuple[Tensor, Tensor]:
    return embedded[None], embedded[None]


def _on_the_line(steps: int, _: _Case, embedded: Tensor, __: int) -> tuple[Tensor, Tensor]:
    """The midpoints of ``steps`` pieces of the line from zero to the embeddings."""
    share = (torch.arange(steps, device=embedded.device) + 0.5) / steps
    return share.to(embedded)[:, None, None] * embedded, embedded.expand(steps, -1, -1)


def _around_the_line(case: _Case, embedded: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Random points on lines from zero to noisy embeddings."""
    generator = case.generator(seed)
    noise = torch.randn(_SHAP_SAMPLES, *embedded.shape, generator=generator, device="cpu")
    share = torch.rand(_SHAP_SAMPLES, 1, 1, generator=generator, device="cpu")
    noisy = embedded + (_SHAP_NOISE * float(embedded.float().std()) * noise).to(embedded)
    return share.to(embedded) * noisy, noisy


def _norm(gradient: Tensor, _: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(gradient, dim=-1)
    return size


def _product(gradient: Tensor, factor: Tensor) -> Tensor:
    return (gradient * factor).sum(-1)


def _gim(bound: BoundModel, cases: Sequence[_Case], seed: int) -> list[Tensor]:
    """Scores ``[targets, N]``: gradient times embedding, inside :func:`_interactions`."""
    layers = range(len(bound.layers))
    if not bound.checked.issuperset(layers):  # because the family says where the gradients change
        with torch.no_grad():
            Check(bound, [cases[0].prompt.ids], layers).run()
    return _by_gradients(_at_embeddings, 1, _product, bound, cases, seed, _interactions)


@contextmanager
def _interactions(bound: BoundModel) -> Iterator[None]:
    """Inside the ``with`` block this thread's gradients are those of Gradient Interaction Modifications.

    Raises:
        ModelError: the model cannot be linearised, or its attention did not use torch's softmax.
    """
    with linearised(bound, _GIM, slope="tangent"), TemperedSoftmax(_GIM_TEMPERATURE) as softmax:
        yield
    if softmax.count < len(bound.layers):
        raise ModelError(
            f"gim changes the gradient of torch's softmax in attention, but {bound.name} called it {softmax.count} times in "
            f"{len(bound.layers)} layers; choose another baseline"
        )


# --- tokens: attention, leave-one-out, random -----------------------------------------------------------------------------


@torch.no_grad()
def _by_attention(reduce: Callable[[list[Tensor]], Tensor], bound: BoundModel, cases: Any, _: int) -> list[Tensor]:
    """Scores ``[targets, N]``: each target's row of ``reduce(patterns)``, for the layers' patterns ``[B, T, T]``."""
    by_case: dict[int, Tensor] = {}
    for some in capture.batches(bound, [len(case.prompt.ids) for case in cases], BATCH_TOKENS):
        run = _Patterns(bound, [cases[i].prompt.ids for i in some], range(len(bound.layers)))
        run.run()
        for i, reduced in zip(some, reduce(run.patterns).cpu(), strict=True):
            rows = [readout.target.position for readout in cases[i].readouts]
            by_case[i] = reduced[rows, : len(cases[i].prompt.ids)]
    return [by_case[i] for i in range(len(cases))]


class _Patterns(Capture):
    """The patterns ``[B, T, T]`` of layers that have heads, averaged over these, on the first layer's device."""

    def __init__(self, bound: BoundModel, prompts: Sequence[Sequence[int]], layers: range) -> None:
        super().__init__(bound, prompts, layers)
        self.patterns: list[Tensor] = []

    def layer(self, index: int, trace: Trace) -> None:
        if not trace.mixers:  # positions do not mix
            return
        by_mixer = [mixer.pattern.float() for mixer in trace.mixers if mixer.pattern is not None]
        pattern = torch.cat(by_mixer, 1).mean(1)
        self.patterns.append(pattern.to(self.patterns[0].device if self.patterns else pattern.device))


def _mean(patterns: list[Tensor]) -> Tensor:
    return torch.stack(patterns).mean(0)


def _last(patterns: list[Tensor]) -> Tensor:
    return patterns[-1]


def _rollout(patterns: list[Tensor]) -> Tensor:
    identity = torch.eye(patterns[0].shape[-1], device=patterns[0].device)
    rolled = identity.expand_as(patterns[0])
    for pattern in patterns:
        rolled = (pattern + identity) / 2 @ rolled
    return rolled


@torch.no_grad()
def _leave_one_out(bound: BoundModel, cases: Sequence[_Case], _: int) -> list[Tensor]:
    """Scores ``[targets, N]``; tokens after the target's position score 0."""
    all_scores = [torch.zeros(len(case.readouts), len(case.prompt.ids), device="cpu") for case in cases]
    without: list[tuple[int, int, int]] = []  # case, the target's position, the token that is left out
    for i, case in enumerate(cases):
        for q in sorted({readout.target.position for readout in case.readouts}):
            if q == 0:
                raise PromptError(
                    f"prompt {i}: leave_one_out at position 0 leaves no token; give a target at a later position"
                )
            without += [(i, q, t) for t in range(q + 1)]
    rows = [cases[i].prompt.ids[:t] + cases[i].prompt.ids[t + 1 : q + 1] for i, q, t in without]
    for some in capture.batches(bound, [len(row) for row in rows], BATCH_TOKENS):
        normed = _normed(bound, [rows[k] for k in some])
        for of_row, k in zip(normed, some, strict=True):
            i, q, t = without[k]
            for j, readout in enumerate(cases[i].readouts):
                if readout.target.position == q:
                    w = readout.w.to(of_row.device)
                    left = float(of_row[q - 1].to(w) @ w) + readout.constant
                    all_scores[i][j, t] = readout.logit - left
    return all_scores


def _random_tokens(_: BoundModel, cases: Sequence[_Case], seed: int) -> list[Tensor]:
    shapes = [(len(case.readouts), len(case.prompt.ids)) for case in cases]
    return [
        torch.randn(shape, generator=case.generator(seed), device="cpu")
        for shape, case in zip(shapes, cases, strict=True)
    ]


TOKENS: dict[str, Callable[[BoundModel, Sequence[_Case], int], list[Tensor]]] = {
    "gradient_norm": partial(_by_gradients, _at_embeddings, 1, _norm),
    "input_x_gradient": partial(_by_gradients, _at_embeddings, 1, _product),
    "integrated_gradients_20": partial(_by_gradients, partial(_on_the_line, 20), 20, _product),
    "integrated_gradients_50": partial(_by_gradients, partial(_on_the_line, 50), 50, _product),
    "gradient_shap": partial(_by_gradients, _around_the_line, _SHAP_SAMPLES, _product),
    "gim": _gim,
    "mean_attention": partial(_by_attention, _mean),
    "last_attention": partial(_by_attention, _last),
    "attention_rollout": partial(_by_attention, _rollout),
    "leave_one_out": _leave_one_out,
    "random": _random_tokens,
}
