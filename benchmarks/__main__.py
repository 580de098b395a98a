"""Is it faster? Lists, runs, compares and reports the benchmarks.

    python -m benchmarks list [PATTERN ...]
    python -m benchmarks run 'tokens/smollm2/*' [--device cuda] [--memory-limit 48GB]
    python -m benchmarks compare COMMIT [COMMIT]
    python -m benchmarks predict
    python -m benchmarks report README.md docs/performance.md

A case is QUESTION/MODEL/DTYPE/SIZE, and patterns take * and several sizes (tokens/smollm2/float32/10,64). Every run
appends rows to benchmarks/results/MACHINE.jsonl. The ops: pytest benchmarks/test_ops.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from depass.checks import byte_count
from depass.errors import ConservationWarning, DePassError, OptionError
from depass.files import append_row

from .compare import compare, shown
from .machine import ROOT, BenchmarkError, Machine, commit, here
from .registry import all_cases, find, listed, methods_of
from .runner import Options, Row, line, measure_memory, read, run

RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done; 1: a case was refused or failed, or a comparison found something slower; 2: not possible."""
    options = _parser().parse_args(arguments)
    try:
        done: int = options.do(options)
        sys.stdout.flush()
    except (BenchmarkError, DePassError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe left early, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return done


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("list", help="the cases and what answers them")
    one.add_argument("patterns", nargs="*", default=["*"])
    one.set_defaults(do=_list)

    one = commands.add_parser("run", help="check, time and append rows")
    one.add_argument("patterns", nargs="+", metavar="PATTERN")
    one.add_argument("--methods", help="some of them, separated by commas; all without it")
    one.add_argument("--device", choices=("cpu", "cuda"), default=here())
    one.add_argument("--backend", default="auto", help="of our ops")
    one.add_argument("--runs", type=int, default=Options.runs)
    one.add_argument("--budget", type=float, default=Options.budget_seconds, metavar="SECONDS",
                     help="a method starts no further run beyond it (default %(default)s)")  # fmt: skip
    one.add_argument("--limit", type=float, default=Options.limit_seconds, metavar="SECONDS",
                     help="a method whose first run takes longer is stopped (default %(default)s)")  # fmt: skip
    one.add_argument("--memory-limit", type=size, help="cap the CUDA allocator, as 48GB")
    one.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    one.add_argument("--commit", help="of the code, where this is no checkout")
    one.add_argument("--session", default=uuid.uuid4().hex[:12], help=argparse.SUPPRESS)
    one.add_argument("--results", type=Path, help="the file to append to")
    one.set_defaults(do=_run)

    one = commands.add_parser("memory", help="what `run` starts to measure one method's peak memory on the CPU")
    one.add_argument("case")
    one.add_argument("method")
    one.add_argument("--backend", default="auto")
    one.add_argument("--limit", type=float, default=Options.limit_seconds)
    one.set_defaults(do=_memory)

    one = commands.add_parser("compare", help="rows of two commits on the same machine; 1 where something is slower")
    one.add_argument("old")
    one.add_argument("new", nargs="?", help="without it the commit of the last row")
    one.add_argument("--results", type=Path, nargs="+")
    one.set_defaults(do=_compare)

    one = commands.add_parser("predict", help="write what GPUs should take, counted on this machine without one")
    one.set_defaults(do=_predict)

    one = commands.add_parser("report", help="draw the figures and fill in what lies between the markers of documents")
    one.add_argument("documents", type=Path, nargs="+")
    one.add_argument("--results", type=Path, nargs="+")
    one.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures")
    one.set_defaults(do=_report)
    return parser


def size(text: str) -> int:
    """:func:`byte_count`, with its error as argparse wants it."""
    try:
        return byte_count(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _list(options: argparse.Namespace) -> int:
    cases = all_cases() if options.patterns == ["*"] else find(options.patterns)
    print("\n".join(listed(cases)))
    return 0


def _run(options: argparse.Namespace) -> int:
    cases = find(options.patterns)
    methods = None if options.methods is None else tuple(options.methods.split(","))
    there = {name for case in cases for name in methods_of(case, options.device)}
    for name in methods or ():
        if name not in there:
            raise BenchmarkError(f"unknown method {name!r}; these cases have: {', '.join(sorted(there))}")
    if options.runs < 1:
        raise BenchmarkError(f"--runs {options.runs}: at least one")
    if not 0 < options.limit < 1e9:
        raise BenchmarkError(f"--limit {options.limit:g}: a number of seconds, more than none")
    machine = Machine(options.device, options.memory_limit)
    chosen = Options(methods, options.backend, options.runs, options.budget, options.limit, not options.no_memory)
    described = machine.describe()
    stamp = {**commit(), **({"commit": options.commit} if options.commit else {}), **described,
             "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "session": options.session}  # fmt: skip
    path = options.results or RESULTS / f"{described['machine']}.jsonl"
    bad = 0
    for case in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConservationWarning)  # the check says so, and refuses
            try:
                for row in run(case, machine, chosen):
                    append_row(path, {**row, **stamp})
                    print(line(row), flush=True)
                    bad += row["status"] in ("refused", "failed")
            except (DePassError, torch.OutOfMemoryError) as error:  # the model itself cannot be had, or does not fit
                print(f"{case.name}: no model: {error}", file=sys.stderr, flush=True)
                bad += 1
    print(f"rows in {path}")
    return 1 if bad else 0


def _memory(options: argparse.Namespace) -> int:
    (case,) = find([options.case])
    there = methods_of(case, "cpu")
    if options.method not in there:
        raise BenchmarkError(f"unknown method {options.method!r}; there are: {', '.join(there)}")
    print(json.dumps(measure_memory(case, options.method, options.backend, options.limit)))
    return 0


def _rows(given: Sequence[Path] | None) -> list[Row]:
    return read(sorted(RESULTS.glob("*.jsonl")) if given is None else given)


def _compare(options: argparse.Namespace) -> int:
    changes = compare(_rows(options.results), options.old, options.new)
    print(shown(changes))
    return 1 if any(change.verdict == "SLOWER" for change in changes) else 0


def _predict(_: argparse.Namespace) -> int:
    from .predict import predict

    print(predict())
    return 0


def _report(options: argparse.Namespace) -> int:
    from .report import report

    for path in report(_rows(options.results), options.documents, options.figures):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
