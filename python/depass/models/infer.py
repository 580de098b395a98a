"""Infers the family of a model whose type is not in the list, from one trial pass of five tokens.

:func:`infer` asks of the trial pass which tensor is which other (:mod:`depass.models.trial`). The questions about attention
are in :mod:`depass.models.infer_attention`, those about MLP and experts in :mod:`depass.models.infer_mlp`; they are asked of
the first layer with experts and the first one without. :func:`compare` then checks every layer as the first run of a model
does. A family is accepted only where both find no fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from . import infer_attention, infer_mlp
from .bound import BoundModel, Norm, epsilon_of
from .capture import Check
from .check import first_miss, last_differences, limit
from .families import Family, NormKind, RecurrenceKind
from .infer_attention import AttentionAnswers
from .infer_mlp import MLPAnswers, near, numbers, slope
from .paths import has, module_paths
from .trial import (
    Call,
    InferenceError,
    LayerTrial,
    Trial,
    difference,
    failures,
    layers_of,
    rounding,
    same,
    tokens,
    tried,
)

__all__ = ["InferenceError", "compare", "infer", "known_layers"]

_EPSILONS = (1e-5, 1e-6, 1e-12)  # of norms that hold none, besides the config's


def infer(model: Any) -> Family:
    """The family of a model of transformers, from one trial pass.

    Raises:
        InferenceError: one of the questions has no answer.
    """
    trial = tried(model)
    if trial.mixing is None:
        alone = "" if trial.recurrence is None else f" alone, and each has a recurrence ({trial.recurrence[0]})"
        raise InferenceError(f"none of its layers has attention{alone}")
    attention = infer_attention.ask(trial.mixing, trial.config)
    path, computes = trial.recurrence or (None, "delta_rule")
    answers = [infer_mlp.ask(layer, trial.config, _added(layer, attention, path)) for layer in trial.each]
    one = _agreeing(answers)
    final_norm, head = _end(trial)
    norms = [attention.attention_norm, one.norm, attention.attention_post_norm, one.post_norm, final_norm]
    norms += [attention.latent_norm, attention.mix_norm]
    kind, epsilon = _norm_kind(trial, [norm for norm in norms if norm is not None])
    logit_factor, logit_divisor = _logit_names(trial, head)
    first = answers[0]
    family = Family(
        backbone=trial.backbone,
        layers=trial.layers,
        final_norm=final_norm.path,
        attention=attention.attention,
        value=attention.value.path,
        output=attention.output.path,
        attention_norm=_path(attention.attention_norm),
        mlp_norm=_path(one.norm),
        attention_post_norm=_path(attention.attention_post_norm),
        mlp_post_norm=_path(one.post_norm),
        norm=kind,
        epsilon=epsilon,
        value_rows=attention.value_rows,
        latent=_path(attention.latent),
        latent_norm=_path(attention.latent_norm),
        mix_gate=_path(attention.mix_gate),
        mix_gate_rows=attention.mix_gate_rows,
        mix_norm=_path(attention.mix_norm),
        sinks=attention.sinks,
        parallel=same(first.reads, trial.each[0].whole.read),
        recurrence=path,
        recurrence_kind=cast(RecurrenceKind, computes),
        residual_factor=one.residual_factor,
        logit_factor=logit_factor,
        logit_divisor=logit_divisor,
        **_paths_of_mlps(answers),
    )
    _compare_modules(model, trial, family)
    return family


def _added(layer: LayerTrial, attention: AttentionAnswers, recurrence: str | None) -> Tensor:
    """What the attention of a layer, or its recurrence, adds to the residual stream, ``[P, D]``."""
    written_by = attention.attention_post_norm or attention.output
    is_recurrent = recurrence is not None and not any(call.path == attention.output.path for call in layer.calls)
    if is_recurrent and written_by is attention.output:
        return layer.at(f"{recurrence}.out_proj").written
    return layer.at(written_by.path).written


def _agreeing(answers: Sequence[MLPAnswers]) -> MLPAnswers:
    """The answers of the last layer, if those of the others about norms and factors are the same.

    Raises:
        InferenceError: they differ.
    """
    said = [(_path(each.norm), _path(each.post_norm), each.residual_factor) for each in answers]
    if len(set(said)) > 1:
        raise InferenceError(
            "its layers with experts and those without have other norms around the MLP or another factor behind it: "
            f"{_said(said[0])} and {_said(said[1])}"
        )
    rows = {each.gate_rows for each in answers if each.gate is not None}
    if len(rows) > 1:
        raise InferenceError("its layers with experts and those without take other rows of a projection for the gate")
    return answers[-1]


def _said(names: tuple[str | None, ...]) -> str:
    return ", ".join(name for name in names if name is not None) or "none"


def _paths_of_mlps(answers: Sequence[MLPAnswers]) -> dict[str, Any]:
    """The fields of a family that say where MLPs and experts are."""
    found: dict[str, Any] = {}
    for each in answers:
        if each.gate is not None:
            found["gate_rows"] = each.gate_rows
        if each.experts is None:
            found |= {"gate": _path(each.gate), "down": _path(each.down)}
        else:
            found |= {"experts": each.experts.path, "shared_weight": _path(each.weight)}
            found |= {"shared_gate": _path(each.gate), "shared_down": _path(each.down)}
    return found


def compare(bound: BoundModel) -> None:
    """Compare an inferred family with every layer, the final norm and the head, at every position of the trial's tokens.

    Raises:
        InferenceError: the model computes something else.
    """
    with torch.no_grad(), failures():
        _Comparison(bound, [tokens(bound.model)], range(len(bound.layers))).run()
    bound.checked.clear()  # the first run compares again


def _compare_modules(model: Any, trial: Trial, family: Family) -> None:
    """Does every layer have the modules that were found in the first one of its kind?"""
    for index, layer in enumerate(layers_of(model, trial.config)[1]):
        for path in module_paths(layer, family).values():
            if not has(layer, path):
                raise InferenceError(f"layer {index} lacks {path}, which the first layer of its kind has")


def known_layers(model: Any) -> list[nn.Module]:
    """The layers of a model; none where no list of modules has as many as its config says."""
    try:
        return list(layers_of(model, model.config.get_text_config())[1])
    except InferenceError:
        return []


class _Comparison(Check):
    """A pass that compares all positions and lets nothing pass, hooks or not."""

    def checked_positions(self) -> Tensor:
        return torch.arange(sum(self.lengths), device="cpu")

    def check_the_end(self) -> None:
        found = last_differences(self.bound, self.stream, self.normed)
        self.judge(len(self.bound.layers), found, limit(self.bound.layers[-1], self.stream, self.normed))

    def judge(self, index: int, found: dict[str, Tensor], allowed: float) -> None:
        where = f"layer {index}" if index < len(self.bound.layers) else "the model"
        largest = {step: float(each.max()) for step, each in found.items()}
        if not all(bool(each.isfinite().all()) for each in found.values()):
            raise InferenceError(f"{where} computes numbers that are not finite")
        miss = first_miss(largest, allowed)
        if miss is not None:
            raise InferenceError(f"{where}: {miss.said(self.bound, index)}")


# The questions about norms, the end of the model and its factors.


def _end(trial: Trial) -> tuple[Call, Call]:
    """Which norm's output does the head read? With the head's own call."""
    if not trial.head:
        raise InferenceError("its head did not run")
    for call in trial.outside:
        if same(call.written, trial.head[0].read):
            return call, trial.head[0]
    raise InferenceError("no norm's output is what the head reads; other modules stand between them")


def _norm_kind(trial: Trial, norms: Sequence[Call]) -> tuple[NormKind, float | None]:
    """Which formula do the norms compute? With the epsilon, where their modules hold none.

    Each norm gets vectors with a mean, which a LayerNorm subtracts, and so small that epsilon counts.
    """
    missing = any(epsilon_of(norm.module, None) is None for norm in norms)
    own = [number for name, number in numbers(trial.config) if "eps" in name]
    epsilons = [*own, *_EPSILONS] if missing else [None]
    pairs = [(kind, epsilon) for kind in get_args(NormKind) for epsilon in epsilons]
    with torch.no_grad(), failures():
        worst = [max(_norm_difference(norm, kind, epsilon) for norm in norms) for kind, epsilon in pairs]
    best = min(range(len(pairs)), key=worst.__getitem__)
    if worst[best] > rounding(norms[0].written):
        names = ", ".join(dict.fromkeys(type(norm.module).__name__ for norm in norms))
        raise InferenceError(f"its norms ({names}) are not all of one known kind")
    return pairs[best]


def _norm_difference(norm: Call, kind: NormKind, epsilon: float | None) -> float:
    """The relative difference between a norm's output and that of a formula."""
    if kind.endswith("plus_one") and getattr(norm.module, "weight", None) is None:
        return torch.inf
    width = norm.read.shape[1]
    x = torch.stack([torch.linspace(-1, 3, width), torch.linspace(2, 1, width).square() - 1])
    x = (0.003 * x).to(norm.read)
    formula = Norm(norm.module, kind, epsilon)
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    normed = formula.of_parts(wide, formula.scale(wide, wide.dtype)[:, None])
    beta = formula.beta()
    normed = normed if beta is None else normed + beta.to(normed)
    return difference(normed, norm.module(x))


def _logit_names(trial: Trial, head: Call) -> tuple[str | None, str | None]:
    """Which number of the config multiplies the head's output, and which one divides it? None where it is 1."""
    assert trial.logits is not None
    logits, written = trial.logits.double(), head.written.double()
    cap = getattr(trial.config, "final_logit_softcapping", None)
    if cap is not None:  # undone where it did not round the logits away
        inside = logits.abs() < cap / 2
        logits, written = cap * torch.atanh(logits / cap)[inside], written[inside]
    if logits.shape == written.shape and logits.numel():
        factor = slope(logits, written)
        for is_divisor, wanted in ((False, factor), (True, 1 / factor if factor else 0.0)):
            for name, number in near(trial.config, wanted, "logit"):
                expected = written / number if is_divisor else written * number
                if difference(expected.flatten(), logits.flatten()) < rounding(head.written):
                    return (None, name) if is_divisor else (name, None)
    raise InferenceError("the logits are not the head's output, times 1 or a number of the config or divided by one")


def _path(call: Call | None) -> str | None:
    return None if call is None else call.path
