"""Masking heads, neurons or experts while a model runs: their output to the residual stream is set to zero.

::

    with masking.heads(dp, {7: [0, 3]}):
        logits = dp.model(ids).logits

Heads can also be set to their mean output over other prompts (mean ablation)::

    with masking.heads(dp, {7: [0, 3]}, means=masking.head_means(dp, prompts)):
        logits = dp.model(ids).logits
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .api import DePass
from .checks import integer, integers, listed
from .errors import OptionError
from .models import attention, capture
from .models.bind import bind
from .models.bound import BoundModel, Layer, Projection

Masked = Mapping[int, Sequence[int]] | Tensor
Kind = Literal["heads", "neurons", "experts"]


@contextmanager
def heads(model: Any, masked: Masked, means: Sequence[Tensor] | None = None) -> Iterator[None]:
    """Set the outputs of the masked heads to zero, or to their means, inside the ``with`` block.

    The head outputs are the inputs of the output projection; its bias is kept. Use this for the model's own forward
    passes. Attributions in other threads wait until the block ends. An attribution inside the block explains
    the model without these heads; with ``means`` it is refused.

    Args:
        model: a :class:`DePass`, or a supported HuggingFace model.
        masked: a dict from layer to the masked heads, for every prompt; or a bool tensor ``[B, num_layers, num_heads]``
            with one row per prompt of the batch, true where masked.
        means: for each layer ``[H·d]``, as :func:`head_means` returns them: the outputs of the masked heads at every
            position. By default zero.

    Raises:
        OptionError: a layer or head is out of range, or the means do not fit the layers; or, when the model runs, the batch
            does not have ``B`` prompts, or with ``means`` an attribution runs.
        ModelError: the model is not supported.
    """
    with _masked(model, masked, "heads", None if means is None else checked_means(bound_of(model), means)):
        yield


@torch.no_grad()
def head_means(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Each layer's mean head outputs ``[H·d]`` over the positions of prompts, in fp64 on the CPU.

    A prompt's mean is over its positions, and every prompt weighs the same. The head outputs are those that :func:`heads`
    masks.

    Args:
        model: as for :func:`heads`.
        prompts: the ids of one or more prompts.

    Raises:
        OptionError: there are no prompts.
        ModelError: the model is not supported.
    """
    bound, outputs = bound_of(model), _HeadOutputs()
    if not prompts:
        raise OptionError("prompts is empty; give at least one prompt to take the mean over")
    read = [[projection.module for projection, _ in read_by(layer, "heads")] for layer in bound.layers]
    with ExitStack() as stack:
        for module in chain.from_iterable(read):
            stack.callback(module.register_forward_pre_hook(outputs.hook).remove)
        for ids in prompts:
            capture.normed(bound, input_ids=torch.tensor([ids], device=bound.input_device))
    nothing = torch.zeros(0, dtype=torch.float64, device="cpu")  # of a layer without heads
    return [torch.cat([nothing, *(outputs.totals[module] for module in of_layer)]) / len(prompts) for of_layer in read]


class _HeadOutputs:
    """For each module the sum over this thread's passes of its input's mean over positions, ``[H·d]``."""

    def __init__(self) -> None:
        self.thread, self.totals = threading.get_ident(), dict[nn.Module, Tensor]()

    @capture.of_this_thread
    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        mean = x.reshape(-1, x.shape[-1]).double().mean(0).cpu()
        self.totals[module] = mean + self.totals.get(module, 0.0)


@contextmanager
def neurons(model: Any, masked: Masked) -> Iterator[None]:
    """Set the hidden values of the masked neurons to zero inside the ``with`` block.

    The hidden values are the inputs of the down projection; its bias is kept.

    Args:
        model: as for :func:`heads`; without routed experts.
        masked: a dict from layer to the masked neurons, or a bool tensor ``[B, num_layers, num_neurons]``.

    Raises:
        OptionError: as for :func:`heads`; or the model has routed experts.
        ModelError: as for :func:`heads`.
    """
    with _masked(model, masked, "neurons"):
        yield


@contextmanager
def experts(model: Any, masked: Masked) -> Iterator[None]:
    """Set the router's weights of the masked experts to zero inside the ``with`` block.

    A position that chose a masked expert gets nothing from it. The router still chooses the same experts, and the other
    weights stay as they are: no other expert takes its place.

    Args:
        model: as for :func:`heads`; with routed experts.
        masked: a dict from layer to the masked experts, or a bool tensor ``[B, num_layers, num_experts]``. It is false in
            layers without experts.

    Raises:
        OptionError: as for :func:`heads`; or a layer has no routed experts.
        ModelError: as for :func:`heads`.
    """
    with _masked(model, masked, "experts"):
        yield


def bound_of(model: Any) -> BoundModel:
    """The bound model of a :class:`DePass`, or of a HuggingFace model of a known family.

    Raises:
        ModelError: the model is not supported.
    """
    return model.bound if isinstance(model, DePass) else bind(model)


def num_components(bound: BoundModel, kind: Kind) -> int:
    """The number of heads, neurons or experts of each layer that has any.

    Raises:
        OptionError: the layers have different numbers of such components, the model has none, or neurons are asked for and
            it has experts.
    """
    if kind == "neurons" and bound.has_experts:
        raise OptionError(
            f"{bound.name} has routed experts, whose neurons cannot be masked or scored one by one; take its "
            "experts or heads"
        )
    if kind == "experts" and not bound.has_experts:
        raise OptionError(f"{bound.name} has no routed experts; take its heads or neurons")
    counts = {_count(bound.layers[layer], kind) for layer in layers_with(bound, kind)}
    if not counts:
        raise OptionError(f"{bound.name} has no {kind}: its layers have another sublayer alone")
    if len(counts) > 1:
        raise OptionError(
            f"the layers of {bound.name} have different numbers of {kind}, {sorted(counts)}; they must have the same"
        )
    return counts.pop()


def layers_with(bound: BoundModel, kind: Kind) -> tuple[int, ...]:
    """The layers that have components of a kind."""
    return tuple(index for index, layer in enumerate(bound.layers) if _count(layer, kind))


def _count(layer: Layer, kind: Kind) -> int:
    if kind == "heads":
        return layer.num_heads
    if kind == "neurons":
        return 0 if layer.mlp is None else int(layer.mlp.down.shape[1])
    return 0 if layer.experts is None else layer.experts.count


def read_by(layer: Layer, kind: Kind) -> list[tuple[Projection, slice]]:
    """The projections that read a layer's heads or neurons, each with those that it reads among all."""
    if kind == "heads":
        return [(mixer.output, heads) for mixer, heads in layer.heads]
    down = layer.only_mlp.down
    return [(down, slice(0, down.shape[1]))]


@contextmanager
def _masked(model: Any, masked: Any, kind: Kind, means: Sequence[Tensor] | None = None) -> Iterator[None]:
    bound = bound_of(model)
    off = _checked(bound, masked, kind)
    with ExitStack() as stack:
        for index, layer in enumerate(bound.layers):
            if bool(off[:, index].any()):
                if means is None:
                    _mask_layer(stack, layer, off[:, index], kind)
                else:
                    _fill_layer(stack, layer, off[:, index], means[index])
        yield


def means_by_module(layer: Layer, mean: Tensor) -> dict[nn.Module, Tensor]:
    """A layer's means ``[H·d]`` by the modules that read its heads."""
    readers = [projection for projection, _ in read_by(layer, "heads")]
    own = torch.split(mean, [projection.shape[1] for projection in readers])
    return {projection.module: each for projection, each in zip(readers, own, strict=True)}


def _fill_layer(stack: ExitStack, layer: Layer, off: Tensor, mean: Tensor) -> None:
    """Register the hooks that set a layer's heads ``[B, H]`` to their means ``[H·d]``."""
    own_means = means_by_module(layer, mean)
    for projection, own in read_by(layer, "heads"):
        fill = _Mean(off[:, own], own_means[projection.module])
        stack.callback(projection.module.register_forward_pre_hook(fill.hook).remove)


def _mask_layer(stack: ExitStack, layer: Layer, off: Tensor, kind: Kind) -> None:
    """Register the hooks that mask a layer's components ``[B, C]``; they are removed when the stack closes."""
    if kind == "experts":
        assert layer.experts is not None
        zero = _ZeroWeights(off)
        stack.callback(layer.module.register_forward_pre_hook(zero.begin, with_kwargs=True).remove)
        if layer.experts.router is not None:
            stack.callback(layer.experts.router.register_forward_hook(zero.on_input).remove)
            return
        stack.callback(layer.experts.module.register_forward_pre_hook(zero.hook, with_kwargs=True).remove)
        return
    for projection, own in read_by(layer, kind):
        stack.callback(projection.module.register_forward_pre_hook(_Zero(off[:, own]).hook).remove)
        if kind == "heads":
            _mask_heads(stack, projection.module, off[:, own])


def _mask_heads(stack: ExitStack, module: Any, off: Tensor) -> None:
    """Tell this thread's captures which heads pass no values on, until the stack closes. Nested masks add up."""
    key = module, threading.get_ident()
    before = capture.masked_heads.get(key)
    capture.masked_heads[key] = off if before is None else off | before

    def restore() -> None:
        if before is None:
            del capture.masked_heads[key]
        else:
            capture.masked_heads[key] = before

    stack.callback(restore)


class _Zero:
    """Zeroes the components in ``off`` ``[B, C]`` of a module's input, in this thread's passes.

    The input is ``[B, T, C·d]``, of prompts in one row ``[1, P, C·d]``, or without its first dimension, as OPT flattens it.
    """

    mean: Tensor | None = None  # [C·d], what the components are set to instead of zero

    def __init__(self, off: Tensor) -> None:
        self.off, self.thread = off, threading.get_ident()

    def hook(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != self.thread:
            return None
        x: Tensor = args[0]
        off, packing = self.off, attention.packing_of_this_thread()
        wide = off.to(x.device).repeat_interleave(x.shape[-1] // off.shape[1], 1)  # [B, C·d]
        if len(off) == 1:
            return (self.filled(x, wide[0]), *args[1:])
        flattened = len(off) if len(x) % len(off) == 0 else 1  # [B·T, C·d] does not tell how many prompts it holds
        prompts = len(packing.lengths) if packing is not None else len(x) if x.dim() == 3 else flattened
        _must_fit(off, prompts)
        by_prompt = wide[:, None] if packing is None else packing.by_position(wide)  # [B, 1, C·d] or [1, P, C·d]
        rows = x.reshape(len(by_prompt), -1, x.shape[-1])
        return (self.filled(rows, by_prompt).view(x.shape), *args[1:])

    def filled(self, x: Tensor, off: Tensor) -> Tensor:
        """``x`` ``[..., C·d]`` with its masked numbers replaced."""
        return x.masked_fill(off, 0) if self.mean is None else torch.where(off, self.mean.to(x), x)


class _Mean(_Zero):
    """Sets the heads in ``off`` ``[B, H]`` to their means ``[H·d]``; attributions do not know this step."""

    def __init__(self, off: Tensor, mean: Tensor) -> None:
        super().__init__(off)
        self.mean = mean

    def hook(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() == self.thread and attention.captures_in_this_thread():
            raise OptionError(
                "an attribution cannot run inside masking.heads(..., means=...): the means are parts of no source; mask "
                "without means, which sets the heads to zero"
            )
        return super().hook(_, args)


class _ZeroWeights:
    """Zeroes the router's weights of the experts in ``off`` ``[B, E]``, in this thread's passes."""

    def __init__(self, off: Tensor) -> None:
        self.off, self.thread, self.prompts = off, threading.get_ident(), 1

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note how many prompts the layer gets; its experts get all positions in one dimension."""
        if threading.get_ident() == self.thread:
            packing = attention.packing_of_this_thread()
            self.prompts = (
                len(args[0] if args else kwargs["hidden_states"]) if packing is None else len(packing.lengths)
            )

    def hook(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """The arguments of the experts with these weights set to zero."""
        if threading.get_ident() != self.thread:
            return None
        chosen, weight = capture.routing_of(args, kwargs)[1:]  # [P, k]
        off, count = self._by_position(len(chosen)).to(chosen.device), self.off.shape[1]
        is_expert = (chosen >= 0) & (chosen < count)  # some routers choose "none" by another number
        is_off = off.gather(1, chosen.clamp(0, count - 1)) & is_expert
        masked = weight.masked_fill(is_off, 0)
        args = tuple(masked if each is weight else each for each in args)
        return args, {name: masked if each is weight else each for name, each in kwargs.items()}

    def on_input(self, _: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The output of a router whose weights ``[P, E]`` multiply the experts' inputs, with these weights set to zero."""
        if threading.get_ident() != self.thread:
            return None
        off = self._by_position(len(output[0])).to(output[0].device)
        return (output[0].masked_fill(off, 0), *output[1:])

    def _by_position(self, positions: int) -> Tensor:  # [P, E]
        packing = attention.packing_of_this_thread()
        if len(self.off) == 1:
            return self.off.expand(positions, -1)
        _must_fit(self.off, self.prompts)
        if packing is not None and packing.packed:
            return packing.by_position(self.off)[0]
        return self.off.repeat_interleave(positions // self.prompts, 0)


def _must_fit(off: Tensor, prompts: int) -> None:
    if len(off) not in (1, prompts):
        raise OptionError(
            f"masked has {len(off)} rows, but the batch has {prompts} prompts; give one row per prompt or one for all"
        )


def _refuse_absent(bound: BoundModel, kind: Kind, layer: int) -> None:
    if layer not in layers_with(bound, kind):
        raise OptionError(
            f"masked: layer {layer} of {bound.name} has no {kind}; the layers that have them are "
            f"{listed(layers_with(bound, kind))}"
        )


def checked_means(bound: BoundModel, means: Any) -> Sequence[Tensor]:
    """Means for each layer of a model, as :func:`head_means` returns them.

    Raises:
        OptionError: they do not fit the layers.
    """
    widths = [layer.mixed for layer in bound.layers]
    given = [list(mean.shape) for mean in means] if isinstance(means, Sequence) else None
    if given != [[width] for width in widths]:
        raise OptionError(
            f"means must be a list of {len(widths)} tensors of shape [H·d], one for each layer of {bound.name}, got "
            f"{type(means).__name__ if given is None else given}; take them from masking.head_means"
        )
    return list(means)


def _checked(bound: BoundModel, masked: Any, kind: Kind) -> Tensor:
    """``[B, layers, C]``, true where masked."""
    depth, count = len(bound.layers), num_components(bound, kind)
    if isinstance(masked, Tensor):
        if masked.dtype != torch.bool or masked.dim() != 3 or masked.shape[1:] != (depth, count) or not len(masked):
            raise OptionError(
                f"masked must be a bool tensor [prompts, {depth}, {count}] (prompts, layers, {kind}), got "
                f"{masked.dtype} of shape {list(masked.shape)}"
            )
        for layer in masked.any(2).any(0).nonzero()[:, 0].tolist():
            _refuse_absent(bound, kind, layer)
        return masked
    if not isinstance(masked, Mapping):
        raise OptionError(f"masked must be a dict from layers to {kind}, or a bool tensor, got {type(masked).__name__}")
    mask = torch.zeros(1, depth, count, dtype=torch.bool, device="cpu")
    for layer, numbers in masked.items():
        if not 0 <= integer("a layer of masked", layer, OptionError) < depth:
            raise OptionError(f"masked: layer {layer} is out of range; {bound.name} has layers 0 to {depth - 1}")
        _refuse_absent(bound, kind, layer)
        for number in integers(f"masked[{layer}]", numbers, OptionError):
            if not 0 <= number < count:
                raise OptionError(
                    f"masked: {kind.removesuffix('s')} {number} is out of range; a layer has {kind} 0 to {count - 1}"
                )
            mask[0, layer, number] = True
    return mask
