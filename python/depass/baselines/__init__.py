"""Other attribution methods for tokens, heads, neurons and experts, with the result types of DePass.

Their scores need not add up to the logit. So ``conservation_error`` is NaN, and in sweeps ``rest`` and ``bias`` are NaN as
well; ``settings.method`` names the method. They explain the same number as DePass: the target's logit before any
soft-capping. Gradients are taken with respect to the token embeddings that enter the model, without learned positions.
"""

from .components import EXPERTS, HEADS, NEURONS, experts, heads, neurons
from .tokens import TOKENS, tokens

__all__ = ["EXPERTS", "HEADS", "NEURONS", "TOKENS", "experts", "heads", "neurons", "tokens"]
