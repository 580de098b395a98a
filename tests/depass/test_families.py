"""Every family once through what users ask for; the longer tests of other files take those that differ in structure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import family_table
import models
import multimodal
import pytest
import torch
import transformers as tf

from depass import FAMILIES, DePass, Family, Heads, ModelError, Neurons, RoutedExperts, Spans, masking
from depass.masking import layers_with, num_components
from depass.models.bind import bind
from depass.models.bound import BoundModel
from depass.models.families import UNSUPPORTED

pytestmark = pytest.mark.filterwarnings("ignore::depass.ConservationWarning")  # the tests judge by themselves

RULES = ("softmax", "max", "relu", "linear", "taylor")
LINEAR = ("taylor", "half", "up")
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2}
NEW_AND_SIMILAR = ["granite", "hyperclovax", "olmo", "nemotron", "phi", "cohere", "codegen", *models.SIMILAR]
NAMES = [name for name in NEW_AND_SIMILAR if name in models.EVERY]


def test_every_family_has_a_small_model() -> None:
    made = {models.make(name).config.model_type for name in models.EVERY}
    made |= {multimodal.config_of(name).text_config.model_type for name in multimodal.NAMES}
    assert made <= set(FAMILIES)
    missing = set(FAMILIES) - made
    not_here = models.NOT_HERE + multimodal.NOT_HERE
    assert len(missing) <= len(not_here)
    if not not_here:
        assert missing == set()


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", models.SIMILAR)
def test_scores_add_up_under_every_rule(name: str, dtype: torch.dtype, device: str) -> None:
    its, ids = models.make(name, dtype, device), models.prompt(17)
    with torch.no_grad():  # a small logit is the difference of large parts, whose rounding it does not show
        targets = its(torch.tensor([ids], device=device)).logits[0, -1].abs().topk(2).indices.tolist()
    dp = DePass(its, engine="forward")
    for rule in RULES:
        for sources in ("token", Spans([(0, 1), (3, 9)])):
            res = dp.attribute(ids, targets, rule=rule, sources=sources)
            assert res.conservation_error.max() < LIMITS[dtype], (rule, sources)
    dp = DePass(its)  # which takes the backward engine for these rules
    for rule in LINEAR:
        res = dp.attribute(ids, targets, rule=rule)
        assert res.conservation_error.max() < LIMITS[dtype], rule


@pytest.mark.parametrize("name", NAMES)
def test_batches_sweeps_and_components_agree(name: str, device: str) -> None:
    dp, ids = DePass(models.make(name, torch.float64, device)), models.prompt(9)
    alone = [dp.attribute(each, 5) for each in (ids, ids[:4])]
    for one, found in zip(alone, dp.attribute_many([ids, ids[:4]], 5), strict=True):
        assert (found.scores - one.scores).abs().max() < 1e-5  # type: ignore[union-attr]
    layers = list(enumerate(dp.bound.layers))
    heads = Heads(next(index for index, layer in layers if index and layer.mixers))
    parts: dict[str, Any] = {
        "heads": heads,
        "neurons": Neurons([index for index, layer in layers if layer.has_mlp][-1]),
    }
    if dp.bound.has_experts:
        parts = {"heads": heads, "experts": RoutedExperts(dp.bound.expert_layers[-1])}
    for kind, spec in parts.items():
        sweep, one = dp.sweep(kind, ids, 5), dp.attribute(ids, 5, sources=spec)  # type: ignore[arg-type]
        assert sweep.conservation_error.max() < 1e-6
        own = [index for index, source in enumerate(one.sources) if source.kind in ("head", "neuron", "expert")]
        columns = [one.sources[index].index for index in own]
        assert kind == "experts" or columns == list(sweep.columns)
        row = sweep.scores[0, sweep.layers.index(spec.layer)]
        assert torch.allclose(row[columns], one.scores[0, own], atol=1e-6)
        assert not row[[column for column in sweep.columns if column not in columns]].any()  # experts that none chose
        linear = dp.sweep(kind, ids, 5, rule="half")  # type: ignore[arg-type]
        assert linear.conservation_error.max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_generated_tokens_are_the_models_own(name: str, device: str) -> None:
    its, ids = models.make(name, torch.float64, device), models.prompt(6)
    made = DePass(its).generate(ids, max_new_tokens=3, eos_token_id=None)
    expected = its.generate(torch.tensor([ids], device=device), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert list(made.ids) == expected[0, 6:].tolist()
    assert made.attribution.conservation_error.max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_masked_components_are_those_without_output_weights(name: str, device: str) -> None:
    model = models.make(name, torch.float64, device)
    prompts = torch.tensor([models.prompt(8), models.prompt(8, seed=1)], device=device)
    bound = bind(model)
    with torch.no_grad():
        before = model(prompts).logits
        for part in ("heads", "experts" if bound.has_experts else "neurons"):
            layer = layers_with(bound, part)[-1]  # type: ignore[arg-type]
            off = torch.zeros(2, models.LAYERS, num_components(bound, part), dtype=torch.bool)  # type: ignore[arg-type]
            off[1, layer, :2] = True  # of the second prompt
            with getattr(masking, part)(model, off):
                masked = model(prompts).logits
            without = models.make(name, torch.float64, device)
            switch_off(bind(without), layer, part)
            expected = torch.stack([before[0], without(prompts).logits[1]])
            assert torch.allclose(masked, expected, rtol=1e-9, atol=1e-9)


def switch_off(bound: BoundModel, index: int, part: str) -> None:
    """Set the output weights of the first two heads, neurons or experts of a layer to zero."""
    layer = bound.layers[index]
    if layer.experts is not None and part == "experts":
        for each in (name for name in layer.experts.tensors if name.startswith("down_proj")):
            layer.experts.tensors[each][:2] = 0
        return
    projection = layer.mixers[0].output if part == "heads" else layer.only_mlp.down
    columns = 2 * (projection.shape[1] // layer.mixers[0].num_heads if part == "heads" else 1)
    module = projection.module
    (module.weight if type(module).__name__ == "Conv1D" else module.weight.T)[:columns] = 0


def wrong(name: str, **changed: Any) -> Any:
    """A model with its family's declaration changed."""
    model = models.make(name)
    return DePass(model, family=Family(**{**vars(FAMILIES[model.config.model_type]), **changed}))


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "1 + w declared as w": ("nemotron", {"norm": "layer"}, "values"),
    "another epsilon": ("olmo", {"epsilon": 1.0}, "values"),
    "an RMSNorm in place of a LayerNorm": ("olmo", {"norm": "rms", "epsilon": 1e-5}, "values"),
    "the keys of fused weights": ("codegen", {"value_rows": "last"}, "values"),
    "parallel layers as sequential ones": ("phi", {"parallel": False}, "mlp.fc1"),
    "another factor": ("granite", {"residual_factor": "attention_multiplier"}, "mlp.gate_proj"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_declarations_of_new_kinds_are_found(case: str) -> None:
    name, changed, named = WRONG[case]
    if name not in models.EVERY:
        pytest.skip(f"{name} needs transformers {models.since(name)}")
    if "residual_factor" in changed:  # the factor that is left over would be refused at once
        changed = {**changed, "logit_factor": "residual_multiplier"}
    dp = wrong(name, **changed)
    with pytest.raises(ModelError, match=rf"layer \d: .*{named}.*correct the family"):
        dp.attribute(models.prompt(9), 5)
    with pytest.raises(ModelError, match=rf"layer \d: .*{named}.*correct the family"):
        dp.attribute(models.prompt(9), 5, rule="half")


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "clamped values": ("olmo", {"clip_qkv": 8.0}, {}, r"has clip_qkv=8.0; DePass supports it only with clip_qkv=None"),
    "norms after": ("opt", {"do_layer_norm_before": False}, {}, r"has do_layer_norm_before=False.* only with .*=True"),
    "a projection before the head": (
        "opt", {"word_embed_proj_dim": 16}, {}, "write vectors of width 32, but its head reads width 16",
    ),
    "an undeclared factor": ("granite", {}, {"residual_factor": None}, r"has residual_multiplier=0.4, which .*not declare"),
    "a factor of zero": ("granite", {"residual_multiplier": 0.0}, {}, r"has residual_multiplier=0.0; it must be a positive"),
    "an unknown factor": ("cohere", {}, {"logit_factor": "nope"}, r"Family\(logit_factor='nope'\): .* has nope=None"),
    "a bad epsilon": ("olmo", {}, {"epsilon": -1.0}, r"Family\(epsilon=-1.0\): give a positive number, or None"),
    "no epsilon": ("olmo", {}, {"epsilon": None}, r"\(OlmoLayerNorm\) has no eps; declare it: depass.Family\(epsilon="),
    "bad requirements": ("olmo", {}, {"requires": ("clip_qkv",)}, "give a tuple of pairs"),
    "layers without attention": (
        "granitemoehybrid", {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, {"recurrence": None},
        r"layer 1 of GraniteMoeHybridForCausalLM has no attention \(self_attn\), which other layers have",
    ),
    "MLPs beside experts that are averaged with them": (
        "cohere2_moe", {"num_shared_experts": 1}, {}, "has num_shared_experts=1; DePass supports it only with .*=0",
    ),
    "experts in another form": ("mixtral", {}, {"experts": "mlp"}, "are not of transformers' experts interface"),
    "1 + w without w": ("olmo", {}, {"norm": "layer_plus_one"}, "has no weight; a norm of the kind 'layer_plus_one'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_family_does_not_allow_is_refused(case: str) -> None:
    name, sizes, changed, says = REFUSED[case]
    if name not in models.EVERY:
        pytest.skip(f"{name} needs transformers {models.since(name)}")
    model = models.make(name, **sizes)
    family = Family(**{**vars(FAMILIES[model.config.model_type]), **changed})
    with pytest.raises(ModelError, match=says):
        DePass(model, family=family)


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_families_that_do_not_fit_are_refused_with_the_reason(kind: str) -> None:
    model = models.make("llama")
    model.config.model_type = kind
    with pytest.raises(ModelError, match=f"'{kind}' models .* are not supported: (its|it|some|a) "):
        DePass(model)
    assert kind not in FAMILIES


def test_the_names_of_families_are_those_of_transformers() -> None:
    known = set(tf.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    here = {models.make(name).config.model_type for name in models.EVERY} | {*UNSUPPORTED} - {
        "lfm2",
        "doge",
        "minicpm3",
    }
    assert here <= known


def test_an_attention_mask_by_name_is_accepted() -> None:
    """As some models pass it."""
    from depass.models.attention import _attention

    model = models.make("llama")
    module, query = model.model.layers[0].self_attn, torch.randn(1, 4, 3, 8)
    key = value = torch.randn(1, 2, 3, 8)
    by_name, _ = _attention(module, query, key, value, attention_mask=None, scaling=1.0, dropout=0.0)
    by_place, _ = _attention(module, query, key, value, None, scaling=1.0, dropout=0.0)
    assert torch.equal(by_name, by_place)


@pytest.mark.parametrize(("name", "rate"), [("opt", "dropout"), ("opt", "layerdrop"), ("biogpt", "activation_dropout")])
def test_dropout_outside_of_modules_is_refused(name: str, rate: str) -> None:
    rates = ("dropout", "activation_dropout", "attention_dropout", "layerdrop")
    model = models.make(name).train()
    for module in model.modules():
        for each in rates:
            if isinstance(getattr(module, each, None), float):
                setattr(module, each, 0.1 if each == rate else 0.0)
    with pytest.raises(ModelError, match=r"training mode with dropout.*call model.eval\(\)"):
        DePass(model).attribute(models.prompt(4))


@pytest.mark.skipif(bool(models.NOT_HERE), reason=f"this transformers lacks {', '.join(models.NOT_HERE)}")
def test_the_table_of_the_documents_is_that_of_the_families() -> None:
    document = Path(__file__).parents[2] / "docs" / "models.md"
    text = document.read_text(encoding="utf-8")
    assert family_table.written(text) == text, "run: python tests/support/family_table.py docs/models.md"
