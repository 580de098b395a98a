"""The parts that a component spec describes, and the checks that the specs share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from depass_kernels.ops import FLOATS

from ..checks import integer, integers
from ..errors import OptionError, SourceError
from ..models.bound import BoundModel
from ..models.trace import Trace
from .source import Kind, Moment, Source, check_labels


class _Parts(NamedTuple):
    """The parts that a component spec describes.

    Exactly one of ``outputs`` and ``each`` is given: ``each`` where most outputs are zero.
    """

    moment: Moment
    sources: list[Source]
    outputs: Callable[[Trace, Tensor], Tensor] | None  # trace, positions [p] -> [p, sources, D] in the state's dtype
    whole: Callable[[Trace], Tensor]  # the residual stream that the parts and the remainder add up to, [N, D]
    bias: Callable[[Trace], Tensor | None] = lambda trace: None  # the start of the bias source, [N, D]
    has_rest: bool = True
    # trace, positions [p] -> of one source after the other: its number, some of the positions [q], its outputs there [q, D]
    each: Callable[[Trace, Tensor], Iterator[tuple[int, Tensor, Tensor]]] | None = None
    starts: list[int] | None = None  # rising, the first position of each source; None: the first of all that count

    def blocks(self, trace: Trace, where: Tensor, numbers: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The outputs that are not zero, in blocks of about ``numbers`` numbers.

        Args:
            trace: the layer's trace.
            where: ``[p]`` int64, the positions whose outputs count.
            numbers: how many numbers a block of several sources has.

        Yields:
            ``n`` consecutive sources, the positions ``[q]``, and the sources' outputs there ``[q, n, D]``.
        """
        if self.each is not None:
            for source, positions, outputs in self.each(trace, where):
                yield slice(source, source + 1), positions, outputs[:, None]
            return
        assert self.outputs is not None
        at_once = max(1, numbers // max(1, len(self.sources) * trace.stream.shape[1]))
        for positions in torch.split(where, at_once):
            yield slice(0, len(self.sources)), positions, self.outputs(trace, positions)


def check_layer(spec: Any, bound: BoundModel) -> int:
    """The checked layer of a component spec.

    Raises:
        OptionError: the layer is not an integer or is out of range.
    """
    depth = len(bound.layers)
    layer = integer(f"layer of {type(spec).__name__}", spec.layer, OptionError)
    if not 0 <= layer < depth:
        raise OptionError(
            f"{type(spec).__name__}(layer={layer!r}) is out of range: {bound.name} has layers 0 to {depth - 1}"
        )
    return layer


def _named(what: str, spec: Any) -> str:
    return f"{what} of {type(spec).__name__}(layer={spec.layer})"


def _labelled(spec: Any, count: int, kind: Kind) -> list[Source]:
    labels = check_labels(spec.labels, count, type(spec).__name__)
    if labels is None:
        labels = [f"L{spec.layer}.{kind}{i if count > 1 else ''}" for i in range(count)]
    return [Source(label, kind, layer=spec.layer, index=i) for i, label in enumerate(labels)]


def _after(trace: Trace) -> Tensor:
    assert trace.after is not None
    return trace.after


def _finite(name: str, given: Any, shape: tuple[int | None, ...]) -> Tensor:
    tensor: Tensor | None
    try:
        tensor = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
    got = type(given).__name__ if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    fits = (
        tensor is not None
        and tensor.dtype in FLOATS
        and tensor.dim() == len(shape)
        and all(n in (None, size) for n, size in zip(shape, tensor.shape, strict=True))
        and tensor.numel() > 0
    )
    if tensor is None or not fits:
        raise SourceError(f"{name} must be floats {wanted} for this prompt and model, got {got}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise SourceError(f"{name} must be a dense tensor with data, got layout {tensor.layout} on {tensor.device}")
    if not bool(tensor.isfinite().all()):
        raise SourceError(f"{name} must be finite, got NaN or infinity")
    return tensor


def _indices(name: str, given: Any, count: int, negative: bool = False) -> list[int]:
    """Checked and sorted indices below ``count``; all of them if ``given`` is None."""
    if given is None:
        return list(range(count))
    indices, lowest = integers(name, given, SourceError), -count if negative else 0
    for index in indices:
        if not lowest <= index < count:
            raise SourceError(f"{name}: {index} is out of range; choose from {lowest} to {count - 1}")
    indices = [index % count for index in indices]
    if not indices or len(set(indices)) < len(indices):
        raise SourceError(f"{name} must be a non-empty list without duplicates, got {given}")
    return sorted(indices)
