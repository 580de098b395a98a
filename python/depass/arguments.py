"""Options as frozen dataclasses, the arguments of a command that are made of them, and the model that they name."""

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

if TYPE_CHECKING:
    from .api import DePass


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
DIGITS = 18  # of a number that is counted with


def argument(
    help: str,
    *,
    flags: tuple[str, ...] = (),
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    least: int | None = None,
    most: float | None = None,
) -> dict[str, Any]:
    """The metadata of a field of :class:`CommandOptions`.

    Args:
        help: what the option is, in the command's help.
        flags: its names on the command line, or one without dashes for an argument by position; the field's name without
            them, ``--held-out`` for ``held_out``.
        metavar: what stands for its value in the help.
        choices: the values that there are.
        least: the option is an integer from here on.
        most: the option is a number above 0, up to this one.
    """
    return {"help": help, "flags": flags, "metavar": metavar, "choices": choices, "least": least, "most": most}


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """Options that a command takes as arguments and Python as fields: a base for frozen dataclasses.

    A field is a ``str``, ``int``, ``float`` or ``bool``, one of these or None, or a ``tuple`` of several; its metadata are
    those of :func:`argument`, or none. What Python gives is held to the same as what the command is given.

    Raises:
        OptionError: a field has a value that it cannot have.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for one in fields(self):
            value, (kind, several, optional) = getattr(self, one.name), _kind(hints[one.name])
            if value is None and optional:
                continue
            if several and not (isinstance(value, tuple) and value):
                raise OptionError(f"{one.name} must be a tuple of at least one value, got {value!r}")
            for part in value if several else (value,):
                if (wanted := _refusal(part, kind, one.metadata)) is not None:
                    raise OptionError(f"{one.name} must be {wanted}, got {part!r}")


Told = TypeVar("Told", bound=CommandOptions)


def _kind(hint: Any) -> tuple[type, bool, bool]:
    """Of a field's type: the type of a value, whether there are several, and whether there may be none."""
    parts = get_args(hint)
    return (parts or (hint,))[0], get_origin(hint) is tuple, NoneType in parts


def _refusal(value: Any, kind: type, said: Mapping[str, Any]) -> str | None:
    """What a value must be and is not; None where nothing speaks against it."""
    choices, least, most = said.get("choices"), said.get("least"), said.get("most")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if choices is not None:
        return None if value in choices else f"one of {', '.join(choices)}"
    if least is not None:
        return None if type(value) is int and value >= least else f"an integer from {least}"
    if most is not None:
        return None if number and 0 < value <= most else f"a number above 0, up to {most:g}"
    if kind is float:
        return None if number else "a number"
    same = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    return None if same else f"of type {kind.__name__}"


def add_options(
    parser: argparse.ArgumentParser, kind: type[CommandOptions], names: Collection[str] | None = None
) -> None:
    """Add an argument for each field of some options, or for those of the given names alone.

    Each such field has metadata of :func:`argument`. What the parser reads, :func:`read_options` makes the options of.
    """
    hints = get_type_hints(kind)
    for one in fields(kind):
        if names is not None and one.name not in names:
            continue
        of, several, _ = _kind(hints[one.name])
        said, help = one.metadata, plain(one.metadata["help"])
        flags = said["flags"] or (f"--{one.name.replace('_', '-')}",)
        if of is bool:
            parser.add_argument(*flags, action="store_true", help=help)
            continue
        more: dict[str, Any] = {"nargs": "+"} if several else {}
        if flags[0].startswith("-"):
            more["required"] = one.default is MISSING
            more["default"] = None if one.default is MISSING else one.default
        parser.add_argument(
            *flags, type=_reader(of, said), choices=said["choices"], metavar=said["metavar"], help=help, **more
        )


def plain(help: str) -> str:
    """A help as it stands, in which argparse would take what follows a % for a format."""
    return help.replace("%", "%%")


def read_options(kind: type[Told], arguments: argparse.Namespace) -> Told:
    """The options of a kind out of a command's arguments, which may hold others."""
    values = {one.name: getattr(arguments, one.name) for one in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _reader(kind: type, said: Mapping[str, Any]) -> Callable[[str], Any]:
    """Makes a value of an argument's text."""
    if said["least"] is not None:
        return partial(_integer, least=said["least"])
    if said["most"] is not None:
        return partial(_fraction, most=said["most"])
    return kind


def _fraction(text: str, most: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0, up to {most:g}")
    return number


def _integer(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from {least}")
    return int(text)


def say(text: str) -> None:
    """Print a line on standard output; names of files in it command no terminal."""
    print(escaped(text))


# The model.


@dataclass(frozen=True, kw_only=True)
class ModelOptions(CommandOptions):
    """Which model is loaded, and how.

    Attributes:
        model: a folder or a hub name; ``smollm2`` is the embedded SmolLM2-135M-Instruct.
        dtype: of the weights, one of :data:`DTYPES`; ``auto`` is as saved.
        device: where the model runs.
        stream: keep the weights in host memory and bring each layer's to ``device`` in turn.
        device_map: how accelerate spreads the weights over devices, instead of ``device``; None: it does not.
        quantization: ``8bit`` or ``4bit`` weights by bitsandbytes; None is as saved.
        trust_remote_code: run code that the model brings along.
        backend: what computes, one of :data:`BACKENDS`; ``auto`` is the first that can.
    """

    model: str = field(
        default="smollm2",
        metadata=argument(
            "a folder or a hub name (default: the embedded SmolLM2-135M-Instruct)", flags=("-m", "--model")
        ),
    )
    dtype: str = field(default="auto", metadata=argument("of the weights (default: as saved)", choices=DTYPES))
    device: str = field(default="cpu", metadata=argument("cpu (default), cuda, cuda:1, ..."))
    stream: bool = field(
        default=False,
        metadata=argument("keep the weights in host memory, bring each layer's to --device in turn"),
    )
    device_map: str | None = field(
        default=None,
        metadata=argument(
            "spread the weights over all GPUs, then host memory, then disk, instead of --device (needs accelerate)",
            choices=("auto", "balanced", "balanced_low_0", "sequential"),
        ),
    )
    quantization: str | None = field(
        default=None,
        metadata=argument("of the weights, by bitsandbytes (default: as saved)", choices=("8bit", "4bit")),
    )
    trust_remote_code: bool = field(
        default=False, metadata=argument("run code that the model brings along (default: refuse it)")
    )
    backend: str = field(
        default="auto", metadata=argument("what computes (default: the first that can)", choices=BACKENDS)
    )


def load_model(options: ModelOptions, **more: Any) -> DePass:
    """The model that was asked for; ``more`` as :class:`DePass` takes it.

    Raises:
        OptionError: no such device, or options that exclude each other.
        ModelError: no such model, or it cannot be attributed.
    """
    if options.device_map is not None and (options.stream or options.device != "cpu"):
        raise OptionError(
            f"--device-map {options.device_map} chooses the devices itself; leave out --device and --stream"
        )
    check_stream(options.stream, options.quantization)
    import torch
    from transformers.utils import logging

    from .api import DePass

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return DePass.from_pretrained(
        options.model,
        dtype="auto" if options.dtype == "auto" else getattr(torch, options.dtype),
        say=lambda message: print(message, file=sys.stderr),
        backend=options.backend,
        device_map=options.device_map
        or (None if options.stream or options.device == "cpu" else device_name(options.device)),
        quantization=options.quantization,
        trust_remote_code=options.trust_remote_code,
        stream_to=device_name(options.device) if options.stream else None,
        **more,
    )


def check_stream(stream: bool, quantization: str | None) -> None:
    """Refuse ``--stream`` beside what it does not go with.

    Raises:
        OptionError: weights that are streamed and quantised.
    """
    if stream and quantization is not None:
        raise OptionError(f"--stream brings weights as they are; leave it out, or --quantization {quantization}")


def device_name(name: str) -> str:
    """The device that an option names, if torch has it.

    Raises:
        OptionError: it does not.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"--device {name}: there is no such device; write cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here")
    return name
