"""Adapters that give this package the interfaces of other tools. Import the module that you need by its name."""

from collections.abc import Iterable

from ..errors import OptionError

OPTIONS = ("start_layer", "stop_layer", "rule", "temperature", "exclude_bos", "strict")


def check_options(of: str, given: Iterable[str]) -> None:
    """Refuse options that :meth:`depass.DePass.attribute` does not have.

    Raises:
        OptionError: an unknown option.
    """
    for name in given:
        if name not in OPTIONS:
            raise OptionError(f"{of}({name}=...): there is no such option; choose from {', '.join(OPTIONS)}")
