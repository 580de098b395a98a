"""The result of a sweep: one decomposition per layer, each of which adds up to the target's logit."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TextIO

from torch import Tensor

from .errors import DePassError, SourceError, TargetError
from .files import load_result, save_result
from .prompt import Prompt
from .result import Settings, check_shape, common, judged, listed
from .sources import Source
from .targets import Target

if TYPE_CHECKING:
    import pandas

_FORMAT = "depass-sweep-1"
_TENSORS = ("scores", "rest", "bias", "target_logits", "conservation_error")


@dataclass(frozen=True, eq=False)
class Sweep:
    """How much each head, neuron or module of every layer contributed to each target's logit.

    Every layer is a decomposition of its own: ``scores[t, l].sum() + rest[t, l] + bias[t, l]`` is the logit of target
    ``t``, for each ``l``; of modules each column is one, ``scores[t, l, i] + rest[t, l, i] + bias[t, l, i]``. Layers are
    compared, not added up. A baseline's scores promise no sum: its ``rest``, ``bias`` and ``conservation_error`` are NaN.

    Attributes:
        scores: ``[targets, layers, C]`` fp32 on the CPU, signed, in logits; ``C`` heads, neurons, or attention and MLP.
        rest: ``[targets, layers]``, what is not of the layer's components; for modules ``[targets, layers, 2]``:
            attention and MLP are two decompositions.
        bias: as ``rest``, what is of the model's biases; zeros without any.
        layers: ``[layers]``, which they are.
        columns: what the last dimension is: heads' or neurons' numbers, or 0 for attention and 1 for the MLP.
        kind: ``heads``, ``neurons`` or ``modules``.
        targets: what is explained.
        target_logits: ``[targets]`` fp32, the model's own.
        conservation_error: as ``rest``, of each decomposition (see :class:`Attribution`).
        prompt: the prompt's tokens and text.
        settings: how it was made.
    """

    scores: Tensor
    rest: Tensor
    bias: Tensor
    layers: tuple[int, ...]
    columns: tuple[int, ...]
    kind: Literal["heads", "neurons", "modules"]
    targets: tuple[Target, ...]
    target_logits: Tensor
    conservation_error: Tensor
    prompt: Prompt
    settings: Settings

    def __repr__(self) -> str:
        return (
            f"Sweep({len(self.targets)} targets x {len(self.layers)} layers x {len(self.columns)} {self.kind}, "
            f"{self.settings.model}, {judged(self.settings, self.conservation_error)})"
        )

    def source(self, row: int, column: int) -> Source:
        """What ``scores[:, row, column]`` is of."""
        layer, index = self.layers[row], self.columns[column]
        if self.kind == "modules":
            return Source(f"L{layer}.{('attn', 'mlp')[index]}", "module", layer=layer)
        letter, kind = ("H", "head") if self.kind == "heads" else ("N", "neuron")
        return Source(f"L{layer}{letter}{index}", kind, layer=layer, index=index)  # type: ignore[arg-type]

    def top(self, k: int = 10, target: int = 0) -> list[tuple[Source, float]]:
        """The ``k`` components with the largest scores by absolute value, in logits, largest first."""
        if k < 1:
            raise SourceError(f"top({k}): k must be at least 1")
        scores = self.scores[self.row(target)].flatten()
        best = scores.abs().argsort(descending=True, stable=True)[:k].tolist()
        return [(self.source(*divmod(i, len(self.columns))), float(scores[i])) for i in best]

    def row(self, target: int) -> int:
        """A target's number, checked."""
        if not -len(self.targets) <= target < len(self.targets):
            raise TargetError(f"target {target} is out of range, there are {len(self.targets)}")
        return target

    def show(self, file: TextIO | None = None, width: int | None = None) -> None:
        """Print every target's scores, layers down and components across, in colour where ``file`` is a terminal."""
        from .terminal import show_sweep

        show_sweep(self, file, width)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The scores as one standalone page with a map of layers and components; written to ``path`` where given.

        Raises:
            OutputError: the path cannot be written.
        """
        from .page import render

        return render([("sweep", self)], path)

    def plot(self, path: str | os.PathLike[str], target: int = 0) -> None:
        """Draw one target's map of layers and components; the suffix (``.png``, ``.svg``, ``.pdf``) says as what.

        Raises:
            OutputError: the path cannot be written, or its suffix names no picture.
            DePassError: matplotlib is not installed.
        """
        from .picture import heat_map

        heat_map(self, path, self.row(target))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings."""
        return {
            "format": _FORMAT,
            "kind": self.kind,
            "layers": list(self.layers),
            "columns": list(self.columns),
            "settings": asdict(self.settings),
            "prompt": {**asdict(self.prompt), "special": sorted(self.prompt.special)},
            "targets": [asdict(target) for target in self.targets],
            **{name: listed(getattr(self, name)) for name in _TENSORS},
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per target and component: label, layer, index, score in logits.

        Raises:
            DePassError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise DePassError("to_dataframe needs pandas: pip install 'depass-kernels[plots]'") from error
        rows = []
        for target, scores in zip(self.targets, self.scores.tolist(), strict=True):
            for row, line in enumerate(scores):
                for column, score in enumerate(line):
                    source = self.source(row, column)
                    rows.append(
                        {"target": target.label, "position": target.position, "source": source.label,
                         "layer": source.layer, "index": self.columns[column], "score": score}
                    )  # fmt: skip
        return pandas.DataFrame(rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write scores and all that belongs to them as safetensors with JSON metadata; :meth:`load` reads it.

        Raises:
            OutputError: the path cannot be written.
        """
        save_result(path, self.to_dict(), {name: getattr(self, name) for name in _TENSORS})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Sweep:
        """Read what :meth:`save` wrote; needs no model.

        Raises:
            OutputError: the file cannot be read or is no sweep.
        """

        def make(tensors: dict[str, Any], said: dict[str, Any]) -> Sweep:
            layers, columns = tuple(said["layers"]), tuple(said["columns"])
            check_shape(tensors["scores"], said["targets"], layers, columns)
            return Sweep(**tensors, layers=layers, columns=columns, kind=said["kind"], **common(said))

        return load_result(path, _FORMAT, _TENSORS, make)
