"""The terminal views: coloured sources with their signed scores, a grid of layers and components, or a survey's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from ..sources.source import name
from .drawing import (
    GRID,
    Claimed,
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
    likelihood,
    place,
    quantity,
    scale,
)

_POSITIVE, _NEGATIVE, _PAPER = (205, 50, 45), (45, 90, 205), (255, 255, 255)
_FAINT = 0.05  # share of the largest score; a smaller score gets no colour
_LONGEST = 24  # cells; longer labels are cut in the middle
_MANY, _FEW = 60, 40  # with more than _MANY components, only the _FEW largest are shown
_LISTED = 20  # components listed for a sweep that is too wide for a grid
_CITED = 5  # sentences of documents shown for each sentence of an answer
_SOURCES = 3  # sources shown for each token of an answer
_NEURONS, _NEURON = 3, 16  # neurons shown for each layer of a survey, and the width in cells of each
_NUMBER, _GUTTER = 7, 7  # width in cells of a score and of a layer's number


def show(res: Scored, file: TextIO | None = None, width: int | None = None) -> None:
    """Print ``res`` to ``file`` (default: stdout), wrapped to ``width`` columns (default: the terminal's width)."""
    console = Console(file=file, width=width, highlight=False)
    with console:  # one output in a notebook's cell, not one per line
        for row in range(len(res.targets)):
            _print(console, strip(res, row, console.width))


def show_sweep(sweep: Grid, file: TextIO | None = None, width: int | None = None) -> None:
    """Print each target's grid to ``file`` (default: stdout), or its largest components where a grid is too wide."""
    console = Console(file=file, width=width, highlight=False)
    with console:
        for row in range(len(sweep.targets)):
            _print(console, grid(sweep, row, console.width))


def show_survey(survey: Layered, file: TextIO | None = None, width: int | None = None) -> None:
    """Print each target's layers and largest tokens to ``file`` (default: stdout)."""
    console = Console(file=file, width=width, highlight=False)
    with console:
        for row in range(len(survey.targets)):
            _print(console, layers(survey, row, console.width))


def show_answer(
    res: Scored, tokens: Sequence[str], total: Scored, file: TextIO | None = None, width: int | None = None
) -> None:
    """Print an answer's ``tokens`` with their logits, probabilities, ranks and largest sources, then the ``total``."""
    console = Console(file=file, width=width, highlight=False)
    with console:
        _print(console, answer(res, tokens, console.width))
        _print(console, strip(total, 0, console.width))


def show_citations(
    claims: Sequence[Claimed], res: Explained, file: TextIO | None = None, width: int | None = None
) -> None:
    """Print each sentence of an answer, what its logit in ``res`` is the sum of, and its largest sources."""
    console = Console(file=file, width=width, highlight=False)
    with console:
        for row, claim in enumerate(claims):
            _print(console, citations(claim, quantity(res, row), console.width))


def _print(console: Console, lines: Sequence[Text]) -> None:
    console.print(lines[0])
    for line in lines[1:]:
        console.print(line, overflow="ignore", no_wrap=True, crop=False)


def strip(res: Scored, row: int, width: int) -> list[Text]:
    """One target's lines: a heading, then pairs of lines with the sources above their scores."""
    res, unassigned = drawn(res)
    apart = "" if unassigned is None else f" {float(unassigned[row]):+.2f} unassigned"
    head = _head(res, row, f"sum of {len(res.sources)} scores{apart}")
    largest = scale(res, row)
    if len(components(res)) > _MANY:
        res = abridged(res, res.scores[row].abs(), _FEW)
    return [head, *_strip([name(source) for source in res.sources], res.scores[row].tolist(), largest, width), Text()]


def answer(res: Scored, tokens: Sequence[str], width: int) -> list[Text]:
    """One line for each token of an answer, with its largest sources."""
    said = f"{quantity(res, 0):>8}"
    labels = [_cut(printable(token.strip() or token)) or "·" for token in tokens]
    widest = max(5, *map(cell_len, labels))
    lines = [Text(f"{'part':{widest}}  {said}  probability    rank  largest sources", style="bold")]
    for row, (label, target) in enumerate(zip(labels, res.targets, strict=True)):
        line = Text(label + " " * (widest - cell_len(label)))
        line.append(f"  {float(res.target_logits[row]):{len(said)}.2f}")
        line.append(f"  {target.probability or 0.0:11.2g}  {target.rank or '':6}")
        scores = res.scores[row]
        for index in scores.abs().argsort(descending=True, stable=True)[:_SOURCES].tolist():
            share = float(scores[index]) / scale(res, row)
            its = name(res.sources[index])
            entry = Text(f"{_cut(printable(its.strip() or its))} {float(scores[index]):+.2f}", style=colour(share))
            if line.cell_len + entry.cell_len + 2 <= width:
                line.append("  ").append(entry)
        lines.append(line)
    return [*lines, Text()]


def citations(claim: Claimed, of: str, width: int) -> list[Text]:
    """One claim's lines: a heading, then one line for each of its largest sources."""
    apart = {name: score for name, score in claim.others.items() if score}
    sums = {"documents": sum(source.score for source in claim.sources), **apart}
    head = Text(repr(printable(claim.text)), style="bold")
    said = " ".join(f"{score:+.2f} {name}" for name, score in sums.items())
    head.append(f" {of} {claim.logit:.2f} = {said}; p {claim.probability:.2g}", style="not bold")
    best = claim.sources[:_CITED]
    largest = abs(best[0].score) or 1.0  # there is a source, because no document is empty
    titles = [printable(source.title) for source in best]
    titles = [t if _cut(t) == t else f"{s.document + 1}: {_cut(t)}" for s, t in zip(best, titles, strict=True)]
    places = [f"{title}, {source.sentence + 1}" for source, title in zip(best, titles, strict=True)]
    widest = max(map(cell_len, places))
    lines = [head]
    for source, where in zip(best, places, strict=True):
        line = Text(f"  {source.score:+8.2f} {source.share:+5.0%}  {where}{' ' * (widest - cell_len(where))}  ")
        text = Text(printable(source.text), style=colour(source.score / largest))
        text.truncate(max(8, width - line.cell_len), overflow="ellipsis")
        lines.append(line.append(text))
    return [*lines, Text()]


def grid(sweep: Grid, row: int, width: int) -> list[Text]:
    """One target's lines: a heading, then one line per layer with its components' scores."""
    count, columns = len(sweep.columns), beside(sweep)
    named = [printable(heading) for heading in headings(sweep)]
    balance = sweep.settings.balance
    others = f" + rest{' + bias' if bool(sweep.bias.any()) else ''}{f' + {balance}' if balance else ''}"
    parts = f"attention{others} = MLP{others}" if sweep.kind == "modules" else f"{count} {sweep.kind}{others}"
    head = _head(sweep, row, f"{parts}, in each of {len(sweep.layers)} layers")
    widths = [max(_NUMBER, len(label)) + 2 for label, _ in columns]
    room = (width - _GUTTER - sum(widths)) // count
    if room < 1 <= (width - _GUTTER) // count:  # the columns beside the components go first
        columns, widths, room = [], [], (width - _GUTTER) // count
    if count > GRID or room < 1:
        top = sweep.top(_LISTED, row)
        head.append(f"; the {len(top)} largest:", style="not bold")
        labels, scores = [source.label for source, _ in top], [score for _, score in top]
        return [head, *_strip(labels, scores, abs(scores[0]) or 1.0, width), Text()]
    widest = max(_NUMBER, *(len(heading) + 2 for heading in named))
    size = widest if room >= widest else 2 if room >= 2 else 1
    largest = float(sweep.scores[row].abs().max()) or 1.0
    over = Text("layer".rjust(_GUTTER - 2) + "  " + _ruler(named, size), style="dim")
    over.append("".join(label.rjust(size_beside) for (label, _), size_beside in zip(columns, widths, strict=True)))
    lines = [head, over]
    for index, layer in enumerate(sweep.layers):
        line = Text(f"{layer:{_GUTTER - 2}}  ")
        for score in sweep.scores[row, index].tolist():
            share = score / largest
            line.append((f"{score:+.2f}" if size >= _NUMBER else _mark(share)).rjust(size), style=colour(share))
        for (_, apart), size_beside in zip(columns, widths, strict=True):
            line.append(f"{float(apart[row, index]):+.2f}".rjust(size_beside), style="dim")
        lines.append(line)
    return [*lines, Text()]


def layers(survey: Layered, row: int, width: int) -> list[Text]:
    """One target's lines: a heading, one line per layer with its heads, modules and largest neurons, and the tokens.

    Neurons, then heads, are left out where the line is too narrow for them. Layers with routed experts have no neurons.
    """
    count, heads = len(survey.prompt.tokens), survey.heads[row]  # [L, H]
    parts = [f"{count} tokens", *(label for label, _ in behind(survey))]
    head = _head(
        survey, row, f"{' + '.join(parts)}, at the input of each of {len(survey.layers)} layers and at the end"
    )
    room = width - _GUTTER - 2 * (_NUMBER + 2)
    columns = max(len("heads"), heads.shape[1])
    columns = columns if columns <= room else 0
    each = min(_NEURONS, survey.neurons.shape[2], max(0, room - columns) // _NEURON)
    over = Text("layer".rjust(_GUTTER - 2) + "  " + "heads"[:columns].ljust(columns), style="dim")
    over.append("".join(label.rjust(_NUMBER + 2) for label in ("attn", "MLP")) + "  largest neurons" * (each > 0))
    largest, neurons = float(heads.abs().max()) or 1.0, float(survey.neurons[row].abs().max()) or 1.0
    lines = [head, over]
    for index, layer in enumerate(survey.layers):
        line = Text(f"{layer:{_GUTTER - 2}}  ")
        for score in heads[index, :columns].tolist():
            line.append(_mark(score / largest), style=colour(score / largest))
        line.pad_right(_GUTTER + columns - line.cell_len)
        for score in survey.modules[row, index].tolist():
            line.append(f"{score:+.2f}".rjust(_NUMBER + 2))
        for rank in survey.neurons[row, index].abs().argsort(descending=True, stable=True)[:each].tolist():
            if survey.neuron_ids[row, index, rank] < 0:  # the layer has routed experts
                break
            score = float(survey.neurons[row, index, rank])
            text = f"N{int(survey.neuron_ids[row, index, rank])} {score:+.2f}"
            line.append("  ").append(text, style=colour(score / neurons)).append(" " * (_NEURON - 2 - len(text)))
        line.rstrip()
        lines.append(line)
    return [*lines, Text(), *_largest_tokens(survey, row, width), Text()]


def _largest_tokens(survey: Layered, row: int, width: int) -> list[Text]:
    scores = survey.tokens[row, 0]
    best = scores.abs().argsort(descending=True, stable=True)[:_LISTED]
    title = Text(f"largest tokens at the input of layer {survey.layers[0]}:")
    labels, sizes = [survey.prompt.tokens[index] for index in best.tolist()], scores[best].tolist()
    apart = [Text(f"{label} there: {float(scores[row, 0]):+.2f}") for label, scores in behind(survey)]
    return [title, *_strip(labels, sizes, abs(sizes[0]) or 1.0, width), *apart]


def _head(res: Explained, row: int, sums: str) -> Text:
    target = res.targets[row]
    head = Text(f"{printable(target.label)!r}", style="bold")
    logit = f"{quantity(res, row)} {float(res.target_logits[row]):.2f}"
    if res.settings.adds_up:
        summary = f"{logit} = {sums} (error {float(res.conservation_error[row].max()):.0e})"
    else:
        summary = f"{logit}; scores by {printable(res.settings.method)}, which need not add up to it"
    if res.settings.family != "declared":
        summary = f"{summary}; family: {printable(res.settings.family)}"
    likely = likelihood(target)
    where = f"{f' ({likely})' if likely else ''} {printable(place(res, row))}"
    return head.append(f"{where}: {summary}", style="not bold")


def _strip(labels: Sequence[str], scores: Sequence[float], largest: float, width: int) -> list[Text]:
    lines, upper, lower = [], Text(), Text()
    for label, score in zip(labels, scores, strict=True):
        shown = _cut(printable(label.strip() or label)) or "·"
        number = f"{score:+.2f}"
        size = max(cell_len(shown), cell_len(number))
        if upper.cell_len and upper.cell_len + 1 + size > width:
            lines += [upper, lower, Text()]
            upper, lower = Text(), Text()
        if upper.cell_len:
            upper.append(" ")
            lower.append(" ")
        upper.append(shown + " " * (size - cell_len(shown)), style=colour(score / largest))
        lower.append(number + " " * (size - cell_len(number)), style="dim" if abs(score) < _FAINT * largest else "")
    return [*lines, upper, lower]


def _ruler(labels: Sequence[str], size: int) -> str:
    """Labels over columns of ``size`` cells; only every fifth where they would touch."""
    every = 1 if size > max(map(len, labels)) else 5
    return "".join(label.rjust(size).ljust(size * every) for label in labels[::every])[: size * len(labels)]


def _mark(share: float) -> str:
    """A sign for a score, where there is no room for its number."""
    if abs(share) < _FAINT:
        return "·"
    return "+" if share > 0 else "-"


def colour(share: float) -> Style:
    """Black on a red (positive) or blue (negative) background, strongest where ``share`` is 1 or -1."""
    if abs(share) < _FAINT:
        return Style.null()
    ink = _POSITIVE if share > 0 else _NEGATIVE
    strength = 0.75 * min(1.0, abs(share))
    red, green, blue = (round(p + (i - p) * strength) for p, i in zip(_PAPER, ink, strict=True))
    return Style.parse(f"rgb(0,0,0) on rgb({red},{green},{blue})")


def printable(text: str) -> str:
    """Text without control characters, which could move the cursor or change the terminal's colours."""
    named = text.replace("\n", "↵").replace("\t", "→")
    return "".join(c if c.isprintable() else "�" for c in named)


def _cut(label: str) -> str:
    if cell_len(label) <= _LONGEST:
        return label
    half = _LONGEST // 2 - 1
    return f"{label[:half]}…{label[-half:]}"
