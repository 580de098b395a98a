"""nnsight: attribute a model that it wraps.

::

    model = nnsight.TransformersModel("HuggingFaceTB/SmolLM2-135M", task="text-generation")
    res = from_nnsight(model).attribute("The Colosseum is in", target=" Rome")

Tried with nnsight 0.8.1.
"""

from __future__ import annotations

from typing import Any

from ..api import DePass
from ..errors import DePassError, ModelError


def from_nnsight(model: Any, **options: Any) -> DePass:
    """A :class:`DePass` of the model that nnsight wraps, whose weights are loaded now if they were not.

    Args:
        model: a ``TransformersModel`` or ``LanguageModel`` of nnsight, or an ``NNsight`` around a HuggingFace model.
        options: of :class:`DePass`; ``tokenizer`` is nnsight's without it.

    Raises:
        DePassError: nnsight is not installed.
        ModelError: no model of nnsight; one with edits, which its module does not have; one that DePass cannot attribute.
    """
    try:
        from nnsight import Envoy
    except ImportError as error:
        raise DePassError(f"from_nnsight needs nnsight 0.8 ({error}): pip install 'depass-kernels[nnsight]'") from error
    if not isinstance(model, Envoy):
        raise ModelError(
            f"expected a model of nnsight, got {type(model).__name__}; DePass(model) takes one of HuggingFace"
        )
    edited = _edited(model)
    if edited:
        raise ModelError(
            f"the nnsight model has edits ({', '.join(edited)}), which run in its traces alone and would be left out; call "
            "clear_edits() on each"
        )
    if hasattr(model, "dispatch"):
        model.dispatch()
    if "tokenizer" not in options:
        options["tokenizer"] = getattr(model, "tokenizer", None)
    return DePass(model._module, **options)


def _edited(envoy: Any) -> list[str]:
    """Where in a tree of nnsight's modules edits are stored."""
    found = [envoy.path] if envoy._edits else []
    return found + [path for child in envoy._children for path in _edited(child)]
