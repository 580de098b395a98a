"""Writes the list of transformers' causal models into docs/models.md: ``python tests/support/causal_models.py docs/models.md``.

Each model type of the installed transformers is made as a small random model and attributed. A type works if ``DePass`` takes
the model, the scores add up to the model's own logit under two rules, and a prompt in a batch gets the scores that it gets
alone. Models run in a process of their own: one that crashes or hangs costs its own row.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import models
import torch
import transformers as tf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from depass import FAMILIES, DePass, ModelError

BEGIN, END = "<!-- the causal models: begin -->", "<!-- the causal models: end -->"
OUTCOMES = ("declared", "inferred", "wrong", "refused", "not made")
COMMAND = [sys.executable, __file__, "--each"]  # prints the rows of the types that follow
SECONDS = 60  # for one type
TOLERANCE = 1e-5  # relative, in fp32
LENGTHS = (40, 17)  # of prompts
# sizes by their names in the configs; a config has some of them
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff", "dim_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), models.VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 320),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("head_dim", "v_head_dim", "global_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("rotary_dim", "hidden_size_per_layer_input"), 4),
    "sliding_window": 5,
    "is_decoder": True,
}
_OF_LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")  # made anew for fewer layers
# words for the errors that name modules of one model or numbers
_SHORT = {
    "mixture of experts": "mixture of experts",
}


@dataclass(frozen=True)
class Row:
    """What came out for a type: one of ``OUTCOMES``, and why where it does not work."""

    kind: str
    outcome: str
    reason: str = ""


def kinds() -> list[str]:
    """The types of causal models that the installed transformers has."""
    return [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in CONFIG_MAPPING]


# Small models.


def make(kind: str) -> Any:
    """A small random model of a type: that of the tests where they have one, else one whose config is made small."""
    names = [name for name, (prefix, _) in models.EVERY.items() if _key(prefix) == _key(kind) and kind in FAMILIES]
    if names:
        return models.make(names[0])
    config = small(CONFIG_MAPPING[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config).float()
        for path, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.data.copy_(_values(path, parameter))
    return model.eval()


def _key(name: str) -> str:
    return name.lower().replace("_", "").removesuffix("text")


def small(config_class: Any) -> Any:
    """A config with small sizes, also in its parts."""
    default = config_class()
    return config_class(**_sizes(default))


def _sizes(default: Any) -> dict[str, Any]:
    own = default.to_dict()
    sizes = {name: size for name, size in SIZES.items() if own.get(name) is not None or name in ("bos_token_id",)}
    parts = getattr(default, "sub_configs", {})
    for name in parts:
        part = getattr(default, name, None)
        if part is not None and hasattr(part, "to_dict"):
            sizes[name] = {"model_type": part.model_type, **_sizes(part)}
    return sizes


def _values(path: str, parameter: torch.Tensor) -> torch.Tensor:
    normal = torch.randn_like(parameter)
    if parameter.dim() < 2:
        return 0.1 * normal if path.endswith("bias") else 1 + 0.2 * normal
    if any(part in path for part in ("embed", ".wte", ".wpe", "lm_head")):
        return normal
    return normal / parameter.shape[-1] ** 0.5


# What comes out.


def row(kind: str) -> Row:
    """Make a type's small model and attribute it."""
    try:
        model = make(kind)
        ids = models.prompt(max(LENGTHS))
        with torch.no_grad():
            model(torch.tensor([ids]), use_cache=False)
    except Exception as error:  # configs and models may raise anything
        return Row(kind, "not made", _phrase(error))
    try:
        dp = DePass(model)
        for length in LENGTHS:
            fault = fault_of(dp, model, models.prompt(length))
            if fault:
                return Row(kind, "wrong", fault)
    except ModelError as error:
        return Row(kind, "refused", shortened(str(error)))
    except Exception as error:  # a fault of ours
        return Row(kind, "wrong", f"{type(error).__name__}: {_phrase(error)}")
    return Row(kind, dp.bound.origin)


def fault_of(dp: DePass, model: Any, ids: list[int]) -> str:
    """What is wrong with the scores of a prompt, or an empty text."""
    with torch.no_grad():
        logits = models.uncapped(model, model(torch.tensor([ids]), use_cache=False).logits[0, -1].double())
    size = float(logits.norm() / len(logits) ** 0.5)
    for rule in ("softmax", "taylor"):
        alone = dp.attribute(ids, 5, rule=rule)
        if not float(alone.conservation_error.max()) < TOLERANCE:
            return f"under {rule} the scores miss the logit by {float(alone.conservation_error.max()):.0e}"
        missed = abs(float(alone.target_logits[0]) - float(logits[5])) / size
        if not missed < TOLERANCE:
            return f"the target's logit is not the model's own ({missed:.0e})"
        together = list(dp.attribute_many([ids, ids[:7]], 5, rule=rule))[0]
        missed = float((together.scores - alone.scores).norm() / alone.scores.norm())  # type: ignore[union-attr]
        if not missed < 10 * TOLERANCE:
            return f"under {rule} a prompt in a batch has other scores ({missed:.0e})"
    return ""


def _phrase(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return (lines[0] or type(error).__name__)[:150]


def shortened(message: str) -> str:
    """The reason in an error of ``DePass``, without what differs between models."""
    reason = message.partition("it cannot be inferred: ")[2].partition(". The nearest listed family")[0] or message
    reason = reason.partition(" are not supported: ")[2] or reason
    for pattern, words in _SHORT.items():
        if re.search(pattern, reason):
            return words
    return reason


def rows(named: Sequence[str]) -> Iterator[Row]:
    """The rows of types, from processes that go on after a crash."""
    left = list(named)
    while left:
        done = subprocess.run([*COMMAND, *left], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        found = [Row(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith('{"kind"')]
        yield from found
        left = left[len(found) :]
        if left:
            number = -done.returncode
            hung = number == signal.SIGALRM
            yield Row(
                left.pop(0), "not made",
                f"it took more than {SECONDS} s" if hung else f"the process ended with signal {number}",
            )  # fmt: skip


def print_each(named: Sequence[str]) -> None:
    """Print the rows of types; an alarm ends the process where one of them hangs."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for kind in named:
        signal.alarm(SECONDS)
        print(json.dumps(asdict(row(kind))), flush=True)


# The document.


def lines(found: Sequence[Row]) -> Iterator[str]:
    """A sentence with the counts, and the table."""
    working = {origin: [row for row in found if row.outcome == origin] for origin in ("declared", "inferred")}
    count = sum(map(len, working.values()))
    said = " and ".join(f"{len(those)} {origin}" for origin, those in working.items())
    yield f"transformers {tf.__version__} has {len(found)} types of causal models. {count} of them work: {said}."
    yield ""
    yield "| outcome | number | `model_type` |"
    yield "|---|---:|---|"
    groups: dict[tuple[str, str], list[str]] = {}
    for each in found:
        groups.setdefault((each.outcome, each.reason), []).append(each.kind)
    for (outcome, reason), names in sorted(groups.items(), key=lambda pair: (OUTCOMES.index(pair[0][0]), -len(pair[1]))):
        label = f"{outcome}: {reason}" if reason else outcome
        yield f"| {label} | {len(names)} | {', '.join(f'`{name}`' for name in names)} |"


def read(text: str) -> tuple[str, list[Row]]:
    """The version of transformers and the rows of a document's table."""
    inside = text.partition(BEGIN)[2].partition(END)[0]
    version = re.search(r"^transformers (\S+) has", inside, re.M)
    found = []
    for outcome, names in re.findall(r"^\| (.+) \| +\d+ \| (`.*`) \|$", inside, re.M):
        label, _, reason = outcome.partition(": ")
        found += [Row(kind, label, reason) for kind in re.findall("`([^`]+)`", names)]
    return version[1] if version else "", found


def written(text: str, found: Sequence[Row]) -> str:
    """A document with the table between its markers."""
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{head}{BEGIN}\n" + "\n".join(lines(found)) + f"\n{END}{tail}"


def main(document: Path) -> None:
    found = list(rows(kinds()))
    document.write_text(written(document.read_text(), found))
    for each in found:
        if each.outcome == "wrong":
            print(f"{each.kind}: {each.reason}", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1] == "--each":
        print_each(sys.argv[2:])
    else:
        main(Path(sys.argv[1]))
