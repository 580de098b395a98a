"""Checks of integers, lists of integers and byte sizes that callers pass."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from .errors import DePassError, OptionError

UNITS = {"": 1, **{unit: 1000**power for power, unit in enumerate("KMGT", 1)}}  # bytes by unit prefix
UNITS |= {f"{unit}I": 1024**power for power, unit in enumerate("KMGT", 1)}
Of = Literal["logit", "logprob", "contrast"]  # what is explained of a token
OF: tuple[Of, ...] = get_args(Of)


def check_of(of: Any) -> Of:
    """What is explained of a token, checked.

    Raises:
        OptionError: it is unknown.
    """
    for known in OF:
        if isinstance(of, str) and of == known:
            return known
    raise OptionError(f"of must be one of: {', '.join(OF)}; got {of!r}")


def integer(name: str, value: Any, error: type[DePassError]) -> int:
    """Convert any kind of integer (Python, numpy, a one-element tensor) to ``int``; a bool is refused.

    Raises:
        DePassError: of class ``error``, where the value is not an integer.
    """
    try:
        number = operator.index(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        raise error(f"{name} must be an integer, got {_short(value)}")
    return number


def integers(name: str, values: Any, error: type[DePassError]) -> list[int]:
    """Convert any iterable of integers to a list of ``int``.

    Raises:
        DePassError: of class ``error``, where the value is not an iterable of integers.
    """
    try:
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise TypeError
        listed = list(values)
    except TypeError:
        raise error(f"{name} must be a list of integers, got {_short(values)}") from None
    return [integer(f"each of {name}", value, error) for value in listed]


def byte_count(text: str) -> int:
    """Parse a size in bytes: ``48GB`` is 48e9, ``48GiB`` is 48 * 2**30.

    Raises:
        OptionError: the text is not a positive number, with or without a unit of bytes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in UNITS:
        raise OptionError(f"{text!r} is not a size in bytes; write it as 48GB, 512MB or 48GiB")
    size = int(float(match[1]) * UNITS[match[2]])
    if size < 1:
        raise OptionError(f"a size must be at least 1 byte, got {text!r}")
    return size


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{type(value).__name__} {shown[:50]}..."


def listed(numbers: Sequence[int]) -> str:
    """Numbers in words: the first and the last where they follow one another."""
    first, last = numbers[0], numbers[-1]
    is_range = len(numbers) > 2 and list(numbers) == list(range(first, last + 1))
    return f"{first} to {last}" if is_range else ", ".join(map(str, numbers))
