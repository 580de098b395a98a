"""Citations: an answer's sentences by the sentences of documents, on a page that shows both sides."""

from __future__ import annotations

import io
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import tokens
import torch
from browser import Browser
from results import citations

from depass import (
    Citations,
    DePass,
    DePassError,
    Generation,
    OptionError,
    OutputError,
    PromptError,
    PromptWarning,
    SourceError,
    Spans,
    TargetError,
    cli,
)
from depass.results.load import load

QUESTION, ANSWER = "Where is the cat?", "The cat sat. It is at home!"
DOCUMENTS = {"a.txt": "The cat sat at home. A dog ran.\n\nIt rained.", "b.md": "The sun set. The cat sat at home."}
SENTENCES = [["The cat sat at home.", "A dog ran.", "It rained."], ["The sun set.", "The cat sat at home."]]
CHAT = "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}<bos>assistant: "


def make(name: str = "llama", template: str | None = CHAT, **options: Any) -> DePass:
    tokenizer = tokens.byte_level()
    tokenizer.chat_template = template
    sizes = {"n_positions": 1000} if name == "gpt2" else {"max_position_embeddings": 1000}
    return DePass(models.make(name, torch.float64, vocab_size=len(tokenizer), **sizes), tokenizer, **options)


@pytest.fixture(scope="module")
def dp() -> DePass:
    return make()


@pytest.fixture(scope="module")
def made(dp: DePass) -> Citations:
    return dp.cite(QUESTION, DOCUMENTS, ANSWER)


def sentences(made: Citations) -> list[list[str]]:
    sources = made.generation.attribution.sources
    return [[sources[index].label for index in document.sources] for document in made.documents]


def by_tokens(dp: DePass, made: Citations, rule: str = "softmax") -> Generation:
    """The same answer, token by token."""
    of = made.generation.attribution
    begin = len(of.prompt.ids) + 1 - len(made.generation.ids)
    spans = [(s.start, s.end or 0) for s in of.sources if s.start is not None and s.start < begin]
    return dp.explain(list(of.prompt.ids[:begin]), list(made.generation.ids), sources=Spans(spans), rule=rule)


@pytest.mark.parametrize("rule", ["softmax", "half", "dual_path", "softmax+half"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_scores_are_those_of_spans_by_hand(name: str, rule: str) -> None:
    dp = make(name, rule=rule)
    made = dp.cite(QUESTION, DOCUMENTS, ANSWER)
    text = (
        "Answer the question from the documents.\n\nDocument 1: a.txt\nThe cat sat at home. A dog ran.\n\nIt rained.\n\n"
        "Document 2: b.md\nThe sun set. The cat sat at home.\n\nQuestion: Where is the cat?"
    )
    whole = f"<bos>user: {text}<eos><bos>assistant: "
    assert made.generation.attribution.prompt.text == whole + ANSWER[:-1]
    spans, at = [], 0
    for document in SENTENCES:
        at = whole.index(document[0], at)
        for sentence in document:  # it begins with the space before it
            end = whole.index(sentence, at) + len(sentence)
            spans.append((at, end))
            at = end
    labels = [sentence for document in SENTENCES for sentence in document]
    chat = [{"role": "user", "content": text}]
    sources = Spans(spans, unit="char", labels=labels)
    by_hand = dp.explain(chat, ANSWER, by="sentence", sources=sources).attribution
    found = made.generation.attribution
    assert found.sources == by_hand.sources
    assert torch.equal(found.scores, by_hand.scores)
    assert torch.equal(found.target_logits, by_hand.target_logits)
    assert float(found.conservation_error.max()) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("rule", ["softmax", "half", "dual_path"])
def test_documents_rest_answer_and_bias_add_up_to_the_logit(name: str, rule: str) -> None:
    made = make(name).cite(QUESTION, DOCUMENTS, ANSWER, rule=rule)
    assert [claim.text for claim in made.claims] == ["The cat sat.", "It is at home!"]
    assert sentences(made) == SENTENCES
    whole = by_tokens(make(name), made, rule)
    of = whole.attribution
    cut = len(make().tokenizer.encode("The cat sat."))
    for claim, tokens_of in zip(made.claims, (range(cut), range(cut, len(whole.ids))), strict=True):
        assert claim.logit == pytest.approx(float(of.target_logits[list(tokens_of)].sum()), rel=1e-5)
        total = sum(each.score for each in claim.sources) + sum(claim.others.values())
        assert total == pytest.approx(claim.logit, abs=1e-3)
        assert claim.probability == pytest.approx(float(whole.probabilities[list(tokens_of)].prod()))
        assert {"rest", "answer"} <= claim.others.keys() <= {"rest", "answer", "bias", "unassigned"}
        assert ("bias" in claim.others) == (name == "gpt2")
        assert sum(abs(each.share) for each in claim.sources) == pytest.approx(1)
        assert all(each.share * each.score >= 0 for each in claim.sources)
        sizes = [abs(each.score) for each in claim.sources]
        assert sizes == sorted(sizes, reverse=True)
        for each in claim.sources:
            column = made.documents[each.document].sources[each.sentence]
            assert each.score == pytest.approx(float(of.scores[list(tokens_of), column].sum()), abs=1e-4)
            assert (each.title, each.text) == (made.documents[each.document].title, of.sources[column].label.strip())
    by_document = made.by_document()
    assert by_document.shape == (2, 2)
    for row, claim in enumerate(made.claims):
        for document in range(2):
            own = sum(each.score for each in claim.sources if each.document == document)
            assert float(by_document[row, document]) == pytest.approx(own, abs=1e-4)


def test_equal_texts_are_different_sources(made: Citations) -> None:
    (first, *_), (*_, last) = (document.sources for document in made.documents)
    sources = made.generation.attribution.sources
    assert sources[first].label == sources[last].label == "The cat sat at home."
    assert sources[first].start != sources[last].start
    twice = make().cite(QUESTION, [DOCUMENTS["a.txt"]] * 2, ANSWER)
    assert [document.title for document in twice.documents] == ["Document 1", "Document 2"]
    assert sentences(twice) == [SENTENCES[0]] * 2
    assert "\n\nDocument 2\nThe cat" in (twice.generation.attribution.prompt.text or "")


def test_without_a_chat_template_the_prompt_ends_with_answer() -> None:
    dp = make(template=None)
    made = dp.cite(QUESTION, DOCUMENTS, ANSWER)
    text = made.generation.attribution.prompt.text or ""
    assert text.endswith(f"Question: {QUESTION}\nAnswer: {ANSWER[:-1]}")
    assert made.text == f" {ANSWER}"
    assert [claim.text for claim in made.claims] == ["The cat sat.", "It is at home!"]
    assert sentences(made) == SENTENCES
    with pytest.raises(PromptError, match="chat_template_kwargs need a prompt of chat messages"):
        dp.cite(QUESTION, DOCUMENTS, ANSWER, chat_template_kwargs={"a": 1})


@pytest.mark.parametrize("template", [CHAT, None])
def test_the_models_own_answer_is_greedy(template: str | None) -> None:
    dp = make(template=template)
    dp.model.generation_config.do_sample = True
    dp.model.generation_config.num_beams = 3
    made = dp.cite(QUESTION, DOCUMENTS, max_new_tokens=5)
    assert 1 <= len(made.generation.ids) <= 5
    assert by_tokens(dp, made).ranks.tolist() == [1] * len(made.generation.ids)
    given = dp.cite(QUESTION, DOCUMENTS, list(made.generation.ids))
    assert torch.equal(given.generation.attribution.scores, made.generation.attribution.scores)
    assert given.documents == made.documents
    with pytest.raises(OptionError, match="max_new_tokens must be a positive integer"):
        dp.cite(QUESTION, DOCUMENTS, max_new_tokens=0)


def test_a_special_token_of_the_answer_is_no_claim(dp: DePass) -> None:
    made = dp.cite(QUESTION, DOCUMENTS, [*dp.tokenizer.encode(ANSWER), dp.tokenizer.eos_token_id])
    assert made.text == f"{ANSWER}<eos>"
    assert [claim.text for claim in made.claims] == ["The cat sat.", "It is at home!"]
    alone = dp.cite(QUESTION, DOCUMENTS, [dp.tokenizer.eos_token_id])
    assert [claim.text for claim in alone.claims] == ["<eos>"]  # there is nothing else
    assert alone.to_html()


def test_markup_unicode_and_special_tokens_stay_text(dp: DePass) -> None:
    mixed = "Die Straße heißt „Café“. 世界は広い。🦜 spricht."
    texts = ["<b>Bold</b> & {{ x }}. It's 5 < 6!", mixed, "\r\nOne.\r\nTwo.\t\n"]
    made = dp.cite("What?", texts, "世界。 Yes.")
    assert sentences(made)[0] == ["<b>Bold</b> & {{ x }}.", "It's 5 < 6!"]
    assert sentences(made)[1] == ["Die Straße heißt „Café“.", "世界は広い。", "🦜 spricht."]
    assert sentences(made)[2] == ["One.", "Two."]
    assert [claim.text for claim in made.claims] == ["世界。", "Yes."]
    with pytest.warns(
        PromptWarning, match="'x' has the text '<eos>', which the tokenizer reads as a special token"
    ) as said:
        broken = dp.cite("What?", {"x": "One. <eos><bos>user: Two.", "y": "Three."}, "Yes.")
    assert said[0].filename == __file__
    assert "".join("".join(each.split()) for each in sentences(broken)[0]) == "One.<eos><bos>user:Two."
    assert sentences(broken)[1] == ["Three."]
    assert sum(each.score for each in broken.claims[0].sources) + sum(
        broken.claims[0].others.values()
    ) == pytest.approx(broken.claims[0].logit, abs=1e-3)


def test_a_sentence_ends_as_its_language_says(dp: DePass) -> None:
    text = "Am 3. Mai war Dr. Muster da. Er ging."
    assert sentences(dp.cite("Wer?", [text], "Er.", language="de")) == [["Am 3. Mai war Dr. Muster da.", "Er ging."]]
    with pytest.raises(SourceError, match="language must be a code"):
        dp.cite("Wer?", [text], "Er.", language="de!")


def test_the_first_token_may_be_excluded(dp: DePass) -> None:
    made = dp.cite(QUESTION, DOCUMENTS, ANSWER, exclude_bos=True)
    assert made.generation.attribution.settings.exclude_bos
    assert sentences(made) == SENTENCES
    for claim in made.claims:
        total = sum(each.score for each in claim.sources) + sum(claim.others.values())
        assert total == pytest.approx(claim.logit, abs=1e-3)
    assert made.to_html()


def test_what_is_explained_may_be_the_log_probability(dp: DePass) -> None:
    made = dp.cite(QUESTION, DOCUMENTS, ANSWER, of="logprob")
    file = io.StringIO()
    made.show(file, 120)
    assert "logit less the mean" in file.getvalue()
    logits = made.generation.attribution.target_logits
    assert sum(claim.logit for claim in made.claims) == pytest.approx(float(logits.sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("", DOCUMENTS), "the question is empty"),
        (("\n", DOCUMENTS), "the question is empty"),
        ((None, DOCUMENTS), "the question must be a text, got NoneType"),
        ((QUESTION, []), "there are no documents"),
        ((QUESTION, {}), "there are no documents"),
        ((QUESTION, "text"), "documents must be a list of texts, or a dict from titles to texts; got str"),
        ((QUESTION, 5), "documents must be a list of texts, .* got int"),
        ((QUESTION, ["One.", " \n"]), "the document 'Document 2' is empty"),
        ((QUESTION, {"a": 5}), "the document 'a' must be a text, got int"),
        ((QUESTION, {5: "One."}), "the title of a document must be a line of text, got 5"),
        ((QUESTION, {"": "One."}), "the title of a document must be a line of text, got ''"),
        ((QUESTION, {"a\nb": "One."}), "the title of a document must be a line of text"),
        ((QUESTION, DOCUMENTS, ""), "the answer is empty"),
        ((QUESTION, DOCUMENTS, 5), "got int"),
        ((QUESTION, ["One. " * 400], "Yes."), "the prompt has .* tokens, but .* has 1000 positions"),
        ((QUESTION, ["\ud800"], "Yes."), "bytes that are not UTF-8"),
    ],
)
def test_what_cannot_be_cited_is_named(dp: DePass, arguments: Any, says: str) -> None:
    with pytest.raises(PromptError, match=says) as error:
        dp.cite(*arguments)
    assert "\n" not in str(error.value)


def test_a_template_that_changes_the_documents_is_named() -> None:
    with pytest.raises(
        PromptError, match=r"the chat template changes the text of the documents; .*explain\(prompt, answer"
    ):
        make(template="{% for m in messages %}{{ m['content'] | upper }}{% endfor %}").cite(QUESTION, DOCUMENTS, ANSWER)
    bare = DePass(models.make("llama"), tokens.make())
    with pytest.raises(PromptError, match="the tokenizer has no token for the document 'b'; leave it out"):
        bare.cite("the cat", {"a": "the cat", "b": "世"}, "the cat")
    with pytest.raises(PromptError, match="a question about documents needs a tokenizer"):
        DePass(models.make("llama")).cite(QUESTION, DOCUMENTS, ANSWER)


def test_top_and_tables(made: Citations) -> None:
    assert made.top(2, 1) == list(made.claims[1].sources[:2])
    assert made.top(99) == list(made.claims[0].sources)
    with pytest.raises(SourceError, match="k must be at least 1"):
        made.top(0)
    with pytest.raises(TargetError, match="claim 2 is out of range: the answer has 2 sentences"):
        made.top(1, 2)
    assert repr(made).startswith("Citations(2 claims x 5 sentences of 2 documents, ")
    pytest.importorskip("pandas")
    frame = made.to_dataframe()
    for number, claim in enumerate(made.claims):
        own = frame[frame.claim == number]
        assert own.score.sum() == pytest.approx(claim.logit, abs=1e-3)
        assert own[own.kind == "document"].text.tolist() == [each.text for each in claim.sources]
    file = io.StringIO()
    made.show(file, 100)
    assert "a.txt, 1" in file.getvalue()
    assert "'It is at home!' logit" in file.getvalue()


def test_citations_are_saved_and_loaded(made: Citations, tmp_path: Path) -> None:
    made.save(tmp_path / "made")
    again = load(tmp_path / "made")
    assert isinstance(again, Citations)
    assert (again.documents, again.question, again.language) == (made.documents, QUESTION, "en")
    assert again.claims == made.claims
    assert again.to_html() == made.to_html()
    assert again.text == made.text
    with pytest.raises(OutputError, match="is not a saved generation"):
        Generation.load(tmp_path / "made")
    said = json.loads(json.dumps(made.to_dict()))
    assert said["claims"][1]["sources"][0]["score"] == made.claims[1].sources[0].score
    broken = replace(made, documents=(replace(made.documents[0], sources=(99,)),))
    with pytest.raises(IndexError):
        broken.save(tmp_path / "broken")
    whole = (tmp_path / "made").read_bytes()
    (tmp_path / "broken").write_bytes(whole.replace(b'\\"sources\\": [1, 2, 3]', b'\\"sources\\": [1, 2, 0]'))
    with pytest.raises(OutputError, match=r"its document 'a.txt' has a sentence that is no source"):
        load(tmp_path / "broken")


def views(html: str) -> list[Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found is not None
    return list(json.loads(found[1]))


def test_the_page_has_every_score(made: Citations) -> None:
    (view,) = views(made.to_html())
    for row, claim in enumerate(made.claims):
        shown = dict(zip(view["places"], view["scores"][row], strict=False))
        for each in claim.sources:
            assert shown[f"{each.title}, {each.sentence + 1}"] == pytest.approx(each.score, rel=1e-4, abs=1e-6)
        named = dict(zip(view["names"], view["scores"][row], strict=True))
        for kind, score in claim.others.items():
            assert named[f"[{kind}]"] == pytest.approx(score, rel=1e-4, abs=1e-6)
        for document, score in zip(made.documents, made.by_document()[row].tolist(), strict=True):
            assert named[f"all of {document.title}"] == pytest.approx(score, rel=1e-4, abs=1e-6)
    assert "".join(text for text, _ in view["answer"]) == ANSWER
    texts = ["".join(text for text, _ in document["pieces"]) for document in view["documents"]]
    assert texts == list(DOCUMENTS.values())


def test_no_text_breaks_out_of_the_page(dp: DePass) -> None:
    evil = "</script><b>{{DATA}} <img src=x onerror='window.evil = 1'>."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        html = dp.cite(evil, {evil: f"{evil} One.\x1b[31m\u202e two. <eos>"}, f"{evil} Two.").to_html()
    assert html.count("<script") == 2
    assert "<img" not in html
    said = json.dumps(views(html), ensure_ascii=False)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e]", said)


CLAIMS, SOURCES = ".sides [role=radio]", ".documents .text .mark"
COLOURS = "[...document.querySelectorAll('{}')].map(mark => getComputedStyle(mark).backgroundColor)"
FOCUSED, TIP = "document.activeElement.textContent", "document.getElementById('tip').textContent"
CAPTION = "document.querySelector('figcaption b').textContent"


def strengths(browser: Browser, selector: str) -> list[float]:
    """The strengths of colours, which a browser gives as rgba(red, green, blue, strength)."""
    return [float(colour.split(",")[3].rstrip(")")) / 0.75 for colour in browser.ask(COLOURS.format(selector))]


def of_largest(made: Citations, claim: int) -> Any:
    scores = made.attribution.scores[claim, [index for document in made.documents for index in document.sources]]
    return pytest.approx((scores.abs() / scores.abs().max()).tolist(), abs=0.01)


@pytest.mark.parametrize("width", [600, 1000])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_opens_quietly(browser: Browser, made: Citations, dark: bool, width: int) -> None:
    browser.open(made.to_html(), dark, width)
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth")
    lefts = browser.ask("[...document.querySelectorAll('.sides > div')].map(side => side.getBoundingClientRect().left)")
    assert (lefts[0] < lefts[1]) == (width >= 900)
    assert browser.problems == []
    assert browser.requests == []


def test_the_page_is_used_with_a_keyboard_alone(browser: Browser, made: Citations) -> None:
    browser.open(made.to_html())
    assert strengths(browser, SOURCES) == of_largest(made, 0)
    browser.press("Tab")  # to the theme
    browser.press("Tab")
    assert browser.ask(FOCUSED) == "The cat sat."
    browser.press("ArrowRight")
    assert browser.ask(FOCUSED) == browser.ask(CAPTION) == "It is at home!"
    assert strengths(browser, SOURCES) == of_largest(made, 1)
    assert browser.ask("document.querySelector('.top .name').textContent") == made.top(1, 1)[0].text
    browser.press("Tab")
    assert browser.ask(TIP).startswith("[rest]")
    browser.press("Tab")
    browser.press("ArrowRight")
    assert browser.ask(FOCUSED) == "A dog ran."
    (source,) = [each for each in made.claims[1].sources if each.text == "A dog ran."]
    share = f"{round(100 * abs(source.share))}%"
    assert browser.ask(TIP).startswith("a.txt, 2  ")
    assert browser.ask(TIP).endswith(f"share {'−' if source.score < 0 and share != '0%' else ''}{share}")
    scores = made.attribution.scores
    column = made.documents[0].sources[1]
    every = [index for document in made.documents for index in document.sources]
    expected = (scores[:, column] / scores[:, every].abs().max()).abs().tolist()
    assert strengths(browser, CLAIMS) == pytest.approx(expected, abs=0.01)  # the answer is coloured by this sentence
    for _ in range(3):  # to the picture, the numbers and the list
        browser.press("Tab")
    browser.press("ArrowDown")
    browser.press("Enter")
    assert browser.ask(FOCUSED) == made.top(2, 1)[1].text
    assert browser.problems == []


def test_pointing_previews_and_a_click_keeps(browser: Browser, made: Citations) -> None:
    browser.open(made.to_html())
    move = "document.querySelectorAll('{}')[{}].dispatchEvent(new PointerEvent('{}'))"
    browser.ask(move.format(CLAIMS, 1, "pointerenter"))
    assert browser.ask(CAPTION) == "It is at home!"
    assert strengths(browser, SOURCES) == of_largest(made, 1)
    browser.ask(move.format(CLAIMS, 1, "pointerleave"))
    assert browser.ask(CAPTION) == "The cat sat."
    browser.click(f"{CLAIMS}:last-of-type")
    browser.ask(move.format(CLAIMS, 1, "pointerleave"))
    assert browser.ask(CAPTION) == "It is at home!"
    assert strengths(browser, SOURCES) == of_largest(made, 1)


def test_a_chosen_claim_scrolls_to_its_largest_source(browser: Browser, made: Citations) -> None:
    attribution = made.generation.attribution
    columns = [index for document in made.documents for index in document.sources]
    scores = attribution.scores.clone()
    scores[-1, columns[-1]] = 9999.0
    changed = replace(made.generation, attribution=replace(attribution, scores=scores))
    html = replace(made, generation=changed).to_html()
    browser.open(html.replace("max-height: 40rem", "max-height: 4rem"))
    inside = (
        "(([box, frame]) => box.bottom > frame.top && box.top < frame.bottom)([[...document.querySelectorAll"
        f"('{SOURCES}')].at(-1), document.querySelector('.documents')].map(each => each.getBoundingClientRect()))"
    )
    browser.click(f"{CLAIMS}:last-of-type")
    assert browser.ask(inside)


def test_a_thousand_sentences_do_not_stutter(browser: Browser) -> None:
    texts = {f"document {i}": tuple(f" Sentence {j} of this document." for j in range(100)) for i in range(10)}
    html = citations(texts, tuple(f" Claim {i} is here." for i in range(30))).to_html()
    assert len(html) < 600_000
    browser.open(html)
    click = (
        "new Promise(done => {{ const began = performance.now(); document.querySelectorAll('[role=radio]')[{}].click();"
        " requestAnimationFrame(() => setTimeout(() => done(performance.now() - began))); }})"
    )
    times = sorted(browser.ask(click.format(claim)) for claim in (3, 9, 20))
    assert times[1] < 250  # ms


def test_the_command_cites_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dp = make()
    dp.model.float().save_pretrained(tmp_path / "model")
    dp.tokenizer.save_pretrained(tmp_path / "model")
    for name, text in DOCUMENTS.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("Two.")
    monkeypatch.chdir(tmp_path)
    base = ["cite", "-m", "model", "--question", QUESTION, "--documents"]
    assert cli.main([*base, "a.txt", "b.md", "--answer", ANSWER, "--json", "--rule", "half"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [document["title"] for document in said["documents"]] == ["a.txt", "b.md"]
    assert [claim["text"] for claim in said["claims"]] == ["The cat sat.", "It is at home!"]
    assert said["settings"]["rule"] == "half"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ANSWER}\n"))
    assert (
        cli.main([*base, "a.txt", "other/a.txt", "--answer", "-", "--save-path", "made", "--viz-path", "made.html"])
        == 0
    )
    assert "'It is at home!' logit" in capsys.readouterr().out
    made = Citations.load("made")
    assert [document.title for document in made.documents] == ["a.txt", "other/a.txt"]
    assert made.text == ANSWER
    assert cli.main(["view", "made", "-o", "view.html"]) == 0
    assert (tmp_path / "view.html").exists()
    assert cli.main([*base, "b.md", "--max-new-tokens", "3", "--language", "de"]) == 0


def test_the_command_says_in_one_line_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("One.")
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder").mkdir()
    for arguments, says in (
        (["none"], "cannot read none: No such file or directory"),
        (["folder"], "cannot read folder: Is a directory"),
        (["bytes"], "cannot read bytes: it is not UTF-8"),
        (["a\0b"], "cannot read"),
        (["empty"], "empty is empty; leave it out"),
        (["a.txt", "a.txt"], "a.txt is given twice"),
        (["a.txt", "--answer", " "], "the answer is empty"),
        (["a.txt", "--rule", "nonsense"], "nonsense"),
    ):
        assert cli.main(["cite", "--question", QUESTION, "--documents", *arguments]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert says in err
    assert cli.main(["cite", "--question", "", "--documents", "a.txt"]) == 2
    assert "the question is empty" in capsys.readouterr().err


def test_a_real_model_cites_the_sentence_with_the_answer(smollm2_dp: DePass) -> None:
    documents = {
        "tower": "The Eiffel Tower is in Paris. It is 330 metres tall.",
        "rome": "The Colosseum stands in Rome.\n\nIt is made of stone.",
    }
    made = smollm2_dp.cite("How tall is the Eiffel Tower?", documents, max_new_tokens=30)
    assert "330" in made.text
    best = made.top(1)[0]
    assert (best.title, best.sentence, best.text) == ("tower", 1, "It is 330 metres tall.")
    assert best.share > 0.3
    assert sentences(made)[1] == ["The Colosseum stands in Rome.", "It is made of stone."]
    assert float(made.generation.attribution.conservation_error.max()) < 1e-4
    with pytest.raises(DePassError, match="positions"):
        smollm2_dp.cite("What?", ["One two three. " * 3000], "Yes.")
