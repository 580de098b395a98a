"""What a command prints besides its result: our warnings, one line each; with ``--verbose`` also what libraries say."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import errors
from ..errors import escaped


def add_verbose(command: argparse.ArgumentParser) -> None:
    """Add the argument ``--verbose``."""
    command.add_argument("--verbose", action="store_true", help="also print what libraries warn of and log")


@contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Inside the ``with`` block libraries' warnings and log lines are not printed, unless ``verbose``."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
        for kind in vars(errors).values():
            if isinstance(kind, type) and issubclass(kind, UserWarning):
                warnings.simplefilter("default", kind)
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if category.__module__ == errors.__name__:
                print(f"depass: {escaped(str(message))}", file=sys.stderr)
            else:
                usual(message, category, *where)

        warnings.showwarning = show  # type: ignore[assignment]
        try:
            yield
        finally:
            logging.disable(before)
