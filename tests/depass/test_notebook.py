"""A result as the last expression of a notebook's cell: it shows itself, and disturbs neither the notebook nor another."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import browser as browsers
import pytest
from browser import Browser
from results import EVIL, attribution, generation, survey, sweep, token_attribution

RESULTS = {
    "tokens": token_attribution(("the", " cat", EVIL)), "components": attribution(9), "sweep": sweep(),
    "survey": survey(("the", " cat", EVIL)),
    "generation": generation(("the", " cat"), (" sat", EVIL)),
}  # fmt: skip
STYLE = (
    "body { font: 14px Georgia; color: rgb(1, 2, 3) } table { border: 3px solid rgb(255, 0, 0) } .mark { opacity: 0.5 }"
)
# what notebooks do with a cell's HTML: innerHTML of an element, whose scripts run
NOTEBOOK = """<!DOCTYPE html><style>%s</style><body><table id="theirs"><tr><td class="mark">1</td></tr></table>
<div id="result"></div><div id="output1"></div><div id="output2"></div>
<script>%s.forEach((html, index) => {
  const output = document.getElementById(`output${index + 1}`);
  output.innerHTML = html;
  for (const script of output.querySelectorAll("script")) {
    const again = document.createElement("script");
    again.textContent = script.textContent;
    script.replaceWith(again);
  }
});</script>"""
SEEN = """(() => {
  const style = selector => getComputedStyle(document.querySelector(selector));
  const mark = style("#theirs .mark");
  return [style("body").font, style("body").color, style("body").maxWidth, style("body").padding, style("#theirs").border,
          style("#theirs").fontSize, mark.opacity, mark.boxShadow, document.getElementById("result").childElementCount];
})()"""


class Elements(HTMLParser):
    """All elements of a text, each with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_shows_its_page_in_one_element_that_no_token_leaves(name: str) -> None:
    html = RESULTS[name]._repr_html_()
    assert type(html) is str
    ((tag, attributes),) = Elements(html).elements
    assert tag == "iframe"
    assert attributes["srcdoc"] == RESULTS[name].to_html()
    assert set((attributes["sandbox"] or "").split()) == {"allow-scripts", "allow-downloads"}  # no allow-same-origin
    assert "src" not in attributes
    assert set(re.findall(r"https?:[^&\"']*", html)) == {"http://www.w3.org/2000/svg"}  # a name, which is not fetched


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = browsers.find()
    if program is None:
        pytest.skip("there is no Chromium here (apt install chromium)")
    chromium = Browser(program, tmp_path_factory.mktemp("browser"))
    yield chromium
    chromium.close()


def notebook(*outputs: str) -> str:
    return NOTEBOOK % (STYLE, json.dumps(outputs).replace("</", "<\\/"))


def wait_for(document: Browser | Frame, expression: str) -> None:
    until = time.monotonic() + browsers.PATIENCE
    while not document.ask(expression):
        assert time.monotonic() < until, expression
        time.sleep(0.05)


class Frame:
    """The document of one of the notebook's frames: a sandboxed frame is a target of its own."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def ask(self, expression: str) -> Any:
        notebook, self.browser.session = self.browser.session, self.session
        try:
            return self.browser.ask(expression)
        finally:
            self.browser.session = notebook

    def click(self, selector: str, output: int) -> None:
        """A click of the mouse, at its place in the notebook's window."""
        place = "(({left, top, width, height}) => [left + width / 2, top + height / 2])"
        self.browser.ask(f"document.querySelector('#output{output} iframe').scrollIntoView()")
        x, y = self.ask(f"{place}(document.querySelector({json.dumps(selector)}).getBoundingClientRect())")
        left, top = self.browser.ask(
            f"(({{left, top}}) => [left, top])(document.querySelector('#output{output} iframe').getBoundingClientRect())"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.browser.call("Input.dispatchMouseEvent", type=kind, x=left + x, y=top + y, **button)


def frames(browser: Browser, count: int) -> list[Frame]:
    """The frames of the open page, in no order."""
    until = time.monotonic() + browsers.PATIENCE
    targets: list[str] = []
    while len(targets) != count:  # the last page's frames may still be there
        assert time.monotonic() < until, f"{len(targets)} frames"
        infos = browser.call("Target.getTargets")["targetInfos"]
        targets = [info["targetId"] for info in infos if info["type"] == "iframe"]
    attached = [browser.call("Target.attachToTarget", targetId=target, flatten=True) for target in targets]
    return [Frame(browser, answer["sessionId"]) for answer in attached]


def open_notebook(browser: Browser, *outputs: str, handlers: bool = True) -> list[Frame]:
    browser.open(notebook(*outputs), height=2000)
    opened = frames(browser, len(outputs))
    for frame in opened:
        wait_for(frame, "document.querySelectorAll('.mark').length > 0")
        if handlers:  # the frame takes the height of its content
            wait_for(frame, "innerHeight === document.body.offsetHeight")
    return opened


FIRST, SECOND = token_attribution(("the", " cat", " sat", ".")), sweep("heads", bias=True)
STATE = (
    "[[...document.querySelectorAll('.mark')].map(mark => getComputedStyle(mark).backgroundColor), "
    "document.querySelector('[aria-checked=true]').textContent]"
)


def test_two_results_in_one_notebook_both_draw_and_leave_it_and_each_other_alone(browser: Browser) -> None:
    browser.open(notebook())
    before = browser.ask(SEEN)
    opened = open_notebook(browser, FIRST._repr_html_(), SECOND._repr_html_())
    assert browser.ask(SEEN) == before
    first, second = sorted(opened, key=lambda frame: frame.ask("document.querySelectorAll('.map').length"))
    assert first.ask("document.querySelectorAll('.mark').length") == 4
    assert second.ask("document.querySelectorAll('td.mark').length") == 4 * (3 + 2)
    for frame in opened:
        assert frame.ask("document.documentElement.scrollHeight <= innerHeight")  # nothing is cut off or scrolled
        assert frame.ask("(() => { try { return parent.document !== null } catch { return 'apart' } })()") == "apart"
    seen = first.ask(STATE), second.ask(STATE)
    first.click(".targets button:nth-child(2)", 1)
    assert first.ask(STATE)[1].startswith(repr(EVIL)[:6])
    assert first.ask(STATE) != seen[0]
    assert second.ask(STATE) == seen[1]
    first.click("#theme", 1)
    assert first.ask("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 27)"
    assert second.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    changed = first.ask(STATE)
    second.click(".targets button:nth-child(2)", 2)
    assert second.ask(STATE) != seen[1]
    assert first.ask(STATE) == changed
    assert browser.ask(SEEN) == before
    assert browser.problems == []
    assert browser.requests == []


def test_a_figure_is_saved_out_of_a_notebook(browser: Browser) -> None:
    (frame,) = open_notebook(browser, FIRST._repr_html_())
    frame.click("figure + .tools button", 1)
    begun = browser.wait("Browser.downloadWillBegin")
    while browser.wait("Browser.downloadProgress")["state"] != "completed":
        pass
    path = browser.folder / begun["suggestedFilename"]
    assert path.read_text(encoding="utf-8").startswith("<svg")
    path.unlink()


def test_a_notebook_that_runs_no_handler_shows_a_frame_that_scrolls(browser: Browser) -> None:
    (frame,) = open_notebook(browser, re.sub(r' onload="[^"]*"', "", FIRST._repr_html_()), handlers=False)
    wait_for(browser, "document.querySelector('iframe').clientHeight === 480")
    assert frame.ask("document.querySelectorAll('.mark').length") == 4
    assert frame.ask("document.documentElement.scrollHeight > innerHeight")
