"""Position encodings that depend on the length of a pass: which prompts may share one, and how a pass begins.

Two rotary encodings of transformers do: ``longrope`` has one set of frequencies up to a number of positions and another
beyond it, ``dynamic`` (NTK) has its own set for every length beyond it, and keeps the set of the longest pass so far.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn


class Switch(NamedTuple):
    """A number of positions beyond which a model's position encoding changes."""

    kind: str  # "longrope" or "dynamic"
    positions: int

    def regime(self, length: int) -> Hashable:
        """What passes with the same encoding have in common."""
        return length if self.kind == "dynamic" and length > self.positions else length > self.positions


def switches(backbone: nn.Module) -> tuple[Switch, ...]:
    """The switches of a model's rotary modules, each once."""
    found: dict[Switch, None] = {}
    for module in backbone.modules():
        for layer_type, kind in _kinds(module):
            if kind in ("longrope", "dynamic"):
                limit: Any = module.original_max_seq_len
                if kind == "longrope":
                    limit = _longrope_limit(module, layer_type)
                found[Switch(kind, int(limit))] = None
    return tuple(found)


@contextmanager
def fresh(backbone: nn.Module, given: tuple[Switch, ...]) -> Iterator[None]:
    """Inside the ``with`` block a dynamic encoding does not depend on earlier passes; afterwards it is as before."""
    if not any(switch.kind == "dynamic" for switch in given):
        yield
        return
    modules = [module for module in backbone.modules() if any(kind == "dynamic" for _, kind in _kinds(module))]
    before = [_state(module) for module in modules]
    try:
        for module in modules:
            _forget(module)
        yield
    finally:
        for module, state in zip(modules, before, strict=True):
            for name in _state(module).keys() - state.keys():
                delattr(module, name)
            for name, value in state.items():
                setattr(module, name, value)


def _kinds(module: nn.Module) -> list[tuple[str | None, str]]:
    """The rotary encodings of a module: pairs of the layer type, or None, and the kind."""
    kinds: Any = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return list(kinds.items())
    return [(None, kinds)] if isinstance(kinds, str) else []


def _longrope_limit(module: Any, layer_type: str | None) -> Any:
    config, name = module.config, "original_max_position_embeddings"
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    of_type = parameters.get(layer_type, parameters)
    return of_type.get(name) or getattr(config, name, None) or module.original_max_seq_len


def _state(module: nn.Module) -> dict[str, Any]:
    """What a dynamic encoding changes during a pass: the longest length, the frequencies and the scaling."""
    held = {**vars(module), **module._buffers}
    ends = ("max_seq_len_cached", "inv_freq", "attention_scaling")
    return {name: value for name, value in held.items() if name.endswith(ends)}


def _forget(module: Any) -> None:
    for name in _state(module):
        if name.endswith("max_seq_len_cached"):
            setattr(module, name, module.original_max_seq_len)
        elif name.endswith("original_inv_freq"):
            now = name.replace("original_", "")
            setattr(module, now, getattr(module, name).to(getattr(module, now), copy=True))
