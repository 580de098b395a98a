"""List, run, compare and report the benchmarks.

    python -m benchmarks list [PATTERN ...]
    python -m benchmarks run 'tokens/smollm2/*' [--device cuda] [--memory-limit 48GB]
    python -m benchmarks compare COMMIT [COMMIT]
    python -m benchmarks predict
    python -m benchmarks report README.md docs/performance.md

A case is QUESTION/MODEL/DTYPE/SIZE. A pattern may hold * and several sizes (tokens/smollm2/float32/10,64). Each run appends
its rows to benchmarks/results/MACHINE.jsonl. To benchmark the ops, run pytest benchmarks/test_ops.py.
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
    """Run the command. Returns 0: done; 1: a case was refused or failed, or something is slower; 2: wrong use."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.do(options)
        sys.stdout.flush()
    except (BenchmarkError, DePassError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the pipe closed it early, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("list", help="list the cases, and the methods that can run each")
    command.add_argument("patterns", nargs="*", default=["*"], metavar="PATTERN", help="cases to list (default: all)")
    command.set_defaults(do=_list)

    command = commands.add_parser("run", help="check the methods of each case, time them, and append rows of results")
    command.add_argument("patterns", nargs="+", metavar="PATTERN", help="cases to run, such as 'tokens/smollm2/*'")
    command.add_argument("--methods", metavar="A,B", help="methods to run, separated by commas (default: all)")
    command.add_argument("--device", choices=("cpu", "cuda"), default=here(),
                         help="device to measure (default here: %(default)s)")  # fmt: skip
    command.add_argument("--backend", default="auto", help="backend of depass's ops (default: %(default)s)")
    command.add_argument("--runs", type=int, default=Options.runs, metavar="N",
                         help="timed runs of each method (default: %(default)s)")  # fmt: skip
    command.add_argument("--budget", type=float, default=Options.budget_seconds, metavar="SECONDS",
                         help="start no further run of a method after this time (default: %(default)s)")  # fmt: skip
    command.add_argument("--limit", type=float, default=Options.limit_seconds, metavar="SECONDS",
                         help="stop a method whose first run takes longer (default: %(default)s)")  # fmt: skip
    command.add_argument("--memory-limit", type=size, metavar="48GB", help="cap of the CUDA allocator")
    command.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    command.add_argument("--commit", help="commit of the code, if this is not a git checkout")
    command.add_argument("--session", default=uuid.uuid4().hex[:12], help=argparse.SUPPRESS)
    command.add_argument("--results", type=Path, metavar="FILE",
                         help="file to append to (default: benchmarks/results/MACHINE.jsonl)")  # fmt: skip
    command.set_defaults(do=_run)

    command = commands.add_parser("memory", help="measure one method's peak memory on the CPU (`run` calls this)")
    command.add_argument("case")
    command.add_argument("method")
    command.add_argument("--backend", default="auto")
    command.add_argument("--limit", type=float, default=Options.limit_seconds)
    command.set_defaults(do=_memory)

    command = commands.add_parser(
        "compare", help="compare two commits on the same machine; exit code 1 if something is slower"
    )
    command.add_argument("old", help="a commit, or its first characters")
    command.add_argument("new", nargs="?", help="default: the commit of the last row")
    command.add_argument("--results", type=Path, nargs="+", metavar="FILE", help="default: all files of results")
    command.set_defaults(do=_compare)

    command = commands.add_parser("predict", help="predict the times on GPUs from counts; needs no GPU")
    command.set_defaults(do=_predict)

    command = commands.add_parser(
        "report", help="draw the figures, and fill in the tables between markers in documents"
    )
    command.add_argument("documents", type=Path, nargs="+", metavar="DOCUMENT")
    command.add_argument("--results", type=Path, nargs="+", metavar="FILE", help="default: all files of results")
    command.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures", metavar="DIR",
                         help="directory for the figures (default: docs/figures)")  # fmt: skip
    command.set_defaults(do=_report)
    return parser


def size(text: str) -> int:
    """:func:`byte_count`, with its error as an argparse error."""
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
    available = {name for case in cases for name in methods_of(case, options.device)}
    for name in methods or ():
        if name not in available:
            raise BenchmarkError(f"unknown method {name!r}; these cases have: {', '.join(sorted(available))}")
    if options.runs < 1:
        raise BenchmarkError(f"--runs {options.runs}: must be at least 1")
    if not 0 < options.limit < 1e9:
        raise BenchmarkError(f"--limit {options.limit:g}: must be a positive number of seconds")
    machine = Machine(options.device, options.memory_limit)
    chosen = Options(methods, options.backend, options.runs, options.budget, options.limit, not options.no_memory)
    described = machine.describe()
    stamp = {**commit(options.commit), **described,
             "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "session": options.session}  # fmt: skip
    path = options.results or RESULTS / f"{described['machine']}.jsonl"
    bad = 0
    for case in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConservationWarning)  # the check refuses such a result
            try:
                for row in run(case, machine, chosen):
                    append_row(path, {**row, **stamp})
                    print(line(row), flush=True)
                    bad += row["status"] in ("refused", "failed")
            except (DePassError, torch.OutOfMemoryError) as error:  # the model cannot be loaded, or does not fit
                print(f"{case.name}: cannot load the model: {error}", file=sys.stderr, flush=True)
                bad += 1
    print(f"rows in {path}")
    return 1 if bad else 0


def _memory(options: argparse.Namespace) -> int:
    (case,) = find([options.case])
    available = methods_of(case, "cpu")
    if options.method not in available:
        raise BenchmarkError(f"unknown method {options.method!r}; choose from {', '.join(available)}")
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
