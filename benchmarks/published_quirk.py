"""Measures how much one quirk of the published implementation, and all quirks together, change a real model's head scores.

    python benchmarks/published_quirk.py [--prompts 6] [--results benchmarks/results/published_quirk.json]

The quirk: at position 0 the published code sets the pre-activation of source 0 (the remainder of the residual stream) to 1
before the softmax. The program compares the published head scores with those without this quirk, and with those of
``depass`` (no quirks). It uses SmolLM2-135M-Instruct in fp32, at the last position, and compares each layer's heads, without
the remainder.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depass import DePass
from depass.compat.official import decomposed_state_manager
from depass.compat.published import Published
from depass.files import write_atomically

PROMPTS = {
    "Schreckhorn belongs to the continent of": " Europe",
    "The native language of Georges Gorse is": " French",
    "In United Kingdom, the language spoken is": " English",
    "Sultan Satuq Bughra Khan follows the religion of": " Islam",
    "Hamza ibn Abdul-Muttalib is affiliated with the religion of": " Islam",
    "The cave Sarah and Robin went to had a strawberry. Robin gave it to": " Sarah",
}


class WithoutTheQuirk(Published):
    """The published engine without the quirk at position 0; the other quirks stay."""

    def _replace_first(self, gate: Tensor) -> None:
        pass


class WithoutTheQuirkManager(decomposed_state_manager):
    """The published interface on that engine."""

    def _engine(self) -> Any:
        return WithoutTheQuirk(self.bound, "softmax", self.mlp_softmax_temp, self.ignore_special_token)


def compare(published: Tensor, other: Tensor) -> dict[str, float]:
    """The relative difference of two vectors of head scores ``[H]``, and their Spearman rank correlation."""
    ranks = torch.stack([scores.argsort().argsort().double() for scores in (published, other)])
    return {
        "relative_difference": float((published - other).norm() / published.norm()),
        "rank_correlation": float(torch.corrcoef(ranks)[0, 1]),
    }


def summary(comparisons: list[dict[str, float]]) -> dict[str, float]:
    """Medians, means and worst cases over layers and prompts."""
    differences = [comparison["relative_difference"] for comparison in comparisons]
    correlations = [comparison["rank_correlation"] for comparison in comparisons]
    return {
        "relative_difference_median": round(statistics.median(differences), 4),
        "relative_difference_worst": round(max(differences), 4),
        "share_that_differs_by_more_than_a_tenth": round(sum(d > 0.1 for d in differences) / len(differences), 4),
        "rank_correlation_median": round(statistics.median(correlations), 4),
        "rank_correlation_mean": round(statistics.mean(correlations), 4),
        "rank_correlation_worst": round(min(correlations), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prompts", type=int, default=len(PROMPTS), metavar="N",
        help="use only the first N prompts (default: %(default)s, all)",
    )  # fmt: skip
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results" / "published_quirk.json", metavar="FILE",
        help="file of results (default: benchmarks/results/published_quirk.json)",
    )  # fmt: skip
    options = parser.parse_args()
    dp = DePass.from_pretrained(dtype=torch.float32)
    managers = {
        "published": decomposed_state_manager(dp.model, dp.tokenizer, reproduce_published=True),
        "without the quirk": WithoutTheQuirkManager(dp.model, dp.tokenizer, reproduce_published=True),
        "depass": decomposed_state_manager(dp.model, dp.tokenizer),
    }
    layers = range(len(dp.model.model.layers))
    rows: list[dict[str, Any]] = []
    for prompt, target in list(PROMPTS.items())[: options.prompts]:
        token = dp.tokenizer.encode(target, add_special_tokens=False)[0]
        for layer in layers:
            scores: dict[str, Tensor] = {}
            for name, manager in managers.items():
                state = manager.get_layer_module_decomposed_state(prompt, layer, type="attn_head")
                scores[name] = manager.compute_attribute_score(state, -1, token)[1:]
            others = {
                name: compare(scores["published"], other) for name, other in scores.items() if name != "published"
            }
            rows.append({"prompt": prompt, "layer": layer, **others})
        print(f"{prompt!r}: {len(layers)} layers", flush=True)
    results = {
        "model": dp.name, "dtype": "float32", "prompts": options.prompts, "layers": len(layers),
        "published_against": {name: summary([row[name] for row in rows]) for name in ("without the quirk", "depass")},
        "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    print(json.dumps(results, indent=1))
    write_atomically(options.results, json.dumps({**results, "rows": rows}, indent=1).encode())


if __name__ == "__main__":
    main()
