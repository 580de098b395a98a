"""Code that the terminal views, the pages and the figures share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from ..inputs.prompt import Prompt
from ..inputs.settings import Settings
from ..inputs.targets import Target
from ..sources.source import BESIDE, Source

NUMBERED = 16  # up to so many columns of a sweep, each cell shows its number
GRID = 64  # up to so many columns of a sweep are drawn; with more (neurons), a view shows sums or a list
SINGULAR = {"heads": "attention head", "neurons": "neuron", "experts": "expert", "modules": "module"}
POSITIONS = 120  # up to so many columns of tokens are drawn; of a longer prompt, neighbouring tokens are summed


class Explained(Protocol):
    """The part that all results share."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def targets(self) -> tuple[Target, ...]: ...  # noqa: D102
    @property
    def target_logits(self) -> Tensor: ...  # noqa: D102
    @property
    def conservation_error(self) -> Tensor: ...  # noqa: D102
    @property
    def prompt(self) -> Prompt: ...  # noqa: D102
    @property
    def settings(self) -> Settings: ...  # noqa: D102


class Scored(Explained, Protocol):
    """Scores ``[targets, sources]`` of one decomposition."""

    @property
    def scores(self) -> Tensor: ...  # noqa: D102
    @property
    def sources(self) -> tuple[Source, ...]: ...  # noqa: D102


class Grid(Explained, Protocol):
    """Scores ``[targets, layers, columns]``: one decomposition per layer."""

    @property
    def scores(self) -> Tensor: ...  # noqa: D102
    @property
    def rest(self) -> Tensor: ...  # noqa: D102
    @property
    def bias(self) -> Tensor: ...  # noqa: D102
    @property
    def balance(self) -> Tensor: ...  # noqa: D102
    @property
    def layers(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def columns(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    def source(self, row: int, column: int) -> Source: ...  # noqa: D102
    def top(self, k: int, target: int) -> list[tuple[Source, float]]: ...  # noqa: D102


class Layered(Explained, Protocol):
    """Scores of tokens, heads, modules and neurons of all layers; :class:`depass.Survey` gives their shapes."""

    @property
    def tokens(self) -> Tensor: ...  # noqa: D102
    @property
    def bias(self) -> Tensor: ...  # noqa: D102
    @property
    def balance(self) -> Tensor: ...  # noqa: D102
    @property
    def heads(self) -> Tensor: ...  # noqa: D102
    @property
    def heads_by_position(self) -> Tensor: ...  # noqa: D102
    @property
    def modules(self) -> Tensor: ...  # noqa: D102
    @property
    def modules_by_position(self) -> Tensor: ...  # noqa: D102
    @property
    def neurons(self) -> Tensor: ...  # noqa: D102
    @property
    def neuron_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def layers(self) -> tuple[int, ...]: ...  # noqa: D102
    def top_neurons(self, k: int, target: int) -> list[tuple[Source, float]]: ...  # noqa: D102


class Cited(Protocol):
    """What a sentence of a document contributed to a sentence of an answer."""

    @property
    def document(self) -> int: ...  # noqa: D102
    @property
    def title(self) -> str: ...  # noqa: D102
    @property
    def sentence(self) -> int: ...  # noqa: D102
    @property
    def text(self) -> str: ...  # noqa: D102
    @property
    def score(self) -> float: ...  # noqa: D102
    @property
    def share(self) -> float: ...  # noqa: D102


class Claimed(Protocol):
    """A sentence of an answer with its sources; :class:`depass.Claim` describes it."""

    @property
    def text(self) -> str: ...  # noqa: D102
    @property
    def logit(self) -> float: ...  # noqa: D102
    @property
    def probability(self) -> float: ...  # noqa: D102
    @property
    def sources(self) -> Sequence[Cited]: ...  # noqa: D102
    @property
    def others(self) -> dict[str, float]: ...  # noqa: D102


AnyScored = TypeVar("AnyScored", bound=Scored)


def drawn(res: AnyScored) -> tuple[AnyScored, Tensor | None]:
    """The result without the source ``unassigned``, which is no part to draw, and that source's scores ``[targets]``."""
    kept = [index for index, source in enumerate(res.sources) if source.kind != "unassigned"]
    if len(kept) == len(res.sources):
        return res, None
    sources = tuple(res.sources[index] for index in kept)
    return replace(res, scores=res.scores[:, kept], sources=sources), res.scores[:, -1]


def components(res: Scored) -> list[int]:
    """The columns whose sources are components of the model (heads, neurons), not parts of the prompt."""
    return [index for index, source in enumerate(res.sources) if source.start is None and source.kind not in BESIDE]


def scale(res: Scored, row: int) -> float:
    """The score drawn in full colour: the largest one. Beside components ``rest`` does not count: it would drown them."""
    scores = res.scores[row]
    named = components(res)
    return float((scores[named] if named else scores).abs().max()) or 1.0


def abridged(res: AnyScored, sizes: Tensor, most: int) -> AnyScored:
    """The ``most`` components with the largest ``sizes`` ``[sources]``, largest first, and the sum of the others."""
    named = components(res)
    order = [named[rank] for rank in sizes[named].argsort(descending=True, stable=True).tolist()]
    others = order[most:]
    if not others:
        return res
    kept = [*sorted(set(range(len(res.sources))) - set(named)), *order[:most]]
    return replace(
        res,
        scores=torch.cat([res.scores[:, kept], res.scores[:, others].sum(1, keepdim=True)], 1),
        sources=(*(res.sources[index] for index in kept), Source(f"[{len(others)} others]", "part")),
    )


def headings(sweep: Grid) -> list[str]:
    """The headings of a sweep's columns."""
    return ["attention", "MLP"] if sweep.kind == "modules" else [str(column) for column in sweep.columns]


def beside(sweep: Grid) -> list[tuple[str, Tensor]]:
    """The columns beside a sweep's components: ``rest``, ``bias`` unless it is zero, and ``pattern`` or ``unassigned``.

    Each ``[targets, layers]``. A baseline's sweep has none.
    """
    columns: list[tuple[str, Tensor]] = []
    if not sweep.settings.adds_up:
        return columns
    named = [("rest", sweep.rest), ("bias", sweep.bias)]
    if (balance := sweep.settings.balance) is not None:
        named.append((balance, sweep.balance))
    for label, scores in named:
        if label == "bias" and not bool(scores.any()):
            continue
        if sweep.kind == "modules":  # attention and MLP are decomposed separately
            columns += [(f"{label} ({module})", scores[:, :, index]) for index, module in enumerate(("attn", "MLP"))]
        else:
            columns.append((label, scores))
    return columns


def behind(survey: Layered) -> list[tuple[str, Tensor]]:
    """The columns beside a survey's tokens: ``bias`` unless it is zero, and ``pattern`` or ``unassigned``.

    Each ``[targets, layers + 1]``.
    """
    columns = [("bias", survey.bias)] if bool(survey.bias.any()) else []
    balance = survey.settings.balance
    return columns if balance is None else [*columns, (balance, survey.balance)]


def spans(count: int) -> list[tuple[int, int]]:
    """The columns of ``count`` tokens, each with its first token and one past its last: at most :data:`POSITIONS`."""
    size = -(-count // POSITIONS)
    return [(begin, min(begin + size, count)) for begin in range(0, count, size)]


def summed(scores: Tensor, columns: list[tuple[int, int]]) -> Tensor:
    """The sums of scores ``[targets, layers, tokens, ...]`` over the tokens of each column of :func:`spans`."""
    return torch.stack([scores[:, :, begin:end].sum(2) for begin, end in columns], 2)


def place(res: Explained, row: int) -> str:
    """Where a target is: after which token, or over how many tokens its sum runs."""
    target = res.targets[row]
    after = f"after token {target.position + 1} ({res.prompt.tokens[target.position]!r})"
    if target.kind != "sum":
        return after
    count = len(target.token_ids)
    return f"sum over {count} token{'s' if count > 1 else ''}, the last {after}"


def likelihood(target: Target) -> str:
    """The model's own probability of a target, and its rank where another token is likelier; empty without one."""
    if target.probability is None:
        return ""
    return f"p {target.probability:.2g}" + ("" if target.rank in (None, 1) else f", rank {target.rank:,}")


def quantity(res: Explained, row: int) -> str:
    """What the scores of a target add up to."""
    of_sum = res.targets[row].kind == "sum" and res.settings.of == "logprob"
    return "logit less the mean" if of_sum or res.targets[row].kind == "logprob" else "logit"


def largest_elsewhere(scores: Tensor, columns: list[tuple[int, int]], position: int) -> float:
    """The largest of one target's ``scores`` ``[layers + 1, columns]`` outside the column of its own ``position``.

    A map of tokens draws it in full colour. The stream at the target's position ends as the whole logit, so its scores say
    little and would drown the others.
    """
    others = [index for index, (begin, end) in enumerate(columns) if not begin <= position < end]
    return float((scores[:, others] if others else scores).abs().max()) or 1.0


def numbers(begin: int, end: int) -> str:
    """The numbers of some tokens, counted from 1."""
    return str(end) if end == begin + 1 else f"{begin + 1}–{end}"
