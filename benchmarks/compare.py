"""Compares the rows of two commits on the same machine, and flags changes that exceed the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .machine import BenchmarkError, percentile
from .runner import Row

FEWEST = 3  # runs on each side that a spread needs
SLACK = 0.02  # a smaller difference is no change, however small the noise


@dataclass(frozen=True)
class Change:
    """The change of one method of one case on one machine.

    Attributes:
        ratio: new time divided by old time.
        noise: how far the ratio may differ from 1 by chance. It is the sum of both sides' spreads (p20 to p80, relative to
            the median), or the change of the floor if that is larger: the floor depends only on the machine. None: too few
            runs.
    """

    machine: str
    case: str
    method: str
    old: float
    new: float
    ratio: float
    noise: float | None

    @property
    def verdict(self) -> str:
        if self.noise is None:
            return f"not judged: fewer than {FEWEST} runs"
        if self.ratio > (1 + SLACK) * (1 + self.noise):
            return "SLOWER"
        return "faster" if self.ratio < 1 / ((1 + SLACK) * (1 + self.noise)) else "same"


def compare(rows: Sequence[Row], old: str, new: str | None = None) -> list[Change]:
    """The changes from commit ``old`` to ``new``. Prefixes are enough; ``new`` defaults to the commit of the last row.

    Raises:
        BenchmarkError: a commit has no timed rows, or the two have no case in common.
    """
    timed = [row for row in rows if row.get("status") == "ok" and row.get("seconds") and row.get("commit")]
    if not timed:
        raise BenchmarkError("no timed rows with a commit; make some with `python -m benchmarks run`")
    new = new or str(timed[-1]["commit"])
    before, after = _by_case(timed, old), _by_case(timed, new)
    for name, cases in ((old, before), (new, after)):
        if not cases:
            commits = ", ".join(sorted({str(row["commit"])[:10] for row in timed}))
            raise BenchmarkError(f"no timed rows of commit {name!r}; there are rows of {commits}")
    common = [key for key in after if key in before]
    if not common:
        raise BenchmarkError(f"{old} and {new} have no case in common that ran on the same machine")
    return [_change(key, before[key], after[key]) for key in common]


Key = tuple[str, str, str]  # machine, case, method


def _by_case(rows: Sequence[Row], commit: str) -> dict[Key, list[Row]]:
    by_case: dict[Key, list[Row]] = {}
    for row in rows:
        if str(row["commit"]).startswith(commit):
            backend = row.get("asked_backend")
            method = row["method"] if backend in (None, "auto") else f"{row['method']} ({backend})"
            by_case.setdefault((row["machine"], row["case"], method), []).append(row)
    return by_case


def _change(key: Key, before: Sequence[Row], after: Sequence[Row]) -> Change:
    sides = [[second for row in side for second in row["seconds"]] for side in (before, after)]
    old, new = (percentile(side, 0.5) for side in sides)
    noise = None
    if min(map(len, sides)) >= FEWEST:
        noise = sum((percentile(side, 0.8) - percentile(side, 0.2)) / percentile(side, 0.5) for side in sides)
        floors = [[row["floor_seconds"] for row in side if row.get("floor_seconds")] for side in (before, after)]
        if all(floors):
            drift = percentile(floors[1], 0.5) / percentile(floors[0], 0.5)
            noise = max(noise, max(drift, 1 / drift) - 1)
    return Change(*key, old, new, new / old, noise)


def shown(changes: Sequence[Change]) -> str:
    """A table with one line per change."""
    lines = [f"{'case':44} {'method':26} {'old s':>10} {'new s':>10} {'ratio':>7} {'noise':>7}"]
    for change in changes:
        noise = "" if change.noise is None else f"{change.noise:.1%}"
        lines.append(
            f"{change.case:44} {change.method:26} {change.old:10.4g} {change.new:10.4g} {change.ratio:7.2f} {noise:>7}"
            f"  {change.verdict}"
        )
    return "\n".join(lines)
