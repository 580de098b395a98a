"""A source, and a decomposition into sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from depass_kernels import SourceLayout

from ..errors import SourceError

if TYPE_CHECKING:
    from ..models.trace import Trace


Kind = Literal[
    "token", "span", "rest", "bias", "head", "neuron", "expert", "module", "subspace", "part", "pattern", "unassigned"
]
BESIDE = ("rest", "bias", "pattern", "unassigned")  # the kinds that are no part of the prompt or of the model
# of a layer: the middle lies between its attention and its MLP; late is before what some layers have behind the MLP
Moment = Literal["start", "middle", "late", "end"]


@dataclass(frozen=True)
class Source:
    """One source: a part of the prompt, a component of the model, the remainder or the model's biases.

    Attributes:
        label: the text of a token or span, or the name of a component (``L3H5``, ``L3N120``, ``L3E7``, ``L3.attn``).
        kind: ``token`` or ``span``; ``head``, ``neuron``, ``expert``, ``module``, ``subspace`` or ``part`` for a component;
            ``rest`` for the remainder; ``bias`` for the model's own biases; ``pattern`` for what a rule credits to steering
            attention on top of the logit (its score takes that back); ``unassigned`` for what a rule's paths do not carry.
        start: the first position of a token or span, else None.
        end: one past the last position of a token or span, else None.
        layer: the layer of a component, else None.
        index: the number of a component in its layer, else None.
    """

    label: str
    kind: Kind
    start: int | None = None
    end: int | None = None
    layer: int | None = None
    index: int | None = None


@dataclass(frozen=True)
class Decomposition:
    """The sources of one prompt and their packed (staircase) layout.

    Attributes:
        sources: the ``M`` sources: the bias source (if any), the source ``rest`` (if any), then the others by start.
        layout: one staircase; it also holds the excluded source.
        excluded: whether the first token is excluded from the MLPs of later positions.
        layer: the layer at which the residual stream is decomposed.
        moment: the point in that layer: before it, between attention and MLP, behind the MLP but before what some layers
            have there, or after it.
        spec: the component spec that it was laid out from, with its layer counted from 0; None for sources of the prompt.
        fill: a function that takes the state's rows ``[R, D]``, which are zero, and the prompt's trace of that layer. It
            writes the initial vectors of every source, so that ``Σ_m X[m, t] = x[t]`` (docs/method.md, equation 1).
    """

    sources: tuple[Source, ...]
    layout: SourceLayout
    excluded: bool
    layer: int
    moment: Moment
    fill: Callable[[Tensor, Trace], None]
    spec: Any = None

    @property
    def owner(self) -> Tensor:
        """The source that each position belongs to ``[N]`` int64: its token or span, elsewhere ``rest``.

        It also holds what reaches a layer beside the stream: the values of an earlier layer.
        """
        rest = next((i for i, source in enumerate(self.sources) if source.kind == "rest"), 0)
        owner = torch.full((self.layout.positions,), rest, device="cpu")
        for index, source in enumerate(self.sources):
            if source.kind in ("token", "span"):
                owner[source.start : source.end] = index
        return owner


def check_labels(labels: Any, count: int, of: str) -> Sequence[str] | None:
    """The checked labels of ``count`` sources, or None.

    Raises:
        SourceError: the labels are not a list of one string per source.
    """
    if labels is None:
        return None
    if not isinstance(labels, (list, tuple)) or not all(isinstance(label, str) for label in labels):
        raise SourceError(f"labels of {of} must be a list of strings, got {labels!r}")
    if len(labels) != count:
        raise SourceError(f"labels of {of} must be one string per source: got {len(labels)} labels for {count} sources")
    return labels


def name(source: Source) -> str:
    """The name of a source; those of :data:`BESIDE` are in brackets, because they are not text of the prompt."""
    return f"[{source.kind}]" if source.kind in BESIDE else source.label
