"""The variant of DePass that the paper on Dual Path Attribution measured (arXiv 2603.19742), to compare with its tables.

It differs from DePass, and its scores do not add up to the logit. On ten of the built-in facts (SmolLM2-135M-Instruct, fp32)
the conservation error is 0.22 to 0.55; that of DePass is at most 6e-7. The differences:

1. The softmax rule has temperature 1, where DePass has 0.1.
2. Tokens are decomposed in chunks of four elements. A chunk holds its own tokens, and one source with all other tokens of
   the prompt. Shares are normalised within a chunk, so every chunk is another decomposition.
3. The elements of a batch stand in one row, so a prompt's first chunk has what the chunk before has left. A prompt's scores
   depend on the prompts before it in its batch.
4. A source that is zero at a position, such as a later token, still gets a share of the MLP there.
5. Every source gets the whole bias of a projection, not a part of it.
6. Norms are frozen with an epsilon of 1e-7, whatever the model's own is.
7. Only the tokens of the context are scored; a special first token is not.

Their code runs in bf16; this one in the dtype of decomposed states. :class:`depass.DePass` is the method itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError, OptionError
from ..models.bound import BoundModel, Norm, Projection
from .published import _Freezing, _Frozen, _mlp_output, _refuse_other_families

CHUNK = 4  # elements of a chunk, as in the script that made their table
_EPSILON = 1e-7


@dataclass(frozen=True)
class TokenScores:
    """The scores of one prompt.

    Attributes:
        scores: ``[N]`` one for each token, 0 for tokens outside of the context.
        logit: the target's logit.
        conservation_error: ``|sum of the scores - logit|``, divided by the larger of ``|logit|`` and the sum of the scores'
            absolute values.
    """

    scores: Tensor
    logit: float
    conservation_error: float


@torch.no_grad()
def token_scores(
    bound: BoundModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[int],
    contexts: Sequence[range],
    chunk: int = CHUNK,
) -> list[TokenScores]:
    """Score the context of each prompt for its next token.

    Args:
        bound: the model: RMSNorm before attention and before the MLP, in sequence, as in Llama and Qwen2.
        prompts: the ids of the prompts of one batch, in order.
        targets: for each prompt the id of its next token.
        contexts: for each prompt the positions of its context.
        chunk: elements of a chunk, at least one.

    Raises:
        ModelError: the method cannot read this model family.
        NonFiniteError: a score is not finite; pre-activations above 88 overflow.
        OptionError: ``chunk`` is less than one.
    """
    if chunk < 1:
        raise OptionError(f"chunk must be an integer of at least 1, got {chunk}")
    refuse(bound)
    found, before = [], 0  # elements of the batch before this prompt
    for ids, target, context in zip(prompts, targets, contexts, strict=True):
        found.append(_scored(bound, ids, target, _chunks(context, chunk, before)))
        before += len(context)
    return found


def refuse(bound: BoundModel) -> None:
    """Refuse models that the method cannot read.

    Raises:
        ModelError: the model is of such a family.
    """
    _refuse_other_families(bound, "the DePass of Dual Path Attribution", "leave depass_dpa out")


def _chunks(context: range, chunk: int, before: int) -> list[range]:
    """The context's positions, cut where the batch's row of elements is cut."""
    first = -before % chunk or chunk
    begins = [0, *range(first, len(context), chunk)]
    ends = [*begins[1:], len(context)]
    return [context[begin:end] for begin, end in zip(begins, ends, strict=True) if begin < end]


def _scored(bound: BoundModel, ids: Sequence[int], target: int, chunks: Sequence[range]) -> TokenScores:
    run = _Freezing(bound, ids, range(len(bound.layers)), False, bound.state_dtype)
    run.run()
    frozen, last = run.layers_frozen, run.stream.to(bound.state_dtype)
    streams = [*(layer.stream for layer in frozen[1:]), last]
    scores = torch.zeros(len(ids), dtype=last.dtype)
    for chunk in chunks:
        state = _sources(frozen[0].stream, chunk)
        for layer, after in zip(frozen, streams, strict=True):
            state = _step(state.to(layer.stream.device), layer, after.to(layer.stream.device))
        normed = bound.final_norm.weighted(state[: len(chunk), -1].to(last) * _scale(last[-1]))
        logits = bound.logits(normed.to(bound.dtype))[:, target]
        scores[list(chunk)] = logits.to(scores)
    logit = float(bound.logits(run.normed[-1:].to(bound.dtype))[0, target])
    if not bool(scores.isfinite().all()):
        raise NonFiniteError("a score by depass_dpa is not finite: pre-activations overflow the exponential function")
    scale = max(abs(logit), float(scores.abs().sum()))
    missed = abs(float(scores.sum()) - logit)
    return TokenScores(scores.float(), logit, missed / scale if scale else 0.0)


def _sources(stream: Tensor, chunk: range) -> Tensor:
    """``[M, N, D]``: each token of the chunk, and all other tokens as the last source if there are some."""
    own = torch.zeros(len(chunk), *stream.shape).to(stream)
    own[range(len(chunk)), list(chunk)] = stream[list(chunk)]
    if len(chunk) == len(stream):
        return own
    return torch.cat([own, (stream - own.sum(0))[None]])


def _scale(stream: Tensor) -> Tensor:
    """``[..., 1]`` the factor of RMSNorm with their epsilon."""
    return torch.rsqrt(stream.square().mean(-1, keepdim=True) + _EPSILON)


def _step(state: Tensor, frozen: _Frozen, after: Tensor) -> Tensor:
    """The sources ``[M, N, D]`` after a layer; ``after`` ``[N, D]`` is the residual stream there."""
    layer, mixer, count = frozen.layer, frozen.mixer, len(state)
    values = _projected(_normed(state, frozen.stream, layer.attention_norm), mixer.value)  # [M, N, K·d]
    values = values.view(count, state.shape[1], -1, mixer.output.shape[1] // mixer.num_heads)
    values = values.repeat_interleave(mixer.num_heads // values.shape[2], dim=2)
    mixed = torch.einsum("hqk,mkhd->mqhd", frozen.pattern, values).flatten(2)
    state = state + _projected(mixed, mixer.output)
    _, middle = _mlp_output(frozen, after)
    gate = _projected(_normed(state, middle, layer.mlp_norm), layer.only_mlp.gate)  # [M, N, F]
    share = gate.exp()
    share = share / share.sum(0)
    return state + _projected(share * frozen.hidden, layer.only_mlp.down)


def _normed(state: Tensor, stream: Tensor, norm: Norm | None) -> Tensor:
    assert norm is not None  # families without it are refused
    return norm.weighted(state * _scale(stream))


def _projected(state: Tensor, projection: Projection) -> Tensor:
    """The whole projection, its bias included, of every source."""
    out = state @ projection.weight.to(state.dtype).T
    return out if projection.bias is None else out + projection.bias.to(out)
