"""Peak memory of an attribution on the CPU, beyond a process that loaded the model and ran it plainly on the same prompt.

python benchmarks/memory.py [--positions 512]
"""

from __future__ import annotations

import argparse
import json
import resource

import torch

from depass import DePass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=512)
    options = parser.parse_args()
    dp = DePass.from_pretrained(dtype=torch.float32)
    ids = torch.randint(100, 40_000, (options.positions,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dp.model(ids[None])
    plain = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = dp.attribute(ids, target=5)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    state = options.positions * (options.positions + 1) // 2 * dp.model.config.hidden_size * 4
    report = {
        "model": dp.name,
        "positions": options.positions,
        "plain_peak_bytes": plain,
        "attribution_peak_bytes": peak,
        "beyond_plain_bytes": peak - plain,
        "state_bytes": state,
        "beyond_plain_over_state": round((peak - plain) / state, 3),
        "conservation_error": float(result.conservation_error.max()),
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
