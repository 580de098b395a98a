"""Rows of results in words: where they were measured, their times and their sizes."""

from __future__ import annotations

from collections.abc import Sequence

from .runner import Row

NOTHING = "Not measured yet."


def where(rows: Sequence[Row]) -> str:
    """The machine, the versions, the commits and the dates of a table's rows."""
    row = rows[-1]
    commits = sorted(
        {f"{str(r.get('commit'))[:10]}{' with uncommitted changes' if r.get('changed') else ''}" for r in rows}
    )
    dates = sorted({r["date"][:10] for r in rows})
    cpu = f"{row['threads']} threads, {row['cpu_capability']}"
    driver = f", driver {row['driver']}" if row.get("driver") else ""
    limit = sorted({r["memory_limit_bytes"] for r in rows if r.get("memory_limit_bytes")})
    all_or_some = "" if all(r.get("memory_limit_bytes") for r in rows) else " for some rows"
    capped = f", memory capped at {', '.join(f'{b / 1e9:g} GB' for b in limit)}{all_or_some}" if limit else ""
    return (
        f"Measured on {machine(row)} ({'GPU' if row['gpu'] else cpu}{driver}{capped}) with torch {row['torch']} and "
        f"transformers {row['transformers']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. "
        f"{'Commit' if len(commits) == 1 else 'Commits'}: {', '.join(commits)}."
    )


def machine(row: Row) -> str:
    return str(row["gpu"] or row["cpu"])


def seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.3g} µs"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def size(value: float) -> str:
    return f"{value / 1e6:.0f} MB" if value < 1e9 else f"{value / 1e9:.1f} GB"


def model(name: str) -> str:
    return "SmolLM2-135M-Instruct" if name == "smollm2" else f"{name}, random weights"


def device(row: Row) -> str:
    return row["gpu"] or f"{row['cpu']}, {row['threads']} threads"
