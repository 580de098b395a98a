"""Linear probes of the residual stream, and the residual streams that they read (paper, sections 4.1.2 and 4.3)."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..api import DePass
from ..errors import DataError, DePassError, NonFiniteError
from ..inputs.prompt import Prompt, encode
from ..models import attention, packing
from ..models.health import blame, refuse_dropout
from ..models.positions import fresh
from . import data, forward


@dataclass(frozen=True)
class Probe:
    """A logistic regression on the raw residual stream that enters a layer.

    Attributes:
        layer: counted from 0.
        weight: ``[C, D]`` fp32, one row per class. With two classes there is a single row, and it points to class 1.
        intercept: ``[C]`` fp32.
    """

    layer: int
    weight: Tensor
    intercept: Tensor

    def logits(self, stream: Tensor) -> Tensor:
        """Logits ``[P, C]`` of streams ``[P, D]``."""
        return stream @ self.weight.T + self.intercept

    def accuracy(self, stream: Tensor, labels: Sequence[int]) -> float:
        """The share of streams ``[P, D]`` that it classifies correctly."""
        logits = self.logits(stream)
        classes = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
        return float((classes == torch.as_tensor(labels)).double().mean())


def fit(layer: int, stream: Tensor, labels: Sequence[int], seed: int) -> Probe:
    """Fit a probe as published: scikit-learn's logistic regression with the solver saga, at most 1000 iterations.

    The published learning rate of 0.01 does not apply, because saga chooses its own steps. Saga needs features of similar
    size, which a residual stream does not have. So each feature is scaled to unit variance, and the scales are folded into
    the weights: the probe reads the raw stream. The tolerance is 0.01. With scikit-learn's default, saga runs to its last
    iteration, which takes ten times as long and is no better on held-out data.

    Args:
        layer: the layer that the streams enter.
        stream: ``[P, D]``.
        labels: ``[P]`` classes, counted from 0; at least two different ones.
        seed: seed of saga's random order.

    Raises:
        DePassError: scikit-learn is not installed.
    """
    scaler = sklearn("preprocessing").StandardScaler()
    scaled = scaler.fit_transform(stream.numpy())
    model = sklearn("linear_model").LogisticRegression(solver="saga", max_iter=1000, tol=1e-2, random_state=seed)
    model.fit(scaled, labels)
    weight = torch.from_numpy(model.coef_ / scaler.scale_).double()  # [C, D]
    intercept = torch.from_numpy(model.intercept_).double() - weight @ torch.from_numpy(scaler.mean_)
    return Probe(layer, weight.float(), intercept.float())


def sklearn(module: str) -> Any:
    """Import a module of scikit-learn.

    Raises:
        DePassError: scikit-learn is not installed.
    """
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise DePassError("this evaluation needs scikit-learn: pip install 'depass-kernels[evaluate]'") from error


def labelled(dp: DePass, path: str, classes: int) -> tuple[list[Prompt], list[int]]:
    """Encoded texts and their classes, from a file whose rows have ``text`` and ``label``.

    Raises:
        DataError: the file cannot be read, a row is invalid (it is not skipped, because that would change the probe), or
            a class has no row.
    """
    texts, labels = [], []
    for item in data.read(path):
        text, label = item.data.get("text"), item.data.get("label")
        if not isinstance(text, str) or not text or type(label) is not int or not 0 <= label < classes:
            raise DataError(
                f"{path}, row {item.id}: expected a text and a label from 0 to {classes - 1}, got {item.data}"
            )
        texts.append(encode(text, dp.tokenizer, dp.bound))
        labels.append(label)
    missing = set(range(classes)) - set(labels)
    if missing:
        raise DataError(f"{path} has no row of label {min(missing)}; a probe needs every label from 0 to {classes - 1}")
    return texts, labels


@torch.no_grad()
def streams(
    dp: DePass, prompts: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], layers: Sequence[int]
) -> Tensor:
    """The residual stream that enters the given layers, at the given positions, from plain forward passes.

    Args:
        dp: the model.
        prompts: token ids.
        positions: the positions of each prompt, counted from 0.
        layers: layers, counted from 0, below the number of layers.

    Returns:
        ``[layers, P, D]`` fp32 on the CPU, with the positions of all prompts one after the other.

    Raises:
        NonFiniteError: the stream is not finite.
    """
    bound = dp.bound
    refuse_dropout(bound)
    begins = [0, *itertools.accumulate(map(len, positions))]
    residual = torch.empty(len(layers), begins[-1], bound.hidden_size)
    for batch in forward.batches(dp, prompts):
        ids = packing.padded([prompts[i] for i in batch]).to(bound.input_device)
        with attention.running, fresh(bound.backbone, bound.switches):
            states = bound.backbone(
                input_ids=ids, use_cache=False, output_hidden_states=True, return_dict=True
            ).hidden_states
        for row, i in enumerate(batch):
            for at, layer in enumerate(layers):
                residual[at, begins[i] : begins[i + 1]] = states[layer][row, list(positions[i])].float().cpu()
    if not bool(residual.isfinite().all()):
        raise NonFiniteError(f"the model's residual stream is not finite; {blame(bound)}")
    return residual
