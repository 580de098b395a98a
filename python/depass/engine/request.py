"""What is asked of a pass, checked before any work is done."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from depass_kernels.names import NAMES, RULES

from ..checks import integer
from ..errors import OptionError
from ..inputs.prompt import Prompt, encode
from ..inputs.targets import Asked, check
from ..models.bound import BoundModel
from ..propagation.sharing import MLPSharing
from ..sources.components import Heads, Modules, Neurons
from ..sources.decompose import COMPONENTS, check_kind, decompose_components
from ..sources.source import Decomposition
from ..sources.spans import decompose_prompt

Progress = Callable[[int, int], None]
Exclude = bool | Literal["auto"]


@dataclass(frozen=True)
class Defaults:
    """What holds of every call that says nothing else: see :class:`depass.DePass`.

    Raises:
        OptionError: an option with a value that it does not have.
    """

    rule: str = "softmax"
    temperature: float = 0.1
    exclude_bos: Exclude = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        self.sharing(None, None)
        _check_exclude(self.exclude_bos)

    def sharing(self, rule: str | None, temperature: float | None) -> MLPSharing:
        """How MLPs are shared out where a call asks for a rule and a temperature, or for none."""
        rule = self.rule if rule is None else rule
        temperature = self.temperature if temperature is None else temperature
        if rule not in RULES:
            raise OptionError(f"unknown mlp_rule {rule!r}; there are: {', '.join(RULES)}")
        number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
        if not number or not 0 < temperature <= sys.float_info.max:
            raise OptionError(f"temperature must be a positive number, got {temperature!r}")
        if self.backend not in NAMES:
            raise OptionError(f"unknown backend {self.backend!r}; there are: {', '.join(NAMES)}")
        return MLPSharing(rule, float(temperature), self.backend)


@dataclass(frozen=True)
class Options:
    """What holds of a whole pass.

    Attributes:
        start: the layer whose input is decomposed.
        stop: one past the last layer.
        sharing: how MLPs are shared out.
        exclude: whether the first token takes no part in later positions' MLPs.
    """

    start: int
    stop: int
    sharing: MLPSharing
    exclude: Exclude


@dataclass(frozen=True)
class Case:
    """A prompt, its decomposition and what is asked of it, all checked."""

    prompt: Prompt
    parts: Decomposition
    asked: tuple[Asked, ...]


def options(
    defaults: Defaults,
    bound: BoundModel,
    start_layer: int = 0,
    stop_layer: int | None = None,
    mlp_rule: str | None = None,
    temperature: float | None = None,
    exclude_bos: Exclude | None = None,
) -> Options:
    """The options of a call, where None is the default's.

    Raises:
        OptionError: layers that the model does not have, or an option with a value that it does not have.
    """
    depth = len(bound.layers)
    start = integer("start_layer", start_layer, OptionError)
    stop = depth if stop_layer is None else integer("stop_layer", stop_layer, OptionError)
    if not 0 <= start < stop <= depth:
        raise OptionError(
            f"start_layer={start}, stop_layer={stop}: need 0 <= start < stop <= {depth}, the layers of {bound.name}"
        )
    exclude = _check_exclude(defaults.exclude_bos if exclude_bos is None else exclude_bos)
    return Options(start, stop, defaults.sharing(mlp_rule, temperature), exclude)


def case(bound: BoundModel, tokenizer: Any, prompt: Any, target: Any, sources: Any, chosen: Options) -> Case:
    """One prompt and what is asked about it.

    Raises:
        PromptError, TargetError, SourceError, OptionError: something that cannot be attributed.
    """
    encoded = encode(prompt, tokenizer, bound)
    parts = decompose(bound, tokenizer, encoded, sources, chosen)
    asked = check(target, len(encoded.ids), decomposed_layers(parts, chosen.stop), tokenizer, bound)
    return Case(encoded, parts, tuple(asked))


def decompose(bound: BoundModel, tokenizer: Any, prompt: Prompt, sources: Any, chosen: Options) -> Decomposition:
    """Lay out a prompt's sources, of whichever kind.

    Raises:
        SourceError, OptionError: sources that there are not.
    """
    check_kind(sources)
    if not isinstance(sources, COMPONENTS):
        bos = None if tokenizer is None else tokenizer.bos_token_id
        return decompose_prompt(prompt, sources, chosen.start, bound.has_bias, chosen.exclude, bos)
    name = type(sources).__name__
    if chosen.start != 0:
        raise OptionError(f"start_layer={chosen.start}: {name} names its own layer; leave it out")
    parts = decompose_components(sources, len(prompt.ids), bound)
    if parts.layer >= chosen.stop:
        raise OptionError(f"stop_layer={chosen.stop}: must lie behind layer {parts.layer} of {name}")
    return parts


def components_of_layer(kind: str, layer: int, ids: Any, positions: Any) -> list[Any]:
    """What a sweep of a kind decomposes a layer into: one spec, or of modules two."""
    if kind == "modules":
        return [Modules(layer, "attn", positions), Modules(layer, "mlp", positions)]
    return [(Neurons if kind == "neurons" else Heads)(layer, ids, positions)]


def decomposed_layers(parts: Decomposition, stop: int) -> range:
    """The layers whose input is decomposed, and one past the last, where the final state is."""
    return range(parts.layer + (parts.moment != "start"), stop + 1)


def callable_or_none(name: str, given: Any) -> Any:
    """``given``, if it can be called or is None.

    Raises:
        OptionError: it can not.
    """
    if given is not None and not callable(given):
        raise OptionError(f"{name} must be a function, got {given!r}")
    return given


def _check_exclude(exclude: Any) -> Exclude:
    if not isinstance(exclude, bool) and not (isinstance(exclude, str) and exclude == "auto"):
        raise OptionError(f"exclude_bos must be 'auto', True or False, got {exclude!r}")
    return exclude if isinstance(exclude, bool) else "auto"
