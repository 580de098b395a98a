"""A model and how it is run, and a pass of it: prompts with their decompositions on the way through the layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depass_kernels import BackendError

from ..device_memory import asked_bytes, shown
from ..errors import DePassError, MemoryLimitError, MemoryLimitWarning, OptionError
from ..inputs.prompt import Prompt
from ..models.bound import BoundModel
from ..models.capture import Capture
from ..models.health import dtype_name, refuse_dropout
from ..models.trace import Trace
from ..models.weights import device_of
from ..propagation.blocks import workspace
from ..propagation.cuda_graphs import Recordings
from ..propagation.needs import Needs, needs, room
from ..propagation.propagate import Propagation
from ..sources.source import Decomposition, Moment
from .request import Defaults, Options, Progress


@dataclass(frozen=True)
class Engine:
    """A model and how it is run.

    Attributes:
        bound: the model.
        tokenizer: its tokenizer, or None.
        name: of the model, in results.
        defaults: of what a call does not say.
        workspace_bytes: the size of a block's buffers, or None for the device's.
        recordings: of short prompts' layers as CUDA graphs, or None.
    """

    bound: BoundModel
    tokenizer: Any
    name: str
    defaults: Defaults
    workspace_bytes: int | None = None
    recordings: Recordings | None = None


class Pass(Capture):
    """One pass of the model over prompts, with decompositions of them on the way. A subclass may read states: :meth:`state`.

    Args:
        engine: the model.
        prompts: whose positions lie one behind the other.
        joining: the decompositions, and of which prompt each is; in the order in which they join.
        options: how.
        progress: told after each layer how many are done, and of how many.
        read: the positions of each decomposition that are read after the last layer; None: all.
        recorded: whether a recorded propagation may serve; whoever asks gives it back.

    Attributes:
        propagation: with its final state, after :meth:`run`.
        stream: ``[P, D]``, the residual stream there.
        normed: the same after the final norm.
        dtype: of the model's weights, as results name it.
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
    ) -> None:
        layers = range(min(parts.layer for parts, _ in joining), options.stop)
        super().__init__(engine.bound, [prompt.ids for prompt in prompts], layers, options.sharing.rule == "taylor")
        self.engine, self.joining, self.options, self.progress, self.read = engine, joining, options, progress, read
        self.recordings = engine.recordings if recorded else None
        self.lengths = [len(prompt.ids) for prompt in prompts]
        self.dtype = dtype_name(engine.bound.dtype) + (", quantised" if engine.bound.is_quantized else "")

    def state(self, layer: int, stream: Tensor) -> None:
        """Called with each state that enters a layer, and with what leaves the last; ``stream`` is the model's own."""

    def run(self) -> None:
        """Do it. Where memory runs out in spite of the plan, it is done once more with smaller blocks, with a warning.

        Raises:
            ModelError: it drops out at random, or cannot be followed.
            OptionError: a backend that cannot serve.
            MemoryLimitError: it does not fit.
        """
        refuse_dropout(self.bound)
        blocks = workspace(self.engine.workspace_bytes, self.bound.device)
        fewer = max(1, blocks // 8)
        try:
            return self._once(self.engine.workspace_bytes, self.recordings)
        except (RuntimeError, MemoryError) as error:
            asked = asked_bytes(error)
            if asked is None or isinstance(error, DePassError):
                raise
        # out of the handler, so that the error no longer holds what did fit
        warnings.warn(
            f"out of memory, asked for {shown(asked)}; once more with blocks of {shown(fewer)} instead of "
            f"{shown(blocks)} (workspace_bytes=)", MemoryLimitWarning, stacklevel=5,
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
            norm = self.bound.final_norm.module
            self.normed = norm(self.stream[None].to(device_of(norm)))[0]
        with without_autocast(self.stream.device):
            self.state(self.options.stop, self.stream)

    def _propagation(self, workspace_bytes: int | None, recordings: Recordings | None) -> Propagation:
        parts = self.joining[0][0]
        if recordings is not None and len(self.joining) == 1 and parts.moment == "start":
            recorded = recordings.lend(parts.layout, self.options.sharing, workspace_bytes)
            if recorded is not None:
                return recorded
        if self._needs(workspace_bytes).total_bytes > room(self.bound):
            raise MemoryLimitError(self._needed())
        return Propagation(self.bound, self.options.sharing, workspace_bytes, self.lengths, self._rows)

    def layer(self, index: int, trace: Trace) -> None:
        """Move the state through a layer: what joins, the attention, what joins behind it, the MLP, what joins last."""
        device = self.bound.layers[index].device  # a model may be spread over several
        trace = trace.map(lambda tensor: tensor.to(device))
        read = self.read if index == self.layers[-1] else None
        with without_autocast(device):
            self._join(index, "start", trace)
            if self.propagation.layout is not None:
                self.state(index, trace.stream)
            self.propagation.attention(index, trace, read)
            self._join(index, "middle", trace)
            self.propagation.mlp(index, trace, read)
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

    def _needs(self, workspace_bytes: int | None) -> Needs:
        return needs(self.bound, self._rows, self.lengths, workspace_bytes, self.bound.device)

    def _needed(self) -> str:
        """The plan of a run, against what there is."""
        needed = self._needs(self.engine.workspace_bytes)
        return (
            f"{self._rows:,} rows of {sum(self.lengths):,} tokens take {shown(needed.total_bytes)} beside the model (state "
            f"{shown(needed.state_bytes)}, the model's pass {shown(needed.pass_bytes)}, buffers "
            f"{shown(needed.buffer_bytes)}) and {shown(max(0, room(self.bound)))} are free; give fewer or longer "
            "spans, fewer tokens or components; `depass plan` says what fits"
        )


def without_autocast(device: torch.device) -> torch.autocast:
    """Within it our own products keep their dtype; a caller's autocast holds of the model's pass alone."""
    return torch.autocast(device.type, enabled=False)
