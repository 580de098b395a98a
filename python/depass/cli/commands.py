"""The functions that run the commands, once the arguments are parsed."""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from .. import rules
from ..arguments import DIGITS, ModelOptions, check_stream, device_name, load_model, read_options, say, say_aside
from ..errors import OptionError, PromptError, TargetError, escaped
from ..files import check_writable

PATIENCE = 2.0  # seconds before a progress bar appears


def _attribute(options: argparse.Namespace) -> None:
    for path in (options.save_path, options.viz_path):
        if path is not None:
            check_writable(path)
    prompt = _standard_input() if options.prompt == "-" else options.prompt
    if not prompt:
        raise PromptError("the prompt is empty; give at least one token")
    rules.read(options.rule)

    gc.disable()  # collecting takes a fifth of the start-up time, and the process is short
    targets = [_target(text) for text in options.target] if options.target else None
    dp = load_model(read_options(ModelOptions, options), rule=options.rule, temperature=options.temperature)
    from ..sources.spans import named  # needs torch

    sources = named(options.sources, options.language)
    with _Progress() as progress:
        result = dp.attribute(prompt, target=targets, of=options.of, sources=sources, progress=progress.update)
    _give(options, result)


def _explain(options: argparse.Namespace) -> None:
    for path in (options.save_path, options.viz_path):
        if path is not None:
            check_writable(path)
    if options.prompt == options.answer == "-":
        raise OptionError("the prompt and the answer cannot both be read from standard input; give one of them as text")
    prompt, answer = (_standard_input() if given == "-" else given for given in (options.prompt, options.answer))
    if not prompt:
        raise PromptError("the prompt is empty; give at least one token")
    if not answer:
        raise PromptError("the answer is empty; give at least one token")
    rules.read(options.rule)

    gc.disable()  # as above
    dp = load_model(read_options(ModelOptions, options), rule=options.rule, temperature=options.temperature)
    from ..sources.spans import named  # needs torch

    sources = named(options.sources, options.language)
    with _Progress() as progress:
        result = dp.explain(prompt, answer, of=options.of, sources=sources, progress=progress.update)
    _give(options, result)


def _cite(options: argparse.Namespace) -> None:
    for path in (options.save_path, options.viz_path):
        if path is not None:
            check_writable(path)
    documents = _documents(options.documents)
    answer = _standard_input() if options.answer == "-" else options.answer
    for name, given in (("question", options.question), ("answer", answer)):
        if given is not None and not given.strip():
            raise PromptError(f"the {name} is empty; give a text")
    rules.read(options.rule)

    gc.disable()  # as above
    dp = load_model(read_options(ModelOptions, options), rule=options.rule, temperature=options.temperature)
    with _Progress() as progress:
        result = dp.cite(
            options.question, documents, answer, max_new_tokens=options.max_new_tokens, of=options.of,
            language=options.language, progress=progress.update,
        )  # fmt: skip
    _give(options, result)


def _documents(paths: Sequence[str]) -> dict[str, str]:
    """The texts of files by their names, or by their paths where two have the same name.

    Raises:
        PromptError: a file is given twice, empty or not UTF-8, or it cannot be read.
    """
    names = [os.path.basename(path) for path in paths]
    documents: dict[str, str] = {}
    for path, name in zip(paths, names, strict=True):
        title = name if names.count(name) == 1 else path
        if title in documents:
            raise PromptError(f"--documents: {path} is given twice; leave one out")
        try:
            with open(path, encoding="utf-8-sig") as file:
                documents[title] = file.read()
        except (OSError, ValueError) as error:
            reason = "it is not UTF-8" if isinstance(error, UnicodeError) else getattr(error, "strerror", None) or error
            raise PromptError(f"--documents: cannot read {path}: {reason}") from error
        if not documents[title].strip():
            raise PromptError(f"--documents: {path} is empty; leave it out")
    return documents


def _give(options: argparse.Namespace, result: Any) -> None:
    """Print a result, and write the files that the options name."""
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

    from ..datasets.options import DatasetOptions
    from ..datasets.run import run
    from ..errors import ConservationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConservationWarning)  # every row holds its conservation error
        say(run(read_options(DatasetOptions, options)))


def _view(options: argparse.Namespace) -> None:
    output = options.output or os.path.splitext(options.results[0])[0] + ".html"
    if os.path.realpath(output) in map(os.path.realpath, options.results):
        raise OptionError(f"the page would overwrite the saved result {output}; give another file with -o")
    check_writable(output)

    from ..results.load import load
    from ..views.page import render

    render([(path, load(path).page_view()) for path in options.results], output)
    say(output)


def _plan(options: argparse.Namespace) -> None:
    from dataclasses import replace

    import torch

    from ..checks import byte_count
    from ..engine import request
    from ..engine.plan import make, measured_rate
    from ..models.loading import empty_model

    rules.read(options.rule)
    check_stream(options.stream, options.quantization)
    device = torch.device(device_name(options.device))
    budget = None if options.budget is None else byte_count(options.budget)
    is_number = options.sources.isdecimal() and len(options.sources) <= DIGITS
    sources = int(options.sources) if is_number else options.sources
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    bound = empty_model(options.model, dtype, options.quantization, options.trust_remote_code, say=say_aside)
    if budget is None and device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory
    if budget is None:
        budget = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if options.stream:
        bound = replace(bound, stream_to=device)
    chosen = request.options(request.Defaults(options.rule), bound)
    print(
        make(
            bound, options.tokens, sources, device, budget, None, measured_rate(bound, device), chosen, options.targets
        )
    )


def _family(options: argparse.Namespace) -> None:
    from ..models.families import FAMILIES, written

    bound = load_model(read_options(ModelOptions, options)).bound
    kind = bound.model.config.model_type
    print(f"# {escaped(kind)}, family: {bound.origin}")
    print(written(FAMILIES[kind] if bound.origin == "declared" else bound.family))


def _backends(_: argparse.Namespace) -> None:
    from depass_kernels.backends import BACKENDS, OPS, build_info

    missing = {backend.name: backend.missing() for backend in BACKENDS}
    lines = [["op", *missing]]
    for op in OPS:
        runs = (op in backend.ops and missing[backend.name] is None for backend in BACKENDS)
        lines.append([op, *("yes" if yes else "no" for yes in runs)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

    reasons: dict[str, list[str]] = {}
    for name, reason in missing.items():
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
    for op in OPS:
        without = [backend.name for backend in BACKENDS if op not in backend.ops]
        if without:
            reasons[f"{op} is not implemented"] = without
    print()
    for reason, names in reasons.items():
        print(f"{', '.join(names)}: {reason}")
    info = build_info()
    if info:
        cuda = f" and nvcc {info['nvcc']} for {', '.join(info['cuda_architectures'])}"
        print(f"\ncsrc was built with {info['cxx']}{cuda if info['nvcc'] else ', without CUDA kernels'}")


def _standard_input() -> str:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the prompt's own check refuses bytes that are not UTF-8
    return sys.stdin.read().removesuffix("\n")


def _target(text: str) -> Any:
    from ..inputs.targets import Token, TopK

    kind, _, number = text.partition(":")
    if kind not in ("id", "top") or not number:
        return Token(text)
    if not number.isdecimal() or len(number) > DIGITS:
        raise TargetError(f"--target {text}: {number!r} is not a number; write id:1910 or top:5")
    return Token(int(number)) if kind == "id" else TopK(int(number))


class _Progress:
    """A progress bar on standard error. It appears on a terminal, once the work has taken ``PATIENCE`` seconds."""

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
