"""Loading models with transformers, whole or as shapes alone."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from . import smollm2
from .errors import MemoryLimitError, ModelError
from .families import BoundModel, bind
from .memory import asked_bytes


def empty_model(name_or_path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> BoundModel:
    """A model's shapes from its configuration alone: no weight is loaded.

    Raises:
        ModelError: there is no such configuration, or no family for it.
    """
    import transformers

    name = os.fspath(name_or_path)
    path = os.fspath(smollm2.folder()) if name == smollm2.NAME else name
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        saved = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        model = model.to(dtype or (saved if isinstance(saved, torch.dtype) else torch.float32))
    except Exception as error:  # runs transformers' code, which raises what it likes
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"cannot read the configuration of {name!r}: {lines[0]}") from error
    return replace(bind(model, empty=True), name=name)


def load(name: str, path: str, dtype: torch.dtype | str, device_map: Any) -> tuple[Any, Any]:
    """A model and its tokenizer from a folder or a hub name.

    Raises:
        ModelError: there is no such model, or not all of it.
        MemoryLimitError: it does not fit.
    """
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options: dict[str, Any] = {"dtype" if version >= (4, 56) else "torch_dtype": dtype}
    # one device needs no device_map, which transformers leaves to accelerate
    spread = isinstance(device_map, dict) or device_map in ("auto", "balanced", "balanced_low_0", "sequential")
    if spread:
        options["device_map"] = device_map
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
        if device_map is not None and not spread:
            model = model.to(device_map)
    except Exception as error:  # loading runs transformers' and the model's own code, which raise what they like
        if asked_bytes(error) is not None:
            raise MemoryLimitError(
                f"cannot load the model {name!r}: out of memory; `depass plan` says what it takes"
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        anew = f"; delete {path} to have it fetched anew" if name == smollm2.NAME else ""
        raise ModelError(f"cannot load the model {name!r}: {lines[0]}{anew}") from error
    if missing := sorted(found["missing_keys"]):  # transformers gives them random numbers
        raise ModelError(f"cannot load the model {name!r}: its files lack {len(missing)} weights, {missing[0]} first")
    return model, tokenizer
