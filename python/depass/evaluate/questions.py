"""What a model says of a prompt that was changed: without tokens, without embeddings, or without parts of embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..api import DePass
from .forward import next_tokens

FIXED = 2.0  # stands for a probability: the embedding is never changed


@dataclass(frozen=True)
class Question:
    """How likely is the answer after ``ids``? Equal questions are asked once.

    Attributes:
        ids: ``[N]`` the ids that the model reads.
        answer: the id whose probability is asked for.
        zeroed: positions whose embeddings are zero.
        kept: ``[N]`` for each token the probability that a dimension of its embedding is kept, or :data:`FIXED`; empty: no
            random change.
        draw: the number of the random draw. Equal draws have equal random numbers for all ``kept``.
        turned: keep the dimensions that would be dropped, and drop the others.
    """

    ids: tuple[int, ...]
    answer: int
    zeroed: tuple[int, ...] = ()
    kept: tuple[float, ...] = ()
    draw: int = 0
    turned: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the model reads the ids as they are."""
        return not self.zeroed and not self.kept

    def factors(self, width: int, seed: int) -> Tensor:
        """What the embeddings are multiplied by, ``[N, width]`` or ``[N, 1]``: zeros and ones."""
        if not self.kept:
            factors = torch.ones(len(self.ids), 1, device="cpu")
            factors[list(self.zeroed)] = 0
            return factors
        digest = hashlib.sha256(repr((seed, self.ids, self.draw)).encode()).digest()
        chance = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        kept = torch.tensor(self.kept, device="cpu")[:, None]
        are_kept = torch.rand(len(self.ids), width, generator=chance, device="cpu") < kept
        return (((kept == FIXED) | ~are_kept) if self.turned else are_kept).float()


class Asked:
    """Questions, each once."""

    def __init__(self) -> None:
        self.questions: dict[Question, int] = {}

    def add(self, question: Question) -> int:
        """The question's index."""
        return self.questions.setdefault(question, len(self.questions))

    def answered(self, dp: DePass, seed: int) -> list[float]:
        """The answers' probabilities by index, rounded to six digits, the precision of fp32."""
        questions = list(self.questions)
        found = [0.0] * len(questions)
        for plain in (True, False):
            some = [i for i, question in enumerate(questions) if question.is_plain == plain]
            if some:
                for i, probability in zip(some, _asked(dp, [questions[i] for i in some], plain, seed), strict=True):
                    found[i] = float(f"{probability:.6g}")
        return found


def _asked(dp: DePass, questions: Sequence[Question], plain: bool, seed: int) -> list[float]:
    width = dp.bound.hidden_size
    found, _ = next_tokens(
        dp,
        [question.ids for question in questions],
        [question.answer for question in questions],
        None if plain else lambda i: questions[i].factors(width, seed),
    )
    probabilities: list[float] = found.tolist()
    return probabilities
