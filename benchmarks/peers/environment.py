"""A tool's environment, which pip fills, and the process that runs the tool in it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from ..machine import ROOT

BUILD = ROOT / "build" / "peers"
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


class ToolError(Exception):
    """A tool cannot be installed or fails; the message is its error's line."""


def python_of(tool: str, module: ModuleType, torch: str) -> str:
    """The Python of a tool's environment, installed at the first call and whenever the pins change.

    Args:
        tool: the environment's name.
        module: the tool's module, with ``PINS``.
        torch: the requirement for torch, which is installed first.

    Raises:
        ToolError: pip failed, or replaced that torch.
    """
    folder, alone = BUILD / tool, getattr(module, "WITHOUT_DEPENDENCIES", ())
    python, ready = folder / "bin" / "python", folder / "ready"
    wanted = "\n".join((torch, *module.PINS, *alone))
    if ready.exists() and ready.read_text() == wanted:
        return str(python)
    if not python.exists():
        _run(sys.executable, "-m", "venv", str(folder))
    pip = (str(python), "-m", "pip", "install", "--quiet")
    version = (str(python), "-c", "import torch; print(torch.__version__)")
    _run(*pip, torch)
    before = _run(*version)
    _run(*pip, torch, *module.PINS)
    if alone:
        _run(*pip, "--no-deps", *alone)
    if (after := _run(*version)) != before:
        raise ToolError(f"pip replaced torch {before} by {after} for {tool}; give another --torch")
    ready.write_text(wanted)
    return str(python)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [text for text in done.stderr.splitlines() if text.startswith("ERROR")] or done.stderr.splitlines()
        raise ToolError(f"{' '.join(command[1:4])} failed: {lines[-1] if lines else 'no reason given'}")
    return done.stdout.strip()


class Worker:
    """A process that runs one tool on one model (:mod:`benchmarks.peers.worker`).

    Args:
        tool: the tool's module.
        python: the Python of its environment.
        folder: the model's directory.
        path: a directory to import from beside the repository's, or None.
    """

    def __init__(self, tool: str, python: str, folder: str, path: Path | None = None) -> None:
        self.tool = tool
        self._command = [python, "-m", "benchmarks.peers.worker", tool, folder]
        paths = os.pathsep.join(str(each) for each in (ROOT, path) if each is not None)
        self._environment = {**os.environ, **THREADS, **OFFLINE, "PYTHONPATH": paths}
        self._process: subprocess.Popen[str] | None = None
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._said.close()

    def ask(self, *, limit: float, **request: Any) -> dict[str, Any]:
        """The answer to a request. A process that ended is started again.

        Raises:
            ToolError: the tool raised an error, its process ended, or ``limit`` seconds passed.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, text=True, bufsize=1,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
            )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
        readable, _, _ = select.select([self._process.stdout], [], [], limit)
        if not readable:
            self._stop()
            raise ToolError(f"stopped after {limit:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._stop()
            raise ToolError(f"its process ended with exit code {code}: {self._last_line()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ToolError(answer["error"])
        return answer

    def _last_line(self) -> str:
        self._said.seek(0)
        lines = self._said.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
