"""Loading models with transformers, with weights or as shapes only: from safetensors or GGUF, never from pickles."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..device_memory import asked_bytes
from ..errors import DePassError, MemoryLimitError, ModelError, OptionError, first_line
from . import builtin, gguf_file
from .bind import bind, quantization_method
from .bound import BoundModel, Projection
from .multimodal import text_config
from .weights import QUANTIZATIONS

BITS = {"8bit": 8, "4bit": 4}
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that transformers computes


def empty_model(
    name_or_path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> BoundModel:
    """A model with shapes only, from its configuration; no weight is loaded.

    Args:
        name_or_path: a directory, a GGUF file, a name on the hub, or a short name (``depass.models.builtin``).
        dtype: the dtype of the weights; by default the saved one, or fp32 for a GGUF file.
        quantization: ``"8bit"`` or ``"4bit"`` as by bitsandbytes, which need not be installed; by default as saved.
        trust_remote_code: whether to run code from the model's directory or repository.
        say: a function that is called with one line of text before each slow step.

    Raises:
        ModelError: the configuration cannot be read, or the family is unknown.
        OptionError: a quantisation is given for a model that is already quantised.
    """
    import transformers

    name = os.fspath(name_or_path)
    path = builtin.path(name, say)
    is_gguf = gguf_file.is_meant(path)
    if is_gguf:
        _refuse_quantization(name, quantization)
    try:
        if is_gguf:
            config = gguf_file.config_of(name, path)
        else:
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = _auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        model = model.to(dtype or _saved_dtype(config))
    except DePassError:
        raise
    except Exception as error:  # transformers may raise anything
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
    """Load a model and its tokenizer from a directory, a GGUF file or a hub name.

    The options are those of :meth:`DePass.from_pretrained`.

    Raises:
        ModelError: the model does not exist, is incomplete, or cannot be loaded safely.
        MemoryLimitError: the model does not fit into memory.
        OptionError: an option does not fit the model, or a package that it needs is not installed.
    """
    # one device needs no device_map, which transformers leaves to accelerate
    spread = isinstance(device_map, dict) or device_map in SPREAD
    if spread:
        _require("accelerate", f"device_map={device_map!r}", "offload")
    elif max_memory is not None:
        raise OptionError(f"max_memory={max_memory!r} needs a device_map over several devices; give device_map='auto'")
    if isinstance(device_map, dict) and max_memory is not None:
        raise OptionError(
            f"max_memory={max_memory!r} has no effect with a dict as device_map, which assigns every module; leave it out"
        )
    options: dict[str, Any] = {"device_map": device_map, "max_memory": max_memory} if spread else {}
    try:
        if gguf_file.is_meant(path):
            _refuse_quantization(name, quantization)
            options["dtype"] = torch.float32 if dtype == "auto" else dtype
            model, tokenizer, loading_info = gguf_file.load(name, path, **_given(options))
        else:
            _refuse_other_files(name, path)
            options = _quantized(name, path, dtype, device_map, quantization, trust_remote_code) | options
            model, tokenizer, loading_info = _load_safetensors(path, dtype, trust_remote_code, options)
        if device_map is not None and "device_map" not in options:
            model = model.to(device_map)
    except DePassError:
        raise
    except Exception as error:  # transformers' and the model's own code may raise anything
        if asked_bytes(error) is not None:
            raise MemoryLimitError(
                f"cannot load the model {name!r}: out of memory; `depass plan` shows how much it needs"
            ) from error
        anew = f"; delete {path} to download it again" if name in builtin.MODELS else ""
        raise ModelError(f"cannot load the model {name!r}: {_said(error)}{anew}") from error
    if missing := sorted(loading_info["missing_keys"]):  # transformers initialises them randomly
        plural = "s" if len(missing) > 1 else ""
        raise ModelError(
            f"cannot load the model {name!r}: its files lack {len(missing)} weight{plural}, the first is {missing[0]}; "
            "load it from intact files"
        )
    return model, tokenizer


def _load_safetensors(
    path: str, dtype: torch.dtype | str, trust_remote_code: bool, options: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """A model, its tokenizer, and what transformers reports about the loading, from a directory or a hub name."""
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options = {"dtype" if version >= (4, 56) else "torch_dtype": dtype, "use_safetensors": True, **options}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    model, loading_info = _auto_class(config).from_pretrained(
        path, trust_remote_code=trust_remote_code, output_loading_info=True, **_given(options)
    )
    return model, tokenizer, loading_info


def _auto_class(config: Any) -> Any:
    """The class of transformers that loads a model of this configuration: with a text decoder alone, or with more parts."""
    import transformers

    for name, mapping in (
        ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
        ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
        ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING"),  # absent before transformers 5
    ):
        if type(config) in getattr(transformers, mapping, ()):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def tokenizer_of(given: Any) -> Any:
    """The tokenizer of a processor, with the processor's chat template if it has none; anything else as it is."""
    from transformers import ProcessorMixin

    if not isinstance(given, ProcessorMixin):
        return given
    tokenizer, template = getattr(given, "tokenizer", None), getattr(given, "chat_template", None)
    if tokenizer is None or template is None or tokenizer.chat_template is not None:
        return tokenizer
    tokenizer = copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def _quantized(
    name: str, path: str, dtype: torch.dtype | str, device_map: Any, quantization: Any, trust_remote_code: bool
) -> dict[str, Any]:
    """What transformers needs to load a model that is quantised, saved so or now; nothing for another model."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    method = _method(name, config, quantization)
    if method is None:
        return {}
    _require("accelerate", "a quantised model", "quantized")
    _require(method, f"a model quantised by {method}", "quantized")
    return {
        "quantization_config": _quantization_config(quantization, dtype, config),
        "device_map": {"": "cpu" if device_map is None else device_map},
    }


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _refuse_quantization(name: str, given: Any) -> None:
    """Raise an OptionError where a quantisation is given for a GGUF file."""
    if given is not None:
        raise OptionError(
            f"quantization={given!r}: {name!r} is a GGUF file, whose weights are quantised already and are unpacked; leave "
            "it out, or load the original model"
        )


def _method(name: str, config: Any, given: Any) -> str | None:
    """The quantisation method of a model, saved or given: one of ``QUANTIZATIONS`` or None.

    Raises:
        ModelError: the model was saved with an unsupported quantisation.
        OptionError: the given quantisation is invalid, or the model is already quantised.
    """
    saved = quantization_method(getattr(config, "quantization_config", None))
    if saved is not None and saved not in QUANTIZATIONS:
        raise ModelError(
            f"{name!r} is quantised by {saved}, whose weights DePass cannot read (it reads those of "
            f"{' and '.join(QUANTIZATIONS)}); load the original model, with quantization='4bit' (--quantization 4bit) "
            "if memory is short"
        )
    if given is None or saved is not None:
        if given is not None:
            raise OptionError(f"quantization={given!r}: {name!r} is already quantised by {saved}; leave it out")
        return saved
    method = "bitsandbytes" if isinstance(given, str) and given in BITS else quantization_method(given)
    if method not in QUANTIZATIONS:
        raise OptionError(
            f"quantization must be {' or '.join(map(repr, BITS))}, or a transformers config for "
            f"{' or '.join(QUANTIZATIONS)}, got {given!r}"
        )
    return method


def _quantization_config(given: Any, dtype: torch.dtype | str, config: Any) -> Any:
    """The quantisation config to pass to transformers; None keeps the saved one."""
    if not isinstance(given, str):
        return given
    from transformers import BitsAndBytesConfig

    if BITS[given] == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    # NF4 loses less than FP4, transformers' default; products are computed in the model's dtype, not in fp32
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    computed = named if isinstance(named, torch.dtype) else _saved_dtype(config)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed)


def _saved_dtype(config: Any) -> torch.dtype:
    for part in (config, text_config(config)):
        saved = getattr(part, "dtype", None) or getattr(part, "torch_dtype", None)
        if isinstance(saved, torch.dtype):
            return saved
    return torch.float32


def _saved_bits(name: str, config: Any, method: str) -> int:
    given = config.quantization_config
    given = given if isinstance(given, dict) else given.to_dict()
    if method != "bitsandbytes":
        raise ModelError(
            f"the size of {name!r}, quantised by {method}, is not known before it is loaded; load it and call DePass.plan"
        )
    return 4 if given.get("load_in_4bit") else 8


def _pack(model: Any, bits: int) -> None:
    """Replace the linear layers of a model with shapes only by those of bitsandbytes, except for the head."""
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if module is head or type(module).__name__ not in ("Linear", "Conv1D"):
            continue
        rows, columns = Projection(module).shape
        count = rows * columns
        # a scale of four bytes per row, or per 64 numbers
        held = count + 4 * rows if bits == 8 else (count + 1) // 2 + 4 * ((count + 63) // 64)
        packed = nn.Linear(columns, rows, module.bias is not None, device="meta", dtype=module.weight.dtype)
        packed.weight = nn.Parameter(torch.empty(held, dtype=torch.uint8, device="meta"), requires_grad=False)
        model.set_submodule(path, packed)


def _require(package: str, what: str, extra: str) -> None:
    if find_spec(package) is None:
        raise OptionError(f"{what} needs {package}: pip install 'depass-kernels[{extra}]'")


def _refuse_other_files(name: str, path: str) -> None:
    """Raise a ModelError where a directory has weights only as pickles or as GGUF files."""
    files = sorted(os.listdir(path)) if os.path.isdir(path) else []
    packed = [file for file in files if file.endswith(".gguf")]
    if packed and "config.json" not in files:
        raise ModelError(
            f"{name!r} has no config.json but GGUF files; name one of them: {os.path.join(name, packed[0])}"
        )
    pickles = [file for file in files if file.startswith("pytorch_model") and file.endswith(".bin")]
    if pickles and not any(file.endswith(".safetensors") for file in files):
        raise ModelError(f"{name!r} has its weights only as {pickles[0]}; {_CONVERT}")


_CONVERT = (
    "a pickle can run any code when it is opened, so DePass does not open it. If you trust it, convert it once: "
    "AutoModelForCausalLM.from_pretrained(..., use_safetensors=False).save_pretrained(DIRECTORY)"
)


def _said(error: Exception) -> str:
    """The error of transformers in one line, with our advice where its own does not apply."""
    said, line = str(error), first_line(error)
    if "custom code" in said or "trust_remote_code" in said:
        return (
            f"{line.rstrip('. ')}; DePass does not run that code by default: read it, and if you trust it give "
            "trust_remote_code=True (--trust-remote-code)"
        )
    if "use_safetensors" in said:  # a repository without safetensors
        return f"it has no safetensors weights; {_CONVERT}"
    return line
