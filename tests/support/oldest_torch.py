"""Checks csrc against the oldest supported torch: ``make oldest-torch``.

``register.cpp`` is the one source that includes torch. It must compile against the headers of that torch, with and without
CUDA. The objects, and the library that was built against a newer torch, must need no symbol that the oldest one lacks.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

CHECKOUT = Path(__file__).parents[2]
LIBRARY = CHECKOUT / "depass_kernels" / "_csrc.so"
# This wheel is the smallest. The headers and the C symbols of torch's stable ABI do not depend on the machine.
WHEEL = ["--platform=manylinux_2_28_aarch64", "--python-version=3.12", "--only-binary=:all:", "--no-deps", "--quiet"]


def main() -> None:
    setup = setup_py()
    version = ".".join(map(str, setup.OLDEST_TORCH)) + ".0"
    torch = Path(sys.argv[1]) / version
    if not torch.exists():
        download(version, torch)
    needed = needed_symbols(LIBRARY, "--dynamic")
    with tempfile.TemporaryDirectory() as temporary:
        for cuda in (False, True):
            output = Path(temporary) / "register.o"
            command = setup.cxx_command(setup.cxx(), torch / "include", cuda)
            command += ["-c", str(CHECKOUT / "csrc" / "register.cpp"), "-o", str(output)]
            if subprocess.run(command, check=False).returncode != 0:
                kernels = "with" if cuda else "without"
                raise SystemExit(
                    f"csrc/register.cpp does not compile {kernels} CUDA against the headers of torch {version}"
                )
            needed |= needed_symbols(output)
    missing = needed - set((torch / "symbols.txt").read_text(encoding="utf-8").split())
    if missing:
        raise SystemExit(f"csrc needs symbols that torch {version} lacks: {', '.join(sorted(missing))}")
    print(f"torch {version}: register.cpp compiles with and without CUDA; all {len(needed)} symbols of torch are there")


def setup_py() -> ModuleType:
    """setup.py as a module; nothing is built."""
    spec = importlib.util.spec_from_file_location("depass_setup", CHECKOUT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def download(version: str, folder: Path) -> None:
    """Fill ``folder`` with torch's headers (``include``) and the symbols that it exports (``symbols.txt``)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        temporary = Path(name)
        pip = [sys.executable, "-m", "pip", "download", *WHEEL, f"--dest={temporary}", f"torch=={version}"]
        subprocess.run(pip, check=True)
        (wheel,) = temporary.glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(temporary, [path for path in archive.namelist() if path.startswith("torch/include/")])
            library = archive.extract("torch/lib/libtorch_cpu.so", temporary / "library")
        nm = ["nm", "--dynamic", "--defined-only", "--format=just-symbols", library]
        symbols = subprocess.run(nm, capture_output=True, text=True, check=True).stdout
        (temporary / "torch" / "symbols.txt").write_text(symbols, encoding="utf-8")
        (temporary / "torch").rename(folder)  # last: a download that was interrupted leaves no folder


def needed_symbols(binary: Path, *options: str) -> set[str]:
    """The undefined symbols that are torch's. The CUDA stream's is weak and not among them: a CPU-only torch lacks it."""
    nm = ["nm", "--undefined-only", *options, str(binary)]
    output = subprocess.run(nm, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^\s*U (\w*(?:torch|c10)\w*)$", output, re.MULTILINE))


if __name__ == "__main__":
    main()
