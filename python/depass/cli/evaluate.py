"""The command ``depass evaluate``: every task's options, and its run."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..arguments import ModelOptions, add_options, load_model, plain, read_options, say
from ..errors import ConservationWarning
from ..evaluate import TASKS
from ..evaluate.run import run
from ..evaluate.task import Task


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """A sub-command for each task."""
    commands = parser.add_subparsers(required=True, metavar="TASK")
    for task in TASKS.values():
        one = commands.add_parser(task.name, help=plain(task.help), description=task.help)
        one.set_defaults(run=_run, task=task)
        add_options(one, ModelOptions)
        add_options(one, task.Options, ["data"])
        one.add_argument(
            "--out", metavar="DIR", default=f"depass-{task.name}",
            help="where rows and report go (default: %(default)s)",
        )  # fmt: skip
        add_options(one, task.Options, [field.name for field in fields(task.Options) if field.name != "data"])


def _run(arguments: argparse.Namespace) -> None:
    task: Task[Any] = arguments.task
    loading, options = read_options(ModelOptions, arguments), read_options(task.Options, arguments)
    dp = load_model(loading)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConservationWarning)  # the reports say how far the scores miss
        say(str(run(task, dp, options, Path(arguments.out), quantization=loading.quantization)))
