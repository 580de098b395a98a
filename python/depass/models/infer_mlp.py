"""The questions that :mod:`depass.models.infer` asks about the MLP and the experts of a layer, one a function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .check import activations
from .families import GateRows
from .trial import Call, InferenceError, LayerTrial, close, difference, rounding, same


@dataclass
class MLPAnswers:
    """What the trial pass says about one layer. A layer without experts has an MLP; one with experts may have one beside.

    ``weight`` is the projection the sigmoid of whose output multiplies the output of the MLP beside the experts.
    """

    norm: Call | None
    reads: Tensor  # [P, D], what the norm or, without one, the MLP reads
    experts: Call | None
    gate: Call | None
    gate_rows: GateRows = "all"
    down: Call | None = None
    weight: Call | None = None
    post_norm: Call | None = None
    residual_factor: str | None = None


def ask(layer: LayerTrial, config: Any, of_attention: Tensor) -> MLPAnswers:
    """Answer the questions about the MLP and the experts of a layer.

    Args:
        layer: what the trial pass saw of it.
        config: of the text decoder.
        of_attention: ``[P, D]``, what the attention adds to the residual stream.

    Raises:
        InferenceError: one of them has no answer.
    """
    experts, found = layer.experts, _gate(layer)
    gate = None if found is None else found[0]
    reader = experts or gate
    if reader is None:
        raise InferenceError("no activation module of a layer reads the output of a projection")
    norm = layer.norm_before(reader)
    answers = MLPAnswers(norm, (norm or reader).read, experts, gate)
    if found is not None:
        answers.gate_rows, answers.down = found[1], _down(layer, found[0], found[2])
    _ask_of_the_sum(answers, layer, config, of_attention)
    return answers


def _gate(layer: LayerTrial) -> tuple[Call, GateRows, Call] | None:
    """Which projection's output, or its first half, does the activation function read? With the activation's own call.

    Activation functions inside the experts are left out; without others there is no answer.
    """
    experts = layer.experts
    inside = [] if experts is None else list(experts.module.modules())
    modules = [each for each in activations(layer.whole.module) if not _is_one_of(each, inside)]
    acts = [call for call in layer.calls if _is_one_of(call.module, modules)]
    found: list[tuple[Call, GateRows, Call]] = []
    for call in layer.linears:
        choices: tuple[tuple[Tensor, GateRows], ...] = ((call.written, "all"), (call.halves[0], "first_half"))
        found += [(call, rows, act) for part, rows in choices for act in acts if same(part, act.read)]
    if len(found) > 1:
        paths = " and ".join(call.path for call, _, _ in found)
        raise InferenceError(f"activation modules read the outputs of several projections of a layer, {paths}")
    return found[0] if found else None


def _is_one_of(module: nn.Module, modules: list[nn.Module]) -> bool:
    return any(module is each for each in modules)


def _down(layer: LayerTrial, gate: Call, act: Call) -> Call:
    """Which projection reads the activation's output, or its product with another projection's output?

    A norm may stand before it: it scales the hidden vector, which is frozen.
    """
    factors = [factor for call in layer.linears for factor in (call.written, call.halves[1])]
    products = [act.written * factor for factor in factors if factor.shape == act.written.shape]
    hidden = [act.written, *products]
    hidden += [norm.written for norm in layer.norms if any(same(norm.read, each) for each in hidden)]
    for call in layer.linears:
        if any(same(call.read, each) for each in hidden):
            return call
    raise InferenceError(
        f"no projection reads the activation of {gate.path}, or its product with another projection's output"
    )


# What is added to the residual stream.


def _ask_of_the_sum(answers: MLPAnswers, layer: LayerTrial, config: Any, of_attention: Tensor) -> None:
    """What of the experts' and the MLP's outputs is added to the stream, after which norm, and times which number?"""
    best, factors = rounding(layer.whole.written), []
    for added, weight in _sums(answers, layer):
        for norm in (*(norm for norm in layer.norms if close(norm.read, added)), None):
            of_mlp = added if norm is None else norm.written
            missed, name, factor = _residual_name(layer, config, of_attention, of_mlp)
            factors.append(factor)
            if missed < best:
                best = missed
                answers.post_norm, answers.weight, answers.residual_factor = norm, weight, name
    if best == rounding(layer.whole.written):
        if any(same(norm.written, layer.whole.written) for norm in layer.norms):
            raise InferenceError(
                "its layers end with a norm of the residual stream itself, not of what a sublayer adds"
            )
        raise InferenceError(
            f"what a layer adds to the stream is not what its projections write, times 1 or a number of the config "
            f"(about {factors[-1]:.3g} times)"
        )


def _sums(answers: MLPAnswers, layer: LayerTrial) -> Iterator[tuple[Tensor, Call | None]]:
    """What the experts and the MLP may add ``[P, D]``, with the projection whose sigmoid weights the MLP's output."""
    experts, down = answers.experts, answers.down
    if experts is None or down is None:
        only = experts or down
        assert only is not None
        yield only.written, None
        return
    yield experts.written + down.written, None
    for call in layer.linears:
        if call.written.shape[1] == 1:
            yield experts.written + call.written.sigmoid() * down.written, call


def _residual_name(
    layer: LayerTrial, config: Any, of_attention: Tensor, of_mlp: Tensor
) -> tuple[float, str | None, float]:
    """Which number of the config multiplies what the sublayers add to the stream? None where it is 1.

    Returns:
        the relative difference that is left with this number, its name, and the factor that fits best.
    """
    before, after = layer.whole.read.double(), layer.whole.written.double()
    added = of_attention.double() + of_mlp.double()
    factor = slope(after - before, added)
    name, number = near(config, factor, "residual")[0]
    return difference(before + number * added, after, added), name, factor


# Numbers of the config.


def numbers(config: Any) -> list[tuple[str, float]]:
    """The positive numbers of a config by name, 1 left out."""
    found = [(name, number) for name, number in vars(config).items() if isinstance(number, (int, float))]
    return [(name, float(number)) for name, number in found if type(number) is not bool and 0 < number != 1]


def near(config: Any, factor: float, word: str) -> list[tuple[str | None, float]]:
    """1 without a name and the config's numbers, the nearest to ``factor`` first; of equal ones, a name with ``word``."""
    candidates: list[tuple[str | None, float]] = [(None, 1.0), *numbers(config)]
    return sorted(candidates, key=lambda pair: (abs(pair[1] - factor), word not in (pair[0] or word)))


def slope(y: Tensor, x: Tensor) -> float:
    """The number that ``x`` is to be multiplied by to come nearest to ``y``."""
    return float((x * y).sum() / (x * x).sum())
