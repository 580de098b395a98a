"""Token mode agrees with recorded outputs of the published implementation (arXiv 2510.18462)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published import load
from torch import Tensor

from depass import DePass

SOFTMAX = {"mlp_rule": "softmax", "temperature": 0.1, "exclude_bos": True}
CALLS: dict[str, dict[str, Any]] = {
    "token.softmax.ignore1": SOFTMAX,
    "token.softmax.ignore0": {**SOFTMAX, "exclude_bos": False},
    "token.softmax.temp07": {**SOFTMAX, "temperature": 0.7},
    "token.max.ignore1": {**SOFTMAX, "mlp_rule": "max"},
    "token.max.ignore0": {**SOFTMAX, "mlp_rule": "max", "exclude_bos": False},
    "token.taylor.ignore1": {**SOFTMAX, "mlp_rule": "taylor"},
    "token.taylor.ignore0": {**SOFTMAX, "mlp_rule": "taylor", "exclude_bos": False},
    "token.from1": {**SOFTMAX, "start_layer": 1},
    "token.0to2": {**SOFTMAX, "stop_layer": 2},
}


def after_final_norm(state: Tensor, residual: Tensor, model: Any) -> Tensor:
    """``[M, N, D]`` to the published ``[N, M, D]`` behind the frozen final norm."""
    scale = torch.rsqrt(residual.square().mean(-1) + model.config.rms_norm_eps)
    return (state * scale[:, None] * model.model.norm.weight.detach().cpu()).transpose(0, 1)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha"])
def test_last_and_middle_states(name: str, call: str, golden: Path, device: str) -> None:
    model, tensors = load(golden / f"{name}.safetensors", device)
    stop = CALLS[call].get("stop_layer", model.config.num_hidden_layers)
    states = DePass(model).states(tensors["input_ids"], stop, **CALLS[call])
    ours = states.dense(stop)
    ours = ours.transpose(0, 1) if call == "token.0to2" else after_final_norm(ours, states.residual[stop], model)
    assert (ours - tensors[f"out.{call}"]).abs().max() <= 2e-5


@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha"])
def test_states_of_all_layers(name: str, golden: Path, device: str) -> None:
    model, tensors = load(golden / f"{name}.safetensors", device)
    states = DePass(model).states(tensors["input_ids"], exclude_bos=True)
    ours = torch.stack([states.dense(layer).transpose(0, 1) for layer in sorted(states.rows)])
    assert (ours - tensors["out.token.all"]).abs().max() <= 2e-5


@pytest.mark.parametrize("target", [3, 77])
@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha"])
def test_scores(name: str, target: int, golden: Path, device: str) -> None:
    model, tensors = load(golden / f"{name}.safetensors", device)
    res = DePass(model).attribute(tensors["input_ids"], target=target, exclude_bos=True)
    assert (res.scores[0] - tensors[f"out.score.last.{target}"]).abs().max() <= 2e-5
    assert res.target_logits[0].item() == pytest.approx(tensors["logits"][-1, target].item(), abs=2e-5)


def test_all_token_scores_of_smollm2(golden: Path, smollm2_dp: DePass) -> None:
    cases = json.loads((golden / "smollm2.json").read_text())
    assert len(cases) >= 10
    for case in cases:
        res = smollm2_dp.attribute(case["prompt"], target=case["target"], exclude_bos=True)
        assert list(res.prompt.ids) == case["input_ids"]
        assert res.targets[0].token_ids == (case["target_id"],)
        assert res.target_logits[0].item() == pytest.approx(case["logit"], abs=2e-3)
        assert (res.scores[0] - torch.tensor(case["token_scores"])).abs().max() <= 2e-3
