"""Writes the table of the families into docs/models.md: ``python tests/support/family_table.py docs/models.md``.

All of it follows from ``depass.FAMILIES``, but the versions of transformers, which are those of the small models.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import models

from depass import FAMILIES, Family

BEGIN, END = "<!-- the families: begin -->", "<!-- the families: end -->"
NORMS = {"rms": "RMSNorm", "rms_plus_one": "RMSNorm, 1 + w", "layer": "LayerNorm", "layer_plus_one": "LayerNorm, 1 + w"}


def places(family: Family) -> str:
    """Where the norms of a family are."""
    before, after = family.attention_norm is not None, family.attention_post_norm is not None
    return "before and after" if before and after else "after" if after else "before"


def reads(family: Family) -> str:
    """What the MLP reads."""
    if family.single:
        return "the layer's input"
    if isinstance(family.parallel, str):
        return f"the layer's input with `{family.parallel}`"
    return "the layer's input" if family.parallel else "after the attention"


def special(kind: str, family: Family) -> str:
    """What else a family has; whether a recurrence stands beside the attention no family says."""
    found = []
    if family.experts is not None:
        beside = " and an MLP beside" if family.shared_gate else ""
        beside += ", the router's weights on the experts' inputs" if family.input_router else ""
        found.append(f"experts{beside.replace('an MLP', 'a weighted MLP') if family.shared_weight else beside}")
    if family.recurrence is not None:
        kinds = {"delta_rule": "a gated delta rule", "state_space": "Mamba-2"}
        found.append(
            f"{kinds[family.recurrence_kind]} {'beside the attention' if kind == 'falcon_h1' else 'in some layers'}"
        )
    if family.single:
        found.append("one sublayer a layer")
    if family.latent is not None:
        found.append("latent values")
    elif family.value_rows != "all":
        found.append("fused values")
    named = {
        "value_norm": "norms on values", "shared_values": "shared values", "late_gate": "a branch behind the MLP",
        "layer_scalar": "a factor on the stream",
    }  # fmt: skip
    found += [text for part, text in named.items() if getattr(family, part) is not None]
    if family.mix_gate is not None:
        found.append("a gate on what the heads mix")
    if family.mix_norm is not None:
        found.append("a norm on what the heads mix")
    if family.sinks is not None:
        found.append("sinks behind the attention pattern")
    if family.gate_rows != "all":
        found.append("fused gate")
    if family.epsilon is not None:
        found.append(f"epsilon {family.epsilon}")
    found += [f"factor `{name}`" for name in (family.residual_factor, family.logit_factor) if name]
    found += [f"factor `{name}`" for _, name in family.factors]
    found += [f"divisor `{name}`" for name in (family.logit_divisor,) if name]
    found += [f"only `{name}={value}`" for name, value in family.requires]
    return ", ".join(found)


def lines() -> Iterator[str]:
    """The table, a row for each family."""
    yield "| `model_type` | norm | norms on sublayers | the MLP reads | special | transformers |"
    yield "|---|---|---|---|---|---|"
    for kind, family in FAMILIES.items():
        cells = (NORMS[family.norm], places(family), reads(family), special(kind, family), models.since(kind))
        yield f"| `{kind}` | {' | '.join(cells)} |"


def written(text: str) -> str:
    """A document with the table between its markers."""
    if BEGIN not in text or END not in text:
        raise SystemExit(f"the document has no markers; add {BEGIN} and {END} where the table goes")
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{head}{BEGIN}\n" + "\n".join(lines()) + f"\n{END}{tail}"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(written(document.read_text()))
