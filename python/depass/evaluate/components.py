"""Component faithfulness (DePass, section 4.2): do the scores tell which heads, neurons or experts the answer needs?

The task masks the x % of all heads (or neurons, or experts) with the highest or lowest scores, at every position, and the
model answers again. With faithful scores, masking the top few loses the answer, and masking the bottom ones keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import baselines, masking
from ..api import DePass
from ..arguments import argument
from ..errors import DePassError, NonFiniteError
from ..masking import Kind
from ..models.health import blame
from ..models.positions import fresh
from . import data, summary
from .task import Item, Row, Task, TaskOptions, failed, skipped

# |name|: ranked by absolute value
RANKINGS: dict[Kind, tuple[str, ...]] = {
    "heads": ("depass", "|depass|", "attribution_patching", "|attribution_patching|", "output_norm", "random"),
    "neurons": (
        "depass", "|depass|", "attribution_patching", "|attribution_patching|", "attribution_patching_last",
        "|attribution_patching_last|", "|activation|", "|activation_x_norm|", "random",
    ),
    "experts": (
        "depass", "|depass|", "attribution_patching", "|attribution_patching|", "output_norm", "router_weight", "random",
    ),
}  # fmt: skip
PERCENT: dict[Kind, tuple[float, ...]] = {
    "heads": (1, 2, 5, 10, 20, 30, 50),
    "neurons": (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
    "experts": (0.3, 1, 2, 5, 10, 20, 30),
}
_BASELINES = {"heads": baselines.heads, "neurons": baselines.neurons, "experts": baselines.experts}
_MASKS = {"heads": masking.heads, "neurons": masking.neurons, "experts": masking.experts}
ENDS = ("top", "bottom")
MEASURES = {"first": "the answer's first token is the most likely one", "generated": "the generated text is the answer"}
WRONG = "the unmasked model does not give the answer"
_TOKENS = 4096  # tokens of one pass


def _data(default: str) -> dict[str, Any]:
    return argument(f"{data.HELP} (default: {default})", metavar="FILE")


def _percent(part: Kind) -> dict[str, Any]:
    default = " ".join(f"{x:g}" for x in PERCENT[part])
    return argument(f"percentages of the model's {part} to mask (default: {default})", metavar="X", most=100.0)


def _positions(part: Kind, default: str) -> dict[str, Any]:
    return argument(
        f"positions whose {part} DePass scores: all, or only the last, which takes far less time and memory (default: "
        f"{default}); masking applies to all positions in either case",
        choices=("all", "last"),
    )


@dataclass(frozen=True, kw_only=True)
class ComponentsOptions(TaskOptions):
    """The options of :class:`Components`. Heads, neurons and experts have other defaults.

    Attributes:
        percent: percentages of the model's components to mask, each above 0 and at most 100.
        positions: the positions whose outputs DePass scores: ``all``, or only the ``last``.
    """

    percent: tuple[float, ...]
    positions: str


@dataclass(frozen=True, kw_only=True)
class HeadsOptions(ComponentsOptions):
    """The options of the task ``heads``."""

    data: str = field(default="ioi", metadata=_data("ioi"))
    percent: tuple[float, ...] = field(default=PERCENT["heads"], metadata=_percent("heads"))
    positions: str = field(default="all", metadata=_positions("heads", "all"))


@dataclass(frozen=True, kw_only=True)
class NeuronsOptions(ComponentsOptions):
    """The options of the task ``neurons``."""

    data: str = field(default="facts", metadata=_data("facts"))
    percent: tuple[float, ...] = field(default=PERCENT["neurons"], metadata=_percent("neurons"))
    positions: str = field(default="last", metadata=_positions("neurons", "last"))


@dataclass(frozen=True, kw_only=True)
class ExpertsOptions(ComponentsOptions):
    """The options of the task ``experts``."""

    data: str = field(default="facts", metadata=_data("facts"))
    percent: tuple[float, ...] = field(default=PERCENT["experts"], metadata=_percent("experts"))
    positions: str = field(default="all", metadata=_positions("experts", "all"))


_OPTIONS: dict[Kind, type[ComponentsOptions]] = {
    "heads": HeadsOptions,
    "neurons": NeuronsOptions,
    "experts": ExpertsOptions,
}


class Components(Task[ComponentsOptions]):
    """The tasks ``heads``, ``neurons`` and ``experts``: masks the components that ``part`` names."""

    def __init__(self, part: Kind) -> None:
        self.part: Kind = part
        self.name = part
        self.help = f"measure accuracy after masking the top or bottom x % of all {part} (paper, section 4.2)"
        self.Options = _OPTIONS[part]

    def items(self, options: ComponentsOptions) -> list[Item]:
        """Prompts with their answers."""
        return data.prompts(options.data, options.seed, options.needed)

    def measure(self, dp: DePass, prepared: Any, items: Sequence[Item], options: ComponentsOptions) -> Iterator[Row]:
        """Mask each prompt that the model answers right, by every ranking, end and percentage; does it stay right?"""
        for item in items:
            try:
                yield self._measure(dp, item, options)
            except DePassError as error:
                yield failed(item, error)

    def _measure(self, dp: DePass, item: Item, options: ComponentsOptions) -> Row:
        pair = data.pair(dp, item)
        ids, wanted, answer = list(pair.ids), pair.answer, item.data["target"]
        layers, count = masking.layers_with(dp.bound, self.part), masking.num_components(dp.bound, self.part)
        nothing = torch.zeros(1, len(layers), count, dtype=torch.bool)
        said = generated(dp, self.part, ids, nothing, len(wanted) + 1)[0]
        if int(said[0]) != wanted[0] or not says(dp.tokenizer, said.tolist(), wanted, answer):
            return skipped(item, WRONG, said=said.tolist() if dp.tokenizer is None else dp.tokenizer.decode(said))
        scores, error = rankings(dp, self.part, ids, wanted[0], options.positions == "last", options.seed)
        masks = torch.cat([masked(ranking, options.percent, end) for ranking in scores.values() for end in ENDS])
        answers = generated(dp, self.part, ids, masks, len(wanted) + 1)  # [rankings · ends · percentages, tokens]
        first = answers[:, 0] == wanted[0]
        right = torch.tensor([says(dp.tokenizer, row, wanted, answer) for row in answers.tolist()])
        shape = (len(scores), len(ENDS), len(options.percent))
        return {
            "id": item.id,
            "status": "ok",
            "conservation_error": error,
            "first": first.view(shape).int().tolist(),
            "generated": right.view(shape).int().tolist(),
        }

    def report(self, rows: Sequence[Row], options: ComponentsOptions, folder: Path) -> str:
        """One table for each measure and end, and one figure."""
        if not rows:
            return "The model answered no prompt right, so nothing was masked."
        worst = max(row["conservation_error"] for row in rows)
        counted = "all positions"
        if options.positions == "last":
            counted = "the last position only" + (
                ", as `attribution_patching_last` does; `attribution_patching` scores all positions"
                if self.part == "neurons"
                else ""
            )
        text = [
            f"Accuracy on the {len(rows)} prompts that the unmasked model answers right, after the top or bottom x % of all "
            f"{self.part} are masked at every position. Without masking the accuracy is 1. A name in bars, as `|depass|`, "
            f"ranks by absolute value. DePass scores outputs at {counted}. The largest conservation error is {worst:.0e}. "
            "For `random`, top and bottom are two separate draws.",
        ]
        accuracy = {
            name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in MEASURES
        }  # [rows, rankings, ends, percentages]
        for name, meaning in MEASURES.items():
            for index, end in enumerate(ENDS):
                better = "Lower is better" if end == "top" else "Higher is better"
                text += [
                    f"## {end.capitalize()} x % masked: {meaning}",
                    f"{better}. The last column is the mean over the percentages, with a 95 % bootstrap interval over "
                    "prompts.",
                    self._table(accuracy[name][:, :, index], options),
                ]
        return "\n\n".join([*text[:1], self._figure(accuracy, options, folder), *text[1:]])

    def _table(self, accuracy: Tensor, options: ComponentsOptions) -> str:
        """The table of an accuracy ``[rows, rankings, percentages]``."""
        percent = sorted(options.percent)
        lines = []
        for name, ranking in zip(RANKINGS[self.part], _ascending(accuracy, options).unbind(1), strict=True):
            line = [f"`{name}`", *(f"{value:.2f}" for value in ranking.mean(0).tolist())]
            lines.append([*line, str(summary.mean(ranking.mean(1).tolist(), options.seed))])
        return summary.table(["ranked by", *(f"{x:g} %" for x in percent), "mean"], lines)

    def _figure(self, accuracy: dict[str, Tensor], options: ComponentsOptions, folder: Path) -> str:
        figure = summary.new_figure(9.5, 7)
        grid: Any = figure.subplots(len(MEASURES), len(ENDS), sharex=True, sharey=True)
        percent = [0.0, *sorted(options.percent)]
        bases = list(dict.fromkeys(name.strip("|") for name in RANKINGS[self.part]))
        for row, name in enumerate(MEASURES):
            for column, end in enumerate(ENDS):
                axes = grid[row][column]
                means = _ascending(accuracy[name][:, :, column], options).mean(0)  # [rankings, percentages]
                for ranking, values in zip(RANKINGS[self.part], means.tolist(), strict=True):
                    axes.plot(
                        percent, [1.0, *values], label=ranking, marker="o", markersize=3,
                        color=summary.COLOURS[-1 if ranking == "random" else bases.index(ranking.strip("|"))],
                        linestyle="--" if ranking.startswith("|") else "-",
                    )  # fmt: skip
                better = "lower is better" if end == "top" else "higher is better"
                axes.set_title(f"{end} x % masked; {better}", fontsize=10)
                axes.set_ylim(-0.03, 1.03)
                axes.set_xscale("symlog", linthresh=min(x for x in percent if x > 0))
                axes.set_xticks(percent, [f"{x:g}" for x in percent])
                axes.minorticks_off()
                axes.spines[["top", "right"]].set_visible(False)
                if row == len(MEASURES) - 1:
                    axes.set_xlabel(f"masked {self.part}, x (% of all)")
                if column == 0:
                    measured = {"first": "first token", "generated": "generated text"}[name]
                    axes.set_ylabel(f"accuracy of the {measured} (0 to 1)")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        return summary.save(figure, folder / f"{self.part}.png")


def _ascending(accuracy: Tensor, options: ComponentsOptions) -> Tensor:
    """The same accuracy ``[..., percentages]``, in the order of growing percentages."""
    return accuracy[..., torch.tensor(options.percent).argsort()]


def says(tokenizer: Any, said: Sequence[int], wanted: Sequence[int], answer: Any) -> bool:
    """Whether generated ids begin with the answer as whole words; an answer of ids is compared as ids."""
    if tokenizer is None or not isinstance(answer, str):
        return list(said[: len(wanted)]) == list(wanted)
    text, expected = tokenizer.decode(said).strip(), answer.strip()
    return text.startswith(expected) and not text[len(expected) : len(expected) + 1].isalnum()


def rankings(
    dp: DePass, part: Kind, prompt: Sequence[int], target: int, last: bool, seed: int
) -> tuple[dict[str, Tensor], float]:
    """The scores ``[layers, C]`` of one prompt for each of :data:`RANKINGS`, and DePass's largest conservation error.

    Args:
        dp: the model.
        part: ``"heads"``, ``"neurons"`` or ``"experts"``.
        prompt: the prompt's ids.
        target: the id of the token whose logit is explained.
        last: whether DePass scores only the last position's outputs.
        seed: seed of the random numbers.

    Raises:
        DePassError: see :meth:`DePass.sweep`.
    """
    ours = dp.sweep(part, prompt, target, positions=[-1] if last else None)
    by_method = {"depass": ours.scores[0]}
    by_ranking = {}
    for name in RANKINGS[part]:
        base = name.strip("|")
        if base not in by_method:
            by_method[base] = _BASELINES[part](dp, base, prompt, target, seed=seed).scores[0]
        by_ranking[name] = by_method[base].abs() if name.startswith("|") else by_method[base]
    return by_ranking, float(ours.conservation_error.max())


def masked(scores: Tensor, percent: Sequence[float], end: str) -> Tensor:
    """Bools ``[percentages, layers, C]``: true for the components in the top or bottom x %, at least one."""
    order = scores.flatten().argsort(descending=end == "top", stable=True)
    masks = torch.zeros(len(percent), scores.numel(), dtype=torch.bool)
    for mask, x in zip(masks, percent, strict=True):
        mask[order[: max(1, round(x / 100 * len(order)))]] = True
    return masks.view(-1, *scores.shape)


@torch.no_grad()
def generated(dp: DePass, part: Kind, ids: Sequence[int], masks: Tensor, count: int) -> Tensor:
    """Greedily generated ids ``[V, count]`` of one prompt, under each of the masks ``[V, layers, C]``.

    The layers are those that have such components.

    Raises:
        NonFiniteError: a logit is NaN.
    """
    bound, batches = dp.bound, []
    device = bound.input_device
    every = masks.new_zeros(len(masks), len(bound.layers), masks.shape[2])
    every[:, list(masking.layers_with(bound, part))] = masks
    for some in torch.split(every, max(1, _TOKENS // len(ids))):
        inputs, cache, new = torch.tensor([ids], device=device).expand(len(some), -1), None, []
        with _MASKS[part](dp, some), fresh(bound.backbone, bound.switches):
            for _ in range(count):
                out = bound.backbone(input_ids=inputs, past_key_values=cache, use_cache=True, return_dict=True)
                cache = out.past_key_values
                logits = bound.logits(out.last_hidden_state[:, -1])  # [V, vocab_size]
                if bool(logits.isnan().any()):
                    raise NonFiniteError(f"the model's own logits are not finite; {blame(bound)}")
                inputs = logits.argmax(-1, keepdim=True).to(device)
                new.append(inputs)
        batches.append(torch.cat(new, 1).cpu())
    return torch.cat(batches)
