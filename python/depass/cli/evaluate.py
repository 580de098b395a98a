"""The command ``depass evaluate``: every task's options, and its run."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from .. import arguments
from ..errors import ConservationWarning
from ..evaluate import TASKS
from ..evaluate.run import run
from ..evaluate.task import Task


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """A sub-command for each task."""
    commands = parser.add_subparsers(required=True, metavar="TASK")
    for task in TASKS.values():
        one = commands.add_parser(task.name, help=task.help, description=task.help)
        one.set_defaults(run=_run, task=task)
        _add(one, task)


def options_of(task: Task, arguments: Sequence[str] = ()) -> argparse.Namespace:
    """A task's options as the command would have them, for :func:`depass.evaluate.run.run` without it."""
    parser = argparse.ArgumentParser()
    _add(parser, task)
    return parser.parse_args(arguments)


def _add(parser: argparse.ArgumentParser, task: Task) -> None:
    arguments.add_model(parser)
    add = parser.add_argument
    default = "required" if task.data is None else f"default: {task.data}"
    add("--data", metavar="FILE", default=task.data, required=task.data is None, help=f"{task.data_help} ({default})")
    add("--out", metavar="DIR", default=f"depass-{task.name}", help="where rows and report go (default: %(default)s)")
    add("--seed", type=arguments.natural, default=0, help="of everything random (default: 0)")
    add("--limit", type=arguments.positive, metavar="N", help="measure only the first N items")
    task.add_arguments(parser)


def _run(options: argparse.Namespace) -> None:
    task: Task = options.task
    dp = arguments.load_model(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConservationWarning)  # the reports say how far the scores miss
        arguments.say(str(run(task, dp, options, Path(options.out))))
