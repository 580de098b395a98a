"""Generated tokens are the model's own, and each is attributed as a run on the ids before it would attribute it."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch

from depass import DePass, Heads, OptionError, SourceError, Spans, Token


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_every_generated_token_is_attributed_to_what_came_before(name: str, device: str) -> None:
    its, ids = models.make(name, torch.float64, device), models.prompt(6)
    dp = DePass(its)
    made = dp.generate(ids, max_new_tokens=5, eos_token_id=None)
    expected = its.generate(torch.tensor([ids], device=device), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert list(made.ids) == expected[0, 6:].tolist()
    assert made.attribution.scores.shape == (5, 6 + 4 + (name == "gpt2"))
    assert made.attribution.conservation_error.max() < 1e-6
    for i, token in enumerate(made.ids):
        one = dp.attribute([*ids, *made.ids[:i]], target=token)
        of_those = one.scores.shape[1]
        assert torch.allclose(made.attribution.scores[i, :of_those], one.scores[0], rtol=1e-5, atol=1e-6)
        assert not made.attribution.scores[i, of_those:].any()  # what came later is no source


def test_sampling_goes_to_the_models_generate(device: str) -> None:
    dp, ids = DePass(models.make("llama", device=device)), models.prompt(6)
    found = set()
    for seed in range(6):
        torch.manual_seed(seed)
        found.add(dp.generate(ids, max_new_tokens=4, do_sample=True, temperature=5.0, eos_token_id=None).ids)
    assert len(found) > 1
    torch.manual_seed(3)
    again = [dp.generate(ids, max_new_tokens=4, do_sample=True, top_k=3, eos_token_id=None).ids]
    torch.manual_seed(3)
    assert again == [dp.generate(ids, max_new_tokens=4, do_sample=True, top_k=3, eos_token_id=None).ids]


def test_spans_of_the_prompt_and_tokens_behind_it(smollm2_dp: DePass) -> None:
    prompt = "The capital of France is"
    made = smollm2_dp.generate(prompt, max_new_tokens=4, sources="word")
    assert made.text.startswith(" Paris")
    assert "".join(made.tokens) == made.text
    labels = [source.label for source in made.attribution.sources]
    assert labels == ["The", " capital", " of", " France", " is", *made.tokens[:-1]]
    spans = smollm2_dp.generate(prompt, max_new_tokens=3, sources=Spans([(3, 4)], labels=["country"]))
    assert [source.label for source in spans.attribution.sources] == ["rest", "country", *spans.tokens[:-1]]
    assert spans.attribution.prompt.text == prompt + "".join(spans.tokens[:-1])
    one = smollm2_dp.attribute(list(made.attribution.prompt.ids), target=Token(made.ids[2], position=6))
    assert abs(float(one.target_logits[0] - made.attribution.target_logits[2])) < 1e-3


def test_the_model_may_end_at_once(device: str) -> None:
    its, ids = models.make("llama", device=device), models.prompt(6)
    first = DePass(its).generate(ids, max_new_tokens=3, eos_token_id=None).ids[0]
    made = DePass(its).generate(ids, max_new_tokens=3, eos_token_id=first)
    assert made.ids == (first,)
    assert made.attribution.scores.shape == (1, 6)


def test_what_cannot_be_generated_is_named() -> None:
    dp, ids = DePass(models.make("llama")), models.prompt(6)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"max_new_tokens": 0}, OptionError, "max_new_tokens must be a positive integer, got 0"),
        ({"max_new_tokens": 315}, OptionError, "has 320 positions"),
        ({"num_return_sequences": 2}, OptionError, r"generate\(num_return_sequences=...\)"),
        ({"no_such_option": 2}, OptionError, "generate rejected these options.*no_such_option"),
        ({"sources": Heads(1)}, OptionError, "does not support Heads as sources; use .* or call attribute"),
        ({"sources": Spans([(0, 9)])}, SourceError, "outside the prompt, which has 6 tokens"),
    ]
    for options, error, says in wrong:
        with pytest.raises(error, match=says):
            dp.generate(ids, **options)


def test_more_sequences_of_the_models_own_configuration_change_nothing(device: str) -> None:
    """The first of several rows would be padded to the longest, and its padding attributed as if it had been generated."""
    model = models.make("llama", torch.float32, device)
    config = model.generation_config
    config.do_sample, config.eos_token_id, config.pad_token_id = True, list(range(1, 60)), 100
    for several in (1, 4):
        config.num_return_sequences, config.num_beams = several, 1
        for seed in range(6):
            torch.manual_seed(seed)
            ids = DePass(model).generate(models.prompt(5), max_new_tokens=8).ids
            assert all(token >= 60 or token == 0 for token in ids[:-1])  # it ends with the first end of a sequence
            assert 100 not in ids or several == 1
