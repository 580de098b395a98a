"""Families that are not in the list: inferred from one trial pass, compared on every layer, and said to be inferred."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import models
import pytest
import tokens
import torch
import transformers as tf
from torch import Tensor, nn

from depass import FAMILIES, DePass, Family, ModelError, cli
from depass.models import infer
from depass.models.bind import as_configured, check, resolve
from depass.models.bound import epsilon_of
from depass.models.nearest import nearest
from depass.models.paths import has, has_experts, has_recurrence, has_shared, module_paths
from depass.views.terminal import strip

SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# one for each kind of rows, norms and factors
KINDS = (
    "llama",
    "gemma2",
    "phi3",
    "olmo",
    "gpt2",
    "gpt-neox",
    "granite",
    "hyperclovax",
    "nemotron",
    "cohere",
    "codegen",
)
# one for each kind of experts, MLP beside them, gate, sinks and values
ROUTED = ("qwen3_moe", "qwen2_moe", "gpt_oss", "granitemoeshared", "deepseek_v3", "afmoe", "granite_swa", "bitnet")


def resolved(model: Any) -> Family:
    """The written declaration as it is for one model, without fields that make no difference there."""
    family = as_configured(FAMILIES[model.config.model_type], model.config)
    layer = model.get_submodule(f"{family.backbone}.{family.layers}.0")
    posts = {name: getattr(family, name) for name in ("attention_post_norm", "mlp_post_norm")}
    absent = dict.fromkeys(
        name for name, path in posts.items() if path and isinstance(layer.get_submodule(path), nn.Identity)
    )
    norm = model.get_submodule(f"{family.backbone}.{family.final_norm}")
    epsilon = family.epsilon if epsilon_of(norm, None) is None else None
    layers = list(model.get_submodule(f"{family.backbone}.{family.layers}"))
    unused = {name: Family.__dataclass_fields__[name].default for name in _fields_without_layers(layers, family)}
    if not any(has_recurrence(layer, family) for layer in layers):
        unused |= {"recurrence": None, "recurrence_kind": "delta_rule"}
    return replace(family, parallel_mlp_norm=None, requires=(), epsilon=epsilon, **absent, **unused)


def _fields_without_layers(layers: list[Any], family: Family) -> list[str]:
    """The fields about modules that no layer has: of experts, of an MLP beside them, or of a layer's only MLP."""
    routed = [layer for layer in layers if has_experts(layer, family)]
    shared = [layer for layer in routed if has_shared(layer, family)]
    names = [] if len(routed) < len(layers) else ["gate", "down"]
    names += [] if routed else ["experts"]
    names += [] if shared else ["shared_gate", "shared_down", "shared_weight"]
    return names + ([] if shared or len(routed) < len(layers) else ["gate_rows"])


def unknown(name: str, dtype: torch.dtype = torch.float32, **others: Any) -> Any:
    """A model whose type is not in the list."""
    model = models.make(name, dtype, **others)
    model.config.model_type = "a-new-one"
    return model


def own(name: str, **more: Any) -> Any:
    """A random model of a family of transformers that is not in the list."""
    config = getattr(tf, f"{name}Config")(**{**SIZES, **more})
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(tf, {"CTRL": "CTRLLMHeadModel"}.get(name, f"{name}ForCausalLM"))(config).eval()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1)
    return model


NOT_INFERRED = {  # by name of a model, what inference does not know
    # layers with one sublayer, or with two mixers side by side
    "nemotron_h": "no activation module of a layer reads",
    "falcon_h1": "none of its layers has attention alone, and each has a recurrence (mamba)",
    # a norm on values; experts whose inputs the router weights
    "gemma4": "no projection's output holds the values that the attention function gets",
    "gemma4-experts": "no projection's output holds the values that the attention function gets",
    "llama4": "the experts model.layers.0.feed_forward.experts of Llama4ForCausalLM (Llama4TextExperts) are not of",
}


@pytest.mark.parametrize(("name", "says"), NOT_INFERRED.items())
def test_layers_of_other_forms_are_not_inferred(name: str, says: str) -> None:
    if name not in models.EVERY:
        pytest.skip(f"{name} needs transformers {models.since(name)}")
    with pytest.raises(ModelError) as error:
        DePass(unknown(name))
    assert f"cannot be inferred: {says}" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in models.EVERY if not name.startswith(tuple(NOT_INFERRED))])
def test_the_inferred_family_is_the_written_one(name: str, dtype: torch.dtype) -> None:
    model = models.make(name, dtype)
    family = infer.infer(model)
    assert family == resolved(model)
    infer.compare(resolve(model, check(model, family), "inferred"))


@pytest.mark.parametrize("name", [name for name in KINDS if name in models.EVERY])
def test_an_unknown_type_gets_the_scores_of_its_declaration(name: str) -> None:
    listed, inferred, ids = DePass(models.make(name)), DePass(unknown(name)), models.prompt(9)
    assert (listed.bound.origin, inferred.bound.origin) == ("declared", "inferred")
    for rule, engine in (("softmax", "forward"), ("half", "backward")):
        expected, found = (dp.attribute(ids, 5, rule=rule) for dp in (listed, inferred))
        assert torch.equal(found.scores, expected.scores)
        assert found.conservation_error.max() < 1e-5
        assert found.settings == replace(expected.settings, family="inferred")
        assert found.settings.engine == engine


@pytest.mark.parametrize("name", [name for name in ROUTED if name in models.EVERY])
def test_an_unknown_type_with_experts_gates_or_sinks_gets_the_scores_of_its_declaration(name: str) -> None:
    listed, inferred = DePass(models.make(name), engine="forward"), DePass(unknown(name), engine="forward")
    assert (listed.bound.origin, inferred.bound.origin) == ("declared", "inferred")
    for rule in ("softmax", "taylor"):
        expected, found = (dp.attribute(models.prompt(9), 5, rule=rule) for dp in (listed, inferred))
        assert torch.equal(found.scores, expected.scores)
        assert found.conservation_error.max() < 1e-5
        assert found.settings == replace(expected.settings, family="inferred")


@pytest.mark.skipif(bool(models.NOT_HERE), reason="older transformers lack them, or their attention's interface")
@pytest.mark.parametrize(
    ("name", "more"),
    [("CTRL", {"n_embd": 32, "dff": 48, "n_layer": 3, "n_head": 4}), ("Moshi", {"ffn_dim": 48})],
)
def test_families_of_transformers_that_are_not_in_the_list_are_inferred(name: str, more: dict[str, Any]) -> None:
    dp = DePass(own(name, **more))
    for rule in ("softmax", "taylor", "half"):
        found = dp.attribute(models.prompt(9), 5, rule=rule)
        assert found.conservation_error.max() < 1e-5
        assert found.settings.family == "inferred"


def test_a_result_says_where_its_family_comes_from(tmp_path: Path) -> None:
    model = unknown("llama")
    inferred = DePass(model).attribute(models.prompt(5), 5)
    given = DePass(model, family=Family()).attribute(models.prompt(5), 5)
    listed = DePass(models.make("llama")).attribute(models.prompt(5), 5)
    for result, said in ((inferred, "inferred"), (given, "given")):
        assert result.settings.family == said
        assert f"family: {said}" in result.page_view()["facts"]
        assert f"; family: {said}" in strip(result, 0, 80)[0].plain
        result.save(tmp_path / "result.safetensors")
        assert type(result).load(tmp_path / "result.safetensors").settings.family == said
    assert listed.settings.family == "declared"
    assert "family" not in listed.page_view()["facts"] + strip(listed, 0, 80)[0].plain


def with_its_mlp(forward: Callable[[Any, Tensor], Tensor]) -> Any:
    """An unknown model whose last layer's MLP computes something else."""
    model = unknown("llama")
    for layer in model.model.layers[-1:]:
        layer.mlp.__class__ = type("Other", (type(layer.mlp),), {"forward": forward})
    return model


def changed(module: nn.Module, **members: Any) -> None:
    """Give a module a class of the same name with other members."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **members})


def with_its_last(name: str, path: str, forward: Callable[..., Any], method: str = "forward") -> Any:
    """An unknown model in whose last layer a method computes something else; ``forward`` gets the own method first."""
    model = unknown(name)
    module = model.model.layers[-1].get_submodule(path)
    theirs = getattr(type(module), method)
    changed(module, **{method: lambda self, *args, **more: forward(partial(theirs, self), *args, **more)})
    return model


def scaled_shared(name: str, path: str, which: slice) -> Any:
    """An unknown model some of whose layers add half the output of the MLP beside their experts."""
    model = unknown(name)
    for layer in model.model.layers[which]:
        if has(layer, path):
            kind = type(layer.get_submodule(path))
            changed(layer.get_submodule(path), forward=lambda self, x, kind=kind: 0.5 * kind.forward(self, x))
    return model


def without_interface(name: str) -> Any:
    """An unknown model whose experts do not say how they store their weights."""
    model = unknown(name)
    for layer in model.model.layers:
        del layer.mlp.experts.is_concatenated
    return model


def scaled_stream() -> Any:
    model = unknown("llama")
    kind = type(model.model.layers[0])

    def scaled(*args: Any, **more: Any) -> Any:
        output = kind.forward(*args, **more)
        return (1.5 * output[0], *output[1:]) if isinstance(output, tuple) else 1.5 * output  # as older transformers

    for layer in model.model.layers:
        layer.__class__ = type("Scaled", (kind,), {"forward": scaled})
    return model


def scaled_logits() -> Any:
    model = unknown("llama")
    kind = type(model)

    class Scaled(kind):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **more: Any) -> Any:
            output = super().forward(*args, **more)
            output.logits = 1.7 * output.logits
            return output

    model.__class__ = Scaled
    return model


def functional_activation() -> Any:
    return _functional("llama")


def _functional(name: str) -> Any:
    model = unknown(name)
    kind = type(model.model.layers[0].mlp)

    class Functional(kind):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    for layer in model.model.layers:
        layer.mlp.__class__ = Functional
    return model


IMPOSSIBLE: dict[str, tuple[Callable[[], Any], str]] = {
    "another MLP in the last layer": (
        lambda: with_its_mlp(lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(2 * x)) * mlp.up_proj(x))),
        "layer 2: the output of mlp.gate_proj is not that of its weights",
    ),
    "gate and up exchanged in the last layer": (
        lambda: with_its_mlp(lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x))),
        "layer 2: its activation function does not get the output of mlp.gate_proj",
    ),
    "a scaled stream": (scaled_stream, "what a layer adds to the stream is not what its projections write"),
    "scaled logits": (scaled_logits, "the logits are not the head's output, times 1 or a number of the config"),
    "no module for the activation": (functional_activation, "no activation module of a layer reads the output"),
}
IMPOSSIBLE_EXPERTS: dict[str, tuple[str, Callable[[], Any], str]] = {  # the first: the small model that is changed
    "experts in another form": (
        "mixtral",
        lambda: without_interface("mixtral"),
        "the experts model.layers.0.mlp.experts of MixtralForCausalLM (MixtralExperts) are not of transformers' experts "
        "interface (5.7 and later)",
    ),
    "the router's weights applied twice": (
        "mixtral",
        lambda: with_its_last("mixtral", "mlp.experts", lambda run, x, chosen, weight: run(x, chosen, weight.square())),
        "layer 2: the output of mlp.experts is not the sum of its experts' outputs times the router's weights",
    ),
    "experts that read another input": (
        "mixtral",
        lambda: with_its_last("mixtral", "mlp", lambda run, x: run(2 * x)),
        "layer 2: the input of mlp.experts is not the stream after post_attention_layernorm",
    ),
    "gate and up of experts exchanged": (
        "mixtral",
        lambda: with_its_last(
            "mixtral", "mlp.experts", lambda run, first: run(torch.cat(first.chunk(2, -1)[::-1], -1)), "_apply_gate"
        ),
        "layer 2: the activation of mlp.experts takes other rows of its first projection for the gate",
    ),
    "an MLP beside experts with a factor": (
        "glm4_moe",
        lambda: scaled_shared("glm4_moe", "mlp.shared_experts", slice(None)),
        "what a layer adds to the stream is not what its projections write",
    ),
    "an MLP beside experts with a factor in the last layer": (
        "glm4_moe",
        lambda: scaled_shared("glm4_moe", "mlp.shared_experts", slice(-1, None)),
        "layer 2: the output of the module around mlp.experts is not the sum of ",
    ),
    "another weight of the MLP beside experts in the last layer": (
        "qwen2_moe",
        lambda: scaled_shared("qwen2_moe", "mlp.shared_expert", slice(-1, None)),
        "layer 2: the output of the module around mlp.experts is not the sum of ",
    ),
    "another norm of latent values in the last layer": (
        "deepseek_v3",
        lambda: with_its_last("deepseek_v3", "self_attn.kv_a_layernorm", lambda run, x: 2 * run(x)),
        "layer 2: the values that its attention gets are not those of self_attn.kv_b_proj",
    ),
    "keys chosen for each query": (
        "llama",
        lambda: with_its_last("llama", "self_attn", lambda run, *args, **more: run(*args, indices=torch.ones(1), **more)),
        "the attention of LlamaAttention chooses some keys for each query (indices: sparse attention)",
    ),
}  # fmt: skip
IMPOSSIBLE |= {case: (make, says) for case, (name, make, says) in IMPOSSIBLE_EXPERTS.items() if name in models.EVERY}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_inferred_is_one_line_with_the_reason(case: str) -> None:
    make, says = IMPOSSIBLE[case]
    with pytest.raises(
        ModelError, match=r"unknown model family .*it cannot be inferred: .*pass family=\S.*\)$"
    ) as error:
        DePass(make())
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in ("llama", "granite_swa", "afmoe", "bitnet") if name in models.EVERY])
def test_another_scale_of_what_the_heads_mix_is_not_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = unknown(name)
    code = sys.modules[type(model.model.layers[0].self_attn).__module__]
    theirs = code.eager_attention_forward

    def scaled(*args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        output, pattern = theirs(*args, **more)
        return 0.9 * output, pattern

    monkeypatch.setattr(code, "eager_attention_forward", scaled)
    with pytest.raises(ModelError, match=r"input of self_attn\.o_proj is not the attention pattern times the values"):
        DePass(model)


def renamed_attention() -> Any:
    """A model whose attention is declared nowhere under its name, and whose MLP cannot be inferred."""
    model = functional_activation()
    kind = type(model.model.layers[0])

    class Renamed(kind):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **more: Any) -> Any:
            parts = {**self._modules, "self_attn": self.mixer}
            return kind.forward(SimpleNamespace(**parts), *args, **more)

    for layer in model.model.layers:
        attention = layer.self_attn
        del layer.self_attn
        layer.__class__ = Renamed
        layer.mixer = attention
    return model


def own_class() -> Any:
    """A model of somebody's own class, whose backbone, layers and MLP have other names."""

    class Own(tf.PreTrainedModel):
        config_class = tf.GPT2Config
        _no_split_modules: ClassVar[list[str]] = []

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.net = nn.Module()
            block = {"normed": nn.LayerNorm(32), "mixed": nn.Linear(32, 32)}
            self.net.blocks = nn.ModuleList(nn.ModuleDict(block) for _ in range(3))
            self.embedding, self.head = nn.Embedding(101, 32), nn.Linear(32, 101)

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, ids: Tensor, use_cache: bool = False) -> Any:
            x = self.embedding(ids)
            for block in self.net.blocks:
                x = x + block["mixed"](block["normed"](x))
            return tf.modeling_outputs.CausalLMOutput(logits=self.head(x))

    config = tf.GPT2Config(vocab_size=101, n_embd=32, n_layer=3, n_head=4)
    config.model_type = "of-my-own"
    return Own(config).eval()


NEAREST: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    "no activation module": (
        functional_activation, "'llama': the model has all 9 modules that it names. ", "",
        "dataclasses.replace(depass.FAMILIES['llama'], ...)",
    ),
    "a renamed attention": (
        renamed_attention,
        "'llama': of the 9 modules that it names, the model lacks self_attn, self_attn.v_proj and self_attn.o_proj",
        "in their place it has mixer. ",
        "dataclasses.replace(depass.FAMILIES['llama'], attention=..., value=..., output=...)",
    ),
    "norms of Gemma": (
        lambda: _functional("gemma2"), "'gemma2': the model has all 11 modules that it names", "",
        "dataclasses.replace(depass.FAMILIES['gemma2'], ...)",
    ),
    "a class of one's own": (
        own_class, "'llama': of the 9 modules", "in their place it has normed and mixed. ", "depass.Family(...)",
    ),
}  # fmt: skip


if "mixtral" in models.EVERY:
    NEAREST["experts in another form"] = (
        lambda: without_interface("mixtral"), "'mixtral': the model has all 8 modules that it names. ", "",
        "dataclasses.replace(depass.FAMILIES['mixtral'], ...)",
    )  # fmt: skip
    NEAREST["an MLP beside experts with a factor"] = (
        lambda: scaled_shared("glm4_moe", "mlp.shared_experts", slice(None)),
        "'glm4_moe': the model has all 12 modules that it names. ", "",
        "dataclasses.replace(depass.FAMILIES['glm4_moe'], ...)",
    )  # fmt: skip


@pytest.mark.parametrize("case", NEAREST)
def test_the_error_names_the_nearest_family_and_what_differs(case: str) -> None:
    make, near, instead, declaration = NEAREST[case]
    with pytest.raises(ModelError) as error:
        DePass(make())
    said = str(error.value)
    assert f"The nearest listed family is {near}" in said
    assert instead in said
    assert said.endswith(f"If a depass.Family describes the model, pass family={declaration}")


def test_every_listed_family_is_nearest_to_its_own_model() -> None:
    """Or one listed before it that names the same modules."""
    for name in models.EVERY:
        model = models.make(name)
        layers = infer.known_layers(model)
        found, family = nearest(model, layers), resolved(model)
        # of a recurrence the list names the whole module, and of a projection that also computes a gate the other use
        named = {path for layer in layers for field, path in module_paths(layer, family).items()
                 if not has_recurrence(layer, family) or field not in ("recurrence_value", "recurrence_output")}  # fmt: skip
        named -= {family.mix_gate} if family.mix_gate_rows != "all" else set()
        named -= {family.value_of_keys}  # which every model has
        beside = {"late_gate", "late_down", "late_post_norm"}
        if "experts" in found.lacking:
            beside |= {"shared_gate", "shared_down", "experts_norm", "experts_post_norm", "shared_post_norm"}
        assert not found.lacking.keys() - {"experts", "recurrence", *beside}, name  # which some models of a family lack
        assert named <= set(found.held), name


def test_numbers_that_are_not_finite_are_not_accepted() -> None:
    model = unknown("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"it cannot be inferred: .*not finite"):
        DePass(model)


def test_a_model_that_trains_is_told_to_stop() -> None:
    model = unknown("gpt2").train()
    with pytest.raises(ModelError, match=r"it is in training mode: call model.eval\(\)"):
        DePass(model)


def test_the_trial_leaves_the_model_alone() -> None:
    model = unknown("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    dp = DePass(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert dp.bound.checked == set()  # the first run compares again
    dp.attribute(models.prompt(9), 5)
    assert dp.bound.checked == {0, 1, 2}


def saved(folder: Path, model: Any, kind: str | None = None) -> str:
    """A model's directory; ``kind`` is another type, whose code lies beside it."""
    model.save_pretrained(folder)
    tokens.make().save_pretrained(folder)
    if kind is not None:
        (folder / "own.py").write_text(
            f"from transformers import {type(model.config).__name__} as C, {type(model).__name__} as M\n"
            f"class Own(C):\n    model_type = {kind!r}\nclass Model(M):\n    config_class = Own\n"
        )
        config = (folder / "config.json").read_text()
        auto = '{"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"},'
        config = config.replace(f'"{model.config.model_type}"', f'"{kind}"').replace("{", auto, 1)
        (folder / "config.json").write_text(config)
    return str(folder)


@pytest.mark.parametrize("name", ["llama", "gpt2", "stablelm", "deepseek_v3"])
def test_the_command_prints_a_listed_declaration(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name not in models.EVERY:
        pytest.skip(f"{name} needs transformers {models.since(name)}")
    folder = saved(tmp_path, models.make(name))
    capsys.readouterr()  # the bar of transformers, which counts what it writes
    assert cli.main(["family", "-m", folder]) == 0
    out, err = capsys.readouterr()
    assert eval(out, {"Family": Family}) == FAMILIES[name]
    assert out.startswith(f"# {name}, family: declared\n")
    assert err == ""


def test_the_command_prints_an_inferred_declaration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = models.make("granite")
    folder = saved(tmp_path, model, "a-new-one")
    capsys.readouterr()
    assert cli.main(["family", "-m", folder, "--trust-remote-code"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("# a-new-one, family: inferred\n")
    family = eval(out, {"Family": Family})
    assert family == resolved(model)
    assert DePass(model, family=family).attribute(models.prompt(5), 5).settings.family == "given"
    assert cli.main(["attribute", "the cat", "-m", folder, "--trust-remote-code"]) == 0
    assert "family: inferred" in capsys.readouterr().out


def test_the_command_says_why_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path, own("Falcon", new_decoder_architecture=False), "a-new-one")
    capsys.readouterr()
    assert cli.main(["family", "-m", folder, "--trust-remote-code"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "it cannot be inferred: its first layer does not call transformers' AttentionInterface" in err
