"""Finds what makes a model compute something else than its weights say: hooks, replaced forwards, modules put in later."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import module as torch_module

from ..errors import ModelError
from .bound import BoundModel, Layer

_OBSERVERS = ("depass.", "transformers.")  # packages whose hooks read a module's output and do not change it


class Alteration(NamedTuple):
    """A hook or a replaced forward; it may change what a module computes, or only observe it."""

    path: str  # of the module, "" for a hook on all modules
    what: str

    def __str__(self) -> str:
        return f"{self.path} has {self.what}" if self.path else self.what


def alterations(bound: BoundModel) -> list[Alteration]:
    """The hooks and replaced forwards of a model's modules.

    Raises:
        ModelError: a module was compiled in place, or replaced after ``DePass(model)``.
    """
    found = [Alteration("", f"a global {kind} of torch ({_name(hook)}) is set") for kind, hook in _global_hooks()]
    modules = [*bound.backbone.modules(), bound.head]
    changed = {id(module): what for module in modules for what in _changes(module)}
    if changed:
        paths = {id(module): path for path, module in bound.model.named_modules()}
        found += [Alteration(paths.get(key, "a module"), what) for key, what in changed.items()]
    _refuse_replaced(bound)
    refuse_compiled(bound.model, modules)
    return found


def within(found: list[Alteration], bound: BoundModel, module: nn.Module) -> list[Alteration]:
    """Those of the alterations that are on ``module`` or inside of it; all of them where none is."""
    path = next((path for path, each in bound.model.named_modules() if each is module), None)
    inside = [each for each in found if path and f"{each.path}.".startswith(f"{path}.")]
    return inside or found


def _changes(module: nn.Module) -> Iterator[str]:
    for kind, hooks in (("forward hook", module._forward_hooks), ("forward pre-hook", module._forward_pre_hooks)):
        for hook in hooks.values():
            if not str(getattr(hook, "__module__", "")).startswith(_OBSERVERS):
                yield f"a {kind} ({_name(hook)})"
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):  # accelerate moves weights and inputs only
        yield f"another forward ({_name(vars(module)['forward'])})"


def _global_hooks() -> Iterator[tuple[str, Any]]:
    for kind, hooks in (
        ("forward hook", torch_module._global_forward_hooks),
        ("forward pre-hook", torch_module._global_forward_pre_hooks),
    ):
        for hook in hooks.values():
            yield kind, hook


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__name__).rpartition("<locals>.")[2]


def _refuse_replaced(bound: BoundModel) -> None:
    """Raise a ModelError where the model no longer holds a module that :func:`depass.models.bind.resolve` found."""
    blocks = list(bound.model.get_submodule(f"{bound.family.backbone}.{bound.family.layers}"))
    if hasattr(bound.head, "base_layer"):
        raise ModelError(f"the head of {bound.name} got an adapter after DePass was made; {_way_out(bound.head)}")
    if len(blocks) != len(bound.layers):
        raise ModelError(
            f"{bound.name} has {len(blocks)} layers, and had {len(bound.layers)} when DePass was made; make a new "
            "DePass(model)"
        )
    for index, (block, layer) in enumerate(zip(blocks, bound.layers, strict=True)):
        for path, module in _held(bound, layer):
            try:
                now = block.get_submodule(path)
            except AttributeError:
                now = None
            if now is not module:
                raise ModelError(
                    f"{path} of layer {index} of {bound.name} was replaced by a {type(now).__name__} after DePass was "
                    f"made; {_way_out(now)}"
                )


def _way_out(module: Any) -> str:
    if hasattr(module, "base_layer"):
        return "an adapter must be merged first: model.merge_and_unload()"
    return "make a new DePass(model)"


def _held(bound: BoundModel, layer: Layer) -> Iterator[tuple[str, Any]]:
    family = bound.family
    yield family.attention, layer.attention
    for part in ("value", "output", "gate", "down"):
        yield getattr(family, part), getattr(layer, part).module
    for part in ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm"):
        path = getattr(family, part)
        if path is not None:
            yield path, getattr(layer, part).module


def refuse_compiled(model: Any, modules: list[nn.Module]) -> None:
    """Raise a ModelError where one of the modules is compiled, so that it runs past hooks."""
    for module in modules:
        wrapped = "_orig_mod" in module._modules
        if wrapped or module._compiled_call_impl is not None:
            path = next((path for path, each in model.named_modules() if each is module), "a module")
            undo = f"{path}._orig_mod" if wrapped else f"model.get_submodule({path!r})._compiled_call_impl = None"
            raise ModelError(
                f"{path} of {type(model).__name__} is compiled and runs past the hooks that DePass needs; "
                f"{'use the module inside of it' if wrapped else 'undo it'}: {undo}"
            )
