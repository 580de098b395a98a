"""A model under attribution behaves as ever for other threads, and they change nothing of an attribution."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch

from depass import DePass, masking
from depass.models import attention, capture

SECONDS = float(os.environ.get("DEPASS_TEST_SECONDS", "4"))


@pytest.fixture(autouse=True)
def threads_switch_often() -> Iterator[None]:
    before, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-4)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(before)
    torch.set_num_threads(threads)


def at_once(*works: Callable[[], None], seconds: float = SECONDS) -> list[int]:
    """Each work again and again in a thread of its own; how often each ran. What one raises is raised here."""
    end, failed, counts = time.monotonic() + seconds, list[BaseException](), [0] * len(works)

    def again(index: int) -> None:
        try:
            while time.monotonic() < end and not failed:
                works[index]()
                counts[index] += 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=again, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return counts


def equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt-neox"])
def test_attributions_and_plain_runs_of_one_model_in_four_threads(name: str, implementation: str) -> None:
    model = models.make(name, torch.float32)
    model.set_attn_implementation(implementation)
    dp, ids = DePass(model), [models.prompt(9, seed) for seed in range(3)]
    batch = torch.tensor([ids[0], ids[1]])
    padding = torch.ones_like(batch)
    padding[0, :3] = 0  # padded on the left: a mask that no implementation leaves out
    with torch.no_grad():
        plain, masked = model(batch).logits, model(batch, attention_mask=padding).logits
    expected = [dp.attribute(one, 5).scores for one in ids]
    heads = dp.sweep("heads", ids[2], 5).scores

    def runs() -> None:
        with torch.no_grad():
            equal(model(batch).logits, plain)
            equal(model(batch, attention_mask=padding).logits[:, 3:], masked[:, 3:])

    def attributes() -> None:
        for got, scores in zip(dp.attribute_many(ids, 5), expected, strict=True):
            equal(got.scores, scores)

    counts = at_once(
        runs, runs, attributes, lambda: equal(dp.sweep("heads", ids[2], 5).scores, heads), seconds=SECONDS / 4
    )
    assert min(counts) > 0
    assert model.config._attn_implementation == implementation


def test_a_training_loop_beside_attributions_has_its_own_gradients() -> None:
    model = models.make("llama", torch.float32)
    dp, ids, batch = DePass(model), models.prompt(9), torch.tensor([models.prompt(9, 1)])

    def gradients() -> list[torch.Tensor]:
        loss = model(batch, labels=batch).loss
        return list(torch.autograd.grad(loss, [layer.mlp.down_proj.weight for layer in model.model.layers]))

    expected, scores = gradients(), dp.attribute(ids, 5).scores

    def trains() -> None:
        for got, wanted in zip(gradients(), expected, strict=True):
            equal(got, wanted)

    assert min(at_once(trains, lambda: equal(dp.attribute(ids, 5).scores, scores))) > 0


def test_masks_are_this_threads_alone() -> None:
    model = models.make("llama", torch.float32)
    dp, batch = DePass(model), torch.tensor([models.prompt(9)])
    other = {1: [2]}
    with torch.no_grad():
        plain = model(batch).logits
        with masking.heads(dp, {0: [1]}):
            masked = model(batch).logits
        with masking.heads(dp, other):
            scores = dp.attribute(batch[0].tolist(), 5).scores

    def runs() -> None:
        with torch.no_grad():
            equal(model(batch).logits, plain)

    def masks() -> None:
        with torch.no_grad(), masking.heads(dp, {0: [1]}):
            equal(model(batch).logits, masked)

    def attributes() -> None:
        with masking.heads(dp, other):
            equal(dp.attribute(batch[0].tolist(), 5).scores, scores)

    assert min(at_once(runs, masks, attributes)) > 0
    assert not capture.masked_heads


def test_hooks_are_seen_by_no_run_of_another_thread() -> None:
    """In the middle of a pass, at every layer, another thread runs the model."""
    model = models.make("llama", torch.float32)
    dp, batch = DePass(model), torch.tensor([models.prompt(6, 1)])
    with torch.no_grad():
        plain = model(batch).logits
    got: list[torch.Tensor] = []

    def run() -> None:
        with torch.no_grad():
            got.append(model(batch).logits)

    def in_the_middle(done: int, of: int) -> None:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    expected = dp.attribute(models.prompt(9), 5).scores
    equal(dp.attribute(models.prompt(9), 5, progress=in_the_middle).scores, expected)
    assert len(got) == models.LAYERS
    for logits in got:
        equal(logits, plain)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2", "gpt-neox"])
def test_no_mask_is_taken_for_a_causal_one(name: str) -> None:
    """An implementation that is swapped within a run gets the mask that was made for the one before."""
    model: Any = models.make(name, torch.float32)
    model.set_attn_implementation("sdpa")
    batch = torch.tensor([models.prompt(3)])  # within every sliding window
    DePass(model)
    with torch.no_grad():
        plain = model(batch).logits
        model.config._attn_implementation = attention.ATTENTION
        layer = next(module for module in model.modules() if hasattr(module, "is_causal"))
        try:
            query = torch.randn(1, 2, 5, 8)
            mask = attention._causal(layer, query, query)
            assert mask is not None
            assert torch.equal(mask[0, 0] == 0, torch.ones(5, 5, dtype=torch.bool).tril())
            assert attention._causal(layer, query[:, :, :1], query) is None  # one query sees every key
            equal(model(batch).logits, plain)
        finally:
            model.config._attn_implementation = "sdpa"
