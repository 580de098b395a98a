"""The command ``depass evaluate``: its tasks, their options, and the run."""

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
from .quiet import add_verbose


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add one sub-command per task."""
    commands = parser.add_subparsers(required=True, metavar="TASK")
    for task in TASKS.values():
        command = commands.add_parser(task.name, help=plain(task.help), description=task.help)
        command.set_defaults(run=_run, task=task)
        add_verbose(command)
        add_options(command, ModelOptions)
        add_options(command, task.Options, ["data"])
        command.add_argument(
            "--out", metavar="DIR", default=f"depass-{task.name}",
            help="directory for the rows and the report; run the same command again to resume (default: %(default)s)",
        )  # fmt: skip
        add_options(command, task.Options, [field.name for field in fields(task.Options) if field.name != "data"])


def _run(arguments: argparse.Namespace) -> None:
    task: Task[Any] = arguments.task
    loading, options = read_options(ModelOptions, arguments), read_options(task.Options, arguments)
    dp = load_model(loading)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConservationWarning)  # the report gives the conservation error
        say(str(run(task, dp, options, Path(arguments.out), quantization=loading.quantization)))
