"""Reading scores from a pass: the targets' logits, the score of each source, and the conservation error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConservationError, ConservationWarning, DePassError, NonFiniteError
from ..inputs import targets
from ..inputs.settings import Settings
from ..inputs.targets import Asked, Readout, Target
from ..models import capture
from ..models.bound import BoundModel
from ..models.health import blame
from ..models.weights import device_of
from ..results.attribution import Attribution
from ..results.sweep import Sweep
from .passes import Engine, Pass, without_autocast
from .request import Case, Options, Progress


def attribute(
    engine: Engine, cases: Sequence[Case], options: Options, progress: Progress | None = None
) -> list[Attribution | DePassError]:
    """Attribute cases in one forward pass; returns an error in place of the result of a case that fails."""
    with capture.running:  # also while weights are read: another thread's pass may have moved them
        done = _ProbedPass(engine, cases, options, progress)
        done.run()
        logits = logits_of(done, [case.asked for case in cases])
        results = [_result(done, i, case, logits) for i, case in enumerate(cases)]
    if engine.recordings is not None:
        engine.recordings.give_back(done.propagation)
    return results


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


def _result(done: _ProbedPass, index: int, case: Case, logits: dict[int, Tensor]) -> Attribution | DePassError:
    first, sources = done.propagation.prompt_start[index], len(case.parts.sources)
    scored: list[tuple[Target, Tensor, float]] = []  # scores [M], logit
    for j, asked in enumerate(case.asked):
        if asked.layer is not None:
            target = Target(asked.label, "probe", asked.position, layer=asked.layer, intercept=asked.intercept)
            scores, logit = done.probes[index, j]
            scored.append((target, _padded(scores, sources), logit))
            continue
        for readout in readouts_of(done, asked, first + asked.position, logits):
            scored.append((readout.target, score(done, index, index, readout, sources), readout.logit))
    rows = torch.stack([row for _, row, _ in scored])
    own = torch.tensor([logit for _, _, logit in scored], dtype=torch.float64, device="cpu")
    try:
        for target, _, logit in scored:
            must_be_finite(target, logit, done.bound)
    except NonFiniteError as error:
        return error
    if not bool(rows.isfinite().all()):
        return NonFiniteError(f"the scores are not finite; {blame(done.bound)}")
    return Attribution(
        scores=rows.float(),
        sources=case.parts.sources,
        targets=tuple(target for target, _, _ in scored),
        target_logits=own.float(),
        conservation_error=conservation_error(rows, own).float(),
        prompt=case.prompt,
        settings=settings(done, case.parts.layer, case.parts.excluded, done.propagation.served, index),
    )


def logits_of(done: Pass, asked: Sequence[Sequence[Asked]]) -> dict[int, Tensor]:
    """The head's output ``[V]`` by position of the packed prompts, for every position that a target needs."""
    starts = done.propagation.prompt_start
    wanted = sorted(
        {
            starts[i] + target.position
            for i, of_prompt in enumerate(asked)
            for target in of_prompt
            if target.layer is None
        }
    )
    return dict(zip(wanted, done.bound.logits(done.normed[wanted]), strict=True)) if wanted else {}


def readouts_of(done: Pass, asked: Asked, position: int, logits: dict[int, Tensor]) -> list[Readout]:
    """The directions and logits of a target at a position of the packed prompts."""
    at = logits[position].to(done.bound.state_dtype)
    return targets.fill(asked, done.normed[position].to(at), at, done.bound, done.engine.tokenizer)


def score(done: Pass, staircase: int, prompt: int, readout: Readout, sources: int) -> Tensor:
    """``score[m] = w · x̂_final[m, t]`` ``[sources]`` on the CPU, in the state's dtype (docs/method.md, equation 6)."""
    norm, position = done.bound.final_norm, readout.target.position
    rows = done.propagation.rows_at(staircase, position)
    w = readout.w.to(rows.device)
    folded = norm.fold(w[None].to(device_of(norm.module)))[0].to(rows.device)  # [D]
    scale = norm.scale(done.stream[done.propagation.prompt_start[prompt] + position], rows.dtype).to(rows.device)
    with without_autocast(rows.device):
        scores = (rows @ folded * scale).cpu()
    if done.bound.has_bias:
        beta = norm.beta()
        scores[0] += readout.constant + (0.0 if beta is None else float(w @ beta.to(w)))
    return _padded(scores, sources)


def _padded(scores: Tensor, sources: int) -> Tensor:
    """Append zeros for the sources that have not started."""
    return torch.cat([scores, scores.new_zeros(sources - len(scores))])


def conservation_error(scores: Tensor, logits: Tensor) -> Tensor:
    """``|Σ scores - logit| / max(|logit|, Σ |scores|)`` over the last dimension of ``scores``, in fp64."""
    total, spread = scores.double().sum(-1), scores.double().abs().sum(-1)
    size = torch.maximum(logits.abs().expand_as(spread), spread).clamp(min=torch.finfo(torch.float64).tiny)
    return (total - logits).abs() / size


def must_be_finite(target: Target, logit: float, bound: BoundModel) -> None:
    """Raise a NonFiniteError where a target's logit is NaN or infinite."""
    if not math.isfinite(logit):
        raise NonFiniteError(f"the model's own logits are not finite ({logit} for {target.label!r}); {blame(bound)}")


def judge(result: Attribution | Sweep, strict: bool, tolerance: float) -> None:
    """Warn if the model was altered, or the conservation error of a result exceeds ``tolerance``.

    Raises:
        ConservationError: with ``strict``, instead of the warning.
    """
    error, altered, dtype = float(result.conservation_error.max()), result.settings.altered, result.settings.dtype
    if altered is None and not error > tolerance:
        return
    if altered is not None:
        message = (
            f"{altered}. The scores explain the weights and not this change; they miss the logit by a relative error of "
            f"{error:.1e}. Remove it, or put its effect into the weights"
        )
    else:
        wider = "" if dtype == "float64" else "load the model in a wider dtype; "
        message = (
            f"the scores miss the logit by a relative error of {error:.1e}, but the tolerance for {dtype} is "
            f"{tolerance:.0e}; {wider}if the model's code changed after its first run, a new DePass(model) names the layer"
        )
    if strict:
        raise ConservationError(message)
    warnings.warn(message, ConservationWarning, stacklevel=4)  # past torch's decorator, to the caller


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
        padded=not done.packing.packed and len(set(done.lengths)) > 1,
    )
