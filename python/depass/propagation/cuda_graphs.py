"""Recording the steps of layers as CUDA graphs and replaying them, for short prompts whose launches cost more than the work.

A recorded step reads its trace from buffers and changes the state in place. So replaying it for another prompt of the same
layout takes a copy into the buffers and one launch. Recording costs more than a step, so a layout is recorded when it
occurs for the second time.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch

from depass_kernels import SourceLayout

from ..errors import OptionError
from ..models.bound import BoundModel, Layer
from ..models.trace import Trace
from ..sources.source import Decomposition
from .blocks import Blocks
from .propagate import Propagation
from .sharing import MLPSharing

ROWS = 1024  # with more, a step's work outlasts its launches (by count of bytes; not measured)
LAYOUTS = 4  # layouts whose recordings are kept; each holds its state and one layer's buffers


class Recorded(Protocol):
    """A recorded step."""

    def replay(self) -> None:
        """Run the step again, on the memory that it was recorded with."""


Record = Callable[[Any], AbstractContextManager[Recorded]]  # takes a memory pool and records what runs inside


def refuse_graphs(devices: set[torch.device], quantized: bool, has_experts: bool, lends_values: bool = False) -> None:
    """Raise an OptionError where the layers of a model on ``devices`` cannot be recorded."""
    if lends_values:
        raise OptionError(
            "cuda_graphs=True records each layer by itself, but some layers of this model take the values of earlier ones; "
            "leave cuda_graphs out"
        )
    if has_experts:
        raise OptionError(
            "cuda_graphs=True records the same steps for every prompt, but each prompt chooses its own experts in this "
            "model; leave cuda_graphs out"
        )
    if len(devices) > 1 or next(iter(devices)).type != "cuda" or quantized:
        raise OptionError(
            f"cuda_graphs=True needs an unquantised model on one CUDA device, but this model {lies_on(devices, quantized)}; "
            "leave cuda_graphs out"
        )
    if torch.cuda.device_count() > 1:
        raise OptionError(
            f"cuda_graphs=True is not tested with several GPUs, and torch sees {torch.cuda.device_count()}; make only one "
            "visible (CUDA_VISIBLE_DEVICES=0), or leave cuda_graphs out"
        )


def lies_on(devices: set[torch.device], quantized: bool) -> str:
    """Describe the devices of a model for an error message."""
    where = ", ".join("no device (offloaded)" if device.type == "meta" else str(device) for device in devices)
    return f"{'is quantised and ' if quantized else ''}is on {where}"


@cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # one: the library keeps a workspace for each


@contextmanager
def record_cuda_graph(pool: Any) -> Iterator[Recorded]:
    """Record the kernels launched inside the ``with`` block, without running them."""
    graph, stream = torch.cuda.CUDAGraph(), _recording_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # the library allocates its workspace with this thread's first product on a stream; do that outside the graph
        ones = torch.ones(16, 16, device="cuda")
        torch.mm(ones, ones)
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield graph
        except BaseException:
            with suppress(RuntimeError):  # which would hide the first error
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)


@dataclass(frozen=True)
class _Recording:
    trace: Trace  # the buffers that it reads
    weights: tuple[int, ...]  # where the layer's weights lay
    attention: Recorded
    mlp: Recorded


class RecordedPropagation(Propagation):
    """A propagation for many prompts of one layout: the steps of the first prompt are recorded, and replayed for others.

    A step is recorded again when its layer's weights have moved; weights changed in place need no new recording. Steps
    that the reference backend runs are not recorded, because it may wait for the device.
    """

    def __init__(
        self,
        bound: BoundModel,
        sharing: MLPSharing,
        blocks: Blocks,
        layout: SourceLayout,
        key: Any,
        record: Record,
        pool: Any,
    ) -> None:
        super().__init__(bound, sharing, blocks, [layout.positions], layout.rows)
        self.key = key
        self._record, self._pool = record, pool
        self._recordings: dict[int, _Recording] = {}

    def join(self, joining: Sequence[tuple[Decomposition, int]], trace: Trace) -> None:
        """Start with the only decomposition of a prompt, in the memory of the previous prompt."""
        if self.layout is None:
            super().join(joining, trace)
            return
        joining[0][0].fill(self.state.zero_(), trace)

    def attention(self, index: int, trace: Trace, read: Sequence[Sequence[int]] | None = None) -> None:
        """See :meth:`Propagation.attention`; replays the layer's recording if there is one. All rows are kept."""
        recording = self._recording_of(index)
        if recording is None:
            super().attention(index, trace)
        else:
            recording.trace.copy_from(trace)
            recording.attention.replay()

    def mlp(self, index: int, trace: Trace, read: Sequence[Sequence[int]] | None = None) -> None:
        """See :meth:`Propagation.mlp`; replays the layer's recording, or makes one if there is none yet."""
        recording = self._recording_of(index)
        if recording is not None:
            recording.mlp.replay()
            return
        super().mlp(index, trace)  # compiles kernels and fills caches, which a recording cannot do
        if "reference" not in self.served["mix_values"] | self.served["share_hidden"]:
            self._recordings[index] = self._recorded(index, trace)

    def _recording_of(self, index: int) -> _Recording | None:
        recording = self._recordings.get(index)
        return recording if recording is not None and recording.weights == _places(self.bound.layers[index]) else None

    def _recorded(self, index: int, trace: Trace) -> _Recording:
        mixers = tuple(replace(mixer, mixed=None) for mixer in trace.mixers)
        buffers = replace(trace, mixers=mixers, after=None).map(torch.clone)
        device = trace.stream.device  # of the CUDA stream that records
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            with self._record(self._pool) as attention:
                super().attention(index, buffers)
            with self._record(self._pool) as mlp:
                super().mlp(index, buffers)
        return _Recording(buffers, _places(self.bound.layers[index]), attention, mlp)


class Recordings:
    """The recorded propagations of one model, each lent to one pass at a time."""

    def __init__(self, bound: BoundModel, record: Record = record_cuda_graph) -> None:
        self.bound, self._record = bound, record
        self._idle: OrderedDict[Any, RecordedPropagation | None] = OrderedDict()  # None: occurred once, or is lent
        self._lock = threading.Lock()

    def lend(self, layout: SourceLayout, sharing: MLPSharing, blocks: Blocks) -> RecordedPropagation | None:
        """A recorded propagation for one decomposition at the start of a layer; None for a large or a new layout."""
        device = self.bound.layers[0].device
        if layout.rows > ROWS or (self._record is record_cuda_graph and device.type != "cuda"):
            return None
        if not all(layer.mixers and layer.has_mlp for layer in self.bound.layers):  # an empty graph cannot be replayed
            return None
        key = device, self.bound.dtype, *_key(layout, sharing)
        with self._lock:
            came_before = key in self._idle
            idle = self._idle.pop(key, None)
            self._idle[key] = None
            while len(self._idle) > LAYOUTS:
                self._idle.popitem(last=False)
        if idle is not None:
            return idle
        if not came_before:
            return None
        pool = torch.cuda.graph_pool_handle() if self._record is record_cuda_graph else None
        return RecordedPropagation(self.bound, sharing, blocks, layout, key, self._record, pool)

    def give_back(self, propagation: Propagation) -> None:
        """Keep a lent propagation for the next prompt of its layout; its state must not be read afterwards."""
        if isinstance(propagation, RecordedPropagation):
            with self._lock:
                if propagation.key in self._idle:
                    self._idle[propagation.key] = propagation


def _key(layout: SourceLayout, sharing: MLPSharing) -> tuple[Any, ...]:
    offsets = (layout.row_start, layout.position_start, layout.prompt, layout.skipped)
    return sharing, os.environ.get("DEPASS_BACKEND"), *(offset.numpy().tobytes() for offset in offsets)


def _places(layer: Layer) -> tuple[int, ...]:
    return tuple(parameter.data_ptr() for parameter in layer.module.parameters())
