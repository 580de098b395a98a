"""Linear attention: recurrences that are linear in their values, once all that steers them is frozen.

A gated delta rule and a state space (Mamba-2) read values one position after the other into a state, and read the state
with queries. With queries, keys, decays and step sizes frozen, the output at position ``t`` is ``Σ_s P[t, s] v[s]``: ``P``
is their attention pattern, lower triangular and without a softmax. Before it, a short convolution over positions and a SiLU
make the values; the SiLU's ``σ`` is frozen like a gate. Behind it stand a norm and a gate, a frozen scale.

Everything is computed here from the input of the module that holds the recurrence. The check of a model's first run
compares what comes out with the input of the output projection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ModelError
from . import weights

HEADS_NUMBERS = 1 << 24  # numbers in the patterns of the heads that are computed together


class Frozen(NamedTuple):
    """What a recurrence freezes, for ``B`` prompts of ``T`` tokens.

    Attributes:
        values: ``[B, T, H·d]``, which the convolution reads.
        pattern: ``[B, H, T, T]``.
        value_scale: ``[B, T, H·d]``, the ``σ`` of the SiLU behind the convolution.
        mix_scale: ``[B, T, H·d]``, of the norm and the gate before the output projection.
        mixed: ``[B, T, H·d]``, the pattern times the values.
    """

    values: Tensor
    pattern: Tensor
    value_scale: Tensor
    mix_scale: Tensor
    mixed: Tensor


@dataclass(frozen=True)
class Recurrence(ABC):
    """A layer's linear attention, in the place of its attention or beside it: the module that holds it."""

    module: Any

    @property
    @abstractmethod
    def heads(self) -> int:
        """The number of heads of the values."""

    @property
    @abstractmethod
    def channels(self) -> range:
        """The channels of the convolution that are the values'."""

    @abstractmethod
    def value_projection(self) -> tuple[Any, str, int]:
        """The projection that computes the values before the convolution: the module, its rows, and how many heads."""

    @abstractmethod
    def frozen(self, x: Tensor) -> Frozen:
        """What the recurrence freezes for its input ``[B, T, D]``."""

    @property
    def has_bias(self) -> bool:
        """Whether the convolution has a bias."""
        return getattr(self.module.conv1d, "bias", None) is not None

    def taps(self) -> Tensor:
        """The convolution's weight on the values, ``[H·d, taps]``; the last tap is that of a position itself."""
        return _convolution(self.module)[0][self.channels.start : self.channels.stop]

    def taps_bias(self) -> Tensor | None:
        """The convolution's bias on the values ``[H·d]``, which belongs to the bias source; or None."""
        bias = _convolution(self.module)[1]
        return None if bias is None else bias[self.channels.start : self.channels.stop]

    def _convolved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution of ``[B, T, C]`` over positions, before and behind its SiLU.

        Both are rounded to the model's dtype, as the model rounds them, and then at least fp32.
        """
        weight, bias = _convolution(self.module)
        u = functional.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
        u = u[..., : x.shape[1]].transpose(1, 2)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return u.to(dtype), functional.silu(u).to(dtype)


class DeltaRule(Recurrence):
    """The gated delta rule of Qwen3-Next and Qwen3.5: ``S_t = γ_t S_{t-1} + k_t β_t (v_t - γ_t S_{t-1}ᵀ k_t)ᵀ``."""

    @property
    def heads(self) -> int:
        """See :attr:`Recurrence.heads`."""
        return int(self.module.num_v_heads)

    @property
    def channels(self) -> range:
        """See :attr:`Recurrence.channels`."""
        return range(2 * self.module.key_dim, 2 * self.module.key_dim + self.module.value_dim)

    def value_projection(self) -> tuple[Any, str, int]:
        """See :meth:`Recurrence.value_projection`."""
        m = self.module
        if hasattr(m, "in_proj_qkv"):
            return m.in_proj_qkv, f"last:{m.value_dim}", 1
        values = m.value_dim // m.num_k_heads
        return m.in_proj_qkvz, f"within:{2 * m.head_k_dim}:{2 * m.head_k_dim + values}", m.num_k_heads

    def frozen(self, x: Tensor) -> Frozen:
        """See :meth:`Recurrence.frozen`."""
        m, (batch, length) = self.module, x.shape[:2]
        qkv, z, b, a = self._projected(x)
        u, behind = self._convolved(qkv)
        query, key, value = torch.split(behind, [m.key_dim, m.key_dim, m.value_dim], -1)
        repeats = m.num_v_heads // m.num_k_heads
        query, key = (
            _unit(each.reshape(batch, length, -1, m.head_k_dim)).repeat_interleave(repeats, 2).transpose(1, 2)
            for each in (query, key)
        )
        decay = -_own(m, "A_log").to(u).exp() * functional.softplus(a.to(u) + _own(m, "dt_bias").to(u))  # [B, T, H]
        beta = b.sigmoid().to(u).transpose(1, 2)[..., None]  # [B, H, T, 1]
        pattern = _by_heads(delta_pattern, query * m.head_k_dim**-0.5, key, decay.transpose(1, 2), beta)
        core = _mixed(pattern, value.reshape(batch, length, -1, m.head_v_dim))  # [B, T, H, d]
        root = torch.rsqrt(core.square().mean(-1, keepdim=True) + m.norm.variance_epsilon)
        gate = functional.silu(z.to(u)).reshape(core.shape)
        scale = _own(m.norm, "weight").to(u) * root * gate
        values = slice(self.channels.start, self.channels.stop)
        return Frozen(qkv[..., values], pattern, u[..., values].sigmoid(), scale.flatten(2), core.flatten(2))

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values together, the gate, and what makes step sizes and decays, each ``[B, T, ...]``."""
        m = self.module
        if hasattr(m, "in_proj_qkv"):
            qkv, z, b, a = (_linear(getattr(m, f"in_proj_{name}"), x) for name in ("qkv", "z", "b", "a"))
            return qkv, z, b, a
        ordered = m.fix_query_key_value_ordering(_linear(m.in_proj_qkvz, x), _linear(m.in_proj_ba, x))
        query, key, value, z, b, a = ordered
        return torch.cat([each.flatten(2) for each in (query, key, value)], -1), z.flatten(2), b, a


class StateSpace(Recurrence):
    """Mamba-2's state space (Granite 4 hybrids, Bamba, Nemotron-H): ``S_t = exp(Δ_t A) S_{t-1} + Δ_t B_t v_tᵀ``, read by
    ``C_t``. Falcon-H1's has factors on its input and on what its first projection writes, and may have no norm.
    """

    @property
    def heads(self) -> int:
        """See :attr:`Recurrence.heads`."""
        return int(self.module.num_heads)

    @property
    def channels(self) -> range:
        """See :attr:`Recurrence.channels`."""
        return range(self.module.intermediate_size)

    def value_projection(self) -> tuple[Any, str, int]:
        """See :meth:`Recurrence.value_projection`."""
        width = self.module.intermediate_size  # the gate comes first
        return self.module.in_proj, f"within:{width}:{2 * width}", 1

    def frozen(self, x: Tensor) -> Frozen:
        """See :meth:`Recurrence.frozen`."""
        m, (batch, length) = self.module, x.shape[:2]
        projected = _linear(m.in_proj, x * getattr(m, "ssm_in_multiplier", 1))
        if hasattr(m, "mup_vector"):
            projected = projected * m.mup_vector
        z, read, step = torch.split(projected, [m.intermediate_size, m.conv_dim, m.num_heads], -1)
        u, behind = self._convolved(read)
        states = m.n_groups * m.ssm_state_size
        value, b, c = torch.split(behind, [m.intermediate_size, states, states], -1)
        step = functional.softplus(step + _own(m, "dt_bias").to(step)).to(u).clamp(*m.time_step_limit).transpose(1, 2)
        b, c = (
            each.reshape(batch, length, m.n_groups, -1).repeat_interleave(m.num_heads // m.n_groups, 2).transpose(1, 2)
            for each in (b, c)
        )
        decay = -_own(m, "A_log").to(u).exp()[:, None] * step
        pattern = _by_heads(state_space_pattern, c, b, decay, step[..., None])
        pattern.diagonal(dim1=2, dim2=3).add_(_own(m, "D").to(u)[:, None])
        core = _mixed(pattern, value.reshape(batch, length, m.num_heads, -1)).flatten(2)
        values, scale = read[..., : m.intermediate_size], self._scale(core, functional.silu(z.to(u)))
        return Frozen(values, pattern, u[..., : m.intermediate_size].sigmoid(), scale, core)

    def _scale(self, core: Tensor, gate: Tensor) -> Tensor:
        """The norm's scale and weight times the gate ``[B, T, H·d]``; the norm reads ``core`` before or behind the gate."""
        norm, width = self.module.norm, core.shape[-1]
        if isinstance(norm, nn.Identity):
            return gate
        size = width // norm.n_groups if hasattr(norm, "n_groups") else getattr(norm, "group_size", width)
        read = core if getattr(norm, "norm_before_gate", False) else core * gate
        by_group = read.reshape(*read.shape[:-1], -1, size)  # transformers before 5.23 norms all channels together
        root = torch.rsqrt(by_group.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        return root.expand(by_group.shape).flatten(2) * gate * _own(norm, "weight").to(core)


KINDS = {"delta_rule": DeltaRule, "state_space": StateSpace}
# what each kind reads of its module
_NEEDED: dict[str, tuple[str, ...]] = {
    "delta_rule": (
        "num_v_heads", "num_k_heads", "head_k_dim", "head_v_dim", "key_dim", "value_dim", "conv1d", "A_log", "dt_bias",
        "norm", "out_proj",
    ),
    "state_space": (
        "num_heads", "n_groups", "ssm_state_size", "intermediate_size", "conv_dim", "conv1d", "in_proj", "A_log", "D",
        "dt_bias", "time_step_limit", "norm", "out_proj",
    ),
}  # fmt: skip


def recurrence(module: Any, kind: str, which: str) -> Recurrence:
    """A module's recurrence; ``which`` names it in the error.

    Raises:
        ModelError: the module lacks something that the kind reads, or has another activation than SiLU.
    """
    lacking = [name for name in _NEEDED[kind] if not hasattr(module, name)]
    if lacking:
        raise ModelError(
            f"{which} ({type(module).__name__}) is no {kind} as DePass knows it: it lacks {', '.join(lacking)}"
        )
    lacking = [name for name in ("weight", "variance_epsilon") if not hasattr(module.norm, name)]
    if lacking and not (kind == "state_space" and isinstance(module.norm, nn.Identity)):
        raise ModelError(
            f"the norm of {which} ({type(module.norm).__name__}) is not as DePass knows it: it lacks {', '.join(lacking)}"
        )
    if getattr(module, "activation", "silu") not in ("silu", "swish"):
        raise ModelError(
            f"{which} has the activation {module.activation!r} behind its convolution; DePass knows 'silu'"
        )
    return KINDS[kind](module)


def find_recurrence(layer: nn.Module) -> tuple[str, str] | None:
    """The path and the kind of the recurrence inside a layer, or None."""
    for path, module in layer.named_modules():
        for kind, needed in _NEEDED.items():
            if all(hasattr(module, name) for name in needed):
                return path, kind
    return None


def convolved(values: Tensor, taps: Tensor, where: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The causal convolution of each source's own values ``[R, C]`` over its positions.

    Args:
        values: the rows of a block of sources.
        taps: ``[C, k]``, the last of a position itself.
        where: of each earlier tap, the nearest first, rows and the rows of the same source so many positions before.
    """
    out = values * taps[:, -1]
    for back, (rows, before) in enumerate(where, start=2):
        out.index_add_(0, rows, values.index_select(0, before) * taps[:, -back])
    return out


def delta_pattern(query: Tensor, key: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The mixing matrix of the gated delta rule, ``[B, H, T, T]``.

    ``u_t = β_t (v_t - Σ_{s<t} Γ[t, s] (k_t · k_s) u_s)`` is what a position writes, and ``Σ_{s≤t} Γ[t, s] (q_t · k_s) u_s``
    what one reads: the second times the inverse of the first.

    Args:
        query, key: ``[B, H, T, d]``.
        decay: the logarithms ``[B, H, T]`` of what a position leaves of the state before it.
        beta: ``[B, H, T, 1]``.
    """
    decays = _decays(decay)
    one = torch.eye(query.shape[2], dtype=query.dtype, device=query.device)
    earlier = (beta * decays * (key @ key.mT)).tril(-1)
    written: Tensor = torch.linalg.solve_triangular(one + earlier, one * beta, upper=False, unitriangular=True)
    return (decays * (query @ key.mT)).tril() @ written


def state_space_pattern(c: Tensor, b: Tensor, decay: Tensor, step: Tensor) -> Tensor:
    """The mixing matrix of a state space without its skip, ``Γ[t, s] (C_t · B_s) Δ_s``, ``[B, H, T, T]``.

    Args:
        c, b: ``[B, H, T, n]``.
        decay: the logarithms ``[B, H, T]`` of what a position leaves of the state before it.
        step: ``[B, H, T, 1]``.
    """
    return (_decays(decay) * (c @ b.mT)).tril() * step.mT


def _by_heads(pattern: Callable[..., Tensor], *of_heads: Tensor) -> Tensor:
    """A pattern ``[B, H, T, T]``, computed for a few heads at a time: it needs several times its own memory."""
    batch, heads, length = of_heads[0].shape[:3]
    found = of_heads[0].new_empty(batch, heads, length, length)
    at_once = max(1, HEADS_NUMBERS // (batch * length * length))
    for begin in range(0, heads, at_once):
        some = slice(begin, begin + at_once)
        found[:, some] = pattern(*(each[:, some] for each in of_heads))
    return found


def _mixed(pattern: Tensor, values: Tensor) -> Tensor:
    """``[B, T, H, d]``: a pattern ``[B, H, T, T]`` times values ``[B, T, H, d]``."""
    return (pattern @ values.transpose(1, 2)).transpose(1, 2)


def _decays(logs: Tensor) -> Tensor:
    """``[B, H, T, T]``: what is left at ``t`` of a state at ``s``, from the logarithms ``[B, H, T]``; 0 before ``s``."""
    total = logs.double().cumsum(-1)  # two sums of thousands of positions differ by little
    apart = (total[..., :, None] - total[..., None, :]).to(logs)
    later = torch.ones_like(apart, dtype=torch.bool).triu(1)
    decays: Tensor = apart.masked_fill(later, -torch.inf).exp()
    return decays


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _linear(module: Any, x: Tensor) -> Tensor:
    weight, bias = weights.dense(module), weights.dense(module, "bias")
    assert weight is not None
    return functional.linear(x.to(weight), weight, bias)


def _own(module: Any, name: str) -> Tensor:
    tensor = weights.dense(module, name)
    assert tensor is not None
    return tensor


def _convolution(module: Any) -> tuple[Tensor, Tensor | None]:
    """The weight ``[C, taps]`` and the bias of a module's convolution."""
    return _own(module.conv1d, "weight")[:, 0], weights.dense(module.conv1d, "bias")
