"""Truthful subspace (paper, section 4.1.2): do the tokens that turn a truth probe to "false" also mislead the model?

A probe is fitted to the residual stream of true and false statements. The model then gets a question with two options,
after a line of misinformation. DePass scores how much each token of that line contributed to the probe's reading of the
line. The tokens that turn it most to "false" are deleted, and the model gets the question again.
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
TEXTS = ("correct_info", "wrong_info")  # the texts of the options
OPTIONS = ("A", "B")
BEGIN, END = "Information:", "\nQuestion:"  # around the line of information
HOW = {  # how two options are compared, by --answer
    "letter": "An answer is right if the logit of the right option's letter is the larger of the two; the probability is "
    "that of the right letter among the two.",
    "text": "An answer is right if the tokens of the right option's text have the larger mean log-probability of the two; "
    "the probability is the sigmoid of the difference.",
}
CHUNK = 16  # items that are measured together
ANSWER_HELP = (
    "how to compare the options: letter compares the logits of their letters (default); text compares the mean "
    "log-probabilities of their texts, for models that cannot answer multiple-choice questions"
)
POSITIONS = 2000  # the most positions of each label for fitting a probe and for its accuracy; more slow saga down
CONDITIONS = {
    "no information": "without the line",
    "correct information": "with a true line",
    "misinformation": "with a false line",
    "probe": "misinformation without the tokens where the probe reads most false",
    "DePass": "misinformation without the tokens with the lowest DePass scores",
    "random": "misinformation without random tokens",
}


@dataclass(frozen=True)
class Prepared:
    """The chosen probe, and the held-out accuracy of each layer's probe."""

    probe: Probe
    held_out: list[float]


@dataclass(frozen=True)
class Question:
    """The encoded prompts of an item.

    Attributes:
        item: the item.
        plain: the question without information.
        correct: the question with true information.
        wrong: the question with misinformation.
        line: the positions of the misinformation in ``wrong``.
        options: the ids of the right option, and those of the other.
    """

    item: Item
    plain: Prompt
    correct: Prompt
    wrong: Prompt
    line: list[int]
    options: tuple[list[int], list[int]]


@dataclass(frozen=True, kw_only=True)
class TruthfulOptions(TaskOptions):
    """The options of :class:`Truthful`.

    Attributes:
        train: a file of true and false statements, to fit the probes.
        held_out: such a file, to choose the layer.
        last: read only the last positions of each statement, so many; None: all.
        answer: how to compare the options, by ``letter`` or ``text`` (see :data:`HOW`).
        masked: share of the line's tokens to delete, above 0 and at most 1.
    """

    data: str = field(metadata=argument(f"file whose rows have {', '.join(KEYS)} (required)", metavar="FILE"))
    train: str = field(
        metadata=argument(
            "file whose rows have text and label (1: true, 0: false), to fit the probes (required)", metavar="FILE"
        )
    )
    held_out: str = field(metadata=argument("such a file, to choose the layer (required)", metavar="FILE"))
    last: int | None = field(
        default=None,
        metadata=argument(
            "read only the last N positions of each statement (default: all, as published)", metavar="N", least=1
        ),
    )
    answer: str = field(default="letter", metadata=argument(ANSWER_HELP, choices=tuple(HOW)))
    masked: float = field(
        default=0.5, metadata=argument("share of the line's tokens to delete (default: 0.5)", metavar="X", most=1.0)
    )


class Truthful(Task[TruthfulOptions]):
    """See the module."""

    name = "truthful"
    help = "delete the tokens of misinformation that a truth probe reads as false (paper, section 4.1.2)"
    Options = TruthfulOptions
    files = ("data", "train", "held_out")

    def items(self, options: TruthfulOptions) -> list[Item]:
        """Rows of the data set."""
        return [_checked(item) for item in data.read(options.data)]

    def prepare(self, dp: DePass, items: Sequence[Item], options: TruthfulOptions) -> Prepared:
        """Fit a probe at each layer, and choose the one with the best held-out accuracy."""
        return choose_probe(dp, options.train, options.held_out, options.last, options.seed)

    def measure(self, dp: DePass, prepared: Prepared, items: Sequence[Item], options: TruthfulOptions) -> Iterator[Row]:
        """Ask each question under six conditions."""
        for begin in range(0, len(items), CHUNK):
            questions = []
            for item in items[begin : begin + CHUNK]:
                question = _question(dp, item, options.answer)
                if isinstance(question, Question):
                    questions.append(question)
                else:
                    yield question
            yield from _measure(dp, prepared, questions, options)

    def report(self, rows: Sequence[Row], options: TruthfulOptions, folder: Path) -> str:
        """Tables and figures of the accuracy under each condition, and of the probes' accuracy."""
        return _report(rows, options, folder)


# The probe.


def choose_probe(dp: DePass, train: str, held_out: str, last: int | None, seed: int) -> Prepared:
    """Fit a truth probe to every layer's input, and choose the one with the best accuracy on held-out positions.

    Both sets have as many positions of true statements as of false ones. The seed draws them from all tokens that are not
    special, or from the ``last`` tokens of each statement, where the model has read most of it.

    Raises:
        DataError: a file cannot be read, or lacks true or false statements.
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
    """The positions that a probe is fitted to: all but special tokens, or only the ``last`` of these."""
    return [t for t in range(len(prompt.ids)) if t not in prompt.special][-(last or 0) :]


def balanced(positions: Sequence[Sequence[int]], labels: Sequence[int], most: int, seed: int) -> list[list[int]]:
    """Draw equally many positions of both labels.

    Args:
        positions: the positions of each prompt.
        labels: the label of each prompt, 0 or 1.
        most: the most positions per label.
        seed: seed of the draw.

    Returns:
        The drawn positions of each prompt.
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
    """The probe's probability of "true" at each position of a statement, and each token's contribution to the readings.

    A token's score is the mean of its contributions to the probe's readings at all positions. As published, each position
    is weighted by its probability of "false".

    Args:
        dp: the model.
        probe: a probe with two classes.
        prompts: token ids.
        lines: the statement's positions in each prompt, at least one.
        last: only so many of its last positions are weighted; None: all.

    Yields:
        For each prompt, the probability of "true" at each position of the line, and the score of each of its tokens
        (negative: it turns the probe to "false"); or the error of a prompt that cannot be scored.
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
        return Item(item.id, broken=f"the row needs texts for {', '.join(KEYS)}")
    if item.data["correct_option"] not in OPTIONS:
        return Item(item.id, broken=f"correct_option must be one of {', '.join(OPTIONS)}")
    wrong = item.data["prompt_wrong"]
    if wrong.count(BEGIN) != 1 or END not in wrong.split(BEGIN)[1]:
        return Item(item.id, broken=f"prompt_wrong must have one line {BEGIN!r} before {END.strip()!r}")
    return item


def _question(dp: DePass, item: Item, answer: str) -> Question | Row:
    """The item's prompts, or the row of an item that cannot be measured."""
    right = item.data["correct_option"]
    answers = [right, OPTIONS[1 - OPTIONS.index(right)]]
    if answer == "text":
        answers = [item.data.get(key, "") for key in TEXTS]
        if not all(isinstance(text, str) and text.strip() for text in answers):
            return failed(item, f"the row has no {' and '.join(TEXTS)}, which --answer text needs")
    try:
        plain, correct, wrong = (encode(item.data[key], dp.tokenizer, dp.bound) for key in KEYS[:3])
        longer = [encode(f"{item.data['prompt_wrong']} {text}", dp.tokenizer, dp.bound).ids for text in answers]
    except PromptError as error:
        return failed(item, error)
    length = len(wrong.ids)
    if any(ids[:length] != wrong.ids or len(ids) == length for ids in longer) or longer[0] == longer[1]:
        return skipped(item, "the options do not become different tokens after the prompt")
    line = information(wrong)
    if not line:
        return skipped(item, "no token lies within the line of information")
    return Question(item, plain, correct, wrong, line, (list(longer[0][length:]), list(longer[1][length:])))


def information(prompt: Prompt) -> list[int]:
    """The positions of the tokens that lie wholly within the line of information.

    A token that reaches beyond the line, such as a full stop joined with the line break, is never deleted.
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
    prompts: list[list[int]] = []
    results = token_scores(dp, prepared.probe, statements, lines, options.last) if questions else iter(())
    for question, result in zip(questions, results, strict=True):
        if isinstance(result, DePassError):
            yield failed(question.item, result)
            continue
        true, scores = result
        count = max(1, round(options.masked * len(question.line)))
        chance = torch.Generator().manual_seed(zlib.crc32(f"{options.seed}:{question.item.id}".encode()))
        orders = (true, scores, torch.rand(len(question.line), generator=chance))  # by the probe, by DePass, at random
        prompts += [list(question.plain.ids), list(question.correct.ids), list(question.wrong.ids)]
        prompts += [without(question.wrong.ids, lowest(order, question.line, count)) for order in orders]
        kept.append((question, count))
    right, tops = forward.continuations(dp, prompts, [q.options[0] for q, _ in kept for _ in CONDITIONS])
    other, _ = forward.continuations(dp, prompts, [q.options[1] for q, _ in kept for _ in CONDITIONS])
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
    """The ``count`` positions with the lowest values in ``order`` ``[positions]``."""
    return {positions[i] for i in order.argsort(stable=True)[:count].tolist()}


def without(ids: Sequence[int], positions: set[int]) -> list[int]:
    """A prompt's ids without those at the given positions."""
    return [token for t, token in enumerate(ids) if t not in positions]


# The report.


def _report(rows: Sequence[Row], options: TruthfulOptions, folder: Path) -> str:
    if not rows:
        return "No question was measured."
    accuracy = {name: summary.mean([float(row[name]["correct"]) for row in rows], options.seed) for name in CONDITIONS}
    probability = {name: summary.mean([row[name]["probability"] for row in rows], options.seed) for name in CONDITIONS}
    lines = []
    for name, meaning in CONDITIONS.items():
        says = sum(row[name]["says_an_option"] for row in rows) / len(rows)
        lines.append([f"{name}: {meaning}", str(accuracy[name]), str(probability[name]), f"{says:.3f}"])
    head = ["condition", "accuracy", "probability of the right option", "next token is an option"]
    held_out, layer = rows[0]["held_out"], rows[0]["layer"]
    deleted, tokens = (sum(row[key] for row in rows) / len(rows) for key in ("deleted", "tokens"))
    first = sum(row["correct_option"] == OPTIONS[0] for row in rows) / len(rows)
    return "\n\n".join(
        [
            summary.table(head, lines),
            f"Means over {len(rows)} questions with 95 % bootstrap intervals. {HOW[options.answer]} The last three rows "
            f"delete {deleted:.1f} of the line's {tokens:.1f} tokens on average. {OPTIONS[0]} is the right option in "
            f"{first:.3f} of the questions.",
            summary.table(["DePass minus", "accuracy", "probability of the right option"], _gains(rows, options.seed)),
            "The gain from deleting tokens by DePass's scores over the named condition, question by question.",
            _figure(accuracy, probability, folder),
            f"The probe of layer {layer} has the best accuracy on held-out positions, {held_out[layer]:.3f}. Half of these "
            "positions are in true statements. The number is slightly too high, because the same positions chose the layer.",
            _probe_figure(held_out, layer, folder),
        ]
    )


def _gains(rows: Sequence[Row], seed: int) -> list[list[str]]:
    """The gain from deleting tokens by DePass's scores over the other conditions."""
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
        ("accuracy (0 to 1)", "probability of the right option (0 to 1)"),
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
    axes.plot(layer, held_out[layer], "o", color=summary.COLOURS[1], label=f"chosen layer {layer}")
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":", label="chance")
    axes.set_xlabel("layer whose input the probe reads")
    axes.set_ylabel("accuracy on held-out positions (0 to 1)")
    axes.legend()
    return summary.save(figure, folder / "probes.png")
