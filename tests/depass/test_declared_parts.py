"""Families of experts, latent values, gates and sinks: what is refused before a run, and what attentions may take."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from depass import FAMILIES, DePass, ModelError
from depass.models.attention import sink_scale

MISFITS: dict[str, tuple[str, dict[str, Any], str]] = {
    "one of two projections beside the experts": (
        "qwen2_moe", {"shared_down": None}, r"Family\(shared_gate='mlp.shared_expert.gate_proj'\) without shared_down",
    ),
    "the other one": ("qwen2_moe", {"shared_gate": None}, r"Family\(shared_down=.* without shared_gate: name that too"),
    "an MLP beside no experts": ("qwen2_moe", {"experts": None}, r"Family\(shared_gate=.* without experts"),
    "a norm on no latent vector": ("deepseek_v3", {"latent": None}, r"Family\(latent_norm=.* without latent"),
    "values that read no stream": (
        "deepseek_v3", {"latent": None, "latent_norm": None},
        r"layer 0 of .* does not fit its depass.Family: self_attn.kv_b_proj reads vectors of width 16, but the residual "
        r"stream has width 32; name what projects it before: latent=",
    ),
    "a narrow latent vector": (
        "deepseek_v3", {"latent": "self_attn.q_a_proj"}, "reads vectors of width 16, but self_attn.q_a_proj writes 12",
    ),
    "a latent projection of something else": (
        "deepseek_v3", {"latent": "self_attn.o_proj"}, "self_attn.o_proj reads vectors of width 24, but the residual",
    ),
    "rows of no whole heads": (
        "deepseek_v3", {"value_rows": "last_of_head"}, r"weights \[56, 16\], of which value_rows='last_of_head' takes no",
    ),
    "half of all gates": ("deepseek_v3", {"gate_rows": "first_half"}, "has 28 rows with gate_rows='first_half', but .* 56"),
    "gates and ups together": ("phi3", {"gate_rows": "all"}, "has 112 rows with gate_rows='all', but mlp.down_proj reads"),
    "gates and ups beside experts": (
        "granitemoeshared", {"gate_rows": "all"}, "shared_mlp.input_linear has 64 rows .*shared_mlp.output_linear reads 32",
    ),
    "a gate of no head": (
        "qwen3", {"mix_gate": "self_attn.v_proj"}, "has 16 rows with mix_gate_rows='all'; a gate has 4",
    ),
    "a gate without queries": (
        "qwen3", {"mix_gate": "self_attn.q_proj", "mix_gate_rows": "second_of_head"}, "has 16 rows with mix_gate_rows='sec",
    ),
    "a bias as sinks": ("gpt_oss", {"sinks": "self_attn.q_proj.bias"}, r"has shape \[32\]; sinks have \[4\], one a head"),
    "no such sinks": ("llama", {"sinks": "self_attn.sinks"}, r"lacks modules .*Missing: .*self_attn.sinks"),
    "a norm of the hidden vector": ("bitnet", {"mix_norm": "mlp.ffn_sub_norm"}, r"of shape \[56\]; here it has \[32\]"),
    "a norm of one head": ("qwen3", {"attention_norm": "self_attn.q_norm"}, r"weight of shape \[8\]; here it has \[32\]"),
    "a factor of no part": ("llama", {"factors": (("up", "x"),)}, r"give a tuple of pairs \(part, name .* parts are 'value"),
    "a factor that is no pair": ("llama", {"factors": ("gate",)}, r"Family\(factors=\('gate',\)\): give a tuple of pairs"),
    "a factor that no config has": (
        "falcon_h1", {"factors": (("gate", "mlp_multipliers.2"),)}, "has mlp_multipliers.2=None; it must be a positive",
    ),
    "a factor on logits that is left out": (
        "falcon_h1", {"logit_factor": None}, "has lm_head_multiplier=0.6, which its family does not declare",
    ),
    "a norm on the sum of two mixers": (
        "falcon_h1", {"attention_post_norm": "pre_ff_layernorm"}, "self_attn and mamba, side by side; DePass supports no",
    ),
    "a layer's only sublayer under another name": (
        "nemotron_h", {"experts": None, "shared_gate": None, "shared_down": None}, "Missing: .*layers.1.mixer.v_proj",
    ),
    "layers with one sublayer declared as whole ones": ("nemotron_h", {"single": False}, "lacks modules|is no state_space"),
    "the block as its experts": ("qwen3_moe", {"experts": "mlp"}, "experts of layer 0 .* not of transformers"),
}  # fmt: skip


def changed(name: str, fields: dict[str, Any]) -> DePass:
    """A small model with its family's declaration changed."""
    model = models.make(name)
    return DePass(model, family=replace(FAMILIES[model.config.model_type], **fields))


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_are_refused_before_a_run(case: str) -> None:
    name, fields, says = MISFITS[case]
    if name not in models.EVERY:
        pytest.skip(f"{name} needs transformers {models.since(name)}")
    with pytest.raises(ModelError, match=says):
        changed(name, fields)


# --- experts whose weights cannot be read -----------------------------------------------------------------------------


def in_a_list(model: Any) -> None:
    mlp = model.model.layers[2].mlp
    mlp.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))


def of_integers(model: Any) -> None:
    experts = model.model.layers[2].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.int8), requires_grad=False)


def of_eight_bits(model: Any) -> None:
    experts = model.model.layers[2].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)


def packed_flat(model: Any) -> None:
    experts = model.model.layers[2].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().flatten(1))


def spread(model: Any) -> None:
    model.model.layers[2].mlp.experts._is_expert_parallel = True


def normed(model: Any) -> None:
    model.model.layers[2].mlp.experts.has_post_expert_norm = True


def without_down(model: Any) -> None:
    del model.model.layers[2].mlp.experts.down_proj


UNREADABLE: dict[str, tuple[Callable[[Any], None], str]] = {
    "a list of modules": (
        in_a_list,
        r"\(ModuleList\) are not of transformers' experts interface.*DePass supports no others",
    ),
    "integers": (of_integers, r"hold torch.int8 weights of shape \[6, 32, 24\] as down_proj.*load unquantised weights"),
    "eight bits": (of_eight_bits, r"hold torch.float8_e4m3fn weights of shape \[6, 48, 32\] as gate_up_proj"),
    "flat weights": (packed_flat, r"hold torch.float32 weights of shape \[6, 768\] as down_proj"),
    "several processes": (spread, r"spread over processes \(expert parallelism\); load the model in one process"),
    "a norm on outputs": (normed, "have a norm on their outputs, which DePass does not support"),
    "no down projection": (without_down, "have no down_proj"),
}


@pytest.mark.skipif("qwen3_moe" not in models.EVERY, reason="this transformers has no experts interface")
@pytest.mark.parametrize("case", UNREADABLE)
def test_experts_that_cannot_be_read_are_refused_by_their_layer(case: str) -> None:
    change, says = UNREADABLE[case]
    model = models.make("qwen3_moe")
    change(model)
    with pytest.raises(ModelError, match=rf"^the experts (of layer 2|layers.2.mlp.experts) of Qwen3Moe\w+ .*{says}"):
        DePass(model)


# --- attention functions ----------------------------------------------------------------------------------------------


def with_attention(model: Any, monkeypatch: pytest.MonkeyPatch, extras: list[str]) -> None:
    """Give the model's attention modules an eager function of their own, which takes ``extras`` besides."""
    own = sys.modules[type(model.model.layers[0].self_attn).__module__].eager_attention_forward  # type: ignore[attr-defined]

    def eager_attention_forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    said = inspect.signature(own)
    first = [each for each in said.parameters.values() if each.kind != inspect.Parameter.VAR_KEYWORD]
    more = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in extras]
    eager_attention_forward.__signature__ = said.replace(parameters=[*first, *more])  # type: ignore[attr-defined]
    module = types.ModuleType("made_up_attention")
    module.eager_attention_forward = eager_attention_forward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for layer in model.model.layers:
        cls = type(layer.self_attn)
        layer.self_attn.__class__ = type("MadeUpAttention", (cls,), {"__module__": module.__name__})


@pytest.mark.parametrize("known", [[], ["softcap"], ["sliding_window", "position_bias"]])
def test_extras_of_attention_functions_that_are_part_of_the_pattern_pass(
    known: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = models.make("llama", torch.float64), models.prompt(7)
    expected = DePass(model).attribute(ids, 5).scores
    with_attention(model, monkeypatch, known)
    found = DePass(model).attribute(ids, 5, strict=True)
    assert torch.equal(found.scores, expected)


@pytest.mark.parametrize(
    ("extras", "named"), [(["temperature"], "temperature"), (["gate", "softcap", "bias"], "bias, gate")]
)
def test_extras_of_attention_functions_that_nobody_knows_are_refused_by_name(
    extras: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.make("llama")
    with_attention(model, monkeypatch, extras)
    with pytest.raises(
        ModelError, match=f"attention function of MadeUpAttention takes {named}, of which DePass does not"
    ):
        DePass(model).attribute(models.prompt(7), 5)


def parts(heads: int, kv_heads: int, queries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, a causal mask and sinks, of a model's sizes."""
    made = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, queries, 8, generator=made, dtype=torch.float64)
    key = torch.randn(2, kv_heads, queries, 8, generator=made, dtype=torch.float64)
    sinks = 3 * torch.randn(heads, generator=made, dtype=torch.float64)
    mask = torch.full((queries, queries), torch.finfo(dtype).min, dtype=torch.float64).triu(1)[None, None]
    return query.to(dtype), key.to(dtype), mask.to(dtype), sinks.to(dtype)


@pytest.mark.parametrize(("heads", "kv_heads", "queries"), [(4, 4, 7), (6, 2, 5), (3, 1, 1)])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-7), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("masked", [True, False])
def test_the_scale_of_sinks_is_the_softmax_that_a_sink_leaves(
    heads: int, kv_heads: int, queries: int, dtype: torch.dtype, limit: float, masked: bool
) -> None:
    """One more logit in the softmax takes its share from all keys: what is left is the sigmoid of the definition."""
    query, key, mask, sinks = parts(heads, kv_heads, queries, dtype)
    keys = key.double().repeat_interleave(heads // kv_heads, 1)
    logits = 0.3 * query.double() @ keys.mT + (mask.double() if masked else 0)
    pattern = logits.softmax(-1).to(dtype)
    found = sink_scale(query, key, mask if masked else None, pattern, sinks, 0.3)
    column = sinks.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    left = torch.cat([logits, column], -1).softmax(-1)[..., :-1].sum(-1, keepdim=True)
    assert found.shape == (2, heads, queries, 1)
    assert found.dtype == dtype
    assert (found.double() - left).abs().max() < limit
