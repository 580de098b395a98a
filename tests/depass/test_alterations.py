"""Altered, wrapped and compiled models: the result is right, or the message says what was done and how to undo it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import models
import pytest
import tokens
import torch
import transformers as tf
from torch import Tensor, nn

from depass import Attribution, ConservationError, ConservationWarning, DePass, ModelError, masking

IDS = models.prompt(9)
VECTOR = torch.linspace(-2, 2, 32)


def steer(module: nn.Module, args: Any, output: Any) -> Any:
    return (output[0] + VECTOR.to(output[0]), *output[1:]) if isinstance(output, tuple) else output + VECTOR.to(output)


def steer_before(module: nn.Module, args: Any) -> Any:
    return (args[0] + VECTOR.to(args[0]), *args[1:])


def scale(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 1.5


ALTERED: dict[str, tuple[str, str, Callable[..., Any], str]] = {  # path, kind, hook, what is named
    "the stream after a layer": ("model.layers.1", "forward", steer, "layer 1: the residual stream after it"),
    "the stream before a layer": ("model.layers.2", "pre", steer_before, "layer 2: the residual stream at its input"),
    "an MLP": ("model.layers.1.mlp", "forward", steer, "layer 1: the residual stream after it"),
    "an MLP's input": ("model.layers.1.mlp", "pre", steer_before, "layer 1: the output of mlp.gate_proj"),
    "an output projection": (
        "model.layers.0.self_attn.o_proj",
        "forward",
        steer,
        "layer 0: the output of mlp.gate_proj",
    ),
    "values": ("model.layers.1.self_attn.v_proj", "forward", scale, "layer 1: the values that its attention gets"),
    "pre-activations, which conserve": (
        "model.layers.1.mlp.gate_proj",
        "forward",
        scale,
        "layer 1: the output of mlp.gate",
    ),
    "a norm": ("model.layers.1.input_layernorm", "forward", scale, "layer 1: the values that its attention gets"),
    "the final norm": ("model.norm", "forward", scale, "the model: the output of the final norm norm"),
    "the head": ("lm_head", "forward", scale, "the model: the logits of the head"),
}


@contextmanager
def hooked(model: Any, path: str, kind: str, hook: Callable[..., Any]) -> Iterator[None]:
    module = model.get_submodule(path)
    handle = (module.register_forward_hook if kind == "forward" else module.register_forward_pre_hook)(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("case", ALTERED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_hook_that_changes_the_model_is_named(case: str, dtype: torch.dtype) -> None:
    path, kind, hook, said = ALTERED[case]
    dp = DePass(models.make("llama", dtype))
    with hooked(dp.model, path, kind, hook):
        with pytest.warns(ConservationWarning) as caught:
            found = dp.attribute(IDS, 5)
        assert {warning.filename for warning in caught} == {__file__}
        (message,) = {str(warning.message) for warning in caught}
        assert said in message
        assert re.search(rf"{path} has a forward (pre-)?hook \({hook.__name__}\)", message)
        assert "dtype" not in message
        assert found.settings.altered is not None
        assert found.settings.altered in message
        with pytest.raises(ConservationError, match=re.escape(said)):
            dp.attribute(IDS, 5, strict=True)
        with pytest.warns(ConservationWarning, match=re.escape(said)):
            dp.sweep("heads", IDS, 5)
        with pytest.warns(ConservationWarning, match=re.escape(said)):
            list(dp.attribute_many([IDS, IDS[:5]], 5))
    after = dp.attribute(IDS, 5, strict=True)  # the check waited for this run
    assert after.settings.altered is None
    assert dp.bound.checked >= {0, 1, 2}


def test_a_change_at_one_position_or_of_one_prompt_is_named_for_that_prompt() -> None:
    dp = DePass(models.make("llama"))

    def at_2(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 2] *= 3
        return output

    for path in ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp"):  # one conserves, one does not
        with hooked(dp.model, path, "forward", at_2), pytest.warns(ConservationWarning, match=r"\(.*at_2\)"):
            dp.attribute(IDS, 5)
    prompts = [models.prompt(9, 1), models.prompt(9, 2), models.prompt(9, 3)]

    def of_the_second(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[1] *= 3
        return output

    with hooked(dp.model, "model.layers.1.mlp", "forward", of_the_second), pytest.warns(ConservationWarning) as caught:
        found = list(dp.attribute_many(prompts, 5))
    assert [result.settings.altered is None for result in found] == [True, False, True]
    assert len(caught) == 1


def test_the_cause_is_named_before_bystanders() -> None:
    dp = DePass(models.make("llama"))

    def looks(module: nn.Module, *_: Any) -> None:
        pass

    def on_all(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 2 if module is dp.model.model.layers[1].mlp else None

    with hooked(dp.model, "model.layers.1.mlp.act_fn", "forward", looks):
        handle = nn.modules.module.register_module_forward_hook(on_all)
        with pytest.warns(
            ConservationWarning, match=r"may come from this: a global forward hook of torch \(.*on_all\)"
        ):
            dp.attribute(IDS, 5)
        handle.remove()
        with hooked(dp.model, "lm_head", "forward", scale):
            for options in ({}, {"stop_layer": 2}):
                with pytest.warns(
                    ConservationWarning, match=r"may come from this: lm_head has a forward hook \(scale\)"
                ):
                    dp.attribute(IDS, 5, **options)


def test_a_class_patched_later_is_named() -> None:
    dp = DePass(models.make("llama"))
    dp.attribute(IDS, 5)
    kind = type(dp.model.model.layers[0].mlp)
    own = kind.forward

    def louder(self: Any, x: Tensor) -> Tensor:
        return own(self, x) * 2  # type: ignore[no-any-return]

    kind.forward = louder
    try:
        with pytest.warns(ConservationWarning, match=rf"this: {kind.__name__} has another forward \(louder\)"):
            dp.attribute(IDS, 5)
    finally:
        kind.forward = own
    dp.attribute(IDS, 5, strict=True)


def test_alterations_of_a_model_that_accelerate_hooks_are_seen() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = models.make("llama")
    accelerate.cpu_offload(model, torch.device("cpu"))
    dp = DePass(model)
    dp.attribute(IDS, 5, strict=True)
    gate = model.model.layers[1].mlp.gate_proj
    own = gate.forward
    gate.forward = lambda x: own(x) * 1.5
    with pytest.warns(ConservationWarning, match="model.layers.1.mlp.gate_proj has another forward"):
        dp.attribute(IDS, 5)

    class Louder(accelerate.hooks.ModelHook):  # type: ignore[misc,name-defined]
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 2

    model = models.make("llama")
    accelerate.hooks.add_hook_to_module(model.model.layers[1].mlp, Louder())
    with pytest.warns(ConservationWarning, match="model.layers.1.mlp has another forward"):
        DePass(model).attribute(IDS, 5)


def test_what_made_a_result_wrong_is_saved_with_it(tmp_path: Any) -> None:
    dp = DePass(models.make("llama"))
    with hooked(dp.model, "model.layers.1", "forward", steer), pytest.warns(ConservationWarning):
        found = dp.attribute(IDS, 5)
    found.save(tmp_path / "a.safetensors")
    assert Attribution.load(tmp_path / "a.safetensors").settings == found.settings


def test_hooks_that_only_look_change_nothing() -> None:
    dp, seen = DePass(models.make("llama")), list[str]()
    expected = dp.attribute(IDS, 5)
    with (
        hooked(dp.model, "model.layers.1", "forward", lambda *_: seen.append("layer")),
        hooked(dp.model, "model.layers.2.mlp.gate_proj", "pre", lambda *_: seen.append("gate")),
    ):
        found = dp.attribute(IDS, 5, strict=True)
    assert seen == ["layer", "gate"]
    assert torch.equal(found.scores, expected.scores)
    assert found.settings == expected.settings


def test_a_change_of_what_enters_the_first_layer_is_attributed() -> None:
    """The state begins with the model's own stream, so steered embeddings are simply the embeddings."""
    dp = DePass(models.make("llama"))
    with hooked(dp.model, "model.embed_tokens", "forward", steer):
        found = dp.attribute(IDS, 5, strict=True)
        own = dp.model(torch.tensor([IDS])).logits[0, -1, 5]
    torch.testing.assert_close(found.target_logits[0], own)


def test_a_replaced_forward_and_a_global_hook_are_named() -> None:
    dp = DePass(models.make("llama"))
    mlp = dp.model.model.layers[1].mlp
    own = mlp.forward

    def louder(x: Tensor) -> Tensor:
        return own(x) * 2  # type: ignore[no-any-return]

    mlp.forward = louder
    with pytest.warns(ConservationWarning, match=r"layer 1: .*model.layers.1.mlp has another forward \(louder\)"):
        dp.attribute(IDS, 5)
    del mlp.forward

    def on_all(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 2 if module is mlp else None

    handle = nn.modules.module.register_module_forward_hook(on_all)
    try:
        with pytest.warns(ConservationWarning, match=r"layer 1: .*a global forward hook of torch \(on_all\) is set"):
            dp.attribute(IDS, 5)
    finally:
        handle.remove()


def test_modules_put_in_later_are_refused() -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) * 1.1  # type: ignore[no-any-return]

    for path in ("self_attn.v_proj", "mlp.down_proj", "mlp.gate_proj"):
        dp = DePass(models.make("llama"))
        dp.attribute(IDS, 5)
        layer = dp.model.model.layers[1]
        parent, name = layer.get_submodule(path.split(".")[0]), path.split(".")[1]
        base = getattr(parent, name)
        setattr(parent, name, Adapter(base))
        with pytest.raises(ModelError, match=rf"{path} of layer 1 .* by a Adapter .*model.merge_and_unload\(\)"):
            dp.attribute(IDS, 5)
        setattr(parent, name, nn.Linear(base.in_features, base.out_features, bias=False))
        with pytest.raises(ModelError, match=rf"{path} of layer 1 .* by a Linear .*make a new DePass\(model\)"):
            dp.attribute(IDS, 5)
        setattr(parent, name, base)
        dp.attribute(IDS, 5, strict=True)
    norm = dp.model.model.norm
    dp.model.model.norm = type(norm)(32)
    with pytest.raises(ModelError, match=r"the final norm of .* was replaced after DePass was made"):
        dp.attribute(IDS, 5)
    dp.model.model.norm = norm
    dp.model.model.layers = dp.model.model.layers[:2]
    with pytest.raises(ModelError, match="has 2 layers, and had 3 when DePass was made"):
        dp.attribute(IDS, 5)


def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = models.make("llama")
    dp, expected = DePass(model), DePass(models.make("llama")).attribute(IDS, 5)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["v_proj", "down_proj"], init_lora_weights=False)
    )
    with pytest.raises(ModelError, match=r"merge_and_unload\(\)"):
        dp.attribute(IDS, 5)
    with pytest.raises(ModelError, match=r"got PeftModel.*; merge its adapters first: DePass\(model.merge_and_unload"):
        DePass(adapted)
    merged = DePass(adapted.merge_and_unload()).attribute(IDS, 5, strict=True)
    assert float((merged.scores - expected.scores).norm()) > 0.01


def test_weights_that_are_computed_are_read_as_they_are() -> None:
    dp = DePass(models.make("llama"))
    for name in ("q_proj", "v_proj"):
        nn.utils.parametrizations.weight_norm(getattr(dp.model.model.layers[1].self_attn, name))
    dp.model.model.layers[1].mlp.gate_proj.weight.data *= 1.5
    found = dp.attribute(IDS, 5, strict=True)
    torch.testing.assert_close(found.target_logits[0], dp.model(torch.tensor([IDS])).logits[0, -1, 5])


# --- masks, which are alterations of our own


def test_under_a_mask_nothing_is_warned_about_and_the_check_is_made() -> None:
    dp = DePass(models.make("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with masking.heads(dp, {1: [0, 2]}), masking.neurons(dp, {0: [3, 4, 5], 2: [7]}):
            found = dp.attribute(IDS, 5, strict=True)
    assert found.settings.altered is None
    assert dp.bound.checked >= {0, 1, 2}


# --- wrapped and compiled models


def test_wrapped_models_are_refused_with_the_line_that_unwraps_them() -> None:
    model = models.make("llama")
    pipeline = tf.TextGenerationPipeline(model=model, tokenizer=tokens.make())
    for wrapped, line in (
        (torch.compile(model, backend="eager"), "DePass(model._orig_mod)"),
        (nn.DataParallel(model), "DePass(model.module)"),
        (pipeline, "DePass(model.model)"),
        ("some/name", "DePass.from_pretrained('some/name')"),
    ):
        with pytest.raises(ModelError, match=re.escape(line)):
            DePass(wrapped)
    for inner in (torch.compile(model, backend="eager")._orig_mod, nn.DataParallel(model).module, pipeline.model):
        DePass(inner).attribute(IDS, 5, strict=True)


def test_compiled_modules_are_refused_with_the_line_that_undoes_it() -> None:
    model = models.make("llama")
    dp = DePass(model)
    dp.attribute(IDS, 5)
    model.model.layers[1].mlp.compile(backend="eager")
    for refused in (lambda: dp.attribute(IDS, 5), lambda: DePass(model)):
        with pytest.raises(ModelError, match=r"model.layers.1.mlp of .* is compiled") as error:
            refused()
        line = str(error.value).partition("undo it: ")[2]
        exec(line, {"model": model})  # runs as printed
        dp.attribute(IDS, 5, strict=True)
        model.model.layers[1].mlp.compile(backend="eager")
    model = models.make("llama")
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    with pytest.raises(ModelError, match=r"use the module inside of it: model.layers.1._orig_mod"):
        DePass(model)
    model = models.make("llama")
    for harmless in (model.model.layers[0].mlp.up_proj, model.model.embed_tokens, model.lm_head):
        harmless.compile(backend="eager")
    DePass(model).attribute(IDS, 5, strict=True)
    model.model.layers[1].mlp.forward = torch.compile(model.model.layers[1].mlp.forward, backend="eager")
    with torch.no_grad():
        model(torch.tensor([IDS]))  # compiled before there are hooks
    with pytest.raises(ModelError, match=r"did not run, which DePass needs; model.layers.1.mlp has another forward"):
        DePass(model).attribute(IDS, 5)
    model = models.make("llama")
    model.compile(backend="eager")  # the whole model, which DePass does not call
    DePass(model).attribute(IDS, 5, strict=True)


def test_a_config_with_another_number_of_layers() -> None:
    model = models.make("llama")
    model.config.num_hidden_layers = 2  # the third layer does not run
    with pytest.raises(ModelError, match=r"did not run layer 2: it holds 3 layers, .*num_hidden_layers=2"):
        DePass(model).attribute(IDS, 5)
    model = models.make("llama")
    model.model.layers = model.model.layers[:2]  # pruned; the config still says 3
    found = DePass(model).attribute(IDS, 5, strict=True)
    torch.testing.assert_close(found.target_logits[0], model(torch.tensor([IDS])).logits[0, -1, 5])
