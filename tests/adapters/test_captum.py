"""captum: DePass as its method and behind its results for language models, against DePass itself and the model's logits."""

from __future__ import annotations

from typing import Any

import models
import pytest
import tokens
import torch

from depass import DePass, OptionError, PromptError, SourceError, Spans, TargetError, Token, TopK

attr = pytest.importorskip("captum.attr", reason="captum is not installed in this environment (make adapters)")
adapter = pytest.importorskip("depass.compat.captum")

IDS = [models.prompt(7), models.prompt(7, seed=1)]
FAMILIES = ["llama", "qwen2", "gemma2", "gpt2"]


def dp(name: str = "qwen2") -> DePass:
    return DePass(models.make(name), tokens.make())


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """``[N, V]``, before soft-capping."""
    with torch.no_grad():
        stream = model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state
        made: torch.Tensor = model.get_output_embeddings()(stream)[0]
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_attributions_are_depasss_and_their_delta_is_zero(name: str) -> None:
    own = dp(name)
    method = adapter.DePassAttribution(own)
    made, delta = method.attribute(torch.tensor(IDS), target=5, return_convergence_delta=True)
    assert made.shape == (2, 7)
    assert method.has_convergence_delta()
    for row, ids in enumerate(IDS):
        res = own.attribute(ids, 5)
        assert made[row].equal(res.scores[0, -7:])
        bias = res.scores[0, :-7].sum()
        torch.testing.assert_close(made[row].sum() + bias, logits(own.model, ids)[-1, 5], rtol=1e-5, atol=1e-5)
    assert delta.abs().max() < 1e-4
    again = method.compute_convergence_delta(made, torch.tensor(IDS), target=5)
    torch.testing.assert_close(again, delta, rtol=0, atol=1e-5)
    moved = method.compute_convergence_delta(made + 1, torch.tensor(IDS), target=5)
    torch.testing.assert_close(moved, delta + 7, rtol=0, atol=1e-4)  # seven tokens have one more each


def test_targets_are_captums() -> None:
    own = dp()
    method = adapter.DePassAttribution(own)
    inputs = torch.tensor(IDS)

    def scores(row: int, target: Any) -> torch.Tensor:
        return own.attribute(IDS[row], target).scores[0, -7:]

    assert method.attribute(inputs)[1].equal(scores(1, TopK(1)))
    assert method.attribute(inputs, target=torch.tensor([3, 4]))[1].equal(scores(1, 4))
    assert method.attribute(inputs, target=[3])[1].equal(scores(1, 3))
    assert method.attribute(inputs, target=(2, 9))[0].equal(scores(0, Token(9, 2)))
    assert method.attribute(inputs, target=[(2, 9), (-3, 8)])[1].equal(scores(1, Token(8, -3)))


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_has_no_attribution_and_changes_none(pad: str) -> None:
    own = dp()
    method = adapter.DePassAttribution(own)
    inputs, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    places = [slice(2, 9), slice(4, 9)] if pad == "left" else [slice(0, 7), slice(0, 5)]
    for row, where in enumerate(places):
        inputs[row, where], mask[row, where] = torch.tensor(IDS[row][: where.stop - where.start]), 1
    made = method.attribute(inputs, target=[(places[0].start + 1, 3), (places[1].stop - 1, 4)], attention_mask=mask)
    assert made[mask == 0].eq(0).all()
    assert made[0, places[0]].equal(own.attribute(IDS[0], Token(3, 1)).scores[0, -7:])
    assert made[1, places[1]].equal(own.attribute(IDS[1][:5], 4).scores[0, -5:])


def test_options_are_depasss() -> None:
    own = dp()
    made = adapter.DePassAttribution(own, start_layer=1, rule="linear").attribute(torch.tensor(IDS), target=5)
    assert made[0].equal(own.attribute(IDS[0], 5, start_layer=1, rule="linear").scores[0, -7:])


@pytest.mark.parametrize("name", FAMILIES)
def test_text_with_a_target_adds_up_to_each_of_its_logits(name: str) -> None:
    own = dp(name)
    text, target = "<bos>the cat sat", " the cat."
    inp = attr.TextTokenInput(text, own.tokenizer)
    found = adapter.DePassLLMAttribution(adapter.DePassAttribution(own)).attribute(inp, target)
    assert isinstance(found, attr.LLMAttributionResult)
    ids, new = own.tokenizer.encode(text), own.tokenizer.encode(target)
    assert found.input_tokens == own.tokenizer.convert_ids_to_tokens(ids)
    assert "".join(found.output_tokens) == target
    assert found.token_attr.shape == (len(new), len(ids))
    assert found.seq_attr.equal(found.token_attr.sum(0))
    res = own.attribute([*ids, *new[:-1]], [Token(token, len(ids) - 1 + i) for i, token in enumerate(new)])
    first = len(res.sources) - len(ids) - len(new) + 1
    assert found.token_attr.equal(res.scores[:, first : first + len(ids)])
    own_logits = logits(own.model, [*ids, *new[:-1]])[len(ids) - 1 :].gather(1, torch.tensor(new)[:, None])[:, 0]
    torch.testing.assert_close(found.attribution.scores.sum(1), own_logits, rtol=1e-5, atol=1e-4)


def test_tokens_that_are_skipped_have_no_column() -> None:
    own = dp()
    inp = attr.TextTokenInput("<bos>the cat sat", own.tokenizer, skip_tokens=["<bos>"])
    found = adapter.DePassLLMAttribution(adapter.DePassAttribution(own)).attribute(inp, " cat")
    whole = attr.TextTokenInput("<bos>the cat sat", own.tokenizer)
    more = adapter.DePassLLMAttribution(adapter.DePassAttribution(own)).attribute(whole, " cat")
    assert found.token_attr.equal(more.token_attr[:, 1:])


def test_what_is_generated_is_the_target_where_none_is_given() -> None:
    own = dp("llama")
    inp = attr.TextTokenInput("<bos>the cat", own.tokenizer)
    llm = adapter.DePassLLMAttribution(adapter.DePassAttribution(own))
    found = llm.attribute(inp, gen_args={"max_new_tokens": 3, "do_sample": False})
    made = own.generate("<bos>the cat", max_new_tokens=3, do_sample=False)
    assert found.attribution.scores.equal(made.attribution.scores)


def test_a_templates_values_are_spans() -> None:
    own = dp()
    inp = attr.TextTemplateInput("the {} sat. {}!", values=["cat", "Dr the cat"])
    text = "the cat sat. Dr the cat!"
    found = adapter.DePassLLMAttribution(adapter.DePassAttribution(own)).attribute(inp, " at")
    ids, new = own.tokenizer.encode(text), own.tokenizer.encode(" at")
    prompt = own.attribute(text, new[0], sources=Spans([(4, 7), (13, 23)], unit="char"))
    assert found.input_tokens == ["cat", "Dr the cat"]
    torch.testing.assert_close(found.token_attr[0], prompt.scores[0, -2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.attribution.scores[0].sum(), logits(own.model, ids)[-1, new[0]], rtol=1e-5, atol=1e-4
    )


def test_a_templates_masked_and_repeated_values_are_added_up() -> None:
    own = dp()
    llm = adapter.DePassLLMAttribution(adapter.DePassAttribution(own))
    one = llm.attribute(attr.TextTemplateInput("{} {} {}", values=["the", "cat", "sat"]), ".").token_attr
    masked = attr.TextTemplateInput("{} {} {}", values=["the", "cat", "sat"], mask=[0, 1, 0])
    both = llm.attribute(masked, ".").token_attr
    torch.testing.assert_close(both, torch.stack([one[:, 0] + one[:, 2], one[:, 1], one[:, 0] + one[:, 2]], 1))
    again = attr.TextTemplateInput(lambda a, b: f"{a} {b} {a}", values=["the", "cat"])
    twice = llm.attribute(again, ".").token_attr
    assert twice.shape == (1, 2)
    thrice = llm.attribute(attr.TextTemplateInput("{} {} {}", values=["the", "cat", "the"]), ".").token_attr
    torch.testing.assert_close(twice, torch.stack([thrice[:, 0] + thrice[:, 2], thrice[:, 1]], 1))


def test_captum_draws_it() -> None:
    plt = pytest.importorskip("matplotlib.pyplot", reason="captum draws with matplotlib")
    plt.switch_backend("agg")
    own = dp()
    inp = attr.TextTokenInput("the cat", own.tokenizer)
    found = adapter.DePassLLMAttribution(adapter.DePassAttribution(own)).attribute(inp, " sat")
    figure, axes = found.plot_token_attr()
    assert len(axes.get_xticklabels()) == len(found.input_tokens)
    assert len(axes.get_yticklabels()) == len(found.output_tokens)
    plt.close(figure)
    exported, _ = own.attribute("the cat", TopK(2)).to_captum().plot_token_attr()
    plt.close(exported)


def test_a_result_becomes_captums() -> None:
    res = dp().attribute("<bos>the cat", TopK(2))
    found = res.to_captum()
    assert isinstance(found, attr.LLMAttributionResult)
    assert found.token_attr.equal(res.scores)
    torch.testing.assert_close(found.seq_attr, res.scores.sum(0))
    assert found.input_tokens == [source.label for source in res.sources]
    assert found.output_tokens == [target.label for target in res.targets]


def test_what_cannot_be_done_is_refused_by_name() -> None:
    own = dp()
    method = adapter.DePassAttribution(own)
    llm = adapter.DePassLLMAttribution(method)
    inp = attr.TextTokenInput("the cat", own.tokenizer)
    inputs = torch.tensor(IDS)
    with pytest.raises(OptionError, match="dp must be a DePass, got Qwen2ForCausalLM"):
        adapter.DePassAttribution(own.model)
    with pytest.raises(OptionError, match=r"DePassAttribution\(sources=\.\.\.\)"):
        adapter.DePassAttribution(own, sources="word")
    with pytest.raises(PromptError, match=r"inputs must be token ids \[B, N\], got torch.float32 of shape \[2, 7\]"):
        method.attribute(inputs.float())
    with pytest.raises(PromptError, match="one run of ones"):
        method.attribute(inputs, attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1, 1]] * 2))
    with pytest.raises(TargetError, match="a list of 2, one per row"):
        method.attribute(inputs, target=[1, 2, 3])
    with pytest.raises(TargetError, match="position 7 of a target"):
        method.attribute(inputs, target=(7, 3))
    with pytest.raises(PromptError, match=r"inputs' shape \[2, 7\], got \[2, 6\]"):
        method.compute_convergence_delta(torch.zeros(2, 6), inputs)
    with pytest.raises(OptionError, match="attr_target='log_prob'"):
        adapter.DePassLLMAttribution(method, attr_target="log_prob")
    with pytest.raises(OptionError, match="got FeatureAblation"):
        adapter.DePassLLMAttribution(attr.FeatureAblation(own.model))
    with pytest.raises(OptionError, match="gen_args need generated text, but a target is given"):
        llm.attribute(inp, " cat", gen_args={"max_new_tokens": 2})
    with pytest.raises(TargetError, match="has no token"):
        llm.attribute(inp, "")
    with pytest.raises(TargetError, match="got int"):
        llm.attribute(inp, 3)
    with pytest.raises(OptionError, match="inp must be a TextTokenInput or TextTemplateInput, got str"):
        llm.attribute("the cat", " cat")
    with pytest.raises(SourceError, match="the template changes its values"):
        llm.attribute(attr.TextTemplateInput("{:>9} sat", values=["cat"]), ".")
    with pytest.raises(SourceError, match="the template changes its values"):
        llm.attribute(attr.TextTemplateInput(lambda a: a.upper(), values=["cat"]), ".")
    with pytest.raises(OptionError, match="captum's inputs are text"):
        adapter.DePassLLMAttribution(adapter.DePassAttribution(DePass(own.model)))
