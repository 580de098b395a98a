"""Prompts of a chosen length in which one or two places decide the answer.

Three kinds, with invented names:

- ``fact``: one sentence among filler says who is the keeper of a place, and a question asks for it. Another sentence says
  it of another place.
- ``facts``: two sentences in different places say one half of the answer each.
- ``agreement``: long-range agreement, after LongRA (Vafa et al. 2021, arXiv 2109.06387): the last word is the capital or the
  language of a country that is named once, long before.

Every prompt has changed copies: in each, one needle has another word, and nothing else differs. If the model then gives the
other answer, this needle decides.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .planted import Range

RIVALS = 1  # sentences of a fact of the asked kind about another place


class Copy(NamedTuple):
    """A prompt and the right answer to it, with the space before it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Haystack:
    """A prompt that ends where its answer begins.

    Attributes:
        whole: the prompt with its answer.
        needles: the characters of each needle: a sentence, or for agreement a word.
        sentences: the characters of each sentence, the question included. What follows the last one leads to the answer.
        changed: for each needle the copy in which it says something else.
    """

    whole: Copy
    needles: tuple[Range, ...]
    sentences: tuple[Range, ...]
    changed: tuple[Copy, ...]


class Plan(NamedTuple):
    """What a prompt says besides filler.

    Attributes:
        needles: each needle's sentence, the part of it that is the needle, the word that a changed copy replaces, and the
            other word.
        rivals: sentences of the asked kind about another place.
        question: the last sentence before the lead, or an empty text.
        lead: the text that the answer follows.
        answer: the answer.
        last: the needles' last place, as a share of the filler.
    """

    needles: tuple[tuple[str, str, str, str], ...]
    rivals: tuple[str, ...]
    question: str
    lead: str
    answer: str
    last: float = 1.0


# Invented names.

BEGINNINGS = (
    "Tol",
    "Var",
    "Mes",
    "Dor",
    "Kel",
    "Bran",
    "Sil",
    "Quor",
    "Hal",
    "Nim",
    "Ost",
    "Pel",
    "Rav",
    "Zan",
    "Wend",
)
MIDDLES = ("a", "e", "i", "o", "u", "or", "an", "el", "is")
ENDINGS = ("vek", "dan", "mir", "thas", "lon", "rik", "bel", "nos", "gar", "tine", "wick", "ford", "met")
PLACES = ("the old castle", "the red tower", "the north harbour", "the grand hotel", "the little museum", "the iron bridge",
          "the royal theatre", "the stone chapel", "the winter palace", "the city library")  # fmt: skip
ROLES = ("keeper", "founder", "captain", "judge", "teacher", "owner", "painter", "doctor")


def _names(chance: random.Random, count: int) -> list[str]:
    """Different invented words; no two of them begin alike."""
    beginnings = chance.sample(BEGINNINGS, count)
    return [begin + chance.choice(MIDDLES) + chance.choice(ENDINGS) for begin in beginnings]


def fact(chance: random.Random) -> Plan:
    """One needle; the answer is a person's invented name."""
    role, places, people = chance.choice(ROLES), chance.sample(PLACES, RIVALS + 1), _names(chance, RIVALS + 2)
    said = [f"The {role} of {place} is called {person}." for place, person in zip(places, people, strict=False)]
    needle = (said[0], said[0], people[0], people[-1])
    question = f"Question: Who is the {role} of {places[0]}?"
    return Plan((needle,), tuple(said[1:]), question, f"Answer: The {role} of {places[0]} is called", f" {people[0]}")


def facts(chance: random.Random) -> Plan:
    """Two needles; each holds one half of the answer."""
    role, place, people = chance.choice(ROLES), chance.choice(PLACES), _names(chance, 4)
    forms = [f"{which} {role} of {{}} is called {{}}." for which in ("One", "The other")]
    said = [form.format(place, person) for form, person in zip(forms, people, strict=False)]
    needles = tuple((own, own, person, other) for own, person, other in zip(said, people, people[2:], strict=False))
    question = f"Question: Who are the two {role}s of {place}?"
    lead = f"Answer: The two {role}s of {place} are called"
    return Plan(needles, (), question, lead, f" {people[0]} and {people[1]}")


COUNTRIES = {  # capital, language
    "France": ("Paris", "French"), "Italy": ("Rome", "Italian"), "Spain": ("Madrid", "Spanish"),
    "Germany": ("Berlin", "German"), "Japan": ("Tokyo", "Japanese"), "Russia": ("Moscow", "Russian"),
    "Portugal": ("Lisbon", "Portuguese"), "Greece": ("Athens", "Greek"), "Poland": ("Warsaw", "Polish"),
    "Hungary": ("Budapest", "Hungarian"), "Norway": ("Oslo", "Norwegian"), "Sweden": ("Stockholm", "Swedish"),
    "China": ("Beijing", "Chinese"), "Denmark": ("Copenhagen", "Danish"),
}  # fmt: skip
JOURNEYS = (
    "When our flight landed in {}, we slept for a long time.",
    "That summer my family went on a long journey to {}.",
    "My sister and I took the night train to {}.",
)
ENDS = (
    "We stayed in the capital, a city called",
    "We stayed with a family there, and they taught us to speak",
)


def agreement(chance: random.Random) -> Plan:
    """One needle, the name of a country; the answer is its capital or its language."""
    own, other = chance.sample(list(COUNTRIES), 2)
    which, sentence = chance.randrange(2), chance.choice(JOURNEYS).format(own)
    return Plan(((sentence, own, own, other),), (), "", ENDS[which], f" {COUNTRIES[own][which]}", 0.5)


# Filler.

ADJECTIVES = ("old", "young", "quiet", "busy", "tall", "tired", "cheerful", "careful", "slow", "clever", "proud", "shy")
PEOPLE = (
    "farmer",
    "baker",
    "sailor",
    "gardener",
    "carpenter",
    "tailor",
    "miller",
    "hunter",
    "clerk",
    "singer",
    "shepherd",
)
ACTS = ("walked", "waited", "worked", "sat", "slept", "read", "sang", "stood", "talked", "ate", "rested", "played")
SPOTS = ("near the river", "in the garden", "under the bridge", "at the market", "behind the church", "by the window",
         "on the hill", "in the barn", "at the mill", "along the road", "in the square", "beside the well")  # fmt: skip
TIMES = ("in the morning", "after lunch", "until noon", "for an hour", "all day", "before dinner", "in the rain",
         "on a cold day", "at dawn", "in the evening")  # fmt: skip


def filler(chance: random.Random) -> Iterator[str]:
    """Sentences without names, for ever."""
    while True:
        words = (chance.choice(words) for words in (ADJECTIVES, PEOPLE, ACTS, SPOTS, TIMES))
        yield "The {} {} {} {} {}.".format(*words)


KINDS: dict[str, Callable[[random.Random], Plan]] = {"fact": fact, "facts": facts, "agreement": agreement}


def haystack(kind: str, index: int, seed: int, tokens: int, count: Callable[[str], int]) -> Haystack:
    """Prompt number ``index`` of a kind. Its needles do not depend on its length.

    Args:
        kind: one of :data:`KINDS`.
        index: the prompt's number.
        seed: seed of the random numbers.
        tokens: the length. Filler is added while the prompt is not longer than this.
        count: the number of tokens of a text.
    """
    chance = random.Random(f"{seed} {kind} {index}")
    plan = KINDS[kind](chance)
    special = [(chance.random() * plan.last, sentence) for sentence, *_ in plan.needles]
    special += [(chance.random(), rival) for rival in plan.rivals]
    tail = f"\n\n{plan.question}\n{plan.lead}" if plan.question else f" {plan.lead}"
    left = tokens - count(tail) - sum(count(f" {sentence}") for _, sentence in special)
    sentences = []
    for sentence in filler(random.Random(f"{seed} {kind} {index} filler")):
        left -= count(f" {sentence}")
        if left < 0:
            break
        sentences.append(sentence)
    for place, sentence in sorted(special, reverse=True):
        sentences.insert(int(place * (len(sentences) + 1)), sentence)
    return _haystack(plan, sentences, tail)


def _haystack(plan: Plan, sentences: Sequence[str], tail: str) -> Haystack:
    ranges, begin = list[Range](), 0
    for sentence in sentences:
        ranges.append((begin, begin + len(sentence)))
        begin += len(sentence) + 1
    text = " ".join(sentences) + tail
    if plan.question:
        at = text.rindex(plan.question)
        ranges.append((at, at + len(plan.question)))
    needles, changed = [], []
    for sentence, part, word, other in plan.needles:
        begin, end = ranges[sentences.index(sentence)]
        at = begin + sentence.index(part)
        needles.append((at, at + len(part)))
        says = text[:begin] + text[begin:end].replace(word, other) + text[end:]
        changed.append(Copy(says, _answer(plan, word, other)))
    return Haystack(Copy(text, plan.answer), tuple(needles), tuple(ranges), tuple(changed))


def _answer(plan: Plan, word: str, other: str) -> str:
    """The answer where a needle has the other word."""
    if word not in COUNTRIES:
        return plan.answer.replace(word, other)
    which = COUNTRIES[word].index(plan.answer.strip())
    return f" {COUNTRIES[other][which]}"
