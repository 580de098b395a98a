"""Which part of the input made a language model say what it said: exact additive attribution by DePass.

from depass import DePass

dp = DePass.from_pretrained()
res = dp.attribute("Catalonia belongs to the continent of", target=" Europe")
res.show()
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import DePass
    from .engine.plan import Plan
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
    from .inputs.prompt import Prompt
    from .inputs.settings import Settings
    from .inputs.targets import Contrast, Direction, Target, Token, TopK
    from .models.families import FAMILIES, Family
    from .results.attribution import Attribution
    from .results.generation import Generation
    from .results.states import States
    from .results.sweep import Sweep
    from .sources.components import Heads, Modules, Neurons
    from .sources.source import Source
    from .sources.spans import Spans
    from .sources.subspaces import Custom, Subspace

# Loaded when first used: torch and transformers take seconds, and `depass --help` should not.
_MODULES = {
    "api": ("DePass",),
    "results.states": ("States",),
    "sources.components": ("Heads", "Modules", "Neurons"),
    "sources.subspaces": ("Custom", "Subspace"),
    "errors": (
        "ConservationError", "ConservationWarning", "DataError", "DePassError", "MemoryLimitError",
        "MemoryLimitWarning", "ModelError", "NonFiniteError", "OptionError", "OutputError", "PromptError",
        "PublishedDifferenceWarning", "SourceError", "TargetError", "WorkerError",
    ),
    "models.families": ("FAMILIES", "Family"),
    "results.generation": ("Generation",),
    "engine.plan": ("Plan",),
    "inputs.prompt": ("Prompt",),
    "results.attribution": ("Attribution",),
    "inputs.settings": ("Settings",),
    "sources.source": ("Source",),
    "sources.spans": ("Spans",),
    "results.sweep": ("Sweep",),
    "inputs.targets": ("Contrast", "Direction", "Target", "Token", "TopK"),
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
