"""GGUF files: checked by their header, then loaded by transformers' own loader, with their weights unpacked."""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..errors import ModelError, OptionError, PromptWarning, warn

# older versions build tokenizers that add no BOS token, or merge other pieces
_TRANSFORMERS = (5, 23)
_LIKE_GPT2 = ("gpt-2", "jais", "mpt", "olmo", "phi-2")  # names of GPT-2's own way to split text
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_SETTINGS = {  # names in the file, and in a config of transformers
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


class _Tensor(NamedTuple):
    name: str
    kind: int
    elements: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its weights.

    Attributes:
        architecture: the model's kind, in the words of llama.cpp.
        fields: its numbers and texts by name; of an array, the number of its elements.
        tensors: its tensors, with their type in ggml's numbering and their offset in bytes from ``data``.
        data: where the tensors begin, in bytes.
        size: the bytes of the file.
    """

    architecture: str
    fields: dict[str, Any]
    tensors: tuple[_Tensor, ...]
    data: int
    size: int


def is_meant(path: str) -> bool:
    """Whether a path means a GGUF file, which need not exist: a model is otherwise a directory or a name."""
    return path.lower().endswith(".gguf") or os.path.isfile(path)


def require(what: str) -> None:
    """Check that the packages that load GGUF files are installed.

    Raises:
        OptionError: one is missing, or transformers is too old.
    """
    import transformers

    install = "pip install 'depass-kernels[gguf]'"
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise OptionError(f"{what} needs {package}: {install}")
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < _TRANSFORMERS:
        raise OptionError(
            f"{what} needs transformers {'.'.join(map(str, _TRANSFORMERS))} or later, found {transformers.__version__}, "
            f"which reads the tokenizer of such a file wrongly: {install}"
        )


def read(name: str, path: str) -> Header:
    """Read a file's header.

    Args:
        name: the model's name in errors.
        path: the file.

    Raises:
        ModelError: the file is no GGUF file, or its header is damaged.
    """
    try:
        with open(path, "rb") as file:
            if is_gguf := file.read(4) == b"GGUF":
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    header = _Reader(content).header(len(content))
    except OSError as error:
        raise ModelError(f"cannot read the GGUF file {name!r}: {error.strerror}") from error
    except (struct.error, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ModelError(f"the GGUF file {name!r} is truncated or damaged in its header; fetch it again") from error
    if not is_gguf:
        raise ModelError(f"{name!r} is not a GGUF file; a model is a directory, a GGUF file, or a name on the hub")
    return header


class _Reader:
    """Reads a header from front to back; a file that ends early raises ``struct.error``."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at = content, 4

    def header(self, size: int) -> Header:
        version, tensors, fields = self.take("IQQ")
        if version not in (2, 3):
            raise KeyError(version)
        values = {}
        for _ in range(fields):
            name = self.text()
            values[name] = self.value(self.take("I")[0])
        listed = []
        for _ in range(tensors):
            name, (dimensions,) = self.text(), self.take("I")
            shape = self.take(f"{dimensions}Q")
            kind, offset = self.take("IQ")
            listed.append(_Tensor(name, kind, prod(shape), offset))
        alignment = values.get("general.alignment", 32)
        data = -(-self.at // alignment) * alignment
        return Header(values["general.architecture"], values, tuple(listed), data, size)

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.content, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def text(self) -> str:
        (length,) = self.take("Q")
        return bytes(self.take(f"{length}s")[0]).decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.take(_FORMATS[kind])[0]
        inner, count = self.take("IQ")
        if inner == _TEXT:
            for _ in range(count):
                (length,) = self.take("Q")
                self.at += length
        else:
            self.at += count * struct.calcsize(f"<{_FORMATS[inner]}")
        return count


def _refuse_truncated(name: str, header: Header) -> None:
    """Raise a ModelError where a tensor ends behind the end of the file, or has an unknown type."""
    import gguf

    for tensor in header.tensors:
        try:
            block, bytes_per_block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
        except (KeyError, ValueError) as error:
            raise ModelError(
                f"the GGUF file {name!r} has a tensor of an unknown type ({tensor.name}, type {tensor.kind}); "
                "pip install --upgrade gguf, or take a file with another quantisation"
            ) from error
        end = header.data + tensor.offset + tensor.elements // block * bytes_per_block
        if end > header.size:
            raise ModelError(
                f"the GGUF file {name!r} is truncated: {tensor.name} ends at byte {end:,}, the file has "
                f"{header.size:,} bytes; fetch it again"
            )


def _refuse_incomplete(name: str, fields: dict[str, Any]) -> None:
    """Raise a ModelError where a file has only a part of a model, or no tokenizer."""
    if fields.get("split.count", 1) > 1:
        raise ModelError(
            f"{name!r} is one of {fields['split.count']} parts of a model; merge them first: llama-gguf-split --merge"
        )
    if fields.get("tokenizer.ggml.model", "no_vocab") == "no_vocab" or not fields.get("tokenizer.ggml.tokens"):
        raise ModelError(
            f"the GGUF file {name!r} has no tokenizer; load the model with transformers (gguf_file=) and pass the "
            "tokenizer: DePass(model, tokenizer)"
        )


def _complete(name: str, header: Header, config: Any) -> None:
    """Set what the file says of the attention and transformers leaves at its defaults.

    Raises:
        ModelError: the configuration has no place for it, so the logits would be wrong.
    """
    for key, attribute in _SETTINGS.items():
        given = header.fields.get(f"{header.architecture}.{key}")
        if given and hasattr(config, attribute):
            setattr(config, attribute, given)
        elif given:
            _refuse_lost(name, f"{key} {given}")
    factors = [tensor.name for tensor in header.tensors if tensor.name.startswith("rope_f")]
    kind = header.fields.get(f"{header.architecture}.rope.scaling.type", "none")
    rope = getattr(config, "rope_parameters", None) or {}
    entries = [entry for entry in rope.values() if isinstance(entry, dict)] or [rope]
    if (kind != "none" or factors) and all(entry.get("rope_type", "default") == "default" for entry in entries):
        _refuse_lost(name, factors[0] if factors else f"rope.scaling.type {kind}")


def _refuse_lost(name: str, what: str) -> NoReturn:
    raise ModelError(
        f"the GGUF file {name!r} has {what}, which transformers does not read from such a file; load the original model"
    )


def _warn_of_other_splits(name: str, fields: dict[str, Any]) -> None:
    """Warn where transformers does not know how the tokenizer splits text, and so splits it as GPT-2 does."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as KNOWN
    except ImportError:
        return
    split = fields.get("tokenizer.ggml.pre")
    if fields["tokenizer.ggml.model"] == "gpt2" and split is not None and split not in (*KNOWN, *_LIKE_GPT2):
        warn(
            f"the GGUF file {name!r} splits text as {split!r} does, which transformers does not know: it splits as GPT-2 "
            "does, so some tokens may differ from those of the original tokenizer",
            PromptWarning,
        )


@contextmanager
def opened(name: str, path: str) -> Iterator[tuple[Header, dict[str, str]]]:
    """Check a file; inside the ``with`` block, these keyword arguments name it to transformers' ``from_pretrained``.

    The file stands alone in a directory there: transformers would prefer another model's tokenizer beside it.

    Raises:
        ModelError: see :func:`read`; or there is no file, it is truncated, or it has no tokenizer or only a part of a model.
        OptionError: a package is missing or too old.
    """
    if not os.path.isfile(path):
        raise ModelError(f"there is no file {name!r}")
    header = read(name, path)
    require(f"the GGUF file {name!r}")
    _refuse_truncated(name, header)
    _refuse_incomplete(name, header.fields)
    with tempfile.TemporaryDirectory(prefix="depass-") as folder, _without_bar():
        os.symlink(os.path.abspath(path), os.path.join(folder, "model.gguf"))
        yield header, {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}


@contextmanager
def _without_bar() -> Iterator[None]:
    """The loader's bar does not obey transformers' switch for progress bars."""
    from transformers.utils import logging

    with ExitStack() as stack:
        if not logging.is_progress_bar_enabled():
            stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        yield


def config_of(name: str, path: str) -> Any:
    """The configuration of a file's model; arguments and errors as for :func:`load`."""
    with opened(name, path) as (header, place):
        return _config(name, header, place)


def _config(name: str, header: Header, place: dict[str, str]) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(**place)
    _complete(name, header, config)
    return config


def load(name: str, path: str, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The model of a file, with unpacked weights, its tokenizer, and what transformers reports about the loading.

    Args:
        name: the model's name in errors.
        path: the file.
        options: keyword arguments of transformers' ``from_pretrained``.

    Raises:
        ModelError, OptionError: see :func:`opened`; or transformers does not read a setting that changes the logits.
    """
    import transformers

    with opened(name, path) as (header, place):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        model, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
            **place,
            config=_config(name, header, place),
            quantization_config=transformers.GgufConfig(dequantize=True),
            output_loading_info=True,
            **options,
        )
    _warn_of_other_splits(name, header.fields)
    model.config.name_or_path = tokenizer.name_or_path = name
    return model, tokenizer, loading_info


def convert(source: Path, target: Path) -> None:
    """Write a file's model, in fp32, and its tokenizer into a directory, in the format that transformers loads."""
    import torch

    model, tokenizer, _ = load(source.name, os.fspath(source), dtype=torch.float32)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
