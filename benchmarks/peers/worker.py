"""Runs one tool in its own environment: reads requests from standard input and answers each with one line of JSON.

    python -m benchmarks.peers.worker TOOL FOLDER

A request is ``{"do": "check", "time" or "scores", "method": NAME, "ids": [...], "target": ID}``. A failed request is
answered with the error's line; what the tool prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from benchmarks.machine import Machine

from .common import logits

PLAIN = "plain pass"


def main() -> None:
    tool, folder = import_module(f"{__package__}.{sys.argv[1]}"), sys.argv[2]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    loaded: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if loaded is None:
                loaded = tool.load(folder)
            answer = answered(tool, loaded, **request)
        except Exception as error:  # a tool may raise anything
            answer = {"error": said(error)}
        print(json.dumps(answer), file=answers, flush=True)


def said(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def answered(tool: ModuleType, loaded: Any, do: str, method: str, ids: Sequence[int], target: int) -> dict[str, Any]:
    """What a request asks for: ``time``, ``scores``, or ``check``, which also measures memory and the numbers explained."""

    def run() -> Any:
        return plain(loaded.model, ids) if method == PLAIN else tool.scores(loaded, method, ids, target)

    if do == "time":
        return timed(run)
    if do == "scores":
        return {"scores": run().double().tolist()}
    kept: list[Any] = []
    _trim()
    seconds: dict[str, float] = {}
    peak = Machine("cpu").peak_bytes(lambda: seconds.update(timed(lambda: kept.append(run()))))
    environment, logit = Machine("cpu").describe(), float(logits(loaded.model, ids)[target])
    answer = {"peak_bytes": peak, **seconds, "environment": environment, "logit": logit}
    if method == PLAIN:
        return answer
    scores = kept[0].double()
    if scores.ndim != 1 or len(scores) < len(ids):
        raise ValueError(
            f"{method} gave scores of shape {tuple(scores.shape)}, expected one for each of {len(ids)} tokens"
        )
    if not bool(scores.isfinite().all()):
        raise ValueError(f"{method} gave scores that are not finite")
    return {**answer, "scores": scores.tolist(), "explained": tool.explained(loaded, method, ids, target)}


def timed(run: Any) -> dict[str, float]:
    """Wall-clock and processor seconds of one run."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}


@torch.no_grad()
def plain(model: Any, ids: Sequence[int]) -> Any:
    """The model's own pass."""
    return model(torch.tensor([list(ids)]), use_cache=False).logits


def _trim() -> None:
    """Give memory that earlier runs freed back to the system, so that it does not count as this run's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    main()
