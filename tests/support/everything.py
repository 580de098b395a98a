"""Every score of every layer that a backward pass finds, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional

from depass.engine.backward import Backward, LayerGradients, Parts, StreamGradient
from depass.inputs.targets import Asked, Readout
from depass.models.bound import BoundModel, Layer
from depass.rules import PathWeights


@dataclass(frozen=True)
class Everything:
    """All scores of one prompt, for ``T`` targets; ``L`` layers from the first that was gone through, ``N`` tokens.

    At every layer's input tokens, biases and the balance add up to the logit. They are zero behind a probe's layer.

    Attributes:
        readouts: the targets, with the model's own logits.
        tokens: ``[T, L + 1, N]``, of the stream at the input of each layer and at the output of the last.
        biases: ``[T, L + 1]``, of the biases behind it.
        balance: ``[T, L + 1]``, the balance behind it; see :attr:`depass.rules.PathWeights.balance`.
        heads: ``[T, L, H]``; zero behind the heads that a layer has.
        neurons: by layer, ``[T, F]``; ``[T, 0]`` where a layer has experts or no MLP.
        experts: by layer, ``[T, E]``; ``[T, 0]`` where a layer has none.
        modules: ``[T, L, 2]``, of attention and MLP.
        rest, bias, balances: by kind of parts, the scores ``[T, L]`` of these sources; see :meth:`LayerGradients.rest`.
            Zero in layers that do not have this kind.
        has: by kind of parts, the layers that have it.
    """

    readouts: list[Readout]
    tokens: Tensor
    biases: Tensor
    balance: Tensor
    heads: Tensor
    neurons: list[Tensor]
    experts: list[Tensor]
    modules: Tensor
    rest: dict[Parts, Tensor]
    bias: dict[Parts, Tensor]
    balances: dict[Parts, Tensor]
    has: dict[Parts, list[bool]]


def everything(
    bound: BoundModel,
    prompts: Sequence[Sequence[int]],
    asked: Sequence[Sequence[Asked]],
    path_weights: PathWeights,
    **options: Any,
) -> list[Everything]:
    """Score all tokens, heads, neurons and modules of all layers; holds ``T·L·F`` numbers, so for small models.

    Args:
        bound: the model.
        prompts: the token ids of each prompt.
        asked: the checked targets of each prompt.
        path_weights: how gradients flow.
        options: the other arguments of :class:`Backward`.

    Raises:
        ModelError: as for :meth:`Backward.run`.
    """
    run = _Everything(bound, prompts, asked, path_weights, **options)
    run.run()
    return [run.of(prompt) for prompt in range(len(prompts))]


def parts_of(layer: Layer) -> set[Parts]:
    """The kinds of parts that a layer has."""
    has: dict[Parts, bool] = {
        "heads": bool(layer.mixers), "attn": bool(layer.mixers), "mlp": layer.has_mlp,
        "neurons": layer.experts is None and layer.mlp is not None, "experts": layer.experts is not None,
    }  # fmt: skip
    return {parts for parts, is_here in has.items() if is_here}


class _Everything(Backward):
    """Keeps every score by layer, as rows ``[T, ...]`` in which targets that were left out are zero."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kept: dict[tuple[str, int], Tensor] = {}  # by name and layer: [T, P, ...] or [T, B, ...]

    def stream(self, gradient: StreamGradient) -> None:
        self._keep("tokens", gradient.layer, gradient.targets, gradient.scores())
        self._keep("biases", gradient.layer, gradient.targets, gradient.behind)
        self._keep("balance", gradient.layer, gradient.targets, gradient.balance)

    def layer(self, gradients: LayerGradients) -> None:
        sums = gradients.of_prompts
        heads, none = sums(gradients.heads()), gradients.after.behind
        scores = {"heads": functional.pad(heads, (0, self.bound.most_heads - heads.shape[-1]))}
        has = parts_of(self.bound.layers[gradients.layer])
        for own in ("neurons", "experts"):
            scores[own] = getattr(gradients, own)() if own in has else none[..., None][..., :0]
        scores["modules"] = torch.stack([sums(gradients.attention()), sums(gradients.mlp())], -1)
        for parts in get_args(Parts):
            is_here = parts in has
            scores[f"rest {parts}"] = sums(gradients.rest(parts)) if is_here else torch.zeros_like(none)
            scores[f"bias {parts}"] = gradients.bias(parts) if is_here else torch.zeros_like(none)
            scores[f"balance {parts}"] = gradients.balance(parts) if is_here else torch.zeros_like(none)
        for name, each in scores.items():
            self._keep(name, gradients.layer, gradients.targets, each)

    def _keep(self, name: str, layer: int, some: list[int], scores: Tensor) -> None:
        count = max(len(of_prompt) for of_prompt in self.readouts)
        rows = self.kept.setdefault((name, layer), scores.new_zeros(count, *scores.shape[1:], device="cpu"))
        rows[some] = scores.cpu()

    def of(self, prompt: int) -> Everything:
        """The scores of one prompt."""
        readouts, begin = self.readouts[prompt], sum(self.lengths[:prompt])
        count, layers = len(readouts), range(self.start, self.stop)

        def by_layer(name: str) -> list[Tensor]:
            return [self.kept[name, layer][:count, prompt] for layer in layers]

        def by_parts(name: str) -> dict[Parts, Tensor]:
            return {parts: torch.stack(by_layer(f"{name} {parts}"), 1) for parts in get_args(Parts)}

        places, tokens = range(self.start, self.stop + 1), slice(begin, begin + self.lengths[prompt])
        of_tokens = torch.stack([self.kept["tokens", layer][:count, tokens] for layer in places], 1)
        biases, balance = (torch.stack([self.kept[name, layer][:count, prompt] for layer in places], 1)
                           for name in ("biases", "balance"))  # fmt: skip
        return Everything(
            readouts=readouts,
            tokens=of_tokens,
            biases=biases,
            balance=balance,
            heads=torch.stack(by_layer("heads"), 1),
            neurons=by_layer("neurons"),
            experts=by_layer("experts"),
            modules=torch.stack(by_layer("modules"), 1),
            rest=by_parts("rest"),
            bias=by_parts("bias"),
            balances=by_parts("balance"),
            has={parts: [parts in parts_of(self.bound.layers[layer]) for layer in layers] for parts in get_args(Parts)},
        )
