"""The options and prompts of a pass, checked before the model runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from depass_kernels.names import NAMES

from .. import rules
from ..checks import Of, check_of, integer, integers
from ..errors import ModelError, OptionError
from ..inputs.prompt import Prompt, encode
from ..inputs.targets import Asked, Sum, check
from ..models.alterations import alterations
from ..models.bound import BoundModel, Layer
from ..models.linearised import refuse
from ..propagation.sharing import MLPSharing
from ..results.sweep import SweepKind
from ..rules import FORWARD, AnyRule, PathWeights
from ..sources.components import Heads, Modules, Neurons, RoutedExperts, refuse_absent
from ..sources.decompose import COMPONENTS, check_kind, decompose_components
from ..sources.parts import check_layer
from ..sources.source import Decomposition
from ..sources.spans import decompose_prompt
from .routing import chosen_experts

Progress = Callable[[int, int], None]
Exclude = bool | Literal["auto"]


@dataclass(frozen=True)
class Defaults:
    """The options of calls that leave them out; see :class:`depass.DePass`.

    Raises:
        OptionError: an option has an invalid value.
    """

    rule: AnyRule = "softmax"
    temperature: float = 0.1
    exclude_bos: Exclude = "auto"
    backend: str = "auto"
    engine: str = "auto"

    def __post_init__(self) -> None:
        rules.read(self.rule)
        _check_temperature(self.temperature)
        if self.backend not in NAMES:
            raise OptionError(f"unknown backend {self.backend!r}; choose one of: {', '.join(NAMES)}")
        if self.engine not in ("auto", "forward"):
            raise OptionError(f"engine must be 'auto' or 'forward', got {self.engine!r}")
        _check_exclude(self.exclude_bos)


@dataclass(frozen=True)
class Options:
    """The options of a pass.

    Attributes:
        start: the layer whose input is decomposed.
        stop: one past the last layer.
        sharing: the rule that shares MLP outputs among the sources; its name is that of the mixture, if there is one.
        exclude: whether the first token is excluded from the MLPs of later positions.
        paths: how gradients flow, where a backward pass scores the sources; None where a decomposed state does.
        mixture: the options of the rules whose scores are averaged, with their shares; empty for a single rule.
        of: what is explained of a token; see :func:`depass.inputs.targets.check`.
    """

    start: int
    stop: int
    sharing: MLPSharing
    exclude: Exclude
    paths: PathWeights | None = None
    mixture: tuple[tuple[float, Options], ...] = ()
    of: Of = "logit"

    @property
    def rules(self) -> tuple[tuple[float, Options], ...]:
        """The options of every rule of a mixture with its share, or these options alone."""
        return self.mixture or ((1.0, self),)


@dataclass(frozen=True)
class Case:
    """A prompt, its decomposition and its targets, all checked.

    Attributes:
        prompt, parts, asked: these.
        answer: the answer whose tokens the targets are, or None.
        sums: the sums of targets that are scored in their place; empty: the targets themselves.
    """

    prompt: Prompt
    parts: Decomposition
    asked: tuple[Asked, ...]
    answer: Prompt | None = None
    sums: tuple[Sum, ...] = ()


def options(
    defaults: Defaults,
    bound: BoundModel,
    start_layer: int = 0,
    stop_layer: int | None = None,
    rule: AnyRule | None = None,
    temperature: float | None = None,
    exclude_bos: Exclude | None = None,
    of: str = "logit",
) -> Options:
    """The options of a call; None means the default.

    Raises:
        OptionError: a layer is out of range, or an option has an invalid value.
    """
    depth = len(bound.layers)
    start = integer("start_layer", start_layer, OptionError)
    stop = depth if stop_layer is None else integer("stop_layer", stop_layer, OptionError)
    if not 0 <= start < stop <= depth:
        raise OptionError(
            f"start_layer={start}, stop_layer={stop}: need 0 <= start_layer < stop_layer <= {depth}, the number of layers "
            f"of {bound.name}"
        )
    explained = check_of(of)
    exclude = _check_exclude(defaults.exclude_bos if exclude_bos is None else exclude_bos)
    degree = _check_temperature(defaults.temperature if temperature is None else temperature)
    chosen = rules.read(defaults.rule if rule is None else rule)
    singles = []
    for part in chosen.parts:
        paths = part.paths if _is_linear(part, defaults.engine, bound) else None
        sharing = MLPSharing(part.rule, degree, defaults.backend)
        excludes = exclude if paths is None else False
        singles.append((part.share, Options(start, stop, sharing, excludes, paths, of=explained)))
    of_mixture = next((one.exclude for _, one in singles if one.paths is None), None)
    if of_mixture is None and exclude is True and (exclude_bos is True or rule is None):
        raise OptionError(
            f"exclude_bos=True has no effect under rule={chosen.name!r}, where sources do not compete for a neuron; leave "
            "it out"
        )
    if len(singles) == 1:
        return singles[0][1]
    sharing = MLPSharing(chosen.name, degree, defaults.backend)
    return Options(start, stop, sharing, of_mixture or False, None, tuple(singles), explained)


def linear_options(defaults: Defaults, bound: BoundModel, rule: AnyRule | None, of: str = "logit") -> Options:
    """The options of a call that only a backward pass serves, over all layers.

    Args:
        defaults: the options of calls that leave them out.
        bound: the model.
        rule: a linear rule; None means the default rule if it is one, else ``half``.
        of: what is explained of a token.

    Raises:
        OptionError: it is no single linear rule, or the forward engine was asked for.
    """
    if defaults.engine == "forward":
        raise OptionError("engine='forward' has no surveys; leave engine out")
    chosen = rules.read(defaults.rule if rule is None else rule)
    is_linear = len(chosen.parts) == 1 and chosen.parts[0].paths is not None
    if rule is None and not is_linear:
        chosen = rules.read("half")
    elif not is_linear:
        raise OptionError(
            f"a survey takes one linear rule and no mixture, got rule={chosen.name!r}; choose one of: "
            f"{', '.join(rules.LINEAR)}, or PathWeights"
        )
    sharing = MLPSharing(chosen.name, float(defaults.temperature), defaults.backend)
    return Options(0, len(bound.layers), sharing, False, chosen.parts[0].paths, of=check_of(of))


def _is_linear(part: rules.Part, engine: str, bound: BoundModel) -> bool:
    """Whether a backward pass serves a rule; ``taylor`` stays with the forward engine where the model takes no gradients.

    It also does under hooks: a gradient would go through what they change, and the scores explain the weights.

    Raises:
        OptionError: the forward engine was asked for, which does not have the rule.
        ModelError: the rule needs the backward engine, and the model takes no gradients.
    """
    if part.paths is None:
        return False
    has_both = part.rule in FORWARD
    if engine == "forward":
        if not has_both:
            raise OptionError(
                f"engine='forward' does not have rule={part.rule!r}; leave engine out, or choose one of: "
                f"{', '.join(FORWARD)}"
            )
        return False
    try:
        refuse(bound)
    except ModelError:
        if not has_both:
            raise
        return False
    return not (has_both and alterations(bound))


def _check_temperature(temperature: Any) -> float:
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 < temperature <= sys.float_info.max:
        raise OptionError(f"temperature must be a positive number, got {temperature!r}")
    return float(temperature)


def case(bound: BoundModel, tokenizer: Any, prompt: Any, target: Any, sources: Any, chosen: Options) -> Case:
    """Check a prompt, its sources and its targets.

    Raises:
        PromptError, TargetError, SourceError, OptionError: one of them is invalid.
    """
    encoded = encode(prompt, tokenizer, bound)
    parts = decompose(bound, tokenizer, encoded, sources, chosen)
    targets = check(target, len(encoded.ids), decomposed_layers(parts, chosen.stop), tokenizer, bound, chosen.of)
    return Case(encoded, parts, tuple(targets))


def decompose(bound: BoundModel, tokenizer: Any, prompt: Prompt, sources: Any, chosen: Options) -> Decomposition:
    """Lay out the sources of a prompt, of any kind.

    Raises:
        SourceError, OptionError: the sources are invalid.
    """
    check_kind(sources)
    if not isinstance(sources, COMPONENTS):
        bos = None if tokenizer is None else tokenizer.bos_token_id
        return decompose_prompt(prompt, sources, chosen.start, bound.has_bias, chosen.exclude, bos)
    name = type(sources).__name__
    if chosen.start != 0:
        raise OptionError(f"start_layer={chosen.start}: {name} names its own layer; leave it out")
    routing = None
    if isinstance(sources, RoutedExperts):
        routing = chosen_experts(bound, prompt.ids, [check_layer(sources, bound)]).get(sources.layer)
    parts = decompose_components(sources, len(prompt.ids), bound, routing)
    if isinstance(sources, Modules):
        refuse_absent(sources, bound)
    if parts.layer >= chosen.stop:
        raise OptionError(f"stop_layer={chosen.stop} must be greater than the layer of {name}, {parts.layer}")
    return parts


def components_of_layer(kind: str, layer: int, ids: Any, positions: Any) -> list[Any]:
    """The specs that decompose a layer in a sweep: one, or two for modules. A module that it lacks is no source."""
    if kind == "modules":
        return [Modules(layer, "attn", positions), Modules(layer, "mlp", positions)]
    by_kind: dict[str, Callable[..., Any]] = {"heads": Heads, "neurons": Neurons, "experts": RoutedExperts}
    return [by_kind[kind](layer, ids, positions)]


def _has(layer: Layer, kind: SweepKind) -> bool:
    """Whether a sweep of a kind looks at a layer by default; one of neurons is refused where there are experts."""
    has: dict[SweepKind, bool] = {
        "heads": bool(layer.mixers), "neurons": layer.has_mlp, "experts": layer.experts is not None, "modules": True,
    }  # fmt: skip
    return has[kind]


def layers_of_sweep(bound: BoundModel, kind: SweepKind, layers: Any, ids: Any) -> list[int]:
    """The layers of a sweep: the given ones, by default all that have such components.

    Raises:
        OptionError: ``layers`` is not a non-empty list of integers without duplicates; or the layers of a sweep of heads
            or experts have different numbers of them, and ``ids`` names none; or the model has no experts.
    """
    experts = kind == "experts"
    if experts and not bound.has_experts:
        raise OptionError(f"{bound.name} has no routed experts; sweep its heads, neurons or modules")
    every = [index for index, layer in enumerate(bound.layers) if _has(layer, kind)]
    wanted = list(every) if layers is None else integers("layers", layers, OptionError)
    if not every:
        raise OptionError(f"{bound.name} has no {kind}: its layers have another sublayer alone; sweep its modules")
    if not wanted or len(set(wanted)) < len(wanted):
        raise OptionError(f"layers must be a non-empty list without duplicates, got {layers}")
    if kind in ("experts", "heads") and ids is None:
        held = {index: layer.experts.count for index, layer in enumerate(bound.layers) if layer.experts is not None}
        held = held if experts else {index: layer.num_heads for index, layer in enumerate(bound.layers) if layer.mixers}
        counts = {held[index] for index in wanted if index in held}
        if len(counts) > 1:
            raise OptionError(
                f"the layers of {bound.name} have different numbers of {kind}, {sorted(counts)}; choose layers with the "
                f"same number (layers=) or name the {kind} (ids=)"
            )
    return wanted


def decomposed_layers(parts: Decomposition, stop: int) -> range:
    """The layers at whose input there is a decomposed state; the last number means the state after the last layer."""
    return range(parts.layer + (parts.moment != "start"), stop + 1)


def callable_or_none(name: str, given: Any) -> Any:
    """Check that ``given`` is a function or None, and return it.

    Raises:
        OptionError: it is neither.
    """
    if given is not None and not callable(given):
        raise OptionError(f"{name} must be a function, got {given!r}")
    return given


def _check_exclude(exclude: Any) -> Exclude:
    if not isinstance(exclude, bool) and not (isinstance(exclude, str) and exclude == "auto"):
        raise OptionError(f"exclude_bos must be 'auto', True or False, got {exclude!r}")
    return exclude if isinstance(exclude, bool) else "auto"
