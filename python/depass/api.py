"""``DePass``: attribute what a model said to the parts of its prompt."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from depass_kernels import BackendError, SourceLayout
from depass_kernels.backends import NAMES, RULES

from . import lockstep, prompt, smollm2, sources, targets
from .components import COMPONENTS, decompose_components
from .errors import ConservationError, ConservationWarning, DePassError, ModelError, NonFiniteError, OptionError
from .families import BoundModel, Family, bind
from .graphs import Recordings
from .propagate import MLPSharing, Propagation
from .result import Attribution, Settings
from .sources import Decomposition, Moment, Source
from .targets import Target

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class States:
    """The decomposed state itself, as it enters one or several layers.

    Attributes:
        rows: by layer, ``[R, D]`` in the staircase's rows, in the state's dtype, on the CPU.
        residual: by layer, ``[N, D]``, the model's own residual stream, which the sources add up to.
        layout: where the rows lie.
        sources: what the sources are.
    """

    rows: dict[int, Tensor]
    residual: dict[int, Tensor]
    layout: SourceLayout
    sources: tuple[Source, ...]

    def dense(self, layer: int) -> Tensor:
        """The state entering ``layer`` as ``[M, N, D]``, zeros where a source cannot reach."""
        if layer not in self.rows:
            raise OptionError(f"layer {layer} was not kept; there are {sorted(self.rows)}")
        rows, layout = self.rows[layer], self.layout
        active = torch.arange(len(self.sources)) < layout.counts[:, None]  # [N, M]
        full = rows.new_zeros(layout.positions, len(self.sources), rows.shape[1])
        full[active] = rows
        return full.transpose(0, 1)


class DePass:
    """Attribute a causal language model's outputs to its inputs by decomposed forward passes (arXiv 2510.18462).

    Args:
        model: a causal language model of HuggingFace transformers; never modified.
        tokenizer: its tokenizer, or None where prompts and targets are ids.
        mlp_rule: how an MLP's output is shared out: ``softmax`` (the paper's), ``max``, ``relu``, ``linear``, ``taylor``.
        temperature: of the softmax rule, in units of the pre-activation.
        exclude_bos: whether the first token takes no part in later positions' MLPs; ``"auto"``: where it is the
            tokenizer's BOS token.
        backend: of the ops: ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpu"`` or ``"reference"``; what ``depass backends``
            says cannot serve here is refused, never replaced. Results say who served in ``settings.backends``.
        workspace_bytes: size of the block buffers, by device without it; changes no result beyond rounding.
        cuda_graphs: replay the layers of short prompts of which a like one came before (as many tokens or the same spans)
            as CUDA graphs; for many short prompts one by one on one GPU.
        family: where the model's modules are, for families that are not known.

    Raises:
        ModelError: a model that cannot be attributed.
        OptionError: an option with a value that it does not have.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        mlp_rule: str = "softmax",
        temperature: float = 0.1,
        exclude_bos: bool | Literal["auto"] = "auto",
        backend: str = "auto",
        workspace_bytes: int | None = None,
        cuda_graphs: bool = False,
        family: Family | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.name: str = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        self.mlp_rule, self.temperature, self.exclude_bos = mlp_rule, temperature, exclude_bos
        self.backend, self.workspace_bytes = backend, workspace_bytes
        self._bound = bind(model, family)
        if workspace_bytes is not None and workspace_bytes < 1:
            raise OptionError(f"workspace_bytes must be positive, got {workspace_bytes}")
        self._sharing(mlp_rule, temperature)
        _check_exclude(exclude_bos)
        devices = {parameter.device for parameter in model.parameters()}
        if cuda_graphs and (len(devices) > 1 or next(iter(devices)).type != "cuda"):
            raise OptionError(
                f"cuda_graphs=True needs a model on one CUDA device, this one lies on {', '.join(map(str, devices))}"
            )
        self._recordings = Recordings(self._bound) if cuda_graphs else None

    @staticmethod
    def from_pretrained(
        name_or_path: str | os.PathLike[str] = smollm2.NAME,
        *,
        dtype: torch.dtype | str = "auto",
        device_map: Any = None,
        say: Callable[[str], None] = lambda message: None,
        **options: Any,
    ) -> DePass:
        """Load a model and its tokenizer with transformers.

        Args:
            name_or_path: a folder, a name on the hub, or ``"smollm2"``, the embedded default.
            dtype: of the weights; ``"auto"``: as saved.
            device_map: one device, or a map over several as transformers takes it (which needs accelerate).
            say: told in a line what takes long.
            options: of :class:`DePass`.

        Raises:
            ModelError: there is no such model, or it cannot be attributed.
        """
        name = os.fspath(name_or_path)
        path = os.fspath(smollm2.folder(say)) if name == smollm2.NAME else name
        if not os.path.isdir(path) and (os.path.isabs(path) or path.startswith((".", "~"))):
            raise ModelError(f"the model path {name!r} is no folder")
        model, tokenizer = _load(name, path, dtype, device_map)
        made = DePass(model, tokenizer, **options)
        made.name = name
        return made

    @torch.no_grad()
    def attribute(
        self,
        prompt: Any,
        target: Any = None,
        *,
        sources: Any = "token",
        start_layer: int = 0,
        stop_layer: int | None = None,
        mlp_rule: str | None = None,
        temperature: float | None = None,
        exclude_bos: bool | Literal["auto"] | None = None,
        strict: bool = False,
        progress: Progress | None = None,
    ) -> Attribution:
        """Split the targets' logits into the contributions of the prompt's parts (DePass, section 3).

        Args:
            prompt: one prompt: a string, chat messages (a list of dicts), or ids (a list of ints or a 1-D tensor).
            target: None (the model's own next token), a string or id, :class:`TopK`, :class:`Token`, :class:`Contrast`,
                :class:`Direction`, or a list of these.
            sources: ``"token"``, ``"word"``, ``"sentence"`` or :class:`Spans`; or what the model's own parts put into the
                stream: :class:`Heads`, :class:`Neurons`, :class:`Modules`, :class:`Subspace`, :class:`Custom`.
            start_layer: the layer whose input stream is decomposed, from 0.
            stop_layer: one past the last layer, the model's last without it; before that, scores are read from the
                stream there through the final norm and head (a logit lens).
            mlp_rule: instead of the constructor's, as ``temperature`` and ``exclude_bos``.
            temperature: of the softmax rule.
            exclude_bos: see :class:`DePass`.
            strict: raise instead of warn where the scores do not add up to the logit within tolerance.
            progress: called after each layer with the number of layers done and of all.

        Raises:
            PromptError, TargetError, SourceError, OptionError, ModelError: something that cannot be attributed.
            NonFiniteError: the model's logits or the parts are not finite.
            ConservationError: with ``strict``, scores that do not add up.
        """
        run = self._options(start_layer, stop_layer, mlp_rule, temperature, exclude_bos)
        found = self._attribute([self._case(prompt, target, sources, run)], run, progress)[0]
        if isinstance(found, DePassError):
            raise found
        self._judge(found, strict)
        return found

    @torch.no_grad()
    def states(
        self,
        prompt: Any,
        layers: int | Sequence[int] | None = None,
        *,
        sources: Any = "token",
        start_layer: int = 0,
        stop_layer: int | None = None,
        mlp_rule: str | None = None,
        temperature: float | None = None,
        exclude_bos: bool | Literal["auto"] | None = None,
        on_state: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> States:
        """The decomposed state as it enters layers: ``Σ_m X[m, t] = x[t]`` at each (design section 1).

        Args:
            prompt: as for :meth:`attribute`, as the other arguments.
            layers: the layers whose input state is kept, ``stop_layer`` for the state after the last; all without it.
            sources: see :meth:`attribute`.
            start_layer: see :meth:`attribute`.
            stop_layer: see :meth:`attribute`.
            mlp_rule: see :meth:`attribute`.
            temperature: see :meth:`attribute`.
            exclude_bos: see :meth:`attribute`.
            on_state: given each layer, its state ``[R, D]`` and stream ``[N, D]`` on the model's device, which it may read
                only during the call; then nothing is kept.

        Raises:
            PromptError, SourceError, OptionError, ModelError: something that cannot be decomposed.
            NonFiniteError: a state is not finite.
        """
        run = self._options(start_layer, stop_layer, mlp_rule, temperature, exclude_bos)
        case = self._case(prompt, None, sources, run)
        there = case.layers(run)
        given = layers if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
        wanted = there if layers is None else tuple(given)
        for layer in wanted:
            if not isinstance(layer, int) or layer not in there:
                raise OptionError(f"layers: {layer!r} is none of the layers {there.start} to {there.stop - 1}")
        rows: dict[int, Tensor] = {}
        residual: dict[int, Tensor] = {}

        def keep(layer: int, propagation: Propagation, stream: Tensor) -> None:
            if layer not in wanted:
                return
            if not bool(propagation.state.isfinite().all()):
                raise NonFiniteError(f"the state entering layer {layer} is not finite in {_name(self._bound.dtype)}")
            if on_state is not None:
                on_state(layer, propagation.state, stream)
            else:
                rows[layer] = propagation.state.to("cpu", copy=True)
                residual[layer] = stream.to("cpu", copy=True)

        self._run([case.prompt], [(case.parts, 0)], run, keep=keep)
        return States(rows, residual, case.parts.layout, case.parts.sources)

    def _options(
        self,
        start_layer: int,
        stop_layer: int | None,
        mlp_rule: str | None,
        temperature: float | None,
        exclude_bos: bool | Literal["auto"] | None,
    ) -> _Options:
        depth = len(self._bound.layers)
        stop_layer = depth if stop_layer is None else stop_layer
        if not (
            isinstance(start_layer, int) and isinstance(stop_layer, int) and 0 <= start_layer < stop_layer <= depth
        ):
            raise OptionError(
                f"start_layer={start_layer}, stop_layer={stop_layer}: need 0 <= start < stop <= {depth}, the layers of "
                f"{self._bound.name}"
            )
        sharing = self._sharing(
            self.mlp_rule if mlp_rule is None else mlp_rule, self.temperature if temperature is None else temperature
        )
        exclude = _check_exclude(self.exclude_bos if exclude_bos is None else exclude_bos)
        return _Options(start_layer, stop_layer, sharing, exclude)

    def _case(self, given: Any, target: Any, wanted: Any, run: _Options) -> _Case:
        """Check one prompt and what is asked about it, before any work is done."""
        bound = self._bound
        made = prompt.encode(given, self.tokenizer, bound)
        if isinstance(wanted, COMPONENTS):
            if run.start != 0:
                raise OptionError(f"start_layer={run.start}: {type(wanted).__name__} names its own layer; leave it out")
            parts = decompose_components(wanted, len(made.ids), bound)
            if parts.layer >= run.stop:
                raise OptionError(
                    f"stop_layer={run.stop}: must lie behind layer {parts.layer} of {type(wanted).__name__}"
                )
        else:
            bos = None if self.tokenizer is None else self.tokenizer.bos_token_id
            parts = sources.decompose(made, wanted, run.start, bound.has_bias, run.exclude, bos)
        case = _Case(made, parts, ())
        asked = targets.check(target, len(made.ids), case.layers(run), self.tokenizer, bound)
        return replace(case, asked=tuple(asked))

    def _attribute(
        self, cases: Sequence[_Case], run: _Options, progress: Progress | None = None
    ) -> list[Attribution | DePassError]:
        """The cases' results from one pass of the model; an error in the place of one that has none."""
        probes: dict[tuple[int, int], tuple[Tensor, float]] = {}  # by case and target: scores [M], logit

        def read(layer: int, propagation: Propagation, stream: Tensor) -> None:
            for i, case in enumerate(cases):
                for j, asked in enumerate(case.asked):
                    if asked.layer == layer and asked.w is not None:
                        probes[i, j] = _probe(propagation, stream, i, case, asked)

        propagation, stream, normed = self._run(
            [case.prompt for case in cases], [(case.parts, i) for i, case in enumerate(cases)], run, progress, read
        )
        logits = self._logits(cases, normed, propagation)
        found = [
            self._result(i, case, run, propagation, stream, normed, logits, probes) for i, case in enumerate(cases)
        ]
        if self._recordings is not None:
            self._recordings.give_back(propagation)
        return found

    def _logits(self, cases: Sequence[_Case], normed: Tensor, propagation: Propagation) -> dict[int, Tensor]:
        """The head's output ``[V]`` by position of the packed prompts, where a target asks for it."""
        starts = propagation.prompt_start
        wanted = sorted({starts[i] + asked.position for i, case in enumerate(cases) for asked in case.asked})
        head = self._bound.head
        return dict(zip(wanted, head(normed[wanted].to(head.weight.device)), strict=True))

    def _result(
        self,
        index: int,
        case: _Case,
        run: _Options,
        propagation: Propagation,
        stream: Tensor,
        normed: Tensor,
        logits: dict[int, Tensor],
        probes: dict[tuple[int, int], tuple[Tensor, float]],
    ) -> Attribution | DePassError:
        bound, first = self._bound, propagation.prompt_start[index]
        found: list[Target] = []
        rows: list[Tensor] = []
        sums: list[float] = []
        for j, asked in enumerate(case.asked):
            if asked.layer is not None:
                scores, logit = probes[index, j]
                found.append(Target(asked.label, "probe", asked.position, layer=asked.layer, intercept=asked.intercept))
                rows.append(scores)
                sums.append(logit)
                continue
            at = logits[first + asked.position].to(bound.state_dtype)
            vector = normed[first + asked.position].to(at)
            for readout in targets.fill(asked, vector, at, bound, self.tokenizer):
                found.append(readout.target)
                rows.append(_score(propagation, stream, index, index, case.parts, readout, bound))
                sums.append(readout.logit)
        for target, logit in zip(found, sums, strict=True):
            if not math.isfinite(logit):
                return NonFiniteError(
                    f"the model's own logits are not finite ({logit} for {target.label!r}); "
                    f"its weights or its dtype ({_name(bound.dtype)}) do not carry this prompt"
                )
        scores = torch.stack(rows)
        if not bool(scores.isfinite().all()):
            return NonFiniteError(f"scores are not finite in {_name(bound.dtype)}; try bfloat16 or float32")
        own = torch.tensor(sums, dtype=torch.float64)
        return Attribution(
            scores=scores.float(),
            sources=case.parts.sources,
            targets=tuple(found),
            target_logits=own.float(),
            conservation_error=conservation_error(scores, own).float(),
            prompt=case.prompt,
            settings=self._settings(run, case.parts.layer, case.parts.excluded, propagation),
        )

    def _settings(self, run: _Options, start: int, excluded: bool, propagation: Propagation) -> Settings:
        return Settings(
            model=self.name,
            dtype=_name(self._bound.dtype),
            rule=run.sharing.rule,
            temperature=run.sharing.temperature,
            exclude_bos=excluded,
            start_layer=start,
            stop_layer=run.stop,
            backends={op: "+".join(sorted(names)) for op, names in sorted(propagation.served.items())},
        )

    def _run(
        self,
        prompts: Sequence[prompt.Prompt],
        joining: Sequence[tuple[Decomposition, int]],
        run: _Options,
        progress: Progress | None = None,
        keep: Callable[[int, Propagation, Tensor], None] | None = None,
    ) -> tuple[Propagation, Tensor, Tensor]:
        """One pass of the model over prompts, with decompositions of them on the way.

        Args:
            prompts: whose positions lie one behind the other.
            joining: the decompositions, and of which prompt each is; in the order in which they join.
            run: how.
            progress: told after each layer.
            keep: given the state that enters a layer, after those that start there have joined, and the stream; at last
                what leaves the last layer.

        Returns:
            The propagation with its final state, the stream there ``[P, D]``, and the same after the final norm.
        """
        bound = self._bound
        _refuse_dropout(bound)
        layers = range(min(made.layer for made, _ in joining), run.stop)
        lengths, rows = [len(made.ids) for made in prompts], sum(made.layout.rows for made, _ in joining)
        propagation: Propagation | None = None
        if self._recordings is not None and len(joining) == 1 and joining[0][0].moment == "start":
            propagation = self._recordings.lend(joining[0][0].layout, run.sharing, self.workspace_bytes)
        if propagation is None:
            propagation = Propagation(bound, run.sharing, self.workspace_bytes, lengths, rows)
        going: Propagation = propagation

        def join(layer: int, moment: Moment, trace: lockstep.Trace) -> None:
            now = [one for one in joining if (one[0].layer, one[0].moment) == (layer, moment)]
            if now:
                going.join(now, trace)

        def on_layer(index: int, trace: lockstep.Trace) -> None:
            join(index, "start", trace)
            if keep is not None and going.layout is not None:
                keep(index, going, trace.stream)
            going.step(index, trace, lambda: join(index, "middle", trace))
            join(index, "end", trace)
            if progress is not None:
                progress(index - layers.start + 1, len(layers))

        try:
            stream, normed = lockstep.run(
                bound, [made.ids for made in prompts], on_layer, layers, with_gate_total=run.sharing.rule == "taylor"
            )
        except BackendError as error:
            raise OptionError(str(error)) from error
        if run.stop < len(bound.layers):
            norm = bound.final_norm.module
            normed = norm(stream[None].to(norm.weight.device))[0]
        if keep is not None:
            keep(run.stop, going, stream)
        return going, stream, normed

    def _sharing(self, rule: str, temperature: float) -> MLPSharing:
        if rule not in RULES:
            raise OptionError(f"unknown mlp_rule {rule!r}; there are: {', '.join(RULES)}")
        number = isinstance(temperature, (int, float)) and math.isfinite(temperature)
        if not number or temperature <= 0:
            raise OptionError(f"temperature must be a positive number, got {temperature!r}")
        if self.backend not in NAMES:
            raise OptionError(f"unknown backend {self.backend!r}; there are: {', '.join(NAMES)}")
        return MLPSharing(rule, float(temperature), self.backend)

    def _judge(self, found: Attribution, strict: bool) -> None:
        error, tolerance = float(found.conservation_error.max()), self._bound.tolerance
        if error > tolerance:
            message = (
                f"the scores miss the logit by {error:.1e} of their size, more than {tolerance:.0e} for "
                f"{_name(self._bound.dtype)}; a wider dtype makes them add up"
            )
            if strict:
                raise ConservationError(message)
            warnings.warn(message, ConservationWarning, stacklevel=4)  # past torch's decorator, to the caller


@dataclass(frozen=True)
class _Options:
    """What holds of a whole pass."""

    start: int
    stop: int
    sharing: MLPSharing
    exclude: bool | Literal["auto"]


@dataclass(frozen=True)
class _Case:
    """A prompt, its decomposition and what is asked of it, all checked."""

    prompt: prompt.Prompt
    parts: Decomposition
    asked: tuple[targets.Asked, ...]

    def layers(self, run: _Options) -> range:
        """The layers whose input is decomposed, and one past the last, where the final state is."""
        return range(self.parts.layer + (self.parts.moment != "start"), run.stop + 1)


def conservation_error(scores: Tensor, logits: Tensor) -> Tensor:
    """``|Σ scores - logit| / max(|logit|, Σ |scores|)`` over the last dimension of ``scores``, in fp64."""
    total, spread = scores.double().sum(-1), scores.double().abs().sum(-1)
    size = torch.maximum(logits.abs(), spread).clamp(min=torch.finfo(torch.float64).tiny)
    return (total - logits).abs() / size


def _score(
    propagation: Propagation,
    stream: Tensor,
    staircase: int,
    prompt: int,
    parts: Decomposition,
    readout: targets.Readout,
    bound: BoundModel,
) -> Tensor:
    """``score[m] = w · final_norm_frozen(X[m, q])``: ``[sources]`` on the CPU, in the state's dtype."""
    norm, position = bound.final_norm, readout.target.position
    rows = propagation.rows_at(staircase, position)
    w = readout.w.to(rows.device)
    folded = norm.fold(w[None].to(norm.module.weight.device))[0].to(rows.device)  # [D]
    scale = norm.scale(stream[propagation.prompt_start[prompt] + position], rows.dtype).to(rows.device)
    scores = torch.zeros(len(parts.sources), dtype=rows.dtype)
    scores[: len(rows)] = (rows @ folded * scale).cpu()
    if bound.has_bias:
        beta = norm.beta()
        scores[0] += readout.constant + (0.0 if beta is None else float(w @ beta.to(w)))
    return scores


def _probe(
    propagation: Propagation, stream: Tensor, index: int, case: _Case, asked: targets.Asked
) -> tuple[Tensor, float]:
    """``score[m] = w · X[m, q]`` of the raw stream, ``[sources]`` on the CPU, and ``w · x[q]``."""
    assert asked.w is not None
    rows = propagation.rows_at(index, asked.position)
    w = asked.w.to(rows)
    scores = torch.zeros(len(case.parts.sources), dtype=rows.dtype)
    scores[: len(rows)] = (rows @ w).cpu()
    own = stream[propagation.prompt_start[index] + asked.position].to(rows)
    return scores, float(own @ w)


def _load(name: str, path: str, dtype: torch.dtype | str, device_map: Any) -> tuple[Any, Any]:
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options: dict[str, Any] = {"dtype" if version >= (4, 56) else "torch_dtype": dtype}
    # one device needs no device_map, which transformers leaves to accelerate
    spread = isinstance(device_map, dict) or device_map in ("auto", "balanced", "balanced_low_0", "sequential")
    if spread:
        options["device_map"] = device_map
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
        if device_map is not None and not spread:
            model = model.to(device_map)
    except Exception as error:  # loading runs transformers' and the model's own code, which raise what they like
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"cannot load the model {name!r}: {lines[0]}") from error
    return model, tokenizer


def _refuse_dropout(bound: BoundModel) -> None:
    modules = bound.model.modules()
    rates = [module.p for module in modules if isinstance(module, torch.nn.Dropout) and module.training]
    rates += [getattr(layer.attention, "attention_dropout", 0.0) for layer in bound.layers if layer.attention.training]
    if any(isinstance(rate, (int, float)) and rate > 0 for rate in rates):
        raise ModelError(f"{bound.name} is in training mode with dropout, so its logits are random; call model.eval()")


def _check_exclude(exclude: Any) -> bool | Literal["auto"]:
    if exclude != "auto" and not isinstance(exclude, bool):
        raise OptionError(f"exclude_bos must be 'auto', True or False, got {exclude!r}")
    checked: bool | Literal["auto"] = exclude
    return checked


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
