"""The result of a generation: what a model generated, and what each of its tokens is owed to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..views.page import View, generation_view
from .attribution import Attribution
from .common import Result


@dataclass(frozen=True, eq=False)
class Generation(Result):
    """What a model generated, and what each of its tokens is owed to.

    Attributes:
        text: what was generated, special tokens included.
        tokens: each generated token's piece of it.
        ids: the generated tokens' ids.
        attribution: a target for each generated token, in order; its sources are the prompt's tokens or spans and the
            generated tokens but the last, which is the source of nothing. Logits are the model's own, before a
            temperature or any other change that sampling made to them.
    """

    text: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    attribution: Attribution

    FORMAT = "depass-generation-1"
    TENSORS = Attribution.TENSORS

    def __repr__(self) -> str:
        return f"Generation({self.text!r}, {self.attribution!r})"

    def page_view(self) -> View:
        """See :meth:`Result.page_view`: a click on a generated token shows its sources."""
        return generation_view(self.attribution, self.tokens)

    def tensors(self) -> dict[str, Tensor]:
        """The attribution's."""
        return self.attribution.tensors()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings: the attribution's, and what was generated."""
        made = {"text": self.text, "tokens": list(self.tokens), "ids": list(self.ids)}
        return {**self.attribution.to_dict(), "format": self.FORMAT, **made}

    @classmethod
    def from_saved(cls, tensors: dict[str, Any], said: dict[str, Any]) -> Generation:
        """See :meth:`Result.from_saved`."""
        ids = tuple(said["ids"])
        return cls(said["text"], tuple(said["tokens"]), ids, Attribution.from_saved(tensors, said))
