"""Which part of the input made a language model say what it said: exact additive attribution by DePass.

from depass import DePass

dp = DePass.from_pretrained()
res = dp.attribute("Catalonia belongs to the continent of", target=" Europe")
res.show()
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import DePass, States
    from .components import Custom, Heads, Modules, Neurons, Subspace
    from .errors import (
        ConservationError,
        ConservationWarning,
        DataError,
        DePassError,
        MemoryLimitError,
        MemoryLimitWarning,
        ModelError,
        NonFiniteError,
        OptionError,
        OutputError,
        PromptError,
        PublishedDifferenceWarning,
        SourceError,
        TargetError,
        WorkerError,
    )
    from .families import FAMILIES, Family
    from .generation import Generation
    from .plan import Plan
    from .prompt import Prompt
    from .result import Attribution, Settings
    from .sources import Source, Spans
    from .sweep import Sweep
    from .targets import Contrast, Direction, Target, Token, TopK

# Loaded when first used: torch and transformers take seconds, and `depass --help` should not.
_MODULES = {
    "api": ("DePass", "States"),
    "components": ("Custom", "Heads", "Modules", "Neurons", "Subspace"),
    "errors": (
        "ConservationError", "ConservationWarning", "DataError", "DePassError", "MemoryLimitError",
        "MemoryLimitWarning", "ModelError", "NonFiniteError", "OptionError", "OutputError", "PromptError",
        "PublishedDifferenceWarning", "SourceError", "TargetError", "WorkerError",
    ),
    "families": ("FAMILIES", "Family"),
    "generation": ("Generation",),
    "plan": ("Plan",),
    "prompt": ("Prompt",),
    "result": ("Attribution", "Settings"),
    "sources": ("Source", "Spans"),
    "sweep": ("Sweep",),
    "targets": ("Contrast", "Direction", "Target", "Token", "TopK"),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "FAMILIES", "Attribution", "ConservationError", "ConservationWarning", "Contrast", "Custom", "DataError",
    "DePass", "DePassError", "Direction", "Family", "Generation", "Heads", "MemoryLimitError", "MemoryLimitWarning",
    "ModelError", "Modules",
    "Neurons", "NonFiniteError", "OptionError", "OutputError", "Plan", "Prompt", "PromptError",
    "PublishedDifferenceWarning", "Settings", "Source", "SourceError", "Spans", "States", "Subspace", "Sweep",
    "Target", "TargetError", "Token", "TopK", "WorkerError",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
