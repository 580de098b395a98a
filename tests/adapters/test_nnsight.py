"""nnsight: the model that it wraps, against the same model without it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import tokens
import torch

from depass import DePass, ModelError, OptionError, TopK

nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed in this environment (make adapters)")
if not hasattr(nnsight, "TransformersModel"):  # interpreto brings an older one along
    pytest.skip("the nnsight of this environment is older than 0.8 (make adapters)", allow_module_level=True)

from depass.compat.nnsight import from_nnsight  # noqa: E402

IDS = models.prompt(9)


def wrapped(name: str) -> tuple[Any, Any]:
    """A model of HuggingFace, and nnsight around a copy of it."""
    model = models.make(name)
    return model, nnsight.TransformersModel(copy.deepcopy(model), tokenizer=tokens.make(), task="text-generation")


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "gpt-neox"])
def test_it_is_the_attribution_of_the_model(name: str) -> None:
    model, outer = wrapped(name)
    res, own = from_nnsight(outer).attribute(IDS, TopK(3)), DePass(model, tokens.make()).attribute(IDS, TopK(3))
    assert res.scores.equal(own.scores)
    assert res.target_logits.equal(own.target_logits)
    torch.testing.assert_close(res.scores.sum(1), res.target_logits, rtol=1e-5, atol=1e-4)


def test_the_scores_add_up_to_a_traces_logit_and_traces_still_work() -> None:
    _, outer = wrapped("llama")
    dp = from_nnsight(outer)

    def traced() -> torch.Tensor:
        with outer.trace(torch.tensor([IDS])):
            logits = outer.lm_head.output.save()
        return logits[0, -1].detach()

    before = traced()
    res = dp.attribute(IDS, TopK(2))
    ids = [target.token_ids[0] for target in res.targets]
    torch.testing.assert_close(res.scores.sum(1), before[ids], rtol=1e-5, atol=1e-4)
    assert traced().equal(before)


def test_weights_that_are_not_loaded_are_loaded(tmp_path: Path) -> None:
    model = models.make("llama")
    model.save_pretrained(tmp_path)
    outer = nnsight.TransformersModel(str(tmp_path), tokenizer=tokens.make(), task="text-generation")
    assert not outer.dispatched
    dp = from_nnsight(outer)
    assert outer.dispatched
    assert dp.attribute("the cat").prompt.text == "the cat"
    torch.testing.assert_close(dp.attribute(IDS).scores, DePass(model, tokens.make()).attribute(IDS).scores)


def test_a_plain_wrapper_has_no_tokenizer_and_needs_none() -> None:
    model = models.make("llama")
    res = from_nnsight(nnsight.NNsight(model)).attribute(IDS, 5)
    assert res.scores.equal(DePass(model).attribute(IDS, 5).scores)


def test_what_cannot_be_done_is_refused_by_name() -> None:
    model, outer = wrapped("llama")
    with pytest.raises(ModelError, match="expected a model of nnsight, got LlamaForCausalLM"):
        from_nnsight(model)
    with pytest.raises(ModelError, match="expected a HuggingFace causal language model, got Linear"):
        from_nnsight(nnsight.NNsight(torch.nn.Linear(2, 2)))
    with pytest.raises(OptionError, match="unknown rule"):
        from_nnsight(outer, rule="mean")
    with outer.edit(inplace=True):
        outer.model.layers[1].mlp.output = outer.model.layers[1].mlp.output * 0
    with pytest.raises(ModelError, match=r"the nnsight model has edits \("):
        from_nnsight(outer)
    outer.clear_edits()
    from_nnsight(outer)
