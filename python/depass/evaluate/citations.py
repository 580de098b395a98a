"""Citations: do the scores name the part of a prompt that decides the answer? The truth is planted (:mod:`.planted`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import baselines, rules
from ..api import DePass
from ..arguments import argument
from ..errors import DePassError, NonFiniteError, OptionError
from ..inputs.prompt import encode
from ..inputs.targets import Token
from ..sources.spans import Spans, token_ranges
from . import data
from .forward import continuations, greedy
from .planted import KINDS, Question, Range, questions
from .summary import mean, prompts_in_words, table
from .task import Item, Row, Task, TaskOptions, failed, skipped
from .tokens import KEEP_WRONG

BOTH = "planted"
COUNT = 100  # prompts of a kind
RULES = ("softmax", *rules.LINEAR, "steered")
LEFT_OUT = "leave_one_out"
ATTENTION = ("last_attention", "mean_attention")
METHODS = (*RULES, LEFT_OUT, *ATTENTION)
LEVELS = {
    "document": "Documents: which document holds the fact?",
    "sentence": "Documents: which sentence holds the fact?",
    "step": "Chains: which step of the reasoning decides the answer?",
    "statement": "Chains: which of the premises and steps decides the answer?",
    "premise": "Chains: which premise decides the value in this step?",
}
WRONG = "the model's own answer is wrong"
UNMOVED = "with another value in the deciding part, the model does not give that value"


@dataclass(frozen=True, kw_only=True)
class CitationsOptions(TaskOptions):
    """The options of :class:`Citations`.

    Attributes:
        data: the kind of prompts, or ``planted`` for both.
        keep_wrong: also measure prompts that the model answers wrong.
    """

    data: str = field(
        default=BOTH,
        metadata=argument(f"the kind of prompts (default: {BOTH}, both kinds)", choices=(BOTH, *KINDS)),
    )
    keep_wrong: bool = field(default=False, metadata=KEEP_WRONG)


class Citations(Task[CitationsOptions]):
    """Ranks documents, sentences, premises and steps by their scores for the answer."""

    name = "citations"
    help = "do the scores name the document, the sentence or the step that decides the answer?"
    Options = CitationsOptions
    files = ()

    def items(self, options: CitationsOptions) -> list[Item]:
        """Generated prompts; the kinds alternate."""
        kinds = list(KINDS) if options.data == BOTH else [options.data]
        count = COUNT if options.needed is None else math.ceil(options.needed / len(kinds))
        return [
            Item(f"{kind}-{index}", {"kind": kind, "questions": questions(kind, index, options.seed)})
            for index in range(count)
            for kind in kinds
        ]

    def measure(self, dp: DePass, prepared: Any, items: Sequence[Item], options: CitationsOptions) -> Iterator[Row]:
        """The scores of every part of each prompt, by every method.

        Raises:
            OptionError: the model has no tokenizer.
        """
        if dp.tokenizer is None:
            raise OptionError("the prompts of citations are texts, but the model has no tokenizer; give one")
        for item in items:
            try:
                yield _measured(dp, item, options.keep_wrong)
            except DePassError as error:
                yield failed(item, error)

    def report(self, rows: Sequence[Row], options: CitationsOptions, folder: Path) -> str:
        """One table for each level."""
        text = [_explained(rows)]
        for level, title in LEVELS.items():
            of_level = [row["levels"][level] for row in rows if level in row["levels"]]
            if of_level:
                text += [f"## {title}", _table(of_level, options.seed)]
        return "\n\n".join(text) if rows else "No prompt was measured."


# Measuring.


@dataclass(frozen=True)
class Asked:
    """A question as the model reads it.

    Attributes:
        ids: ids of the prompt.
        answer: ids of the answer.
        levels: for each level the token ranges of its parts.
        right: whether the model's greedy answer is the right one.
        moved: whether the model gives the other value where the deciding part has it.
    """

    ids: list[int]
    answer: list[int]
    levels: dict[str, list[Range]]
    right: bool
    moved: bool


def asked(dp: DePass, question: Question) -> Asked:
    """Let the model answer a question and its changed copy.

    Raises:
        PromptError: the model cannot read the prompt.
        TargetError: the answer is not in the vocabulary, or merges with the prompt's end.
        SourceError: a part has no token.
    """
    encoded = encode(question.prompt, dp.tokenizer, dp.bound)
    texts = ((question.prompt, question.answer), (question.changed, question.other))
    pairs = [data.pair(dp, Item("", {"prompt": prompt, "target": target})) for prompt, target in texts]
    right, moved = greedy(dp, [pair.ids for pair in pairs], [pair.answer for pair in pairs])
    shift = max(0, (encoded.text or "").find(question.prompt))  # a text made of ids begins with the special tokens
    ranges = {
        level: token_ranges(encoded, Spans([(b + shift, e + shift) for b, e in parts.ranges], unit="char"))
        for level, parts in question.levels.items()
    }
    return Asked(list(encoded.ids), list(pairs[0].answer), ranges, right, moved)


def _measured(dp: DePass, item: Item, keep_wrong: bool) -> Row:
    """The row of one prompt; a later question that the model does not answer right has no levels in it."""
    row: Row = {"id": item.id, "status": "ok", "kind": item.data["kind"], "levels": {}, "conservation_error": 0.0}
    for number, question in enumerate(item.data["questions"]):
        this = asked(dp, question)
        if number == 0:
            row |= {"tokens": len(this.ids), "answer_tokens": len(this.answer), "right": this.right and this.moved}
        if not keep_wrong and not (this.right and this.moved):
            if number == 0:
                return skipped(item, f"{item.data['kind']}: {UNMOVED if this.right else WRONG}")
            continue
        by_level, error = scores(dp, this)
        row["conservation_error"] = max(row["conservation_error"], error)
        for level, by_method in by_level.items():
            row["levels"][level] = {"truth": question.levels[level].truth, "scores": by_method}
    return row


def scores(dp: DePass, question: Asked) -> tuple[dict[str, dict[str, list[float]]], float]:
    """For each level and method the scores of its parts, and the largest conservation error of the rules.

    A part's score is the sum over the answer's tokens and the part's tokens. Leave-one-out has the answer's mean
    log-probability, less that without the part.

    Raises:
        DePassError: a method cannot score the prompt, or a score is not finite.
    """
    read = [*question.ids, *question.answer[:-1]]
    targets = [Token(token, len(question.ids) - 1 + i) for i, token in enumerate(question.answer)]
    of_tokens, error = _by_rules(dp, read, targets, next(iter(question.levels.values())))
    for name in ATTENTION:
        (result,) = baselines.tokens(dp, name, [read], [targets])
        of_tokens[name] = result.scores.sum(0)
    by_level, left_out = {}, _left_out(dp, question)
    for level, ranges in question.levels.items():
        by_method = {name: [float(of[begin:end].sum()) for begin, end in ranges] for name, of in of_tokens.items()}
        by_method[LEFT_OUT] = [left_out[part] for part in ranges]
        if not all(math.isfinite(score) for of in by_method.values() for score in of):
            raise NonFiniteError("a score is not finite")
        by_level[level] = {name: [float(f"{score:.6g}") for score in by_method[name]] for name in METHODS}
    return by_level, error


def _by_rules(
    dp: DePass, read: list[int], targets: list[Token], ranges: list[Range]
) -> tuple[dict[str, Tensor], float]:
    """``[N]`` for each of :data:`RULES`: the score of each range, at its first token; and the largest conservation error.

    A mixture is the mean of rules that are scored once.
    """
    single: dict[str, Tensor] = {}
    error = 0.0
    for name in RULES:
        for part in rules.read(name).parts:
            if part.rule not in single:
                result = dp.attribute(read, targets, sources=Spans(ranges), rule=part.rule)
                single[part.rule] = torch.zeros(len(read))
                for source, score in zip(result.sources, result.scores.sum(0), strict=True):
                    if source.kind == "span":
                        single[part.rule][source.start] = score
                error = max(error, float(result.conservation_error.max()))
    return {name: sum((part.share * single[part.rule] for part in rules.read(name).parts), torch.zeros(len(read)))
            for name in RULES}, error  # fmt: skip


def _left_out(dp: DePass, question: Asked) -> dict[Range, float]:
    """The fall of the answer's mean log-probability without each part of any level."""
    ids, ranges = question.ids, sorted({part for parts in question.levels.values() for part in parts})
    prompts = [ids, *(ids[:begin] + ids[end:] for begin, end in ranges)]
    whole, *without = continuations(dp, prompts, [question.answer] * len(prompts))[0].tolist()
    return {part: whole - left for part, left in zip(ranges, without, strict=True)}


# Reporting.


def recall(scores: Sequence[float], truth: int) -> float:
    """The chance that a random one of the parts with the highest score is the right one: 0 or 1 without a tie."""
    best = max(scores)
    return 1 / scores.count(best) if scores[truth] == best else 0.0


def _explained(rows: Sequence[Row]) -> str:
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    of_kinds = "; ".join(prompts_in_words([row["tokens"] for row in of], kind) for kind, of in by_kind.items() if of)
    wrong = sum(not row["right"] for row in rows)
    return (
        f"{of_kinds}. {sum(row['answer_tokens'] > 1 for row in rows)} answers have several tokens; all are scored. {wrong} "
        "prompts are included although the model answers them wrong, or gives another answer than the deciding part says "
        "when that is changed.\n\n"
        "*Recall@1* is the share of prompts whose deciding part has the highest score of all parts: the mean over prompts "
        "with its 95 % bootstrap interval. Of parts that share the highest score each counts its chance. *Minus* columns "
        "are differences of recall prompt by prompt: an interval without zero is a difference that these prompts show. "
        f"`random` is the expected value. `{LEFT_OUT}` deletes the part and measures the fall of the answer's "
        "log-probability; attention is from the positions that predict the answer. The largest conservation error of the "
        f"rules is {max((row['conservation_error'] for row in rows), default=0.0):.0e}."
    )


def _table(rows: Sequence[Mapping[str, Any]], seed: int) -> str:
    """The table of one level, from each prompt's ``truth`` and ``scores``."""
    hits = {name: [recall(row["scores"][name], row["truth"]) for row in rows] for name in METHODS}
    hits["random"] = [1 / len(row["scores"][METHODS[0]]) for row in rows]
    lines = [
        [
            f"`{name}`",
            str(mean(own, seed)),
            *(
                "" if name == other else str(mean([a - b for a, b in zip(own, hits[other], strict=True)], seed))
                for other in ATTENTION
            ),
        ]
        for name, own in hits.items()
    ]
    return f"{len(rows)} prompts.\n\n" + table(["method", "recall@1", *(f"minus {name}" for name in ATTENTION)], lines)
