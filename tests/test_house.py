"""Who may import whom: the rooms of ``python/depass`` stand one on the other, and private names stay in their room."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"depass": ROOT / "python" / "depass", "depass_kernels": ROOT / "depass_kernels"}
GROUND = ("errors", "checks", "files", "rules", "runs", "device_memory", "names")
# a room may import from itself and from what stands above it here; rooms of one line know nothing of each other
FLOORS = (
    GROUND, ("models",), ("inputs",), ("sources",), ("propagation", "views"), ("results",), ("engine",), ("api",),
    ("compat", "masking", "arguments"), ("baselines", "datasets"), ("evaluate",), ("cli",),
)  # fmt: skip
KNOW_ARGPARSE = ("cli", "arguments")
NOT_AT_RUN_TIME = {"results": ("models", "propagation", "engine")}  # types under TYPE_CHECKING may be named


@dataclass(frozen=True)
class Import:
    """One name that a module imports: ``target`` is the module, ``name`` what of it (or None)."""

    module: str
    target: str
    name: str | None
    line: int
    typing: bool


def modules() -> dict[str, ast.Module]:
    """Every module of both packages, by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def imports(name: str, tree: ast.Module, known: set[str]) -> Iterator[Import]:
    """What a module imports, wherever in it."""
    typing_lines = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    is_package = any(other.startswith(f"{name}.") for other in known)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, None, node.lineno, node.lineno in typing_lines)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{target}.{alias.name}"
                if whole in known and not _is_value(target, alias.name, known):
                    yield Import(name, whole, None, node.lineno, node.lineno in typing_lines)
                else:
                    yield Import(name, target, alias.name, node.lineno, node.lineno in typing_lines)


def _is_value(package: str, name: str, known: set[str]) -> bool:
    """Whether a package's ``__all__`` has a name that one of its modules has too (``baselines.tokens``)."""
    return f"{package}.{name}" in known and package in ("depass.baselines",)


def room(module: str) -> str:
    """``models`` of ``depass.models.bind``; the package's own modules are rooms too."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def floor(of: str) -> int:
    return next((index for index, rooms in enumerate(FLOORS) if of in rooms), -1)


def run_up(all_imports: list[Import]) -> list[str]:
    """Imports of a room above, or beside on the same floor."""
    found = []
    for one in all_imports:
        here, there = room(one.module), room(one.target)
        if not one.target.startswith("depass.") or not one.module.startswith("depass.") or here == there:
            continue
        if here == "__main__":
            continue
        beside = floor(here) == floor(there) and here not in GROUND
        if floor(here) < 0 or floor(there) < 0 or floor(there) > floor(here) or beside:
            found.append(f"{one.module}:{one.line} imports {one.target}")
        if there in NOT_AT_RUN_TIME.get(here, ()) and not one.typing:
            found.append(f"{one.module}:{one.line} imports {one.target} when it runs")
    return found


def circles(all_imports: list[Import], known: set[str]) -> list[list[str]]:
    """Modules that import each other round and round, lazily or not; names of types do not count."""
    graph: dict[str, set[str]] = {name: set() for name in known}
    for one in all_imports:
        if one.target in known and not one.typing and not (one.name is None and one.target == one.module):
            graph[one.module].add(one.target)
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:  # Tarjan
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in graph[name]:
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            circle = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for name in graph:
        if name not in order:
            visit(name)
    return found


def argparse_below(all_imports: list[Import]) -> list[str]:
    return [
        f"{one.module}:{one.line}"
        for one in all_imports
        if one.target == "argparse" and one.module.startswith("depass.") and room(one.module) not in KNOW_ARGPARSE
    ]


def depass_in_the_kernels(trees: dict[str, ast.Module], all_imports: list[Import]) -> list[str]:
    return [
        f"{one.module}:{one.line}"
        for one in all_imports
        if one.module.startswith("depass_kernels") and one.target.split(".")[0] == "depass"
    ]


def private_names(trees: dict[str, ast.Module], all_imports: list[Import]) -> list[str]:
    """``from .room import _name``, ``module._name`` and ``dp._name`` across rooms."""
    found = []
    for one in all_imports:
        if one.target.split(".")[0] not in PACKAGES or _home(one.module) == _home(one.target):
            continue
        names = [*one.target.split(".")[1:], one.name or ""]
        if any(_private(name) for name in names) and names[-1] != "_build_info":
            found.append(f"{one.module}:{one.line} imports {one.target}.{one.name}")
    for module, tree in trees.items():
        foreign = {
            (one.name or one.target).split(".")[-1]
            for one in all_imports
            if one.module == module and one.target.split(".")[0] in PACKAGES and _home(one.target) != _home(module)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _private(node.attr) and isinstance(node.value, ast.Name):
                owner = node.value.id
                if owner in foreign or (owner in ("dp", "bound", "engine") and room(module) != "api"):
                    found.append(f"{module}:{node.lineno} reaches {owner}.{node.attr}")
            if (
                isinstance(node, ast.Attribute)
                and _private(node.attr)
                and ast.unparse(node.value).endswith((".dp", "_dp"))
            ):
                found.append(f"{module}:{node.lineno} reaches {ast.unparse(node)}")
    return found


def _home(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "depass_kernels" else ".".join(parts[:2])


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def long_functions(trees: dict[str, ast.Module], most: int = 50) -> list[tuple[int, str]]:
    """Functions whose body without its docstring has more lines, the longest first."""
    found = []
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines > most:
                    found.append((lines, f"{module}.{node.name}"))
    return sorted(found, reverse=True)


TREES = modules()
IMPORTS = [one for name, tree in TREES.items() for one in imports(name, tree, set(TREES))]


def test_no_import_runs_up() -> None:
    assert run_up(IMPORTS) == []


def test_the_file_map_has_every_room_on_its_level() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", (ROOT / "docs" / "project.md").read_text(encoding="utf-8"), re.M)
    said = {name: int(level) for level, rooms in rows for name in re.findall(r"`(\w+)", rooms)}
    there = {room(module) for module in TREES if module.startswith("depass.")} - {"__main__"}
    assert said == {name: floor(name) + 1 for name in there}


def test_there_is_no_circle() -> None:
    assert circles(IMPORTS, set(TREES)) == []


def test_only_the_command_knows_argparse() -> None:
    assert argparse_below(IMPORTS) == []


def test_the_kernels_know_no_model() -> None:
    assert depass_in_the_kernels(TREES, IMPORTS) == []


def test_private_names_stay_in_their_room() -> None:
    assert private_names(TREES, IMPORTS) == []


def test_no_function_is_too_long_to_read() -> None:
    assert long_functions(TREES) == []


@pytest.mark.parametrize(
    ("module", "line", "check"),
    [
        ("depass.models.bind", "from ..api import DePass", "run_up"),
        ("depass.views.page", "from ..propagation.blocks import workspace", "run_up"),
        ("depass.results.attribution", "from ..models.bound import Norm", "run_up"),
        ("depass.masking", "from .compat import check_options", "run_up"),
        ("depass.models.bound", "from .bind import bind", "circles"),
        ("depass.results.saved", "def f():\n    from .load import load", "circles"),
        ("depass.datasets.rows", "import argparse", "argparse_below"),
        ("depass.evaluate.run", "def f():\n    from argparse import Namespace", "argparse_below"),
        ("depass_kernels.layout", "from depass.errors import DePassError", "depass_in_the_kernels"),
        ("depass.engine.plan", "from ..models.weights import _parts", "private_names"),
        ("depass.engine.plan", "from ..models import weights\nweights._parts", "private_names"),
        ("depass.evaluate.run", "def f(dp):\n    return dp._engine", "private_names"),
        ("depass.engine.plan", "from depass_kernels.ops import _says", "private_names"),
        ("depass.engine.plan", "def f():\n" + "    pass\n" * 51, "long_functions"),
    ],
)
def test_each_rule_finds_what_breaks_it(module: str, line: str, check: str) -> None:
    """Each is broken on purpose once."""
    trees = {**TREES, module: ast.parse(f"{ast.unparse(TREES[module])}\n{line}")}
    found = [one for name, tree in trees.items() for one in imports(name, tree, set(trees))]
    broken = {
        "run_up": lambda: run_up(found),
        "circles": lambda: circles(found, set(trees)),
        "argparse_below": lambda: argparse_below(found),
        "depass_in_the_kernels": lambda: depass_in_the_kernels(trees, found),
        "private_names": lambda: private_names(trees, found),
        "long_functions": lambda: long_functions(trees),
    }
    assert broken[check]()


if __name__ == "__main__":
    rooms = sorted({room(name) for name in TREES if name.startswith("depass.")})
    print(f"{len(rooms)} rooms: {', '.join(rooms)}")
    print(f"{len(circles(IMPORTS, set(TREES)))} circles, {len(run_up(IMPORTS))} imports that run up")
    print("longest functions:", *long_functions(TREES, 0)[:5])
