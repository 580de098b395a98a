"""Experiments that test whether the attributions are faithful: those of the paper (DePass, section 4),
those of other papers, and some whose truth is planted, on any model.

::

    depass evaluate tokens -m MODEL --data known_1000.json --out DIR
"""

from typing import Any

from .circuits import Circuits
from .citations import Citations
from .components import Components
from .language import Language
from .needles import Needles
from .rules import Rules
from .run import run
from .suite import SuiteOptions, run_all
from .task import Item, Row, Task, TaskOptions, failed, skipped
from .tokens import Tokens
from .truthful import Truthful

TASKS: dict[str, Task[Any]] = {
    task.name: task
    for task in (
        Tokens(),
        Components("heads"),
        Components("neurons"),
        Components("experts"),
        Truthful(),
        Language(),
        Rules(),
        Citations(),
        Circuits(),
        Needles(),
    )
}

__all__ = ["TASKS", "Item", "Row", "SuiteOptions", "Task", "TaskOptions", "failed", "run", "run_all", "skipped"]
