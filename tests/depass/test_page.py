"""The page: what it carries, and in a browser what it shows, how it is used and what it never does."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import models
import pytest
import tokens
import torch
from browser import Browser
from results import EVIL, KINDS, attribution, citations, generation, survey, sweep, token_attribution

from depass import Attribution, DePass, Generation, OutputError, Spans, Survey, Sweep, cli
from depass.results.load import load
from depass.views.page import render

STRANGE = (
    "<script>window.evil = 1</script>", " \x1b[31m", "\u202eevil", " \u0645\u0631\u062d\u0628",
    " \U0001f469\u200d\U0001f467", "", "\n", "\t", "\x00", ' <img src=x onerror="window.evil = 1">',
    "&amp;", "\r", "\ufffe\uffff", "end",
)  # fmt: skip


def data(html: str) -> list[Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found is not None
    views: list[Any] = json.loads(found[1])
    return views


def close(scores: list[float]) -> Any:
    return pytest.approx(scores, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [3, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sweeps_page_has_every_score_under_its_name(kind: str, columns: int, bias: bool) -> None:
    made = sweep(kind, columns=columns, bias=bias)
    (view,) = data(made.to_html())
    for target in range(2):
        there = dict(zip(view["names"], view["scores"][target], strict=True))
        for row in range(4):
            for column in range(len(made.columns)):
                assert there.pop(made.source(row, column).label) == close(made.scores[target, row, column].item())
        apart = [*made.rest[target].flatten().tolist(), *(made.bias[target].flatten().tolist() if bias else [])]
        assert sorted(there.values()) == close(sorted(apart))
        assert view["largest"][target] == close(made.scores[target].abs().max().item())  # rest does not drown them


def test_the_page_of_many_neurons_is_small_and_has_sums_and_the_largest() -> None:
    made = sweep("neurons", layers=30, columns=1536)
    html = made.to_html()
    assert len(html) < 100_000
    (view,) = data(html)
    for target, scores in enumerate(made.scores):
        there = dict(zip(view["names"], view["scores"][target], strict=True))
        for row, layer in enumerate(made.layers):
            assert there[f"L{layer} neurons, positive"] == close(scores[row].clamp(min=0).sum().item())
            assert there[f"L{layer} neurons, negative"] == close(scores[row].clamp(max=0).sum().item())
            assert there[f"L{layer} rest"] == close(made.rest[target, row].item())
        ranked = sorted((view["names"][index] for index in view["ranked"]), key=lambda label: -abs(there[label]))
        assert ranked[: view["listed"]] == [source.label for source, _ in made.top(50, target)]


@pytest.mark.parametrize(("rule", "bias"), [("half", False), ("half", True), ("steer", False), ("dual_path", True)])
def test_a_surveys_page_has_every_score_under_its_name(rule: str, bias: bool) -> None:
    made = survey(WORDS, rule=rule, bias=bias)
    (view,) = data(made.to_html())
    tokens, heads = view["maps"]
    beside = [*(["bias"] if bias else []), *([made.settings.balance] if made.settings.balance else [])]
    assert [column["name"] for column in tokens["columns"]] == [*map(str, WORDS), *beside]
    assert tokens["layers"] == [0, 1, 2, 3, "out"]
    assert [column["name"] for column in heads["columns"]] == ["0", "1", "2", "attention", "MLP"]
    for target in range(2):
        shown = dict(zip(zip(view["places"], view["names"], strict=True), view["scores"][target], strict=False))
        for row, stage in enumerate(("L0", "L1", "L2", "L3", "out")):
            line = [shown["1", f"{stage} the"], *(shown[str(t + 1), f"{stage} {WORDS[t]}"] for t in range(1, 4))]
            assert line == close(made.tokens[target, row].tolist())
            apart = sum(shown["", f"{stage} {label}"] for label in beside)
            assert sum(line) + apart == pytest.approx(made.target_logits[target].item(), abs=1e-3)
        for layer in range(4):
            assert [shown["", f"L{layer}H{head}"] for head in range(3)] == close(made.heads[target, layer].tolist())
            modules = [shown["", f"L{layer}.{module}"] for module in ("attn", "mlp")]
            assert modules == close(made.modules[target, layer].tolist())
        for source, score in made.top_neurons(20, target):
            assert shown["", source.label] == close(score)
        assert heads["largest"][target] == view["largest"][target] == close(made.heads[target].abs().max().item())
        assert tokens["largest"][target] == close(made.tokens[target, :, :-1].abs().max().item())


def test_a_surveys_cells_lead_to_their_scores_by_position() -> None:
    made = survey(WORDS, rule="steer")
    (view,) = data(made.to_html())

    def strip(cell: int) -> list[float]:
        _, begin = view["strips"][view["strip_of"][cell]]
        scores: list[float] = view["scores"][1][begin : begin + 4]
        return scores

    for row in range(5):
        assert strip(5 * row + 2) == close(made.tokens[1, row].tolist())
        assert view["strip_of"][5 * row + 4] is None  # pattern
    for layer in range(4):
        by_position = torch.cat([made.heads_by_position, made.modules_by_position], 3)[1, layer]
        for column in range(5):
            assert strip(25 + 5 * layer + column) == close(by_position[:, column].tolist())


def test_the_page_of_a_long_survey_sums_neighbouring_tokens_and_is_small() -> None:
    made = survey(tuple(f" w{i}" for i in range(3001)), layers=30)
    html = made.to_html()
    assert len(html) < 1_500_000
    (view,) = data(html)
    tokens = view["maps"][0]
    assert len(tokens["columns"]) == len(view["prompt"]) == 116
    assert tokens["across"] == "sum of 26 neighbouring tokens"
    assert (view["places"][0], view["places"][115]) == ("1–26", "2991–3001")
    assert "".join(text for text, _ in view["prompt"]) == "".join(made.prompt.tokens)
    assert view["scores"][0][1] == close(made.tokens[0, 0, 26:52].sum().item())
    assert view["scores"][0][115] == pytest.approx(made.tokens[0, 0, 2990:].sum().item(), rel=1e-3)


def test_a_survey_of_many_heads_has_the_largest_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depass.views.page._BY_POSITION", 2 * 4 * 7)  # of two targets and four tokens, seven
    made = survey(WORDS)
    (view,) = data(made.to_html())
    kept = {view["names"][cell] for cell, strip in enumerate(view["strip_of"]) if strip is not None and strip >= 5}
    sizes = torch.cat([made.heads, made.modules], 2).flatten(1).abs().amax(0)
    assert kept == {view["names"][20 + cell] for cell in sizes.topk(7).indices.tolist()}
    assert len(view["strips"]) == 5 + 7


def test_of_many_components_the_page_has_the_largest_over_all_targets() -> None:
    made = attribution(11008, "neuron")
    (view,) = data(made.to_html())
    order = made.scores[:, 2:].abs().amax(0).argsort(descending=True)
    assert {view["names"][index] for index in view["ranked"]} == {f"L3N{i}" for i in order[:200].tolist()}
    assert [view["names"][index] for index in view["chips"]] == ["[bias]", "[rest]", "[10808 others]"]
    for row, scores in enumerate(view["scores"]):
        assert sum(scores) == pytest.approx(made.scores[row].sum().item(), abs=0.05)


def test_spans_and_rest_lie_over_the_whole_prompt(device: str) -> None:
    dp = DePass(models.make("llama", device=device), tokens.make())
    (view,) = data(dp.attribute("the cat sat at the cat", sources=Spans([(1, 3), (5, 6)])).to_html())
    assert "".join(text for text, _ in view["prompt"]) == "the cat sat at the cat"
    assert [source for _, source in view["prompt"]] == [0, 1, 0, 2, 0]


def test_a_generations_page_goes_on_behind_the_prompt() -> None:
    made = generation(("the", " cat"), (" sat", "", " here"))
    (view,) = data(made.to_html())
    assert view["prompt"] == [["the", 0], [" cat", 1]]
    assert view["generated"] == [[" sat", 2], ["·", 3], [" here", None]]
    assert view["scores"][0][2:] == [0, 0]


def test_small_scores_keep_their_digits() -> None:
    made = attribution(3)
    made.scores.mul_(1e-9)
    assert data(made.to_html())[0]["scores"][1] == close(made.scores[1].tolist())


@pytest.mark.parametrize(
    "made",
    [
        sweep(),
        sweep("neurons", columns=100),
        attribution(9),
        token_attribution(STRANGE),
        generation(STRANGE, STRANGE),
        survey(STRANGE),
        survey(STRANGE * 20),
        citations({EVIL: STRANGE}, STRANGE),
    ],
    ids=["map", "sums", "components", "tokens", "generation", "survey", "long survey", "citations"],
)
def test_no_text_breaks_out_of_a_page_and_nothing_is_fetched(made: Any) -> None:
    html = made.to_html()
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(html)
    assert (tags.count("script"), tags.count("img"), tags.count("b")) == (2, 0, 0)
    assert "model<i>" in data(html)[0]["facts"]
    assert not re.search(r"(src|href)\s*=\s*[\"']|@import|url\(", html)
    assert set(re.findall(r"https?:[^\"']*", html)) == {"http://www.w3.org/2000/svg"}  # a name, which is not fetched
    assert not re.search(r"\{\{(?!DATA)", html)
    said = json.dumps(data(html), ensure_ascii=False)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\ufffe\uffff]", said)


def test_a_page_is_written_whole_or_refused_by_name(tmp_path: Path) -> None:
    for made in (sweep(), attribution(2), generation(("a",), ("b",)), survey()):
        assert made.to_html(tmp_path / "page.html") == (tmp_path / "page.html").read_text()
        with pytest.raises(OutputError, match="No such file or directory"):
            made.to_html(tmp_path / "none" / "page.html")


def test_a_generation_saved_and_loaded_is_the_same(device: str, tmp_path: Path) -> None:
    dp = DePass(models.make("llama", device=device), tokens.make())
    made = dp.generate("the cat", max_new_tokens=3, eos_token_id=None)
    made.save(tmp_path / "made")
    loaded = Generation.load(tmp_path / "made")
    assert (loaded.text, loaded.tokens, loaded.ids) == (made.text, made.tokens, made.ids)
    for field in dataclasses.fields(Attribution):
        ours, theirs = getattr(made.attribution, field.name), getattr(loaded.attribution, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert json.loads(json.dumps(made.to_dict()))["answer"]["ids"] == list(made.ids)
    for other in (Attribution, Sweep):
        with pytest.raises(OutputError, match="is not a saved"):
            other.load(tmp_path / "made")


def test_a_file_that_contradicts_itself_does_not_load(tmp_path: Path) -> None:
    for made in (attribution(3), sweep(), generation(("a",), ("b",))):
        inner = made.attribution if isinstance(made, Generation) else made
        broken = dataclasses.replace(inner, targets=inner.targets[:0])
        whole = dataclasses.replace(made, attribution=broken) if isinstance(made, Generation) else broken
        whole.save(tmp_path / "broken")
        with pytest.raises(OutputError, match=r"broken: its scores have shape \(.*\), but its labels have shape \(0, "):
            load(tmp_path / "broken")


def test_view_puts_results_of_every_kind_on_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"a.x": attribution(3), "b.safetensors": sweep(), "c": generation(("a",), ("b", "c")), "d": survey()}
    for name, made in kinds.items():
        made.save(tmp_path / name)  # type: ignore[attr-defined]
    paths = [str(tmp_path / name) for name in kinds]
    assert cli.main(["view", *paths, "-o", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    views = data((tmp_path / "page.html").read_text())
    assert [view["name"] for view in views] == paths
    assert ["maps" in view for view in views] == [False, True, False, True]
    assert "generated" in views[2]
    assert cli.main(["view", paths[1]]) == 0
    assert (tmp_path / "b.html").read_text() == render([(paths[1], load(paths[1]).page_view())])


def test_what_cannot_be_viewed_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    made, other, torn, text = (str(tmp_path / name) for name in ("made.html", "other", "torn", "text"))
    attribution(3).save(made)
    save_file({"x": torch.zeros(1)}, other)
    Path(torn).write_bytes(Path(made).read_bytes()[:-9])
    Path(text).write_text("nothing of the kind")
    cases = [
        (["none"], 1, "cannot read none"),
        ([""], 1, "cannot read"),
        ([str(tmp_path)], 1, "cannot read"),
        ([other], 1, f"{other} is not a saved result (attribution, sweep, survey, generation, citations)"),
        ([torn], 1, f"cannot read {torn}"),
        ([text], 1, f"cannot read {text}"),
        ([made], 2, f"the page would overwrite the saved result {made}"),
        ([other, made, "-o", made], 2, f"the page would overwrite the saved result {made}"),
        ([made, "-o", str(tmp_path / "none" / "page.html")], 1, "No such file or directory"),
    ]
    monkeypatch.chdir(tmp_path)
    for arguments, code, says in cases:
        assert cli.main(["view", *arguments]) == code
        out, err = capsys.readouterr()
        assert says in err
        assert (out, err.count("\n")) == ("", 1)
    assert sorted(os.listdir(tmp_path)) == ["made.html", "other", "text", "torn"]


WORDS = ("the", " cat", " sat", ".")
PAGES = {
    "tokens": token_attribution(WORDS), "strange": token_attribution(STRANGE), "components": attribution(9),
    "survey": survey(WORDS, rule="dual_path", bias=True), "strange survey": survey(STRANGE),
    "long survey": survey(WORDS * 100), "many": attribution(300, "neuron"),
    "generation": generation(WORDS, (" here", " now", ".")),
    "citations": citations({"one": WORDS, EVIL: STRANGE, "long": (" A sentence.",) * 200}, (" Here.", " Now", " then.")),
    **{kind: sweep(kind, bias=True) for kind in KINDS}, "dense": sweep(columns=64), "sums": sweep("neurons", columns=100),
    "many experts": sweep("experts", columns=100),
}  # fmt: skip
COLOURS = "[...document.querySelectorAll('.mark:not(.beside)')].map(mark => getComputedStyle(mark).backgroundColor)"


BARS = "[...document.querySelectorAll('.bar')].map(bar => getComputedStyle(bar).backgroundColor)"
STEP = 1 / 255 / 0.75  # a browser keeps a colour's strength as a byte


def sign(colour: str) -> float:
    """The strength of a score's colour, negative for blue."""
    red, _, blue, *strength = map(float, re.findall(r"[\d.]+", colour))
    return (strength[0] if strength else 1.0) * (1 if red > blue else -1) / 0.75


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_without_a_word_on_the_console_or_a_request(browser: Browser, name: str, dark: bool) -> None:
    browser.open(PAGES[name].to_html(), dark)
    paper = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 22, 27)" if dark else "rgb(255, 255, 255)")
    assert browser.ask("document.querySelectorAll('.top tr').length") > 0
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth")
    assert browser.problems == []
    assert browser.requests == []


def test_a_click_on_a_target_recolours(browser: Browser) -> None:
    made = token_attribution(WORDS)
    browser.open(made.to_html())
    for row in (0, 1, 0):
        browser.click(f".targets button:nth-child({row + 1})")
        scores = made.scores[row]
        assert [sign(colour) for colour in browser.ask(COLOURS)] == pytest.approx(
            (scores / scores.abs().max()).tolist(), abs=STEP
        )
        assert browser.ask("document.querySelector('.top .name').textContent") == made.top(1, row)[0][0].label
        checked = "[...document.querySelectorAll('[aria-checked=true]')].map(choice => choice.textContent)"
        assert browser.ask(checked)[0].startswith(repr(made.targets[row].label))


def test_a_click_on_a_heads_target_recolours_the_map(browser: Browser) -> None:
    made = sweep(bias=True)
    browser.open(made.to_html())
    browser.click(".targets button:nth-child(2)")
    scores = made.scores[1].flatten()
    shares = [sign(colour) for colour in browser.ask(COLOURS)]
    assert shares == pytest.approx((scores / scores.abs().max()).tolist(), abs=STEP)
    cells = browser.ask("[...document.querySelectorAll('td.mark')].map(cell => cell.textContent)")
    beside = torch.stack([made.rest[1], made.bias[1]], 1)
    shown = torch.cat([made.scores[1], beside], 1).flatten().tolist()
    assert cells == [f"{score:+.2f}".replace("-", "−") for score in shown]


SHARES = "[...document.querySelectorAll('{}')].map(mark => getComputedStyle(mark).backgroundColor)"


def shares(browser: Browser, selector: str) -> list[float]:
    return [sign(colour) if "0)" not in colour[-3:] else 0.0 for colour in browser.ask(SHARES.format(selector))]


def of_largest(scores: torch.Tensor) -> Any:
    return pytest.approx((scores / scores.abs().max()).flatten().tolist(), abs=STEP)


def test_a_surveys_cells_colour_the_prompt_and_its_tokens_the_heads(browser: Browser) -> None:
    made = survey(WORDS, rule="steer")
    browser.open(made.to_html())
    prompt, left, right = ".text .mark", ".maps > :first-child", ".maps > :last-child"
    own = f"{right} .mark:not(.beside)"
    assert shares(browser, prompt) == of_largest(made.tokens[0, 0])
    assert shares(browser, own) == of_largest(made.heads[0])
    browser.click(f"{left} tr:nth-child(6) td:nth-child(3)")  # two rows of headings, and a heading in each
    assert browser.ask("document.querySelector('.about').textContent").endswith("at the input of layer 2")
    assert shares(browser, prompt) == of_largest(made.tokens[0, 2])
    browser.click(f"{right} tr:nth-child(5) td:nth-child(4)")
    assert browser.ask("document.querySelector('.about').textContent").endswith("L1H2 at each position")
    assert shares(browser, prompt) == of_largest(made.heads_by_position[0, 1, :, 2])
    browser.click(".targets button:nth-child(2)")
    assert shares(browser, prompt) == of_largest(made.heads_by_position[1, 1, :, 2])
    browser.click(f"{prompt}:nth-child(2)")
    assert shares(browser, own) == of_largest(made.heads_by_position[1, :, 1])
    modules = browser.ask(f"[...document.querySelectorAll('{right} td.beside')].map(cell => cell.textContent)")
    shown = made.modules_by_position[1, :, 1].flatten().tolist()
    assert modules == [f"{score:+.2f}".replace("-", "−") for score in shown]
    assert browser.ask("document.querySelector('#tip').textContent").startswith("token 2  L1H2  ")
    browser.click(f"{prompt}:nth-child(2)")
    assert shares(browser, own) == of_largest(made.heads[1])
    assert browser.problems == []


def test_the_keyboard_goes_through_a_survey(browser: Browser) -> None:
    made = survey(WORDS)
    browser.open(made.to_html())
    tip, about = "document.getElementById('tip').textContent", "document.querySelector('.about').textContent"
    browser.ask("document.querySelector('.text .mark').focus()")
    for key, label in [
        ("ArrowRight", "token 2  L0  cat"), ("Tab", "token 1  L0 the"), ("ArrowDown", "token 1  L1 the"), ("Tab", "L0H0"),
        ("ArrowRight", "L0H1"),
    ]:  # fmt: skip
        browser.press(key)
        assert browser.ask(tip).startswith(label)
    browser.press("Enter")
    assert browser.ask(about).endswith("L0H1 at each position")
    browser.ask("document.querySelector('.text .mark').focus()")
    assert browser.ask(tip).startswith("token 1  L0H1")
    assert browser.problems == []


def test_a_long_survey_does_not_stutter(browser: Browser) -> None:
    made = survey(tuple(f" word{i}" for i in range(2400)), layers=32)
    browser.open(made.to_html(), width=1300)
    click = (
        "new Promise(done => {{ const began = performance.now(); document.querySelectorAll('td.mark')[{}].click();"
        " requestAnimationFrame(() => setTimeout(() => done(performance.now() - began))); }})"
    )
    times = sorted(browser.ask(click.format(cell)) for cell in (3, 500, 1000, 2000, 3500))
    assert browser.ask("document.querySelectorAll('td.mark').length") == 33 * 120 + 32 * 5
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth")
    assert times[2] < 250  # ms, as below


def test_a_click_on_a_generated_token_shows_its_sources(browser: Browser) -> None:
    made = generation(WORDS, (" here", " now", "."))
    browser.open(made.to_html())
    for row in (2, 1):
        browser.click(f".choice:nth-child({row + 1})")
        scores = made.attribution.scores[row]
        shares = [sign(colour) if "0)" not in colour[-3:] else 0.0 for colour in browser.ask(COLOURS)]
        assert shares == pytest.approx((scores / scores.abs().max()).tolist(), abs=STEP)
        listed = browser.ask("[...document.querySelectorAll('.top .place')].map(cell => Number(cell.textContent))")
        assert listed == (scores.abs().argsort(descending=True)[: 4 + row] + 1).tolist()
        later = browser.ask("[...document.querySelectorAll('.later')].map(token => token.textContent)")
        assert later == ["."][: 2 - row]


def test_the_keyboard_goes_everywhere(browser: Browser) -> None:
    made = generation(WORDS, (" here", " now", "."))
    html = render([("first", made.page_view()), ("second", sweep(columns=5).page_view())])
    browser.open(html)
    focused, tip = "document.activeElement.textContent", "document.getElementById('tip').textContent"
    checked = "[...document.querySelectorAll('main [aria-checked=true]')].map(token => token.textContent)"
    for key, where in [
        ("Tab", "first"),
        ("Tab", "Light / dark"),
        ("Tab", "the"),
        ("ArrowRight", " cat"),
        ("End", "."),
    ]:
        browser.press(key)
        assert browser.ask(focused) == where
    assert browser.ask(tip) == f"token 4  .  {made.attribution.scores[0, 3]:+.2f}".replace("-", "−")
    browser.press("Tab")
    assert browser.ask(focused) == " here"
    browser.press("ArrowRight")
    assert browser.ask(checked) == [" now"]
    for key in ("Home", "Tab", "Tab"):
        browser.press(key)
    assert browser.ask(checked) == [" here"]
    assert browser.ask("document.activeElement.className") == "numbers"
    browser.ask("document.querySelector('#results button').focus()")
    browser.press("ArrowRight")
    assert browser.ask("document.querySelectorAll('.map').length") == 1
    browser.ask("document.querySelector('td.mark').focus()")
    for key, label in [("ArrowDown", "L3H0"), ("ArrowRight", "L3H1"), ("ArrowUp", "L2H1"), ("ArrowUp", "L2H1")]:
        browser.press(key)
        assert browser.ask(tip).startswith(label)
    assert browser.problems == []


def test_tokens_stay_text(browser: Browser) -> None:
    for made in (token_attribution(STRANGE), generation(STRANGE, STRANGE), survey(STRANGE)):
        browser.open(made.to_html())
        browser.click(".mark")
        assert browser.ask("document.querySelector('.text').textContent").startswith(
            STRANGE[0] + r" \x1b[31m\u202eevil"
        )
        assert browser.ask("document.querySelectorAll('main script, main img').length") == 0
        assert browser.ask("window.evil") is None
        assert browser.problems == []
        assert browser.requests == []
    browser.open(attribution(3).to_html())
    assert browser.ask("document.querySelector('.targets').textContent").count("</script><b>") == 1
    assert EVIL[:9] in browser.ask("document.querySelector('.text').textContent")


def saved(browser: Browser, button: str) -> ElementTree.Element:
    browser.click(button)
    begun = browser.wait("Browser.downloadWillBegin")
    while browser.wait("Browser.downloadProgress")["state"] != "completed":
        pass
    path = browser.folder / begun["suggestedFilename"]
    root = ElementTree.parse(path).getroot()
    path.unlink()
    return root


@pytest.mark.parametrize("name", PAGES)
def test_a_figure_is_saved_as_svg_of_rectangles_and_texts(browser: Browser, name: str) -> None:
    browser.open(PAGES[name].to_html())
    for button, figure in (("figure + .tools button", 0), (".tools:last-of-type button", 1)):
        root = saved(browser, button)
        assert {element.tag.rpartition("}")[2] for element in root} == {"rect", "text"}
        shown = browser.ask(f"document.querySelectorAll('figure')[{figure}].textContent")
        said = "".join(element.text or "" for element in root)
        assert re.sub(r"\s", "", said) == re.sub(r"\s", "", shown)
        colours = set(browser.ask(COLOURS if figure == 0 else BARS)) - {"rgba(0, 0, 0, 0)"}
        assert colours <= {element.get("fill") for element in root}
    assert browser.problems == []


def test_the_theme_button_turns_the_page_over(browser: Browser) -> None:
    browser.open(PAGES["tokens"].to_html())
    paper = "getComputedStyle(document.body).backgroundColor"
    seen = [browser.ask(paper)]
    for _ in range(2):
        browser.click("#theme")
        seen.append(browser.ask(paper))
    assert seen == ["rgb(255, 255, 255)", "rgb(20, 22, 27)", "rgb(255, 255, 255)"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_strongest_colours_leave_the_text_legible(browser: Browser, dark: bool) -> None:
    browser.open(PAGES["tokens"].to_html(), dark)

    def light(colour: list[float]) -> float:  # WCAG 2, relative luminance
        parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    ink, paper, *ends = (
        [float(part) for part in re.findall(r"[\d.]+", browser.ask(f"getComputedStyle({element}).{what}"))]
        for element, what in [
            ("document.querySelector('.text')", "color"), ("document.body", "backgroundColor"),
            ("document.querySelector('.scale').firstChild", "backgroundColor"),
            ("document.querySelector('.scale').lastChild", "backgroundColor"),
        ]
    )  # fmt: skip
    for *end, strength in ends:
        under = [strength * e + (1 - strength) * p for e, p in zip(end, paper, strict=True)]
        low, high = sorted([light(ink), light(under)])
        assert (high + 0.05) / (low + 0.05) > 4.5


def test_two_thousand_tokens_do_not_stutter(browser: Browser) -> None:
    made = generation(tuple(f" word{i}" for i in range(2000)), tuple(f" new{i}" for i in range(100)))
    html = made.to_html()
    began = time.monotonic()
    browser.open(html)
    opened = time.monotonic() - began
    click = (
        "new Promise(done => {{ const began = performance.now(); document.querySelectorAll('.choice')[{}].click();"
        " requestAnimationFrame(() => setTimeout(() => done(performance.now() - began))); }})"
    )
    times = sorted(browser.ask(click.format(row)) for row in (99, 50, 10, 98, 49))
    focus = (
        "new Promise(done => {{ const began = performance.now(); document.querySelectorAll('.mark')[{}].focus();"
        " requestAnimationFrame(() => setTimeout(() => done(performance.now() - began))); }})"
    )
    moves = sorted(browser.ask(focus.format(row)) for row in (0, 500, 1000, 1500, 1999))
    print(f"\n2,000 tokens, 100 generated: opens in {opened:.2f} s, click {times[2]:.0f} ms, focus {moves[2]:.0f} ms")
    assert browser.ask("document.querySelectorAll('.mark').length") == 2099
    texts = [element for element in saved(browser, "figure + .tools button") if element.text]
    heights = [float(element.get("y", "nan")) for element in texts]
    assert len(texts) > 2100
    assert all(after > before - 2 for before, after in pairwise(heights))  # what a box scrolls lies over nothing else
    assert times[2] < 250  # ms; what a hand takes for at once, on a machine that does other things
    assert moves[2] < 250


def test_a_score_that_is_no_number_is_refused() -> None:
    made = attribution(3)
    made.scores[0, 1] = float("nan")
    with pytest.raises(OutputError, match="attribution cannot be shown: a score is NaN or infinite"):
        made.to_html()


def test_a_file_whose_parts_do_not_fit_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = token_attribution(("the", " cat", " sat"))
    late = dataclasses.replace(good, targets=tuple(dataclasses.replace(one, position=9) for one in good.targets))
    wide = dataclasses.replace(good, sources=(*good.sources[:2], dataclasses.replace(good.sources[2], end=9)))
    for made, says in ((late, "target position 9 is out of range"), (wide, "covers tokens 2 to 9")):
        made.save(tmp_path / "res")
        assert cli.main(["view", str(tmp_path / "res")]) == 1
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", Survey.TENSORS)
def test_a_survey_whose_tensors_do_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    made = survey(WORDS)
    tensor = getattr(made, name)
    for torn in (tensor[:1], tensor[..., None], tensor.sum()):
        dataclasses.replace(made, **{name: torn}).save(tmp_path / "survey")
        with pytest.raises(OutputError, match=r"cannot read .*survey: "):
            load(tmp_path / "survey")


def test_hidden_characters_are_shown() -> None:
    hidden = ("a\u200bb", "\u2060", "\u00ad", "\ufeff", "\U000e0041", "\u3164", "end")
    html = token_attribution(hidden).to_html()
    shown = json.dumps(data(html), ensure_ascii=False)
    assert not any(token in shown for token in hidden[:-1])
    assert all(f"\\{name}" in shown for name in ("u200b", "u2060", "xad", "ufeff", "U000e0041", "u3164"))
    family = "\U0001f469\u200d\U0001f467"  # its joiner makes one picture of two
    assert family in json.dumps(data(token_attribution((family, " cat", "end")).to_html()), ensure_ascii=False)


def test_a_files_method_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    made = token_attribution(("the", " cat", "end"))
    dataclasses.replace(made, settings=dataclasses.replace(made.settings, method="\x1b]0;mine\x07")).show()
    assert "\x1b]" not in capsys.readouterr().out
