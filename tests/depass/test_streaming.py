"""Weights that come to the device layer by layer change nothing but where they are, and all are back afterwards."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch

from depass import DePass, OptionError
from depass.device_memory import free_memory


def places(model: Any) -> list[int]:
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


NAMES = [name for name in ("llama", "llama-biased", "gemma2", "gpt2", "gpt-neox", "qwen2_moe", "gpt_oss", "deepseek_v3")
         if name in models.CONFIGS]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_streamed_results_are_the_same(name: str, device: str) -> None:
    model, ids = models.make(name), models.prompt(17)
    plain, streamed = DePass(models.make(name, device=device)), DePass(model, stream_to=device)
    before = places(model)
    for work in (
        lambda dp: dp.attribute(ids, 5).scores,
        lambda dp: dp.sweep("heads", ids, 5).scores,
        lambda dp: dp.states(ids, 2).dense(2),
        lambda dp: torch.cat([one.scores for one in dp.attribute_many([ids, ids[:5]], 5)], dim=1),
        lambda dp: dp.attribute(ids, 5, stop_layer=2).scores,
    ):
        assert torch.equal(work(streamed), work(plain))
        assert places(model) == before


def test_a_layer_s_weights_are_there_while_it_works(device: str) -> None:
    model, ids = models.make("llama"), models.prompt(9)
    layers = model.model.layers
    dp, before, moved = DePass(model, stream_to=device), [places(layer) for layer in layers], list[list[int]]()
    dp.states(
        ids, on_state=lambda *_: moved.append([i for i, layer in enumerate(layers) if places(layer) != before[i]])
    )
    assert moved == [[layer] for layer in range(models.LAYERS)] + [[]]


def test_an_error_leaves_the_weights_where_they_were(device: str) -> None:
    model, ids = models.make("llama"), models.prompt(9)
    dp, before = DePass(model, stream_to=device), places(model)

    def fails(layer: int, *_: Any) -> None:
        if layer == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        dp.states(ids, on_state=fails)
    assert places(model) == before
    assert dp.attribute(ids, 5).conservation_error.max() < 1e-5


def test_what_is_free_on_a_gpu_is_asked_of_one_with_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[torch.device]()

    def answer(value: Any) -> Any:
        return lambda device: asked.append(device) or value

    for name, value in (("mem_get_info", (50, 100)), ("memory_reserved", 30), ("memory_allocated", 10),
                        ("get_per_process_memory_fraction", 0.6)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, answer(value))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert free_memory(torch.device("cuda")) == 30 + 20  # what its cap leaves, and what torch keeps
    assert set(asked) == {torch.device("cuda", 1)}


def test_the_plan_counts_two_layers() -> None:
    model = models.make("llama")
    whole = DePass(model).plan(9, measure=False).weights_bytes
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers]
    streamed = DePass(model, stream_to="cpu").plan(9, measure=False).weights_bytes
    assert whole - streamed == layers[0] * (len(layers) - 2)


@pytest.mark.parametrize("given", ["tpu", "cuda:99", 1.5, "meta"])
def test_a_device_that_there_is_not(given: Any) -> None:
    with pytest.raises(OptionError, match="is not a CPU or CUDA device of this machine"):
        DePass(models.make("llama"), stream_to=given)
