"""The trial pass of five tokens, which shows what the modules of a model read and wrote.

Modules pass tensors on as they are. So a module that reads what another one wrote gets the same numbers, bit for bit, in any
dtype. Numbers that are computed outside of modules are compared up to rounding. The questions are those of
:mod:`depass.models.infer`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..device_memory import asked_bytes
from ..errors import first_line
from . import weights
from .capture import running, watched
from .check import mixed
from .experts import holds_experts

TOKENS = (5, 17, 42, 7, 9)


class InferenceError(Exception):
    """No family was found. The text says what is missing."""


@dataclass(eq=False)
class Call:
    """What one module read and wrote in the trial pass, one row per position."""

    path: str  # relative to the layer; of modules outside of the layer, to the backbone
    module: Any
    read: Tensor  # [P, in]
    written: Tensor  # [P, out]

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """The two halves of what it wrote, each ``[P, out / 2]``."""
        half = self.written.shape[1] // 2
        return self.written[:, :half], self.written[:, half:]


@dataclass
class Attention:
    """One call of the attention function."""

    module: nn.Module
    values: Tensor  # [P, K·d]
    output: Tensor  # [P, H·d]
    product: Tensor  # [P, H·d], the attention pattern times the values


@dataclass
class LayerTrial:
    """What the trial pass saw of one layer.

    Attributes:
        index: the layer's.
        calls: those of its modules, in the order in which they ended.
        attention: the calls of the attention function.
    """

    index: int
    calls: list[Call] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The layer in words."""
        return "its first layer" if self.index == 0 else f"its layer {self.index}"

    @property
    def whole(self) -> Call:
        """The call of the layer itself, which ends last."""
        return self.calls[-1]

    @property
    def experts(self) -> Call | None:
        """The call of the routed experts, if the layer has some."""
        return next((call for call in self.calls if holds_experts(call.module)), None)

    @property
    def linears(self) -> list[Call]:
        """The linear layers: modules with a weight of two dimensions that are no norms. One with an adapter is one."""
        whole = [call for call in self.calls if not call.path.endswith(".base_layer")]
        return [call for call in whole if _dimensions(call.module) == 2 and not is_norm(call.module)]

    @property
    def norms(self) -> list[Call]:
        """The norms of the layer."""
        return [call for call in self.calls if is_norm(call.module)]

    def at(self, path: str) -> Call:
        """The call of the module at a path.

        Raises:
            InferenceError: it did not run.
        """
        found = next((call for call in self.calls if call.path == path), None)
        if found is None:
            raise InferenceError(f"{self.name} does not run {path}, which another layer does")
        return found

    def norm_before(self, call: Call) -> Call | None:
        """The norm whose output a module reads, or None where it reads the stream."""
        earlier = self.calls[: self.calls.index(call)]
        return next(
            (each for each in reversed(earlier) if is_norm(each.module) and same(each.written, call.read)), None
        )


@dataclass
class Trial:
    """What the trial pass saw of some layers, and of the end of the model.

    Attributes:
        config: of the text decoder.
        backbone, layers: the paths, as in a :class:`~depass.models.families.Family`.
        dense: the first layer without experts, or None.
        routed: the first layer with experts, or None.
        outside: the calls of the norms outside of the layers.
        head: that of the head.
        logits: ``[P, V]``.
    """

    config: Any
    backbone: str
    layers: str
    dense: LayerTrial | None = None
    routed: LayerTrial | None = None
    outside: list[Call] = field(default_factory=list)
    head: list[Call] = field(default_factory=list)
    logits: Tensor | None = None

    @property
    def each(self) -> list[LayerTrial]:
        """The layers that the pass noted, the first layer first."""
        return sorted(
            (layer for layer in (self.dense, self.routed) if layer is not None), key=lambda layer: layer.index
        )

    @property
    def first(self) -> LayerTrial:
        """The first layer."""
        return self.each[0]


@contextmanager
def failures() -> Iterator[None]:
    """Turns an error of the model's own code into a reason; a lack of memory stays an error."""
    try:
        yield
    except InferenceError:
        raise
    except Exception as error:
        if asked_bytes(error) is not None:
            raise
        raise InferenceError(f"its trial pass failed: {first_line(error)}") from error


def tokens(model: Any) -> list[int]:
    """The trial's tokens, which every vocabulary has."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return [token % vocabulary for token in TOKENS]


def tried(model: Any) -> Trial:
    """Run the model once, and note what the modules read and wrote.

    Raises:
        InferenceError: the layers are not found, or the pass fails.
    """
    config = model.config.get_text_config()
    path, layers = layers_of(model, config)
    backbone, _, name = path.rpartition(".")
    trial = Trial(config, backbone, name, *_noted_layers(layers))
    inside = {id(module) for module in layers.modules()}
    outside = model.get_submodule(backbone).named_modules()
    noted = [(path, each, layer.calls) for layer in trial.each for path, each in layers[layer.index].named_modules()]
    noted += [(path, each, trial.outside) for path, each in outside if id(each) not in inside and is_norm(each)]
    noted.append(("", model.get_output_embeddings(), trial.head))
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    owners = {id(module): layer for layer in trial.each for module in layers[layer.index].modules()}

    def attention(module: nn.Module, values: Tensor, output: Tensor, pattern: Tensor) -> None:
        if id(module) in owners:
            product = mixed(pattern, values)[0]
            seen = Attention(module, values.transpose(1, 2).flatten(2)[0], output.flatten(2)[0], product)
            owners[id(module)].attention.append(seen)

    with running, torch.no_grad(), failures(), ExitStack() as stack:  # attributions of several threads take turns
        for path, module, calls in noted:
            stack.callback(module.register_forward_hook(_noted(path, calls), with_kwargs=True).remove)
        stack.enter_context(watched(configs, attention))
        device = weights.device_of(model.get_input_embeddings())
        logits = model(torch.tensor([tokens(model)], device=device), use_cache=False).logits
        trial.logits = logits.flatten(0, -2)
        if not bool(logits.isfinite().all()):
            raise InferenceError("its logits are not finite")
    return trial


def _noted_layers(layers: Sequence[nn.Module]) -> tuple[LayerTrial | None, LayerTrial | None]:
    """The first layer without experts and the first one with them."""
    routed = [any(map(holds_experts, layer.modules())) for layer in layers]
    dense, first = ([index for index, each in enumerate(routed) if each is wanted] for wanted in (False, True))
    return LayerTrial(dense[0]) if dense else None, LayerTrial(first[0]) if first else None


def layers_of(model: Any, config: Any) -> tuple[str, Any]:
    """The path and the list of modules that holds the layers: the outermost of the config's length.

    Raises:
        InferenceError: there is none.
    """
    count = getattr(config, "num_hidden_layers", None)
    lists = [(path, each) for path, each in model.named_modules() if isinstance(each, nn.ModuleList)]
    fitting = [(path, each) for path, each in lists if len(each) == count]
    if not fitting:
        raise InferenceError(f"no list of modules has the length of the config's num_hidden_layers={count}")
    return min(fitting, key=lambda pair: pair[0].count("."))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


def _noted(path: str, calls: list[Call]) -> Callable[..., None]:
    """A hook that notes what a module reads and writes in this thread."""
    thread = threading.get_ident()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        read = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        written = output[0] if isinstance(output, tuple) else output
        if read is not None and read.dim() and isinstance(written, Tensor) and threading.get_ident() == thread:
            calls.append(Call(path, module, _rows(read), _rows(written)))

    return hook


# Numbers and tensors.


def same(a: Tensor | None, b: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    return a is not None and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def close(expected: Tensor, own: Tensor, *added: Tensor) -> bool:
    """Whether two tensors differ by no more than rounding; ``added`` went into them and rounded too."""
    return expected.shape == own.shape and difference(expected, own, *added) < rounding(own)


def difference(expected: Tensor, own: Tensor, *added: Tensor) -> float:
    """The relative difference of two tensors of one shape; ``added`` went into them and rounded too."""
    size = max(float(each.double().norm()) for each in (own, *added))
    missed = float((expected.double() - own.double()).norm())
    return missed / size if size else missed


def rounding(like: Tensor) -> float:
    """The largest difference that rounding explains; the comparison of every layer knows the products' dtypes better."""
    return 5e-2 if like.dtype in (torch.float16, torch.bfloat16) else 1e-3


def _rows(x: Tensor) -> Tensor:
    """A copy ``[P, width]`` of a tensor ``[..., width]``, which later steps cannot change."""
    return x.detach().reshape(-1, x.shape[-1]).clone()


def _dimensions(module: Any) -> int:
    weight = getattr(module, "weight", None)
    return weight.dim() if isinstance(weight, Tensor) else 0
