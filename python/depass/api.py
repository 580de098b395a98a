"""``DePass``: attribute what a model said to the parts of its prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from .checks import integer, integers
from .engine import plan as plans
from .engine import request, scores, sweeps
from .engine.batches import Many, with_targets
from .engine.generate import generate
from .engine.passes import Engine
from .engine.plan import Plan
from .engine.request import Defaults, Progress, callable_or_none, components_of_layer, decomposed_layers
from .engine.states import KeptStates
from .errors import DePassError, ModelError, OptionError
from .inputs.prompt import encode
from .inputs.targets import check
from .models import smollm2, streaming
from .models.bind import bind
from .models.bound import BoundModel
from .models.families import Family
from .models.loading import load
from .propagation.cuda_graphs import Recordings, lies_on, refuse_graphs
from .propagation.needs import room
from .results.attribution import Attribution
from .results.generation import Generation
from .results.states import States
from .results.sweep import Sweep
from .sources.decompose import COMPONENTS, check_kind, decompose_components


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
        self.model = model
        name: str = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        bound = bind(model, family)
        if not (tokenizer is None or all(hasattr(tokenizer, name) for name in ("encode", "decode", "bos_token_id"))):
            raise OptionError(f"tokenizer must be one of transformers, or None, got {type(tokenizer).__name__}")
        if workspace_bytes is not None and integer("workspace_bytes", workspace_bytes, OptionError) < 1:
            raise OptionError(f"workspace_bytes must be positive, got {workspace_bytes}")
        defaults = Defaults(mlp_rule, temperature, exclude_bos, backend)
        devices = {parameter.device for parameter in model.parameters()}
        if cuda_graphs:
            refuse_graphs(devices, bound.is_quantized)
        if stream_to is not None:
            bound = replace(bound, stream_to=_device_to_stream_to(stream_to, devices, bound))
        recordings = Recordings(bound) if cuda_graphs else None
        self.engine = Engine(bound, tokenizer, name, defaults, workspace_bytes, recordings)

    @property
    def bound(self) -> BoundModel:
        """The model as the decomposition sees it: its layers, their projections and norms."""
        return self.engine.bound

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return self.engine.tokenizer

    @property
    def name(self) -> str:
        """The model's name or path, as results have it."""
        return self.engine.name

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
        made.engine = replace(made.engine, name=name)
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
        case = request.case(self.bound, self.tokenizer, prompt, target, sources, options)
        (result,) = scores.attribute(self.engine, [case], options, callable_or_none("progress", progress))
        if isinstance(result, DePassError):
            raise result
        scores.judge(result, strict, self.bound.tolerance)
        return result

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
        many = Many(self.engine, sources, batch_tokens, errors, options, strict)
        return many.results(with_targets(prompts, target, targets))

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
        encoded = encode(prompt, self.tokenizer, bound)
        asked = check(target, len(encoded.ids), range(0), self.tokenizer, bound)
        wanted = list(range(len(bound.layers))) if layers is None else integers("layers", layers, OptionError)
        ids, positions = (tuple(given) if isinstance(given, Iterator) else given for given in (ids, positions))
        if not wanted or len(set(wanted)) < len(wanted):
            raise OptionError(f"layers={layers} must name each layer once and at least one")
        parts = [
            [
                decompose_components(spec, len(encoded.ids), bound)
                for spec in components_of_layer(kind, layer, ids, positions)
            ]
            for layer in wanted
        ]
        parts.sort(key=lambda of_layer: of_layer[0].layer)
        if memory_bytes is not None and integer("memory_bytes", memory_bytes, OptionError) < 1:
            raise OptionError(f"memory_bytes must be a positive integer, got {memory_bytes!r}")
        budget = max(0, room(bound)) // 2 if memory_bytes is None else memory_bytes
        groups = list(sweeps.grouped(parts, len(encoded.ids), budget, bound, self.engine.workspace_bytes))
        told = callable_or_none("progress", progress)
        result = sweeps.sweep(self.engine, encoded, groups, asked, options, kind, told)
        scores.judge(result, strict, bound.tolerance)
        return result

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
        result = generate(
            self.engine, prompt, max_new_tokens, sources, options, sampling, callable_or_none("progress", progress)
        )
        scores.judge(result.attribution, strict, self.bound.tolerance)
        return result

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
        return plans.make(bound, tokens, sources, bound.device, budget, self.engine.workspace_bytes, rate)

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
        """The decomposed state as it enters layers: ``Σ_m X[m, t] = x[t]`` at each (docs/method.md, equation 1).

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
        case = request.case(self.bound, self.tokenizer, prompt, None, sources, options)
        there = decomposed_layers(case.parts, options.stop)
        several = isinstance(layers, Iterable) and getattr(layers, "ndim", 1) != 0
        wanted = list(there) if layers is None else integers("layers", layers if several else [layers], OptionError)
        if not wanted:
            raise OptionError("layers=[] names no layer; leave it out for all of them")
        for layer in wanted:
            if layer not in there:
                raise OptionError(f"layers: {layer!r} is none of the layers {there.start} to {there.stop - 1}")
        kept = KeptStates(self.engine, case, options, wanted, callable_or_none("on_state", on_state))
        kept.run()
        return States(kept.rows, kept.residual, case.parts.layout, case.parts.sources)

    def _options(self, *asked: Any) -> request.Options:
        return request.options(self.engine.defaults, self.bound, *asked)


def _device_to_stream_to(given: str | torch.device, devices: set[torch.device], bound: BoundModel) -> torch.device:
    """The device that a model in host memory is streamed to; its weights are pinned from now on.

    Raises:
        OptionError: no such device, or a model that lies elsewhere or is quantised.
    """
    try:
        device = torch.device(given)
        if device.type not in ("cpu", "cuda"):
            raise TypeError
        device = torch.empty(0, device=device).device  # with the number of the one that is meant
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's, of a device that it does not have
        raise OptionError(f"stream_to={given!r} is no device of this machine") from error
    if devices != {torch.device("cpu")} or bound.is_quantized:
        raise OptionError(
            "stream_to needs an unquantised model in host memory, this one "
            f"{lies_on(devices, bound.is_quantized)}; load it without a device"
        )
    if device.type == "cuda":
        streaming.pin(bound.model)
    return device
