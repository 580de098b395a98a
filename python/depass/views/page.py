"""The page: results as one standalone HTML file. This module writes its texts and data; ``page.js`` draws them."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import rules
from ..errors import OutputError
from ..files import write_atomically
from ..inputs.settings import Settings
from ..sources.source import Source, name
from .drawing import (
    GRID,
    NUMBERED,
    SINGULAR,
    Explained,
    Grid,
    Layered,
    Scored,
    abridged,
    behind,
    beside,
    components,
    drawn,
    headings,
    largest_elsewhere,
    likelihood,
    numbers,
    place,
    quantity,
    scale,
    spans,
    summed,
)

View: TypeAlias = dict[str, Any]  # the data of one result, as ``page.js`` reads them
_KEPT = 200  # components of an attribution that are shown; the others become one sum
_LISTED, _LISTED_COMPONENTS = 12, 50  # lengths of the list of largest contributions
_LONGEST = 60  # characters of a name; longer names are cut in the middle
_SENTENCE = 160  # characters of a sentence in a list; a longer one is cut in the middle
_WIDEST = 12  # characters of a token over its column
_BY_POSITION = 150_000  # scores by position of heads and modules on a survey's page, about a megabyte and a half
_DIGITS = 5  # significant digits of a score
_FRAME_HEIGHT = 480  # pixels, until the page in the frame has told its height


# control characters, characters that change the direction of writing, and invisible characters, except the joiners of emoji
# and scripts; a program that reads SVG may refuse them
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\u3164\ud800-\udfff\ufeff"
    "\uffa0\ufffe\uffff\U000e0000-\U000e007f]"
)


def render(views: Sequence[tuple[str, View]], path: str | os.PathLike[str] | None = None) -> str:
    """One page of named results; written to ``path`` if given. It loads nothing, and no token is parsed as HTML.

    Raises:
        OutputError: the path cannot be written, or a score is NaN or infinite.
    """
    for result_name, view in views:
        if not all(math.isfinite(score) for row in view["scores"] for score in row):
            raise OutputError(f"{result_name} cannot be shown: a score is NaN or infinite")
    data = [{"name": _seen(result_name), **view} for result_name, view in views]
    directory = files(__package__)
    template, style, script = (
        directory.joinpath(file).read_text(encoding="utf-8") for file in ("page.html", "page.css", "page.js")
    )
    parts = {
        "STYLE": style.strip(),
        "SCRIPT": script,
        "HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        # no text may close the script element that contains it
        "DATA": json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    }
    # one pass over the template: a placeholder in a prompt must not be filled in
    page = re.sub(r"\{\{([A-Z]+)\}\}", lambda place: parts[place[1]], template)
    if path is not None:
        write_atomically(path, page.encode())
    return page


def framed(page: str) -> str:
    """A page as an ``<iframe>`` for a notebook's cell.

    The frame is a document of its own: its styles, element ids and scripts do not meet those of the notebook or of another
    result. ``sandbox`` keeps its scripts from reading the notebook, and still allows its button to save an SVG. The page
    tells its height by a message; where the notebook runs no ``onload``, the frame keeps its first height and scrolls.
    """
    fit = (
        "window.addEventListener('message', event => { "
        "if (event.source === this.contentWindow) this.height = event.data; "
        "}); this.contentWindow.postMessage('height', '*')"
    )
    return (
        f'<iframe title="DePass result" sandbox="allow-scripts allow-downloads" width="100%" height="{_FRAME_HEIGHT}" '
        f'style="border: 0" onload="{html.escape(fit)}" srcdoc="{html.escape(page)}"></iframe>'
    )


def attribution_view(res: Scored) -> View:
    """The view of an attribution: the prompt with its parts coloured, and a list of the largest contributions."""
    res, unassigned = drawn(res)
    largest = [scale(res, row) for row in range(len(res.targets))]
    res = abridged(res, res.scores.abs().amax(0), _KEPT)
    named = components(res)
    ranked = named[:_KEPT] or list(range(len(res.sources)))  # the sum of the others comes after these
    many = len(ranked) > GRID and bool(named)
    facts = _facts(res.settings)
    if "forward" in res.settings.engine:
        excluded = "first token excluded from later tokens' MLPs"
        facts.append(excluded if res.settings.exclude_bos else "no token excluded from the MLPs")
    if res.settings.aggregated:
        facts.append(f"scores summed by {res.settings.aggregated}")
    parts = "component of the model" if named else "part of the prompt"
    return {
        "question": f"How much each {parts} contributed to the target",
        "facts": " · ".join(facts),
        **_words(
            res.settings, f"They {'' if unassigned is None else 'and what is unassigned '}add up to the target's logit."
        ),
        "targets": [_target(res, row, place(res, row), unassigned) for row in range(len(res.targets))],
        "scores": _rounded(res.scores),
        "largest": largest,
        "names": [_short(name(source)) for source in res.sources],
        "places": [_place(source) for source in res.sources],
        "ranked": ranked,
        "listed": _LISTED_COMPONENTS if many else _LISTED,
        "prompt": _pieces(res, len(res.prompt.tokens)),
        "chips": [i for i, source in enumerate(res.sources) if source.start is None and not (many and i in ranked)],
    }


def generation_view(res: Scored, tokens: Sequence[str], parts: Sequence[tuple[int, int]]) -> View:
    """The view of an answer: the prompt, and the ``parts`` of the answer's ``tokens``, each with its own scores."""
    begin = len(res.prompt.tokens) - len(tokens) + 1  # the last token of the answer is not a source
    sources, (_, unassigned) = {source.start: index for index, source in enumerate(res.sources)}, drawn(res)
    by = "part" if any(b - a > 1 for a, b in parts) else "token"
    columns = [sources.get(begin + a) if b - a == 1 else None for a, b in parts]
    texts = ["".join(tokens[a:b]) for a, b in parts]
    return {
        **attribution_view(res),
        "question": f"How much the text before each {by} of the answer contributed to it",
        "targets": [
            _target(res, row, f"{by} {row + 1} of the answer, {place(res, row)}", unassigned)
            for row in range(len(res.targets))
        ],
        "prompt": _pieces(res, begin),
        "generated": [[_seen(text) or "·", column] for text, column in zip(texts, columns, strict=True)],
    }


def citations_view(
    res: Scored,
    tokens: Sequence[str],
    ranges: Sequence[tuple[int, int]],
    documents: Sequence[tuple[str, Sequence[int]]],
    asked: str,
) -> View:
    """The view of citations: the answer beside the documents.

    Args:
        res: one target for each sentence of the answer.
        tokens: the answer's tokens.
        ranges: the sentences' tokens, from 0 in the answer.
        documents: the title of each document, and the columns of its sentences.
        asked: the question.
    """
    begin = len(res.prompt.tokens) - len(tokens) + 1
    res, unassigned = drawn(res)
    sentences = [column for _, columns in documents for column in columns]
    sums = [(title, res.scores[:, list(columns)].sum(1)) for title, columns in documents]
    others = _others(res, begin, set(sentences))
    apart = [score for _, score in (*sums, *others)]
    scores = torch.cat([res.scores[:, sentences], torch.stack(apart, 1)], 1)
    labels = [_short(res.sources[column].label, _SENTENCE) for column in sentences]
    names = [*labels, *(f"all of {_short(title)}" for title, _ in sums), *(f"[{name}]" for name, _ in others)]
    places = [f"{_short(title)}, {n}" for title, columns in documents for n in range(1, len(columns) + 1)]
    texts, first = [], 0
    for number, (title, columns) in enumerate(documents):
        pieces = _prose(res, begin, columns, first)
        texts.append({"title": _short(title), "sum": len(sentences) + number, "pieces": pieces})
        first += len(columns)
    summands = ["The documents' sentences", *(f"[{name}]" for name, _ in others)]
    summands += [] if unassigned is None else ["what is unassigned"]
    unit = f"{', '.join(summands)} add up to the sentence's logit, the sum over its tokens."
    return {
        "question": "How much each sentence of the documents contributed to the answer",
        "facts": " · ".join([*_facts(res.settings), f"{len(documents)} documents, {len(sentences)} sentences"]),
        "asked": _seen(asked),
        **_words(res.settings, f"{unit} A share is a score divided by the sum of all sentences' absolute scores."),
        "targets": _of_claims(res, unassigned),
        "scores": _rounded(scores),
        "largest": [size or 1.0 for size in scores[:, : len(sentences)].abs().amax(1).tolist()],
        "names": names,
        "places": [*places, *[""] * len(apart)],
        "ranked": list(range(len(sentences))),
        "listed": _LISTED,
        "answer": _claims(tokens, ranges),
        "documents": texts,
        "chips": list(range(len(sentences) + len(sums), len(names))),
    }


def _of_claims(res: Scored, unassigned: Tensor | None) -> list[dict[str, str]]:
    """The labels of an answer's sentences, and what is said of each."""
    targets = []
    for row, target in enumerate(res.targets):
        count = len(target.token_ids)
        where = f"sentence {row + 1} of {len(res.targets)}, {count} token{'s' if count > 1 else ''}"
        said = _target(res, row, where, unassigned)
        targets.append({**said, "label": _short(target.label.strip())})
    return targets


def _others(res: Scored, begin: int, cited: set[int]) -> list[tuple[str, Tensor]]:
    """The names and the scores ``[targets]`` of what is no sentence of a document; the answer's tokens are one sum."""
    sums: dict[str, Tensor] = {}
    for column, source in enumerate(res.sources):
        if column not in cited:
            is_answer = source.start is not None and source.start >= begin
            label = "answer" if is_answer else "rest" if source.kind == "span" else source.kind
            sums[label] = sums.get(label, 0) + res.scores[:, column]
    return list(sums.items())


def _prose(res: Scored, begin: int, columns: Sequence[int], first: int) -> list[list[Any]]:
    """The pieces of a document: its sentences with their numbers from ``first``, and the space between them."""
    pieces: list[list[Any]] = []
    for number, column in enumerate(columns, first):
        source = res.sources[column]
        text = "".join(res.prompt.tokens[source.start : source.end])
        bare = text.strip()
        before, _, after = text.partition(bare) if bare else ("", "", "")
        pieces += [[before, None], [bare or "·", number], [after, None]]
    pieces = [[_seen(text).replace("↵\n", "\n"), number] for text, number in pieces if text]
    while pieces and pieces[0][1] is None:
        del pieces[0]
    return pieces


def _claims(tokens: Sequence[str], ranges: Sequence[tuple[int, int]]) -> list[list[Any]]:
    """The pieces of an answer: its sentences with their numbers, and what lies between them."""
    pieces: list[list[Any]] = []
    at = 0
    for number, (begin, end) in enumerate([*ranges, (len(tokens), len(tokens))]):
        text = "".join(tokens[begin:end])
        bare = text.strip()
        before, _, after = text.partition(bare) if bare else ("", "", "")
        pieces += [["".join(tokens[at:begin]) + before, None]]
        pieces += [[bare or "·", number], [after, None]] if number < len(ranges) else []
        at = end
    return [[_seen(text).replace("↵\n", "\n"), number] for text, number in pieces if text]


def sweep_view(sweep: Grid) -> View:
    """The view of a sweep: a map of layers and components, or their sums by layer where a map would be too wide."""
    kind, rows = sweep.kind, range(len(sweep.targets))
    whole = len(sweep.columns) <= GRID
    cells = _Cells(sweep, whole)
    balance = sweep.settings.balance
    others = "the remainder (rest) and the bias" if balance is None else f"the remainder (rest), the bias and {balance}"
    separately = (
        "Attention and MLP of each layer are decomposed separately: the score of each,"
        if kind == "modules"
        else "Each layer is decomposed separately: its scores,"
    )
    sums = f"{separately} {others} add up to the target's logit. So compare layers; do not add them up."
    return {
        "question": f"How much each {SINGULAR[kind]} contributed to the target, layer by layer",
        "facts": " · ".join([*_facts(sweep.settings), f"{len(sweep.layers)} layers × {len(sweep.columns)} {kind}"]),
        **_words(sweep.settings, sums),
        "targets": [_target(sweep, row, place(sweep, row)) for row in rows],
        "scores": _rounded(cells.scores),
        "largest": cells.largest,
        "names": cells.names,
        "places": [""] * len(cells.names),
        "ranked": cells.ranked,
        "listed": _LISTED if whole else _LISTED_COMPONENTS,
        "prompt": [[_seen("".join(sweep.prompt.tokens)), None]],
        "chips": [],
        "maps": [
            {
                "columns": [{"name": heading, "beside": beside} for heading, beside in cells.headings],
                "layers": list(sweep.layers),
                "across": SINGULAR[kind] if whole else f"sum of {SINGULAR[kind]} scores",
                "numbered": cells.numbered,
                "every": 1 if cells.numbered else 4,
                "upright": False,
                "largest": cells.largest,
            }
        ],
    }


def survey_view(survey: Layered) -> View:
    """The view of a survey: a map of layers and tokens beside one of layers and heads, and the largest neurons.

    Its scores are the cells of both maps, row by row; the neurons; and the strips that are no row of the map of tokens. A
    strip is a row of scores by position, which colours the prompt when one of its cells is chosen.
    """
    columns = spans(len(survey.prompt.tokens))
    maps, neurons = (_token_map(survey, columns), _head_map(survey)), _largest_neurons(survey)
    tokens, heads = maps
    by_position, kept = _by_position(survey, columns)
    names, wide = [*tokens.names, *heads.names, *neurons], len(tokens.headings)
    ranked = range(len(names) - len(neurons), len(names))
    stages = [*(f"the input of layer {layer}" for layer in survey.layers), f"the output of layer {survey.layers[-1]}"]
    strips = [(f"the tokens' scores at {stage}", row * wide) for row, stage in enumerate(stages)]
    strips += [(f"{heads.names[cell]} at each position", len(names) + i * len(columns)) for i, cell in enumerate(kept)]
    owned = {cell: strip for strip, cell in enumerate(kept, len(stages))}
    own_row = [row if column < len(columns) else None for row in range(len(stages)) for column in range(wide)]
    texts = ["".join(survey.prompt.tokens[begin:end]) for begin, end in columns]
    places = [numbers(*span) for span in columns] + [""] * tokens.beside
    summands = " and ".join(["the tokens", *tokens.headings[len(columns) :]])
    sums = (
        f"At the input of each layer, and at the output of the last (out), {summands} add up to the target's logit. Heads, "
        "attention, MLP and neurons have the scores of their outputs. So compare layers; do not add them up. In the map of "
        "tokens, full colour is the largest score outside the target's own position, whose stream ends as the whole logit."
    )
    size = f"{len(survey.layers)} layers × {len(survey.prompt.tokens)} tokens"
    return {
        "question": "How much each token, head and neuron contributed to the target, layer by layer",
        "facts": " · ".join([*_facts(survey.settings), size]),
        **_words(survey.settings, sums),
        "use": "Choose a cell to colour the prompt by its layer's tokens, or by its head at each token. Choose a token to "
        "see the heads there, and again to see their sums.",
        "targets": [_target(survey, row, place(survey, row)) for row in range(len(survey.targets))],
        "scores": _rounded(torch.cat([tokens.cells, heads.cells, torch.tensor([*neurons.values()]).T, by_position], 1)),
        "largest": heads.largest,
        "names": names,
        "places": places * len(stages) + [""] * (len(names) - len(tokens.names)),
        "ranked": list(ranked),
        "listed": _LISTED_COMPONENTS,
        "list": "Neurons with the largest scores for ",
        "prompt": [[_seen(text) or "·", column] for column, text in enumerate(texts)],
        "chips": [],
        "maps": [each.data() for each in maps],
        "strips": strips,
        "strip_of": own_row + [owned.get(cell) for cell in range(len(heads.names))],
    }


@dataclass(frozen=True)
class _Map:
    """A map of layers and columns.

    Attributes:
        cells: its scores ``[targets, rows * columns]``.
        names: the name of each cell.
        largest: for each target, the score drawn in full colour.
        layers: the heading of each row.
        headings: the heading of each column.
        beside: how many of the columns, the last ones, stand beside the others: numbers without a colour.
        across: what the columns are.
        every: every how many columns there is room for a heading.
        upright: whether the headings are turned.
    """

    cells: Tensor
    names: list[str]
    largest: list[float]
    layers: Sequence[int | str]
    headings: list[str]
    beside: int
    across: str
    every: int
    upright: bool

    def data(self) -> dict[str, Any]:
        """The map as ``page.js`` reads it."""
        own = len(self.headings) - self.beside
        return {
            "columns": [{"name": name, "beside": column >= own} for column, name in enumerate(self.headings)],
            "layers": list(self.layers),
            "across": self.across,
            "numbered": False,
            "every": self.every,
            "upright": self.upright,
            "largest": self.largest,
        }


def _token_map(survey: Layered, columns: list[tuple[int, int]]) -> _Map:
    scores, apart, size = (
        summed(survey.tokens, columns),
        behind(survey),
        columns[0][1],
    )  # [targets, layers + 1, columns]
    labels = [label for label, _ in apart]
    texts = [_short(survey.prompt.tokens[begin]) if size == 1 else "" for begin, _ in columns]
    ranges = [numbers(*span) for span in columns]
    stages = [*(f"L{layer}" for layer in survey.layers), "out"]
    return _Map(
        cells=torch.cat([scores, *(score[:, :, None] for _, score in apart)], 2).flatten(1),
        names=[f"{stage} {text}".strip() for stage in stages for text in (*texts, *labels)],
        largest=[
            largest_elsewhere(each, columns, target.position)
            for each, target in zip(scores, survey.targets, strict=True)
        ],
        layers=[*survey.layers, "out"],
        headings=[*(map(_heading, texts) if size == 1 else ranges), *labels],
        beside=len(labels),
        across="token" if size == 1 else f"sum of {size} neighbouring tokens",
        every=1 if size == 1 else 4,
        upright=True,
    )


def _head_map(survey: Layered) -> _Map:
    heads, modules = survey.heads, survey.modules
    parts = [*(f"H{head}" for head in range(heads.shape[2])), ".attn", ".mlp"]
    return _Map(
        cells=torch.cat([heads, modules], 2).flatten(1),
        names=[f"L{layer}{part}" for layer in survey.layers for part in parts],
        largest=[size or 1.0 for size in heads.abs().amax((1, 2)).tolist()],
        layers=survey.layers,
        headings=[*(str(head) for head in range(heads.shape[2])), "attention", "MLP"],
        beside=2,
        across="attention head",
        every=1 if heads.shape[2] <= NUMBERED else 4,
        upright=False,
    )


def _by_position(survey: Layered, columns: list[tuple[int, int]]) -> tuple[Tensor, list[int]]:
    """Scores by position ``[targets, cells * columns]`` of cells of the map of heads, and these cells.

    They are all cells, or those with the largest scores where all would make the page too large.
    """
    scores = torch.cat(
        [survey.heads_by_position, survey.modules_by_position], 3
    )  # [targets, layers, tokens, heads + 2]
    scores = summed(scores, columns).transpose(2, 3).flatten(1, 2)  # [targets, cells, columns]
    order = scores.sum(2).abs().amax(0).argsort(descending=True, stable=True)
    kept = order[: _BY_POSITION // scores[:, 0].numel()].sort().values
    return scores[:, kept].flatten(1), kept.tolist()


def _largest_neurons(survey: Layered) -> dict[str, list[float]]:
    """The names of the largest neurons of all targets, each with its scores; 0 where it is not among the largest."""
    count = len(survey.targets)
    found: dict[str, list[float]] = {}
    for row in range(count):
        for source, score in survey.top_neurons(_LISTED_COMPONENTS, row):
            found.setdefault(source.label, [0.0] * count)[row] = score
    return found


class _Cells:
    """The cells of a sweep's map, row by row. A map of sums has the largest components appended to them.

    Attributes:
        scores: ``[targets, cells]``.
        names: the name of each cell.
        largest: for each target, the score drawn in full colour.
        ranked: the cells that the list of largest contributions takes from.
        headings: for each column, its heading and whether it stands beside the components (``rest``, ``bias``).
    """

    def __init__(self, sweep: Grid, whole: bool) -> None:
        if whole:
            columns = list(zip(headings(sweep), sweep.scores.unbind(2), strict=True))
            names = [[sweep.source(row, c).label for c in range(len(columns))] for row in range(len(sweep.layers))]
        else:
            signs = (("positive", sweep.scores.clamp(min=0)), ("negative", sweep.scores.clamp(max=0)))
            columns = [(sign, scores.sum(2)) for sign, scores in signs]
            names = [[f"L{layer} {sweep.kind}, {sign}" for sign, _ in columns] for layer in sweep.layers]
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
            for name in (*line, *(f"L{layer} {label}" for label, _ in apart))
        ]
        self.ranked = [cell for cell in range(len(self.names)) if cell % width < len(columns)]
        if not whole:  # the largest neurons come after the cells; only they are listed
            order = sweep.scores.flatten(1).abs().argsort(dim=1, descending=True, stable=True)
            best = sorted(set(order[:, :_LISTED_COMPONENTS].flatten().tolist()))
            self.ranked = list(range(len(self.names), len(self.names) + len(best)))
            self.scores = torch.cat([self.scores, sweep.scores.flatten(1)[:, best]], 1)
            self.names += [sweep.source(*divmod(cell, len(sweep.columns))).label for cell in best]


def _facts(settings: Settings) -> list[str]:
    model = [settings.model, settings.dtype]
    if settings.family != "declared":
        model.append(f"family: {settings.family}")
    if not settings.adds_up:
        return [*model, f"baseline {settings.method}"]
    tempered = any(part.rule == "softmax" for part in rules.read(settings.rule).parts)
    rule = f"{settings.rule}, temperature {settings.temperature:g}" if tempered else settings.rule
    layers = f"layers {settings.start_layer} to {settings.stop_layer}"
    return [*model, f"rule {rule}", layers]


def _words(settings: Settings, sums: str) -> dict[str, str]:
    """The texts about the scores' unit and signs; ``sums`` says what the scores add up to."""
    if settings.adds_up:
        return {"low": "lowers the logit", "high": "raises the logit", "hint": f"Scores are in logits. {sums}"}
    hint = (
        f"The scores are those of the baseline {settings.method}, in its own unit. They need not add up to the logit."
    )
    return {"low": "lowest", "high": "highest", "hint": hint}


def _target(res: Explained, row: int, where: str, unassigned: Tensor | None = None) -> dict[str, str]:
    error = f", conservation error {float(res.conservation_error[row].max()):.0e}" if res.settings.adds_up else ""
    logit = f"{float(res.target_logits[row]):.2f}".replace("-", "−")
    apart = "" if unassigned is None else f", unassigned {float(unassigned[row]):.2f}".replace("-", "−")
    likely = likelihood(res.targets[row])
    about = f"{where}, {quantity(res, row)} {logit}{f', {likely}' if likely else ''}{apart}{error}"
    return {"label": _short(repr(res.targets[row].label)), "logit": logit, "about": about}


def _pieces(res: Scored, end: int) -> list[list[Any]]:
    """The first ``end`` tokens, adjacent tokens of one source joined, each with its source's index (None: no source)."""
    tokens = res.prompt.tokens[:end]
    if components(res):
        return [[_seen("".join(tokens)), None]]
    rest = next((index for index, source in enumerate(res.sources) if source.kind == "rest"), None)
    owner: list[int | None] = [rest] * len(res.prompt.tokens)  # without a rest, the sources cover every token
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
    """The numbers of a source's tokens, counted from 1."""
    return "" if source.start is None or source.end is None else numbers(source.start, source.end)


def _seen(text: str) -> str:
    """Text with escapes for characters that are invisible or change how other characters look."""
    marked = text.replace("\n", "↵\n").replace("\t", "→\t")
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), marked)


def _short(label: str, longest: int = _LONGEST) -> str:
    half = longest // 2
    cut = label if len(label) <= longest else f"{label[:half]} … {label[-half:]}"
    return _seen(cut if cut.strip(" ") else "␣" * len(cut)).replace("\n", "") or "·"


def _heading(label: str) -> str:
    return label if len(label) <= _WIDEST else f"{label[: _WIDEST - 1]}…"


def _rounded(scores: Tensor) -> list[list[float]]:
    return [[float(f"{score:.{_DIGITS}g}") for score in row] for row in scores.tolist()]
