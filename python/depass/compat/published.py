"""Reproduces the published implementation's numbers, quirks included, to compare with older results.

It computes the method densely, on states ``[M, N, D]``, and differs from the method where the published code does:

1. In every mode, the pre-activation of source 0 at position 0 is set to 1 before sharing.
2. In every mode, pre-activations of the last source below 1e-5 in absolute value become 0. A source with an exact zero gets
   no share; where all sources are zero, the last one takes all. Token mode appends a row with the remainder of the residual
   stream, and drops it at the end.
3. Biases are dropped. With Qwen2's value bias the parts do not add up. A whole module's output still contains its bias.
4. For neurons, row 0 is the residual stream *before* the MLP minus the neurons.
5. ``compute_num`` and ``single_compute_token`` share within blocks of sources, which changes the result.
6. ``relu`` loses neurons where every source is negative. ``linear`` overflows, and gives nothing where two or more sources
   share.

:mod:`depass.compat.official` gives the exact results behind the same interface.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError
from ..models.bound import BoundModel, Layer, Mixer, Norm, Projection
from ..models.capture import Capture
from ..models.trace import Trace

_THRESHOLD = 1e-5  # smaller pre-activations of the last source become zero


@dataclass(frozen=True)
class _Frozen:
    """The frozen values of one layer of the real run, in the state's dtype and on the layer's device."""

    layer: Layer
    stream: Tensor  # [N, D], before attention
    pattern: Tensor  # [H, N, N]
    attention_scale: Tensor  # [N]
    mlp_scale: Tensor  # [N]
    hidden: Tensor  # [N, F]
    gate_total: Tensor | None  # [N, F], for the taylor rule

    @property
    def mixer(self) -> Mixer:
        """The layer's attention."""
        return self.layer.mixers[0]


class _Freezing(Capture):
    """A run of the model that keeps each layer's frozen values, in ``dtype`` and on the layer's device."""

    def __init__(
        self, bound: BoundModel, ids: Sequence[int], layers: range, with_gate_total: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(bound, [ids], layers, with_gate_total)
        self.dtype, self.layers_frozen = dtype, list[_Frozen]()

    def layer(self, index: int, trace: Trace) -> None:
        layer = self.bound.layers[index]
        device, dtype = layer.device, self.dtype
        own = trace.map(lambda tensor: tensor.to(device, dtype, copy=True))
        pattern = own.mixers[0].pattern
        assert pattern is not None
        assert own.hidden is not None
        scales = own.scales["attention_norm"], own.scales["mlp_norm"]
        self.layers_frozen.append(_Frozen(layer, own.stream, pattern[0], *scales, own.hidden, own.gate_total))


class Published:
    """The published decomposition of one model. States are ``[M, N, D]``, before the final norm and on the CPU.

    Args:
        bound: the model: RMSNorm before attention and before the MLP, in sequence, as in Llama and Qwen2.
        rule: how a neuron's output is shared among the sources.
        temperature: temperature of the softmax rule.
        exclude_first: whether the first token gets no share in token mode, except at position 0.

    Raises:
        ModelError: the published code cannot decompose this model family.
    """

    def __init__(self, bound: BoundModel, rule: str, temperature: float, exclude_first: bool) -> None:
        _refuse_other_families(bound, "reproduce_published=True", "leave reproduce_published out")
        self.bound, self.rule, self.temperature, self.exclude_first = bound, rule, temperature, exclude_first
        self.dtype = bound.state_dtype

    @torch.no_grad()
    def token_states(
        self, ids: Sequence[int], layers: range, keep_all: bool = False, single_compute_token: int | None = None
    ) -> list[Tensor]:
        """The states with each token as a source (``M = N``), after the last of ``layers``; with ``keep_all`` at each one.

        Args:
            ids: ``N`` token ids.
            layers: a range of layers. The residual stream entering the first is decomposed.
            keep_all: also keep the states that enter each layer.
            single_compute_token: tokens per block (quirk 5). Later blocks begin with token 0. The tokens outside of a
                block form its remainder.
        """
        frozen, _ = self._freeze(ids, layers)
        stream, n = frozen[0].stream, len(ids)
        tokens = torch.eye(n).to(stream)[:, :, None] * stream  # [N, N, D]
        blocks = []
        for first in range(0, n, single_compute_token or n):
            own = tokens[first : first + (single_compute_token or n)]
            part = own if first == 0 else torch.cat([tokens[:1], own])
            left = stream - part.sum(0)
            states = self._propagate(torch.cat([part, left[None]]), frozen, keep_all, self.exclude_first)
            blocks.append([state[int(first > 0) : -1] for state in states])
        return [torch.cat(parts) for parts in zip(*blocks, strict=True)]

    @torch.no_grad()
    def module_states(self, ids: Sequence[int], layer: int, kind: str) -> Tensor:
        """Sources ``[rest, module]`` for ``kind`` ``attn`` or ``mlp``; ``[rest, head 0 … head H-1]`` for ``attn_head``."""
        frozen, last = self._freeze(ids, range(layer, len(self.bound.layers)))
        first = frozen[0]
        output, middle = _mlp_output(first, frozen[1].stream if len(frozen) > 1 else last)
        if kind == "mlp":
            return self._last(torch.stack([middle, output]), frozen[1:])
        if kind == "attn":
            state = torch.stack([first.stream, middle - first.stream])
        else:
            mixed = self._mix(first.stream[None], first)[0]  # [N, H, d]
            weight = first.mixer.output.weight.to(self.dtype)  # [D, H·d]
            heads = torch.einsum("qhd,Dhd->hqD", mixed, weight.reshape(len(weight), *mixed.shape[1:]))
            state = torch.cat([first.stream[None], heads])
        return self._last(self._mlp(state, first, False), frozen[1:])

    @torch.no_grad()
    def neuron_states(self, ids: Sequence[int], layer: int, compute_num: int | None = None) -> Tensor:
        """Sources ``[rest, neuron 0 … neuron F-1]`` of a layer's MLP, in ``compute_num`` blocks of neurons (quirk 5)."""
        frozen, last = self._freeze(ids, range(layer, len(self.bound.layers)))
        own = frozen[0]
        _, middle = _mlp_output(own, frozen[1].stream if len(frozen) > 1 else last)
        weight = own.layer.only_mlp.down.weight.to(self.dtype)  # [D, F]
        width = math.ceil(weight.shape[1] / (compute_num or 1))
        states: list[Tensor] = []
        for first in range(0, weight.shape[1], width):
            hidden, down = own.hidden[:, first : first + width], weight[:, first : first + width]
            neurons = hidden.T[:, :, None] * down.T[:, None]  # [f, N, D]
            state = torch.cat([(middle - hidden @ down.T)[None], neurons])
            states.append(self._last(state, frozen[1:])[int(bool(states)) :])
        return torch.cat(states)

    @torch.no_grad()
    def subspace_states(
        self, ids: Sequence[int], layer: int, parts: Tensor, stream: Tensor, keep_all: bool = False
    ) -> list[Tensor]:
        """The states of given parts ``[M, N, D]`` of the stream after ``layer``: after the last layer, or (``keep_all``)
        after each.
        """
        frozen, last = self._freeze(ids, range(layer, len(self.bound.layers)))
        return list(self._propagate(parts.to(last), frozen[1:], keep_all))

    def _freeze(self, ids: Sequence[int], layers: range) -> tuple[list[_Frozen], Tensor]:
        """Run the model once: the frozen values of each of ``layers``, and the residual stream after the last ``[N, D]``."""
        frozen = _Freezing(self.bound, ids, layers, self.rule == "taylor", self.dtype)
        frozen.run()
        return frozen.layers_frozen, frozen.stream.to(self.dtype)

    def _last(self, state: Tensor, frozen: Sequence[_Frozen]) -> Tensor:
        return self._propagate(state, frozen)[0]

    def _propagate(
        self, state: Tensor, frozen: Sequence[_Frozen], keep_all: bool = False, exclude_first: bool = False
    ) -> deque[Tensor]:
        """The last state, or (``keep_all``) all states, on the CPU."""

        def states() -> Iterator[Tensor]:
            yield state.cpu()
            moving = state
            for frozen_layer in frozen:
                moving = moving.to(frozen_layer.stream.device)
                moving = self._mlp(self._attention(moving, frozen_layer), frozen_layer, exclude_first)
                yield moving.cpu()

        return deque(states(), maxlen=None if keep_all else 1)

    def _attention(self, state: Tensor, frozen: _Frozen) -> Tensor:
        return state + self._mix(state, frozen).flatten(2) @ frozen.mixer.output.weight.to(self.dtype).T

    def _mix(self, state: Tensor, frozen: _Frozen) -> Tensor:
        """Every head's values ``[M, N, H, d]``, mixed by the frozen pattern, without the value bias (quirk 3)."""
        values = _read(state, frozen.attention_scale, frozen.mixer.value, frozen.layer.attention_norm)  # [M, N, K·d]
        width = frozen.mixer.output.shape[1] // frozen.mixer.num_heads
        values = values.view(*state.shape[:2], -1, width)  # [M, N, K, d]
        values = values.repeat_interleave(frozen.mixer.num_heads // values.shape[2], dim=2)
        return torch.einsum("hqk,mkhd->mqhd", frozen.pattern, values)

    def _mlp(self, state: Tensor, frozen: _Frozen, exclude_first: bool) -> Tensor:
        gate = _read(state, frozen.mlp_scale, frozen.layer.only_mlp.gate, frozen.layer.mlp_norm)  # [M, N, F]
        if frozen.gate_total is not None:
            share = torch.where(frozen.gate_total == 0, 0, gate / frozen.gate_total)
        else:
            if exclude_first:
                gate[0] = 0
            self._replace_first(gate)
            gate[-1][gate[-1].abs() < _THRESHOLD] = 0  # quirk 2
            gate[-1][(gate == 0).all(0)] = 1
            share = _share(gate, self.rule, self.temperature)
        return state + (share * frozen.hidden) @ frozen.layer.only_mlp.down.weight.to(self.dtype).T

    def _replace_first(self, gate: Tensor) -> None:
        """Quirk 1, in a method of its own because ``benchmarks/published_quirk.py`` measures its effect."""
        gate[0, 0] = 1


def _read(state: Tensor, scale: Tensor, projection: Projection, norm: Norm | None) -> Tensor:
    """A projection of the normed sources ``[M, N, out]``, without its bias (quirk 3)."""
    weight = projection.weight.to(state.dtype)
    return (state * scale[:, None]) @ (weight if norm is None else norm.fold(weight)).T


def _mlp_output(frozen: _Frozen, after: Tensor) -> tuple[Tensor, Tensor]:
    """The MLP's output ``[N, D]``, and the residual stream before the MLP, from the stream after it."""
    down = frozen.layer.only_mlp.down
    output = frozen.hidden @ down.weight.to(frozen.hidden.dtype).T
    if down.bias is not None:
        output = output + down.bias
    return output, after.to(output.device) - output


def _share(gate: Tensor, rule: str, temperature: float) -> Tensor:
    """The shares ``[M, N, F]``. A source whose pre-activation is exactly zero gets none."""
    active = gate != 0
    if rule == "relu":
        positive = gate.relu()
        return positive / (positive.sum(0) + 1e-6)
    if rule == "linear":
        return (active & (active.sum(0) == 1)).to(gate)
    gate = gate.masked_fill(~active, -math.inf)
    if rule == "max":
        return torch.zeros_like(gate).scatter_(0, gate.argmax(0, keepdim=True), 1)
    return torch.softmax(gate / temperature, dim=0)


def _scales_mixes(mixer: Mixer) -> bool:
    return any(part is not None for part in (mixer.mix_gate, mixer.mix_norm, mixer.sinks))


def _refuse_other_families(bound: BoundModel, asked: str, instead: str) -> None:
    mixers = [mixer for layer in bound.layers for mixer in layer.mixers]
    reasons = [
        (bound.final_norm.is_centred, "LayerNorm"),
        (any(not layer.mixers or not layer.has_mlp for layer in bound.layers), "layers with one sublayer"),
        (any(layer.late is not None or layer.scalar_path is not None for layer in bound.layers), "more behind the MLP"),
        (any(mixer.value_norm is not None for mixer in mixers), "norms on values"),
        (bool(bound.lending), "layers that share values"),
        (
            any(part.is_scaled for layer in bound.layers for part in layer.projections),
            "a factor on what a sublayer adds",
        ),
        ((bound.logit_factor, bound.logit_divisor) != (1, 1), "a factor on logits"),
        (bound.has_experts, "routed experts"),
        (bound.has_recurrence, "linear attention"),
        (any(mixer.latent is not None for mixer in mixers), "values projected from a latent vector"),
        (any(_scales_mixes(mixer) for mixer in mixers), "a gate, a norm or sinks on what the heads mix"),
        (bound.parallel, "attention and MLP in parallel"),
        (any(layer.attention_post_norm or layer.mlp_post_norm for layer in bound.layers), "post-norms"),
        (any(not (layer.attention_norm and layer.mlp_norm) for layer in bound.layers), "sublayers without a pre-norm"),
    ]
    unsupported = [reason for refused, reason in reasons if refused]
    if unsupported:
        raise ModelError(
            f"{asked}: {bound.name} has {' and '.join(unsupported)}, which the published code does not support (it supports "
            f"models like Llama and Qwen2); {instead}"
        )
