"""Attention with gradients over some queries at a time, for long prompts on a CPU.

There a layer's pattern is larger than what the C library keeps for the next request, so each of its tensors is memory that
the system has to clear first. This took a third of a backward pass over 2,048 tokens. In blocks no pattern is kept: the way
back computes each block again, and only up to the last key that its queries see. Outputs stay the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BLOCK_BYTES = 16 << 20  # of a block's pattern in fp32; the C library keeps freed memory of up to 32 MB
_MULTIPLE = 64  # of a block's queries, as far as they allow
Attention = Callable[..., tuple[Tensor, Tensor]]


def queries_at_once(device: torch.device, heads: int, positions: int) -> int:
    """How many of a pattern's queries a block takes; all of them where the pattern is small, or not on a CPU.

    Args:
        device: where the layer runs.
        heads: the number of heads, of all prompts together.
        positions: the number of queries, and of keys.
    """
    fit = BLOCK_BYTES // (4 * heads * positions)
    if device.type == "cuda" or fit >= positions:
        return positions
    return max(1, fit // _MULTIPLE * _MULTIPLE or fit)


def attend(
    eager: Attention,
    module: nn.Module,
    qkv: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    options: Mapping[str, Any],
) -> Tensor | None:
    """The output ``[B, N, H, d]`` of a module's eager attention, by blocks of queries; None where it takes all at once.

    Args:
        eager: the family's own eager attention.
        module: the attention module.
        qkv: its queries, keys and values.
        mask: what is added to its scores, ``[.., N, N]``.
        options: the further arguments of ``eager``.
    """
    query, key, value = qkv
    count = query.shape[2]
    at_once = queries_at_once(query.device, query.shape[0] * query.shape[1], count)
    of_queries = (x for x in options.values() if isinstance(x, Tensor) and x.dim() > 2)  # perhaps; they are not cut
    fits = mask is None or mask.shape[-2:] == (count, count)
    if at_once >= count or key.shape[2] != count or not fits or any(count in x.shape for x in of_queries):
        return None
    ends = [min(begin + at_once, count) for begin in range(0, count, at_once)]

    def block(begin: int, end: int, keys: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen = None if mask is None else mask[..., begin:end, :keys]
        return eager(module, query[:, :, begin:end], key[:, :, :keys], value[:, :, :keys], seen, **options)[0]

    return _Blocks.apply(query, key, value, block, ends, mask)  # type: ignore[no-untyped-call, no-any-return]


def _keys_seen(mask: Tensor | None, begin: int, end: int, count: int) -> int:
    """How many of the first keys hold all that the queries of a block see; all, where a query sees none."""
    if mask is None or not mask.is_floating_point():
        return count
    seen = mask[..., begin:end, :] > torch.finfo(mask.dtype).min
    if not bool(seen.any(-1).all()):
        return count
    return int(seen.flatten(0, -2).any(0).nonzero().max()) + 1


class _Blocks(torch.autograd.Function):
    """The blocks' outputs, one after another; each block is computed again for its gradients."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, block: Callable[..., Tensor], ends: Sequence[int],
        mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(query, key, value)
        ctx.block, ctx.ends, ctx.mask = block, ends, mask
        count = query.shape[2]
        return torch.cat([block(begin, end, count, query, key, value)
                          for begin, end in zip([0, *ends], ends, strict=False)], 1)  # fmt: skip

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        needed = ctx.needs_input_grad[:3]
        inputs = [x.detach().requires_grad_(needs) for x, needs in zip(ctx.saved_tensors, needed, strict=True)]
        chosen = [x for x in inputs if x.requires_grad]
        sums: list[Tensor] = []
        for begin, end in zip([0, *ctx.ends], ctx.ends, strict=False):
            keys = _keys_seen(ctx.mask, begin, end, inputs[1].shape[2])
            with torch.enable_grad():
                output = ctx.block(begin, end, keys, *inputs)
            found = torch.autograd.grad(output, chosen, gradient[:, begin:end])
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else list(found)
        each = iter(sums)
        return *(next(each) if needs else None for needs in needed), None, None, None
