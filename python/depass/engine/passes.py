"""The engine, a model with its settings, and a pass: prompts and their decompositions on their way through the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depass_kernels import BackendError

from ..device_memory import asked_bytes, shown
from ..errors import DePassError, MemoryLimitError, MemoryLimitWarning, OptionError, warn
from ..inputs.prompt import Prompt
from ..models.bound import BoundModel
from ..models.capture import Capture
from ..models.health import dtype_name, refuse_dropout
from ..models.trace import Trace
from ..propagation.blocks import traits
from ..propagation.cuda_graphs import Recordings
from ..propagation.needs import fitting, room
from ..propagation.propagate import Propagation
from ..sources.source import Decomposition, Moment
from .request import Defaults, Options, Progress


@dataclass(frozen=True)
class Engine:
    """A model and the settings of its runs.

    Attributes:
        bound: the model.
        tokenizer: its tokenizer, or None.
        name: the model's name in results.
        defaults: the options of calls that leave them out.
        workspace_bytes: the size of a block's buffers, or None for the device's default.
        recordings: the layers of short prompts recorded as CUDA graphs, or None.
    """

    bound: BoundModel
    tokenizer: Any
    name: str
    defaults: Defaults
    workspace_bytes: int | None = None
    recordings: Recordings | None = None


class Pass(Capture):
    """One forward pass of the model over prompts, with their decompositions; a subclass may read states in :meth:`state`.

    Args:
        engine: the model and its settings.
        prompts: the prompts; their positions follow one another.
        joining: pairs of a decomposition and the index of its prompt, in the order in which they join.
        options: the options of the pass.
        progress: a function that is called after each layer with the number of layers done and their total.
        read: the positions of each decomposition that are read after the last layer; None: all.
        budget: the most bytes of the state and its buffers, where one larger block would be faster; None: what is available.
        recorded: whether a recorded propagation may be used; the caller then gives it back.

    Attributes:
        propagation: the propagation, which holds the final state after :meth:`run`.
        stream: ``[P, D]``, the residual stream after the last layer.
        normed: ``[P, D]``, the residual stream after the final norm.
        dtype: the dtype of the model's weights, as results name it.
    """

    propagation: Propagation

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        joining: Sequence[tuple[Decomposition, int]],
        options: Options,
        progress: Progress | None = None,
        read: Sequence[Sequence[int]] | None = None,
        recorded: bool = False,
        budget: int | None = None,
    ) -> None:
        layers = range(min(parts.layer for parts, _ in joining), options.stop)
        super().__init__(engine.bound, [prompt.ids for prompt in prompts], layers, options.sharing.rule == "taylor")
        self.engine, self.joining, self.options, self.progress, self.read = engine, joining, options, progress, read
        self.recordings, self.budget = engine.recordings if recorded else None, budget
        self.lengths = [len(prompt.ids) for prompt in prompts]
        self.dtype = dtype_name(engine.bound.dtype) + (", quantised" if engine.bound.is_quantized else "")

    def state(self, layer: int, stream: Tensor) -> None:
        """Called with the state at the input of each layer and at the output of the last; ``stream`` is the model's own."""

    def run(self) -> None:
        """Run the pass; if memory runs out in spite of the plan, warn and repeat it once with smaller blocks.

        Raises:
            ModelError: dropout is active, or the model's pass cannot be captured.
            OptionError: the backend cannot run here.
            MemoryLimitError: there is too little memory.
        """
        refuse_dropout(self.bound)
        blocks = self.engine.workspace_bytes or traits(self.bound.device).workspace
        fewer = max(1, blocks // 8)
        try:
            return self._once(self.engine.workspace_bytes, self.recordings)
        except (RuntimeError, MemoryError) as error:
            failed = asked_bytes(error)
            if failed is None or isinstance(error, DePassError):
                raise
        # outside the handler, so that the error no longer holds the memory that was allocated
        warn(
            f"out of memory{f' while allocating {shown(failed)}' if failed else ''}; retrying with blocks of {shown(fewer)} "
            f"instead of {shown(blocks)} (workspace_bytes=)", MemoryLimitWarning
        )  # fmt: skip
        del self.propagation
        if self.bound.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            return self._once(fewer, None)
        except (RuntimeError, MemoryError) as error:
            if asked_bytes(error) is None or isinstance(error, DePassError):
                raise
            raise MemoryLimitError(
                f"out of memory twice, with blocks of {shown(blocks)} and of {shown(fewer)}: {self._needed()}"
            ) from error

    def _once(self, workspace_bytes: int | None, recordings: Recordings | None) -> None:
        self.propagation = self._propagation(workspace_bytes, recordings)
        try:
            super().run()
        except BackendError as error:
            raise OptionError(str(error)) from error
        if self.options.stop < len(self.bound.layers):
            self.normed = self.bound.final_norm.module(self.stream[None].to(self.bound.final_device))[0]
            self.check_the_end()
        with without_autocast(self.stream.device):
            self.state(self.options.stop, self.stream)

    def _propagation(self, workspace_bytes: int | None, recordings: Recordings | None) -> Propagation:
        available = room(self.bound)
        blocks, needed = fitting(
            self.bound, self._rows, self.lengths, workspace_bytes, self.bound.device, available, self.budget
        )
        parts = self.joining[0][0]
        if recordings is not None and len(self.joining) == 1 and parts.moment == "start":
            recorded = recordings.lend(parts.layout, self.options.sharing, blocks)
            if recorded is not None:
                return recorded
        if needed.total_bytes > available:
            raise MemoryLimitError(self._needed())
        return Propagation(self.bound, self.options.sharing, blocks, self.lengths, self._rows)

    def layer(self, index: int, trace: Trace) -> None:
        """Propagate the state through a layer; decompositions join before it, after its attention, or after its MLP."""
        device = self.bound.layers[index].device  # a model may be spread over several devices
        trace = trace.map(lambda tensor: tensor.to(device))
        read = self.read if index == self.layers[-1] else None
        with without_autocast(device):
            self._join(index, "start", trace)
            if self.propagation.layout is not None:
                self.state(index, trace.stream)
            self.propagation.attention(index, trace, read)
            self._join(index, "middle", trace)
            self.propagation.mlp(index, trace, read)
            self._join(index, "late", trace)
            self.propagation.finish(index, trace)
            self._join(index, "end", trace)
        if self.progress is not None:
            self.progress(index - self.layers.start + 1, len(self.layers))

    def _join(self, layer: int, moment: Moment, trace: Trace) -> None:
        joining = [(parts, i) for parts, i in self.joining if (parts.layer, parts.moment) == (layer, moment)]
        if joining:
            self.propagation.join(joining, trace)

    @property
    def _rows(self) -> int:
        return sum(parts.layout.rows for parts, _ in self.joining)

    def _needed(self) -> str:
        """The memory that the run needs and the memory available, for an error message."""
        available = room(self.bound)
        _, needed = fitting(
            self.bound, self._rows, self.lengths, self.engine.workspace_bytes, self.bound.device, available
        )
        return (
            f"{self._rows:,} rows for {sum(self.lengths):,} tokens need {shown(needed.total_bytes)} besides the model's "
            f"weights (state {shown(needed.state_bytes)}, the model's pass {shown(needed.pass_bytes)}, buffers "
            f"{shown(needed.buffer_bytes)}), {shown(max(0, available))} are available; use fewer or longer "
            "spans, or fewer tokens or components; `depass plan` shows what fits"
        )


def without_autocast(device: torch.device) -> torch.autocast:
    """Inside the ``with`` block our own products keep their dtype; a caller's autocast affects only the model's pass."""
    return torch.autocast(device.type, enabled=False)
