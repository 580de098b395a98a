"""Text decoders inside models that also read images, videos or sound: where one is, and a check that it reads ids alone.

Given ids alone, such a model computes what its text decoder computes, and the decoder is what DePass decomposes. The ids
that stand for features of an image, a video or a sound are placeholders.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..device_memory import asked_bytes
from ..errors import ModelError, first_line
from .bound import BoundModel
from .check import limit
from .families import Family
from .positions import fresh

_MEDIA = {"image": "an image", "video": "a video", "audio": "a sound"}
_PROBE = 6  # tokens


def text_config(config: Any) -> Any:
    """The configuration of a model's text decoder: the model's own, or a part of it."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_wrapped(config: Any) -> bool:
    """Whether a model's text decoder is one of several parts of the model."""
    return text_config(config) is not config


def placeholders(config: Any) -> dict[int, str]:
    """The ids in whose place a model puts features, each with what it stands for (``an image``)."""
    found = {}
    for part in (config, text_config(config)):
        for kind, said in _MEDIA.items():
            for name in (f"{kind}_token_id", f"{kind}_token_index"):
                token = getattr(part, name, None)
                if isinstance(token, int):
                    found[token] = said
    return found


def located(model: Any, family: Family) -> Family:
    """The family with the path of the text decoder as its backbone, where the decoder is a part of the model.

    Raises:
        ModelError: several parts of the model could be the text decoder.
    """
    from transformers import PreTrainedModel

    modules = dict(model.named_modules())
    if not is_wrapped(model.config) or f"{family.backbone}.{family.layers}" in modules:
        return family
    kind = text_config(model.config).model_type
    paths = [
        path
        for path, module in modules.items()
        if isinstance(module, PreTrainedModel)
        and module.config.model_type == kind
        and f"{path}.{family.layers}" in modules
    ]
    if len(paths) > 1:
        raise ModelError(
            f"{type(model).__name__} has several text decoders ({', '.join(paths)}); choose one: "
            "DePass(model, family=depass.Family(backbone=...))"
        )
    return replace(family, backbone=paths[0]) if paths else family


def must_read_ids_alone(bound: BoundModel) -> None:
    """Compare what the head reads in passes of the whole model and of its text decoder, over a few ids.

    Raises:
        ModelError: the model does not run on ids alone, or computes something else than its text decoder.
    """
    ids = [token for token in range(bound.vocab_size // 2, bound.vocab_size) if token not in bound.placeholders]
    prompt = torch.tensor([ids[:_PROBE]], device=bound.input_device)
    with torch.no_grad(), fresh(bound.backbone, bound.switches):
        own: Tensor = bound.backbone(input_ids=prompt, use_cache=False, return_dict=True).last_hidden_state
        of_model = _read_by_head(bound, prompt).to(own.device)
        difference, allowed = _difference(of_model, own), limit(bound.layers[-1], own)
        if not difference > allowed:
            return
        before = _difference(of_model[:, :-1], _read_by_head(bound, prompt[:, :-1]).to(own.device))
    why = "its attention looks ahead" if before > allowed else "it changes what its text decoder gets"
    raise ModelError(
        f"{bound.name} does not compute what its text decoder ({bound.family.backbone}) computes, given ids alone: {why} "
        f"(relative difference {difference:.1e}, limit {allowed:.0e}); DePass does not support such models"
    )


def _read_by_head(bound: BoundModel, ids: Tensor) -> Tensor:
    """The input ``[1, T, D]`` of the head in a pass of the whole model."""
    thread, read = threading.get_ident(), []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            read.append(args[0])

    hook = bound.head.register_forward_pre_hook(note)
    try:
        bound.model(input_ids=ids, use_cache=False, return_dict=True)
    except Exception as error:  # the model's own code may raise anything
        if asked_bytes(error) is not None:
            raise
        raise ModelError(f"{bound.name} does not run on token ids alone: {first_line(error)}") from error
    finally:
        hook.remove()
    if not read or read[0].shape[:2] != ids.shape:
        raise ModelError(f"the head of {bound.name} does not read one vector per token; DePass needs that")
    return read[0]


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of two vectors at a position, relative to the second's size."""
    one, other = one.double(), other.double()
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).max())
