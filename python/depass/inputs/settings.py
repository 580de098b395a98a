"""The settings of an attribution, which every result records."""

from __future__ import annotations

from dataclasses import dataclass, field

from .. import rules


@dataclass(frozen=True)
class Settings:
    """The settings of an attribution.

    Attributes:
        model: the model's name or path.
        dtype: the dtype of the model's weights.
        rule: the rule by which scores are shared, as :class:`depass.DePass` takes it; ``none`` for a baseline.
        temperature: the temperature of the softmax rule, in units of the pre-activation.
        exclude_bos: whether the first token was excluded from the MLPs of later positions.
        start_layer: the layer whose input was decomposed.
        stop_layer: one past the last layer that ran. If it is less than the number of layers, the scores are read from
            the residual stream there through the final norm and the head (a logit lens).
        aggregated: the unit that token scores were summed to afterwards, or None.
        backends: the backends used, by op of ``depass_kernels`` (``"cpu+reference"`` if two ran parts of it).
        method: ``depass``, or the name of a baseline (:mod:`depass.baselines`), whose scores need not add up.
        altered: the layer that computed something else than its weights say, and the hook that did it; None for an
            unaltered model.
        engine: ``forward`` for a decomposed state, ``backward`` for a linear rule's backward pass, ``forward+backward`` for
            a mixture that has both, ``none`` for a baseline.
        family: where the model's :class:`depass.Family` comes from: ``declared`` in the list of families, ``inferred`` from
            a trial pass, or ``given`` by the caller.
        of: what was explained of a token: its ``logit``, its ``logprob`` or its ``contrast`` with the likeliest other token.
        padded: whether the model ran on padded prompts, because it takes no ``position_ids``; False for a single prompt.
    """

    model: str
    dtype: str
    rule: str
    temperature: float
    exclude_bos: bool
    start_layer: int
    stop_layer: int
    aggregated: str | None = None
    backends: dict[str, str] = field(default_factory=dict)
    method: str = "depass"
    altered: str | None = None
    padded: bool = False
    engine: str = "forward"
    family: str = "declared"
    of: str = "logit"

    @property
    def adds_up(self) -> bool:
        """Whether the method's scores add up to the target's logit by construction."""
        return self.method == "depass"

    @property
    def balance(self) -> rules.Balance | None:
        """The kind of the source that balances the sum of scores, or None; see :attr:`depass.PathWeights.balance`."""
        return rules.read(self.rule).balance if self.adds_up else None
