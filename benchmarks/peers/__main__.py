"""Time other tools in their own code beside this package, on the same prompts, models and machine.

    python -m benchmarks.peers [TOOL ...] [--published DIR] [--models M ...] [--lengths N ...]

Each tool gets an environment of its own in build/peers, where pip installs what its module pins. Two processes, one with
the tool and one with this package, take turns on one thread. Rows are appended to benchmarks/results/peers.jsonl. The
published code is on no package index: give a checkout of it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from depass.files import append_row
from depass.models import builtin

from ..machine import ROOT, BenchmarkError, Machine, commit
from ..runner import Row
from . import ours
from .environment import ToolError, Worker, python_of
from .report import FILE
from .worker import PLAIN

TOOLS = ("ours", "published", "lxt", "gim", "flashtrace", "inseq", "captum", "interpreto")
MODELS = ("smollm2", "gemma3-270m")
LENGTHS = (10, 32, 64, 128)
SAME_LOGIT = 1e-3  # the largest difference between two releases' logits of the same model in fp32
TEXT = (
    "The lighthouse at the end of the harbour was built in 1871, after three ships had been lost on the rocks in a single "
    "winter. Its keeper, a quiet man from the north of the country, wrote down the weather four times a day in a large blue "
    "book. When he retired, his daughter took over the work and continued the book for another thirty years. Scientists who "
    "study the climate of the coast still use these pages today, because no other record of that time is as complete. The "
    "book itself is now kept in the museum of the capital, next to the old lamp and the letters that the sailors sent to "
    "thank the family for the light that had brought them home."
)


@dataclass(frozen=True)
class Options:
    """How much is run: rounds, and seconds after which a method gets no further round, or no longer prompt."""

    rounds: int = 3
    budget: float = 10.0
    limit: float = 30.0
    patience: float = 600.0


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the token that follows it in the text."""

    ids: tuple[int, ...]
    target: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after a wrong use; a tool that fails is a row."""
    options = _parser().parse_args(arguments)
    tools = list(options.tools or TOOLS)
    if options.published is None and "published" in tools:
        if options.tools:
            raise BenchmarkError("published needs --published DIR, a checkout of the published DePass code")
        tools.remove("published")
        print("published: not measured; give --published DIR, a checkout of the published DePass code", file=sys.stderr)
    stamp = {
        **commit(), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "rounds": options.rounds, "budget": options.budget,
        "limit": options.limit,
    }  # fmt: skip
    for model in options.models:
        folder = builtin.path(model, print)
        prompts = prompts_of(folder, options.lengths)
        with Worker("ours", sys.executable, folder, ROOT / "python") as beside:
            for method in (PLAIN, *ours.METHODS):  # warm up
                beside.ask(do="time", method=method, **vars(prompts[0]), limit=Options.patience)
            for tool in tools:
                for row in rows_of(tool, folder, prompts, beside, options):
                    append_row(options.out, {**row, **stamp, "model": model})
                    print(line({**row, "model": model}), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"which to run (default: {' '.join(TOOLS)})")
    parser.add_argument("--published", type=Path, metavar="DIR", help="a checkout of the published DePass code")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="M", help="short names of models")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="tokens of the prompts")
    parser.add_argument(
        "--rounds", type=int, default=Options.rounds, metavar="N", help="timed runs (default: %(default)s)"
    )
    parser.add_argument("--budget", type=float, default=Options.budget, metavar="SECONDS",
                        help="start no further run of a method after this time (default: %(default)s)")  # fmt: skip
    parser.add_argument("--limit", type=float, default=Options.limit, metavar="SECONDS",
                        help="give a method no longer prompt if a run took longer (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--torch", default="torch==2.13.0", metavar="SPEC", help="torch to install (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="file to append to")
    return parser


def prompts_of(folder: str, lengths: Sequence[int]) -> list[Prompt]:
    """The first tokens of the text, as many as each length says; BOS counts.

    Raises:
        BenchmarkError: the text is too short.
    """
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    if max(lengths) >= len(ids) or min(lengths) < 2:
        raise BenchmarkError(f"lengths {list(lengths)}: must be from 2 to {len(ids) - 1} tokens, the text's length")
    return [Prompt(tuple(ids[:length]), ids[length]) for length in sorted(lengths)]


def rows_of(tool: str, folder: str, prompts: Sequence[Prompt], beside: Worker, options: Any) -> Iterator[Row]:
    """A row for each length and method of a tool, in order. A tool that cannot be installed or loaded has failed rows."""
    module = import_module(f".{tool}", __package__)
    methods = (PLAIN, *module.METHODS) if tool == "ours" else tuple(module.METHODS)
    common = {"what": "peer", "tool": tool, "version": version_of(module, options.published)}
    try:
        path = options.published if tool == "published" else None
        python = sys.executable if tool == "ours" else python_of(tool, module, options.torch)
    except ToolError as error:
        for prompt in prompts:
            for method in methods:
                yield {**common, **failed(method, prompt, str(error))}
        return
    with Worker(tool, python, folder, ROOT / "python" if tool == "ours" else path) as worker:
        slow: dict[str, str] = {}
        for prompt in prompts:
            for row in cell(module, methods, prompt, worker, beside, options, slow):
                yield {**common, **row}


def version_of(module: Any, published: Path | None) -> str:
    """The pin of a tool; of the published code, the checkout's commit."""
    if module.__name__.endswith(".published"):
        git = ["git", "-C", str(published), "rev-parse", "--short=10", "HEAD"]
        done = subprocess.run(git, capture_output=True, text=True, check=False)
        return done.stdout.strip() or "unknown commit"
    pins = (*getattr(module, "WITHOUT_DEPENDENCIES", ()), *module.PINS)
    return pins[0].split("==")[1] if pins else ""


def cell(
    module: Any,
    methods: Sequence[str],
    prompt: Prompt,
    worker: Worker,
    beside: Worker,
    options: Any,
    slow: dict[str, str],
) -> list[Row]:
    """The rows of a tool's methods for one prompt: each is checked, and then timed in turn with this package's.

    A method is left out of longer prompts once it is in ``slow``, where its reason stands.
    """
    rows: dict[str, Row] = {}
    for method in methods:
        if method in slow:
            rows[method] = {**_named(method, prompt), "status": "not measured", "error": slow[method]}
            continue
        try:
            rows[method] = checked(module, method, prompt, worker, beside)
        except ToolError as error:
            rows[method] = failed(method, prompt, str(error))
            continue
        if rows[method]["first_processor"] > options.limit:
            slow[method] = f"a run over {len(prompt.ids)} tokens took {rows[method]['first_processor']:.0f} s"
    good = [method for method, row in rows.items() if row["status"] == "ok"]
    works: Works = {(worker, method): [] for method in good if method not in slow}
    if worker.tool != "ours" and good:
        rules = [module.METHODS[method].beside for method in good]
        works |= {(beside, name): [] for name in dict.fromkeys((PLAIN, *rules)) if name is not None}
    timed = in_turn(works, prompt, options)
    for method in good:
        row = rows[method]
        row.update(summary(row, timed.get((worker, method), [])))
        row.update(ratios(row, module.METHODS.get(method), worker if worker.tool == "ours" else beside, timed))
    return list(rows.values())


def _named(method: str, prompt: Prompt) -> Row:
    return {"method": method, "tokens": len(prompt.ids), "threads": 1, "machine": Machine("cpu").describe()["machine"]}


def failed(method: str, prompt: Prompt, error: str) -> Row:
    return {**_named(method, prompt), "status": "failed", "error": error}


def checked(module: Any, method: str, prompt: Prompt, worker: Worker, beside: Worker) -> Row:
    """The untimed part of a row: memory, what the scores add up to, and how well they agree with ours.

    Raises:
        ToolError: the tool fails, or its model gives another logit than ours.
    """
    answer = worker.ask(do="check", method=method, **vars(prompt), limit=Options.patience)
    logit = beside.ask(do="check", method=PLAIN, **vars(prompt), limit=Options.patience)["logit"]
    if abs(answer["logit"] - logit) > SAME_LOGIT * max(1.0, abs(logit)):
        raise ToolError(f"its model gives the target the logit {answer['logit']:.4g}, expected {logit:.4g}")
    row = {
        **answer["environment"], **_named(method, prompt), "status": "ok", "peak_bytes": answer["peak_bytes"],
        "first_wall": answer["wall"], "first_processor": answer["processor"], "logit": answer["logit"],
    }  # fmt: skip
    if method == PLAIN:
        return row
    about, scores = module.METHODS[method], answer["scores"]
    row |= {"explains": about.explains, "beside": about.beside, "sum": sum(scores), "explained": answer["explained"]}
    if about.same_as is not None:
        same = beside.ask(do="scores", method=about.same_as, **vars(prompt), limit=Options.patience)["scores"]
        length = len(prompt.ids)
        row |= {"same_as": about.same_as, "why_off": about.why_off, **agreement(scores[:length], same[:length])}
    return row


def agreement(scores: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Pearson's correlation, and the largest difference relative to our largest score."""
    largest = max(abs(score) for score in ours)
    difference = max(abs(a - b) for a, b in zip(scores, ours, strict=True))
    return {"correlation": statistics.correlation(scores, ours), "largest_difference": difference / largest}


Works = dict[tuple[Worker, str], list[dict[str, float]]]


def in_turn(works: Works, prompt: Prompt, options: Any) -> Works:
    """Run every work once a round. A work whose runs have taken the budget gets no further one."""
    for _ in range(options.rounds):
        for (worker, method), seconds in works.items():
            if sum(each["processor"] for each in seconds) < options.budget:
                seconds.append(worker.ask(do="time", method=method, **vars(prompt), limit=Options.patience))
    return works


def summary(row: Row, seconds: list[dict[str, float]]) -> Row:
    """The times of a row. The first run of a slow method is its only one, and not a warm one."""
    runs = seconds or [{"wall": row["first_wall"], "processor": row["first_processor"]}]
    found: Row = {"warm": bool(seconds), "runs": len(runs)}
    for clock in ("wall", "processor"):
        found |= {f"{clock}_seconds": [each[clock] for each in runs]}
        found |= {f"{clock}_p50": statistics.median(each[clock] for each in runs)}
    return found


def ratios(row: Row, about: Any, ours: Worker, timed: Works) -> Row:
    """A row's processor time relative to the plain pass and to the rule beside it, where they ran in the same rounds."""
    found = {}
    for key, name in (("times_plain", PLAIN), ("times_beside", about and about.beside)):
        runs = timed.get((ours, name), [])
        if runs:
            found[key] = row["processor_p50"] / statistics.median(each["processor"] for each in runs)
    return found


def line(row: Row) -> str:
    """A row in one line, to be read while the program runs."""
    head = f"{row['model']:12} {row['tool']:10} {row['method']:21} {row['tokens']:4}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['error']}"
    return f"{head} {row['processor_p50']:8.3f} s {row.get('times_plain', math.nan):7.1f} times a plain pass"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2)
