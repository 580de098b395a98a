"""The command ``depass``. Exit codes: 0, 1 (ran and failed), 2 (wrong use), 130 (interrupted), 143 (terminated)."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

from ..arguments import ModelOptions, add_options
from ..datasets.options import DatasetOptions
from ..errors import DePassError, OptionError, PromptError, SourceError, TargetError, escaped
from .commands import _attribute, _attribute_dataset, _backends, _plan, _view


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
        from ..device_memory import asked_bytes

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
    add_options(attribute, ModelOptions)
    add(
        "--target", action="append", metavar="T",
        help="what to explain, may be repeated: a token (' Europe'), id:1910 or top:5 (default: the model's next token)",
    )  # fmt: skip
    add_options(attribute, DatasetOptions, ("sources", "mlp_rule", "temperature"))
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
    add_options(plan, ModelOptions, ("dtype", "device"))
    add("--stream", action="store_true", help="with the weights in host memory, as of `depass attribute`")
    add_options(plan, ModelOptions, ("quantization", "trust_remote_code"))
    dataset = commands.add_parser("attribute-dataset", help="attribute every row of a data set, into Parquet files")
    dataset.set_defaults(run=_attribute_dataset)
    add_options(dataset, DatasetOptions)
    backends = commands.add_parser("backends", help="which backend can serve which op on this machine")
    backends.set_defaults(run=_backends)
    evaluate = commands.add_parser("evaluate", help="does the attribution tell the truth: experiments on a model")
    if given[:1] == ["evaluate"]:  # its tasks need torch, which takes seconds to load
        from .evaluate import add_tasks

        add_tasks(evaluate)
    return parser
