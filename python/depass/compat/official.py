"""The interface of the published DePass manager: the same names, arguments and shapes, but the parts add up.

::

    from depass.compat.official import decomposed_state_manager

    manager = decomposed_state_manager(model, tokenizer)
    state, states = manager.get_last_layer_decomposed_state("Catalonia belongs to the continent of")
    scores = manager.compute_attribute_score(state, -1, tokenizer.encode(" Europe", add_special_tokens=False)[0])

``reproduce_published=True`` gives the published numbers instead (:mod:`depass.compat.published`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from depass_kernels.names import RULES

from ..api import DePass
from ..checks import integer
from ..errors import (
    NonFiniteError,
    OptionError,
    PromptError,
    PublishedDifferenceWarning,
    SourceError,
    TargetError,
    warn,
)
from ..inputs.prompt import encode
from ..inputs.targets import token_id
from ..models.bind import bind
from ..models.bound import BoundModel
from ..models.capture import Capture, of_this_thread, running
from ..models.health import blame, refuse_dropout
from ..models.trace import Trace
from ..sources.components import Heads, Modules, Neurons
from ..sources.subspaces import Custom
from .published import Published

_KINDS = ("attn", "mlp", "attn_head")
_NOTICE = (
    "decomposed_state_manager returns parts that add up to the residual stream, so its numbers differ from the published "
    "implementation's: in module, head, neuron and subspace mode; with the rules relu and linear; in models with biases, "
    "which are part of row 0 (the remainder or, in token mode, the first token); and with compute_num or "
    "single_compute_token, which have no effect here. reproduce_published=True gives the published numbers"
)
_told = False


class decomposed_state_manager:  # noqa: N801 (the published name)
    """Decompose a model's states into tokens, modules, heads, neurons or given subspaces.

    A prompt is a string, which ``tokenizer.encode`` turns into ids, or a list of ids. All tensors are returned on the CPU.
    Unless a method says otherwise, a state is ``[N, M, D]`` (positions, sources, hidden_size), after the final norm with
    its frozen scale and weight. Its sum over the sources is the model's own residual stream after the final norm. Some
    methods also return ``states``, the model's residual streams: a list of ``2L + 1`` tensors ``[1, N, D]``, before
    attention and before the MLP of each layer in turn, and before the final norm.

    The contribution of the model's biases belongs to no token and no component. It is part of row 0, so that the rows add
    up: the remainder in module, head and neuron mode, the first token in token mode, the first part in subspace mode.

    ``compute_num`` and ``single_compute_token`` change the published results. Here they are accepted and ignored, because
    a memory budget sets the block size and blocks do not change the result. One
    :class:`depass.PublishedDifferenceWarning` per process says where the numbers differ from the published ones.

    Args:
        model: a causal language model of Hugging Face transformers. It is never modified.
        tokenizer: an object with ``encode(prompt)``, which returns ids; generation also needs ``decode``.
        mlp_softmax_temp: the softmax rule's temperature, in units of the pre-activation.
        ignore_special_token: exclude the first token from the MLPs of later positions in token mode, BOS or not.
        mlp_decomposed_function: ``softmax``, ``max``, ``relu``, ``linear`` or ``taylor``.
        reproduce_published: give the published implementation's numbers, quirks included.

    Raises:
        ModelError: DePass does not support the model.
        OptionError: an invalid option value.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        mlp_softmax_temp: float = 0.1,
        ignore_special_token: bool = True,
        mlp_decomposed_function: str = "softmax",
        reproduce_published: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.mlp_softmax_temp, self.ignore_special_token = mlp_softmax_temp, ignore_special_token
        self.mlp_decomposed_function, self.reproduce_published = mlp_decomposed_function, reproduce_published
        self.states: list[Tensor] = []
        self._ids: tuple[int, ...] = ()
        self.bound = bind(model)
        self._engine()
        if not reproduce_published:
            _tell_once()

    def get_states(self, prompt: Any) -> list[Tensor]:
        """Run the model on a prompt and return ``states``. :meth:`compute_decomposed_state` then decomposes this prompt.

        Raises:
            PromptError: the prompt is empty, too long, outside of the vocabulary, or not a single prompt.
            ModelError: the model is in training mode with dropout.
            NonFiniteError: the residual stream is not finite.
        """
        ids = self._encode(prompt)
        states = _residual_streams(self.bound, ids)
        if not bool(states[-1].isfinite().all()):
            raise NonFiniteError(f"the model's residual stream is not finite; {blame(self.bound)}")
        self._ids, self.states = ids, states
        return states

    def compute_decomposed_state(self, start_layer_idx: int = 0, single_compute_token: int | None = None) -> Tensor:
        """``[N, M=N, D]``: the last prompt's state with the tokens as sources, decomposed at a layer's input.

        Raises:
            PromptError: there is no prompt yet.
            OptionError: the model does not have this layer, or the block size is not a positive integer.
        """
        if not self._ids:
            raise PromptError("there is no prompt yet; call get_states(prompt) first")
        layers = range(self._start(start_layer_idx), len(self.bound.layers))
        return self._normed(self._token_states(layers, single_compute_token)[0])

    def get_last_layer_decomposed_state(
        self, prompt: Any, single_compute_token: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The last layer's state ``[N, M=N, D]`` with the tokens as sources, and ``states``."""
        states = self.get_states(prompt)
        return self.compute_decomposed_state(0, single_compute_token), states

    def get_middle_to_last_decomposed_state(
        self, prompt: Any, start_layer_idx: int, single_compute_token: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The last layer's state ``[N, M=N, D]`` with the positions of a layer's input as sources, and ``states``."""
        states = self.get_states(prompt)
        return self.compute_decomposed_state(start_layer_idx, single_compute_token), states

    def get_middel_to_middle_decomposed_state(
        self, prompt: Any, start_layer_idx: int, end_layer_idx: int, single_compute_token: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The state ``[N, M=N, D]`` entering ``end_layer_idx``, with the positions of a layer's input as sources and before
        the final norm; and ``states``.
        """
        start = self._start(start_layer_idx)
        end = _integer("end_layer_idx", end_layer_idx, start + 1, len(self.bound.layers))
        states = self.get_states(prompt)
        return _by_position(self._token_states(range(start, end), single_compute_token)[0]), states

    def all_layer_to_init_attribute_state(
        self, prompt: Any, single_compute_token: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The states ``[L+1, N, M=N, D]`` entering each layer and after the last, with the tokens as sources and before the
        final norm; and ``states``.
        """
        states = self.get_states(prompt)
        by_layer = self._token_states(range(len(self.bound.layers)), single_compute_token, keep_all=True)
        return torch.stack([_by_position(state) for state in by_layer]), states

    def get_mlp_neuron_decomposed_state(
        self, prompt: Any, start_layer_idx: int, compute_num: int | None = None
    ) -> Tensor:
        """``[N, 1+F, D]``: the remainder of the residual stream after a layer, then each neuron of that layer's MLP."""
        start = self._start(start_layer_idx)
        blocks = None if compute_num is None else _integer("compute_num", compute_num, 1)
        self.get_states(prompt)
        return self._normed(self._engine().neuron_states(self._ids, start, blocks))

    def get_layer_module_decomposed_state(
        self, prompt: Any, start_layer_idx: int, single_compute_token: int | None = None, type: str | None = None
    ) -> Tensor:
        """``[N, 2, D]`` (remainder, module) for ``type`` ``attn`` or ``mlp``; ``[N, 1+H, D]`` (remainder, heads) for
        ``attn_head``.
        """
        start = self._start(start_layer_idx)
        if type not in _KINDS:
            raise OptionError(f"type={type!r}: must be one of {', '.join(_KINDS)}")
        if single_compute_token is not None and self.reproduce_published:
            raise OptionError(
                f"single_compute_token={single_compute_token!r}: the published code's use of it for modules is unknown, and "
                "so few sources need no blocks; leave it out"
            )
        self.get_states(prompt)
        return self._normed(self._engine().module_states(self._ids, start, type))

    def get_subspace_decomposed_state(self, prompt: Any, start_layer_idx: int, attribute_state: Tensor) -> Tensor:
        """The last layer's state ``[N, M, D]``, from given parts of the residual stream *after* a layer.

        Args:
            prompt: ``N`` tokens.
            start_layer_idx: the layer; the parts are those of the residual stream after it.
            attribute_state: the parts ``[M, N, D]``. If they do not add up to the residual stream, the difference is
                propagated as an additional part and added to row 0 of the result, so that the result adds up. With
                ``reproduce_published=True`` the difference is left out.

        Raises:
            SourceError: the parts are not finite or do not have this shape.
        """
        return self._normed(self._subspace_states(prompt, start_layer_idx, attribute_state, keep_all=False)[-1])

    def get_subspace_decomposed_state_all_layer(
        self, prompt: Any, start_layer_idx: int, attribute_state: Tensor
    ) -> list[Tensor]:
        """As :meth:`get_subspace_decomposed_state`, but ``[N, M, D]`` after each layer from that one on, before the final
        norm.
        """
        by_layer = self._subspace_states(prompt, start_layer_idx, attribute_state, keep_all=True)
        return [_by_position(state) for state in by_layer]

    def compute_attribute_score(self, attribute_state: Tensor, token_idx: int, decode_token_id: int) -> Tensor:
        """``[M]``: each source's contribution to the logit of a token after a position.

        Args:
            attribute_state: ``[N, M, D]``, after the final norm.
            token_idx: the position, counted from 0, or from the end if negative.
            decode_token_id: the token's id.

        Raises:
            TargetError: the position or the token does not exist.
            SourceError: ``attribute_state`` is not a state.
        """
        head = self.bound.unembedding
        _check_state(attribute_state, (None, None, self.bound.hidden_size), "[N, M, D]")
        length = len(attribute_state)
        if not -length <= integer("token_idx", token_idx, TargetError) < length:
            raise TargetError(f"token_idx={token_idx!r}: must be a position of the state, {-length} to {length - 1}")
        token = token_id(decode_token_id, None, self.bound)
        direction = self.bound.scaled(head.weight[token].detach().to(attribute_state))
        scores: Tensor = attribute_state[token_idx] @ direction
        bias = head.bias
        if bias is not None and not self.reproduce_published:
            scores[0] += self.bound.scaled(bias[token].detach().to(scores))
        return scores

    def model_generate_cite(
        self, prompt: Any, **generate_options: Any
    ) -> tuple[str, list[Tensor], Tensor, list[Tensor]]:
        """Generate text, then attribute each generated token to all tokens before it. (The published method cannot run.)

        Args:
            prompt: the prompt that the model continues.
            generate_options: options of ``model.generate``, for example ``max_new_tokens``.

        Returns:
            The generated text; for each generated token the scores ``[M]`` of the ``M`` tokens before it (of the prompt and
            generated), which add up to its logit; the state ``[N, N, D]`` of prompt and generated text; and its ``states``.

        Raises:
            PromptError: the prompt is invalid.
            OptionError: the options ask for several texts, or for no text.
        """
        given = self._encode(prompt)
        ids = torch.tensor([given], device=self.bound.input_device)
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), **generate_options)
        sequences = getattr(output, "sequences", output)
        if len(sequences) != 1:
            raise OptionError(f"num_return_sequences={len(sequences)}: must be 1, one text at a time is attributed")
        text = sequences[0].tolist()
        if len(text) == len(given):
            raise OptionError("model.generate returned no new token; raise max_new_tokens")
        state, states = self.get_last_layer_decomposed_state(text)
        scores = [self.compute_attribute_score(state[:, :t], t - 1, text[t]) for t in range(len(given), len(text))]
        new: str = self.tokenizer.decode(text[len(given) :], skip_special_tokens=True)
        return new, scores, state, states

    def _engine(self) -> _Engine:
        """The decomposition. It is created for each call, because the options are attributes that may have changed."""
        options = self.mlp_decomposed_function, self.mlp_softmax_temp, self.ignore_special_token
        _check_options(*options, self.reproduce_published)
        return Published(self.bound, *options) if self.reproduce_published else _Exact(self.model, *options)

    def _encode(self, prompt: Any) -> tuple[int, ...]:
        refuse_dropout(self.bound)
        if isinstance(prompt, str) and self.tokenizer is None:
            raise PromptError("a text prompt needs a tokenizer; give the manager a tokenizer, or give token ids")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return encode(ids, None, self.bound).ids

    def _start(self, layer: Any) -> int:
        return _integer("start_layer_idx", layer, 0, len(self.bound.layers) - 1)

    def _token_states(self, layers: range, block: int | None, keep_all: bool = False) -> list[Tensor]:
        block = None if block is None else _integer("single_compute_token", block, 1)
        return self._engine().token_states(self._ids, layers, keep_all, block)

    def _subspace_states(self, prompt: Any, layer: Any, parts: Tensor, keep_all: bool) -> list[Tensor]:
        start = self._start(layer)
        self.get_states(prompt)
        _check_state(parts, (None, *self.states[0].shape[1:]), "[M, N, D]")
        stream = self.states[2 * start + 2][0]
        return self._engine().subspace_states(self._ids, start, parts, stream, keep_all)

    @torch.no_grad()
    def _normed(self, state: Tensor) -> Tensor:
        """A state ``[M, N, D]`` as ``[N, M, D]`` after the final norm, with the norm's bias in row 0."""
        norm = self.bound.final_norm
        scale = norm.scale(self.states[-1][0], state.dtype)  # [N]
        state = norm.of_parts(state, scale[:, None])
        beta = norm.beta()
        if beta is not None:
            state[0] += beta.to(state)
        return _by_position(state)


class _Engine(Protocol):
    """The decomposition that the manager uses. States are ``[M, N, D]``, before the final norm, on the CPU."""

    def token_states(
        self, ids: Sequence[int], layers: range, keep_all: bool = False, single_compute_token: int | None = None
    ) -> list[Tensor]:
        """``M = N``; after the last of ``layers``, or (``keep_all``) entering each of them and after the last."""

    def module_states(self, ids: Sequence[int], layer: int, kind: str) -> Tensor:
        """After the last layer: the remainder, then the attention, the MLP or the heads."""

    def neuron_states(self, ids: Sequence[int], layer: int, compute_num: int | None = None) -> Tensor:
        """After the last layer: the remainder, then the layer's neurons."""

    def subspace_states(
        self, ids: Sequence[int], layer: int, parts: Tensor, stream: Tensor, keep_all: bool = False
    ) -> list[Tensor]:
        """Of parts of the stream after ``layer``: after the last layer, or (``keep_all``) after each layer from there on."""


class _Exact:
    """The exact decomposition by :class:`depass.DePass`: its parts add up."""

    def __init__(self, model: Any, rule: str, temperature: float, exclude_first: bool) -> None:
        self.dp = DePass(model, None, rule=rule, temperature=temperature, exclude_bos=False)
        self.exclude_first, self.bound = exclude_first, self.dp.bound
        self.depth = len(self.bound.layers)

    def token_states(
        self, ids: Sequence[int], layers: range, keep_all: bool = False, single_compute_token: int | None = None
    ) -> list[Tensor]:
        wanted = range(layers.start, layers.stop + 1) if keep_all else [layers.stop]
        states = self.dp.states(
            ids, wanted, start_layer=layers.start, stop_layer=layers.stop, exclude_bos=self.exclude_first
        )
        return [_with_others_in_first(states.dense(layer), len(ids)) for layer in wanted]

    def module_states(self, ids: Sequence[int], layer: int, kind: str) -> Tensor:
        if kind == "attn_head":
            return self._last(ids, Heads(layer), self.bound.num_heads)
        return self._last(ids, Modules(layer, "attn" if kind == "attn" else "mlp"), 1)

    def neuron_states(self, ids: Sequence[int], layer: int, compute_num: int | None = None) -> Tensor:
        mlp = self.bound.layers[layer].mlp
        return self._last(ids, Neurons(layer), 0 if mlp is None else mlp.down.shape[1])  # Neurons refuses experts

    def subspace_states(
        self, ids: Sequence[int], layer: int, parts: Tensor, stream: Tensor, keep_all: bool = False
    ) -> list[Tensor]:
        count, parts = len(parts), parts.detach().to("cpu", self.bound.state_dtype, copy=True)
        missing = stream.to(parts) - parts.sum(0)
        sizes = stream.abs().amax(1).to(missing)
        if bool((missing.abs().amax(1) <= self.bound.tolerance * sizes).all()):  # only rounding: no source of its own
            parts[0] += missing
        else:
            parts = torch.cat([missing[None], parts])
        if layer + 1 == self.depth:
            return [_with_others_in_first(parts, count)]
        wanted = range(layer + 1, self.depth + 1) if keep_all else [self.depth]
        states = self.dp.states(ids, wanted, sources=Custom(parts, layer + 1))
        return [_with_others_in_first(states.dense(at), count) for at in wanted]

    def _last(self, ids: Sequence[int], sources: Heads | Modules | Neurons, count: int) -> Tensor:
        """After the last layer: the remainder and ``count`` components."""
        states = self.dp.states(ids, self.depth, sources=sources)
        return _with_others_in_first(states.dense(self.depth), 1 + count)


def _with_others_in_first(state: Tensor, count: int) -> Tensor:
    """The last ``count`` sources ``[count, N, D]``. The others (the biases, a remainder) are added to the first of them."""
    others, named = state[:-count], state[-count:]
    named[0] += others.sum(0)
    return named


def _residual_streams(bound: BoundModel, ids: Sequence[int]) -> list[Tensor]:
    """The model's residual streams ``[1, N, D]``: before attention and MLP of each layer, and before the final norm."""
    kept = _Streams(bound, [ids], range(len(bound.layers)))
    with (
        torch.no_grad(),
        running,
        ExitStack() as stack,
    ):  # other threads wait, because their runs would call these hooks
        for layer in bound.layers:
            reader = layer.mlp_norm or (layer.experts if layer.mlp is None else layer.mlp.gate)
            assert reader is not None
            stack.callback(reader.module.register_forward_pre_hook(kept.between).remove)
        kept.run()
    return [*kept.streams, kept.stream.to("cpu", copy=True)[None]]


class _Streams(Capture):
    """Captures each layer's residual stream before its attention and before its MLP."""

    def __init__(self, bound: BoundModel, prompts: Sequence[Sequence[int]], layers: range) -> None:
        super().__init__(bound, prompts, layers)
        self.thread = threading.get_ident()
        self.streams: list[Tensor] = []
        self.middle: Tensor | None = None

    @of_this_thread
    def between(self, _: Any, args: tuple[Tensor, ...]) -> None:
        self.middle = args[0].detach().to("cpu", copy=True).reshape(1, -1, args[0].shape[-1])

    def layer(self, index: int, trace: Trace) -> None:
        assert self.middle is not None
        self.streams += [trace.stream.detach().to("cpu", copy=True)[None], self.middle]


def _by_position(state: Tensor) -> Tensor:
    return state.transpose(0, 1).contiguous()


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    number = integer(name, value, OptionError)
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise OptionError(f"{name}={number}: must be an integer {bounds}")
    return number


def _check_options(rule: Any, temperature: Any, ignore: Any, reproduce: Any) -> None:
    number = isinstance(temperature, (int, float)) and math.isfinite(temperature)
    if not number or temperature <= 0:
        raise OptionError(f"mlp_softmax_temp={temperature!r}: must be a positive number")
    if rule not in RULES:
        raise OptionError(f"mlp_decomposed_function={rule!r}: must be one of {', '.join(RULES)}")
    for name, value in (("ignore_special_token", ignore), ("reproduce_published", reproduce)):
        if not isinstance(value, bool):
            raise OptionError(f"{name}={value!r}: must be True or False")


def _check_state(state: Any, shape: tuple[int | None, ...], letters: str) -> None:
    sizes = ", ".join(
        letter if n is None else str(n) for letter, n in zip(letters[1:-1].split(", "), shape, strict=True)
    )
    if not isinstance(state, Tensor) or not state.is_floating_point():
        raise SourceError(
            f"attribute_state must be a float tensor {letters}, got {getattr(state, 'dtype', type(state))}"
        )
    fits = state.dim() == 3 and all(n is None or n == m for n, m in zip(shape, state.shape, strict=True))
    if not fits or state.numel() == 0:
        raise SourceError(f"attribute_state must have shape {letters}, here [{sizes}], got {list(state.shape)}")
    if not bool(state.isfinite().all()):
        raise SourceError("attribute_state must be finite, got NaN or infinity")


def _tell_once() -> None:
    global _told
    if not _told:
        _told = True
        warn(_NOTICE, PublishedDifferenceWarning)
