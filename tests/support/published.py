"""Recorded outputs of the published implementation, and the models that they were made with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

SELECTION = Path(__file__).parents[1] / "golden"


@dataclass
class Recorded:
    """One file: a model in eval mode, the file's tensors and, by the name of an output, the call that made it."""

    model: Any
    tensors: dict[str, Tensor]
    calls: dict[str, dict[str, Any]]
    positions: list[int]  # those that the file's outputs hold

    def deviation(self, name: str, ours: Tensor) -> float:
        """The largest difference of an output ``[..., N, M, D]`` or scores ``[M]``, at the positions that the file holds."""
        theirs = self.tensors[f"out.{name}"]
        if theirs.dim() > 1:
            assert ours.shape[-3] == len(self.tensors["input_ids"])
            ours = ours.index_select(ours.dim() - 3, torch.tensor(self.positions))
        assert ours.shape == theirs.shape
        return (ours - theirs).abs().max().item()


def load(path: Path, device: str) -> Recorded:
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a file, not a dict)
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    kind = config.pop("model_type")
    config_class = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind]
    model = transformers.AutoModelForCausalLM.from_config(config_class(**config))
    model.load_state_dict({key[2:]: value for key, value in tensors.items() if key.startswith("w.")})
    every = list(range(len(tensors["input_ids"])))  # the full set's files hold all positions and do not say so
    positions = json.loads(metadata["positions"]) if "positions" in metadata else every
    return Recorded(model.to(device).eval(), tensors, calls(path), positions)


def calls(path: Path) -> dict[str, dict[str, Any]]:
    """By the name of a recorded output, the method and the arguments that it was made with."""
    with safe_open(path, framework="pt") as file:
        made: dict[str, dict[str, Any]] = json.loads(file.metadata()["calls"])
    return made
