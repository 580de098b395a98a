"""The model's own next-token predictions of many prompts, several in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..api import DePass
from ..models import capture

_TOKENS, _PROMPTS = 4096, 256  # of one pass; every prompt has a row of the whole vocabulary


@torch.no_grad()
def next_tokens(dp: DePass, prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the model thinks of one answer to each prompt.

    Prompts are sorted by length and padded on the right, where causal attention does not see it; the head reads the last
    position of each alone.

    Args:
        dp: whose model.
        prompts: ``B`` prompts' ids.
        answers: ``[B]`` ids.

    Returns:
        ``[B]`` fp32 probabilities of the answers as the next token, and ``[B]`` the most likely next tokens' ids.
    """
    probabilities, tops = torch.empty(len(prompts)), torch.empty(len(prompts), dtype=torch.long)
    for batch in batches(prompts):
        logits = _logits(dp, [prompts[i] for i in batch])  # [b, V]
        asked = torch.tensor([answers[i] for i in batch], device=logits.device)
        chosen = logits.gather(1, asked[:, None])[:, 0] - logits.logsumexp(1)
        probabilities[batch], tops[batch] = chosen.exp().cpu(), logits.argmax(1).cpu()
    return probabilities, tops


@torch.no_grad()
def continuations(
    dp: DePass, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """What the model thinks of answers of several tokens.

    Args:
        dp: whose model.
        prompts: ``B`` prompts' ids.
        answers: ``B`` answers' ids.

    Returns:
        ``[B]`` fp32 mean log-probabilities of an answer's tokens, and ``[B]`` the most likely next tokens' ids.
    """
    found, tops = torch.empty(len(prompts)), torch.empty(len(prompts), dtype=torch.long)
    whole = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    for batch in batches(whole):
        stream = _stream(dp, [whole[i] for i in batch])
        for row, i in enumerate(batch):
            logits = _head(dp, stream[row, len(prompts[i]) - 1 : len(whole[i])])  # [answer, V]
            asked = torch.tensor(answers[i], device=logits.device)
            found[i] = logits.log_softmax(1).gather(1, asked[:, None]).mean().cpu()
            tops[i] = logits[0].argmax().cpu()
    return found, tops


def batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The indices of prompts that go together in one pass, those of like length with each other."""
    return capture.batches([len(ids) for ids in prompts], _TOKENS, prompts=_PROMPTS)


def _logits(dp: DePass, prompts: Sequence[Sequence[int]]) -> Tensor:
    """``[B, V]`` fp32 of the last positions."""
    stream = _stream(dp, prompts)
    last = torch.tensor([len(ids) - 1 for ids in prompts], device=stream.device)
    return _head(dp, stream[torch.arange(len(prompts), device=stream.device), last])


def _stream(dp: DePass, prompts: Sequence[Sequence[int]]) -> Tensor:
    """``[B, T, D]`` after the final norm."""
    return capture.normed(dp.bound, input_ids=capture.padded(prompts).to(dp.bound.input_device))


def _head(dp: DePass, stream: Tensor) -> Tensor:
    """fp32 logits ``[..., V]``, soft-capped where the model does it."""
    logits = dp.bound.logits(stream).float()
    cap = getattr(dp.bound.model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
