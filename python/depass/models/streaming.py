"""A model larger than its device: the weights stay in host memory and come to the device one layer ahead of the work.

While a layer works, the next one's weights are copied beside it on a stream of their own, so at most two layers' are there
at once. What is no layer (embeddings, last norm, head) is there for the whole pass. After it, or after an error, every
weight is where it was.
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
    """Within it the model runs on ``device``, with forward hooks that run after those that are registered before."""
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
    """What of the model's weights is on the devices where it works, at most, during its own pass."""
    everything = weights.held_bytes(bound.model) + weights.brought_bytes(bound.model)
    if bound.stream_to is None:
        return everything
    layers = [weights.held_bytes(layer.module) for layer in bound.layers]
    return everything - sum(layers) + sum(sorted(layers)[-2:])


def arriving_bytes(bound: BoundModel) -> int:
    """What of that comes for a pass, and is not there between passes."""
    return weights.brought_bytes(bound.model) if bound.stream_to is None else weight_bytes(bound)


def pin(model: nn.Module) -> None:
    """Move weights to pinned host memory, from which they can be copied while the device works."""
    for tensor in _tensors(model):
        if not tensor.is_pinned():
            tensor.data = tensor.data.pin_memory()


class _Ahead:
    """The layers whose weights are on the device or on their way, each with the event of its arrival."""

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self.modules, self.device = modules, device
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.coming: dict[int, tuple[list[Tensor], Any]] = {}
        self.there: dict[int, ExitStack] = {}
        self.done: Any = None  # the event after the last layer that was taken away

    def bring(self, index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            copies, arrived = self._copies(index)
            if arrived is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(arrived)
                for copy in copies:
                    copy.record_stream(current)  # allocated on the other stream
            self.there[index] = ExitStack()
            _replace(self.there[index], _tensors(self.modules[index]), copies)
            if self.done is not None:
                self.done.synchronize()  # or the host would run ahead, and further layers come before one is gone
            if index + 1 < len(self.modules):
                self.coming[index + 1] = self._copies(index + 1)

        return hook

    def take_away(self, index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.there.pop(index).close()
            if self.stream is not None:
                self.done = torch.cuda.current_stream(self.device).record_event()

        return hook

    def clear(self) -> None:
        self.coming.clear()
        for stack in self.there.values():
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
    """Its parameters and buffers, each once."""
    return list({id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values())


def _lend(stack: ExitStack, tensors: list[Tensor], device: torch.device) -> None:
    _replace(stack, tensors, [tensor.data.to(device, copy=True) for tensor in tensors])


def _replace(stack: ExitStack, tensors: Iterable[Tensor], by: Iterable[Tensor]) -> None:
    """Put other data in tensors until the stack closes."""
    for tensor, other in zip(tensors, by, strict=True):
        stack.callback(setattr, tensor, "data", tensor.data)
        tensor.data = other
