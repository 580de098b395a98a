"""End-to-end time on the CPU against the GEMM floor, both measured in one process, in turn.

    python benchmarks/cpu_floor.py [--positions 128] [--runs 5] [--dtype float32] [--naive]

The floor is the operations that nobody avoids without approximating, ``2D·Kd + 2D·Hd + 4D·F`` per row and layer, at the
rate that the library's own GEMMs of these shapes reach here, in the dtype of the products (fp32 for bf16 weights on a CPU
without bf16 instructions), between the runs that are compared with it.
``--naive`` runs the naive decomposition once in the same process, too.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch
from baselines.naive import token_scores

from depass import DePass


def floor_seconds(dp: DePass, rows: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of one layer's four GEMMs over all rows, times the layers, and their rate in GFLOP/s.

    The better of two ways: all rows at once, and in blocks whose operands stay in a CPU's cache.
    """
    layer = dp._bound.layers[0]
    shapes = [weight.weight.shape for weight in (layer.value, layer.output, layer.gate, layer.down)]
    operations = sum(2 * rows * inputs * outputs for outputs, inputs in shapes)
    best = float("inf")
    for at_once in (rows, 2048):
        seconds = 0.0
        for outputs, inputs in shapes:
            a, w = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
            out = torch.empty(rows, outputs, dtype=dtype)
            begin = time.perf_counter()
            for first in range(0, rows, at_once):
                torch.mm(a[first : first + at_once], w.T, out=out[first : first + at_once])
            seconds += time.perf_counter() - begin
        best = min(best, seconds)
    return best * len(dp._bound.layers), operations / best / 1e9


def assert_same(naive: torch.Tensor, ours: torch.Tensor, dtype: torch.dtype) -> None:
    """No time is worth quoting of something that computes something else."""
    missed = float((naive.float() - ours).norm() / ours.norm())
    if missed > (1e-3 if dtype == torch.float32 else 0.5):
        raise SystemExit(f"the naive decomposition's scores differ from ours by {missed:.1e} of their norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--naive", action="store_true")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    dp = DePass.from_pretrained(dtype=dtype)
    ids = torch.randint(100, 40_000, (options.positions,), generator=torch.Generator().manual_seed(0))
    rows = options.positions * (options.positions + 1) // 2
    result = dp.attribute(ids, target=5, exclude_bos=True)  # warm up
    products = dp._bound.product_dtype
    floor_seconds(dp, rows, products)
    runs, floors, rates, plain = [], [], [], []
    for _ in range(options.runs):
        seconds, rate = floor_seconds(dp, rows, products)
        begin = time.perf_counter()
        dp.attribute(ids, target=5, exclude_bos=True)
        runs.append(time.perf_counter() - begin)
        floors.append(seconds)
        rates.append(rate)
        begin = time.perf_counter()
        with torch.no_grad():
            dp.model(ids[None])
        plain.append(time.perf_counter() - begin)
    naive = None
    if options.naive:
        begin = time.perf_counter()
        scores = token_scores(dp.model, ids, 5)
        naive = time.perf_counter() - begin
        assert_same(scores, result.scores[0], dtype)
    ratios = [run / floor for run, floor in zip(runs, floors, strict=True)]
    print(
        json.dumps(
            {
                "model": dp.name, "dtype": options.dtype,
                "products": str(products).removeprefix("torch."), "backends": result.settings.backends,
                "positions": options.positions, "rows": rows, "runs": options.runs,
                "seconds_median": round(statistics.median(runs), 3),
                "floor_seconds_median": round(statistics.median(floors), 3),
                "gemm_gflops_median": round(statistics.median(rates), 1),
                "plain_forward_seconds_median": round(statistics.median(plain), 3),
                "naive_seconds": naive and round(naive, 2),
                "naive_ratio": naive and round(naive / statistics.median(runs), 1),
                "ratio_median": round(statistics.median(ratios), 3), "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3), "torch": torch.__version__, "threads": torch.get_num_threads(),
                "machine": platform.processor() or platform.machine(),
            },
            indent=1,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
