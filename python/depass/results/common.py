"""What results have in common: a base that saves, loads and shows them, and what their files have in common."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from ..errors import DePassError, SourceError, TargetError
from ..inputs.prompt import Prompt
from ..inputs.settings import Settings
from ..inputs.targets import Target
from ..sources.source import Source
from ..views.page import View, framed, render
from .saved import kind_of, load_result, save_result

if TYPE_CHECKING:
    import pandas

AnyResult = TypeVar("AnyResult", bound="Result")


class Result(ABC):
    """A result that can be saved and shown as a page.

    A class says what its files are called (``FORMAT``), which tensors they hold (``TENSORS``) and what else (``to_dict``),
    and how to make a result of them again (``from_saved``).
    """

    FORMAT: ClassVar[str]
    TENSORS: ClassVar[tuple[str, ...]]

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings."""

    @abstractmethod
    def page_view(self) -> View:
        """What a page shows of it: for :func:`depass.views.page.render`, which can show several."""

    @classmethod
    @abstractmethod
    def from_saved(cls: type[AnyResult], tensors: dict[str, Any], said: dict[str, Any]) -> AnyResult:
        """A result of its tensors and what ``to_dict`` said of it.

        Raises:
            ValueError: the two do not fit.
        """

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps as tensors, by name."""
        return {name: getattr(self, name) for name in self.TENSORS}

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One standalone page; written to ``path`` where given.

        Raises:
            OutputError: the path cannot be written, or a score is no number.
        """
        return render([(kind_of(self.FORMAT), self.page_view())], path)

    def _repr_html_(self) -> str:
        """The page of :meth:`to_html` in a frame: a notebook shows it where a result is a cell's last expression."""
        return framed(self.to_html())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it whole as safetensors with JSON metadata; :meth:`load` reads it.

        Raises:
            OutputError: the path cannot be written.
        """
        save_result(path, self.to_dict(), self.tensors())

    @classmethod
    def load(cls: type[AnyResult], path: str | os.PathLike[str]) -> AnyResult:
        """Read what :meth:`save` wrote; needs no model.

        Raises:
            OutputError: the file cannot be read or is of another kind.
        """
        return load_result(path, cls.FORMAT, cls.TENSORS, cls.from_saved)


class ScoredResult(Result):
    """A result whose scores ``[targets, ...]`` are each a source's."""

    TOP: ClassVar[int]

    scores: Tensor
    targets: tuple[Target, ...]

    @abstractmethod
    def records(self) -> Iterator[dict[str, Any]]:
        """A row of a table for each target and source."""

    @abstractmethod
    def source_at(self, index: int) -> Source:
        """What the score at ``index`` of a target's flattened scores is of."""

    def row(self, target: int) -> int:
        """A target's number, checked.

        Raises:
            TargetError: there is none of that number.
        """
        if not -len(self.targets) <= target < len(self.targets):
            raise TargetError(f"target {target} is out of range, there are {len(self.targets)}")
        return target

    def top(self, k: int | None = None, target: int = 0) -> list[tuple[Source, float]]:
        """The ``k`` sources with the largest scores by absolute value, in logits, largest first (5; of a sweep 10)."""
        k = self.TOP if k is None else k
        if k < 1:
            raise SourceError(f"top({k}): k must be at least 1")
        scores = self.scores[self.row(target)].flatten()
        best = scores.abs().argsort(descending=True, stable=True)[:k].tolist()
        return [(self.source_at(index), float(scores[index])) for index in best]

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per target and source: labels, where it is, score in logits.

        Raises:
            DePassError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise DePassError("to_dataframe needs pandas: pip install 'depass-kernels[plots]'") from error
        frame = pandas.DataFrame(list(self.records()))
        return frame.astype({name: "Int64" for name in ("start", "end") if name in frame})


def judged(settings: Settings, error: Tensor) -> str:
    """How well scores add up, in words, or which method promises nothing of the kind."""
    return f"conservation error {float(error.max()):.1e}" if settings.adds_up else f"by {settings.method}"


def listed(numbers: Tensor) -> Any:
    """Nested lists, or None for what a baseline does not have: JSON knows no NaN."""
    return None if bool(numbers.isnan().all()) else numbers.tolist()


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
