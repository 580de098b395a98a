"""The result of ``cite``: for every sentence of an answer, the sentences of the documents, ranked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from ..errors import SourceError, TargetError
from ..views.page import View, citations_view
from .attribution import Attribution
from .common import Result, judged, table
from .generation import Generation

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Document:
    """A document of :class:`Citations`.

    Attributes:
        title: its title.
        sources: for each of its sentences, in order, the index of the source. The source's label is the sentence's text.
    """

    title: str
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Citation:
    """What a sentence of a document contributed to a sentence of the answer.

    Attributes:
        document: the number of the document, from 0.
        title: its title.
        sentence: the number of the sentence in its document, from 0.
        text: the sentence.
        score: its score, in logits: positive where it raises the claim's logit.
        share: its score divided by the sum of the absolute scores of all sentences of the documents, so from -1 to 1.
    """

    document: int
    title: str
    sentence: int
    text: str
    score: float
    share: float


@dataclass(frozen=True)
class Claim:
    """A sentence of the answer. The scores of its ``sources`` and of the ``others`` add up to its ``logit``.

    Attributes:
        text: the sentence.
        logit: the sum of its tokens' logits, or of what ``of=`` names instead.
        probability: the product of its tokens' probabilities.
        sources: all sentences of the documents, those with the largest absolute scores first.
        others: what else has a score: ``rest`` is the question and the instruction around the documents, ``answer`` the
            tokens of the answer before each token; ``bias``, ``pattern`` and ``unassigned`` as in :class:`Source`.
    """

    text: str
    logit: float
    probability: float
    sources: tuple[Citation, ...]
    others: dict[str, float]


@dataclass(frozen=True, eq=False)
class Citations(Result):
    """An answer to a question about documents, and what each of their sentences contributed to each of its sentences.

    Attributes:
        generation: the answer, and the attribution of each of its sentences to the documents' sentences.
        documents: the documents, in the order of the prompt.
        question: the question.
        language: the language of the sentences.
    """

    generation: Generation
    documents: tuple[Document, ...]
    question: str
    language: str

    FORMAT = "depass-citations-1"
    TENSORS = Generation.TENSORS
    TOP = 5

    def __repr__(self) -> str:
        of = self.generation.attribution
        return (
            f"Citations({len(self.claims)} claims x {len(self._cited)} sentences of {len(self.documents)} documents, "
            f"{of.settings.model}, {judged(of.settings, of.conservation_error)})"
        )

    @property
    def text(self) -> str:
        """The answer as text, special tokens included."""
        return self.generation.text

    @cached_property
    def attribution(self) -> Attribution:
        """The attribution of the claims: one target per sentence of the answer, the sum over its tokens.

        A special token, such as the one that ends a message, is no sentence.
        """
        return self.generation._sums(self._ranges)

    @cached_property
    def claims(self) -> tuple[Claim, ...]:
        """The sentences of the answer, each with its sources."""
        of = self.attribution
        rows = zip(of.targets, of.target_logits.tolist(), of.scores.tolist(), strict=True)
        return tuple(
            Claim(target.label.strip(), logit, target.probability or 0.0, self._ranked(scores), self._others(scores))
            for target, logit, scores in rows
        )

    def top(self, k: int = TOP, claim: int = 0) -> list[Citation]:
        """The ``k`` sentences of the documents with the largest absolute scores for a claim.

        Raises:
            SourceError: ``k`` is less than 1.
            TargetError: there is no such claim.
        """
        if k < 1:
            raise SourceError(f"top({k}): k must be at least 1")
        if not -len(self.claims) <= claim < len(self.claims):
            raise TargetError(f"claim {claim} is out of range: the answer has {len(self.claims)} sentences")
        return list(self.claims[claim].sources[:k])

    def by_document(self) -> Tensor:
        """``[claims, documents]`` fp32, the sum of the scores of each document's sentences."""
        scores = self.attribution.scores
        return torch.stack([scores[:, list(document.sources)].sum(1) for document in self.documents], 1)

    def show(self, file: TextIO | None = None, width: int | None = None) -> None:
        """Print each sentence of the answer and the sentences of the documents with the largest scores."""
        from ..views.terminal import show_citations

        show_citations(self.claims, self.attribution, file, width)

    def page_view(self) -> View:
        """See :meth:`Result.page_view`: the answer beside the documents."""
        ends = [(document.title, document.sources) for document in self.documents]
        return citations_view(self.attribution, self.generation.tokens, self._ranges, ends, self.question)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the attribution of the answer's sentences, by name."""
        return self.generation.tensors()

    def to_dict(self) -> dict[str, Any]:
        """The result as a dict of plain values, as ``depass cite --json`` prints it.

        The sources of a claim have the numbers of document and sentence; the texts are the labels of ``sources``.
        """
        return {
            **self.generation.to_dict(),
            "format": self.FORMAT,
            "question": self.question,
            "language": self.language,
            "documents": [asdict(document) for document in self.documents],
            "claims": [_plain(claim) for claim in self.claims],
        }

    def records(self) -> Iterator[dict[str, Any]]:
        """One table row per claim and sentence of the documents, and per claim and other source; see :class:`Claim`."""
        for number, claim in enumerate(self.claims):
            for source in claim.sources:
                yield {"claim": number, "claim_text": claim.text, "kind": "document", **asdict(source)}
            for kind, score in claim.others.items():
                yield {"claim": number, "claim_text": claim.text, "kind": kind, "score": score}

    def to_dataframe(self) -> pandas.DataFrame:
        """A pandas DataFrame with the rows of :meth:`records`; the scores of a claim add up to its logit.

        Raises:
            DePassError: pandas is not installed.
        """
        return table(self.records(), ("document", "sentence"))

    @classmethod
    def from_saved(cls, tensors: dict[str, Any], said: dict[str, Any]) -> Citations:
        """See :meth:`Result.from_saved`."""
        made = Generation.from_saved(tensors, said)
        documents = tuple(Document(each["title"], tuple(each["sources"])) for each in said["documents"])
        sources = made.attribution.sources
        for document in documents:
            if any(not 0 <= index < len(sources) or sources[index].start is None for index in document.sources):
                raise ValueError(f"its document {document.title!r} has a sentence that is no source")
        return cls(made, documents, said["question"], said["language"])

    @cached_property
    def _ranges(self) -> list[tuple[int, int]]:
        """The tokens of each sentence of the answer. A special token counts only where there is nothing else."""
        answer = self.generation.answer
        every = answer.segments("sentence", self.language)
        return [each for each in every if each[0] not in answer.special] or every

    @property
    def _cited(self) -> list[tuple[int, int, int]]:
        """For each sentence of the documents: its document, its number there, and the index of its source."""
        every = enumerate(self.documents)
        return [(number, at, index) for number, each in every for at, index in enumerate(each.sources)]

    def _ranked(self, scores: list[float]) -> tuple[Citation, ...]:
        total = sum(abs(scores[index]) for _, _, index in self._cited) or 1.0
        sources = self.attribution.sources
        cited = [
            Citation(
                number, self.documents[number].title, at, sources[index].label, scores[index], scores[index] / total
            )
            for number, at, index in self._cited
        ]
        return tuple(sorted(cited, key=lambda each: -abs(each.score)))

    def _others(self, scores: list[float]) -> dict[str, float]:
        cited, sums = {index for _, _, index in self._cited}, {"rest": 0.0, "answer": 0.0}
        for index, source in enumerate(self.attribution.sources):
            if index not in cited:
                kind = "answer" if self.generation._is_of_answer(source) else source.kind
                kind = "rest" if kind == "span" else kind  # the first token, where it is excluded from the MLPs
                sums[kind] = sums.get(kind, 0.0) + scores[index]
        return sums


def _plain(claim: Claim) -> dict[str, Any]:
    names = ("document", "sentence", "score", "share")
    return {**asdict(claim), "sources": [{name: getattr(each, name) for name in names} for each in claim.sources]}
