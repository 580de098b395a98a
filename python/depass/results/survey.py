"""The result of a survey: every token, head and module, and the largest neurons, of all layers, from one backward pass."""

from __future__ import annotations

import os
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, TextIO

from torch import Tensor

from ..errors import SourceError
from ..inputs.prompt import Prompt
from ..inputs.settings import Settings
from ..inputs.targets import Target
from ..sources.source import Source
from ..views.page import View, survey_view
from .common import TargetedResult, check_shape, common, described, judged, listed


@dataclass(frozen=True, eq=False)
class Survey(TargetedResult):
    """The scores of all parts of all layers for ``T`` targets, under a linear rule (docs/method.md).

    A part's score is its product with the gradient of the linearised model, so all of them come from one backward pass.
    At every layer's input ``tokens[t, l].sum() + bias[t, l] + balance[t, l]`` is the logit of target ``t``. Scores of
    different layers say the same logit again, so compare layers, but do not add them up.

    Attributes:
        tokens: ``[T, L + 1, N]`` fp32 on the CPU, signed, in logits: the residual stream of each position at the input of
            each of the ``L`` layers, and at the output of the last.
        bias: ``[T, L + 1]``, the biases behind it.
        balance: ``[T, L + 1]``, ``pattern`` or ``unassigned`` behind it (``settings.balance`` says which); zeros for rules
            without one.
        heads_by_position: ``[T, L, N, H]``, the output of each head at each position.
        modules_by_position: ``[T, L, N, 2]``, the output of attention and of the MLP at each position.
        neurons: ``[T, L, k]``, the ``k`` neurons of each layer with the largest scores, summed over positions. Layers with
            routed experts are left out: each position goes through other neurons there. Their rows are zero.
        neuron_ids: ``[T, L, k]`` int64, their numbers; -1 in layers with routed experts.
        other_neurons: ``[T, L]``, the sum over the layer's other neurons; zero in layers with routed experts.
        layers: the numbers of the ``L`` layers.
        targets: the targets.
        target_logits: ``[T]`` fp32, the model's own logits.
        conservation_error: ``[T, L + 1]``, the conservation error at each layer's input (see :class:`Attribution`).
        prompt: the prompt's tokens and text.
        settings: the settings of the survey.
    """

    tokens: Tensor
    bias: Tensor
    balance: Tensor
    heads_by_position: Tensor
    modules_by_position: Tensor
    neurons: Tensor
    neuron_ids: Tensor
    other_neurons: Tensor
    layers: tuple[int, ...]
    targets: tuple[Target, ...]
    target_logits: Tensor
    conservation_error: Tensor
    prompt: Prompt
    settings: Settings

    FORMAT = "depass-survey-1"
    TENSORS = (
        "tokens", "bias", "balance", "heads_by_position", "modules_by_position", "neurons", "neuron_ids",
        "other_neurons", "target_logits", "conservation_error",
    )  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"Survey({len(self.targets)} targets x {len(self.layers)} layers x {len(self.prompt.tokens)} tokens, "
            f"{self.settings.model}, {judged(self.settings, self.conservation_error)})"
        )

    @property
    def heads(self) -> Tensor:
        """``[T, L, H]``: the score of each head, summed over positions."""
        return self.heads_by_position.sum(2)

    @property
    def modules(self) -> Tensor:
        """``[T, L, 2]``: the scores of attention and MLP, summed over positions."""
        return self.modules_by_position.sum(2)

    def top_neurons(self, k: int = 10, target: int = 0) -> list[tuple[Source, float]]:
        """The ``k`` kept neurons with the largest absolute scores, over all layers, with their signed scores in logits.

        Layers with routed experts have none; ``dp.sweep("experts", ...)`` scores their experts.

        Raises:
            SourceError: ``k`` is less than 1.
            TargetError: the index is out of range.
        """
        if k < 1:
            raise SourceError(f"top_neurons({k}): k must be at least 1")
        scores, ids = self.neurons[self.row(target)].flatten(), self.neuron_ids[target].flatten().tolist()
        order, each = scores.abs().argsort(descending=True, stable=True).tolist(), self.neurons.shape[2]
        best = [index for index in order if ids[index] >= 0][:k]
        found = [(self.layers[index // each], ids[index], float(scores[index])) for index in best]
        return [
            (Source(f"L{layer}N{number}", "neuron", layer=layer, index=number), score) for layer, number, score in found
        ]

    def show(self, file: TextIO | None = None, width: int | None = None) -> None:
        """Print every target's layers, in colour if ``file`` (by default stdout) is a terminal.

        A layer's line has a sign for each head, the scores of attention and MLP, and its three largest neurons. The tokens
        with the largest scores at the input of the first layer follow.
        """
        from ..views.terminal import show_survey

        show_survey(self, file, width)

    def page_view(self) -> View:
        """See :meth:`Result.page_view`: a map of layers and tokens beside a map of layers and heads."""
        return survey_view(self)

    def plot(self, path: str | os.PathLike[str], target: int = 0) -> None:
        """Draw one target's maps, layers by tokens and layers by heads, side by side.

        Args:
            path: the file to write; its suffix, ``.png``, ``.svg`` or ``.pdf``, selects the format.
            target: the index of the target.

        Raises:
            OutputError: the path cannot be written, or its suffix is not one of these.
            TargetError: the index is out of range.
            DePassError: matplotlib is not installed.
        """
        from ..views.figure import survey_maps

        survey_maps(self, path, self.row(target))

    def to_dict(self) -> dict[str, Any]:
        """The result as a dict of plain values."""
        return {
            "format": self.FORMAT,
            "layers": list(self.layers),
            **described(self),
            **{name: listed(getattr(self, name)) for name in self.TENSORS},
        }

    @classmethod
    def from_saved(cls, tensors: dict[str, Any], said: dict[str, Any]) -> Survey:
        """See :meth:`Result.from_saved`."""
        layers, targets, prompt = tuple(said["layers"]), said["targets"], said["prompt"]["tokens"]
        inputs = (*layers, None)
        heads, neurons = (range(*tensors[name].shape[-1:]) for name in ("heads_by_position", "neurons"))
        axes: dict[str, tuple[Sized, ...]] = {
            "tokens": (inputs, prompt), "bias": (inputs,), "balance": (inputs,), "conservation_error": (inputs,),
            "heads_by_position": (layers, prompt, heads), "modules_by_position": (layers, prompt, range(2)),
            "neurons": (layers, neurons), "neuron_ids": (layers, neurons), "other_neurons": (layers,), "target_logits": (),
        }  # fmt: skip
        for name, rest in axes.items():
            check_shape(tensors[name], targets, *rest)
        return cls(**tensors, layers=layers, **common(said))
