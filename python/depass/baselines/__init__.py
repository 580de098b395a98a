"""Other attributions than DePass behind the same results, to compare with: of prompts' tokens, of heads, of neurons.

None of them promises scores that add up to the logit, so ``conservation_error`` (of heads and neurons ``rest`` and
``bias`` too) is NaN, and ``settings.method`` says which it was. What is explained is the same: the target's logit before any
soft-capping. Gradients are with respect to the token embeddings that enter the model (learned positions not included).
"""

from .components import HEADS, NEURONS, heads, neurons
from .tokens import TOKENS, tokens

__all__ = ["HEADS", "NEURONS", "TOKENS", "heads", "neurons", "tokens"]
