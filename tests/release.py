"""What an installed package must do. `make release-check` runs it with the Python of an environment that has only that."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import distribution
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.append(str(CHECKOUT / "tests" / "support"))

import models  # noqa: E402
import tokens  # noqa: E402

import depass  # noqa: E402
from depass import DePass, cli  # noqa: E402
from depass_kernels import backends  # noqa: E402

PROMPT = "the cat sat"


def main() -> None:
    package = distribution("depass-kernels")
    shipped = {str(path) for path in package.files or ()}
    home = Path(depass.__file__).parent
    check(Path(sys.prefix) in home.parents, f"depass is imported from {home}, which is not this environment")
    check(depass_files() <= shipped, f"not installed: {sorted(depass_files() - shipped)}")
    check("depass_kernels/_csrc.so" in shipped, "csrc was not built")
    check(any(name.endswith("licenses/LICENSE") for name in shipped), "there is no licence")
    check(not any(name.startswith(("tests", "benchmarks", "csrc")) for name in shipped), "more than the packages")
    check_sdist(package.version)
    check(backends.csrc_missing() is None, f"csrc does not load: {backends.csrc_missing()}")
    with tempfile.TemporaryDirectory() as folder:
        check_command(Path(folder))
    print(f"depass-kernels {package.version} in {sys.prefix}: {len(shipped)} files, all well")


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(f"release: {otherwise}")


def depass_files() -> set[str]:
    """What of the checkout's packages belongs into an installation."""
    found = set()
    for package, parent in (("depass", CHECKOUT / "python"), ("depass_kernels", CHECKOUT)):
        files = (path for path in (parent / package).rglob("*") if path.is_file())
        kept = (path for path in files if path.suffix in (".py", ".typed", ".html", ".css", ".js"))
        found |= {path.relative_to(parent).as_posix() for path in kept}
    return found


def check_sdist(version: str) -> None:
    """The sources of every kernel are in it: this machine's wheel shows that for those that it builds alone."""
    with tarfile.open(CHECKOUT / "dist" / f"depass_kernels-{version}.tar.gz") as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "csrc").iterdir()}
    wanted |= {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py"}
    check(wanted <= packed, f"not in the sdist: {sorted(wanted - packed)}")
    check(not any(name.endswith(".so") for name in packed), "the sdist holds what was compiled")


def check_command(folder: Path) -> None:
    """The command on a small random model: scores that add up, on the compiled kernels; a page; a saved result."""
    model, page, saved = folder / "model", folder / "page.html", folder / "saved.safetensors"
    models.make("llama").save_pretrained(model)
    tokens.make().save_pretrained(model)
    said = json.loads(command("attribute", PROMPT, "-m", model, "--json", "--viz-path", page, "--save-path", saved))
    (scores,), (logit,) = said["scores"], said["target_logits"]
    check(abs(sum(scores) - logit) < 1e-4, f"{scores} do not add up to {logit}")
    served = said["settings"]["backends"]
    check(served["mix_values"] == served["share_hidden"] == "cpu", f"served by {served}")
    for part in ("page.css", "page.js"):
        there = (CHECKOUT / "python" / "depass" / "views" / part).read_text(encoding="utf-8").strip()
        check(there in page.read_text(encoding="utf-8"), f"the page lacks {part}")
    command("view", saved, "-o", folder / "again.html")
    check("mix_values       yes" in command("backends"), "the backend cpu does not run mix_values")
    check(command("--version").startswith("depass "), "there is no version")
    check("rows" in command("plan", "-m", model, "--tokens", 64), "there is no plan")
    again = DePass.from_pretrained(model).attribute(PROMPT)
    check(again.scores.tolist() == [scores], "Python and the command do not say the same")
    check(cli.main(["attribute", ""]) == 2, "an empty prompt is not refused")


def command(*arguments: object) -> str:
    """What ``depass`` prints, from a folder that has nothing of the checkout."""
    program = [sys.executable, "-I", str(Path(sys.executable).with_name("depass")), *map(str, arguments)]
    done = subprocess.run(program, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False)
    check(done.returncode == 0, f"depass {arguments[0]}: {done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
