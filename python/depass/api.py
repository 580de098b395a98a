"""``DePass``: attribute what a model said to the parts of its prompt."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from depass_kernels import BackendError, SourceLayout
from depass_kernels.backends import NAMES, RULES

from . import lockstep, prompt, smollm2, sources, targets
from .errors import ConservationError, ConservationWarning, ModelError, NonFiniteError, OptionError
from .families import BoundModel, Family, bind
from .graphs import Recordings
from .propagate import MLPSharing, Propagation
from .result import Attribution, Settings
from .sources import Decomposition, Source

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}

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
            sources: ``"token"``, ``"word"``, ``"sentence"`` or :class:`Spans`.
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
        bound = self._bound
        made, parts, layers, sharing = self._prepare(
            prompt, sources, start_layer, stop_layer, mlp_rule, temperature, exclude_bos
        )
        asked = targets.check(target, len(made.ids), self.tokenizer, bound)
        propagation, stream, normed = self._run(made, parts, layers, sharing, progress=progress)
        if layers.stop < len(bound.layers):
            norm = bound.final_norm.module
            normed = norm(stream[None].to(norm.weight.device))[0]
        readouts = targets.fill(asked, normed, bound, self.tokenizer)

        logits = torch.tensor([readout.logit for readout in readouts], dtype=torch.float64)
        for readout in readouts:
            if not math.isfinite(readout.logit):
                raise NonFiniteError(
                    f"the model's own logits are not finite ({readout.logit} for {readout.target.label!r}); "
                    f"its weights or its dtype ({_name(bound.dtype)}) do not carry this prompt"
                )
        scores = _score(propagation, stream, readouts, len(parts.sources), bound)  # [T, M] in the state's dtype
        if self._recordings is not None:
            self._recordings.give_back(propagation)
        if not bool(scores.isfinite().all()):
            raise NonFiniteError(f"scores are not finite in {_name(bound.dtype)}; try bfloat16 or float32")
        total, spread = scores.double().sum(1), scores.double().abs().sum(1)
        error = (total - logits).abs() / torch.maximum(logits.abs(), spread).clamp(min=torch.finfo(torch.float64).tiny)
        self._judge(float(error.max()), strict)
        return Attribution(
            scores=scores.float(),
            sources=parts.sources,
            targets=tuple(readout.target for readout in readouts),
            target_logits=logits.float(),
            conservation_error=error.float(),
            prompt=made,
            settings=Settings(
                model=self.name,
                dtype=_name(bound.dtype),
                rule=sharing.rule,
                temperature=sharing.temperature,
                exclude_bos=parts.excluded,
                start_layer=layers.start,
                stop_layer=layers.stop,
                backends={op: "+".join(sorted(names)) for op, names in sorted(propagation.served.items())},
            ),
        )

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

        Raises:
            PromptError, SourceError, OptionError, ModelError: something that cannot be decomposed.
        """
        made, parts, run, sharing = self._prepare(
            prompt, sources, start_layer, stop_layer, mlp_rule, temperature, exclude_bos
        )
        given = layers if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
        wanted = range(run.start, run.stop + 1) if layers is None else tuple(given)
        for layer in wanted:
            if not isinstance(layer, int) or not run.start <= layer <= run.stop:
                raise OptionError(f"layers: {layer!r} is none of the layers {run.start} to {run.stop}")
        rows: dict[int, Tensor] = {}
        residual: dict[int, Tensor] = {}

        def keep(layer: int, state: Tensor, stream: Tensor) -> None:
            if layer in wanted:
                rows[layer] = state.to("cpu", copy=True)
                residual[layer] = stream.to("cpu", copy=True)

        propagation, stream, _ = self._run(made, parts, run, sharing, keep=keep)
        keep(run.stop, propagation.state, stream)
        for layer, kept in rows.items():
            if not bool(kept.isfinite().all()):
                raise NonFiniteError(f"the state entering layer {layer} is not finite in {_name(self._bound.dtype)}")
        return States(rows, residual, parts.layout, parts.sources)

    def _prepare(
        self,
        given: Any,
        wanted: Any,
        start_layer: int,
        stop_layer: int | None,
        mlp_rule: str | None,
        temperature: float | None,
        exclude_bos: bool | Literal["auto"] | None,
    ) -> tuple[prompt.Prompt, Decomposition, range, MLPSharing]:
        bound = self._bound
        sharing = self._sharing(
            self.mlp_rule if mlp_rule is None else mlp_rule, self.temperature if temperature is None else temperature
        )
        exclude = _check_exclude(self.exclude_bos if exclude_bos is None else exclude_bos)
        depth = len(bound.layers)
        stop_layer = depth if stop_layer is None else stop_layer
        if not (
            isinstance(start_layer, int) and isinstance(stop_layer, int) and 0 <= start_layer < stop_layer <= depth
        ):
            raise OptionError(
                f"start_layer={start_layer}, stop_layer={stop_layer}: need 0 <= start < stop <= {depth}, the layers of "
                f"{bound.name}"
            )
        _refuse_dropout(bound)
        made = prompt.encode(given, self.tokenizer, bound)
        bos = None if self.tokenizer is None else self.tokenizer.bos_token_id
        parts = sources.decompose(made, wanted, bound.has_bias, exclude, bos)
        return made, parts, range(start_layer, stop_layer), sharing

    def _run(
        self,
        made: prompt.Prompt,
        parts: Decomposition,
        layers: range,
        sharing: MLPSharing,
        *,
        progress: Progress | None = None,
        keep: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> tuple[Propagation, Tensor, Tensor]:
        if self._recordings is None:
            propagation = Propagation(self._bound, parts.layout, sharing, self.workspace_bytes)
        else:
            propagation = self._recordings.lend(parts.layout, sharing, self.workspace_bytes)

        def on_layer(index: int, trace: lockstep.Trace) -> None:
            if index == layers.start:
                propagation.begin(trace.stream, parts.owner)
            if keep is not None:
                keep(index, propagation.state, trace.stream)
            propagation.step(index, trace)
            if progress is not None:
                progress(index - layers.start + 1, len(layers))

        ids = torch.tensor(made.ids)
        try:
            stream, normed = lockstep.run(self._bound, ids, on_layer, layers, with_gate_total=sharing.rule == "taylor")
        except BackendError as error:
            raise OptionError(str(error)) from error
        return propagation, stream, normed

    def _sharing(self, rule: str, temperature: float) -> MLPSharing:
        if rule not in RULES:
            raise OptionError(f"unknown mlp_rule {rule!r}; there are: {', '.join(RULES)}")
        number = isinstance(temperature, (int, float)) and math.isfinite(temperature)
        if not number or temperature <= 0:
            raise OptionError(f"temperature must be a positive number, got {temperature!r}")
        if self.backend not in NAMES:
            raise OptionError(f"unknown backend {self.backend!r}; there are: {', '.join(NAMES)}")
        return MLPSharing(rule, float(temperature), self.backend)

    def _judge(self, error: float, strict: bool) -> None:
        tolerance = TOLERANCE[self._bound.dtype]
        if error > tolerance:
            message = (
                f"the scores miss the logit by {error:.1e} of their size, more than {tolerance:.0e} for "
                f"{_name(self._bound.dtype)}; a wider dtype makes them add up"
            )
            if strict:
                raise ConservationError(message)
            warnings.warn(message, ConservationWarning, stacklevel=4)  # past torch's decorator, to the caller


def _score(
    propagation: Propagation, stream: Tensor, readouts: Sequence[targets.Readout], count: int, bound: BoundModel
) -> Tensor:
    """``score[m] = w · final_norm_frozen(X[m, q])``: ``[targets, sources]`` on the CPU, in the state's dtype."""
    state, layout, norm = propagation.state, propagation.layout, bound.final_norm
    scores = torch.zeros(len(readouts), count, dtype=state.dtype)
    beta = norm.beta()
    for row, readout in zip(scores, readouts, strict=True):
        position = readout.target.position
        begin, end = int(layout.row_start[position]), int(layout.row_start[position + 1])
        w = readout.w.to(state.device)
        folded = norm.fold(w[None].to(norm.module.weight.device))[0].to(state.device)  # [D]
        scale = norm.scale(stream[position], state.dtype).to(state.device)
        row[: end - begin] = (state[begin:end] @ folded * scale).cpu()
        if bound.has_bias:
            row[0] += readout.constant + (0.0 if beta is None else float(w @ beta.to(w)))
    return scores


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
