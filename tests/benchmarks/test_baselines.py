"""Every baseline that computes the same thing gives our scores; the others what they are defined as."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import make, prompt
from torch import Tensor, nn

from benchmarks.baselines import ablation, eager, gradients, naive
from depass import DePass, Heads, Spans

TOKEN = 7


@pytest.fixture(scope="module", params=["llama", "llama-tied-wide-heads"])
def model(request: pytest.FixtureRequest, device: str) -> Any:
    return make(request.param, device=device)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.tensor(prompt(9))


def assert_same(theirs: Tensor, ours: Tensor) -> None:
    # all in fp32 through three layers, whose softmax takes ten times the error of a pre-activation
    torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))


def tokens(model: Any, ids: Tensor) -> Tensor:
    return DePass(model, exclude_bos=True).attribute(ids, TOKEN).scores[0]


def heads(model: Any, ids: Tensor) -> Tensor:
    dp = DePass(model)
    return torch.stack([dp.attribute(ids, TOKEN, sources=Heads(layer)).scores[0] for layer in range(3)])


def test_naive_tokens(model: Any, ids: Tensor) -> None:
    assert_same(naive.token_scores(model, ids, TOKEN), tokens(model, ids))


def test_naive_heads_add_up_to_the_logit(model: Any, ids: Tensor) -> None:
    """Each score apart is another at position 0, where the published code changes a pre-activation."""
    logit = DePass(model).attribute(ids, TOKEN).target_logits[0]
    sums = torch.stack([naive.head_scores(model, ids, TOKEN, layer).sum() for layer in range(3)])
    torch.testing.assert_close(sums.cpu(), logit.expand(3), rtol=1e-3, atol=1e-3)


def test_eager_tokens(model: Any, ids: Tensor) -> None:
    assert_same(eager.Eager().token_scores(model, ids, TOKEN), tokens(model, ids))


def test_eager_heads(model: Any, ids: Tensor) -> None:
    assert_same(eager.Eager().head_scores(model, ids, TOKEN), heads(model, ids))


def test_eager_spans(model: Any, ids: Tensor) -> None:
    ranges = [(0, 2), (2, 7), (7, 9)]
    ours = DePass(model, exclude_bos=False).attribute(ids, TOKEN, sources=Spans(ranges)).scores[0]
    assert_same(eager.Eager().span_scores(model, ids, TOKEN, ranges), ours)


@pytest.mark.parametrize("asked", ["tokens", "heads"])
def test_compiled(asked: str, model: Any, ids: Tensor) -> None:
    """Captured whole and in place as for a real run; what then makes machine code of it is torch's to test."""
    baseline = eager.compiled(backend="aot_eager")
    if asked == "tokens":
        assert_same(baseline.token_scores(model, ids, TOKEN), tokens(model, ids))
    else:
        assert_same(baseline.head_scores(model, ids, TOKEN), heads(model, ids))


def test_ablation_is_the_slow_loop(model: Any, ids: Tensor) -> None:
    with torch.no_grad():
        whole = model(ids[None].to(model.device)).logits[0, -1, TOKEN]
        slow = []
        for i in range(len(ids)):
            without = torch.cat([ids[:i], ids[i + 1 :]]).to(model.device)
            slow.append(whole - model(without[None]).logits[0, -1, TOKEN])
    for batch in (1, 4, 100):
        torch.testing.assert_close(
            ablation.leave_one_out(model, ids, TOKEN, batch), torch.stack(slow), atol=1e-4, rtol=0
        )


def test_ablation_of_a_single_token_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="two or more, got 1"):
        ablation.leave_one_out(model, torch.tensor([5]), TOKEN, 4)


class Linear(nn.Module):
    """A causal model whose last logits are ``scale · W · Σ_t c_t e_t``, or that squared."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.embedding, self.head, self.power = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False), power
        self.device = torch.device("cpu")

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Any:
        weight = torch.arange(1.0, inputs_embeds.shape[1] + 1)[:, None]
        return SimpleNamespace(logits=(self.head((weight * inputs_embeds).sum(1, keepdim=True))) ** self.power)


def contributions(model: Linear, ids: Tensor) -> Tensor:
    """``[N]``, what each token adds to the linear logit."""
    weight = torch.arange(1.0, len(ids) + 1)
    return (weight * (model.embedding(ids) @ model.head.weight[TOKEN])).detach()


def test_gradients_of_a_linear_model_are_its_terms() -> None:
    model, ids = Linear(1), torch.tensor([3, 1, 4, 1])
    torch.testing.assert_close(gradients.input_x_gradient(model, ids, TOKEN), contributions(model, ids))
    for batch in (1, 3, 20):
        torch.testing.assert_close(
            gradients.integrated_gradients(model, ids, TOKEN, 20, batch), contributions(model, ids)
        )


def test_integrated_gradients_of_a_square_add_up_and_gradients_come_to_twice_as_much() -> None:
    model, ids = Linear(2), torch.tensor([3, 1, 4, 1])
    terms = contributions(model, ids)
    # the midpoint rule is exact for a gradient that grows linearly along the way
    torch.testing.assert_close(gradients.integrated_gradients(model, ids, TOKEN, 5, 2), terms * terms.sum())
    torch.testing.assert_close(gradients.input_x_gradient(model, ids, TOKEN), 2 * terms * terms.sum())
