"""LXT 2.1: AttnLRP by its efficient implementation, with the release of transformers that its README was tested with.

LXT's package imports a patch of torchvision's vision transformer. PyPI's torchvision needs torch's CUDA build, so LXT is
installed without it, and an empty module takes the place of that patch, which no language model uses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import common
from .common import Loaded, Method, logits

PINS = ("transformers==4.52.4",)
WITHOUT_DEPENDENCIES = ("lxt==2.1",)
METHODS = {"AttnLRP": Method("the target's logit", same_as="dual_path", beside="dual_path")}


def load(folder: str) -> Loaded:
    from transformers import AutoConfig
    from transformers.models.gemma3 import modeling_gemma3
    from transformers.models.llama import modeling_llama

    vision = ModuleType("lxt.efficient.models.vit_torch")
    vision.vision_transformer, vision.cp_LRP = vision, {}  # type: ignore[attr-defined]
    sys.modules[vision.__name__] = vision
    from lxt.efficient import monkey_patch

    modules = {"llama": modeling_llama, "gemma3_text": modeling_gemma3}
    monkey_patch(modules[AutoConfig.from_pretrained(folder).model_type])
    loaded = common.load(folder)
    loaded.model.requires_grad_(False)
    return loaded


def scores(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> Tensor:
    """Embedding times modified gradient, as LXT's README does it."""
    embeddings = loaded.model.get_input_embeddings()(torch.tensor([list(ids)])).requires_grad_()
    loaded.model(inputs_embeds=embeddings, use_cache=False).logits[0, -1, target].backward()
    return (embeddings * embeddings.grad).sum(-1)[0].detach()


def explained(loaded: Loaded, method: str, ids: Sequence[int], target: int) -> float | None:
    return float(logits(loaded.model, ids)[target])
