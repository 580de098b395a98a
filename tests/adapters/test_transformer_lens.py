"""TransformerLens: the model behind a bridge, against the model that the bridge was booted from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import tokens
import torch
from transformers import AutoTokenizer

from depass import DePass, Heads, ModelError, OptionError, TopK

transformer_lens = pytest.importorskip(
    "transformer_lens", reason="TransformerLens is not installed in this environment (make adapters)"
)
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402

from depass.compat.transformer_lens import from_bridge  # noqa: E402

IDS = models.prompt(9)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "gpt2", "gpt-neox"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One out of a folder: a bridge reads it anew."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens.make().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def booted(tokenizer: Any) -> Callable[[str], tuple[Any, Any]]:
    """By name: a model of HuggingFace, and a bridge around a copy of it."""

    def boot(name: str) -> tuple[Any, Any]:
        model = models.make(name)
        theirs = copy.deepcopy(model)
        theirs.config.architectures = [type(model).__name__]
        return model, TransformerBridge.boot_transformers(name, hf_model=theirs, tokenizer=tokenizer, device="cpu")

    return boot


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_attribution_of_the_model(name: str, booted: Any) -> None:
    model, bridge = booted(name)
    before = bridge(torch.tensor([IDS]))
    res, own = from_bridge(bridge).attribute(IDS, TopK(3)), DePass(model, tokens.make()).attribute(IDS, TopK(3))
    assert [target.token_ids for target in res.targets] == [target.token_ids for target in own.targets]
    assert not res.scores[
        :, : -own.scores.shape[1]
    ].any()  # a bridge gives modules biases of zero, which have a source then
    torch.testing.assert_close(res.scores[:, -own.scores.shape[1] :], own.scores, rtol=1e-5, atol=1e-5)
    ids = [target.token_ids[0] for target in res.targets]
    sums = res.scores.sum(1)
    if name == "gemma2":  # its head caps them
        sums = 5 * torch.tanh(sums / 5)
    torch.testing.assert_close(sums, before[0, -1, ids], rtol=1e-4, atol=1e-4)
    assert bridge(torch.tensor([IDS])).equal(before)  # the bridge is what it was


def test_patterns_are_the_bridges(booted: Any) -> None:
    _, bridge = booted("llama")
    dp = from_bridge(bridge)
    _, cache = bridge.run_with_cache(torch.tensor([IDS]))
    from depass.models.capture import Capture

    class Patterns(Capture):
        def layer(self, index: int, trace: Any) -> None:
            kept.append(trace.mixers[0].pattern[0].clone())

    kept: list[torch.Tensor] = []
    Patterns(dp.bound, [IDS], range(models.LAYERS)).run()
    for layer, pattern in enumerate(kept):
        torch.testing.assert_close(pattern, cache[f"blocks.{layer}.attn.hook_pattern"][0], rtol=1e-5, atol=1e-6)


def test_weights_are_shared(booted: Any) -> None:
    _, bridge = booted("gpt2")
    dp = from_bridge(bridge)
    theirs = {parameter.data_ptr() for parameter in bridge.original_model.parameters()}
    assert {parameter.data_ptr() for parameter in dp.model.parameters()} <= theirs
    assert dp.attribute(IDS, sources=Heads(1)).conservation_error.max() < 1e-5


def test_the_tokenizer_is_the_bridges(booted: Any) -> None:
    _, bridge = booted("llama")
    res = from_bridge(bridge).attribute("the cat", 5)
    assert res.prompt.text == "the cat"
    assert from_bridge(bridge, tokenizer=None).tokenizer is None


def test_what_cannot_be_done_is_refused_by_name(booted: Any) -> None:
    model, bridge = booted("llama")
    with pytest.raises(ModelError, match="expected a TransformerBridge, got LlamaForCausalLM"):
        from_bridge(model)
    with pytest.raises(OptionError, match="unknown rule"):
        from_bridge(bridge, rule="mean")
    bridge.add_hook("blocks.1.mlp.hook_out", lambda tensor, hook: tensor * 0)
    with pytest.raises(ModelError, match=r"the bridge has hooks \(blocks.1.mlp.hook_out, "):
        from_bridge(bridge)
    bridge.reset_hooks()
    from_bridge(bridge)
    bridge.enable_compatibility_mode()
    with pytest.raises(ModelError, match="compatibility mode, which rewrites"):
        from_bridge(bridge)


def test_a_bridge_that_computes_something_else_is_refused(booted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, bridge = booted("gpt2")
    own = TransformerBridge.forward
    monkeypatch.setattr(TransformerBridge, "forward", lambda *given, **named: 1.01 * own(*given, **named))
    with pytest.raises(ModelError, match="the bridge's logits differ from its model's"):
        from_bridge(bridge)


def test_a_result_becomes_a_figure_of_circuitsvis() -> None:
    pytest.importorskip("circuitsvis", reason="CircuitsVis is not installed in this environment (make adapters)")
    res = DePass(models.make("llama"), tokens.make()).attribute("the cat sat", TopK(2))
    figure = res.to_circuitsvis()
    for score in res.scores.flatten().tolist():
        assert f"{score:.4f}"[:-1] in figure.local_src
    assert "ColoredTokensMulti" in figure.local_src
