"""The package's states agree with the slow loop of ``tests/support/oracle.py``: which shares they are, not only the sum."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from gemma4_oracle import Gemma4Oracle, Llama4Oracle
from oracle import WITHOUT_BIAS, Oracle
from recurrent_oracle import RecurrentOracle

from depass import DePass, Spans

LENGTH = 7
RECURRENT = ("qwen3_next", "granitemoehybrid-mamba", "nemotron_h", "falcon_h1")
OTHERS = {"gemma4": Gemma4Oracle, "gemma4-experts": Gemma4Oracle, "llama4": Llama4Oracle}
NEW = (*OTHERS, "bitnet", "qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoeshared", *RECURRENT)
FAMILIES = [
    "llama",
    "llama-biased",
    "qwen2",
    "gpt2",
    "gpt-neox",
    "gpt-neox-sequential",
    "olmo2",
    "gemma2",
    "phi3",
    "starcoder2",
    *(name for name in ("granite", "olmo", "phi", "cohere", "codegen", *NEW) if name in models.CONFIGS),
]


def check(
    device: str, name: str, rule: str, tau: float, exclude: bool, sources: Any, starts: list[int], owner: list[int]
) -> None:
    ids = models.prompt(LENGTH)
    bias = name not in WITHOUT_BIAS
    if bias:
        starts, owner = [0, *starts], [o + 1 for o in owner]
    its = models.make(name, torch.float64, device)
    kind, tolerance = (OTHERS.get(name, Oracle), 1e-9)
    if name in RECURRENT:
        kind, tolerance = RecurrentOracle, 2e-6  # their rules compute in fp32
    oracle = kind(name.removesuffix("-mamba"), its, ids, starts, owner, bias)
    excluded = (1 if bias else 0) if exclude else None
    expected = oracle.run(rule, tau, excluded)
    states = DePass(its, rule=rule, temperature=tau).states(ids, sources=sources, exclude_bos=exclude)
    assert (states.sources[0].kind == "bias") == bias
    for layer in range(models.LAYERS + 1):
        truth = torch.stack([torch.stack(row) for row in expected[layer]])
        # taylor divides by a total that may come close to zero; its parts are as large as the state itself is not
        assert (states.dense(layer) - truth).abs().max() <= tolerance * max(1.0, float(truth.abs().max()))


CASES: list[tuple[str, float, bool]] = [
    ("softmax", 0.1, True), ("softmax", 0.1, False), ("softmax", 0.7, True), ("softmax", 0.01, False),
    ("max", 0.1, True), ("max", 0.1, False), ("relu", 0.1, True), ("relu", 0.1, False), ("linear", 0.1, True),
    ("linear", 0.1, False), ("taylor", 0.1, True), ("taylor", 0.1, False),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "tau", "exclude"), CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_agree_with_the_definition(name: str, rule: str, tau: float, exclude: bool, device: str) -> None:
    check(device, name, rule, tau, exclude, "token", list(range(LENGTH)), list(range(LENGTH)))


@pytest.mark.usefixtures("patterns_in_runs")
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_agree_where_the_rows_of_the_pattern_are_longer_than_the_prompt(name: str, device: str) -> None:
    check(device, name, "softmax", 0.1, True, "token", list(range(LENGTH)), list(range(LENGTH)))


@pytest.mark.parametrize("rule", ["softmax", "linear"])
@pytest.mark.parametrize("name", FAMILIES)
def test_spans_and_rest_agree_with_the_definition(name: str, rule: str, device: str) -> None:
    spans = Spans([(5, 6), (1, 3)])  # given out of order; tokens 0, 3, 4 and 6 are rest
    check(device, name, rule, 0.1, False, spans, [0, 1, 5], [0, 1, 1, 0, 0, 2, 0])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_bos_span_of_its_own_is_excluded(name: str, device: str) -> None:
    spans = Spans([(0, 1), (1, 4), (4, 7)])
    check(device, name, "softmax", 0.1, True, spans, [0, 1, 4], [0, 1, 1, 1, 2, 2, 2])


def test_the_excluded_token_takes_part_at_its_own_position_only(device: str) -> None:
    ids, rows = models.prompt(4), {}
    for exclude in (True, False):
        states = DePass(models.make("llama", torch.float64, device)).states(ids, 1, exclude_bos=exclude)
        rows[exclude] = states.dense(1)
    assert torch.equal(rows[True][:, 0], rows[False][:, 0])
    assert not torch.equal(rows[True][0, 1:], rows[False][0, 1:])
