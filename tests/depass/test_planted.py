"""Planted truth: what the generator promises of its prompts, and how the citations are scored and counted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from depass import DePass, OptionError, Spans, Token, cli
from depass.evaluate import TASKS, citations, planted, run
from depass.evaluate.task import Row

MANY = range(150)
OK_ON_SMOLLM2 = {
    "documents": (1, 4, 6, 7),
    "chains": (4, 6, 7, 12),
}  # some of the prompts that the report in docs/evaluation measured


def wordy() -> Any:
    """A tokenizer whose tokens are the words and full stops of all planted prompts."""
    questions = [question for kind in planted.KINDS for i in MANY for question in planted.questions(kind, i, 0)]
    words = sorted(
        {
            word
            for q in questions
            for text in (q.prompt, q.answer, q.other)
            for word in re.findall(r"\w+|[^\w\s]+", text)
        }
    )
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path, tokenizer = tmp_path_factory.mktemp("model"), wordy()
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    tf.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def dp(folder: str) -> DePass:
    return DePass.from_pretrained(folder)


def rows_of(folder: Path) -> dict[str, Row]:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return {row["id"]: row for row in rows}


def texts(question: planted.Question, level: str) -> list[str]:
    return [question.prompt[begin:end] for begin, end in question.levels[level].ranges]


def holding(parts: list[str], value: str) -> list[int]:
    return [i for i, part in enumerate(parts) if re.search(rf"\b{value.strip()}\b", part)]


# The generator.


@pytest.mark.parametrize("kind", planted.KINDS)
def test_a_prompt_depends_on_its_seed_and_number_alone(kind: str) -> None:
    first = [planted.questions(kind, i, 3) for i in range(20)]
    assert [planted.questions(kind, i, 3) for i in reversed(range(20))] == first[::-1]
    prompts = [planted.questions(kind, i, seed)[0].prompt for seed in (3, 4) for i in range(20)]
    assert len(set(prompts)) == 40


@pytest.mark.parametrize("index", MANY)
def test_one_sentence_in_one_document_holds_the_fact(index: int) -> None:
    (question,) = planted.questions("documents", index, 0)
    sentences, documents = texts(question, "sentence"), texts(question, "document")
    assert holding(sentences, question.answer) == [question.levels["sentence"].truth]
    assert holding(documents, question.answer) == [question.levels["document"].truth]
    assert question.prompt.count(question.answer) == 1
    lead = question.prompt.rsplit("Answer: ", 1)[1]
    domain, subject = next(
        (domain, match[1])
        for domain in planted.DOMAINS.values()
        for form in domain.sentences
        if (match := re.fullmatch(form.split(" {value}")[0].format(subject=r"(\w+ [\w ]+)"), lead))
    )
    values = [[value for value in domain.values if holding([document], value)] for document in documents]
    rivals = [of for of in values if of]
    assert [len(of) for of in rivals] == [1] * (1 + planted.RIVALS)  # distractors of the same kind
    assert len({of[0] for of in rivals}) == len(rivals)
    assert question.other.strip() not in {of[0] for of in rivals}
    assert holding(sentences, subject) == [question.levels["sentence"].truth]


@pytest.mark.parametrize("index", range(20))
def test_documents_consist_of_their_sentences(index: int) -> None:
    (question,) = planted.questions("documents", index, 0)
    assert " ".join(texts(question, "sentence")) == " ".join(texts(question, "document"))
    paragraphs = question.prompt.split("\n\n")
    assert paragraphs[1:-1] == texts(question, "document")
    assert {len(re.findall(r"\.", document)) for document in paragraphs[1:-1]} <= set(planted.SENTENCES)


@pytest.mark.parametrize("index", MANY)
def test_one_premise_and_one_step_hold_the_answer(index: int) -> None:
    answer, origin = planted.questions("chains", index, 0)
    steps, statements, premises = texts(answer, "step"), texts(answer, "statement"), texts(origin, "premise")
    assert statements == [*premises, *steps]
    assert holding(steps, answer.answer) == [answer.levels["step"].truth]
    assert holding(premises, answer.answer) == [origin.levels["premise"].truth]
    assert statements[answer.levels["statement"].truth] == steps[answer.levels["step"].truth]
    story = next(story for story in planted.STORIES.values() if answer.answer.strip() in story.values)
    assert sum(bool(holding([step], value)) for step in steps for value in story.values) == 2  # it has a rival
    (who,) = re.findall(rf"(?:{'|'.join(planted.FIRST)}) \w+", answer.prompt.rsplit("\n", 1)[1])
    assert answer.levels["step"].truth in holding(steps, who)
    assert len(holding(steps, who)) == len(steps) - 1
    assert answer.prompt.startswith(f"{origin.prompt}{origin.answer}")
    assert origin.prompt.endswith(premises[origin.levels["premise"].truth].partition(origin.answer)[0])


@pytest.mark.parametrize("kind", planted.KINDS)
def test_the_changed_prompt_differs_only_where_the_truth_is(kind: str) -> None:
    for question in (question for i in MANY for question in planted.questions(kind, i, 0)):
        for parts in question.levels.values():
            begin, end = parts.ranges[parts.truth]
            assert question.changed.startswith(question.prompt[:begin])
            assert question.changed.endswith(question.prompt[end:])
        assert question.changed.replace(question.other, question.answer) == question.prompt
        assert question.other not in question.prompt


@pytest.mark.parametrize(("kind", "level"), [("documents", "document"), ("chains", "step"), ("chains", "premise")])
def test_the_truth_may_be_anywhere(kind: str, level: str) -> None:
    found = [q.levels[level] for i in MANY for q in planted.questions(kind, i, 0) if level in q.levels]
    places = [parts.truth for parts in found]
    own = range(len(found[0].ranges))
    assert set(places) == set(own)
    assert min(places.count(place) for place in own) > len(MANY) / len(own) / 2


# Counting.


@pytest.mark.parametrize(
    ("scores", "truth", "expected"),
    [
        ([0.1, 3.0, -4.0], 1, 1.0),
        ([0.1, 3.0, -4.0], 0, 0.0),
        ([0.1, 3.0, -4.0], 2, 0.0),  # signed: the largest magnitude does not count
        ([2.0, 2.0, 1.0], 0, 0.5),
        ([2.0, 2.0, 1.0], 2, 0.0),
        ([0.0, 0.0, 0.0, 0.0], 3, 0.25),
        ([-2.0, -1.0], 1, 1.0),
    ],
)
def test_recall_shares_ties(scores: list[float], truth: int, expected: float) -> None:
    assert citations.recall(scores, truth) == expected


def test_the_report_counts_right_parts_and_pairs_prompts(tmp_path: Path) -> None:
    wrong, right, tied = [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]
    by_prompt = [dict.fromkeys(citations.METHODS, wrong) for _ in range(4)]
    for prompt in by_prompt[:3]:
        prompt["softmax"] = right
    by_prompt[0]["last_attention"] = right
    by_prompt[3]["half"] = tied
    rows = [
        {"id": str(i), "kind": "chains", "tokens": 9, "answer_tokens": 1, "right": True, "conservation_error": 0.0,
         "levels": {"step": {"truth": 0, "scores": scores}}}
        for i, scores in enumerate(by_prompt)
    ]  # fmt: skip
    report = TASKS["citations"].report(rows, citations.CitationsOptions(), tmp_path)
    lines = [line.split("|") for line in report.splitlines() if line.startswith("| `")]
    cells = {line[1].strip(" `"): line[2:5] for line in lines}
    means = {name: [float(cell.split()[0]) if cell.strip() else None for cell in of] for name, of in cells.items()}
    assert means["softmax"] == [0.75, 0.5, 0.75]
    assert means["half"] == [0.125, -0.125, 0.125]
    assert means["last_attention"] == [0.25, None, 0.25]
    assert means["mean_attention"] == [0.0, -0.25, None]
    assert means["random"] == [0.25, 0.0, 0.25]
    assert cells["softmax"][0].strip() == str(citations.mean([1.0, 1.0, 1.0, 0.0], 0))


# Measuring.


@pytest.fixture(scope="module")
def measured(dp: DePass, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    run(TASKS["citations"], dp, citations.CitationsOptions(limit=4, keep_wrong=True), out)
    return out


def test_the_kinds_alternate_and_every_level_is_measured(measured: Path) -> None:
    rows = rows_of(measured)
    assert list(rows) == ["documents-0", "chains-0", "documents-1", "chains-1"]
    for name, row in rows.items():
        levels = ["sentence", "document"] if name.startswith("documents") else ["statement", "step", "premise"]
        assert list(row["levels"]) == levels
        for level in row["levels"].values():
            assert tuple(level["scores"]) == citations.METHODS
            assert len({len(scores) for scores in level["scores"].values()}) == 1
        assert row["conservation_error"] < 1e-4
    report = (measured / "report.md").read_text()
    assert [line for line in report.splitlines() if line.startswith("## ")] == [
        f"## {title}" for title in citations.LEVELS.values()
    ]


def test_scores_are_those_of_the_methods_themselves(dp: DePass, measured: Path) -> None:
    (question,) = planted.questions("documents", 1, 0)
    row = rows_of(measured)["documents-1"]["levels"]
    ids, (answer,) = dp.tokenizer.encode(question.prompt), dp.tokenizer.encode(question.answer)
    offsets = dp.tokenizer(question.prompt, return_offsets_mapping=True)["offset_mapping"]
    sentences = [
        [t for t, (begin, end) in enumerate(offsets) if first <= begin and end <= last]
        for first, last in question.levels["sentence"].ranges
    ]
    spans = Spans([(part[0], part[-1] + 1) for part in sentences])
    for rule in citations.RULES:
        result = dp.attribute(ids, Token(answer, len(ids) - 1), sources=spans, rule=rule)
        of_spans = [i for i, source in enumerate(result.sources) if source.kind == "span"]
        expected = result.scores[0, of_spans].tolist()
        assert row["sentence"]["scores"][rule] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    tokens = dp.attribute(ids, Token(answer, len(ids) - 1), rule="half").scores[0]
    expected = [float(tokens[part].sum()) for part in sentences]
    assert row["sentence"]["scores"]["half"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    with torch.no_grad():
        whole = dp.model(torch.tensor([ids])).logits[0, -1].log_softmax(0)[answer]
        for part, score in zip(sentences, row["sentence"]["scores"]["leave_one_out"], strict=True):
            left = [token for t, token in enumerate(ids) if t not in part]
            fall = whole - dp.model(torch.tensor([left])).logits[0, -1].log_softmax(0)[answer]
            assert score == pytest.approx(float(fall), abs=1e-4)
    dp.model.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = dp.model(torch.tensor([ids]), output_attentions=True).attentions
    for name, pattern in (("last_attention", patterns[-1][0]), ("mean_attention", torch.cat(patterns).mean(0))):
        expected = [float(pattern.mean(0)[-1, part].sum()) for part in sentences]
        assert row["sentence"]["scores"][name] == pytest.approx(expected, abs=1e-5)


def test_a_documents_score_is_the_sum_of_its_sentences(measured: Path) -> None:
    (question,) = planted.questions("documents", 0, 0)
    levels = rows_of(measured)["documents-0"]["levels"]
    for name in (*citations.RULES, *citations.ATTENTION):
        by_sentence = levels["sentence"]["scores"][name]
        for (begin, end), score in zip(
            question.levels["document"].ranges, levels["document"]["scores"][name], strict=True
        ):
            inside = [
                by_sentence[i] for i, (a, b) in enumerate(question.levels["sentence"].ranges) if begin <= a and b <= end
            ]
            assert score == pytest.approx(sum(inside), rel=1e-3, abs=1e-5)


def test_prompts_that_the_model_answers_wrong_are_counted_by_kind(dp: DePass, tmp_path: Path) -> None:
    report = run(TASKS["citations"], dp, citations.CitationsOptions(limit=4), tmp_path / "out").read_text()
    assert "4 items: 0 ok, 4 skipped, 0 errors." in report
    reasons = re.findall(r"^- \d skipped: (\w+): (.+)$", report, re.M)
    assert {kind for kind, _ in reasons} == set(planted.KINDS)
    assert {reason for _, reason in reasons} <= {citations.WRONG, citations.UNMOVED}
    assert "No prompt was measured." in report


def test_the_command_resumes(folder: str, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["evaluate", "citations", "-m", folder, "--limit", "4", "--keep-wrong", "--out", str(out)]
    assert cli.main(command) == 0
    capsys.readouterr()
    whole = (out / "rows.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (out / "rows.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])
    assert cli.main(command) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.md")
    assert (out / "rows.jsonl").read_bytes().startswith(b"".join(lines[:2]))
    again, before = rows_of(out), rows_of(measured)
    assert list(again) == list(before)
    for name, row in again.items():
        for level, of in row["levels"].items():
            expected = before[name]["levels"][level]
            assert of["truth"] == expected["truth"]
            assert of["scores"]["steered"] == pytest.approx(expected["scores"]["steered"], rel=1e-3, abs=1e-5)


def test_one_kind_alone(dp: DePass, tmp_path: Path) -> None:
    options = citations.CitationsOptions(data="chains", limit=2, keep_wrong=True)
    run(TASKS["citations"], dp, options, tmp_path)
    assert list(rows_of(tmp_path)) == ["chains-0", "chains-1"]
    with pytest.raises(OptionError, match="data"):
        citations.CitationsOptions(data="facts")


def test_a_model_without_a_tokenizer_is_refused(dp: DePass, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the model has no tokenizer"):
        run(TASKS["citations"], DePass(dp.model), citations.CitationsOptions(limit=1), tmp_path)


@pytest.mark.parametrize(("kind", "ok"), OK_ON_SMOLLM2.items())
def test_the_real_model_answers_from_the_part_that_decides(smollm2_dp: DePass, kind: str, ok: tuple[int, ...]) -> None:
    answered = [citations.asked(smollm2_dp, planted.questions(kind, i, 0)[0]) for i in ok]
    assert sum(question.right and question.moved for question in answered) >= len(ok) - 1  # rounding may turn one
