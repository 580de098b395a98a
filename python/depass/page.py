"""The HTML view: one standalone page, readable without scripts; with them, a click on a target recolours the prompt."""

from __future__ import annotations

import json
import re
from html import escape
from importlib.resources import files

from .result import Attribution


def render(res: Attribution) -> str:
    """The page as a string. Every token's text is escaped, and nothing outside of the page is loaded."""
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    settings = res.settings
    rule = f"{settings.rule}, temperature {settings.temperature:g}" if settings.rule == "softmax" else settings.rule
    facts = [
        settings.model, settings.dtype, f"MLPs shared by {rule}", f"layers {settings.start_layer} to {settings.stop_layer}",
        "first token excluded from later MLPs" if settings.exclude_bos else "no token excluded",
    ]  # fmt: skip
    if settings.aggregated:
        facts.append(f"summed up to {settings.aggregated}s")
    others = [(index, source.kind) for index, source in enumerate(res.sources) if source.kind in ("rest", "bias")]
    filled = {
        "FACTS": escape(" · ".join(facts)),
        "TARGETS": "\n".join(_target(res, row) for row in range(len(res.targets))),
        "PROMPT": _prompt(res),
        "OTHERS": "".join(f'<span class="source other" data-source="{index}">{kind}</span>' for index, kind in others),
        "DATA": _data(res),
    }
    # one pass over the template, so that nothing a prompt says is taken for a place in it
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda place: filled[place[1]], template)


def _target(res: Attribution, row: int) -> str:
    target = res.targets[row]
    after = escape(repr(res.prompt.tokens[target.position]))
    return (
        f'<button class="target" data-target="{row}"><b>{escape(repr(target.label))}</b> after token {target.position + 1} '
        f"({after}), logit {float(res.target_logits[row]):.2f}, "
        f"conservation error {float(res.conservation_error[row]):.0e}</button>"
    )


def _prompt(res: Attribution) -> str:
    """The prompt's tokens, runs of one source together, coloured for the first target."""
    rest = next((index for index, source in enumerate(res.sources) if source.kind == "rest"), -1)
    owner = [rest] * len(res.prompt.tokens)  # where there is no rest, the sources cover every token
    for index, source in enumerate(res.sources):
        if source.start is not None and source.end is not None:
            owner[source.start : source.end] = [index] * (source.end - source.start)
    pieces, at = [], 0
    scores = res.scores[0].tolist()
    largest = max((abs(score) for score in scores), default=0.0) or 1.0
    while at < len(owner):
        end = at
        while end < len(owner) and owner[end] == owner[at]:
            end += 1
        score, text = scores[owner[at]], escape("".join(res.prompt.tokens[at:end])) or "·"
        pieces.append(
            f'<span class="source" data-source="{owner[at]}" title="{score:+.3f}" '
            f'style="background:{_paper(score / largest)}">{text}</span>'
        )
        at = end
    return "".join(pieces)


def _paper(share: float) -> str:
    """Red for positive, blue for negative; the page's script has the same two colours."""
    ink = "205,50,45" if share > 0 else "45,90,205"
    return f"rgba({ink},{0.75 * min(1.0, abs(share)):.3f})"


def _data(res: Attribution) -> str:
    data = {
        "scores": [[round(score, 4) for score in row] for row in res.scores.tolist()],
        "labels": [source.label if source.kind in ("token", "span") else f"[{source.kind}]" for source in res.sources],
        "starts": [source.start for source in res.sources],
    }
    # no text may end the script element that it stands in
    return json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
