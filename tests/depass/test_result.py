"""The result: reading it, summing it up, saving, loading and drawing it."""

from __future__ import annotations

import builtins
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import tokens
import torch

from depass import Attribution, Contrast, DePass, DePassError, OutputError, SourceError, Spans, TargetError, TopK

TEXT = '<bos>the cat sat. A <b>cat</b>\nsat & "sat"'


@pytest.fixture(scope="module")
def res(device: str) -> Attribution:
    dp = DePass(models.make("gpt2", device=device), tokens.make())
    return dp.attribute(TEXT, target=[TopK(2), " cat", Contrast("A", "b", position=4)])


def test_its_shape_is_targets_by_sources(res: Attribution) -> None:
    assert res.scores.shape == (4, len(res.sources)) == (4, 1 + len(res.prompt.ids))
    assert res.scores.dtype == res.target_logits.dtype == res.conservation_error.dtype == torch.float32
    assert res.scores.device.type == "cpu"
    assert [target.kind for target in res.targets] == ["token", "token", "token", "contrast"]
    assert res.targets[2].label == " cat"
    assert res.targets[3].position == 4


def test_it_cannot_be_changed(res: Attribution) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        res.scores = torch.zeros(1)  # type: ignore[misc]


def test_top_is_the_largest_by_size_with_its_sign(res: Attribution) -> None:
    top = res.top(3, target=1)
    assert [abs(score) for _, score in top] == sorted(res.scores[1].abs().tolist(), reverse=True)[:3]
    source, score = top[0]
    assert score == res.scores[1][res.sources.index(source)].item()
    assert len(res.top(1000)) == len(res.sources)
    with pytest.raises(SourceError, match=r"top\(0\)"):
        res.top(0)
    with pytest.raises(TargetError, match="target 4 is out of range: the number of targets is 4"):
        res.top(3, target=4)


@pytest.mark.parametrize("unit", ["word", "sentence"])
def test_aggregated_scores_still_add_up(res: Attribution, unit: str) -> None:
    summed = res.aggregate(unit)
    assert torch.allclose(summed.scores.sum(1), res.scores.sum(1), atol=1e-5)
    assert summed.sources[0].kind == "bias"
    assert "".join(source.label for source in summed.sources[1:]) == TEXT
    assert len(summed.sources) < len(res.sources)
    assert summed.settings.aggregated == unit
    with pytest.raises(SourceError, match="these sources are not tokens"):
        summed.aggregate("word")
    with pytest.raises(SourceError, match="unknown unit 'paragraph'"):
        res.aggregate("paragraph")


def test_saved_and_loaded_it_is_the_same(res: Attribution, tmp_path: Path) -> None:
    path = tmp_path / "res.safetensors"
    for original in (res, res.aggregate("word")):
        original.save(path)
        loaded = Attribution.load(path)
        for field in dataclasses.fields(Attribution):
            ours, theirs = getattr(original, field.name), getattr(loaded, field.name)
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert os.listdir(tmp_path) == ["res.safetensors"]  # no temporary file is left


def test_loading_needs_neither_model_nor_transformers(res: Attribution, tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="rich is not installed, though the package depends on it")
    res.save(tmp_path / "res.safetensors")
    code = (
        "import sys; from depass import Attribution; r = Attribution.load(sys.argv[1]); r.show(); r.to_html(); "
        "sys.exit(1 if 'depass.models.capture' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "res.safetensors")], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_is_no_result_does_not_load(res: Attribution, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other, broken = tmp_path / "other.safetensors", tmp_path / "broken"
    save_file({"scores": torch.zeros(1)}, other)
    broken.write_bytes(b"nothing of the kind")
    for path, says in (
        (other, "is not a saved attribution"),
        (broken, "cannot read"),
        (tmp_path / "none", "cannot read"),
    ):
        with pytest.raises(OutputError, match=says):
            Attribution.load(path)


def test_it_cannot_be_saved_where_nothing_can_be_written(res: Attribution, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="it is a directory"):
        res.save(tmp_path)
    with pytest.raises(OutputError, match="No such file or directory"):
        res.to_html(tmp_path / "none" / "page.html")


def test_links_are_followed_and_pipes_stay_pipes(res: Attribution, tmp_path: Path) -> None:
    real, link, pipe = tmp_path / "real.html", tmp_path / "link.html", tmp_path / "pipe"
    real.write_text("old")
    link.symlink_to(real)
    res.to_html(link)
    assert link.is_symlink()
    assert real.read_text() == res.to_html()
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE)
    res.to_html(pipe)
    assert reader.communicate(timeout=20)[0].decode() == res.to_html()
    assert pipe.is_fifo()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_no_file_can_have_are_found_beforehand(res: Attribution, name: str, tmp_path: Path) -> None:
    from depass.files import check_writable

    with pytest.raises(OutputError, match="cannot write"):
        check_writable(tmp_path / name)
    check_writable(tmp_path / ("x" * 250))


def test_a_data_frame_has_a_row_per_score(res: Attribution, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    frame = res.to_dataframe()
    assert len(frame) == res.scores.numel()
    assert frame.groupby("target", sort=False)["score"].sum().iloc[0] == pytest.approx(
        res.target_logits[0].item(), rel=1e-4
    )
    assert frame["start"].isna().sum() == len(res.targets)  # the bias source lies nowhere

    whole = builtins.__import__

    def without_pandas(name: str, *rest: Any) -> Any:
        if name == "pandas":
            raise ImportError
        return whole(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(DePassError, match=r"pip install 'depass-kernels\[plots\]'"):
        res.to_dataframe()


def test_the_dictionary_is_json(res: Attribution) -> None:
    again = json.loads(json.dumps(res.to_dict()))
    assert again["scores"][0] == res.scores[0].tolist()
    assert again["targets"][2]["label"] == " cat"


def shown(res: Attribution, width: int = 80) -> str:
    pytest.importorskip("rich", reason="rich is not installed, though the package depends on it")
    out = io.StringIO()
    res.show(file=out, width=width)
    return out.getvalue()


def test_the_strip_reads_without_colour(res: Attribution) -> None:
    text = shown(res)
    assert "\x1b" not in text
    assert "[bias]" in text
    for score in res.scores.flatten().tolist():
        assert f"{score:+.2f}" in text
    assert f"logit {res.target_logits[0]:.2f}" in text
    assert all(len(line) <= 80 for line in text.splitlines() if "logit" not in line)
    for upper, lower in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if "[bias]" in upper:  # every score starts under its source
            assert next(re.finditer(r"[+-]\d", lower)).start() == upper.index("[bias]")


def test_the_strip_shows_no_control_characters(device: str) -> None:
    ids = [5, 6, 7]

    class Evil:
        all_special_ids: tuple[int, ...] = ()
        bos_token_id = None

        def encode(self, text: str, **_: Any) -> list[int]:
            return ids

        def decode(self, some: list[int], **_: Any) -> str:
            return "".join("\x1b[31m\u202eevil\n" for _ in some)

    text = shown(DePass(models.make("llama", device=device), Evil()).attribute(ids))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "evil↵" in text


def test_the_strip_names_the_rest(device: str) -> None:
    dp = DePass(models.make("llama", device=device), tokens.make())
    assert "[rest]" in shown(dp.attribute("the cat sat at the cat", sources=Spans([(1, 3), (5, 6)])))
