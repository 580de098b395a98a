"""Other tools' interfaces to this package, each a module of its own that is imported by name."""

from collections.abc import Iterable

from ..errors import OptionError

OPTIONS = ("start_layer", "stop_layer", "mlp_rule", "temperature", "exclude_bos", "strict")


def check_options(of: str, given: Iterable[str]) -> None:
    """Refuse what is no option of :meth:`depass.DePass.attribute` that another tool passes on.

    Raises:
        OptionError: the first of these.
    """
    for name in given:
        if name not in OPTIONS:
            raise OptionError(f"{of}({name}=...): there are {', '.join(OPTIONS)}")
