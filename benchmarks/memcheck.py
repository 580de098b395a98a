"""Small calls of the compiled kernels, for compute-sanitizer. It imports only torch and depass_kernels, to start quickly.

compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/memcheck.py [cuda|cpu]
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import torch  # noqa: E402
from layouts import LAYOUTS, poisoned, scale, sliced  # noqa: E402

from depass_kernels import backends, mix_values, normed, share_hidden  # noqa: E402


def main(backend: str) -> None:
    """Call every kernel of ``backend``: ``cuda``, or ``cpu``, which has the same ops."""
    calls = 0
    for name in ("tokens17-bias-excluded", "several", "dense33"):
        layout = LAYOUTS[name]
        for dtype in (torch.float32, torch.bfloat16):
            for columns in (67, 128):
                gate = sliced((layout.rows, columns), dtype, backend)
                hidden = sliced((layout.positions, columns), dtype, backend)
                for rule in backends.RULES:
                    total = hidden if rule == "taylor" else None
                    out = poisoned(layout.rows, columns, dtype, backend)
                    share_hidden(gate, hidden, layout, rule=rule, gate_total=total, out=out, backend=backend)
                    calls += 1
            for d in (5, 64):
                pattern = sliced((layout.prompts, 4, layout.longest, layout.longest), dtype, backend).tril()
                values, query_scale = sliced((layout.rows, 2 * d), dtype, backend), scale(layout.positions, backend)
                mix_values(pattern, values, layout, kv_heads=2, query_scale=query_scale, backend=backend)
                calls += 1
            for columns in (67, 128):
                state, weight = (
                    sliced((layout.rows, columns), torch.float32, backend),
                    torch.ones(columns, device=backend),
                )
                out, scales = poisoned(layout.rows, columns, dtype, backend), scale(layout.positions, backend)
                normed(state, layout, scale=scales, weight=weight, centred=True, out=out, backend=backend)
                calls += 1
    if backend == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls of the {backend} kernels")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")
