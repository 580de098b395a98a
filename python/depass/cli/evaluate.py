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
from ..evaluate.suite import SuiteOptions, run_all
from ..evaluate.task import Task
from .quiet import add_verbose

SUITE = "run every protocol that compares methods, and say which method to take when"


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add one sub-command per task, and one that runs the protocols that compare methods."""
    commands = parser.add_subparsers(required=True, metavar="TASK")
    every = commands.add_parser("all", help=plain(SUITE), description=SUITE)
    every.set_defaults(run=_run_all)
    add_verbose(every)
    add_options(every, ModelOptions)
    _add_out(every, "depass-evaluation", "directory for the page, with a directory for each run")
    add_options(every, SuiteOptions)
    for task in TASKS.values():
        command = commands.add_parser(task.name, help=plain(task.help), description=task.help)
        command.set_defaults(run=_run, task=task)
        add_verbose(command)
        add_options(command, ModelOptions)
        add_options(command, task.Options, ["data"])
        _add_out(command, f"depass-{task.name}", "directory for the rows and the report")
        add_options(command, task.Options, [field.name for field in fields(task.Options) if field.name != "data"])


def _add_out(command: argparse.ArgumentParser, default: str, what: str) -> None:
    how = f"{what}; run the same command again to resume (default: %(default)s)"
    command.add_argument("--out", metavar="DIR", default=default, help=how)


def _run_all(arguments: argparse.Namespace) -> None:
    loading, options = read_options(ModelOptions, arguments), read_options(SuiteOptions, arguments)
    dp = load_model(loading)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConservationWarning)  # the reports give the conservation error
        say(str(run_all(dp, options, Path(arguments.out), quantization=loading.quantization)))


def _run(arguments: argparse.Namespace) -> None:
    task: Task[Any] = arguments.task
    loading, options = read_options(ModelOptions, arguments), read_options(task.Options, arguments)
    dp = load_model(loading)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConservationWarning)  # the report gives the conservation error
        say(str(run(task, dp, options, Path(arguments.out), quantization=loading.quantization)))
