"""A sweep is the layers' own runs, in one pass or in several, within the memory that it was given."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from allocated import allocated

from depass import (
    ConservationError,
    ConservationWarning,
    Contrast,
    DePass,
    Direction,
    Heads,
    Modules,
    Neurons,
    OptionError,
    SourceError,
    TargetError,
    Token,
    TopK,
)
from depass.engine import passes as engine_passes
from depass.propagation.blocks import TRAITS, blocks_of
from depass.propagation.needs import Sizes
from depass.sources.decompose import COMPONENT_BYTES

LENGTH = 9
TARGETS = [TopK(2), 5, Contrast(7, 9), TopK(1, position=3)]


def spec(kind: str, layer: int, **options: Any) -> list[Any]:
    if kind == "modules":
        return [Modules(layer, "attn", **options), Modules(layer, "mlp", **options)]
    return [(Heads if kind == "heads" else Neurons)(layer, **options)]


@pytest.mark.filterwarnings("ignore::depass.ConservationWarning")  # some families' norms compute in fp32 in fp64 models
@pytest.mark.parametrize("kind", ["heads", "neurons", "modules"])
@pytest.mark.parametrize("name", models.CONFIGS)
def test_a_sweep_is_its_layers_runs(name: str, kind: Any, device: str) -> None:
    dp, ids = DePass(models.make(name, torch.float64, device)), models.prompt(LENGTH)
    layers = tuple(range(models.LAYERS))
    if kind == "heads":
        layers = tuple(layer for layer in layers if models.holds(dp.bound, Heads(layer)))
    if kind == "neurons" and dp.bound.has_experts:
        with pytest.raises(SourceError, match=r"Neurons\(layer=\d\): this layer of .* has routed experts"):
            dp.sweep(kind, ids, TARGETS)
        layers = tuple(layer for layer in layers if models.holds(dp.bound, Neurons(layer)))
        if not layers:
            return  # tests/depass/test_routed_experts.py sweeps the experts
    sweep = dp.sweep(kind, ids, TARGETS, layers=layers)
    assert sweep.layers == layers
    for row, layer in enumerate(sweep.layers):
        for column, one in enumerate(spec(kind, layer)):
            if not models.holds(dp.bound, one):  # what adds nothing scores nothing
                assert not sweep.scores[:, row, column].any()
                total = sweep.rest[:, row, column] + sweep.bias[:, row, column]
                assert torch.allclose(total, sweep.target_logits, rtol=1e-5, atol=1e-5)
                continue
            res = dp.attribute(ids, TARGETS, sources=one)
            always = [source.kind for source in res.sources].index("rest")
            scores = sweep.scores[:, row, column : column + 1] if kind == "modules" else sweep.scores[:, row]
            where = (slice(None), row, column) if kind == "modules" else (slice(None), row)
            assert torch.allclose(scores, res.scores[:, always + 1 :], rtol=1e-5, atol=1e-6)
            assert torch.allclose(sweep.rest[where], res.scores[:, always], rtol=1e-5, atol=1e-6)
            assert torch.allclose(sweep.bias[where], res.scores[:, :always].sum(1), rtol=1e-5, atol=1e-6)
            assert sweep.targets == res.targets
            assert torch.equal(sweep.target_logits, res.target_logits)
    labels = [source.label for source in dp.attribute(ids, 5, sources=spec(kind, layers[-1])[0]).sources]
    assert sweep.source(len(layers) - 1, 0).label == labels[-sweep.scores.shape[2] if kind != "modules" else -1]


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("name", models.EVERY)
def test_every_layer_adds_up(name: str, dtype: str, device: str) -> None:
    kind = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    dp = DePass(models.make(name, kind, device))
    for length in (1, 17):
        sweep = dp.sweep("heads", models.prompt(length), TopK(3))
        total = sweep.scores.double().sum(2) + sweep.rest + sweep.bias
        # in bf16 the model's own rounding of its layers is a hundredth of a small logit
        assert float(sweep.conservation_error.max()) <= {"fp64": 1e-6, "fp32": 1e-5, "bf16": 2e-2}[dtype]
        size = torch.maximum(
            sweep.target_logits.abs()[:, None], sweep.scores.abs().sum(2) + sweep.rest.abs() + sweep.bias.abs()
        )
        missed = ((total - sweep.target_logits[:, None]).abs() / size).max()
        assert missed <= {"fp64": 2e-6, "fp32": 1e-5, "bf16": 2e-2}[dtype]


@pytest.mark.parametrize("name", ["llama-biased", "gpt-neox", "gemma2"])
@pytest.mark.parametrize("kind", ["heads", "modules"])
def test_groups_of_layers_change_nothing(name: str, kind: Any, device: str) -> None:
    dp, ids = DePass(models.make(name, torch.float64, device), workspace_bytes=1 << 16), models.prompt(LENGTH)
    whole = dp.sweep(kind, ids, TARGETS)
    runs: list[tuple[int, int]] = []
    blocks = blocks_of(dp.bound, 1 << 16, dp.bound.device)
    needed = Sizes.of(dp.bound, dp.bound.device).needs(60 + 2 * LENGTH, [LENGTH], blocks)
    budget = needed.state_bytes + needed.buffer_bytes + COMPONENT_BYTES
    tight = dp.sweep(kind, ids, TARGETS, memory_bytes=budget, progress=lambda *now: runs.append(now))
    assert len(runs) > models.LAYERS  # several passes
    assert [done for done, _ in runs] == list(range(1, runs[-1][1] + 1))
    for name in ("scores", "rest", "bias"):
        assert torch.allclose(getattr(tight, name), getattr(whole, name), rtol=1e-5, atol=1e-6)


def test_some_layers_heads_and_positions(device: str) -> None:
    dp, ids = DePass(models.make("llama", torch.float64, device)), models.prompt(LENGTH)
    sweep = dp.sweep("heads", ids, 5, layers=[2, 0], ids=[3, 1], positions=[-1])
    assert (sweep.layers, sweep.columns) == ((0, 2), (1, 3))
    res = dp.attribute(ids, 5, sources=Heads(2, [1, 3], [-1]))
    assert torch.allclose(sweep.scores[:, 1], res.scores[:, -2:], rtol=1e-5, atol=1e-6)
    assert sweep.top(1)[0][0].label in {"L0H1", "L0H3", "L2H1", "L2H3"}


def test_targets_before_the_components_have_begun(device: str) -> None:
    dp, ids = DePass(models.make("llama", torch.float64, device)), models.prompt(LENGTH)
    sweep = dp.sweep("heads", ids, [Token(5, 2), 5], positions=iter([-1]))
    assert sweep.scores.shape == (2, models.LAYERS, 4)
    assert not sweep.scores[0].any()
    assert sweep.scores[1].any()
    assert sweep.conservation_error.max() < 1e-6


def test_layers_that_do_not_add_up_warn_or_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depass.models.bound.BoundModel.tolerance", -1.0)
    dp, ids = DePass(models.make("llama")), models.prompt(LENGTH)
    with pytest.warns(ConservationWarning, match="miss the logit by"):
        dp.sweep("heads", ids, 5)
    with pytest.raises(ConservationError):
        dp.sweep("heads", ids, 5, strict=True)


def test_what_does_not_fit_is_named() -> None:
    dp, ids = DePass(models.make("llama")), models.prompt(LENGTH)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        (
            {"kind": "tokens"},
            OptionError,
            "unknown kind of sweep 'tokens'; choose one of: 'heads', 'neurons', 'experts', 'modules'",
        ),
        ({"layers": [3]}, OptionError, r"Heads\(layer=3\) is out of range: .* has layers 0 to 2"),
        ({"layers": []}, OptionError, r"layers must be a non-empty list without duplicates, got \[\]"),
        ({"layers": [1, 1]}, OptionError, "layers must be a non-empty list without duplicates"),
        ({"layers": 1}, OptionError, "layers must be a list of integers, got 1"),
        ({"ids": [4]}, SourceError, "4 is out of range; choose from 0 to 3"),
        ({"kind": "modules", "ids": [0]}, OptionError, r"ids=\[0\] selects heads, neurons or experts"),
        (
            {"target": Direction(torch.ones(32), layer=1)},
            TargetError,
            r"Direction\(layer=1\): probe targets are not supported in sweeps",
        ),
        ({"memory_bytes": 0}, OptionError, "memory_bytes must be a positive integer"),
        (
            {"memory_bytes": 10**6},
            OptionError,
            "layer 0 alone needs .* bytes for its 45 rows, but the budget is 1000000",
        ),
    ]
    for options, error, says in wrong:
        options = {"kind": "heads", "target": 5, **options}
        with pytest.raises(error, match=says):
            dp.sweep(options.pop("kind"), ids, options.pop("target"), **options)


def test_memory_stays_within_the_budget(smollm2_folder: Path) -> None:
    """Four layers of 500 neurons at 48 positions: 24,000 rows a layer, which is 56 MB of state."""
    dp = DePass.from_pretrained(dtype=torch.float32)
    ids = torch.randint(100, 40_000, (48,), generator=torch.Generator().manual_seed(0))
    dp.sweep("heads", ids, 5, layers=[0])  # the first run checks the model

    def swept(budget: int) -> int:
        told: list[Any] = []
        options: dict[str, Any] = {"ids": range(500), "memory_bytes": budget, "progress": lambda *now: told.append(now)}
        dp.sweep("neurons", ids, 5, layers=[26, 27, 28, 29], **options)
        return len(told)

    assert (swept(200_000_000), swept(400_000_000)) == (4 + 2, 4)
    for budget in (200_000_000, 400_000_000):
        assert 100_000_000 < allocated(partial(swept, budget)) <= budget


def test_one_block_stays_within_the_sweeps_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    dp, ids = DePass(models.make("llama")), models.prompt(40)
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], workspace=1 << 12, one_block=True))
    used: list[int] = []
    real = engine_passes.fitting

    def watched(*given: Any) -> Any:
        blocks, needed = real(*given)
        used.append(needed.state_bytes + needed.buffer_bytes)
        return blocks, needed

    monkeypatch.setattr(engine_passes, "fitting", watched)
    expected = dp.sweep("heads", ids, 5)  # all layers at once, each in one block
    whole = used.pop()
    budget = whole + COMPONENT_BYTES - 1
    torch.testing.assert_close(
        dp.sweep("heads", ids, 5, memory_bytes=budget).scores, expected.scores, rtol=1e-5, atol=1e-6
    )
    assert max(used) <= budget - COMPONENT_BYTES
