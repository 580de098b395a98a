"""The second real model: Gemma 3 270M, a base model with BOS, sliding windows and norms on both sides of its sublayers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from depass import DePass, Heads, Spans, cli

PROMPT = "Catalonia belongs to the continent of"


def test_its_tokens_are_those_of_the_published_tokenizer(gemma_dp: DePass) -> None:
    """As llama.cpp splits the text by the scores that the file gives to the tokens."""
    result = gemma_dp.attribute(PROMPT)
    assert result.prompt.ids == (2, 77386, 13577, 19681, 531, 506, 30817, 529)
    assert result.prompt.tokens[:3] == ("<bos>", "Catal", "onia")
    text = "  El Niño, 世界 🦜\n\t12"
    assert gemma_dp.tokenizer.decode(gemma_dp.tokenizer(text)["input_ids"][1:]) == text


def test_it_says_europe(gemma_dp: DePass) -> None:
    result = gemma_dp.attribute(PROMPT)
    assert result.targets[0].label == " Europe"
    logits = gemma_dp.model(torch.tensor([result.prompt.ids], device=gemma_dp.model.device)).logits[0, -1]
    assert logits.softmax(-1).max().item() == pytest.approx(0.53, abs=0.005)
    assert result.settings.model == "gemma3-270m"
    assert result.settings.dtype == "float32"
    assert result.settings.exclude_bos


@pytest.mark.parametrize(
    ("prompt", "target", "scores"),
    [
        (PROMPT, " Europe", [-0.888, 3.745, 0.811, 2.089, 1.108, 1.526, 6.886, 1.732]),
        (
            "The Eiffel Tower stands in the city of",
            " Paris",
            [-0.509, 1.348, 8.380, 1.099, 1.135, 1.407, 1.145, 7.965, 2.137],
        ),
    ],
)
def test_its_scores_are_these(prompt: str, target: str, scores: list[float], gemma_dp: DePass) -> None:
    """They were so on the day that the model came; weights, tokenizer or method would change them."""
    result = gemma_dp.attribute(prompt, target=target)
    torch.testing.assert_close(result.scores[0].cpu(), torch.tensor(scores), rtol=0, atol=2e-3)
    assert result.conservation_error.max() < 1e-5


@pytest.mark.parametrize("rule", ["max", "relu", "linear", "taylor", "half"])
def test_the_parts_add_up_under_every_rule(rule: str, gemma_dp: DePass) -> None:
    assert gemma_dp.attribute(PROMPT, rule=rule).conservation_error.max() < 1e-5
    assert gemma_dp.attribute(PROMPT, sources=Heads(17), rule=rule).conservation_error.max() < 1e-5


def test_beyond_its_sliding_window_the_parts_add_up(gemma_dp: DePass) -> None:
    """A window has 512 positions."""
    ids = [2, *torch.randint(300, 200_000, (560,), generator=torch.Generator().manual_seed(0)).tolist()]
    result = gemma_dp.attribute(ids, sources=Spans([(1, 40), (40, 561)]))
    assert result.conservation_error.max() < 1e-5


def test_the_command_knows_its_name(gemma_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["attribute", PROMPT, "-m", "gemma3-270m"]) == 0
    assert capsys.readouterr().out.startswith("' Europe' (p 0.53) after token 8 (' of'): logit 17.01")
    assert cli.main(["plan", "--tokens", "100", "-m", "gemma3-270m"]) == 0
    assert capsys.readouterr().out.startswith("gemma3-270m, float32, on cpu: 100 tokens")
