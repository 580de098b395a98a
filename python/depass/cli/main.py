"""The command ``depass``. Exit codes: 0 (done), 1 (failed), 2 (wrong use), 130 (interrupted), 143 (terminated)."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..arguments import MODELS, ModelOptions, add_options
from ..datasets.options import DatasetOptions
from ..errors import DePassError, OptionError, PromptError, SourceError, TargetError, escaped
from ..models.builtin import DEFAULT
from .commands import _attribute, _attribute_dataset, _backends, _cite, _explain, _family, _plan, _view
from .quiet import add_verbose, quiet

SCORING = (
    "of",
    "sources",
    "language",
    "rule",
    "temperature",
)  # fields of DatasetOptions that say what is scored and how


class Terminated(KeyboardInterrupt):
    """SIGTERM asked the process to end; it is handled as an interruption is."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the parent process closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lasts
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode gets escapes, not an error
            stream.reconfigure(errors="backslashreplace")
    in_main_thread = threading.current_thread() is threading.main_thread()  # only this thread may set signal handlers
    before = signal.signal(signal.SIGTERM, _terminate) if in_main_thread else None
    try:
        options = _parser(given).parse_args(given)
        run: Callable[[argparse.Namespace], None] = options.run
        with quiet(options.verbose):
            run(options)
        sys.stdout.flush()
    except (OptionError, PromptError, SourceError, TargetError) as error:
        return _fail(error, 2)
    except DePassError as error:
        return _fail(error, 1)
    except BrokenPipeError:  # the reader of the pipe closed it early, as head does
        _drop_output()
        return 0
    except (ImportError, OSError) as error:
        if not isinstance(error, OSError) or error.errno is None:  # a memory limit can cause this
            return _fail(f"cannot load a library: {error}", 1)
        _drop_output()
        where = "standard output" if error.filename is None else error.filename  # other files raise an OutputError
        return _fail(f"cannot write {where}: {error.strerror}", 1)
    except (MemoryError, RuntimeError) as error:
        from ..device_memory import asked_bytes

        if asked_bytes(error) is None:
            raise
        return _fail("out of memory; `depass plan` prints how much memory a prompt needs", 1)
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted", 143 if isinstance(stop, Terminated) else 130)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
    return 0


def _drop_output() -> None:
    """Discard unwritten output, so that the process does not fail a second time when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(*_: object) -> None:
    raise Terminated("terminated")


def _fail(reason: object, code: int) -> int:
    try:
        sys.stdout.flush()  # earlier output comes before the error
    except OSError:
        _drop_output()
    print(f"depass: {escaped(str(reason))}", file=sys.stderr)
    return code


class _Version(argparse.Action):
    """Prints the package's version. It is looked up only when asked for, because the look-up takes time."""

    def __call__(self, *_: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"depass {version('depass-kernels')}")
        except PackageNotFoundError:
            raise DePassError("depass-kernels is not installed, so its version is unknown; pip install it") from None
        raise SystemExit(0)


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments with their control characters escaped."""

    def error(self, message: str) -> NoReturn:
        super().error(escaped(message))


def _command(commands: Any, name: str, help: str) -> argparse.ArgumentParser:
    """A sub-command whose own help begins with the line that the list of commands shows."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    add_verbose(command)
    return command


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="depass", description="Find out which parts of the input made a language model say what it said."
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="print the version and exit"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    attribute = _command(commands, "attribute", "score how much each part of a prompt contributed to the next token")
    attribute.set_defaults(run=_attribute)
    add = attribute.add_argument
    add("prompt", metavar="PROMPT", help="the prompt; - reads it from standard input")
    add_options(attribute, ModelOptions)
    add(
        "--target", action="append", metavar="TARGET",
        help="the token to explain: text (' Europe'), id:1910 or top:5; may be repeated (default: the model's next token)",
    )  # fmt: skip
    _add_output(attribute)
    explain = _command(commands, "explain", "score how much each part of a prompt contributed to a given answer")
    explain.set_defaults(run=_explain)
    add = explain.add_argument
    add("prompt", metavar="PROMPT", help="the prompt; - reads it from standard input")
    add("--answer", required=True, metavar="TEXT", help="the answer that follows it; - reads it from standard input")
    add_options(explain, ModelOptions)
    _add_output(explain)
    _add_cite(commands)
    view = _command(commands, "view", "write saved results as one standalone HTML page")
    view.set_defaults(run=_view)
    add = view.add_argument
    add("results", nargs="+", metavar="RESULT", help="a file that --save-path or a result's save() wrote")
    add(
        "-o", "--output", metavar="FILE.html",
        help="the page to write (default: next to the first RESULT, with its name and the suffix .html)",
    )  # fmt: skip
    _add_plan(commands)
    dataset = _command(commands, "attribute-dataset", "attribute every row of a data set and write Parquet files")
    dataset.set_defaults(run=_attribute_dataset)
    add_options(dataset, DatasetOptions)
    family = _command(commands, "family", "print the declaration (depass.Family) of a model, listed or inferred")
    family.set_defaults(run=_family)
    add_options(family, ModelOptions)
    backends = _command(commands, "backends", "show which backend runs each op on this machine, and why others can't")
    backends.set_defaults(run=_backends)
    evaluate = _command(commands, "evaluate", "run experiments that test whether the attributions are faithful")
    if given[:1] == ["evaluate"]:  # its tasks need torch, which takes seconds to load
        from .evaluate import add_tasks

        add_tasks(evaluate)
    return parser


def _add_cite(commands: Any) -> None:
    cite = _command(
        commands, "cite", "score how much each sentence of documents contributed to each sentence of an answer"
    )
    cite.set_defaults(run=_cite)
    add = cite.add_argument
    add("--documents", nargs="+", required=True, metavar="FILE", help="text files in UTF-8; their names are the titles")
    add("--question", required=True, metavar="TEXT", help="a question about the documents")
    add("--answer", metavar="TEXT", help="the answer; - reads it from standard input (default: the model's own)")
    add("--max-new-tokens", type=int, default=100, metavar="N", help="length of the model's own answer (default: 100)")
    add_options(cite, ModelOptions)
    _add_output(cite, [name for name in SCORING if name != "sources"])


def _add_output(command: argparse.ArgumentParser, scoring: Sequence[str] = SCORING) -> None:
    """The options of what is scored and of what becomes of the result."""
    add_options(command, DatasetOptions, scoring)
    add = command.add_argument
    add("--save-path", metavar="FILE", help="save the result as safetensors (depass view reads it)")
    add("--viz-path", metavar="FILE.html", help="write a standalone HTML page")
    add("--json", action="store_true", help="print the result as JSON instead of coloured text")


def _add_plan(commands: Any) -> None:
    plan = _command(commands, "plan", "print the rows, memory and time that an attribution needs; loads no weights")
    plan.set_defaults(run=_plan)
    add = plan.add_argument
    add("-m", "--model", default=DEFAULT, help=f"{MODELS} (default: {DEFAULT}); its weights are not loaded")
    add("--tokens", type=int, required=True, metavar="N", help="length of the prompt in tokens")
    add("--sources", default="token", help="token (default), heads, neurons, experts, or a number of spans")
    add("--targets", type=int, default=1, metavar="T", help="targets, such as an answer's tokens (default: 1)")
    add("--budget", metavar="48GB", help="available memory (default: all memory of the device)")
    add_options(plan, DatasetOptions, ("rule",))
    add_options(plan, ModelOptions, ("dtype", "device"))
    add("--stream", action="store_true", help="plan for weights that stay in host memory, as `attribute --stream` does")
    add_options(plan, ModelOptions, ("quantization", "trust_remote_code"))
