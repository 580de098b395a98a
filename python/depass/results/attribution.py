"""The result of an attribution: scores that add up to logits, and how to read, save and draw them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, TextIO

import torch
from torch import Tensor

from ..errors import SourceError
from ..inputs.prompt import Prompt
from ..inputs.settings import Settings
from ..inputs.targets import Target
from ..sources.source import BESIDE, Source
from ..views.page import View, attribution_view
from .common import ScoredResult, check_shape, common, described, judged, listed


@dataclass(frozen=True, eq=False)
class Attribution(ScoredResult):
    """The score of each source for each target: ``Σ_m scores[t, m] = logit[t]`` (docs/method.md, equation 7).

    Attributes:
        scores: ``[targets, sources]`` fp32 on the CPU, signed, in logits. A row adds up to its target's logit. The scores
            of a baseline have other units and need not add up.
        sources: the sources, one per column.
        targets: the targets, one per row.
        target_logits: ``[targets]`` fp32, the model's own logits, before any soft-capping of its head.
        conservation_error: ``[targets]`` fp32, the conservation error (completeness),
            ``|Σ scores - logit| / max(|logit|, Σ |scores|)``, measured before the scores were rounded to fp32; NaN for a
            baseline.
        prompt: the prompt's tokens and text.
        settings: the settings of the attribution.
    """

    scores: Tensor
    sources: tuple[Source, ...]
    targets: tuple[Target, ...]
    target_logits: Tensor
    conservation_error: Tensor
    prompt: Prompt
    settings: Settings

    FORMAT = "depass-attribution-1"
    TENSORS = ("scores", "target_logits", "conservation_error")
    TOP = 5

    def __repr__(self) -> str:
        return (
            f"Attribution({len(self.targets)} targets x {len(self.sources)} sources, {self.settings.model}, "
            f"{judged(self.settings, self.conservation_error)})"
        )

    def aggregate(self, unit: str, language: str = "en") -> Attribution:
        """Sum token scores to words or sentences; rows still add up to their logits.

        The scores differ from those of ``sources=unit``: there words or sentences compete for each neuron, here tokens do.

        Args:
            unit: ``"word"``, ``"sentence"`` or ``"token"``.
            language: the language of sentences; see :class:`Sentences`.

        Raises:
            SourceError: the unit is unknown, the prompt has no text, or the sources are not tokens.
        """
        tokens = {source.start: i for i, source in enumerate(self.sources) if source.kind == "token"}
        if any(source.kind not in ("token", *BESIDE) for source in self.sources):
            raise SourceError(
                f"aggregate({unit!r}) sums token scores, but these sources are not tokens; attribute with sources='token'"
            )
        groups = [(source, [i]) for i, source in enumerate(self.sources) if source.kind == "bias"]
        for begin, end in self.prompt.segments(unit, language):
            label = "".join(self.prompt.tokens[begin:end])
            groups.append((Source(label, "span", begin, end), [tokens[t] for t in range(begin, end)]))
        groups += [(source, [i]) for i, source in enumerate(self.sources) if source.kind in ("pattern", "unassigned")]
        scores = torch.stack([self.scores[:, columns].sum(1) for _, columns in groups], dim=1)
        return replace(
            self,
            scores=scores,
            sources=tuple(source for source, _ in groups),
            settings=replace(self.settings, aggregated=unit),
        )

    def show(self, file: TextIO | None = None, width: int | None = None) -> None:
        """Print the prompt with the scores of every target, in colour if ``file`` (by default stdout) is a terminal."""
        from ..views.terminal import show

        show(self, file, width)

    def page_view(self) -> View:
        """See :meth:`Result.page_view`."""
        return attribution_view(self)

    def to_dict(self) -> dict[str, Any]:
        """The result as a dict of plain values, as ``depass attribute --json`` prints it."""
        return {
            "format": self.FORMAT,
            **described(self),
            "sources": [asdict(source) for source in self.sources],
            "target_logits": self.target_logits.tolist(),
            "conservation_error": listed(self.conservation_error),
            "scores": self.scores.tolist(),
        }

    def source_at(self, index: int) -> Source:
        """The source of a column."""
        return self.sources[index]

    def records(self) -> Iterator[dict[str, Any]]:
        """One table row per target and source."""
        for target, row in zip(self.targets, self.scores.tolist(), strict=True):
            for source, score in zip(self.sources, row, strict=True):
                yield {
                    "target": target.label, "position": target.position, "source": source.label, "kind": source.kind,
                    "start": source.start, "end": source.end, "score": score,
                }  # fmt: skip

    def to_captum(self) -> Any:
        """The result as captum's ``LLMAttributionResult``; see :mod:`depass.views.exports`.

        Raises:
            DePassError: captum is not installed.
        """
        from ..views.exports import to_captum

        return to_captum(self)

    def to_inseq(self) -> Any:
        """The result as inseq's ``FeatureAttributionOutput``; see :mod:`depass.views.exports`.

        Raises:
            DePassError: inseq is not installed.
        """
        from ..views.exports import to_inseq

        return to_inseq(self)

    def to_circuitsvis(self) -> Any:
        """The result as CircuitsVis's coloured tokens; see :mod:`depass.views.exports`.

        Raises:
            DePassError: CircuitsVis is not installed.
        """
        from ..views.exports import to_circuitsvis

        return to_circuitsvis(self)

    @classmethod
    def from_saved(cls, tensors: dict[str, Any], said: dict[str, Any]) -> Attribution:
        """See :meth:`Result.from_saved`."""
        check_shape(tensors["scores"], said["targets"], said["sources"])
        sources, length = tuple(Source(**fields) for fields in said["sources"]), len(said["prompt"]["tokens"])
        for source in sources:
            if source.start is not None and not 0 <= source.start < (source.end or 0) <= length:
                raise ValueError(
                    f"its source {source.label!r} covers tokens {source.start} to {source.end}, but its prompt has "
                    f"{length} tokens"
                )
        return cls(**tensors, sources=sources, **common(said))
