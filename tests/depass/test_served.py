"""Whichever backend serves, a whole attribution comes out the same to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import make, prompt

from depass import DePass
from depass_kernels.backends import table


def serving(device: str) -> list[str]:
    missing = {name: why for op, name, why in table() if op == "mix_values"}
    return [name for name, why in missing.items() if why is None and (name != "cpu" or device == "cpu")]


@pytest.mark.parametrize("served_by", ["cpu", "triton", "cuda"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_through_a_whole_model(name: str, served_by: str, dtype: torch.dtype, device: str) -> None:
    if served_by not in serving(device):
        pytest.skip(f"{served_by} does not serve here")
    agree(make(name, dtype, device), prompt(9), served_by, dtype, device)


@pytest.mark.usefixtures("patterns_in_runs")
@pytest.mark.parametrize("served_by", ["cpu", "triton", "cuda"])
@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_backends_agree_where_the_rows_of_the_pattern_are_longer_than_the_prompt(
    length: int, served_by: str, device: str
) -> None:
    if served_by not in serving(device):
        pytest.skip(f"{served_by} does not serve here")
    agree(make("qwen2", torch.float32, device), prompt(length), served_by, torch.float32, device)


def agree(model: Any, ids: list[int], served_by: str, dtype: torch.dtype, device: str) -> None:
    expected = DePass(model, backend="reference").attribute(ids, target=[5, 17], exclude_bos=True)
    got = DePass(model, backend=served_by).attribute(ids, target=[5, 17], exclude_bos=True)
    assert got.settings.backends["mix_values"] == got.settings.backends["share_hidden"] == served_by
    size = float(expected.scores.abs().sum(1).max())
    tolerance = 1e-5 if dtype == torch.float32 and device == "cpu" else 2e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(got.scores, expected.scores, rtol=0, atol=tolerance * size)
