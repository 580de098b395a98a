"""What the terminal's views, the pages and the figures have in common."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .result import Attribution
from .sources import Source
from .sweep import Sweep

NUMBERED = 16  # columns of a sweep whose cells have room for their numbers
GRID = 64  # columns of a sweep that are drawn one by one; more of them (neurons) are summed up or listed


def name(source: Source) -> str:
    """What a source is called; ``rest`` and ``bias`` in brackets, as no text of the prompt."""
    return f"[{source.kind}]" if source.kind in ("rest", "bias") else source.label


def components(res: Attribution) -> list[int]:
    """The columns whose sources are the model's own parts and lie nowhere in the prompt."""
    return [
        index
        for index, source in enumerate(res.sources)
        if source.start is None and source.kind not in ("rest", "bias")
    ]


def scale(res: Attribution, row: int) -> float:
    """The score that is drawn in full colour: the largest; beside components, whose ``rest`` would drown them, theirs."""
    scores = res.scores[row]
    among = components(res)
    return float((scores[among] if among else scores).abs().max()) or 1.0


def abridged(res: Attribution, sizes: Tensor, most: int) -> Attribution:
    """The ``most`` components with the largest ``sizes`` ``[sources]``, largest first, and the others as one sum."""
    among = components(res)
    order = [among[rank] for rank in sizes[among].argsort(descending=True, stable=True).tolist()]
    others = order[most:]
    if not others:
        return res
    kept = [*sorted(set(range(len(res.sources))) - set(among)), *order[:most]]
    return replace(
        res,
        scores=torch.cat([res.scores[:, kept], res.scores[:, others].sum(1, keepdim=True)], 1),
        sources=(*(res.sources[index] for index in kept), Source(f"[{len(others)} others]", "part")),
    )


def headings(sweep: Sweep) -> list[str]:
    """What stands over a sweep's columns."""
    return ["attention", "MLP"] if sweep.kind == "modules" else [str(column) for column in sweep.columns]


def beside(sweep: Sweep) -> list[tuple[str, Tensor]]:
    """What stands beside a sweep's components: ``rest``, and ``bias`` where there is any; ``[targets, layers]`` each.

    Nothing beside a baseline's, which has none.
    """
    found: list[tuple[str, Tensor]] = []
    if not sweep.settings.adds_up:
        return found
    for what, scores in (("rest", sweep.rest), ("bias", sweep.bias)):
        if what == "bias" and not bool(scores.any()):
            continue
        if sweep.kind == "modules":  # each of the two is a decomposition of its own
            found += [(f"{what} of {of}", scores[:, :, index]) for index, of in enumerate(("attn", "MLP"))]
        else:
            found.append((what, scores))
    return found
