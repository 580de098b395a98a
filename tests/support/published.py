"""The models that the published implementation's recorded outputs were made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open
from torch import Tensor


def load(path: Path, device: str) -> tuple[Any, dict[str, Tensor]]:
    """A file's model in eval mode, and all of its tensors."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a file, not a dict)
        config = json.loads(file.metadata()["config"])
    kind = config.pop("model_type")
    config_class = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind]
    model = transformers.AutoModelForCausalLM.from_config(config_class(**config))
    model.load_state_dict({key[2:]: value for key, value in tensors.items() if key.startswith("w.")})
    return model.to(device).eval(), tensors


def calls(path: Path) -> dict[str, dict[str, Any]]:
    """By the name of a recorded output, the method and the arguments that it was made with."""
    with safe_open(path, framework="pt") as file:
        made: dict[str, dict[str, Any]] = json.loads(file.metadata()["calls"])
    return made
