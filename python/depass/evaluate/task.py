"""What an evaluation is: items, one row of results for each, and a report of the rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..api import DePass
from ..arguments import CommandOptions, argument

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TaskOptions(CommandOptions):
    """What every task is told. A task adds fields of its own; the command makes its arguments of them.

    Attributes:
        data: a file, or the name of a built-in set where the task knows some.
        seed: of everything random.
        limit: measure only the first so many items; None: all.

    Raises:
        OptionError: a field has a value that it cannot have.
    """

    data: str = field(metadata=argument("a data set (required)", metavar="FILE"))
    seed: int = field(default=0, metadata=argument("of everything random (default: 0)", least=0))
    limit: int | None = field(default=None, metadata=argument("measure only the first N items", metavar="N", least=1))


Told = TypeVar("Told", bound=TaskOptions)


@dataclass(frozen=True)
class Item:
    """One thing to measure.

    Attributes:
        id: its name among the items, by which a run that was stopped goes on.
        data: what a task reads of it.
        broken: why it cannot be measured, where its row of the data set is broken; it is counted, never measured.
    """

    id: str
    data: dict[str, Any] = field(default_factory=dict)
    broken: str | None = None


class Task(ABC, Generic[Told]):
    """One evaluation.

    Attributes:
        name: on the command line.
        help: what it measures, in a line.
        Options: the class of its options, a frozen dataclass that begins with :class:`TaskOptions`.
        files: names of the options that may name a file; what is in it belongs to a run's settings.
    """

    name: str
    help: str
    Options: type[Told]
    files: tuple[str, ...] = ("data",)

    @abstractmethod
    def items(self, options: Told) -> list[Item]:
        """All items; the run takes the first ``options.limit`` of them.

        Raises:
            DataError: the data set cannot be read.
        """

    def prepare(self, dp: DePass, items: Sequence[Item], options: Told) -> Any:
        """What the measuring of every item needs, of all items that are not broken; the same whenever it is called again."""

    @abstractmethod
    def measure(self, dp: DePass, prepared: Any, items: Sequence[Item], options: Told) -> Iterator[Row]:
        """One row for each item, as they come: ``id``, ``status`` (``ok``, ``skipped`` or ``error``) and what was measured.

        What is not ``ok`` says why as ``reason``. A row's numbers depend on its item and the options alone, not on what
        other items are there: after a stop only the items without a row are given.
        """

    @abstractmethod
    def report(self, rows: Sequence[Row], options: Told, folder: Path) -> str:
        """The ``ok`` rows (there may be none) as Markdown; its figures are drawn into ``folder``."""


def skipped(item: Item, reason: str, **more: Any) -> Row:
    """The row of an item that says nothing: ``reason`` is one of few, for they are counted."""
    return {"id": item.id, "status": "skipped", "reason": reason, **more}


def failed(item: Item, reason: object, **more: Any) -> Row:
    """The row of an item that cannot be measured."""
    return {"id": item.id, "status": "error", "reason": str(reason), **more}
