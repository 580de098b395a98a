"""The documents: they list every public name, their links and examples work, and the tutorial has been run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import depass
import depass.evaluate
import depass_kernels

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md")) + sorted(DOCS.glob("reference/*.md"))
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")), *PAGES]


@pytest.fixture(scope="module")
def tutorial() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "tutorial.ipynb").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    ("page", "package"),
    [("depass", depass), ("evaluate", depass.evaluate), ("kernels", depass_kernels)],
)
def test_the_reference_has_every_public_name(page: str, package: Any) -> None:
    text = (DOCS / "reference" / f"{page}.md").read_text(encoding="utf-8")
    named = re.findall(r"^\.\. (?:auto(?:class|function|exception)|data):: (\w+)$", text, re.M)
    assert sorted(named) == sorted(package.__all__)


def test_the_readme_leads_to_every_page() -> None:
    linked = set(links(ROOT / "README.md"))
    pages = {path.relative_to(ROOT).as_posix() for path in (*DOCS.glob("*.md"), *DOCS.glob("*.ipynb"))}
    assert pages - linked == {"docs/index.md"}  # it only leads to others


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    missing = [link for link in links(document) if not (document.parent / link).exists()]
    assert not missing


def links(document: Path) -> list[str]:
    """What a document links to or shows of this repository."""
    found = re.findall(r"\]\(([^()\s]+)\)", document.read_text(encoding="utf-8"))
    return [link.partition("#")[0] for link in found if not link.startswith(("http", "#"))]


@pytest.mark.usefixtures("smollm2_folder")
def test_the_readmes_example_prints_what_the_readme_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.+?)```\n\n```\n(.+?)```", text, re.S)
    assert example is not None
    monkeypatch.setenv("COLUMNS", "100")
    exec(example[1], {})
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert without_error("\n".join(printed)) == without_error(example[2].rstrip("\n"))


def without_error(text: str) -> str:
    """The conservation error is rounding, which differs between machines."""
    return re.sub(r"\(error [^)]*\)", "(error)", text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_fits_the_page(document: Path) -> None:
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```", document.read_text(encoding="utf-8"), re.M | re.S)
    code = [lines for language, lines in blocks if not language.startswith("{")]  # the others are directives of Sphinx
    assert [line for lines in code for line in lines.splitlines() if len(line) > 88] == []


def test_the_tutorial_has_been_run_from_top_to_bottom(tutorial: dict[str, Any]) -> None:
    code = [cell for cell in tutorial["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    said = [output for cell in code for output in cell["outputs"]]
    assert said
    assert not [output for output in said if output["output_type"] == "error" or output.get("name") == "stderr"]


def test_the_tutorial_is_small_and_loads_nothing_from_outside(tutorial: dict[str, Any]) -> None:
    text = (DOCS / "tutorial.ipynb").read_text(encoding="utf-8")
    assert len(text) < 400_000
    shown = json.dumps([cell.get("outputs") for cell in tutorial["cells"]])
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=\W*(?:https?:)?//", shown)
