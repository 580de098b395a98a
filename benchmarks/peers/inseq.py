"""inseq 0.7.1: integrated gradients and saliency of the target's logit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import common
from .common import Loaded, Method, logits, text_of

PINS = ("inseq==0.7.1", "transformers==5.24.0")
GRADIENTS, SALIENCY = "integrated gradients", "saliency"
STEPS, AT_ONCE = (
    50,
    2,
)  # inseq's default number of steps; points in a pass, since all at once need many GB for the logits
METHODS = {
    GRADIENTS: Method("the target's logit less the logit at inseq's baseline"),
    SALIENCY: Method("no number: the norm of the logit's gradient", same_as="gradient_norm"),
}
NAMES = {GRADIENTS: "integrated_gradients", SALIENCY: "saliency"}


def load(folder: str) -> Loaded:
    return common.load(folder)


def scores(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> Tensor:
    """One score a token: the gradients' sum over the embedding for integrated gradients, their norm for saliency."""
    import inseq

    text = text_of(loaded.tokenizer, ids)
    tool = loaded.wrapper(method, lambda: inseq.load_model(loaded.model, NAMES[method], tokenizer=loaded.tokenizer))
    options = {"n_steps": STEPS, "internal_batch_size": AT_ONCE} if method == GRADIENTS else {}
    result = tool.attribute(
        text, text + loaded.tokenizer.decode([target]), attributed_fn="logit", show_progress=False, **options
    )
    (sequence,) = result.sequence_attributions
    of_target = sequence.target_attributions[: len(ids), 0]  # [N, D]
    return of_target.sum(-1) if method == GRADIENTS else of_target.norm(dim=-1)


def explained(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> float | None:
    """For integrated gradients, inseq's baseline: the unknown token at every position, BOS's too, but not EOS's.

    A tokenizer without an unknown token has got one from inseq by the time that it has given scores.
    """
    if method == SALIENCY:
        return None
    tokenizer = loaded.tokenizer
    baseline = [token if token == tokenizer.eos_token_id else tokenizer.unk_token_id for token in ids]
    return float((logits(loaded.model, ids) - logits(loaded.model, baseline))[target])
