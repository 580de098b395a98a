"""Truthful subspace (paper, 4.1.2): are the tokens that point a probe of truth the wrong way those that mislead the model?

A probe is fitted on the residual stream of true and false statements. A question with two answers to choose from is asked
with a line of misinformation before it. DePass says how much each token of that line contributed to the probe's reading of
it; the tokens that drew it most towards false are deleted, and the question is asked again.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..api import DePass
from ..arguments import argument
from ..errors import DePassError, PromptError
from ..inputs.prompt import Prompt, encode
from ..inputs.targets import Direction
from . import data, forward, probes, summary
from .probes import Probe
from .task import Item, Row, Task, TaskOptions, failed, skipped

KEYS = ("prompt_init", "prompt_correct", "prompt_wrong", "correct_option")
TEXTS = ("correct_info", "wrong_info")  # what the options say
OPTIONS = ("A", "B")
BEGIN, END = "Information:", "\nQuestion:"  # around the line of information
HOW = {  # of two options, by --answer
    "letter": "Right is where the right option's letter has a larger logit than the other's; the probability is that of the "
    "right one of the two letters.",
    "text": "Right is where the tokens of the right option's text have a larger mean log-probability than the other's; the "
    "probability is the sigmoid of the difference.",
}
CHUNK = 16  # items that are attributed and asked together
ANSWER_HELP = (
    "how the options are compared: by the logits of their letters (default), or for models that know no multiple choice by "
    "the mean log-probabilities of their texts' tokens"
)
POSITIONS = 2000  # most of either label that a probe is fitted on and judged by: more take saga longer
CONDITIONS = {
    "no information": "without the line",
    "correct information": "with a true line",
    "misinformation": "with a false line",
    "probe": "misinformation, tokens chosen by the probe's own reading at each",
    "DePass": "misinformation, tokens chosen by their DePass scores",
    "random": "misinformation, tokens chosen at random",
}


@dataclass(frozen=True)
class Prepared:
    """The chosen probe, and how well that of each layer did on statements that it was not fitted on."""

    probe: Probe
    held_out: list[float]


@dataclass(frozen=True)
class Question:
    """An item's prompts, encoded.

    Attributes:
        plain: the question alone.
        correct: with true information.
        wrong: with misinformation.
        line: the positions of the misinformation in ``wrong``.
        options: the ids of what says the right option, and the other.
    """

    item: Item
    plain: Prompt
    correct: Prompt
    wrong: Prompt
    line: list[int]
    options: tuple[list[int], list[int]]


@dataclass(frozen=True, kw_only=True)
class TruthfulOptions(TaskOptions):
    """What :class:`Truthful` is told.

    Attributes:
        train: a file of statements, true and false, which the probes are fitted on.
        held_out: such a file, by which the layer is chosen.
        last: how many positions at the end of a statement are read; None: all.
        answer: how the options are compared, by ``letter`` or ``text`` (see :data:`HOW`).
        masked: the share of the line's tokens that is deleted, above 0 and up to 1.
    """

    data: str = field(metadata=argument(f"rows with {', '.join(KEYS)} (required)", metavar="FILE"))
    train: str = field(
        metadata=argument("rows with text and label (1: true, 0: false), for the probes", metavar="FILE")
    )
    held_out: str = field(metadata=argument("the same, to choose the layer by", metavar="FILE"))
    last: int | None = field(
        default=None,
        metadata=argument("read the last N positions of statements (default: all, as published)", metavar="N", least=1),
    )
    answer: str = field(default="letter", metadata=argument(ANSWER_HELP, choices=tuple(HOW)))
    masked: float = field(
        default=0.5, metadata=argument("share of the line's tokens to delete (default: 0.5)", metavar="X", most=1.0)
    )


class Truthful(Task[TruthfulOptions]):
    """See the module."""

    name = "truthful"
    help = "deletes the tokens of misinformation that a probe of truth objects to (paper, 4.1.2)"
    Options = TruthfulOptions
    files = ("data", "train", "held_out")

    def items(self, options: TruthfulOptions) -> list[Item]:
        """Rows of the data set."""
        return [_checked(item) for item in data.read(options.data)]

    def prepare(self, dp: DePass, items: Sequence[Item], options: TruthfulOptions) -> Prepared:
        """Fit a probe at each layer and choose the one that does best on the statements held out."""
        return choose_probe(dp, options.train, options.held_out, options.last, options.seed)

    def measure(self, dp: DePass, prepared: Prepared, items: Sequence[Item], options: TruthfulOptions) -> Iterator[Row]:
        """Ask each question in six ways."""
        for begin in range(0, len(items), CHUNK):
            questions = []
            for item in items[begin : begin + CHUNK]:
                made = _question(dp, item, options.answer)
                if isinstance(made, Question):
                    questions.append(made)
                else:
                    yield made
            yield from _measure(dp, prepared, questions, options)

    def report(self, rows: Sequence[Row], options: TruthfulOptions, folder: Path) -> str:
        """Accuracy in each condition, and the probes'."""
        return _report(rows, options, folder)


# The probe.


def choose_probe(dp: DePass, train: str, held_out: str, last: int | None, seed: int) -> Prepared:
    """A probe of truth at every layer's input; the one that is best on the held-out positions.

    Fitted on and judged by as many positions of true statements as of false ones, drawn by the seed from all of their tokens
    but special ones, or from the last ``last`` of each statement, where nearly all of it has been read.

    Raises:
        DataError: a file that cannot be read, or that lacks true or false statements.
        DePassError: scikit-learn is not installed.
    """
    layers = range(len(dp.bound.layers))
    sets = []
    for path in (train, held_out):
        texts, labels = probes.labelled(dp, path, 2)
        positions = balanced([readable(text, last) for text in texts], labels, POSITIONS, seed)
        stream = probes.streams(dp, [text.ids for text in texts], positions, layers)
        each = [label for label, chosen in zip(labels, positions, strict=True) for _ in chosen]
        sets.append((stream, each))
    (fitting, fit_labels), (judging, judge_labels) = sets
    fitted = [probes.fit(layer, fitting[layer], fit_labels, seed) for layer in layers]
    held = [probe.accuracy(judging[probe.layer], judge_labels) for probe in fitted]
    return Prepared(fitted[held.index(max(held))], held)


def readable(prompt: Prompt, last: int | None) -> list[int]:
    """The positions that a probe is fitted on: all but those of special tokens, or the ``last`` of them."""
    return [t for t in range(len(prompt.ids)) if t not in prompt.special][-(last or 0) :]


def balanced(positions: Sequence[Sequence[int]], labels: Sequence[int], most: int, seed: int) -> list[list[int]]:
    """As many positions of either label, at most ``most`` of each, drawn from those of each prompt.

    Args:
        positions: of each prompt.
        labels: 0 or 1, of each prompt.
        most: of either label.
        seed: of the draw.
    """
    chance = torch.Generator().manual_seed(seed)
    pairs = {0: [], 1: []}  # type: dict[int, list[tuple[int, int]]]
    for i, (of_prompt, label) in enumerate(zip(positions, labels, strict=True)):
        pairs[label] += [(i, t) for t in of_prompt]
    count = min(most, len(pairs[0]), len(pairs[1]))
    chosen: list[list[int]] = [[] for _ in positions]
    for of_label in pairs.values():
        for at in torch.randperm(len(of_label), generator=chance)[:count].tolist():
            i, t = of_label[at]
            chosen[i].append(t)
    return [sorted(of_prompt) for of_prompt in chosen]


def token_scores(
    dp: DePass, probe: Probe, prompts: Sequence[Sequence[int]], lines: Sequence[Sequence[int]], last: int | None
) -> Iterator[tuple[Tensor, Tensor] | DePassError]:
    """How true a probe finds each position of a statement, and how much each token contributed to that.

    The scores are of the probe's readings at the statement's positions, weighted by how untrue it finds each, as published:
    they say who drew the untrue ones where they are.

    Args:
        dp: whose model.
        probe: of two classes.
        prompts: token ids.
        lines: the statement's positions in each prompt, at least one.
        last: only its last positions are weighted; None for all.

    Yields:
        For each prompt the probability of being true at each position of the line, and the score of each of its tokens,
        negative where it drew the probe towards false; or the error that stands in its way.
    """
    w, intercept = probe.weight[0], float(probe.intercept[0])
    targets = [[Direction(w, t, layer=probe.layer, intercept=intercept) for t in line] for line in lines]
    results = dp.attribute_many(prompts, targets=targets, stop_layer=max(1, probe.layer), errors="return")
    for result, line in zip(results, lines, strict=True):
        if isinstance(result, DePassError):
            yield result
            continue
        true = (result.target_logits + intercept).sigmoid()  # [positions]
        weights = (1 - true)[-(last or 0) :]
        scores = (weights / weights.sum()) @ result.scores[-(last or 0) :]  # [sources]
        column = {source.start: i for i, source in enumerate(result.sources) if source.kind == "token"}
        yield true, scores[[column[t] for t in line]]


# The questions.


def _checked(item: Item) -> Item:
    if item.broken is not None:
        return item
    if not all(isinstance(item.data.get(key), str) and item.data[key] for key in KEYS):
        return Item(item.id, broken=f"a row without {', '.join(KEYS)}")
    if item.data["correct_option"] not in OPTIONS:
        return Item(item.id, broken=f"a correct_option that is none of {', '.join(OPTIONS)}")
    wrong = item.data["prompt_wrong"]
    if wrong.count(BEGIN) != 1 or END not in wrong.split(BEGIN)[1]:
        return Item(item.id, broken="a prompt_wrong without one line of Information before its Question")
    return item


def _question(dp: DePass, item: Item, answer: str) -> Question | Row:
    """The item's prompts, or the row of an item that cannot be measured."""
    right = item.data["correct_option"]
    said = [right, OPTIONS[1 - OPTIONS.index(right)]]
    if answer == "text":
        said = [item.data.get(key, "") for key in TEXTS]
        if not all(isinstance(text, str) and text.strip() for text in said):
            return failed(item, f"a row without {' and '.join(TEXTS)}, which --answer text compares")
    try:
        plain, correct, wrong = (encode(item.data[key], dp.tokenizer, dp.bound) for key in KEYS[:3])
        longer = [encode(f"{item.data['prompt_wrong']} {text}", dp.tokenizer, dp.bound).ids for text in said]
    except PromptError as error:
        return failed(item, error)
    length = len(wrong.ids)
    if any(ids[:length] != wrong.ids or len(ids) == length for ids in longer) or longer[0] == longer[1]:
        return skipped(item, "the options are not different tokens behind the prompt")
    line = information(wrong)
    if not line:
        return skipped(item, "no token lies within the information")
    return Question(item, plain, correct, wrong, line, (list(longer[0][length:]), list(longer[1][length:])))


def information(prompt: Prompt) -> list[int]:
    """The positions of the tokens that lie wholly within the line of information.

    A token that reaches beyond it, such as a full stop with the line's end, belongs to the prompt's form and stays.
    """
    assert prompt.text is not None
    begin = prompt.text.index(BEGIN) + len(BEGIN)
    end = prompt.text.index(END, begin)
    return [t for t, (a, b) in enumerate(prompt.offsets) if begin <= a < b <= end]


def _measure(dp: DePass, prepared: Prepared, questions: Sequence[Question], options: TruthfulOptions) -> Iterator[Row]:
    """The rows of some questions."""
    heads = [[t for t in sorted(q.wrong.special) if t < q.line[0]] for q in questions]  # BOS, where there is one
    statements = [[q.wrong.ids[t] for t in (*head, *q.line)] for q, head in zip(questions, heads, strict=True)]
    lines = [list(range(len(head), len(ids))) for head, ids in zip(heads, statements, strict=True)]
    kept: list[tuple[Question, int]] = []
    asked: list[list[int]] = []
    results = token_scores(dp, prepared.probe, statements, lines, options.last) if questions else iter(())
    for question, found in zip(questions, results, strict=True):
        if isinstance(found, DePassError):
            yield failed(question.item, found)
            continue
        true, scores = found
        count = max(1, round(options.masked * len(question.line)))
        chance = torch.Generator().manual_seed(zlib.crc32(f"{options.seed}:{question.item.id}".encode()))
        orders = (true, scores, torch.rand(len(question.line), generator=chance))  # by the probe, by DePass, at random
        asked += [list(question.plain.ids), list(question.correct.ids), list(question.wrong.ids)]
        asked += [without(question.wrong.ids, lowest(order, question.line, count)) for order in orders]
        kept.append((question, count))
    right, tops = forward.continuations(dp, asked, [q.options[0] for q, _ in kept for _ in CONDITIONS])
    other, _ = forward.continuations(dp, asked, [q.options[1] for q, _ in kept for _ in CONDITIONS])
    margins = (right - other).view(len(kept), len(CONDITIONS))
    for i, (question, count) in enumerate(kept):
        row: Row = {"id": question.item.id, "status": "ok", "correct_option": question.item.data["correct_option"]}
        firsts = [ids[0] for ids in question.options]
        for j, condition in enumerate(CONDITIONS):
            row[condition] = {
                "correct": bool(margins[i, j] > 0),
                "probability": float(margins[i, j].sigmoid()),
                "says_an_option": int(tops[i * len(CONDITIONS) + j]) in firsts,
            }
        row |= {"tokens": len(question.line), "deleted": count}
        yield row | {"layer": prepared.probe.layer, "held_out": prepared.held_out}


def lowest(order: Tensor, positions: Sequence[int], count: int) -> set[int]:
    """The ``count`` of ``positions`` that come first in ascending ``order`` ``[positions]``."""
    return {positions[i] for i in order.argsort(stable=True)[:count].tolist()}


def without(ids: Sequence[int], positions: set[int]) -> list[int]:
    """A prompt's ids without those at some positions."""
    return [token for t, token in enumerate(ids) if t not in positions]


# The report.


def _report(rows: Sequence[Row], options: TruthfulOptions, folder: Path) -> str:
    if not rows:
        return "No question could be asked."
    accuracy = {name: summary.mean([float(row[name]["correct"]) for row in rows], options.seed) for name in CONDITIONS}
    probability = {name: summary.mean([row[name]["probability"] for row in rows], options.seed) for name in CONDITIONS}
    lines = []
    for name, said in CONDITIONS.items():
        says = sum(row[name]["says_an_option"] for row in rows) / len(rows)
        lines.append([f"{name}: {said}", str(accuracy[name]), str(probability[name]), f"{says:.3f}"])
    head = ["asked", "accuracy", "probability of the right option", "next token is an option"]
    held_out, layer = rows[0]["held_out"], rows[0]["layer"]
    deleted, tokens = (sum(row[key] for row in rows) / len(rows) for key in ("deleted", "tokens"))
    first = sum(row["correct_option"] == OPTIONS[0] for row in rows) / len(rows)
    return "\n\n".join(
        [
            summary.table(head, lines),
            f"Means over {len(rows)} questions with 95 % bootstrap intervals. {HOW[options.answer]} In the last three rows "
            f"{deleted:.1f} of the line's {tokens:.1f} tokens are deleted, on average. {OPTIONS[0]} is right in {first:.3f} "
            "of the questions.",
            summary.table(["instead of", "accuracy", "probability of the right option"], _gains(rows, options.seed)),
            "What deleting by DePass's scores adds over another condition, question by question.",
            _figure(accuracy, probability, folder),
            f"The probe of layer {layer} was best on held-out positions, half of them in true statements: "
            f"{held_out[layer]:.3f}. Its choice was made on them, so that number is a little high.",
            _probe_figure(held_out, layer, folder),
        ]
    )


def _gains(rows: Sequence[Row], seed: int) -> list[list[str]]:
    """By how much deleting by DePass's scores is better than each other choice."""
    lines = []
    for other in ("misinformation", "probe", "random"):
        pairs = [(row["DePass"], row[other]) for row in rows]
        right = summary.mean([float(ours["correct"]) - float(its["correct"]) for ours, its in pairs], seed)
        probability = summary.mean([ours["probability"] - its["probability"] for ours, its in pairs], seed)
        lines.append([other, str(right), str(probability)])
    return lines


def _figure(accuracy: dict[str, summary.Mean], probability: dict[str, summary.Mean], folder: Path) -> str:
    figure = summary.new_figure(9, 3.5)
    for axes, title, means in zip(
        figure.subplots(1, 2, sharey=True),
        ("accuracy", "probability of the right option"),
        (accuracy, probability),
        strict=True,
    ):
        for at, mean in enumerate(means.values()):
            axes.barh(at, mean.value, color=summary.COLOURS[0 if at == list(means).index("DePass") else -1])
            axes.plot([mean.low, mean.high], [at, at], color="black", linewidth=1)
        axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(means)), list(means))
        axes.set_xlim(0, 1)
        axes.set_xlabel(title)
    figure.axes[0].invert_yaxis()
    return summary.save(figure, folder / "answers.png")


def _probe_figure(held_out: Sequence[float], layer: int, folder: Path) -> str:
    figure = summary.new_figure(6, 3)
    axes = figure.subplots()
    axes.plot(range(len(held_out)), held_out, color=summary.COLOURS[0])
    axes.plot(layer, held_out[layer], "o", color=summary.COLOURS[1], label=f"layer {layer}, chosen")
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":", label="chance")
    axes.set_xlabel("layer whose input is read")
    axes.set_ylabel("accuracy on held-out positions")
    axes.legend()
    return summary.save(figure, folder / "probes.png")
