"""The adapters' examples run as they are and leave the files that they promise."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
WRITES = {  # by the tool
    "captum": ["captum.png"],
    "inseq": ["inseq.html", "inseq.json"],
    "interpreto": ["interpreto.txt"],
    "transformer_lens": ["circuitsvis.html"],
    "nnsight": ["nnsight.html"],
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {f"with_{tool}" for tool in WRITES}


@pytest.mark.usefixtures("smollm2_folder")
@pytest.mark.parametrize("tool", WRITES)
def test_an_example_runs(tool: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed in this environment (make adapters)")
    if tool == "nnsight" and not hasattr(importlib.import_module(tool), "TransformersModel"):
        pytest.skip("the nnsight of this environment is older than 0.8 (make adapters)")  # interpreto brings it along
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"with_{tool}.py"), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert all((tmp_path / file).stat().st_size > 0 for file in WRITES[tool])
    assert {path.name for path in tmp_path.iterdir()} == set(WRITES[tool])
