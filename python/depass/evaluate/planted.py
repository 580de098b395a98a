"""Prompts whose truth is planted: the generator knows which part of the prompt decides the answer.

Two kinds, with invented people, objects and places:

- ``documents``: short documents of mixed facts, and a question about one of them. Every other document has a fact of the
  same kind, about another subject and with another value.
- ``chains``: premises in two steps (who has which box, and what each box holds), a reasoning that joins them for every
  person in turn, and a question about one person.

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
PEOPLE = 4  # people, boxes and steps of a chain


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
        sentences: forms of the sentence, with ``{subject}`` and ``{value}``.
        question: asks for the value of ``{subject}``.
        lead: begins the answer.
        subjects: two lists of words; a subject is a pair of them, so that subjects share words.
        values: the values.
    """

    sentences: tuple[str, ...]
    question: str
    lead: str
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
        "The {subject} is in the",
        (("brass", "silver", "wooden", "old", "small"), ("key", "lamp", "clock", "vase", "mirror", "drum")),
        ("kitchen", "attic", "cellar", "garage", "library", "bedroom", "garden", "office", "stable", "hallway"),
    ),
    "job": Domain(
        (
            "{subject} works as a {value}.",
            "{subject} has been a {value} for years.",
            "{subject} wanted to become a {value} and did.",
        ),
        "What is the job of {subject}?",
        "{subject} is a",
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
        "{subject} lives in",
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
        "The {subject} meets on",
        (("village", "school", "young", "senior"), ("choir", "band", "chess club", "book club", "drama group")),
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ),
}


@dataclass(frozen=True)
class Story:
    """Chains of one kind; its forms have ``{who}``, ``{what}`` and ``{value}``, whose words are in the three lists.

    Attributes:
        link: the first premise, without a value.
        holds: the second premise, without a person.
        step: the step of the reasoning that joins the two.
        question: asks for a person's value.
        lead: begins the answer.
    """

    link: str
    holds: str
    step: str
    question: str
    lead: str
    whats: tuple[str, ...]
    values: tuple[str, ...]


STORIES = {
    "box": Story(
        "{who} has the {what} box.",
        "The {what} box holds a {value}.",
        "{who} has the {what} box, and the {what} box holds a {value}.",
        "What does {who} have?",
        "{who} has a",
        COLOURS,
        ("coin", "ring", "map", "stone", "pen", "watch", "shell", "candle"),
    ),
    "train": Story(
        "{who} takes the {what} train.",
        "The {what} train goes to {value}.",
        "{who} takes the {what} train, and the {what} train goes to {value}.",
        "Where does {who} go?",
        "{who} goes to",
        ("early", "late", "fast", "slow", "noon", "night"),
        ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Dublin"),
    ),
    "house": Story(
        "{who} lives in the {what} house.",
        "The {what} house belongs to the {value}.",
        "{who} lives in the {what} house, and the {what} house belongs to the {value}.",
        "Who owns the house of {who}?",
        "The house of {who} belongs to the",
        COLOURS,
        ("baker", "teacher", "doctor", "farmer", "lawyer", "painter", "judge"),
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
    values = chance.sample(domain.values, DOCUMENTS + 1)
    subjects = chance.sample(_subjects(domain), DOCUMENTS)
    fillers = _fillers(domain, subjects, chance)
    text, ranges, whole = _Text("Here are some notes."), list[Range](), list[Range]()
    where, truth = chance.randrange(DOCUMENTS), 0
    for index in range(DOCUMENTS):
        count = chance.choice(SENTENCES)
        facts = [next(fillers) for _ in range(count - 1)]
        at = chance.randrange(count)
        facts.insert(at, _said(domain, subjects[index], values[index], chance))
        truth = len(ranges) + at if index == where else truth
        own = [text.add(fact, " " if number else "\n\n") for number, fact in enumerate(facts)]
        ranges += own
        whole.append((own[0][0], own[-1][1]))
    text.add(f"Question: {domain.question.format(subject=subjects[where])}", "\n\n")
    text.add(f"Answer: {domain.lead.format(subject=subjects[where])}", "\n")
    levels = {"sentence": Parts(tuple(ranges), truth), "document": Parts(tuple(whole), where)}
    return [_question(text.text, levels, values[where], values[-1])]


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
    story = STORIES[chance.choice(list(STORIES))]
    people, whats = chance.sample(FIRST, PEOPLE), chance.sample(story.whats, PEOPLE)
    values = chance.sample(story.values, PEOPLE + 1)
    facts = [
        {"who": who, "what": what, "value": value} for who, what, value in zip(people, whats, values[:-1], strict=True)
    ]
    text, where = _Text("Here is a puzzle."), chance.randrange(PEOPLE)
    links = [text.add(story.link.format(**fact)) for fact in chance.sample(facts, PEOPLE)]
    order = chance.sample(range(PEOPLE), PEOPLE)
    holds = [text.add(story.holds.format(**facts[i])) for i in order]
    premises = Parts((*links, *holds), len(links) + order.index(where))
    text.add(f"Question: {story.question.format(**facts[where])}", "\n\n")
    text.add("Reasoning:", "\n")
    order = chance.sample(range(PEOPLE), PEOPLE)
    steps = Parts(tuple(text.add(story.step.format(**facts[i])) for i in order), order.index(where))
    text.add(f"Answer: {story.lead.format(**facts[where])}", "\n")
    statements = Parts((*premises.ranges, *steps.ranges), len(premises.ranges) + steps.truth)
    answer = _question(text.text, {"statement": statements, "step": steps}, values[where], values[-1])
    begin, end = steps.ranges[steps.truth]
    cut = begin + text.text[begin:end].rindex(f" {values[where]}")
    return [answer, _question(text.text[:cut], {"premise": premises}, values[where], values[-1])]


def _question(prompt: str, levels: dict[str, Parts], value: str, other: str) -> Question:
    finest = next(iter(levels.values()))
    begin, end = finest.ranges[finest.truth]
    assert prompt[begin:end].count(value) == 1
    changed = prompt[:begin] + prompt[begin:end].replace(value, other) + prompt[end:]
    return Question(prompt, f" {value}", levels, changed, f" {other}")


KINDS: dict[str, Callable[[random.Random], list[Question]]] = {"documents": documents, "chains": chains}


def questions(kind: str, index: int, seed: int) -> list[Question]:
    """The questions of prompt number ``index`` of a kind; each prompt has random numbers of its own."""
    return KINDS[kind](random.Random(f"{seed} {kind} {index}"))
