"""Any saved result."""

from __future__ import annotations

import os

from ..errors import OutputError
from .attribution import Attribution
from .common import Result
from .generation import Generation
from .saved import kind_of, saved_format
from .sweep import Sweep

KINDS: dict[str, type[Result]] = {kind_of(kind.FORMAT): kind for kind in (Attribution, Sweep, Generation)}


def load(path: str | os.PathLike[str]) -> Result:
    """Read a saved result of whichever kind.

    Raises:
        OutputError: the file cannot be read or is no result.
    """
    kind = kind_of(saved_format(path) or "")
    if kind not in KINDS:
        raise OutputError(
            f"{os.fspath(path)} is no saved result; there are: {', '.join(KINDS)}, as their save() writes them"
        )
    return KINDS[kind].load(path)
