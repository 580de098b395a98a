"""Finds what makes a model compute something else than its weights say: hooks, replaced forwards, modules put in later."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import module as torch_module

from ..errors import ModelError
from .bound import BoundModel
from .families import Family
from .paths import module_paths

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
    for kind in {type(module) for module in modules} & bound.forwards.keys():
        if kind.forward is not bound.forwards[kind]:
            found.append(Alteration("", f"{kind.__name__} has another forward ({_name(kind.forward)})"))
    changed = {id(module): what for module in modules for what in _changes(module)}
    if changed:
        paths = {id(module): path for path, module in bound.model.named_modules()}
        found += [Alteration(paths.get(key, "a module"), what) for key, what in changed.items()]
    _refuse_replaced(bound)
    refuse_compiled(bound.model, bound.family)
    return found


def within(found: list[Alteration], bound: BoundModel, module: nn.Module) -> list[Alteration]:
    """Those of the alterations that are on ``module`` or inside of it, or on all modules."""
    if not found:  # as at almost every layer; naming the module walks through the model
        return []
    path = next((path for path, each in bound.model.named_modules() if each is module), None)
    return [each for each in found if not each.path or f"{each.path}.".startswith(f"{path}.")]


def likely(found: list[Alteration], bound: BoundModel, index: int | None) -> str:
    """The alterations that can have changed a layer or, without an index, the final norm or the head; in words."""
    if index is not None:
        near = within(found, bound, bound.layers[index].module)
    else:
        ends = [bound.backbone.get_submodule(bound.family.final_norm), bound.head]
        near = [each for module in ends for each in within(found, bound, module)]
        near += [each for each in found if each.path == bound.family.backbone]
    return said_of(list(dict.fromkeys(near)) or found)


def said_of(found: list[Alteration]) -> str:
    """Alterations in words, at most three of them."""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return " and ".join(map(str, found[:3])) + more


def _changes(module: nn.Module) -> Iterator[str]:
    for kind, hooks in (("forward hook", module._forward_hooks), ("forward pre-hook", module._forward_pre_hooks)):
        for hook in hooks.values():
            called = hook.func if isinstance(hook, partial) else hook
            if not str(getattr(called, "__module__", "")).startswith(_OBSERVERS):
                yield f"a {kind} ({_name(hook)})"
    if "forward" in vars(module) and not _is_accelerates(module):
        yield f"another forward ({_name(vars(module)['forward'])})"


def _is_accelerates(module: Any) -> bool:
    """Whether a module's forward is wrapped by accelerate alone, whose hooks move weights and inputs only."""
    hook = getattr(module, "_hf_hook", None)
    hooks = [hook, *getattr(hook, "hooks", ())]
    wrapper, own = getattr(vars(module)["forward"], "func", None), getattr(module, "_old_forward", None)
    return (
        all(type(each).__module__ == "accelerate.hooks" for each in hooks)
        and getattr(wrapper, "__module__", None) == "accelerate.hooks"
        and getattr(own, "__func__", None) is type(module).forward
    )


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
    if bound.backbone.get_submodule(bound.family.final_norm) is not bound.final_norm.module:
        raise ModelError(f"the final norm of {bound.name} was replaced after DePass was made; make a new DePass(model)")
    for index, (block, layer) in enumerate(zip(blocks, bound.layers, strict=True)):
        for path, module in layer.held.items():
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


def refuse_compiled(model: Any, family: Family) -> None:
    """Raise a ModelError where a module that DePass hooks, or one around it, is compiled and runs past the hooks."""
    backbone = model.get_submodule(family.backbone)
    compiled = {
        id(module): "_orig_mod" in module._modules
        for module in backbone.modules()
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None
    }
    if not compiled:
        return
    hooked = {
        id(module) for block in backbone.get_submodule(family.layers) for module in (block, *_hooked(block, family))
    }
    for path, module in model.named_modules():
        if id(module) in compiled and any(id(each) in hooked for each in module.modules()):
            wrapped = compiled[id(module)]
            undo = f"{path}._orig_mod" if wrapped else f"model.get_submodule({path!r})._compiled_call_impl = None"
            raise ModelError(
                f"{path} of {type(model).__name__} is compiled and runs past the hooks that DePass needs; "
                f"{'use the module inside of it' if wrapped else 'undo it'}: {undo}"
            )


def _hooked(block: Any, family: Family) -> Iterator[nn.Module]:
    for part, path in module_paths(block, family).items():
        if part not in ("value", "latent"):  # of these only the weights are read
            yield block.get_submodule(path)
