"""interpreto: DePass as its explainer, against DePass itself and the model's logits."""

from __future__ import annotations

from typing import Any

import models
import pytest
import tokens
import torch

from depass import DePass, ModelError, OptionError, PromptError, Token

interpreto = pytest.importorskip("interpreto", reason="interpreto is not installed in this environment (make adapters)")
adapter = pytest.importorskip("depass.compat.interpreto")

PROMPT, TARGET = "the cat", " sat the cat"


def explained(name: str, **options: Any) -> tuple[Any, Any, Any]:
    """The explainer, interpreto's output, and our own result on the same ids."""
    explainer = adapter.DePassExplainer(models.make(name), tokens.make(), **options)
    (found,) = explainer(PROMPT, TARGET)
    tokenizer = explainer.tokenizer
    ids, new = tokenizer.encode(PROMPT), tokenizer.encode(TARGET)
    targets = [Token(token, len(ids) - 1 + i) for i, token in enumerate(new)]
    res = DePass(explainer.dp.model, tokenizer).attribute([*ids, *new[:-1]], targets)
    return explainer, found, res


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_tokens_are_depasss_and_add_up_to_the_logits(name: str) -> None:
    explainer, found, res = explained(name)
    count, length = len(res.targets), len(res.prompt.ids)
    assert found.attributions.shape == (count, length + 1)
    first = res.scores.shape[1] - length
    for row in range(count):
        before = length - count + 1 + row
        assert found.attributions[row, :before].equal(res.scores[row, first : first + before])
        assert found.attributions[row, before:].isnan().all()
    with torch.no_grad():
        whole = torch.tensor([[*res.prompt.ids]])
        logits = explainer.dp.model(whole).logits[0, length - count :].gather(1, found.targets[:, None])[:, 0]
    bias = res.scores[:, :first].sum(1)
    torch.testing.assert_close(found.attributions.nansum(1) + bias, logits, rtol=1e-5, atol=1e-4)
    assert explainer.results[0].scores.equal(res.scores)
    assert "".join(found.elements) == PROMPT + TARGET


def test_words_are_sums_of_tokens() -> None:
    prompt, target = "the cat bat", " Dr sat"
    made = {}
    for granularity in (interpreto.Granularity.ALL_TOKENS, interpreto.Granularity.WORD):
        explainer = adapter.DePassExplainer(models.make("llama"), tokens.make(), granularity=granularity)
        (made[granularity],) = explainer(prompt, target)
    fine, found = made[interpreto.Granularity.ALL_TOKENS], made[interpreto.Granularity.WORD]
    assert [word.strip() for word in found.elements] == ["the", "cat", "bat", "Dr", "sat"]
    assert found.attributions.shape == (2, 5)
    assert "".join(fine.elements) == prompt + target
    ends = [len("".join(fine.elements[: i + 1])) for i in range(len(fine.elements))]  # in characters
    spans = ((0, 3), (3, 7), (7, 11), (11, 14), (14, 18))
    words = [[i for i, end in enumerate(ends) if a < end <= b] for a, b in spans]
    length = len(fine.elements) - fine.attributions.shape[0]
    for row, to in enumerate(words[3:]):
        for column, of in enumerate(words[:3]):
            block = fine.attributions[[i - length for i in to]][:, of]
            torch.testing.assert_close(found.attributions[row, column], block.sum())


def test_options_are_depasss() -> None:
    explainer, found, res = explained("llama", start_layer=1, rule="taylor")
    again = explainer.dp.attribute(list(res.prompt.ids), [Token(res.targets[0].token_ids[0], res.targets[0].position)],
                                   start_layer=1, rule="taylor")  # fmt: skip
    before = res.targets[0].position + 1
    assert found.attributions[0, :before].equal(again.scores[0, :before])


def test_several_inputs_are_explained_each() -> None:
    explainer = adapter.DePassExplainer(models.make("llama"), tokens.make())
    made = explainer([PROMPT, "sat"], [" sat", " the cat"])
    assert [one.attributions.shape[0] for one in made] == [len(res.targets) for res in explainer.results]
    (alone,) = explainer("sat", " the cat")
    torch.testing.assert_close(made[1].attributions, alone.attributions, equal_nan=True, rtol=0, atol=0)


def test_interpreto_draws_it() -> None:
    _, found, _ = explained("qwen2")
    interpreto.plot_attributions(found)


def test_what_cannot_be_done_is_refused_by_name() -> None:
    from interpreto.attributions import InferenceModes

    model, tokenizer = models.make("llama"), tokens.make()
    with pytest.raises(OptionError, match="inference_mode=SOFTMAX"):
        adapter.DePassExplainer(model, tokenizer, inference_mode=InferenceModes.SOFTMAX)
    with pytest.raises(OptionError, match=r"DePassExplainer\(sources=\.\.\.\)"):
        adapter.DePassExplainer(model, tokenizer, sources="word")
    with pytest.raises(ModelError, match="expected a HuggingFace causal language model"):
        adapter.DePassExplainer(torch.nn.Linear(2, 2), tokenizer)
    explainer = adapter.DePassExplainer(model, tokenizer)
    with pytest.raises(OptionError, match="targets are missing"):
        explainer(PROMPT)
    parts = torch.tensor(tokenizer.convert_tokens_to_ids(["Ġ", "t", "h", "e"]))  # together one token
    with pytest.raises(PromptError, match="which changes their ids"):
        explainer(PROMPT, parts)
