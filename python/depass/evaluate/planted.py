"""Prompts whose truth is planted: the generator knows which part of the prompt decides the answer.

Two kinds, with invented people, objects and places:

- ``documents``: short documents of mixed facts, and a question about one of them. Some of the other documents have a fact
  of the same kind, about another subject and with another value.
- ``chains``: pairs of premises (who has which box, and what this box holds), a reasoning with a step for each pair, and a
  question that one step answers. Other steps are about the same person, or of the same kind.

Every question has a changed copy: the deciding part has another value there, and nothing else differs. If the model then
gives that value, this part decides its answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

Range = tuple[int, int]  # half-open

DOCUMENTS, SENTENCES = 6, (3, 4, 5)  # documents of a prompt, and sentences of a document
RIVALS = 3  # other documents with a fact of the asked kind
BESIDES = (
    2  # steps of a chain about the same person, of other kinds; one more is of the same kind, about another person
)


class Parts(NamedTuple):
    """Parts of a prompt of one kind: their characters, and the index of the one that decides the answer."""

    ranges: tuple[Range, ...]
    truth: int


@dataclass(frozen=True)
class Question:
    """A prompt that ends where its answer begins.

    Attributes:
        prompt: the prompt.
        answer: its right answer, with the space before it.
        levels: the prompt's parts, by level. The first level has the finest parts: those of the others join some of them.
        changed: the prompt with another value in the part that decides.
        other: the right answer to ``changed``.
    """

    prompt: str
    answer: str
    levels: dict[str, Parts]
    changed: str
    other: str


@dataclass(frozen=True)
class Domain:
    """Facts of one kind: sentences that give a subject a value, and a question about the value.

    Attributes:
        sentences: forms of the sentence, with ``{subject}`` and ``{value}``. What precedes the value begins the answer.
        question: asks for the value of ``{subject}``.
        subjects: two lists of words; a subject is a pair of them.
        values: the values.
    """

    sentences: tuple[str, ...]
    question: str
    subjects: tuple[tuple[str, ...], tuple[str, ...]]
    values: tuple[str, ...]


FIRST = ("Anna", "Tom", "Maria", "Peter", "Laura", "James", "Sarah", "David", "Emma", "Robert")
LAST = ("Miller", "Brown", "Carter", "Evans", "Hughes", "Parker")
COLOURS = ("red", "blue", "green", "yellow", "black", "white")

DOMAINS = {
    "object": Domain(
        (
            "The {subject} is kept in the {value}.",
            "Someone left the {subject} in the {value}.",
            "You can find the {subject} in the {value}.",
        ),
        "Where is the {subject}?",
        (("brass", "silver", "wooden", "old", "small", "green"), ("key", "lamp", "clock", "vase", "mirror", "drum")),
        ("kitchen", "attic", "cellar", "garage", "library", "bedroom", "garden", "office", "stable", "hallway"),
    ),
    "job": Domain(
        (
            "{subject} works as a {value}.",
            "{subject} has been a {value} for years.",
            "{subject} wanted to become a {value} and did.",
        ),
        "What is the job of {subject}?",
        (FIRST, LAST),
        ("baker", "teacher", "nurse", "lawyer", "farmer", "doctor", "painter", "sailor", "tailor", "pilot"),
    ),
    "town": Domain(
        (
            "{subject} lives in {value}.",
            "{subject} moved to {value} last year.",
            "{subject} has a house in {value}.",
        ),
        "Where does {subject} live?",
        (FIRST, LAST),
        ("Kingsford", "Oakham", "Riverton", "Stonebridge", "Fairhaven", "Ashdale", "Millfield", "Marlow", "Eastbrook"),
    ),
    "day": Domain(
        (
            "The {subject} meets on {value}.",
            "The {subject} comes together every {value}.",
            "The {subject} has its evening on {value}.",
        ),
        "When does the {subject} meet?",
        (
            ("village", "school", "summer", "senior", "church"),
            ("choir", "band", "chess club", "book club", "drama group"),
        ),
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ),
}


@dataclass(frozen=True)
class Story:
    """Chains of one kind. The forms have ``{who}``, a person, ``{what}`` and ``{value}``, of which there are lists.

    Attributes:
        link: the first premise, without a value.
        holds: the second premise, without a person.
        step: the step that joins the two, with ``so``. What lies between this and the last value begins the answer.
        question: asks for a person's value.
        whats: words for ``{what}``.
        values: the values.
    """

    link: str
    holds: str
    step: str
    question: str
    whats: tuple[str, ...]
    values: tuple[str, ...]


STORIES = {
    "train": Story(
        "{who} takes the {what} train.",
        "The {what} train goes to {value}.",
        "The {what} train goes to {value}, so {who} arrives in {value}.",
        "Where does {who} arrive?",
        ("morning", "evening", "night", "noon"),
        ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Dublin"),
    ),
    "box": Story(
        "{who} has the {what} box.",
        "The {what} box holds a {value}.",
        "The {what} box holds a {value}, so {who} owns a {value}.",
        "What does {who} own?",
        ("red", "blue", "green", "yellow", "black", "white"),
        ("coin", "ring", "map", "stone", "pen", "watch", "shell", "candle"),
    ),
    "team": Story(
        "{who} is in the {what} team.",
        "The {what} team is in the {value} league.",
        "The {what} team is in the {value} league, so {who} plays in the {value} league.",
        "Which league does {who} play in?",
        ("school", "village", "city", "army"),
        ("football", "tennis", "chess", "rugby", "hockey", "golf", "cricket"),
    ),
    "menu": Story(
        "{who} orders the {what} menu.",
        "The {what} menu comes with the {value}.",
        "The {what} menu comes with the {value}, so {who} eats the {value}.",
        "What does {who} eat?",
        ("small", "large", "cheap", "daily"),
        ("rice", "fish", "soup", "bread", "pasta", "cheese", "salad"),
    ),
}


class _Text:
    """A text that grows, and tells where each piece of it is."""

    def __init__(self, text: str) -> None:
        self.text = text

    def add(self, piece: str, between: str = " ") -> Range:
        begin = len(self.text) + len(between)
        self.text += between + piece
        return begin, len(self.text)


# Documents.


def documents(chance: random.Random) -> list[Question]:
    """One question about a fact in one of several documents. Its levels are ``sentence`` and ``document``."""
    domain = chance.choice(list(DOMAINS.values()))
    values = chance.sample(domain.values, RIVALS + 2)
    subjects = [
        " ".join(pair) for pair in zip(*(chance.sample(words, RIVALS + 1) for words in domain.subjects), strict=True)
    ]
    forms = [chance.choice(domain.sentences) for _ in subjects]
    facts = [form.format(subject=a, value=b) for form, a, b in zip(forms, subjects, values[:-1], strict=True)]
    fillers, rivals = _fillers(domain, subjects, chance), iter(facts[1:])
    places = chance.sample(range(DOCUMENTS), RIVALS + 1)  # the first has the truth
    text, ranges, whole, truth = _Text("Here are some notes."), list[Range](), list[Range](), 0
    for index in range(DOCUMENTS):
        sentences = [next(fillers) for _ in range(chance.choice(SENTENCES))]
        at = chance.randrange(len(sentences))
        if index == places[0]:
            sentences[at], truth = facts[0], len(ranges) + at
        elif index in places:
            sentences[at] = next(rivals)
        own = [text.add(sentence, " " if number else "\n\n") for number, sentence in enumerate(sentences)]
        ranges += own
        whole.append((own[0][0], own[-1][1]))
    text.add(f"Question: {domain.question.format(subject=subjects[0])}", "\n\n")
    text.add(f"Answer: {_lead(forms[0]).format(subject=subjects[0])}", "\n")
    levels = {"sentence": Parts(tuple(ranges), truth), "document": Parts(tuple(whole), places[0])}
    return [_question(text.text, levels, values[0], values[-1])]


def _lead(form: str) -> str:
    return form[: form.rindex(" {value}")]


def _subjects(domain: Domain) -> list[str]:
    return [" ".join(pair) for pair in product(*domain.subjects)]


def _said(domain: Domain, subject: str, value: str, chance: random.Random) -> str:
    return chance.choice(domain.sentences).format(subject=subject, value=value)


def _fillers(asked: Domain, subjects: Sequence[str], chance: random.Random) -> Iterator[str]:
    """Facts of the other domains, each about another subject."""
    others = [domain for domain in DOMAINS.values() if domain is not asked]
    used = set(subjects)
    while True:
        domain = chance.choice(others)
        subject = chance.choice([subject for subject in _subjects(domain) if subject not in used])
        used.add(subject)
        yield _said(domain, subject, chance.choice(domain.values), chance)


# Chains.


def chains(chance: random.Random) -> list[Question]:
    """Two questions. The answer to the first is in one step of the reasoning; its levels are ``statement``, the premises
    and the steps, and ``step``. The second asks for the value in this step, which one premise holds; its level is
    ``premise``.
    """
    story, *besides = chance.sample(list(STORIES.values()), 1 + BESIDES)
    people = [" ".join(pair) for pair in zip(chance.sample(FIRST, 2), chance.sample(LAST, 2), strict=True)]
    values = chance.sample(story.values, 3)
    facts = [
        (story, {"who": who, "what": what, "value": value})
        for who, what, value in zip(people, chance.sample(story.whats, 2), values, strict=False)
    ]
    for each in besides:
        words = {"who": people[0], "what": chance.choice(each.whats), "value": chance.choice(each.values)}
        facts.append((each, words))
    said = [[form.format(**words) for form in (each.link, each.holds, each.step)] for each, words in facts]
    text = _Text("Here is a puzzle.")
    premises = _shuffled(text, [sentence for of in said for sentence in of[:2]], 1, chance)  # the first fact's `holds`
    text.add(f"Question: {story.question.format(who=people[0])}", "\n\n")
    text.add("Reasoning:", "\n")
    steps = _shuffled(text, [of[2] for of in said], 0, chance)
    text.add(f"Answer: {_conclusion(story).format(who=people[0])}", "\n")
    statements = Parts((*premises.ranges, *steps.ranges), len(premises.ranges) + steps.truth)
    answer = _question(text.text, {"statement": statements, "step": steps}, values[0], values[-1])
    begin, end = steps.ranges[steps.truth]
    cut = begin + text.text[begin:end].index(f" {values[0]}")
    return [answer, _question(text.text[:cut], {"premise": premises}, values[0], values[-1])]


def _shuffled(text: _Text, sentences: Sequence[str], truth: int, chance: random.Random) -> Parts:
    """Add the sentences in random order; the one at ``truth`` is the part that decides."""
    order = chance.sample(range(len(sentences)), len(sentences))
    return Parts(tuple(text.add(sentences[i]) for i in order), order.index(truth))


def _conclusion(story: Story) -> str:
    """The end of a step, without its value: what follows ``so``."""
    return _lead(story.step).partition(", so ")[2]


def _question(prompt: str, levels: dict[str, Parts], value: str, other: str) -> Question:
    finest = next(iter(levels.values()))
    begin, end = finest.ranges[finest.truth]
    changed = prompt[:begin] + prompt[begin:end].replace(value, other) + prompt[end:]
    return Question(prompt, f" {value}", levels, changed, f" {other}")


KINDS: dict[str, Callable[[random.Random], list[Question]]] = {"documents": documents, "chains": chains}


def questions(kind: str, index: int, seed: int) -> list[Question]:
    """The questions of prompt number ``index`` of a kind; each prompt has random numbers of its own."""
    return KINDS[kind](random.Random(f"{seed} {kind} {index}"))
