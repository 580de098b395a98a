"""A stand-in for a CUDA graph where there is no GPU: it records the tensor operations that some work does, undoes what the
work did, and replays the operations on the very same memory. Like a graph it sees nothing that happens on the host, and it
refuses what waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "lift_fresh", "_unique2", "equal")


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Any, Any]] = {}  # by place: the memory that the work changes, and what it held
        self.own: set[int] = set()  # places that the work allocates

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = function._schema.name.split("::")[-1]
        masked = name.startswith("index") and any(t.dtype == torch.bool for t in tensors)
        waits = masked or name in WAITING
        assert not waits, f"{name} waits for the device, which no CUDA graph can record"
        if function._schema.is_mutable:
            for tensor in tensors:
                memory = tensor.untyped_storage()
                if memory.data_ptr() not in self.own:
                    self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        result = function(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.own |= {tensor.untyped_storage().data_ptr() for tensor in made} - given
        self.steps.append((function, args, kwargs, made))
        return result


class Recorded:
    """What a tape has recorded."""

    def __init__(self, tape: _Tape) -> None:
        self._tape = tape

    def replay(self) -> None:
        tape = self._tape
        for _, _, _, made in tape.steps:
            for tensor in made:  # another graph's buffers may have lain here
                if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() in tape.own:
                    tensor.fill_(float("nan"))
        for function, args, kwargs, made in tape.steps:
            again = [leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for old, new in zip(made, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def record(pool: object) -> Iterator[Recorded]:
    """As :func:`depass.propagation.cuda_graphs.record_cuda_graph`, on any device."""
    tape = _Tape()
    with tape:
        yield Recorded(tape)
    for memory, held in tape.before.values():
        memory.copy_(held)
