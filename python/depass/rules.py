"""The rules by which scores are shared, and their names, without torch.

A forward rule shares each MLP output among the parts of a decomposed state. A linear rule needs no parts: one backward pass
through the linearised model scores everything. ``taylor`` is both. A mixture is the weighted mean of the scores of several
rules. docs/method.md says when to take which.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from depass_kernels import names

from .errors import OptionError

Balance = Literal["pattern", "unassigned"]  # the source that balances the sum of scores


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max  # an int may be larger than any float


def _shown(value: float) -> str:
    return repr(value).removesuffix(".0").replace("e+", "e")  # a mixture joins its rules by +


@dataclass(frozen=True)
class PathWeights:
    """A linear rule of one's own: how much of the gradient each factor of a product carries (docs/method.md).

    Attributes:
        q, k: what the queries and the keys carry of the attention pattern's gradient.
        v: what the values carry.
        gate, up: what the two factors of a gated MLP carry. An ungated MLP has no choice.

    Raises:
        OptionError: a weight is not a finite number.
    """

    q: float = 0.0
    k: float = 0.0
    v: float = 1.0
    gate: float = 1.0
    up: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not _is_number(value):
                raise OptionError(f"PathWeights({field.name}={value!r}): a weight must be a finite number")
            object.__setattr__(self, field.name, float(value))

    def __str__(self) -> str:
        """The rule's name, or the weights that differ from taylor's, as :func:`read` takes them."""
        named = next((name for name, weights in LINEAR.items() if weights == self), None)
        changed = {field.name: getattr(self, field.name) for field in fields(self)
                   if getattr(self, field.name) != field.default}  # fmt: skip
        return named or ",".join(f"{name}={_shown(value)}" for name, value in changed.items())

    @property
    def steers(self) -> bool:
        """Whether scores credit what steers attention, through its queries or keys."""
        return self.q != 0 or self.k != 0

    @property
    def balance(self) -> Balance | None:
        """The source that balances the sum of scores; None where the parts and biases add up to the logit by themselves.

        ``pattern`` takes back what was credited to steering attention. ``unassigned`` also holds what no path carries.
        """
        if self.v != 1 or not math.isclose(self.gate + self.up, 1, abs_tol=1e-12):
            return "unassigned"
        return "pattern" if self.steers else None


LINEAR = {
    "taylor": PathWeights(),
    "half": PathWeights(gate=0.5, up=0.5),
    "up": PathWeights(gate=0.0, up=1.0),
    "steer": PathWeights(q=0.25, k=0.25, gate=0.5, up=0.5),
    "dual_path": PathWeights(q=0.25, k=0.25, v=0.5, gate=0.5, up=0.5),
}
FORWARD = names.RULES
_SINGLE = tuple(dict.fromkeys((*FORWARD, *LINEAR)))


@dataclass(frozen=True)
class Mixture:
    """The weighted mean of the scores of several rules, each scored by its own engine.

    Attributes:
        weights: a positive number for each rule, which is a name or :class:`PathWeights`. They are divided by their sum.

    Raises:
        OptionError: there is no rule, a rule is unknown, or a weight is not a positive number.
    """

    weights: Mapping[str | PathWeights, float]

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping) or not self.weights:
            raise OptionError(
                f"Mixture needs a dict with a weight for each rule, such as {{'softmax': 1, 'half': 1}}, got "
                f"{self.weights!r}"
            )
        for rule, weight in self.weights.items():
            if not isinstance(rule, PathWeights) and rule not in _SINGLE:
                raise OptionError(f"unknown rule {rule!r} in a mixture; choose from: {', '.join(_SINGLE)}")
            if not _is_number(weight) or not weight > 0:
                raise OptionError(f"the weight of {rule} in a mixture must be a positive number, got {weight!r}")
        if not _is_number(sum(self.weights.values())):
            raise OptionError(f"the weights of a mixture must have a finite sum, got {self.weights!r}")
        object.__setattr__(self, "weights", dict(self.weights))  # the caller may change its own
        named = [str(rule) for rule in self.weights]
        if len(set(named)) < len(named):
            raise OptionError(f"a mixture names a rule twice: {', '.join(named)}; add up its weights")

    def __hash__(self) -> int:
        return hash(tuple(self.weights.items()))

    def __str__(self) -> str:
        """The rules joined by ``+``, with their weights unless these are equal, as :func:`read` takes them."""
        equal = len(set(self.weights.values())) == 1
        return "+".join(str(rule) if equal else f"{_shown(weight)}*{rule}" for rule, weight in self.weights.items())


MIXTURES = {"steered": Mixture({"softmax": 1, "steer": 2})}
RULES = (*_SINGLE, *MIXTURES)
AnyRule = str | PathWeights | Mixture


class Part(NamedTuple):
    """One rule of a mixture, with its share of the mean; a rule by itself has the share 1."""

    share: float
    rule: str
    paths: PathWeights | None  # None: a forward rule


@dataclass(frozen=True)
class Rule:
    """A checked rule.

    Attributes:
        name: its name in results, which :func:`read` takes.
        parts: the rules whose scores it averages; one, unless it is a mixture.
    """

    name: str
    parts: tuple[Part, ...]

    @property
    def balance(self) -> Balance | None:
        """The source that balances the sum of scores, or None; see :attr:`PathWeights.balance`."""
        found = {part.paths.balance for part in self.parts if part.paths is not None}
        return "unassigned" if "unassigned" in found else "pattern" if "pattern" in found else None


def read(rule: Any) -> Rule:
    """Check a rule.

    Args:
        rule: a name of :data:`RULES`; :class:`PathWeights`, or the same as text (``"q=0.5,k=0.5"``); a :class:`Mixture`, or
            the same as text (``"softmax+half"``, ``"1*softmax+2*half"``).

    Raises:
        OptionError: it is none of these.
    """
    if isinstance(rule, PathWeights):
        return Rule(str(rule), (Part(1.0, str(rule), rule),))
    if isinstance(rule, Mixture):
        return _mixture(str(rule), rule)
    if not isinstance(rule, str):
        raise _unknown(rule)
    if rule in MIXTURES:
        return _mixture(rule, MIXTURES[rule])
    weights: dict[str | PathWeights, float] = {}
    for text in rule.split("+"):
        weight, star, name = text.strip().rpartition("*")
        single = _single(name.strip(), rule)
        if single in weights:
            raise OptionError(f"rule {rule!r} names {str(single)!r} twice; add up its weights")
        weights[single] = _number(weight, rule) if star else 1.0
    mixed = Mixture(weights)
    return _mixture(str(mixed), mixed)


def _mixture(name: str, mixture: Mixture) -> Rule:
    total = sum(mixture.weights.values())
    singles = [(rule, weight / total) for rule, weight in mixture.weights.items()]
    paths = [LINEAR.get(rule) if isinstance(rule, str) else rule for rule, _ in singles]
    return Rule(name, tuple(Part(share, str(rule), each) for (rule, share), each in zip(singles, paths, strict=True)))


def _single(name: str, rule: str) -> str | PathWeights:
    """A rule that scores by itself, from its text."""
    if name in _SINGLE:
        return name
    pairs = [pair.partition("=")[::2] for pair in name.split(",")]
    given = {each.strip(): value for each, value in pairs}
    if "=" not in name or len(given) < len(pairs) or not given.keys() <= {field.name for field in fields(PathWeights)}:
        raise _unknown(rule)
    own = PathWeights(**{each: _number(value, rule) for each, value in given.items()})
    return str(own) if own in LINEAR.values() else own


def _number(text: str, rule: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"rule {rule!r}: {text!r} is not a number") from None


def _unknown(rule: Any) -> OptionError:
    return OptionError(
        f"unknown rule {rule!r}; choose one of: {', '.join(RULES)}; or a mixture such as 'softmax+half', or PathWeights"
    )
