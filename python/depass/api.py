"""``DePass``: attribute what a model said to the parts of its prompt."""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from depass_kernels.backends import NAMES, RULES

from .checks import integer, integers
from .engine import plan as plans
from .engine.generate import continued, generated_ids, sources_of
from .engine.passes import Engine
from .engine.plan import Plan
from .engine.request import Case, Options, Progress, decomposed_layers
from .engine.sweeps import grouped
from .errors import ConservationError, ConservationWarning, DePassError, ModelError, NonFiniteError, OptionError
from .inputs.prompt import Prompt, encode
from .inputs.targets import Token, check
from .models import smollm2, streaming
from .models.bind import bind
from .models.families import Family
from .models.health import blame, refuse_dropout
from .models.loading import load
from .propagation.cuda_graphs import Recordings, lies_on, refuse_graphs
from .propagation.needs import room
from .propagation.propagate import Propagation
from .propagation.sharing import MLPSharing
from .results.attribution import Attribution
from .results.generation import Generation
from .results.states import States
from .results.sweep import Sweep
from .sources.components import Heads, Modules, Neurons
from .sources.decompose import COMPONENTS, check_kind, decompose_components
from .sources.source import Decomposition
from .sources.spans import decompose


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
        stream_to: a GPU for a model that lies in host memory: its weights stay there, in pinned memory from now on, and
            come to the GPU layer by layer. For prompts whose state leaves no room for them.
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
        stream_to: str | torch.device | None = None,
        family: Family | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.name: str = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        self.mlp_rule, self.temperature, self.exclude_bos = mlp_rule, temperature, exclude_bos
        self.backend, self.workspace_bytes = backend, workspace_bytes
        self.bound = bind(model, family)
        if not (tokenizer is None or all(hasattr(tokenizer, name) for name in ("encode", "decode", "bos_token_id"))):
            raise OptionError(f"tokenizer must be one of transformers, or None, got {type(tokenizer).__name__}")
        if workspace_bytes is not None and integer("workspace_bytes", workspace_bytes, OptionError) < 1:
            raise OptionError(f"workspace_bytes must be positive, got {workspace_bytes}")
        self._sharing(mlp_rule, temperature)
        _check_exclude(exclude_bos)
        devices = {parameter.device for parameter in model.parameters()}
        if cuda_graphs:
            refuse_graphs(devices, self.bound.is_quantized)
        self._recordings = Recordings(self.bound) if cuda_graphs else None
        if stream_to is not None:
            self._stream_to(stream_to, devices)

    @staticmethod
    def from_pretrained(
        name_or_path: str | os.PathLike[str] = smollm2.NAME,
        *,
        dtype: torch.dtype | str = "auto",
        device_map: Any = None,
        max_memory: dict[int | str, int | str] | None = None,
        quantization: Any = None,
        trust_remote_code: bool = False,
        say: Callable[[str], None] = lambda message: None,
        **options: Any,
    ) -> DePass:
        """Load a model and its tokenizer with transformers, from safetensors alone.

        Args:
            name_or_path: a folder, a name on the hub, or ``"smollm2"``, the embedded default.
            dtype: of the weights; ``"auto"``: as saved.
            device_map: one device; or several (and host memory and disk, as ``"cpu"`` and ``"disk"``) as transformers takes
                them, ``"auto"`` or a dict from modules to devices, which needs accelerate.
            max_memory: with a ``device_map`` such as ``"auto"``, how much of each device the weights may take, as
                transformers takes it: ``{0: "20GiB", "cpu": "64GiB"}``. The decomposed state needs room beside them.
            quantization: ``"8bit"`` or ``"4bit"`` weights by bitsandbytes, or a quantisation config of transformers
                for bitsandbytes or torchao. Models that were saved so need none.
            trust_remote_code: run code that the model's folder or repository brings along.
            say: told in a line what takes long.
            options: of :class:`DePass`.

        Raises:
            ModelError: there is no such model, or it cannot be attributed.
            OptionError: an option that does not fit the model, or a package that it needs is not installed.
        """
        name = os.fspath(name_or_path)
        path = os.fspath(smollm2.folder(say)) if name == smollm2.NAME else name
        if not os.path.isdir(path) and (os.path.isabs(path) or path.startswith((".", "~"))):
            raise ModelError(f"the model path {name!r} is no folder")
        model, tokenizer = load(name, path, dtype, device_map, max_memory, quantization, trust_remote_code)
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
        options = self._options(start_layer, stop_layer, mlp_rule, temperature, exclude_bos)
        case = self._case(prompt, target, sources, options)
        found = self._engine().attribute([case], options, _callable("progress", progress))[0]
        if isinstance(found, DePassError):
            raise found
        self._judge(found, strict, self.bound.tolerance)
        return found

    def attribute_many(
        self,
        prompts: Iterable[Any],
        target: Any = None,
        *,
        targets: Iterable[Any] | None = None,
        sources: Any = "token",
        batch_tokens: int = 1024,
        errors: Literal["raise", "return"] = "raise",
        start_layer: int = 0,
        stop_layer: int | None = None,
        mlp_rule: str | None = None,
        temperature: float | None = None,
        exclude_bos: bool | Literal["auto"] | None = None,
        strict: bool = False,
    ) -> Iterator[Attribution | DePassError]:
        """Attribute many prompts, several in one pass of the model; each result equals its own run's to rounding.

        Prompts are taken from the iterable as they are needed, and results come in their order. They are padded for the
        model's own pass only, on the right, whatever side the tokenizer pads on.

        Args:
            prompts: prompts as for :meth:`attribute`.
            target: of every prompt, as for :meth:`attribute`.
            targets: instead of ``target``, one for each prompt.
            sources: as for :meth:`attribute`.
            batch_tokens: how many tokens, padding included, go in one pass; a longer prompt goes alone. The state has
                about half as many rows for each token as its prompt has tokens.
            errors: ``"raise"``: a prompt that cannot be attributed raises at its turn, with its index; all before it have
                come by then. ``"return"``: the error comes in its place and the others go on.
            start_layer: see :meth:`attribute`.
            stop_layer: see :meth:`attribute`.
            mlp_rule: see :meth:`attribute`.
            temperature: see :meth:`attribute`.
            exclude_bos: see :meth:`attribute`.
            strict: an attribution that does not add up is an error.

        Yields:
            An :class:`Attribution` for each prompt, or with ``errors="return"`` the error in its place.

        Raises:
            OptionError: at once, for options that no prompt could have; no prompts at all.
            DePassError: with ``errors="raise"``, what :meth:`attribute` raises, naming the prompt's index from 0.
        """
        options = self._options(start_layer, stop_layer, mlp_rule, temperature, exclude_bos)
        check_kind(sources)
        if integer("batch_tokens", batch_tokens, OptionError) < 1:
            raise OptionError(f"batch_tokens must be a positive integer, got {batch_tokens!r}")
        if errors not in ("raise", "return"):
            raise OptionError(f"errors must be 'raise' or 'return', got {errors!r}")
        for name, given in (("prompts", prompts), ("targets", targets)):
            if given is not None and (isinstance(given, (str, bytes)) or not isinstance(given, Iterable)):
                raise OptionError(f"{name} must be several, got one {type(given).__name__}; attribute() takes one")
        if targets is not None and target is not None:
            raise OptionError("give target= for all prompts or targets= for each, not both")
        if isinstance(prompts, (list, tuple)) and not prompts:
            raise OptionError("prompts is empty; give at least one")
        return self._many(prompts, target, targets, sources, batch_tokens, errors, options, strict)

    def _many(
        self,
        prompts: Iterable[Any],
        target: Any,
        targets: Iterable[Any] | None,
        sources: Any,
        batch_tokens: int,
        errors: str,
        options: Options,
        strict: bool,
    ) -> Iterator[Attribution | DePassError]:
        batch: list[Case | DePassError] = []
        # the batch's longest prompt, the index of its first, and of the last one taken
        longest, begin, index = 0, 0, -1
        pairs = _with_targets(prompts, target, targets)
        while True:
            try:
                given, asked = next(pairs)
            except StopIteration:
                break
            except Exception:  # of the caller's iterable, whose prompts up to there have their results
                yield from self._batch(batch, begin, errors, options, strict)
                raise
            index += 1
            try:
                case: Case | DePassError = self._case(given, asked, sources, options)
            except DePassError as error:
                case = error
            length = len(case.prompt.ids) if isinstance(case, Case) else 1
            if batch and max(longest, length) * (len(batch) + 1) > batch_tokens:
                yield from self._batch(batch, begin, errors, options, strict)
                batch, longest, begin = [], 0, index
            batch.append(case)
            longest = max(longest, length)
            if isinstance(case, DePassError) and errors == "raise":
                break
        if index < 0:
            raise OptionError("prompts is empty; give at least one")
        yield from self._batch(batch, begin, errors, options, strict)

    def _batch(
        self, batch: Sequence[Case | DePassError], begin: int, errors: str, options: Options, strict: bool
    ) -> Iterator[Attribution | DePassError]:
        """The results of one pass; ``begin`` is the index of the batch's first prompt."""
        found = iter(self._together([case for case in batch if isinstance(case, Case)], options))
        tolerance = self.bound.tolerance
        for index, case in enumerate(batch, begin):
            result = next(found) if isinstance(case, Case) else case
            if isinstance(result, Attribution):
                try:
                    self._judge(result, strict, tolerance)
                except ConservationError as error:
                    result = error
            if isinstance(result, DePassError) and errors == "raise":
                raise type(result)(f"prompt {index}: {result}") from result
            yield result

    @torch.no_grad()
    def _together(self, cases: Sequence[Case], options: Options) -> list[Attribution | DePassError]:
        """The cases' results from one pass, or where something in one of them stops it, from a pass each."""
        if not cases:
            return []
        try:
            return self._engine().attribute(cases, options)
        except DePassError as error:
            if len(cases) == 1:
                return [error]
            return [result for case in cases for result in self._together([case], options)]

    @torch.no_grad()
    def sweep(
        self,
        kind: Literal["heads", "neurons", "modules"],
        prompt: Any,
        target: Any = None,
        *,
        layers: Sequence[int] | None = None,
        ids: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        memory_bytes: int | None = None,
        mlp_rule: str | None = None,
        temperature: float | None = None,
        strict: bool = False,
        progress: Progress | None = None,
    ) -> Sweep:
        """Every layer's heads, neurons or modules, each layer a decomposition of its own, in one pass of the model.

        Args:
            kind: ``"heads"``: :class:`Heads` of every layer. ``"neurons"``: :class:`Neurons`. ``"modules"``: attention and
                MLP as :class:`Modules`.
            prompt: as for :meth:`attribute`.
            target: as for :meth:`attribute`; a probe of an inner layer is none of a sweep.
            layers: which; all without it.
            ids: which heads or neurons of each layer; all without it.
            positions: where their outputs count, as for :class:`Heads`.
            memory_bytes: what the decomposed states and their buffers may take beside the model. More than that goes in
                groups of layers, a pass each, which changes no result beyond rounding. Without it: half of what is free.
            mlp_rule: instead of the constructor's, as ``temperature``.
            temperature: of the softmax rule.
            strict: see :meth:`attribute`; of every layer.
            progress: called after each layer with the number of layers done and of all, over all passes.

        Raises:
            PromptError, TargetError, SourceError, OptionError, ModelError: something that cannot be attributed.
            NonFiniteError: the model's logits or the parts are not finite.
            ConservationError: with ``strict``, a layer whose scores do not add up.
        """
        bound = self.bound
        options = self._options(0, None, mlp_rule, temperature, False)
        if not isinstance(kind, str) or kind not in ("heads", "neurons", "modules"):
            raise OptionError(f"unknown sweep {kind!r}; there are: 'heads', 'neurons', 'modules'")
        if kind == "modules" and ids is not None:
            raise OptionError("ids= names heads or neurons; a layer's modules are its attention and its MLP")
        made = encode(prompt, self.tokenizer, bound)
        asked = check(target, len(made.ids), range(0), self.tokenizer, bound)
        wanted = list(range(len(bound.layers))) if layers is None else integers("layers", layers, OptionError)
        ids, positions = (tuple(given) if isinstance(given, Iterator) else given for given in (ids, positions))
        if not wanted or len(set(wanted)) < len(wanted):
            raise OptionError(f"layers={layers} must name each layer once and at least one")
        parts = []
        for layer in wanted:
            specs: list[Any] = [Heads(layer, ids, positions)]
            if kind == "neurons":
                specs = [Neurons(layer, ids, positions)]
            elif kind == "modules":
                specs = [Modules(layer, "attn", positions), Modules(layer, "mlp", positions)]
            parts.append([decompose_components(spec, len(made.ids), bound) for spec in specs])
        parts.sort(key=lambda of_layer: of_layer[0].layer)
        if memory_bytes is not None and integer("memory_bytes", memory_bytes, OptionError) < 1:
            raise OptionError(f"memory_bytes must be a positive integer, got {memory_bytes!r}")
        budget = max(0, room(bound)) // 2 if memory_bytes is None else memory_bytes
        groups = list(grouped(parts, len(made.ids), budget, bound, self.workspace_bytes))
        found = self._engine().sweep(made, groups, asked, options, kind, _callable("progress", progress))
        self._judge(found, strict, self.bound.tolerance)
        return found

    @torch.no_grad()
    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 20,
        sources: Any = "token",
        mlp_rule: str | None = None,
        temperature_of_shares: float | None = None,
        exclude_bos: bool | Literal["auto"] | None = None,
        strict: bool = False,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Generation:
        """Generate with the model's own ``generate``, then attribute every generated token, all in one pass over the ids.

        Args:
            prompt: as for :meth:`attribute`.
            max_new_tokens: at most so many; fewer where the model ends.
            sources: ``"token"``, ``"word"``, ``"sentence"`` or :class:`Spans` of the prompt; every generated token is a
                source of its own for the later ones.
            mlp_rule: instead of the constructor's, as ``temperature_of_shares`` and ``exclude_bos``.
            temperature_of_shares: of the softmax rule (``temperature`` is that of sampling, and goes to ``generate``).
            exclude_bos: see :class:`DePass`.
            strict: see :meth:`attribute`.
            progress: see :meth:`attribute`.
            sampling: what else the model's ``generate`` takes: ``do_sample``, ``temperature``, ``top_p``, ``num_beams`` ...

        Raises:
            PromptError, SourceError, OptionError, ModelError: something that cannot be generated or attributed.
            NonFiniteError, ConservationError: see :meth:`attribute`.
        """
        options = self._options(0, None, mlp_rule, temperature_of_shares, exclude_bos)
        if isinstance(sources, COMPONENTS):
            raise OptionError(
                f"generate attributes to the prompt's parts, not to {type(sources).__name__}; use attribute"
            )
        refuse_dropout(self.bound)
        made = encode(prompt, self.tokenizer, self.bound)
        self._decompose(made, sources, options)  # what is wrong with them is found before anything is generated
        new = generated_ids(self.bound, made, max_new_tokens, sampling)
        whole = continued(made, new, self.tokenizer, self.bound)
        read = continued(made, new[:-1], self.tokenizer, self.bound)
        parts = self._decompose(read, sources_of(made, read, sources), options)
        asked = [Token(token, len(made.ids) - 1 + i) for i, token in enumerate(new)]
        layers = decomposed_layers(parts, options.stop)
        case = Case(read, parts, tuple(check(asked, len(read.ids), layers, self.tokenizer, self.bound)))
        found = self._engine().attribute([case], options, _callable("progress", progress))[0]
        if isinstance(found, DePassError):
            raise found
        self._judge(found, strict, self.bound.tolerance)
        tokens = whole.tokens[len(made.ids) :]
        return Generation("".join(tokens), tokens, tuple(new), found)

    def plan(
        self, tokens: int, *, sources: Any = "token", budget_bytes: int | None = None, measure: bool = True
    ) -> Plan:
        """What an attribution of a prompt of so many tokens takes; the model is not run.

        Args:
            tokens: ``N``.
            sources: ``"token"``, a number of spans, or ``"heads"`` or ``"neurons"`` of one layer.
            budget_bytes: what there is, the model's weights included; without it what is free now and the weights (of a
                model on several devices all of them, and what is free where least is).
            measure: whether this device's matrix products are timed, so that the plan has seconds.

        Raises:
            OptionError: sources or sizes that there are not.
        """
        bound = self.bound
        if budget_bytes is not None and integer("budget_bytes", budget_bytes, OptionError) < 1:
            raise OptionError(f"budget_bytes must be positive, got {budget_bytes}")
        budget = streaming.weight_bytes(bound) + room(bound) if budget_bytes is None else budget_bytes
        rate = plans.measured_rate(bound, bound.device) if measure else None
        return plans.make(bound, tokens, sources, bound.device, budget, self.workspace_bytes, rate)

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
        options = self._options(start_layer, stop_layer, mlp_rule, temperature, exclude_bos)
        case = self._case(prompt, None, sources, options)
        there = decomposed_layers(case.parts, options.stop)
        several = isinstance(layers, Iterable) and getattr(layers, "ndim", 1) != 0
        wanted = list(there) if layers is None else integers("layers", layers if several else [layers], OptionError)
        if not wanted:
            raise OptionError("layers=[] names no layer; leave it out for all of them")
        for layer in wanted:
            if layer not in there:
                raise OptionError(f"layers: {layer!r} is none of the layers {there.start} to {there.stop - 1}")
        _callable("on_state", on_state)
        rows: dict[int, Tensor] = {}
        residual: dict[int, Tensor] = {}

        def keep(layer: int, propagation: Propagation, stream: Tensor) -> None:
            if layer not in wanted:
                return
            if not bool(propagation.state.isfinite().all()):
                raise NonFiniteError(f"the state entering layer {layer} is not finite; {blame(self.bound)}")
            if on_state is not None:
                on_state(layer, propagation.state, stream)
            else:
                rows[layer] = propagation.state.to("cpu", copy=True)
                residual[layer] = stream.to("cpu", copy=True)

        self._engine().run([case.prompt], [(case.parts, 0)], options, keep=keep)
        return States(rows, residual, case.parts.layout, case.parts.sources)

    def _stream_to(self, given: str | torch.device, devices: set[torch.device]) -> None:
        try:
            device = torch.device(given)
            if device.type not in ("cpu", "cuda"):
                raise TypeError
            device = torch.empty(0, device=device).device  # with the number of the one that is meant
        except (RuntimeError, AssertionError, TypeError) as error:  # torch's, of a device that it does not have
            raise OptionError(f"stream_to={given!r} is no device of this machine") from error
        if devices != {torch.device("cpu")} or self.bound.is_quantized:
            raise OptionError(
                "stream_to needs an unquantised model in host memory, this one "
                f"{lies_on(devices, self.bound.is_quantized)}; load it without a device"
            )
        if device.type == "cuda":
            streaming.pin(self.model)
        self.bound = replace(self.bound, stream_to=device)

    def _engine(self) -> Engine:
        return Engine(self.bound, self.tokenizer, self.name, self.workspace_bytes, self._recordings)

    def _options(
        self,
        start_layer: int,
        stop_layer: int | None,
        mlp_rule: str | None,
        temperature: float | None,
        exclude_bos: bool | Literal["auto"] | None,
    ) -> Options:
        depth = len(self.bound.layers)
        start = integer("start_layer", start_layer, OptionError)
        stop = depth if stop_layer is None else integer("stop_layer", stop_layer, OptionError)
        if not 0 <= start < stop <= depth:
            raise OptionError(
                f"start_layer={start}, stop_layer={stop}: need 0 <= start < stop <= {depth}, the layers of "
                f"{self.bound.name}"
            )
        sharing = self._sharing(
            self.mlp_rule if mlp_rule is None else mlp_rule, self.temperature if temperature is None else temperature
        )
        exclude = _check_exclude(self.exclude_bos if exclude_bos is None else exclude_bos)
        return Options(start, stop, sharing, exclude)

    def _case(self, given: Any, target: Any, wanted: Any, options: Options) -> Case:
        """Check one prompt and what is asked about it, before any work is done."""
        made = encode(given, self.tokenizer, self.bound)
        parts = self._decompose(made, wanted, options)
        asked = check(target, len(made.ids), decomposed_layers(parts, options.stop), self.tokenizer, self.bound)
        return Case(made, parts, tuple(asked))

    def _decompose(self, made: Prompt, wanted: Any, options: Options) -> Decomposition:
        bound = self.bound
        if isinstance(wanted, COMPONENTS):
            name = type(wanted).__name__
            if options.start != 0:
                raise OptionError(f"start_layer={options.start}: {name} names its own layer; leave it out")
            parts = decompose_components(wanted, len(made.ids), bound)
            if parts.layer >= options.stop:
                raise OptionError(f"stop_layer={options.stop}: must lie behind layer {parts.layer} of {name}")
            return parts
        bos = None if self.tokenizer is None else self.tokenizer.bos_token_id
        return decompose(made, wanted, options.start, bound.has_bias, options.exclude, bos)

    def _sharing(self, rule: str, temperature: float) -> MLPSharing:
        if rule not in RULES:
            raise OptionError(f"unknown mlp_rule {rule!r}; there are: {', '.join(RULES)}")
        number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
        if not number or not 0 < temperature <= sys.float_info.max:
            raise OptionError(f"temperature must be a positive number, got {temperature!r}")
        if self.backend not in NAMES:
            raise OptionError(f"unknown backend {self.backend!r}; there are: {', '.join(NAMES)}")
        return MLPSharing(rule, float(temperature), self.backend)

    def _judge(self, found: Attribution | Sweep, strict: bool, tolerance: float) -> None:
        error = float(found.conservation_error.max())
        if error > tolerance:
            message = (
                f"the scores miss the logit by {error:.1e} of their size, more than {tolerance:.0e} for "
                f"{found.settings.dtype}; a wider dtype makes them add up"
            )
            if strict:
                raise ConservationError(message)
            warnings.warn(message, ConservationWarning, stacklevel=4)  # past torch's decorator, to the caller


def _callable(name: str, given: Any) -> Any:
    if given is not None and not callable(given):
        raise OptionError(f"{name} must be a function, got {given!r}")
    return given


def _with_targets(prompts: Iterable[Any], target: Any, targets: Iterable[Any] | None) -> Iterator[tuple[Any, Any]]:
    """Each prompt with its target.

    Raises:
        OptionError: more of the one than of the other.
    """
    if targets is None:
        for given in prompts:
            yield given, target
        return
    nothing = object()
    for index, (given, asked) in enumerate(itertools.zip_longest(prompts, targets, fillvalue=nothing)):
        if given is nothing or asked is nothing:
            raise OptionError(f"prompts and targets are not equally many: one of them ends after {index}")
        yield given, asked


def _check_exclude(exclude: Any) -> bool | Literal["auto"]:
    if not isinstance(exclude, bool) and not (isinstance(exclude, str) and exclude == "auto"):
        raise OptionError(f"exclude_bos must be 'auto', True or False, got {exclude!r}")
    return exclude if isinstance(exclude, bool) else "auto"
