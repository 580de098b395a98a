"""The result of a sweep: one decomposition per layer; the scores of each add up to the target's logit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TextIO, get_args

from torch import Tensor

from ..inputs.prompt import Prompt
from ..inputs.settings import Settings
from ..inputs.targets import Target
from ..sources.source import Kind, Source
from ..views.page import View, sweep_view
from .common import ScoredResult, check_shape, common, described, judged, listed

SweepKind = Literal["heads", "neurons", "experts", "modules"]
SWEEP_KINDS: tuple[SweepKind, ...] = get_args(SweepKind)
_NAMES: dict[str, tuple[str, Kind]] = {"heads": ("H", "head"), "neurons": ("N", "neuron"), "experts": ("E", "expert")}


@dataclass(frozen=True, eq=False)
class Sweep(ScoredResult):
    """The score of each head, neuron, expert or module of every layer for each target.

    Every layer is a separate decomposition: ``scores[t, l].sum() + rest[t, l] + bias[t, l] + balance[t, l]`` is the logit of
    target ``t`` for each layer ``l``. For modules every column is a separate decomposition, too:
    ``scores[t, l, i] + rest[t, l, i] + bias[t, l, i] + balance[t, l, i]``. So compare layers, but do not add them up. The
    scores of a baseline need not add up: its ``rest``, ``bias``, ``balance`` and ``conservation_error`` are NaN.

    Attributes:
        scores: ``[targets, layers, C]`` fp32 on the CPU, signed, in logits, for ``C`` heads, neurons or experts, or
            attention and MLP.
        rest: ``[targets, layers]``, the score of the remainder; for modules ``[targets, layers, 2]``, because attention
            and MLP are two decompositions.
        bias: the score of the model's biases, with the shape of ``rest``; zeros for a model without biases.
        balance: the score of ``pattern`` or ``unassigned`` (``settings.balance`` says which), with the shape of ``rest``;
            zeros for rules without one.
        layers: the layer numbers, one per row.
        columns: the numbers of the heads, neurons or experts, one per column; for modules, 0 for attention and 1 for the
            MLP.
        kind: ``heads``, ``neurons``, ``experts`` or ``modules``.
        targets: the targets.
        target_logits: ``[targets]`` fp32, the model's own logits.
        conservation_error: the conservation error of each decomposition (see :class:`Attribution`), with the shape of
            ``rest``.
        prompt: the prompt's tokens and text.
        settings: the settings of the sweep.
    """

    scores: Tensor
    rest: Tensor
    bias: Tensor
    balance: Tensor
    layers: tuple[int, ...]
    columns: tuple[int, ...]
    kind: SweepKind
    targets: tuple[Target, ...]
    target_logits: Tensor
    conservation_error: Tensor
    prompt: Prompt
    settings: Settings

    FORMAT = "depass-sweep-1"
    TENSORS = ("scores", "rest", "bias", "balance", "target_logits", "conservation_error")
    TOP = 10

    def __repr__(self) -> str:
        return (
            f"Sweep({len(self.targets)} targets x {len(self.layers)} layers x {len(self.columns)} {self.kind}, "
            f"{self.settings.model}, {judged(self.settings, self.conservation_error)})"
        )

    def source(self, row: int, column: int) -> Source:
        """The component whose scores are ``scores[:, row, column]``."""
        layer, index = self.layers[row], self.columns[column]
        if self.kind == "modules":
            return Source(f"L{layer}.{('attn', 'mlp')[index]}", "module", layer=layer)
        letter, kind = _NAMES[self.kind]
        return Source(f"L{layer}{letter}{index}", kind, layer=layer, index=index)

    def source_at(self, index: int) -> Source:
        """The component of the score at ``index`` of a target's flattened scores."""
        return self.source(*divmod(index, len(self.columns)))

    def show(self, file: TextIO | None = None, width: int | None = None) -> None:
        """Print every target's scores, one row per layer, in colour if ``file`` (by default stdout) is a terminal."""
        from ..views.terminal import show_sweep

        show_sweep(self, file, width)

    def page_view(self) -> View:
        """See :meth:`Result.page_view`."""
        return sweep_view(self)

    def plot(self, path: str | os.PathLike[str], target: int = 0) -> None:
        """Draw a heat map of one target's scores by layer and component.

        Args:
            path: the file to write; its suffix, ``.png``, ``.svg`` or ``.pdf``, selects the format.
            target: the index of the target.

        Raises:
            OutputError: the path cannot be written, or its suffix is not one of these.
            TargetError: the index is out of range.
            DePassError: matplotlib is not installed.
        """
        from ..views.figure import heat_map

        heat_map(self, path, self.row(target))

    def to_dict(self) -> dict[str, Any]:
        """The result as a dict of plain values."""
        return {
            "format": self.FORMAT,
            "kind": self.kind,
            "layers": list(self.layers),
            "columns": list(self.columns),
            **described(self),
            **{name: listed(getattr(self, name)) for name in self.TENSORS},
        }

    def records(self) -> Iterator[dict[str, Any]]:
        """One table row per target and component."""
        for target, scores in zip(self.targets, self.scores.tolist(), strict=True):
            for row, line in enumerate(scores):
                for column, score in enumerate(line):
                    source = self.source(row, column)
                    yield {
                        "target": target.label, "position": target.position, "source": source.label,
                        "layer": source.layer, "index": self.columns[column], "score": score,
                    }  # fmt: skip

    @classmethod
    def from_saved(cls, tensors: dict[str, Any], said: dict[str, Any]) -> Sweep:
        """See :meth:`Result.from_saved`."""
        layers, columns = tuple(said["layers"]), tuple(said["columns"])
        check_shape(tensors["scores"], said["targets"], layers, columns)
        return cls(**tensors, layers=layers, columns=columns, kind=said["kind"], **common(said))
