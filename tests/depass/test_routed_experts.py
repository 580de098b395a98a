"""Routed experts as sources, in sweeps, under masks and by baselines: against the model with its experts changed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from allocated import allocated
from torch import Tensor

from depass import (
    DePass,
    Modules,
    Neurons,
    OptionError,
    RoutedExperts,
    SourceError,
    Sweep,
    Token,
    TopK,
    baselines,
    masking,
)
from depass.engine.backward import Backward
from depass.engine.linear_memory import linear_needs
from depass.engine.routing import chosen_experts
from depass.inputs.targets import check
from depass.models.bind import bind
from depass.models.experts import Places
from depass.rules import LINEAR

IDS = models.prompt(8)
# with a dense layer, a weight, biases, a factor, norms of the experts' own, weights on inputs
FAMILIES = [
    name
    for name in ("qwen3_moe", "qwen2_moe", "gpt_oss", "granitemoeshared", "gemma4-experts", "llama4")
    if name in models.CONFIGS
]


def made(name: str, device: str, dtype: torch.dtype = torch.float64, **others: Any) -> DePass:
    return DePass(models.make(name, dtype, device, **others))


def without(dp: DePass, layer: int, off: list[int]) -> None:
    """Take the experts' down projections away; they are still chosen."""
    experts = dp.bound.layers[layer].experts
    assert experts is not None
    experts.module.down_proj.data[off] = 0
    if experts.has_bias:
        experts.module.down_proj_bias.data[off] = 0


def logits(dp: DePass, ids: list[list[int]]) -> Tensor:
    with torch.no_grad():
        out: Tensor = dp.model(torch.tensor(ids, device=dp.model.device), use_cache=False).logits.cpu()
    return out


# --- sources and sweeps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("name", models.WITH_EXPERTS)
def test_experts_and_the_remainder_add_up(name: str, dtype: str, device: str) -> None:
    kind = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    dp = made(name, device, kind)
    first = dp.bound.expert_layers[0]
    for length in (1, 2, 9):
        for spec in (RoutedExperts(first), RoutedExperts(first, iter([2, 0]), positions=[-1])):  # type: ignore[arg-type]
            res = dp.attribute(models.prompt(length), TopK(2), sources=spec)
            assert float(res.conservation_error[0]) <= {"fp64": 1e-6, "fp32": 1e-5, "bf16": 2e-2}[dtype]


@pytest.mark.parametrize("name", FAMILIES)
def test_only_experts_that_a_position_chose_are_sources(name: str, device: str) -> None:
    dp = made(name, device)
    last = dp.bound.expert_layers[-1]
    weights = baselines.experts(dp, "router_weight", IDS, 5).scores[0, -1]
    res = dp.attribute(IDS, 5, sources=RoutedExperts(last, positions=[-1]))
    chosen = {source.index for source in res.sources if source.kind == "expert"}
    assert chosen == set(weights.nonzero()[:, 0].tolist())
    assert len(chosen) == 2
    absent = min(set(range(len(weights))) - chosen)
    without = dp.attribute(IDS, 5, sources=RoutedExperts(last, [absent], positions=[-1]))
    assert not any(source.kind == "expert" for source in without.sources)
    assert float(without.scores.sum()) == pytest.approx(float(without.target_logits[0]), abs=1e-5)


@pytest.mark.parametrize("rule", ["softmax", "half"])
def test_an_expert_is_a_source_from_its_first_choice_on(rule: str, device: str) -> None:
    dp = made("qwen3_moe", device)
    routing = chosen_experts(dp.bound, IDS, [0])[0]
    states = dp.states(IDS, 1, sources=RoutedExperts(0))
    rows = states.dense(1)
    for number, source in enumerate(states.sources):
        if source.kind == "expert":
            at = (routing == source.index).any(1).cpu()
            assert ((rows[number].abs().amax(1) > 0).cpu() == at).all()
    later = dp.states(IDS, models.LAYERS, sources=RoutedExperts(0)).dense(models.LAYERS)
    for number, source in enumerate(states.sources):
        if source.kind == "expert":
            start = int((routing == source.index).any(1).nonzero()[0])
            assert not later[number, :start].any()
            assert bool(later[number, -1].any())
    swept = dp.sweep("experts", IDS, 5, rule=rule)
    never = [expert for expert in range(6) if not (routing == expert).any()]
    assert not swept.scores[0, 0, never].any()
    of_sources = {s.index: score for s, score in zip(states.sources, dp.attribute(
        IDS, 5, sources=RoutedExperts(0), rule=rule).scores[0].tolist(), strict=True) if s.kind == "expert"}  # fmt: skip
    for expert, score in of_sources.items():
        assert float(swept.scores[0, 0, expert]) == pytest.approx(score, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_some_experts_at_some_positions_are_rows_of_all(name: str, device: str) -> None:
    dp = made(name, device)
    layer, count = dp.bound.expert_layers[-1], len(IDS)
    every = dp.states(IDS, models.LAYERS, sources=RoutedExperts(layer))
    ids = chosen_experts(dp.bound, IDS, [layer])[layer][2].tolist()  # two experts
    some = dp.states(IDS, models.LAYERS, sources=RoutedExperts(layer, ids, [-1, 2]))
    own = [[source.label for source in states.sources].index(f"L{layer}E{ids[0]}") for states in (every, some)]
    whole, part = every.dense(models.LAYERS), some.dense(models.LAYERS)
    kept = torch.zeros(count, 1)
    kept[[2, count - 1]] = 1
    assert torch.allclose(part[own[1]], whole[own[0]] * kept.to(whole), atol=1e-12)
    assert {source.index for source in some.sources if source.kind == "expert"} == set(ids)
    assert (part.sum(0) - whole.sum(0)).abs().max() < 1e-9


def test_shared_experts_belong_to_the_remainder(device: str) -> None:
    dp = made("qwen2_moe", device)
    layer, sizes = models.LAYERS - 1, {}
    for spec in (Modules(layer, "mlp"), RoutedExperts(layer)):
        res = dp.attribute(IDS, 5, sources=spec)
        sizes[type(spec)] = sum(
            s for s, source in zip(res.scores[0].tolist(), res.sources, strict=True) if source.layer == layer
        )
    shared = dp.bound.layers[layer].mlp
    assert shared is not None
    shared.down.module.weight.data.zero_()  # in the last layer nothing else reads it but the final norm
    res = dp.attribute(IDS, 5, sources=Modules(layer, "mlp"))
    alone = dp.attribute(IDS, 5, sources=RoutedExperts(layer))
    routed = sum(
        s for s, source in zip(alone.scores[0].tolist(), alone.sources, strict=True) if source.kind == "expert"
    )
    assert float(res.scores[0, -1]) == pytest.approx(routed, rel=1e-5)
    assert abs(sizes[Modules] - sizes[RoutedExperts]) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sweep_is_its_layers_runs(name: str, device: str, tmp_path: Path) -> None:
    dp, targets = made(name, device), [TopK(2), Token(5, 3)]
    sweep = dp.sweep("experts", IDS, targets)
    assert sweep.layers == dp.bound.expert_layers
    assert sweep.scores.shape == (3, len(sweep.layers), 6 if name == "qwen3_moe" else 4)
    for row, layer in enumerate(sweep.layers):
        res = dp.attribute(IDS, targets, sources=RoutedExperts(layer))
        always = [source.kind for source in res.sources].index("rest")
        chosen = [source.index for source in res.sources[always + 1 :]]
        assert torch.allclose(sweep.scores[:, row, chosen], res.scores[:, always + 1 :], rtol=1e-5, atol=1e-6)
        assert not sweep.scores[:, row, [expert for expert in sweep.columns if expert not in chosen]].any()
        assert torch.allclose(sweep.rest[:, row], res.scores[:, always], rtol=1e-5, atol=1e-6)
        assert torch.allclose(sweep.bias[:, row], res.scores[:, :always].sum(1), rtol=1e-5, atol=1e-6)
        assert sweep.source(row, 2).label == f"L{layer}E2"
    sweep.save(tmp_path / "saved")
    again = Sweep.load(tmp_path / "saved")
    assert (again.kind, again.layers) == ("experts", sweep.layers)
    assert torch.equal(again.scores, sweep.scores)
    assert again.top(1)[0][0].kind == "expert"
    part = dp.sweep("experts", IDS, targets, layers=[sweep.layers[-1]], ids=[3, 1], positions=[-1])
    assert (part.layers, part.columns) == ((sweep.layers[-1],), (1, 3))


@pytest.mark.parametrize("name", models.WITH_EXPERTS)
def test_both_engines_find_the_same_scores_under_a_linear_rule(name: str, device: str) -> None:
    model = models.make(name, torch.float64, device)
    back, forward = (DePass(model, rule="taylor", engine=engine) for engine in ("auto", "forward"))  # type: ignore[arg-type]
    for options in ({}, {"ids": [2, 1], "positions": [-1, 3]}):
        got, wanted = (dp.sweep("experts", IDS, [TopK(2), Token(5, 3)], **options) for dp in (back, forward))  # type: ignore[arg-type]
        assert (got.settings.engine, wanted.settings.engine) == ("backward", "forward")
        for part in ("scores", "rest", "bias"):
            assert torch.allclose(getattr(got, part), getattr(wanted, part), rtol=1e-3, atol=1e-4), part
        assert got.scores.any()


def test_an_expert_that_no_position_chose_scores_zero_under_a_linear_rule(device: str) -> None:
    dp = made("qwen3_moe", device)
    weights = (
        baselines.experts(dp, "router_weight", IDS[:2], 5).scores
        + baselines.experts(dp, "router_weight", IDS[:2], Token(5, 0)).scores
    )
    scores = dp.sweep("experts", IDS[:2], 5, rule="half").scores
    assert ((weights == 0) == (scores == 0)).all()


def test_prompts_of_a_batch_are_those_alone(device: str) -> None:
    dp, prompts = made("gpt_oss", device), [models.prompt(5), models.prompt(9, 1), models.prompt(2, 2)]
    for got, ids in zip(dp.attribute_many(prompts, 5, sources=RoutedExperts(1)), prompts, strict=True):
        assert torch.allclose(got.scores, dp.attribute(ids, 5, sources=RoutedExperts(1)).scores, rtol=1e-6, atol=1e-7)


def test_layers_with_other_numbers_of_experts_are_not_swept_together(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dp = made("mixtral", device)
    module = dp.bound.layers[1].experts.module  # type: ignore[union-attr]
    for name in ("gate_up_proj", "down_proj"):
        parameter = getattr(module, name)
        parameter.data = torch.cat(
            [parameter.data, parameter.data[:1]]
        )  # a fifth expert, which the router never chooses
    module.num_experts = 5
    with pytest.raises(
        OptionError, match=r"different numbers of experts, \[4, 5\]; choose layers .* or name the experts"
    ):
        dp.sweep("experts", IDS, 5)
    assert dp.sweep("experts", IDS, 5, ids=[0, 3]).scores.shape == (1, 3, 2)
    assert dp.sweep("experts", IDS, 5, layers=[0, 2]).scores.shape == (1, 2, 4)
    for ask in (lambda: baselines.experts(dp, "random", IDS, 5), lambda: masking.experts(dp, {0: [0]}).__enter__()):
        with pytest.raises(OptionError, match=r"different numbers of experts, \[4, 5\]; they must have the same"):
            ask()


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (RoutedExperts(1), SourceError, r"RoutedExperts\(layer=1\): this layer of \S+ has no routed experts; its layers "
         r"with experts are 0, 2; take Neurons\(1\)"),
        (RoutedExperts(0, [6]), SourceError, r"ids of RoutedExperts\(layer=0\): 6 is out of range; choose from 0 to 5"),
        (RoutedExperts(0, [1, 1]), SourceError, "must be a non-empty list without duplicates"),
        (RoutedExperts(0, 1), SourceError, r"ids of RoutedExperts\(layer=0\) must be a list of integers, got 1"),  # type: ignore[arg-type]
        (RoutedExperts(0, positions=[8]), SourceError, r"positions of RoutedExperts\(layer=0\): 8 is out of range"),
        (RoutedExperts(3), OptionError, r"RoutedExperts\(layer=3\) is out of range"),
        (RoutedExperts("0"), OptionError, "layer of RoutedExperts must be an integer"),  # type: ignore[arg-type]
        (Neurons(2), SourceError, r"Neurons\(layer=2\): this layer of \S+ has routed experts, .* RoutedExperts\(2\), or the "
         r"whole MLP, Modules\(2, 'mlp'\)"),
    ],
)  # fmt: skip
def test_what_a_layer_does_not_have_is_refused(spec: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        made("qwen3_moe", "cpu").attribute(IDS, 5, sources=spec)


def test_models_without_experts_and_neurons_of_experts_are_refused() -> None:
    dense, routed = made("llama", "cpu"), made("qwen3_moe", "cpu")
    with pytest.raises(SourceError, match=r"RoutedExperts\(layer=0\): .* has no routed experts; take Neurons\(0\)"):
        dense.attribute(IDS, 5, sources=RoutedExperts(0))
    with pytest.raises(OptionError, match="has no routed experts; sweep its heads, neurons or modules"):
        dense.sweep("experts", IDS, 5)
    with pytest.raises(SourceError, match=r"RoutedExperts\(layer=1\): this layer"):
        routed.sweep("experts", IDS, 5, layers=[0, 1])
    with pytest.raises(SourceError, match=r"Neurons\(layer=0\): this layer"):
        routed.sweep("neurons", IDS, 5)
    assert routed.sweep("neurons", IDS, 5, layers=[1]).scores.shape == (1, 1, 56)
    with pytest.raises(OptionError, match="has no routed experts; take its heads or neurons"):
        baselines.experts(dense, "random", IDS, 5)
    with pytest.raises(
        OptionError, match="whose neurons cannot be masked or scored one by one; take its experts or heads"
    ):
        baselines.neurons(routed, "activation", IDS, 5)
    with pytest.raises(OptionError, match="whose neurons cannot be masked"), masking.neurons(routed, {1: [0]}):
        pass


def test_positions_that_chose_no_expert_have_no_places() -> None:
    places = Places.of(torch.full((3, 2), 4), torch.ones(3, 2), 4)  # 4 stands for none
    assert (len(places), places.runs) == (0, {})


# --- masks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", models.WITH_EXPERTS)
def test_masked_experts_are_experts_without_output(name: str, dtype: torch.dtype, device: str) -> None:
    masked, removed = (made(name, device, dtype) for _ in range(2))
    layer = masked.bound.expert_layers[0]
    without(removed, layer, [0, 2])
    before = logits(masked, [IDS])
    with masking.experts(masked.model, {layer: [0, 2]}):
        got = logits(masked, [IDS])
    torch.testing.assert_close(got, logits(removed, [IDS]), rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-9)
    assert not torch.allclose(got, before)
    assert torch.equal(logits(masked, [IDS]), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_attribution_under_a_mask_is_that_of_the_model_without_the_experts(name: str, device: str) -> None:
    masked, removed = made(name, device), made(name, device)
    layer = masked.bound.expert_layers[-1]
    off = baselines.experts(masked, "router_weight", IDS, 5).scores[0, -1].nonzero()[:, 0].tolist()
    without(removed, layer, off)
    with masking.experts(masked, {layer: off[:1]}), masking.experts(masked, {layer: off[1:]}):
        got, sweep = masked.attribute(IDS, [5, 17]), masked.sweep("experts", IDS, 5)
        several = list(masked.attribute_many([IDS, IDS[:3]], 5))
    for result, wanted in (
        (got, removed.attribute(IDS, [5, 17])), (sweep, removed.sweep("experts", IDS, 5)),
        (several[1], removed.attribute(IDS[:3], 5)),
    ):  # fmt: skip
        assert result.conservation_error.max() < 1e-6
        torch.testing.assert_close(result.scores, wanted.scores, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(masked.attribute(IDS, [5, 17]).scores, got.scores)
    assert sweep.scores[0, -1, off].abs().max() == 0
    assert got.settings.altered is None


@pytest.mark.parametrize("lengths", [(6, 6), (6, 3)])
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_every_prompt_of_a_batch_may_have_a_mask_of_its_own(name: str, lengths: tuple[int, int], device: str) -> None:
    dp, prompts = made(name, device), [models.prompt(length, seed) for seed, length in enumerate(lengths)]
    count = dp.bound.layers[0].experts.count  # type: ignore[union-attr]
    off = torch.zeros(2, models.LAYERS, count, dtype=torch.bool)
    off[0, 0, :2] = off[1, 2, 1:] = True
    with masking.experts(dp, off):
        got = list(dp.attribute_many(prompts, 5))
        with pytest.raises(OptionError, match="masked has 2 rows, but the batch has 4 prompts"):
            logits(dp, [prompts[0]] * 4)
    for index, ids in enumerate(prompts):
        with masking.experts(dp, off[index : index + 1]):
            alone = dp.attribute(ids, 5)
        torch.testing.assert_close(got[index].scores, alone.scores, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(alone.scores, dp.attribute(ids, 5).scores)


@pytest.mark.parametrize("rule", ["softmax"])
@pytest.mark.parametrize("name", ["bitnet", *models.WITH_EXPERTS])
def test_masked_heads_are_heads_without_output_weights(name: str, rule: str, device: str) -> None:
    masked, removed = made(name, device), made(name, device)
    index = next(index for index, layer in enumerate(removed.bound.layers) if layer.mixers)
    mixer = removed.bound.layers[index].mixers[0]
    mixer.output.module.weight.data[:, : mixer.output.shape[1] // mixer.num_heads] = 0
    with masking.heads(masked, {index: [0]}):
        got = masked.attribute(IDS, 5, rule=rule)
    wanted = removed.attribute(IDS, 5, rule=rule)
    torch.testing.assert_close(got.scores, wanted.scores, rtol=1e-5, atol=1e-6)
    assert got.conservation_error.max() < 1e-6


@pytest.mark.parametrize(
    ("masked", "message"),
    [
        ({1: [0]}, r"masked: layer 1 of \S+ has no experts; the layers that have them are 0, 2"),
        ({0: [6]}, "expert 6 is out of range; a layer has experts 0 to 5"),
        ({3: [0]}, "layer 3 is out of range"),
        ({0: 1}, r"masked\[0\] must be a list of integers, got 1"),
        (torch.ones(1, 3, 6), r"masked must be a bool tensor \[prompts, 3, 6\] \(prompts, layers, experts\)"),
        (torch.ones(1, 3, 6, dtype=torch.bool), r"masked: layer 1 of \S+ has no experts"),
        ([0], "masked must be a dict from layers to experts, or a bool tensor, got list"),
    ],
)
def test_masks_of_absent_experts_are_refused(masked: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message), masking.experts(made("qwen3_moe", "cpu"), masked):
        pass


# --- baselines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.WITH_EXPERTS)
def test_router_patching_is_the_slope_of_weighting_an_expert_less(name: str, device: str) -> None:
    dp, target = made(name, device), 5
    layer = dp.bound.expert_layers[0]
    found = baselines.experts(dp, "attribution_patching", IDS, Token(target, 6))
    assert found.layers == dp.bound.expert_layers
    module, step = dp.bound.layers[layer].experts.module, 1e-2  # type: ignore[union-attr]
    for expert in range(3):
        values = []
        for factor in (1 - step, 1 + step):  # the router's weight and the expert's output, or input, are one product
            scaled = "gate_up" if name == "llama4" else "down"
            kept = {path: own.data.clone() for path, own in module.named_parameters() if scaled in path}
            for name_of, own in module.named_parameters():
                if name_of in kept:
                    own.data[expert] *= factor
            values.append(float(models.uncapped(dp.model, logits(dp, [IDS])[0, 6])[target]))
            for name_of, own in module.named_parameters():
                if name_of in kept:
                    own.data.copy_(kept[name_of])
        slope = (values[1] - values[0]) / (2 * step)
        assert float(found.scores[0, 0, expert]) == pytest.approx(slope, rel=1e-2, abs=2e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_and_weights_are_those_at_the_target(name: str, device: str) -> None:
    dp, at = made(name, device), 3
    norms, weights = (baselines.experts(dp, name, IDS, Token(5, at)) for name in ("output_norm", "router_weight"))
    states = dp.states(IDS, models.LAYERS, sources=RoutedExperts(dp.bound.expert_layers[-1]))
    last = torch.zeros(norms.scores.shape[2], dtype=torch.float64)
    for source, row in zip(states.sources, states.dense(models.LAYERS)[:, at], strict=True):
        if source.kind == "expert":
            last[source.index or 0] = row.norm()
    scalar = dp.bound.layers[-1].scalar  # at the layer's end, behind what the experts add
    last = last if scalar is None else last / scalar.double().cpu()
    torch.testing.assert_close(norms.scores[0, -1], last.float(), rtol=1e-5, atol=1e-6)
    assert ((weights.scores > 0).sum(2) == 2).all()
    assert torch.isnan(norms.rest).all()
    assert norms.kind == weights.kind == "experts"
    if name != "granitemoeshared":
        assert ((norms.scores > 0) == (weights.scores > 0)).all()


def test_random_scores_and_unknown_baselines() -> None:
    dp = made("qwen3_moe", "cpu")
    first, other = (baselines.experts(dp, "random", IDS, 5, seed=seed).scores for seed in (0, 1))
    assert first.shape == (1, 2, 6)
    assert not torch.equal(first, other)
    with pytest.raises(
        OptionError, match="unknown baseline 'activation' for experts; choose from attribution_patching, "
    ):
        baselines.experts(dp, "activation", IDS, 5)


# --- plans --------------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [1, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_plan_counts_what_experts_take_in_a_backward_pass(recompute: bool, targets: int, dtype: torch.dtype) -> None:
    bound = bind(models.make("qwen3_moe", dtype, **WIDE, mlp_only_layers=[]))
    asked = check(TopK(targets), 96, range(0), None, bound)
    run = partial(Backward, bound, [models.prompt(96)], [asked], LINEAR["half"], recompute=recompute)
    run().run()  # its first run checks the layers, too
    needed = linear_needs(bound, [96], models.LAYERS, targets, LINEAR["half"])
    planned = needed.total(1 if recompute else models.LAYERS)
    assert 0.8 * planned <= allocated(run().run) <= 1.15 * planned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [48, 192])
def test_a_plan_counts_what_experts_take_beside_a_state(length: int, dtype: torch.dtype) -> None:
    dp, ids = DePass(models.make("qwen3_moe", dtype, **WIDE, mlp_only_layers=[])), models.prompt(length)
    dp.attribute(ids, 5)  # its first run checks the layers, too
    plan = dp.plan(length, measure=False)
    planned = plan.total_bytes - plan.weights_bytes
    assert 0.7 * planned <= allocated(lambda: dp.attribute(ids, 5)) <= 1.15 * planned


@pytest.mark.parametrize("name", [name for name in ("qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_5_text", "bamba")
                                  if name in models.EVERY])  # fmt: skip
def test_offloaded_experts_and_recurrences_give_the_same(name: str) -> None:
    accelerate = pytest.importorskip("accelerate", reason="weights are offloaded by accelerate")
    expected, model = DePass(models.make(name)).attribute(IDS, 5), models.make(name)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(DePass(model).attribute(IDS, 5).scores, expected.scores)
