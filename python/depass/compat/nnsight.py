"""nnsight: attribute a model that nnsight wraps.

::

    model = nnsight.TransformersModel("HuggingFaceTB/SmolLM2-135M", task="text-generation")
    res = from_nnsight(model).attribute("The Colosseum is in", target=" Rome")

Tested with nnsight 0.8.1.
"""

from __future__ import annotations

from typing import Any

from ..api import DePass
from ..errors import DePassError, ModelError


def from_nnsight(model: Any, **options: Any) -> DePass:
    """A :class:`DePass` for the model that nnsight wraps. The weights are loaded now, if they are not loaded yet.

    Args:
        model: a ``TransformersModel`` or ``LanguageModel`` of nnsight, or an ``NNsight`` around a Hugging Face model.
        options: options of :class:`DePass`. The default ``tokenizer`` is nnsight's.

    Raises:
        DePassError: nnsight is not installed.
        ModelError: ``model`` is not a model of nnsight, has edits (its module does not contain them), or DePass does not
            support it.
    """
    try:
        from nnsight import Envoy
    except ImportError as error:
        raise DePassError(f"from_nnsight needs nnsight 0.8 ({error}): pip install 'depass-kernels[nnsight]'") from error
    if not isinstance(model, Envoy):
        raise ModelError(
            f"expected a model of nnsight, got {type(model).__name__}; for a Hugging Face model use DePass(model)"
        )
    edited = _edited(model)
    if edited:
        raise ModelError(
            f"the nnsight model has edits ({', '.join(edited)}), which run only in its traces, so DePass cannot see them; "
            "call clear_edits() on each"
        )
    if hasattr(model, "dispatch"):
        model.dispatch()
    if "tokenizer" not in options:
        options["tokenizer"] = getattr(model, "tokenizer", None)
    return DePass(model._module, **options)


def _edited(envoy: Any) -> list[str]:
    """The paths of nnsight's modules that have edits."""
    own = [envoy.path] if envoy._edits else []
    return own + [path for child in envoy._children for path in _edited(child)]
