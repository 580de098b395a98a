"""The DePass that the paper on Dual Path Attribution measured: as their code computes it, and that it does not add up."""

from __future__ import annotations

from typing import Any

import dual_path as oracle
import models
import pytest
import torch

from depass import DePass, ModelError, OptionError
from depass.compat import dual_path

LENGTHS = (5, 9, 7, 2)


def batch(first: int = 0) -> tuple[list[list[int]], list[int], list[range]]:
    prompts = [models.prompt(length, i) for i, length in enumerate(LENGTHS)]
    return prompts, [3, 50, 7, 20], [range(first, length) for length in LENGTHS]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("chunk", [1, 3, 4, 64])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "qwen3"])
def test_scores_are_those_of_their_loop(name: str, chunk: int, first: int) -> None:
    model: Any = models.make(name)
    model.set_attn_implementation("eager")
    prompts, targets, contexts = batch(first)
    expected = oracle.scores(model, prompts, targets, contexts, chunk)
    found = dual_path.token_scores(DePass(model).bound, prompts, targets, contexts, chunk)
    for of_prompt, theirs in zip(found, expected, strict=True):
        for position, score in enumerate(of_prompt.scores.tolist()):
            assert score == pytest.approx(theirs.get(position, 0.0), abs=2e-5)


def test_a_prompts_scores_depend_on_the_batch_and_on_the_chunk() -> None:
    bound = DePass(models.make("llama")).bound
    prompts, targets, contexts = batch()
    (alone,) = dual_path.token_scores(bound, prompts[1:2], targets[1:2], contexts[1:2])
    second = dual_path.token_scores(bound, prompts[:2], targets[:2], contexts[:2])[1]
    (wide,) = dual_path.token_scores(bound, prompts[1:2], targets[1:2], contexts[1:2], 64)
    assert float((alone.scores - second.scores).abs().max()) > 1e-3
    assert float((alone.scores - wide.scores).abs().max()) > 1e-3


def test_scores_add_up_only_where_one_chunk_holds_the_whole_prompt_and_there_is_no_bias() -> None:
    model = models.make("llama", torch.float64)
    bound = DePass(model).bound
    model.config.rms_norm_eps = 1e-7
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-7
    prompts, targets, contexts = batch()
    for whole in dual_path.token_scores(bound, prompts, targets, contexts, sum(LENGTHS)):
        assert whole.conservation_error < 1e-6
    cut = dual_path.token_scores(bound, prompts, targets, contexts)
    assert cut[1].conservation_error > 1e-3
    with torch.no_grad():
        logit = float(model(torch.tensor([prompts[1]])).logits[0, -1, targets[1]])
    total, size = float(cut[1].scores.sum()), float(cut[1].scores.abs().sum())
    assert cut[1].logit == pytest.approx(logit, abs=1e-6)
    assert cut[1].conservation_error == pytest.approx(abs(total - logit) / max(abs(logit), size), rel=1e-4)


def test_other_families_and_chunks_are_refused() -> None:
    prompts, targets, contexts = batch()
    with pytest.raises(ModelError, match=r"the DePass of Dual Path Attribution: .* has .*; leave depass_dpa out"):
        dual_path.token_scores(DePass(models.make("gemma3")).bound, prompts, targets, contexts)
    with pytest.raises(OptionError, match="chunk must be an integer of at least 1, got 0"):
        dual_path.token_scores(DePass(models.make("llama")).bound, prompts, targets, contexts, 0)
