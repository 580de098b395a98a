"""Attribute a language model's output to the parts of its input with DePass; the scores add up to the logit.

from depass import DePass

dp = DePass.from_pretrained()
res = dp.attribute("Catalonia belongs to the continent of", target=" Europe")
res.show()
"""

from importlib import import_module
from typing import TYPE_CHECKING

# The exports are listed twice: type checkers need imports, and at run time a module is imported when a name is used.
if TYPE_CHECKING:
    from .api import DePass as DePass
    from .engine.plan import Plan as Plan
    from .errors import ConservationError as ConservationError
    from .errors import ConservationWarning as ConservationWarning
    from .errors import DataError as DataError
    from .errors import DePassError as DePassError
    from .errors import GenerationWarning as GenerationWarning
    from .errors import MemoryLimitError as MemoryLimitError
    from .errors import MemoryLimitWarning as MemoryLimitWarning
    from .errors import ModelError as ModelError
    from .errors import NonFiniteError as NonFiniteError
    from .errors import OptionError as OptionError
    from .errors import OutputError as OutputError
    from .errors import PromptError as PromptError
    from .errors import PromptWarning as PromptWarning
    from .errors import PublishedDifferenceWarning as PublishedDifferenceWarning
    from .errors import SourceError as SourceError
    from .errors import TargetError as TargetError
    from .errors import WorkerError as WorkerError
    from .inputs.prompt import Prompt as Prompt
    from .inputs.prompt import Section as Section
    from .inputs.settings import Settings as Settings
    from .inputs.targets import Contrast as Contrast
    from .inputs.targets import Direction as Direction
    from .inputs.targets import Target as Target
    from .inputs.targets import Token as Token
    from .inputs.targets import TopK as TopK
    from .models.families import FAMILIES as FAMILIES
    from .models.families import Family as Family
    from .results.attribution import Attribution as Attribution
    from .results.citations import Citation as Citation
    from .results.citations import Citations as Citations
    from .results.citations import Claim as Claim
    from .results.citations import Document as Document
    from .results.generation import Generation as Generation
    from .results.states import States as States
    from .results.survey import Survey as Survey
    from .results.sweep import Sweep as Sweep
    from .rules import Mixture as Mixture
    from .rules import PathWeights as PathWeights
    from .sources.components import Heads as Heads
    from .sources.components import Modules as Modules
    from .sources.components import Neurons as Neurons
    from .sources.components import RoutedExperts as RoutedExperts
    from .sources.source import Source as Source
    from .sources.spans import Sentences as Sentences
    from .sources.spans import Spans as Spans
    from .sources.subspaces import Custom as Custom
    from .sources.subspaces import Subspace as Subspace

# Loaded on first use: torch and transformers take seconds to import, and `depass --help` must not.
_MODULES = {
    "api": ("DePass",),
    "engine.plan": ("Plan",),
    "errors": (
        "ConservationError", "ConservationWarning", "DataError", "DePassError", "GenerationWarning",
        "MemoryLimitError", "MemoryLimitWarning", "ModelError", "NonFiniteError", "OptionError", "OutputError",
        "PromptError", "PromptWarning", "PublishedDifferenceWarning", "SourceError", "TargetError", "WorkerError",
    ),
    "inputs.prompt": ("Prompt", "Section"),
    "inputs.settings": ("Settings",),
    "inputs.targets": ("Contrast", "Direction", "Target", "Token", "TopK"),
    "models.families": ("FAMILIES", "Family"),
    "results.attribution": ("Attribution",),
    "results.citations": ("Citation", "Citations", "Claim", "Document"),
    "results.generation": ("Generation",),
    "results.states": ("States",),
    "results.survey": ("Survey",),
    "results.sweep": ("Sweep",),
    "rules": ("Mixture", "PathWeights"),
    "sources.components": ("Heads", "Modules", "Neurons", "RoutedExperts"),
    "sources.source": ("Source",),
    "sources.spans": ("Sentences", "Spans"),
    "sources.subspaces": ("Custom", "Subspace"),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = list(_HOME)

if not TYPE_CHECKING:  # type checkers would take any name for an export

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
