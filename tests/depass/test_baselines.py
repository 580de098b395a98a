"""Each baseline against captum, a slow loop or a number that is known, and as a result like any other."""

from __future__ import annotations

import io
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import tokens
import torch
from torch import Tensor

from depass import (
    Attribution,
    Contrast,
    DePass,
    Direction,
    ModelError,
    NonFiniteError,
    OptionError,
    PromptError,
    Sweep,
    TargetError,
    Token,
    TopK,
    baselines,
    masking,
)
from depass.models.bind import bind

IDS = models.prompt(8)
TARGET, POSITION = 5, 6  # a position before the last: what lies behind it has no score
FAMILIES = ["llama-biased", "gemma2", "gemma3", "phi3", "olmo2", "gpt2", "gpt-neox"]
ATTENTION = ("mean_attention", "last_attention", "attention_rollout")


def embeddings(model: Any, ids: list[int] = IDS) -> Tensor:
    with torch.no_grad():
        made: Tensor = model.get_input_embeddings()(torch.tensor([ids], device=model.device))
    return made


def logit(model: Any, embedded: Tensor, position: int = POSITION, token: int = TARGET) -> Tensor:
    """``[B]``, before soft-capping."""
    stream = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    made: Tensor = model.get_output_embeddings()(stream[:, position])[:, token]
    return made


def scores(dp: DePass, name: str, **more: Any) -> Tensor:
    (found,) = baselines.tokens(dp, name, [IDS], Token(TARGET, POSITION), **more)
    return found.scores[0]


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_captums(name: str, device: str) -> None:
    attr = pytest.importorskip("captum.attr")
    model = models.make(name, torch.float64, device)
    dp, e = DePass(model), embeddings(model)

    def of(embedded: Tensor) -> Tensor:
        return logit(model, embedded)

    (res,) = baselines.tokens(dp, "random", [IDS], Token(TARGET, POSITION))
    assert of(e).item() == pytest.approx(
        float(res.target_logits), rel=1e-5
    )  # embeddings in place of ids change nothing
    saliency = attr.Saliency(of).attribute(e, abs=False)[0]
    product = attr.InputXGradient(of).attribute(e)[0].sum(-1)
    assert torch.allclose(scores(dp, "gradient_norm"), saliency.norm(dim=-1).float().cpu(), rtol=1e-4, atol=1e-6)
    assert torch.allclose(scores(dp, "input_x_gradient"), product.float().cpu(), rtol=1e-4, atol=1e-6)
    for steps in (20, 50):
        along = attr.IntegratedGradients(of).attribute(e, n_steps=steps, method="riemann_middle")[0].sum(-1)
        assert torch.allclose(scores(dp, f"integrated_gradients_{steps}"), along.float().cpu(), rtol=1e-4, atol=1e-5)


def test_integrated_gradients_add_up_to_the_difference_from_zero_embeddings(device: str) -> None:
    model = smooth(device)
    e = embeddings(model)
    with torch.no_grad():
        difference = float(logit(model, e) - logit(model, 0 * e))
    assert scores(DePass(model), "integrated_gradients_50").sum().item() == pytest.approx(difference, rel=2e-3)


def test_gradient_shap_has_captums_mean(device: str) -> None:
    attr = pytest.importorskip("captum.attr")
    model = smooth(device)
    dp, e = DePass(model), embeddings(model)
    ours = torch.stack([scores(dp, "gradient_shap", seed=seed) for seed in range(30)]).double()
    explain = attr.GradientShap(lambda embedded: logit(model, embedded))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        np.random.seed(0)  # of which captum takes the points of the line
        theirs = torch.stack(
            [
                explain.attribute(e, baselines=0 * e, n_samples=20, stdevs=0.1 * float(e.std()))[0].sum(-1).cpu()
                for _ in range(30)
            ]
        )
    errors = ((ours.var(0) + theirs.var(0)) / 30).sqrt()
    assert ours[:, : POSITION + 1].std(0).min() > 0
    assert bool(((ours.mean(0) - theirs.mean(0)).abs() <= 5 * errors + 1e-9).all())
    # that the bound says something: scores that are all zero would break it
    assert float(ours.mean(0).abs().max()) > 10 * float(errors.max())


def smooth(device: str) -> Any:
    """A model whose norms hardly bend near zero embeddings, so that few steps and samples are enough."""
    model = models.make("llama", torch.float64, device)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1.0
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_what_the_model_returns(name: str, device: str) -> None:
    model = models.make(name, device=device)
    dp = DePass(model)
    with torch.no_grad():
        returned = model(torch.tensor([IDS], device=device), output_attentions=True).attentions
    patterns = [pattern[0].double().mean(0).cpu() for pattern in returned]
    rolled = torch.eye(len(IDS), dtype=torch.float64)
    for pattern in patterns:
        for_each = [
            0.5 * sum(pattern[q, k] * rolled[k] for k in range(len(IDS))) + 0.5 * rolled[q] for q in range(len(IDS))
        ]
        rolled = torch.stack(for_each)
    expected = dict(zip(ATTENTION, (sum(patterns) / len(patterns), patterns[-1], rolled), strict=True))
    for kind in ATTENTION:
        assert torch.allclose(scores(dp, kind).double(), expected[kind][POSITION], rtol=1e-5, atol=1e-6)
        assert scores(dp, kind).sum() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("name", ["llama-biased", "gpt2"])
def test_leaving_out_is_a_run_without_the_token(name: str, device: str) -> None:
    model = models.make(name, torch.float64, device)
    dp = DePass(model)
    whole, found = IDS[: POSITION + 1], scores(dp, "leave_one_out")
    own = float(logit(model, embeddings(model)))
    for t in range(POSITION + 1):
        rest = whole[:t] + whole[t + 1 :]
        assert found[t].item() == pytest.approx(
            own - float(logit(model, embeddings(model, rest), -1)), rel=1e-5, abs=1e-6
        )
    assert not found[POSITION + 1 :].any()
    (contrast,) = baselines.tokens(dp, "leave_one_out", [IDS], Contrast(5, 7, POSITION))
    other = baselines.tokens(dp, "leave_one_out", [IDS], Token(7, POSITION))[0].scores[0]
    assert torch.allclose(contrast.scores[0], found - other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in baselines.TOKENS if name not in (*ATTENTION, "random")])
def test_where_nothing_is_mixed_only_the_last_token_counts(name: str, device: str) -> None:
    model = models.make("llama", torch.float64, device)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    found = scores(DePass(model), name)
    size = abs(float(found[POSITION]))
    found[POSITION] = 0
    assert float(found.abs().max()) <= 1e-5 * size  # runs without a token differ by rounding


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("kind", "baseline"),
    [
        ("heads", "attribution_patching"),
        ("neurons", "attribution_patching"),
        ("neurons", "attribution_patching_last"),
    ],
)
def test_attribution_patching_is_the_derivative_by_the_size_of_an_output(
    name: str, kind: str, baseline: str, device: str
) -> None:
    model = models.make(name, torch.float64, device)
    bound = bind(model)
    of_baseline = baselines.heads if kind == "heads" else baselines.neurons
    sweep = of_baseline(DePass(model), baseline, IDS, [3, Token(TARGET, POSITION)])
    counted = slice(POSITION, POSITION + 1) if baseline.endswith("last") else slice(None)
    count = 4 if kind == "heads" else 56
    assert sweep.scores.shape == (2, models.LAYERS, count)
    step = 0.05  # most families round to fp32 somewhere: a wide step, and five points for its error
    for layer, index in ((0, 1), (1, count - 1), (2, 2)):
        module = (bound.layers[layer].mixers[0].output if kind == "heads" else bound.layers[layer].only_mlp.down).module

        def scaled(by: float, module: Any = module, index: int = index) -> float:
            def hook(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                size = args[0].shape[-1] // count
                changed = args[0].clone()
                changed[:, counted, index * size : (index + 1) * size] *= by
                return (changed, *args[1:])

            handle = module.register_forward_pre_hook(hook)
            try:
                with torch.no_grad():
                    return float(logit(model, embeddings(model)))
            finally:
                handle.remove()

        near, far = (scaled(1 + by) - scaled(1 - by) for by in (step, 2 * step))
        derivative = (8 * near - far) / (12 * step)
        assert sweep.scores[1, layer, index].item() == pytest.approx(derivative, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_h1"])
def test_attribution_patching_with_means_is_the_derivative_on_the_way_to_them(name: str, device: str) -> None:
    """Of a layer with mixers side by side, each head goes to its own part of the layer's means."""
    if not models.runs(name):
        pytest.skip(f"this transformers has no {name} that is supported")
    model = models.make(name, torch.float64, device)
    dp, bound = DePass(model), bind(model)
    means = masking.head_means(model, [models.prompt(6, 1), models.prompt(9, 2)])
    sweep = baselines.heads(dp, "attribution_patching", IDS, Token(TARGET, POSITION), means=means)
    step, count = 0.05, sweep.scores.shape[2]
    for layer, head in ((0, 1), (2, count - 1)):
        (mixer, own), first = next(
            ((mixer, own), before)
            for number, (mixer, own) in enumerate(bound.layers[layer].heads)
            for before in [sum(each.output.shape[1] for each, _ in bound.layers[layer].heads[:number])]
            if own.start <= head < own.stop
        )
        size = mixer.output.shape[1] // mixer.num_heads
        columns = slice((head - own.start) * size, (head - own.start + 1) * size)
        mean = means[layer][first:][columns]

        def moved(by: float, module: Any = mixer.output.module, columns: slice = columns, mean: Tensor = mean) -> float:
            def hook(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                changed = args[0].clone()
                changed[..., columns] += by * (changed[..., columns] - mean.to(changed))
                return (changed, *args[1:])

            handle = module.register_forward_pre_hook(hook)
            try:
                with torch.no_grad():
                    return float(model(torch.tensor([IDS], device=device)).logits[0, POSITION, TARGET])
            finally:
                handle.remove()

        near, far = (moved(by) - moved(-by) for by in (step, 2 * step))
        assert sweep.scores[0, layer, head].item() == pytest.approx((8 * near - far) / (12 * step), rel=1e-3, abs=1e-4)


def test_means_that_no_baseline_takes_or_that_do_not_fit_are_refused() -> None:
    dp = DePass(models.make("llama"))
    means = masking.head_means(dp, [IDS])
    with pytest.raises(OptionError, match="only attribution_patching takes means, got means for 'output_norm'"):
        baselines.heads(dp, "output_norm", IDS, 5, means=means)
    with pytest.raises(OptionError, match="means must be a list of 3 tensors"):
        baselines.heads(dp, "attribution_patching", IDS, 5, means=means[:2])


def captured(model: Any, modules: list[Any]) -> list[Tensor]:
    """The inputs of modules, ``[N, in]`` each."""
    inputs: list[Tensor] = []
    handles = [module.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0])) for module in modules]
    with torch.no_grad():
        model(torch.tensor([IDS], device=model.device))
    for handle in handles:
        handle.remove()
    return inputs


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_are_of_what_a_head_or_neuron_writes(name: str, device: str) -> None:
    """By the model's own modules: the projection of one part alone, its bias taken off, then the post-norm's own scale."""
    model = models.make(name, torch.float64, device)
    bound, dp = bind(model), DePass(model)
    target = [3, Token(TARGET, POSITION)]
    heads = baselines.heads(dp, "output_norm", IDS, target).scores
    neurons = baselines.neurons(dp, "activation_x_norm", IDS, target).scores
    activations = baselines.neurons(dp, "activation", IDS, target).scores
    for index, layer in enumerate(bound.layers):
        for module, norm, columns, found in (
            (layer.mixers[0].output.module, layer.attention_post_norm, 4, heads),
            (layer.only_mlp.down.module, layer.mlp_post_norm, 56, neurons),
        ):
            (x,) = captured(model, [module])
            for row, position in ((0, -1), (1, POSITION)):
                for column in (0, 1, columns - 1):
                    alone, size = torch.zeros_like(x[position]), x.shape[1] // columns
                    here = slice(column * size, (column + 1) * size)
                    alone[here] = x[position, here]
                    with torch.no_grad():
                        written = module(alone[None])[0] - module(torch.zeros_like(alone)[None])[0]
                        if norm is not None:
                            whole = module(x[position][None])[0]
                            written = norm.module(whole[None])[0] * written / whole
                    size_written = float(written.double().norm())
                    if columns == 56:
                        assert activations[row, index, column] == pytest.approx(float(x[position, column]), rel=1e-5)
                        size_written *= 1 if x[position, column] >= 0 else -1
                    assert found[row, index, column].item() == pytest.approx(size_written, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("baseline", baselines.TOKENS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_prompts_together_are_each_ones_own_run(name: str, baseline: str, device: str) -> None:
    dp = DePass(models.make(name, torch.float64, device))
    prompts = [models.prompt(length, length) for length in (5, 9, 2, 17)]
    asked: list[Any] = [TopK(2), 5, [5, Contrast(7, 8)], Direction(torch.linspace(-1, 1, 32), 3)]
    many = baselines.tokens(dp, baseline, prompts, asked, seed=3)
    for prompt, target, found in zip(prompts, asked, many, strict=True):
        (alone,) = baselines.tokens(dp, baseline, [prompt], [target], seed=3)
        assert torch.allclose(found.scores, alone.scores, rtol=1e-4, atol=1e-5)
        ours = dp.attribute(prompt, target)
        assert found.targets == ours.targets
        assert torch.allclose(found.target_logits, ours.target_logits, rtol=1e-5)
        assert [source.label for source in found.sources] == [s.label for s in ours.sources if s.kind == "token"]


def test_more_prompts_than_go_in_one_pass(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dp = DePass(models.make("llama", torch.float64, device))
    prompts = [models.prompt(length, length) for length in (5, 9, 12)]
    whole = {name: baselines.tokens(dp, name, prompts, 5) for name in baselines.TOKENS}
    monkeypatch.setattr(import_module("depass.baselines.tokens"), "BATCH_TOKENS", 10)  # its name is a function's too
    for name, found in whole.items():
        for a, b in zip(found, baselines.tokens(dp, name, prompts, 5), strict=True):
            assert torch.allclose(a.scores, b.scores, rtol=1e-4, atol=1e-5)


def test_random_is_of_its_seed(device: str) -> None:
    dp = DePass(models.make("llama", device=device))
    assert torch.equal(scores(dp, "random"), scores(dp, "random"))
    assert not torch.equal(scores(dp, "random"), scores(dp, "random", seed=1))
    for of_baseline in (baselines.heads, baselines.neurons):
        first, again, other = (of_baseline(dp, "random", IDS, 5, seed=seed).scores for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert abs(float(first.mean())) < 0.5 < float(first.std())


def test_a_tokens_result_reads_like_ours_and_promises_no_sum(device: str, tmp_path: Path) -> None:
    dp = DePass(models.make("gpt2", device=device), tokens.make())
    (res,) = baselines.tokens(dp, "input_x_gradient", ["the cat sat"], " cat")
    assert res.settings.method == "input_x_gradient"
    assert not res.settings.adds_up
    assert dp.attribute("the cat sat").settings.adds_up
    assert res.conservation_error.isnan().all()
    assert repr(res).endswith("by input_x_gradient)")
    assert len(res.top(2)) == 2
    assert res.aggregate("word").scores.sum() == pytest.approx(float(res.scores.sum()), rel=1e-5)
    assert json.loads(json.dumps(res.to_dict(), allow_nan=False))["conservation_error"] is None
    out = io.StringIO()
    res.show(out, 200)
    assert "scores by input_x_gradient, which need not add up to it" in out.getvalue()
    page = res.to_html()
    assert "need not add up to the logit" in page
    assert "Scores are in logits" not in page
    assert "{{" not in page
    res.save(tmp_path / "res.safetensors")
    loaded = Attribution.load(tmp_path / "res.safetensors")
    assert torch.equal(loaded.scores, res.scores)
    assert loaded.conservation_error.isnan().all()
    assert loaded.settings == res.settings


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_a_sweeps_result_reads_like_ours_and_promises_no_sum(kind: str, device: str, tmp_path: Path) -> None:
    dp = DePass(models.make("gpt2", device=device), tokens.make())
    sweep = getattr(baselines, kind)(dp, "attribution_patching", "the cat sat", " cat")
    ours = dp.sweep(kind, "the cat sat", " cat")
    assert (sweep.scores.shape, sweep.layers, sweep.columns) == (ours.scores.shape, ours.layers, ours.columns)
    assert torch.allclose(sweep.target_logits, ours.target_logits, rtol=1e-5)
    assert sweep.targets == ours.targets
    for nothing in (sweep.rest, sweep.bias, sweep.conservation_error):
        assert nothing.shape == ours.rest.shape
        assert nothing.isnan().all()
    said = json.loads(json.dumps(sweep.to_dict(), allow_nan=False))
    assert said["rest"] is None
    out = io.StringIO()
    sweep.show(out, 200)
    assert "which need not add up to it" in out.getvalue()
    assert "nan" not in out.getvalue() + sweep.to_html()
    sweep.plot(tmp_path / "sweep.png")
    sweep.save(tmp_path / "sweep.safetensors")
    loaded = Sweep.load(tmp_path / "sweep.safetensors")
    assert torch.equal(loaded.scores, sweep.scores)
    assert loaded.rest.isnan().all()


def test_the_model_is_left_alone_and_may_be_frozen(device: str) -> None:
    model = models.make("llama", device=device)
    dp = DePass(model)
    free = {name: scores(dp, name) for name in baselines.TOKENS}
    of_heads = baselines.heads(dp, "attribution_patching", IDS, 5).scores
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(False)
    with torch.no_grad():
        for name, found in free.items():
            assert torch.equal(scores(dp, name), found)
        assert torch.equal(baselines.heads(dp, "attribution_patching", IDS, 5).scores, of_heads)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "gradient"}, OptionError, "unknown baseline 'gradient' for tokens; choose from gradient_norm, "),
        ({"name": None}, OptionError, "unknown baseline None"),
        ({"prompts": "text"}, OptionError, "prompts must be a list of one or more prompts, got str 'text'"),
        ({"prompts": []}, OptionError, "prompts must be a list of one or more prompts"),
        ({"target": [5]}, OptionError, "a list of targets must have one per prompt, got 1 targets for 2 prompts"),
        ({"prompts": [IDS, []]}, PromptError, "prompt 1: the prompt is empty"),
        ({"target": [5, 500]}, TargetError, "prompt 1: target id 500 is out of range"),
        ({"target": Direction(torch.ones(32), layer=1)}, TargetError, "not supported in sweeps, surveys and baselines"),
        ({"seed": "a"}, OptionError, "seed must be an integer, got 'a'"),
        ({"name": "leave_one_out", "target": Token(5, 0)}, PromptError, "leave_one_out at position 0 leaves no token"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], error: Any, message: str) -> None:
    given = {"name": "random", "prompts": [IDS, IDS], "target": None, "seed": 0, **change}
    dp = DePass(models.make("llama"))
    with pytest.raises(error, match=message):
        baselines.tokens(dp, given["name"], given["prompts"], given["target"], seed=given["seed"])


def test_unknown_baselines_of_components_are_refused() -> None:
    dp = DePass(models.make("llama"))
    with pytest.raises(
        OptionError, match="'activation' for heads; choose from attribution_patching, output_norm, random"
    ):
        baselines.heads(dp, "activation", IDS)
    with pytest.raises(OptionError, match="'output_norm' for neurons"):
        baselines.neurons(dp, "output_norm", IDS)


def test_models_that_drop_out_and_numbers_that_are_none_are_refused() -> None:
    model = models.make("gpt2").train()
    with pytest.raises(ModelError, match="training mode"):
        baselines.tokens(DePass(model), "random", [IDS])
    broken = models.make("llama")
    broken.lm_head.weight.data[5] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        baselines.tokens(DePass(broken), "input_x_gradient", [IDS], 5)


@pytest.mark.parametrize(
    "take",
    [
        lambda dp: baselines.tokens(dp, "gradient_norm", [[5, 6, 7]], 17),
        lambda dp: baselines.tokens(dp, "integrated_gradients_20", [[5, 6, 7]], 17),
        lambda dp: baselines.tokens(dp, "gim", [[5, 6, 7]], 17),
        lambda dp: baselines.heads(dp, "attribution_patching", [5, 6, 7], 17),
        lambda dp: baselines.neurons(dp, "attribution_patching_last", [5, 6, 7], 17),
    ],
    ids=["tokens", "many steps", "gim", "heads", "neurons"],
)
def test_gradients_in_inference_mode_are_refused_with_the_reason(take: Any) -> None:
    dp = DePass(models.make("llama"))
    with (
        torch.inference_mode(),
        pytest.raises(OptionError, match=r"gradients, which torch.inference_mode\(\) switches off"),
    ):
        take(dp)
    with torch.no_grad():
        take(dp)
    with torch.inference_mode():
        made = models.make("llama")
    with pytest.raises(ModelError, match=r"were made inside torch.inference_mode\(\) and take no gradients"):
        take(DePass(made))


def _cut(model: Any, part: str) -> None:
    """Let a part of layer 1 pass no gradient on to the embeddings; its weights may still take some."""
    layer = bind(model).layers[1]

    def before(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].detach(), *args[1:])

    def after(_: Any, __: Any, output: Any) -> Any:
        return output.detach()

    if part == "norm":
        layer.attention_norm.module.register_forward_hook(after)
    elif part == "experts":
        layer.experts.module.register_forward_hook(after)
    else:
        projection = layer.mixers[0].output if part == "attention" else layer.only_mlp.down
        projection.module.register_forward_pre_hook(before)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("name", "part"), [
    ("llama", "attention"), ("llama", "mlp"), ("llama", "norm"), ("gpt2", "mlp"), ("gemma4", "attention"),
    ("mixtral", "experts"),
])  # fmt: skip
def test_gradients_that_pass_only_by_the_residual_stream_are_refused(name: str, part: str, frozen: bool) -> None:
    """As with kernels of 8-bit activations, which have no gradient: the stream's own gradient would look like the whole."""
    if not models.runs(name):
        pytest.skip(f"this transformers has no {name} that is supported")
    model = models.make(name).requires_grad_(not frozen)
    dp = DePass(model)
    baselines.tokens(dp, "gradient_norm", [IDS], TARGET)
    _cut(model, part)
    said = "does not pass gradients on to its embeddings by every path"
    for baseline in ("gradient_norm", "input_x_gradient", "integrated_gradients_20", "gradient_shap"):
        with pytest.raises(ModelError, match=said):
            baselines.tokens(dp, baseline, [IDS], TARGET)
    of_components = [baselines.heads, baselines.experts if part == "experts" else baselines.neurons]
    for baseline_of in of_components:
        with pytest.raises(ModelError, match=said):
            baseline_of(dp, "attribution_patching", IDS, TARGET)
    baselines.tokens(dp, "random", [IDS], TARGET)


def test_baselines_without_gradients_work_in_inference_mode() -> None:
    dp = DePass(models.make("llama"))
    expected = baselines.tokens(dp, "mean_attention", [[5, 6, 7]], 17)[0].scores
    with torch.inference_mode():
        torch.testing.assert_close(baselines.tokens(dp, "mean_attention", [[5, 6, 7]], 17)[0].scores, expected)
