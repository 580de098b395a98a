"""The published manager's interface: its numbers where asked for, parts that add up where not.

The selection in ``tests/golden`` is always here. The full set is elsewhere: ``DEPASS_PUBLISHED`` names the directory.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import published
import pytest
import tokens
import torch
from published import Recorded
from torch import Tensor

from depass import (
    DePass,
    DePassError,
    ModelError,
    NonFiniteError,
    OptionError,
    PromptError,
    PublishedDifferenceWarning,
    SourceError,
    TargetError,
)
from depass.compat import official
from depass.compat import published as engine
from depass.compat.official import decomposed_state_manager

pytestmark = pytest.mark.filterwarnings("ignore::depass.errors.PublishedDifferenceWarning")
FILES = ("llama_gqa", "llama_mha", "qwen2")
SELECTED = {name: published.calls(published.SELECTION / f"{name}.safetensors") for name in ("llama_gqa", "qwen2")}
RULES = ("softmax", "relu", "max", "linear", "taylor")
CALLS = [
    *(f"token.{rule}.ignore{ignore}" for rule in RULES for ignore in (1, 0)),
    *("token.softmax.temp07", "token.chunk4", "token.from1", "token.0to2", "token.all"),
    *(f"module.{kind}.{layer}" for kind in ("attn", "mlp", "attn_head") for layer in range(3)),
    *(f"{mode}.{layer}" for mode in ("neuron", "neuron3", "subspace") for layer in range(2)),
    *("score.last.3", "score.last.77"),
]
OPTIONS = {"rule": "mlp_decomposed_function", "temperature": "mlp_softmax_temp"}


class Ids:
    """All that a manager needs of a tokenizer."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def encode(self, prompt: str) -> list[int]:
        return self.ids


@pytest.fixture(scope="module")
def recorded(golden: Path, device: str) -> dict[str, Recorded]:
    """The selection, by file."""
    return {name: published.load(golden / f"{name}.safetensors", device) for name in SELECTED}


@pytest.fixture
def manager(device: str) -> Any:
    return decomposed_state_manager(
        models.make("llama", device=device), Ids(models.prompt(5)), reproduce_published=True
    )


def outcome(recorded: Recorded, name: str) -> Tensor:
    """What a recorded call gives here."""
    call = recorded.calls[name]
    arguments, ids = dict(call), recorded.tensors["input_ids"].tolist()
    method = arguments.pop("call")
    options = {OPTIONS.get(key, key): arguments.pop(key) for key in (*OPTIONS, "ignore_special_token") if key in call}
    made = decomposed_state_manager(recorded.model, Ids(ids), reproduce_published=True, **options)
    if arguments.pop("of", None) is not None:
        state, _ = made.get_last_layer_decomposed_state("a prompt")
        return made.compute_attribute_score(state, **arguments)
    if f"in.{name}" in recorded.tensors:
        arguments["attribute_state"] = recorded.tensors[f"in.{name}"]
    result = getattr(made, method)("a prompt", **arguments)
    return result[0] if isinstance(result, tuple) else result


def test_the_selection_covers_every_recorded_call() -> None:
    assert sorted({call for calls in SELECTED.values() for call in calls}) == sorted(CALLS)


@pytest.mark.parametrize(("name", "call"), [(name, call) for name, calls in SELECTED.items() for call in calls])
def test_the_published_numbers(name: str, call: str, recorded: dict[str, Recorded]) -> None:
    ours = outcome(recorded[name], call)
    assert ours.device.type == "cpu"
    assert recorded[name].deviation(call, ours) <= 2e-5


@pytest.mark.parametrize("name", FILES)
def test_the_published_numbers_of_the_full_set(name: str, full_golden: Path, device: str) -> None:
    full = published.load(full_golden / f"{name}.safetensors", device)
    assert sorted(full.calls) == sorted(CALLS)
    deviations = {call: full.deviation(call, outcome(full, call)) for call in CALLS}
    assert {call: deviation for call, deviation in deviations.items() if not deviation <= 2e-5} == {}


@pytest.mark.parametrize("name", SELECTED)
def test_the_selection_is_taken_from_the_full_set(name: str, recorded: dict[str, Recorded], full_golden: Path) -> None:
    selected, full = recorded[name], published.load(full_golden / f"{name}.safetensors", "cpu")
    assert selected.model.config.to_dict() == full.model.config.to_dict()
    assert selected.calls == {call: full.calls[call] for call in selected.calls}
    for key, tensor in selected.tensors.items():
        if key.startswith("out."):
            assert selected.deviation(key[4:], full.tensors[key]) == 0
        else:
            assert torch.equal(tensor, full.tensors[key])


@pytest.mark.parametrize("which", [0, 1])
def test_published_head_scores_of_smollm2(
    which: int, full_golden: Path, smollm2_dp: DePass, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most layers agree to 3e-5, and all to 2e-3 but for one.

    Quirk 2 drops pre-activations below 1e-5, and rounding moves these by up to 1.1e-6 (fp32 against fp64 in layer 0), so
    that a few fall on the threshold's other side there and here. A layer that is off by more than 2e-3 (layer 0 of the
    second prompt, by 2.7e-3) must agree once the threshold is moved by that much or less.
    """
    cases = [case for case in json.loads((full_golden / "smollm2.json").read_text()) if "head_scores" in case]
    case, made = cases[which], decomposed_state_manager(smollm2_dp.model, None, reproduce_published=True)

    def deviation(layer: int, threshold: float = 1e-5) -> float:
        monkeypatch.setattr(engine, "_THRESHOLD", threshold)
        state = made.get_layer_module_decomposed_state(case["input_ids"], layer, type="attn_head")
        ours = made.compute_attribute_score(state, -1, case["target_id"])
        return (ours - torch.tensor(case["head_scores"][layer])).abs().max().item()

    deviations = torch.tensor([deviation(layer) for layer in range(30)])
    assert deviations.median() <= 3e-5
    off = (deviations > 2e-3).nonzero().flatten().tolist()
    assert len(off) <= 1
    for layer in off:
        assert min(deviation(layer, threshold) for threshold in (0.9e-5, 0.95e-5, 1.05e-5, 1.1e-5)) <= 2e-3


def test_published_neuron_scores_of_smollm2(full_golden: Path, smollm2_dp: DePass) -> None:
    case = next(case for case in json.loads((full_golden / "smollm2.json").read_text()) if "neuron_layer" in case)
    made = decomposed_state_manager(smollm2_dp.model, None, reproduce_published=True)
    state = made.get_mlp_neuron_decomposed_state(case["input_ids"], case["neuron_layer"], compute_num=4)
    ours = made.compute_attribute_score(state, -1, case["target_id"])
    assert (ours - torch.tensor(case["neuron_scores"])).abs().max() <= 2e-3


@pytest.mark.parametrize("reproduce", [False, True])
def test_return_types_of_token_mode(reproduce: bool, device: str) -> None:
    model, ids = models.make("llama", device=device), models.prompt(5)
    made = decomposed_state_manager(model, Ids(ids), reproduce_published=reproduce)
    results = [
        made.get_last_layer_decomposed_state("text"),
        made.get_middle_to_last_decomposed_state("text", 1),
        made.get_middel_to_middle_decomposed_state("text", 0, 2),
        made.all_layer_to_init_attribute_state("text"),
    ]
    with torch.no_grad():
        hidden = model(torch.tensor([ids], device=device), output_hidden_states=True).hidden_states
    for state, states in results:
        assert state.device.type == "cpu"
        assert state.shape[-3:] == (5, 5, 32)
        assert len(states) == 2 * models.LAYERS + 1
        for stream, theirs in zip(states[::2], hidden[:-1], strict=False):
            assert torch.equal(stream, theirs.cpu())
    assert results[3][0].shape == (models.LAYERS + 1, 5, 5, 32)
    assert torch.equal(made.compute_decomposed_state(0), results[0][0])
    assert [stream.shape for stream in made.get_states(ids)] == [(1, 5, 32)] * (2 * models.LAYERS + 1)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "olmo2"])
def test_states_before_the_mlp(name: str, device: str) -> None:
    model = models.make(name, device=device)
    states = decomposed_state_manager(model, None).get_states(models.prompt(5))
    assert len(states) == 2 * models.LAYERS + 1
    assert torch.equal(states[1], states[0]) == (name == "gpt-neox")  # attention and MLP side by side read the same


def test_subspace_states_of_all_layers(manager: Any) -> None:
    parts = torch.randn(3, 5, 32)
    states = manager.get_subspace_decomposed_state_all_layer("text", 1, parts)
    assert [state.shape for state in states] == [(5, 3, 32)] * (models.LAYERS - 1)
    assert torch.equal(states[0], parts.transpose(0, 1))
    last = manager.get_subspace_decomposed_state("text", models.LAYERS - 1, parts)
    assert last.shape == (5, 3, 32)


@pytest.mark.parametrize(("name", "reproduce"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_generated_tokens_are_attributed(name: str, reproduce: bool, device: str) -> None:
    model, tokenizer = models.make(name, device=device), tokens.make()
    made = decomposed_state_manager(model, tokenizer, reproduce_published=reproduce)
    text, scores, state, states = made.model_generate_cite("the cat sat", max_new_tokens=4, min_new_tokens=4)
    given, n = len(tokenizer.encode("the cat sat")), states[0].shape[1]
    assert isinstance(text, str)
    assert [len(score) for score in scores] == list(range(given, given + 4))
    assert n == given + 4
    assert state.shape == (n, n, 32)
    ids = made._ids
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=device)).logits[0].cpu()
    for t, score in enumerate(scores, start=given):
        assert score.sum().item() == pytest.approx(logits[t - 1, ids[t]].item(), abs=1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt-neox"])
def test_tokens_add_up(name: str, rule: str, device: str) -> None:
    model, ids = models.make(name, device=device), models.prompt(6)
    made = decomposed_state_manager(model, Ids(ids), mlp_decomposed_function=rule)
    state, states = made.get_last_layer_decomposed_state("text")
    assert state.shape == (6, 6, 32)
    assert (state.sum(1) - normed(model, states)).abs().max() <= 1e-4
    middle, states = made.get_middel_to_middle_decomposed_state("text", 1, 2)
    assert (middle.sum(1) - states[4][0]).abs().max() <= 1e-4
    every, states = made.all_layer_to_init_attribute_state("text")
    assert (every.sum(2) - torch.cat(states[::2])).abs().max() <= 1e-4


@pytest.mark.parametrize("rule", ["softmax", "max", "taylor"])
def test_tokens_of_a_model_without_biases_have_the_published_numbers(rule: str, recorded: dict[str, Recorded]) -> None:
    llama = recorded["llama_gqa"]
    for ignore in (False, True):
        made = decomposed_state_manager(llama.model, Ids(llama.tensors["input_ids"].tolist()), 0.1, ignore, rule)
        state, _ = made.get_last_layer_decomposed_state("a prompt")
        assert llama.deviation(f"token.{rule}.ignore{int(ignore)}", state) <= 2e-5


def test_block_sizes_change_no_answer(device: str) -> None:
    made = decomposed_state_manager(models.make("llama", device=device), Ids(models.prompt(6)))
    whole, _ = made.get_last_layer_decomposed_state("text")
    cut, _ = made.get_last_layer_decomposed_state("text", single_compute_token=2)
    assert torch.equal(whole, cut)


COMPONENTS: dict[str, Callable[[Any, Any, Tensor], Tensor]] = {
    "attn": lambda made, layer, _: made.get_layer_module_decomposed_state("text", layer, type="attn"),
    "mlp": lambda made, layer, _: made.get_layer_module_decomposed_state("text", layer, type="mlp"),
    "attn_head": lambda made, layer, _: made.get_layer_module_decomposed_state("text", layer, type="attn_head"),
    "neuron": lambda made, layer, _: made.get_mlp_neuron_decomposed_state("text", layer),
    "neuron3": lambda made, layer, _: made.get_mlp_neuron_decomposed_state("text", layer, compute_num=3),
    "subspace": lambda made, layer, parts: made.get_subspace_decomposed_state("text", layer, parts),
}


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("mode", COMPONENTS)
@pytest.mark.parametrize("name", [*SELECTED, "llama", "gpt2", "gpt-neox"])
def test_components_add_up(name: str, mode: str, layer: int, recorded: dict[str, Recorded], device: str) -> None:
    if name in SELECTED:
        model, ids = recorded[name].model, recorded[name].tensors["input_ids"].tolist()
        neurons = model.config.intermediate_size
    else:
        heads_of_their_own = {"num_key_value_heads": 4} if name == "llama" else {}  # the recorded Llama's are shared
        model = models.make(name, device=device, **heads_of_their_own)
        ids, neurons = models.prompt(6), 56
    made = decomposed_state_manager(model, Ids(ids))
    stream = made.get_states("text")[2 * layer + 2]
    state = COMPONENTS[mode](made, layer, torch.cat([0.3 * stream, 0.7 * stream]))
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    sources = {"attn_head": 1 + heads, "neuron": 1 + neurons, "neuron3": 1 + neurons}.get(mode, 2)
    assert state.device.type == "cpu"
    assert state.shape == (len(ids), sources, width)
    assert (state.sum(1) - normed(model, made.states)).abs().max() <= 1e-4


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt-neox"])
def test_subspaces_add_up_after_every_layer(name: str, missing: bool, device: str) -> None:
    made = decomposed_state_manager(models.make(name, device=device), Ids(models.prompt(6)))
    stream = made.get_states("text")[2]
    given = torch.cat([0.3 * stream, (0.2 if missing else 0.7) * stream])
    before = given.clone()
    states = made.get_subspace_decomposed_state_all_layer("text", 0, given)
    for state, whole in zip(states, made.states[2::2], strict=True):
        assert state.shape == (6, 2, 32)
        assert (state.sum(1) - whole[0]).abs().max() <= 1e-4
    assert torch.equal(given, before)
    assert (states[0][:, 1] - given[1]).abs().max() <= 1e-6


def test_an_output_bias_is_counted_to_the_rest_and_not_to_the_neurons(device: str) -> None:
    """In the last layer nothing follows the MLP but the final norm: its output is that of its neurons, and the bias."""
    model = models.make("gpt2", device=device)
    made = decomposed_state_manager(model, Ids(models.prompt(6)))
    neurons = made.get_mlp_neuron_decomposed_state("text", 2)[:, 1:].sum(1)
    module = made.get_layer_module_decomposed_state("text", 2, type="mlp")[:, 1]
    bias, norm = model.transformer.h[2].mlp.c_proj.bias.detach().cpu(), model.transformer.ln_f
    scale = torch.rsqrt(made.states[-1][0].var(-1, unbiased=False) + norm.eps)
    biased = neurons + scale[:, None] * (bias - bias.mean()) * norm.weight.detach().cpu()
    assert (biased - module).abs().max() <= 1e-4


def normed(model: Any, states: list[Tensor]) -> Tensor:
    """The model's own stream ``[N, D]`` after its final norm."""
    backbone = model.base_model
    norm = next(getattr(backbone, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(backbone, name))
    with torch.no_grad():
        return norm(states[-1].to(model.device))[0].cpu()


def test_what_differs_is_said_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official, "_told", False)
    model = models.make("llama", device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decomposed_state_manager(model, None, reproduce_published=True)
    with pytest.warns(PublishedDifferenceWarning, match="reproduce_published=True"):
        decomposed_state_manager(model, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decomposed_state_manager(model, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mlp_softmax_temp": 0}, "mlp_softmax_temp=0"),
        ({"mlp_softmax_temp": "warm"}, "mlp_softmax_temp='warm'"),
        ({"ignore_special_token": "auto"}, "ignore_special_token='auto'"),
        ({"mlp_decomposed_function": "hard"}, "'hard': must be one of softmax"),
        ({"reproduce_published": 1}, "reproduce_published=1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str, device: str) -> None:
    with pytest.raises(OptionError, match=said):
        decomposed_state_manager(models.make("llama", device=device), None, **options)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "gemma2", "olmo2"])
def test_families_that_the_published_code_never_knew_are_refused(name: str, device: str) -> None:
    with pytest.raises(ModelError, match="leave reproduce_published out"):
        decomposed_state_manager(models.make(name, device=device), None, reproduce_published=True)


WRONG: dict[str, tuple[type[DePassError], str, Callable[[Any], object]]] = {
    "no-prompt": (PromptError, "call get_states", lambda m: m.compute_decomposed_state(0)),
    "empty": (PromptError, "prompt is empty", lambda m: m.get_states([])),
    "vocabulary": (PromptError, "id 5000", lambda m: m.get_states([5000])),
    "batch": (PromptError, "a batch", lambda m: m.get_states([[3, 4], [5, 6]])),
    "start": (OptionError, "start_layer_idx=3: .* 0 to 2", lambda m: m.get_middle_to_last_decomposed_state("x", 3)),
    "end": (OptionError, "end_layer_idx=1: .* 2 to 3", lambda m: m.get_middel_to_middle_decomposed_state("x", 1, 1)),
    "negative": (OptionError, "start_layer_idx=-1", lambda m: m.get_mlp_neuron_decomposed_state("x", -1)),
    "float": (OptionError, "start_layer_idx must be an integer", lambda m: m.get_mlp_neuron_decomposed_state("x", 1.0)),
    "compute-num": (OptionError, "compute_num=0", lambda m: m.get_mlp_neuron_decomposed_state("x", 0, compute_num=0)),
    "block": (OptionError, "single_compute_token=0", lambda m: m.get_last_layer_decomposed_state("x", 0)),
    "type": (
        OptionError, "type='ffn': must be one of attn, mlp, attn_head",
        lambda m: m.get_layer_module_decomposed_state("x", 0, type="ffn"),
    ),
    "no-type": (OptionError, "type=None: must be one of", lambda m: m.get_layer_module_decomposed_state("x", 0)),
    "parts": (
        SourceError,
        r"\[M, 5, 32\], got \[2, 4, 32\]",
        lambda m: m.get_subspace_decomposed_state("x", 0, torch.ones(2, 4, 32)),
    ),
    "not-finite": (
        SourceError,
        "must be finite",
        lambda m: m.get_subspace_decomposed_state("x", 0, torch.full((2, 5, 32), torch.nan)),
    ),
    "no-parts": (SourceError, "float tensor", lambda m: m.get_subspace_decomposed_state("x", 0, [1.0])),
    "position": (TargetError, "token_idx=5", lambda m: m.compute_attribute_score(torch.ones(5, 2, 32), 5, 3)),
    "token": (TargetError, "500", lambda m: m.compute_attribute_score(torch.ones(5, 2, 32), 0, 500)),
    "state": (SourceError, r"\[N, M, 32\]", lambda m: m.compute_attribute_score(torch.ones(5, 32), 0, 3)),
    "texts": (
        OptionError,
        "num_return_sequences=2",
        lambda m: m.model_generate_cite([3, 4], max_new_tokens=1, num_beams=2, num_return_sequences=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused(case: str, manager: Any) -> None:
    error, said, call = WRONG[case]
    with pytest.raises(error, match=said):
        call(manager)


@pytest.mark.parametrize("reproduce", [False, True])
def test_a_model_in_training_mode_with_dropout_is_refused(reproduce: bool, device: str) -> None:
    model = models.make("llama", device=device).train()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ModelError, match="training mode"):
        decomposed_state_manager(model, None, reproduce_published=reproduce).get_states(models.prompt(4))


def test_options_set_later_are_heeded(manager: Any) -> None:
    before, _ = manager.get_last_layer_decomposed_state("text")
    manager.mlp_softmax_temp = 0.7
    after, _ = manager.get_last_layer_decomposed_state("text")
    assert (before - after).abs().max() > 1e-3
    manager.mlp_softmax_temp = -1
    with pytest.raises(OptionError, match="mlp_softmax_temp=-1"):
        manager.get_last_layer_decomposed_state("text")


def test_a_stream_that_is_not_finite_is_refused(manager: Any) -> None:
    manager.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the model's weight model.layers.1.mlp.down_proj.weight contains NaN"):
        manager.get_states("text")


def test_text_without_a_tokenizer_is_refused(device: str) -> None:
    with pytest.raises(PromptError, match="needs a tokenizer"):
        decomposed_state_manager(models.make("llama", device=device), None).get_states("text")
