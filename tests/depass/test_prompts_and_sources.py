"""Prompts as text, chat and ids; what they are decomposed into; and one clear line for what cannot be."""

from __future__ import annotations

import copy
from typing import Any

import models
import numpy as np
import pytest
import tokens
import torch
import transformers

from depass import (
    Contrast,
    DePass,
    Family,
    ModelError,
    Neurons,
    OptionError,
    Prompt,
    PromptError,
    SourceError,
    Spans,
    TargetError,
    Token,
    TopK,
    baselines,
)
from depass.models import attention


@pytest.fixture(scope="module")
def dp(device: str) -> DePass:
    return DePass(models.make("llama", device=device), tokens.make())


@pytest.fixture(scope="module")
def without_tokenizer(device: str) -> DePass:
    return DePass(models.make("llama", device=device))


def test_text_chat_and_ids_are_the_same_prompt(dp: DePass) -> None:
    text = dp.attribute("the cat sat at the cat.")
    assert "".join(text.prompt.tokens) == text.prompt.text == "the cat sat at the cat."
    for ids in (list(text.prompt.ids), torch.tensor(text.prompt.ids), torch.tensor(text.prompt.ids).numpy()):
        again = dp.attribute(ids)
        assert again.prompt == text.prompt
        assert torch.equal(again.scores, text.scores)
    chat = dp.attribute([{"role": "user", "content": "the cat"}])
    assert chat.prompt.text == "<bos>user the cat<eos><bos>"
    assert chat.prompt.tokens[0] == "<bos>"
    assert chat.prompt.special == {0, len(chat.prompt.ids) - 2, len(chat.prompt.ids) - 1}


def test_the_bos_token_is_excluded_where_it_is_one(dp: DePass) -> None:
    bos, other = [1, *models.prompt(5)], models.prompt(6)
    assert dp.attribute(bos).settings.exclude_bos
    assert not dp.attribute(other).settings.exclude_bos
    assert dp.attribute(other, exclude_bos=True).settings.exclude_bos
    assert not dp.attribute(bos, exclude_bos=False).settings.exclude_bos
    assert not dp.attribute(bos, sources=Spans([(0, 2)])).settings.exclude_bos
    assert dp.attribute(bos, sources=Spans([(0, 1)])).settings.exclude_bos


def test_words_and_sentences_follow_the_text(dp: DePass) -> None:
    words = dp.attribute("<bos>the cat sat. A cat\nsat", sources="word")
    assert [s.label for s in words.sources] == ["<bos>", "the", " cat", " sat.", " A", " cat", "\nsat"]
    assert all(s.kind == "span" for s in words.sources)
    sentences = dp.attribute("<bos>the cat sat. A cat\nsat", sources="sentence")
    assert [s.label for s in sentences.sources] == ["<bos>", "the cat sat.", " A cat", "\nsat"]
    assert words.sources[-1].end == len(words.prompt.ids)


def test_a_token_with_line_breaks_belongs_to_the_sentence_before_them() -> None:
    tokens = ("A", " b", ".\n\n", "C", "\n---\n", "D", ".")  # as in tokenizers that join punctuation and line breaks
    offsets = ((0, 1), (2, 3), (3, 6), (6, 7), (8, 12), (12, 13), (13, 14))
    made = Prompt(tuple(range(7)), tokens, "".join(tokens), offsets)
    lines = ["C", "\n---\n", "D."]
    for unit, expected in (("sentence", ["A b.\n\n", *lines]), ("word", ["A", " b.\n\n", *lines])):
        assert ["".join(tokens[begin:end]) for begin, end in made.segments(unit)] == expected


def test_character_spans_take_the_tokens_that_they_touch(dp: DePass) -> None:
    text = "the cat sat at the cat"
    res = dp.attribute(text, sources=Spans([(15, 22), (4, 7)], unit="char", labels=["second", "first"]))
    assert [s.label for s in res.sources] == ["rest", "first", "second"]
    for source, expected in zip(res.sources[1:], (" cat", " the cat"), strict=True):
        assert "".join(res.prompt.tokens[source.start : source.end]) == expected
    assert torch.allclose(res.scores.sum(1), res.target_logits, rtol=1e-5)


def test_token_spans_are_half_open_and_rest_is_the_rest(dp: DePass) -> None:
    res = dp.attribute(models.prompt(6), sources=Spans([(4, 6), (0, 1)]))
    assert [(s.kind, s.start, s.end) for s in res.sources] == [("rest", None, None), ("span", 0, 1), ("span", 4, 6)]
    whole = dp.attribute(models.prompt(6), sources=Spans([(0, 6)]))
    assert [s.kind for s in whole.sources] == ["span"]
    assert whole.scores[0, 0].item() == pytest.approx(whole.target_logits[0].item(), rel=1e-5)


def test_a_character_of_several_tokens_is_one_part(smollm2_dp: DePass) -> None:
    text = "a 🦜 says 世界"
    for given in (text, smollm2_dp.tokenizer(text)["input_ids"]):
        res = smollm2_dp.attribute(given, sources=Spans([(0, 1), (2, 3), (9, 11)], unit="char"))
        assert [s.label.strip() for s in res.sources] == ["rest", "a", "🦜", "世界"]
        assert "".join(res.prompt.tokens) == text
        assert [(s.start, s.end) for s in res.sources[1:]] == [(0, 1), (1, 4), (6, 11)]
        assert [s.label for s in smollm2_dp.attribute(given, sources="word").sources] == ["a", " 🦜", " says", " 世界"]


def test_a_begun_answer_is_continued(dp: DePass) -> None:
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "a cat"}]
    assert dp.attribute(messages).prompt.text == "<bos>user the<eos><bos>assistant a cat"


def test_biases_have_a_source_of_their_own_exactly_where_the_weights_have_them(device: str) -> None:
    for name, has in (("llama", False), ("llama-biased", True), ("qwen2", True), ("gpt2", True), ("olmo2", False)):
        res = DePass(models.make(name, device=device)).attribute(models.prompt(4))
        assert (res.sources[0].kind == "bias") == has
        assert len(res.sources) == 4 + has


ONE_PROMPT = "expected one prompt"


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        (torch.tensor([], dtype=torch.int64), "the prompt is empty"),
        (torch.zeros(2, 4, dtype=torch.int64), rf"{ONE_PROMPT}, got a batch of shape \[2, 4\]"),
        ([[1, 2], [3, 0]], f"{ONE_PROMPT}, got a batch with 2 rows"),
        (["one", "two"], f"{ONE_PROMPT}, got a batch with 2 rows"),
        (["one"], f"{ONE_PROMPT}, got a batch with 1 rows"),
        ({"input_ids": 5}, "expected a string, chat messages or token ids, got dict"),
        ({"text": "one", "label": 1}, f"{ONE_PROMPT}, got a mapping with text, label"),
        (
            {"input_ids": torch.zeros(2, 3), "attention_mask": torch.ones(2, 3)},
            f"{ONE_PROMPT}, got a batch with 2 rows; pass its rows: attribute_many",
        ),
        ([5, 101], "id 101 at position 1 is out of range: the vocabulary has 101 tokens"),
        ([-1], "id -1 at position 0"),
        ([1.5, 2.0], "token ids must be integers, got 1.5"),
        ([True], "integers, got True"),
        ([torch.tensor(5.7)], "token ids must be integers"),
        ({5, 6}, "got set"),
        ("bad \udcff", "bytes that are not UTF-8"),
        (None, "expected a string, chat messages or token ids, got NoneType"),
        (7, "got int"),
        (torch.tensor(7), "got Tensor"),
        ([1] * 321, "the prompt has 321 tokens, .* has 320 positions"),
        ([{"role": "user"}, {"rôle": 1}], None),
    ],
)
def test_what_is_no_prompt_is_refused(dp: DePass, prompt: Any, says: str | None) -> None:
    if says is None:  # templates forgive missing keys; a broken one must not
        broken = tokens.make()
        broken.chat_template = "{{ raise_exception('roles must alternate') }}"
        dp, says = DePass(dp.model, broken), "chat template rejected these messages: .*roles must alternate"
    with pytest.raises(PromptError, match=says) as error:
        dp.attribute(prompt)
    assert "\n" not in str(error.value)


def test_ids_need_no_tokenizer_and_text_does(without_tokenizer: DePass) -> None:
    res = without_tokenizer.attribute([5, 6, 7], target=9)
    assert res.prompt.tokens == ("5", "6", "7")
    with pytest.raises(PromptError, match="needs a tokenizer"):
        without_tokenizer.attribute("the cat")
    with pytest.raises(PromptError, match="a chat prompt needs a tokenizer"):
        without_tokenizer.attribute([{"role": "user", "content": "hi"}])
    with pytest.raises(TargetError, match="target ' cat' needs a tokenizer"):
        without_tokenizer.attribute([5, 6], target=" cat")
    with pytest.raises(SourceError, match="words need text"):
        without_tokenizer.attribute([5, 6], sources="word")
    with pytest.raises(SourceError, match="character spans need text"):
        without_tokenizer.attribute([5, 6], sources=Spans([(0, 1)], unit="char"))


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        (Spans([(0, 3), (2, 4)]), r"token spans \(0, 3\) and \(2, 4\) overlap"),
        (Spans([(3, 4), (0, 4)]), "overlap"),
        (Spans([(0, 10)]), "outside the prompt, which has 9 tokens"),
        (Spans([(-1, 2)]), "outside"),
        (Spans([(2, 2)]), "is empty or outside"),
        (Spans([(5, 3)]), "is empty or outside"),
        (Spans([(0, 23)], unit="char"), "outside the prompt, which has 22 chars"),
        (Spans([(0, 1)], unit="byte"), "Spans\\(unit='byte'\\): the unit must be 'token' or 'char'"),  # type: ignore[arg-type]
        (Spans([(0, 1, 2)]), r"a span must be a pair of integers \(begin, end\), got \(0, 1, 2\)"),  # type: ignore[list-item]
        (Spans([("a", "b")]), "a span must be a pair"),  # type: ignore[list-item]
        (Spans([(0.5, 2.7)]), "a pair of integers"),  # type: ignore[list-item]
        (Spans(5), "a list of pairs"),  # type: ignore[arg-type]
        (Spans([(0, 1)], labels=[1]), "must be a list of strings, got \\[1\\]"),  # type: ignore[list-item]
        (Spans([]), r"Spans\(\[\]\) is empty; give at least one span"),
        (
            Spans([(0, 1)], labels=["a", "b"]),
            "labels of Spans must be one string per source: got 2 labels for 1 sources",
        ),
        ("paragraph", "unknown unit 'paragraph'; choose one of: token, word, sentence"),
        (5, "sources must be 'token'"),
    ],
)
def test_spans_that_are_none_are_refused(dp: DePass, sources: Any, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        dp.attribute("the cat sat at the cat", sources=sources)


def test_spans_of_an_iterator_serve_many_prompts(dp: DePass) -> None:
    spans = Spans((t, t + 1) for t in range(2))
    one, other = dp.attribute_many(["the cat", "the cat"], 5, sources=spans)
    assert torch.allclose(one.scores, other.scores, atol=1e-5)  # two places of one batch


def test_scores_aggregated_to_tokens_are_the_tokens(dp: DePass) -> None:
    res = dp.attribute("the cat", 5)
    assert torch.equal(res.aggregate("token").scores, res.scores)


@pytest.mark.parametrize("tokenizer", ["gpt2", 5, object()])
def test_a_tokenizer_that_is_none_is_refused(dp: DePass, tokenizer: Any) -> None:
    with pytest.raises(OptionError, match=f"must be a transformers tokenizer or None, got {type(tokenizer).__name__}"):
        DePass(dp.model, tokenizer)


def test_a_default_device_of_the_callers_changes_nothing(dp: DePass) -> None:
    def work() -> list[torch.Tensor]:
        found = [dp.attribute("the cat sat", [5, TopK(2)], sources="word").scores, dp.states("the cat").dense(1)]
        found += [res.scores for res in dp.attribute_many(["the cat", "a"], 5)]
        found += [dp.sweep("heads", "the cat", 5).scores, dp.attribute("a cat", sources=Neurons(1)).scores]
        return [*found, *(baselines.tokens(dp, name, ["the cat"], 5)[0].scores for name in baselines.TOKENS)]

    expected = work()
    with torch.device("meta"):
        found = work()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_forcing_the_exclusion_needs_the_first_token_as_a_source(dp: DePass) -> None:
    with pytest.raises(SourceError, match=r"add the token span \(0, 1\)"):
        dp.attribute(models.prompt(5), sources=Spans([(0, 2)]), exclude_bos=True)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (" cat sat", r"target ' cat sat' is 4 tokens, not one: ' cat' \(\d+\)"),
        ("", "is 0 tokens, not one: none"),
        (101, "target id 101 is out of range: the vocabulary has 101 tokens"),
        (-1, "target id -1"),
        (True, "got bool"),
        (1.5, "got float"),
        (Token(5, position=9), "position 9 is out of range: the prompt has 9 tokens, positions -9 to 8"),
        (Token(5, position=-10), "position -10"),
        (Token(5, position="last"), "a position must be an integer, got 'last'"),  # type: ignore[arg-type]
        (Token(5, position=1.0), "a position must be an integer, got 1.0"),  # type: ignore[arg-type]
        (Token(True), "a target id must be an integer, got True"),
        (torch.tensor([1, 2]), "a target id must be an integer, got tensor"),
        (TopK(2.5), "k of TopK must be an integer, got 2.5"),  # type: ignore[arg-type]
        (TopK(True), "k of TopK must be an integer, got True"),
        (TopK(0), r"TopK\(0\): k must be from 1"),
        (TopK(102), "k must be from 1 to 101, the size of the vocabulary"),
        ([], "target is an empty list; leave it out"),
    ],
)
def test_targets_that_are_none_are_refused(dp: DePass, target: Any, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        dp.attribute("the cat sat at the cat", target=target)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("cat", r"'ca' \(\d+\), 't' \(\d+\); ' cat' with a space in front is one token, pass that$"),
        ("sat", r"'at' \(\d+\); pass one token, as a string or an id$"),
        (" sat", r"'at' \(\d+\); pass one token, as a string or an id$"),
        ("", "none; pass one token, as a string or an id$"),
    ],
    ids=["with a space it is one", "with a space it is not one", "it starts with a space", "empty"],
)
def test_a_target_that_is_one_token_with_a_space_in_front_is_suggested(dp: DePass, target: str, says: str) -> None:
    tokenizer = tokens.make()
    tokenizer.add_tokens(["  sat"])  # one token, but not what anyone means by ' sat'
    assert [len(tokenizer.encode(text, add_special_tokens=False)) for text in (" cat", "  sat", " ")] == [1, 1, 1]
    other = DePass(dp.model, tokenizer)
    for asked in (target, Token(target), Contrast(5, target)):
        with pytest.raises(TargetError, match=says):
            other.attribute("the cat sat", target=asked)


def test_integers_of_any_kind_are_targets(dp: DePass) -> None:
    five, last = np.int64(5), torch.tensor(-1)
    expected = dp.attribute("the cat", target=Token(5)).scores
    for target in (five, torch.tensor(5), Token(five, position=last), [five]):
        assert torch.equal(dp.attribute("the cat", target=target).scores, expected)
    assert dp.attribute("the cat", target=TopK(np.int64(2))).scores.shape[0] == 2


def test_a_direction_must_have_the_models_width(dp: DePass) -> None:
    from depass import Direction

    for w in (
        torch.zeros(31),
        torch.zeros(2, 32),
        torch.full((32,), float("nan")),
        torch.zeros(32, dtype=torch.int64),
        "x",
    ):
        with pytest.raises(TargetError, match="must be 32 finite floats"):
            dp.attribute([5, 6], target=Direction(w))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": "mean"}, "unknown rule 'mean'; choose one of: softmax, max, relu, linear, taylor"),
        ({"temperature": 0}, "temperature must be a positive number, got 0"),
        ({"temperature": "hot"}, "got 'hot'"),
        ({"exclude_bos": "yes"}, "exclude_bos must be 'auto', True or False, got 'yes'"),
        ({"start_layer": 3}, "need 0 <= start_layer < stop_layer <= 3"),
        ({"start_layer": 2, "stop_layer": 2}, "start_layer=2, stop_layer=2"),
        ({"stop_layer": 4}, "stop_layer=4"),
        ({"start_layer": -1}, "start_layer=-1"),
    ],
)
def test_options_that_are_none_are_refused(dp: DePass, options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        dp.attribute([5, 6], **options)


def test_constructor_options_are_checked_at_once(dp: DePass) -> None:
    for options in (
        {"rule": "mean"},
        {"temperature": -1},
        {"exclude_bos": 3},
        {"backend": "metal"},
        {"workspace_bytes": 0},
    ):
        with pytest.raises(OptionError):
            DePass(dp.model, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="layers: layer 9 has no decomposed state; choose from 0 to 3"):
        dp.states([5, 6], 9)
    with pytest.raises(OptionError, match="layers must be a list of integers, got 'all'"):
        dp.states([5, 6], "all")  # type: ignore[arg-type]
    assert sorted(dp.states([5, 6], (layer for layer in (1, 2))).rows) == [1, 2]  # type: ignore[arg-type]


def test_a_backend_that_cannot_serve_is_refused_with_its_reason(dp: DePass, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match=r"'cuda' cannot run this normed: (torch sees no CUDA|csrc was)"):
            DePass(dp.model, backend="cuda").attribute([5, 6])
    monkeypatch.setenv("DEPASS_BACKEND", "metal")
    with pytest.raises(OptionError, match="unknown backend 'metal'"):
        dp.attribute([5, 6])


def test_a_result_says_which_backends_made_it(dp: DePass) -> None:
    forced = DePass(dp.model, backend="reference").attribute([5, 6, 7])
    assert forced.settings.backends == dict.fromkeys(
        ("mix_values", "normed", "residual_update", "share_hidden"), "reference"
    )
    chosen = dp.attribute([5, 6, 7])
    assert chosen.settings.backends["residual_update"] == "reference"  # the library's own GEMM
    assert torch.allclose(chosen.scores, forced.scores, rtol=1e-4, atol=1e-5)


SMALL = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)), "is an encoder-only model"),
        (lambda: transformers.BertModel(transformers.BertConfig(**SMALL)), "is an encoder-only model"),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            ),
            "is an encoder-decoder model",
        ),
        (lambda: transformers.LlamaModel(transformers.LlamaConfig(**SMALL)), "has no language-model head"),
        (
            lambda: transformers.OpenAIGPTLMHeadModel(
                transformers.OpenAIGPTConfig(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=9)
            ),
            r"unknown model family 'openai-gpt'.* nearest .* is 'gpt2': .* lacks transformer.ln_f\. .*final_norm=",
        ),
        (
            lambda: transformers.GPT2LMHeadModel(
                transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, add_cross_attention=True)
            ),
            "has cross-attention",
        ),
        (lambda: torch.nn.Linear(2, 2), "expected a HuggingFace causal language model, got Linear"),
        (lambda: None, "got NoneType"),
    ],
)
def test_models_that_cannot_be_attributed_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says) as error:
        DePass(make())
    assert "\n" not in str(error.value)


def with_adapter() -> Any:
    model = models.make("gpt2")
    model.transformer.h[1].attn.c_proj.base_layer = torch.nn.Linear(1, 1)  # as peft's layers have
    return model


def with_a_layer_twice() -> Any:
    model = models.make("llama")
    model.model.layers[1] = model.model.layers[0]
    return model


class ScaleNorm(torch.nn.Module):
    """A norm that keeps its weight under another name."""

    eps = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(32))


def with_a_norm_with_another_weight() -> Any:
    model = models.make("gpt2")
    model.transformer.h[1].ln_1 = ScaleNorm()
    return model


def with_a_norm_without_epsilon() -> Any:
    model = models.make("gpt2")
    model.transformer.ln_f = torch.nn.Tanh()
    return model


def with_a_layer_without_gate() -> Any:
    model = models.make("llama")
    del model.model.layers[1].mlp.gate_proj
    return model


def looking_ahead() -> Any:
    model = models.make("gemma3")
    model.config.use_bidirectional_attention = True
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (with_adapter, "the output projection of layer 1 .* has an adapter .*; merge it first: model.merge_and_unload"),
        (with_a_layer_twice, "one module for several layers"),
        (
            with_a_norm_with_another_weight,
            r"a norm of GPT2LMHeadModel \(ScaleNorm\) holds scale; a norm of the kind 'layer'",
        ),
        (
            with_a_norm_without_epsilon,
            r"a norm of GPT2LMHeadModel \(Tanh\) has no eps; declare it: depass.Family\(epsilon",
        ),
        (with_a_layer_without_gate, "lacks modules that its family names.*Missing: model.layers.1.mlp.gate_proj$"),
        (looking_ahead, "has bidirectional attention"),
    ],
)
def test_modules_that_are_not_what_they_seem_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        DePass(make())


def test_a_norm_that_does_not_run_is_named(device: str) -> None:
    model = models.make("llama", device=device)
    family = Family(attention_post_norm="unused")
    for layer in model.model.layers:
        layer.unused = copy.deepcopy(layer.input_layernorm)
    with pytest.raises(ModelError, match="the attention_post_norm of layer 0 did not run"):
        DePass(model, family=family).attribute(models.prompt(5))


def test_a_family_can_be_described_by_the_caller(device: str) -> None:
    from depass import FAMILIES

    its = models.make("qwen3", device=device)
    its.config.model_type = "a-new-one"
    res = DePass(its, family=FAMILIES["qwen3"]).attribute([5, 6, 7])
    assert res.conservation_error.max() < 1e-5
    assert res.settings.family == "given"
    with pytest.raises(ModelError, match=r"lacks modules that its family names.*Missing: model.layers.0.mlp.up\b"):
        DePass(its, family=Family(gate="mlp.up"))


def test_a_family_that_does_not_fit_is_refused(device: str) -> None:
    its = models.make("llama", device=device)
    for family, says in (
        ("llama", "family must be a depass.Family, got str"),
        (Family(norm="foo"), r"Family\(norm='foo'\): choose one of 'rms'"),  # type: ignore[arg-type]
        (Family(parallel="nope"), "has no such flag"),
    ):
        with pytest.raises(ModelError, match=says):
            DePass(its, family=family)  # type: ignore[arg-type]


def test_an_attention_outside_of_the_interface_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    its = models.make("llama", device=device)
    monkeypatch.setattr(attention, "ATTENTION", "eager")  # the model's layers then never meet our attention function
    with pytest.raises(ModelError, match="attention of layer 0 does not call transformers' AttentionInterface"):
        DePass(its).attribute([5, 6])


def test_a_resized_head_is_noticed(device: str) -> None:
    its = models.make("llama", device=device)
    dp = DePass(its)
    its.resize_token_embeddings(110, mean_resizing=False)
    res = dp.attribute([5, 105], target=104)
    with torch.no_grad():
        assert res.target_logits[0].item() == pytest.approx(
            its(torch.tensor([[5, 105]], device=device)).logits[0, -1, 104].item(), abs=1e-5
        )


def word_level(known: dict[str, int], unknown: str) -> Any:
    """A tokenizer of whole words, without a byte fallback: it reads a word that it lacks as ``unknown``."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(known, unk_token=unknown))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=unknown)


def test_a_target_that_the_tokenizer_does_not_know_is_refused(device: str) -> None:
    tokenizer = word_level({"[UNK]": 0, "the": 1, "cat": 2}, "[UNK]")
    dp = DePass(models.make("llama", device=device), tokenizer)
    says = r"target 'London' is not in the tokenizer's vocabulary, it would become '\[UNK\]'"
    for target in ("London", Contrast("the", "London"), ["cat", "London"]):
        with pytest.raises(TargetError, match=says):
            dp.attribute("the cat", target=target)
    with pytest.raises(TargetError, match=says):
        baselines.tokens(dp, "input_x_gradient", ["the cat"], "London")
    assert dp.attribute("the cat", target="[UNK]").targets[0].token_ids == (0,)  # asked for by its name
    with pytest.raises(TargetError, match=r"2 tokens, not one.*pass one token, as a string or an id$"):
        dp.attribute("the cat", target="Paris London")  # with a space in front it would be no better


def test_a_target_beyond_the_models_head_is_refused_as_its_id_is(device: str) -> None:
    tokenizer = word_level({"[UNK]": 0, **{f"w{i}": i for i in range(1, 101)}}, "[UNK]")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 101  # the head scores 101 tokens, 0 to 100
    dp = DePass(models.make("llama", device=device), tokenizer)
    says = "target id 101 is out of range: the vocabulary has 101 tokens"
    for target in (101, "[PAD]", Contrast("w7", "[PAD]"), Contrast("[PAD]", "w7")):
        with pytest.raises(TargetError, match=says):
            dp.attribute("w5 w6", target=target)
        with pytest.raises(TargetError, match=says):
            dp.sweep("heads", "w5 w6", target)
        with pytest.raises(TargetError, match=says):
            baselines.heads(dp, "output_norm", "w5 w6", target)
    good, bad, other = dp.attribute_many(["w5", "w6", "w7"], targets=["w1", "[PAD]", "w2"], errors="return")
    assert isinstance(bad, TargetError)
    for result, (prompt, target) in ((good, ("w5", "w1")), (other, ("w7", "w2"))):
        torch.testing.assert_close(result.scores, dp.attribute(prompt, target).scores, rtol=1e-5, atol=1e-6)
