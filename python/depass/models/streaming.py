"""Streaming weights: they stay in host memory, and each layer's are copied to the device one layer ahead of its run.

While a layer runs, the next layer's weights are copied on a separate CUDA stream, so the device holds the weights of at
most two layers. The embeddings, the final norm and the head are on the device for the whole pass. After the pass, or after
an error, every weight is back in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import weights
from .bound import BoundModel


@contextmanager
def streamed(bound: BoundModel, device: torch.device) -> Iterator[None]:
    """Inside the ``with`` block the model runs on ``device``; the copies are forward hooks, after those of the caller."""
    with ExitStack() as stack:
        modules = [layer.module for layer in bound.layers]
        inside = {id(tensor) for module in modules for tensor in _tensors(module)}
        _lend(stack, [tensor for tensor in _tensors(bound.model) if id(tensor) not in inside], device)
        ahead = _Ahead(modules, device)
        stack.callback(ahead.clear)
        for index, module in enumerate(modules):
            stack.callback(module.register_forward_pre_hook(ahead.bring(index)).remove)
            stack.callback(module.register_forward_hook(ahead.take_away(index)).remove)
        yield


def weight_bytes(bound: BoundModel) -> int:
    """The most bytes of the model's weights that are on its devices at once during its forward pass."""
    everything = weights.held_bytes(bound.model) + weights.brought_bytes(bound.model)
    if bound.stream_to is None:
        return everything
    layers = [weights.held_bytes(layer.module) for layer in bound.layers]
    return everything - sum(layers) + sum(sorted(layers)[-2:])


def arriving_bytes(bound: BoundModel) -> int:
    """The bytes of :func:`weight_bytes` that are copied for a pass and not on the device between passes."""
    return weights.brought_bytes(bound.model) if bound.stream_to is None else weight_bytes(bound)


def pin(model: nn.Module) -> None:
    """Move weights to pinned host memory, from which they can be copied while the device computes."""
    for tensor in _tensors(model):
        if not tensor.is_pinned():
            tensor.data = tensor.data.pin_memory()


class _Ahead:
    """The layers whose weights are on the device or being copied, each with the event that ends its copy."""

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self.modules, self.device = modules, device
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.coming: dict[int, tuple[list[Tensor], Any]] = {}
        self.on_device: dict[int, ExitStack] = {}
        self.done: Any = None  # the event after the last layer whose weights were removed

    def bring(self, index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            copies, arrived = self._copies(index)
            if arrived is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(arrived)
                for copy in copies:
                    copy.record_stream(current)  # allocated on the other stream
            self.on_device[index] = ExitStack()
            _replace(self.on_device[index], _tensors(self.modules[index]), copies)
            if self.done is not None:
                self.done.synchronize()  # or the host would run ahead and copy further layers before one is removed
            if index + 1 < len(self.modules):
                self.coming[index + 1] = self._copies(index + 1)

        return hook

    def take_away(self, index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.on_device.pop(index).close()
            if self.stream is not None:
                self.done = torch.cuda.current_stream(self.device).record_event()

        return hook

    def clear(self) -> None:
        self.coming.clear()
        for stack in self.on_device.values():
            stack.close()

    def _copies(self, index: int) -> tuple[list[Tensor], Any]:
        if index in self.coming:
            return self.coming.pop(index)
        tensors = _tensors(self.modules[index])
        if self.stream is None:
            return [tensor.data.to(self.device, copy=True) for tensor in tensors], None
        with torch.cuda.stream(self.stream):
            copies = [tensor.data.to(self.device, non_blocking=True, copy=True) for tensor in tensors]
        return copies, self.stream.record_event()


def _tensors(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module, each once."""
    return list({id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values())


def _lend(stack: ExitStack, tensors: list[Tensor], device: torch.device) -> None:
    _replace(stack, tensors, [tensor.data.to(device, copy=True) for tensor in tensors])


def _replace(stack: ExitStack, tensors: Iterable[Tensor], by: Iterable[Tensor]) -> None:
    """Replace the data of tensors until the stack closes."""
    for tensor, other in zip(tensors, by, strict=True):
        stack.callback(setattr, tensor, "data", tensor.data)
        tensor.data = other
