"""Surveys: tokens, heads, modules and the largest neurons of all layers, from one backward pass under a linear rule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import NonFiniteError, OptionError
from ..inputs.prompt import Prompt
from ..inputs.targets import Asked
from ..models.health import blame
from ..results.common import conservation_error
from ..results.survey import Survey
from .backward import LayerGradients, StreamGradient
from .linear import LinearPass, repeated
from .passes import Engine
from .request import Options, Progress
from .scores import must_be_finite


def survey(
    engine: Engine, prompt: Prompt, asked: Sequence[Asked], options: Options, neurons: int, progress: Progress | None
) -> Survey:
    """Survey a prompt.

    Args:
        engine: the model and its settings.
        prompt: the prompt.
        asked: its targets, none of them a probe.
        options: the options of the pass, with a linear rule.
        neurons: how many neurons of each layer are kept.
        progress: see :meth:`depass.DePass.survey`.

    Raises:
        OptionError: a layer has fewer neurons. Layers with routed experts, whose neurons are left out, and layers without
            an MLP do not count.
        NonFiniteError: a logit or a score is not finite.
    """
    counts = [layer.neurons for layer in engine.bound.layers if layer.experts is None and layer.mlp is not None]
    if neurons < 1 or (counts and neurons > min(counts)):
        allowed = f"from 1 to {min(counts)}, the neurons of a layer of {engine.bound.name}" if counts else "at least 1"
        raise OptionError(f"neurons={neurons}: need {allowed}")
    done = repeated(partial(_SurveyPass, engine, prompt, asked, options, neurons, progress))
    readouts = done.readouts[0]
    for readout in readouts:
        must_be_finite(readout.target, readout.logit, engine.bound)
    found = {
        name: torch.stack([of_layer[layer] for layer in sorted(of_layer)], 1) for name, of_layer in done.found.items()
    }
    if not all(bool(scores.isfinite().all()) for scores in found.values()):
        raise NonFiniteError(f"the scores are not finite; {blame(engine.bound)}")
    logits = torch.tensor([readout.logit for readout in readouts], dtype=torch.float64, device="cpu")
    summands = torch.cat([found["tokens"], found["bias"][..., None], found["balance"][..., None]], -1)
    return Survey(
        **{name: scores.float() if scores.is_floating_point() else scores for name, scores in found.items()},
        layers=tuple(range(options.start, options.stop)),
        targets=tuple(readout.target for readout in readouts),
        target_logits=logits.float(),
        conservation_error=conservation_error(summands, logits[:, None]).float(),
        prompt=prompt,
        settings=done.settings(options.start, 0),
    )


class _SurveyPass(LinearPass):
    """A pass over one prompt that keeps its scores by layer; of the neurons it keeps the largest.

    Attributes:
        found: by the name of a tensor of :class:`depass.Survey` and by layer, its rows ``[targets, ...]`` on the CPU.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        asked: Sequence[Asked],
        options: Options,
        neurons: int,
        progress: Progress | None,
        sparing: bool = False,
    ) -> None:
        super().__init__(engine, [prompt], [asked], options.start, options, progress, sparing)
        self.largest = neurons
        self.found: dict[str, dict[int, Tensor]] = {}

    def stream(self, gradient: StreamGradient) -> None:
        """Keep the scores of the stream at a layer's input, and of what lies behind it."""
        scores = {"tokens": gradient.scores(), "bias": gradient.behind[:, 0], "balance": gradient.balance[:, 0]}
        self._keep(gradient.layer, gradient.targets, scores)

    def layer(self, gradients: LayerGradients) -> None:
        """Keep the scores of heads and modules by position, and of the layer's largest neurons."""
        heads = gradients.heads()
        scores = {
            "heads_by_position": functional.pad(heads, (0, gradients.bound.most_heads - heads.shape[-1])),
            "modules_by_position": torch.stack([gradients.attention(), gradients.mlp()], -1),
            **self._neurons(gradients),
        }
        self._keep(gradients.layer, gradients.targets, scores)

    def _neurons(self, gradients: LayerGradients) -> dict[str, Tensor]:
        """The largest neurons and the sum of the others; the number -1 and zeros where the layer has experts or no MLP."""
        if gradients.routed is not None or gradients.hidden is None:
            zero = gradients.after.scores().new_zeros(len(gradients.targets), self.largest)
            return {
                "neuron_ids": torch.full_like(zero, -1, dtype=torch.int64),
                "neurons": zero,
                "other_neurons": zero[:, 0],
            }
        neurons = gradients.neurons()[:, 0]  # [T, F]
        ids = neurons.abs().topk(self.largest).indices
        largest = neurons.gather(1, ids)
        return {"neuron_ids": ids, "neurons": largest, "other_neurons": neurons.sum(1) - largest.sum(1)}

    def _keep(self, layer: int, some: list[int], scores: dict[str, Tensor]) -> None:
        for name, each in scores.items():
            own = each.new_zeros(len(self.readouts[0]), *each.shape[1:], device="cpu")
            self.found.setdefault(name, {}).setdefault(layer, own)[some] = each.cpu()
