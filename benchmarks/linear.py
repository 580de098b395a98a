"""Times the linear rules in passes: relative to the model's plain eager pass over the same prompt.

    python -m benchmarks.linear [--lengths 10 128 512 2048] [--runs 7] [--threads N] [--folder DIR]
    python -m benchmarks.linear --device cuda --model llama-2-7b --dtype bfloat16

SmolLM2-135M-Instruct in fp32, or another model, attributes one prompt of random tokens per length. Each round runs
everything once: the plain pass, the linear rules, a survey, a sweep over all heads and input x gradient. The softmax rule,
which decomposes, runs on short prompts only. A slow method gets fewer rounds. Everything is checked before it is timed, and
so warmed up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from depass import DePass, baselines
from depass.engine import linear
from depass.files import write_atomically
from depass.rules import LINEAR

from .machine import ROOT, Machine, commit, percentile
from .registry import DTYPES, REAL, TARGET, Case, load, plain
from .runner import CONSERVATION, Options, Row, difference

RESULTS = ROOT / "benchmarks" / "results"
MODEL, DTYPE = REAL, "float32"
LENGTHS = (10, 128, 512, 2048)
LONGEST_DECOMPOSED = 128  # tokens; the softmax rule's time grows with their square
MANY_TARGETS, LENGTH_OF_MANY_TARGETS = 32, 128
SAME = 1e-4  # the largest difference between scores that differ in the order of the sums only, relative to their norm
ENGINES = {"float32": 1e-4, "bfloat16": 0.2}  # the same between two engines, which round differently
SWEEPS = {"float32": 1e-4, "bfloat16": 0.2}  # the largest conservation error of a sweep, which is its worst layer's
PLAIN, AGAIN, GRADIENT = "plain", "half, recomputed", "input_x_gradient"
SWEEP = "sweep heads"
UNCHECKED = (PLAIN, GRADIENT)  # no scores, or scores that do not add up

Works = Mapping[str, Callable[[], Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=_positive, nargs="+", default=LENGTHS, metavar="N",
                        help=f"tokens of each prompt (default: {' '.join(map(str, LENGTHS))})")  # fmt: skip
    parser.add_argument(
        "--runs", type=_positive, default=Options.runs, metavar="N", help="rounds (default: %(default)s)"
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads of torch (default: torch's)")
    parser.add_argument("--model", choices=DTYPES, default=MODEL, metavar="MODEL", help="default: %(default)s")
    parser.add_argument("--dtype", choices=tuple(ENGINES), default=DTYPE, help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, metavar="DIR",
                        help="directory for linear-MACHINE-MODEL-DTYPE.json (default: benchmarks/results)")  # fmt: skip
    parser.add_argument("--commit", help="commit of the code, if this is not a git checkout")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    folder = options.folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    code = commit(options.commit)  # before the runs, in case files change meanwhile
    lengths = sorted(set(options.lengths))
    machine = Machine(options.device)
    cases = [Case("tokens", options.model, options.dtype, str(length)) for length in lengths]
    model = load(cases[0], machine)
    model.set_attn_implementation("eager")
    dp = DePass(model)
    refuse_scarce_memory(dp, lengths)
    check_engines(dp, Case("tokens", options.model, options.dtype, str(LENGTHS[0])))
    measured: list[Row] = []
    for case in cases:
        measured += measure(dp, case, machine, options.runs)
    row = {
        "what": "linear", "model": options.model, "dtype": options.dtype, "lengths": lengths, "runs": options.runs,
        "measured": measured, "device": options.device,
        **code, **machine.describe(), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip
    out = folder / f"linear-{row['machine']}-{options.model}-{options.dtype}.json"
    write_atomically(out, (json.dumps(row, indent=1) + "\n").encode())
    print(f"results in {out}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def works(dp: DePass, case: Case) -> dict[str, Callable[[], Any]]:
    """What is timed at one length, by name and in order."""
    ids = case.prompts[0]
    half = partial(dp.attribute, ids, TARGET, rule="half")
    chosen: dict[str, Callable[[], Any]] = {
        PLAIN: plain(dp.model, case),
        **{rule: partial(dp.attribute, ids, TARGET, rule=rule) for rule in LINEAR},
        AGAIN: partial(layers_run_again, half),
        "survey": partial(dp.survey, ids, TARGET, rule="half"),
        SWEEP: partial(dp.sweep, "heads", ids, TARGET, rule="half"),
        GRADIENT: lambda: baselines.tokens(dp, GRADIENT, [ids], TARGET)[0],
    }
    if case.number == LENGTH_OF_MANY_TARGETS:
        targets = list(range(TARGET, TARGET + MANY_TARGETS))
        chosen[f"half, {MANY_TARGETS} targets"] = partial(dp.attribute, ids, targets, rule="half")
    if case.number <= LONGEST_DECOMPOSED:
        chosen["softmax"] = partial(dp.attribute, ids, TARGET, rule="softmax")
    return chosen


def layers_run_again(work: Callable[[], Any]) -> Any:
    """Do the work as where the activations of all layers do not fit into memory."""
    with mock.patch.object(linear, "recomputes", return_value=True):
        return work()


def measure(dp: DePass, case: Case, machine: Machine, runs: int) -> list[Row]:
    """Check and time everything at one length; a row for each method, in order."""
    methods = works(dp, case)
    results = {name: work() for name, work in methods.items()}
    check(results, case.dtype)
    missed = {name: float(result.conservation_error.max()) for name, result in results.items() if name not in UNCHECKED}
    del results
    seconds = timed(methods, machine, runs)
    pass_seconds = statistics.median(seconds[PLAIN])
    rows = []
    for name, of in seconds.items():
        median = statistics.median(of)
        row = {
            "method": name, "length": case.number, "runs": len(of), "seconds": of, "seconds_p20": percentile(of, 0.2),
            "seconds_p50": median, "seconds_p80": percentile(of, 0.8), "times_plain": median / pass_seconds,
            "conservation_error": missed.get(name),
        }  # fmt: skip
        print(f"{case.number:5} tokens  {name:16} {median:9.4g} s  {row['times_plain']:6.3g} x plain", flush=True)
        rows.append(row)
    return rows


def timed(methods: Works, machine: Machine, runs: int) -> dict[str, list[float]]:
    """The seconds of each method's runs, in turn. A method whose next run would exceed its budget gets no more."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(runs):
        for name, work in methods.items():
            of = seconds[name]
            if not of or sum(of) * (1 + 1 / len(of)) <= Options.budget_seconds:
                of.append(machine.seconds(work))
    return seconds


# Checks. Each ends the program: the times would not be those of what the table names.


def refuse_scarce_memory(dp: DePass, lengths: Sequence[int]) -> None:
    for length in lengths:
        for rule in LINEAR:
            if dp.plan(length, rule=rule, measure=False).recomputed:
                raise SystemExit(
                    f"too little free memory to keep the activations of {length} tokens under {rule}: every linear rule "
                    "would run its layers again; free some, or give shorter --lengths"
                )


def check_engines(dp: DePass, case: Case) -> None:
    """The backward pass and the decomposed state must give taylor the same scores; on a short prompt, whatever is timed."""
    ids = case.prompts[0]
    forward = DePass(dp.model, engine="forward").attribute(ids, TARGET, rule="taylor")
    check_same(
        "taylor",
        dp.attribute(ids, TARGET, rule="taylor"),
        "taylor with a decomposed state",
        forward,
        ENGINES[case.dtype],
    )


def check(results: Mapping[str, Any], dtype: str) -> None:
    """Scores must add up to the logit, and layers that run again must not change them."""
    for name, result in results.items():
        if name == GRADIENT and not bool(result.scores.any()):  # its scores do not add up to the logit
            raise SystemExit(f"all scores of {name} are zero")
        if name in UNCHECKED:
            continue
        error = float(result.conservation_error.max())
        allowed = (SWEEPS if name == SWEEP else CONSERVATION)[dtype]
        if not error < allowed:
            raise SystemExit(f"the conservation error of {name} is {error:.1e}, allowed {allowed:.0e}")
    check_same(AGAIN, results[AGAIN], "half", results["half"], SAME)


def check_same(name: str, result: Any, other: str, expected: Any, allowed: float) -> None:
    if (off := difference(result.scores, expected.scores)) > allowed:
        raise SystemExit(
            f"the scores of {name} and of {other} differ by {off:.1e} of their norm, allowed {allowed:.0e}"
        )


if __name__ == "__main__":
    main()
