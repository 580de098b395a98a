"""The parts add up: to the residual stream in every layer, to the logit at the end, in every family and for every rule."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import models
import pytest
import torch
import transformers

from depass import Contrast, DePass, Direction, Spans, Token, TopK
from depass.models import attention
from depass.models.bind import bind
from depass.models.bound import Layer

pytestmark = pytest.mark.filterwarnings("ignore::depass.ConservationWarning")  # the tests judge by themselves

RULES = ("softmax", "max", "relu", "linear", "taylor")
LENGTHS = (1, 2, 17, 300)
RULES_OF_LONG_PROMPTS = ("softmax", "taylor")  # the ops' own tests have long layouts for every rule
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
IDS = torch.randint(0, models.VOCABULARY, (20,), generator=torch.Generator().manual_seed(7)).tolist()


@cache
def model(name: str, dtype: torch.dtype, device: str) -> Any:
    return models.make(name, dtype, device)


def spans(length: int) -> Any:
    """Spans of several lengths that leave tokens uncovered."""
    if length < 3:
        return Spans([(length - 1, length)])
    return Spans([(0, 1), (1, 3), (length // 2, length // 2 + length // 4), (length - 1, length)])


def tolerance(name: str, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 1e-6 if name in models.NORMS_IN_FP32 else 1e-9
    return {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("sources", ["tokens", "spans"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", models.CONFIGS)
def test_scores_add_up_to_the_logits(name: str, dtype: str, rule: str, sources: str, device: str) -> None:
    dp = DePass(model(name, DTYPES[dtype], device), rule=rule, engine="forward")
    for length in LENGTHS if rule in RULES_OF_LONG_PROMPTS else LENGTHS[:-1]:
        ids = models.prompt(length)
        given = "token" if sources == "tokens" else spans(length)
        res = dp.attribute(ids, target=[TopK(1), *IDS], sources=given, exclude_bos=sources == "tokens")
        assert res.scores.dtype == torch.float32
        limit = tolerance(name, DTYPES[dtype])
        own = (
            own_error(name, length, device) if dtype == "bf16" else 0.0
        )  # the model's logit is known no better than that
        largest = max(float(res.target_logits[0].abs()), float(res.scores[0].abs().sum()))
        assert float(res.conservation_error[0]) * largest <= max(
            limit * largest, 2 * own
        )  # its rounding and that of what is frozen
        # A logit near zero is a sum of products that cancel: it is known no better than a typical logit at its place.
        typical = res.target_logits.square().mean().sqrt()
        size = torch.maximum(res.target_logits.abs(), res.scores.abs().sum(1)).clamp(min=typical)
        allowed = limit * size
        if dtype == "bf16":  # ... within the model's own rounding error plus twice as much for the parts
            allowed = allowed.clamp(min=3 * own)
        recorded = res.conservation_error * torch.maximum(res.target_logits.abs(), res.scores.abs().sum(1))
        assert (recorded <= allowed).all()
        # the recorded error is of the state's own dtype; the scores that are handed out are fp32
        missed = (res.scores.double().sum(1) - res.target_logits).abs()
        assert (missed <= torch.maximum(allowed, 1e-6 * size)).all()


@cache
def own_error(name: str, length: int, device: str) -> float:
    """By how much the bf16 model's own last logits miss those of the same weights computed in fp32, at most."""
    its = model(name, torch.bfloat16, device)
    ids = torch.tensor([models.prompt(length)], device=device)
    with torch.no_grad():
        narrow, wide = its(ids).logits[0, -1].float(), copy.deepcopy(its).float()(ids).logits[0, -1]
    narrow, wide = models.uncapped(its, narrow), models.uncapped(its, wide)
    return float((narrow - wide).abs()[[int(wide.argmax()), *IDS]].max())


@pytest.mark.parametrize("name", models.EVERY)
def test_target_logits_are_the_models_own(name: str, device: str) -> None:
    its = model(name, torch.float64, device)
    ids = models.prompt(17)
    with torch.no_grad():
        logits = its(torch.tensor([ids], device=device)).logits[0, [-1, 3]].cpu()
    logits = models.uncapped(its, logits)
    res = DePass(its).attribute(ids, target=[TopK(1), 7, TopK(2, position=3)])
    best = logits[1].topk(2)
    expected = torch.stack([logits[0].max(), logits[0, 7], *best.values])
    assert torch.allclose(res.target_logits, expected.float(), rtol=1e-5)
    assert [target.token_ids[0] for target in res.targets] == [int(logits[0].argmax()), 7, *best.indices.tolist()]


@pytest.mark.parametrize("name", models.EVERY)
@pytest.mark.parametrize("start", [0, 1])
def test_state_adds_up_to_the_models_stream_in_every_layer(name: str, start: int, device: str) -> None:
    its = model(name, torch.float64, device)
    ids = models.prompt(17)
    with torch.no_grad():
        hidden = its(torch.tensor([ids], device=device), output_hidden_states=True).hidden_states
    states = DePass(its).states(ids, start_layer=start)
    assert sorted(states.rows) == list(range(start, models.LAYERS + 1))
    for layer in range(start, models.LAYERS):  # the last hidden state of transformers is behind the final norm
        total = states.dense(layer).sum(0)
        expected = hidden[layer][0].cpu()
        assert (total - expected).abs().max() <= tolerance(name, torch.float64) * expected.abs().max()
        assert torch.equal(states.residual[layer], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", models.EVERY)
def test_our_attention_function_leaves_the_logits_exactly_eager(name: str, dtype: str, device: str) -> None:
    its = model(name, DTYPES[dtype], device)
    for length in LENGTHS:
        ids = torch.tensor([models.prompt(length)], device=device)
        with torch.no_grad():
            eager = its(ids).logits
            with attention.eager_with_patterns(bind(its)):
                ours = its(ids).logits
        assert its.config._attn_implementation == "eager"
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", models.EVERY)
def test_products_in_half_precision_add_up(
    name: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs and on CPUs with instructions for them, where the state's copy for the products is kept."""
    monkeypatch.setattr("depass.models.bound.multiplies_on_cpu", lambda dtype: True)
    dp, ids = DePass(models.make(name, dtype, device)), models.prompt(17)
    assert dp.bound.product_dtype == dtype
    with torch.no_grad():
        likely = dp.model(torch.tensor([ids], device=device)).logits[0].abs().argmax(1).tolist()
    # the last layer's rows: some, or all; small logits are what large parts leave
    last, everywhere = Token(likely[-1]), [Token(token, position=t) for t, token in enumerate(likely)]
    for asked in ([last], everywhere):
        for res in (dp.attribute(ids, asked), dp.attribute(ids, asked, sources=spans(17))):
            assert res.conservation_error.max() < 2 * dp.bound.tolerance  # a small logit may be what large parts leave
    assert dp.sweep("heads", ids, last).conservation_error.max() < dp.bound.tolerance
    exact = DePass(models.make(name, torch.float32, device)).attribute(ids, last).scores
    if not dp.bound.has_experts:  # of which rounding may choose others
        assert (dp.attribute(ids, last).scores - exact).norm() < 0.3 * exact.norm()
    for res, own in zip(dp.attribute_many([ids, ids[:5]], last), (ids, ids[:5]), strict=True):
        assert (res.scores - dp.attribute(own, last).scores).norm() < 0.1 * res.scores.norm()


@pytest.mark.parametrize("name", ["llama", "llama-biased"])
def test_an_autocast_around_us_changes_the_models_pass_alone(name: str, device: str) -> None:
    dp, ids = DePass(model(name, torch.float32, device)), models.prompt(9)
    with torch.autocast(device, dtype=torch.bfloat16):
        res = dp.attribute(ids, 5)
        states = dp.states(ids)
    assert res.conservation_error.max() < 1e-2  # the stream is bf16's, the products are not
    for layer in range(models.LAYERS):
        total = states.dense(layer).sum(0)
        assert (total - states.residual[layer]).norm() < 1e-2 * total.norm()
    assert dp.attribute(ids, 5).conservation_error.max() < 1e-5


def test_layers_of_different_widths_add_up_in_half_precision(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depass.models.bound.multiplies_on_cpu", lambda dtype: True)
    made = models.make("llama", torch.bfloat16, device)
    wide = models.make("llama", torch.bfloat16, device, intermediate_size=200)
    made.model.layers[2].mlp = wide.model.layers[2].mlp
    for workspace in (None, 60_000):
        dp = DePass(made, workspace_bytes=workspace)
        assert dp.attribute(models.prompt(9), 5).conservation_error.max() < 2e-2


def gates(layer: Layer) -> list[torch.Tensor]:
    """The weights ``[F, D]`` of the pre-activations of a layer: its MLP's, and those of each expert."""
    of_mlp = [] if layer.mlp is None else [layer.mlp.gate.weight]
    if layer.experts is not None:
        read = layer.experts.read()
        of_mlp += [read.gates[expert] for expert in range(layer.experts.count)]
    return [weight.float() for weight in of_mlp]


@pytest.mark.parametrize("name", models.EVERY)
def test_the_random_models_share_neither_flat_nor_one_hot(name: str, device: str) -> None:
    """Otherwise conservation of these models would prove little."""
    its, shares = bind(model(name, torch.float32, device)), []

    dp = DePass(its.model)
    states = dp.states(models.prompt(17))
    for index, layer in enumerate(its.layers):
        x = states.dense(index)[:, -1]  # before the attention; near enough to what the gate reads
        stream = states.residual[index][-1]
        scale = 1.0 if layer.mlp_norm is None else layer.mlp_norm.scale(stream, torch.float32)
        for weight in gates(layer):
            folded = weight if layer.mlp_norm is None else layer.mlp_norm.fold(weight)
            alpha = torch.softmax(x @ folded.cpu().T * scale / 0.1, dim=0)  # [M, F]
            shares.append(alpha.amax(0).mean().item())
    assert 1.5 / 17 < sum(shares) / len(shares) < 0.95


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("workspace", [1, 10_000, 1_000_000])
def test_the_workspace_does_not_change_the_answer(name: str, workspace: int, device: str) -> None:
    its, ids = model(name, torch.float64, device), models.prompt(33)
    whole = DePass(its).states(ids, models.LAYERS).dense(models.LAYERS)
    cut = DePass(its, workspace_bytes=workspace).states(ids, models.LAYERS).dense(models.LAYERS)
    assert torch.allclose(whole, cut, rtol=1e-12, atol=1e-12)


def test_a_lens_at_an_inner_layer_adds_up(device: str) -> None:
    its, ids = model("gpt2", torch.float64, device), models.prompt(9)
    res = DePass(its).attribute(ids, target=5, stop_layer=2)
    with torch.no_grad():
        stream = its(torch.tensor([ids], device=device), output_hidden_states=True).hidden_states[2][0, -1]
        expected = its.lm_head(its.transformer.ln_f(stream))[5]
    assert res.target_logits[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert res.conservation_error.max() <= 1e-9
    assert res.settings.stop_layer == 2


def test_a_direction_is_scored_after_the_final_norm(device: str) -> None:
    its, ids = model("llama", torch.float64, device), models.prompt(9)
    w = its.lm_head.weight[5].detach() - 2 * its.lm_head.weight[6].detach()
    res = DePass(its).attribute(ids, target=[Direction(w, position=-2), *(5, 6)])
    with torch.no_grad():
        logits = its(torch.tensor([ids], device=device)).logits[0, -2]
    assert res.target_logits[0].item() == pytest.approx((logits[5] - 2 * logits[6]).item(), rel=1e-5)
    assert res.conservation_error.max() <= 1e-6


def test_gpt2_with_its_other_eager_attention_is_exact_and_conserves(device: str) -> None:
    if transformers.__version__.startswith("4.53."):
        pytest.skip("transformers 4.53 cannot run this attention itself: its mask has one key too many")
    its, ids = models.make("gpt2-upcast", device=device), models.prompt(17)
    with torch.no_grad():
        eager = its(torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
        with attention.eager_with_patterns(bind(its)):
            assert torch.equal(its(torch.tensor([ids], device=device), use_cache=False).logits[0, -1], eager)
    res = DePass(its).attribute(ids, target=IDS)
    assert res.conservation_error.max() <= 1e-5


def test_fp16_weights_conserve(device: str) -> None:
    res = DePass(model("llama", torch.float16, device)).attribute(models.prompt(17), target=[TopK(1), *IDS])
    assert res.conservation_error.max() <= 2e-3  # fp16 carries three bits more than bf16


def test_sources_before_a_position_score_and_later_ones_do_not(device: str) -> None:
    res = DePass(model("llama", torch.float32, device)).attribute(models.prompt(9), target=TopK(1, position=3))
    assert (res.scores[0, 4:] == 0).all()
    assert (res.scores[0, :4] != 0).all()


def test_a_contrast_is_the_difference_of_its_tokens(device: str) -> None:
    res = DePass(model("gpt2", torch.float32, device)).attribute(models.prompt(9), target=[3, 4, Contrast(3, 4)])
    assert torch.allclose(res.scores[2], res.scores[0] - res.scores[1], atol=1e-5)
    assert res.target_logits[2].item() == pytest.approx((res.target_logits[0] - res.target_logits[1]).item(), abs=1e-5)
    assert res.targets[2].kind == "contrast"
    assert res.targets[2].token_ids == (3, 4)
