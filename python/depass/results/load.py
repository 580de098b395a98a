"""Loading a saved result of any kind."""

from __future__ import annotations

import os

from ..errors import OutputError
from .attribution import Attribution
from .citations import Citations
from .common import Result
from .generation import Generation
from .saved import kind_of, saved_format
from .survey import Survey
from .sweep import Sweep

KINDS: dict[str, type[Result]] = {
    kind_of(kind.FORMAT): kind for kind in (Attribution, Sweep, Survey, Generation, Citations)
}


def load(path: str | os.PathLike[str]) -> Result:
    """Read a saved attribution, sweep, survey, generation or citations.

    Raises:
        OutputError: the file cannot be read or is not a saved result.
    """
    kind = kind_of(saved_format(path) or "")
    if kind not in KINDS:
        raise OutputError(
            f"{os.fspath(path)} is not a saved result ({', '.join(KINDS)}); give a file that a result's save() wrote"
        )
    return KINDS[kind].load(path)
