"""The result of an attribution: scores that add up to logits, with what is needed to read, save and draw them."""

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
from ..sources.source import Source
from ..views.page import View, attribution_view
from .common import ScoredResult, check_shape, common, judged, listed


@dataclass(frozen=True, eq=False)
class Attribution(ScoredResult):
    """How much each source contributed to each target's logit.

    Attributes:
        scores: ``[targets, sources]`` fp32 on the CPU, signed, in logits; a row adds up to its target's logit. A
            baseline's are in units of its own and promise no sum.
        sources: what the columns are.
        targets: what the rows are.
        target_logits: ``[targets]`` fp32, the model's own logits, before any soft-capping of its head.
        conservation_error: ``[targets]`` fp32, ``|Σ scores - logit| / max(|logit|, Σ |scores|)``, measured before the
            scores were rounded to fp32; NaN for a baseline.
        prompt: the prompt's tokens and text.
        settings: how it was made.
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

    def aggregate(self, unit: str) -> Attribution:
        """Sum token scores up to words or sentences (``"word"``, ``"sentence"``); rows still add up to their logits.

        This is not the attribution of ``sources=unit``: there the words themselves share the MLPs.

        Raises:
            SourceError: an unknown unit, a prompt without text, or sources that are no tokens.
        """
        if any(source.kind not in ("token", "bias") for source in self.sources):
            raise SourceError(f"aggregate({unit!r}) sums up token scores, these sources are no tokens")
        kept = [i for i, source in enumerate(self.sources) if source.kind == "bias"]
        groups = [(self.sources[i], [i]) for i in kept]
        for begin, end in self.prompt.segments(unit):
            label = "".join(self.prompt.tokens[begin:end])
            groups.append((Source(label, "span", begin, end), [len(kept) + t for t in range(begin, end)]))
        scores = torch.stack([self.scores[:, columns].sum(1) for _, columns in groups], dim=1)
        return replace(
            self,
            scores=scores,
            sources=tuple(source for source, _ in groups),
            settings=replace(self.settings, aggregated=unit),
        )

    def show(self, file: TextIO | None = None, width: int | None = None) -> None:
        """Print the scores of every target over the prompt, in colour where ``file`` (stdout) is a terminal."""
        from ..views.terminal import show

        show(self, file, width)

    def page_view(self) -> View:
        """See :meth:`Result.page_view`."""
        return attribution_view(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, as ``depass attribute --json`` prints them."""
        return {
            "format": self.FORMAT,
            "settings": asdict(self.settings),
            "prompt": {**asdict(self.prompt), "special": sorted(self.prompt.special)},
            "sources": [asdict(source) for source in self.sources],
            "targets": [asdict(target) for target in self.targets],
            "target_logits": self.target_logits.tolist(),
            "conservation_error": listed(self.conservation_error),
            "scores": self.scores.tolist(),
        }

    def source_at(self, index: int) -> Source:
        """The source of a column."""
        return self.sources[index]

    def records(self) -> Iterator[dict[str, Any]]:
        """A row of a table for each target and source."""
        for target, row in zip(self.targets, self.scores.tolist(), strict=True):
            for source, score in zip(self.sources, row, strict=True):
                yield {
                    "target": target.label, "position": target.position, "source": source.label, "kind": source.kind,
                    "start": source.start, "end": source.end, "score": score,
                }  # fmt: skip

    def to_captum(self) -> Any:
        """captum's ``LLMAttributionResult``: see :mod:`depass.views.exports`.

        Raises:
            DePassError: captum is not installed.
        """
        from ..views.exports import to_captum

        return to_captum(self)

    def to_inseq(self) -> Any:
        """inseq's ``FeatureAttributionOutput``: see :mod:`depass.views.exports`.

        Raises:
            DePassError: inseq is not installed.
        """
        from ..views.exports import to_inseq

        return to_inseq(self)

    def to_circuitsvis(self) -> Any:
        """CircuitsVis's coloured tokens: see :mod:`depass.views.exports`.

        Raises:
            DePassError: CircuitsVis is not installed.
        """
        from ..views.exports import to_circuitsvis

        return to_circuitsvis(self)

    @classmethod
    def from_saved(cls, tensors: dict[str, Any], said: dict[str, Any]) -> Attribution:
        """See :meth:`Result.from_saved`."""
        check_shape(tensors["scores"], said["targets"], said["sources"])
        sources, length = tuple(Source(**one) for one in said["sources"]), len(said["prompt"]["tokens"])
        for source in sources:
            if source.start is not None and not 0 <= source.start < (source.end or 0) <= length:
                raise ValueError(
                    f"its source {source.label!r} lies at {source.start} to {source.end} of {length} tokens"
                )
        return cls(**tensors, sources=sources, **common(said))
