"""Other attributions than DePass behind the same results, to compare with: of prompts' tokens, of heads, of neurons.

None of them promises scores that add up to the logit, so ``conservation_error`` (of heads and neurons ``rest`` and
``bias`` too) is NaN, and ``settings.method`` says which it was. What is explained is the same: the target's logit before any
soft-capping. Gradients are with respect to the token embeddings that enter the model (learned positions not included).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import lockstep, targets
from .api import DePass
from .checks import integer
from .engine import blame, dtype_name, refuse_dropout
from .errors import DePassError, NonFiniteError, OptionError, PromptError
from .families import BoundModel, Layer, into_stream
from .masking import Kind, width
from .prompt import Prompt, encode
from .result import Attribution, Settings
from .sources import Source
from .sweep import Sweep
from .targets import Asked, Readout

BATCH_TOKENS = 1024  # of one pass, padding included; a longer prompt goes alone
_SHAP_SAMPLES = 20
_SHAP_NOISE = 0.1  # of the standard deviation of the prompt's embeddings


@dataclass(frozen=True)
class _Case:
    """One prompt and what is asked of it; the readouts are there once the model has run on it."""

    prompt: Prompt
    asked: Sequence[Asked]
    readouts: Sequence[Readout] = ()

    def generator(self, seed: int) -> torch.Generator:
        """Of its own, so that its random numbers do not depend on the prompts beside it."""
        digest = hashlib.sha256(repr((seed, self.prompt.ids)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def tokens(dp: DePass, name: str, prompts: Sequence[Any], target: Any = None, *, seed: int = 0) -> list[Attribution]:
    """Score the tokens of prompts by a baseline, several prompts in one pass; each result equals its own run's to rounding.

    =========================== =============================================================================================
    ``gradient_norm``           the norm of the logit's gradient with respect to each token's embedding
    ``input_x_gradient``        that gradient times the embedding (signed)
    ``integrated_gradients_20`` the embedding times the mean gradient along the line from zero embeddings, by the midpoint
                                rule with 20 steps (Sundararajan et al. 2017, arXiv 1703.01365); ``_50`` with 50
    ``gradient_shap``           the same at 20 random points of such lines, each to embeddings with Gaussian noise of a tenth
                                of their standard deviation (Lundberg and Lee 2017, as in captum)
    ``mean_attention``          what the target's position attends to, mean over layers and heads
    ``last_attention``          the same, of the last layer
    ``attention_rollout``       the product of ``A/2 + 1/2`` over layers, ``A`` the mean over heads (Abnar and Zuidema 2020,
                                arXiv 2005.00928)
    ``leave_one_out``           by how much the logit falls without the token: a pass of the model for each; 0 behind the
                                target's position
    ``random``                  normal numbers
    =========================== =============================================================================================

    Args:
        dp: the model.
        name: one of :data:`TOKENS`.
        prompts: each as for :meth:`DePass.attribute`.
        target: as for :meth:`DePass.attribute`, for all prompts; or a list with one for each prompt.
        seed: of ``random`` and ``gradient_shap``.

    Raises:
        OptionError: an unknown name, no prompts, or targets that are not as many as prompts.
        PromptError, TargetError: something that cannot be attributed, with the prompt's index.
        ModelError: the model drops out at random.
        NonFiniteError: the model's logits or the scores are not finite.
    """
    method = _named(name, TOKENS, "tokens")
    seed = integer("seed", seed, OptionError)
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence) or not prompts:
        raise OptionError(
            f"prompts must be a list of one or more prompts, got {type(prompts).__name__} {prompts!r:.40}"
        )
    several = isinstance(target, (list, tuple))
    if several and len(target) != len(prompts):
        raise OptionError(f"a list of targets has one for each prompt: {len(target)} targets, {len(prompts)} prompts")
    cases = []
    for index, prompt in enumerate(prompts):
        try:
            cases.append(_case(dp, prompt, target[index] if several else target))
        except DePassError as error:
            raise type(error)(f"prompt {index}: {error}") from error
    cases = _clean(dp, cases)
    found = method(dp._bound, cases, seed)
    return [_attribution(dp, name, case, scores) for case, scores in zip(cases, found, strict=True)]


def heads(dp: DePass, name: str, prompt: Any, target: Any = None, *, seed: int = 0) -> Sweep:
    """Score every attention head of the model by a baseline.

    ========================  ===============================================================================================
    ``attribution_patching``  the logit's gradient with respect to the head's output *before* the output projection, times
                              that output, summed over positions: a first-order estimate of setting it to zero
    ``output_norm``           the norm of what the head writes into the residual stream at the target's position, after the
                              output projection (its bias belongs to no head) and a post-norm where there is one
    ``random``                normal numbers
    ========================  ===============================================================================================

    Args:
        dp: the model.
        name: one of :data:`HEADS`.
        prompt: as for :meth:`DePass.attribute`.
        target: as for :meth:`DePass.attribute`.
        seed: of ``random``.

    Returns:
        Scores ``[targets, layers, heads]``, as ``dp.sweep("heads", ...)`` has them.

    Raises:
        OptionError: an unknown name.
        PromptError, TargetError, ModelError, NonFiniteError: see :func:`tokens`.
    """
    return _sweep(dp, "heads", _named(name, HEADS, "heads"), name, prompt, target, seed)


def neurons(dp: DePass, name: str, prompt: Any, target: Any = None, *, seed: int = 0) -> Sweep:
    """Score every MLP neuron of the model by a baseline.

    ============================= ==========================================================================================
    ``attribution_patching``      the logit's gradient with respect to the neuron's hidden value (the input of the down
                                  projection), times that value, summed over positions
    ``attribution_patching_last`` the same at the target's position alone
    ``activation``                the hidden value at the target's position (signed)
    ``activation_x_norm``         the same times the norm of what one unit of it writes into the residual stream: its column
                                  of the down projection, through a post-norm where there is one
    ``random``                    normal numbers
    ============================= ==========================================================================================

    Args:
        dp: the model.
        name: one of :data:`NEURONS`.
        prompt: as for :meth:`DePass.attribute`.
        target: as for :meth:`DePass.attribute`.
        seed: of ``random``.

    Returns:
        Scores ``[targets, layers, neurons]``, as ``dp.sweep("neurons", ...)`` has them.

    Raises:
        OptionError: an unknown name.
        PromptError, TargetError, ModelError, NonFiniteError: see :func:`tokens`.
    """
    return _sweep(dp, "neurons", _named(name, NEURONS, "neurons"), name, prompt, target, seed)


# --- prompts, targets, results ------------------------------------------------------------------------------------------


def _named(name: Any, table: dict[str, Any], of: str) -> Any:
    if not isinstance(name, str) or name not in table:
        raise OptionError(f"unknown baseline {name!r} of {of}; there are: {', '.join(table)}")
    return table[name]


def _case(dp: DePass, prompt: Any, target: Any) -> _Case:
    refuse_dropout(dp._bound)
    made = encode(prompt, dp.tokenizer, dp._bound)
    return _Case(made, targets.check(target, len(made.ids), range(0), dp.tokenizer, dp._bound))


@torch.no_grad()
def _clean(dp: DePass, cases: Sequence[_Case]) -> list[_Case]:
    """The cases with their readouts, from the model's own run."""
    bound = dp._bound
    done: dict[int, _Case] = {}
    for some in lockstep.batches([len(case.prompt.ids) for case in cases], BATCH_TOKENS):
        normed = _normed(bound, [cases[i].prompt.ids for i in some])  # [B, T, D]
        for row, i in zip(normed, some, strict=True):
            readouts: list[Readout] = []
            for asked in cases[i].asked:
                vector = row[asked.position]
                logits = bound.logits(vector[None])[0].to(bound.state_dtype)
                readouts += targets.fill(asked, vector.to(logits), logits, bound, dp.tokenizer)
            for readout in readouts:
                _must_be_finite(bound, readout.logit, f"the model's own logit of {readout.target.label!r}")
            done[i] = _Case(cases[i].prompt, cases[i].asked, readouts)
    return [done[i] for i in range(len(cases))]


def _attribution(dp: DePass, name: str, case: _Case, scores: Tensor) -> Attribution:
    _must_be_finite(dp._bound, float(scores.abs().max()), f"a score by {name}")
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


def _sweep(dp: DePass, kind: Kind, method: Any, name: str, prompt: Any, target: Any, seed: int) -> Sweep:
    bound, count = dp._bound, width(dp._bound, kind)
    seed = integer("seed", seed, OptionError)
    (case,) = _clean(dp, [_case(dp, prompt, target)])
    scores: Tensor = method(bound, case, seed)  # [targets, layers, C]
    _must_be_finite(bound, float(scores.abs().max()), f"a score by {name}")
    nothing = scores.new_full(scores.shape[:2], math.nan)
    return Sweep(
        scores=scores.float(),
        rest=nothing,
        bias=nothing.clone(),
        layers=tuple(range(len(bound.layers))),
        columns=tuple(range(count)),
        kind=kind,
        targets=tuple(readout.target for readout in case.readouts),
        target_logits=torch.tensor(
            [readout.logit for readout in case.readouts], dtype=torch.float64, device="cpu"
        ).float(),
        conservation_error=nothing.clone(),
        prompt=case.prompt,
        settings=_settings(dp, name),
    )


def _settings(dp: DePass, name: str) -> Settings:
    depth = len(dp._bound.layers)
    return Settings(dp.name, dtype_name(dp._bound.dtype), "none", 0.0, False, 0, depth, method=name)


def _must_be_finite(bound: BoundModel, number: float, what: str) -> None:
    if not math.isfinite(number):
        raise NonFiniteError(f"{what} is not finite ({number}); {blame(bound)}")


# --- passes of the model ------------------------------------------------------------------------------------------------


def _normed(bound: BoundModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """``[B, T, D]``, the stream after the final norm."""
    return lockstep.normed(bound, input_ids=lockstep.padded(prompts).to(bound.input_device))


@torch.no_grad()
def _embedded(bound: BoundModel, case: _Case) -> Tensor:
    """``[N, D]``"""
    embedded: Tensor = bound.model.get_input_embeddings()(torch.tensor([case.prompt.ids], device=bound.input_device))[0]
    return embedded


def _value(normed: Tensor, readout: Readout) -> Tensor:
    """The target as a function of one prompt's stream ``[T, D]``, but for a constant."""
    w = readout.w.to(normed.device)
    return normed[readout.target.position].to(w) @ w


# --- tokens: gradients --------------------------------------------------------------------------------------------------

Points = Callable[[_Case, Tensor, int], tuple[Tensor, Tensor]]


def _by_gradients(
    points: Points, samples: int, combine: Callable[[Tensor, Tensor], Tensor], bound: BoundModel, cases: Any, seed: int
) -> list[Tensor]:
    """Scores ``[targets, N]``: the mean over points of what ``combine`` makes of the gradients and of their factors.

    Args:
        points: of a case, its embeddings ``[N, D]`` and the seed: where gradients are taken and the factors of each,
            ``[samples, N, D]`` both.
        samples: how many points.
        combine: makes ``[..., N]`` of gradients and factors ``[..., N, D]``.
        bound: the model.
        cases: the prompts.
        seed: for ``points``.
    """
    found: list[Tensor] = [torch.zeros(len(case.readouts), len(case.prompt.ids), device="cpu") for case in cases]
    for some in lockstep.batches([len(case.prompt.ids) for case in cases], BATCH_TOKENS, samples):
        longest = max(len(cases[i].prompt.ids) for i in some)
        at, by = zip(*(points(cases[i], _embedded(bound, cases[i]), seed) for i in some), strict=True)
        owners = [i for i in some for _ in range(samples)]
        where, factors = (
            torch.cat([nn.functional.pad(one, (0, 0, 0, longest - one.shape[1])) for one in made]) for made in (at, by)
        )  # [B·samples, T, D]
        rows = max(1, BATCH_TOKENS // longest)
        for begin in range(0, len(owners), rows):
            here = slice(begin, begin + rows)
            gradients = _gradients(bound, where[here], [cases[i] for i in owners[here]])
            for i, of_one, factor in zip(owners[here], gradients, factors[here], strict=True):
                scores = combine(of_one.float(), factor.float()) / samples  # [targets, T]
                found[i] += scores[:, : found[i].shape[1]].cpu()
    return found


def _gradients(bound: BoundModel, embeddings: Tensor, cases: Sequence[_Case]) -> list[Tensor]:
    """``[targets, T, D]`` of each case, at embeddings ``[B, T, D]``: one pass forward, one back for each of the targets."""
    with torch.enable_grad():
        embeddings = embeddings.detach().requires_grad_()
        normed = lockstep.normed(bound, inputs_embeds=embeddings)
        most = max(len(case.readouts) for case in cases)
        made = []
        for j in range(most):
            asked = [_value(normed[b], case.readouts[j]) for b, case in enumerate(cases) if j < len(case.readouts)]
            (gradient,) = torch.autograd.grad(torch.stack(asked).sum(), embeddings, retain_graph=j + 1 < most)
            made.append(gradient)
    stacked = torch.stack(made, 1)  # [B, targets, T, D]
    return [stacked[b, : len(case.readouts)] for b, case in enumerate(cases)]


def _here(_: _Case, embedded: Tensor, __: int) -> tuple[Tensor, Tensor]:
    return embedded[None], embedded[None]


def _on_the_line(steps: int, _: _Case, embedded: Tensor, __: int) -> tuple[Tensor, Tensor]:
    """The midpoints of ``steps`` pieces of the line from zero."""
    share = (torch.arange(steps, device=embedded.device) + 0.5) / steps
    return share.to(embedded)[:, None, None] * embedded, embedded.expand(steps, -1, -1)


def _around_the_line(case: _Case, embedded: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Random points of lines from zero to embeddings with noise."""
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


# --- tokens: attention, leaving out, nothing -------------------------------------------------------------------------------


@torch.no_grad()
def _by_attention(reduce: Callable[[list[Tensor]], Tensor], bound: BoundModel, cases: Any, _: int) -> list[Tensor]:
    """Scores ``[targets, N]``: each target's row of what ``reduce`` makes of the layers' patterns ``[B, T, T]``."""
    found: dict[int, Tensor] = {}
    for some in lockstep.batches([len(case.prompt.ids) for case in cases], BATCH_TOKENS):
        patterns: list[Tensor] = []  # by layer, mean over heads

        def keep(_: int, trace: lockstep.Trace, patterns: list[Tensor] = patterns) -> None:
            assert trace.pattern is not None
            patterns.append(trace.pattern.float().mean(1).to(patterns[0].device if patterns else trace.pattern.device))

        lockstep.run(bound, [cases[i].prompt.ids for i in some], keep, range(len(bound.layers)))
        for i, reduced in zip(some, reduce(patterns).cpu(), strict=True):
            rows = [readout.target.position for readout in cases[i].readouts]
            found[i] = reduced[rows, : len(cases[i].prompt.ids)]
    return [found[i] for i in range(len(cases))]


def _mean(patterns: list[Tensor]) -> Tensor:
    return torch.stack(patterns).mean(0)


def _last(patterns: list[Tensor]) -> Tensor:
    return patterns[-1]


def _rollout(patterns: list[Tensor]) -> Tensor:
    one = torch.eye(patterns[0].shape[-1], device=patterns[0].device)
    rolled = one.expand_as(patterns[0])
    for pattern in patterns:
        rolled = (pattern + one) / 2 @ rolled
    return rolled


@torch.no_grad()
def _leave_one_out(bound: BoundModel, cases: Sequence[_Case], _: int) -> list[Tensor]:
    """Scores ``[targets, N]``; a prompt's tokens behind the target's position have none."""
    found = [torch.zeros(len(case.readouts), len(case.prompt.ids), device="cpu") for case in cases]
    without: list[tuple[int, int, int]] = []  # case, the target's position, the token that is left out
    for i, case in enumerate(cases):
        for q in sorted({readout.target.position for readout in case.readouts}):
            if q == 0:
                raise PromptError(
                    f"prompt {i}: leave_one_out of the first position leaves no token; ask at a later one"
                )
            without += [(i, q, t) for t in range(q + 1)]
    rows = [cases[i].prompt.ids[:t] + cases[i].prompt.ids[t + 1 : q + 1] for i, q, t in without]
    for some in lockstep.batches([len(row) for row in rows], BATCH_TOKENS):
        normed = _normed(bound, [rows[k] for k in some])
        for of_row, k in zip(normed, some, strict=True):
            i, q, t = without[k]
            for j, readout in enumerate(cases[i].readouts):
                if readout.target.position == q:
                    w = readout.w.to(of_row.device)
                    left = float(of_row[q - 1].to(w) @ w) + readout.constant
                    found[i][j, t] = readout.logit - left
    return found


def _random_tokens(_: BoundModel, cases: Sequence[_Case], seed: int) -> list[Tensor]:
    shapes = [(len(case.readouts), len(case.prompt.ids)) for case in cases]
    return [
        torch.randn(shape, generator=case.generator(seed), device="cpu")
        for shape, case in zip(shapes, cases, strict=True)
    ]


TOKENS: dict[str, Callable[[BoundModel, Sequence[_Case], int], list[Tensor]]] = {
    "gradient_norm": partial(_by_gradients, _here, 1, _norm),
    "input_x_gradient": partial(_by_gradients, _here, 1, _product),
    "integrated_gradients_20": partial(_by_gradients, partial(_on_the_line, 20), 20, _product),
    "integrated_gradients_50": partial(_by_gradients, partial(_on_the_line, 50), 50, _product),
    "gradient_shap": partial(_by_gradients, _around_the_line, _SHAP_SAMPLES, _product),
    "mean_attention": partial(_by_attention, _mean),
    "last_attention": partial(_by_attention, _last),
    "attention_rollout": partial(_by_attention, _rollout),
    "leave_one_out": _leave_one_out,
    "random": _random_tokens,
}


# --- heads and neurons --------------------------------------------------------------------------------------------------


def _attribution_patching(kind: Kind, last: bool, bound: BoundModel, case: _Case, _: int) -> Tensor:
    """``[targets, layers, C]``, gradient · value of the inputs of the output or down projections.

    Summed over positions, or with ``last`` at the targets' own positions alone.
    """
    inputs: list[Tensor] = []  # by layer, [1, N, C·d]

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])

    with torch.enable_grad(), lockstep.running, ExitStack() as stack:
        for layer in bound.layers:
            module = (layer.output if kind == "heads" else layer.down).module
            stack.callback(module.register_forward_pre_hook(keep).remove)
        # the graph begins at the embeddings, also where a caller has frozen the weights
        normed = lockstep.normed(bound, inputs_embeds=_embedded(bound, case)[None].requires_grad_())[0]
        made = []
        for j, readout in enumerate(case.readouts):
            more = j + 1 < len(case.readouts)
            gradients = torch.autograd.grad(_value(normed, readout), inputs, retain_graph=more)
            counted = slice(readout.target.position, readout.target.position + 1) if last else slice(None)
            parts = [
                (g.float() * x.detach().float())[0, counted].sum(0).cpu()
                for g, x in zip(gradients, inputs, strict=True)
            ]
            made.append(torch.stack([part.view(width(bound, kind), -1).sum(1) for part in parts]))
    return torch.stack(made)


@torch.no_grad()
def _at_the_target(
    read: Callable[[Layer, lockstep.Trace, list[int]], Tensor], bound: BoundModel, case: _Case, _: int
) -> Tensor:
    """``[targets, layers, C]``: what ``read`` makes, ``[targets, C]``, of each layer and its trace at given positions."""
    positions = [readout.target.position for readout in case.readouts]
    made: list[Tensor] = []

    def keep(index: int, trace: lockstep.Trace) -> None:
        made.append(read(bound.layers[index], trace, positions).cpu())

    lockstep.run(bound, [case.prompt.ids], keep, range(len(bound.layers)))
    return torch.stack(made, 1)


def _output_norm(heads: int, layer: Layer, trace: lockstep.Trace, positions: list[int]) -> Tensor:
    assert trace.mixed is not None
    mixed = trace.mixed[positions].float().view(len(positions), heads, -1)  # [targets, H, d]
    weight = into_stream(layer.output.weight, layer.attention_post_norm, torch.float32)
    weight = weight.reshape(len(weight), heads, -1)  # [D, H, d]
    sizes: Tensor = torch.linalg.vector_norm(torch.einsum("thd,ohd->tho", mixed, weight), dim=-1)
    scale = trace.scales.get("attention_post_norm")
    return sizes if scale is None else sizes * scale[positions, None]


def _activation(_: Layer, trace: lockstep.Trace, positions: list[int]) -> Tensor:
    assert trace.hidden is not None
    return trace.hidden[positions].float()


def _activation_x_norm(layer: Layer, trace: lockstep.Trace, positions: list[int]) -> Tensor:
    weight = into_stream(layer.down.weight, layer.mlp_post_norm, torch.float32)
    columns: Tensor = torch.linalg.vector_norm(weight, dim=0)  # [F]
    sizes = _activation(layer, trace, positions) * columns
    scale = trace.scales.get("mlp_post_norm")
    return sizes if scale is None else sizes * scale[positions, None]


def _output_norms(bound: BoundModel, case: _Case, seed: int) -> Tensor:
    return _at_the_target(partial(_output_norm, bound.heads), bound, case, seed)


def _random(kind: Kind, bound: BoundModel, case: _Case, seed: int) -> Tensor:
    shape = (len(case.readouts), len(bound.layers), width(bound, kind))
    return torch.randn(shape, generator=case.generator(seed), device="cpu")


HEADS: dict[str, Callable[[BoundModel, _Case, int], Tensor]] = {
    "attribution_patching": partial(_attribution_patching, "heads", False),
    "output_norm": _output_norms,
    "random": partial(_random, "heads"),
}
NEURONS: dict[str, Callable[[BoundModel, _Case, int], Tensor]] = {
    "attribution_patching": partial(_attribution_patching, "neurons", False),
    "attribution_patching_last": partial(_attribution_patching, "neurons", True),
    "activation": partial(_at_the_target, _activation),
    "activation_x_norm": partial(_at_the_target, _activation_x_norm),
    "random": partial(_random, "neurons"),
}
