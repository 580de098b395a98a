"""A source, and the decomposition that sources form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from depass_kernels import SourceLayout

from ..errors import SourceError

if TYPE_CHECKING:
    from ..models.trace import Trace


Kind = Literal["token", "span", "rest", "bias", "head", "neuron", "module", "subspace", "part"]
Moment = Literal["start", "middle", "end"]  # of a layer; the middle lies between its attention and its MLP


@dataclass(frozen=True)
class Source:
    """One part of the prompt or of the model, or of what belongs to none.

    Attributes:
        label: its text, or a component's name (``L3H5``, ``L3N120``, ``L3.attn``).
        kind: ``token``, ``span``, a component's (``head``, ``neuron``, ``module``, ``subspace``, ``part``), ``rest``
            (what the others do not cover) or ``bias`` (the model's own biases).
        start: first position of a token or span, None for others.
        end: one past the last position, None likewise.
        layer: a component's.
        index: a component's number in its layer.
    """

    label: str
    kind: Kind
    start: int | None = None
    end: int | None = None
    layer: int | None = None
    index: int | None = None


@dataclass(frozen=True)
class Decomposition:
    """The sources of one prompt and the staircase that they form.

    Attributes:
        sources: ``M`` of them: the bias source (if any), ``rest`` (if any), then by start.
        layout: one staircase; it also carries the excluded source.
        excluded: whether the first token takes no part in later positions' MLPs.
        layer: the layer at which the stream is decomposed.
        moment: when in that layer.
        fill: given the state's rows ``[R, D]``, zeros, and the prompt's trace of that layer: writes what every source starts
            with.
    """

    sources: tuple[Source, ...]
    layout: SourceLayout
    excluded: bool
    layer: int
    moment: Moment
    fill: Callable[[Tensor, Trace], None]


def check_labels(labels: Any, count: int, of: str) -> Sequence[str] | None:
    """Labels of ``count`` sources, or None.

    Raises:
        SourceError: other than one string for each.
    """
    if labels is None:
        return None
    if not isinstance(labels, (list, tuple)) or not all(isinstance(label, str) for label in labels):
        raise SourceError(f"labels of {of} must be a list of strings, got {labels!r}")
    if len(labels) != count:
        raise SourceError(f"{len(labels)} labels for {count} sources of {of}; give one string for each")
    return labels


def name(source: Source) -> str:
    """What a source is called; ``rest`` and ``bias`` in brackets, as no text of the prompt."""
    return f"[{source.kind}]" if source.kind in ("rest", "bias") else source.label
