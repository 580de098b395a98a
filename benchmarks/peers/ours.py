"""This package: the rules that are timed, and the methods that other tools' scores are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .common import Loaded, Method

PINS: tuple[str, ...] = ()
_LOGIT = "the target's logit"
METHODS = {"softmax": Method(_LOGIT), "half": Method(_LOGIT), "dual_path": Method(_LOGIT)}


def load(folder: str) -> Loaded:
    from depass import DePass

    return Loaded(DePass.from_pretrained(folder).model)


def scores(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> Tensor:
    """The scores of a rule, of a baseline, or of the published code as this package reproduces it.

    ``[N]``; or ``[N + 1]`` under dual_path, which leaves a part of the logit unassigned.
    """
    from depass import DePass, baselines

    dp = loaded.wrapper("depass", lambda: DePass(loaded.model))
    if method == "published":
        return _published(loaded.model, ids, target)
    if method in METHODS:
        return dp.attribute(ids, target, rule=method).scores[0]
    return baselines.tokens(dp, method, [ids], target)[0].scores[0]


def _published(model: Any, ids: Sequence[int], target: int) -> Tensor:
    from depass.compat.official import decomposed_state_manager

    manager = decomposed_state_manager(model, None, reproduce_published=True)
    state, _ = manager.get_last_layer_decomposed_state(ids)
    return manager.compute_attribute_score(state, -1, target)


def explained(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> float | None:
    from .common import logits

    return float(logits(loaded.model, ids)[target])
