"""A module's weights as numbers for the decomposed pass, also where the model offloads or quantises them.

In the model's own pass, accelerate's hooks load offloaded weights and quantised kernels read packed ones. The decomposed
pass needs each weight as numbers on its layer's device, and gets it only from this module. For an offloaded or quantised
weight that is a copy; copies of one layer exist at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from depass_kernels.ops import FLOATS

QUANTIZATIONS = ("bitsandbytes", "torchao")


def dense(module: Any, name: str = "weight") -> Tensor | None:
    """A module's weight or bias as numbers, on the module's device; None if the module has none.

    It is the model's own tensor or, for an offloaded or quantised one, a copy.
    """
    tensor: Tensor | None = getattr(module, name, None)
    if tensor is None:
        return None
    hook = _offloading(module)
    if hook is not None:
        offloaded: Tensor = hook.weights_map[name]
        return offloaded.to(device_of(module))
    return tensor if name != "weight" or _library(module) is None else _dequantized(module)


def device_of(module: Any) -> torch.device:
    """The device that a module with weights runs on."""
    hook = _offloading(module)
    if hook is not None:
        return torch.device(hook.execution_device)
    weight = getattr(module, "weight", None)
    device: torch.device = (own_tensors(module)[0] if weight is None else weight).device
    return device


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate offloads the weights and loads them for the module's own pass."""
    return _offloading(module) is not None


def is_packed(module: Any) -> bool:
    """Whether a linear module's weight is quantised, or is not a floating-point matrix for another reason."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.dtype not in FLOATS:
        return True
    return _library(module) is not None


def is_readable(module: Any) -> bool:
    """Whether :func:`dense` can return the weight of a linear module as a matrix."""
    return not is_packed(module) or (_library(module) is not None and not is_offloaded(module))


def rounds_inputs(module: Any) -> bool:
    """Whether a module's kernel rounds its inputs to 8 bits, and not only its weight.

    8 bits are an integer or the significand of bf16: on CPUs with bf16 instructions, bitsandbytes multiplies 4-bit weights
    in bf16, whatever the model's dtype.
    """
    weight = module.weight
    names = ("act_quant_kwargs", "activation_quantization")  # of torchao's tensors
    dynamic = any(getattr(weight, name, None) is not None for name in names)
    dynamic = dynamic or "ActivationQuantized" in type(weight).__name__
    in_bf16 = weight.device.type == "cpu" and getattr(module, "support_avx512bf16_for_cpu", False)
    kind = type(weight).__name__
    return is_packed(module) and (kind == "Int8Params" or (kind == "Params4bit" and in_bf16) or dynamic)


def held_bytes(model: nn.Module) -> int:
    """The bytes of the weights and buffers that are not offloaded, each counted once."""
    held: dict[int, int] = {}
    for module in model.modules():
        if not is_offloaded(module):
            held.update((id(tensor), _bytes(module, tensor)) for tensor in own_tensors(module))
    return sum(held.values())


def brought_bytes(model: nn.Module) -> int:
    """The most bytes of offloaded weights that accelerate loads at once: those of the largest module."""
    offloaded = (module for module in model.modules() if is_offloaded(module))
    return max((sum(tensor.nbytes for tensor in own_tensors(module)) for module in offloaded), default=0)


def lent_bytes(module: Any, dtype: torch.dtype) -> int:
    """The bytes of the copy that :func:`dense` makes of a linear module's weight in a model of ``dtype``, or 0."""
    if not is_packed(module):
        return int(module.weight.nbytes) if is_offloaded(module) else 0
    size = 4 if type(module.weight).__name__ == "Int8Params" else torch.finfo(dtype).bits // 8
    identity = module.in_features if _library(module) == "torchao" and _is_multiplied(module.weight) else 0
    return int((module.out_features + identity) * module.in_features * size)


def numbers(model: nn.Module) -> int:
    """The number of weights of a model, also where they are packed."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    packed = {id(module.weight): module for module in linear if is_packed(module)}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in packed)
    return others + sum(module.out_features * module.in_features for module in packed.values())


def own_tensors(module: nn.Module) -> list[Tensor]:
    """A module's own parameters and buffers."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _offloading(module: nn.Module) -> Any:
    """The hook of accelerate that loads a module's own weights, or None."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])  # a sequential hook holds several
    return next((each for each in hooks if getattr(each, "offload", False) and each.weights_map is not None), None)


def _library(module: Any) -> str | None:
    """The library that quantised a module's weight, if DePass can read it."""
    weight: Any = getattr(module, "weight", None)
    kind = type(weight).__name__
    if (kind == "Params4bit" and weight.quant_state is not None) or (
        kind == "Int8Params" and weight.dtype == torch.int8
    ):
        return "bitsandbytes"
    return "torchao" if type(weight).__module__.partition(".")[0] == "torchao" else None


def _dequantized(module: Any) -> Tensor:
    weight = module.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        return _from_4_bits(weight)
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = module.state.SCB if weight.SCB is None else weight.SCB  # the first pass moves them to the state
        matrix: Tensor = int8_vectorwise_dequant(weight.data, scales)
    elif not _is_multiplied(weight):
        matrix = weight.dequantize()
    else:  # the product with the identity is the weight
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        matrix = functional.linear(identity, weight).T
    return matrix


def _is_multiplied(weight: Any) -> bool:
    """Whether a weight of torchao is packed for one kernel, in an order that only that kernel can read."""
    return type(weight).dequantize is Tensor.dequantize or getattr(weight, "act_pre_scale", None) is not None


def _from_4_bits(weight: Any) -> Tensor:
    from bitsandbytes import functional as bitsandbytes

    data, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # on some CPUs the first pass repacks the weight
        state = copy.copy(state)  # the model's own is not changed
        state.original_nested = False  # the kernel uses these scales, which are not quantised again
        data, state = bitsandbytes._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = state.absmax.T.reshape(-1).float()
    matrix: Tensor = bitsandbytes.dequantize_4bit(data, state)
    return matrix


def _bytes(module: Any, tensor: Any) -> int:
    if type(tensor).__name__ == "Params4bit" and tensor.quant_state is not None:
        return int(tensor.nbytes + sum(part.nbytes for part in _parts(tensor.quant_state)))
    if type(tensor).__name__ == "Int8Params":
        scales = module.state.SCB if tensor.SCB is None else tensor.SCB
        return int(tensor.nbytes + (0 if scales is None else scales.nbytes))
    if hasattr(tensor, "__tensor_flatten__"):  # a tensor subclass that wraps tensors
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return sum(_bytes(module, part) for part in inner)
    return int(tensor.nbytes)


def _parts(state: Any) -> Iterator[Tensor]:
    """The tensors that bitsandbytes keeps beside 4-bit numbers: scales, which may themselves be quantised."""
    for part in vars(state).values():
        if isinstance(part, Tensor):
            yield part
        elif type(part) is type(state):
            yield from _parts(part)
