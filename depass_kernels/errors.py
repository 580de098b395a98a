"""The errors of this package."""


class KernelError(ValueError):
    """Base class: an op cannot take a tensor, an option or a backend."""


class LayoutError(KernelError):
    """The sources or positions do not form a staircase."""


class BackendError(KernelError):
    """The named backend is unknown or cannot run the call; the message says why."""
