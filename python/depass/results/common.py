"""The base classes of results, and the parts of their files that all results share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sized
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import DePassError, SourceError, TargetError
from ..inputs.prompt import Prompt, Section
from ..inputs.settings import Settings
from ..inputs.targets import Target
from ..sources.source import Source
from ..views.drawing import Explained
from ..views.page import View, framed, render
from .saved import kind_of, load_result, save_result

if TYPE_CHECKING:
    import pandas

AnyResult = TypeVar("AnyResult", bound="Result")


class Result(ABC):
    """A result that can be saved and shown as a page.

    A subclass defines the format of its files (``FORMAT``), their tensors (``TENSORS``) and other values (``to_dict``),
    and how to make a result from them (``from_saved``).
    """

    FORMAT: ClassVar[str]
    TENSORS: ClassVar[tuple[str, ...]]

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The result as a dict of plain values."""

    @abstractmethod
    def page_view(self) -> View:
        """The view of the result for :func:`depass.views.page.render`, which can put several on one page."""

    @classmethod
    @abstractmethod
    def from_saved(cls: type[AnyResult], tensors: dict[str, Any], said: dict[str, Any]) -> AnyResult:
        """Make a result from its tensors and the values of ``to_dict``.

        Raises:
            ValueError: the tensors and the values are inconsistent.
        """

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a saved file, by name."""
        return {name: getattr(self, name) for name in self.TENSORS}

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The result as a standalone HTML page, which is also written to ``path`` if given.

        Raises:
            OutputError: the path cannot be written, or a score is NaN or infinite.
        """
        return render([(kind_of(self.FORMAT), self.page_view())], path)

    def _repr_html_(self) -> str:
        """The page of :meth:`to_html` in a frame: a notebook shows it where a result is a cell's last expression."""
        return framed(self.to_html())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result atomically as safetensors with JSON metadata; :meth:`load` reads it.

        Raises:
            OutputError: the path cannot be written.
        """
        save_result(path, self.to_dict(), self.tensors())

    @classmethod
    def load(cls: type[AnyResult], path: str | os.PathLike[str]) -> AnyResult:
        """Read a result that :meth:`save` wrote; this needs no model.

        Raises:
            OutputError: the file cannot be read or holds another kind of result.
        """
        return load_result(path, cls.FORMAT, cls.TENSORS, cls.from_saved)


class TargetedResult(Result):
    """A result that explains several targets."""

    targets: tuple[Target, ...]

    def row(self, target: int) -> int:
        """The checked index of a target.

        Raises:
            TargetError: the index is out of range.
        """
        if not -len(self.targets) <= target < len(self.targets):
            raise TargetError(f"target {target} is out of range: the number of targets is {len(self.targets)}")
        return target


class ScoredResult(TargetedResult):
    """A result with scores ``[targets, ...]``; every score of a target belongs to one source."""

    TOP: ClassVar[int]

    scores: Tensor

    @abstractmethod
    def records(self) -> Iterator[dict[str, Any]]:
        """One table row per target and source."""

    @abstractmethod
    def source_at(self, index: int) -> Source:
        """The source of the score at ``index`` of a target's flattened scores."""

    def top(self, k: int | None = None, target: int = 0) -> list[tuple[Source, float]]:
        """The ``k`` sources with the largest absolute scores, largest first, with their signed scores in logits.

        The source ``unassigned`` is left out, because it is no part.

        Args:
            k: the number of sources; by default 5, and 10 for a sweep.
            target: the index of the target.

        Raises:
            SourceError: ``k`` is less than 1.
            TargetError: the index is out of range.
        """
        k = self.TOP if k is None else k
        if k < 1:
            raise SourceError(f"top({k}): k must be at least 1")
        scores = self.scores[self.row(target)].flatten()
        best = scores.abs().argsort(descending=True, stable=True)[: k + 1].tolist()
        named = [(self.source_at(index), float(scores[index])) for index in best]
        return [pair for pair in named if pair[0].kind != "unassigned"][:k]

    def to_dataframe(self) -> pandas.DataFrame:
        """A pandas DataFrame with one row per target and source: labels, positions, and the score in logits.

        Raises:
            DePassError: pandas is not installed.
        """
        return table(self.records(), ("start", "end"))


def table(records: Iterable[dict[str, Any]], integers: Iterable[str]) -> pandas.DataFrame:
    """A pandas DataFrame of records; the columns ``integers``, where it has them, may lack values.

    Raises:
        DePassError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise DePassError("to_dataframe needs pandas: pip install 'depass-kernels[plots]'") from error
    frame = pandas.DataFrame(list(records))
    return frame.astype({name: "Int64" for name in integers if name in frame})


def judged(settings: Settings, error: Tensor) -> str:
    """The conservation error as text, or the name of a method whose scores need not add up."""
    return f"conservation error {float(error.max()):.1e}" if settings.adds_up else f"by {settings.method}"


def conservation_error(scores: Tensor, logits: Tensor) -> Tensor:
    """``|Σ scores - logit| / max(|logit|, Σ |scores|)`` over the last dimension of ``scores``, in fp64."""
    total, spread = scores.double().sum(-1), scores.double().abs().sum(-1)
    size = torch.maximum(logits.abs().expand_as(spread), spread).clamp(min=torch.finfo(torch.float64).tiny)
    return (total - logits).abs() / size


def listed(numbers: Tensor) -> Any:
    """Nested lists, or None where all are NaN (a baseline's): JSON has no NaN."""
    return None if bool(numbers.isnan().all()) else numbers.tolist()


def check_shape(scores: Tensor, *axes: Sized) -> None:
    """Check that the scores of a file have the shape of their labels.

    Raises:
        ValueError: a dimension of the scores differs in length from its axis.
    """
    wanted = tuple(map(len, axes))
    if scores.shape != wanted:
        raise ValueError(f"its scores have shape {tuple(scores.shape)}, but its labels have shape {wanted}")


def described(result: Explained) -> dict[str, Any]:
    """Settings, prompt and targets of a result as plain values; :func:`common` reads them."""
    return {
        "settings": asdict(result.settings),
        "prompt": prompt_values(result.prompt),
        "targets": [asdict(target) for target in result.targets],
    }


def common(said: dict[str, Any]) -> dict[str, Any]:
    """Targets, prompt and settings of a result, from the values of :func:`described`.

    Raises:
        ValueError: the position of a target is out of range.
    """
    prompt = said["prompt"]
    for target in said["targets"]:
        if not 0 <= target["position"] < len(prompt["tokens"]):
            raise ValueError(
                f"its target position {target['position']} is out of range: its prompt has {len(prompt['tokens'])} tokens"
            )
    settings = Settings(**said["settings"])
    _ = settings.balance  # an unknown rule raises
    return {
        "targets": tuple(Target(**{**fields, "token_ids": tuple(fields["token_ids"])}) for fields in said["targets"]),
        "prompt": read_prompt(prompt),
        "settings": settings,
    }


def prompt_values(prompt: Prompt) -> dict[str, Any]:
    """A prompt as plain values; :func:`read_prompt` reads them."""
    return {**asdict(prompt), "special": sorted(prompt.special)}


def read_prompt(said: dict[str, Any]) -> Prompt:
    """A prompt from the values of :func:`prompt_values`."""
    return Prompt(
        ids=tuple(said["ids"]),
        tokens=tuple(said["tokens"]),
        text=said["text"],
        offsets=tuple((begin, end) for begin, end in said["offsets"]),
        special=frozenset(said["special"]),
        sections=tuple(Section(**section) for section in said["sections"]),
    )
