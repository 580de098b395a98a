"""Where a position encoding depends on the length of the pass, no result depends on what else ran."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import models
import pytest
import torch
import transformers

from depass import DePass, GenerationWarning, baselines
from depass.models import capture
from depass.models.bind import bind
from depass.models.positions import Switch

LIMIT = 12
LONGROPE: dict[str, Any] = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 7.0, 10.0, 20.0]}
if int(transformers.__version__.partition(".")[0]) >= 5:  # before, no other keys are allowed
    LONGROPE |= {"rope_type": "longrope", "original_max_position_embeddings": LIMIT}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


def longrope() -> Any:
    lengths = {"original_max_position_embeddings": LIMIT, "max_position_embeddings": 64}
    return models.make("phi3", rope_scaling=LONGROPE, **lengths)


def dynamic(name: str = "llama") -> Any:
    return models.make(name, max_position_embeddings=LIMIT, rope_scaling=DYNAMIC)


MAKERS = {"longrope": longrope, "dynamic": dynamic}


def own_logit(make: Any, ids: list[int]) -> float:
    """The logit that a model which ran nothing before gives."""
    with torch.no_grad():
        return float(make()(torch.tensor([ids])).logits[0, -1, 5])


@pytest.mark.parametrize("kind", MAKERS)
def test_switches_are_found(kind: str) -> None:
    assert bind(MAKERS[kind]()).switches == (Switch(kind, LIMIT),)
    assert bind(models.make("llama")).switches == ()
    assert bind(models.make("gemma3")).switches == ()
    regimes = [bind(MAKERS[kind]()).regime(length) for length in (1, LIMIT, LIMIT + 1, LIMIT + 2)]
    assert [a == b for a, b in itertools.pairwise(regimes)] == [True, False, kind == "longrope"]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_prompt_does_not_depend_on_its_neighbours(kind: str) -> None:
    make = MAKERS[kind]
    lengths = [7, 20, 3, LIMIT, 25, LIMIT + 1, 20, 9]
    prompts = [models.prompt(length, seed) for seed, length in enumerate(lengths)]
    for order in (list(range(8)), [4, 0, 3, 5, 1, 7, 2, 6]):
        together = list(DePass(make()).attribute_many([prompts[i] for i in order], 5, batch_tokens=10_000))
        for i, found in zip(order, together, strict=True):
            alone = DePass(make()).attribute(prompts[i], 5, strict=True)
            assert float(found.target_logits) == pytest.approx(own_logit(make, prompts[i]), abs=1e-4)
            torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["leave_one_out", "input_x_gradient", "mean_attention"])
def test_baselines_do_not_depend_on_neighbours(kind: str, name: str) -> None:
    prompts = [models.prompt(length, length) for length in (6, LIMIT + 1, 18, LIMIT)]
    together = baselines.tokens(DePass(MAKERS[kind]()), name, prompts, 5)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = baselines.tokens(DePass(MAKERS[kind]()), name, [prompt], 5)
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_a_dynamic_encoding_does_not_remember_and_is_left_as_it_was(name: str) -> None:
    model = dynamic(name)
    dp, rotary = DePass(model), model.model.rotary_emb
    ids = models.prompt(20)
    expected = dp.attribute(ids, 5)
    with torch.no_grad():
        model(torch.tensor([models.prompt(40)]))  # the model's own run, which leaves longer frequencies behind

    def state() -> dict[str, Any]:
        return {k: v for k, v in {**vars(rotary), **rotary._buffers}.items() if "freq" in k or "cached" in k}

    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state().items()}
    found = dp.attribute(ids, 5)
    torch.testing.assert_close(found.scores, expected.scores)
    after = state()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(torch.as_tensor(after[key]), torch.as_tensor(value)), key


def test_generation_with_a_dynamic_encoding_does_not_remember() -> None:
    dp = DePass(dynamic())
    first = dp.generate(models.prompt(20), max_new_tokens=6, do_sample=False, eos_token_id=None).ids
    with torch.no_grad():
        dp.model(torch.tensor([models.prompt(60)]))
    again = dp.generate(models.prompt(20), max_new_tokens=6, do_sample=False, eos_token_id=None).ids
    assert again == first
    assert first[0] == dp.attribute(models.prompt(20)).targets[0].token_ids[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_model_keeps_its_own_frequencies(dtype: torch.dtype) -> None:
    model, ids = dynamic().to(dtype), models.prompt(10)
    own = model(torch.tensor([ids])).logits[0, -1, 5]
    torch.testing.assert_close(DePass(model).attribute(ids, 5).target_logits[0].to(own), own)


@pytest.mark.parametrize("kind", MAKERS)
def test_generation_across_the_switch_says_so(kind: str) -> None:
    dp = DePass(MAKERS[kind]())
    with pytest.warns(GenerationWarning, match=rf"\({kind}\) changes beyond {LIMIT} tokens"):
        dp.generate(models.prompt(LIMIT - 3), max_new_tokens=8, do_sample=False, eos_token_id=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GenerationWarning)
        made = dp.generate(models.prompt(LIMIT - 6), max_new_tokens=7, do_sample=False, eos_token_id=None)
        assert len(made.ids) == 7  # the last is generated by a pass over as many tokens as the switch has
        if kind == "longrope":
            dp.generate(models.prompt(LIMIT + 1), max_new_tokens=5, do_sample=False, eos_token_id=None)


def test_batches_keep_regimes_apart() -> None:
    bound = bind(longrope())
    lengths = [3, 30, 5, LIMIT, LIMIT + 1]
    assert list(capture.batches(bound, lengths, 1000)) == [[0, 2, 3], [4, 1]]
    assert list(capture.batches(bind(models.make("llama")), lengths, 1000)) == [[0, 2, 3, 4, 1]]
