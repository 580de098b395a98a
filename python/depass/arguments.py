"""Options that several commands share, and the model that they name."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from .errors import OptionError, escaped

if TYPE_CHECKING:
    from .api import DePass


RULES = ("softmax", "max", "relu", "linear", "taylor")
BACKENDS = ("auto", "cpu", "triton", "cuda", "reference")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
DIGITS = 18  # of a number that is counted with


def say(text: str) -> None:
    """Print a line on standard output; names of files in it command no terminal."""
    print(escaped(text))


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`load_model` reads."""
    add = parser.add_argument
    add("-m", "--model", default="smollm2", help="a folder or a hub name (default: the embedded SmolLM2-135M-Instruct)")
    add("--dtype", default="auto", choices=DTYPES, help="of the weights (default: as saved)")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add("--stream", action="store_true", help="keep the weights in host memory, bring each layer's to --device in turn")
    add(
        "--device-map", choices=("auto", "balanced", "balanced_low_0", "sequential"),
        help="spread the weights over all GPUs, then host memory, then disk, instead of --device (needs accelerate)",
    )  # fmt: skip
    add_loading(parser)
    add("--backend", default="auto", choices=BACKENDS, help="what computes (default: the first that can)")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """The options of how weights are loaded."""
    add = parser.add_argument
    add("--quantization", choices=("8bit", "4bit"), help="of the weights, by bitsandbytes (default: as saved)")
    add("--trust-remote-code", action="store_true", help="run code that the model brings along (default: refuse it)")


def natural(text: str) -> int:
    """An option's value that is an integer from 0."""
    return _integer(text, 0)


def positive(text: str) -> int:
    """An option's value that is an integer from 1."""
    return _integer(text, 1)


def fraction(text: str, most: float = 1.0) -> float:
    """An option's value that is a number above 0, up to ``most``."""
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


def load_model(options: argparse.Namespace, **more: Any) -> DePass:
    """The model that was asked for; ``more`` as :class:`DePass` takes it.

    Raises:
        OptionError: no such device, or options that exclude each other.
        ModelError: no such model, or it cannot be attributed.
    """
    if options.device_map is not None and (options.stream or options.device != "cpu"):
        raise OptionError(
            f"--device-map {options.device_map} chooses the devices itself; leave out --device and --stream"
        )
    check_stream(options)
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


def check_stream(options: argparse.Namespace) -> None:
    """Refuse ``--stream`` beside what it does not go with."""
    if options.stream and options.quantization is not None:
        raise OptionError(
            f"--stream brings weights as they are; leave it out, or --quantization {options.quantization}"
        )


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
