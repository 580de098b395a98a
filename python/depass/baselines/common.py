"""Code that all baselines share: checked prompts and targets, the model's own pass, and the settings of a result."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..api import DePass
from ..errors import ModelError, NonFiniteError, OptionError
from ..inputs import targets
from ..inputs.prompt import Prompt, encode
from ..inputs.settings import Settings
from ..inputs.targets import Asked, Readout
from ..models import capture, packing
from ..models.alterations import alterations, said_of
from ..models.bound import BoundModel
from ..models.health import blame, dtype_name, refuse_dropout

BATCH_TOKENS = 1024  # tokens of one pass, padding included; a longer prompt has a pass of its own


@dataclass(frozen=True)
class _Case:
    """One prompt and its targets. The readouts are filled in once the model has run on the prompt."""

    prompt: Prompt
    targets: Sequence[Asked]
    readouts: Sequence[Readout] = ()

    def generator(self, seed: int) -> torch.Generator:
        """The prompt's own generator: its random numbers do not depend on the other prompts."""
        digest = hashlib.sha256(repr((seed, self.prompt.ids)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# --- prompts, targets, results ------------------------------------------------------------------------------------------


def _named(name: Any, table: dict[str, Any], kind: str) -> Any:
    if not isinstance(name, str) or name not in table:
        raise OptionError(f"unknown baseline {name!r} for {kind}; choose from {', '.join(table)}")
    return table[name]


def _case(dp: DePass, prompt: Any, target: Any) -> _Case:
    refuse_dropout(dp.bound)
    encoded = encode(prompt, dp.tokenizer, dp.bound)
    return _Case(encoded, targets.check(target, len(encoded.ids), range(0), dp.tokenizer, dp.bound))


def cut(bound: BoundModel) -> ModelError:
    """The error of a model that passes no gradient on, with the hooks that may be why."""
    found = alterations(bound)
    why = f": {said_of(found)}" if found else ""
    return ModelError(
        f"{bound.name} does not pass gradients on to its embeddings by every path, which this baseline needs{why}"
    )


@contextmanager
def every_path_carries_gradients(bound: BoundModel, embeddings: Tensor) -> Iterator[None]:
    """Inside the ``with`` block, refuse a pass of this thread in which attention, an MLP or experts pass no gradient on.

    The residual stream carries gradients past kernels that have none, such as those of 8-bit activations; such gradients
    are wrong. So the graph of what each projection into the stream reads must lead back to the embeddings.

    Args:
        bound: the model.
        embeddings: what the gradients are taken of, or what the pass begins with.

    Raises:
        ModelError: such a pass runs.
    """
    refusal = _Refusal(bound, embeddings)
    with ExitStack() as stack:
        for layer in bound.layers:
            mlps = [mlp for mlp in (layer.mlp, layer.late) if mlp is not None]
            for projection in [*(mixer.output for mixer in layer.mixers), *(mlp.down for mlp in mlps)]:
                stack.callback(projection.module.register_forward_pre_hook(refusal.reads).remove)
            if layer.experts is not None:
                stack.callback(layer.experts.module.register_forward_hook(refusal.writes).remove)
        yield


class _Refusal:
    """Refuses tensors of this thread's pass whose graph does not lead back to the embeddings."""

    def __init__(self, bound: BoundModel, embeddings: Tensor) -> None:
        self.bound, self.thread = bound, threading.get_ident()
        self.reached: set[Any] = {get_gradient_edge(embeddings).node}

    @capture.of_this_thread
    def reads(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._must_lead_back(args[0])

    @capture.of_this_thread
    def writes(self, _: nn.Module, __: Any, output: Any) -> None:
        self._must_lead_back(output[0] if isinstance(output, tuple) else output)

    def _must_lead_back(self, x: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        waiting, seen = [x.grad_fn], set[Any]()
        while waiting:
            node = waiting.pop()
            if node in self.reached:
                self.reached.add(x.grad_fn)  # the walk from what comes later ends here
                return
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [before for before, _ in node.next_functions]
        raise cut(self.bound)


def refuse_inference_mode(bound: BoundModel) -> None:
    """Refuse to take gradients where torch has none.

    Raises:
        OptionError: the call is inside ``torch.inference_mode()``.
        ModelError: the model's weights were made inside it.
    """
    if torch.is_inference_mode_enabled():
        raise OptionError(
            "this baseline takes gradients, which torch.inference_mode() switches off; use torch.no_grad()"
        )
    if any(parameter.is_inference() for parameter in bound.model.parameters()):
        raise ModelError(
            f"the weights of {bound.name} were made inside torch.inference_mode() and take no gradients; load the model "
            "outside of it"
        )


@torch.no_grad()
def _clean(dp: DePass, cases: Sequence[_Case]) -> list[_Case]:
    """The cases with their readouts filled in, from the model's own pass."""
    bound = dp.bound
    done: dict[int, _Case] = {}
    for some in capture.batches(bound, [len(case.prompt.ids) for case in cases], BATCH_TOKENS):
        normed = _normed(bound, [cases[i].prompt.ids for i in some])  # [B, T, D]
        for row, i in zip(normed, some, strict=True):
            vectors = row[[target.position for target in cases[i].targets]]
            logits = bound.logits(vectors).to(bound.state_dtype)
            filled = targets.fill(cases[i].targets, vectors.to(logits), logits, bound, dp.tokenizer)
            readouts = [readout for of_target in filled for readout in of_target]
            for readout in readouts:
                _must_be_finite(bound, readout.logit, f"the model's own logit of {readout.target.label!r}")
            done[i] = _Case(cases[i].prompt, cases[i].targets, readouts)
    return [done[i] for i in range(len(cases))]


def _settings(dp: DePass, name: str) -> Settings:
    depth = len(dp.bound.layers)
    return Settings(
        dp.name, dtype_name(dp.bound.dtype), "none", 0.0, False, 0, depth, method=name, engine="none", family=dp.bound.origin
    )  # fmt: skip


def _must_be_finite(bound: BoundModel, number: float, label: str) -> None:
    if not math.isfinite(number):
        raise NonFiniteError(f"{label} is not finite ({number}); {blame(bound)}")


# --- passes of the model ------------------------------------------------------------------------------------------------


def _normed(bound: BoundModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """The residual stream ``[B, T, D]`` after the final norm."""
    return capture.normed(bound, input_ids=packing.padded(prompts).to(bound.input_device))


@torch.no_grad()
def _embedded(bound: BoundModel, case: _Case) -> Tensor:
    """The token embeddings ``[N, D]``."""
    embedded: Tensor = bound.model.get_input_embeddings()(torch.tensor([case.prompt.ids], device=bound.input_device))[0]
    return embedded


def _value(normed: Tensor, readout: Readout) -> Tensor:
    """The target's logit as a function of one prompt's residual stream ``[T, D]``, up to a constant."""
    w = readout.w.to(normed.device)
    return normed[readout.target.position].to(w) @ w
