"""The first run of a model checks what conservation cannot see: that the model computes what its family says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import models
import pytest
import torch
import transformers as tf
from check_table import differences, loaded, made, quantised, wide
from torch import Tensor, nn

from depass import FAMILIES, DePass, Family, Heads, ModelError, NonFiniteError
from depass.models import weights
from depass.models.bind import as_configured, bind, resolve
from depass.models.bound import BoundModel
from depass.models.check import STEPS
from depass.models.families import GEMMA4, NormKind, ValueRows
from depass.models.paths import has
from depass.models.trace import NORMS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PHI = Family(
    final_norm="final_layernorm", output="self_attn.dense", gate="mlp.fc1", down="mlp.fc2", norm="layer",
    mlp_norm="input_layernorm", parallel=True,
)  # fmt: skip
COHERE = Family(norm="layer", mlp_norm="input_layernorm", parallel=True)


def worst(model: Any, family: Family | None = None) -> dict[str, float]:
    found, allowed = differences(bind(model, family))
    return {step: difference / allowed for step, difference in found.items()}


def steps_of(bound: BoundModel) -> set[str]:
    """The steps that are compared in a model whose declaration is right and whose weights are dense."""
    steps = STEPS.keys() - {"activation", "weights"}  # found where it differs, and where kernels round inputs
    if not any(hasattr(mixer.module, "sinks") for layer in bound.layers for mixer in layer.mixers):
        steps -= {"sinks"}
    if all(layer.mlp is None for layer in bound.layers):
        steps -= {"gate"}
    if not bound.lending:
        steps -= {"lent"}
    if all(layer.late is None for layer in bound.layers):
        steps -= {"late"}
    if "." not in str(bound.family.experts):
        steps -= {"block"}  # the layer itself
    return set(steps) if bound.has_experts else steps - {"routed", "halves", "experts", "block"}


def other(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A random model of a family that is not in the list."""
    config = getattr(tf, f"{name}Config")(**{**SIZES, **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(tf, f"{name}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * (0.4 if parameter.dim() > 1 else 1)
    return model.to(dtype)


@pytest.mark.parametrize("name", models.EVERY)
def test_right_declarations_stay_far_below_the_limit(name: str) -> None:
    for dtype in DTYPES:
        for seed in range(3):
            model = models.make(name, dtype, seed=seed)
            found, bound = worst(model), bind(model)
            assert max(found.values()) < 1 / 4, (dtype, seed, found)
            if any(layer.mlp is not None and layer.mlp.gate.factor != 1 for layer in bound.layers):
                found.pop("activation", None)  # a factor before the activation rounds in half precision
            assert found.keys() == steps_of(bound)


@pytest.mark.parametrize(("name", "family"), [("Phi", PHI), ("Cohere", COHERE)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parallel_models_without_a_flag_can_be_declared(name: str, family: Family, dtype: torch.dtype) -> None:
    more = {"logit_scale": 1.0} if name == "Cohere" else {}
    model = other(name, dtype, **more)
    assert max(worst(model, family).values()) < 1 / 4
    if dtype in (torch.float32, torch.float64):
        for rule in ("softmax", "taylor"):  # taylor divides by the pre-activations, so it shows a wrong reading
            DePass(model, family=family, rule=rule).attribute(models.prompt(9), 5, strict=True)


def with_clamped_values(model: Any) -> None:
    projection = model.model.layers[1].self_attn.v_proj
    own = type(projection).forward
    projection.__class__ = type("Clamped", (nn.Linear,), {"forward": lambda self, x: own(self, x).clamp(-0.1, 0.1)})


def _scaled(like: Any, forward: Callable[..., Tensor]) -> nn.Module:
    made = type("Scaled", (nn.Linear,), {"forward": lambda self, x: forward(self, x) * 1.5})(
        like.in_features, like.out_features, bias=False
    )
    return made.requires_grad_(False)


WRONG: dict[str, tuple[Callable[[], Any], Family | None, str]] = {
    "mlp_norm is the attention's": (lambda: models.make("llama"), Family(mlp_norm="input_layernorm"), "mlp.gate_proj"),
    "no mlp_norm": (lambda: models.make("llama"), Family(mlp_norm=None), "mlp.gate_proj"),
    "no attention_norm": (lambda: models.make("llama"), Family(attention_norm=None), "values"),
    "parallel, declared sequential": (
        lambda: other("Phi"), Family(**{**vars(PHI), "parallel": False}), "mlp.fc1",
    ),
    "parallel, declared sequential without a norm": (
        lambda: other("Phi"), Family(**{**vars(PHI), "parallel": False, "mlp_norm": None}), "mlp.fc1",
    ),
    "Cohere, declared sequential": (
        lambda: other("Cohere", logit_scale=1.0), Family(**{**vars(COHERE), "parallel": False}), "mlp.gate_proj",
    ),
    "sequential, declared parallel": (lambda: models.make("qwen3"), Family(parallel=True), "mlp.gate_proj"),
    "gate and up exchanged": (lambda: models.make("llama"), Family(gate="mlp.up_proj"), "activation function"),
    "up and gate of fused weights exchanged": (lambda: _halves_exchanged(), None, "activation function"),
    "the keys as values": (lambda: models.make("llama"), Family(value="self_attn.k_proj"), "values"),
    "all rows of one projection": (
        lambda: models.make("llama-biased"), Family(value="self_attn.k_proj", norm="rms"), "values",
    ),
    "a factor at the layer's end missed": (
        lambda: models.make("gemma4"), replace(GEMMA4, layer_scalar=None), "the residual stream after it",
    ),
    "a norm on values missed": (lambda: models.make("gemma4"), replace(GEMMA4, value_norm=None), "values"),
    "a branch behind the MLP missed": (
        lambda: models.make("gemma4"), replace(GEMMA4, late_gate=None, late_down=None, late_post_norm=None),
        "the residual stream after it",
    ),
    "weights on the experts' outputs": (
        lambda: _weighted_behind(), None, "the output of feed_forward.experts is not the sum",
    ),
    "1 + w declared as w": (
        lambda: models.make("gemma2"),
        Family(mlp_norm="pre_feedforward_layernorm", attention_post_norm="post_attention_layernorm",
               mlp_post_norm="post_feedforward_layernorm"), "values",
    ),
}  # fmt: skip


def _with_values_that_it_does_not_use() -> Any:
    model = models.make("gemma4")
    first, last = model.model.layers[0].self_attn, model.model.layers[2].self_attn
    for name in ("k_proj", "v_proj", "k_norm", "v_norm"):
        setattr(last, name, copy.deepcopy(getattr(first, name)))
    return model


def _with_other_kinds() -> Any:
    """Its last layer takes the values of layer 0; its config now says that layer 1 is of its kind."""
    model = models.make("gemma4", global_head_dim=8)
    model.config.layer_types = ["sliding_attention", "full_attention", "full_attention"]
    return model


def _weighted_behind() -> Any:
    model = models.make("llama4")

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.reshape(-1, self.hidden_dim)
        scores, logits = self.router(x)
        routed = self.experts(x.repeat(scores.shape[1], 1)).view(scores.shape[1], -1, x.shape[1])
        return self.shared_expert(x) + (routed * scores.T[..., None]).sum(0), logits

    for block in (model.model.layers[0].feed_forward, model.model.layers[2].feed_forward):
        block.__class__ = type("WeightedBehind", (type(block),), {"forward": forward})
    return model


def sibling(model: Any, family: Family, part: str) -> str | None:
    """The path of another projection of the same shape in the module that holds one of the family's projections."""
    layer, path = holder(model, family, part), getattr(family, part)
    if layer is None:
        return None
    parent, _, own = path.rpartition(".")
    shape = layer.get_submodule(path).weight.shape
    for name, module in layer.get_submodule(parent).named_children():
        if name != own and "norm" not in name and getattr(getattr(module, "weight", None), "shape", None) == shape:
            return f"{parent}.{name}"
    return None


def holder(model: Any, family: Family, part: str) -> Any:
    """The first layer that has the module of one of the family's fields: layers differ; or None."""
    path = getattr(family, part)
    layers = model.get_submodule(f"{family.backbone}.{family.layers}")
    return next((layer for layer in layers if path is not None and has(layer, path)), None)


def wrong_declarations(model: Any, family: Family) -> dict[str, Family]:
    """A model's family, with each field that matters to it changed to another value that the model has too."""
    changes: dict[str, dict[str, Any]] = {
        "parallel": {"parallel": not family.parallel},
        "norms exchanged": {"attention_norm": family.mlp_norm, "mlp_norm": family.attention_norm},
        **{f"no {norm}": {norm: None} for norm in (*NORMS, "latent_norm", "mix_norm", "value_norm")},
        **{
            f"no factor of {part}": {"factors": tuple(pair for pair in family.factors if pair[0] != part)}
            for part, _ in family.factors
        },
        **{f"norm {kind}": {"norm": kind} for kind in get_args(NormKind)},
        **{f"value_rows {rows}": {"value_rows": rows} for rows in get_args(ValueRows)},
        **{
            f"another {part}": {part: sibling(model, family, part) or getattr(family, part)}
            for part in ("value", "gate", "shared_gate")
        },
        "no residual_factor": {"residual_factor": None},
        "no layer_scalar": {"layer_scalar": None},
        "no late_gate": {"late_gate": None, "late_down": None, "late_post_norm": None},
        "no MLP beside the experts": {"shared_gate": None, "shared_down": None, "shared_weight": None},
        "no shared_weight": {"shared_weight": None},
        "no mix_gate": {"mix_gate": None},
        "no sinks": {"sinks": None},
        "no recurrence": {"recurrence": None if is_side_by_side(model, family) else family.recurrence},
    }
    layer = holder(model, family, "value") or with_attention(model, family)
    weightless = getattr(model.get_submodule(f"{family.backbone}.{family.final_norm}"), "weight", None) is None
    wrong = {change: replace(family, **fields) for change, fields in changes.items()}
    return {
        change: each
        for change, each in wrong.items()
        if each != family
        and not (change == "parallel" and family.single)
        and not (weightless and each.norm.endswith("plus_one"))
        and not (change == "no residual_factor" and getattr(model.config, family.residual_factor or "", 1) == 1)
        and not (
            change == "another gate"
            and family.experts is not None
            and family.gate == family.shared_gate
            and holder(model, family, "experts") is not None
        )
        and not (change.startswith("no late") and holder(model, family, "late_gate") is None)
        and not (change.endswith("_norm") and holder(model, family, change[3:]) is None)
        and not (change.startswith("value_rows") and not _other_rows(layer, family, each.value_rows))
        and not (change.startswith("no ") and isinstance(_norm(layer, family, change[3:]), nn.Identity))
        and not ("shared_" in change and holder(model, family, "experts") is None)
        and not (
            change == "no MLP beside the experts"
            and None in (holder(model, family, "experts"), holder(model, family, "shared_gate"))
        )
    }


def with_attention(model: Any, family: Family) -> Any:
    """The first layer that has attention, and no recurrence in its place."""
    layers = model.get_submodule(f"{family.backbone}.{family.layers}")
    return next(layer for layer in layers if has(layer, family.attention) and has(layer, family.value))


def is_side_by_side(model: Any, family: Family) -> bool:
    """Whether layers have attention and a recurrence."""
    layer = with_attention(model, family)
    return family.recurrence not in (None, family.attention) and has(layer, str(family.recurrence))


def _other_rows(layer: Any, family: Family, rows: str) -> bool:
    """Whether a value projection's rows can be split in another way, into other rows."""
    count = layer.get_submodule(family.value).weight.shape[0]
    if rows == "end_of_head":  # the same ones, where a projection holds values alone or heads of one width
        return family.value_rows not in ("all", "last_of_head")
    if rows == "last" and family.value_rows == "all":  # all, where there are no more rows than the heads mix
        return bool(count != layer.get_submodule(family.output).weight.shape[1])
    return rows in ("all", "last") or count % 12 == 0 or (count % 3 == 0 and rows == "last_of_head")


def _norm(layer: Any, family: Family, name: str) -> Any:
    path = getattr(family, name) if name in (*NORMS, "latent_norm") else None
    return None if path is None else layer.get_submodule(path)


def by_the_limit(model: Any, family: Family) -> float:
    """The largest difference of a declaration, relative to the limit; infinite where binding refuses it.

    At one position, half precision does not always tell a LayerNorm from an RMSNorm, nor shows a sink: several are tried.
    """
    try:
        bound = resolve(model, family, "given")
    except ModelError:
        return float("inf")
    most = 0.0
    for length in (9, 17, 26, 4):
        found, allowed = differences(bound, (length,))
        most = max(most, max(found.values()) / allowed)
        if most > 1:
            break
    return most


@pytest.mark.parametrize("name", models.EVERY)
def test_wrong_declarations_of_every_family_are_found_in_every_dtype(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = models.make(name, dtype)
        family = as_configured(FAMILIES[model.config.model_type], model.config)
        wrong = wrong_declarations(model, family)
        missed = {change: by_the_limit(model, each) for change, each in wrong.items()}
        assert min(missed.values()) > 1, (dtype, missed)


KINDS = ("bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao int8", "torchao int8, dynamic")
# of several kinds: norms before, after, on both sides, with 1 + w, LayerNorms, parallel layers, fused values, factors;
# experts whose weights stay as they are, beside quantised projections
SOME = ("gemma2", "olmo3", "granite", "nemotron", "phi", "codegen", "opt", "biogpt", "phi3", "qwen3_moe", "granitemoeshared",
        "deepseek_v3")  # fmt: skip


def packed(name: str, kind: str, dtype: torch.dtype) -> Any:
    """A small model in a kind of quantisation, whose library is installed."""
    for library in ("accelerate", kind.split()[0]):
        pytest.importorskip(library, reason=f"{library} is not installed (extra: quantized)")
    return loaded(name, dict(quantised())[kind](), dtype)


@pytest.mark.parametrize("name", [name for name in SOME if name in models.EVERY])
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_declarations_of_quantised_models_are_found(kind: str, name: str) -> None:
    if name == "deepseek_v3" and kind.startswith("bitsandbytes"):
        pytest.skip("its kernels refuse the model's own latent vectors")
    dense = made(name, **wide(name))
    family = as_configured(FAMILIES[dense.config.model_type], dense.config)
    for dtype in (torch.float32, torch.bfloat16):
        bound = packed(name, kind, dtype)
        right, allowed = differences(bound, (1, 9, 17))
        assert max(right.values()) < allowed / 2, (dtype, right)
        for change, each in wrong_declarations(dense, family).items():
            assert by_the_limit(bound.model, each) > 1, (dtype, change)


@pytest.mark.parametrize("kind", KINDS)
def test_large_numbers_that_leave_few_bits_to_others_are_no_false_alarm(kind: str) -> None:
    """As at the first token of most language models: rounding to 8 bits then loses most of a product."""
    bound = packed("llama", kind, torch.bfloat16)
    with torch.no_grad():
        bound.model.model.embed_tokens.weight[:, :2] *= 1000
        for layer in bound.layers:
            layer.module.input_layernorm.weight[:2] = layer.module.post_attention_layernorm.weight[:2] = 1
    found, allowed = differences(bound, (1, 9))
    assert max(found.values()) < allowed / 2


def test_quantised_weights_that_are_read_wrongly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bound, read = packed("llama", "bitsandbytes 8-bit", torch.float32), weights.dense

    def wrongly(module: Any, name: str = "weight") -> Any:
        return 1.1 * read(module) if name == "weight" and weights.rounds_inputs(module) else read(module, name)

    monkeypatch.setattr(weights, "dense", wrongly)
    with pytest.raises(ModelError, match=r"layer 0: the products of .*correct the family"):
        DePass(bound.model).attribute(models.prompt(9), 5)
    found, allowed = differences(bound, (9,))
    assert {step for step, difference in found.items() if difference > allowed} == {"weights"}


def _halves_exchanged() -> Any:
    """Phi-3 whose MLP reads the up weights first; its family says the gate's come first."""
    model = models.make("phi3")
    own = type(model.model.layers[0].mlp)

    class Exchanged(own):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Tensor:
            up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
            return self.down_proj(up * self.activation_fn(gate))

    for layer in model.model.layers:
        layer.mlp.__class__ = Exchanged
    return model


@pytest.mark.parametrize("case", WRONG)
def test_wrong_declarations_are_refused_with_layer_and_number(case: str) -> None:
    make, family, named = WRONG[case]
    for dtype in (torch.float32, torch.bfloat16):
        dp = DePass(make().to(dtype), family=family)
        for run in (
            lambda dp=dp: dp.attribute(models.prompt(9), 5),
            lambda dp=dp: dp.sweep("heads", models.prompt(9), 5),
            lambda dp=dp: dp.states(models.prompt(9), 1),
            lambda dp=dp: next(dp.attribute_many([models.prompt(9)], 5)),
            lambda dp=dp: dp.generate(models.prompt(9), max_new_tokens=2),
        ):
            with pytest.raises(ModelError, match=rf"layer \d: .*{named}.*\(relative difference \d.*, limit .*correct"):
                run()


def test_values_of_another_layer_than_those_that_are_taken_are_found() -> None:
    own = DePass(_with_values_that_it_does_not_use(), family=replace(GEMMA4, shared_values=None))
    with pytest.raises(ModelError, match=r"the value_norm of layer 2 did not run; correct the model's depass.Family"):
        own.attribute(models.prompt(9), 5)
    other = DePass(_with_other_kinds())
    for start in (0, 2):  # also where the layer that lends the values is not of the pass
        with pytest.raises(ModelError, match=r"layer 2: the values .* not those of the layer whose values it takes"):
            other.attribute(models.prompt(9), 5, start_layer=start)


def test_wrong_declarations_without_the_check_conserve() -> None:
    """Why there is a check: the same declarations add up, with other scores."""
    model, ids = models.make("llama"), models.prompt(9)
    right = DePass(model).attribute(ids, 5)
    wrong = DePass(model, family=Family(mlp_norm="input_layernorm"))
    wrong.bound.checked.update(range(models.LAYERS))
    found = wrong.attribute(ids, 5, strict=True)
    assert float((found.scores - right.scores).norm() / right.scores.norm()) > 0.01


def test_what_a_layer_does_beside_its_weights_is_found() -> None:
    model = models.make("mistral")
    with_clamped_values(model)
    with pytest.raises(ModelError, match=r"layer 1: the values that its attention gets"):
        DePass(model).attribute(models.prompt(9), 5)
    model = models.make("mistral")
    own = model.model.layers[2].self_attn.o_proj
    model.model.layers[2].self_attn.o_proj = _scaled(own, nn.Linear.forward)
    model.model.layers[2].self_attn.o_proj.weight.data = own.weight.data
    with pytest.raises(ModelError, match=r"layer 2: the output of mlp.gate_proj is not that of its weights"):
        DePass(model).attribute(models.prompt(9), 5)


def test_layers_are_checked_once_and_those_that_run() -> None:
    dp, ids = DePass(models.make("llama")), models.prompt(9)
    assert dp.bound.checked == set()
    dp.attribute(ids, 5, start_layer=1, stop_layer=2)
    assert dp.bound.checked == {1}
    dp.attribute(ids, 5, sources=Heads(1))
    assert dp.bound.checked == {1, 2}
    dp.attribute(ids, 5)
    assert dp.bound.checked == {0, 1, 2}
    with_clamped_values(dp.model)  # seen by a new DePass only; the scores' error says so
    with pytest.warns(match="if the model's code changed after its first run, a new DePass"):
        dp.attribute(ids, 5)


def test_autocast_is_no_false_alarm() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        dp = DePass(models.make("llama"))
        dp.attribute(models.prompt(9), 5)
    assert dp.bound.checked == {0, 1, 2}


def test_products_in_lower_precision_are_no_false_alarm() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        DePass(models.make("llama")).attribute(models.prompt(40), 5)
    finally:
        torch.set_float32_matmul_precision(before)


def test_weights_of_zero_and_numbers_that_are_not_finite_are_not_judged() -> None:
    model = models.make("llama")
    model.model.layers[1].self_attn.v_proj.weight.data.zero_()
    model.model.layers[2].mlp.down_proj.weight.data.zero_()
    DePass(model).attribute(models.prompt(9), 5, strict=True)


@pytest.mark.parametrize("size", [1000.0, 8000.0])
def test_an_activation_that_a_late_layer_takes_back_is_no_false_alarm(size: float) -> None:
    """The stream rounds at the size that it had: after layer 2 what is left of it is small."""
    for seed in range(6):
        model = models.make("llama-biased", seed=seed)
        with torch.no_grad():
            model.model.embed_tokens.weight[:, :2] = size
            model.model.layers[2].mlp.down_proj.bias[:2] = -size
            for layer in model.model.layers:
                layer.input_layernorm.weight[:2] = layer.post_attention_layernorm.weight[:2] = 1e-3
        for dtype in (torch.bfloat16, torch.float32):
            DePass(model.to(dtype)).attribute(models.prompt(1), 5)


def test_a_run_whose_numbers_are_not_finite_checks_nothing() -> None:
    model, ids = models.make("llama"), models.prompt(9)
    dp = DePass(model, family=Family(mlp_norm="input_layernorm"))
    right = model.model.embed_tokens.weight.data.clone()
    model.model.embed_tokens.weight.data.fill_(float("inf"))
    with pytest.raises(NonFiniteError):
        dp.attribute(ids, 5)
    assert dp.bound.checked == set()
    model.model.embed_tokens.weight.data.copy_(right)
    with pytest.raises(ModelError, match="correct the family"):
        dp.attribute(ids, 5)


def test_an_activation_called_by_keyword_is_seen() -> None:
    model = models.make("llama")
    own = type(model.model.layers[0].mlp)

    class ByKeyword(own):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(input=self.gate_proj(x)) * self.up_proj(x))

    for layer in model.model.layers:
        layer.mlp.__class__ = ByKeyword
    DePass(model).attribute(models.prompt(9), 5, strict=True)
    with pytest.raises(ModelError, match="activation function"):
        DePass(model, family=Family(gate="mlp.up_proj")).attribute(models.prompt(9), 5)
