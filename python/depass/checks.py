"""Checks of what callers give, shared by everything that takes integers or lists of them."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from .errors import DePassError


def integer(name: str, value: Any, error: type[DePassError]) -> int:
    """An integer of any kind (Python's, numpy's, a tensor of one number), but no bool.

    Raises:
        DePassError: ``error``, where it is none.
    """
    try:
        found = operator.index(value)
    except (TypeError, ValueError):
        found = None
    if found is None or isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        raise error(f"{name} must be an integer, got {_short(value)}")
    return found


def integers(name: str, values: Any, error: type[DePassError]) -> list[int]:
    """A list of integers from any iterable of them.

    Raises:
        DePassError: ``error``, where it is none.
    """
    try:
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise TypeError
        listed = list(values)
    except TypeError:
        raise error(f"{name} must be a list of integers, got {_short(values)}") from None
    return [integer(f"each of {name}", value, error) for value in listed]


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{type(value).__name__} {shown[:50]}..."
