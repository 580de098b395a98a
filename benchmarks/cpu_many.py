"""All heads of all layers, and many short prompts, against the naive decomposition, in one process, in turn.

    python benchmarks/cpu_many.py [--prompts FILE.json] [--count 64] [--runs 3] [--dtypes float32,bfloat16]

``--prompts`` takes a list of objects with a ``prompt`` (as Known_1000); without it random tokens of such lengths.
The naive decomposition runs in fp32: heads once per layer, prompts one by one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from baselines.naive import head_scores, token_scores

from depass import DePass

TARGET = 5


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def short_prompts(dp: DePass, path: str | None, count: int) -> list[list[int]]:
    if path is not None:
        texts = [one["prompt"] for one in json.loads(Path(path).read_text())[:count]]
        return [dp.tokenizer.encode(text) for text in texts]
    chance = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 16, (count,), generator=chance).tolist()
    return [torch.randint(100, 40_000, (length,), generator=chance).tolist() for length in lengths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", metavar="FILE")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--positions", type=int, default=10)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    options = parser.parse_args()
    models = {name: DePass.from_pretrained(dtype=getattr(torch, name)) for name in options.dtypes.split(",")}
    wide = DePass.from_pretrained(dtype=torch.float32)
    layers, naive = len(wide.model.model.layers), wide.model
    ids = torch.randint(100, 40_000, (options.positions,), generator=torch.Generator().manual_seed(0))
    prompts = short_prompts(wide, options.prompts, options.count)

    def naive_heads() -> list[torch.Tensor]:
        return [head_scores(naive, ids, TARGET, layer) for layer in range(layers)]

    def naive_prompts() -> list[torch.Tensor]:
        return [token_scores(naive, torch.tensor(prompt), TARGET) for prompt in prompts]

    def batched(dp: DePass) -> list[Any]:
        return list(dp.attribute_many(prompts, TARGET, exclude_bos=True))

    check(wide, naive_heads(), naive_prompts(), batched(wide), ids)
    works: dict[str, Callable[[], object]] = {"naive heads": naive_heads, "naive prompts": naive_prompts}
    for name, dp in models.items():
        works[f"heads {name}"] = lambda d=dp: d.sweep("heads", ids, TARGET)  # type: ignore[misc]
        works[f"prompts {name}"] = lambda d=dp: batched(d)  # type: ignore[misc]
    for name, work in works.items():
        if not name.startswith("naive"):  # which the check has run already
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.runs):
        for name, work in works.items():
            times[name].append(seconds(work))
    medians = {name: statistics.median(of) for name, of in times.items()}
    ratios = {
        name: round(medians[f"naive {name.split()[0]}"] / took, 2)
        for name, took in medians.items()
        if not name.startswith("naive")
    }
    print(json.dumps({
        "model": wide.name, "heads_positions": options.positions, "prompts": len(prompts),
        "prompts_from": options.prompts and Path(options.prompts).name,
        "tokens": sum(map(len, prompts)), "runs": options.runs,
        "seconds_median": {name: round(took, 3) for name, took in medians.items()},
        "times_as_fast_as_naive_fp32": ratios, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }, indent=1))  # fmt: skip


def check(
    dp: DePass, heads: list[torch.Tensor], prompts: list[torch.Tensor], batch: list[Any], ids: torch.Tensor
) -> None:
    """No time is worth quoting of something that computes something else.

    Prompts: the same scores. Heads: the published code changes position 0, so that only the sums are the same.
    """
    logit = float(dp.attribute(ids, TARGET).target_logits[0])
    for layer, scores in enumerate(heads):
        if abs(float(scores.sum()) - logit) > 1e-2 * float(scores.abs().sum()):
            raise SystemExit(f"the naive heads of layer {layer} add up to {float(scores.sum())}, not to {logit}")
    for scores, ours in zip(prompts, batch, strict=True):
        if float((scores - ours.scores[0]).norm() / ours.scores.norm()) > 1e-3:
            raise SystemExit("the naive decomposition's scores of a prompt differ from ours")


if __name__ == "__main__":
    main()
