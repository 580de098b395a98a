"""Recorded steps give what steps give, prompt after prompt. A tape stands in for the CUDA graph, which needs a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tape
import torch
from models import EVERY, make

from depass import DePass, OptionError
from depass.engine import request
from depass.propagation.cuda_graphs import Recordings, refuse_graphs
from depass_kernels import backends

needs_csrc = pytest.mark.skipif(backends.csrc_missing() is not None, reason="the reference's steps are not recorded")
LAYERS = 3


def recorded(model: Any, **options: Any) -> DePass:
    made = DePass(model, **options)
    made.engine = replace(made.engine, recordings=Recordings(made.bound, tape.record))
    return made


def prompts(length: int, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, 101, (count, length), generator=generator).tolist()


@needs_csrc
@pytest.mark.parametrize("rule", ["softmax", "taylor"])
@pytest.mark.parametrize("name", ["llama", "llama-biased", "gemma2", "gpt2", "gpt-neox", "qwen2", "olmo2"])
def test_recorded_steps_give_what_steps_give(name: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name)
    plain, graphed = DePass(model, rule=rule, engine="forward"), recorded(model, rule=rule, engine="forward")
    replays = []
    replay = tape.Recorded.replay
    monkeypatch.setattr(tape.Recorded, "replay", lambda recorded: replays.append(1) or replay(recorded))
    for turn, ids in enumerate(prompts(9, 4)):
        expected, got = plain.attribute(ids, target=[5, 17]), graphed.attribute(ids, target=[5, 17])
        # not bit for bit: without a recording the last layer moves only what is read
        torch.testing.assert_close(got.scores, expected.scores, rtol=1e-6, atol=1e-6)
        assert got.settings == expected.settings
        assert (
            len(replays) == max(0, turn - 1) * 2 * LAYERS
        )  # attention and MLP; the first is no recording yet, the second records


@needs_csrc
@pytest.mark.skipif("nemotron_h-dense" not in EVERY, reason="this transformers lacks the model")
def test_layers_with_one_sublayer_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the other step is empty, and an empty CUDA graph cannot be replayed."""
    model = make("nemotron_h-dense")
    plain, graphed = DePass(model, engine="forward"), recorded(model, engine="forward")
    monkeypatch.setattr(tape.Recorded, "replay", lambda _: pytest.fail("a step was replayed"))
    for ids in prompts(9, 4):
        assert torch.equal(graphed.attribute(ids, 5).scores, plain.attribute(ids, 5).scores)


@needs_csrc
def test_layouts_in_turn_and_blocks() -> None:
    model = make("llama")
    plain, graphed = DePass(model), recorded(model, workspace_bytes=4000)
    for length in (9, 4, 9, 4, 1, 9, 4, 9, 1, 1):
        ids = prompts(length, 1)[0]
        torch.testing.assert_close(graphed.attribute(ids, target=5).scores, plain.attribute(ids, target=5).scores)


@needs_csrc
def test_weights_that_change_are_seen() -> None:
    model = make("llama")
    graphed, ids = recorded(model), prompts(8, 1)[0]
    for _ in range(3):
        graphed.attribute(ids, target=5)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)  # in place: the recordings read it where it is
        model.model.layers[2].mlp.gate_proj.weight = torch.nn.Parameter(
            -model.model.layers[2].mlp.gate_proj.weight
        )  # elsewhere
    expected = DePass(model).attribute(ids, target=5)
    for _ in range(2):
        assert torch.equal(graphed.attribute(ids, target=5).scores, expected.scores)


@needs_csrc
def test_a_lent_propagation_is_nobody_elses() -> None:
    model = make("llama")
    dp = recorded(model)
    options = request.options(dp.engine.defaults, dp.bound)
    parts = request.case(dp.bound, None, prompts(5, 1)[0], None, "token", options).parts
    recordings, sharing = dp.engine.recordings, options.sharing
    assert recordings is not None
    lent = [recordings.lend(parts.layout, sharing, None) for _ in range(3)]
    assert len(set(map(id, lent))) == 3
    recordings.give_back(lent[1])
    assert recordings.lend(parts.layout, sharing, None) is lent[1]


def test_steps_of_the_reference_are_not_recorded() -> None:
    model = make("llama")
    graphed, ids = recorded(model, backend="reference"), prompts(8, 1)[0]
    expected = DePass(model, backend="reference").attribute(ids, target=5)
    for _ in range(4):
        assert torch.equal(graphed.attribute(ids, target=5).scores, expected.scores)


@needs_csrc
def test_a_model_that_was_cast_and_states_in_between() -> None:
    model, ids = make("llama"), prompts(8, 1)[0]
    graphed = recorded(model)
    for _ in range(3):
        graphed.attribute(ids, target=5)
    recordings = graphed.engine.recordings
    assert recordings is not None
    kept = list(recordings._idle.values())
    graphed.states(ids)  # takes none of them away
    assert list(recordings._idle.values()) == kept
    model.double()
    for _ in range(3):
        torch.testing.assert_close(
            graphed.attribute(ids, target=5).scores, DePass(model).attribute(ids, target=5).scores
        )


def test_cuda_graphs_need_a_gpu() -> None:
    with pytest.raises(OptionError, match="needs an unquantised model on one CUDA device, but this model is on cpu"):
        DePass(make("llama"), cuda_graphs=True)


def test_cuda_graphs_are_refused_where_there_are_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    first = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refuse_graphs({first}, quantized=False, has_experts=False)  # nothing to refuse
    with pytest.raises(OptionError, match="one CUDA device, but this model is on cuda:"):
        refuse_graphs({first, torch.device("cuda:1")}, quantized=False, has_experts=False)
    with pytest.raises(OptionError, match="this model is quantised and is on cuda:0"):
        refuse_graphs({first}, quantized=True, has_experts=False)
    with pytest.raises(OptionError, match="each prompt chooses its own experts"):
        refuse_graphs({first}, quantized=False, has_experts=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(OptionError, match="torch sees 4; make only one visible"):
        refuse_graphs({first}, quantized=False, has_experts=False)


def test_cuda_graphs_on_a_gpu(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")
    model = make("llama").to("cuda")
    plain, graphed = DePass(model), DePass(model, cuda_graphs=True)
    for ids in prompts(9, 5):
        torch.testing.assert_close(graphed.attribute(ids, target=5).scores, plain.attribute(ids, target=5).scores)
