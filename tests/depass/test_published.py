"""Token mode agrees with recorded outputs of the published implementation (arXiv 2510.18462).

The selection in ``tests/golden`` is always here. The full set is elsewhere: ``DEPASS_PUBLISHED`` names the directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published import Recorded, load
from torch import Tensor

from depass import DePass

SOFTMAX = {"rule": "softmax", "temperature": 0.1, "exclude_bos": True}
CALLS: dict[str, dict[str, Any]] = {
    "token.softmax.ignore1": SOFTMAX,
    "token.softmax.ignore0": {**SOFTMAX, "exclude_bos": False},
    "token.softmax.temp07": {**SOFTMAX, "temperature": 0.7},
    "token.max.ignore1": {**SOFTMAX, "rule": "max"},
    "token.max.ignore0": {**SOFTMAX, "rule": "max", "exclude_bos": False},
    "token.taylor.ignore1": {**SOFTMAX, "rule": "taylor"},
    "token.taylor.ignore0": {**SOFTMAX, "rule": "taylor", "exclude_bos": False},
    "token.from1": {**SOFTMAX, "start_layer": 1},
    "token.0to2": {**SOFTMAX, "stop_layer": 2},
}


def after_final_norm(state: Tensor, residual: Tensor, model: Any) -> Tensor:
    """``[M, N, D]`` to the published ``[N, M, D]`` behind the frozen final norm."""
    scale = torch.rsqrt(residual.square().mean(-1) + model.config.rms_norm_eps)
    return (state * scale[:, None] * model.model.norm.weight.detach().cpu()).transpose(0, 1)


def state_deviation(recorded: Recorded, call: str) -> float:
    model = recorded.model
    stop = CALLS[call].get("stop_layer", model.config.num_hidden_layers)
    states = DePass(model).states(recorded.tensors["input_ids"], stop, **CALLS[call])
    ours = states.dense(stop)
    ours = ours.transpose(0, 1) if call == "token.0to2" else after_final_norm(ours, states.residual[stop], model)
    return recorded.deviation(call, ours)


def all_layers_deviation(recorded: Recorded) -> float:
    states = DePass(recorded.model).states(recorded.tensors["input_ids"], exclude_bos=True)
    ours = torch.stack([states.dense(layer).transpose(0, 1) for layer in sorted(states.rows)])
    return recorded.deviation("token.all", ours)


def check_scores(recorded: Recorded, target: int) -> None:
    res = DePass(recorded.model).attribute(recorded.tensors["input_ids"], target=target, exclude_bos=True)
    assert recorded.deviation(f"score.last.{target}", res.scores[0]) <= 2e-5
    logit = recorded.tensors["logits"][-1, target].item()
    assert res.target_logits[0].item() == pytest.approx(logit, abs=2e-5)


@pytest.mark.parametrize("call", CALLS)
def test_last_and_middle_states(call: str, golden: Path, device: str) -> None:
    assert state_deviation(load(golden / "llama_gqa.safetensors", device), call) <= 2e-5


def test_states_of_all_layers(golden: Path, device: str) -> None:
    assert all_layers_deviation(load(golden / "llama_gqa.safetensors", device)) <= 2e-5


@pytest.mark.parametrize("target", [3, 77])
def test_scores(target: int, golden: Path, device: str) -> None:
    check_scores(load(golden / "llama_gqa.safetensors", device), target)


@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha"])
def test_states_and_scores_of_the_full_set(name: str, full_golden: Path, device: str) -> None:
    recorded = load(full_golden / f"{name}.safetensors", device)
    deviations = {call: state_deviation(recorded, call) for call in CALLS}
    deviations["token.all"] = all_layers_deviation(recorded)
    assert {call: deviation for call, deviation in deviations.items() if not deviation <= 2e-5} == {}
    for target in (3, 77):
        check_scores(recorded, target)


def test_all_token_scores_of_smollm2(full_golden: Path, smollm2_dp: DePass) -> None:
    cases = json.loads((full_golden / "smollm2.json").read_text())
    assert len(cases) >= 10
    for case in cases:
        res = smollm2_dp.attribute(case["prompt"], target=case["target"], exclude_bos=True)
        assert list(res.prompt.ids) == case["input_ids"]
        assert res.targets[0].token_ids == (case["target_id"],)
        assert res.target_logits[0].item() == pytest.approx(case["logit"], abs=2e-3)
        assert (res.scores[0] - torch.tensor(case["token_scores"])).abs().max() <= 2e-3
