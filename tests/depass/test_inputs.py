"""What tokenizers and chat templates make is a prompt as it is; sentences are those of the language."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import models
import numpy as np
import pytest
import tokens
import torch
from tokenizers import processors

from depass import (
    Contrast,
    DePass,
    OptionError,
    PromptError,
    PromptWarning,
    Sentences,
    SourceError,
    TopK,
    baselines,
)


@pytest.fixture(scope="module")
def dp() -> DePass:
    return DePass(models.make("llama"), tokens.make())


@pytest.fixture(scope="module")
def letters() -> DePass:
    """A model and a tokenizer for any text."""
    return DePass(models.make("llama", vocab_size=300), tokens.byte_level())


def with_bos(tokenizer: Any, name: str = "<bos>") -> Any:
    """The tokenizer that puts BOS before every text."""
    template = processors.TemplateProcessing(
        single=f"{name} $A", special_tokens=[(name, tokenizer.convert_tokens_to_ids(name))]
    )
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


# --- what a tokenizer returns


def test_what_a_tokenizer_returns_for_one_text_is_a_prompt(dp: DePass) -> None:
    text, tokenizer = "the cat sat at the cat.", dp.tokenizer
    expected = dp.attribute(text, 5)
    chat = [{"role": "user", "content": "the cat"}]
    given: list[Any] = [
        tokenizer(text),
        tokenizer([text]),
        tokenizer(text, return_tensors="pt"),
        tokenizer(text, return_tensors="np"),
        tokenizer(text, return_tensors="pt").input_ids,
        tokenizer([text]).input_ids,
        tokenizer.encode(text, return_tensors="pt"),
        tokenizer(text, padding="max_length", max_length=40),
        tokenizer(text, padding="max_length", max_length=40, padding_side="left", return_tensors="pt"),
        dict(tokenizer([text], padding="max_length", max_length=40)),
        np.array([tokenizer(text).input_ids]),
        torch.tensor(tokenizer(text).input_ids, dtype=torch.int32)[None],
        tuple(tokenizer(text).input_ids),
        [np.array(tokenizer(text).input_ids)],
        [torch.tensor(tokenizer(text).input_ids)],
    ]
    for prompt in given:
        found = dp.attribute(prompt, 5)
        assert found.prompt == expected.prompt
        assert torch.equal(found.scores, expected.scores)
        assert next(dp.attribute_many([prompt], 5)).prompt == expected.prompt
        assert dp.generate(prompt, max_new_tokens=1).attribution.prompt == expected.prompt
        assert baselines.tokens(dp, "random", [prompt], 5)[0].prompt == expected.prompt
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
    assert dp.attribute(rendered, 5).prompt == dp.attribute(chat, 5).prompt


@pytest.mark.parametrize("options", [{}, {"padding": True}, {"padding": True, "return_tensors": "pt"}])
def test_the_advice_for_a_batch_runs_as_printed(dp: DePass, options: dict[str, Any]) -> None:
    texts = ["the cat", "the cat sat at the cat."]
    encoding = dp.tokenizer(texts, **options)
    for refused in (lambda: dp.attribute(encoding), lambda: dp.attribute_many(encoding)):
        with pytest.raises((PromptError, OptionError), match="attribute_many") as error:
            refused()
        advice = str(error.value).partition("attribute_many")[2]
        found = eval(f"dp.attribute_many{advice}", {"dp": dp, "encoding": encoding})
        assert [each.prompt.text for each in found] == texts
    if "return_tensors" in options:
        with pytest.raises(PromptError, match=r"a batch of shape \[2, \d+\] with 2 rows; pass them to attribute_many"):
            dp.attribute(encoding.input_ids)


# --- chats


def test_a_second_special_token_is_warned_about(letters: DePass) -> None:
    tokenizer = with_bos(tokens.byte_level())
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    dp = DePass(letters.model, tokenizer)
    messages = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    for run in (
        lambda: dp.attribute(rendered, 7),
        lambda: list(dp.attribute_many([rendered], 7)),
        lambda: dp.sweep("heads", rendered, 7),
        lambda: baselines.tokens(dp, "random", [rendered], 7),
    ):
        with pytest.warns(PromptWarning, match=r"begins with '<bos>', and the tokenizer adds another"):
            run()
    with pytest.warns(PromptWarning) as caught:
        found = dp.attribute(rendered, 7)
    assert found.prompt.tokens[:2] == ("<bos>", "<bos>")  # as given: the warning changes nothing
    expected = dp.attribute(messages, 7)
    advice = str(caught[0].message).partition("ids ")[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = dp.attribute(eval(advice, {"tokenizer": tokenizer, "prompt": rendered}), 7)
        assert again.prompt.ids == expected.prompt.ids
        dp.attribute("hi", 7)
        dp.attribute(messages, 7)
        dp.attribute(found.prompt.ids, 7)  # ids are as they are
        letters.attribute("<bos>hi", 7)  # a tokenizer that adds none


def test_a_second_end_is_warned_about(letters: DePass) -> None:
    tokenizer = tokens.byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 2)]
    )
    with pytest.warns(PromptWarning, match=r"ends with '<eos>', and the tokenizer adds another"):
        DePass(letters.model, tokenizer).attribute("hi<eos>", 7)
    dp = DePass(letters.model, with_bos(tokens.byte_level()))  # it adds nothing at the end
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dp.attribute("hi<eos><eos>", 7)
        dp.attribute("hi<bos><bos>", 7)
    with pytest.warns(PromptWarning) as caught:
        dp.attribute("<bos>", 7)
    assert len(caught) == 1
    assert "begins with '<bos>'" in str(caught[0].message)


def test_messages_take_what_templates_take(letters: DePass) -> None:
    tokenizer = tokens.byte_level()
    tokenizer.chat_template = (
        "{% for t in tools or [] %}T:{{ t['function']['name'] }} {% endfor %}"
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }};{% endfor %}"
        "{% if enable_thinking is defined and not enable_thinking %}no thought {% endif %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    dp = DePass(letters.model, tokenizer)
    messages = [{"role": "user", "content": "hi"}]
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}

    def text(**template: Any) -> str | None:
        return dp.attribute(messages, 7, chat_template_kwargs=template).prompt.text

    assert dp.attribute(messages, 7).prompt.text == text() == "[user] hi;[assistant]"
    assert text(tools=[tool]) == "T:add [user] hi;[assistant]"
    assert text(enable_thinking=False) == "[user] hi;no thought [assistant]"
    assert text(add_generation_prompt=False) == "[user] hi;"
    assert text(chat_template="{{ messages[0]['content'] }}") == "hi"
    kwargs = {"enable_thinking": False}
    expected = "[user] hi;no thought [assistant]"
    assert next(dp.attribute_many([messages], 7, chat_template_kwargs=kwargs)).prompt.text == expected
    assert dp.sweep("heads", messages, 7, chat_template_kwargs=kwargs).prompt.text == expected
    assert dp.generate(messages, max_new_tokens=1, chat_template_kwargs=kwargs).attribution.prompt.text == expected
    states = dp.states(messages, 0, chat_template_kwargs=kwargs)
    assert "".join(source.label for source in states.sources) == expected
    begun = [*messages, {"role": "assistant", "content": "yes"}]
    assert dp.attribute(begun, 7).prompt.text == "[user] hi;[assistant] yes"
    assert dp.attribute(begun, 7, chat_template_kwargs={"add_generation_prompt": True}).prompt.text == (
        "[user] hi;[assistant] yes;[assistant]"
    )


def test_template_arguments_that_do_not_fit_are_named(letters: DePass) -> None:
    with pytest.raises(PromptError, match=r"chat_template_kwargs need a prompt of chat messages.*got str"):
        letters.attribute("hi", 7, chat_template_kwargs={"tools": []})
    with pytest.raises(PromptError, match=r"chat_template_kwargs need a prompt of chat messages.*got list"):
        next(letters.attribute_many([[5, 6]], 7, chat_template_kwargs={}))
    with pytest.raises(OptionError, match="chat_template_kwargs must be a dict, got list"):
        letters.attribute_many(["hi"], 7, chat_template_kwargs=["tools"])  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="chat_template_kwargs: tokenize is set by DePass"):
        letters.attribute([{"role": "user", "content": "hi"}], 7, chat_template_kwargs={"tokenize": True})


# --- ids that the tokenizer does not have


def test_ids_beyond_the_tokenizer_have_a_label() -> None:
    dp = DePass(models.make("llama", vocab_size=300), tokens.make())
    known = dp.tokenizer.encode("the cat")
    found = dp.attribute([*known, 290, 291, known[-1]], target=[299, Contrast(5, 298), TopK(300)])
    assert found.prompt.tokens[len(known) :] == ("<290>", "<291>", dp.tokenizer.decode(known[-1:]))
    assert found.prompt.text == "the cat<290><291>" + dp.tokenizer.decode(known[-1:])
    labels = [target.label for target in found.targets]
    assert labels[0] == "<299>"
    assert labels[1].endswith(" - <298>")
    assert all(labels)
    assert len(set(labels[2:])) >= 299 - 3  # every token has its own, but for those that decode to the same text


# --- sentences

TEXTS = [
    ("en", "The fund rose 3.14 percent to $1.6 million. Then it fell.", 2),
    ("en", "See https://www.example.com/a.b?c=d for details. Thanks.", 2),
    ("en", "Version 2.0.1 of file.py is out. Use it.", 2),
    ("en", 'He said "Stop." Then he left.', 2),
    ("en", "ما اسمك؟ أنا علي.", 2),
    ("en", "यह एक वाक्य है। यह दूसरा है।", 2),
    ("en", "Dr. Smith met Mr. Jones.", 1),
    ("en", "これはテストです。次の文です！", 2),
    ("en", "Wait! What? No... 3.5 of U.S. firms.", 3),
    ("en", "First line\nSecond line\n\nThird. Fourth", 4),
    ("en", "It ended at 5 p.m. I am at No. 5.", 2),
    ("de", "Das gilt z. B. am 3. Mai. Danach nicht.", 2),
    ("hy", "Սա նախադասություն է։ Սա երկրորդն է։", 2),
    ("am", "ይህ ዓረፍተ ነገር ነው። ይህ ሁለተኛው ነው።", 2),
]


@pytest.mark.parametrize(("language", "text", "count"), TEXTS)
def test_sentences_end_where_their_language_says(letters: DePass, language: str, text: str, count: int) -> None:
    pytest.importorskip("sentencex", reason="sentencex is not installed")
    found = letters.attribute(text, 7, sources=Sentences(language))
    assert len(found.sources) == count, [source.label for source in found.sources]
    assert "".join(source.label for source in found.sources) == text
    summed = letters.attribute(text, 7).aggregate("sentence", language=language)
    assert [source.label for source in summed.sources] == [source.label for source in found.sources]
    if language == "en":
        same = letters.attribute(text, 7, sources="sentence")
        assert torch.equal(same.scores, found.scores)


def test_special_tokens_are_never_inside_a_sentence(dp: DePass) -> None:
    pytest.importorskip("sentencex", reason="sentencex is not installed")
    found = dp.attribute("<bos>the cat<eos>sat. The cat.<eos>", 5, sources="sentence")
    assert [source.label for source in found.sources] == ["<bos>", "the cat", "<eos>", "sat.", " The cat.", "<eos>"]
    made = dp.generate("the cat. A cat", max_new_tokens=2, sources=Sentences("en"), eos_token_id=None)
    assert [source.label for source in made.attribution.sources][:2] == ["the cat.", " A cat"]


def test_what_no_sentences_can_be_made_of_is_named(letters: DePass, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("", "e n", 5, None):
        with pytest.raises(SourceError, match="language must be a code such as 'en' or 'pt-br'"):
            Sentences(wrong)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "sentencex", None)
    with pytest.raises(OptionError, match="sentences need the package sentencex: pip install sentencex"):
        letters.attribute("One. Two.", 7, sources="sentence")
    assert len(letters.attribute("One. Two.", 7, sources="word").sources) == 2
