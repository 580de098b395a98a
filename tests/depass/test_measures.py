"""Token methods by name, and the measures of their scores: each by hand, on a model whose answer is known, or by a loop."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import tokens as tokenizers
import torch
from one_token import ANSWER, OTHERS, TRIGGER, one_token_model

from depass import DePass, OptionError
from depass.errors import DePassError
from depass.evaluate import TASKS, data, measures, methods, run, tokens
from depass.evaluate.forward import next_tokens
from depass.evaluate.questions import FIXED, Question
from depass.evaluate.task import Item


@pytest.fixture(scope="module")
def dp() -> DePass:
    return DePass(models.make("llama"))


def pair(ids: Sequence[int], special: bool = False) -> data.Pair:
    return data.Pair(Item("0"), tuple(ids), (1,), special)


def written(folder: Path, rows: Sequence[Any]) -> str:
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


# Methods.


def test_names_are_methods_mixtures_and_groups() -> None:
    assert methods.named("random,1*half+1*softmax,depass_dpa") == ("random", "half+softmax", "depass_dpa")
    assert methods.named("all") == methods.METHODS
    assert methods.named("steer,mixtures")[0] == "steer"
    assert set(methods.named("steer,mixtures")) == set(methods.MIXTURES)
    shares = [dict(methods.parts(name)).get("steer", 0.0) for name in methods.MIXTURES]
    assert shares == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1])
    for name, said in (
        ("magic", "--methods: unknown method 'magic'; choose from softmax,"),
        ("depass", "unknown method 'depass'"),
        ("softmax+magic", r"unknown method 'softmax\+magic'"),
        ("random,random", "--methods names 'random' twice"),
        ("softmax+half,1*softmax+1*half", r"--methods names '1\*softmax\+1\*half' twice"),
    ):
        with pytest.raises(OptionError, match=said):
            methods.named(name)


def test_mixtures_are_means_of_rules_that_are_scored_once(dp: DePass, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, targets = [models.prompt(6), models.prompt(9, 1)], [3, 7]
    expected = {
        name: list(dp.attribute_many(prompts, targets=targets, rule=name)) for name in methods.named("mixtures")
    }
    calls: list[Any] = []
    plain = DePass.attribute_many
    monkeypatch.setattr(DePass, "attribute_many", lambda *a, **k: calls.append(k["rule"]) or plain(*a, **k))
    found = methods.scored(dp, methods.MIXTURES, prompts, targets, 0)
    assert calls == ["softmax", "steer"]
    for i, outcomes in enumerate(found):
        for name, outcome in outcomes.items():
            assert isinstance(outcome, methods.Scores)
            alone = expected[name][i]
            theirs = alone.scores[0, [source.kind == "token" for source in alone.sources]]
            assert torch.allclose(outcome.tokens, theirs, atol=1e-5)
        seconds = {name: outcome.seconds for name, outcome in outcomes.items()}  # type: ignore[union-attr]
        assert seconds["softmax+steer"] == pytest.approx(seconds["softmax"] + seconds["steer"])


def test_several_targets_are_summed_and_one_bad_prompt_takes_no_other_with_it(dp: DePass) -> None:
    several, single = [[3, 7]], [3]
    prompt = models.prompt(6)
    for name in ("softmax", "mean_attention"):
        (both,), (one,), (other,) = (methods.scored(dp, [name], [prompt], of, 0) for of in (several, single, [7]))
        total = one[name].tokens + other[name].tokens  # type: ignore[union-attr]
        assert torch.allclose(both[name].tokens, total, atol=1e-5)  # type: ignore[union-attr]
    names = ("softmax", "leave_one_out", "depass_dpa")
    good, bad = methods.scored(dp, names, [prompt, [10_000]], [3, 3], 0)
    assert all(isinstance(outcome, methods.Scores) for outcome in good.values())
    assert all(isinstance(outcome, DePassError) for outcome in bad.values())
    with pytest.raises(OptionError, match=r"one next token, given as an id, got the target \[3, 7\]"):
        raise methods.scored(dp, ["depass_dpa"], [prompt], several, 0)[0]["depass_dpa"]  # type: ignore[misc]


# Zeroing.


def test_zeroed_tokens_count_the_last_and_are_rounded_up() -> None:
    scores = torch.tensor([0.5, -1.0, 3.0, 0.5, 2.0, 99.0])
    assert measures.zeroed(pair([9] * 6), scores, 10, "disrupt") == (5,)
    assert measures.zeroed(pair([9] * 6), scores, 40, "disrupt") == (2, 4, 5)  # 2.4 tokens are three
    assert measures.zeroed(pair([9] * 6), scores, 40, "restore") == (0, 1, 3)
    assert measures.zeroed(pair([9] * 6), scores, 100, "restore") == ()
    assert measures.zeroed(pair([9] * 6, special=True), scores, 100, "disrupt") == (1, 2, 3, 4, 5)
    for count in range(1, 200):  # in whole numbers: 0.7 times 10 is no 8
        top = measures.zeroed(pair([9] * count), torch.zeros(count), 70, "disrupt")
        assert len(top) == -((-7 * count) // 10)


def test_curves_are_those_of_a_loop_over_embeddings(dp: DePass, tmp_path: Path) -> None:
    rows = [{"prompt": models.prompt(4 + i, i), "target": 3 + i} for i in range(4)]
    options = tokens.TokensOptions(data=written(tmp_path, rows), methods="softmax,random", keep_wrong=True, seed=3)
    run(TASKS["tokens"], dp, options, tmp_path / "out")
    embed = dp.model.get_input_embeddings()
    for given, row in zip(rows, rows_of(tmp_path / "out"), strict=True):
        ids, answer = torch.tensor([given["prompt"]]), given["target"]
        scores = dp.attribute(given["prompt"], answer).scores[0].tolist()
        order = sorted(range(ids.shape[1]), key=lambda t, scores=scores: -scores[t])  # type: ignore[misc]

        def probability(zero: Sequence[int], ids: torch.Tensor = ids, answer: int = answer) -> float:
            changed = embed(ids).detach().clone()
            changed[0, list(zero)] = 0
            with torch.no_grad():
                return float(dp.model(inputs_embeds=changed).logits[0, -1].softmax(0)[answer])

        for k in range(10):
            count = math.ceil(round(len(order) * (k + 1) / 10, 6))
            assert row["disrupt"]["softmax"][k] == pytest.approx(probability(order[:count]), rel=1e-4)
            assert row["restore"]["softmax"][k] == pytest.approx(probability(order[count:]), rel=1e-4)
        assert row["nothing"] == pytest.approx(probability(range(len(order) - 1)), rel=1e-4)
        remaining = [row["clean"], *row["disrupt"]["softmax"]]
        area = sum(0.1 * 100 * (a + b) / 2 / row["clean"] for a, b in itertools.pairwise(remaining))
        assert measures.value(row, "disrupt", "softmax") == pytest.approx(area)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3", "granite", "phi"])
def test_embeddings_times_one_are_the_models_own_and_prompts_do_not_mix(name: str) -> None:
    model = DePass(models.make(name))
    prompts = [models.prompt(length, length) for length in (3, 9, 5)]
    answers = next_tokens(model, prompts, [3, 7, 50])[1].tolist()  # the likeliest
    plain = next_tokens(model, prompts, answers)[0]
    ones = next_tokens(model, prompts, answers, lambda i: torch.ones(len(prompts[i]), 1))[0]
    assert torch.allclose(ones, plain, rtol=1e-4, atol=0)
    factors = [Question(tuple(ids), 1, zeroed=(1,)).factors(32, 0) for ids in prompts]
    together = next_tokens(model, prompts, answers, lambda i: factors[i])[0]
    for i in range(3):
        alone = next_tokens(model, prompts[i : i + 1], answers[i : i + 1], lambda _, i=i: factors[i])[0]  # type: ignore[misc]
        assert torch.allclose(together[i], alone[0], rtol=1e-4, atol=0)
    assert not torch.allclose(together, plain, rtol=1e-4, atol=0)


# Soft measures.


def test_probabilities_by_hand() -> None:
    assert measures.kept([0, 1, 3], [1, 1, 1], 0.5) == pytest.approx([0, 0.5, 1])
    assert measures.kept([7, 8, 10], [1, 1, 1], 0.5) == pytest.approx([0, 0.5, 1])
    assert measures.kept([0, 1, 3], [2, 1, 1], 0.5) == pytest.approx([0, 1, 1])
    assert measures.kept([0, 0, 3], [1, 1, 2], 0.75) == pytest.approx([0.5, 0.5, 1])
    assert measures.kept([5, 5, 5], [1, 4, 2], 0.2) == pytest.approx([0.2] * 3)
    assert measures.kept([-1], [3], 0.8) == pytest.approx([0.8])


@pytest.mark.parametrize("budget", measures.BUDGETS)
def test_every_method_keeps_equally_much_whatever_the_size_of_its_scores(budget: float) -> None:
    chance = random.Random(0)
    for _ in range(200):
        count = chance.randint(1, 12)
        scores = [chance.choice([chance.gauss(0, 1), 0.0, chance.gauss(0, 1000)]) for _ in range(count)]
        sizes = [chance.randint(1, 4) for _ in range(count)]
        found = measures.kept(scores, sizes, budget)
        assert sum(a * n for a, n in zip(found, sizes, strict=True)) == pytest.approx(budget * sum(sizes))
        assert all(-1e-9 <= a <= 1 + 1e-9 for a in found)
        ranked = [found[i] for i in sorted(range(count), key=scores.__getitem__)]
        assert all(low <= high + 1e-9 for low, high in itertools.pairwise(ranked))
        assert measures.kept([1e-3 * score for score in scores], sizes, budget) == pytest.approx(found, abs=1e-6)


def test_words_share_a_probability_and_fixed_tokens_have_none() -> None:
    of_text = DePass(models.make("llama"), tokenizers.make())
    ids = of_text.tokenizer.encode("the quick cat")
    asked = pair(ids, special=ids[0] in of_text.tokenizer.all_special_ids)
    groups = measures.words(of_text, asked)
    assert [position for word in groups for position in word] == list(asked.deletable)
    assert len(groups) < len(asked.deletable)
    probabilities = measures.soft(asked, groups, torch.arange(float(len(ids))), 0.5)
    assert all(len({probabilities[position] for position in word}) == 1 for word in groups)
    assert probabilities[-1] == FIXED
    assert len(measures.words(DePass(models.make("llama")), pair([5, 6, 7]))) == 2  # without text each token is a word


def test_dimensions_are_kept_by_their_probabilities_and_seeds() -> None:
    kept, width = (0.0, 0.2, 0.7, 1.0, FIXED), 20_000
    ids = (3, 4, 5, 6, 7)
    own, turned = (Question(ids, 1, kept=kept, turned=turn).factors(width, 0) for turn in (False, True))
    assert own.mean(1).tolist() == pytest.approx([0, 0.2, 0.7, 1, 1], abs=0.02)
    assert torch.equal(own[:4] + turned[:4], torch.ones(4, width))  # one keeps what the other drops
    assert bool(turned[4].all())
    assert torch.equal(own, Question(ids, 1, kept=kept).factors(width, 0))
    for other in (Question(ids, 1, kept=kept, draw=1).factors(width, 0), Question(ids, 1, kept=kept).factors(width, 1)):
        assert not torch.equal(own, other)
    more = Question(ids, 1, kept=(0.1, 0.3, 0.8, 1.0, FIXED)).factors(width, 0)
    assert bool((more >= own).all())  # methods share the random numbers


def test_soft_values_by_hand() -> None:
    row = {"clean": 0.9, "nothing": 0.1, "soft_nc": {"a": [0.5, 1.0]}, "soft_ns": {"a": [0.1, 0.9]}}
    assert measures.value(row, "soft_nc", "a") == pytest.approx(0.25)  # the drops are 0.4 and none, of 0.8
    assert measures.value(row, "soft_ns", "a") == pytest.approx(0.5)
    assert measures.value(row, "soft_ns", "b") is None
    assert measures.value({**row, "nothing": 0.9}, "soft_nc", "a") is None  # the embeddings say nothing


# The task.


def test_all_measures_find_the_one_token_that_matters(tmp_path: Path) -> None:
    prompt = [token for token in range(OTHERS) if token not in (TRIGGER, ANSWER)][:10]
    prompt[3] = TRIGGER
    source = written(tmp_path, [{"prompt": prompt, "target": ANSWER}])
    run(
        TASKS["tokens"],
        DePass(one_token_model()),
        tokens.TokensOptions(data=source, methods="softmax"),
        tmp_path / "out",
    )
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    found = {result["measure"]: result["value"][0] for result in content["results"]}
    assert found == pytest.approx(
        {
            "patch-top, area": 1 / OTHERS, "recover-top, area": 1,
            "disrupt (embeddings zero), area": 10 * ((1 + 1 / OTHERS) / 2 + 9 / OTHERS),
            "recover (embeddings zero), area": 90, "soft-NC": 1, "soft-NS": 1,
        },
        rel=1e-4,
    )  # fmt: skip
    assert all(result["cost"] > 0 for result in content["results"])


def test_slow_methods_are_measured_on_the_first_items_only(dp: DePass, tmp_path: Path) -> None:
    source = written(tmp_path, [{"prompt": models.prompt(5, i), "target": 3} for i in range(5)])
    options: dict[str, Any] = {"data": source, "methods": "softmax,leave_one_out", "keep_wrong": True, "skip": 1}
    options |= {"slow_limit": 2, "measures": "deletion"}
    report = run(TASKS["tokens"], dp, tokens.TokensOptions(**options), tmp_path / "out").read_text()
    rows = {row["id"]: row for row in rows_of(tmp_path / "out")}
    assert [sorted(rows[name]["patch"]) for name in "1234"] == [["leave_one_out", "softmax"]] * 2 + [["softmax"]] * 2
    assert "disrupt" not in rows["1"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert {(result["method"], result["prompts"]) for result in results} == {("softmax", 4), ("leave_one_out", 2)}
    assert "| leave_one_out | 2 |" in report


def test_the_best_mixture_is_named_for_other_prompts(dp: DePass, tmp_path: Path) -> None:
    source = written(tmp_path, [{"prompt": models.prompt(6, i), "target": 3} for i in range(3)])
    options = tokens.TokensOptions(data=source, methods="mixtures", measures="deletion", keep_wrong=True)
    report = run(TASKS["tokens"], dp, options, tmp_path / "out").read_text()
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    gain = dict.fromkeys(methods.MIXTURES, 0.0)
    for result in results:
        gain[result["method"]] += result["value"][0] * (1 if result["better"] == "higher" else -1)
    (said,) = [line for line in report.splitlines() if line.startswith("Of the mixtures")]
    assert gain[said.split("`")[1]] == pytest.approx(max(gain.values()))


def test_the_other_papers_depass_refuses_models_that_it_cannot_read(tmp_path: Path) -> None:
    source = written(tmp_path, [{"prompt": models.prompt(6), "target": 3}])
    options = tokens.TokensOptions(data=source, methods="depass_dpa", keep_wrong=True)
    with pytest.raises(OptionError, match=r"leave depass_dpa out"):
        run(TASKS["tokens"], DePass(models.make("gemma3")), options, tmp_path / "out")
