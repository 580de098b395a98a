"""A model as the decomposition sees it: layers, projections and norms in one shape, whatever the family."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import weights


@dataclass(frozen=True)
class Norm:
    """A norm as the decomposition sees it: ``γ``, ``β`` and the frozen scale of a captured input."""

    module: Any  # its attributes are the family's
    kind: str

    def gamma(self, dtype: torch.dtype) -> Tensor:  # [D]
        """The weight that multiplies the normed vector."""
        weight = weights.dense(self.module)
        assert weight is not None
        weight = weight.to(dtype)
        return weight + 1 if self.kind == "rms_plus_one" else weight

    def beta(self) -> Tensor | None:  # [D]
        """The bias, which belongs to the bias source."""
        return weights.dense(self.module, "bias")

    def scale(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``1/rms`` or ``1/σ`` of whole vectors ``[..., D]``, in ``dtype``: the frozen ``r`` of equation (2)."""
        x = x.to(dtype)
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        epsilon: float = self.module.eps if hasattr(self.module, "eps") else self.module.variance_epsilon
        return torch.rsqrt(x.square().mean(-1) + epsilon)

    def of_parts(self, parts: Tensor, scale: Tensor) -> Tensor:
        """Parts ``[..., D]`` of vectors, normed with the frozen ``scale`` ``[..., 1]`` of the whole; ``β`` is in none."""
        parts = parts - parts.mean(-1, keepdim=True) if self.kind == "layer" else parts
        return parts * scale * self.gamma(parts.dtype).to(parts.device)

    def fold(self, weight: Tensor) -> Tensor:
        """``W`` such that ``W x = weight · γ ⊙ centre(x)``, for weights ``[out, D]``: a norm without a pass over x."""
        weight = weight * self.gamma(weight.dtype)
        return weight - weight.mean(1, keepdim=True) if self.kind == "layer" else weight


def into_stream(weight: Tensor, post_norm: Norm | None, dtype: torch.dtype) -> Tensor:
    """A projection's weight ``[D, in]`` in ``dtype`` with the ``γ`` of the norm on its output, whose scale is left out."""
    weight = weight.to(dtype)
    return weight if post_norm is None else weight * post_norm.gamma(dtype)[:, None]


@dataclass(frozen=True)
class Projection:
    """Some output rows of a linear layer, as ``[out, in]``."""

    module: Any
    rows: str = "all"
    num_heads: int = 1

    @property
    def weight(self) -> Tensor:
        """``[out, in]`` where its layer works: a view of the model's own or, offloaded or quantised, a copy of one's own."""
        weight = weights.dense(self.module)
        assert weight is not None
        return self._select(self._turned(weight))

    @property
    def shape(self) -> torch.Size:
        """``[out, in]``; the weight is not read."""
        module = self.module
        if not weights.is_packed(module):
            return self._select(self._turned(module.weight)).shape
        return self._select(torch.empty(module.out_features, module.in_features, device="meta")).shape

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, or None."""
        bias = weights.dense(self.module, "bias")
        return None if bias is None else self._select(bias)

    def _turned(self, weight: Tensor) -> Tensor:
        # transformers' Conv1D keeps [in, out]; nn.Linear and its likes keep [out, in]
        return weight.T if type(self.module).__name__ == "Conv1D" else weight

    def select_output(self, output: Tensor) -> Tensor:
        """The projection's part ``[P, out]`` of the module's own output ``[P, all]``."""
        return self._select(output.T).T

    def _select(self, rows: Tensor) -> Tensor:
        if self.rows == "first_half":
            return rows[: len(rows) // 2]
        if self.rows == "last_of_head":
            return rows.reshape(self.num_heads, 3, -1, *rows.shape[1:])[:, 2].flatten(0, 1)
        if self.rows.startswith("last:"):
            return rows[-int(self.rows[5:]) :]
        return rows


@dataclass(frozen=True)
class Layer:
    """One layer's modules, and what of them a decomposition reads."""

    module: nn.Module
    attention: nn.Module
    value: Projection
    output: Projection
    gate: Projection
    down: Projection
    attention_norm: Norm | None
    mlp_norm: Norm | None
    attention_post_norm: Norm | None
    mlp_post_norm: Norm | None

    @property
    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        """What of its weights a decomposition multiplies by."""
        return self.value, self.output, self.gate, self.down

    @property
    def device(self) -> torch.device:
        """Where it works."""
        return weights.device_of(self.down.module)

    def has_bias(self) -> bool:
        """Whether anything in this layer adds to the stream without reading it."""
        norms = (norm for norm in (self.attention_norm, self.mlp_norm) if norm is not None)
        return any(p.bias is not None for p in self.projections) or any(norm.beta() is not None for norm in norms)


@dataclass(frozen=True)
class BoundModel:
    """A model with its family's paths resolved."""

    model: Any
    name: str
    backbone: Any
    layers: tuple[Layer, ...]
    final_norm: Norm
    num_heads: int
    parallel: bool
    has_bias: bool
    max_positions: int | None
    configs: tuple[Any, ...] = field(repr=False)
    stream_to: torch.device | None = None  # where the layers work whose weights stay elsewhere

    @property
    def widest_layer(self) -> Layer:
        """The layer with the most neurons: blocks that hold its gates hold every layer's."""
        return max(self.layers, key=lambda layer: layer.gate.shape[0])

    @property
    def head(self) -> Any:
        """The unembedding, looked up anew: it is another module after ``resize_token_embeddings``."""
        return self.model.get_output_embeddings()

    @property
    def unembedding(self) -> Projection:
        """The head's weight and bias."""
        return Projection(self.head)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's output ``[..., V]`` for vectors ``[..., D]`` after the final norm, wherever they lie."""
        made: Tensor = self.head(hidden.to(weights.device_of(self.head)))
        return made

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the head scores."""
        return self.unembedding.shape[0]

    @property
    def hidden_size(self) -> int:
        """``D``, of the residual stream."""
        return self.unembedding.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights or, where they are quantised, of its residual stream."""
        module = self.layers[0].value.module
        weight: Tensor = (self.model.get_input_embeddings() if weights.is_packed(module) else module).weight
        return weight.dtype

    @property
    def is_quantized(self) -> bool:
        """Whether any layer's weights are."""
        return any(weights.is_packed(projection.module) for layer in self.layers for projection in layer.projections)

    @property
    def device(self) -> torch.device:
        """Where the last layer works."""
        return self.stream_to or self.layers[-1].device

    @property
    def devices(self) -> list[torch.device]:
        """Where any layer works."""
        return [self.stream_to] if self.stream_to else list(dict.fromkeys(layer.device for layer in self.layers))

    @property
    def input_device(self) -> torch.device:
        """Where the tokens' ids go in."""
        return weights.device_of(self.model.get_input_embeddings())

    @property
    def product_dtype(self) -> torch.dtype:
        """That of the decomposition's matrix products: the weights', or fp32 on a CPU that would only emulate theirs."""
        return self.product_dtype_on(self.device)

    def product_dtype_on(self, device: torch.device) -> torch.dtype:
        """What :attr:`product_dtype` is where the model lies on ``device``."""
        return torch.float32 if device.type == "cpu" and not multiplies_on_cpu(self.dtype) else self.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """What the state accumulates in: fp32, or fp64 for fp64 models."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def tolerance(self) -> float:
        """By how much, of their size, sums of parts may miss what they are parts of.

        Of quantised models whose kernels round the activations to 8 bits as much as of bf16, which keeps as many.
        """
        modules = [part.module for layer in self.layers for part in layer.projections]
        if any(weights.rounds_inputs(module) for module in modules):
            return 5e-2
        dtypes = {self.dtype, *(getattr(module, "compute_dtype", None) or self.dtype for module in modules)}
        return max({torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2}.get(dtype, 5e-2) for dtype in dtypes)


@cache
def multiplies_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of ``dtype``; without them fp32 is several times as fast."""
    instructions = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }.get(dtype)
    if instructions is None or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return any(getattr(torch.cpu, name, lambda: False)() for name in instructions)
