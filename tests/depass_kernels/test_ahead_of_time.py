"""Every Triton kernel, in every configuration that its launcher names, compiled for GPUs that need not be there: it fits
the shared memory of a block and spills no register. (The CUDA kernels' check stands in test_csrc_build.py.)"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from depass.propagation.propagate import with_rows_in_runs
from depass_kernels import SourceLayout

pytest.importorskip("triton", exc_type=ImportError)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip(
        "the GPU at hand compiles them; a stand-in for its driver would keep them from running", allow_module_level=True
    )

from ahead_of_time import SHARED_LIMIT, compile_for

from depass_kernels.triton import (
    grouped_matmul,
    grouped_update,
    mix_values,
    normed,
    residual_update,
    share_hidden,
    taylor,
)

RULES = ("softmax", "max", "relu", "linear")
LAYOUTS = {
    "9 sources": SourceLayout.dense(9, 4),
    "33 sources": SourceLayout.dense(33, 4),
    "tokens 96": SourceLayout.tokens(96),
    "tokens 256": SourceLayout.tokens(256),
    "300 sources": SourceLayout.dense(300, 64),
}
SHARED_OF_A_MULTIPROCESSOR = {86: 100 << 10, 90: 228 << 10}  # bytes, of the CUDA programming guide's table
HALF, FULL = torch.bfloat16, torch.float32


def empty(*shape: int, dtype: torch.dtype = FULL) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def share(name: str, rule: str, dtype: torch.dtype) -> Any:
    layout, hidden = LAYOUTS[name], empty(LAYOUTS[name].positions, 1536, dtype=dtype)
    out = empty(layout.rows, 1536, dtype=dtype)
    if rule == "taylor":
        return taylor.launch(empty(layout.rows, 1536), hidden, layout, hidden, out)
    return share_hidden.launch(empty(layout.rows, 1536), hidden, layout, rule, 0.1, out)


def mix(name: str, head_dim: int, dtype: torch.dtype) -> Any:
    layout, heads, kv_heads = LAYOUTS[name], 8, 2
    pattern = empty(1, heads, layout.longest, layout.longest, dtype=dtype)
    values, out = (
        empty(layout.rows, kv_heads * head_dim, dtype=dtype),
        empty(layout.rows, heads * head_dim, dtype=dtype),
    )
    return mix_values.launch(pattern, values, layout, kv_heads, empty(layout.positions), out)


def mix_prompt(n: int, dtype: torch.dtype) -> Any:
    """As the propagation calls it, for a prompt of ``n`` tokens of Llama-3.1-8B's heads."""
    layout = SourceLayout.tokens(n)
    pattern = with_rows_in_runs(empty(1, 32, n, n, dtype=dtype), 16)
    values, out = empty(layout.rows, 8 * 128, dtype=dtype), empty(layout.rows, 32 * 128, dtype=dtype)
    return mix_values.launch(pattern, values, layout, 8, None, out)


def update(scattered: bool, dtype: torch.dtype) -> Any:
    rows = torch.arange(4096) if scattered else None
    return residual_update.launch(
        empty(4096, 2048), empty(4096, 4096, dtype=dtype), empty(2048, 4096, dtype=dtype), rows
    )


def grouped(rows_of_each: int, form: str, dtype: torch.dtype) -> Any:
    """As the propagation calls it for the pre-activations, of 768 neurons an expert (Qwen3-30B-A3B's)."""
    weight = {
        "concatenated": empty(8, 1536, 2048, dtype=dtype)[:, :768],
        "transposed": empty(8, 2048, 1536, dtype=dtype).mT[:, :768],
        "interleaved": empty(8, 2048, 1536, dtype=dtype).mT[:, ::2],
    }[form]
    ends, rows = rows_of_each * torch.arange(1, 9), torch.arange(8 * rows_of_each)
    return grouped_matmul.launch(
        empty(8 * rows_of_each, 2048, dtype=dtype), weight, ends, rows, empty(8 * rows_of_each, 768)
    )


def add_places(columns: int, scaled: bool) -> Any:
    places = torch.zeros(256, 8, dtype=torch.int64)
    return grouped_update.add(empty(256, columns), empty(2048, columns), places, empty(columns) if scaled else None)


def norm(columns: int, some_rows: bool, centred: bool, dtype: torch.dtype) -> Any:
    layout = SourceLayout.tokens(64)
    rows = torch.arange(layout.rows) if some_rows else None
    out = empty(layout.rows, columns, dtype=dtype)
    return normed.launch(
        empty(layout.rows, columns), layout, empty(64), empty(columns, dtype=dtype), centred, rows, out
    )


def launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype in (HALF, FULL):
        short = str(dtype).removeprefix("torch.")
        for name in LAYOUTS:
            for rule in RULES if dtype == HALF or name in ("tokens 256", "300 sources") else ("softmax",):
                yield f"share_hidden {rule} {name} {short}", partial(share, name, rule, dtype)
        yield f"taylor {short}", partial(share, "tokens 256", "taylor", dtype)
        for name in ("9 sources", "tokens 96"):
            for head_dim in (32, 64, 80, 128, 256):
                yield f"mix_values {head_dim} {name} {short}", partial(mix, name, head_dim, dtype)
        for scattered in (False, True):
            yield (
                f"residual_update {'some rows' if scattered else 'all rows'} {short}",
                partial(update, scattered, dtype),
            )
        for rows_of_each in (8, 40, 500):
            for form in ("concatenated", "transposed", "interleaved"):
                yield (
                    f"grouped_matmul {form} {rows_of_each} rows {short}",
                    partial(grouped, rows_of_each, form, dtype),
                )
    for columns, scaled in ((96, False), (768, True), (2048, False)):
        yield f"grouped_update {columns}", partial(add_places, columns, scaled)
    for columns in (576, 4096, 16384):
        for some, centred in ((False, False), (True, True)):
            yield (
                f"normed {columns}{' some rows' * some}{' centred' * centred}",
                partial(norm, columns, some, centred, HALF),
            )
    for head_dim in (64, 128, 256):
        yield f"mix_values {head_dim} tokens 96 float16", partial(mix, "tokens 96", head_dim, torch.float16)


LAUNCHES = dict(launches())


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getoption("--ahead-of-time"):
        pytest.skip("minutes of compiling, done with --ahead-of-time (make test-kernels)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
        yield


@pytest.mark.parametrize("capability", SHARED_LIMIT, ids=lambda capability: f"sm_{capability}")
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles_fits_and_does_not_spill(name: str, capability: int, tmp_path: Path) -> None:
    usage = compile_for(LAUNCHES[name](), capability, tmp_path)
    assert usage.shared <= SHARED_LIMIT[capability]
    assert usage.stack == 0
    if name.startswith(("mix_values", "residual_update", "grouped_matmul")):  # fp32 too, as three tf32 products
        assert usage.count("HMMA") + usage.count("HGMMA") > 0
    if name.startswith("grouped_matmul") and name.endswith("bfloat16") and "interleaved" not in name:
        assert re.findall(r"LDGSTS\.E[.\w]*\.128", usage.sass)  # rows and weights, straight to shared memory
        assert not re.findall(r"LDG\.E[.\w]*\.U16", usage.sass)
    if name.startswith("normed"):
        assert re.findall(r"LDG\.E[.\w]*\.128", usage.sass)  # the state, 16 bytes an access
        assert not re.findall(r"LDG\.E[.\w]*\.U16", usage.sass)
    if name.startswith("share_hidden"):
        assert "LDG.E.128" in usage.sass or "LDG.E.EF.128" in usage.sass  # 16 bytes an access


@pytest.mark.parametrize("capability", [86, 90], ids=lambda capability: f"sm_{capability}")
@pytest.mark.parametrize("n", [100, 128, 250])
def test_the_pattern_is_read_in_runs_of_keys(n: int, capability: int, tmp_path: Path) -> None:
    """16 bytes an access, straight to shared memory; never single 16-bit numbers."""
    usage = compile_for(mix_prompt(n, HALF), capability, tmp_path)
    assert usage.stack == 0
    assert not re.findall(r"LDG\.E[.\w]*\.U16", usage.sass)
    # of the pattern [128, 64] and of the values [64, 128], each by 256 threads
    assert len(re.findall(r"LDGSTS\.E[.\w]*\.128", usage.sass)) >= 4 + 4
    # registers and shared memory leave room for so many blocks of 256 threads on a multiprocessor
    blocks = min(65536 // (256 * usage.registers), SHARED_OF_A_MULTIPROCESSOR[capability] // usage.shared)
    assert blocks >= {86: 1, 90: 2}[capability]
