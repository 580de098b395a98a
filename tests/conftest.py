"""Options and fixtures of all tests."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import browser as browsers
import models
import published
import pytest
import torch
from torch import Tensor, nn

from depass import DePass, ModelError, OptionError
from depass.models import builtin
from depass.propagation.blocks import TRAITS
from depass_kernels import backends


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ahead-of-time", action="store_true", help="compile the Triton kernels for GPUs that are not here"
    )
    parser.addoption(
        "--deadline", type=float, metavar="SECONDS",
        help="stop after so long; tests then come in a fixed random order, and failures are printed as they happen",
    )  # fmt: skip
    parser.addoption("--device", default="cpu", help="where models and tensors lie: cpu (default) or cuda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--deadline") is not None:
        random.Random(0).shuffle(items)  # whatever is reached is a sample of all


def pytest_configure(config: pytest.Config) -> None:
    seconds = config.getoption("--deadline")
    if seconds is not None:
        config.pluginmanager.register(Deadline(config, time.monotonic() + seconds))


DEADLINE = "the deadline"


class Deadline:
    """Ends the session in good order at a time, so that pytest still prints what failed."""

    def __init__(self, config: pytest.Config, end: float) -> None:
        self.config, self.end, self.reached, self.stopped = config, end, 0, False

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A failure is printed at once: whoever ends this process later may leave it no time to."""
        self.reached += report.when == "teardown"
        if report.failed:
            print(f"\nFAILED {report.nodeid}\n{report.longreprtext}", file=sys.__stdout__, flush=True)

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        """Stop behind the test that passed the deadline."""
        if time.monotonic() > self.end:
            item.session.shouldstop = DEADLINE

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """With several processes, one of them stops the session."""
        self.stopped = self.stopped or getattr(node, "workeroutput", {}).get("shouldstop") == DEADLINE

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A stop at the deadline is no failure."""
        if self.stopped or session.shouldstop == DEADLINE:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if session.testsfailed else pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """How many were reached."""
        terminalreporter.write_line(f"reached {self.reached} of {terminalreporter._session.testscollected} tests")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.exit(f"--device {name}: torch sees no CUDA device", returncode=2)
    return name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``backend`` runs on every backend that works on the device's tensors."""
    if "backend" not in metafunc.fixturenames:
        return
    if metafunc.config.getoption("--device") != "cpu":
        names = ["reference", "triton", "cuda"]
    elif os.environ.get("TRITON_INTERPRET") == "1":
        names = ["triton"]
    else:
        names = ["reference", "cpu"]
    ops = getattr(metafunc.module, "OP", "share_hidden")
    table = {(op, name): reason for op, name, reason in backends.table()}
    marked = []
    for name in names:
        reason = table[ops, name]
        if reason != "not implemented":
            marks = () if reason is None else (pytest.mark.skip(reason=reason),)
            marked.append(pytest.param(name, marks=marks))
    metafunc.parametrize("backend", marked)


@pytest.fixture
def patterns_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns get the longer rows here that they have on a GPU."""
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], keys=TRAITS["cuda"].keys))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """A function that makes a model's norms compute in the model's dtype; transformers' compute in fp32."""

    def forward(self: Any, x: Tensor) -> Tensor:
        eps = getattr(self, "eps", getattr(self, "variance_epsilon", 1e-5))  # OLMo's norm has its own in its code
        weight = getattr(self, "weight", 1) + models.adds_one(self)
        x = x - x.mean(-1, keepdim=True) if type(self).__name__.endswith("LayerNorm") else x
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)  # type: ignore[no-any-return]

    def patched(model: Any) -> Any:
        own = {type(module) for module in model.modules() if type(module) is not nn.LayerNorm}
        for kind in own:
            if kind.__name__.endswith(("RMSNorm", "LayerNorm", "L2Norm")):
                monkeypatch.setattr(kind, "forward", forward)
        return model

    return patched


@pytest.fixture(scope="session")
def golden() -> Path:
    """The selection of the published implementation's outputs that comes with the repository."""
    return published.SELECTION


@pytest.fixture(scope="session")
def full_golden() -> Path:
    """All recorded outputs of the published implementation, which do not come with the repository."""
    return published_directory("golden")


@pytest.fixture(scope="session")
def published_data() -> Path:
    """The data sets of the published implementation, which do not come with the repository."""
    return published_directory("data")


def published_directory(name: str) -> Path:
    parent = os.environ.get("DEPASS_PUBLISHED")
    if not parent:
        pytest.skip(f"DEPASS_PUBLISHED is not set; it names the directory that holds the published code's {name}/")
    directory = Path(parent) / name
    if not directory.is_dir():
        pytest.fail(
            f"DEPASS_PUBLISHED={parent!r} has no directory {name}/; name the directory that holds golden/ and data/, "
            "or unset it to skip these tests"
        )
    return directory


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    return built_in("smollm2")


@pytest.fixture(scope="session")
def gemma_folder() -> Path:
    return built_in("gemma3-270m")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browsers.Browser]:
    program = browsers.find()
    if program is None:
        pytest.skip("there is no Chromium here (apt install chromium)")
    made = browsers.Browser(program, tmp_path_factory.mktemp("browser"))
    yield made
    made.close()


def built_in(name: str) -> Path:
    try:
        return Path(builtin.path(name))
    except (ModelError, OptionError) as error:
        pytest.skip(f"the model {name!r} cannot be had here: {error}")


@pytest.fixture(scope="session")
def smollm2_dp(smollm2_folder: Path, device: str) -> Any:
    return DePass.from_pretrained(dtype=torch.float32, device_map=None if device == "cpu" else device)


@pytest.fixture(scope="session")
def gemma_dp(gemma_folder: Path, device: str) -> Any:
    return DePass.from_pretrained("gemma3-270m", dtype=torch.float32, device_map=None if device == "cpu" else device)
