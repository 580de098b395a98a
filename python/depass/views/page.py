"""The page: results as one standalone HTML file. Here is what it says; ``page.js`` draws it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import OutputError
from ..files import write_atomically
from ..inputs.settings import Settings
from ..sources.source import Source, name
from .drawing import GRID, NUMBERED, Explained, Grid, Scored, abridged, beside, components, headings, scale

View: TypeAlias = dict[str, Any]  # what ``page.js`` draws of one result
_KEPT = 200  # components of an attribution; the others are one sum
_LISTED, _LISTED_COMPONENTS = 12, 50  # largest contributions, and those that are shown nowhere else
_LONGEST = 60  # characters of a name; longer ones are cut in the middle
_DIGITS = 5  # of a score, significant


# control characters, those that turn the direction of what follows, and those without any shape but the joiners of emoji and
# scripts; nothing that a program reading SVG would refuse
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\u3164\ud800-\udfff\ufeff"
    "\uffa0\ufffe\uffff\U000e0000-\U000e007f]"
)


def render(views: Sequence[tuple[str, View]], path: str | os.PathLike[str] | None = None) -> str:
    """One page of named results, which loads nothing from outside and parses no token as HTML; written to ``path`` if given.

    Raises:
        OutputError: the path cannot be written, or a score is no number.
    """
    for called, view in views:
        if not all(math.isfinite(score) for row in view["scores"] for score in row):
            raise OutputError(f"{called} cannot be shown: a score is NaN or infinite")
    data = [{"name": _seen(called), **view} for called, view in views]
    folder = files(__package__)
    template, style, script = (
        folder.joinpath(file).read_text(encoding="utf-8") for file in ("page.html", "page.css", "page.js")
    )
    parts = {
        "STYLE": style.strip(),
        "SCRIPT": script,
        "HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        # no text may end the script element that it stands in
        "DATA": json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    }
    # one pass over the template, so that nothing a prompt says is taken for a place in it
    html = re.sub(r"\{\{([A-Z]+)\}\}", lambda place: parts[place[1]], template)
    if path is not None:
        write_atomically(path, html.encode())
    return html


def attribution_view(res: Scored) -> View:
    """A prompt whose parts are coloured, and the largest of them."""
    largest = [scale(res, row) for row in range(len(res.targets))]
    res = abridged(res, res.scores.abs().amax(0), _KEPT)
    among = components(res)
    ranked = among[:_KEPT] or list(range(len(res.sources)))  # behind those is the sum of the others
    many = len(ranked) > GRID and bool(among)
    facts = _facts(res.settings)
    if res.settings.adds_up:
        facts.append("first token excluded from later MLPs" if res.settings.exclude_bos else "no token excluded")
    if res.settings.aggregated:
        facts.append(f"summed up to {res.settings.aggregated}s")
    what = "the model's own parts" if among else "each part of its prompt"
    return {
        "question": f"What the model's next token owes to {what}",
        "facts": " · ".join(facts),
        **_words(res.settings, "They are signed, and all of them together add up to the target's logit."),
        "targets": [_target(res, row, _after(res, row)) for row in range(len(res.targets))],
        "scores": _rounded(res.scores),
        "largest": largest,
        "names": [_short(name(source)) for source in res.sources],
        "places": [_place(source) for source in res.sources],
        "ranked": ranked,
        "listed": _LISTED_COMPONENTS if many else _LISTED,
        "prompt": _pieces(res, len(res.prompt.tokens)),
        "chips": [i for i, source in enumerate(res.sources) if source.start is None and not (many and i in ranked)],
    }


def generation_view(res: Scored, tokens: Sequence[str]) -> View:
    """A prompt and the ``tokens`` that were generated behind it, each with its own sources."""
    begin = len(res.prompt.tokens) - len(tokens) + 1  # the last generated token is the source of nothing
    sources = {source.start: index for index, source in enumerate(res.sources)}
    return {
        **attribution_view(res),
        "question": "What each generated token owes to the text before it",
        "targets": [_target(res, row, f"generated token {row + 1}") for row in range(len(res.targets))],
        "prompt": _pieces(res, begin),
        "generated": [[_seen(text) or "·", sources.get(begin + row)] for row, text in enumerate(tokens)],
    }


def sweep_view(sweep: Grid) -> View:
    """A map of layers and components, or for more than a map can show their sums by layer, and the largest."""
    kind, rows = sweep.kind, range(len(sweep.targets))
    whole = len(sweep.columns) <= GRID
    cells = _Cells(sweep, whole)
    sums = (
        "A row with what stands beside it adds up to the target's logit: every layer is a decomposition of its own, and "
        "layers are compared, not added up."
    )
    return {
        "question": f"Which {'attention heads' if kind == 'heads' else kind} raise or lower the model's next token, "
        "layer by layer",
        "facts": " · ".join([*_facts(sweep.settings), f"{len(sweep.layers)} layers × {len(sweep.columns)} {kind}"]),
        **_words(sweep.settings, sums),
        "targets": [_target(sweep, row, _after(sweep, row)) for row in rows],
        "scores": _rounded(cells.scores),
        "largest": cells.largest,
        "names": cells.names,
        "places": [""] * len(cells.names),
        "ranked": cells.ranked,
        "listed": _LISTED if whole else _LISTED_COMPONENTS,
        "prompt": [[_seen("".join(sweep.prompt.tokens)), None]],
        "chips": [],
        "map": {
            "columns": [{"name": heading, "beside": beside} for heading, beside in cells.headings],
            "layers": list(sweep.layers),
            "across": kind.removesuffix("s") if whole else f"sum of the {kind} that",
            "numbered": cells.numbered,
        },
    }


class _Cells:
    """The cells of a sweep's map, row by row, and behind them the largest components where the map has sums alone.

    Attributes:
        scores: ``[targets, cells]``.
        names: of each cell.
        largest: of each target, the score in full colour.
        ranked: the cells that are listed by size.
        headings: of each column, and whether it stands beside the components.
    """

    def __init__(self, sweep: Grid, whole: bool) -> None:
        if whole:
            columns = list(zip(headings(sweep), sweep.scores.unbind(2), strict=True))
            names = [[sweep.source(row, c).label for c in range(len(columns))] for row in range(len(sweep.layers))]
        else:
            signs = (("raise", sweep.scores.clamp(min=0)), ("lower", sweep.scores.clamp(max=0)))
            columns = [(does, scores.sum(2)) for does, scores in signs]
            names = [[f"L{layer} {sweep.kind} that {does}" for does, _ in columns] for layer in sweep.layers]
        apart = beside(sweep)
        width = len(columns) + len(apart)
        cells = torch.stack([scores for _, scores in [*columns, *apart]], 2)  # [targets, layers, width]
        self.numbered = len(columns) <= NUMBERED
        self.headings = [(heading, c >= len(columns)) for c, (heading, _) in enumerate([*columns, *apart])]
        self.largest = [size or 1.0 for size in cells[:, :, : len(columns)].abs().amax((1, 2)).tolist()]
        self.scores = cells.flatten(1)
        self.names = [
            name
            for layer, line in zip(sweep.layers, names, strict=True)
            for name in (*line, *(f"L{layer} {what}" for what, _ in apart))
        ]
        self.ranked = [cell for cell in range(len(self.names)) if cell % width < len(columns)]
        if not whole:  # the largest neurons stand behind the cells and are listed alone
            order = sweep.scores.flatten(1).abs().argsort(dim=1, descending=True, stable=True)
            best = sorted(set(order[:, :_LISTED_COMPONENTS].flatten().tolist()))
            self.ranked = list(range(len(self.names), len(self.names) + len(best)))
            self.scores = torch.cat([self.scores, sweep.scores.flatten(1)[:, best]], 1)
            self.names += [sweep.source(*divmod(cell, len(sweep.columns))).label for cell in best]


def _facts(settings: Settings) -> list[str]:
    if not settings.adds_up:
        return [settings.model, settings.dtype, f"scores by {settings.method}, which promise no sum"]
    rule = f"{settings.rule}, temperature {settings.temperature:g}" if settings.rule == "softmax" else settings.rule
    layers = f"layers {settings.start_layer} to {settings.stop_layer}"
    return [settings.model, settings.dtype, f"MLPs shared by {rule}", layers]


def _words(settings: Settings, sums: str) -> dict[str, str]:
    """What scores are in and what their signs mean; ``sums`` says what they add up to."""
    if settings.adds_up:
        return {"low": "lowers the logit", "high": "raises the logit", "hint": f"Scores are logits. {sums}"}
    hint = f"Scores are by {settings.method}, in units of its own. They promise no sum."
    return {"low": "lowest", "high": "highest", "hint": hint}


def _target(res: Explained, row: int, where: str) -> dict[str, str]:
    error = f", conservation error {float(res.conservation_error[row].max()):.0e}" if res.settings.adds_up else ""
    logit = f"{float(res.target_logits[row]):.2f}".replace("-", "−")
    return {"label": _short(repr(res.targets[row].label)), "logit": logit, "about": f"{where}, logit {logit}{error}"}


def _after(res: Explained, row: int) -> str:
    position = res.targets[row].position
    return f"after token {position + 1} ({res.prompt.tokens[position]!r})"


def _pieces(res: Scored, end: int) -> list[list[Any]]:
    """The first ``end`` tokens, runs of one source together, each with its source's index; None where none is of it."""
    tokens = res.prompt.tokens[:end]
    if components(res):
        return [[_seen("".join(tokens)), None]]
    rest = next((index for index, source in enumerate(res.sources) if source.kind == "rest"), None)
    owner: list[int | None] = [rest] * len(res.prompt.tokens)  # where there is no rest, the sources cover every token
    for index, source in enumerate(res.sources):
        if source.start is not None and source.end is not None:
            owner[source.start : source.end] = [index] * (source.end - source.start)
    pieces: list[list[Any]] = []
    for token, its in zip(tokens, owner, strict=False):
        if pieces and pieces[-1][1] == its:
            pieces[-1][0] += token
        else:
            pieces.append([token, its])
    return [[_seen(text) or "·", its] for text, its in pieces]


def _place(source: Source) -> str:
    """A source's tokens, counted from 1."""
    if source.start is None or source.end is None:
        return ""
    return str(source.end) if source.end == source.start + 1 else f"{source.start + 1}–{source.end}"


def _seen(text: str) -> str:
    """Text with an escape for each character that would not be seen, or would change how others are."""
    marked = text.replace("\n", "↵\n").replace("\t", "→\t")
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), marked)


def _short(label: str) -> str:
    half = _LONGEST // 2
    cut = label if len(label) <= _LONGEST else f"{label[:half]} … {label[-half:]}"
    return _seen(cut if cut.strip(" ") else "␣" * len(cut)).replace("\n", "") or "·"


def _rounded(scores: Tensor) -> list[list[float]]:
    return [[float(f"{score:.{_DIGITS}g}") for score in row] for row in scores.tolist()]
