"""Which method when: the decision table and its figure, from the results that the committed evaluations hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from depass.evaluate.decide import DRAWN_IN_WORDS, Experiment, load, tables
from depass.evaluate.decide import draw as draw_all

from .figures import shown
from .machine import ROOT
from .wording import NOTHING

FOLDER = ROOT / "docs" / "evaluation"


def experiments() -> list[Experiment]:
    """The evaluations whose directory has ``results.json``, in the order of their names.

    Those on whose prompts the weights of mixtures were chosen are left out.
    """
    return [load(path.parent) for path in sorted(FOLDER.glob("*/results.json")) if not path.parent.match("weights*")]


def draw(folder: Path) -> list[Path]:
    """Draw the figure into ``folder``; nothing if there are no results."""
    found, path = experiments(), folder / "which-method.png"
    if not found:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    draw_all(found, path)
    return [path]


def section(figures: Sequence[Path], document: Path) -> str:
    """How to read the table, the table, and the figure."""
    found = experiments()
    if not found:
        return NOTHING
    return "\n\n".join([*tables(found), shown(figures, document), DRAWN_IN_WORDS])
