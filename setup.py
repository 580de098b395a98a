"""Builds csrc into one library that torch loads; everything else about the package is in pyproject.toml.

The library needs the headers of the torch it will run with, and nothing of torch at build time but those, so an isolated
build looks them up in the environment that it installs into instead of downloading a torch of its own. Where there is no
torch yet, or no compiler, the library is left out: the package then runs on plain torch, more slowly, and says so in
``depass_kernels.backends.table()``. ``DEPASS_BUILD_CPU=1`` makes that an error.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

WHERE_IS_TORCH = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"


def torch_folder() -> Path | None:
    """The folder of the environment's torch, seen past pip's build isolation (which works through PYTHONPATH)."""
    for isolated in ([], ["-I"]):
        found = subprocess.run(
            [sys.executable, *isolated, "-c", WHERE_IS_TORCH], capture_output=True, text=True, check=False
        ).stdout.strip()
        if found:
            return Path(found).parent
    return None


class BuildLibrary(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = torch_folder()
        if torch is None:
            raise CompileError("no torch in this environment; install torch first to have csrc built against it")
        ext.include_dirs = [str(torch / "include")]
        ext.library_dirs = [str(torch / "lib")]
        super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # a library for torch.ops.load_library, not a Python module


setup(
    ext_modules=[
        Extension(
            "depass_kernels._csrc",
            sources=["csrc/register.cpp", "csrc/share_hidden_cpu.cpp", "csrc/mix_values_cpu.cpp"],
            depends=["csrc/types.h", "csrc/share_hidden.h", "csrc/mix_values.h"],
            # the oldest torch that the library may be loaded into: 2.10
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-trapping-math", "-fno-math-errno"],
            libraries=["torch", "torch_cpu", "c10"],
            language="c++",
            optional=os.environ.get("DEPASS_BUILD_CPU") != "1",
        )
    ],
    cmdclass={"build_ext": BuildLibrary},
)
