"""What DePass raises when it is given something it cannot attribute. Every message is one line that says what to do."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def escaped(text: str) -> str:
    """Text with escapes for what is not printable: what a file or a model is called must not command a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class DePassError(Exception):
    """Base of every error that this package raises on purpose."""

    def __str__(self) -> str:
        return escaped(super().__str__())


class PromptError(DePassError, ValueError):
    """A prompt that is empty, too long, out of the vocabulary, or not one prompt."""


class TargetError(DePassError, ValueError):
    """A target that is not one token, or a position that the prompt does not have."""


class SourceError(DePassError, ValueError):
    """Spans that overlap or lie outside of the prompt, or sources that the prompt does not have."""


class OptionError(DePassError, ValueError):
    """An option with a value that it does not have: a rule, a temperature, a layer, a backend."""


class ModelError(DePassError, ValueError):
    """A model that cannot be attributed: unknown family, no language-model head, training mode, or not found."""


class MemoryLimitError(DePassError, MemoryError):
    """More rows than the device has memory for."""


class NonFiniteError(DePassError, ArithmeticError):
    """The model's logits, or the parts of its state, are not finite."""


class ConservationError(DePassError, ArithmeticError):
    """The parts do not add up to the logit within tolerance (raised when asked to be strict)."""


class ConservationWarning(UserWarning):
    """The parts do not add up to the logit within tolerance."""


class MemoryLimitWarning(UserWarning):
    """Memory ran out, and the work was done in smaller blocks."""


class PublishedDifferenceWarning(UserWarning):
    """Numbers that differ on purpose from those of the published implementation."""


class OutputError(DePassError, OSError):
    """A file that cannot be written or read."""


class DataError(DePassError, ValueError):
    """A data set that cannot be read, or rows that an evaluation cannot go on from."""


class WorkerError(DePassError, RuntimeError):
    """A worker of a cluster that could not start, or ended twice at the same rows."""
