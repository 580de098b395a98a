"""Results made by hand, of every kind, with texts that a page must not believe."""

from __future__ import annotations

from typing import Any, Literal

import torch

from depass import Attribution, Generation, Prompt, Settings, Source, Sweep, Target

EVIL = "</script><b>{{DATA}}\x1b[31m$x$\"'"
PROMPT = Prompt((5, 6, 7), ("the", " cat", EVIL), "the cat" + EVIL, ((0, 3), (4, 7), (7, 30)))
TARGETS = tuple(Target(label, "token", 2, (index,)) for index, label in enumerate((" sat", EVIL)))
SETTINGS = Settings("model<i>", "float32", "softmax", 0.1, False, 0, 4)
KINDS = ["heads", "neurons", "modules"]


def sweep(kind: Any = "heads", layers: int = 4, columns: int = 3, bias: bool = False) -> Sweep:
    random = torch.Generator().manual_seed(layers * columns)
    columns = 2 if kind == "modules" else columns
    shape = (2, layers, 2) if kind == "modules" else (2, layers)
    return Sweep(
        scores=torch.randn(2, layers, columns, generator=random),
        rest=9 + torch.randn(shape, generator=random),
        bias=torch.randn(shape, generator=random) if bias else torch.zeros(shape),
        layers=tuple(range(2, 2 + layers)),
        columns=tuple(range(columns)),
        kind=kind,
        targets=TARGETS,
        target_logits=torch.tensor([12.5, -3.25]),
        conservation_error=torch.full(shape, 1e-7),
        prompt=PROMPT,
        settings=SETTINGS,
    )


def attribution(count: int, kind: Literal["head", "neuron"] = "head") -> Attribution:
    named = [Source(f"L3{kind[0].upper()}{i}", kind, layer=3, index=i) for i in range(count)]
    return Attribution(
        scores=torch.randn(2, 2 + count, generator=torch.Generator().manual_seed(count)),
        sources=(Source("bias", "bias"), Source("rest", "rest"), *named),
        targets=TARGETS,
        target_logits=torch.tensor([12.5, -3.25]),
        conservation_error=torch.tensor([1e-7, 1e-7]),
        prompt=PROMPT,
        settings=SETTINGS,
    )


def token_attribution(tokens: tuple[str, ...], targets: tuple[Target, ...] = TARGETS) -> Attribution:
    """One source per token, scores that differ from target to target."""
    offsets, at = [], 0
    for token in tokens:
        offsets.append((at, at + len(token)))
        at += len(token)
    scores = torch.randn(len(targets), len(tokens), generator=torch.Generator().manual_seed(len(tokens)))
    return Attribution(
        scores=scores,
        sources=tuple(Source(token, "token", t, t + 1) for t, token in enumerate(tokens)),
        targets=targets,
        target_logits=scores.sum(1),
        conservation_error=torch.full((len(targets),), 1e-7),
        prompt=Prompt(tuple(range(len(tokens))), tokens, "".join(tokens), tuple(offsets)),
        settings=SETTINGS,
    )


def generation(prompt: tuple[str, ...], new: tuple[str, ...]) -> Generation:
    """Each new token owes something to every token before it, and nothing to itself and those behind it."""
    targets = tuple(Target(token, "token", len(prompt) - 1 + i, (i,)) for i, token in enumerate(new))
    made = token_attribution((*prompt, *new[:-1]), targets)
    for row in range(len(new)):
        made.scores[row, len(prompt) + row :] = 0
    return Generation("".join(new), new, tuple(range(len(new))), made)
