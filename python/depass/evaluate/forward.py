"""The model's own next-token predictions of many prompts, several in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..api import DePass
from ..errors import NonFiniteError
from ..models import capture, packing
from ..models.health import blame

_TOKENS, _PROMPTS = 4096, 256  # of one pass; each prompt takes a row of vocab_size logits


@torch.no_grad()
def next_tokens(
    dp: DePass,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[int],
    factors: Callable[[int], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The model's probability of one answer to each prompt, and its most likely next token.

    Prompts are sorted by length and padded on the right, which causal attention does not see. The head reads only the
    last position of each prompt.

    Args:
        dp: the model.
        prompts: the ids of ``B`` prompts.
        answers: ``[B]`` ids.
        factors: takes a prompt's index; returns what its token embeddings are multiplied by, ``[N, D]`` or ``[N, 1]``.
            None: nothing.

    Returns:
        ``[B]`` fp32 probabilities of the answers as the next token, and ``[B]`` ids of the most likely next tokens.
    """
    probabilities, tops = torch.empty(len(prompts)), torch.empty(len(prompts), dtype=torch.long)
    for batch in batches(dp, prompts):
        changed = None if factors is None else [factors(i) for i in batch]
        logits = _logits(dp, [prompts[i] for i in batch], changed)  # [b, V]
        answer_ids = torch.tensor([answers[i] for i in batch], device=logits.device)
        log_probabilities = logits.gather(1, answer_ids[:, None])[:, 0] - logits.logsumexp(1)
        probabilities[batch], tops[batch] = log_probabilities.exp().cpu(), logits.argmax(1).cpu()
    return probabilities, tops


@torch.no_grad()
def continuations(
    dp: DePass, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """The model's log-probability of an answer of several tokens to each prompt, and its most likely next token.

    Args:
        dp: the model.
        prompts: the ids of ``B`` prompts.
        answers: the ids of ``B`` answers.

    Returns:
        ``[B]`` fp32 mean log-probabilities of the answers' tokens, and ``[B]`` ids of the most likely next tokens.
    """
    means, tops = torch.empty(len(prompts)), torch.empty(len(prompts), dtype=torch.long)
    for i, logits in _at_answers(dp, prompts, answers):
        answer_ids = torch.tensor(answers[i], device=logits.device)
        means[i] = logits.log_softmax(1).gather(1, answer_ids[:, None]).mean().cpu()
        tops[i] = logits[0].argmax().cpu()
    return means, tops


@torch.no_grad()
def greedy(dp: DePass, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[bool]:
    """Whether greedy generation after each prompt begins with its answer, from one pass over both.

    Args:
        dp: the model.
        prompts: the ids of ``B`` prompts.
        answers: the ids of ``B`` answers.

    Raises:
        NonFiniteError: a logit is not finite.
    """
    begins = [False] * len(prompts)
    for i, logits in _at_answers(dp, prompts, answers):
        if not bool(logits.isfinite().all()):
            raise NonFiniteError(f"a logit after a prompt is not finite; {blame(dp.bound)}")
        begins[i] = logits.argmax(1).tolist() == list(answers[i])
    return begins


def _at_answers(
    dp: DePass, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Tensor]]:
    """Each prompt's index, and the fp32 logits ``[answer, V]`` at the positions that predict its answer."""
    whole = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    for batch in batches(dp, whole):
        stream = _stream(dp, [whole[i] for i in batch])
        for row, i in enumerate(batch):
            yield i, _head(dp, stream[row, len(prompts[i]) - 1 : len(whole[i])])


def batches(dp: DePass, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Batches of the prompts' indices, prompts of similar length together."""
    return capture.batches(dp.bound, [len(ids) for ids in prompts], _TOKENS, prompts=_PROMPTS)


def _logits(dp: DePass, prompts: Sequence[Sequence[int]], factors: Sequence[Tensor] | None = None) -> Tensor:
    """The last positions' fp32 logits ``[B, V]``."""
    stream = _stream(dp, prompts, factors)
    last = torch.tensor([len(ids) - 1 for ids in prompts], device=stream.device)
    return _head(dp, stream[torch.arange(len(prompts), device=stream.device), last])


def _stream(dp: DePass, prompts: Sequence[Sequence[int]], factors: Sequence[Tensor] | None = None) -> Tensor:
    """The residual stream ``[B, T, D]`` after the final norm."""
    ids = packing.padded(prompts).to(dp.bound.input_device)
    if factors is None:
        return capture.normed(dp.bound, input_ids=ids)
    embedded = dp.bound.model.get_input_embeddings()(ids)  # [B, T, D]
    width = max(factor.shape[1] for factor in factors)
    by = [nn.functional.pad(factor.expand(-1, width), (0, 0, 0, ids.shape[1] - len(factor))) for factor in factors]
    return capture.normed_at(dp.bound, prompts, embedded * torch.stack(by).to(embedded))


def _head(dp: DePass, stream: Tensor) -> Tensor:
    """fp32 logits ``[..., V]``, soft-capped if the model does so."""
    return dp.bound.capped(dp.bound.logits(stream).float())
