"""Other attribution methods for tokens, heads and neurons. They return the same result types as DePass, so you can compare.

Their scores need not add up to the logit. So ``conservation_error`` is NaN, and for heads and neurons ``rest`` and ``bias``
are NaN as well; ``settings.method`` names the method. They explain the same number as DePass: the target's logit before any
soft-capping. Gradients are taken with respect to the token embeddings that enter the model, without learned positions.
"""

from .components import HEADS, NEURONS, heads, neurons
from .tokens import TOKENS, tokens

__all__ = ["HEADS", "NEURONS", "TOKENS", "heads", "neurons", "tokens"]
