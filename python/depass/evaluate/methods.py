"""The methods that score tokens, by name: every rule, mixtures of rules, all baselines, and the DePass of another paper."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import baselines, rules
from ..api import DePass
from ..compat import dual_path
from ..errors import DePassError, ModelError, OptionError
from ..inputs.prompt import encode
from . import data

REFERENCE = "softmax"  # the others are compared with it
DPA = "depass_dpa"
MIXTURES = (  # softmax with a growing share of steer: 0, 1/6, 1/3, 1/2, 2/3, 5/6, 1
    "softmax", "5*softmax+1*steer", "2*softmax+1*steer", "softmax+steer", "steered", "1*softmax+5*steer", "steer",
)  # fmt: skip
METHODS = (*rules.RULES, "softmax+half", "softmax+dual_path", *baselines.TOKENS)
GROUPS = {"all": METHODS, "rules": rules.RULES, "mixtures": MIXTURES, "baselines": tuple(baselines.TOKENS)}
SLOW = ("integrated_gradients_20", "integrated_gradients_50", "gradient_shap", "leave_one_out")


@dataclass(frozen=True)
class Scores:
    """What a method says of one prompt.

    Attributes:
        tokens: ``[N]`` the tokens' scores, summed over the targets.
        missed: the conservation error, the largest of the targets; of a mixture the largest of its rules; None: the scores
            need not add up.
        seconds: the time of one prompt: that of all prompts scored together, divided by their number. A mixture takes the
            time of all its rules.
    """

    tokens: Tensor
    missed: float | None
    seconds: float


Outcome = Scores | DePassError


def named(text: str) -> tuple[str, ...]:
    """The methods that ``text`` names, separated by commas: methods, mixtures as text, or groups of :data:`GROUPS`.

    Raises:
        OptionError: there is no such method, or one is named twice.
    """
    chosen: list[str] = []
    for name in text.split(","):
        if name in GROUPS:
            chosen += [method for method in GROUPS[name] if method not in chosen]
            continue
        method = _method(name)
        if method in chosen:
            raise OptionError(f"--methods names {name!r} twice; name each method once")
        chosen.append(method)
    return tuple(chosen)


def _method(name: str) -> str:
    if name == DPA or name in baselines.TOKENS:
        return name
    try:
        return rules.read(name).name
    except OptionError as error:
        choices = ", ".join((*METHODS, DPA, *GROUPS))
        raise OptionError(
            f"--methods: unknown method {name!r}; choose from {choices}; or a mixture such as 'softmax+half'"
        ) from error


def parts(name: str) -> tuple[tuple[str, float], ...]:
    """What is scored for a method, with its share of the mean: the rules of a mixture, or the method alone."""
    if name == DPA or name in baselines.TOKENS:
        return ((name, 1.0),)
    return tuple((part.rule, part.share) for part in rules.read(name).parts)


def scored(
    dp: DePass, names: Sequence[str], prompts: Sequence[Any], targets: Sequence[Any], seed: int
) -> list[dict[str, Outcome]]:
    """For each prompt, the scores by each method, or why it has none.

    A rule that several mixtures share is scored once.

    Args:
        dp: the model. Its temperature and its ``exclude_bos`` hold for the rules that have them.
        names: names from :func:`named`.
        prompts: ids, or texts.
        targets: for each prompt its target, or a list of targets, as for :meth:`DePass.attribute`. ``depass_dpa`` takes one
            id, the next token.
        seed: the seed of the baselines that draw random numbers.
    """
    return mixed(names, lambda name: _scored(dp, name, prompts, targets, seed))


def mixed(names: Sequence[str], score: Callable[[str], Sequence[Outcome]]) -> list[dict[str, Outcome]]:
    """For each prompt, the outcomes of methods; ``score`` takes no mixtures, and is asked once for each rule or baseline."""
    singles = dict.fromkeys(single for name in names for single, _ in parts(name))
    if not singles:
        return []
    outcomes = {single: score(single) for single in singles}
    return [
        {name: _mixed([(of_prompt[single], share) for single, share in parts(name)]) for name in names}
        for of_prompt in (dict(zip(outcomes, each, strict=True)) for each in zip(*outcomes.values(), strict=True))
    ]


def refused(dp: DePass, names: Sequence[str], seed: int) -> dict[str, str]:
    """The methods that cannot score this model, with the reasons. Each method is tried on a short prompt.

    Other errors than those of the model or of an option, such as a lack of memory, are left to the run.
    """
    pair = data.short_prompt(dp)

    def tried(name: str) -> list[Outcome]:
        try:
            return _scored(dp, name, [list(pair.ids)], [pair.answer[0]], seed)
        except DePassError as error:
            return [error]

    return {
        name: str(each)
        for outcomes in mixed(names, tried)
        for name, each in outcomes.items()
        if isinstance(each, (ModelError, OptionError))
    }


def by_rule(dp: DePass, prompts: Sequence[Any], targets: Sequence[Any], **options: Any) -> list[Outcome]:
    """Scores by one rule; ``options`` go to :meth:`DePass.attribute_many`."""
    began = time.perf_counter()
    results = list(dp.attribute_many(prompts, targets=targets, errors="return", **options))
    seconds = (time.perf_counter() - began) / len(prompts)
    return [result if isinstance(result, DePassError) else _scores(result, seconds) for result in results]


def _scored(dp: DePass, name: str, prompts: Sequence[Any], targets: Sequence[Any], seed: int) -> list[Outcome]:
    if name in baselines.TOKENS:
        return _timed(partial(_by_baseline, dp, name, seed), prompts, targets)
    if name == DPA:
        return [outcome for prompt, target in zip(prompts, targets, strict=True)
                for outcome in _timed(partial(_by_dpa, dp), [prompt], [target])]  # fmt: skip
    return by_rule(dp, prompts, targets, rule=name)


def _timed(score: Any, prompts: Sequence[Any], targets: Sequence[Any]) -> list[Outcome]:
    """Scores of prompts together; where one of them has none, of each alone."""
    began = time.perf_counter()
    try:
        results = score(prompts, targets)
    except DePassError as error:
        if len(prompts) == 1:
            return [error]
        return [outcome for prompt, target in zip(prompts, targets, strict=True)
                for outcome in _timed(score, [prompt], [target])]  # fmt: skip
    seconds = (time.perf_counter() - began) / len(prompts)
    return [Scores(tokens, missed, seconds) for tokens, missed in results]


def _by_baseline(
    dp: DePass, name: str, seed: int, prompts: Sequence[Any], targets: Sequence[Any]
) -> list[tuple[Tensor, float | None]]:
    results = baselines.tokens(dp, name, prompts, list(targets), seed=seed)
    return [(result.scores.sum(0), None) for result in results]


def _by_dpa(dp: DePass, prompts: Sequence[Any], targets: Sequence[Any]) -> list[tuple[Tensor, float | None]]:
    (prompt,), (target,) = prompts, targets
    if not isinstance(target, int):
        raise OptionError(f"{DPA} scores one next token, given as an id, got the target {target!r}; leave {DPA} out")
    encoded = encode(prompt, dp.tokenizer, dp.bound)
    result = dual_path.token_scores(
        dp.bound, [encoded.ids], [target], [range(int(0 in encoded.special), len(encoded.ids))]
    )
    return [(result[0].scores, result[0].conservation_error)]


def _scores(result: Any, seconds: float) -> Scores:
    tokens = [i for i, source in enumerate(result.sources) if source.kind == "token"]
    error = float(result.conservation_error.max())
    return Scores(result.scores[:, tokens].sum(0), error if math.isfinite(error) else None, seconds)


def _mixed(outcomes: Sequence[tuple[Outcome, float]]) -> Outcome:
    """The mean of scores, weighted by their shares; the first error if there is one."""
    scores = []
    for outcome, _ in outcomes:
        if isinstance(outcome, DePassError):
            return outcome
        scores.append(outcome)
    errors = [each.missed for each in scores if each.missed is not None]
    tokens = torch.stack([each.tokens * share for each, (_, share) in zip(scores, outcomes, strict=True)]).sum(0)
    return Scores(tokens, max(errors, default=None), sum(each.seconds for each in scores))


def costs(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A method's time in plain passes of the model, for each prompt that it scored."""
    return [row["seconds"][name] / row["plain_seconds"] for row in rows if name in row["seconds"]]
