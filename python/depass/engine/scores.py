"""Reading scores from a pass: the targets' logits, the score of each source, and the conservation error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConservationError, ConservationWarning, NonFiniteError, warn
from ..inputs import targets
from ..inputs.settings import Settings
from ..inputs.targets import Asked, Readout, Sum, Target
from ..models import attention
from ..models.bound import BoundModel
from ..models.health import blame
from ..results.attribution import Attribution
from ..results.common import conservation_error
from ..results.survey import Survey
from ..results.sweep import Sweep
from ..sources.source import Source
from .passes import Engine, Pass, without_autocast
from .request import Case, Options, Progress


@dataclass(frozen=True)
class Scored:
    """What an engine found for one case.

    Attributes:
        targets: the ``T`` targets.
        logits: ``[T]`` fp64 on the CPU, the model's own logits.
        rows: one tensor, the scores ``[T, M]`` of the case's sources, on the CPU in the state's dtype.
        balance: ``[T]``, the score of the source that balances the sum; see :attr:`depass.rules.PathWeights.balance`.
        settings: the settings of the pass.
    """

    targets: tuple[Target, ...]
    logits: Tensor
    rows: list[Tensor]
    balance: Tensor
    settings: Settings


def scored(engine: Engine, cases: Sequence[Case], options: Options, progress: Progress | None = None) -> list[Scored]:
    """Score cases in one forward pass."""
    with attention.running:  # also while weights are read: another thread's pass may have moved them
        done = _ProbedPass(engine, cases, options, progress)
        done.run()
        readouts = readouts_in(done, [case.asked for case in cases])
        rows = scores_of(done, [[each for some in of_case for each in some] for of_case in readouts],
                         [len(case.parts.sources) for case in cases])  # fmt: skip
        found = [_scored(done, i, case, readouts[i], rows[i]) for i, case in enumerate(cases)]
    if engine.recordings is not None:
        engine.recordings.give_back(done.propagation)
    return found


class _ProbedPass(Pass):
    """A pass over cases, which reads the probes of inner layers."""

    def __init__(self, engine: Engine, cases: Sequence[Case], options: Options, progress: Progress | None) -> None:
        joining = [(case.parts, i) for i, case in enumerate(cases)]
        read = [[asked.position for asked in case.asked] for case in cases]
        super().__init__(engine, [case.prompt for case in cases], joining, options, progress, read, recorded=True)
        self.cases = cases
        self.probes: dict[tuple[int, int], tuple[Tensor, float]] = {}  # by case and target: scores [M], logit

    def state(self, layer: int, stream: Tensor) -> None:
        """Read the probes of a layer from the raw residual stream: ``score[m] = w · X[m, t]`` and ``w · x[t]``."""
        for i, case in enumerate(self.cases):
            for j, asked in enumerate(case.asked):
                if asked.layer == layer:
                    assert asked.w is not None
                    rows = self.propagation.rows_at(i, asked.position)
                    w = asked.w.to(rows)
                    own = stream[self.propagation.prompt_start[i] + asked.position].to(rows)
                    self.probes[i, j] = (rows @ w).cpu(), float(own @ w)


def _scored(done: _ProbedPass, index: int, case: Case, readouts: Sequence[Sequence[Readout]], rows: Tensor) -> Scored:
    found: list[tuple[Target, Tensor, float]] = []  # scores [M], logit
    rows_of_readouts = iter(rows)
    for j, (asked, of_target) in enumerate(zip(case.asked, readouts, strict=True)):
        if asked.layer is not None:
            target = Target(asked.label, "probe", asked.position, layer=asked.layer, intercept=asked.intercept)
            scores, logit = done.probes[index, j]
            found.append((target, _padded(scores, len(case.parts.sources)), logit))
        found += [(readout.target, next(rows_of_readouts), readout.logit) for readout in of_target]
    targets = tuple(target for target, _, _ in found)
    logits = torch.tensor([logit for _, _, logit in found], dtype=torch.float64, device="cpu")
    scores = torch.stack([row for _, row, _ in found])
    if case.sums:
        targets = tuple(each.of(targets) for each in case.sums)
        logits, scores = (_summed(values, case.sums) for values in (logits, scores))
    return Scored(
        targets=targets,
        logits=logits,
        rows=[scores],
        balance=rows.new_zeros(len(targets)),
        settings=settings(done, case.parts.layer, case.parts.excluded, done.propagation.served, index),
    )


def _summed(values: Tensor, sums: Sequence[Sum]) -> Tensor:
    """The sums over ranges of the first dimension."""
    return torch.stack([values[each.begin : each.end].sum(0) for each in sums])


def attribution(case: Case, scored: Scored, bound: BoundModel) -> Attribution | NonFiniteError:
    """The result of a case; an error if a number is not finite."""
    (scores,), sources, balance = scored.rows, case.parts.sources, scored.settings.balance
    if balance is not None:
        scores, sources = torch.cat([scores, scored.balance[:, None]], 1), (*sources, Source(balance, balance))
    try:
        for target, logit in zip(scored.targets, scored.logits.tolist(), strict=True):
            must_be_finite(target, logit, bound)
    except NonFiniteError as error:
        return error
    if not bool(scores.isfinite().all()):
        return NonFiniteError(f"the scores are not finite; {blame(bound)}")
    return Attribution(
        scores=scores.float(),
        sources=sources,
        targets=scored.targets,
        target_logits=scored.logits.float(),
        conservation_error=conservation_error(scores, scored.logits).float(),
        prompt=case.prompt,
        settings=scored.settings,
    )


def readouts_of(
    asked: Sequence[Sequence[Asked]], normed: Tensor, starts: Sequence[int], bound: BoundModel, tokenizer: Any
) -> list[list[list[Readout]]]:
    """The directions and the model's own logits by prompt and target; a probe has none. The head runs once.

    Args:
        asked: the targets of each prompt.
        normed: ``[P, D]``, the residual stream of all prompts after the final norm.
        starts: each prompt's first position in it.
        bound: the model.
        tokenizer: the tokenizer for labels; may be None.
    """
    flat = [(starts[i] + each.position, each) for i, of_prompt in enumerate(asked) for each in of_prompt
            if each.layer is None]  # fmt: skip
    filled: Iterator[list[Readout]] = iter(())
    if flat:
        positions = sorted({position for position, _ in flat})
        vectors, row_of = normed[positions], {position: row for row, position in enumerate(positions)}
        logits, rows = bound.logits(vectors).to(bound.state_dtype), [row_of[position] for position, _ in flat]
        own = vectors.to(logits)[rows]
        filled = iter(targets.fill([each for _, each in flat], own, logits[rows], bound, tokenizer))
    return [[next(filled) if each.layer is None else [] for each in of_prompt] for of_prompt in asked]


def readouts_in(done: Pass, asked: Sequence[Sequence[Asked]]) -> list[list[list[Readout]]]:
    """:func:`readouts_of` a pass, after :meth:`Pass.run`."""
    return readouts_of(asked, done.normed, done.propagation.prompt_start, done.bound, done.engine.tokenizer)


def scores_of(done: Pass, readouts: Sequence[Sequence[Readout]], sources: Sequence[int]) -> list[Tensor]:
    """``score[m] = w · x̂_final[m, t]`` of every decomposition of a pass (docs/method.md, equation 7).

    Args:
        done: the pass, after :meth:`Pass.run`.
        readouts: the readouts of each prompt.
        sources: the number of sources of each decomposition, in the order in which they joined.

    Returns:
        Of each decomposition ``[readouts, sources]`` on the CPU, in the state's dtype; copied from the device together.
    """
    prompts = [prompt for _, prompt in done.joining]
    scores = [torch.zeros(len(readouts[prompt]), count, dtype=done.bound.state_dtype, device="cpu")
              for prompt, count in zip(prompts, sources, strict=True)]  # fmt: skip
    groups = [_Group(prompt, position, tuple(numbers))
              for prompt, of_prompt in enumerate(readouts)
              for position, numbers in _by_position(of_prompt).items()]  # fmt: skip
    if not groups:
        return scores
    w, constant = _through_the_norm(done, readouts, groups)
    firsts = [0, *itertools.accumulate(len(group.numbers) for group in groups)]
    products = [constant]
    into: list[tuple[int, _Group, int]] = []  # of each product: its decomposition, group and sources
    with without_autocast(w.device):
        for staircase, prompt in enumerate(prompts):
            for group, first in zip(groups, firsts, strict=False):
                if group.prompt == prompt:
                    rows = done.propagation.rows_at(staircase, group.position)  # [sources there, D]
                    products.append((w[first : first + len(group.numbers)] @ rows.T).flatten())
                    into.append((staircase, group, len(rows)))
        copied = torch.split(torch.cat(products).cpu(), [len(product) for product in products])
    constants = dict(zip(groups, torch.split(copied[0], [len(group.numbers) for group in groups]), strict=True))
    for (staircase, group, count), product in zip(into, copied[1:], strict=True):
        scores[staircase][list(group.numbers), :count] = product.view(-1, count)
        if done.bound.has_bias:
            scores[staircase][list(group.numbers), 0] += constants[group]
    return scores


class _Group(NamedTuple):
    """The readouts of a prompt at one position."""

    prompt: int
    position: int
    numbers: tuple[int, ...]  # among the prompt's


def _by_position(readouts: Sequence[Readout]) -> dict[int, list[int]]:
    numbers: dict[int, list[int]] = {}
    for number, readout in enumerate(readouts):
        numbers.setdefault(readout.target.position, []).append(number)
    return numbers


def _through_the_norm(
    done: Pass, readouts: Sequence[Sequence[Readout]], groups: Sequence[_Group]
) -> tuple[Tensor, Tensor]:
    """The directions ``[T, D]`` before the final norm, its scale included, and the constants ``[T]`` of the bias source."""
    norm, starts, device = done.bound.final_norm, done.propagation.prompt_start, done.propagation.state.device
    flat = [readouts[group.prompt][number] for group in groups for number in group.numbers]
    positions = [starts[group.prompt] + group.position for group in groups for _ in group.numbers]
    w = torch.stack([readout.w for readout in flat]).to(done.bound.final_device)
    scale = norm.scale(done.stream[positions], w.dtype)
    constant = torch.tensor([readout.constant for readout in flat], dtype=w.dtype, device=w.device)
    beta = norm.beta()
    if beta is not None:
        constant = constant + w @ beta.to(w)
    return norm.fold(w).to(device) * scale.to(device)[:, None], constant.to(device)


def _padded(scores: Tensor, sources: int) -> Tensor:
    """Append zeros for the sources that have not started."""
    return torch.cat([scores, scores.new_zeros(sources - len(scores))])


def must_be_finite(target: Target, logit: float, bound: BoundModel) -> None:
    """Raise a NonFiniteError where a target's logit is NaN or infinite."""
    if not math.isfinite(logit):
        raise NonFiniteError(f"the model's own logits are not finite ({logit} for {target.label!r}); {blame(bound)}")


def judge(result: Attribution | Sweep | Survey, strict: bool, tolerance: float) -> None:
    """Warn if the model was altered, or the conservation error of a result exceeds ``tolerance``.

    Raises:
        ConservationError: with ``strict``, instead of the warning.
    """
    error, altered, dtype = float(result.conservation_error.max()), result.settings.altered, result.settings.dtype
    if altered is None and not error > tolerance:
        return
    if altered is not None:
        explained = {"backward": "go through this change", "forward": "explain the weights and not this change"}
        mixed = "go through this change under the linear rules of the mixture, and explain the weights under the others"
        message = (
            f"{altered}. The scores {explained.get(result.settings.engine, mixed)}; "
            f"they miss the logit by a relative error of {error:.1e}. Remove it, or put its effect into the weights"
        )
    else:
        wider = "" if dtype == "float64" else "load the model in a wider dtype; "
        message = (
            f"the scores miss the logit by a relative error of {error:.1e}, but the tolerance for {dtype} is "
            f"{tolerance:.0e}; {wider}if the model's code changed after its first run, a new DePass(model) names the layer"
        )
    if strict:
        raise ConservationError(message)
    warn(message, ConservationWarning)


def settings(done: Pass, start: int, excluded: bool, served: dict[str, set[str]], prompt: int = 0) -> Settings:
    """The settings of a pass, as the result of one of its prompts records them."""
    options = done.options
    return Settings(
        model=done.engine.name,
        dtype=done.dtype,
        rule=options.sharing.rule,
        temperature=options.sharing.temperature,
        exclude_bos=excluded,
        start_layer=start,
        stop_layer=options.stop,
        backends={op: "+".join(sorted(names)) for op, names in sorted(served.items())},
        altered=done.altered.get(prompt),
        family=done.engine.bound.origin,
        of=options.of,
        padded=not done.packing.packed and len(set(done.lengths)) > 1,
    )
