"""What terminal and figures show of sweeps and of the model's own parts."""

from __future__ import annotations

import builtins
import dataclasses
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from results import EVIL, KINDS, TARGETS, attribution, survey, sweep

from depass import Attribution, DePassError, OutputError, SourceError, Survey, Sweep, Target, TargetError


def shown(made: Sweep | Attribution | Survey, width: int) -> str:
    out = io.StringIO()
    made.show(file=out, width=width)
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("columns", [3, 32, 64, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_keeps_to_the_terminals_width(kind: str, columns: int, width: int) -> None:
    text = shown(sweep(kind, columns=columns, bias=True), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrow_sweep_shows_every_number(kind: str) -> None:
    made = sweep(kind, bias=True)
    text = shown(made, 100)
    for scores in (made.scores, made.rest, made.bias):
        assert all(f"{score:+.2f}" in text for score in scores.flatten().tolist())
    assert "logit 12.50" in text
    assert all(re.search(rf"^ +{layer} ", text, re.M) for layer in made.layers)


def test_a_wider_sweep_shows_signs() -> None:
    made = sweep(columns=64)
    made.scores[0, 1] = torch.tensor([1.0, -1.0, 0.0, 0.0] * 16)
    made.scores[0, 2:] = 0
    made.scores[0, 0] = 1
    text = shown(made, 100)
    assert "+-··" * 16 in text
    assert "+" * 64 in text


def test_too_wide_a_sweep_lists_the_largest() -> None:
    made = sweep("neurons", columns=1536)
    text = shown(dataclasses.replace(made, targets=TARGETS[:1]), 80)
    assert set(re.findall(r"L\d+N\d+", text)) == {source.label for source, _ in made.top(20)}
    assert all(f"{score:+.2f}" in text for _, score in made.top(20))


def test_many_experts_are_a_map_where_the_terminal_is_wide_enough() -> None:
    made = sweep("experts", columns=128)
    made.scores[0, 1] = torch.tensor([1.0, -1.0, 0.0, 0.0] * 32)
    made = dataclasses.replace(made, targets=TARGETS[:1])
    assert "+-··" * 32 in shown(made, 160)
    for text in (shown(made, 100), shown(dataclasses.replace(sweep("experts", columns=257), targets=TARGETS[:1]), 400)):
        assert re.findall(r"L\d+E\d+", text)
        assert "+-··" not in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_survey_keeps_to_the_terminals_width(width: int) -> None:
    text = shown(survey((EVIL, *"abcdefghijkl"), bias=True), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text


def test_a_survey_shows_each_layers_heads_modules_and_largest_neurons() -> None:
    made = survey(("the", " cat", " sat"), rule="steer", bias=True)
    made.heads_by_position[0, 1, :] = torch.tensor([9.0, -9.0, 0.0])
    text = shown(dataclasses.replace(made, targets=made.targets[:1]), 100)
    assert "logit 12.50 = 3 tokens + bias + pattern" in text
    for layer in made.layers:
        (line,) = re.findall(rf"^ +{layer}  .*", text, re.M)
        assert all(f"{score:+.2f}" in line for score in made.modules[0, layer].tolist())
        best = made.neurons[0, layer].abs().argsort(descending=True)[:3]
        neurons = zip(made.neuron_ids[0, layer, best].tolist(), made.neurons[0, layer, best].tolist(), strict=True)
        assert re.findall(r"N\d+ [+-][\d.]+", line) == [f"N{number} {score:+.2f}" for number, score in neurons]
    assert re.search(r"^ +1  \+-· ", text, re.M)
    assert all(f"{score:+.2f}" in text for score in made.tokens[0, 0].tolist())


def test_of_a_long_prompt_a_survey_shows_the_largest_tokens() -> None:
    made = survey(tuple(f"w{i}" for i in range(300)))
    text = shown(dataclasses.replace(made, targets=made.targets[:1]), 80)
    best = made.tokens[0, 0].abs().argsort(descending=True)[:20].tolist()
    assert set(re.findall(r"\bw\d+", text)) == {f"w{index}" for index in best}
    assert "largest tokens at the input of layer 0:" in text


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    out = Terminal()
    sweep().show(file=out, width=80)
    assert re.search(r"\x1b\[[\d;]*48;2;", out.getvalue())
    assert "\x1b[31m" not in out.getvalue()  # the prompt's own


def test_components_show_by_name() -> None:
    made = attribution(9)
    text = shown(made, 80)
    for label, score in zip(["[bias]", "[rest]", *(f"L3H{i}" for i in range(9))], made.scores[0].tolist(), strict=True):
        assert label in text
        assert f"{score:+.2f}" in text


def test_of_many_components_the_terminal_shows_the_largest_and_the_others_sum() -> None:
    made = attribution(11008, "neuron")
    made = dataclasses.replace(made, targets=TARGETS[:1])
    text = shown(made, 80)
    order = made.scores[0, 2:].abs().argsort(descending=True)
    assert set(re.findall(r"L3N\d+", text)) == {f"L3N{i}" for i in order[:40].tolist()}
    assert "[10968 others]" in text
    assert f"{made.scores[0, 2 + order[40:]].sum().item():+.2f}" in text
    assert "sum of 11010 scores" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    assert "others" not in shown(attribution(60), 80)


@pytest.mark.parametrize("kind", [*KINDS, "many neurons", "many experts"])
@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_a_figure_is_drawn_as_its_suffix_says(kind: str, suffix: str, begins: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib, of the extra [plots]")
    made = sweep(kind.removeprefix("many "), columns=100 if "many" in kind else 3)
    made = dataclasses.replace(made, targets=(TARGETS[0], Target("$\\x$ costs", "token", 2)))
    path = tmp_path / f"plot{suffix}"
    made.plot(path, target=-1)
    assert path.read_bytes().startswith(begins)
    assert os.listdir(tmp_path) == [path.name]  # no temporary file is left


@pytest.mark.parametrize("count", [1, 3, 120, 1000])
@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_a_surveys_maps_are_drawn_as_the_suffix_says(count: int, suffix: str, begins: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib, of the extra [plots]")
    made = survey(tuple([EVIL, "$\\x$", "\n", "\u202e", *map(str, range(count))][:count]), rule="steer")
    path = tmp_path / f"plot{suffix}"
    made.plot(path, target=-1)
    assert path.read_bytes().startswith(begins)
    assert os.listdir(tmp_path) == [path.name]


def test_a_figure_that_cannot_be_drawn_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sweep()
    for drawn in (made, survey()):
        for name in ("plot.jpg", "plot"):
            with pytest.raises(OutputError, match=rf"{name}: the file name must end in one of \.png, \.svg, \.pdf"):
                drawn.plot(tmp_path / name)
        with pytest.raises(TargetError, match="target 2 is out of range: the number of targets is 2"):
            drawn.plot(tmp_path / "plot.png", target=2)
    pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib, of the extra [plots]")
    with pytest.raises(OutputError, match="No such file or directory"):
        made.plot(tmp_path / "none" / "plot.png")
    whole = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] in ("matplotlib", "pandas"):
            raise ImportError
        return whole(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for draw in (lambda: made.plot(tmp_path / "plot.png"), made.to_dataframe):
        with pytest.raises(DePassError, match=r"pip install 'depass-kernels\[plots\]'"):
            draw()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_saved_and_loaded_is_the_same(kind: str, tmp_path: Path) -> None:
    made = sweep(kind, bias=True)
    made.save(tmp_path / "sweep")
    loaded = Sweep.load(tmp_path / "sweep")
    for field in dataclasses.fields(Sweep):
        ours, theirs = getattr(made, field.name), getattr(loaded, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert os.listdir(tmp_path) == ["sweep"]
    with pytest.raises(OutputError, match="is not a saved attribution"):
        Attribution.load(tmp_path / "sweep")
    attribution(3).save(tmp_path / "attribution")
    with pytest.raises(OutputError, match="is not a saved sweep"):
        Sweep.load(tmp_path / "attribution")


def test_a_survey_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    made = survey(rule="dual_path", bias=True)
    made.save(tmp_path / "survey")
    loaded = Survey.load(tmp_path / "survey")
    for field in dataclasses.fields(Survey):
        ours, theirs = getattr(made, field.name), getattr(loaded, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert loaded.to_html() == made.to_html()
    assert os.listdir(tmp_path) == ["survey"]
    with pytest.raises(OutputError, match="is not a saved sweep"):
        Sweep.load(tmp_path / "survey")
    (tmp_path / "torn").write_bytes((tmp_path / "survey").read_bytes()[:-9])
    with pytest.raises(OutputError, match="cannot read"):
        Survey.load(tmp_path / "torn")


def test_a_surveys_dictionary_is_json_and_whole() -> None:
    made = survey(bias=True)
    again = json.loads(json.dumps(made.to_dict()))
    assert again["layers"] == [0, 1, 2, 3]
    for name in Survey.TENSORS:
        assert again[name] == getattr(made, name).tolist()


def test_a_surveys_largest_neurons_are_of_all_layers() -> None:
    made = survey()
    top = made.top_neurons(7, target=1)
    assert [abs(score) for _, score in top] == sorted(made.neurons[1].abs().flatten().tolist(), reverse=True)[:7]
    for source, score in top:
        assert source.label == f"L{source.layer}N{source.index}"
        (place,) = (made.neuron_ids[1, source.layer] == source.index).nonzero()[:, 0].tolist()
        assert made.neurons[1, source.layer, place].item() == score
    with pytest.raises(SourceError, match=r"top_neurons\(0\): k must be at least 1"):
        made.top_neurons(0)
    with pytest.raises(TargetError, match="target 2 is out of range"):
        made.top_neurons(target=2)


def test_a_sweeps_dictionary_is_json_and_whole() -> None:
    made = sweep("modules", bias=True)
    again = json.loads(json.dumps(made.to_dict()))
    assert (again["kind"], again["layers"], again["columns"]) == ("modules", [2, 3, 4, 5], [0, 1])
    for name in ("scores", "rest", "bias", "target_logits", "conservation_error"):
        assert again[name] == getattr(made, name).tolist()


def test_a_sweeps_data_frame_has_a_row_per_score() -> None:
    pytest.importorskip("pandas", reason="data frames are of the extra [plots]")
    made = sweep()
    frame = made.to_dataframe()
    assert len(frame) == made.scores.numel()
    for row, column in ((0, 0), (3, 2)):
        one = frame[(frame.target == EVIL) & (frame.layer == made.layers[row]) & (frame["index"] == column)]
        assert one.score.item() == made.scores[1, row, column].item()
        assert one.source.item() == made.source(row, column).label


def test_a_sweeps_top_is_the_largest_by_size_with_its_sign() -> None:
    made = sweep()
    top = made.top(5, target=1)
    assert [abs(score) for _, score in top] == sorted(made.scores[1].abs().flatten().tolist(), reverse=True)[:5]
    for source, score in top:
        assert source.layer is not None
        assert source.index is not None
        assert made.scores[1, made.layers.index(source.layer), source.index].item() == score
    with pytest.raises(SourceError, match=r"top\(0\): k must be at least 1"):
        made.top(0)
    with pytest.raises(TargetError, match="target -3 is out of range"):
        made.top(target=-3)
