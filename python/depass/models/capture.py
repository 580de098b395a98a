"""Capture: one forward pass of the model, which yields layer by layer the values that a decomposed pass freezes.

Hooks fill a trace of the current layer. When the layer ends, its trace is passed on and dropped, so no attention pattern
or hidden vector outlives its layer. The hooks are always removed and the attention implementation is always restored.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ModelError
from . import weights
from .alterations import Alteration, alterations, likely, said_of, within
from .attention import at_work, eager_with_patterns, in_one_row, refuse_nested, running
from .bound import MLP, BoundModel, Mixer, Norm
from .check import Seen, SeenMixer, activations, differences, first_miss, last_differences, limit, mixed
from .experts import Experts
from .multimodal import must_read_ids_alone
from .packing import Packing
from .positions import fresh
from .streaming import streamed
from .trace import NORMS, MixerTrace, Trace

Hook = TypeVar("Hook", bound=Callable[..., Any])


def batches(
    bound: BoundModel, lengths: Sequence[int], tokens: int, each: int = 1, prompts: int | None = None
) -> Iterator[list[int]]:
    """Group prompts into passes, shortest first; yields the indices of each pass.

    Prompts whose lengths give the model another position encoding do not share a pass.

    Args:
        bound: the model.
        lengths: the prompts' numbers of tokens.
        tokens: the most tokens of one pass, padding included; a longer prompt runs alone.
        each: how many copies of a prompt a pass holds.
        prompts: the most prompts of one pass.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        full = len(batch) == prompts or length * each * (len(batch) + 1) > tokens
        if batch and (full or bound.regime(length) != bound.regime(lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def normed(bound: BoundModel, **inputs: Tensor) -> Tensor:
    """The residual stream after the final norm, ``[B, T, D]``, from a plain forward pass of the model."""
    with fresh(bound.backbone, bound.switches):
        output: Tensor = bound.backbone(**inputs, use_cache=False, return_dict=True).last_hidden_state
    return output


def normed_at(bound: BoundModel, prompts: Sequence[Sequence[int]], embeddings: Tensor) -> Tensor:
    """The residual stream after the final norm, ``[B, T, D]``, where the token embeddings are others than the prompts' own.

    The model gets the ids and the embeddings, because some models also read the ids elsewhere (Gemma 4's per-layer inputs).

    Args:
        bound: the model.
        prompts: the ids of ``B`` prompts of at most ``T`` tokens.
        embeddings: ``[B, T, D]``, what enters the model in the place of the embedding module's output.
    """
    ids = torch.zeros(embeddings.shape[:2], dtype=torch.long, device="cpu")
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device="cpu")
    thread = threading.get_ident()

    def replaced(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return embeddings if threading.get_ident() == thread else output

    hook = bound.model.get_input_embeddings().register_forward_hook(replaced)
    try:
        return normed(bound, input_ids=ids.to(bound.input_device))
    finally:
        hook.remove()


def of_this_thread(hook: Hook) -> Hook:
    """A hook that ignores calls from other threads than the one that created its owner."""

    @wraps(hook)
    def guarded(self: Any, *args: Any) -> Any:  # torch may drop the keyword arguments while the hook is removed
        return hook(self, *args) if threading.get_ident() == self.thread else None

    return guarded  # type: ignore[return-value]


# heads that depass.masking switches off, by output projection and thread: ``[B, H]``, per prompt of a pass or B = 1 for all
masked_heads: dict[tuple[nn.Module, int], Tensor] = {}


def unmasked(mixer: Mixer, of_heads: Tensor) -> Tensor:
    """Numbers of a mixer's heads ``[B, H, ., .]``, such as the pattern, with zero for the heads that this thread masks."""
    off = masked_heads.get((mixer.output.module, threading.get_ident()))
    return of_heads if off is None else of_heads.masked_fill(off.to(of_heads.device)[:, :, None, None], 0)


class Capture(ABC):
    """One forward pass of a model's backbone over prompts; a subclass implements :meth:`layer`.

    Prompts of different lengths lie in one row, if the model takes positions; otherwise they are padded on the right, where
    causal attention ignores the padding. ``P`` does not count it.

    Args:
        bound: the model.
        prompts: the token ids of ``B`` prompts.
        layers: the layers, consecutive and at least one, for which :meth:`layer` is called.
        with_gate_total: whether traces hold the model's own pre-activations.

    Attributes:
        stream: after :meth:`run`, the residual stream ``[P, D]`` at the output of the last of ``layers``.
        normed: after :meth:`run`, the backbone's output ``[P, D]`` after its final norm.
        altered: by prompt, what makes the model compute something else than its weights say.
    """

    stream: Tensor
    normed: Tensor
    altered: dict[int, str]
    alterations: list[Alteration]

    def __init__(
        self, bound: BoundModel, prompts: Sequence[Sequence[int]], layers: range, with_gate_total: bool = False
    ) -> None:
        self.bound, self.layers, self.with_gate_total = bound, layers, with_gate_total
        self.state_dtype = bound.state_dtype
        self.packing = Packing(prompts, bound.takes_positions)
        self.lengths = self.packing.lengths
        self.reading: int | None = None  # the layer whose trace is being read

    @abstractmethod
    def layer(self, index: int, trace: Trace) -> None:
        """Called when a layer ends; the trace may be read only during the call."""

    def run(self) -> None:
        """Run the model. Layers are checked at their first run; those of a model with hooks, at every run.

        Raises:
            ModelError: an attribution is already running in this thread, the model does not call transformers' attention
                interface, or a layer does not compute what the family says.
        """
        bound = self.bound
        with running, ExitStack() as stack:  # attributions of several threads take turns
            refuse_nested()
            self.altered, self.alterations = {}, alterations(bound)
            if bound.is_wrapped and not self.alterations and self.is_checked(0):
                with nullcontext() if bound.stream_to is None else streamed(bound, bound.stream_to):
                    must_read_ids_alone(bound)
            stack.enter_context(eager_with_patterns(bound))
            layers = [LayerCapture(self, index, self.is_checked(index)) for index in self.layers]
            for layer in layers:
                layer.hook(stack)
            self._hook_lending(stack)
            if bound.stream_to is not None:
                stack.enter_context(streamed(bound, bound.stream_to))
            stack.enter_context(in_one_row(self.packing))
            output = normed(bound, **self.packing.inputs(bound.input_device))
        self._must_have_ended(layers)
        self.normed = self.packing.flat(output)
        if self.layers[-1] + 1 == len(bound.layers):
            self.check_the_end()

    def _hook_lending(self, stack: ExitStack) -> None:
        """See the values of layers before this pass's, which its layers take."""
        self.lent: dict[int, Tensor] = {}  # by layer, [P, K·d]
        for index in self.bound.lending:
            mixer = self.bound.layers[index].attention
            if index < self.layers[0] and mixer is not None:
                at_work[mixer.module] = Lender(self, index, mixer)
                stack.callback(at_work.pop, mixer.module)

    def check_the_end(self) -> None:
        """Compare the final norm and the head where there are hooks; elsewhere the scores' sum shows a difference."""
        if self.alterations:
            at, bound = self.checked_positions(), self.bound
            found = last_differences(
                bound, self.stream[at.to(self.stream.device)], self.normed[at.to(self.normed.device)]
            )
            self.judge(len(bound.layers), found, limit(bound.layers[-1], self.stream, self.normed))

    def checked_positions(self) -> Tensor:
        """The positions that the check compares: the first prompt's last or, where there are hooks, all."""
        if self.alterations:
            return torch.arange(sum(self.lengths), device="cpu")
        return torch.tensor([self.lengths[0] - 1], device="cpu")

    def is_checked(self, index: int) -> bool:
        """Whether this run checks a layer."""
        has_numbers = self.bound.device.type != "meta"
        return has_numbers and (bool(self.alterations) or index not in self.bound.checked)

    def judge(self, index: int, found: dict[str, Tensor], allowed: float) -> None:
        """Note the prompts at which a layer's steps differ from the family's, where the model has hooks.

        The number of layers stands for the final norm and the head.

        Raises:
            ModelError: the steps differ, and the model has no hooks.
        """
        bound, inside = self.bound, index < len(self.bound.layers)
        of_prompts = [found]
        if self.alterations:
            of_prompts = [dict(zip(found, each, strict=True)) for each in
                          zip(*(torch.split(steps, self.lengths) for steps in found.values()), strict=True)]  # fmt: skip
        for prompt, steps in enumerate(of_prompts):
            miss = first_miss({step: float(each.max()) for step, each in steps.items()}, allowed)
            if miss is None:
                continue
            said = f"{f'layer {index}' if inside else 'the model'}: {miss.said(bound, index)}"
            if not self.alterations:
                raise ModelError(f"{bound.name} is not what its depass.Family says; {said}; correct the family")
            if prompt not in self.altered:
                cause = likely(self.alterations, bound, index if inside else None)
                self.altered[prompt] = f"{said}, which may come from this: {cause}"
        if not self.altered and all(bool(steps.isfinite().all()) for steps in found.values()):
            bound.checked.add(index)

    def _must_have_ended(self, layers: Sequence[LayerCapture]) -> None:
        silent = [layer.index for layer in layers if not layer.ended]
        if silent:
            if self.alterations:
                raise ModelError(
                    f"{self.bound.name} did not run layer {silent[0]} past DePass's hooks; {said_of(self.alterations)}"
                )
            count = getattr(self.bound.model.config.get_text_config(), "num_hidden_layers", None)
            raise ModelError(
                f"{self.bound.name} did not run layer {silent[0]}: it holds {len(self.bound.layers)} layers, and its config "
                f"says num_hidden_layers={count}; set model.config.num_hidden_layers, or remove the layers that do not run"
            )


def routing_of(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of an experts module: its input ``[P, D]``, the chosen experts ``[P, k]``, and the router's weights."""
    x, *others = (*args, *kwargs.values())
    chosen, weight = sorted(others[:2], key=torch.is_floating_point)
    return x, chosen, weight


class Lender:
    """Sees the values that a layer outside of a pass's layers lends to later ones."""

    def __init__(self, run: Capture, index: int, mixer: Mixer) -> None:
        self.run, self.index, self.mixer = run, index, mixer
        self.seen = None
        self.thread = threading.get_ident()

    def attention(self, _: Tensor, values: Tensor) -> None:
        """Keep the values ``[B, K, T, d]``."""
        if threading.get_ident() == self.thread:
            self.run.lent[self.index] = self.run.packing.of_padded(values.transpose(1, 2)).flatten(1)


class Check(Capture):
    """A pass that only compares layers with the family."""

    def layer(self, index: int, trace: Trace) -> None:
        """Nothing is read of a layer."""


class MixerCapture:
    """The hooks of one mixer of a layer: they fill its part of the layer's trace."""

    def __init__(self, of: LayerCapture, mixer: Mixer, number: int) -> None:
        self.of, self.mixer, self.number, self.thread = of, mixer, number, of.thread

    def hooks(self, stack: ExitStack) -> list[RemovableHandle]:
        """Register the hooks, and the mixer for the attention function until the stack closes."""
        mixer, is_checked = self.mixer, self.of.seen is not None
        hooks = [mixer.output.module.register_forward_pre_hook(self.mixed)]
        if mixer.recurrence is None:
            at_work[mixer.module] = self
            stack.callback(at_work.pop, mixer.module)
        else:
            hooks.append(mixer.module.register_forward_pre_hook(self.recurrence, with_kwargs=True))
            if is_checked:
                hooks.append(mixer.value.module.register_forward_hook(self.values_of_recurrence))
        if mixer.latent_norm is not None:
            hooks.append(mixer.latent_norm.module.register_forward_pre_hook(self.latent_norm))
        if mixer.value_norm is not None:
            hooks.append(mixer.value_norm.module.register_forward_pre_hook(self.value_norm))
        if mixer.mix_gate is not None:
            hooks.append(mixer.mix_gate.module.register_forward_hook(self.mix_gate))
        if mixer.mix_norm is not None:
            hooks.append(mixer.mix_norm.module.register_forward_pre_hook(self.mix_norm))
        if is_checked and weights.rounds_inputs(mixer.value.module):
            hooks.append(mixer.value.module.register_forward_pre_hook(self.read_by_value))
        return hooks

    @property
    def trace(self) -> MixerTrace:
        """The mixer's part of the current layer's trace."""
        return self.of.trace.mixers[self.number]

    @property
    def seen(self) -> SeenMixer | None:
        """What the check reads of the mixer, or None where the layer is not checked."""
        return None if self.of.seen is None else self.of.seen.mixers[self.number]

    def _flat(self, tensor: Tensor) -> Tensor:
        return self.of.run.packing.flat(tensor)

    def attention(self, pattern: Tensor, values: Tensor) -> None:
        """Capture the attention pattern ``[B, H, T, T]``; a call of the module outside its layer is ignored."""
        if not self.of.is_running or threading.get_ident() != self.thread:
            return
        self.trace.pattern = unmasked(self.mixer, pattern)
        run, lender, lends = self.of.run, self.mixer.values_of, self.of.index in self.of.run.bound.lending
        if not lends and lender is None and self.seen is None:
            return
        flat = run.packing.of_padded(values.transpose(1, 2)).flatten(1)
        if lends:
            run.lent[self.of.index] = flat
        if lender is not None:
            self.trace.values = flat
        if self.seen is not None:
            self.seen.values, self.seen.mixed = flat, run.packing.of_padded(mixed(self.trace.pattern, values))
            self.seen.lent = None if lender is None else run.lent.get(lender)

    @of_this_thread
    def recurrence(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture what a recurrence freezes, computed from its input."""
        assert self.mixer.recurrence is not None
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            frozen = self.mixer.recurrence.frozen(x)
        trace, trace.pattern = self.trace, unmasked(self.mixer, frozen.pattern)
        trace.value_scale, trace.mix_scale = self._flat(frozen.value_scale), self._flat(frozen.mix_scale)
        if self.seen is not None:
            by_head = frozen.mixed.reshape(*x.shape[:2], self.mixer.num_heads, -1).transpose(1, 2)  # [B, H, T, d]
            self.seen.mixed = self._flat(unmasked(self.mixer, by_head).transpose(1, 2).flatten(2))
            self.seen.convolved = self._flat(frozen.values)

    @of_this_thread
    def values_of_recurrence(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Capture what the value projection of a recurrence writes, before the convolution."""
        if self.seen is not None:
            self.seen.values = self.mixer.value.select_output(self._flat(output))

    @of_this_thread
    def value_norm(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Capture the scale and the weight of the norm on each head's values."""
        norm, x = self.mixer.value_norm, self._flat(args[0])  # [P, K, d]
        assert norm is not None
        scale = norm.scale(x, self.of.run.state_dtype)[..., None].expand(x.shape)
        self.trace.value_scale = norm.weighted(scale).flatten(1)

    @of_this_thread
    def latent_norm(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Capture the scale of the norm on the latent vectors."""
        assert self.mixer.latent_norm is not None
        self.trace.latent_scale = self.mixer.latent_norm.scale(self._flat(args[0]), self.of.run.state_dtype)

    @of_this_thread
    def mixed(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Capture the input of the output projection."""
        self.trace.mixed = self._flat(args[0])

    @of_this_thread
    def mix_gate(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Capture the gate on what the heads mix."""
        assert self.mixer.mix_gate is not None
        gate = self.mixer.mix_gate.select_output(self._flat(output)).sigmoid()
        width = self.mixer.output.shape[1]
        self._scale_mix(gate.repeat_interleave(width // gate.shape[1], 1))  # one number a head, or one a channel

    @of_this_thread
    def mix_norm(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Capture the scale and the weight of the norm on what the heads mix."""
        norm, x = self.mixer.mix_norm, self._flat(args[0])
        assert norm is not None
        scale = norm.scale(x, self.of.run.state_dtype)[:, None].expand(-1, x.shape[1])
        self._scale_mix(norm.weighted(scale))

    def _scale_mix(self, scale: Tensor) -> None:
        before = self.trace.mix_scale
        self.trace.mix_scale = scale if before is None else before * scale

    @of_this_thread
    def read_by_value(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Capture the input of the value projection, whose kernel rounds it."""
        if self.seen is not None:
            self.seen.read_by_value = self._flat(args[0].flatten(0, -2))  # latent vectors are [B, 1, T, rank]


class LayerCapture:
    """The hooks of one layer: they fill its trace, which is passed on and dropped when the layer ends."""

    def __init__(self, run: Capture, index: int, checked: bool) -> None:
        self.run, self.index, self.modules = run, index, run.bound.layers[index]
        self.seen = Seen(mixers=tuple(SeenMixer() for _ in self.modules.mixers)) if checked else None  # until the end
        self.ended = False
        self.thread = threading.get_ident()  # other threads may run the model meanwhile
        self._trace: Trace | None = None

    def hook(self, stack: ExitStack) -> None:
        """Register the hooks; they are removed when the stack closes."""
        modules = self.modules
        mixers = [
            MixerCapture(self, mixer, number) for number, mixer in enumerate(modules.mixers)
        ]  # not kept: no cycle
        norms = {name: norm for name in NORMS if (norm := getattr(modules, name)) is not None}
        hooks = [
            modules.module.register_forward_pre_hook(self.begin, with_kwargs=True),
            modules.module.register_forward_hook(self.end),
            *(hook for mixer in mixers for hook in mixer.hooks(stack)),
            *(norm.module.register_forward_pre_hook(partial(self.norm, name, norm)) for name, norm in norms.items()),
        ]
        if modules.mlp is not None:
            hooks += self._of_mlp(modules.mlp)
        if modules.late is not None:
            hooks.append(modules.late.down.module.register_forward_pre_hook(self.late_hidden))
            hooks.append(modules.late.gate.module.register_forward_hook(self.late_gate))
        if modules.experts is not None:
            hooks += self._of_experts(modules.experts)
        for hook in hooks:
            stack.callback(hook.remove)

    def _of_mlp(self, mlp: MLP) -> list[RemovableHandle]:
        hooks = [mlp.down.module.register_forward_pre_hook(self.hidden)]
        if mlp.weight is not None:
            hooks.append(mlp.weight.register_forward_hook(self.mlp_weight))
        if self.run.with_gate_total or self.seen is not None:
            hooks.append(mlp.gate.module.register_forward_hook(self.gate))
        if self.seen is not None:
            experts = self.modules.experts
            inside = set() if experts is None else set(activations(experts.module))
            hooks += [
                each.register_forward_pre_hook(self.activation, with_kwargs=True)
                for each in activations(self.modules.module) if each not in inside
            ]  # fmt: skip
        return hooks

    def _of_experts(self, experts: Experts) -> list[RemovableHandle]:
        if experts.router is None:
            hooks = [experts.module.register_forward_pre_hook(self.routed, with_kwargs=True)]
        else:
            hooks = [experts.router.register_forward_hook(self.routed_on_input)]
        if self.seen is not None:
            hooks.append(experts.module.register_forward_hook(self.experts))
            around = str(self.run.bound.family.experts).rpartition(".")[0]
            if around:
                hooks.append(self.modules.module.get_submodule(around).register_forward_hook(self.block))
        return hooks

    @property
    def is_running(self) -> bool:
        """Whether the model is inside of the layer."""
        return self._trace is not None

    @property
    def trace(self) -> Trace:
        """The trace of the current layer."""
        assert self._trace is not None
        return self._trace

    @of_this_thread
    def begin(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        """Capture the residual stream at the layer's input."""
        if self.run.reading is not None:
            raise ModelError(
                f"a callback (progress= or on_state=) ran {self.run.bound.name} after layer {self.run.reading}; run the "
                "model after the attribution"
            )
        stream = self.run.packing.flat(args[0] if args else kwargs["hidden_states"])
        self._trace = Trace(stream, tuple(MixerTrace() for _ in self.modules.mixers))

    @of_this_thread
    def norm(self, name: str, norm: Norm, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Capture the scale of a norm's input."""
        self.trace.scales[name] = norm.scale(self.run.packing.flat(args[0]), self.run.state_dtype)

    @of_this_thread
    def hidden(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Capture the input of the down projection."""
        self.trace.hidden = self.run.packing.flat(args[0])

    @of_this_thread
    def mlp_weight(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Capture what multiplies the output of the MLP beside the experts."""
        self.trace.mlp_weight = self.run.packing.flat(output).sigmoid()[:, 0]

    @of_this_thread
    def routed(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture the input of the experts, which ones each position chose, and the router's weights."""
        x, chosen, weight = routing_of(args, kwargs)
        trace, flat = self.trace, self.run.packing.flat
        trace.routed, trace.chosen, trace.chosen_weights = flat(x), flat(chosen), flat(weight)

    @of_this_thread
    def routed_on_input(self, _: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """Capture the input of a router whose weights ``[P, E]`` multiply the experts' inputs, and its choices."""
        assert self.modules.experts is not None
        trace, flat = self.trace, self.run.packing.flat
        trace.routed = flat(args[0])
        trace.chosen_weights, trace.chosen = flat(output[0]).topk(self.modules.experts.chosen, dim=1)

    @of_this_thread
    def late_hidden(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Capture the hidden vector of the branch behind the MLP."""
        self.trace.late_hidden = self.run.packing.flat(args[0])

    @of_this_thread
    def late_gate(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Capture the pre-activations of the branch behind the MLP."""
        gate = self.run.packing.flat(output)
        if self.run.with_gate_total:
            self.trace.late_total = gate
        if self.seen is not None:
            self.seen.late_gate, self.seen.read_late = gate, self.run.packing.flat(args[0])

    @of_this_thread
    def experts(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Capture the output of the experts."""
        experts = self.modules.experts
        if self.seen is not None and experts is not None:
            if experts.router is not None:  # each expert's own, one after another: [E·P, D]
                output = output.view(experts.count, -1, output.shape[-1]).sum(0)
            self.seen.experts = self.run.packing.flat(output)

    @of_this_thread
    def block(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Capture the output of the module around the experts."""
        output = output[0] if isinstance(output, tuple) else output
        if self.seen is not None and isinstance(output, Tensor) and output.shape[-1] == self.trace.stream.shape[-1]:
            self.seen.block = self.run.packing.flat(output)

    @of_this_thread
    def gate(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Capture the pre-activations."""
        gate = self._mlp.gate.select_output(self.run.packing.flat(output))
        if self.run.with_gate_total:
            self.trace.gate_total = gate
        if self.seen is not None:
            self.seen.gate, self.seen.read_by_gate = gate, self.run.packing.flat(args[0])

    @property
    def _mlp(self) -> MLP:
        assert self.modules.mlp is not None
        return self.modules.mlp

    @of_this_thread
    def activation(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        """Capture the input of an activation function, if it has the width of the pre-activations."""
        given = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        if self.seen is not None and given is not None and given.shape[-1] == self._mlp.gate.shape[0]:
            self.seen.activated.append(self.run.packing.flat(given))

    @of_this_thread
    def end(self, _: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        """Capture the residual stream at the layer's output, and pass the trace on."""
        trace, self._trace = self.trace, None
        self._must_be_whole(trace)
        trace.after = self.run.packing.flat(output[0] if isinstance(output, tuple) else output)
        self._check(trace)
        self.ended = True
        self.run.stream = trace.after
        self.run.reading = self.index
        try:
            self.run.layer(self.index, trace)
        finally:
            self.run.reading = None

    def _check(self, trace: Trace) -> None:
        """Compare the layer with its family; see :mod:`depass.models.check`."""
        seen, self.seen = self.seen, None
        if seen is None:
            return
        if self.index > self.run.layers[0]:
            seen.before = self.run.stream
        at = self.run.checked_positions()
        values = [mixer.values for mixer in seen.mixers]
        allowed = limit(self.modules, trace.stream, trace.hidden, *values, seen.gate)
        self.run.judge(self.index, differences(self.run.bound, self.index, trace, seen, at), allowed)

    def _must_be_whole(self, trace: Trace) -> None:
        name, index = self.run.bound.name, self.index
        found = self.run.alterations
        why = f"; {said_of(likely_here)}" if (likely_here := within(found, self.run.bound, self.modules.module)) else ""
        if any(mixer.pattern is None for mixer in trace.mixers):
            raise ModelError(
                f"{name}: the attention of layer {index} does not call transformers' AttentionInterface, which DePass "
                f"needs{why}"
            )
        if trace.hidden is None and self.modules.mlp is not None:
            raise ModelError(f"{name}: the down projection of layer {index} did not run, which DePass needs{why}")
        if trace.late_hidden is None and self.modules.late is not None:
            raise ModelError(f"{name}: the branch behind the MLP of layer {index} did not run, which DePass needs{why}")
        if trace.chosen is None and self.modules.experts is not None:
            raise ModelError(f"{name}: the experts of layer {index} did not run, which DePass needs{why}")
        silent = [norm for norm in NORMS if getattr(self.modules, norm) is not None and norm not in trace.scales]
        for mixer, own in zip(self.modules.mixers, trace.mixers, strict=True):
            silent += ["value_norm"] if mixer.value_norm is not None and own.value_scale is None else []
            silent += ["mix_norm"] if mixer.mix_norm is not None and own.mix_scale is None else []
            silent += ["latent_norm"] if mixer.latent_norm is not None and own.latent_scale is None else []
        if silent:
            raise ModelError(f"{name}: the {silent[0]} of layer {index} did not run; correct the model's depass.Family")
