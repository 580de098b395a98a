"""The truthful and the language subspace, on models in which both are planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import make as make_model
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokens import make as make_tokenizer
from torch import Tensor

from depass import DataError, DePass, OptionError, Subspace
from depass.cli.main import main
from depass.evaluate import TASKS, forward, language, probes, run, truthful
from depass.inputs.prompt import Prompt, encode

WIDTH = 32


def words(vocabulary: list[str], bos: bool = False) -> Any:
    """A tokenizer with one token for each word."""
    pieces = ["<unk>", "<bos>", *vocabulary]
    tokenizer = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", pad_token="<unk>"
    )


def still(vocabulary: int) -> Any:
    """A model of two layers in which nothing moves: attention is uniform and writes nothing, and the MLPs write nothing."""
    config = tf.LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    for path, parameter in model.named_parameters():
        parameter.data.fill_(1.0 if "norm" in path else 0.0)
    return model


def write(path: Path, rows: list[Any]) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


# Probes.


def test_streams_are_what_enters_each_layer_whatever_else_is_in_the_batch() -> None:
    dp = DePass(make_model("llama"), make_tokenizer())
    prompts = [[5, 9, 30, 7], [8, 8, 40], [3, 50, 60, 9, 10, 11, 12]]
    positions = [[0, 3], [2], [6, 1]]
    found = probes.streams(dp, prompts, positions, [0, 2])
    begin = 0
    for ids, at in zip(prompts, positions, strict=True):
        own = dp.states(ids, layers=[0, 2]).residual
        expected = torch.stack([own[layer][at] for layer in (0, 2)])
        torch.testing.assert_close(found[:, begin : begin + len(at)], expected, rtol=1e-5, atol=1e-5)
        begin += len(at)


def test_a_probe_finds_the_planted_direction_in_features_of_very_different_size() -> None:
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    sizes = torch.logspace(-2, 2, 6)
    stream = torch.randn(400, 6, generator=chance)
    stream[:, 3] += 4.0 * (2 * labels - 1)
    probe = probes.fit(1, stream * sizes + 7.0, labels.tolist(), seed=0)
    direction = (probe.weight[0] * sizes).abs()
    assert int(direction.argmax()) == 3
    assert direction[3] > 5 * direction[[0, 1, 2, 4, 5]].max()
    assert probe.accuracy(stream * sizes + 7.0, labels.tolist()) > 0.99
    assert probes.fit(1, stream, labels.tolist(), seed=0).weight.equal(
        probes.fit(1, stream, labels.tolist(), seed=0).weight
    )


def test_balanced_draws_as_many_positions_of_either_label() -> None:
    positions = [[0, 1, 2], [1, 2], [0], [4, 5, 6, 7]]
    labels = [1, 0, 0, 1]
    drawn = truthful.balanced(positions, labels, 10, seed=0)
    assert [sum(len(of) for of, label in zip(drawn, labels, strict=True) if label == k) for k in (0, 1)] == [3, 3]
    assert all(set(of) <= set(all_) for of, all_ in zip(drawn, positions, strict=True))
    assert sum(map(len, truthful.balanced(positions, labels, 2, seed=0))) == 4
    assert truthful.balanced(positions, labels, 2, seed=0) == truthful.balanced(positions, labels, 2, seed=0)


# Truth.

NEUTRAL = [f"n{i}" for i in range(20)]
FORM = ["Information:", "Question:", "sky", "Options:", "A:", "B:", "x", "y", "The", "answer", "is"]
TRUTH_WORDS = ["true", "false", "decoy", "A", "B", *NEUTRAL, *FORM]


def truthful_toy(bos: bool = False) -> DePass:
    """The answer hangs on attention to ``true`` and ``false``, in dimension 1; it writes what it finds to dimension 0.

    ``decoy`` itself lies far out in dimension 0, on the false side, where nothing attends to it.
    """
    tokenizer = words(TRUTH_WORDS, bos)
    ids = tokenizer.get_vocab()
    model = still(len(ids))
    embedding, head = model.get_input_embeddings().weight.data, model.lm_head.weight.data
    embedding[:, 2:] = torch.randn(len(ids), WIDTH - 2, generator=torch.Generator().manual_seed(1))
    for word, (own, attended) in {
        "true": (0.0, 6.0),
        "false": (0.0, -6.0),
        "decoy": (-35.0, 0.0),
        "sky": (0.0, 1.5),
    }.items():
        embedding[ids[word], 0], embedding[ids[word], 1] = own, attended
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight.data[1, 1] = 1.0
    attention.o_proj.weight.data[0, 1] = 8.0
    head[ids["A"], 0], head[ids["B"], 0] = 1.0, -1.0
    return DePass(model, tokenizer)


def statements(path: Path, seed: int) -> str:
    chance = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(40):
        rest = [NEUTRAL[j] for j in torch.randint(len(NEUTRAL), (5,), generator=chance).tolist()]
        rows.append({"text": " ".join([("false", "true")[i % 2], *rest]), "label": i % 2})
    return write(path, rows)


def question(line: str, right: str = "A") -> dict[str, str]:
    ask = "Question: sky\nOptions: A: x B: y\nThe answer is"
    return {
        "prompt_init": ask,
        "prompt_correct": f"Information: true n3 n4\n{ask}",
        "prompt_wrong": f"Information: {line}\n{ask}",
        "correct_option": right,
    }


def run_truthful(tmp_path: Path, dp: DePass, rows: list[Any], **more: Any) -> list[dict[str, Any]]:
    train, held_out = statements(tmp_path / "train.json", 0), statements(tmp_path / "held.json", 1)
    options = truthful.TruthfulOptions(data=write(tmp_path / "data.json", rows), train=train, held_out=held_out, **more)
    run(TASKS["truthful"], dp, options, tmp_path / "out")
    return rows_of(tmp_path / "out")


@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
def test_the_token_that_misleads_through_attention_is_deleted_and_the_answer_is_right_again(
    tmp_path: Path, bos: bool
) -> None:
    """The probe's own reading is lowest at the decoy, which no other position ever sees."""
    dp = truthful_toy(bos)
    (row,) = run_truthful(tmp_path, dp, [question("n1 false n2 n5 n6 decoy n7 n8")], masked=0.125)
    assert row["status"] == "ok"
    assert (row["tokens"], row["deleted"]) == (8, 1)
    assert row["layer"] == 1  # what enters layer 0 is each token alone
    assert row["held_out"][1] == 1.0
    assert row["held_out"][0] < 0.8
    assert [row[name]["correct"] for name in ("no information", "correct information", "misinformation")] == [
        True,
        True,
        False,
    ]
    assert row["DePass"]["correct"]
    assert not row["probe"]["correct"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "1 items: 1 ok, 0 skipped, 0 errors" in report
    assert (tmp_path / "out" / "answers.png").stat().st_size > 1000


@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
def test_the_information_is_its_own_tokens_and_no_other(bos: bool) -> None:
    """The published mask counts BOS among the information's tokens and so takes each one's neighbour."""
    tokenizer = words(TRUTH_WORDS, bos)
    dp = DePass(still(len(tokenizer)), tokenizer)
    made = encode(question("n1 false n2")["prompt_wrong"], tokenizer, dp.bound)
    line = truthful.information(made)
    assert [tokenizer.decode([made.ids[t]]) for t in line] == ["n1", "false", "n2"]
    left = truthful.without(made.ids, {line[1]})
    assert tokenizer.decode(left, skip_special_tokens=True).split()[:4] == ["Information:", "n1", "n2", "Question:"]


def test_a_token_that_ends_the_line_with_it_stays() -> None:
    tokens = ("Information:", " a", " cat", ".\n", "Question:", " b")
    ends = [len("".join(tokens[: i + 1])) for i in range(len(tokens))]
    offsets = tuple((end - len(token.lstrip(" ")), end) for token, end in zip(tokens, ends, strict=True))
    made = Prompt(tuple(range(6)), tokens, "".join(tokens), offsets)
    assert truthful.information(made) == [1, 2]


@pytest.mark.parametrize("last", [None, 2])
def test_token_scores_are_the_weighted_readings_of_the_states_own_parts(last: int | None) -> None:
    dp = DePass(make_model("llama"), make_tokenizer())
    chance = torch.Generator().manual_seed(0)
    probe = probes.Probe(2, torch.randn(1, 32, generator=chance) / 6, torch.tensor([0.3]))
    ids, line = [5, 9, 30, 7, 44], [1, 2, 3, 4]
    ((true, scores),) = truthful.token_scores(dp, probe, [ids], [line], last)  # type: ignore[misc]
    states = dp.states(ids, layers=2)
    state, stream = states.dense(2), states.residual[2]
    expected_true = [1 / (1 + float((-(stream[t] @ probe.weight[0]) - 0.3).exp())) for t in line]
    read = line if last is None else line[-last:]
    weights = [1 - expected_true[line.index(t)] for t in read]
    expected = [
        sum(w / sum(weights) * float(state[m, t] @ probe.weight[0]) for w, t in zip(weights, read, strict=True))
        for m in line
    ]
    torch.testing.assert_close(true, torch.tensor(expected_true), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_continuations_are_those_of_the_models_own_forward_pass(family: str) -> None:
    dp = DePass(make_model(family), make_tokenizer())
    prompts, answers = [[5, 9, 30], [8, 40, 41, 9, 11, 60], [7]], [[4], [9, 9, 50], [3, 12]]
    found, tops = forward.continuations(dp, prompts, answers)
    for prompt, answer, one, top in zip(prompts, answers, found, tops, strict=True):
        with torch.no_grad():
            logits = dp.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected = [float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
        assert float(one) == pytest.approx(sum(expected) / len(expected), abs=1e-4)
        assert int(top) == int(logits[len(prompt) - 1].argmax())


def test_options_may_be_compared_by_their_texts(tmp_path: Path) -> None:
    """``A`` and ``B`` stand for texts here; a row without texts cannot be measured so."""
    row = question("n1 false n2 n5 n6 decoy n7 n8")
    with_texts = {**row, "correct_info": "A n1", "wrong_info": "B n1"}
    found = run_truthful(tmp_path, truthful_toy(), [with_texts, row], masked=0.125, answer="text")
    measured, refused = sorted(found, key=lambda one: one["id"])
    assert [measured[name]["correct"] for name in ("no information", "misinformation", "DePass")] == [True, False, True]
    assert refused["status"] == "error"
    assert "correct_info" in refused["reason"]


def test_questions_that_cannot_be_asked_are_counted_with_their_reason(tmp_path: Path) -> None:
    good = question("n1 false n2 n5")
    rows = run_truthful(
        tmp_path, truthful_toy(), [good, {"prompt_init": "x"}, {**good, "correct_option": "C"}, question("")]
    )
    assert sorted(row["status"] for row in rows) == ["error", "error", "ok", "skipped"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "4 items: 1 ok, 1 skipped, 2 errors" in report
    assert "no token lies within the line of information" in report


def test_the_same_row_comes_whatever_else_is_measured(tmp_path: Path) -> None:
    rows = [question(f"n1 false n{i} n5 n6 decoy") for i in range(7, 10)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    together = run_truthful(tmp_path / "a", truthful_toy(), rows)
    alone = run_truthful(tmp_path / "b", truthful_toy(), rows, limit=1)
    assert together[0]["random"]["correct"] == alone[0]["random"]["correct"]
    assert together[0]["DePass"]["probability"] == pytest.approx(alone[0]["DePass"]["probability"], abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "n1", "label": 1}], "no row of label 0"),
        ([{"text": "n1", "label": 2}], "a label from 0 to 1"),
        ([{"label": 1}], "expected a text"),
        (["n1"], "row 0"),
    ],
)
def test_statements_that_no_probe_can_be_fitted_on_are_refused(tmp_path: Path, rows: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        probes.labelled(truthful_toy(), write(tmp_path / "train.json", rows), 2)


def test_the_command_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in (
        (["--data", "x"], "--train"),
        ([], "--data"),
        (["--masked", "0"], "not a number above 0 and at most 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["evaluate", "truthful", *given])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


# Language.

MEANINGS, OFFSET = 8, 5


def language_toy() -> tuple[DePass, Tensor]:
    """A word for every language and meaning, and an answer to it; nothing moves, so the last state is the word's embedding.

    It is the meaning's vector plus the language's. The answer's unembedding is the same.

    Returns:
        It, and the languages' offsets ``[6, D]``.
    """
    named = [f"{kind}{g}{m}" for kind in ("word", "answer") for g in range(6) for m in range(MEANINGS)]
    tokenizer = words([*named, *(f"filler{g}" for g in range(6))])
    ids = tokenizer.get_vocab()
    model = still(len(ids))
    chance = torch.Generator().manual_seed(2)
    mixing = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=chance))[0]  # no axis is special
    offsets = 3 * torch.nn.functional.one_hot(torch.arange(6), 6).float()
    offsets = (offsets - offsets.mean(0)) @ mixing[:6]
    contents = 4 * torch.nn.functional.one_hot(torch.arange(MEANINGS), MEANINGS).float() @ mixing[8 : 8 + MEANINGS]
    for g in range(6):
        model.get_input_embeddings().weight.data[ids[f"filler{g}"]] = offsets[g]
        for m in range(MEANINGS):
            model.get_input_embeddings().weight.data[ids[f"word{g}{m}"]] = contents[m] + offsets[g]
            model.lm_head.weight.data[ids[f"answer{g}{m}"]] = contents[m] + offsets[g]
    return DePass(model, tokenizer), offsets


def language_options(tmp_path: Path, layer: int = 1) -> language.LanguageOptions:
    texts = [{"text": f"filler{g} word{g}{m}", "label": g} for g in range(6) for m in range(MEANINGS) for _ in range(3)]
    cases = [
        {key: {"prompt": f"filler{g} word{g}{m}", "answer": f"answer{g}{m}"} for g, key in enumerate(language.KEYS)}
        for m in range(MEANINGS)
    ]
    train = write(tmp_path / "texts.json", texts)
    file = write(tmp_path / "cases.json", cases)
    return language.LanguageOptions(data=file, train=train, held_out=train, layer=layer)


def test_the_subspace_is_the_span_of_the_planted_offsets(tmp_path: Path) -> None:
    dp, offsets = language_toy()
    train = language_options(tmp_path).train
    found = language.find_subspace(dp, train, train, 1, seed=0)
    assert found.basis.shape == (5, WIDTH)  # six offsets that add up to nothing
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(5), rtol=0, atol=1e-5)
    # the classifier sees every axis in units of its spread, and its weights, a sum of what it sees, are taken back
    spread = torch.stack([dp.model.get_input_embeddings().weight[dp.tokenizer.get_vocab()[f"word{g}{m}"]]
                          for g in range(6) for m in range(MEANINGS)]).std(0, correction=0)  # fmt: skip
    expected = offsets / spread.square()
    inside = expected @ found.basis.T @ found.basis
    assert float((inside - expected).norm() / expected.norm()) < 0.15  # saga stops at a tolerance of 0.01
    assert found.facts["held_out"] == 1.0
    assert found.facts["held_out_language"] == 1.0


def test_each_part_says_its_own_and_nothing_of_the_other(tmp_path: Path) -> None:
    dp, _ = language_toy()
    run(TASKS["language"], dp, language_options(tmp_path), tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok"] * MEANINGS
    part = {name: at for at, name in enumerate(language.PARTS)}
    for row in rows:
        for g in range(6):
            assert row["rank"][g][part["whole"]] == 1
            for split in language.SPLITS:
                assert row["chosen"][g][part[f"language ({split})"]]
                assert row["any_rank"][g][part[f"meaning ({split})"]] == 1
                assert row["rank"][g][part[f"meaning ({split})"]] <= 6  # the six answers of the meaning come first
    states = torch.tensor([row["states"] for row in rows])  # [cases, languages, parts, D]
    scale = float(states.norm(dim=-1).max())
    for split in language.SPLITS:
        inside, outside = states[:, :, part[f"language ({split})"]], states[:, :, part[f"meaning ({split})"]]
        torch.testing.assert_close(inside + outside, states[:, :, part["whole"]], rtol=0, atol=1e-3 * scale)
        # the mean is told what belongs together; the classifier's weights lean towards axes of little spread
        leak = 0.05 if split == "mean" else 0.25
        assert float(inside.std(0).norm()) < leak * float(inside.std(1).norm())  # one vector for each language
        assert float(outside.std(1).norm()) < leak * float(outside.std(0).norm())  # one for each meaning
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"{MEANINGS} items: {MEANINGS} ok" in report
    assert (tmp_path / "out" / "parts.png").stat().st_size > 1000


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
def test_final_parts_score_as_the_attribution_of_their_sources_does(family: str) -> None:
    model = make_model(family)
    dp = DePass(model, make_tokenizer())
    chance = torch.Generator().manual_seed(0)
    prompts = [encode([5, 9, 30, 7], dp.tokenizer, dp.bound), encode([8, 40, 41, 9, 11, 60], dp.tokenizer, dp.bound)]
    basis = torch.randn(2, 32, generator=chance)
    specs = [
        [Subspace(1, basis=basis), Subspace(1, parts=torch.randn(1, len(prompt.ids), 32, generator=chance))]
        for prompt in prompts
    ]
    parts = language.final_parts(dp, prompts, specs)
    assert parts.shape == (2, 5, 32)
    targets = [3, 50]
    for prompt, of_prompt, found in zip(prompts, specs, parts, strict=True):
        said = found @ dp.bound.head.weight[targets].T  # [parts, targets]
        for at, spec in enumerate(of_prompt):
            scores = dp.attribute(list(prompt.ids), target=targets, sources=spec).scores  # ..., rest, inside
            torch.testing.assert_close(said[1 + 2 * at : 3 + 2 * at].flip(0).T, scores[:, -2:], rtol=1e-4, atol=1e-4)
            whole = dp.attribute(list(prompt.ids), target=targets).target_logits
            torch.testing.assert_close(said[0], whole, rtol=1e-4, atol=1e-4)


def test_a_classifiers_common_part_is_none_of_its_subspace() -> None:
    chance = torch.Generator().manual_seed(0)
    apart, common = torch.randn(6, 16, generator=chance), 50 * torch.randn(16, generator=chance)
    basis = language.subspace(probes.Probe(0, apart + common, torch.zeros(6)))
    expected = language.subspace(probes.Probe(0, apart, torch.zeros(6)))
    torch.testing.assert_close(basis.T @ basis, expected.T @ expected, rtol=0, atol=1e-4)


def test_cases_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    dp, _ = language_toy()
    options = language_options(tmp_path)
    cases = json.loads(Path(options.data).read_text())
    del cases[1]["German"]
    cases[2]["original"]["prompt"] = " "
    write(tmp_path / "cases.json", cases)
    run(TASKS["language"], dp, options, tmp_path / "out")
    assert f"{MEANINGS} items: {MEANINGS - 2} ok, 0 skipped, 2 errors" in (tmp_path / "out" / "report.md").read_text()


def test_a_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    dp, _ = language_toy()
    with pytest.raises(OptionError, match="has layers 0 to 1"):
        run(TASKS["language"], dp, language_options(tmp_path, layer=2), tmp_path / "out")
