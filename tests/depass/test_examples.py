"""The examples run as they are and leave the files that they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
WRITES = {
    "tokens": ["tokens.html", "tokens.safetensors"],
    "heads": ["heads.png", "heads.html"],
    "neurons": ["neurons-27.html", "neurons.png", "neurons.html"],
    "subspace": ["subspace.txt"],
    "generation": ["generation.html"],
    "chat": ["chat.html"],
    "answer_of_vllm": ["answer-0.html"],
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(WRITES)


@pytest.mark.usefixtures("smollm2_folder")
@pytest.mark.parametrize("name", WRITES)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    if any(file.endswith(".png") for file in WRITES[name]):
        pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib, of the extra [plots]")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert all((tmp_path / file).stat().st_size > 0 for file in WRITES[name])
    assert {path.name for path in tmp_path.iterdir()} == set(WRITES[name])
