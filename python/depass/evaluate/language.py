"""Language subspace (paper, section 4.3): can a state be split into its language and its meaning?

The residual stream that enters a layer is split in two ways: by the subspace that a language classifier reads, and by the
mean over the last positions of a prompt's translations. DePass propagates both parts to the end. There the head reads each
part by itself, and the task measures how the parts cluster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import DePass
from ..arguments import argument
from ..engine.passes import Pass
from ..engine.request import options
from ..errors import DePassError
from ..inputs.prompt import Prompt, encode
from ..sources.decompose import decompose_components
from ..sources.parts import check_layer
from ..sources.subspaces import Subspace
from . import data, probes, summary
from .probes import Probe
from .task import Item, Row, Task, TaskOptions, failed, skipped

LANGUAGES = ("English", "French", "German", "Italian", "Portuguese", "Spanish")  # by their labels
KEYS = ("original", *LANGUAGES[1:])  # keys of a row of the data set
SPLITS = {"classifier": "the classifier's subspace", "mean": "mean over translations"}
PARTS = (
    "whole",
    *(f"{part} ({split})" for split in SPLITS for part in ("language", "meaning")),
)
TOPS = (1, 5)
LAYER = 0.625  # share of the depth: the published layer is 20 of 32


@dataclass(frozen=True)
class Prepared:
    """The classifier's layer, the basis ``[k, D]`` of the subspace that it reads, and ``facts`` for the report."""

    layer: int
    basis: Tensor
    facts: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One prompt in six languages, and the first token of its answer in each."""

    item: Item
    prompts: list[Prompt]
    answers: list[int]


@dataclass(frozen=True, kw_only=True)
class LanguageOptions(TaskOptions):
    """The options of :class:`Language`.

    Attributes:
        train: a file of texts with their languages, to fit the classifier.
        held_out: such a file, to measure the classifier's accuracy.
        layer: the layer whose input is split; None: at five eighths of the depth.
    """

    data: str = field(
        metadata=argument(
            f"file whose rows have {', '.join(KEYS)}, each with prompt and answer (required)", metavar="FILE"
        )
    )
    train: str = field(
        metadata=argument(
            "file whose rows have text and label (0 to 5), to fit the classifier (required)", metavar="FILE"
        )
    )
    held_out: str = field(
        metadata=argument("such a file, to measure the classifier's accuracy (required)", metavar="FILE")
    )
    layer: int | None = field(
        default=None,
        metadata=argument(
            "layer whose input is split (default: at five eighths of the depth, as published)", metavar="L"
        ),
    )


class Language(Task[LanguageOptions]):
    """See the module."""

    name = "language"
    help = "split states into language and meaning, and read what each part says (paper, section 4.3)"
    Options = LanguageOptions
    files = ("data", "train", "held_out")

    def items(self, options: LanguageOptions) -> list[Item]:
        """Rows of the data set."""
        return [_checked(item) for item in data.read(options.data)]

    def prepare(self, dp: DePass, items: Sequence[Item], options: LanguageOptions) -> Prepared:
        """Fit the classifier and find its subspace."""
        depth = len(dp.bound.layers)
        layer = round(LAYER * depth) if options.layer is None else options.layer
        return find_subspace(dp, options.train, options.held_out, layer, options.seed)

    def measure(self, dp: DePass, prepared: Prepared, items: Sequence[Item], options: LanguageOptions) -> Iterator[Row]:
        """Split a case's six states in both ways and read the parts."""
        for item in items:
            try:
                case = _case(dp, item)
                yield _measure(dp, prepared, case) if isinstance(case, Case) else case
            except DePassError as error:
                yield failed(item, error)

    def report(self, rows: Sequence[Row], options: LanguageOptions, folder: Path) -> str:
        """Tables of what the parts say, and of how they cluster."""
        return _report(rows, options, folder)


# The subspace.


def find_subspace(dp: DePass, train: str, held_out: str, layer: int, seed: int) -> Prepared:
    """Fit a language classifier to the last positions of texts, and find the subspace that it reads.

    Raises:
        OptionError: the model does not have this layer.
        DataError: a file cannot be read, or lacks a language.
        DePassError: scikit-learn is not installed.
    """
    check_layer(Subspace(layer), dp.bound)
    (fitting, fit_labels), (judging, judge_labels) = (_last_streams(dp, path, layer) for path in (train, held_out))
    probe = probes.fit(layer, fitting, fit_labels, seed)
    basis = subspace(probe)
    language = [stream @ basis.T for stream in (fitting, judging)]  # coordinates [P, k]
    meaning = [stream - inside @ basis for stream, inside in zip((fitting, judging), language, strict=True)]
    facts = {"layer": layer, "dimensions": len(basis), "held_out": probe.accuracy(judging, judge_labels)}
    for name, (inside, judged) in {"language": language, "meaning": meaning}.items():
        facts[f"held_out_{name}"] = probes.fit(layer, inside, fit_labels, seed).accuracy(judged, judge_labels)
    share = language[1].norm() / judging.norm()
    return Prepared(layer, basis, {**facts, "norm_share": float(share)})


def _last_streams(dp: DePass, path: str, layer: int) -> tuple[Tensor, list[int]]:
    texts, labels = probes.labelled(dp, path, len(LANGUAGES))
    ends = [[len(text.ids) - 1] for text in texts]
    return probes.streams(dp, [text.ids for text in texts], ends, [layer])[0], labels


def subspace(probe: Probe) -> Tensor:
    """An orthonormal basis ``[k, D]`` of the directions that a classifier's decision depends on.

    These are the right singular vectors of its weights. The mean of the classes' weights is subtracted first, because it
    does not change which class wins.
    """
    weight = probe.weight.double()
    _, sizes, right = torch.linalg.svd(weight - weight.mean(0), full_matrices=False)
    basis: Tensor = right[sizes > sizes[0] * 1e-3].float()
    return basis


# A case.


def _checked(item: Item) -> Item:
    if item.broken is not None:
        return item
    for key in KEYS:
        row = item.data.get(key)
        if not isinstance(row, dict) or not all(
            isinstance(row.get(k), str) and row[k].strip() for k in ("prompt", "answer")
        ):
            return Item(item.id, broken=f"the row lacks a prompt and an answer in each of {', '.join(LANGUAGES)}")
    return item


def _case(dp: DePass, item: Item) -> Case | Row:
    """The item's prompts, or the row of an item that cannot be measured."""
    prompts, answers = [], []
    for key in KEYS:
        prompt, answer = item.data[key]["prompt"], item.data[key]["answer"].strip()
        encoded = encode(prompt, dp.tokenizer, dp.bound)
        longer = encode(f"{prompt} {answer}", dp.tokenizer, dp.bound).ids
        if longer[: len(encoded.ids)] != encoded.ids or len(longer) == len(encoded.ids):
            return skipped(item, "an answer changes the tokens of its prompt")
        prompts.append(encoded)
        answers.append(longer[len(encoded.ids)])
    return Case(item, prompts, answers)


def mean_split(dp: DePass, prompts: Sequence[Prompt], layer: int) -> Tensor:
    """``[prompts, D]``: the stream at each translation's last position, minus the mean over all translations."""
    ends = [[len(prompt.ids) - 1] for prompt in prompts]
    stream = probes.streams(dp, [prompt.ids for prompt in prompts], ends, [layer])[0]
    return stream - stream.mean(0)


@torch.no_grad()
def final_parts(dp: DePass, prompts: Sequence[Prompt], specs: Sequence[Sequence[Subspace]]) -> Tensor:
    """Split several prompts' states, and propagate all parts to the end in one pass.

    Args:
        dp: the model.
        prompts: ``B`` prompts.
        specs: for each prompt, ``S`` subspaces of one layer, with one source each.

    Returns:
        ``[B, 1 + 2 S, D]`` after the final norm with its frozen scale, at each prompt's last position: the whole state,
        then for each split the part inside the subspace and the remainder (``rest``). Only the whole holds the biases.
    """
    bound, norm = dp.bound, dp.bound.final_norm
    joining = [
        (decompose_components(spec, len(prompt.ids), bound), i)
        for i, (prompt, of_prompt) in enumerate(zip(prompts, specs, strict=True))
        for spec in of_prompt
    ]
    done = Pass(
        dp.engine, prompts, joining, options(replace(dp.engine.defaults, engine="forward"), bound, exclude_bos=False)
    )
    done.run()
    by_prompt = []
    for i, prompt in enumerate(prompts):
        at = done.propagation.prompt_start[i] + len(prompt.ids) - 1
        parts = [done.normed[at : at + 1]]
        for staircase in range(i * len(specs[0]), (i + 1) * len(specs[0])):
            rows = done.propagation.rows_at(staircase, len(prompt.ids) - 1)[-2:]  # rest, inside; before them a bias row
            parts.append(norm.of_parts(rows.flip(0), norm.scale(done.stream[at].to(rows.device), rows.dtype)))
        by_prompt.append(torch.cat([part.float().cpu() for part in parts]))
    return torch.stack(by_prompt)


def _measure(dp: DePass, prepared: Prepared, case: Case) -> Row:
    layer, remainders = prepared.layer, mean_split(dp, case.prompts, prepared.layer)
    specs = [
        [Subspace(layer, basis=prepared.basis), Subspace(layer, parts=remainder.expand(1, len(prompt.ids), -1))]
        for prompt, remainder in zip(case.prompts, remainders, strict=True)
    ]
    parts = final_parts(dp, case.prompts, specs)  # [languages, parts, D]
    weight, bias = dp.bound.unembedding.weight, dp.bound.unembedding.bias
    said = (parts.to(weight) @ weight.T).float().cpu()  # [languages, parts, V]
    if bias is not None:
        said[:, 0] += bias.float().cpu()
    answers = said[..., case.answers]  # [languages, parts, languages]
    right = answers.diagonal(dim1=0, dim2=2).T  # [languages, parts]
    rank = (said > right[..., None]).sum(-1) + 1
    any_rank = (said > answers.amax(-1, keepdim=True)).sum(-1) + 1
    return {
        "id": case.item.id,
        "status": "ok",
        "answers": [dp.tokenizer.decode([token]) for token in case.answers],
        "shared": [case.answers.count(token) for token in case.answers],
        "rank": rank.tolist(),
        "any_rank": any_rank.tolist(),
        "chosen": (right >= answers.amax(-1)).tolist(),
        "tops": [[dp.tokenizer.batch_decode(top[:, None]) for top in row] for row in said.topk(3).indices],
        "states": [[[float(f"{x:.4g}") for x in part] for part in row] for row in parts.tolist()],
        "facts": prepared.facts,
    }


# The report.


def _report(rows: Sequence[Row], options: LanguageOptions, folder: Path) -> str:
    if not rows:
        return "No case was measured."
    facts = rows[0]["facts"]
    states = torch.tensor([row["states"] for row in rows])  # [cases, languages, parts, D]
    cases, languages = len(rows), len(LANGUAGES)
    language = list(range(languages)) * cases
    meaning = [case for case in range(cases) for _ in range(languages)]
    return "\n\n".join(
        [
            f"The residual stream that enters layer {facts['layer']} is split in two ways. The first uses the subspace of "
            f"{facts['dimensions']} dimensions that a language classifier reads there: the part inside is the language, the "
            "part outside is the meaning. The second uses the mean of the last positions over a prompt's six translations: "
            "the mean is the meaning, the difference from it is the language.",
            f"The classifier's accuracy on held-out texts is {facts['held_out']:.3f}. A classifier fitted to the part "
            f"inside the subspace reaches {facts['held_out_language']:.3f}, one fitted to the part outside "
            f"{facts['held_out_meaning']:.3f}. Chance is {1 / languages:.3f}. The subspace holds "
            f"{facts['norm_share']:.3f} of the norm of these texts' last states.",
            "## What the parts say at the end",
            _said(rows, options.seed),
            "## Examples",
            _examples(rows),
            "## How the parts cluster",
            _clusters(states, language, meaning),
            _scatter(states, language, meaning, options.seed, folder),
        ]
    )


def _said(rows: Sequence[Row], seed: int) -> str:
    """How often each part's most likely tokens hold the answer: over all prompts, and over those answered right."""
    prompts = [(row, language) for row in rows for language in range(len(LANGUAGES))]
    known = [(row, language) for row, language in prompts if row["rank"][language][0] == 1]
    head = [
        "part",
        *(f"{which}, top {top}" for top in TOPS for which in ("right language", "any language")),
        "choice of six",
    ]
    tables = []
    for heading, chosen in (
        (f"All {len(prompts)} prompts:", prompts),
        (f"The {len(known)} prompts whose answer is the model's own next token:", known),
    ):
        tables.append(heading)
        if not chosen:
            continue
        lines = []
        for at, part in enumerate(PARTS):
            hits = [
                [float(row[key][language][at] <= top) for row, language in chosen]
                for top in TOPS
                for key in ("rank", "any_rank")
            ]
            hits.append([float(row["chosen"][language][at]) for row, language in chosen])
            lines.append([part, *(str(summary.mean(values, seed)) for values in hits)])
        tables.append(summary.table(head, lines))
    chance = sum(row["shared"][language] for row, language in prompts) / (len(prompts) * len(LANGUAGES))
    tables.append(
        "A cell is the share of prompts for which the first token of the answer, in the prompt's language or in any of the "
        "six, is among the part's top tokens. Choice of six: the answer in the prompt's language has the largest logit of "
        f"the six answers. Languages that share a first token both count, so chance is {chance:.3f}. Intervals are 95 % "
        "bootstrap intervals."
    )
    return "\n\n".join(tables)


def _examples(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows[:2]:
        for language, name in enumerate(LANGUAGES):
            tops = [" ".join(f"`{token!r}`" for token in top) for top in row["tops"][language]]
            lines.append([name, f"`{row['answers'][language]!r}`", *(top.replace("|", "\\|") for top in tops)])
    return summary.table(["language", "answer", *PARTS], lines)


def _clusters(states: Tensor, language: Sequence[int], meaning: Sequence[int]) -> str:
    """Three cluster indices of each part, by language and by meaning."""
    metrics = probes.sklearn("metrics")
    lines = []
    for at, part in enumerate(PARTS):
        points = states[:, :, at].flatten(0, 1).double().numpy()
        line = [part]
        for labels in (language, meaning):
            if len(set(labels)) < 2 or len(set(labels)) == len(labels):
                line += ["–"] * 3
                continue
            line += [
                f"{index(points, labels):.3g}"
                for index in (metrics.silhouette_score, metrics.davies_bouldin_score, metrics.calinski_harabasz_score)
            ]
        lines.append(line)
    names = ("silhouette", "Davies-Bouldin", "Calinski-Harabasz")
    head = ["part", *(f"{name} by {by}" for by in ("language", "meaning") for name in names)]
    return (
        summary.table(head, lines)
        + "\n\nThe points are the parts after the final norm at the last position. A meaning is one prompt in six "
        "languages. Larger silhouette (-1 to 1) and Calinski-Harabasz are better; smaller Davies-Bouldin is better. A good "
        "split clusters the language part by language and not by meaning, and the meaning part the other way round. The "
        "mean over translations is computed from prompts known to belong together, so its clusters by meaning follow from "
        "the construction."
    )


def _scatter(states: Tensor, language: Sequence[int], meaning: Sequence[int], seed: int, folder: Path) -> str:
    """t-SNE of each part, coloured by language and by meaning."""
    manifold = probes.sklearn("manifold")
    figure = summary.new_figure(3 * len(PARTS), 6.4)
    axes = figure.subplots(2, len(PARTS))
    colours = {"language": [summary.COLOURS[label] for label in language], "meaning": meaning}
    for at, part in enumerate(PARTS):
        points = states[:, :, at].flatten(0, 1).double().numpy()
        perplexity = min(30.0, (len(points) - 1) / 3)
        flat = manifold.TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)
        for row, (by, colour) in enumerate(colours.items()):
            axes[row, at].scatter(*flat.T, c=colour, cmap="hsv" if by == "meaning" else None, s=8)
            axes[row, at].set(
                xticks=[], yticks=[], title=part if row == 0 else "", ylabel=f"by {by}" if at == 0 else ""
            )
    for name, colour in zip(LANGUAGES, summary.COLOURS, strict=False):
        axes[0, 0].scatter([], [], c=colour, s=8, label=name)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LANGUAGES))
    return (
        summary.save(figure, folder / "parts.png")
        + "\n\nt-SNE of each part's states, coloured by language (top) and by meaning (bottom). The axes have no unit."
    )
