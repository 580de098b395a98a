"""Linear rules: sources of any kind, and sweeps over all layers, scored by one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..device_memory import asked_bytes, shown
from ..errors import DePassError, MemoryLimitError, MemoryLimitWarning, warn
from ..inputs.prompt import Prompt
from ..inputs.settings import Settings
from ..inputs.targets import Asked, Sum
from ..models import attention
from ..models.health import dtype_name
from ..models.trace import Trace
from ..propagation.needs import room
from ..sources.components import Heads, Modules, Neurons, RoutedExperts
from ..sources.source import Decomposition
from .backward import Backward, LayerGradients, Parts, StreamGradient
from .linear_memory import linear_needs, must_fit, recomputes
from .passes import Engine
from .request import Case, Options, Progress
from .scores import Scored
from .sweeps import Swept

AnyPass = TypeVar("AnyPass", bound="LinearPass")


def scored(engine: Engine, cases: Sequence[Case], options: Options, progress: Progress | None = None) -> list[Scored]:
    """Score cases in one pass there and back."""
    prompts, asked = [case.prompt for case in cases], [case.asked for case in cases]
    parts, sums = [[case.parts] for case in cases], [case.sums for case in cases]
    done = repeated(partial(_SourcesPass, engine, prompts, asked, parts, options, progress, sums=sums))
    return [
        Scored(
            targets=tuple(readout.target for readout in readouts),
            logits=torch.tensor([readout.logit for readout in readouts], dtype=torch.float64, device="cpu"),
            rows=[rows[:, :-1]],
            balance=rows[:, -1],
            settings=done.settings(case.parts.layer, i),
        )
        for i, (case, (rows,), readouts) in enumerate(zip(cases, done.scores, done.readouts, strict=True))
    ]


def swept(
    engine: Engine,
    prompt: Prompt,
    layers: Sequence[Sequence[Decomposition]],
    asked: Sequence[Asked],
    options: Options,
    progress: Progress | None = None,
) -> Swept:
    """Score the components of all layers in one pass; a layer has one decomposition, or for modules two."""
    flat = [parts for layer in layers for parts in layer]
    done = repeated(partial(_SourcesPass, engine, [prompt], [asked], [flat], options, progress))
    rows = done.scores[0]
    return Swept(
        done.readouts[0], [row[:, :-1] for row in rows], torch.stack([row[:, -1] for row in rows], 1),
        done.settings(flat[0].layer, 0),
    )  # fmt: skip


def repeated(make: Callable[[bool], AnyPass]) -> AnyPass:
    """Run a pass; if memory runs out in spite of the plan, warn and repeat it once with less in memory at a time.

    Args:
        make: a function that makes the pass, given whether it is sparing.
    """
    try:
        return _once(make(False))
    except (RuntimeError, MemoryError) as error:
        failed = asked_bytes(error)
        if failed is None or isinstance(error, DePassError):
            raise
    # outside the handler, so that the error no longer holds the memory that was allocated
    warn(
        f"out of memory{f' while allocating {shown(failed)}' if failed else ''}; retrying with the activations of one layer "
        "and one target at a time", MemoryLimitWarning
    )  # fmt: skip
    sparing = make(True)
    if sparing.bound.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        return _once(sparing)
    except (RuntimeError, MemoryError) as error:
        if asked_bytes(error) is None or isinstance(error, DePassError):
            raise
        raise MemoryLimitError(
            "out of memory twice, the second time with the activations of one layer and one target at a time, for "
            f"{sum(sparing.lengths):,} tokens under a linear rule; use fewer tokens or targets"
        ) from error


def _once(done: AnyPass) -> AnyPass:
    with attention.running:
        done.run()
    return done


class LinearPass(Backward):
    """A backward pass with the options of a call. Layers are run again where their activations do not fit into memory.

    Args:
        engine: the model and its settings.
        prompts: the prompts.
        asked: the targets of each prompt.
        start: the layer at whose input the pass ends.
        options: the options of the pass.
        progress: a function that is called after each layer with the number of layers done and their total.
        sparing: whether to hold the activations of one layer, and the gradients of one target, at a time.
        sums: for each prompt, the sums of targets that go back in their place; see :class:`Backward`.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        asked: Sequence[Sequence[Asked]],
        start: int,
        options: Options,
        progress: Progress | None,
        sparing: bool = False,
        sums: Sequence[Sequence[Sum]] = (),
    ) -> None:
        ids = [prompt.ids for prompt in prompts]
        counts = [sum(each.k or 1 for each in of_prompt) for of_prompt in asked]
        targets = max(len(own) or count for own, count in zip(sums or [()] * len(counts), counts, strict=True))
        layers, available = options.stop - start, room(engine.bound)
        assert options.paths is not None
        needed = linear_needs(engine.bound, [len(each) for each in ids], layers, targets, options.paths)
        must_fit(needed, sum(len(each) for each in ids), targets, available)
        recompute = sparing or recomputes(needed, layers, available)
        super().__init__(
            engine.bound, ids, asked, options.paths, start, options.stop, recompute, 1 if sparing else None,
            engine.tokenizer, sums,
        )  # fmt: skip
        self.engine, self.options, self.progress = engine, options, progress
        self.begins = [sum(self.lengths[:index]) for index in range(len(self.lengths))]

    def settings(self, start: int, prompt: int) -> Settings:
        """The settings of the pass, as the result of one of its prompts records them."""
        return Settings(
            model=self.engine.name,
            dtype=dtype_name(self.bound.dtype),
            rule=self.options.sharing.rule,
            temperature=self.options.sharing.temperature,
            exclude_bos=False,
            start_layer=start,
            stop_layer=self.stop,
            altered=self.altered.get(prompt),
            padded=not self.packing.packed and len(set(self.lengths)) > 1,
            engine="backward",
            family=self.bound.origin,
            of=self.options.of,
        )

    def passed(self, layer: int) -> None:
        """Report the progress."""
        if self.progress is not None:
            self.progress(self.stop - layer, self.stop - self.start)


class _SourcesPass(LinearPass):
    """A pass that scores the sources of decompositions.

    Args:
        engine, prompts, asked, options, progress, sparing, sums: see :class:`LinearPass`.
        parts: the decompositions of each prompt, at least one.

    Attributes:
        scores: by prompt and decomposition, ``[targets, sources + 1]`` on the CPU in the state's dtype; the last column is
            the balance (:attr:`depass.rules.PathWeights.balance`).
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        asked: Sequence[Sequence[Asked]],
        parts: Sequence[Sequence[Decomposition]],
        options: Options,
        progress: Progress | None,
        sparing: bool = False,
        sums: Sequence[Sequence[Sum]] = (),
    ) -> None:
        start = min(each.layer for of_prompt in parts for each in of_prompt)
        super().__init__(engine, prompts, asked, start, options, progress, sparing, sums)
        self.parts = parts
        self._scores: dict[tuple[int, int], Tensor] = {}

    @property
    def scores(self) -> list[list[Tensor]]:
        """By prompt and decomposition, ``[targets, sources + 1]``; a probe before a decomposition is refused earlier."""
        return [[self._of(i, j) for j in range(len(of_prompt))] for i, of_prompt in enumerate(self.parts)]

    def stream(self, gradient: StreamGradient) -> None:
        """Score the decompositions of the stream at this layer's input."""
        per_position = None
        for i, of_prompt in enumerate(self.parts):
            for j, parts in enumerate(of_prompt):
                if (parts.layer, parts.moment) != (gradient.layer, "start"):
                    continue
                own = slice(self.begins[i], self.begins[i] + self.lengths[i])
                if parts.spec is None:
                    per_position = gradient.scores() if per_position is None else per_position
                    scores = _of_spans(parts, per_position[:, own])
                else:
                    scores = _of_rows(parts, gradient.gradient[:, own], gradient.x[own], self.bound.state_dtype)
                    if gradient.beside is not None:
                        scores = scores + _of_spans(parts, gradient.beside[:, own])
                if self.bound.has_bias:
                    scores[:, 0] += gradient.behind[:, i]
                self._put(i, j, gradient.targets, torch.cat([scores, gradient.balance[:, i, None]], 1))

    def layer(self, gradients: LayerGradients) -> None:
        """Score the decompositions into this layer's components."""
        components = _Components(gradients)
        for i, of_prompt in enumerate(self.parts):
            for j, parts in enumerate(of_prompt):
                if parts.layer == gradients.layer and parts.moment != "start":
                    self._put(i, j, gradients.targets, components.scores(parts, i))

    def _of(self, prompt: int, number: int) -> Tensor:
        sources = len(self.parts[prompt][number].sources) + 1
        empty = torch.zeros(len(self.readouts[prompt]), sources, dtype=self.bound.state_dtype, device="cpu")
        return self._scores.setdefault((prompt, number), empty)

    def _put(self, prompt: int, number: int, some: Sequence[int], scores: Tensor) -> None:
        """Keep the scores of the targets that the prompt has."""
        into = self._of(prompt, number)
        own = [(row, target) for row, target in enumerate(some) if target < len(into)]
        into[[target for _, target in own]] = scores.cpu()[[row for row, _ in own]]


def _of_spans(parts: Decomposition, per_position: Tensor) -> Tensor:
    """Scores ``[T, M]`` of sources of the prompt: sums of the scores ``[T, N]`` of their tokens."""
    scores = per_position.new_zeros(len(per_position), len(parts.sources))
    return scores.index_add(1, parts.owner.to(scores.device), per_position)


def _of_rows(parts: Decomposition, gradient: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores ``[T, M]`` of parts of the stream ``x`` ``[N, D]``: their vectors times its gradients ``[T, N, D]``."""
    rows = torch.zeros(parts.layout.rows, x.shape[1], dtype=dtype, device=x.device)
    parts.fill(rows, Trace(x))
    position = parts.layout.position_of_row(x.device)
    source = torch.arange(len(rows), device=x.device) - parts.layout.to(x.device).row_start[position]
    per_row = torch.stack([(of_target[position].to(dtype) * rows).sum(-1) for of_target in gradient])
    return per_row.new_zeros(len(gradient), len(parts.sources)).index_add(1, source, per_row)


class _Named(NamedTuple):
    """The scores of a layer's components, for all prompts of the pass."""

    every: Tensor  # [T, B], of all components at all positions
    rest: Tensor  # [T, B], of what is no component
    bias: Tensor  # [T, B]
    balance: Tensor  # [T, B]


_PARTS: dict[type, Parts] = {Heads: "heads", Neurons: "neurons", RoutedExperts: "experts"}


class _Components:
    """The components of one layer, each kind computed when it is first asked for."""

    def __init__(self, gradients: LayerGradients) -> None:
        self.gradients = gradients
        self._kept: dict[Parts, tuple[_Named, Tensor]] = {}

    def scores(self, parts: Decomposition, prompt: int) -> Tensor:
        """``[T, M + 1]`` of a prompt's decomposition; what it does not name is in the rest, the balance is last."""
        spec, gradients = parts.spec, self.gradients
        kind: Parts = spec.module if isinstance(spec, Modules) else _PARTS[type(spec)]
        if kind not in self._kept:
            self._kept[kind] = self._all(kind)
        (every, rest, bias, balance), by_position = self._kept[kind]
        begin, length = sum(gradients.lengths[:prompt]), gradients.lengths[prompt]
        positions = list(range(length)) if spec.positions is None else sorted(int(p) % length for p in spec.positions)
        where = torch.tensor(positions, device=by_position.device) + begin
        if kind in ("neurons", "experts"):
            counts = torch.zeros(sum(gradients.lengths), dtype=torch.bool, device=by_position.device)
            counts[where] = True
            by_prompt = gradients.neurons(counts) if kind == "neurons" else gradients.experts(counts)
            named = by_prompt[:, prompt]  # [T, F or E]
        else:
            named = by_position[:, where].sum(1)  # [T, H], or [T, 1] of a module
        ids = [source.index or 0 for source in parts.sources if source.kind not in ("bias", "rest")]
        named = named[:, ids]
        columns = [(rest + every)[:, prompt, None] - named.sum(1, keepdim=True), named, balance[:, prompt, None]]
        if gradients.bound.has_bias:
            columns.insert(0, bias[:, prompt, None])
        return torch.cat(columns, 1)

    def _all(self, kind: Parts) -> tuple[_Named, Tensor]:
        gradients, of_prompts = self.gradients, self.gradients.of_prompts
        by_position: Tensor = gradients.after.behind
        if kind in ("neurons", "experts"):
            every = (gradients.neurons() if kind == "neurons" else gradients.experts()).sum(-1)
        else:
            of_kind: dict[str, Callable[[], Any]] = {
                "heads": gradients.heads, "attn": lambda: gradients.attention()[..., None],
                "mlp": lambda: gradients.mlp()[..., None],
            }  # fmt: skip
            by_position = of_kind[kind]()
            every = of_prompts(by_position.sum(-1))
        rest, bias, balance = of_prompts(gradients.rest(kind)), gradients.bias(kind), gradients.balance(kind)
        return _Named(every, rest, bias, balance), by_position
