"""Generated tokens are the model's own, and each is attributed as a run on the ids before it would attribute it."""

from __future__ import annotations

from typing import Any

import models
import pytest
import tokens
import torch
import transformers

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
        ({"position_ids": torch.arange(6)[None]}, OptionError, r"generate\(position_ids=...\)"),
        ({"generation_config": {"do_sample": False}}, OptionError, r"pass its entries as arguments: \*\*config"),
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


# every option of transformers' GenerationConfig, by what it does here; docs/explain.md has the same table
CHOOSE = {  # which tokens are generated: the options are the model's own
    "bad_words_ids": [[5]], "begin_suppress_tokens": [5], "diversity_penalty": None, "do_sample": True, "dola_layers": None,
    "epsilon_cutoff": 0.0003, "eta_cutoff": 0.0003, "exponential_decay_length_penalty": (2, 1.5), "force_words_ids": None,
    "constraints": None, "guidance_scale": 1.5, "length_penalty": 0.5, "min_p": 0.1, "no_repeat_ngram_size": 2,
    "num_beams": 3, "num_beam_groups": None, "early_stopping": True, "penalty_alpha": None, "remove_invalid_values": True,
    "renormalize_logits": True, "repetition_penalty": 1.5, "sequence_bias": {(5,): 3.0}, "suppress_tokens": [5, 6],
    "temperature": 3.0, "top_h": None, "top_k": 5, "top_p": 0.5, "typical_p": 0.5, "watermarking_config": None,
    "forced_bos_token_id": 9, "forced_eos_token_id": 9,
}  # fmt: skip
STOP = {"eos_token_id": 7, "max_time": 100.0, "min_length": 12, "min_new_tokens": 4, "stop_strings": ["a"]}
SPEED = {  # how the same tokens are computed
    "assistant_confidence_threshold": None, "assistant_early_exit": None, "assistant_ensemble_weight": None,
    "assistant_lookbehind": None, "cache_config": None, "cache_implementation": "dynamic", "compile_config": None,
    "continuous_batching_config": None, "disable_compile": True, "is_assistant": False, "low_memory": None,
    "max_cache_len": None, "max_matching_ngram_size": 2, "num_assistant_tokens": None,
    "num_assistant_tokens_schedule": None, "prefill_chunk_size": 3, "prompt_lookup_num_tokens": 2,
    "speculation_type": None, "target_lookbehind": None, "use_cache": False, "use_mtp": None,
}  # fmt: skip
NO_EFFECT = {  # of encoder-decoder models, of padding, or of outputs that DePass does not return
    "bos_token_id": 4, "decoder_start_token_id": 4, "encoder_no_repeat_ngram_size": None,
    "encoder_repetition_penalty": None, "output_attentions": False, "output_hidden_states": False,
    "output_logits": False, "output_scores": False, "pad_token_id": 9, "transformers_version": None,
    "_from_model_config": None, "max_length": 9, "return_legacy_cache": None, "_commit_hash": None,
}  # fmt: skip
OF_DEPASS = ("max_new_tokens", "num_return_sequences", "return_dict_in_generate")
REFUSED = ("token_healing",)


def test_every_option_of_generation_is_in_the_table() -> None:
    known = {*CHOOSE, *STOP, *SPEED, *NO_EFFECT, *OF_DEPASS, *REFUSED}
    unknown = vars(transformers.GenerationConfig()).keys() - known
    assert not unknown, "say in docs/explain.md what these options do, or refuse them"


TRIED = {name: value for name, value in {**CHOOSE, **STOP, **SPEED, **NO_EFFECT}.items() if value is not None}


@pytest.mark.parametrize("name", TRIED)
def test_an_option_has_its_meaning_whether_it_is_given_or_the_models(name: str) -> None:
    """The generated ids are those that the model's own generate appends with the option."""
    model, tokenizer, ids = models.make("llama"), tokens.make(), models.prompt(6)
    sampled = {"do_sample": True} if name in ("temperature", "top_k", "top_p", "min_p", "typical_p") else {}
    given = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **sampled, name: TRIED[name]}
    helper = {"tokenizer": tokenizer} if name == "stop_strings" else {}
    if name in ("length_penalty", "early_stopping"):
        given["num_beams"] = 2
    if name in ("exponential_decay_length_penalty", "prompt_lookup_num_tokens"):
        given["eos_token_id"] = 7
    torch.manual_seed(0)
    its = model.generate(torch.tensor([ids]), max_new_tokens=8, **given, **helper)[0].tolist()
    assert its[:6] == ids
    torch.manual_seed(0)
    assert list(DePass(model, tokenizer).generate(ids, max_new_tokens=8, **given).ids) == its[6:]
    for option, of_model in given.items():
        setattr(model.generation_config, option, of_model)
    torch.manual_seed(0)
    assert list(DePass(model, tokenizer).generate(ids, max_new_tokens=8).ids) == its[6:]


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_change_the_prompt_are_refused(name: str) -> None:
    model, ids = models.make("llama"), models.prompt(6)
    config = transformers.GenerationConfig(**{name: True})
    for options in ({name: True}, {"generation_config": config}):
        with pytest.raises(OptionError, match=f"{name} changes .*; pass {name}=False"):
            DePass(model, tokens.make()).generate(ids, **options)
    setattr(model.generation_config, name, True)
    with pytest.raises(OptionError, match=f"{name} changes .*; pass {name}=False"):
        DePass(model, tokens.make()).generate(ids)
    assert DePass(model, tokens.make()).generate(ids, max_new_tokens=2, **{name: False}).ids


def test_a_generate_that_returns_another_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.make("llama")
    monkeypatch.setattr(model, "generate", lambda ids, **_: torch.cat([ids[:, 1:], ids], 1))
    with pytest.raises(OptionError, match="generate changed the prompt of 6 tokens"):
        DePass(model).generate(models.prompt(6))
