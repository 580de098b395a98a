"""The command ``depass``. Exit codes: 0, 1 (ran and failed), 2 (wrong use), 130 (interrupted), 143 (terminated)."""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import DePassError, OptionError, PromptError, SourceError, TargetError, escaped
from .files import check_writable

if TYPE_CHECKING:
    from .api import DePass

RULES = ("softmax", "max", "relu", "linear", "taylor")
BACKENDS = ("auto", "cpu", "triton", "cuda", "reference")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_DIGITS = 18  # of a number that is counted with
PATIENCE = 2.0  # seconds before a progress bar is worth its lines


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM): what holds of an interruption holds of it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started the process
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lasts
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode gets escapes, not an error
            stream.reconfigure(errors="backslashreplace")
    alone = threading.current_thread() is threading.main_thread()  # no other one may ask for signals
    before = signal.signal(signal.SIGTERM, _terminate) if alone else None
    try:
        options = _parser(given).parse_args(given)
        run: Callable[[argparse.Namespace], None] = options.run
        run(options)
        sys.stdout.flush()
    except (OptionError, PromptError, SourceError, TargetError) as error:
        return _fail(error, 2)
    except DePassError as error:
        return _fail(error, 1)
    except BrokenPipeError:  # the reader of a pipe left early, as head does
        _drop_output()
        return 0
    except (ImportError, OSError) as error:
        if not isinstance(error, OSError) or error.errno is None:  # a library; memory that is limited can be why
            return _fail(f"cannot load what it needs: {error}", 1)
        _drop_output()
        where = "standard output" if error.filename is None else error.filename  # other files raise an OutputError
        return _fail(f"cannot write {where}: {error.strerror}", 1)
    except (MemoryError, RuntimeError) as error:
        from .memory import asked_bytes

        if asked_bytes(error) is None:
            raise
        return _fail("out of memory; `depass plan` says what a prompt takes", 1)
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted", 143 if isinstance(stop, Terminated) else 130)
    finally:
        if alone:
            signal.signal(signal.SIGTERM, before)
    return 0


def _drop_output() -> None:
    """Leave what could not be written, instead of failing once more when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(*_: object) -> None:
    raise Terminated("terminated")


def _fail(why: object, code: int) -> int:
    try:
        sys.stdout.flush()  # what was said before stands before it
    except OSError:
        _drop_output()
    print(f"depass: {escaped(str(why))}", file=sys.stderr)
    return code


def say(text: str) -> None:
    """Print a line on standard output; names of files in it command no terminal."""
    print(escaped(text))


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with arguments without repeating their control characters."""

    def error(self, message: str) -> NoReturn:
        super().error(escaped(message))


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="depass", description="Which part of the input made a language model say what it said.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    attribute = commands.add_parser("attribute", help="attribute a model's next token to the parts of a prompt")
    attribute.set_defaults(run=_attribute)
    add = attribute.add_argument
    add("prompt", metavar="PROMPT", help="the prompt; - reads it from standard input")
    add_model(attribute)
    add(
        "--target", action="append", metavar="T",
        help="what to explain, may be repeated: a token (' Europe'), id:1910 or top:5 (default: the model's next token)",
    )  # fmt: skip
    _add_attribution(attribute)
    add("--save-path", metavar="F", help="save the result (safetensors; Attribution.load reads it)")
    add("--viz-path", metavar="F.html", help="write a standalone HTML page")
    add("--json", action="store_true", help="print the result as JSON instead of a picture")
    view = commands.add_parser("view", help="write saved results as one standalone HTML page")
    view.set_defaults(run=_view)
    add = view.add_argument
    add("results", nargs="+", metavar="RESULT", help="a saved attribution, sweep or generation")
    add("-o", "--output", metavar="page.html", help="(default: beside the first RESULT, its name with .html)")
    plan = commands.add_parser(
        "plan", help="what an attribution takes: rows, memory, time; from the configuration alone"
    )
    plan.set_defaults(run=_plan)
    add = plan.add_argument
    add("-m", "--model", default="smollm2", help="a folder or a hub name; its weights are not loaded")
    add("--tokens", type=int, required=True, metavar="N", help="length of the prompt")
    add("--sources", default="token", help="token (default), heads, neurons, or a number of spans")
    add("--budget", metavar="48GB", help="memory that there is (default: the device's)")
    add("--dtype", default="auto", choices=DTYPES, help="of the weights (default: as saved)")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add("--stream", action="store_true", help="with the weights in host memory, as of `depass attribute`")
    _add_loading(plan)
    _add_dataset(commands.add_parser("attribute-dataset", help="attribute every row of a data set, into Parquet files"))
    backends = commands.add_parser("backends", help="which backend can serve which op on this machine")
    backends.set_defaults(run=_backends)
    evaluate = commands.add_parser("evaluate", help="does the attribution tell the truth: experiments on a model")
    if given[:1] == ["evaluate"]:  # its tasks need torch, which takes seconds to load
        from .evaluate.command import add_tasks

        add_tasks(evaluate)
    return parser


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_attribute_dataset)
    add = parser.add_argument
    add("data", metavar="DATA", help="a .jsonl, .csv or .parquet file, or a HuggingFace data set's name or folder")
    add_model(parser)
    add("--out", metavar="DIR", required=True, help="where the rows go; a run that was stopped goes on there")
    add("--prompt-column", metavar="NAME", default="prompt", help="texts, chat messages or ids (default: prompt)")
    add("--target-column", metavar="NAME", help="tokens to explain (default: target, where there is one)")
    add("--id-column", metavar="NAME", help="names of the rows (default: id, where there is one, else their numbers)")
    add("--subset", metavar="NAME", help="of a HuggingFace data set: its configuration")
    add("--split", metavar="NAME", help="of a HuggingFace data set (default: train)")
    _add_attribution(parser)
    add(
        "--shard-rows", type=positive, default=256, metavar="N",
        help="rows of a file; after a stop those of the unfinished one are done again (default: 256)",
    )  # fmt: skip
    add(
        "--batch-tokens",
        type=positive,
        metavar="N",
        help="tokens of one pass (default: 1024, or what memory has room for)",
    )
    add(
        "--engine",
        default="local",
        choices=("local", "ray"),
        help="this process (default), or workers of a Ray cluster",
    )
    add("--workers", type=positive, default=1, metavar="N", help="with --engine ray: models at work (default: 1)")
    add("--ray-address", metavar="ADDR", help="of a cluster that is there (default: one on this machine, for the run)")


def _add_attribution(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--sources", default="token", choices=("token", "word", "sentence"), help="the parts of the prompt")
    add("--mlp-rule", default="softmax", choices=RULES, help="how MLPs are shared out among the sources")
    add("--temperature", type=float, default=0.1, help="of the softmax rule (default: 0.1)")


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
    _add_loading(parser)
    add("--backend", default="auto", choices=BACKENDS, help="what computes (default: the first that can)")


def _add_loading(parser: argparse.ArgumentParser) -> None:
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
    _check_stream(options)
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
        or (None if options.stream or options.device == "cpu" else _device(options.device)),
        quantization=options.quantization,
        trust_remote_code=options.trust_remote_code,
        stream_to=_device(options.device) if options.stream else None,
        **more,
    )


def _check_stream(options: argparse.Namespace) -> None:
    if options.stream and options.quantization is not None:
        raise OptionError(
            f"--stream brings weights as they are; leave it out, or --quantization {options.quantization}"
        )


def _attribute(options: argparse.Namespace) -> None:
    for path in (options.save_path, options.viz_path):
        if path is not None:
            check_writable(path)
    prompt = _standard_input() if options.prompt == "-" else options.prompt
    if not prompt:
        raise PromptError("the prompt is empty; give at least one token")

    gc.disable()  # a fifth of a start is spent looking for garbage among what imports leave, and the process is short
    targets = [_target(text) for text in options.target] if options.target else None
    dp = load_model(options, mlp_rule=options.mlp_rule, temperature=options.temperature)
    with _Progress() as progress:
        result = dp.attribute(prompt, target=targets, sources=options.sources, progress=progress.update)
    if options.json:
        print(json.dumps(result.to_dict()))
    else:
        result.show()
    if options.save_path is not None:
        result.save(options.save_path)
    if options.viz_path is not None:
        result.to_html(options.viz_path)


def _attribute_dataset(options: argparse.Namespace) -> None:
    import warnings

    from .dataset import run
    from .errors import ConservationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConservationWarning)  # every row says how far its scores miss
        say(run(options))


def _view(options: argparse.Namespace) -> None:
    output = options.output or os.path.splitext(options.results[0])[0] + ".html"
    if os.path.realpath(output) in map(os.path.realpath, options.results):
        raise OptionError(f"the page would overwrite the result {output}; name another file with -o")
    check_writable(output)

    from .page import load, render

    render([(path, load(path)) for path in options.results], output)
    say(output)


def _plan(options: argparse.Namespace) -> None:
    from dataclasses import replace

    import torch

    from .checks import byte_count
    from .loading import empty_model
    from .plan import make, measured_rate

    _check_stream(options)
    device = torch.device(_device(options.device))
    budget = None if options.budget is None else byte_count(options.budget)
    counted = options.sources.isdecimal() and len(options.sources) <= _DIGITS
    sources = int(options.sources) if counted else options.sources
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    bound = empty_model(options.model, dtype, options.quantization, options.trust_remote_code)
    if budget is None and device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory
    if budget is None:
        budget = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if options.stream:
        bound = replace(bound, stream_to=device)
    print(make(bound, options.tokens, sources, device, budget, None, measured_rate(bound, device)))


def _backends(_: argparse.Namespace) -> None:
    from depass_kernels.backends import build_info, table

    for op, backend, reason in table():
        print(f"{op:<17}{backend:<12}{'can serve' if reason is None else f'cannot: {reason}'}")
    info = build_info()
    if info:
        cuda = f"nvcc {info['nvcc']} for {', '.join(info['cuda_architectures'])}" if info["nvcc"] else "no CUDA kernels"
        print(f"\ncompiled by {info['cxx']}; {cuda}")


def _standard_input() -> str:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8 are refused with the prompt
    return sys.stdin.read().removesuffix("\n")


def _target(text: str) -> Any:
    from .targets import Token, TopK

    kind, _, number = text.partition(":")
    if kind not in ("id", "top") or not number:
        return Token(text)
    if not number.isdecimal() or len(number) > _DIGITS:
        raise TargetError(f"--target {text}: {number!r} is no number; write id:1910 or top:5")
    return Token(int(number)) if kind == "id" else TopK(int(number))


def _device(name: str) -> str:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"--device {name}: there is no such device; write cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here")
    return name


class _Progress:
    """A progress bar on standard error, where that is a terminal and the work takes longer than ``PATIENCE``."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, of: int) -> None:
        if self.bar is None:
            if time.monotonic() - self.began < PATIENCE or not sys.stderr.isatty():
                return
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("layers", total=of)
        self.bar.update(self.task, completed=done)
