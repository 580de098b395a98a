"""Results made by hand, of every kind, with texts that a page must not believe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from depass import Attribution, Citations, Document, Generation, Prompt, Settings, Source, Survey, Sweep, Target

EVIL = "</script><b>{{DATA}}\x1b[31m$x$\"'"
PROMPT = Prompt((5, 6, 7), ("the", " cat", EVIL), "the cat" + EVIL, ((0, 3), (4, 7), (7, 30)))
TARGETS = tuple(Target(label, "token", 2, (index,)) for index, label in enumerate((" sat", EVIL)))
SETTINGS = Settings("model<i>", "float32", "softmax", 0.1, False, 0, 4)
KINDS = ["heads", "neurons", "experts", "modules"]


def sweep(kind: Any = "heads", layers: int = 4, columns: int = 3, bias: bool = False) -> Sweep:
    random = torch.Generator().manual_seed(layers * columns)
    columns = 2 if kind == "modules" else columns
    shape = (2, layers, 2) if kind == "modules" else (2, layers)
    return Sweep(
        scores=torch.randn(2, layers, columns, generator=random),
        rest=9 + torch.randn(shape, generator=random),
        bias=torch.randn(shape, generator=random) if bias else torch.zeros(shape),
        balance=torch.zeros(shape),
        layers=tuple(range(2, 2 + layers)),
        columns=tuple(range(columns)),
        kind=kind,
        targets=TARGETS,
        target_logits=torch.tensor([12.5, -3.25]),
        conservation_error=torch.full(shape, 1e-7),
        prompt=PROMPT,
        settings=SETTINGS,
    )


def survey(tokens: tuple[str, ...] = PROMPT.tokens, layers: int = 4, rule: str = "half", bias: bool = False) -> Survey:
    """Three heads and five kept neurons per layer; the scores at every layer's input add up to the logit."""
    count, random = len(tokens), torch.Generator().manual_seed(len(tokens))
    scores = torch.randn(2, layers + 1, count, generator=random)
    inputs, logits = (2, layers + 1), torch.tensor([12.5, -3.25])
    settings = replace(SETTINGS, rule=rule, engine="backward")
    apart = torch.randn(inputs, generator=random) if bias else torch.zeros(inputs)
    balance = torch.zeros(inputs) if settings.balance is None else torch.randn(inputs, generator=random)
    scores[:, :, -1] += logits[:, None] - scores.sum(2) - apart - balance
    return Survey(
        tokens=scores,
        bias=apart,
        balance=balance,
        heads_by_position=torch.randn(2, layers, count, 3, generator=random),
        modules_by_position=torch.randn(2, layers, count, 2, generator=random),
        neurons=torch.randn(2, layers, 5, generator=random),
        neuron_ids=torch.stack([torch.randperm(99, generator=random)[:5] for _ in range(2 * layers)]).view(
            2, layers, 5
        ),
        other_neurons=torch.randn(2, layers, generator=random),
        layers=tuple(range(layers)),
        targets=tuple(replace(target, position=count - 1) for target in TARGETS),
        target_logits=logits,
        conservation_error=torch.full(inputs, 1e-7),
        prompt=_prompt(tokens),
        settings=settings,
    )


def _prompt(tokens: tuple[str, ...]) -> Prompt:
    offsets, at = [], 0
    for token in tokens:
        offsets.append((at, at + len(token)))
        at += len(token)
    return Prompt(tuple(range(len(tokens))), tokens, "".join(tokens), tuple(offsets))


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
    scores = torch.randn(len(targets), len(tokens), generator=torch.Generator().manual_seed(len(tokens)))
    return Attribution(
        scores=scores,
        sources=tuple(Source(token, "token", t, t + 1) for t, token in enumerate(tokens)),
        targets=targets,
        target_logits=scores.sum(1),
        conservation_error=torch.full((len(targets),), 1e-7),
        prompt=_prompt(tokens),
        settings=SETTINGS,
    )


def generation(prompt: tuple[str, ...], new: tuple[str, ...]) -> Generation:
    """Each new token owes something to every token before it, and nothing to itself and those behind it."""
    targets = tuple(Target(token, "token", len(prompt) - 1 + i, (i,)) for i, token in enumerate(new))
    made = token_attribution((*prompt, *new[:-1]), targets)
    for row in range(len(new)):
        made.scores[row, len(prompt) + row :] = 0
    answer = Prompt(tuple(range(len(new))), tuple(new), "".join(new))
    return Generation(answer, made)


def citations(documents: dict[str, tuple[str, ...]], new: tuple[str, ...]) -> Citations:
    """Every sentence of the documents is one token; the first token and the last before the answer are the rest."""
    sentences = [sentence for document in documents.values() for sentence in document]
    begin = len(sentences) + 2
    targets = tuple(Target(token, "token", begin - 1 + i, (i,), probability=0.5, rank=1) for i, token in enumerate(new))
    made = token_attribution(("Ask:", *sentences, "Answer:", *new[:-1]), targets)
    rest = made.scores[:, :1] + made.scores[:, begin - 1 : begin]
    cited = [Source(text.strip(), "span", t, t + 1) for t, text in enumerate(sentences, 1)]
    further = [Source(token, "span", begin + t, begin + t + 1) for t, token in enumerate(new[:-1])]
    scores = torch.cat([rest, made.scores[:, 1 : begin - 1], made.scores[:, begin:]], 1)
    made = replace(made, scores=scores, sources=(Source("rest", "rest"), *cited, *further))
    columns = iter(range(1, begin - 1))
    said = tuple(Document(title, tuple(next(columns) for _ in texts)) for title, texts in documents.items())
    return Citations(Generation(_prompt(new), made), said, EVIL, "en")
