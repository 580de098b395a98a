"""Evaluation data: prompts with the answer that should follow, from files or from two built-in sets.

A file is a JSON list, or has a JSON object on each line. The name of the answer's key tells whether a space precedes it:

| keys | as in | the answer |
|---|---|---|
| ``prompt``, ``attribute`` | Known_1000 | a word: a space is put before it |
| ``prompt``, ``target_token`` | IOI | a word: a space is put before it |
| ``prompt``, ``answer`` | CounterFact | a word: a space is put before it |
| ``prompt``, ``target`` | your own data | taken unchanged: write the space; without a tokenizer, a list of ids and an id |

The prompt and its answer are encoded together, and the tokens after the prompt's own are the answer's. This gives what the
model would read, both for tokenizers that put a space before every word (Llama 2) and for those that do not (GPT-2).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..api import DePass
from ..errors import DataError, TargetError
from ..inputs.prompt import encode
from ..inputs.targets import token_id
from .task import Item

WORDS = ("attribute", "target_token", "answer")  # keys of answers that need a space before them
BUILT_IN = ("facts", "ioi")
IOI_COUNT = 200
HELP = "a data file, or a built-in set: facts, ioi"


def prompts(source: str, seed: int, limit: int | None) -> list[Item]:
    """Items with a ``prompt`` and the ``target`` that follows it, from a built-in set (:data:`BUILT_IN`) or a file.

    A row without these two becomes an item marked as broken.

    Raises:
        DataError: the file cannot be read, or is not a list of rows.
    """
    if source == "facts":
        return [Item(str(i), {"prompt": prompt, "target": f" {answer}"}) for i, (prompt, answer) in enumerate(FACTS)]
    if source == "ioi":
        rows = ioi(IOI_COUNT if limit is None else limit, seed)
        return [Item(str(i), row) for i, row in enumerate(rows)]
    return [_prompt(item) for item in read(source)]


def _prompt(item: Item) -> Item:
    if item.broken is not None:
        return item
    key = next((key for key in ("target", *WORDS) if key in item.data), None)
    if "prompt" not in item.data or key is None:
        return Item(item.id, broken="the row has no prompt with a target")
    prompt, target = item.data["prompt"], item.data[key]
    text = isinstance(prompt, str) and isinstance(target, str) and prompt != "" and target.strip() != ""
    if text and key in WORDS:
        target = f" {target.strip()}"
    ids = isinstance(prompt, list) and all(type(token) is int for token in [*prompt, target]) and prompt
    if not text and not ids:
        return Item(item.id, broken="the prompt and the target are neither texts nor ids")
    given = item.data.get("giver")  # of the task circuits
    giver = {"giver": given} if type(given) is (str if text else int) else {}
    return Item(item.id, {"prompt": prompt, "target": target, **giver})


def read(path: str) -> list[Item]:
    """The rows of a JSON list, or of a file with a JSON object on each line; an item's id is its number among the rows.

    A row that is not an object becomes an item marked as broken.

    Raises:
        DataError: the file cannot be read, or is not a list.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # with or without the mark that some editors put first
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"cannot read the data set {path!r}: {reason}; give a file, or one of {', '.join(BUILT_IN)}"
        ) from error
    if text.lstrip().startswith("[") and not path.endswith(".jsonl"):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path} is not a valid JSON list: {error}") from error
        return [_item(index, row) for index, row in enumerate(rows)]
    lines = [line for line in text.split("\n") if line.strip()]  # other marks of a new line may stand in a JSON text
    return [_line(index, line) for index, line in enumerate(lines)]


def _line(index: int, line: str) -> Item:
    try:
        row = json.loads(line)
    except ValueError:
        return Item(str(index), broken="the line is not valid JSON")
    return _item(index, row)


def _item(index: int, row: Any) -> Item:
    return Item(str(index), row) if isinstance(row, dict) else Item(str(index), broken="the row is not a JSON object")


@dataclass(frozen=True)
class Pair:
    """The tokens of a prompt and of its answer.

    Attributes:
        item: the item.
        ids: ``[N]`` ids of the prompt.
        answer: ids of the answer, at least one.
        begins_special: whether the prompt's first token is a special token (BOS).
    """

    item: Item
    ids: tuple[int, ...]
    answer: tuple[int, ...]
    begins_special: bool

    @property
    def deletable(self) -> range:
        """The positions that may be deleted: all but a special first token and the last token."""
        return range(int(self.begins_special), len(self.ids) - 1)


def pair(dp: DePass, item: Item) -> Pair:
    """The tokens of an item from :func:`prompts`.

    Raises:
        PromptError: the model cannot read the prompt.
        TargetError: the answer is not in the vocabulary, or the prompt's end and the answer's beginning form one token.
    """
    text, target = item.data["prompt"], item.data["target"]
    prompt = encode(text, dp.tokenizer, dp.bound)
    if isinstance(target, int):
        answer: tuple[int, ...] = (token_id(target, dp.tokenizer, dp.bound),)
    else:
        whole = encode(text + target, dp.tokenizer, dp.bound).ids
        answer = whole[len(prompt.ids) :]
        if whole[: len(prompt.ids)] != prompt.ids or not answer:
            raise TargetError(
                "the prompt's end and the answer's beginning form one token; divide prompt and answer at another place"
            )
    return Pair(item, prompt.ids, answer, 0 in prompt.special)


def short_prompt(dp: DePass) -> Pair:
    """A prompt of a few tokens, to try what works on a model; without a tokenizer its ids mean nothing.

    Raises:
        PromptError, TargetError: the model cannot read it.
    """
    (prompt, answer), *_ = FACTS
    row = {"prompt": [1, 2, 3], "target": 0} if dp.tokenizer is None else {"prompt": prompt, "target": f" {answer}"}
    return pair(dp, Item("short", row))


# Indirect object identification (IOI): one of two people gives something to the other.

NAMES = (
    "Alice", "Anna", "Brian", "Carol", "Daniel", "David", "Emma", "Frank", "George", "Helen", "Jack", "James", "Jane",
    "John", "Kate", "Laura", "Mark", "Martin", "Mary", "Paul", "Peter", "Robert", "Sarah", "Simon", "Susan", "Thomas",
)  # fmt: skip
PLACES = ("park", "library", "station", "garden", "kitchen", "museum", "harbor", "bakery", "school", "office")
THINGS = (
    "a book",
    "an apple",
    "a letter",
    "an umbrella",
    "a ticket",
    "a flower",
    "an orange",
    "a key",
    "a map",
    "a cup",
)
# {B} gives; the answer is the other name
TEMPLATES = (
    "{first} and {second} met at the {place}, and before they left {B} gave {thing} to",
    "While {first} and {second} were waiting near the {place}, {B} handed {thing} to",
    "When {first} and {second} came back from the {place}, {B} offered {thing} to",
    "Yesterday {first} and {second} worked at the {place}. In the evening {B} brought {thing} to",
    "After {first} and {second} had talked for a while in the {place}, {B} passed {thing} to",
)


def ioi(count: int, seed: int) -> list[dict[str, str]]:
    """``count`` sentences in which one of two people receives something: ``prompt``, ``target`` and ``giver``.

    The sentence names the giver twice and the answer once. Each is named first in half of the sentences.
    """
    chance, rows = random.Random(seed), []
    for index in range(count):
        answer, giver = chance.sample(NAMES, 2)
        first, second = (answer, giver) if index % 2 else (giver, answer)
        prompt = chance.choice(TEMPLATES).format(
            first=first, second=second, B=giver, place=chance.choice(PLACES), thing=chance.choice(THINGS)
        )
        rows.append({"prompt": prompt, "target": f" {answer}", "giver": giver})
    return rows


# Facts that most small language models know.

FACTS: Sequence[tuple[str, str]] = (
    ("The capital of France is the city of", "Paris"),
    ("The capital of Italy is the city of", "Rome"),
    ("The government of Spain sits in its capital,", "Madrid"),
    ("The capital of Germany is the city of", "Berlin"),
    ("The capital of Japan is the city of", "Tokyo"),
    ("The capital of Russia is", "Moscow"),
    ("The capital of England is the city of", "London"),
    ("The capital of Egypt is the city of", "Cairo"),
    ("The capital of China is the city of", "Beijing"),
    ("The capital of Austria is the city of", "Vienna"),
    ("The capital of Portugal is the city of", "Lisbon"),
    ("The capital of Cuba is the city of", "Havana"),
    ("The Eiffel Tower stands in the city of", "Paris"),
    ("The Colosseum stands in the city of", "Rome"),
    ("Big Ben is a famous clock tower in", "London"),
    ("The Kremlin is in the city of", "Moscow"),
    ("The Great Wall was built in the country of", "China"),
    ("The pyramids of Giza are in the country of", "Egypt"),
    ("The Taj Mahal is in the country of", "India"),
    ("Kyoto and Osaka are cities in the country of", "Japan"),
    ("Nigeria and Kenya are countries on the continent of", "Africa"),
    ("Poland and Hungary are countries on the continent of", "Europe"),
    ("China and Mongolia are countries on the continent of", "Asia"),
    ("Brazil and Peru are countries in South", "America"),
    ("Sydney and Melbourne are cities in", "Australia"),
    ("Toronto and Vancouver are cities in", "Canada"),
    ("Munich and Hamburg are cities in", "Germany"),
    ("Barcelona and Seville are cities in", "Spain"),
    ("In Lisbon and in Brazil people speak", "Portuguese"),
    ("The official language of Mexico is", "Spanish"),
    ("In Berlin and in Vienna people speak", "German"),
    ("In Paris and in Lyon people speak", "French"),
    ("A molecule of water has two atoms of hydrogen and one of", "oxygen"),
    ("Plants take in carbon dioxide and release", "oxygen"),
    ("The gas that people need to breathe is called", "oxygen"),
    ("The chemical symbol Fe stands for the metal", "iron"),
    ("Venus, Earth and", "Mars"),
    ("The largest planet in the Solar System is", "Jupiter"),
    ("The Earth moves around the", "Sun"),
    ("The first person to walk on the Moon was Neil", "Armstrong"),
    ("The theory of relativity was developed by Albert", "Einstein"),
    ("The theory of evolution was put forward by Charles", "Darwin"),
    ("Hamlet and Macbeth were written by William", "Shakespeare"),
    ("The first president of the United States was George", "Washington"),
    ("The president during the American Civil War was Abraham", "Lincoln"),
    ("The painter of the Mona Lisa was Leonardo da", "Vinci"),
    ("Sunday, Monday,", "Tuesday"),
    ("Thursday, Friday,", "Saturday"),
    ("April, May, June,", "July"),
    ("August, September, October,", "November"),
    ("The opposite of hot is", "cold"),
    ("The opposite of black is", "white"),
    ("One, two, three,", "four"),
    ("Bees collect nectar and make", "honey"),
    ("The flag of Japan is red and", "white"),
    ("New York lies on the coast of the Atlantic", "Ocean"),
    ("The company Microsoft was founded by Paul Allen and Bill", "Gates"),
    ("Apple was founded by Steve", "Jobs"),
    ("The iPhone and the Mac are made by", "Apple"),
    ("Windows and Excel are made by", "Microsoft"),
)
