"""The terminal view: every target's scores as a strip over the prompt, signed, in colour plus numbers."""

from __future__ import annotations

from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from .result import Attribution

_POSITIVE, _NEGATIVE, _PAPER = (205, 50, 45), (45, 90, 205), (255, 255, 255)
_FAINT = 0.05  # of the largest score; below it a source keeps the terminal's own colours
_LONGEST = 24  # cells; longer labels are cut in the middle


def show(res: Attribution, file: TextIO | None = None, width: int | None = None) -> None:
    """Print ``res`` to ``file`` (stdout), wrapped to ``width`` columns (the terminal's)."""
    console = Console(file=file, width=width, highlight=False)
    for row in range(len(res.targets)):
        for line in strip(res, row, console.width):
            console.print(line, overflow="ignore", no_wrap=True, crop=False)


def strip(res: Attribution, row: int, width: int) -> list[Text]:
    """One target's lines: what is explained, then pairs of lines with sources over their scores."""
    target, scores = res.targets[row], res.scores[row].tolist()
    after = printable(res.prompt.tokens[target.position])
    where = f"after token {target.position + 1} of {len(res.prompt.tokens)} ({after!r})"
    head = Text(f"{printable(target.label)!r}", style="bold")
    head.append(
        f" {where}: logit {float(res.target_logits[row]):.2f} = sum of {len(scores)} scores "
        f"(error {float(res.conservation_error[row]):.0e})",
        style="not bold",
    )
    largest = max((abs(score) for score in scores), default=0.0) or 1.0
    labels = [source.label if source.kind in ("token", "span") else f"[{source.kind}]" for source in res.sources]
    lines, upper, lower = [head], Text(), Text()
    for label, score in zip(labels, scores, strict=True):
        shown = _cut(printable(label.strip() or label)) or "·"
        number = f"{score:+.2f}"
        size = max(cell_len(shown), cell_len(number))
        if upper.cell_len and upper.cell_len + 1 + size > width:
            lines += [upper, lower, Text()]
            upper, lower = Text(), Text()
        if upper.cell_len:
            upper.append(" ")
            lower.append(" ")
        upper.append(shown + " " * (size - cell_len(shown)), style=colour(score / largest))
        lower.append(number + " " * (size - cell_len(number)), style="dim" if abs(score) < _FAINT * largest else "")
    return [*lines, upper, lower, Text()]


def colour(share: float) -> Style:
    """Black on red (positive) or blue (negative) paper, the stronger the closer ``share`` is to 1 or -1."""
    if abs(share) < _FAINT:
        return Style.null()
    ink = _POSITIVE if share > 0 else _NEGATIVE
    strength = 0.75 * min(1.0, abs(share))
    red, green, blue = (round(p + (i - p) * strength) for p, i in zip(_PAPER, ink, strict=True))
    return Style.parse(f"rgb(0,0,0) on rgb({red},{green},{blue})")


def printable(text: str) -> str:
    """Text without control characters, which could move the cursor or recolour the terminal."""
    named = text.replace("\n", "↵").replace("\t", "→")
    return "".join(c if c.isprintable() else "�" for c in named)


def _cut(label: str) -> str:
    if cell_len(label) <= _LONGEST:
        return label
    half = _LONGEST // 2 - 1
    return f"{label[:half]}…{label[-half:]}"
