"""Linear attention: the mixing matrices, what is refused, and layers that differ in their heads."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import transformers as tf
from allocated import allocated
from torch import Tensor
from torch.nn import functional

from depass import DePass, Family, Heads, ModelError, OptionError, masking
from depass.models.families import FAMILIES
from depass.models.recurrences import delta_pattern, state_space_pattern

NAMES = [name for name in ("qwen3_next", "granitemoehybrid-mamba", "qwen3_5_text", "bamba") if name in models.EVERY]
pytestmark = pytest.mark.skipif(not NAMES, reason="this transformers has no model with linear attention")


def randoms(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("length", [1, 2, 33])
def test_the_delta_rule_is_its_recurrence(length: int) -> None:
    shape = (2, 3, length, 5)
    query, key, value, decay, beta = randoms(shape, shape, (2, 3, length, 4), shape[:3], (*shape[:3], 1))
    decay, beta = -functional.softplus(decay), beta.sigmoid()
    state, outputs = torch.zeros(2, 3, 5, 4, dtype=torch.float64), []
    for t in range(length):
        state = state * decay[:, :, t, None, None].exp()
        error = value[:, :, t] - (key[:, :, t, :, None] * state).sum(2)
        state = state + key[:, :, t, :, None] * (beta[:, :, t] * error)[:, :, None]
        outputs.append((query[:, :, t, :, None] * state).sum(2))
    mixed = delta_pattern(query, key, decay, beta) @ value
    assert (mixed - torch.stack(outputs, 2)).abs().max() < 1e-10 * mixed.abs().max()


@pytest.mark.parametrize("length", [1, 2, 33])
def test_the_state_space_is_its_recurrence(length: int) -> None:
    shape = (2, 3, length, 5)
    c, b, value, decay, step = randoms(shape, shape, (2, 3, length, 4), shape[:3], (*shape[:3], 1))
    decay, step = -functional.softplus(decay), step.exp()
    state, outputs = torch.zeros(2, 3, 5, 4, dtype=torch.float64), []
    for t in range(length):
        state = state * decay[:, :, t, None, None].exp()
        state = state + b[:, :, t, :, None] * (step[:, :, t] * value[:, :, t])[:, :, None]
        outputs.append((c[:, :, t, :, None] * state).sum(2))
    mixed = state_space_pattern(c, b, decay, step) @ value
    assert (mixed - torch.stack(outputs, 2)).abs().max() < 1e-10 * mixed.abs().max()


def test_decays_over_thousands_of_positions_do_not_round_away() -> None:
    c, b = (torch.ones(1, 1, 2000, 1, dtype=torch.float64) for _ in range(2))
    decay = -16 * torch.rand(1, 1, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = state_space_pattern(c, b, decay, torch.ones_like(c))
    in_fp32 = state_space_pattern(*(each.float() for each in (c, b, decay, torch.ones_like(c))))
    assert (in_fp32 - truth).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_in_a_batch_gets_the_scores_that_it_gets_alone(name: str) -> None:
    dp = DePass(models.make(name))
    prompts = [models.prompt(length, seed=length) for length in (19, 3, 11)]
    for rule in ("softmax", "half"):
        for prompt, of_batch in zip(prompts, dp.attribute_many(prompts, 5, rule=rule), strict=True):
            alone = dp.attribute(prompt, 5, rule=rule)
            torch.testing.assert_close(of_batch.scores, alone.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_that_computes_something_else_is_found(name: str) -> None:
    for change in (scaled_values, another_step):
        model = models.make(name)
        change(model)
        with pytest.raises(
            ModelError, match=r"layer 0: .*(attention pattern times the values|values that its attention)"
        ):
            DePass(model).attribute(models.prompt(9), 5)


def scaled_values(model: Any) -> None:
    """The convolution of layer 0 works on twice its input, which no weight says."""
    layer = model.model.layers[0]
    module = getattr(layer, "linear_attn", None) or layer.mamba
    own = type(module).forward

    class Changed(type(module)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **options: Any) -> Any:
            return own(self, 2 * hidden_states, **options)

    module.__class__ = Changed


def another_step(model: Any) -> None:
    """The norm behind the recurrence of layer 0 gets another epsilon than the module says."""
    layer = model.model.layers[0]
    norm = (getattr(layer, "linear_attn", None) or layer.mamba).norm
    own = type(norm).forward

    class Changed(type(norm)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            self.variance_epsilon, before = 1.0, self.variance_epsilon
            try:
                return own(self, *args)
            finally:
                self.variance_epsilon = before

    norm.__class__ = Changed


@pytest.mark.parametrize("name", NAMES)
def test_what_a_recurrence_does_not_allow_is_refused(name: str) -> None:
    model = models.make(name)
    family = FAMILIES[model.config.model_type]
    other = {"delta_rule": "state_space", "state_space": "delta_rule"}[family.recurrence_kind]
    with pytest.raises(
        ModelError, match=f"is no {other} as DePass knows it: it lacks|lacks modules that its family names"
    ):
        DePass(model, family=Family(**{**vars(family), "recurrence_kind": other}))
    with pytest.raises(ModelError, match="has no attention"):
        DePass(model, family=Family(**{**vars(family), "recurrence": None}))
    layer = model.model.layers[0]
    (getattr(layer, "linear_attn", None) or layer.mamba).activation = "gelu"
    with pytest.raises(ModelError, match="has the activation 'gelu' behind its convolution; DePass knows 'silu'"):
        DePass(model)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", ["steer", "dual_path", "softmax+steer"])
def test_rules_that_score_what_steers_are_refused(name: str, rule: str) -> None:
    with pytest.raises(ModelError, match=r"layer 0 of .* has linear attention, .* take rule='half', 'up' or 'taylor'"):
        DePass(models.make(name)).attribute(models.prompt(9), 5, rule=rule)


@pytest.mark.skipif("qwen3_5_text" not in models.EVERY, reason="this transformers lacks the model")
def test_layers_with_different_numbers_of_heads() -> None:
    model = models.make("qwen3_5_text", linear_num_value_heads=8)
    dp, prompt = DePass(model), models.prompt(9)
    for layer, count in ((0, 8), (1, 4), (2, 8)):
        result = dp.attribute(prompt, 5, sources=Heads(layer))
        assert [source.kind for source in result.sources].count("head") == count
        assert result.conservation_error.max() < 1e-5
    with pytest.raises(OptionError, match=r"different numbers of heads, \[4, 8\]; choose layers with the same number"):
        dp.sweep("heads", prompt, 5)
    for rule in ("softmax", "half"):
        swept = dp.sweep("heads", prompt, 5, layers=[0, 2], rule=rule)
        assert swept.scores.shape == (1, 2, 8)
    with pytest.raises(OptionError, match=r"different numbers of heads, \[4, 8\]"), masking.heads(dp, {0: [1]}):
        pass
    survey = dp.survey(prompt, 5, rule="half")
    assert survey.heads.shape == (1, 3, 8)
    torch.testing.assert_close(survey.heads[:, [0, 2]], swept.scores, rtol=1e-4, atol=1e-5)
    assert bool((survey.heads[:, 1, 4:] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [48, 192])
@pytest.mark.parametrize("name", [name for name in ("qwen3_5_text", "bamba") if name in models.EVERY])
def test_a_plan_counts_what_a_recurrence_takes(name: str, length: int, dtype: torch.dtype) -> None:
    dp, ids = DePass(models.make(name, dtype)), models.prompt(length)
    dp.attribute(ids, 5)  # its first run checks the layers, too
    plan = dp.plan(length, measure=False)
    assert 0.7 <= allocated(lambda: dp.attribute(ids, 5)) / (plan.total_bytes - plan.weights_bytes) <= 1.15


MAMBA2 = Family(
    backbone="backbone", final_norm="norm_f", attention_norm="norm", recurrence="mixer", recurrence_kind="state_space",
    single=True,
)  # fmt: skip


def pure_mamba() -> Any:
    """A model whose layers have Mamba-2 alone."""
    sizes = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8, "expand": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = tf.Mamba2Config(vocab_size=101, hidden_size=32, num_hidden_layers=3, **sizes, **special)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.Mamba2ForCausalLM(config).eval()
        models.fill(model, MAMBA2)
    return model


@pytest.mark.skipif("nemotron_h" not in models.EVERY, reason="older transformers: not tried")
def test_a_model_without_attention_and_mlp_can_be_declared() -> None:
    model, ids = pure_mamba(), models.prompt(9)
    dp = DePass(model, family=MAMBA2)
    for rule in ("softmax", "taylor", "half"):
        for sources in ("token", Heads(1)):
            assert dp.attribute(ids, 5, rule=rule, sources=sources, strict=True).conservation_error.max() < 1e-5
    assert dp.sweep("modules", ids, 5).scores[:, :, 0].abs().min() > 0
    assert dp.plan(9, sources="heads").seconds
    with pytest.raises(OptionError, match="has no neurons"):
        dp.sweep("neurons", ids, 5)
    with pytest.raises(OptionError, match="has no neurons"), masking.neurons(dp, {0: [1]}):
        pass
    with pytest.raises(OptionError, match="has no layer with an MLP; choose 'heads'"):
        dp.plan(9, sources="neurons")
    with masking.heads(dp, {1: [0, 1, 2, 3]}), torch.no_grad():
        masked = model(torch.tensor([ids])).logits
    model.backbone.layers[1].mixer.out_proj.weight.data.zero_()
    torch.testing.assert_close(masked, model(torch.tensor([ids])).logits)
