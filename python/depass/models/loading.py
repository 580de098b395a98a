"""Loading models with transformers, whole or as shapes alone: from safetensors, never from pickles."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..device_memory import asked_bytes
from ..errors import DePassError, MemoryLimitError, ModelError, OptionError, first_line
from . import smollm2
from .bind import bind, quantization_method
from .bound import BoundModel, Projection
from .weights import QUANTIZATIONS

BITS = {"8bit": 8, "4bit": 4}
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that transformers makes itself


def empty_model(
    name_or_path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> BoundModel:
    """A model's shapes from its configuration alone: no weight is loaded.

    Args:
        name_or_path: as of :func:`load`.
        dtype: of its weights; as saved without it.
        quantization: ``"8bit"`` or ``"4bit"``, by bitsandbytes, which need not be there; as saved without it.
        trust_remote_code: whether code that the model brings along is run.

    Raises:
        ModelError: there is no such configuration, or no family for it.
        OptionError: a quantisation of what is quantised already.
    """
    import transformers

    name = os.fspath(name_or_path)
    path = os.fspath(smollm2.folder()) if name == smollm2.NAME else name
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        model = model.to(dtype or _saved_dtype(config))
    except Exception as error:  # runs transformers' code, which raises what it likes
        raise ModelError(f"cannot read the configuration of {name!r}: {_said(error)}") from error
    method = _method(name, config, quantization)
    if method is not None:
        _pack(model, BITS[quantization] if quantization else _saved_bits(name, config, method))
    return replace(bind(model, empty=True), name=name)


def load(
    name: str,
    path: str,
    dtype: torch.dtype | str,
    device_map: Any = None,
    max_memory: dict[int | str, int | str] | None = None,
    quantization: Any = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model and its tokenizer from a folder or a hub name; the options as of :meth:`DePass.from_pretrained`.

    Raises:
        ModelError: there is no such model, not all of it, or none that can be loaded safely.
        MemoryLimitError: it does not fit.
        OptionError: an option that does not fit the model, or a package that it needs is not there.
    """
    import transformers

    # one device needs no device_map, which transformers leaves to accelerate
    spread = isinstance(device_map, dict) or device_map in SPREAD
    if spread:
        _require("accelerate", f"device_map={device_map!r}", "offload")
    elif max_memory is not None:
        raise OptionError(f"max_memory={max_memory!r} belongs to a map over several devices; give device_map='auto'")
    if isinstance(device_map, dict) and max_memory is not None:
        raise OptionError(f"max_memory={max_memory!r}: the device_map says already where everything goes; leave it out")
    _refuse_pickles(name, path)
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options: dict[str, Any] = {"dtype" if version >= (4, 56) else "torch_dtype": dtype, "use_safetensors": True}
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        method = _method(name, config, quantization)
        if method is not None:
            _require("accelerate", "a quantised model", "quantized")
            _require(method, f"a model quantised by {method}", "quantized")
            options["quantization_config"] = _quantization_config(quantization, dtype, config)
            device_map, spread = device_map if spread else {"": "cpu" if device_map is None else device_map}, True
        if spread:
            options |= {"device_map": device_map, "max_memory": max_memory}
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **{key: value for key, value in options.items() if value is not None},
        )
        if device_map is not None and not spread:
            model = model.to(device_map)
    except DePassError:
        raise
    except Exception as error:  # loading runs transformers' and the model's own code, which raise what they like
        if asked_bytes(error) is not None:
            raise MemoryLimitError(
                f"cannot load the model {name!r}: out of memory; `depass plan` says what it takes"
            ) from error
        anew = f"; delete {path} to have it fetched anew" if name == smollm2.NAME else ""
        raise ModelError(f"cannot load the model {name!r}: {_said(error)}{anew}") from error
    if missing := sorted(found["missing_keys"]):  # transformers gives them random numbers
        raise ModelError(f"cannot load the model {name!r}: its files lack {len(missing)} weights, {missing[0]} first")
    return model, tokenizer


def _method(name: str, config: Any, given: Any) -> str | None:
    """What quantises, or has quantised, a model: one of ``QUANTIZATIONS`` or None.

    Raises:
        ModelError: it is quantised in a way that is not known.
        OptionError: no such quantisation, or the model is quantised already.
    """
    saved = quantization_method(getattr(config, "quantization_config", None))
    if saved is not None and saved not in QUANTIZATIONS:
        raise ModelError(
            f"{name!r} is quantised by {saved}, whose weights cannot be read here (those of "
            f"{' and '.join(QUANTIZATIONS)} can); load the model that it was made from, with quantization='4bit' "
            "(--quantization 4bit) where memory is short"
        )
    if given is None or saved is not None:
        if given is not None:
            raise OptionError(f"quantization={given!r}: {name!r} is quantised already, by {saved}; leave it out")
        return saved
    method = "bitsandbytes" if isinstance(given, str) and given in BITS else quantization_method(given)
    if method not in QUANTIZATIONS:
        raise OptionError(
            f"quantization must be {' or '.join(map(repr, BITS))}, or a config of transformers for "
            f"{' or '.join(QUANTIZATIONS)}, got {given!r}"
        )
    return method


def _quantization_config(given: Any, dtype: torch.dtype | str, config: Any) -> Any:
    """What transformers takes as one; None: as saved."""
    if not isinstance(given, str):
        return given
    from transformers import BitsAndBytesConfig

    if BITS[given] == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    # NF4 loses less than FP4, transformers' default; and products are taken in the model's dtype, not in fp32
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    computed = named if isinstance(named, torch.dtype) else _saved_dtype(config)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed)


def _saved_dtype(config: Any) -> torch.dtype:
    saved = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return saved if isinstance(saved, torch.dtype) else torch.float32


def _saved_bits(name: str, config: Any, method: str) -> int:
    given = config.quantization_config
    given = given if isinstance(given, dict) else given.to_dict()
    if method != "bitsandbytes":
        raise ModelError(
            f"what {method} made of {name!r} does not show before it is loaded; load it and call DePass.plan"
        )
    return 4 if given.get("load_in_4bit") else 8


def _pack(model: Any, bits: int) -> None:
    """Give a model of shapes alone the linear layers that bitsandbytes makes of its own, but for the head."""
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if module is head or type(module).__name__ not in ("Linear", "Conv1D"):
            continue
        rows, columns = Projection(module).shape
        count = rows * columns
        # with a scale of four bytes for every row, or for every 64 numbers
        held = count + 4 * rows if bits == 8 else (count + 1) // 2 + 4 * ((count + 63) // 64)
        packed = nn.Linear(columns, rows, module.bias is not None, device="meta", dtype=module.weight.dtype)
        packed.weight = nn.Parameter(torch.empty(held, dtype=torch.uint8, device="meta"), requires_grad=False)
        model.set_submodule(path, packed)


def _require(package: str, what: str, extra: str) -> None:
    if find_spec(package) is None:
        raise OptionError(f"{what} needs {package}: pip install 'depass-kernels[{extra}]'")


def _refuse_pickles(name: str, path: str) -> None:
    """Raise a ModelError where a folder has weights, but none as safetensors."""
    files = sorted(os.listdir(path)) if os.path.isdir(path) else []
    pickles = [file for file in files if file.startswith("pytorch_model") and file.endswith(".bin")]
    if pickles and not any(file.endswith(".safetensors") for file in files):
        raise ModelError(f"{name!r} has its weights as {pickles[0]} alone; {_CONVERT}")


_CONVERT = (
    "a pickle runs what its maker likes when it is opened, so it is not. Where you trust it, write it anew once: "
    "AutoModelForCausalLM.from_pretrained(..., use_safetensors=False).save_pretrained(FOLDER)"
)


def _said(error: Exception) -> str:
    """What transformers says is wrong, in a line, with what to do where its own advice is none."""
    said, line = str(error), first_line(error)
    if "custom code" in said or "trust_remote_code" in said:
        return (
            f"{line.rstrip('. ')}; it is not run: read it, and where you trust it give trust_remote_code=True "
            "(--trust-remote-code)"
        )
    if "use_safetensors" in said:  # a repository without
        return f"it has no weights as safetensors; {_CONVERT}"
    return line
