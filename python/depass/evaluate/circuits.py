"""Circuits: do the highest-scoring heads alone do what the whole model does?

A *circuit* is the heads that a ranking puts first. All other heads are mean-ablated: at every position their output is set
to its mean over the other prompts. With faithful scores a small circuit tells the answer from the giver as the model does.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import baselines, masking, rules
from ..api import DePass
from ..arguments import argument
from ..errors import DePassError, ModelError, NonFiniteError, OptionError
from ..inputs.targets import Contrast
from ..models import capture
from ..models.health import blame
from ..results.sweep import Sweep
from . import data
from .components import masked
from .summary import Mean, Result, area, mean, new_figure, results, save, style, table
from .task import Item, Row, Task, TaskOptions, chosen, failed, skipped

RULES = ("softmax", *rules.LINEAR, "steered")
METHODS = (*RULES, *baselines.HEADS)
REFERENCE = "half"
PATCHING = "attribution_patching"
PERCENT = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
WRONG = "the model's own next token is not the answer's first token"
SAME = "the answer and the giver begin with the same token"
NO_GIVER = "the prompt does not say exactly one other name twice; give the row a giver"
_TOKENS = 4096  # tokens of one pass


@dataclass(frozen=True, kw_only=True)
class CircuitsOptions(TaskOptions):
    """The options of :class:`Circuits`.

    Attributes:
        percent: sizes of circuits, in percent of the model's heads, each above 0 and at most 100.
        methods: names of rankings, separated by commas.
    """

    data: str = field(
        default="ioi",
        metadata=argument("a file of IOI prompts, or the built-in set ioi (default: ioi)", metavar="FILE"),
    )
    percent: tuple[float, ...] = field(
        default=PERCENT,
        metadata=argument(
            f"sizes of circuits, in % of all heads (default: {' '.join(f'{x:g}' for x in PERCENT)})",
            metavar="X",
            most=100.0,
        ),
    )
    methods: str = field(
        default=",".join(METHODS),
        metadata=argument(
            f"rankings, separated by commas: {', '.join(METHODS)} (default: all)",
            metavar="A,B",
            check=partial(chosen, METHODS),
        ),
    )


class Means(NamedTuple):
    """The mean head outputs over all prompts: for each layer ``[H·d]``, and of how many prompts."""

    of_layers: list[Tensor]
    prompts: int

    def without(self, own: Sequence[Tensor]) -> list[Tensor]:
        """The means over all prompts but one, from that prompt's own means."""
        return [
            (self.prompts * every - one) / (self.prompts - 1) for every, one in zip(self.of_layers, own, strict=True)
        ]


class Circuits(Task[CircuitsOptions]):
    """Keeps the highest-scoring heads and mean-ablates all others."""

    name = "circuits"
    help = "keep the x % highest-scoring heads, mean-ablate all others: how much of the logit difference is left?"
    Options = CircuitsOptions
    edition = 2  # since 2: attribution patching estimates setting heads to their means

    def items(self, options: CircuitsOptions) -> list[Item]:
        """Sentences in which one of two people, the giver, gives something to the other, the answer."""
        return data.prompts(options.data, options.seed, options.needed)

    def prepare(self, dp: DePass, items: Sequence[Item], options: CircuitsOptions) -> Means:
        """The mean head outputs over all prompts that the model can read.

        Raises:
            OptionError: fewer than two prompts can be read.
        """
        readable = _readable(dp, items)
        return Means(masking.head_means(dp, readable), len(readable))

    def measure(self, dp: DePass, prepared: Means, items: Sequence[Item], options: CircuitsOptions) -> Iterator[Row]:
        """The logit differences of the model and of each circuit, for each prompt that the model answers right."""
        for item in items:
            try:
                yield _measured(dp, item, prepared, options)
            except DePassError as error:
                yield failed(item, error)

    def refused(self, dp: DePass, options: CircuitsOptions) -> dict[str, str]:
        """The rankings that cannot score this model's heads; see :func:`.methods.refused`."""
        _readable(dp, self.items(options)[options.skip :][: options.limit])
        pair, found = data.short_prompt(dp), dict[str, str]()
        for name in chosen(METHODS, options.methods):
            try:
                _ranking(dp, name, list(pair.ids), Contrast(pair.answer[0], pair.ids[0]), options.seed)
            except (ModelError, OptionError) as error:
                found[name] = str(error)
            except DePassError:
                continue  # measure() gives the error
        return found

    def report(self, rows: Sequence[Row], options: CircuitsOptions, folder: Path) -> str:
        """One table and one figure."""
        if not rows:
            return "The model answered no prompt right, so no circuit was measured."
        size = effect(rows)
        if size <= 0:
            return (
                f"The model's logit difference is not larger than that without heads (by {size:.3g} on average), so the "
                "share that a circuit keeps is not defined."
            )
        names = list(rows[0]["circuits"])
        shares = {name: kept(rows, name, options.percent) for name in names}
        return "\n\n".join([_explained(rows), _table(shares, options), _draw(shares, options, folder)])

    def results(self, rows: Sequence[Row], options: CircuitsOptions) -> list[Result]:
        """The area under each ranking's shares; none if the model's effect is not positive."""
        if effect(rows) <= 0:
            return []
        values = {name: _areas(kept(rows, name, options.percent), options.percent) for name in rows[0]["circuits"]}
        costs = {name: [row["seconds"][name] / row["plain_seconds"] for row in rows] for name in values}
        lengths = [row["tokens"] for row in rows]
        return results("circuits of heads, area", "higher", values, REFERENCE, options.seed, lengths, costs)


def _readable(dp: DePass, items: Sequence[Item]) -> list[tuple[int, ...]]:
    """The ids of the prompts that the model can read; measuring gives the errors of the others.

    Raises:
        OptionError: there are fewer than two.
    """
    found = []
    for item in items:
        with suppress(DePassError):
            if item.broken is None:
                found.append(data.pair(dp, item).ids)
    if len(found) < 2:
        raise OptionError(
            f"circuits takes means over other prompts, but {len(found)} of {len(items)} prompts can be read; give two or "
            "more"
        )
    return found


# Measuring.


def giver_of(item: Item) -> str | int | None:
    """The giver: the row's own, or the one other name that the prompt says twice; None if there is no such name."""
    given = item.data.get("giver")
    prompt = item.data["prompt"]
    if given is not None or not isinstance(prompt, str):
        return given
    words = Counter(re.findall(r"\b[A-Z][\w'-]*", prompt))
    names = [word for word, count in words.items() if count > 1 and word != item.data["target"].strip()]
    return names[0] if len(names) == 1 else None


def _measured(dp: DePass, item: Item, means: Means, options: CircuitsOptions) -> Row:
    pair, giver = data.pair(dp, item), giver_of(item)
    if giver is None:
        return skipped(item, NO_GIVER)
    other = Item(item.id, {**item.data, "target": f" {giver}" if isinstance(giver, str) else giver})
    ids, answer, rival = list(pair.ids), pair.answer[0], data.pair(dp, other).answer[0]
    if answer == rival:
        return skipped(item, SAME)
    began = time.perf_counter()
    logits = _logits(dp, torch.tensor([ids]))[0]
    plain = time.perf_counter() - began
    if int(logits.argmax()) != answer:
        return skipped(item, WRONG)
    others = means.without(masking.head_means(dp, [ids]))
    scores, seconds, error = _rankings(dp, ids, Contrast(answer, rival), others, options)
    keep = torch.cat(
        [masked(ranking, options.percent, "top") for ranking in scores.values()]
    )  # [rankings · sizes, layers with heads, H]
    off = torch.cat([torch.ones_like(keep[:1]), ~keep])
    none, *circuits = differences(dp, ids, off, others, answer, rival).tolist()
    sizes = len(options.percent)
    return {
        "id": item.id, "status": "ok", "tokens": len(ids), "conservation_error": error,
        "model": float(logits[answer] - logits[rival]), "none": none,
        "circuits": {name: circuits[i * sizes : (i + 1) * sizes] for i, name in enumerate(scores)},
        "seconds": seconds, "plain_seconds": plain,
    }  # fmt: skip


def _rankings(
    dp: DePass, ids: list[int], target: Contrast, means: Sequence[Tensor], options: CircuitsOptions
) -> tuple[dict[str, Tensor], dict[str, float], float]:
    """Each method's scores ``[L, H]`` and its seconds, and the largest conservation error of the rules.

    Raises:
        DePassError: a method cannot score the prompt, or a score is not finite.
    """
    scores, seconds, error = dict[str, Tensor](), dict[str, float](), 0.0
    for name in chosen(METHODS, options.methods):
        began = time.perf_counter()
        sweep = _ranking(dp, name, ids, target, options.seed, means)
        scores[name], seconds[name] = sweep.scores[0], time.perf_counter() - began
        if not bool(scores[name].isfinite().all()):
            raise NonFiniteError(f"a score by {name} is not finite; {blame(dp.bound)}")
        if name in RULES:
            error = max(error, float(sweep.conservation_error.max()))
    return scores, seconds, error


def _ranking(
    dp: DePass, name: str, ids: list[int], target: Contrast, seed: int, means: Sequence[Tensor] | None = None
) -> Sweep:
    """The heads' scores by a method; attribution patching estimates what setting them to ``means`` does."""
    if name in RULES:
        return dp.sweep("heads", ids, target, rule=name)
    return baselines.heads(dp, name, ids, target, seed=seed, means=means if name == PATCHING else None)


@torch.no_grad()
def differences(
    dp: DePass, ids: Sequence[int], off: Tensor, means: Sequence[Tensor], answer: int, rival: int
) -> Tensor:
    """``[V]``: the answer's logit minus the rival's after a prompt, under each of the masks ``off`` ``[V, L, H]``.

    Args:
        dp: the model.
        ids: the prompt's ids.
        off: true for the heads that are set to their means, of the layers that have heads.
        means: the means, as for :func:`depass.masking.heads`.
        answer: the answer's id.
        rival: the id of the token that it is compared with.

    Raises:
        NonFiniteError: a logit is not finite.
    """
    found, every_layer = [], off.new_zeros(len(off), len(dp.bound.layers), off.shape[2])
    every_layer[:, list(masking.layers_with(dp.bound, "heads"))] = off
    for some in torch.split(every_layer, max(1, _TOKENS // len(ids))):
        with masking.heads(dp, some, means=means):
            logits = _logits(dp, torch.tensor([ids]).expand(len(some), -1))
        found.append(logits[:, answer] - logits[:, rival])
    return torch.cat(found)


@torch.no_grad()
def _logits(dp: DePass, ids: Tensor) -> Tensor:
    """The fp32 logits ``[B, V]`` after prompts ``[B, T]``, before any soft-capping."""
    bound = dp.bound
    logits: Tensor = bound.logits(capture.normed(bound, input_ids=ids.to(bound.input_device))[:, -1]).float().cpu()
    if not bool(logits.isfinite().all()):
        raise NonFiniteError(f"a logit is not finite; {blame(bound)}")
    return logits


# Reporting.


def effect(rows: Sequence[Row]) -> float:
    """The mean over prompts of the model's logit difference less that without heads."""
    return float(sum(row["model"] - row["none"] for row in rows)) / len(rows)


def kept(rows: Sequence[Row], name: str, percent: Sequence[float]) -> Tensor:
    """``[prompts, sizes + 1]``: the share of :func:`effect` that circuits keep, by growing size; the last is the model.

    The mean over prompts is the ratio of the means.
    """
    order = sorted(range(len(percent)), key=percent.__getitem__)
    curves = [[*(row["circuits"][name][i] for i in order), row["model"]] for row in rows]
    none = torch.tensor([row["none"] for row in rows], dtype=torch.float64)
    return (torch.tensor(curves, dtype=torch.float64) - none[:, None]) / effect(rows)


def _areas(shares: Tensor, percent: Sequence[float]) -> list[float]:
    """Each prompt's mean share over the logarithm of the size, from the smallest to 100 %."""
    sizes = torch.tensor([*sorted(percent), 100.0], dtype=torch.float64).log().tolist()
    if sizes[0] == sizes[-1]:
        return [float(share) for share in shares[:, -1]]
    return [float(each) for each in area(sizes, shares)]


def _explained(rows: Sequence[Row]) -> str:
    model, none = (sum(row[name] for row in rows) / len(rows) for name in ("model", "none"))
    worst = max(row["conservation_error"] for row in rows)
    return (
        f"{len(rows)} prompts. *m* is the logit of the answer minus that of the giver: {model:.2f} for the model and "
        f"{none:.2f} with all heads mean-ablated, on average. A circuit keeps the x % highest-scoring heads. Each other "
        "head's output is set, at every position, to its mean over all positions of the other prompts. *F* is (m of the "
        "circuit - m of no heads) / (m of the model - m of no heads), a ratio of means over prompts: higher is better. It "
        "can exceed 1, because some heads work against the answer. The area is the mean of F over the logarithm of x up to "
        "100 %, where F is 1. Intervals are 95 % bootstrap intervals over prompts, with the model's effect held fixed. "
        f"*Minus {REFERENCE}* compares prompt by prompt. *Distance* is the area of |1 - F|, without an interval: lower is "
        f"better. The largest conservation error of the rules is {worst:.0e}."
    )


def _table(shares: dict[str, Tensor], options: CircuitsOptions) -> str:
    areas = {name: _areas(of, options.percent) for name, of in shares.items()}
    lines = []
    for name, of in shares.items():
        minus = ""
        if REFERENCE in areas and name != REFERENCE:
            compared: Mean = mean([a - b for a, b in zip(areas[name], areas[REFERENCE], strict=True)], options.seed)
            minus = str(compared)
        (distance,) = _areas((1 - of.mean(0, keepdim=True)).abs(), options.percent)
        lines.append(
            [f"`{name}`", *(f"{value:.2f}" for value in of.mean(0)[:-1].tolist()), str(mean(areas[name], options.seed)),
             minus, f"{distance:.3f}"]
        )  # fmt: skip
    sizes = [f"F, {x:g} %" for x in sorted(options.percent)]
    return table(["ranked by", *sizes, "area", f"minus {REFERENCE}", "distance"], lines)


def _draw(shares: dict[str, Tensor], options: CircuitsOptions, folder: Path) -> str:
    figure = new_figure(8.5, 4.4)
    axes = figure.add_subplot()
    percent = [*sorted(options.percent), 100.0]
    for name, of in shares.items():
        axes.plot(
            percent, of.mean(0).tolist(), marker="o", markersize=3, label=name, **style(METHODS.index(name)),
        )  # fmt: skip
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_xscale("log")
    axes.set_xticks(percent, [f"{x:g}" for x in percent])
    axes.minorticks_off()
    axes.set_xlabel("heads kept, x (% of all)")
    axes.set_ylabel("F: share of the model's logit difference")
    axes.set_title("Circuits of the x % highest-scoring heads; higher is better", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save(figure, folder / "circuits.png")
