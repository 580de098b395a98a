"""All protocols one after the other, and a page that says which method to take when."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..api import DePass
from ..arguments import CommandOptions, argument
from ..errors import DataError, OptionError
from ..files import write_atomically
from ..runs import hold
from . import data, decide
from .circuits import METHODS as RANKINGS
from .circuits import Circuits
from .methods import METHODS
from .needles import METHODS as NEEDLE_METHODS
from .needles import Needles
from .run import run
from .task import Task, TaskOptions, by_reason
from .tokens import Tokens

PAGE = "which-method.md"
SLOWEST = ("integrated_gradients_20", "integrated_gradients_50", "gradient_shap")  # left out of a quick run
SLOW_BEYOND_TOKENS = ("softmax", "steered")  # left out of its long prompts and sweeps of heads: a state of all sources
QUICK_CIRCUITS = 40  # prompts; the means are taken over all of them before the first is measured
QUICK = 540.0  # seconds for all protocols; ten minutes are meant, with loading and the last items


@dataclass(frozen=True, kw_only=True)
class SuiteOptions(CommandOptions):
    """The options of :func:`run_all`.

    Attributes:
        facts: prompts about facts: a file, or a built-in set.
        ioi: prompts in which one of two people receives something: a file, or a built-in set.
        seed: seed of all random numbers.
        quick: stop each protocol when its share of nine minutes is over, and leave out the slowest methods of each.
    """

    facts: str = field(
        default="facts", metadata=argument(f"prompts about facts: {data.HELP} (default: facts)", metavar="FILE")
    )
    ioi: str = field(
        default="ioi", metadata=argument(f"prompts that name two people: {data.HELP} (default: ioi)", metavar="FILE")
    )
    seed: int = field(default=0, metadata=argument("seed of all random numbers (default: 0)", metavar="N", least=0))
    quick: bool = field(
        default=False,
        metadata=argument("stop each task when its share of nine minutes is over, and leave out the slowest methods"),
    )


class Protocol(NamedTuple):
    """One run of the suite, and its share of the time of a quick one."""

    name: str
    task: Task[Any]
    options: TaskOptions
    share: float


def run_all(
    dp: DePass, options: SuiteOptions, folder: str | os.PathLike[str], *, quantization: str | None = None
) -> Path:
    """Run every protocol in a directory of its own below ``folder``, and write the page from their results.

    A method that cannot score this model is left out, and the page says why. A stopped suite resumes where it was: run it
    again with the same options.

    Args:
        dp: the model.
        options: which prompts, and how much time.
        folder: the output directory; it is created if needed.
        quantization: see :func:`.run.run`.

    Returns:
        The path of the page, which is in ``folder`` with its figure.

    Raises:
        OptionError, DataError, OutputError, DePassError: see :func:`.run.run`.
    """
    folder, reports, left_out = Path(folder), list[Path](), dict[str, list[str]]()
    planned = protocols(options)
    for protocol in planned:  # a data set that cannot be read is found before anything is measured
        if not protocol.task.items(protocol.options):
            raise DataError(f"{protocol.options.data} has no rows to measure; give a data set with rows")
    with hold(folder):
        began = time.monotonic()
        for number, protocol in enumerate(planned):
            try:
                refused = protocol.task.refused(dp, protocol.options)
            except OptionError as error:
                left_out.setdefault(str(error), []).append(protocol.name)
                continue
            for sentence in by_reason(refused):
                left_out.setdefault(sentence, []).append(protocol.name)
            left = _without(protocol.options, refused)
            if left is not None:
                left_seconds = max(
                    0.0, QUICK - (time.monotonic() - began)
                )  # less where an earlier protocol took longer
                share = protocol.share / sum(later.share for later in planned[number:])
                seconds = left_seconds * share if options.quick else None
                at = folder / protocol.name
                report = run(protocol.task, dp, left, at, quantization=quantization, seconds=seconds, refused={})
                reports.append(report)
        experiments = [decide.load(report.parent) for report in reports if (report.parent / "results.json").exists()]
        write_atomically(folder / PAGE, (_page(experiments, reports, left_out, folder) + "\n").encode())
    return folder / PAGE


def protocols(options: SuiteOptions) -> tuple[Protocol, ...]:
    """What the suite runs, in order; the shares add up to 1."""
    tokens, needles, circuits = Tokens(), Needles(), Circuits()
    fast = ",".join(name for name in METHODS if name not in SLOWEST)
    of_tokens: dict[str, Any] = {"methods": ",".join(METHODS)}
    of_needles, of_circuits = dict[str, Any](), dict[str, Any]()
    if options.quick:
        of_tokens = {"methods": fast, "slow_limit": 20, "measures": "deletion"}
        slow = (*SLOWEST, *SLOW_BEYOND_TOKENS)
        left = ",".join(name for name in NEEDLE_METHODS if name not in slow)
        of_needles = {"methods": left, "data": "fact", "tokens": (100,), "steps": 5}
        of_circuits = {"methods": ",".join(name for name in RANKINGS if name not in slow), "limit": QUICK_CIRCUITS}
    common: dict[str, Any] = {"seed": options.seed}
    return (
        Protocol("tokens", tokens, tokens.Options(data=options.facts, **common, **of_tokens), 0.3),
        Protocol("tokens-ioi", tokens, tokens.Options(data=options.ioi, **common, **of_tokens), 0.2),
        Protocol("needles", needles, needles.Options(**common, **of_needles), 0.3),
        Protocol("circuits", circuits, circuits.Options(data=options.ioi, **common, **of_circuits), 0.2),
    )


def _without(options: Any, refused: Iterable[str]) -> Any:
    """A protocol's options without these methods; None where no method is left."""
    if not refused:
        return options
    names = [name for name in options.methods.split(",") if name not in refused]
    return replace(options, methods=",".join(names)) if names else None


def _page(
    experiments: list[decide.Experiment], reports: list[Path], left_out: dict[str, list[str]], folder: Path
) -> str:
    links = ", ".join(f"[{report.parent.name}]({report.relative_to(folder)})" for report in reports)
    text = ["# Which method when", f"Reports: {links}."] if reports else ["# Which method when"]
    if left_out:
        text.append("What cannot be measured on this model was left out:")
        text.append("\n".join(f"- in {', '.join(names)}: {sentence}" for sentence, names in left_out.items()))
    if not any(experiment.results for experiment in experiments):
        return "\n\n".join([*text, "No prompt was measured: the reports say why."])
    text += decide.tables(experiments)
    figure = decide.draw(experiments, folder / "which-method.png")
    return "\n\n".join([*text, figure, decide.DRAWN_IN_WORDS] if figure else text)
