"""Base classes of an evaluation: its items, one row of results per item, and a report on the rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..api import DePass
from ..arguments import CommandOptions, argument
from ..errors import OptionError
from .summary import Result

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TaskOptions(CommandOptions):
    """The options that all tasks share. A task adds its own fields; the command turns all fields into arguments.

    Attributes:
        data: a file, or the name of a built-in set if the task has some.
        seed: seed of all random numbers.
        skip: leave out the first ``skip`` items: prompts on which something was chosen should not be reported.
        limit: measure only the first ``limit`` of the others; None: all.

    Raises:
        OptionError: a field has an invalid value.
    """

    data: str = field(metadata=argument("the data file (required)", metavar="FILE"))
    seed: int = field(default=0, metadata=argument("seed of all random numbers (default: 0)", metavar="N", least=0))
    skip: int = field(default=0, metadata=argument("leave out the first N items (default: 0)", metavar="N", least=0))
    limit: int | None = field(default=None, metadata=argument("measure only the first N items", metavar="N", least=1))

    @property
    def needed(self) -> int | None:
        """How many items a run looks at, those that it leaves out included; None: all."""
        return None if self.limit is None else self.skip + self.limit


AnyTaskOptions = TypeVar("AnyTaskOptions", bound=TaskOptions)


@dataclass(frozen=True)
class Item:
    """One thing to measure.

    Attributes:
        id: its unique id; a resumed run uses it to find the items that are done.
        data: the fields that the task reads.
        broken: why its row of the data set is broken, or None. A broken item is counted but not measured.
    """

    id: str
    data: dict[str, Any] = field(default_factory=dict)
    broken: str | None = None


class Task(ABC, Generic[AnyTaskOptions]):
    """One evaluation.

    Attributes:
        name: its name on the command line.
        help: what it does, in one line.
        Options: the class of its options, a frozen dataclass derived from :class:`TaskOptions`.
        files: names of the options that may name a file. The file's content is part of a run's settings.
        edition: the number of the measure's definition. Rows of different editions are not mixed in a run.
        together: how many items a run with a time limit measures before it looks at the clock.
    """

    name: str
    help: str
    Options: type[AnyTaskOptions]
    files: tuple[str, ...] = ("data",)
    edition: int = 1
    together: int = 1

    @abstractmethod
    def items(self, options: AnyTaskOptions) -> list[Item]:
        """All items; the run leaves out ``options.skip`` and takes the first ``options.limit`` of the others.

        Raises:
            DataError: the data set cannot be read.
        """

    def prepare(self, dp: DePass, items: Sequence[Item], options: AnyTaskOptions) -> Any:
        """Compute what all measurements share, from all items that are not broken. Every call must give the same result."""

    @abstractmethod
    def measure(self, dp: DePass, prepared: Any, items: Sequence[Item], options: AnyTaskOptions) -> Iterator[Row]:
        """Yield one row per item: its ``id``, its ``status`` (``ok``, ``skipped`` or ``error``) and the measured values.

        A row that is not ``ok`` gives the ``reason``. A row's numbers may depend only on its item and the options, not on
        the other items, because a resumed run passes only the items without a row.
        """

    def refused(self, dp: DePass, options: AnyTaskOptions) -> dict[str, str]:
        """The methods of ``options`` that cannot score this model, with the reasons; a task that compares none has none.

        A run raises an error that names them, before it measures anything.

        Raises:
            OptionError: the model or the data lack what the task needs, whatever the method.
        """
        return {}

    @abstractmethod
    def report(self, rows: Sequence[Row], options: AnyTaskOptions, folder: Path) -> str:
        """A Markdown report on the ``ok`` rows, which may be empty. Its figures are written into ``folder``."""

    def results(self, rows: Sequence[Row], options: AnyTaskOptions) -> list[Result]:
        """What the ``ok`` rows, one or more, say of each method; a task that compares no methods has none."""
        return []


def chosen(known: Sequence[str], names: str) -> list[str]:
    """The named methods; ``names`` are separated by commas.

    Raises:
        OptionError: there is no such method, or one is named twice.
    """
    methods = names.split(",")
    for index, name in enumerate(methods):
        if name not in known:
            raise OptionError(f"--methods: unknown method {name!r}; choose from {', '.join(known)}")
        if name in methods[:index]:
            raise OptionError(f"--methods names {name!r} twice; name each method once")
    return methods


def by_reason(refused: Mapping[str, str]) -> list[str]:
    """A sentence for each reason of :meth:`Task.refused`, with all methods that are refused for it."""
    methods: dict[str, list[str]] = {}
    for method, reason in refused.items():
        methods.setdefault(reason, []).append(method)
    return [f"{', '.join(names)}: {reason}" for reason, names in methods.items()]


def skipped(item: Item, reason: str, **more: Any) -> Row:
    """The row of an item that is not measured. Reports count the reasons, so use few different ones."""
    return {"id": item.id, "status": "skipped", "reason": reason, **more}


def failed(item: Item, reason: object, **more: Any) -> Row:
    """The row of an item that cannot be measured."""
    return {"id": item.id, "status": "error", "reason": str(reason), **more}
