"""The CUDA kernels without a GPU: emulated on the CPU they agree with the reference; compiled they fit the cards.

And setup.py: which nvcc it takes, and what it says of one that fails.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import oldest_torch
import pytest
import torch
from cuda_emulation.library import Emulated
from layouts import LAYOUTS, poisoned, scale, sliced
from torch import Tensor

import depass_kernels
from depass_kernels import SourceLayout, backends, reference

RULES = ("softmax", "max", "relu", "linear", "taylor")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHECKOUT = Path(__file__).parents[2]
LIBRARY = Path(depass_kernels.__file__).with_name("_csrc.so")
EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are small: threads would cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    if shutil.which("g++") is None:
        pytest.skip("g++ is needed to compile the CUDA sources for the CPU")
    return Emulated(tmp_path_factory.mktemp("emulated"))


def doubled(call: dict[str, Any]) -> dict[str, Any]:
    """The same call in fp64."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}


def judge(out: Tensor, truth: Tensor, eager: Tensor, tiny: Tensor | float) -> None:
    """At most twice eager's own error, and ``tiny``."""
    assert not out.isnan().any()
    error, own = (out.double() - truth).abs(), (eager.double() - truth).abs()
    worst = (error - 2 * own - tiny).max()
    assert worst <= 0, f"{worst:.3g} over the bound, the largest error is {error.max():.3g}"


# ---- share_hidden


def share_call(
    layout: SourceLayout, columns: int, rule: str, gate: torch.dtype, hidden: torch.dtype | None = None
) -> dict[str, Any]:
    hidden = hidden or gate
    total = sliced((layout.positions, columns), hidden, "cpu", seed=4)
    total[:, 0] = 0
    return {
        "gate": sliced((layout.rows, columns), gate, "cpu", scale=0.3),
        "hidden": sliced((layout.positions, columns), hidden, "cpu", seed=2),
        "layout": layout,
        "rule": rule,
        "temperature": 0.1,
        "gate_total": total if rule == "taylor" else None,
    }


def check_share(emulated: Emulated, call: dict[str, Any], out: Tensor, tiny: float = 16 * EPS32) -> None:
    """Off by ``tiny`` times the hidden values: a temperature of 0.1 makes a rounding of the gate ten times as much."""
    truth, eager = torch.zeros(out.shape, dtype=torch.float64), torch.zeros(out.shape, dtype=out.dtype)
    reference.share_hidden(**doubled(call), out=truth)
    reference.share_hidden(**call, out=eager)
    hidden = call["hidden"].double().abs().repeat_interleave(call["layout"].counts, 0)
    if call["rule"] == "taylor":
        hidden = truth.abs()
    emulated.share_hidden(**call, out=out)
    judge(out, truth, eager, torch.finfo(out.dtype).eps * truth.abs() + tiny * hidden)


def runs(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Like ``sliced``, but every row begins at a multiple of 16 bytes."""
    larger = torch.full((rows + 2, columns + 16), float("nan"), dtype=dtype)
    inner = larger[1:-1, 8:-8]
    return inner.copy_(0.3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_sharing_agrees_on_odd_columns(emulated: Emulated, name: str, rule: str, dtype: torch.dtype) -> None:
    layout, columns = LAYOUTS[name], 67 if LAYOUTS[name].rows < 500 else 35
    check_share(emulated, share_call(layout, columns, rule, dtype), poisoned(layout.rows, columns, dtype, "cpu"))


@pytest.mark.parametrize("out", DTYPES, ids=lambda dtype: f"to-{dtype}")
@pytest.mark.parametrize("gate", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_sharing_agrees_in_runs_of_columns(emulated: Emulated, rule: str, gate: torch.dtype, out: torch.dtype) -> None:
    layout, columns = (LAYOUTS["spans"], 1024) if gate == out else (LAYOUTS["tokens17-bias-excluded"], 132)
    call = share_call(layout, columns, rule, gate, out) | {"gate": runs(layout.rows, columns, gate)}
    larger = torch.full((layout.rows, columns + 8), float("nan"), dtype=out)
    check_share(emulated, call, larger[:, :columns])
    assert larger[:, columns:].isnan().all()


@pytest.mark.parametrize("columns", [36, 33])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sources", [16, 17, 257, 700])
def test_sharing_agrees_on_more_sources_than_are_kept(
    emulated: Emulated, sources: int, rule: str, columns: int
) -> None:
    layout = SourceLayout.from_starts([0] * (sources - 5) + [1] * 5, 2, excluded=3)
    for make in (sliced, lambda shape, dtype, _: runs(*shape, dtype)):
        call = share_call(layout, columns, rule, torch.float32)
        call["gate"] = make((layout.rows, columns), torch.float32, "cpu")
        check_share(emulated, call, torch.full((layout.rows, columns), float("nan")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 65])
@pytest.mark.parametrize("rule", RULES)
def test_sharing_may_write_over_its_input(emulated: Emulated, rule: str, columns: int, dtype: torch.dtype) -> None:
    layout = SourceLayout.concat([LAYOUTS["several"], SourceLayout.dense(300, 1)])
    call = share_call(layout, columns, rule, dtype) | {"gate": runs(layout.rows, columns, dtype)}
    apart = torch.empty(layout.rows, columns, dtype=dtype)
    emulated.share_hidden(**call, out=apart)
    same_size = call["gate"].clone()
    emulated.share_hidden(**call, out=call["gate"])
    assert torch.equal(call["gate"], apart)
    if dtype != torch.float32:
        other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
        call["gate"] = same_size
        apart = torch.empty(layout.rows, columns, dtype=other)
        emulated.share_hidden(**call, out=apart)
        emulated.share_hidden(**call, out=same_size.view(other))
        assert torch.equal(same_size.view(other), apart)


@pytest.mark.parametrize("columns", [64, 63])
@pytest.mark.parametrize("rule", RULES[:-1])
@pytest.mark.parametrize("tau", [1e-3, 1e3])
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e4, 1e30])
def test_shares_of_extreme_gates(emulated: Emulated, magnitude: float, tau: float, rule: str, columns: int) -> None:
    layout = SourceLayout.concat([SourceLayout.tokens(20, excluded=0), SourceLayout.dense(300, 1)])
    call = share_call(layout, columns, rule, torch.float32)
    gate = magnitude * sliced((layout.rows, columns), torch.float32, "cpu")
    call |= {"gate": gate, "temperature": tau, "hidden": torch.ones(layout.positions, columns)}
    check_share(emulated, call, poisoned(layout.rows, columns, torch.float32, "cpu"), 4 * EPS32)


@pytest.mark.parametrize("copies", [1, 100])
@pytest.mark.parametrize("rule", RULES[:-1])
def test_infinities_and_nan_go_where_the_reference_has_them(emulated: Emulated, rule: str, copies: int) -> None:
    inf, nan = math.inf, math.nan
    three = torch.tensor(
        [
            [0.1, 0.1, 1.0, nan, -inf, inf, 2.0, -inf],
            [-inf, 0.3, 2.0, 1.0, -inf, 1.0, 2.0, nan],
            [0.2, nan, -5.0, 1.0, -inf, 0.0, 2.0, 1.0],
        ]
    )
    gate = three.repeat(copies, 1)
    layout = SourceLayout.dense(3 * copies, 1)
    call = share_call(layout, 8, rule, torch.float32) | {"gate": gate, "hidden": torch.ones(1, 8)}
    out, eager = torch.zeros(gate.shape), torch.zeros(gate.shape)
    emulated.share_hidden(**call, out=out)
    reference.share_hidden(**call, out=eager)
    assert torch.allclose(out, eager, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("rule", ["softmax", "taylor"])
@pytest.mark.parametrize("columns", [64, 63])
def test_sharing_reaches_beyond_two_to_the_31_numbers(emulated: Emulated, columns: int, rule: str) -> None:
    first = 2**31 // columns + 1
    layout = SourceLayout(
        torch.tensor([first, first + 2, first + 5]), torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([-1, 0])
    )
    small = SourceLayout(layout.row_start - first, layout.position_start, layout.prompt, layout.skipped)
    call = share_call(small, columns, rule, torch.bfloat16)
    out = torch.empty(5, columns, dtype=torch.bfloat16)
    emulated.share_hidden(**call, out=out)
    gate = torch.empty(first + 5, columns, dtype=torch.bfloat16)  # only its end is ever touched
    gate[first:] = call["gate"]
    emulated.share_hidden(**call | {"gate": gate, "layout": layout}, out=gate)
    assert torch.equal(gate[first:], out)


# ---- mix_values

HEADS = {"mha": (2, 2), "gqa": (4, 2), "one": (1, 1)}  # H, K


def mix_call(
    layout: SourceLayout, heads: str, dim: int, pattern: torch.dtype, values: torch.dtype | None = None
) -> dict[str, Any]:
    prompts, n = int(layout.prompt.max()) + 1, layout.longest
    query_heads, kv_heads = HEADS[heads]
    weight = sliced((prompts, query_heads, n, n), pattern, "cpu")
    weight.copy_(weight.tril())
    return {
        "pattern": weight,
        "values": sliced((layout.rows, kv_heads * dim), values or pattern, "cpu", seed=2),
        "layout": layout,
        "kv_heads": kv_heads,
        "query_scale": scale(layout.positions, "cpu", seed=3),
    }


def check_mix(emulated: Emulated, call: dict[str, Any], out: torch.dtype) -> None:
    """Each product is off by up to an eps of it; the sum is fp32 and in order."""
    values = call["values"]
    shape = (values.shape[0], values.shape[1] // call["kv_heads"] * call["pattern"].shape[1])
    truth, products = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    eager = torch.zeros(shape, dtype=out)
    reference.mix_values(**doubled(call), out=truth)
    absolute = {name: call[name].double().abs() for name in ("pattern", "values")}
    reference.mix_values(**doubled(call) | absolute, out=products)
    reference.mix_values(**call, out=eager)
    eps = torch.finfo(values.dtype).eps if values.dtype == call["pattern"].dtype else EPS32
    eps += call["layout"].longest * EPS32 / 2
    for result in (poisoned(*shape, out, "cpu"), torch.full((shape[0], shape[1] + 8), math.nan, dtype=out)[:, :-8]):
        emulated.mix_values(**call, out=result)
        judge(result, truth, eager, eps * products + torch.finfo(out).eps * truth.abs())
        padding = result.as_strided((shape[0], result.stride(0) - shape[1]), (result.stride(0), 1), shape[1])
        assert padding.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_mixing_agrees_on_every_layout(emulated: Emulated, name: str, dtype: torch.dtype) -> None:
    check_mix(emulated, mix_call(LAYOUTS[name], "gqa" if LAYOUTS[name].rows < 200 else "one", 5, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 5, 16, 64, 65, 80, 128, 256])
def test_mixing_agrees_on_every_head_dim(emulated: Emulated, dim: int, dtype: torch.dtype) -> None:
    layout = SourceLayout.from_starts([0, 0, 30, 69], 70)
    call = mix_call(layout, "gqa", dim, dtype)
    check_mix(emulated, call, dtype)
    call["values"] = runs(layout.rows, 2 * dim, dtype)
    larger = torch.full((1, 4, 70, 72), math.nan, dtype=dtype)
    larger[..., :70] = call["pattern"]
    check_mix(emulated, call | {"pattern": larger[..., :70]}, dtype)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("out", DTYPES, ids=lambda dtype: f"to-{dtype}")
@pytest.mark.parametrize("values", DTYPES, ids=lambda dtype: f"values-{dtype}")
@pytest.mark.parametrize("pattern", DTYPES, ids=str)
def test_mixing_agrees_in_every_mix_of_types(
    emulated: Emulated, pattern: torch.dtype, values: torch.dtype, out: torch.dtype, scaled: bool
) -> None:
    call = mix_call(LAYOUTS["spans"], "mha", 24, pattern, values)
    check_mix(emulated, call if scaled else call | {"query_scale": None}, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", [64, 129, 200])
def test_mixing_agrees_on_long_prompts(emulated: Emulated, positions: int, dtype: torch.dtype) -> None:
    starts = [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 130, 199]
    layout = SourceLayout.from_starts([start for start in starts if start < positions], positions)
    check_mix(emulated, mix_call(layout, "one", 8, dtype), dtype)


def test_mixing_agrees_on_many_sources(emulated: Emulated) -> None:
    check_mix(emulated, mix_call(SourceLayout.dense(700, 2), "one", 8, torch.bfloat16), torch.bfloat16)


NORMED = {  # what is given, of scale, weight, centred and rows
    "all": (True, True, True, True), "no rows": (True, True, True, False), "rms": (True, True, False, False),
    "plain": (False, False, False, False), "gathered": (False, False, False, True),
}  # fmt: skip


@pytest.mark.parametrize("given", NORMED)
@pytest.mark.parametrize("out", DTYPES[:1] + DTYPES[2:], ids=lambda dtype: f"to-{dtype}")
@pytest.mark.parametrize("state", DTYPES[:1] + DTYPES[2:], ids=str)
@pytest.mark.parametrize("columns", [1, 40, 1024, 1027])
def test_norming_agrees(emulated: Emulated, columns: int, state: torch.dtype, out: torch.dtype, given: str) -> None:
    scaled, weighted, centred, some = NORMED[given]
    layout = LAYOUTS["several"]
    held = 2 * layout.rows + 1 if some else layout.rows
    rows = torch.randperm(held, generator=torch.Generator().manual_seed(2))[: layout.rows] if some else None
    for x in (sliced((held, columns), state, "cpu"), runs(held, columns, state)):
        call = {
            "state": x, "layout": layout, "scale": scale(layout.positions, "cpu") if scaled else None,
            "weight": sliced((columns,), torch.bfloat16, "cpu", seed=3).contiguous() if weighted else None,
            "centred": centred, "rows": rows,
        }  # fmt: skip
        truth = torch.zeros(layout.rows, columns, dtype=torch.float64)
        eager = torch.zeros(layout.rows, columns, dtype=out)
        reference.normed(**doubled(call), out=truth)
        reference.normed(**call, out=eager)
        for result in (poisoned(*truth.shape, out, "cpu"), runs(layout.rows, columns, out)):
            emulated.normed(**call, out=result)
            judge(result, truth, eager, (torch.finfo(out).eps + 8 * EPS32) * (truth.abs() + x.double().abs().mean()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_goes_its_own_sources_way(emulated: Emulated, dtype: torch.dtype) -> None:
    call = mix_call(SourceLayout.tokens(4), "mha", 8, dtype)
    call["values"][2] = math.nan  # source 1 at position 1
    out = torch.zeros(10, 16, dtype=dtype)
    emulated.mix_values(**call, out=out)
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 6]].isfinite().all()  # source 0


@pytest.mark.parametrize("dim", [64, 63])
def test_mixing_reaches_beyond_two_to_the_31_numbers(emulated: Emulated, dim: int) -> None:
    first = 2**31 // dim + 1
    small = SourceLayout.from_starts([0, 0, 1], 2)
    layout = SourceLayout(small.row_start + first, small.position_start, small.prompt, small.skipped)
    call = mix_call(small, "one", dim, torch.bfloat16)
    out = torch.empty(5, dim, dtype=torch.bfloat16)
    emulated.mix_values(**call, out=out)
    values, far = (torch.empty(first + 5, dim, dtype=torch.bfloat16) for _ in range(2))
    values[first:] = call["values"]
    emulated.mix_values(**call | {"values": values, "layout": layout}, out=far)
    assert torch.equal(far[first:], out)


# ---- the compiled library


@pytest.fixture(scope="session")
def built() -> dict[str, Any]:
    if backends.csrc_missing() is not None:
        pytest.skip(str(backends.csrc_missing()))
    module = pytest.importorskip(
        "depass_kernels._build_info", reason="csrc was built without depass_kernels._build_info"
    )
    info: dict[str, Any] = module.build_info()
    return info


@pytest.fixture(scope="session")
def kernels(built: dict[str, Any]) -> list[dict[str, str]]:
    """Of every kernel for every architecture: its name, and what cuobjdump says it takes."""
    if built["cuda_missing"] is not None:
        pytest.skip(f"csrc was built without its CUDA kernels: {built['cuda_missing']}")
    triton = importlib.util.find_spec("triton")
    beside = Path(str(triton.origin)).parent / "backends/nvidia/bin/cuobjdump" if triton else Path()
    cuobjdump = str(beside) if beside.is_file() else shutil.which("cuobjdump")
    if cuobjdump is None:
        pytest.skip("neither triton's cuobjdump nor one on PATH")
    command = [cuobjdump, "--dump-resource-usage", str(LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, arch = [], ""
    for line in text.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif (name := re.match(r" Function (\w+):", line)) is not None:
            found.append({"arch": arch, "name": name[1]})
        elif "REG:" in line:
            found[-1] |= dict(re.findall(r"(\w+):(\d+)", line))
    return found


def test_every_kernel_is_there_for_every_architecture(built: dict[str, Any], kernels: list[dict[str, str]]) -> None:
    assert built["cuda_architectures"] == ["sm_80", "sm_86", "sm_89", "sm_90"]
    for arch in built["cuda_architectures"]:
        names = [kernel["name"] for kernel in kernels if kernel["arch"] == arch]
        for part, count in {"5share": 8, "taylor": 1, "mix_halves": 6, "mix_singles": 1}.items():
            assert sum(part in name for name in names) == count, (arch, part)


def test_no_kernel_spills_and_every_block_fits(kernels: list[dict[str, str]]) -> None:
    threads = {"norm_rows": 128, "5share": 512, "taylor": 256, "mix_halves": 128, "mix_singles": 256}
    for kernel in kernels:
        assert kernel["STACK"] == "0", kernel
        assert kernel["LOCAL"] == "0", kernel
        block = next(count for part, count in threads.items() if part in kernel["name"])
        # registers are given out to warps in units of 8 a thread
        assert math.ceil(int(kernel["REG"]) / 8) * 8 * block <= 65536, kernel
        assert int(kernel["SHARED"]) <= 1024, kernel  # what the system reserves; the emulation bounds the dynamic rest


def test_the_library_serves_cpu_and_cuda(built: dict[str, Any]) -> None:
    for op in ("normed", "share_hidden", "mix_values"):
        for device in ("CPU", "CUDA"):
            has = torch._C._dispatch_has_kernel_for_dispatch_key(f"depass_kernels::{op}", device)
            assert has == (device == "CPU" or built["cuda_missing"] is None)


def test_the_loader_will_look_for_the_cuda_stream_in_torch(built: dict[str, Any]) -> None:
    """libtorch.so brings libtorch_cuda.so; a linker that drops it as unneeded leaves the weak name empty for good."""
    if built["cuda_missing"] is not None or shutil.which("readelf") is None:
        pytest.skip("built without CUDA kernels, or no readelf")
    says = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    assert "[libtorch.so]" in says


def test_build_info_needs_no_torch(built: dict[str, Any]) -> None:
    code = "import sys; import _build_info; print(_build_info.build_info()['cxx'], 'torch' in sys.modules)"
    says = subprocess.run([sys.executable, "-c", code], cwd=LIBRARY.parent, capture_output=True, text=True, check=True)
    assert says.stdout.split() == [*built["cxx"].split(), "False"]


# ---- setup.py

NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 12.9, V12.9.86" ;;
  --list-gpu-arch) echo "compute_80 compute_86 compute_89 {newest}" ;;
  *) echo 'host_config.h:143:2: error: #error -- unsupported GNU version: "99"' >&2; exit 1 ;;
esac
"""


def nvcc(home: Path, text: str) -> Path:
    """A CUDA compiler for $CUDA_HOME."""
    path = home / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module; nothing is built."""
    monkeypatch.delenv("DEPASS_BUILD_CUDA", raising=False)
    return oldest_torch.setup_py()


def test_the_build_and_the_package_agree_on_the_oldest_torch(setup_py: ModuleType) -> None:
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    major, minor = map(int, oldest.split("."))
    assert (major, minor) == setup_py.OLDEST_TORCH
    assert int(setup_py.TORCH_TARGET.removeprefix("TORCH_TARGET_VERSION="), 16) == (major << 56) + (minor << 48)


@pytest.mark.parametrize(
    ("text", "reason"),
    [(NVCC.format(newest=""), "does not know sm_90"), ("", "does not run: ")],
    ids=["too-old", "no-program"],
)
def test_an_nvcc_that_cannot_be_used_has_failed(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, reason: str
) -> None:
    path = nvcc(tmp_path, text)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = setup_py.nvcc()
    assert found.left_out.startswith(f"{path} {reason}")
    assert (found.path, found.failed) == (None, True)
    monkeypatch.setenv("DEPASS_BUILD_CUDA", "1")
    with pytest.raises(setup_py.CompileError, match=reason):
        setup_py.nvcc()


def test_no_nvcc_is_no_failure(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert setup_py.nvcc() == setup_py.Nvcc(left_out="no nvcc in $CUDA_HOME, on PATH or in /usr/local/cuda")


def test_a_failed_build_is_summarized_by_its_first_errors(setup_py: ModuleType) -> None:
    compiler = (
        "FAILED: a.o\ng++ -fno-math-errno a.cpp\na.cpp:1: fatal error: no such file\n  1 | #include\nninja: stopped"
    )
    assert setup_py.first_errors(compiler) == "a.cpp:1: fatal error: no such file"
    killed = "FAILED: a.o\nnvcc a.cu\nKilled\nninja: stopped"
    assert setup_py.first_errors(killed) == "FAILED: a.o | nvcc a.cu | Killed"


def test_a_reason_becomes_a_valid_string_literal(setup_py: ModuleType) -> None:
    literal = setup_py.literal('a "b" \\ é\x1b')
    assert ast.literal_eval(literal) == 'a "b" \\ ??'  # Python reads the escapes as C++ does


def test_importing_warns_only_where_nvcc_failed(built: dict[str, Any], tmp_path: Path) -> None:
    tree, compiler = tmp_path / "tree", tmp_path / "g++"
    for folder in ("csrc", "depass_kernels"):
        shutil.copytree(CHECKOUT / folder, tree / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, tree)
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')  # compiles sooner
    compiler.chmod(0o755)
    path = nvcc(tmp_path / "cuda", NVCC.format(newest="compute_90"))
    use = (
        "import depass_kernels; from depass_kernels import backends; rows = backends.table();"
        "print(backends.build_info()['cuda_failed'], next(why for op, name, why in rows if name == 'cuda'))"
    )

    def build_and_use(**settings: str) -> tuple[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DEPASS_")}
        environment = kept | {
            "CXX": str(compiler),
            "CUDA_HOME": str(tmp_path / "cuda"),
            "PYTHONPATH": str(tree),
            **settings,
        }
        for command in (["setup.py", "--quiet", "build_ext", "--inplace"], ["-W", "always", "-c", use]):
            done = subprocess.run(
                [sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True, check=True
            )
        return done.stdout, done.stderr

    row, stderr = build_and_use()
    why = f'with {path}, csrc does not compile: host_config.h:143:2: error: #error -- unsupported GNU version: "99"'
    assert row == f"True csrc was built without its CUDA kernels: {why}\n"
    assert stderr.count("RuntimeWarning") == 1
    assert f"without its CUDA kernels because nvcc failed: {why}. On a GPU" in stderr
    assert "DEPASS_BUILD_CUDA=1 pip install" in stderr

    row, stderr = build_and_use(DEPASS_BUILD_CUDA="0")
    assert row == "False csrc was built without its CUDA kernels: DEPASS_BUILD_CUDA=0\n"
    assert "RuntimeWarning" not in stderr
