"""The result of a generation: the generated tokens, and the attribution of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..views.page import View, generation_view
from .attribution import Attribution
from .common import Result


@dataclass(frozen=True, eq=False)
class Generation(Result):
    """The tokens that a model generated, and the attribution of each.

    Attributes:
        text: the generated text, special tokens included.
        tokens: the generated tokens' pieces of the text.
        ids: the generated tokens' ids.
        attribution: the attribution, with one target per generated token, in order. Its sources are the prompt's tokens
            or spans and all generated tokens except the last, which no other token follows. Logits are the model's own,
            before a temperature or any other change by sampling.
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
        """The tensors of the attribution, by name."""
        return self.attribution.tensors()

    def to_dict(self) -> dict[str, Any]:
        """The attribution as a dict of plain values, with the generated text, tokens and ids."""
        generated = {"text": self.text, "tokens": list(self.tokens), "ids": list(self.ids)}
        return {**self.attribution.to_dict(), "format": self.FORMAT, **generated}

    @classmethod
    def from_saved(cls, tensors: dict[str, Any], said: dict[str, Any]) -> Generation:
        """See :meth:`Result.from_saved`."""
        ids = tuple(said["ids"])
        return cls(said["text"], tuple(said["tokens"]), ids, Attribution.from_saved(tensors, said))
