"""Token scores of a whole data set, in prompts per second, compared with the naive decomposition.

    python -m benchmarks.evaluation --data known_1000.json [--sample 32] [--runs 3] [--out FILE.json]

DePass scores every prompt. The naive decomposition scores a sample, evenly spread over the prompts' lengths. Both run in
bf16 and in fp32, because a CPU without bf16 instructions is slower in bf16. Each round runs everything once. A prompt's
target is the first token of its answer. Before anything is timed, both must agree in fp32 on the sample. ``--data facts``
takes the built-in set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from depass import Attribution, DePass
from depass.errors import DePassError
from depass.evaluate import data
from depass.evaluate.data import Pair
from depass.files import write_atomically

from .baselines.naive import token_scores
from .machine import ROOT, Machine, commit
from .runner import TOLERANCE, difference


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help=data.HELP)
    parser.add_argument("--limit", type=int, metavar="N", help="score only the first N prompts (default: all)")
    parser.add_argument(
        "--sample", type=int, default=32, metavar="N", help="prompts for the naive decomposition (default: 32)"
    )
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "evaluation.json", metavar="FILE",
        help="file of results (default: benchmarks/results/evaluation.json)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    code = commit()  # before the runs, in case files change meanwhile
    models = {name: DePass.from_pretrained(dtype=getattr(torch, name)) for name in ("bfloat16", "float32")}
    pairs, unread = readable(models["float32"], options.data, options.limit)
    sample = spread(pairs, options.sample)
    check(models["float32"], sample)
    works: dict[str, Callable[[], object]] = {
        "depass bfloat16": lambda: ours(models["bfloat16"], pairs),
        "depass float32": lambda: ours(models["float32"], pairs),
        "naive bfloat16": lambda: naive(models["bfloat16"], sample),
        "naive float32": lambda: naive(models["float32"], sample),
    }
    prompts = {name: len(pairs if name.startswith("depass") else sample) for name in works}
    naive(models["bfloat16"], sample[:1])  # warm-up; the check has warmed up the naive decomposition in fp32
    ours(models["bfloat16"], sample)
    machine = Machine("cpu")
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.runs):
        for name, work in works.items():
            times[name].append(machine.seconds(work))
    rates = {name: prompts[name] / statistics.median(of) for name, of in times.items()}
    row = {
        "what": "evaluation", "data": Path(options.data).name, "model": models["float32"].name, "prompts": len(pairs),
        "unread": unread, "tokens": sum(len(pair.ids) for pair in pairs), "sample": len(sample),
        "sample_tokens": sum(len(pair.ids) for pair in sample), "runs": options.runs, "seconds": times,
        "prompts_per_second": rates,
        "times_the_fastest_naive": {
            name: rate / max(rate for other, rate in rates.items() if other.startswith("naive"))
            for name, rate in rates.items()
            if name.startswith("depass")
        },
        **code, **machine.describe(), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip
    write_atomically(options.out, (json.dumps(row, indent=1) + "\n").encode())
    print(json.dumps(row, indent=1))


def readable(dp: DePass, source: str, limit: int | None) -> tuple[list[Pair], int]:
    """The prompts that have tokens and an answer, and the number of prompts that do not."""
    items = data.prompts(source, 0, limit)[:limit]
    pairs = []
    for item in items:
        try:
            pairs += [data.pair(dp, item)] if item.broken is None else []
        except DePassError:
            continue
    return pairs, len(items) - len(pairs)


def spread(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """``count`` prompts, evenly spread over all prompts in order of length."""
    ordered, count = sorted(pairs, key=lambda pair: len(pair.ids)), min(count, len(pairs))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def ours(dp: DePass, pairs: Sequence[Pair]) -> list[Any]:
    prompts, targets = [list(pair.ids) for pair in pairs], [pair.answer[0] for pair in pairs]
    # the published code always excludes the first token
    return list(dp.attribute_many(prompts, targets=targets, errors="return", exclude_bos=True))


def naive(dp: DePass, pairs: Sequence[Pair]) -> list[torch.Tensor]:
    return [token_scores(dp.model, torch.tensor(pair.ids), pair.answer[0]) for pair in pairs]


def check(dp: DePass, pairs: Sequence[Pair]) -> None:
    """End the program if DePass and the naive decomposition give different scores: their times would not compare."""
    for result, expected in zip(ours(dp, pairs), naive(dp, pairs), strict=True):
        if (
            not isinstance(result, Attribution)
            or difference(result.scores[0], expected) > TOLERANCE["float32"]["naive"]
        ):
            raise SystemExit(f"the scores of DePass and of the naive decomposition differ for a prompt: {result}")


if __name__ == "__main__":
    main()
