"""Linear rules behind the public calls: the same results as other rules give, from one backward pass."""

from __future__ import annotations

import json
from typing import Any

import models
import pytest
import torch
from linear_oracle import LinearOracle
from recurrent_oracle import RecurrentOracle

from depass import (
    Attribution,
    ConservationWarning,
    Contrast,
    Custom,
    DePass,
    Direction,
    Heads,
    MemoryLimitError,
    MemoryLimitWarning,
    ModelError,
    Modules,
    Neurons,
    OptionError,
    Spans,
    Subspace,
    TopK,
)
from depass.cli.main import main
from depass.engine import linear, segment
from depass.engine.linear_memory import linear_needs
from depass.rules import LINEAR

HYBRIDS = ("nemotron_h", "falcon_h1")
TARGETS = [TopK(2), Contrast(3, 4, position=5), Direction(torch.linspace(-1, 1, 32)), 7]
SOURCES: list[Any] = [
    "token", Spans([(1, 3), (4, 9)]), Heads(1), Heads(1, ids=[2], positions=[0, 4]), Neurons(1, ids=[0, 7, 3]),
    Neurons(2, positions=[8]), Modules(0, "attn"), Modules(2, "mlp", positions=[1, 2]), Subspace(1, torch.eye(32)[:3]),
]  # fmt: skip


def sources_of(dp: DePass) -> list[Any]:
    """Those of the sources that a model has."""
    return [each for each in SOURCES if models.holds(dp.bound, each)]


def close(got: Any, expected: Any, limit: float) -> None:
    assert (got.sources, got.targets, got.prompt) == (expected.sources, expected.targets, expected.prompt)
    size = float(expected.scores.abs().sum(1).max())
    torch.testing.assert_close(got.scores, expected.scores, rtol=0, atol=limit * size)
    torch.testing.assert_close(got.target_logits, expected.target_logits, rtol=0, atol=limit * size)


@pytest.mark.parametrize("name", models.EVERY)
def test_taylor_is_the_same_from_both_engines(name: str) -> None:
    model, ids = models.make(name), models.prompt(9)
    back, ahead = DePass(model, rule="taylor"), DePass(model, rule="taylor", engine="forward")
    for sources in sources_of(back):
        got, expected = (dp.attribute(ids, TARGETS, sources=sources, strict=True) for dp in (back, ahead))
        assert (got.settings.engine, expected.settings.engine) == ("backward", "forward")
        close(got, expected, 2e-5)
    probe = Direction(torch.linspace(1, 2, 32), layer=2, intercept=3.0)
    close(back.attribute(ids, [probe, 5]), ahead.attribute(ids, [probe, 5]), 2e-5)
    options: dict[str, Any] = {"start_layer": 1, "stop_layer": 2}
    close(back.attribute(ids, TARGETS, **options), ahead.attribute(ids, TARGETS, **options), 2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt-neox", "olmo2", "gpt_oss"])
@pytest.mark.parametrize("kind", ["heads", "neurons", "modules"])
def test_a_sweep_is_the_same_from_both_engines(name: str, kind: Any) -> None:
    model, ids = models.make(name), models.prompt(9)
    if kind == "neurons" and name == "gpt_oss":
        pytest.skip("its layers have experts")
    back, ahead = DePass(model, rule="taylor"), DePass(model, rule="taylor", engine="forward")
    for options in ({}, {"layers": [2, 0], "positions": [1, 8]}, {} if kind == "modules" else {"ids": [3, 1]}):
        got, expected = (dp.sweep(kind, ids, [5, TopK(2)], strict=True, **options) for dp in (back, ahead))
        assert (got.layers, got.columns, got.targets) == (expected.layers, expected.columns, expected.targets)
        size = float(expected.scores.abs().sum(-1).max() + expected.rest.abs().max())
        for field in ("scores", "rest", "bias"):
            torch.testing.assert_close(getattr(got, field), getattr(expected, field), rtol=0, atol=3e-5 * size)
        assert got.settings.engine == "backward"


@pytest.mark.parametrize("rule", ["half", "up"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_tokens_equal_a_loop_that_takes_no_gradients(name: str, rule: str) -> None:
    model, ids = models.make(name, torch.float64), models.prompt(7)
    res = DePass(model, rule=rule).attribute(ids, 5, strict=True)
    bias = res.sources[0].kind == "bias"
    oracle = LinearOracle(name, model, ids, [0] * (7 + bias), [t + bias for t in range(7)], bias)
    states = oracle.weigh(LINEAR[rule].gate, LINEAR[rule].up).run("", 0.0, None)
    expected = oracle.scores(states[-1], 6, 5)
    torch.testing.assert_close(res.scores[0].double(), expected, rtol=0, atol=1e-5 * float(expected.abs().sum()))


class HybridOracle(RecurrentOracle, LinearOracle):
    """The loop of linear rules with the recurrences of the other one."""


@pytest.mark.parametrize("rule", ["half", "up"])
@pytest.mark.parametrize("name", [name for name in models.RECURRENT if name.startswith(HYBRIDS)])
def test_tokens_of_hybrids_equal_a_loop_that_takes_no_gradients(name: str, rule: str) -> None:
    model, ids = models.make(name, torch.float64), models.prompt(7)
    res = DePass(model, rule=rule).attribute(ids, 5, strict=True)
    oracle = HybridOracle(name.split("-")[0], model, ids, [0] * 8, list(range(1, 8)), True)
    states = oracle.weigh(LINEAR[rule].gate, LINEAR[rule].up).run("", 0.0, None)
    expected = oracle.scores(states[-1], 6, 5)
    torch.testing.assert_close(res.scores[0].double(), expected, rtol=0, atol=1e-5 * float(expected.abs().sum()))


@pytest.mark.parametrize(
    ("name", "rule"), [(name, rule) for name in models.CONFIGS for rule in LINEAR if models.takes(name, LINEAR[rule])]
)
def test_every_kind_of_source_adds_up(name: str, rule: str) -> None:
    dp, ids = DePass(models.make(name), rule=rule), models.prompt(9)
    for sources in sources_of(dp):
        res = dp.attribute(ids, TARGETS, sources=sources, strict=True)
        assert float(res.conservation_error.max()) < 3e-5  # taylor's quotients are as large as a gate is near zero
    for kind in ("heads", "modules") if dp.bound.has_experts else ("heads", "neurons", "modules"):
        assert float(dp.sweep(kind, ids, [5, 6], strict=True).conservation_error.max()) < 1e-5


def test_spans_are_sums_of_their_tokens() -> None:
    dp, ids = DePass(models.make("llama-biased"), rule="half"), models.prompt(9)
    tokens, spans = dp.attribute(ids, 5), dp.attribute(ids, 5, sources=Spans([(1, 3), (4, 9)]))
    bias, of_token = tokens.scores[0, 0], tokens.scores[0, 1:]
    expected = torch.stack([bias, of_token[0] + of_token[3], of_token[1:3].sum(), of_token[4:].sum()])
    torch.testing.assert_close(spans.scores[0], expected, rtol=1e-5, atol=1e-6)
    assert [source.kind for source in spans.sources] == ["bias", "rest", "span", "span"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "gpt_oss"])
def test_a_batch_equals_its_prompts_alone(name: str) -> None:
    dp = DePass(models.make(name), rule="half")
    prompts = [models.prompt(length, seed) for seed, length in enumerate((5, 9, 1, 7))]
    targets = [[5], [TopK(3), 7], [Contrast(3, 4)], [6, 7]]
    found = list(dp.attribute_many(prompts, targets=targets, batch_tokens=1000, strict=True))
    for got, ids, target in zip(found, prompts, targets, strict=True):
        close(got, dp.attribute(ids, target), 1e-5)
    heads = list(dp.attribute_many(prompts, 5, sources=Heads(1), batch_tokens=1000))
    for got, ids in zip(heads, prompts, strict=True):
        close(got, dp.attribute(ids, 5, sources=Heads(1)), 1e-5)


def test_layers_are_run_again_where_activations_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    dp, ids, ran = DePass(models.make("llama"), rule="half"), models.prompt(40), []
    expected = dp.attribute(ids, 5)
    needed = linear_needs(dp.bound, [40], 3, 1, LINEAR["half"])
    dp.model.model.layers[1].register_forward_pre_hook(lambda *_: ran.append(1))
    for available, times in ((2 * needed.total(3), 1), (2 * needed.total(3) - 1, 2), (needed.total(1), 2)):
        monkeypatch.setattr(linear, "room", lambda bound, available=available: available)
        ran.clear()
        close(dp.attribute(ids, 5), expected, 1e-6)
        assert len(ran) == times + 1  # once more because the hook makes it check the layers
        plan = dp.plan(40, budget_bytes=available + dp.plan(40, measure=False).weights_bytes, measure=False)
        assert (plan.recomputed, plan.fits, plan.rows) == (times == 2, True, 0)
    monkeypatch.setattr(linear, "room", lambda bound: needed.total(1) - 1)
    with pytest.raises(
        MemoryLimitError, match=r"40 tokens and 1 targets need 0.. MB besides .* under a linear rule, 0"
    ):
        dp.attribute(ids, 5)


def test_what_linear_rules_refuse() -> None:
    model, ids = models.make("llama"), models.prompt(5)
    with pytest.raises(OptionError, match=r"exclude_bos=True has no effect under rule='half'"):
        DePass(model, rule="half").attribute(ids, exclude_bos=True)
    with pytest.raises(OptionError, match="engine='forward' does not have rule='up'"):
        DePass(model, engine="forward").attribute(ids, rule="up")
    with pytest.raises(OptionError, match="engine must be 'auto' or 'forward', got 'backward'"):
        DePass(model, engine="backward")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"rule='half' has no decomposed states; choose one of: softmax"):
        DePass(model, rule="half").states(ids)
    with torch.inference_mode():
        made = models.make("llama")
    with pytest.raises(ModelError, match=r"were made in torch.inference_mode\(\)"):
        DePass(made).attribute(ids, 5, rule="half")
    fell_back = DePass(made).attribute(ids, 5, rule="taylor")
    assert fell_back.settings.engine == "forward"


def test_generated_tokens_progress_and_saved_results(tmp_path: Any) -> None:
    dp, ids = DePass(models.make("llama"), rule="half"), models.prompt(5)
    done: list[tuple[int, int]] = []
    made = dp.generate(ids, max_new_tokens=3, progress=lambda *at: done.append(at))
    assert done == [(layer + 1, models.LAYERS) for layer in range(models.LAYERS)]
    assert made.attribution.settings.engine == "backward"
    made.attribution.save(tmp_path / "a.safetensors")
    again = Attribution.load(tmp_path / "a.safetensors")
    assert (again.settings, again.sources) == (made.attribution.settings, made.attribution.sources)
    with torch.inference_mode():
        close(dp.attribute(ids, 5), dp.attribute(ids, 5), 0)


def test_parts_of_ones_own() -> None:
    dp, ids = DePass(models.make("gpt2"), rule="up"), models.prompt(6)
    stream = dp.states(ids, 1, rule="taylor").residual[1]
    halves = Custom(torch.stack([0.25 * stream, 0.75 * stream]), layer=1)
    scores = dp.attribute(ids, 5, sources=halves, strict=True).scores[0, -2:]
    torch.testing.assert_close(3 * scores[0], scores[1], rtol=1e-4, atol=1e-5)


def test_the_command_takes_them(capsys: pytest.CaptureFixture[str], smollm2_folder: Any) -> None:
    assert (
        main(["attribute", "Catalonia belongs to the continent of", "--target", " Europe", "--rule", "half", "--json"])
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert (printed["settings"]["rule"], printed["settings"]["engine"]) == ("half", "backward")


def test_progress_counts_every_layer_once() -> None:
    dp, ids = DePass(models.make("llama"), rule="half"), models.prompt(9)
    probe = Direction(torch.ones(32), layer=1)
    for target in (5, [probe, 5], [probe], TopK(40)):
        done: list[tuple[int, int]] = []
        dp.attribute(ids, target, progress=lambda *at: done.append(at))  # noqa: B023
        assert done == [(1, 3), (2, 3), (3, 3)]


def test_the_constructors_exclude_bos_is_for_the_rules_that_have_it() -> None:
    dp, ids = DePass(models.make("llama"), exclude_bos=True), models.prompt(5)
    close(dp.attribute(ids, 5, rule="half"), DePass(dp.model, rule="half").attribute(ids, 5), 0)
    assert dp.attribute(ids, 5, rule="taylor").settings.engine == "backward"
    with pytest.raises(OptionError, match="exclude_bos=True has no effect"):
        DePass(dp.model, rule="half", exclude_bos=True).attribute(ids, 5)


@pytest.mark.parametrize("path", ["mlp", "mlp.down_proj", "self_attn.o_proj", ""])
def test_a_hook_without_a_gradient_is_named(path: str) -> None:
    model, ids = models.make("llama"), models.prompt(6)
    module = model.model.layers[1].get_submodule(path)

    def without_gradient(_: Any, args: Any, output: Any) -> Any:
        return tuple(x.detach() for x in output) if isinstance(output, tuple) else output.detach()

    handle = module.register_forward_hook(without_gradient)
    with pytest.raises(ModelError, match=r"layer 1 of .* passes no gradient on, .*without_gradient.*take another rule"):
        DePass(model).attribute(ids, 5, rule="half")
    assert DePass(model).attribute(ids, 5, rule="taylor", strict=True).settings.engine == "forward"
    handle.remove()
    assert DePass(model).attribute(ids, 5, rule="half", strict=True).settings.altered is None


def test_a_change_that_gradients_go_through_is_said() -> None:
    model, ids = models.make("llama"), models.prompt(6)
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, output: 1.5 * output)
    with pytest.warns(ConservationWarning, match="The scores go through this change; they miss the logit by"):
        res = DePass(model).attribute(ids, 5, rule="half")
    assert float(res.conservation_error.max()) < 1e-5
    with pytest.warns(ConservationWarning, match="The scores explain the weights and not this change"):
        DePass(model).attribute(ids, 5, rule="taylor")


def test_memory_that_runs_out_is_answered_with_less_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    dp, ids = DePass(models.make("llama"), rule="half"), models.prompt(9)
    expected, heads = dp.attribute(ids, TopK(3)), dp.sweep("heads", ids, TopK(3))
    go_back, most = segment.Segment.go_back, 1

    def failing(segment: Any, gradient: torch.Tensor, is_last: bool, *of_lent: Any) -> Any:
        if len(gradient) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return go_back(segment, gradient, is_last, *of_lent)

    monkeypatch.setattr(segment.Segment, "go_back", failing)
    with pytest.warns(MemoryLimitWarning, match="while allocating 3.22 GB; retrying with the activations of one layer"):
        close(dp.attribute(ids, TopK(3)), expected, 1e-6)
    for work in (lambda: dp.sweep("heads", ids, TopK(3)), lambda: next(dp.attribute_many([ids], TopK(3)))):
        with pytest.warns(MemoryLimitWarning) as caught:
            found = work()
        assert {warning.filename for warning in caught} == {__file__}  # the line of the call, however deep
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
    with pytest.warns(MemoryLimitWarning):
        torch.testing.assert_close(dp.sweep("heads", ids, TopK(3)).scores, heads.scores, rtol=1e-5, atol=1e-6)
    most = 0
    with pytest.warns(MemoryLimitWarning), pytest.raises(MemoryLimitError, match=r"out of memory twice, .* 9 tokens"):
        dp.attribute(ids, TopK(3))
