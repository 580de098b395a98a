"""The published implementation's numbers, quirks included: a plain dense engine to compare older results with.

It follows the method on states ``[M, N, D]`` and departs from it where the published code does:

1. In every mode the pre-activation of source 0 at position 0 is replaced by 1 before the sharing.
2. In every mode the last source's pre-activations below 1e-5 in size become 0; exact zeros get no share, and where all
   sources are zero the last one takes all. Token mode appends a row with what is left of the stream, drops it at the end.
3. Biases are dropped: with Qwen2's value bias the parts do not add up. A whole module's output still contains them.
4. Neurons: row 0 is the stream *before* the MLP minus the neurons.
5. ``compute_num`` and ``single_compute_token`` share within blocks of sources, which changes the answer.
6. ``relu`` loses what is negative everywhere; ``linear`` overflows and gives nothing where two or more sources share.

:mod:`depass.compat.official` has the right answers behind the same interface.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError
from ..models.bound import BoundModel, Layer, Norm, Projection
from ..models.capture import Capture
from ..models.trace import Trace

_THRESHOLD = 1e-5  # pre-activations of the last source below it become zero


@dataclass(frozen=True)
class _Frozen:
    """What one layer of the real run freezes, in the state's dtype and on the layer's device."""

    layer: Layer
    stream: Tensor  # [N, D], before attention
    pattern: Tensor  # [H, N, N]
    attention_scale: Tensor  # [N]
    mlp_scale: Tensor  # [N]
    hidden: Tensor  # [N, F]
    gate_total: Tensor | None  # [N, F], for the taylor rule


class _Freezing(Capture):
    """A run of the model that keeps what each layer freezes, in ``dtype`` and on the layer's device."""

    def __init__(
        self, bound: BoundModel, ids: Sequence[int], layers: range, with_gate_total: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(bound, [ids], layers, with_gate_total)
        self.dtype, self.layers_frozen = dtype, list[_Frozen]()

    def layer(self, index: int, trace: Trace) -> None:
        layer = self.bound.layers[index]
        device, dtype = layer.device, self.dtype
        own = trace.map(lambda tensor: tensor.to(device, dtype, copy=True))
        assert own.pattern is not None
        assert own.hidden is not None
        scales = own.scales["attention_norm"], own.scales["mlp_norm"]
        self.layers_frozen.append(_Frozen(layer, own.stream, own.pattern[0], *scales, own.hidden, own.gate_total))


class Published:
    """The published decomposition of one model. States are ``[M, N, D]``, before the final norm and on the CPU.

    Args:
        bound: the model: RMSNorm on the inputs of attention and MLP, one after the other, as in Llama and Qwen2.
        rule: how an MLP's output is shared out.
        temperature: of the softmax rule.
        exclude_first: whether the first token takes no share in token mode (but at position 0).

    Raises:
        ModelError: a family that the published code does not know how to decompose.
    """

    def __init__(self, bound: BoundModel, rule: str, temperature: float, exclude_first: bool) -> None:
        _refuse_other_families(bound)
        self.bound, self.rule, self.temperature, self.exclude_first = bound, rule, temperature, exclude_first
        self.dtype = bound.state_dtype

    @torch.no_grad()
    def token_states(
        self, ids: Sequence[int], layers: range, keep_all: bool = False, single_compute_token: int | None = None
    ) -> list[Tensor]:
        """Every token a source (``M = N``): the states after the last of ``layers`` or, to ``keep_all``, at each of them.

        Args:
            ids: ``N`` token ids.
            layers: a run of layers; the stream entering the first is decomposed.
            keep_all: whether the states that enter each layer are kept, too.
            single_compute_token: tokens in a block (quirk 5). Later blocks begin with token 0, and all other tokens
                are left over.
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
        """``[rest, module]`` for ``kind`` ``attn`` or ``mlp``, ``[rest, head 0 … head H-1]`` for ``attn_head``."""
        frozen, last = self._freeze(ids, range(layer, len(self.bound.layers)))
        here = frozen[0]
        output, middle = _mlp_output(here, frozen[1].stream if len(frozen) > 1 else last)
        if kind == "mlp":
            return self._last(torch.stack([middle, output]), frozen[1:])
        if kind == "attn":
            state = torch.stack([here.stream, middle - here.stream])
        else:
            mixed = self._mix(here.stream[None], here)[0]  # [N, H, d]
            weight = here.layer.output.weight.to(self.dtype)  # [D, H·d]
            heads = torch.einsum("qhd,Dhd->hqD", mixed, weight.reshape(len(weight), *mixed.shape[1:]))
            state = torch.cat([here.stream[None], heads])
        return self._last(self._mlp(state, here, False), frozen[1:])

    @torch.no_grad()
    def neuron_states(self, ids: Sequence[int], layer: int, compute_num: int | None = None) -> Tensor:
        """``[rest, neuron 0 … neuron F-1]`` of a layer's MLP, in ``compute_num`` blocks of neurons (quirk 5)."""
        frozen, last = self._freeze(ids, range(layer, len(self.bound.layers)))
        here = frozen[0]
        _, middle = _mlp_output(here, frozen[1].stream if len(frozen) > 1 else last)
        weight = here.layer.down.weight.to(self.dtype)  # [D, F]
        width = math.ceil(weight.shape[1] / (compute_num or 1))
        states: list[Tensor] = []
        for first in range(0, weight.shape[1], width):
            hidden, down = here.hidden[:, first : first + width], weight[:, first : first + width]
            neurons = hidden.T[:, :, None] * down.T[:, None]  # [f, N, D]
            state = torch.cat([(middle - hidden @ down.T)[None], neurons])
            states.append(self._last(state, frozen[1:])[int(bool(states)) :])
        return torch.cat(states)

    @torch.no_grad()
    def subspace_states(
        self, ids: Sequence[int], layer: int, parts: Tensor, stream: Tensor, keep_all: bool = False
    ) -> list[Tensor]:
        """Given parts ``[M, N, D]`` of the stream after ``layer``: after the last one or, to ``keep_all``, after each."""
        frozen, last = self._freeze(ids, range(layer, len(self.bound.layers)))
        return list(self._propagate(parts.to(last), frozen[1:], keep_all))

    def _freeze(self, ids: Sequence[int], layers: range) -> tuple[list[_Frozen], Tensor]:
        """One run of the model: what each of ``layers`` freezes, and the stream after the last ``[N, D]``."""
        frozen = _Freezing(self.bound, ids, layers, self.rule == "taylor", self.dtype)
        frozen.run()
        return frozen.layers_frozen, frozen.stream.to(self.dtype)

    def _last(self, state: Tensor, frozen: Sequence[_Frozen]) -> Tensor:
        return self._propagate(state, frozen)[0]

    def _propagate(
        self, state: Tensor, frozen: Sequence[_Frozen], keep_all: bool = False, exclude_first: bool = False
    ) -> deque[Tensor]:
        """The last state or all of them, on the CPU."""

        def states() -> Iterator[Tensor]:
            yield state.cpu()
            moving = state
            for here in frozen:
                moving = moving.to(here.stream.device)
                moving = self._mlp(self._attention(moving, here), here, exclude_first)
                yield moving.cpu()

        return deque(states(), maxlen=None if keep_all else 1)

    def _attention(self, state: Tensor, here: _Frozen) -> Tensor:
        return state + self._mix(state, here).flatten(2) @ here.layer.output.weight.to(self.dtype).T

    def _mix(self, state: Tensor, here: _Frozen) -> Tensor:
        """Every head's values ``[M, N, H, d]``, mixed by the frozen pattern and without the value bias (quirk 3)."""
        values = _read(state, here.attention_scale, here.layer.value, here.layer.attention_norm)  # [M, N, K·d]
        width = here.layer.output.shape[1] // self.bound.num_heads
        values = values.view(*state.shape[:2], -1, width)  # [M, N, K, d]
        values = values.repeat_interleave(self.bound.num_heads // values.shape[2], dim=2)
        return torch.einsum("hqk,mkhd->mqhd", here.pattern, values)

    def _mlp(self, state: Tensor, here: _Frozen, exclude_first: bool) -> Tensor:
        gate = _read(state, here.mlp_scale, here.layer.gate, here.layer.mlp_norm)  # [M, N, F]
        if here.gate_total is not None:
            share = torch.where(here.gate_total == 0, 0, gate / here.gate_total)
        else:
            if exclude_first:
                gate[0] = 0
            self._replace_first(gate)
            gate[-1][gate[-1].abs() < _THRESHOLD] = 0  # quirk 2
            gate[-1][(gate == 0).all(0)] = 1
            share = _share(gate, self.rule, self.temperature)
        return state + (share * here.hidden) @ here.layer.down.weight.to(self.dtype).T

    def _replace_first(self, gate: Tensor) -> None:
        """Quirk 1, apart from the others: ``benchmarks/published_quirk.py`` measures what it does."""
        gate[0, 0] = 1


def _read(state: Tensor, scale: Tensor, projection: Projection, norm: Norm | None) -> Tensor:
    """A projection of the normed sources ``[M, N, out]``, without its bias (quirk 3)."""
    weight = projection.weight.to(state.dtype)
    return (state * scale[:, None]) @ (weight if norm is None else norm.fold(weight)).T


def _mlp_output(here: _Frozen, after: Tensor) -> tuple[Tensor, Tensor]:
    """The MLP's output ``[N, D]`` and the stream before it, from the one after it."""
    down = here.layer.down
    output = here.hidden @ down.weight.to(here.hidden.dtype).T
    if down.bias is not None:
        output = output + down.bias
    return output, after.to(output.device) - output


def _share(gate: Tensor, rule: str, temperature: float) -> Tensor:
    """Shares ``[M, N, F]`` of the sources whose pre-activation is not exactly zero."""
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


def _refuse_other_families(bound: BoundModel) -> None:
    reasons = [
        (bound.final_norm.kind == "layer", "LayerNorm"),
        (bound.parallel, "attention and MLP side by side"),
        (any(layer.attention_post_norm or layer.mlp_post_norm for layer in bound.layers), "norms on outputs"),
        (any(not (layer.attention_norm and layer.mlp_norm) for layer in bound.layers), "no norms on inputs"),
    ]
    found = [reason for refused, reason in reasons if refused]
    if found:
        raise ModelError(
            f"reproduce_published=True: {bound.name} has {' and '.join(found)}, which the published code never handled "
            "(it knows models like Llama and Qwen2); leave reproduce_published out"
        )
