"""Text decoders inside multimodal models: found, attributed as the whole model computes them, and given text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import multimodal
import pytest
import tokens
import torch
import transformers as tf
from transformers import BatchFeature, ProcessorMixin

from depass import FAMILIES, Contrast, DePass, Family, ModelError, PromptError, baselines, masking
from depass.cli.main import main
from depass.models import attention, capture
from depass.models.bind import bind
from depass.models.check import limit

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
LLAVA = tf.LlavaForConditionalGeneration

pytestmark = pytest.mark.filterwarnings("ignore::depass.ConservationWarning")  # the tests judge by themselves


def like_llava(forward: Any) -> Any:
    """A LLaVA whose class has another forward."""
    kind = type("Other", (LLAVA,), {"forward": forward})
    model = multimodal.make("llava-llama")
    model.__class__ = kind
    return model


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", multimodal.NAMES)
def test_scores_add_up_to_the_whole_models_logits(name: str, dtype: torch.dtype, device: str) -> None:
    model, ids = multimodal.make(name, dtype, device), models.prompt(11)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
    dp, expected = DePass(model), logits[0, -1, [5, 7]].float().cpu()
    for rule in ("softmax", "taylor", "half"):
        res = dp.attribute(ids, [5, 7], rule=rule)
        assert res.conservation_error.max() < LIMITS[dtype], rule
        # DePass multiplies the same vector by two rows of the head alone, and in at least fp32
        assert torch.allclose(res.target_logits, expected, rtol=0, atol=LIMITS[dtype] * float(logits.abs().max())), rule


@pytest.mark.parametrize("name", multimodal.NAMES)
def test_logits_are_the_whole_models_bit_for_bit(name: str, device: str) -> None:
    bound = bind(multimodal.make(name, device=device))
    ids = torch.tensor([models.prompt(11)], device=device)
    with torch.no_grad():
        whole = bound.model(input_ids=ids, use_cache=False).logits
        with attention.eager_with_patterns(bound):
            assert torch.equal(bound.logits(capture.normed(bound, input_ids=ids)), whole)


@pytest.mark.parametrize("name", multimodal.NAMES)
def test_batches_sweeps_and_generated_text_agree(name: str, device: str) -> None:
    model, ids = multimodal.make(name, torch.float64, device), models.prompt(9)
    dp = DePass(model)
    alone = [dp.attribute(each, 5) for each in (ids, ids[:4])]
    for one, found in zip(alone, dp.attribute_many([ids, ids[:4]], 5), strict=True):
        assert (found.scores - one.scores).abs().max() < 1e-5  # type: ignore[union-attr]
    for rule in ("softmax", "half"):
        assert dp.sweep("heads", ids, 5, rule=rule).conservation_error.max() < 1e-6
    made = dp.generate(ids, max_new_tokens=3, eos_token_id=None)
    expected = model.generate(torch.tensor([ids], device=device), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert list(made.ids) == expected[0, 9:].tolist()
    assert made.attribution.conservation_error.max() < 1e-6


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_baselines_surveys_and_masks_take_the_text_decoder(name: str, device: str) -> None:
    model, ids = multimodal.make(name, device=device), models.prompt(6)
    dp = DePass(model)
    assert dp.survey(ids, 5, rule="half").conservation_error.max() < 1e-5
    for baseline in ("input_x_gradient", "leave_one_out", "gim", "attention_rollout"):
        scores = baselines.tokens(dp, baseline, [ids], 5)[0].scores
        assert scores.shape[-1] == len(ids)
        assert scores.isfinite().all()
    off = torch.zeros(1, models.LAYERS, dp.bound.most_heads, dtype=torch.bool)
    off[0, 1, 0] = True
    prompt = torch.tensor([ids], device=device)
    with torch.no_grad(), masking.heads(model, off):
        masked = model(input_ids=prompt).logits
    weight = dp.bound.layers[1].mixers[0].output.module.weight
    with torch.no_grad():
        weight[:, : weight.shape[1] // dp.bound.most_heads] = 0
        assert torch.allclose(masked, model(input_ids=prompt).logits, atol=1e-4)


def test_every_model_has_a_family_and_its_text_decoder() -> None:
    for name in multimodal.NAMES:
        bound = bind(multimodal.make(name))
        assert bound.backbone is bound.model.model.language_model
        assert bound.is_wrapped
        assert set(bound.placeholders) <= {multimodal.IMAGE, multimodal.VIDEO}
        assert FAMILIES[bound.model.config.get_text_config().model_type].gate == bound.family.gate
    assert not bind(models.make("llama")).placeholders


def test_a_family_of_ones_own_needs_no_path_of_the_decoder() -> None:
    model, ids = multimodal.make("llava-llama"), models.prompt(6)
    one, other = (DePass(model, family=family).attribute(ids, 5) for family in (Family(), None))
    assert torch.equal(one.scores, other.scores)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_vl"])
def test_a_saved_model_is_loaded_and_planned(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = multimodal.make(name)
    model.save_pretrained(tmp_path)
    tokens.make().save_pretrained(tmp_path)
    dp = DePass.from_pretrained(tmp_path)
    assert type(dp.model) is type(model)
    own = DePass(model, tokens.make()).attribute("the cat sat", "at")
    assert torch.equal(dp.attribute("the cat sat", "at").scores, own.scores)
    assert main(["plan", "-m", str(tmp_path), "--tokens", "20"]) == 0
    assert "20 tokens" in capsys.readouterr().out


def test_a_processor_serves_as_its_tokenizer() -> None:
    class Processor(ProcessorMixin):  # type: ignore[misc]
        attributes = ("tokenizer",)
        tokenizer_class = "AutoTokenizer"

        def __init__(self, tokenizer: Any = None, chat_template: Any = None) -> None:
            super().__init__(tokenizer, chat_template=chat_template)

    tokenizer = tokens.make()
    template, tokenizer.chat_template = tokenizer.chat_template, None
    dp = DePass(multimodal.make("llava-llama"), Processor(tokenizer, chat_template=template))
    assert dp.tokenizer.chat_template == template
    assert tokenizer.chat_template is None
    assert dp.attribute([{"role": "user", "content": "cat"}], "at").scores.isfinite().all()


@pytest.mark.parametrize("key", ["pixel_values", "pixel_values_videos", "image_grid_thw", "input_features"])
def test_what_a_processor_makes_of_images_is_refused_by_name(key: str) -> None:
    dp, ids = DePass(multimodal.make("qwen2_vl")), models.prompt(4)
    prompt = BatchFeature({"input_ids": [ids], "attention_mask": [[1] * 4], key: torch.zeros(1, 3)})
    with pytest.raises(PromptError, match=f"the prompt has {key}; DePass attributes text alone"):
        dp.attribute(prompt, 5)
    text = BatchFeature({"input_ids": [ids], "attention_mask": [[1] * 4], "mm_token_type_ids": [[0] * 4], key: None})
    assert torch.equal(dp.attribute(text, 5).scores, dp.attribute(ids, 5).scores)


def test_images_in_chat_messages_are_refused_by_name() -> None:
    dp = DePass(multimodal.make("qwen2_vl"), tokens.make())
    parts = [{"type": "image", "url": "cat.png"}, {"type": "text", "text": "the cat"}]
    with pytest.raises(PromptError, match="the prompt has image; DePass attributes text alone"):
        dp.attribute([{"role": "user", "content": parts}], 5)


@pytest.mark.parametrize("token", [multimodal.IMAGE, multimodal.VIDEO])
def test_ids_that_stand_for_images_are_refused(token: int) -> None:
    dp, what = DePass(multimodal.make("qwen2_vl")), "an image" if token == multimodal.IMAGE else "a video"
    ids = [*models.prompt(3), token]
    with pytest.raises(PromptError, match=rf"id {token} at position 3 stands for {what} in .*; DePass attributes text"):
        dp.attribute(ids, 5)
    good, bad = dp.attribute_many([ids[:3], ids], 5, errors="return")
    assert isinstance(bad, PromptError)
    assert good.scores.isfinite().all()  # type: ignore[union-attr]
    assert dp.attribute(ids[:3], Contrast(5, token)).scores.isfinite().all()  # as a target it is a token like any


def test_attention_that_looks_ahead_is_found() -> None:
    def forward(self: Any, input_ids: Any, attention_mask: Any = None, **others: Any) -> Any:
        everything = torch.zeros(len(input_ids), 1, input_ids.shape[1], input_ids.shape[1])
        return LLAVA.forward(self, input_ids=input_ids, attention_mask=everything, **others)

    for rule in ("softmax", "half"):
        with pytest.raises(
            ModelError, match=r"its text decoder \(model.language_model\) .*: its attention looks ahead"
        ):
            DePass(like_llava(forward)).attribute(models.prompt(4), 5, rule=rule)


def test_a_model_that_changes_what_its_decoder_gets_is_found() -> None:
    def forward(self: Any, input_ids: Any, **others: Any) -> Any:
        return LLAVA.forward(self, inputs_embeds=2 * self.get_input_embeddings()(input_ids), **others)

    with pytest.raises(ModelError, match=r"given ids alone: it changes what its text decoder gets .*limit 1e-04"):
        DePass(like_llava(forward)).attribute(models.prompt(4), 5)


def test_a_model_that_needs_an_image_is_refused() -> None:
    def forward(self: Any, pixel_values: Any, **others: Any) -> Any:
        return LLAVA.forward(self, pixel_values=pixel_values, **others)

    with pytest.raises(ModelError, match=r"does not run on token ids alone: .*pixel_values"):
        DePass(like_llava(forward)).attribute(models.prompt(4), 5)


def test_paligemma_is_refused_by_name() -> None:
    text = {**models.EVERY["gemma"][1], "model_type": "gemma"}
    config = tf.PaliGemmaConfig(text_config=text, vision_config=dict(multimodal.SIGLIP), projection_dim=32)
    with pytest.raises(ModelError, match=r"'paligemma' models .* are not supported: its attention looks ahead"):
        DePass(tf.PaliGemmaForConditionalGeneration(config))


def test_the_model_of_two_text_decoders_asks_for_one() -> None:
    model = multimodal.make("llava-llama")
    model.model.second = tf.LlamaModel(model.config.text_config)
    with pytest.raises(
        ModelError, match=r"has several text decoders \(model.language_model, model.second\); choose one"
    ):
        DePass(model)
    chosen = DePass(model, family=Family(backbone="model.language_model"))
    assert chosen.attribute(models.prompt(4), 5).conservation_error.max() < limit(chosen.bound.layers[0])
