"""The first run's check of experts, gates and norms on what the heads mix, and sinks: right and wrong declarations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
import transformers as tf
from check_table import differences
from torch import Tensor

from depass import FAMILIES, DePass, Family, ModelError
from depass.models.bind import bind

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FACTORS = {"residual_multiplier": 0.4, "logits_scaling": 3.0}
SIZES: dict[str, Any] = {
    "vocab_size": models.VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
SHARED = Family(
    experts="mlp.experts", shared_gate="mlp.shared_experts.gate_proj", shared_down="mlp.shared_experts.down_proj"
)
SINKS = Family(sinks="self_attn.sinks", residual_factor="residual_multiplier", logit_divisor="logits_scaling")
# families given by hand: a gate on what the heads mix, number by number or in the queries' projection; sinks
GIVEN: dict[str, tuple[dict[str, Any], Family]] = {
    "Afmoe": (
        {**EXPERTS, "num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 5},
        replace(
            SHARED, attention_post_norm="post_attention_layernorm", mlp_norm="pre_mlp_layernorm",
            mlp_post_norm="post_mlp_layernorm", mix_gate="self_attn.gate_proj",
        ),
    ),
    "Qwen3Next": (
        {**EXPERTS, "shared_expert_intermediate_size": 24, "layer_types": ["full_attention"] * 3},
        replace(
            FAMILIES["qwen2_moe"], norm="rms_plus_one", mix_gate="self_attn.q_proj", mix_gate_rows="second_of_head"
        ),
    ),
    "GraniteSWA": (FACTORS, SINKS),
    "GraniteMoeSWA": (
        {**FACTORS, "num_local_experts": 4, "num_experts_per_tok": 2}, replace(SINKS, experts="block_sparse_moe.experts")
    ),
}  # fmt: skip
GIVEN = {name: given for name, given in GIVEN.items() if hasattr(tf, f"{name}Config")}
HALVES = (torch.bfloat16, torch.float16)


def given(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model of a family that is given by hand."""
    config = getattr(tf, f"{name}Config")(**SIZES, **GIVEN[name][0])
    config._experts_implementation = "eager"  # torch's grouped products refuse fp64
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(tf, f"{name}ForCausalLM")(config).to(torch.float64)
        models.fill(model, GIVEN[name][1])
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", GIVEN)
def test_right_families_given_by_hand_stay_far_below_the_limit(name: str) -> None:
    for dtype in (torch.float64, torch.float32, *HALVES):
        for seed in range(3):
            found, allowed = differences(bind(given(name, dtype, seed), GIVEN[name][1]))
            assert max(found.values()) < allowed / 4, (dtype, seed, found)


@pytest.mark.parametrize("rule", ["softmax", "taylor"])
@pytest.mark.parametrize("name", GIVEN)
def test_families_given_by_hand_add_up(name: str, rule: str) -> None:
    for dtype, limit in ((torch.float64, 1e-6), (torch.bfloat16, 3e-2)):
        dp = DePass(given(name, dtype), family=GIVEN[name][1], rule=rule, engine="forward")
        found = dp.attribute(models.prompt(17), [5, 7])
        assert found.conservation_error.max() < limit


# --- wrong ones -------------------------------------------------------------------------------------------------------


def _calling(forward: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: forward(self, own, *args, **kwargs)


def weighted_twice(self: Any, own: Any, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = own(self, x, chosen, weight)
    return out * weight[:, :1].to(out.dtype)


def scaled(self: Any, own: Any, *args: Any) -> Tensor:
    out: Tensor = own(self, *args)
    return 1.5 * out


def block_weighs(self: Any, own: Any, x: Tensor) -> Tensor:
    """The block multiplies the sum of the experts by a weight of the router once more."""
    flat = x.flatten(0, -2)
    _, weight, chosen = self.gate(flat)
    weight = weight.to(x.dtype)
    return (self.experts(flat, chosen, weight) * weight[:, :1]).view_as(x)  # type: ignore[no-any-return]


def block_reads_doubled(self: Any, own: Any, x: Tensor) -> Tensor:
    """The experts read something else than the block does."""
    flat = x.flatten(0, -2)
    _, weight, chosen = self.gate(flat)
    return self.experts(2 * flat, chosen, weight).view_as(x)  # type: ignore[no-any-return]


def block_of(name: str, dtype: torch.dtype, forward: Callable[..., Any], part: str = "mlp") -> Any:
    model = models.make(name, dtype)
    for layer in model.model.layers:
        module = layer.get_submodule(part)
        own = type(module).forward
        module.__class__ = type(f"Own{type(module).__name__}", (type(module),), {"forward": _calling(forward, own)})
    return model


def lying(name: str, dtype: torch.dtype, concatenated: bool) -> Any:
    """A model whose experts say the wrong thing of how gate and up weights are stored."""
    model = models.make(name, dtype)
    for layer in model.model.layers:
        layer.mlp.experts.is_concatenated = concatenated
    return model


AROUND = "the output of the module around mlp.experts is not the sum"
SINKS_DIFFER = "(nor that times its gate|its attention sinks act on the pattern in another way)"
Wrong = tuple[Callable[[torch.dtype], Any], Family, str]  # how to make the model; its family; what the error names
WRONG: dict[str, Wrong] = {
    "an MLP beside the experts missed": (
        lambda dtype: models.make("deepseek_v3", dtype),
        replace(FAMILIES["deepseek_v3"], shared_gate=None, shared_down=None), AROUND,
    ),
    "the weight of that MLP missed": (
        lambda dtype: models.make("qwen2_moe", dtype), replace(FAMILIES["qwen2_moe"], shared_weight=None), AROUND,
    ),
    "an MLP beside the block missed": (
        lambda dtype: models.make("granitemoeshared", dtype),
        replace(FAMILIES["granitemoeshared"], shared_gate=None, shared_down=None), "the residual stream after it",
    ),
    "another norm before the experts": (
        lambda dtype: models.make("mixtral", dtype), replace(FAMILIES["mixtral"], mlp_norm="input_layernorm"),
        "the input of mlp.experts is not the stream after input_layernorm",
    ),
    "no norm before the experts": (
        lambda dtype: models.make("gpt_oss", dtype), replace(FAMILIES["gpt_oss"], mlp_norm=None),
        "the input of mlp.experts is not the stream after no norm",
    ),
    "experts that read something else": (
        lambda dtype: block_of("mixtral", dtype, block_reads_doubled), FAMILIES["mixtral"], "the input of mlp.experts",
    ),
    "a router's weight that the block multiplies once more": (
        lambda dtype: block_of("mixtral", dtype, block_weighs), FAMILIES["mixtral"],
        "the output of the module around mlp.experts",
    ),
    "experts that weigh their outputs twice": (
        lambda dtype: block_of("mixtral", dtype, weighted_twice, "mlp.experts"), FAMILIES["mixtral"],
        "the output of mlp.experts is not the sum",
    ),
    "experts that scale their own output": (
        lambda dtype: block_of("gpt_oss", dtype, scaled, "mlp.experts"), FAMILIES["gpt_oss"],
        "the output of mlp.experts is not the sum",
    ),
    "halves that are interleaved": (
        lambda dtype: lying("gpt_oss", dtype, True), FAMILIES["gpt_oss"], "takes other rows of its first projection",
    ),
    "interleaved weights that are halves": (
        lambda dtype: lying("mixtral", dtype, False), FAMILIES["mixtral"], "takes other rows of its first projection",
    ),
    "a norm on what the heads mix missed": (
        lambda dtype: models.make("bitnet", dtype), replace(FAMILIES["bitnet"], mix_norm=None), "nor that times its gate",
    ),
    "a latent norm missed": (
        lambda dtype: models.make("deepseek_v3", dtype), replace(FAMILIES["deepseek_v3"], latent_norm=None),
        "the values that its attention gets",
    ),
    "the keys of latent vectors": (
        lambda dtype: models.make("deepseek_v3", dtype), replace(FAMILIES["deepseek_v3"], value_rows="last"),
        "the values that its attention gets",
    ),
    "the gate on what the heads mix missed": (
        lambda dtype: given("Afmoe", dtype), replace(GIVEN["Afmoe"][1], mix_gate=None), "nor that times its gate",
    ),
    "the queries as that gate": (
        lambda dtype: given("Afmoe", dtype), replace(GIVEN["Afmoe"][1], mix_gate="self_attn.q_proj"), "nor that times its",
    ),
    "sinks behind the pattern missed": (
        lambda dtype: given("GraniteSWA", dtype), replace(GIVEN["GraniteSWA"][1], sinks=None), SINKS_DIFFER,
    ),
    "sinks inside the softmax declared behind it": (
        lambda dtype: models.make("gpt_oss", dtype), replace(FAMILIES["gpt_oss"], sinks="self_attn.sinks"), SINKS_DIFFER,
    ),
    "such sinks missed beside experts": (
        lambda dtype: given("GraniteMoeSWA", dtype), replace(GIVEN["GraniteMoeSWA"][1], sinks=None), SINKS_DIFFER,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_wrong_declarations_are_refused_by_the_step_that_differs(case: str, dtype: torch.dtype) -> None:
    make, family, named = WRONG[case]
    dp = DePass(make(dtype), family=family)
    with pytest.raises(ModelError, match=rf"layer \d: .*{named}.*\(relative difference \d.*, limit .*correct"):
        dp.attribute(models.prompt(17), 5)
    assert len(dp.bound.checked) < models.LAYERS


def test_what_the_check_refuses_would_add_up() -> None:
    """Why there is a check: without it these declarations conserve, with other scores."""
    model, ids = models.make("mixtral"), models.prompt(9)
    right = DePass(model).attribute(ids, 5)
    wrong = DePass(model, family=replace(FAMILIES["mixtral"], mlp_norm="input_layernorm"))
    wrong.bound.checked.update(range(models.LAYERS))
    found = wrong.attribute(ids, 5, strict=True)
    assert float((found.scores - right.scores).norm() / right.scores.norm()) > 0.01
