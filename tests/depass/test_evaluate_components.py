"""Masking by score, on models of which one head, or one neuron, gives every answer: by construction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import tokens
import torch
from torch import Tensor

from depass import DePass, OptionError, cli, masking
from depass.evaluate import TASKS, components, run

ANSWER = 7
SHARED, WRITTEN = (
    0,
    31,
)  # of the stream's numbers: every token has the first, nothing but the one component writes the last


def toy(kind: str, device: str = "cpu") -> Any:
    """A random model of which only head 2 of layer 1 (or neuron 5 of layer 2) writes anything: the answer."""
    model = models.make("llama", device=device)
    embedded, unembedding = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embedded[:, SHARED], embedded[:, WRITTEN] = 3.0, 0.0
    unembedding[:, WRITTEN], unembedding[ANSWER] = 0.0, 0.0
    unembedding[ANSWER, WRITTEN] = 10.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    if kind == "heads":
        attention = model.model.layers[1].self_attn
        attention.v_proj.weight.data[8:].zero_()  # the second of two key/value heads, which heads 2 and 3 read
        attention.v_proj.weight.data[8, SHARED] = 1.0
        attention.o_proj.weight.data[WRITTEN, 16] = 30.0
    else:
        mlp = model.model.layers[2].mlp
        mlp.gate_proj.weight.data[5].zero_()
        mlp.up_proj.weight.data[5].zero_()
        mlp.gate_proj.weight.data[5, SHARED], mlp.up_proj.weight.data[5, SHARED] = 3.0, 3.0
        mlp.down_proj.weight.data[WRITTEN, 5] = 30.0
    return model


THE_ONE = {"heads": (1, 2), "neurons": (2, 5)}


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_without_the_one_component_the_answer_is_gone(kind: Any, device: str) -> None:
    dp, ids = DePass(toy(kind, device)), models.prompt(6)
    layers, count = models.LAYERS, 4 if kind == "heads" else 56
    one = torch.zeros(layers, count, dtype=torch.bool)
    one[THE_ONE[kind]] = True
    made = components.generated(dp, kind, ids, torch.stack([torch.zeros_like(one), one, ~one]), 3)
    assert made[0].tolist() == made[2].tolist() == [ANSWER] * 3
    assert ANSWER not in made[1]
    found, error = components.rankings(dp, kind, ids, ANSWER, kind == "neurons", 0)
    assert tuple(found) == components.RANKINGS[kind]
    assert error < 1e-5
    for name in ("depass", "|depass|", "attribution_patching", "|attribution_patching|"):
        assert divmod(int(found[name].argmax()), count) == THE_ONE[kind]
        assert torch.equal(components.masked(found[name], [0.1], "top")[0], one)
        assert not bool(components.masked(found[name], [90.0], "bottom")[0][THE_ONE[kind]])


def test_masks_take_the_highest_or_lowest_scored_part_of_all() -> None:
    scores = torch.tensor([[3.0, -1.0], [0.0, 5.0], [-4.0, 1.0], [2.0, 0.5]])
    top = components.masked(scores, [1, 25, 50, 100], "top")
    assert top.sum((1, 2)).tolist() == [1, 2, 4, 8]
    assert bool(top[0, 1, 1])
    assert top[1].nonzero().tolist() == [[0, 0], [1, 1]]
    bottom = components.masked(scores, [25], "bottom")
    assert bottom[0].nonzero().tolist() == [[0, 1], [2, 0]]


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """Without a cache, one prompt at a time."""
    made = list(ids)
    for _ in range(count):
        with torch.no_grad():
            logits: Tensor = model(torch.tensor([made], device=model.device), use_cache=False).logits
        made.append(int(logits[0, -1].argmax()))
    return made[len(ids) :]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2", "gpt-neox"])
def test_generating_under_masks_is_generating_again_and_again(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = models.make(name, torch.float64, device), models.prompt(9)
    masks = torch.rand(5, models.LAYERS, 4, generator=torch.Generator().manual_seed(1)) < 0.3
    made = components.generated(DePass(model), "heads", ids, masks, 6)
    assert len({tuple(row) for row in made.tolist()}) > 1
    for mask, row in zip(masks, made, strict=True):
        with masking.heads(model, {layer: mask[layer].nonzero()[:, 0].tolist() for layer in range(models.LAYERS)}):
            assert greedy(model, ids, 6) == row.tolist()
    monkeypatch.setattr(components, "_TOKENS", 20)
    assert torch.equal(components.generated(DePass(model), "heads", ids, masks, 6), made)


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_the_task_counts_every_row_and_goes_on(kind: str, device: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "rows.jsonl"
    rows: list[Any] = [{"prompt": models.prompt(5, seed), "target": ANSWER} for seed in range(4)]
    rows += [{"prompt": models.prompt(5), "target": 8}, {"prompt": [500], "target": ANSWER}, {"prompt": 3}]
    file.write_text("\n".join(map(json.dumps, rows)))
    task, dp, out = TASKS[kind], DePass(toy(kind, device)), tmp_path / "out"
    options = task.Options(data=str(file), percent=(20, 1, 50))
    report = run(task, dp, options, out).read_text()
    assert "7 items: 4 ok, 1 skipped, 2 errors." in report
    assert f"1 skipped: {components.WRONG}" in report
    assert "id 500 at position 0 is out of range" in report
    assert (out / f"{kind}.png").stat().st_size > 10_000
    lines = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    good = [line for line in lines if line["status"] == "ok"]
    for name, (top, bottom) in zip(components.RANKINGS[kind], good[0]["first"], strict=True):
        if "depass" in name or "patching" in name:
            assert (top, bottom) == ([0, 0, 0], [1, 1, 1]), name
    assert good[0]["generated"] == good[0]["first"]
    table = [line for line in report.splitlines() if line.startswith("| `depass`")]
    assert "| ranked by | 1 % | 20 % | 50 % | mean |" in report
    assert table[0] == "| `depass` | 0.00 | 0.00 | 0.00 | 0.000 [0.000, 0.000] |"
    assert table[1] == "| `depass` | 1.00 | 1.00 | 1.00 | 1.000 [1.000, 1.000] |"
    kept = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(kept[:3]))
    assert run(task, dp, options, out).read_text().split("##")[1:] == report.split("##")[1:]
    assert sorted((out / "rows.jsonl").read_text().splitlines(keepends=True)) == sorted(kept)


def test_a_model_that_gets_nothing_right_has_a_report(device: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": models.prompt(5), "target": 8}))
    task = TASKS["heads"]
    report = run(task, DePass(toy("heads", device)), task.Options(data=str(file)), tmp_path / "out")
    assert "answered no prompt right" in report.read_text()


@pytest.mark.parametrize("text", ["0", "101", "nan", "x"])
def test_what_is_no_percentage_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "heads", "--percent", text])
    assert "is not a number above 0 and at most 100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"percent": (1.0, 101)}, "percent must be a number above 0 and at most 100, got 101"),
        ({"percent": ()}, r"percent must be a tuple of at least one value, got \(\)"),
        ({"percent": [1.0]}, r"percent must be a tuple of at least one value, got \[1.0\]"),
        ({"positions": "first"}, "positions must be one of all, last, got 'first'"),
        ({"limit": 0}, "limit must be an integer of at least 1, got 0"),
        ({"seed": True}, "seed must be an integer of at least 0, got True"),
        ({"seed": None}, "seed must be an integer of at least 0, got None"),
        ({"data": Path("facts")}, "data must be of type str, got .*Path"),
    ],
)
def test_python_is_refused_what_the_command_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        TASKS["heads"].Options(**given)


def test_heads_and_neurons_have_defaults_of_their_own() -> None:
    heads, neurons = (TASKS[kind].Options() for kind in ("heads", "neurons"))
    assert (heads.data, heads.positions, heads.percent) == ("ioi", "all", (1, 2, 5, 10, 20, 30, 50))
    assert (neurons.data, neurons.positions, neurons.percent[0]) == ("facts", "last", 0.01)


def test_an_answer_is_a_whole_word_of_what_was_said() -> None:
    tokenizer = tokens.make()

    def said(text: str, answer: str) -> bool:
        return components.says(tokenizer, tokenizer.encode(text, add_special_tokens=False), [], answer)

    assert said(" the cat", " the")
    assert said(" the.", " the")
    assert said(" the", " the")
    assert not said(" theb", " the")
    assert not said(" b the", " the")
    assert components.says(None, [4, 5, 6], [4, 5], 4)
    assert not components.says(None, [5, 4], [4], 4)
    assert components.says(tokenizer, [4, 5, 6], [4], 4)  # a row of ids, though the model has a tokenizer
