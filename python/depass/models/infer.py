"""Infers the family of a model whose type is not in the list, from one trial pass of five tokens.

Modules pass tensors on as they are. So a module that reads what another one wrote gets the same numbers, bit for bit, in any
dtype. :func:`infer` asks of one layer which tensor is which other. Numbers that are computed outside of modules, the factors
of the config, are compared up to rounding. :func:`compare` then checks every layer as the first run of a model does. A
family is accepted only where both find no fault.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..device_memory import asked_bytes
from ..errors import first_line
from . import weights
from .bound import BoundModel, Norm, Projection, epsilon_of
from .capture import Check, running, watched
from .check import activations, first_miss, last_differences, limit
from .families import Family, GateRows, NormKind, ValueRows

TOKENS = (5, 17, 42, 7, 9)
_EPSILONS = (1e-5, 1e-6, 1e-12)  # of norms that hold none, besides the config's


class InferenceError(Exception):
    """No family was found. The text says what is missing."""


@dataclass
class _Call:
    """What one module read and wrote in the trial pass, one row per position."""

    path: str  # relative to the layer; of modules outside of the layer, to the backbone
    module: Any
    read: Tensor  # [P, in]
    written: Tensor  # [P, out]


@dataclass
class _Trial:
    """What the trial pass saw of the first layer, its attention, and the end of the model."""

    config: Any
    backbone: str
    layers: str
    calls: list[_Call] = field(default_factory=list)  # of the layer's modules, in the order in which they ended
    outside: list[_Call] = field(default_factory=list)  # of the norms outside of the layers
    head: list[_Call] = field(default_factory=list)  # one call
    attention: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)  # module, values, output: [P, ·]
    logits: Tensor | None = None  # [P, V]

    @property
    def layer(self) -> _Call:
        """The layer itself, which ends last."""
        return self.calls[-1]

    @property
    def linears(self) -> list[_Call]:
        """The linear layers: modules with a weight of two dimensions that are no norms. One with an adapter is one."""
        whole = [call for call in self.calls if not call.path.endswith(".base_layer")]
        return [call for call in whole if _dimensions(call.module) == 2 and not _is_norm(call.module)]

    @property
    def norms(self) -> list[_Call]:
        """The norms of the layer."""
        return [call for call in self.calls if _is_norm(call.module)]

    def before(self, call: _Call) -> list[_Call]:
        """The norms that ended before a call did, the latest first."""
        earlier = self.calls[: self.calls.index(call)]
        return [each for each in reversed(earlier) if _is_norm(each.module)]


def infer(model: Any) -> Family:
    """The family of a model of transformers, from one trial pass.

    Raises:
        InferenceError: one of the questions below has no answer.
    """
    trial = _tried(model)
    attention, values, mixed = _attention(trial)
    _refuse_heads_by_layer(trial.config)
    value, value_rows = _value(trial, values)
    output = _output(trial, mixed)
    gate, gate_rows, activation = _gate(trial)
    down = _down(trial, gate, activation)
    attention_norm = _norm_before(trial, value)
    mlp_norm = _norm_before(trial, gate)
    attention_post_norm = _norm_after(trial, output)
    mlp_post_norm = _norm_after(trial, down)
    final_norm, head = _end(trial)
    norms = [norm for norm in (attention_norm, mlp_norm, attention_post_norm, mlp_post_norm, final_norm) if norm]
    kind, epsilon = _norm_kind(trial, norms)
    added = (attention_post_norm or output).written, (mlp_post_norm or down).written
    logit_factor, logit_divisor = _logit_names(trial, head)
    _compare_modules(model, trial, [value.path, output.path, gate.path, down.path, *map(_path, norms[:-1])])
    return Family(
        backbone=trial.backbone,
        layers=trial.layers,
        final_norm=final_norm.path,
        attention=attention,
        value=value.path,
        output=output.path,
        gate=gate.path,
        down=down.path,
        attention_norm=_path(attention_norm),
        mlp_norm=_path(mlp_norm),
        attention_post_norm=_path(attention_post_norm),
        mlp_post_norm=_path(mlp_post_norm),
        norm=kind,
        epsilon=epsilon,
        value_rows=value_rows,
        gate_rows=gate_rows,
        parallel=_same((mlp_norm or gate).read, trial.layer.read),
        residual_factor=_residual_name(trial, *added),
        logit_factor=logit_factor,
        logit_divisor=logit_divisor,
    )


def compare(bound: BoundModel) -> None:
    """Compare an inferred family with every layer, the final norm and the head, at every position of the trial's tokens.

    Raises:
        InferenceError: the model computes something else.
    """
    with torch.no_grad(), _failures():
        _Comparison(bound, [_tokens(bound.model)], range(len(bound.layers))).run()
    bound.checked.clear()  # the first run compares again


def _refuse_heads_by_layer(config: Any) -> None:
    try:
        _ = config.num_attention_heads
    except Exception as error:  # a config with numbers for each layer raises more than AttributeError
        raise InferenceError("its config has no num_attention_heads that holds for all layers") from error


def _compare_modules(model: Any, trial: _Trial, paths: Sequence[str | None]) -> None:
    """Does every layer have the modules that were found in the first one?"""
    for index, layer in enumerate(_layers(model, trial.config)[1]):
        modules = dict(layer.named_modules())
        for path in paths:
            if path not in modules:
                raise InferenceError(f"layer {index} lacks {path}, which the first layer has")


def first_layer(model: Any) -> Any:
    """The first layer of a model, or None where no list of modules has as many as its config says."""
    try:
        return _layers(model, model.config.get_text_config())[1][0]
    except InferenceError:
        return None


def experts_of(model: Any) -> str | None:
    """The path of the first module that holds the experts of an MLP, or None."""
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name == "experts" or "experts" in type(module).__name__.lower():
            return str(path)
    return None


class _Comparison(Check):
    """A pass that compares all positions and lets nothing pass, hooks or not."""

    def checked_positions(self) -> Tensor:
        return torch.arange(sum(self.lengths), device="cpu")

    def check_the_end(self) -> None:
        found = last_differences(self.bound, self.stream, self.normed)
        self.judge(len(self.bound.layers), found, limit(self.bound.layers[-1], self.stream, self.normed))

    def judge(self, index: int, found: dict[str, Tensor], allowed: float) -> None:
        where = f"layer {index}" if index < len(self.bound.layers) else "the model"
        largest = {step: float(each.max()) for step, each in found.items()}
        if not all(bool(each.isfinite().all()) for each in found.values()):
            raise InferenceError(f"{where} computes numbers that are not finite")
        miss = first_miss(largest, allowed)
        if miss is not None:
            raise InferenceError(f"{where}: {miss.said(self.bound, index)}")


# The trial pass.


@contextmanager
def _failures() -> Iterator[None]:
    """Turns an error of the model's own code into a reason; a lack of memory stays an error."""
    try:
        yield
    except InferenceError:
        raise
    except Exception as error:
        if asked_bytes(error) is not None:
            raise
        raise InferenceError(f"its trial pass failed: {first_line(error)}") from error


def _tokens(model: Any) -> list[int]:
    """The trial's tokens, which every vocabulary has."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return [token % vocabulary for token in TOKENS]


def _tried(model: Any) -> _Trial:
    """Run the model once, and note what the modules read and wrote."""
    config = model.config.get_text_config()
    path, layers = _layers(model, config)
    backbone, _, name = path.rpartition(".")
    trial = _Trial(config, backbone, name)
    inside = {id(module) for module in layers.modules()}
    outside = model.get_submodule(backbone).named_modules()
    noted = [
        *((path, module, trial.calls) for path, module in layers[0].named_modules()),
        *((path, module, trial.outside) for path, module in outside if id(module) not in inside and _is_norm(module)),
        ("", model.get_output_embeddings(), trial.head),
    ]
    configs = [module.config for module in model.modules() if hasattr(module, "config")]

    def attention(module: nn.Module, values: Tensor, output: Tensor) -> None:  # [1, K, P, d], [1, P, H, d]
        if any(module is each for each in layers[0].modules()):
            trial.attention.append((module, values.transpose(1, 2).flatten(2)[0], output.flatten(2)[0]))

    with running, torch.no_grad(), _failures(), ExitStack() as stack:  # attributions of several threads take turns
        for path, module, calls in noted:
            stack.callback(module.register_forward_hook(_noted(path, calls), with_kwargs=True).remove)
        stack.enter_context(watched(configs, attention))
        device = weights.device_of(model.get_input_embeddings())
        logits = model(torch.tensor([_tokens(model)], device=device), use_cache=False).logits
        trial.logits = logits.flatten(0, -2)
        if not bool(logits.isfinite().all()):
            raise InferenceError("its logits are not finite")
    return trial


def _layers(model: Any, config: Any) -> tuple[str, Any]:
    """Which list of modules holds the layers? The outermost of the config's length."""
    count = getattr(config, "num_hidden_layers", None)
    lists = [(path, each) for path, each in model.named_modules() if isinstance(each, nn.ModuleList)]
    fitting = [(path, each) for path, each in lists if len(each) == count]
    if not fitting:
        raise InferenceError(f"no list of modules has the length of the config's num_hidden_layers={count}")
    return min(fitting, key=lambda pair: pair[0].count("."))


def _noted(path: str, calls: list[_Call]) -> Callable[..., None]:
    """A hook that notes what a module reads and writes in this thread."""
    thread = threading.get_ident()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        read = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        written = output[0] if isinstance(output, tuple) else output
        if read is not None and read.dim() and isinstance(written, Tensor) and threading.get_ident() == thread:
            calls.append(_Call(path, module, _rows(read), _rows(written)))

    return hook


# The questions, one a function.


def _attention(trial: _Trial) -> tuple[str, Tensor, Tensor]:
    """Which module calls the attention function? With the values ``[P, K·d]`` that it gives and the output ``[P, H·d]``."""
    if not trial.attention:
        raise InferenceError("its first layer does not call transformers' AttentionInterface")
    if len(trial.attention) > 1:
        raise InferenceError(f"its first layer calls transformers' AttentionInterface {len(trial.attention)} times")
    module, values, mixed = trial.attention[0]
    path = next(path for path, each in trial.layer.module.named_modules() if each is module)
    return path, values, mixed


def _value(trial: _Trial, values: Tensor) -> tuple[_Call, ValueRows]:
    """Which projection writes the values, and in which of its rows?"""
    for call in trial.linears:
        for rows in get_args(ValueRows):
            if _same(_columns(call.written, rows, values.shape[1], trial.config.num_attention_heads), values):
                return call, rows
    raise InferenceError("no projection's output holds the values that the attention function gets")


def _columns(written: Tensor, rows: str, width: int, num_heads: int) -> Tensor | None:
    """The columns ``[P, width]`` of a fused projection's output, or None where it has another width."""
    fits = {"all": width == written.shape[1], "last": width < written.shape[1]}
    if not fits.get(rows, 3 * width == written.shape[1] and width % max(num_heads, 4) == 0):
        return None
    return Projection(None, f"last:{width}" if rows == "last" else rows, num_heads).select_output(written)


def _output(trial: _Trial, mixed: Tensor) -> _Call:
    """Which projection reads the attention's output?"""
    for call in trial.linears:
        if _same(call.read, mixed) and call.written.shape == trial.layer.read.shape:
            return call
    raise InferenceError("no projection reads the output of the attention function as it is")


def _gate(trial: _Trial) -> tuple[_Call, GateRows, _Call]:
    """Which projection's output, or its first half, does the activation function read? With the activation's own call."""
    modules = activations(trial.layer.module)
    acts = [call for call in trial.calls if any(call.module is module for module in modules)]
    found: list[tuple[_Call, GateRows, _Call]] = []
    for call in trial.linears:
        choices: tuple[tuple[Tensor, GateRows], ...] = ((call.written, "all"), (_halves(call)[0], "first_half"))
        found += [(call, rows, act) for part, rows in choices for act in acts if _same(part, act.read)]
    if not found:
        raise InferenceError("no activation module of a layer reads the output of a projection")
    if len(found) > 1:
        paths = " and ".join(call.path for call, _, _ in found)
        raise InferenceError(f"activation modules read the outputs of several projections of a layer, {paths}")
    return found[0]


def _down(trial: _Trial, gate: _Call, act: _Call) -> _Call:
    """Which projection reads the activation's output, or its product with another projection's output?"""
    factors = [factor for call in trial.linears for factor in (call.written, _halves(call)[1])]
    products = [act.written * factor for factor in factors if factor.shape == act.written.shape]
    for call in trial.linears:
        if any(_same(call.read, hidden) for hidden in (act.written, *products)):
            return call
    raise InferenceError(
        f"no projection reads the activation of {gate.path}, or its product with another projection's output"
    )


def _halves(call: _Call) -> tuple[Tensor, Tensor]:
    """The two halves of a projection's output, each ``[P, out / 2]``."""
    half = call.written.shape[1] // 2
    return call.written[:, :half], call.written[:, half:]


def _norm_before(trial: _Trial, call: _Call) -> _Call | None:
    """Which norm's output does a projection read? None where it reads the stream."""
    return next((norm for norm in trial.before(call) if _same(norm.written, call.read)), None)


def _norm_after(trial: _Trial, call: _Call) -> _Call | None:
    """Which norm reads a projection's output? None where it goes to the stream."""
    return next((norm for norm in trial.norms if _same(norm.read, call.written)), None)


def _end(trial: _Trial) -> tuple[_Call, _Call]:
    """Which norm's output does the head read? With the head's own call."""
    if not trial.head:
        raise InferenceError("its head did not run")
    for call in trial.outside:
        if _same(call.written, trial.head[0].read):
            return call, trial.head[0]
    if any(_same(norm.written, trial.layer.written) for norm in trial.norms):
        raise InferenceError("its layers end with a norm of the residual stream itself, not of what a sublayer adds")
    raise InferenceError("no norm's output is what the head reads; other modules stand between them")


def _norm_kind(trial: _Trial, norms: Sequence[_Call]) -> tuple[NormKind, float | None]:
    """Which formula do the norms compute? With the epsilon, where their modules hold none.

    Each norm gets vectors with a mean, which a LayerNorm subtracts, and so small that epsilon counts.
    """
    missing = any(epsilon_of(norm.module, None) is None for norm in norms)
    own = [number for name, number in _numbers(trial.config) if "eps" in name]
    epsilons = [*own, *_EPSILONS] if missing else [None]
    pairs = [(kind, epsilon) for kind in get_args(NormKind) for epsilon in epsilons]
    with torch.no_grad(), _failures():
        worst = [max(_norm_difference(norm, kind, epsilon) for norm in norms) for kind, epsilon in pairs]
    best = min(range(len(pairs)), key=worst.__getitem__)
    if worst[best] > _limit(norms[0].written):
        names = ", ".join(dict.fromkeys(type(norm.module).__name__ for norm in norms))
        raise InferenceError(f"its norms ({names}) are not all of one known kind")
    return pairs[best]


def _norm_difference(norm: _Call, kind: NormKind, epsilon: float | None) -> float:
    """The relative difference between a norm's output and that of a formula."""
    if kind.endswith("plus_one") and getattr(norm.module, "weight", None) is None:
        return torch.inf
    width = norm.read.shape[1]
    x = torch.stack([torch.linspace(-1, 3, width), torch.linspace(2, 1, width).square() - 1])
    x = (0.003 * x).to(norm.read)
    formula = Norm(norm.module, kind, epsilon)
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    normed = formula.of_parts(wide, formula.scale(wide, wide.dtype)[:, None])
    beta = formula.beta()
    normed = normed if beta is None else normed + beta.to(normed)
    return _difference(normed, norm.module(x))


def _residual_name(trial: _Trial, of_attention: Tensor, of_mlp: Tensor) -> str | None:
    """Which number of the config multiplies what the sublayers add to the stream? None where it is 1."""
    layer = trial.layer
    added, change = of_attention.double() + of_mlp.double(), layer.written.double() - layer.read.double()
    factor = _slope(change, added)
    for name, number in _near(trial.config, factor, "residual"):
        expected = layer.read.double() + number * added
        if _difference(expected, layer.written, added) < _limit(layer.written):
            return name
    raise InferenceError(
        f"what a layer adds to the stream is not what its projections write, times 1 or a number of the config "
        f"(about {factor:.3g} times)"
    )


def _logit_names(trial: _Trial, head: _Call) -> tuple[str | None, str | None]:
    """Which number of the config multiplies the head's output, and which one divides it? None where it is 1."""
    assert trial.logits is not None
    logits, written = trial.logits.double(), head.written.double()
    cap = getattr(trial.config, "final_logit_softcapping", None)
    if cap is not None:  # undone where it did not round the logits away
        inside = logits.abs() < cap / 2
        logits, written = cap * torch.atanh(logits / cap)[inside], written[inside]
    if logits.shape == written.shape and logits.numel():
        factor = _slope(logits, written)
        for is_divisor, wanted in ((False, factor), (True, 1 / factor if factor else 0.0)):
            for name, number in _near(trial.config, wanted, "logit"):
                expected = written / number if is_divisor else written * number
                if _difference(expected.flatten(), logits.flatten()) < _limit(head.written):
                    return (None, name) if is_divisor else (name, None)
    raise InferenceError("the logits are not the head's output, times 1 or a number of the config or divided by one")


# Numbers and tensors.


def _numbers(config: Any) -> list[tuple[str, float]]:
    """The positive numbers of a config by name, 1 left out."""
    found = [(name, number) for name, number in vars(config).items() if isinstance(number, (int, float))]
    return [(name, float(number)) for name, number in found if type(number) is not bool and 0 < number != 1]


def _near(config: Any, factor: float, word: str) -> list[tuple[str | None, float]]:
    """1 without a name and the config's numbers, the nearest to ``factor`` first; of equal ones, a name with ``word``."""
    numbers: list[tuple[str | None, float]] = [(None, 1.0), *_numbers(config)]
    return sorted(numbers, key=lambda pair: (abs(pair[1] - factor), word not in (pair[0] or word)))


def _slope(y: Tensor, x: Tensor) -> float:
    """The number that ``x`` is to be multiplied by to come nearest to ``y``."""
    return float((x * y).sum() / (x * x).sum())


def _difference(expected: Tensor, own: Tensor, *added: Tensor) -> float:
    """The relative difference of two tensors; ``added`` went into them and rounded too."""
    size = max(float(each.double().norm()) for each in (own, *added))
    missed = float((expected.double() - own.double()).norm())
    return missed / size if size else missed


def _limit(like: Tensor) -> float:
    """The largest difference that rounding explains; the comparison of every layer knows the products' dtypes better."""
    return 5e-2 if like.dtype in (torch.float16, torch.bfloat16) else 1e-3


def _same(a: Tensor | None, b: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    return a is not None and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def _rows(x: Tensor) -> Tensor:
    """A copy ``[P, width]`` of a tensor ``[..., width]``, which later steps cannot change."""
    return x.detach().reshape(-1, x.shape[-1]).clone()


def _dimensions(module: Any) -> int:
    weight = getattr(module, "weight", None)
    return weight.dim() if isinstance(weight, Tensor) else 0


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


def _path(call: _Call | None) -> str | None:
    return None if call is None else call.path
