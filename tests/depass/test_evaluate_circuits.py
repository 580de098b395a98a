"""Circuits: mean ablation, and the share of the model's logit difference that a circuit keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor

from depass import Contrast, DePass, OptionError, masking
from depass.evaluate import TASKS, Item, circuits, run
from depass.models.bind import bind

FAMILIES = ["llama-biased", "gemma2", "gpt2", "gpt-neox", "bitnet"]


def logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([ids], device=model.device)).logits[0].cpu()
    return found


# Mean ablation.


@pytest.mark.parametrize("name", FAMILIES)
def test_means_are_those_of_a_loop_over_prompts_and_positions(name: str, device: str) -> None:
    model, prompts = (
        models.make(name, torch.float64, device),
        [models.prompt(5, 1), models.prompt(8, 2), models.prompt(3, 3)],
    )
    seen: list[Tensor] = []
    (mixer,) = bind(model).layers[1].mixers
    hook = mixer.output.module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].cpu()))
    for ids in prompts:
        logits(model, ids)
    hook.remove()
    expected = sum(sum(row for row in outputs) / len(outputs) for outputs in seen) / 3
    assert torch.allclose(masking.head_means(model, prompts)[1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not models.runs("falcon_h1"), reason="this transformers has no Falcon-H1 that is supported")
def test_a_layer_with_mixers_side_by_side_has_the_means_of_both() -> None:
    """The heads of the recurrence follow those of the attention; each is filled in the projection that reads it."""
    model, ids = models.make("falcon_h1", torch.float64), models.prompt(7)
    means = masking.head_means(model, [models.prompt(6, 1), models.prompt(9, 2)])
    layer = bind(model).layers[1]
    widths = [mixer.output.shape[1] for mixer in layer.mixers]
    assert len(widths) == 2
    assert len(means[1]) == sum(widths)
    for number, (mixer, heads) in enumerate(layer.heads):
        last, d = heads.stop - 1, widths[number] // mixer.num_heads
        mean = means[1].split(widths)[number][-d:]
        added = mixer.output.module.weight[:, -d:] @ mean
        with masking.heads(model, {1: [last]}, means=means):
            masked = logits(model, ids)
        hook = mixer.output.module.register_forward_hook(lambda _, __, output, added=added: output + added.to(output))
        with masking.heads(model, {1: [last]}):
            expected = logits(model, ids)
        hook.remove()
        assert torch.allclose(masked, expected, rtol=1e-7, atol=1e-7)
        assert not torch.allclose(masked, logits(model, ids))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_at_its_mean_is_a_head_whose_output_is_constant(name: str, device: str) -> None:
    """The oracle: the head's columns of the output projection are zero, and their product with the mean is in a bias."""
    model, ids = models.make(name, torch.float64, device), models.prompt(7)
    means = masking.head_means(model, [models.prompt(6, 1), models.prompt(9, 2)])
    (mixer,) = bind(model).layers[1].mixers
    d = mixer.output.weight.shape[1] // 4
    columns = [*range(d), *range(3 * d, 4 * d)]
    added = mixer.output.weight[:, columns].cpu() @ means[1][columns]
    with masking.heads(model, {1: [0, 3]}, means=means):
        masked = logits(model, ids)
    projection = mixer.output.module
    hook = projection.register_forward_hook(lambda _, __, output: output + added.to(output))
    with masking.heads(model, {1: [0, 3]}):
        expected = logits(model, ids)
    hook.remove()
    assert torch.allclose(masked, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(masked, logits(model, ids))


def test_each_prompt_of_a_batch_has_its_own_mask_at_the_mean(device: str) -> None:
    model, ids = models.make("llama", torch.float64, device), models.prompt(6)
    means = masking.head_means(model, [models.prompt(5, 4)])
    off = torch.rand(3, models.LAYERS, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    together = circuits.differences(DePass(model), ids, off, means, 5, 9)
    for row in range(3):
        with masking.heads(model, {i: off[row, i].nonzero()[:, 0].tolist() for i in range(models.LAYERS)}, means=means):
            alone = logits(model, ids)[-1]
        assert float(together[row]) == pytest.approx(float(alone[5] - alone[9]), rel=1e-5)


@pytest.mark.parametrize("rule", ["softmax", "half"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_attribution_at_the_means_is_refused(name: str, rule: str, device: str) -> None:
    dp = DePass(models.make(name, device=device), rule=rule)
    means = masking.head_means(dp, [models.prompt(5)])
    for attribute in (dp.attribute, lambda ids, target: dp.sweep("heads", ids, target)):
        with masking.heads(dp, {1: [0]}, means=means), pytest.raises(OptionError, match="mask without means"):
            attribute(models.prompt(6), 5)
    dp.attribute(models.prompt(6), 5)


@pytest.mark.parametrize(
    ("means", "message"),
    [
        ([torch.zeros(32)] * 2, r"a list of 3 tensors of shape \[H·d\], .* got \[\[32\], \[32\]\]"),
        ([torch.zeros(31)] * 3, r"got \[\[31\], \[31\], \[31\]\]"),
        (3, "got int; take them from masking.head_means"),
    ],
)
def test_means_that_do_not_fit_are_refused(means: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message), masking.heads(models.make("llama"), {0: [0]}, means=means):
        pass
    with pytest.raises(OptionError, match="prompts is empty"):
        masking.head_means(models.make("llama"), [])


# The measure.


def row(model: float, none: float, kept: list[float], **more: Any) -> dict[str, Any]:
    return {"model": model, "none": none, "circuits": {"half": kept}, "tokens": 5, "conservation_error": 0.0,
            "seconds": {"half": 0.2}, "plain_seconds": 0.1, **more}  # fmt: skip


def test_shares_and_areas_are_those_computed_by_hand() -> None:
    """The effect is ((5 - 1) + (2 - 2)) / 2 = 2; sizes of 1, 10 and 100 % lie evenly on the logarithm."""
    rows = [row(5.0, 1.0, [4.0, 2.0]), row(2.0, 2.0, [3.0, 1.0])]  # of 10 % and of 1 %
    assert circuits.effect(rows) == 2.0
    shares = circuits.kept(rows, "half", (10.0, 1.0))
    assert shares.tolist() == [[0.5, 1.5, 2.0], [-0.5, 0.5, 0.0]]
    assert shares.mean(0).tolist() == [0.0, 1.0, 1.0]
    options = circuits.CircuitsOptions(percent=(10.0, 1.0), methods="half")
    (result,) = TASKS["circuits"].results(rows, options)
    assert result.value.value == pytest.approx(((0.25 + 1.5 + 1.0) + (-0.25 + 0.5 + 0.0)) / 2 / 2)
    assert (result.better, result.prompts, result.cost, result.against) == ("higher", 2, 2.0, None)


def test_without_an_effect_there_is_no_share(tmp_path: Path) -> None:
    rows, options = [row(1.0, 3.0, [2.0])], circuits.CircuitsOptions(percent=(10.0,), methods="half")
    assert TASKS["circuits"].results(rows, options) == []
    assert "is not defined" in TASKS["circuits"].report(rows, options, tmp_path)


def test_the_means_of_the_others_leave_out_ones_own() -> None:
    own = [torch.tensor([3.0]), torch.tensor([9.0])]
    every = circuits.Means([torch.tensor([2.0]), torch.tensor([5.0])], 3)
    assert [float(mean) for mean in every.without(own)] == [1.5, 3.0]


@pytest.mark.parametrize(
    ("data", "giver"),
    [
        ({"prompt": "When Paula and Lee got a plum, Lee gave it to", "target": " Paula"}, "Lee"),
        ({"prompt": "When Paula and Lee got a plum, Lee gave it to", "target": " Paula", "giver": "Bo"}, "Bo"),
        ({"prompt": "When Paula and Lee met, When they left, Lee gave it to", "target": " Paula"}, None),
        ({"prompt": "When Paula and Lee met, she gave it to", "target": " Paula"}, None),
        ({"prompt": [3, 4], "target": 5, "giver": 6}, 6),
        ({"prompt": [3, 4], "target": 5}, None),
    ],
)
def test_the_giver_is_the_name_said_twice(data: dict[str, Any], giver: Any) -> None:
    assert circuits.giver_of(Item("0", data)) == giver


# The task.


def data_file(path: Path, dp: DePass) -> str:
    rows: list[Any] = []
    for seed in range(4):
        ids = models.prompt(5 + seed, seed)
        top = int(logits(dp.model, ids)[-1].argmax())
        rows.append({"prompt": ids, "target": top, "giver": (top + 1) % 90 + 5})
    rows += [{**rows[0], "target": rows[0]["giver"], "giver": rows[0]["target"]}, {**rows[1], "giver": rows[1]["target"]},
             {"prompt": models.prompt(4), "target": 5}, {"prompt": [500], "target": 5, "giver": 6}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_the_task_measures_counts_and_repeats(device: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    dp, task = DePass(models.make("llama", device=device)), TASKS["circuits"]
    options = task.Options(data=data_file(tmp_path / "data.jsonl", dp), percent=(10, 50, 100))
    report = run(task, dp, options, tmp_path / "out").read_text()
    assert "8 items: 4 ok, 3 skipped, 1 errors." in report
    for reason in (circuits.WRONG, circuits.SAME, circuits.NO_GIVER, "id 500 at position 0 is out of range"):
        assert reason in report
    assert (tmp_path / "out" / "circuits.png").stat().st_size > 10_000
    lines = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    good = [line for line in lines if line["status"] == "ok"]
    prepared = task.prepare(dp, task.items(options), options)
    for line in good:
        assert tuple(line["circuits"]) == circuits.METHODS
        for kept in line["circuits"].values():
            assert kept[2] == pytest.approx(line["model"], rel=1e-4)  # all heads kept: the model itself
        assert line["none"] != pytest.approx(line["model"], rel=1e-3)
    (first,) = task.measure(dp, prepared, task.items(options)[:1], options)
    for name, kept in first["circuits"].items():
        assert kept == pytest.approx(good[0]["circuits"][name], rel=1e-3, abs=1e-3)


@pytest.mark.skipif(not models.runs("nemotron_h"), reason="this transformers has no Nemotron-H that is supported")
def test_layers_without_heads_are_no_part_of_a_circuit(tmp_path: Path) -> None:
    dp, task = DePass(models.make("nemotron_h")), TASKS["circuits"]
    options = task.Options(
        data=data_file(tmp_path / "data.jsonl", dp), percent=(25, 100), methods="half,attribution_patching,random"
    )
    assert "8 items: 4 ok, 3 skipped, 1 errors." in run(task, dp, options, tmp_path / "out").read_text()
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    for line in rows:
        for kept in line.get("circuits", {}).values():
            assert kept[1] == pytest.approx(line["model"], rel=1e-4)


def test_attribution_patching_estimates_the_circuits_own_ablation(tmp_path: Path) -> None:
    """Its scores are those of setting heads to the means of the other prompts, and another ranking than to zero."""
    dp, task = DePass(models.make("llama", torch.float64)), TASKS["circuits"]
    options = task.Options(
        data=data_file(tmp_path / "data.jsonl", dp), percent=(9, 17, 25, 34, 50), methods="attribution_patching"
    )
    items = task.items(options)[:4]
    (row, *_) = task.measure(dp, task.prepare(dp, items, options), items, options)
    ids, answer, giver = (items[0].data[key] for key in ("prompt", "target", "giver"))
    means, target = masking.head_means(dp, [item.data["prompt"] for item in items[1:]]), Contrast(answer, giver)
    kept = {}
    for name, given in (("means", means), ("zero", None)):
        sweep = circuits.baselines.heads(dp, "attribution_patching", ids, target, means=given)
        kept[name] = list[float]()
        for size in (1, 2, 3, 4, 6):
            top = set(sweep.scores[0].flatten().argsort(descending=True)[:size].tolist())
            off = {layer: [h for h in range(4) if layer * 4 + h not in top] for layer in range(models.LAYERS)}
            with masking.heads(dp, off, means=means):
                alone = logits(dp.model, ids)[-1]
            kept[name].append(float(alone[answer] - alone[giver]))
    assert row["circuits"]["attribution_patching"] == pytest.approx(kept["means"], rel=1e-5)
    assert kept["means"] != pytest.approx(kept["zero"], rel=1e-3)


def test_a_giver_of_another_kind_than_the_prompt_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": [3, 4], "target": 5, "giver": "Anna"}))
    (item,) = TASKS["circuits"].items(TASKS["circuits"].Options(data=str(path)))
    assert circuits.giver_of(item) is None


def test_a_circuit_is_the_heads_that_the_sweep_puts_first(device: str, tmp_path: Path) -> None:
    dp, task = DePass(models.make("llama", torch.float64, device)), TASKS["circuits"]
    options = task.Options(data=data_file(tmp_path / "data.jsonl", dp), percent=(25,), methods="half")
    items = task.items(options)[:4]
    rows = list(task.measure(dp, task.prepare(dp, items, options), items, options))
    ids, answer, giver = (items[0].data[key] for key in ("prompt", "target", "giver"))
    scores = dp.sweep("heads", ids, Contrast(answer, giver), rule="half").scores[0].flatten()
    kept = set(scores.argsort(descending=True)[:3].tolist())
    off = {layer: [h for h in range(4) if layer * 4 + h not in kept] for layer in range(models.LAYERS)}
    means = masking.head_means(dp, [item.data["prompt"] for item in items[1:]])
    with masking.heads(dp, off, means=means):
        alone = logits(dp.model, ids)[-1]
    assert rows[0]["circuits"]["half"][0] == pytest.approx(float(alone[answer] - alone[giver]), rel=1e-5)


def test_scores_that_are_not_finite_are_errors_of_the_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dp, task = DePass(models.make("llama")), TASKS["circuits"]
    options = task.Options(data=data_file(tmp_path / "data.jsonl", dp), percent=(25,), methods="random")
    original = circuits.baselines.heads

    def poisoned(*arguments: Any, **named: Any) -> Any:
        sweep = original(*arguments, **named)
        sweep.scores[0, 1, 2] = math.nan
        return sweep

    monkeypatch.setattr(circuits.baselines, "heads", poisoned)
    items = task.items(options)[:2]
    rows = list(task.measure(dp, task.prepare(dp, items, options), items, options))
    assert [line["status"] for line in rows] == ["error", "error"]
    assert "a score by random is not finite" in rows[0]["reason"]


def test_one_prompt_has_no_other_and_unknown_methods_are_refused() -> None:
    task, dp = TASKS["circuits"], DePass(models.make("llama"))
    with pytest.raises(OptionError, match="1 of 1 prompts can be read; give two or more"):
        task.prepare(dp, [Item("0", {"prompt": [3, 4], "target": 5})], task.Options())
    with pytest.raises(OptionError, match="unknown method 'best'; choose from softmax"):
        task.Options(methods="half,best")
    with pytest.raises(OptionError, match="names 'half' twice"):
        task.Options(methods="half,half")
