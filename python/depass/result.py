"""The result of an attribution: scores that add up to logits, with what is needed to read, save and draw them."""

from __future__ import annotations

import os
from collections.abc import Sized
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from .errors import DePassError, SourceError, TargetError
from .files import load_result, save_result
from .prompt import Prompt
from .sources import Source
from .targets import Target

if TYPE_CHECKING:
    import pandas

_FORMAT = "depass-attribution-1"
TENSORS = ("scores", "target_logits", "conservation_error")


@dataclass(frozen=True)
class Settings:
    """How an attribution was made.

    Attributes:
        model: its name or path.
        dtype: of its weights.
        rule: how the MLP was shared out; of a baseline, which shares out nothing, ``none``.
        temperature: of the softmax rule, in units of the pre-activation.
        exclude_bos: whether the first token took no part in later positions' MLPs.
        start_layer: the layer whose input was decomposed.
        stop_layer: one past the last layer; before the model's last, scores are read from the stream there through the
            final norm and head (a logit lens).
        aggregated: units that the sources were summed up to afterwards, or None.
        backends: by op of ``depass_kernels``, which backend did it (``"cpu+reference"`` where two did parts of it).
        method: ``depass``, or the name of a baseline (:mod:`depass.baselines`), whose scores promise no sum.
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

    @property
    def adds_up(self) -> bool:
        """Whether the method promises scores that add up to the target's logit."""
        return self.method == "depass"


@dataclass(frozen=True, eq=False)
class Attribution:
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

    def __repr__(self) -> str:
        return (
            f"Attribution({len(self.targets)} targets x {len(self.sources)} sources, {self.settings.model}, "
            f"{judged(self.settings, self.conservation_error)})"
        )

    def top(self, k: int = 5, target: int = 0) -> list[tuple[Source, float]]:
        """The ``k`` sources with the largest scores by absolute value, in logits, largest first."""
        if k < 1:
            raise SourceError(f"top({k}): k must be at least 1")
        row = self.scores[self._row(target)]
        best = row.abs().argsort(descending=True, stable=True)[:k].tolist()
        return [(self.sources[i], float(row[i])) for i in best]

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
        from .terminal import show

        show(self, file, width)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The scores as one standalone page; written to ``path`` where given.

        Raises:
            OutputError: the path cannot be written.
        """
        from .page import render

        return render([("attribution", self)], path)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, as ``depass attribute --json`` prints them."""
        return {
            "format": _FORMAT,
            "settings": asdict(self.settings),
            "prompt": {**asdict(self.prompt), "special": sorted(self.prompt.special)},
            "sources": [asdict(source) for source in self.sources],
            "targets": [asdict(target) for target in self.targets],
            "target_logits": self.target_logits.tolist(),
            "conservation_error": listed(self.conservation_error),
            "scores": self.scores.tolist(),
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per target and source: labels, positions, score in logits.

        Raises:
            DePassError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise DePassError("to_dataframe needs pandas: pip install 'depass-kernels[plots]'") from error
        rows = [
            {
                "target": target.label, "position": target.position, "source": source.label, "kind": source.kind,
                "start": source.start, "end": source.end, "score": score,
            }
            for target, row in zip(self.targets, self.scores.tolist(), strict=True)
            for source, score in zip(self.sources, row, strict=True)
        ]  # fmt: skip
        return pandas.DataFrame(rows).astype({"start": "Int64", "end": "Int64"})

    def to_captum(self) -> Any:
        """captum's ``LLMAttributionResult``: see :mod:`depass.compat.exports`.

        Raises:
            DePassError: captum is not installed.
        """
        from .compat.exports import to_captum

        return to_captum(self)

    def to_inseq(self) -> Any:
        """inseq's ``FeatureAttributionOutput``: see :mod:`depass.compat.exports`.

        Raises:
            DePassError: inseq is not installed.
        """
        from .compat.exports import to_inseq

        return to_inseq(self)

    def to_circuitsvis(self) -> Any:
        """CircuitsVis's coloured tokens: see :mod:`depass.compat.exports`.

        Raises:
            DePassError: CircuitsVis is not installed.
        """
        from .compat.exports import to_circuitsvis

        return to_circuitsvis(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write scores and all that belongs to them as safetensors with JSON metadata; :meth:`load` reads it.

        Raises:
            OutputError: the path cannot be written.
        """
        save_result(path, self.to_dict(), {name: getattr(self, name) for name in TENSORS})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Attribution:
        """Read what :meth:`save` wrote; needs no model.

        Raises:
            OutputError: the file cannot be read or is no attribution.
        """
        return load_result(path, _FORMAT, TENSORS, attribution)

    def _row(self, target: int) -> int:
        if not -len(self.targets) <= target < len(self.targets):
            raise TargetError(f"target {target} is out of range, there are {len(self.targets)}")
        return target


def judged(settings: Settings, error: Tensor) -> str:
    """How well scores add up, in words, or which method promises nothing of the kind."""
    return f"conservation error {float(error.max()):.1e}" if settings.adds_up else f"by {settings.method}"


def listed(numbers: Tensor) -> Any:
    """Nested lists, or None for what a baseline does not have: JSON knows no NaN."""
    return None if bool(numbers.isnan().all()) else numbers.tolist()


def attribution(tensors: dict[str, Any], said: dict[str, Any]) -> Attribution:
    """An attribution of its tensors and what ``to_dict`` said of it.

    Raises:
        ValueError: the two do not fit.
    """
    check_shape(tensors["scores"], said["targets"], said["sources"])
    sources, length = tuple(Source(**one) for one in said["sources"]), len(said["prompt"]["tokens"])
    for source in sources:
        if source.start is not None and not 0 <= source.start < (source.end or 0) <= length:
            raise ValueError(f"its source {source.label!r} lies at {source.start} to {source.end} of {length} tokens")
    return Attribution(**tensors, sources=sources, **common(said))


def check_shape(scores: Tensor, *axes: Sized) -> None:
    """Refuse a file whose scores are not of what it says that they are.

    Raises:
        ValueError: a dimension of the scores is not as long as its axis.
    """
    wanted = tuple(map(len, axes))
    if scores.shape != wanted:
        raise ValueError(f"its scores are {tuple(scores.shape)}, and it names {wanted}")


def common(described: dict[str, Any]) -> dict[str, Any]:
    """Targets, prompt and settings of a result, from what ``to_dict`` said of them.

    Raises:
        ValueError: a target lies where the prompt has no token.
    """
    prompt = described["prompt"]
    for target in described["targets"]:
        if not 0 <= target["position"] < len(prompt["tokens"]):
            raise ValueError(f"its target at {target['position']} is behind no token of {len(prompt['tokens'])}")
    return {
        "targets": tuple(Target(**{**one, "token_ids": tuple(one["token_ids"])}) for one in described["targets"]),
        "prompt": Prompt(
            ids=tuple(prompt["ids"]),
            tokens=tuple(prompt["tokens"]),
            text=prompt["text"],
            offsets=tuple((begin, end) for begin, end in prompt["offsets"]),
            special=frozenset(prompt["special"]),
        ),
        "settings": Settings(**described["settings"]),
    }
