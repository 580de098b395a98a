"""Runs `depass attribute-dataset` on many short prompts and records its memory: python -m benchmarks.dataset [ROWS]"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from depass.evaluate.data import FACTS, ioi

SHARD_ROWS, WINDOW = 100, 1000


def main(rows: int) -> None:
    """Print the rate, and the largest memory during the first and during the last thousand rows."""
    if rows < 2 * WINDOW:
        sys.exit(f"{rows} rows are too few to compare the first {WINDOW} with the last; give at least {2 * WINDOW}")
    prompts = [{"prompt": prompt, "target": f" {answer}"} for prompt, answer in FACTS]
    sentences = (row["prompt"].split() for row in ioi(rows - len(prompts), seed=0))
    prompts += [
        {"prompt": " ".join(words[: 4 + i % 9])} for i, words in enumerate(sentences)
    ]  # as long as Known_1000's
    with tempfile.TemporaryDirectory() as work:
        data, out = Path(work) / "data.jsonl", Path(work) / "out"
        data.write_text("".join(json.dumps(row) + "\n" for row in prompts))
        command = [sys.executable, "-m", "depass", "attribute-dataset", str(data), "--out", str(out)]
        seen: list[tuple[int, int]] = []  # rows done, bytes
        with subprocess.Popen([*command, "--shard-rows", str(SHARD_ROWS)]) as process:
            while process.poll() is None:
                seen.append((SHARD_ROWS * len(list(out.glob("rows/0*.parquet"))), resident(process.pid)))
                time.sleep(0.1)
        if process.returncode:
            sys.exit(process.returncode)
        seconds = json.loads((out / "run.json").read_text())["sessions"][0]["seconds"]
    first = max(held for done, held in seen if 0 < done <= WINDOW)
    last = max(held for done, held in seen if rows - WINDOW <= done < rows)
    print(f"{rows:,} prompts in {seconds:.0f} s, {rows / seconds:.1f}/s on {os.cpu_count()} cores")
    print(
        f"memory: {first / 1e6:.0f} MB in the first thousand, {last / 1e6:.0f} MB in the last ({last / first - 1:+.1%})"
    )


def resident(pid: int) -> int:
    """A process's resident memory in bytes; 0 once it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
