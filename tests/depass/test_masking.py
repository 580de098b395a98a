"""A masked head or neuron writes nothing: the model is what it would be without its weights."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import Tensor

from depass import DePass, Heads, ModelError, Neurons, OptionError, masking
from depass.models.bind import bind

IDS = torch.tensor([models.prompt(7)])
# shared values, a branch behind the MLP, one sublayer a layer, and mixers side by side
OTHERS = [name for name in models.EVERY if name.startswith(("gemma4", "llama4", "nemotron_h", "falcon_h1"))]
FAMILIES = ["llama-biased", "llama-tied-wide-heads", "gemma2", "phi3", "olmo2", "gpt2", "gpt-neox"]


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(ids.to(model.device)).logits.cpu()
    return made


def without_columns(name: str, device: str, layer: int, columns: list[int]) -> Tensor:
    """The logits of a copy whose output projection has zeros in these columns."""
    model = models.make(name, torch.float64, device)
    projection = bind(model).layers[layer].mixers[0].output
    projection.weight.data[:, columns] = 0
    return logits(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_heads_are_heads_without_output_weights(name: str, device: str) -> None:
    model = models.make(name, torch.float64, device)
    d = bind(model).layers[1].mixers[0].output.weight.shape[1] // 4
    before = logits(model)
    with masking.heads(model, {1: [0, 3]}):
        masked = logits(model)
    removed = without_columns(name, device, 1, [*range(d), *range(3 * d, 4 * d)])
    assert torch.allclose(masked, removed, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(masked, before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", OTHERS)
def test_masked_heads_of_every_mixer_are_heads_without_output_weights_and_score_nothing(name: str, device: str) -> None:
    model, removed = (models.make(name, torch.float64, device) for _ in range(2))
    dp, ids = DePass(model, rule="taylor"), IDS[0].tolist()
    before = logits(model)
    layers = [(index, layer) for index, layer in enumerate(bind(removed).layers) if layer.mixers]
    for _, layer in layers:
        for mixer, _ in layer.heads:  # the first head of each mixer
            d = mixer.output.shape[1] // mixer.num_heads
            mixer.output.module.weight.data[:, :d] = 0  # with a factor, the projection's is a copy
    off = {index: [own.start for _, own in layer.heads] for index, layer in layers}
    with masking.heads(model, off):
        masked = logits(model)
        found = {index: dp.attribute(ids, 5, sources=Heads(index)) for index in off}
    limit = 2e-6 if name in models.NORMS_IN_FP32 or name in models.RECURRENT else 1e-12
    assert torch.allclose(masked, logits(removed), rtol=limit, atol=limit)
    assert not torch.allclose(masked, before)
    for index, result in found.items():
        assert result.conservation_error.max() < 5e-6  # recurrences compute in fp32
        heads = {source.index: scores for source, scores in zip(result.sources, result.scores[0], strict=True)
                 if source.kind == "head"}  # fmt: skip
        assert all(bool((heads[head] == 0).all()) == (head in off[index]) for head in heads)


@pytest.mark.parametrize("name", [name for name in OTHERS if name in ("gemma4", "falcon_h1")])
def test_masked_neurons_of_other_layers_score_nothing(name: str, device: str) -> None:
    dp, ids = DePass(models.make(name, torch.float64, device), rule="taylor"), IDS[0].tolist()
    with masking.neurons(dp, {1: [0, 7]}):
        found = dp.attribute(ids, 5, sources=Neurons(1, range(10)))
    neurons = {source.index: scores for source, scores in zip(found.sources, found.scores[0], strict=True)
               if source.kind == "neuron"}  # fmt: skip
    assert [index for index in range(10) if not neurons[index].any()] == [0, 7]


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_neurons_are_neurons_without_output_weights(name: str, device: str) -> None:
    model = models.make(name, torch.float64, device)
    before = logits(model)
    with masking.neurons(DePass(model), {0: [5], 2: iter([1, 55])}):  # type: ignore[dict-item]
        masked = logits(model)
    two = models.make(name, torch.float64, device)
    for layer, columns in ((0, [5]), (2, [1, 55])):
        bind(two).layers[layer].only_mlp.down.weight.data[:, columns] = 0
    assert torch.allclose(masked, logits(two), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(masked, before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_every_prompt_of_a_batch_may_have_a_mask_of_its_own(kind: str, device: str) -> None:
    model = models.make("llama", torch.float64, device)
    mask = getattr(masking, kind)
    off = torch.rand(3, models.LAYERS, 4 if kind == "heads" else 56, generator=torch.Generator().manual_seed(0)) < 0.3
    with mask(model, off):
        together = logits(model, IDS.expand(3, -1))
        with pytest.raises(OptionError, match="masked has 3 rows, but the batch has 2 prompts"):
            logits(model, IDS.expand(2, -1))
    for row in range(3):
        with mask(model, {layer: off[row, layer].nonzero()[:, 0].tolist() for layer in range(models.LAYERS)}):
            assert torch.allclose(logits(model)[0], together[row], rtol=1e-12, atol=1e-12)


def test_masks_end_also_where_something_fails(device: str) -> None:
    model = models.make("llama", device=device)
    before = logits(model)
    with pytest.raises(ZeroDivisionError), masking.heads(model, {0: [1]}), masking.neurons(model, {1: [2]}):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("masked", "message"),
    [
        ({3: [0]}, "layer 3 is out of range; .* has layers 0 to 2"),
        ({-1: [0]}, "layer -1 is out of range"),
        ({0: [4]}, "head 4 is out of range; a layer has heads 0 to 3"),
        ({0: 1}, r"masked\[0\] must be a list of integers, got 1"),
        ({"a": [0]}, "a layer of masked must be an integer, got 'a'"),
        ([0], "masked must be a dict from layers to heads, or a bool tensor, got list"),
        (torch.ones(1, 3, 4), r"masked must be a bool tensor \[prompts, 3, 4\]"),
        (torch.ones(1, 3, 5, dtype=torch.bool), r"of shape \[1, 3, 5\]"),
    ],
)
def test_what_the_model_does_not_have_is_refused(masked: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message), masking.heads(models.make("llama"), masked):
        pass


def test_no_model_is_refused() -> None:
    with pytest.raises(ModelError), masking.heads(torch.nn.Linear(2, 2), {0: [0]}):
        pass


@pytest.mark.parametrize("rule", ["softmax", "taylor"])
@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_attribution_under_a_mask_is_that_of_the_model_without_the_weights(
    name: str, kind: str, rule: str, device: str
) -> None:
    masked, removed = (models.make(name, torch.float64, device) for _ in range(2))
    layer = bind(removed).layers[1]
    projection = layer.mixers[0].output if kind == "heads" else layer.only_mlp.down
    d = projection.weight.shape[1] // 4 if kind == "heads" else 1
    projection.weight.data[:, [*range(d), *range(3 * d, 4 * d)]] = 0
    dp, ids = DePass(masked, rule=rule), IDS[0].tolist()
    expected = DePass(removed, rule=rule)
    context = getattr(masking, kind)
    with context(dp, {1: [0, 3]}):
        got, sweep = dp.attribute(ids, [5, 17]), dp.sweep("heads", ids, 5)
        twice = list(dp.attribute_many([ids, ids[:4]], 5))
    for result, wanted in (
        (got, expected.attribute(ids, [5, 17])), (sweep, expected.sweep("heads", ids, 5)),
        (twice[1], expected.attribute(ids[:4], 5)),
    ):  # fmt: skip
        assert result.conservation_error.max() < 1e-6
        torch.testing.assert_close(result.scores, wanted.scores, rtol=1e-6, atol=1e-7)
    without = dp.attribute(ids, [5, 17])
    assert not torch.allclose(without.scores, got.scores)


def test_prompts_of_a_batch_are_attributed_each_under_its_own_mask(device: str) -> None:
    dp = DePass(models.make("llama", torch.float64, device))
    prompts = [models.prompt(6, 0), models.prompt(6, 1)]
    off = torch.zeros(2, models.LAYERS, 4, dtype=torch.bool)
    off[0, 0, 1] = off[1, 1, 2] = True
    with masking.heads(dp, off):
        got = list(dp.attribute_many(prompts, 5))
    for index, (layer, head) in enumerate([(0, 1), (1, 2)]):
        with masking.heads(dp, {layer: [head]}):
            alone = dp.attribute(prompts[index], 5)
        torch.testing.assert_close(got[index].scores, alone.scores, rtol=1e-6, atol=1e-7)
        assert got[index].conservation_error.max() < 1e-6


def test_masks_within_masks_add_up(device: str) -> None:
    dp = DePass(models.make("llama", torch.float64, device))
    ids = IDS[0].tolist()
    with masking.heads(dp, {1: [0, 3]}):
        both = dp.attribute(ids, 5)
    with masking.heads(dp, {1: [0]}):
        with masking.heads(dp, {1: [3]}):
            torch.testing.assert_close(dp.attribute(ids, 5).scores, both.scores, rtol=1e-6, atol=1e-7)
        one = dp.attribute(ids, 5)
    assert one.conservation_error.max() < 1e-6
    assert not torch.allclose(one.scores, both.scores)
