"""Which part of the input made a language model say what it said: exact additive attribution by DePass.

    from depass import DePass

    dp = DePass.from_pretrained()
    res = dp.attribute("Catalonia belongs to the continent of", target=" Europe")
    res.show()
"""

from .api import DePass, States
from .errors import (
    ConservationError,
    ConservationWarning,
    DePassError,
    ModelError,
    NonFiniteError,
    OptionError,
    OutputError,
    PromptError,
    SourceError,
    TargetError,
)
from .families import FAMILIES, Family
from .prompt import Prompt
from .result import Attribution, Settings
from .sources import Source, Spans
from .targets import Contrast, Direction, Target, Token, TopK

__all__ = [
    "FAMILIES", "Attribution", "ConservationError", "ConservationWarning", "Contrast", "DePass", "DePassError",
    "Direction", "Family", "ModelError", "NonFiniteError", "OptionError", "OutputError", "Prompt", "PromptError",
    "Settings", "Source", "SourceError", "Spans", "States", "Target", "TargetError", "Token", "TopK",
]  # fmt: skip
