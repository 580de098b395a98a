"""Builds csrc with ninja; the rest of the package's configuration is in pyproject.toml.

``depass_kernels/_csrc.so`` holds the CPU and the CUDA kernels; torch loads it. The build needs only the headers of the
torch that the package will run with. An isolated build looks for them in the environment that it installs into, so it
downloads no second torch. ``depass_kernels._build_info`` says how the library was built and needs no torch. Object files
are kept in ``build/csrc``, so a second build compiles nothing.

If torch, a compiler or ninja is missing, the library is left out. The package then runs on plain torch, more slowly, and
``depass backends`` says why. ``DEPASS_BUILD_CPU=1`` makes that an error. Without nvcc the CUDA kernels are left out;
``DEPASS_BUILD_CUDA=1`` makes that an error, and ``DEPASS_BUILD_CUDA=0`` leaves them out on purpose. If nvcc is found but
fails, they are left out too, and ``import depass_kernels`` warns and says why.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.absolute()
BUILD = ROOT / "build" / "csrc"
LIBRARY, INFO = "depass_kernels._csrc", "depass_kernels._build_info"
CPP = ["register.cpp", "normed_cpu.cpp", "share_hidden_cpu.cpp", "mix_values_cpu.cpp"]
CUDA = ["normed.cu", "share_hidden.cu", "mix_values.cu"]
ARCHITECTURES = ["80", "86", "89", "90"]  # the last one's PTX serves what is newer
OLDEST_TORCH = (2, 10)  # the oldest version to compile against and to load into; the same as in pyproject.toml
TORCH_TARGET = f"TORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}{0:012x}"
FLAGS = ["-O3", "-DNDEBUG", "-std=c++17", "-Wall", "-fPIC", "-fvisibility=hidden"]
CPU_FLAGS = ["-fno-trapping-math", "-fno-math-errno"]
MACOS = sys.platform == "darwin"

WHERE_IS_TORCH = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"


def torch_folder() -> Path:
    """The folder of the environment's torch, seen past pip's build isolation (which works through PYTHONPATH)."""
    for isolated in ([], ["-I"]):
        found = subprocess.run(
            [sys.executable, *isolated, "-c", WHERE_IS_TORCH], capture_output=True, text=True, check=False
        ).stdout.strip()
        if found:
            return Path(found).parent
    raise CompileError("no torch in this environment; install torch first to have csrc built against it")


def ninja() -> str:
    if importlib.util.find_spec("ninja"):
        import ninja as package

        return str(Path(package.BIN_DIR) / "ninja")
    found = shutil.which("ninja")
    if found is None:
        raise CompileError("csrc is compiled through ninja, which is not installed; pip install ninja")
    return found


def cxx() -> str:
    names = [os.environ.get("CXX"), (sysconfig.get_config_var("CXX") or "").split(" ")[0], "g++", "c++"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise CompileError("no C++ compiler: neither $CXX nor g++ nor c++ is on PATH")
    return found


@dataclass(frozen=True)
class Nvcc:
    """The CUDA compiler and its version, or why the CUDA kernels are left out. ``failed``: one was found and failed."""

    path: str | None = None
    version: str = ""
    left_out: str = ""
    failed: bool = False


def nvcc() -> Nvcc:
    if os.environ.get("DEPASS_BUILD_CUDA") == "0":
        return Nvcc(left_out="DEPASS_BUILD_CUDA=0")
    home, usual = os.environ.get("CUDA_HOME"), "/usr/local/cuda"
    folders = [f"{home}/bin" if home else "", os.environ.get("PATH", ""), f"{usual}/bin"]
    path = shutil.which("nvcc", path=os.pathsep.join(folder for folder in folders if folder))
    absent = Nvcc(left_out="no nvcc in $CUDA_HOME, on PATH or in /usr/local/cuda")
    found = absent if path is None else examined(path)
    if found.path is None and os.environ.get("DEPASS_BUILD_CUDA") == "1":
        raise CompileError(found.left_out)
    return found


def examined(path: str) -> Nvcc:
    """The nvcc at ``path``, if it knows every architecture."""
    try:
        about, architectures = (
            subprocess.run([path, flag], capture_output=True, text=True, check=False).stdout
            for flag in ("--version", "--list-gpu-arch")
        )
    except OSError as error:
        return Nvcc(left_out=f"{path} does not run: {error}", failed=True)
    unknown = [f"sm_{a}" for a in ARCHITECTURES if f"compute_{a}" not in architectures]
    if unknown:
        return Nvcc(left_out=f"{path} does not know {', '.join(unknown)}", failed=True)
    version = re.search(r"release [\d.]+, V([\d.]+)", about)
    return Nvcc(path, version[1] if version else "unknown")


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def quoted(arguments: list[str]) -> str:
    """For the shell, through ninja."""
    return shlex.join(arguments).replace("$", "$$")


def escaped(path: Path) -> str:
    """For ninja alone, which quotes what it hands to the shell."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class Graph:
    """One library's build.ninja in the making. ``compiled`` and ``linked`` return the path of what they add."""

    def __init__(self, folder: Path, compiler: str) -> None:
        self.folder, self.compiler = folder, compiler
        self.text = ""
        for rule in ("cxx", "nvcc"):  # both write the headers that they met beside the object
            self.text += f"rule {rule}\n  command = $run -MMD -MF $out.d -c $in -o $out\n"
            self.text += f"  depfile = $out.d\n  deps = gcc\n  description = {rule} $in\n"
        self.text += "rule link\n  command = $run $in -o $out $libraries\n  description = link $out\n"

    def compiled(self, rule: str, source: str, run: list[str]) -> Path:
        path = self.folder / f"{source}.o"
        self.text += f"build {escaped(path)}: {rule} {escaped(ROOT / 'csrc' / source)}\n  run = {quoted(run)}\n"
        return path

    def linked(self, name: str, objects: list[Path], run: list[str], libraries: list[str]) -> Path:
        path = self.folder / name
        self.text += f"build {escaped(path)}: link {' '.join(map(escaped, objects))}\n"
        self.text += f"  run = {quoted(run)}\n  libraries = {quoted(libraries)}\n"
        return path

    def build(self, ninja: str) -> None:
        write_if_changed(self.folder / "build.ninja", self.text)
        command = [ninja, "--quiet", "-C", str(self.folder)]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
            )
        except OSError as error:
            raise CompileError(f"ninja does not run: {error}") from error
        print(done.stdout, end="")
        if done.returncode != 0:
            raise CompileError(f"csrc does not compile: {first_errors(done.stdout)}")


def first_errors(output: str) -> str:
    """The first three lines that name an error, joined into one; the last three lines where none does."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("ninja: ")]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line)]
    return " | ".join(line[:250] for line in (errors[:3] or lines[-3:]))


def cxx_command(compiler: str, headers: Path, cuda: bool) -> list[str]:
    """The compiler and its flags for the library's C++ sources. ``headers``: torch's include directory."""
    defines = [f"-D{TORCH_TARGET}", *(["-DDEPASS_CUDA"] if cuda else [])]
    return [compiler, *FLAGS, *CPU_FLAGS, *defines, f"-I{headers}"]


def library(graph: Graph, cuda: str | None) -> Path:
    """What is loaded into torch. Linked by nvcc where there is one, which knows its own static runtime."""
    torch = torch_folder()
    run = cxx_command(graph.compiler, torch / "include", cuda is not None)
    objects = [graph.compiled("cxx", source, run) for source in CPP]
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if cuda is None:
        return graph.linked("_csrc.so", objects, [graph.compiler, "-shared"], libraries)
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    codes.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
    run = [
        cuda,
        "-O3",
        "-std=c++17",
        "--threads=0",
        "-ccbin",
        graph.compiler,
        *codes,
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
    ]
    objects += [graph.compiled("nvcc", source, run) for source in CUDA]
    # The static runtime's names stay inside, apart from those of torch's own. libtorch.so is named as needed though
    # nothing of it is used: through it the loader finds the CUDA stream's name in libtorch_cuda.so, where there is one.
    linker = ["-Xlinker", "--exclude-libs=ALL", "-Xlinker", "--no-as-needed"]
    link = [cuda, "-shared", "-cudart=static", "--no-device-link", "-ccbin", graph.compiler]
    return graph.linked("_csrc.so", objects, link, linker + libraries)


def literal(text: str) -> str:
    """``text`` as a C++ string literal. What is not printable ASCII becomes a question mark."""
    return json.dumps(re.sub(r"[^ -~]", "?", text))


def info(graph: Graph, cuda: Nvcc) -> Path:
    if not importlib.util.find_spec("pybind11"):
        raise CompileError("depass_kernels._build_info needs pybind11, which is not installed; pip install pybind11")
    import pybind11

    architectures = " ".join(f"sm_{a}" for a in ARCHITECTURES) if cuda.path else ""
    lines = [
        f"#define DEPASS_NVCC {literal(cuda.version)}",
        f"#define DEPASS_NO_CUDA {literal(cuda.left_out)}",
        f"#define DEPASS_CUDA_FAILED {str(cuda.failed).lower()}",
        f"#define DEPASS_ARCHITECTURES {literal(architectures)}",
    ]
    write_if_changed(graph.folder / "build_config.h", "\n".join(lines) + "\n")
    include = [sysconfig.get_path("include"), pybind11.get_include(), str(graph.folder)]
    run = [graph.compiler, *FLAGS, *(f"-I{folder}" for folder in include)]
    objects = [graph.compiled("cxx", "build_info.cpp", run)]
    undefined = ["-undefined", "dynamic_lookup"] if MACOS else []
    return graph.linked(f"_build_info{suffix()}", objects, [graph.compiler, "-shared", *undefined], [])


def suffix() -> str:
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


class BuildThroughNinja(build_ext):
    cuda_fails: Nvcc | None = None

    def build_extension(self, ext: Extension) -> None:
        runner, graph = ninja(), Graph(BUILD / ext.name.rpartition(".")[2], cxx())
        cuda = self.cuda_fails or nvcc()
        if ext.name == LIBRARY:
            if cuda.path is None:
                print(f"depass_kernels: CUDA kernels left out: {cuda.left_out}")
            built = library(graph, cuda.path)
        else:
            built = info(graph, cuda)
        try:
            graph.build(runner)
        except CompileError as error:
            if ext.name != LIBRARY or cuda.path is None or os.environ.get("DEPASS_BUILD_CUDA") == "1":
                raise
            # a CUDA compiler that does not get on with this host compiler must not cost the CPU kernels
            self.cuda_fails = Nvcc(left_out=f"with {cuda.path}, {error}", failed=True)
            self.build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(target))

    def get_ext_filename(self, fullname: str) -> str:
        # the library is for torch.ops.load_library, not a Python module: it serves every Python
        return fullname.replace(".", os.sep) + (".so" if fullname.endswith("_csrc") else suffix())


if __name__ == "__main__":  # tests import this file for its flags
    optional = "1" not in (os.environ.get("DEPASS_BUILD_CPU"), os.environ.get("DEPASS_BUILD_CUDA"))
    setup(
        ext_modules=[Extension(name, sources=[], optional=optional) for name in (LIBRARY, INFO)],
        cmdclass={"build_ext": BuildThroughNinja},
    )
