"""What this package raises when it is given something it cannot work with."""


class KernelError(ValueError):
    """A tensor, option or backend that an op cannot take."""


class LayoutError(KernelError):
    """Sources or positions that do not form a staircase."""


class BackendError(KernelError):
    """A backend was asked for by name and cannot serve the call; the message says why."""
