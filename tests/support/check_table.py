"""Writes the table of the first run's check into docs/models.md: ``python tests/support/check_table.py docs/models.md``.

For every family, dtype and quantisation: the largest relative difference of any step at any layer, on small random models.
A difference above the limit is in bold.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import models
import multimodal
import tokens
import torch

from depass import DePass
from depass.models.bind import bind
from depass.models.bound import BoundModel
from depass.models.capture import Capture

BEGIN, END = "<!-- the check: begin -->", "<!-- the check: end -->"
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# sizes of quantised models, by their names in the configs: 4-bit kernels want whole blocks of 64
WIDE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "n_embd": 64, "n_inner": 128, "ffn_dim": 128, "word_embed_proj_dim": 64,
    "head_dim": 16, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "shared_intermediate_size": 64,
    "kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 8,
}  # fmt: skip
MULTIMODAL = [name for name in multimodal.NAMES if name.endswith("vl") or name == "glm4v"]  # with decoders of their own
NAMES = [*models.EVERY, *MULTIMODAL]


class Differences(Capture):
    """One pass that notes the largest difference of each step and the limit, and judges nothing."""

    def __init__(self, bound: BoundModel, ids: list[int]) -> None:
        super().__init__(bound, [ids], range(len(bound.layers)))
        self.found: dict[str, float] = {}
        self.allowed = 0.0

    def layer(self, *_: Any) -> None:
        pass

    def judge(self, index: int, found: dict[str, torch.Tensor], allowed: float) -> None:
        self.allowed = max(self.allowed, allowed)
        for step, difference in found.items():
            self.found[step] = max(self.found.get(step, 0.0), float(difference.max()))


def differences(bound: BoundModel, lengths: Sequence[int] = (1, 2, 17, 40)) -> tuple[dict[str, float], float]:
    """The largest difference of each step over prompts of several lengths, and the limit."""
    found: dict[str, float] = {}
    for length in lengths:
        run = Differences(bound, models.prompt(length, length))
        with torch.no_grad():
            run.run()
        found = {step: max(difference, found.get(step, 0.0)) for step, difference in run.found.items()}
    return found, run.allowed


def quantised() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The kinds of quantisation, each with a function that makes its config."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    def torchao(name: str, *arguments: Any, **others: Any) -> Any:
        from torchao import quantization

        return TorchAoConfig(getattr(quantization, name)(*arguments, **others))

    def groups() -> Any:
        from torchao.quantization.granularity import PerGroup

        return torchao("IntxWeightOnlyConfig", torch.int4, granularity=PerGroup(32))

    yield "bitsandbytes 4-bit", lambda: BitsAndBytesConfig(load_in_4bit=True)
    yield "bitsandbytes 8-bit", lambda: BitsAndBytesConfig(load_in_8bit=True)
    yield "torchao int8", lambda: torchao("Int8WeightOnlyConfig")
    yield "torchao int4", groups
    yield "torchao int8, dynamic", lambda: torchao("Int8DynamicActivationInt8WeightConfig")


def cell(measure: Callable[[], BoundModel]) -> str:
    try:
        found, allowed = differences(measure())
    except ImportError:
        return "not measured"
    except (AssertionError, ValueError, RuntimeError):  # the library's kernel refuses this shape
        return "refused"
    worst = max(found.values())
    return f"**{worst:.0e}**" if worst > allowed else f"{worst:.0e}"


def wide(name: str) -> dict[str, Any]:
    """The sizes of a quantised model."""
    if name in MULTIMODAL:  # the sections of their positions hold for heads of 8
        return {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes = WIDE | ({"head_dim": 32} if name.endswith("wide-heads") else {})
    if "kv_lora_rank" in models.EVERY[name][1]:
        sizes = {size: number for size, number in sizes.items() if size != "head_dim"}  # that of the rotated keys
    return {size: number for size, number in sizes.items() if size in models.EVERY[name][1]}


def made(name: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """A small model of a table's row."""
    return (multimodal if name in MULTIMODAL else models).make(name, dtype, **sizes)


def loaded(name: str, config: Any, dtype: torch.dtype) -> BoundModel:
    """A row's model, saved and loaded again in a kind of quantisation."""
    if name in MULTIMODAL and hasattr(config, "modules_to_not_convert"):
        config.modules_to_not_convert = ["lm_head", "model.visual"]  # the small vision part has no groups of 32
    with tempfile.TemporaryDirectory() as folder:
        made(name, **wide(name)).save_pretrained(folder)
        tokens.make().save_pretrained(folder)
        return DePass.from_pretrained(folder, dtype=dtype, quantization=config).bound


def lines() -> Iterator[str]:
    """Two tables: dense weights by dtype, and quantised weights in a model of fp32 and of bf16."""
    yield f"| model | {' | '.join(DTYPES)} |"
    yield f"|---|{'---|' * len(DTYPES)}"
    for name in NAMES:
        bounds = (partial(dense, name, dtype) for dtype in DTYPES.values())
        yield f"| {name} | {' | '.join(map(cell, bounds))} |"
    yield ""
    kinds = dict(quantised())
    yield f"| quantised, fp32 / bf16 | {' | '.join(kinds)} |"
    yield f"|---|{'---|' * len(kinds)}"
    for name in NAMES:
        pairs = [
            " / ".join(cell(partial(loaded, name, make(), dtype)) for dtype in (torch.float32, torch.bfloat16))
            for make in kinds.values()
        ]
        yield f"| {name} | {' | '.join(pairs)} |"


def dense(name: str, dtype: torch.dtype) -> BoundModel:
    return bind(made(name, dtype))


def main(path: Path) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    text = path.read_text()
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    path.write_text(f"{head}{BEGIN}\n" + "\n".join(lines()) + f"\n{END}{tail}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
