"""The errors and warnings of DePass. Every message is one line: what was given, what was expected and what to do."""

from __future__ import annotations

import sys
import warnings


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, or the error's type where the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def escaped(text: str) -> str:
    """Escape unprintable characters, so that the name of a file or model cannot control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class DePassError(Exception):
    """Base class of the errors that this package raises."""

    def __str__(self) -> str:
        return escaped(super().__str__())


class PromptError(DePassError, ValueError):
    """The prompt is empty, too long, outside the vocabulary, or a batch instead of one prompt."""


class TargetError(DePassError, ValueError):
    """The target is not exactly one token, or its position is out of range."""


class SourceError(DePassError, ValueError):
    """The sources are unknown, overlap, or are outside the prompt."""


class OptionError(DePassError, ValueError):
    """An invalid option value: a rule, a temperature, a layer or a backend."""


class ModelError(DePassError, ValueError):
    """The model cannot be attributed: unknown family, no language-model head, training mode, or not found."""


class MemoryLimitError(DePassError, MemoryError):
    """The device has too little memory."""


class NonFiniteError(DePassError, ArithmeticError):
    """The model's logits, the decomposed state or the scores contain NaN or infinity."""


class ConservationError(DePassError, ArithmeticError):
    """The scores do not add up to the logit within tolerance; raised only with ``strict=True``."""


class ConservationWarning(UserWarning):
    """The scores do not add up to the logit within tolerance."""


class MemoryLimitWarning(UserWarning):
    """Memory ran out, and the run was repeated with smaller blocks."""


class PromptWarning(UserWarning):
    """A prompt's tokens are probably not those that were meant: a special token is there twice, or the tokenizer differs."""


class GenerationWarning(UserWarning):
    """Generated tokens are explained by other logits than those that they were generated with."""


class PublishedDifferenceWarning(UserWarning):
    """The results differ by design from those of the published implementation."""


class OutputError(DePassError, OSError):
    """A file cannot be written or read."""


class DataError(DePassError, ValueError):
    """A data set cannot be read, or an evaluation cannot resume from the rows in its directory."""


class WorkerError(DePassError, RuntimeError):
    """A cluster worker could not start, or died twice on the same rows."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line that called this package: the first frame outside of it and of torch's decorators."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("depass", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
