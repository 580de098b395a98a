"""Needles: what the generator promises, and RISE, MAS and recovery by hand and by slow loops."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from depass import DePass, OptionError, rules
from depass.evaluate import TASKS, haystacks, needles, run
from depass.evaluate.haystacks import Haystack, haystack
from depass.evaluate.methods import Scores

MANY = range(40)


def words(text: str) -> int:
    """The number of words and marks, as :func:`wordy` counts tokens."""
    return len(re.findall(r"\w+|[^\w\s]+", text))


def made(kind: str, index: int, tokens: int = 200, seed: int = 0) -> Haystack:
    return haystack(kind, index, seed, tokens, words)


def wordy() -> Any:
    """A tokenizer whose tokens are the words and marks of all these prompts."""
    texts = [part for kind in haystacks.KINDS for i in MANY for copy in (made(kind, i).whole, *made(kind, i).changed)
             for part in copy]  # fmt: skip
    every = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", *every])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


@pytest.fixture(scope="module")
def dp() -> DePass:
    tokenizer = wordy()
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return DePass(tf.LlamaForCausalLM(config).eval(), tokenizer)


@pytest.fixture
def answers_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model answers nothing right: count its answers as right, and turn each curve so that it falls."""
    original = needles.continuations
    monkeypatch.setattr(needles, "greedy", lambda _, prompts, __: [True] * len(prompts))

    def falling(dp: DePass, prompts: Any, answers: Any) -> tuple[Tensor, Tensor]:
        blanks = torch.tensor([float(list(ids).count(1)) for ids in prompts])
        return original(dp, prompts, answers)[0] - blanks, blanks

    monkeypatch.setattr(needles, "continuations", falling)


# The generator.


@pytest.mark.parametrize("kind", haystacks.KINDS)
def test_a_prompt_depends_on_its_seed_and_number_and_its_needles_not_on_its_length(kind: str) -> None:
    first = [made(kind, i, seed=3) for i in range(20)]
    assert [made(kind, i, seed=3) for i in reversed(range(20))] == first[::-1]
    assert len({made(kind, i, seed=seed).whole.prompt for seed in (3, 4) for i in range(20)}) == 40
    for i in range(20):
        short, long = made(kind, i, 150), made(kind, i, 900)
        assert _needles(short) == _needles(long)
        assert short.whole.answer == long.whole.answer


def _needles(hay: Haystack) -> list[str]:
    return [hay.whole.prompt[begin:end] for begin, end in hay.needles]


@pytest.mark.parametrize("tokens", [150, 333, 2000])
@pytest.mark.parametrize("kind", haystacks.KINDS)
def test_a_prompt_has_the_length_asked_for(kind: str, tokens: int) -> None:
    for index in range(10):
        assert tokens - 15 < words(made(kind, index, tokens).whole.prompt) <= tokens


@pytest.mark.parametrize("kind", haystacks.KINDS)
def test_each_changed_copy_differs_in_one_needle_and_in_the_answer(kind: str) -> None:
    for hay in (made(kind, i) for i in MANY):
        assert len(hay.changed) == len(hay.needles) == (2 if kind == "facts" else 1)
        for copy, (begin, end) in zip(hay.changed, hay.needles, strict=True):
            assert copy.prompt.startswith(hay.whole.prompt[:begin])
            assert copy.prompt.endswith(hay.whole.prompt[end:])
            assert copy.prompt != hay.whole.prompt
            assert copy.answer != hay.whole.answer
        assert len({copy.answer for copy in (hay.whole, *hay.changed)}) == 1 + len(hay.changed)


@pytest.mark.parametrize("index", MANY)
def test_the_needles_alone_say_the_answer(index: int) -> None:
    for kind in ("fact", "facts"):
        hay = made(kind, index)
        for needle, name in zip(_needles(hay), hay.whole.answer.strip().split(" and "), strict=True):
            assert hay.whole.prompt.count(name) == 1
            assert needle.endswith(f" {name}.")
    hay = made("agreement", index)
    (country,), answer = _needles(hay), hay.whole.answer.strip()
    assert answer in haystacks.COUNTRIES[country]
    assert re.search(rf"\b{answer}\b", hay.whole.prompt) is None
    assert hay.whole.prompt.count(country) == 1
    assert hay.needles[0][1] < len(hay.whole.prompt) * 0.6  # long before the answer
    assert sum(name in hay.whole.prompt for name in haystacks.COUNTRIES) == 1


@pytest.mark.parametrize("kind", haystacks.KINDS)
def test_sentences_cover_all_but_the_lead(kind: str) -> None:
    for hay in (made(kind, i) for i in MANY):
        ends = 0
        for begin, end in hay.sentences:
            assert hay.whole.prompt[ends:begin].strip() == ""
            assert hay.whole.prompt[end - 1] in ".?"
            ends = end
        assert hay.whole.prompt[ends:].strip()


# The measures.


def test_rise_and_mas_are_those_computed_by_hand() -> None:
    """Log-probabilities from -1 to -5: the response is 1, 3/4, 1/4, 0; it does not rise at the third."""
    curve = torch.tensor([-1.0, -2.0, -4.0, -5.0], dtype=torch.float64)
    assert needles.response(curve).tolist() == [1, 0.75, 0.25, 0]
    assert needles.rise(curve) == pytest.approx((0.5 + 0.75 + 0.25 + 0) / 3)
    bump = torch.tensor([-1.0, -4.0, -2.0, -7.0, -5.0], dtype=torch.float64)
    assert needles.response(bump).tolist() == [1, 0.25, 0.25, 0, 0]
    aligned = torch.tensor([1, 0.75, 0.25, 0], dtype=torch.float64)
    assert needles.mas(curve, aligned) == pytest.approx(needles.rise(curve))
    # density 1, 1/4, 1/4, 0: the penalties are 0, 1/2, 0, 0, so the sum is 1, 5/4 (cut at 1), 1/4, 0
    off = torch.tensor([1, 0.25, 0.25, 0], dtype=torch.float64)
    assert needles.mas(curve, off) == pytest.approx((0.5 + 1 + 0.25 + 0) / 3)
    # density above one and below zero: the sum is 1, 3/4 + 3/4, 1/4 + 1/2, 0
    assert needles.mas(curve, torch.tensor([1, 1.5, -0.25, 0], dtype=torch.float64)) == pytest.approx(
        (0.5 + 1 + 0.75) / 3
    )


def slow(log_probabilities: list[float], left: list[float]) -> tuple[float, float]:
    """RISE and MAS step by step."""
    lowest, curve = 1.0, []
    for value in log_probabilities:
        share = (value - log_probabilities[-1]) / abs(log_probabilities[0] - log_probabilities[-1])
        lowest = min(lowest, max(0.0, min(1.0, share)))
        curve.append(lowest)
    penalised = [min(1.0, max(0.0, a + abs(a - b))) for a, b in zip(curve, left, strict=True)]
    low, high = min(penalised), max(penalised)
    scaled = [(value - low) / (high - low) for value in penalised]
    areas = [sum((a + b) / 2 for a, b in pairwise(of)) / (len(of) - 1) for of in (curve, scaled)]
    return areas[0], areas[1]


@pytest.mark.parametrize("seed", range(20))
def test_rise_and_mas_are_those_of_a_slow_loop(seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 40, (1,), generator=chance))
    scores = torch.randn(size, generator=chance) + (0.5 if seed % 2 else -0.2)
    order = needles.deletion_order(scores, 7)
    curve = torch.randn(len(order) + 1, generator=chance, dtype=torch.float64).sub(3)
    curve[0], curve[-1] = 0.0, -4.0
    left = needles.density(scores, order)
    assert (needles.rise(curve), needles.mas(curve, left)) == pytest.approx(
        slow(curve.tolist(), left.tolist()), abs=1e-9
    )


def test_tokens_go_in_even_groups_highest_first() -> None:
    scores = torch.tensor([0.0, 5.0, 1.0, 5.0, -2.0, 3.0, 0.0])
    order = needles.deletion_order(scores, 3)
    assert [group.tolist() for group in order] == [[1, 3, 5], [2, 0], [6, 4]]
    assert needles.density(scores, order).tolist() == pytest.approx([1, 1 - 13 / 12, 1 - 14 / 12, 0])
    assert [len(group) for group in needles.deletion_order(scores, 20)] == [1] * 7
    assert needles.density(-scores, needles.deletion_order(-scores, 2)).tolist() == [1, 0.5, 0]  # no positive sum
    assert needles.density(torch.zeros(4), needles.deletion_order(torch.zeros(4), 4)).tolist() == [
        1,
        0.75,
        0.5,
        0.25,
        0,
    ]


@pytest.mark.parametrize(
    ("needle", "expected"), [([1, 3], 1.0), ([1, 0], 0.5), ([4], 0.0), ([1, 3, 2, 0], 0.75), (list(range(6)), 1.0)]
)
def test_recovery_is_the_share_of_the_needle_at_the_top(needle: list[int], expected: float) -> None:
    assert needles.recovery(torch.tensor([0.0, 5.0, 0.0, 4.0, -9.0, 1.0]), needle) == expected


# The task.


def test_every_method_scores_the_whole_answer(dp: DePass, answers_all: None) -> None:
    prompt = needles.asked(dp, made("facts", 1, 120))
    first, last = prompt.deletable
    options = needles.NeedlesOptions()
    found = needles.scores_of(dp, prompt, 1, options)
    assert tuple(found) == needles.METHODS
    scores = {name: of.tokens for name, of in found.items() if isinstance(of, Scores)}
    assert {name: len(of) for name, of in scores.items()} == dict.fromkeys(needles.METHODS, last - first)
    for name, of in found.items():
        assert isinstance(of, Scores)
        assert of.seconds > 0
        assert (of.missed is None) == (name not in rules.RULES)
        assert of.missed is None or of.missed < 1e-4
    read, at = [*prompt.ids, *prompt.answer[:-1]], len(prompt.ids) - 1
    for rule in ("softmax", "steer"):
        alone = [
            dp.attribute(read[: at + 1 + i], token, rule=rule).scores[0][first:last]
            for i, token in enumerate(prompt.answer)
        ]
        assert torch.allclose(scores[rule], torch.stack(alone).sum(0), rtol=1e-3, atol=1e-4)
    assert torch.allclose(scores["steered"], scores["softmax"] / 3 + 2 * scores["steer"] / 3, rtol=1e-4, atol=1e-5)


def test_leave_one_out_shares_a_sentences_fall_among_its_tokens(dp: DePass) -> None:
    prompt = needles.asked(dp, made("fact", 2, 120))
    found = needles._left_out(dp, prompt, 1)
    begin, end = prompt.sentences[3]
    ids = [1 if begin <= i < end else token for i, token in enumerate(prompt.ids)]
    with torch.no_grad():
        both = dp.model(torch.tensor([[*prompt.ids, *prompt.answer[:-1]], [*ids, *prompt.answer[:-1]]])).logits
    of = both[:, len(prompt.ids) - 1 :].log_softmax(-1)
    falls = sum(float(of[0, i, token] - of[1, i, token]) for i, token in enumerate(prompt.answer))
    assert found[begin:end].tolist() == pytest.approx([falls / (end - begin)] * (end - begin), rel=1e-3, abs=1e-5)
    assert float(found[: prompt.sentences[0][0]].abs().sum()) == 0


def test_the_task_writes_rows_results_and_a_report(dp: DePass, answers_all: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    task = TASKS["needles"]
    options = task.Options(tokens=(100, 130), steps=4, methods="half,last_attention,leave_one_out,random", limit=12)
    report = run(task, dp, options, tmp_path).read_text()
    assert "12 items: 12 ok" in report
    assert (tmp_path / "needles.png").stat().st_size > 10_000
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {(row["kind"], row["length"]) for row in rows} == {(kind, n) for kind in haystacks.KINDS for n in (100, 130)}
    for row in rows:
        starts = {tuple(curve[:1] + curve[-1:]) for curve in row["log_probabilities"].values()}
        assert len(starts) == 1  # all orders begin with every token and end without any
        assert {len(curve) for curve in row["log_probabilities"].values()} == {5}
        assert row["recovery"].keys() == row["seconds"].keys() == row["density"].keys()
    lines = json.loads((tmp_path / "results.json").read_text())["results"]
    assert len(lines) == 6 * 3 * 4
    line = next(one for one in lines if one["measure"] == "fact, 100 tokens, RISE" and one["method"] == "random")
    own = [needles.values_of(row, "random")["RISE"] for row in rows if row["kind"] == "fact" and row["length"] == 100]
    assert line["value"][0] == pytest.approx(sum(own) / len(own))
    assert (line["better"], line["reference"], line["prompts"]) == ("lower", "half", 2)
    again = next(iter(task.measure(dp, None, task.items(options)[3:4], options)))
    assert again["log_probabilities"]["half"] == pytest.approx(rows[3]["log_probabilities"]["half"], rel=1e-4)


def test_prompts_that_the_model_answers_wrong_do_not_count(dp: DePass, tmp_path: Path) -> None:
    options = TASKS["needles"].Options(tokens=(100,), methods="random", limit=6)
    report = run(TASKS["needles"], dp, options, tmp_path).read_text()
    assert "6 items: 0 ok, 6 skipped" in report
    assert f"fact, 100 tokens: {needles.WRONG}" in report
    assert "No prompt was measured." in report


def test_scores_that_are_not_finite_are_errors_of_the_row(
    dp: DePass, answers_all: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, original = TASKS["needles"], needles.baselines.tokens

    def poisoned(*arguments: Any, **named: Any) -> Any:
        results = original(*arguments, **named)
        results[0].scores[0, 20] = math.nan
        return results

    monkeypatch.setattr(needles.baselines, "tokens", poisoned)
    options = task.Options(tokens=(100,), methods="half,random", limit=1)
    (row,) = task.measure(dp, None, task.items(options)[:1], options)
    assert (row["status"], row["reason"]) == ("error", "a score by random is not finite")


def test_a_rule_that_does_not_fit_is_left_out_and_said(
    dp: DePass, answers_all: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(needles, "_too_large", lambda _, __, rule: "too large" if rule == "softmax" else None)
    task = TASKS["needles"]
    options = task.Options(data="fact", tokens=(100,), steps=3, methods="softmax,half,steered,random", limit=2)
    report = run(task, dp, options, tmp_path).read_text()
    assert "`softmax` did not fit into memory for 2 prompts. `steered` did not fit into memory for 2 prompts." in report
    assert {line["method"] for line in json.loads((tmp_path / "results.json").read_text())["results"]} == {
        "half",
        "random",
    }


def test_ties_count_as_their_chance_of_being_at_the_top() -> None:
    """A loop over all orders of the tied scores: leave_one_out gives all tokens of a sentence one score."""
    scores = torch.tensor([1.0, 3.0, 1.0, 1.0, 0.0, 1.0])
    for needle in ([0], [0, 1], [2, 4, 5], [1, 3, 4, 5]):
        shares = [
            len(set(order[: len(needle)]) & set(needle)) / len(needle)
            for order in permutations(range(6))
            if all(scores[a] >= scores[b] for a, b in pairwise(order))
        ]
        assert needles.recovery(scores, needle) == pytest.approx(sum(shares) / len(shares))


def test_changed_countries_have_their_own_capital_and_language() -> None:
    """Japanese begins with Japan: a country's other word is looked up, not put in."""
    for index in range(400):
        hay = made("agreement", index)
        ((changed, answer),) = hay.changed
        (begin, end), start = hay.needles[0], hay.whole.prompt
        country = changed[begin : len(changed) - (len(start) - end)]
        own = haystacks.COUNTRIES[start[begin:end]].index(hay.whole.answer.strip())
        assert answer == f" {haystacks.COUNTRIES[country][own]}"


def test_leaving_out_alone_is_a_method(dp: DePass, tmp_path: Path, answers_all: None) -> None:
    task = TASKS["needles"]
    options = task.Options(data="fact", tokens=(100,), steps=3, methods="leave_one_out", limit=2)
    assert "2 items: 2 ok" in run(task, dp, options, tmp_path).read_text()


def test_a_model_without_a_token_for_the_deleted_is_refused(dp: DePass) -> None:
    with pytest.raises(OptionError, match="the model has no tokenizer"):
        needles.blank_id(DePass(dp.model))
    bare = wordy()
    bare.pad_token = None
    with pytest.raises(OptionError, match="the tokenizer has neither"):
        needles.blank_id(DePass(dp.model, bare))
    grown = wordy()
    grown.add_special_tokens({"pad_token": "<new>"})  # and the model's embeddings were not resized
    with pytest.raises(OptionError, match="neither that the model knows"):
        needles.blank_id(DePass(dp.model, grown))
    with pytest.raises(OptionError, match="the tokenizer has neither"):
        TASKS["needles"].refused(DePass(dp.model, bare), TASKS["needles"].Options(methods="half,leave_one_out"))
    assert needles.blank_id(dp) == 1
    with pytest.raises(OptionError, match="tokens must be an integer of at least 100"):
        TASKS["needles"].Options(tokens=(50,))
    with pytest.raises(OptionError, match="unknown method 'best'"):
        TASKS["needles"].Options(methods="best")
