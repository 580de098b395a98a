"""Answers, given or generated: their tokens' scores, phrases, matrices, and chains back to the prompt."""

from __future__ import annotations

import io
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import models
import pytest
import tokens
import torch

from depass import (
    DePass,
    Direction,
    Generation,
    Heads,
    OptionError,
    PromptError,
    PromptWarning,
    SourceError,
    Spans,
    TargetError,
    Token,
    TopK,
    cli,
)

PROMPT, ANSWER = "the cat sat at", " the cat. A cat sat."
RULES = ("softmax", "half", "steer", "dual_path", "softmax+half")


@pytest.fixture(scope="module")
def dp() -> DePass:
    return DePass(models.make("llama", torch.float64), tokens.make())


@pytest.fixture(scope="module")
def made(dp: DePass) -> Generation:
    return dp.explain(PROMPT, ANSWER)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "phi"])
@pytest.mark.parametrize("rule", ["softmax", "half"])
def test_the_models_own_answer_has_the_scores_of_generate(name: str, rule: str, device: str) -> None:
    dp, ids = DePass(models.make(name, torch.float64, device), rule=rule), models.prompt(6)
    made = dp.generate(ids, max_new_tokens=5, eos_token_id=None)
    given = dp.explain(ids, made.ids)
    assert given.ids == made.ids
    assert torch.equal(given.attribution.scores, made.attribution.scores)
    assert torch.equal(given.attribution.target_logits, made.attribution.target_logits)
    assert given.ranks.tolist() == [1] * 5  # greedy


@pytest.mark.parametrize("name", models.EVERY)
def test_probabilities_and_ranks_are_the_models_own(name: str) -> None:
    model, ids, answer = models.make(name, torch.float64), models.prompt(6), models.prompt(4, 1)
    made = DePass(model, rule="half").explain(ids, answer)
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *answer]])).logits[0, 5:9].double()
    expected = logits.softmax(-1)[range(4), answer]
    assert torch.allclose(made.probabilities, expected, rtol=1e-6)
    assert made.ranks.tolist() == [int((row > row[token]).sum()) + 1 for row, token in zip(logits, answer, strict=True)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "granite"])
def test_a_log_probability_is_the_logit_less_the_mean_under_the_models_probabilities(name: str, rule: str) -> None:
    """The scores of every token of the vocabulary, weighted with the model's own probabilities, give the mean's."""
    model, ids = models.make(name, torch.float64), models.prompt(7)
    dp = DePass(model, rule=rule)
    every = dp.attribute(ids, list(range(models.VOCABULARY)))
    with torch.no_grad():
        p = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    found = dp.attribute(ids, [5, TopK(2)], of="logprob")
    assert [target.kind for target in found.targets] == ["logprob"] * 3
    for row, target in enumerate(found.targets):
        (token,) = target.token_ids
        expected = every.scores[token].double() - p @ every.scores.double()
        assert torch.allclose(found.scores[row].double(), expected, atol=1e-5, rtol=1e-5)
        value = every.target_logits[token].double() - p @ every.target_logits.double()
        assert float(found.target_logits[row]) == pytest.approx(float(value), abs=1e-5)
    assert float(found.conservation_error.max()) < 2e-6  # norms compute in fp32


def test_a_log_probability_does_not_change_when_all_logits_shift() -> None:
    model, ids = models.make("llama", torch.float64), models.prompt(7)
    before = DePass(model).attribute(ids, 5, of="logprob")
    plain = DePass(model).attribute(ids, 5)
    model.lm_head.weight.data += torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    after = DePass(model).attribute(ids, 5, of="logprob")
    assert torch.allclose(before.scores, after.scores, atol=1e-6)
    assert not torch.allclose(plain.scores, DePass(model).attribute(ids, 5).scores, atol=0.1)


def test_a_contrast_is_with_the_likeliest_other_token(dp: DePass) -> None:
    ids = models.prompt(7)
    first, second = (target.token_ids[0] for target in dp.attribute(ids, TopK(2)).targets)
    found = dp.attribute(ids, [first, 5, TopK(2)], of="contrast", rule="softmax+half")
    pairs = [(first, second), (5, first), (first, second), (second, first)]
    assert [target.token_ids for target in found.targets] == pairs
    alone = dp.attribute(ids, [token for pair in pairs for token in pair], rule="softmax+half")
    expected = alone.scores[0::2] - alone.scores[1::2]
    assert torch.allclose(found.scores, expected, atol=1e-5)


def test_what_is_explained_goes_through_every_call(dp: DePass) -> None:
    ids = models.prompt(7)
    whole = dp.attribute(ids, 5, of="logprob").target_logits
    assert torch.allclose(dp.sweep("heads", ids, 5, of="logprob").target_logits, whole)
    assert torch.allclose(dp.survey(ids, 5, of="logprob").target_logits, whole)
    (many,) = dp.attribute_many([ids], 5, of="logprob")
    assert torch.allclose(many.target_logits, whole)
    made = dp.generate(ids, max_new_tokens=2, of="contrast")
    assert {target.kind for target in made.attribution.targets} == {"contrast"}
    with pytest.raises(OptionError, match="of must be one of: logit, logprob, contrast; got 'odds'"):
        dp.attribute(ids, 5, of="odds")  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="of='logprob' needs tokens as targets, got a Direction"):
        dp.attribute(ids, Direction(torch.ones(32)), of="logprob")


def test_a_text_follows_the_prompt(dp: DePass, made: Generation) -> None:
    assert made.text == ANSWER
    assert made.attribution.prompt.text == PROMPT + ANSWER[:-1]
    whole = dp.attribute(
        PROMPT + ANSWER[:-1],
        [Token(token, len(made.attribution.prompt.ids) - len(made.ids) + i) for i, token in enumerate(made.ids)],
    )
    assert torch.allclose(made.attribution.scores, whole.scores, atol=1e-6)
    assert made.attribution.conservation_error.max() < 1e-6


@pytest.mark.parametrize("tokenizer", [tokens.make(), tokens.byte_level(), tokens.byte_fallback()])
@pytest.mark.parametrize(("prompt", "answer"), [("the c", "at the"), ("the ", "cat"), ("th", "e cat"), ("t\n", "\nhe")])
def test_tokens_that_would_cross_the_border_are_split_there(tokenizer: Any, prompt: str, answer: str) -> None:
    size = len(tokenizer)
    dp = DePass(models.make("llama", vocab_size=size), tokenizer)
    alone = dp.attribute(prompt).prompt
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = dp.explain(prompt, answer)
    assert made.attribution.prompt.ids[: len(alone.ids)] == alone.ids
    assert tokenizer.decode([*alone.ids, *made.ids], skip_special_tokens=True).strip() == (prompt + answer).strip()
    joined = dp.attribute(prompt + answer).prompt.ids
    said = [str(warning.message) for warning in caught if warning.category is PromptWarning]
    assert {warning.filename for warning in caught if warning.category is PromptWarning} <= {__file__}
    assert (joined != (*alone.ids, *made.ids)) == bool(said)
    assert all("tokenized on its own, as if the model had continued the prompt" in text for text in said)


def test_a_chat_may_end_with_its_answer(dp: DePass) -> None:
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a cat sat"}]
    found = dp.explain(chat)
    assert found.text == "a cat sat"
    assert found.attribution.prompt.text == "<bos>user the cat<eos><bos>assistant a cat s"
    same = dp.explain("<bos>user the cat<eos><bos>assistant ", "a cat sat")
    assert found.ids == same.ids
    refused = [
        (chat[:1], "the last of them the assistant's"),
        (PROMPT, "the prompt must be chat messages"),
        (chat[1:], "the answer is the only message"),
        ([*chat[:1], {"role": "assistant", "content": " "}], "the answer is empty"),
    ]
    for wrong, says in refused:
        with pytest.raises(PromptError, match=says):
            dp.explain(wrong)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("", "the answer is empty"),
        ([], "the answer is empty"),
        ([5] * 317, "the prompt has 7 tokens and the answer 317, but .* has 320 positions"),
        ([5, 101], "id 101 at position 1 of the answer is out of range"),
        ([0.5], "token ids must be integers"),
        ("\ud800", "the answer is not text"),
        ([[1, 2], [3, 4]], "got a batch with 2 rows"),
        ({"role": "assistant"}, "got a mapping"),
    ],
)
def test_answers_that_cannot_be_explained_are_named(dp: DePass, answer: Any, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        dp.explain(PROMPT, answer)


def test_text_needs_a_tokenizer_and_components_another_call(dp: DePass) -> None:
    bare = DePass(models.make("llama"))
    with pytest.raises(PromptError, match="an answer given as text needs a tokenizer"):
        bare.explain([5, 6], " cat")
    with pytest.raises(OptionError, match="an answer does not support Heads as sources"):
        dp.explain(PROMPT, ANSWER, sources=Heads(1))
    with pytest.raises(TargetError, match="there is no tokenizer; give a slice"):
        bare.explain([5, 6], [7, 8]).phrase(" cat")
    assert bare.explain([5, 6], [7, 8]).total().targets[0].label == "78"


def test_a_phrase_is_the_sum_of_its_tokens(made: Generation) -> None:
    of = made.attribution
    for phrase, begin, end in (
        ("cat", 1, 2),
        (" cat. A", 1, 5),
        (slice(2, 4), 2, 4),
        (slice(-1, None), len(made.ids) - 1, None),
    ):
        found = made.phrase(phrase)
        assert torch.allclose(found.scores[0], of.scores[begin:end].sum(0), atol=1e-5)
        assert torch.allclose(found.target_logits[0], of.target_logits[begin:end].sum(), atol=1e-5)
        assert found.targets[0].token_ids == made.ids[begin:end]
        assert found.targets[0].probability == pytest.approx(float(made.probabilities[begin:end].prod()))
        assert float(found.conservation_error) < 1e-6
    assert made.phrase("cat", occurrence=1).targets[0].position > made.phrase("cat").targets[0].position
    assert torch.allclose(made.total().scores[0], of.scores.sum(0), atol=1e-5)
    refused: list[tuple[Any, str]] = [
        ("dog", "'dog' occurs 0 times in the answer"),
        ("", "must be a text"),
        (3, "must be a text"),
        (slice(9, 9), "takes no token"),
        (slice(0, 4, 2), "takes no token of the answer, or not every one"),
    ]
    for wrong, says in refused:
        with pytest.raises(TargetError, match=says):
            made.phrase(wrong)
    with pytest.raises(TargetError, match=r"occurs 2 times .* no occurrence 2"):
        made.phrase("cat", occurrence=2)


@pytest.mark.parametrize("rule", RULES)
def test_a_matrix_sums_both_sides(dp: DePass, rule: str) -> None:
    made = dp.explain("the cat sat. A cat", ANSWER, rule=rule)
    found = made.matrix("sentence", "sentence")
    assert [target.label for target in found.targets] == [" the cat.", " A cat sat."]
    labels = [source.label for source in found.sources if source.start is not None]
    assert labels == ["the cat sat.", " A cat", " the cat.", " A cat sat"]
    assert torch.allclose(found.scores.sum(1), found.target_logits, atol=1e-4)
    assert torch.allclose(found.scores.sum(0).sum(), made.total().scores.sum(), atol=1e-4)
    later = [source.label for source in found.sources].index(" A cat sat")
    assert float(found.scores[0, later]) == 0  # what comes later is no source
    whole = made.matrix("token")
    assert torch.allclose(whole.scores, made.attribution.scores, atol=1e-6)
    words = made.matrix("word", "word")
    assert torch.allclose(words.scores.sum(1), words.target_logits, atol=1e-4)
    with pytest.raises(SourceError, match="unknown unit 'page'"):
        made.matrix("page")


def test_a_matrix_keeps_the_prompts_spans(dp: DePass) -> None:
    spans = Spans([(0, 1), (2, 4)], labels=["one", "two"])
    found = dp.explain(PROMPT, ANSWER, sources=spans).matrix("sentence", "sentence")
    assert [source.label for source in found.sources] == ["rest", "one", "two", " the cat.", " A cat sat"]
    assert torch.allclose(found.scores.sum(1), found.target_logits, atol=1e-4)


@pytest.mark.parametrize("rule", [*RULES, "taylor"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("of", ["logit", "logprob"])
def test_parts_are_the_sums_of_their_tokens(name: str, rule: str, of: Any, tmp_path: Path) -> None:
    """A backward pass starts from all tokens of a part at once; a decomposed state has them all."""
    dp = DePass(models.make(name, torch.float64), tokens.make(), rule=rule)
    by_token = dp.explain(PROMPT, ANSWER, of=of)
    for by in ("word", "sentence", "answer"):
        found = dp.explain(PROMPT, ANSWER, by=by, of=of)
        expected = by_token.total() if by == "answer" else by_token.matrix(by)
        assert found.attribution.targets == expected.targets
        torch.testing.assert_close(found.attribution.scores, expected.scores, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.attribution.target_logits, expected.target_logits, rtol=1e-5, atol=1e-5)
        assert torch.allclose(found.total().scores, by_token.total().scores, atol=1e-4)
        assert found.parts[-1][1] == len(found.ids)
        (many,) = dp.attribute_many([PROMPT], answers=[ANSWER], by=by, of=of)
        torch.testing.assert_close(many.attribution.scores, found.attribution.scores, rtol=1e-5, atol=1e-5)
    found.save(tmp_path / "answer")
    assert Generation.load(tmp_path / "answer").parts == found.parts == [(0, len(found.ids))]
    assert found.attribution.settings.of == of


def test_parts_that_are_too_large_are_named(dp: DePass) -> None:
    found = dp.explain(PROMPT, ANSWER, by="sentence")
    assert "part 2 of the answer" in found.to_html()
    assert found.phrase(" the cat.").targets[0].label == " the cat."
    for work in (lambda: found.phrase("cat"), lambda: found.matrix("word")):
        with pytest.raises(TargetError, match="inside one of its parts; explain it by='token'"):
            work()
    with pytest.raises(TargetError, match="a chain runs through the answer's tokens"):
        found.through()
    with pytest.raises(SourceError, match="unknown unit 'page'; choose one of: token, word, sentence, answer"):
        dp.explain(PROMPT, ANSWER, by="page")
    with pytest.raises(SourceError, match="words need text"):
        DePass(models.make("llama")).explain([5, 6], [7, 8], by="word")


def test_sums_are_said_to_be_of_what_was_explained(dp: DePass, tmp_path: Path) -> None:
    made = dp.explain(PROMPT, ANSWER, of="logprob")
    with (tmp_path / "shown.txt").open("w") as file:
        made.total().show(file, 200)
    assert "logit less the mean" in (tmp_path / "shown.txt").read_text()
    assert "logit less the mean" in made.total().to_html()


def _by_paths(made: Generation, token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What reaches each source of the prompt, and what stays at each token of the answer, path by path."""
    of, begin = made.attribution, len(made.attribution.prompt.ids) + 1 - len(made.ids)
    own = {
        source.start - begin: i
        for i, source in enumerate(of.sources)
        if source.start is not None and source.start >= begin
    }
    given = [i for i, source in enumerate(of.sources) if source.start is not None and source.start < begin]
    scores = of.scores.double()
    reached, stays = scores[token].clone(), torch.zeros(len(of.sources), dtype=torch.float64)
    for index in own.values():
        reached[index] = 0
    for length in range(1, token + 1):
        for path in itertools.combinations(range(token), length):
            steps = [token, *reversed(path)]
            carried = float(scores[token, own[steps[1]]])
            for here, there in itertools.pairwise(steps[1:]):
                carried *= float(scores[here, own[there]] / scores[here].abs().sum())
            last = scores[steps[-1]] / scores[steps[-1]].abs().sum()
            reached[given] += carried * last[given]
            stays[own[steps[-1]]] += carried * (1 - last[given].sum() - last[[own[t] for t in range(steps[-1])]].sum())
    return reached, stays


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("sources", ["token", Spans([(0, 2), (3, 4)])])
def test_a_chain_follows_every_path_back_to_the_prompt(name: str, sources: Any) -> None:
    made = DePass(models.make(name, torch.float64)).explain(models.prompt(5), models.prompt(6, 1), sources=sources)
    for token in range(6):
        found = made.through(token)
        reached, stays = _by_paths(made, token)
        assert torch.allclose(found.scores[0].double(), reached + stays, atol=1e-5)
        assert float(found.conservation_error) < 1e-5
    assert torch.equal(made.through(0).scores[0], made.attribution.scores[0])
    whole = torch.stack([made.through(token).scores[0] for token in range(6)]).sum(0)
    assert torch.allclose(made.through().scores[0], whole, atol=1e-4)
    with pytest.raises(TargetError, match="token 6 is out of range: the answer has 6 tokens"):
        made.through(6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_chain_may_end_at_steps_of_the_answer(name: str) -> None:
    """What reaches a kept token is what its row passes on when it is not kept: the two ways meet."""
    made = DePass(models.make(name, torch.float64)).explain(models.prompt(5), models.prompt(6, 1))
    of, whole = made.attribution, made.through(5).scores[0].double()
    column = [source.start for source in of.sources].index(5 + 2)  # of the answer's third token
    found = made.through(5, keep=slice(2, 3))
    assert float(found.conservation_error) < 1e-5
    reached = float(found.scores[0, column])
    passed = made.through(2).scores[0].double() * reached / float(of.scores[2].abs().sum())
    own = [i for i, source in enumerate(of.sources) if source.start is not None]
    expected = found.scores[0].double()
    expected[column] = 0
    expected[own] += passed[own]
    expected[column] += reached * (1 - float(of.scores[2, own].sum() / of.scores[2].abs().sum()))
    assert torch.allclose(whole, expected, atol=1e-5)
    assert torch.equal(made.through(5, keep="prompt").scores, made.through(5).scores)
    for wrong in ("answer", 2):
        with pytest.raises(TargetError, match="keep must be 'prompt' or a slice"):
            made.through(5, keep=wrong)  # type: ignore[arg-type]


def test_messages_and_documents_of_a_chat_are_sources(dp: DePass) -> None:
    chat = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "the cat"},
    ]
    found = dp.attribute(chat, sources="message")
    assert [(source.label, source.kind) for source in found.sources] == [
        ("rest", "rest"),
        ("user", "span"),
        ("assistant", "span"),
        ("user", "span"),
    ]
    texts = ["".join(found.prompt.tokens[s.start : s.end]).strip() for s in found.sources[1:]]
    assert texts == ["the cat", "sat", "the cat"]
    assert float(found.conservation_error) < 1e-6
    made = dp.explain(chat, " cat sat", sources="message")
    assert [source.label for source in made.attribution.sources[:4]] == ["rest", "user", "assistant", "user"]
    for prompt, sources, says in (
        (PROMPT, "message", "needs a prompt of chat messages"),
        (chat, "document", "needs documents"),
        (chat, "page", "unknown unit 'page'"),
    ):
        with pytest.raises(SourceError, match=says):
            dp.attribute(prompt, sources=sources)
    tokenizer = tokens.make()
    of_documents = "{% for d in documents %}<{{ d['title'] }}> {{ d['text'] }}{% endfor %}"
    tokenizer.chat_template = of_documents + "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}"
    other = DePass(dp.model, tokenizer)
    documents = {"documents": [{"title": "a", "text": "the cat"}, {"title": "b", "text": "sat at"}]}
    found = other.attribute(chat[:1], sources="document", chat_template_kwargs=documents)
    assert [source.label for source in found.sources] == ["rest", "a", "b"]
    tokenizer.chat_template = tokenizer.chat_template.replace("d['text']", "d['text'] | upper")
    for sources in ("message", "document"):
        with pytest.raises(SourceError, match="whose texts the chat template keeps"):
            other.attribute(chat[:1], sources=sources, chat_template_kwargs=documents)
    short = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "s"},
        {"role": "user", "content": "the cat "},
    ]
    found = dp.attribute(short, sources="message")  # the text of each occurs earlier
    assert found.prompt.text is not None
    begins = [found.prompt.offsets[source.start or 0][0] for source in found.sources[1:]]
    assert [found.prompt.text[:begin].count("<bos>") for begin in begins] == [1, 2, 3]
    assert found.prompt.text[begins[0] - 5 : begins[0] + 1] == "user a"
    with pytest.raises(SourceError, match="whose texts the chat template keeps"):  # it changes the messages
        other.attribute(chat[:1], sources="message", chat_template_kwargs=documents)


@pytest.mark.parametrize("rule", ["softmax", "half"])
def test_many_answers_are_each_ones_own(dp: DePass, rule: str) -> None:
    prompts, answers = [PROMPT, "the", models.prompt(5)], [ANSWER, " cat", models.prompt(3, 1)]
    for found, prompt, answer in zip(
        dp.attribute_many(prompts, answers=answers, rule=rule), prompts, answers, strict=True
    ):
        alone = dp.explain(prompt, answer, rule=rule)
        assert isinstance(found, Generation)
        assert found.ids == alone.ids
        assert torch.allclose(found.attribution.scores, alone.attribution.scores, atol=1e-5)
    broken = list(dp.attribute_many(["the", "the"], answers=["", " cat"], errors="return"))
    assert isinstance(broken[0], PromptError)
    assert isinstance(broken[1], Generation)
    with pytest.raises(OptionError, match="either answers= or a target"):
        dp.attribute_many(["the"], 5, answers=[" cat"])
    with pytest.raises(OptionError, match="answers ends after 1, but prompts has more; give one answer per prompt"):
        list(dp.attribute_many(["the", "cat"], answers=[" cat"]))


def test_an_answer_is_saved_and_shown(made: Generation, tmp_path: Path) -> None:
    made.save(tmp_path / "answer.safetensors")
    again = Generation.load(tmp_path / "answer.safetensors")
    assert (again.answer, again.attribution.targets) == (made.answer, made.attribution.targets)
    assert torch.equal(again.probabilities, made.probabilities)
    assert again.phrase("cat.").targets == made.phrase("cat.").targets
    with (tmp_path / "shown.txt").open("w") as file:
        made.show(file, 120)
    shown = (tmp_path / "shown.txt").read_text()
    assert "probability" in shown
    assert f"sum over {len(made.ids)} tokens" in shown
    page = made.to_html()
    assert "token 2 of the answer" in page
    assert made.phrase("cat").to_html()


def test_the_answer_may_come_from_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models.make("llama").save_pretrained(tmp_path)
    tokens.make().save_pretrained(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ANSWER}\n"))
    assert cli.main(["explain", PROMPT, "--answer", "-", "-m", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"]["text"] == ANSWER


def test_the_command_explains_an_answer(dp: DePass, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    models.make("llama").save_pretrained(folder)
    tokens.make().save_pretrained(folder)
    assert cli.main(["explain", PROMPT, "--answer", ANSWER, "-m", str(folder), "--of", "logprob", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["answer"]["text"] == ANSWER
    assert {target["kind"] for target in said["targets"]} == {"logprob"}
    assert (
        cli.main(
            [
                "explain",
                PROMPT,
                "--answer",
                ANSWER,
                "-m",
                str(folder),
                "--save-path",
                str(tmp_path / "a"),
                "--viz-path",
                str(tmp_path / "a.html"),
            ]
        )
        == 0
    )
    assert Generation.load(tmp_path / "a").text == ANSWER
    assert "rank" in capsys.readouterr().out
    for wrong, says in (
        (["-", "--answer", "-"], "cannot both be read"),
        ([PROMPT, "--answer", ""], "the answer is empty"),
    ):
        assert cli.main(["explain", *wrong, "-m", str(folder)]) == 2
        assert says in capsys.readouterr().err
    pq = pytest.importorskip("pyarrow.parquet", reason="data sets need pyarrow, of the extra [data]")
    rows = [
        {"prompt": PROMPT, "answer": ANSWER},
        {"prompt": "the", "answer": [24, 25]},
        {"prompt": "the"},
        {"prompt": "the", "answer": ""},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    given = [
        "attribute-dataset",
        str(tmp_path / "data.jsonl"),
        "--out",
        str(out),
        "-m",
        str(folder),
        "--answer-column",
        "answer",
    ]
    assert cli.main(given) == 0
    table = pq.read_table(out / "rows").to_pylist()
    assert [row["status"] for row in table] == ["ok", "ok", "error", "error"]
    total = DePass.from_pretrained(str(folder)).explain(PROMPT, ANSWER).total()
    assert table[0]["scores"] == pytest.approx(total.scores[0].tolist(), abs=1e-4)
    assert table[0]["target"] == ANSWER
    assert "no 'answer' in this row" in table[2]["error"]
    assert "the answer is empty" in table[3]["error"]
    assert cli.main([*given, "--target-column", "prompt"]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["softmax", "half"])
def test_a_likely_tokens_log_probability_adds_up(dtype: torch.dtype, rule: str, smollm2_folder: Path) -> None:
    """Its value is small: the difference of two large logits would be mostly their rounding."""
    dp = DePass.from_pretrained(str(smollm2_folder), dtype=dtype, rule=rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = dp.explain("The Eiffel Tower is in Paris. The Colosseum is in", " Rome, in Italy.", of="logprob")
    assert float(made.probabilities[0]) > 0.9
    assert float(made.attribution.target_logits[0]) == pytest.approx(0.18, abs=0.05)
