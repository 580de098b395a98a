"""Writes the list of transformers' causal models into a document: ``python tests/support/causal_models.py docs/models.md``.

Each model type of the installed transformers is made as a small random model and attributed. A type works if DePass takes
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
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff", "dim_ff"), 48
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 3),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "global_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), models.VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 320),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "hidden_size_per_layer_input"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("num_kv_shared_layers",), 0),
    "sliding_window": 5,
    "pad_token_id": 0,
    "is_decoder": True,
}
# of experts, where a config has a number of them
EXPERTS: dict[str, int] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts"), 1),
}
# what single types want besides
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
MORE: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 1, "num_expert_group": 1, "topk_group": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "dots3_note": {"adapter_in_dim": 32, "adapter_out_dim": 32, "adapter_input_size": 32},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mllama": {"cross_attention_layers": [1]},
    "qwen4_exp": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds": False, "attention_head_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "hybrid", "mamba"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


_CODEBOOKS = "it reads several ids at each position (codebooks)"
_DRAFT = "a draft model, which reads another model's keys and values"
# why a type cannot be made small, in words, where the error of transformers does not say it
NOT_MADE = {
    "blt": "it reads bytes in patches, with several models",
    "gemma3n": "its vision part needs the package timm",
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "musicgen": _CODEBOOKS,
    "musicgen_melody": _CODEBOOKS,
}
# words for errors that name a model's own modules and numbers
SHORT = {
    "are not of transformers' experts interface": "its experts are not of transformers' experts interface",
    "layers with experts and those without have": "its layers with experts and those without have other norms",
    "chooses some keys for each query": "its attention chooses some keys for each query (sparse attention)",
    "of which DePass does not know what": "its attention function takes arguments that DePass does not know",
    "does not call transformers' AttentionInterface": "its first layer has no attention that calls the `AttentionInterface`",
    "^layer .* lacks .*, which": "its layers differ in their modules",
    "activation modules read": "activation modules read the outputs of several projections of a layer",
    "no list of modules": "its layers are no list of the length that its config says",
    "none of its layers has attention": "none of its layers has attention alone",
    "encoder-only": "an encoder-only model",
    "adds to the stream is not": "what a layer adds to the stream is not what its projections write",
    "is not the attention pattern times the values": "its attention scales the pattern's output",
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
    names = [name for name in models.EVERY if name.replace("-", "_") in (kind, kind.removesuffix("_text"))]
    if names and kind in FAMILIES:
        return models.make(names[0])
    model_class = getattr(tf, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    config = small((model_class.config_class or CONFIG_MAPPING[kind])(), MORE.get(kind, {}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).float()
        for path, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.data.copy_(_values(path, parameter))
    return model.eval()


def small(default: Any, more: dict[str, Any]) -> Any:
    """A config with small sizes, also in its parts, and with a few layers that are as different as those of the default."""
    own = default.to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in own}
    sizes |= {name: size for name, size in EXPERTS.items() if own.get(name)}
    if "qk_rope_head_dim" in own:  # latent attention has as many value heads as heads
        sizes |= {"head_dim": 4, "num_key_value_heads": 4}
        sizes = {name: size for name, size in sizes.items() if name in own}
    layers = getattr(default, "num_hidden_layers", None)
    for name, each in own.items():
        if isinstance(each, list) and len(each) == layers:
            different = list(dict.fromkeys(each))
            sizes[name] = [different[index % len(different)] for index in range(SIZES["num_hidden_layers"])]
    for name in getattr(default, "sub_configs", {}):
        part = getattr(default, name, None)
        if isinstance(part, tf.PretrainedConfig):
            sizes[name] = small(part, more)
    sizes |= {name: each for name, each in more.items() if name in own}
    return type(default)(**sizes)


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
        return Row(kind, "not made", NOT_MADE.get(kind) or _phrase(error))
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
        together = next(iter(dp.attribute_many([ids, ids[:7]], 5, rule=rule)))
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
    for pattern, words in SHORT.items():
        if re.search(pattern, reason):
            return words
    return reason


def rows(named: Sequence[str]) -> Iterator[Row]:
    """The rows of types, from processes that go on after a crash."""
    left = list(named)
    while left:
        done = subprocess.run(
            [*COMMAND, *left], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
        )
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
    for (outcome, reason), names in sorted(
        groups.items(), key=lambda pair: (OUTCOMES.index(pair[0][0]), -len(pair[1]))
    ):
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
