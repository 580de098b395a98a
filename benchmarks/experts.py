"""Times models with routed experts, relative to a dense model of equal active width.

    python -m benchmarks.experts [--lengths 32 96] [--runs 5] [--threads N] [--out FILE.json]

Both are random models of Qwen3's shape. In one, each position chooses 8 of 64 experts of 384 neurons; the other has one MLP
of 3,072 neurons. A prompt of random tokens is attributed under the softmax rule and under half, and the model runs alone.
Runs of both models take turns; each is warmed up by one that is checked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from depass import DePass
from depass.evaluate.summary import table
from depass.files import write_atomically

from .machine import ROOT, Machine, commit
from .wording import NOTHING, where
from .wording import seconds as shown

FILE = ROOT / "benchmarks" / "results" / "experts.json"
EXPERTS, CHOSEN, NEURONS = 64, 8, 384
SHAPE = {
    "vocab_size": 2000, "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 64, "max_position_embeddings": 4096,
}  # fmt: skip
CONSERVATION = 1e-4  # the largest error without a doubt about the run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print its table and store its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=(32, 96), metavar="N", help="tokens of each prompt")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="file of results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    code, measured = commit(), []
    models = {"experts": routed(), "dense": dense()}
    for length in options.lengths:
        for method in ("plain eager pass", "half", "softmax"):
            seconds = timed({name: work(dp, length, method) for name, dp in models.items()}, options.runs)
            measured.append({"method": method, "length": length, **seconds})
    row = {
        "what": "experts", "lengths": list(options.lengths), "runs": options.runs, "measured": measured, **code,
        **Machine("cpu").describe(), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip
    write_atomically(options.out, (json.dumps(row, indent=1) + "\n").encode())
    print(section(options.out))


def section(file: Path | None = None) -> str:
    """What was measured and where, and the table, from a file of results; by default the committed one."""
    file = file or FILE
    if not file.exists():
        return NOTHING
    row = json.loads(file.read_text())
    lengths = " ".join(map(str, row["lengths"]))
    caption = (
        f"Command: `python -m benchmarks.experts --lengths {lengths} --runs {row['runs']} --threads {row['threads']}`. "
        f"Processor time, medians. {where([row])}"
    )
    lines = [[each["method"], str(each["length"]), shown(each["experts"]), shown(each["dense"]),
              f"{each['experts'] / each['dense']:.2f}×"] for each in row["measured"]]  # fmt: skip
    return f"{caption}\n\n{table(['method', 'tokens', '64 experts', 'dense', 'ratio'], lines)}"


def routed() -> DePass:
    """The model with experts."""
    config = transformers.Qwen3MoeConfig(
        **SHAPE,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=NEURONS,
        intermediate_size=NEURONS,
    )
    return _of(transformers.Qwen3MoeForCausalLM, config)


def dense() -> DePass:
    """The dense model of the same active width."""
    return _of(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**SHAPE, intermediate_size=CHOSEN * NEURONS))


def _of(kind: Any, config: Any) -> DePass:
    torch.manual_seed(0)
    model = kind(config).eval()
    model.set_attn_implementation("eager")
    return DePass(model)


def work(dp: DePass, length: int, method: str) -> Callable[[], None]:
    """What is timed: an attribution under a rule, which is checked first, or the model's own pass."""
    ids = torch.randint(5, SHAPE["vocab_size"], (length,), generator=torch.Generator().manual_seed(length)).tolist()
    if method == "plain eager pass":
        return partial(_plain, dp, ids)
    error = float(dp.attribute(ids, 5, rule=method).conservation_error.max())
    if error > CONSERVATION:
        raise SystemExit(f"{method} at {length} tokens misses the logit by {error:.1e}; nothing was timed")
    return partial(_attribute, dp, ids, method)


@torch.no_grad()
def _plain(dp: DePass, ids: Sequence[int]) -> None:
    dp.model(torch.tensor([ids]), use_cache=False)


def _attribute(dp: DePass, ids: Sequence[int], rule: str) -> None:
    dp.attribute(ids, 5, rule=rule)


def timed(works: dict[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """The median processor time of each work in seconds, over rounds in which they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs + 1):
        for name, run in works.items():
            began = time.process_time()
            run()
            taken[name].append(time.process_time() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


if __name__ == "__main__":
    main()
