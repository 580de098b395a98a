"""share_hidden and mix_values in C++ against the plain-torch reference and a copy of the same bytes, in turn.

    python benchmarks/cpu_kernels.py [--runs 15]

The shapes are SmolLM2-135M's at N=128: 8256 rows. Prints medians in milliseconds and their ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from depass_kernels import SourceLayout, mix_values, share_hidden


def in_turn(works: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median milliseconds of each, run one after the other ``runs`` times."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for run in range(runs + 2):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            if run >= 2:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    layout, neurons, heads, kv_heads, d = SourceLayout.tokens(128, excluded=0), 1536, 9, 3, 64
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        short = str(dtype).removeprefix("torch.")
        gate = (0.3 * torch.randn(layout.rows, neurons)).to(dtype)
        hidden, scale = torch.randn(128, neurons).to(dtype), torch.rand(128) + 0.5
        out = torch.empty_like(gate)
        took = in_turn(
            {
                "cpu": lambda: share_hidden(gate, hidden, layout, gate_scale=scale, out=out, backend="cpu"),  # noqa: B023
                "reference": lambda: share_hidden(gate, hidden, layout, gate_scale=scale, out=out, backend="reference"),  # noqa: B023
                "copy": lambda: out.copy_(gate),  # noqa: B023
            },
            options.runs,
        )
        rows.append({"op": "share_hidden", "shape": list(gate.shape), "dtype": short, "milliseconds": took})
        pattern = torch.softmax(torch.randn(1, heads, 128, 128), -1).tril().to(dtype)
        values = torch.randn(layout.rows, kv_heads * d).to(dtype)
        mixed = torch.empty(layout.rows, heads * d, dtype=dtype)
        call = {"kv_heads": kv_heads, "key_scale": scale, "out": mixed}
        took = in_turn(
            {
                name: lambda b=name: mix_values(pattern, values, layout, **call, backend=b)  # type: ignore[misc]  # noqa: B023
                for name in ("cpu", "reference")
            },
            options.runs,
        )
        rows.append({"op": "mix_values", "shape": list(mixed.shape), "dtype": short, "milliseconds": took})
    for row in rows:
        took = row["milliseconds"]
        row["times_as_fast_as_reference"] = round(took["reference"] / took["cpu"], 1)
        if "copy" in took:
            row["times_a_copy"] = round(took["cpu"] / took["copy"], 1)
    print(
        json.dumps(
            {"torch": torch.__version__, "threads": torch.get_num_threads(), "runs": options.runs, "rows": rows},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
