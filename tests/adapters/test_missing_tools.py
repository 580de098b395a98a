"""Without a tool, its adapter says what to install."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

import models
import pytest

from depass import Attribution, DePass, DePassError
from depass.compat.nnsight import from_nnsight
from depass.compat.transformer_lens import from_bridge


@pytest.fixture(scope="module")
def res() -> Attribution:
    return DePass(models.make("llama")).attribute(models.prompt(4))


USES: dict[str, tuple[str, str, Callable[[Attribution], object]]] = {  # what is used: extra, the tool's module, the use
    "captum": ("captum", "captum.attr", lambda _: import_module("depass.compat.captum")),
    "inseq": ("inseq", "inseq.attr.feat", lambda _: import_module("depass.compat.inseq")),
    "interpreto": ("interpreto", "interpreto", lambda _: import_module("depass.compat.interpreto")),
    "from_bridge": ("transformer-lens", "transformer_lens.model_bridge", lambda _: from_bridge(None)),
    "from_nnsight": ("nnsight", "nnsight", lambda _: from_nnsight(None)),
    "to_captum": ("captum", "captum.attr", lambda res: res.to_captum()),
    "to_inseq": ("inseq", "inseq.data", lambda res: res.to_inseq()),
    "to_circuitsvis": ("transformer-lens", "circuitsvis.tokens", lambda res: res.to_circuitsvis()),
}


@pytest.mark.parametrize("use", USES)
def test_a_missing_tool_is_named(use: str, res: Attribution, monkeypatch: pytest.MonkeyPatch) -> None:
    extra, module, call = USES[use]
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"depass.compat.{use}", raising=False)
    with pytest.raises(DePassError, match=rf"pip install 'depass-kernels\[{extra}\]'"):
        call(res)
