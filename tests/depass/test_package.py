"""What ``import depass`` gives: every export, to type checkers and to programs alike, and nothing loaded before its use."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import depass


def test_type_checkers_see_the_exports_that_programs_get() -> None:
    """An import ``as`` its own name is an export to type checkers."""
    tree = ast.parse(Path(depass.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    shown = {alias.asname: node.module for node in imports for alias in node.names}
    assert sorted(shown) == sorted(depass.__all__)
    for name, module in shown.items():
        assert getattr(depass, name) is getattr(import_module(f"depass.{module}"), name)


@pytest.mark.parametrize("name", depass.__all__)
def test_every_export_is_there(name: str) -> None:
    assert name in dir(depass)
    assert getattr(depass, name) is not None


def test_what_is_no_export_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'depass' has no attribute 'DePas'"):
        depass.DePas  # noqa: B018


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, depass; dir(depass); depass.DePassError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
