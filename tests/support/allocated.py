"""How much memory torch holds at a time, by its own profiler."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def allocated(work: Callable[[], object]) -> int:
    """The most bytes that torch held at a time on the CPU for what it did, besides what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    found: list[Any] = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    return max(itertools.accumulate(each.nbytes() for each in sorted(found, key=lambda each: each.start_ns())))
