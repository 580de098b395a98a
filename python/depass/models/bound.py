"""A model in the form that the decomposition uses: layers, projections and norms, the same for every family."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from . import weights
from .experts import Experts
from .families import Family, NormKind, Origin
from .positions import Switch
from .recurrences import Recurrence


@dataclass(frozen=True)
class Norm:
    """A norm: its weight ``γ``, its bias ``β``, and the frozen scale ``r`` of a captured input."""

    module: Any  # its attributes depend on the family
    kind: NormKind
    epsilon: float | None = None  # where the module holds none

    @property
    def is_centred(self) -> bool:
        """Whether the norm subtracts the mean: a LayerNorm does, an RMSNorm does not."""
        return self.kind in ("layer", "layer_plus_one")

    def gamma(self, dtype: torch.dtype | None = None) -> Tensor | None:  # [D]
        """The weight ``γ`` that multiplies the normalised vector, ``[D]``; without a dtype in one that holds it exactly.

        None for a norm without a weight.
        """
        weight = weights.dense(self.module)
        if weight is None:
            return None
        if self.kind in ("rms_plus_one", "layer_plus_one"):
            return weight.to(dtype or torch.promote_types(weight.dtype, torch.float32)) + 1
        return weight if dtype is None else weight.to(dtype)

    def weighted(self, x: Tensor) -> Tensor:
        """``γ ⊙ x`` for vectors ``[..., D]``; ``x`` itself for a norm without a weight."""
        gamma = self.gamma(x.dtype)
        return x if gamma is None else x * gamma.to(x.device)

    def beta(self) -> Tensor | None:  # [D]
        """The bias ``β`` ``[D]``, which belongs to the bias source, or None."""
        return weights.dense(self.module, "bias")

    def scale(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The frozen scale ``r`` ``[...]``: ``1/rms`` or ``1/σ`` of vectors ``[..., D]`` (docs/method.md, equation 2)."""
        epsilon = epsilon_of(self.module, self.epsilon)
        assert epsilon is not None
        if self.is_centred:
            return torch.rsqrt(x.to(dtype).var(-1, correction=0) + epsilon)
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
        return torch.rsqrt(norm * norm / x.shape[-1] + epsilon)

    def of_parts(self, parts: Tensor, scale: Tensor) -> Tensor:
        """Normalise parts ``[..., D]`` with the frozen ``scale`` ``[..., 1]`` of the whole vector; ``β`` is not added."""
        parts = parts - parts.mean(-1, keepdim=True) if self.is_centred else parts
        return self.weighted(parts * scale)

    def fold(self, weight: Tensor) -> Tensor:
        """Fold the norm into a weight ``[out, D]``: returns ``W`` with ``W x = weight · γ ⊙ centre(x)``."""
        weight = self.weighted(weight)
        return weight - weight.mean(1, keepdim=True) if self.is_centred else weight


def epsilon_of(module: Any, declared: float | None) -> float | None:
    """The epsilon of a norm: the one that its module holds or, where it holds none, the declared one."""
    epsilon: float | None = getattr(module, "eps", getattr(module, "variance_epsilon", declared))
    return epsilon


def into_stream(weight: Tensor, post_norm: Norm | None, dtype: torch.dtype) -> Tensor:
    """A projection's weight ``[D, in]`` in ``dtype``, times the ``γ`` of the norm on its output; the scale is left out."""
    weight = weight.to(dtype)
    return weight if post_norm is None else post_norm.weighted(weight.T).T


@dataclass(frozen=True)
class Projection:
    """A linear layer, or some of its output rows, with weight ``[out, in]``.

    A ``factor`` by which the model multiplies its output is part of the weight and of the bias. An ``input_factor`` by
    which it multiplies what the module reads is part of the weight.
    """

    module: Any
    rows: str = "all"
    num_heads: int = 1
    factor: float = 1.0
    input_factor: float = 1.0

    @property
    def weight(self) -> Tensor:
        """The weight ``[out, in]`` on its layer's device: a view of the model's or, if offloaded or quantised, a copy.

        With a factor it is a copy in at least fp32.
        """
        weight = weights.dense(self.module)
        assert weight is not None
        return _multiplied(self._select(self._turned(weight)), self.factor * self.input_factor)

    @property
    def is_scaled(self) -> bool:
        """Whether a factor makes the weight a copy."""
        return self.factor * self.input_factor != 1

    @property
    def shape(self) -> torch.Size:
        """The shape ``[out, in]``; the weight is not read."""
        module = self.module
        if not weights.is_packed(module):
            return self._select(self._turned(module.weight)).shape
        return self._select(torch.empty(module.out_features, module.in_features, device="meta")).shape

    @property
    def bias(self) -> Tensor | None:
        """The bias ``[out]``, or None."""
        bias = weights.dense(self.module, "bias")
        return None if bias is None else _multiplied(self._select(bias), self.factor)

    def _turned(self, weight: Tensor) -> Tensor:
        # transformers' Conv1D stores [in, out]; nn.Linear stores [out, in]
        return weight.T if type(self.module).__name__ == "Conv1D" else weight

    def select_output(self, output: Tensor) -> Tensor:
        """The projection's output ``[P, out]``, from the module's ``[P, all]``."""
        return _multiplied(self._select(output.T).T, self.factor)

    def _select(self, rows: Tensor) -> Tensor:
        if self.rows == "first_half":
            return rows[: len(rows) // 2]
        if self.rows == "middle_of_four":
            return rows.reshape(4, 3, -1, *rows.shape[1:])[:, 1].flatten(0, 1)
        if self.rows == "last_of_head":
            return rows.reshape(self.num_heads, 3, -1, *rows.shape[1:])[:, 2].flatten(0, 1)
        if self.rows == "second_of_head":
            return rows.reshape(self.num_heads, 2, -1, *rows.shape[1:])[:, 1].flatten(0, 1)
        if self.rows.startswith("end_of_head:"):
            by_head = rows.reshape(self.num_heads, -1, *rows.shape[1:])
            return by_head[:, -int(self.rows[12:]) :].flatten(0, 1)
        if self.rows.startswith("within:"):
            begin, end = map(int, self.rows[7:].split(":"))
            return rows.reshape(self.num_heads, -1, *rows.shape[1:])[:, begin:end].flatten(0, 1)
        if self.rows.startswith("first:"):
            return rows[: int(self.rows[6:])]
        if self.rows.startswith("last:"):
            return rows[-int(self.rows[5:]) :]
        return rows


def _multiplied(rows: Tensor, factor: float) -> Tensor:
    return rows if factor == 1 else rows.to(torch.promote_types(rows.dtype, torch.float32)) * factor


@dataclass(frozen=True)
class Mixer:
    """What moves values between positions: an attention, or a recurrence whose output is linear in its values.

    Attributes:
        module: the module that calls the attention function or holds the recurrence.
        num_heads: the number of heads.
        value: the value projection. Where there is a ``latent`` projection, it reads that one's output after
            ``latent_norm``.
        output: the output projection.
        mix_gate, mix_norm: the gate and the norm on what the heads mix, or None.
        value_norm: the norm on each head's values, or None.
        values_of: the layer whose keys and values the attention takes; ``value`` is then the projection of that layer. None
            where it has its own.
        sinks: ``[H]``, the attention sinks that scale what the heads mix, or None.
        recurrence: the recurrence; None for an attention.
    """

    module: nn.Module
    num_heads: int
    value: Projection
    output: Projection
    latent: Projection | None = None
    latent_norm: Norm | None = None
    mix_gate: Projection | None = None
    mix_norm: Norm | None = None
    value_norm: Norm | None = None
    values_of: int | None = None
    sinks: Any = None
    recurrence: Recurrence | None = None

    @cached_property
    def projections(self) -> tuple[Projection, ...]:
        """The linear layers that the decomposition uses."""
        value = (self.value,) if self.values_of is None else ()
        return (*(() if self.latent is None else (self.latent,)), *value, self.output)

    def has_bias(self) -> bool:
        """Whether the values or the output have a bias."""
        of_norm = self.latent_norm is not None and self.latent_norm.beta() is not None
        of_taps = self.recurrence is not None and self.recurrence.has_bias
        return of_norm or of_taps or any(projection.bias is not None for projection in self.projections)


@dataclass(frozen=True)
class MLP:
    """An MLP that every position goes through: a layer's only one, or the one beside its experts.

    Attributes:
        gate: the projection that computes the pre-activations.
        down: the down projection.
        weight: the module the sigmoid of whose output ``[P, 1]`` multiplies the MLP's output, or None.
    """

    gate: Projection
    down: Projection
    weight: Any = None


@dataclass(frozen=True)
class Layer:
    """The modules, projections and norms of one layer: mixers that add to the stream, and then MLP or experts.

    A layer has one mixer, or two side by side whose outputs add; or none. It has an :class:`MLP`, experts, or both; or
    none. What it does not have adds nothing. ``late`` is a branch behind the MLP, which reads the stream after it.
    """

    module: nn.Module
    mixers: tuple[Mixer, ...]
    mlp: MLP | None
    experts: Experts | None
    attention_norm: Norm | None
    mlp_norm: Norm | None
    attention_post_norm: Norm | None
    mlp_post_norm: Norm | None
    experts_norm: Norm | None = None
    experts_post_norm: Norm | None = None
    shared_post_norm: Norm | None = None
    late: MLP | None = None
    late_post_norm: Norm | None = None
    scalar_path: str | None = None
    held: dict[str, nn.Module] = field(default_factory=dict, repr=False, compare=False)  # by path, all that was found

    @cached_property
    def projections(self) -> tuple[Projection, ...]:
        """The linear layers that the decomposition uses; experts are no linear layers."""
        of_mixers = [projection for mixer in self.mixers for projection in mixer.projections]
        mlps = [each for mlp in (self.mlp, self.late) if mlp is not None for each in (mlp.gate, mlp.down)]
        return (*of_mixers, *mlps)

    @cached_property
    def num_heads(self) -> int:
        """The number of heads of all mixers."""
        return sum(mixer.num_heads for mixer in self.mixers)

    @cached_property
    def heads(self) -> tuple[tuple[Mixer, slice], ...]:
        """The mixers, each with its heads among all of the layer's."""
        ends = list(itertools.accumulate((mixer.num_heads for mixer in self.mixers), initial=0))
        return tuple((mixer, slice(*ends[number : number + 2])) for number, mixer in enumerate(self.mixers))

    @cached_property
    def attention(self) -> Mixer | None:
        """The mixer that is an attention, or None."""
        return next((mixer for mixer in self.mixers if mixer.recurrence is None), None)

    @cached_property
    def recurrence(self) -> Recurrence | None:
        """The recurrence of one of the mixers, or None."""
        return next((mixer.recurrence for mixer in self.mixers if mixer.recurrence is not None), None)

    @cached_property
    def values_of(self) -> int | None:
        """The layer whose keys and values this one's attention takes, or None."""
        return None if self.attention is None else self.attention.values_of

    @property
    def values(self) -> int:
        """The numbers of all mixers' values at a position."""
        return sum(mixer.value.shape[0] for mixer in self.mixers)

    @property
    def mixed(self) -> int:
        """The numbers that all mixers' output projections read at a position."""
        return sum(mixer.output.shape[1] for mixer in self.mixers)

    @cached_property
    def has_mlp(self) -> bool:
        """Whether the layer has an MLP or experts."""
        return self.mlp is not None or self.experts is not None

    @cached_property
    def read_by_experts(self) -> Norm | None:
        """The norm on the experts' input."""
        return self.mlp_norm if self.experts_norm is None else self.experts_norm

    @property
    def scalar(self) -> Tensor | None:
        """The number, as a tensor, that multiplies the residual stream at the layer's end, or None."""
        if self.scalar_path is None:
            return None
        path, _, name = self.scalar_path.rpartition(".")
        return weights.dense(self.module.get_submodule(path), name)

    @property
    def only_mlp(self) -> MLP:
        """The MLP of a layer without experts."""
        assert self.mlp is not None
        assert self.experts is None
        return self.mlp

    @property
    def neurons(self) -> int:
        """The number of neurons that a position has in this layer: the MLP's, and those of the experts that it chooses."""
        of_experts = 0 if self.experts is None else self.experts.chosen * self.experts.neurons
        return of_experts + (0 if self.mlp is None else self.mlp.gate.shape[0])

    @property
    def idle_numbers(self) -> int:
        """The number of weights that a position does not use: those of the experts that it does not choose."""
        if self.experts is None:
            return 0
        held, count = sum(tensor.numel() for tensor in self.experts.tensors.values()), self.experts.count
        return held // count * max(0, count - self.experts.chosen)

    @property
    def device(self) -> torch.device:
        """The device that the layer runs on."""
        held = [projection.module for projection in self.projections]
        return weights.device_of((held or [self.experts and self.experts.module])[-1])

    def has_bias(self) -> bool:
        """Whether the layer has a bias, which adds to the residual stream independently of the prompt."""
        read = (self.attention_norm, self.mlp_norm, self.experts_norm)
        norms = (norm for norm in read if norm is not None)
        of_experts = self.experts is not None and self.experts.has_bias
        mlps = [mlp for mlp in (self.mlp, self.late) if mlp is not None]
        of_mlp = any(part.bias is not None for mlp in mlps for part in (mlp.gate, mlp.down))
        of_mixers = any(mixer.has_bias() for mixer in self.mixers)
        return of_experts or of_mlp or of_mixers or any(n.beta() is not None for n in norms)


@dataclass(frozen=True)
class BoundModel:
    """A model with the paths of its family resolved.

    ``checked`` are the layers that :mod:`depass.models.check` has compared with the family. ``origin`` says where the family
    comes from: the list, a trial pass, or the caller.
    """

    model: Any
    family: Family
    origin: Origin
    name: str
    backbone: Any
    layers: tuple[Layer, ...]
    final_norm: Norm
    parallel: bool
    has_bias: bool
    logit_factor: float  # what the model multiplies the head's output by
    logit_divisor: float  # what it divides it by
    logit_cap: float | None  # the soft cap on the logits, after the factor and divisor
    max_positions: int | None
    switches: tuple[Switch, ...]
    takes_positions: bool  # whether prompts of different lengths can share a pass without padding
    is_wrapped: bool  # whether the layers are those of a text decoder inside the model
    placeholders: dict[int, str]  # ids that stand for an image, a video or a sound
    configs: tuple[Any, ...] = field(repr=False)
    forwards: dict[type, Any] = field(repr=False)  # of the modules' classes, when DePass was made
    checked: set[int] = field(default_factory=set, repr=False, compare=False)
    stream_to: torch.device | None = None  # the device that layers run on while their weights stay in host memory

    def regime(self, length: int) -> tuple[Hashable, ...]:
        """What passes of ``length`` positions must have in common to have the same position encoding."""
        return tuple(switch.regime(length) for switch in self.switches)

    @property
    def widest_layer(self) -> Layer:
        """The layer in which a position has the most neurons, which determines the size of the MLP's blocks."""
        return max(self.layers, key=lambda layer: layer.neurons)

    @cached_property
    def most_heads(self) -> int:
        """The number of heads of the layer that has most."""
        return max(layer.num_heads for layer in self.layers)

    @property
    def most_values(self) -> int:
        """The numbers of values at a position in the layer that has most."""
        return max(layer.values for layer in self.layers)

    @property
    def most_mixed(self) -> int:
        """The numbers that output projections read at a position in the layer where they read most."""
        return max(layer.mixed for layer in self.layers)

    @cached_property
    def has_recurrence(self) -> bool:
        """Whether a layer has a recurrence."""
        return any(layer.recurrence is not None for layer in self.layers)

    @cached_property
    def lending(self) -> tuple[int, ...]:
        """The layers whose keys and values later layers take, rising."""
        return tuple(sorted({layer.values_of for layer in self.layers if layer.values_of is not None}))

    @cached_property
    def has_experts(self) -> bool:
        """Whether a layer has routed experts."""
        return bool(self.expert_layers)

    @cached_property
    def expert_layers(self) -> tuple[int, ...]:
        """The numbers of the layers with routed experts."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.experts is not None)

    @property
    def head(self) -> Any:
        """The unembedding module, looked up on every call: ``resize_token_embeddings`` replaces it."""
        return self.model.get_output_embeddings()

    @property
    def unembedding(self) -> Projection:
        """The head's weight and bias."""
        return Projection(self.head)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits ``[..., V]`` for vectors ``[..., D]`` after the final norm, on any device; a soft cap is left out."""
        return self.scaled(self.head(hidden.to(weights.device_of(self.head))))

    def scaled(self, of_head: Tensor) -> Tensor:
        """The head's output, or rows of its weight or bias, times the model's factor on logits."""
        if self.logit_factor != 1:
            of_head = of_head * self.logit_factor
        return of_head if self.logit_divisor == 1 else of_head / self.logit_divisor

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """The model's own log-probabilities ``[..., V]`` of the next token, from its logits before a soft cap."""
        return self.capped(logits).log_softmax(-1)

    def capped(self, logits: Tensor) -> Tensor:
        """Logits after the soft cap of the model's head, if it has one."""
        return logits if self.logit_cap is None else self.logit_cap * torch.tanh(logits / self.logit_cap)

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the head scores."""
        return self.unembedding.shape[0]

    @property
    def hidden_size(self) -> int:
        """The width ``D`` of the residual stream."""
        return self.unembedding.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights or, if they are quantised, of its residual stream."""
        module = next((part.module for layer in self.layers for part in layer.projections), None)
        if module is None or weights.is_packed(module):
            module = self.model.get_input_embeddings()
        weight: Tensor = module.weight
        return weight.dtype

    @property
    def is_quantized(self) -> bool:
        """Whether any layer's weights are quantised."""
        return any(weights.is_packed(projection.module) for layer in self.layers for projection in layer.projections)

    @property
    def device(self) -> torch.device:
        """The device of the last layer."""
        return self.stream_to or self.layers[-1].device

    @property
    def final_device(self) -> torch.device:
        """The device of the final norm; without a weight it runs where the last layer does."""
        module = self.final_norm.module
        return self.device if getattr(module, "weight", None) is None else weights.device_of(module)

    @property
    def devices(self) -> list[torch.device]:
        """The devices of all layers, each once."""
        return [self.stream_to] if self.stream_to else list(dict.fromkeys(layer.device for layer in self.layers))

    @property
    def input_device(self) -> torch.device:
        """The device that token ids must be on."""
        return weights.device_of(self.model.get_input_embeddings())

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the decomposition's matrix products: the model's, or fp32 on a CPU without products in that."""
        return self.product_dtype_on(self.device)

    def product_dtype_on(self, device: torch.device) -> torch.dtype:
        """The :attr:`product_dtype` of this model on ``device``."""
        return torch.float32 if device.type == "cpu" and not multiplies_on_cpu(self.dtype) else self.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the decomposed state: fp32, or fp64 for fp64 models."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def tolerance(self) -> float:
        """The largest conservation error (completeness) without a warning, relative to the size of the scores.

        A quantised model whose kernels round activations to 8 bits has the tolerance of bf16, which has as many bits.
        """
        modules = [part.module for layer in self.layers for part in layer.projections]
        if any(weights.rounds_inputs(module) for module in modules):
            return 5e-2
        dtypes = {self.dtype, *(getattr(module, "compute_dtype", None) or self.dtype for module in modules)}
        return max({torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2}.get(dtype, 5e-2) for dtype in dtypes)


@cache
def multiplies_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in ``dtype``; without them fp32 is several times as fast."""
    instructions = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }.get(dtype)
    if instructions is None or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return any(getattr(torch.cpu, name, lambda: False)() for name in instructions)
