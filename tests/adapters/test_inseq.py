"""inseq: the method ``depass`` against DePass itself, and its tables with what stands beside them against the logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import tokens
import torch

from depass import Contrast, DePass, Heads, ModelError, OptionError, Token, TopK

inseq = pytest.importorskip("inseq", reason="inseq is not installed in this environment (make adapters)")
adapter = pytest.importorskip("depass.compat.inseq")

PROMPT, WHOLE = "the cat", "the cat sat."
LAYERS, HEADS = models.LAYERS, 4


def loaded(name: str) -> Any:
    return inseq.load_model(models.make(name), "depass", tokenizer=tokens.make())


def attributed(model: Any, texts: Any = PROMPT, wholes: Any = WHOLE, **options: Any) -> Any:
    options = {"attributed_fn": "logit", "show_progress": False, **options}
    return model.attribute(texts, wholes, **options)


def own(model: Any) -> tuple[DePass, list[int], int, list[Token]]:
    """DePass, the ids of the whole, the prompt's length, and the targets."""
    ids, length = model.tokenizer.encode(WHOLE), len(model.tokenizer.encode(PROMPT))
    targets = [Token(ids[t], t - 1) for t in range(length, len(ids))]
    return DePass(model.model, model.tokenizer), ids, length, targets


def logits(model: Any, ids: list[int], length: int) -> torch.Tensor:
    """``[targets]``, before soft-capping."""
    with torch.no_grad():
        stream = model.model.base_model(torch.tensor([ids[:-1]]), use_cache=False).last_hidden_state
        made: torch.Tensor = model.model.get_output_embeddings()(stream)[0, length - 1 :]
    return made.gather(1, torch.tensor(ids[length:])[:, None])[:, 0]


def test_it_is_one_of_inseqs_methods() -> None:
    assert "depass" in inseq.list_feature_attribution_methods()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
def test_tokens_are_depasss_and_add_up_to_the_logits(name: str) -> None:
    model = loaded(name)
    (found,) = attributed(model).sequence_attributions
    dp, ids, length, targets = own(model)
    res = dp.attribute(ids[:-1], targets)
    assert found.target_attributions.shape == (len(ids), len(targets))
    assert [token.id for token in found.target] == ids
    for column, t in enumerate(range(length, len(ids))):
        scores = found.target_attributions[:, column]
        assert scores[:t].equal(res.scores[column, res.scores.shape[1] - len(ids) + 1 :][:t])
        assert scores[t:].isnan().all()
    total = found.target_attributions.nansum(0) + found.step_scores.get("bias", 0)
    torch.testing.assert_close(total, logits(model, ids, length), rtol=1e-5, atol=1e-4)
    assert found.step_scores["logit"].equal(res.target_logits)
    assert ("bias" in found.step_scores) == dp.bound.has_bias


def test_options_are_depasss() -> None:
    model = loaded("llama")
    (found,) = attributed(model, start_layer=1, rule="linear", exclude_bos=True).sequence_attributions
    dp, ids, _, targets = own(model)
    res = dp.attribute(ids[:-1], targets, start_layer=1, rule="linear", exclude_bos=True)
    assert found.target_attributions[:-1, -1].equal(res.scores[-1])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layers_are_the_tokens_of_every_layers_input(name: str) -> None:
    model = loaded(name)
    (found,) = attributed(model, outputs="layers").sequence_attributions
    dp, ids, length, targets = own(model)
    assert found.target_attributions.shape == (len(ids), len(targets), LAYERS)
    for layer in range(LAYERS):
        res = dp.attribute(ids[:-1], targets, start_layer=layer)
        table = found.target_attributions[..., layer]
        assert table[:-1, -1].equal(res.scores[-1, res.scores.shape[1] - len(ids) + 1 :])
        total = table.nansum(0) + found.step_scores.get(f"L{layer}.bias", 0)
        torch.testing.assert_close(total, logits(model, ids, length), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_heads_and_their_rest_add_up_to_the_logits(name: str) -> None:
    model = loaded(name)
    (found,) = attributed(model, outputs="heads").sequence_attributions
    _, ids, length, targets = own(model)
    assert found.target_attributions.shape == (len(ids), len(targets), LAYERS, HEADS)
    for layer in range(LAYERS):
        total = found.target_attributions[:, :, layer].nansum((0, 2)) + found.step_scores[f"L{layer}.rest"]
        total += found.step_scores.get(f"L{layer}.bias", 0)
        torch.testing.assert_close(total, logits(model, ids, length), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_heads_at_a_position_are_depasss_where_sources_do_not_compete(name: str) -> None:
    # the taylor rule is linear: a source's score does not depend on which others stand beside it
    model = loaded(name)
    (found,) = attributed(model, outputs="heads", rule="taylor").sequence_attributions
    dp, ids, _, targets = own(model)
    for position in (0, len(ids) - 2):
        res = dp.attribute(ids[:-1], targets[-1], sources=Heads(1, positions=[position]), rule="taylor")
        torch.testing.assert_close(
            found.target_attributions[position, -1, 1], res.scores[0, -HEADS:], rtol=1e-4, atol=1e-5
        )


def test_a_batch_is_its_sequences_alone() -> None:
    model = loaded("llama")
    texts = ["the cat sat. the", "the cat"]
    together = model.attribute(
        texts, attributed_fn="logit", show_progress=False, generation_args={"max_new_tokens": 3, "do_sample": False}
    )
    assert len(together.sequence_attributions) == 2
    dp = DePass(model.model, model.tokenizer)
    for found in together.sequence_attributions:
        ids = [token.id for token in found.target]
        count = found.target_attributions.shape[1]
        targets = [Token(ids[t], t - 1) for t in range(len(ids) - count, len(ids))]
        res = dp.attribute(ids[:-1], targets)
        torch.testing.assert_close(found.target_attributions[:-1, -1], res.scores[-1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.step_scores["logit"], res.target_logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.target_attributions.nansum(0), res.target_logits, rtol=1e-5, atol=1e-4)


def test_positions_are_inseqs() -> None:
    model = loaded("llama")
    dp, ids, length, targets = own(model)
    (found,) = attributed(model, attr_pos_start=length + 1, attr_pos_end=length + 2).sequence_attributions
    res = dp.attribute(ids[:-1], targets[1])
    assert found.target_attributions.shape[1] == 1
    torch.testing.assert_close(found.target_attributions[: length + 1, 0], res.scores[0, : length + 1])


def test_a_contrast_is_depasss() -> None:
    model = loaded("qwen2")
    other = "the cat cat."
    dp, ids, length, targets = own(model)
    others = model.tokenizer.encode(other)
    options = {"attributed_fn": "contrast_logits_diff", "contrast_targets": other}
    options["contrast_targets_alignments"] = [[(t, t) for t in range(min(len(ids), len(others)))]]
    (found,) = attributed(model, attr_pos_end=length + 1, **options).sequence_attributions
    res = dp.attribute(ids[:length], Contrast(ids[length], others[length]))
    torch.testing.assert_close(found.target_attributions[:length, 0], res.scores[0, -length:])
    torch.testing.assert_close(found.step_scores["logit"], res.target_logits)
    assert len(targets) > 1


def test_it_is_shown_saved_and_loaded(tmp_path: Path) -> None:
    model = loaded("qwen2")
    out = attributed(model)
    assert "<th>at</th>" in out.show(display=False, return_html=True)
    out.save(tmp_path / "out.json")
    again = inseq.FeatureAttributionOutput.load(tmp_path / "out.json")
    torch.testing.assert_close(
        again[0].target_attributions, out[0].target_attributions, equal_nan=True, rtol=1e-6, atol=1e-6
    )
    assert attributed(model, outputs="heads").show(display=False, return_html=True)


def mine(args: Any) -> torch.Tensor:
    made: torch.Tensor = args.target_ids.float()
    return made


def test_what_cannot_be_done_is_refused_by_name() -> None:
    model = loaded("llama")
    with pytest.raises(OptionError, match="attributed_fn='probability': depass scores add up to logits"):
        attributed(model, attributed_fn=None)
    with pytest.raises(OptionError, match="attributed_fn='entropy'"):
        attributed(model, attributed_fn="entropy")
    with pytest.raises(OptionError, match="attributed_fn='mine'"):
        attributed(model, attributed_fn=mine)
    with pytest.raises(ValueError, match="Step scores are not supported for final step methods"):  # by inseq itself
        attributed(model, step_scores=["probability"])
    with pytest.raises(OptionError, match="outputs='neurons'"):
        attributed(model, outputs="neurons")
    with pytest.raises(OptionError, match="start_layer=1: outputs='layers'"):
        attributed(model, outputs="layers", start_layer=1)
    with pytest.raises(OptionError, match="exclude_bos=True: outputs='heads' has no tokens to exclude"):
        attributed(model, outputs="heads", exclude_bos=True)
    with pytest.raises(OptionError, match="contrast_logits_diff needs contrast_targets"):
        attributed(model, attributed_fn="contrast_logits_diff")
    with pytest.raises(OptionError, match="contrast_force_inputs=True"):
        attributed(
            model, attributed_fn="contrast_logits_diff", contrast_targets="the cat cat.", contrast_force_inputs=True
        )
    with pytest.raises(OptionError, match="unknown rule 'mean'"):
        attributed(model, rule="mean")
    model.model.config.model_type = "mpt"
    with pytest.raises(ModelError, match=r"'mpt' models .* are not supported"):
        inseq.load_model(model.model, "depass", tokenizer=tokens.make())


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "depass.compat.inseq", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})


def test_the_launcher_is_inseqs_command_with_the_method(tmp_path: Path) -> None:
    model, tokenizer = models.make("llama"), tokens.make()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    common = ["attribute", "-m", str(tmp_path / "model"), "-a", "depass", "-i", PROMPT, "-g", WHOLE, "--hide"]
    done = launched(*common, "-fn", "logit", "--save_path", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    found = inseq.FeatureAttributionOutput.load(tmp_path / "out.json")[0]
    ids = tokenizer.encode(WHOLE)
    res = DePass(model, tokenizer).attribute(ids[:-1], Token(ids[-1]))
    torch.testing.assert_close(found.target_attributions[:-1, -1], res.scores[0], rtol=1e-5, atol=1e-5)
    done = launched(*common)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "attributed_fn='probability'" in done.stderr


@pytest.mark.parametrize("sources", ["token", "word", Heads(1)])
def test_a_result_becomes_inseqs(sources: Any, tmp_path: Path) -> None:
    res = DePass(models.make("qwen2"), tokens.make()).attribute("<bos>the cat sat", TopK(3), sources=sources)
    out = res.to_inseq()
    assert isinstance(out, inseq.FeatureAttributionOutput)
    assert out[0].source_attributions.equal(res.scores.T)
    assert [token.token for token in out[0].source] == [source.label for source in res.sources]
    assert [token.id for token in out[0].target] == [target.token_ids[0] for target in res.targets]
    assert out[0].step_scores["logit"].equal(res.target_logits)
    assert out.show(display=False, return_html=True)
    out.save(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())
    again = inseq.FeatureAttributionOutput.load(tmp_path / "out.json")
    torch.testing.assert_close(again[0].source_attributions, res.scores.T)
