"""Passes of a model with decompositions on the way, and what is read from them: the work behind :class:`depass.DePass`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from depass_kernels import BackendError

from ..device_memory import asked_bytes, shown
from ..errors import DePassError, MemoryLimitError, MemoryLimitWarning, NonFiniteError, OptionError
from ..inputs import targets
from ..inputs.prompt import Prompt
from ..inputs.settings import Settings
from ..inputs.targets import Asked, Readout, Target
from ..models import capture
from ..models.bound import BoundModel
from ..models.health import blame, dtype_name, refuse_dropout
from ..models.trace import Trace
from ..models.weights import device_of
from ..propagation.blocks import workspace
from ..propagation.cuda_graphs import Recordings
from ..propagation.needs import needs, room
from ..propagation.propagate import Propagation
from ..results.attribution import Attribution
from ..results.sweep import Sweep
from ..sources.source import Decomposition, Moment
from .request import Case, Options, Pass, Progress
from .scores import _as_it_is, _padded, _probe, conservation_error


@dataclass(frozen=True)
class Engine:
    """A model and how it is run."""

    bound: BoundModel
    tokenizer: Any
    name: str
    workspace_bytes: int | None
    recordings: Recordings | None

    def run(
        self,
        prompts: Sequence[Prompt],
        joining: Sequence[tuple[Decomposition, int]],
        options: Options,
        progress: Progress | None = None,
        keep: Callable[[int, Propagation, Tensor], None] | None = None,
        read: Sequence[Sequence[int]] | None = None,
        recordings: Recordings | None = None,
    ) -> Pass:
        """One pass of the model over prompts, with decompositions of them on the way.

        Where memory runs out in spite of the plan, it is done once more with smaller blocks, and a warning says so.

        Args:
            prompts: whose positions lie one behind the other.
            joining: the decompositions, and of which prompt each is; in the order in which they join.
            options: how.
            progress: told after each layer how many are done, and of how many.
            keep: given the state that enters a layer, after those that start there have joined, and the stream; at last
                what leaves the last layer.
            read: the positions of each decomposition that are read after the last layer; None: all.
            recordings: where a recorded propagation may come from; the caller gives it back.

        Raises:
            ModelError: it drops out at random, or cannot be followed.
            OptionError: a backend that cannot serve.
            MemoryLimitError: it does not fit.
        """
        refuse_dropout(self.bound)
        blocks = workspace(self.workspace_bytes, self.bound.device)
        fewer = max(1, blocks // 8)
        try:
            return self._run(prompts, joining, options, self.workspace_bytes, progress, keep, read, recordings)
        except (RuntimeError, MemoryError) as error:
            asked = asked_bytes(error)
            if asked is None or isinstance(error, DePassError):
                raise
        # out of the handler, so that the error no longer holds what did fit
        warnings.warn(
            f"out of memory, asked for {shown(asked)}; once more with blocks of {shown(fewer)} instead of "
            f"{shown(blocks)} (workspace_bytes=)", MemoryLimitWarning, stacklevel=5,
        )  # fmt: skip
        if self.bound.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            return self._run(prompts, joining, options, fewer, progress, keep, read, None)
        except (RuntimeError, MemoryError) as error:
            if asked_bytes(error) is None or isinstance(error, DePassError):
                raise
            raise MemoryLimitError(
                f"out of memory twice, with blocks of {shown(blocks)} and of {shown(fewer)}: "
                f"{self._needed(prompts, joining)}"
            ) from error

    def _run(
        self,
        prompts: Sequence[Prompt],
        joining: Sequence[tuple[Decomposition, int]],
        options: Options,
        workspace_bytes: int | None,
        progress: Progress | None,
        keep: Callable[[int, Propagation, Tensor], None] | None,
        read: Sequence[Sequence[int]] | None,
        recordings: Recordings | None,
    ) -> Pass:
        bound = self.bound
        layers = range(min(made.layer for made, _ in joining), options.stop)
        propagation: Propagation | None = None
        if recordings is not None and len(joining) == 1 and joining[0][0].moment == "start":
            propagation = recordings.lend(joining[0][0].layout, options.sharing, workspace_bytes)
        if propagation is None:
            rows = sum(made.layout.rows for made, _ in joining)
            lengths = [len(made.ids) for made in prompts]
            if needs(bound, rows, lengths, workspace_bytes, bound.device).total_bytes > room(bound):
                raise MemoryLimitError(self._needed(prompts, joining))
            propagation = Propagation(bound, options.sharing, workspace_bytes, lengths, rows)
        going: Propagation = propagation

        def join(layer: int, moment: Moment, trace: Trace) -> None:
            now = [one for one in joining if (one[0].layer, one[0].moment) == (layer, moment)]
            if now:
                going.join(now, trace)

        def on_layer(index: int, trace: Trace) -> None:
            device = bound.layers[index].device  # a model may be spread over several
            trace = trace.map(lambda tensor: tensor.to(device))
            with _as_it_is(device):
                join(index, "start", trace)
                if keep is not None and going.layout is not None:
                    keep(index, going, trace.stream)
                going.step(index, trace, lambda: join(index, "middle", trace), read if index == layers[-1] else None)
                join(index, "end", trace)
            if progress is not None:
                progress(index - layers.start + 1, len(layers))

        with_gate_total = options.sharing.rule == "taylor"
        try:
            stream, normed = capture.run(bound, [made.ids for made in prompts], on_layer, layers, with_gate_total)
        except BackendError as error:
            raise OptionError(str(error)) from error
        if options.stop < len(bound.layers):
            norm = bound.final_norm.module
            normed = norm(stream[None].to(device_of(norm)))[0]
        if keep is not None:
            with _as_it_is(stream.device):
                keep(options.stop, going, stream)
        dtype = dtype_name(bound.dtype) + (", quantised" if bound.is_quantized else "")
        return Pass(going, stream, normed, dtype)

    def _needed(self, prompts: Sequence[Prompt], joining: Sequence[tuple[Decomposition, int]]) -> str:
        """The plan of a run, against what there is."""
        rows, lengths = sum(made.layout.rows for made, _ in joining), [len(made.ids) for made in prompts]
        needed = needs(self.bound, rows, lengths, self.workspace_bytes, self.bound.device)
        return (
            f"{rows:,} rows of {sum(lengths):,} tokens take {shown(needed.total_bytes)} beside the model (state "
            f"{shown(needed.state_bytes)}, the model's pass {shown(needed.pass_bytes)}, buffers "
            f"{shown(needed.buffer_bytes)}) and {shown(max(0, room(self.bound)))} are free; give fewer or longer "
            "spans, fewer tokens or components; `depass plan` says what fits"
        )

    def attribute(
        self, cases: Sequence[Case], options: Options, progress: Progress | None = None
    ) -> list[Attribution | DePassError]:
        """The cases' results from one pass of the model; an error in the place of one that has none."""
        probes: dict[tuple[int, int], tuple[Tensor, float]] = {}  # by case and target: scores [M], logit

        def read(layer: int, propagation: Propagation, stream: Tensor) -> None:
            for i, case in enumerate(cases):
                for j, asked in enumerate(case.asked):
                    if asked.layer == layer:
                        probes[i, j] = _probe(propagation, stream, i, case, asked)

        joining = [(case.parts, i) for i, case in enumerate(cases)]
        last = [[one.position for one in case.asked] for case in cases]
        with capture.running:  # also while weights are read: another thread's pass may have them elsewhere
            done = self.run([case.prompt for case in cases], joining, options, progress, read, last, self.recordings)
            logits = self._logits([case.asked for case in cases], done)
            found = [self._result(i, case, options, done, logits, probes) for i, case in enumerate(cases)]
        if self.recordings is not None:
            self.recordings.give_back(done.propagation)
        return found

    def sweep(
        self,
        prompt: Prompt,
        groups: Sequence[Sequence[Sequence[Decomposition]]],
        asked: Sequence[Asked],
        options: Options,
        kind: Literal["heads", "neurons", "modules"],
        progress: Progress | None = None,
    ) -> Sweep:
        """A pass for each group of layers; a layer is one decomposition, or attention and MLP."""
        of = sum(options.stop - group[0][0].layer for group in groups)
        began, served = 0, dict[str, set[str]]()
        readouts: list[Readout] = []
        rows: list[Tensor] = []  # [targets, sources], of each decomposition
        for group in groups:

            def told(done: int, _: int, before: int = began) -> None:
                if progress is not None:
                    progress(before + done, of)

            flat = [one for layer in group for one in layer]
            last = [[one.position for one in asked]] * len(flat)
            with capture.running:  # as in attribute
                done = self.run([prompt], [(one, 0) for one in flat], options, told, read=last)
                began += options.stop - flat[0].layer
                if not readouts:
                    logits = self._logits([asked], done)
                    readouts = [made for one in asked for made in self._readouts(one, one.position, done, logits)]
                    for readout in readouts:
                        self._must_be_finite(readout.target, readout.logit)
                for index, one in enumerate(flat):
                    of_one = [self._score(done, index, 0, readout, len(one.sources)) for readout in readouts]
                    rows.append(torch.stack(of_one))
            for op, names in done.propagation.served.items():
                served.setdefault(op, set()).update(names)
            dtype = done.dtype
            del done  # its state makes room for the next group's
        parts = [one for group in groups for layer in group for one in layer]
        always = [len([s for s in one.sources if s.kind in ("bias", "rest")]) for one in parts]
        per_layer = len(groups[0][0])
        named = torch.stack([row[:, first:] for row, first in zip(rows, always, strict=True)], 1)  # [T, L·per, C]
        rest = torch.stack([row[:, first - 1] for row, first in zip(rows, always, strict=True)], 1)
        bias = torch.stack([row[:, : first - 1].sum(1) for row, first in zip(rows, always, strict=True)], 1)
        logits_of = torch.tensor([readout.logit for readout in readouts], dtype=torch.float64, device="cpu")
        error = conservation_error(torch.stack(rows, 1), logits_of[:, None])
        if not all(bool(row.isfinite().all()) for row in rows):
            raise NonFiniteError(f"scores are not finite; {blame(self.bound)}")
        shape = (len(readouts), -1, per_layer) if per_layer > 1 else (len(readouts), -1)
        layers = tuple(layer[0].layer for group in groups for layer in group)
        sources = [s for s in parts[0].sources if s.kind not in ("bias", "rest")]
        return Sweep(
            scores=named.reshape(len(readouts), len(layers), -1).float(),
            rest=rest.reshape(shape).float(),
            bias=bias.reshape(shape).float(),
            layers=layers,
            columns=(0, 1) if kind == "modules" else tuple(s.index or 0 for s in sources),
            kind=kind,
            targets=tuple(readout.target for readout in readouts),
            target_logits=logits_of.float(),
            conservation_error=error.reshape(shape).float(),
            prompt=prompt,
            settings=self._settings(options, layers[0], False, dtype, served),
        )

    def _logits(self, asked: Sequence[Sequence[Asked]], done: Pass) -> dict[int, Tensor]:
        """The head's output ``[V]`` by position of the packed prompts, where a target asks for it."""
        starts = done.propagation.prompt_start
        wanted = sorted(
            {starts[i] + one.position for i, of_one in enumerate(asked) for one in of_one if one.layer is None}
        )
        if not wanted:
            return {}
        return dict(zip(wanted, self.bound.logits(done.normed[wanted]), strict=True))

    def _readouts(self, asked: Asked, position: int, done: Pass, logits: dict[int, Tensor]) -> list[Readout]:
        at = logits[position].to(self.bound.state_dtype)
        return targets.fill(asked, done.normed[position].to(at), at, self.bound, self.tokenizer)

    def _result(
        self,
        index: int,
        case: Case,
        options: Options,
        done: Pass,
        logits: dict[int, Tensor],
        probes: dict[tuple[int, int], tuple[Tensor, float]],
    ) -> Attribution | DePassError:
        first = done.propagation.prompt_start[index]
        found: list[tuple[Target, Tensor, float]] = []  # scores [M], logit
        for j, asked in enumerate(case.asked):
            if asked.layer is not None:
                target = Target(asked.label, "probe", asked.position, layer=asked.layer, intercept=asked.intercept)
                scores, logit = probes[index, j]
                found.append((target, _padded(scores, len(case.parts.sources)), logit))
                continue
            for readout in self._readouts(asked, first + asked.position, done, logits):
                row = self._score(done, index, index, readout, len(case.parts.sources))
                found.append((readout.target, row, readout.logit))
        scores = torch.stack([row for _, row, _ in found])
        own = torch.tensor([logit for _, _, logit in found], dtype=torch.float64, device="cpu")
        try:
            for target, _, logit in found:
                self._must_be_finite(target, logit)
        except NonFiniteError as error:
            return error
        if not bool(scores.isfinite().all()):
            return NonFiniteError(f"scores are not finite; {blame(self.bound)}")
        return Attribution(
            scores=scores.float(),
            sources=case.parts.sources,
            targets=tuple(target for target, _, _ in found),
            target_logits=own.float(),
            conservation_error=conservation_error(scores, own).float(),
            prompt=case.prompt,
            settings=self._settings(
                options, case.parts.layer, case.parts.excluded, done.dtype, done.propagation.served
            ),
        )

    def _score(self, done: Pass, staircase: int, prompt: int, readout: Readout, sources: int) -> Tensor:
        """``score[m] = w · final_norm_frozen(X[m, q])``: ``[sources]`` on the CPU, in the state's dtype."""
        norm, position = self.bound.final_norm, readout.target.position
        rows = done.propagation.rows_at(staircase, position)
        w = readout.w.to(rows.device)
        folded = norm.fold(w[None].to(device_of(norm.module)))[0].to(rows.device)  # [D]
        scale = norm.scale(done.stream[done.propagation.prompt_start[prompt] + position], rows.dtype).to(rows.device)
        with _as_it_is(rows.device):
            scores = (rows @ folded * scale).cpu()
        if self.bound.has_bias:
            beta = norm.beta()
            scores[0] += readout.constant + (0.0 if beta is None else float(w @ beta.to(w)))
        return _padded(scores, sources)

    def _must_be_finite(self, target: Target, logit: float) -> None:
        if not math.isfinite(logit):
            raise NonFiniteError(
                f"the model's own logits are not finite ({logit} for {target.label!r}); {blame(self.bound)}"
            )

    def _settings(
        self, options: Options, start: int, excluded: bool, dtype: str, served: dict[str, set[str]]
    ) -> Settings:
        return Settings(
            model=self.name,
            dtype=dtype,
            rule=options.sharing.rule,
            temperature=options.sharing.temperature,
            exclude_bos=excluded,
            start_layer=start,
            stop_layer=options.stop,
            backends={op: "+".join(sorted(names)) for op, names in sorted(served.items())},
        )
