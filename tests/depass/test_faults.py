"""What goes wrong outside of the package: one line that says so, a code, and nothing lost or left behind (docs/faults.md).

Runs of data sets that end in every way are in ``test_dataset.py``.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dying
import models
import pytest
import tokens
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from depass import (
    Attribution,
    DePass,
    Heads,
    MemoryLimitError,
    NonFiniteError,
    OutputError,
    PromptError,
    Spans,
    TargetError,
    cli,
)
from depass.engine.generate import generated_ids
from depass.evaluate import probes
from depass.files import write_atomically
from depass.inputs.prompt import Prompt, encode

TOKENIZERS = {
    "byte-level": tokens.byte_level, "without-bos": lambda: tokens.byte_level(bos=False),
    "prefix-space": lambda: tokens.byte_level(prefix_space=True), "byte-fallback": tokens.byte_fallback,
}  # fmt: skip
ODD = {
    "emoji": "the 🦜 and 👩‍👩‍👧 cat", "right-to-left": "the שלום \u202ecat\u202c مرحبا", "null": "a\0the\0 cat",
    "control": "\x1b[31mthe\x1b[0m\x07\b\x9b2J\x1b]0;title\x07 cat\r\x7f", "newlines": "\n\n the\r\n\tcat \n",
    "accents": "e\u0301\u0327 naïve ﬁ Ⅷ", "one": "🦜",
}  # fmt: skip


def saved(path: Path, tokenizer: Any) -> str:
    models.make("llama", vocab_size=400).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model"), tokens.byte_level())


@pytest.fixture(scope="module")
def dp(folder: str) -> DePass:
    return DePass.from_pretrained(folder)


def run(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as error:  # argparse
        return int(error.code or 0)


def harmless(text: str) -> bool:
    """Nothing in it moves a terminal's cursor, recolours it or turns its text around."""
    return all(character.isprintable() or character == "\n" for character in text)


# Prompts and tokenizers.


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_odd_prompts_are_attributed_and_shown_without_control_characters(
    text: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*more: str) -> str:
        assert run("attribute", text, "-m", folder, *more) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert harmless(out)
        return out

    command("--sources", "word", "--viz-path", str(tmp_path / "page.html"), "--save-path", str(tmp_path / "res"))
    assert Attribution.load(tmp_path / "res").prompt.text == text
    found = json.loads(command("--json"))
    assert found["prompt"]["text"] == "".join(found["prompt"]["tokens"]) == text
    assert sum(found["scores"][0]) == pytest.approx(found["target_logits"][0], rel=1e-4, abs=1e-5)


def test_a_terminal_gets_colours_and_no_other_sequences(folder: str) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "depass", "attribute", ODD["control"].replace("\0", ""), "-m", folder]
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                seen += os.read(master, 4096)
            except OSError:  # the other end is closed
                break
    os.close(master)
    assert process.returncode == 0
    text = seen.decode().replace("\r\n", "\n")
    assert "\x1b[" in text
    assert harmless(re.sub(r"\x1b\[[0-9;]*m", "", text))


def test_standard_input_may_hold_nulls_but_no_bytes_that_are_no_text(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the \xff cat"), encoding="utf-8"))
    assert run("attribute", "-", "-m", folder) == 2
    assert capsys.readouterr().err == "depass: the prompt is not text: it contains bytes that are not UTF-8\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the\0 cat\n"), encoding="utf-8"))
    assert run("attribute", "-", "-m", folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"]["text"] == "the\0 cat"


EVIL = "\x1b]0;evil\x07\x9b31m\u202e"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["attribute", "x", "-m", f"/none/{EVIL}"], 1),
        (["attribute", "x", "-m", f"nobody/{EVIL}"], 1),
        (["attribute", "x", "-m", "MODEL", "--target", f"a{EVIL}"], 2),
        (["attribute", "x", "-m", "MODEL", "--target", f"id:{EVIL}"], 2),
        (["attribute", "x", "-m", "MODEL", "--save-path", f"/none/{EVIL}/x"], 1),
        (["attribute", "x", "-m", "MODEL", "--device", EVIL], 2),
        (["attribute", "x", "-m", "MODEL", EVIL], 2),
        (["attribute", "x", "-m", "MODEL", "--sources", EVIL], 2),
        (["attribute", "x", "-m", "MODEL", f"--{EVIL}"], 2),
        ([EVIL], 2),
        (["view", f"/none/{EVIL}"], 1),
        (["plan", "-m", f"/none/{EVIL}", "--tokens", "5"], 1),
        (["attribute-dataset", f"/none/{EVIL}.jsonl", "-m", "MODEL", "--out", "OUT"], 1),
        (["attribute-dataset", "DATA", "-m", "MODEL", "--out", f"/proc/{EVIL}"], 1),
        (["attribute-dataset", "DATA", "-m", "MODEL", "--out", "OUT", "--prompt-column", EVIL * 2], 1),
        (["evaluate", "tokens", "-m", "MODEL", "--data", f"/none/{EVIL}.json", "--out", "OUT"], 1),
        (["evaluate", EVIL], 2),
    ],
)
def test_errors_repeat_no_control_characters(
    arguments: list[str], code: int, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("pyarrow", reason="pyarrow is not installed, and data sets need it")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "the cat", EVIL: 1}))
    there = {"MODEL": folder, "DATA": str(tmp_path / "data.jsonl"), "OUT": str(tmp_path / "out")}
    assert run(*(there.get(argument, argument) for argument in arguments)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "depass" in err
    assert harmless(err)
    assert "Traceback" not in err


def test_what_is_printed_after_success_has_no_control_characters_either(
    tmp_path: Path, dp: DePass, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"page{EVIL}.html"
    dp.attribute("the cat").save(tmp_path / "res")
    assert run("view", str(tmp_path / "res"), "-o", str(path)) == 0
    assert path.exists()
    assert harmless(capsys.readouterr().out)


def test_a_models_files_command_no_terminal(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": EVIL, "architectures": [EVIL]}))
    for arguments in (["attribute", "x", "-m", str(model)], ["plan", "-m", str(model), "--tokens", "5"]):
        assert run(*arguments) == 1
        assert harmless(capsys.readouterr().err)


LONG = 100_000


@pytest.mark.parametrize(
    "text",
    ["the cat sat. " * (LONG // 13), "x" * LONG, " " * LONG, "\n" * LONG, "🦜" * (LONG // 4), "\0" * LONG],
    ids=["words", "a-word", "spaces", "newlines", "emoji", "nulls"],
)
def test_a_prompt_of_100_kb_is_refused_at_once(text: str, dp: DePass) -> None:
    """By the model's positions where it has few, by what it takes where it has many."""
    began = time.monotonic()
    with pytest.raises(PromptError, match=r"has 320 positions; shorten it"):
        dp.attribute(text)
    wide = DePass(models.make("llama", vocab_size=400, max_position_embeddings=1 << 20), dp.tokenizer)
    for sources in ("token", "word", "sentence"):
        with pytest.raises(MemoryLimitError, match="are available"):
            wide.attribute(text, sources=sources)
    assert time.monotonic() - began < 20


def test_words_of_blank_text_are_found_in_one_pass() -> None:
    for unit in ("word", "sentence"):
        began = time.monotonic()
        made = Prompt((1, 2), ("\n" * LONG, "x"), "\n" * LONG + "x", ((0, LONG), (LONG, LONG + 1)))
        assert made.segments(unit) == [(0, 2)]
        assert Prompt((1,), ("\n" * LONG,), "\n" * LONG, ((0, LONG),)).segments(unit) == [(0, 1)]
        assert time.monotonic() - began < 2  # a pattern that goes back takes minutes


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_tokenizers_tokens_are_the_text(kind: str) -> None:
    dp = DePass(models.make("llama", vocab_size=400), TOKENIZERS[kind]())
    for text in ODD.values():
        res = dp.attribute(text)
        assert "".join(token for i, token in enumerate(res.prompt.tokens) if i not in res.prompt.special) == text
        assert res.scores.sum().item() == pytest.approx(res.target_logits.item(), rel=1e-4, abs=1e-5)
        again = dp.attribute(list(res.prompt.ids))
        assert torch.equal(again.scores, res.scores)
        assert again.prompt.text == dp.tokenizer.decode(list(res.prompt.ids))
        words = dp.attribute(text, sources="word")
        assert "".join(source.label for source in words.sources if source.label != "<bos>") == text
    at = ODD["emoji"].index("🦜")
    res = dp.attribute(ODD["emoji"], sources=Spans([(at, at + 1)], unit="char"))
    (bird,) = [source for source in res.sources if source.kind == "span"]
    assert bird.label.strip() == "🦜"
    assert bird.start is not None
    assert bird.end is not None
    assert bird.end - bird.start >= 4  # its bytes


def test_a_tokenizer_without_bos_excludes_nothing_unless_told() -> None:
    its = models.make("llama", vocab_size=400)
    without, fallback = DePass(its, tokens.byte_level(bos=False)), DePass(its, tokens.byte_fallback())
    plain, forced = (without.attribute("the cat sat", exclude_bos=exclude) for exclude in ("auto", True))
    assert not plain.settings.exclude_bos
    assert forced.settings.exclude_bos
    assert not torch.equal(plain.scores, forced.scores)
    found = fallback.attribute("the cat sat")
    assert (found.prompt.tokens[0], found.settings.exclude_bos) == ("<bos>", True)


def test_targets_of_tokenizers_that_put_a_space_before_words() -> None:
    for make in (tokens.byte_fallback, lambda: tokens.byte_level(prefix_space=True)):
        dp = DePass(models.make("llama", vocab_size=400), make())
        assert dp.attribute("the", target="cat").targets[0].label.strip() == "cat"
    with pytest.raises(TargetError, match=r"target ' cat' is \d tokens, not one: .*'cat' \(\d+\); pass one token"):
        DePass(models.make("llama", vocab_size=400), tokens.byte_fallback()).attribute("the", target=" cat")


# Models.


def broken_weights(folder: str, path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    shutil.copytree(folder, path)
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    """What the command says in its one line."""
    assert run(*arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("depass: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model.safetensors", lambda content: content[: len(content) // 2]),
        ("model.safetensors", lambda content: content[:-1]),
        ("model.safetensors", lambda content: b""),
        ("model.safetensors", lambda content: b"\xff" * 8 + content[8:]),
        ("model.safetensors", lambda content: content[:20] + b"\0" * 20 + content[40:]),
        ("config.json", lambda content: content[:-20]),
        ("config.json", lambda content: b'{"model_type": "llama", "hidden_size": "many"}'),
        ("config.json", lambda content: b"[]"),
        ("tokenizer.json", lambda content: content[:-20]),
        ("tokenizer.json", lambda content: b"{}"),
    ],
)
def test_a_damaged_model_file_is_one_line(
    file: str, change: Callable[[bytes], bytes], folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    (model / file).write_bytes(change((model / file).read_bytes()))
    said = fails(["attribute", "the cat", "-m", str(model), "--save-path", str(tmp_path / "res")], capsys)
    assert said.startswith(f"depass: cannot load the model '{model}': ")
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_weights_that_a_file_lacks_are_not_made_up(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    model = broken_weights(folder, tmp_path / "model", lambda weights: weights.pop(name))
    said = fails(["attribute", "the cat", "-m", model], capsys)
    lacks = f"its files lack 1 weight, the first is {name}; load it from intact files"
    assert said == f"depass: cannot load the model '{model}': {lacks}\n"
    other = broken_weights(folder, tmp_path / "other", lambda weights: weights.update({name: torch.zeros(3, 3)}))
    fails(["attribute", "the cat", "-m", other], capsys)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    for name in ("gpt2", "gemma2", "llama-tied-wide-heads"):
        its = models.make(name)
        its.save_pretrained(tmp_path / name)
        tokens.make().save_pretrained(tmp_path / name)
        again = DePass.from_pretrained(tmp_path / name).attribute([5, 6, 7])
        torch.testing.assert_close(again.scores, DePass(its).attribute([5, 6, 7]).scores)


WEIGHTS = [
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight",
    "model.layers.2.post_attention_layernorm.weight",
    *(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
]  # fmt: skip


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_that_is_no_number_is_named_and_scores_nothing(name: str, number: float) -> None:
    its = models.make("llama")
    its.get_parameter(name).data[5] = number  # a row, or for a norm one number
    dp, ids = DePass(its), [5, 6, 7]
    says = re.escape(f"the model's weight {name} contains NaN or infinity")
    asked: list[Callable[[], Any]] = [
        lambda: dp.attribute(ids, [5, 6]), lambda: dp.attribute(ids, 5, sources=Heads(0)),
        lambda: dp.sweep("heads", ids, 5), lambda: list(dp.attribute_many([ids, ids], 5)),
        lambda: dp.generate(ids, max_new_tokens=2) if name != "lm_head.weight" else dp.attribute(ids, 5),
    ]  # fmt: skip
    for ask in asked:
        with pytest.raises(NonFiniteError, match=says):
            ask()
    if name not in ("model.norm.weight", "lm_head.weight"):
        with pytest.raises(NonFiniteError, match=says):
            dp.states(ids, models.LAYERS)
        with pytest.raises(NonFiniteError, match=says):
            probes.streams(dp, [ids], [[0, 2]], [models.LAYERS - 1, models.LAYERS])


def test_a_number_that_the_prompt_does_not_meet_changes_nothing() -> None:
    its = models.make("llama")
    expected = DePass(its).attribute([5, 6, 7], 8)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        its.get_parameter(name).data[50] = float("nan")
    assert torch.equal(DePass(its).attribute([5, 6, 7], 8).scores, expected.scores)


def test_numbers_too_large_for_a_dtype_blame_the_dtype() -> None:
    its = models.make("llama", torch.float16)
    its.model.norm.weight.data.fill_(60000)  # times a number of 1.1 it is more than fp16 holds
    with pytest.raises(
        NonFiniteError, match="the model's weights are finite, so a value is outside the range of float16"
    ):
        DePass(its).attribute([5, 6, 7], 8)


def test_the_command_with_weights_that_are_no_numbers(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model = broken_weights(folder, tmp_path / "model", lambda weights: weights[name].fill_(float("nan")))
    said = fails(["attribute", "the cat", "-m", model, "--save-path", str(tmp_path / "res")], capsys)
    assert said.startswith("depass: the model's own logits are not finite (nan for ")
    assert said.endswith(f"); the model's weight {name} contains NaN or infinity; load the model from an intact file\n")
    assert sorted(os.listdir(tmp_path)) == ["model"]
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed, and data sets need it")
    (tmp_path / "data.jsonl").write_text('{"prompt": "the"}\n{"prompt": "cat"}\n')
    arguments = ["attribute-dataset", str(tmp_path / "data.jsonl"), "-m", model, "--out", str(tmp_path / "out")]
    assert run(*arguments) == 0
    assert capsys.readouterr().out.endswith("rows: 0 ok, 2 errors\n")
    for row in parquet.read_table(tmp_path / "out" / "rows").to_pylist():
        assert (row["status"], row["scores"]) == ("error", None)
        assert name in row["error"]


# Memory.

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the limit is set by what /proc says is held"
)


@needs_proc
def test_a_prompt_that_a_memory_limit_has_no_room_for_is_one_line(tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    models.make("llama", vocab_size=400, max_position_embeddings=1 << 16).save_pretrained(wide)
    tokens.byte_level().save_pretrained(wide)
    arguments = ["attribute", "x" * 4000, "-m", str(wide), "--save-path", str(tmp_path / "res")]
    assert dying.run(arguments, tmp_path / "said", memory=900_000_000) == 1  # its state alone takes 1 GB
    said = (tmp_path / "said").read_text()
    assert re.fullmatch(
        r"depass: 8,002,000 rows for 4,000 tokens need .* besides the model's weights .* are available; .* fits\n", said
    ), said
    assert sorted(os.listdir(tmp_path)) == ["said", "wide"]


@needs_proc
def test_a_memory_limit_is_an_error_of_the_rows_that_do_not_fit(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed, and data sets need it")
    models.make("llama", vocab_size=400, max_position_embeddings=1 << 16).save_pretrained(tmp_path / "wide")
    tokens.byte_level().save_pretrained(tmp_path / "wide")
    prompts = ["the cat", "x" * 4000, "a cat"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    arguments = [
        "attribute-dataset",
        str(tmp_path / "data.jsonl"),
        "-m",
        str(tmp_path / "wide"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert dying.run(arguments, tmp_path / "said", memory=900_000_000) == 0, (tmp_path / "said").read_text()
    rows = parquet.read_table(tmp_path / "out" / "rows").to_pylist()
    assert [row["status"] for row in rows] == ["ok", "error", "ok"]
    assert "8,002,000 rows for 4,000 tokens need" in rows[1]["error"]


@needs_proc
def test_a_model_that_a_memory_limit_has_no_room_for_is_one_line(tmp_path: Path) -> None:
    large = saved(tmp_path / "large", tokens.byte_level())
    config = LlamaConfig(
        vocab_size=400, hidden_size=512, intermediate_size=8192, num_hidden_layers=3, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(large)  # 160 MB
    assert dying.run(["attribute", "x", "-m", large], tmp_path / "said", memory=60_000_000) == 1
    said = (tmp_path / "said").read_text()
    assert re.fullmatch(rf"depass: cannot load the model '{large}': out of memory; `depass plan` shows .*\n", said), (
        said
    )


FAILING = """
import resource, torch, warnings
from pathlib import Path
from depass import DePass, MemoryLimitError
from depass.propagation import needs
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(hidden_size=512, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, vocab_size=99)
dp = DePass(LlamaForCausalLM(config).eval())
expected = dp.attribute([3] * 9, 5).scores
needs.free_memory = lambda device: 1 << 50  # the plan believes that there is room
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 60_000_000, resource.RLIM_INFINITY))
warnings.simplefilter("ignore")
try:
    dp.attribute([3] * 300, 5)
except MemoryLimitError as error:
    print(error)
print(torch.equal(dp.attribute([3] * 9, 5).scores, expected))
"""


@needs_proc
def test_an_allocation_that_fails_in_the_middle_is_an_error_and_leaves_the_model_whole() -> None:
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, check=False)
    assert re.fullmatch(
        r"out of memory twice, with blocks of .*45,150 rows for 300 tokens need .*\nTrue\n", done.stdout
    ), done.stdout + done.stderr


def out_of_memory(*_: Any, **__: Any) -> Any:
    torch.empty(1 << 60)


def test_memory_that_runs_out_anywhere_else_is_one_line(
    folder: str, dp: DePass, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dp.model, "generate", out_of_memory)
    with pytest.raises(
        MemoryLimitError, match="out of memory while generating 5 tokens after a prompt of 2 tokens; generate fewer"
    ):
        generated_ids(dp.bound, None, Prompt((5, 6), ("a", "b")), 5, {})
    monkeypatch.setattr(Attribution, "show", out_of_memory)
    assert fails(["attribute", "x", "-m", folder], capsys).startswith("depass: out of memory; `depass plan`")

    def not_memory(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Attribution, "show", not_memory)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run("attribute", "x", "-m", folder)


def test_a_library_that_cannot_be_loaded_is_one_line(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (ImportError("libtorch.so: failed to map segment"), OSError("libtorch.so: failed to map segment")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr("depass.cli.commands.load_model", fail)
        said = fails(["attribute", "x", "-m", folder], capsys)
        assert said == "depass: cannot load a library: libtorch.so: failed to map segment\n"


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        (ImportError("libtorch.so: cannot be mapped"), 1, "cannot load a library: libtorch.so: cannot be mapped"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
    ],
    ids=["library", "interrupt", "signal"],
)
def test_what_ends_the_command_while_it_reads_its_arguments_is_one_line(
    how: BaseException | signal.Signals,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(_: Any) -> None:  # the tasks of `evaluate` need torch
        if isinstance(how, BaseException):
            raise how
        signal.raise_signal(how)

    monkeypatch.setattr("depass.cli.evaluate.add_tasks", stop)
    assert run("evaluate", "tokens") == code
    assert capsys.readouterr().err == f"depass: {said}\n"


# Files.


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
def test_a_result_that_cannot_be_written_leaves_the_old_one(
    function: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "res"
    path.write_bytes(b"old")
    real = getattr(os, function)

    def fail(first: Any, *more: Any, **named: Any) -> Any:
        if function != "open" or Path(str(first)).name.startswith(".depass-"):
            raise OSError(number, os.strerror(number))
        return real(first, *more, **named)

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OutputError, match=re.escape(f"cannot write {path}: {os.strerror(number)}")):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["res"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_device_is_one_line(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--save-path", "--viz-path"):
        assert run("attribute", "the cat", "-m", folder, option, "/dev/full") == 1
        assert capsys.readouterr().err == "depass: cannot write /dev/full: No space left on device\n"
    for more in ([], ["--json"]):
        command = [sys.executable, "-m", "depass", "attribute", "the cat", "-m", folder, *more]
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (1, "depass: cannot write standard output: No space left on device\n")


@pytest.mark.parametrize("where", ["/proc/x", "/sys/x"])
def test_a_place_that_nobody_may_write_is_found_before_the_model_is_loaded(
    where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--save-path", "--viz-path"):
        said = fails(["attribute", "x", "-m", "/no/such/model", option, where], capsys)
        assert said.startswith(f"depass: cannot write {where}: ")


MOMENTS = [("fsync", 1, True), ("fsync", 1, False), ("replace", 1, True), ("replace", 1, False)]


@pytest.mark.parametrize("at", MOMENTS, ids=lambda at: f"{'before' if at[2] else 'after'}-{at[0]}")
@pytest.mark.parametrize(("send", "code", "line"), [
    (signal.SIGINT, 130, "depass: interrupted\n"), (signal.SIGTERM, 143, "depass: terminated\n"),
    (signal.SIGKILL, -signal.SIGKILL, ""),
])  # fmt: skip
def test_a_result_is_the_old_one_or_the_new_one_however_the_command_ends(
    send: int, code: int, line: str, at: dying.Moment, folder: str, dp: DePass, tmp_path: Path
) -> None:
    path, said = tmp_path / "out" / "res", tmp_path / "said"
    path.parent.mkdir()
    dp.attribute("a cat").save(path)
    old = path.read_bytes()
    arguments = ["attribute", "the cat", "-m", folder, "--save-path", str(path), "--json"]
    assert dying.run(arguments, said, at=at, send=send) == code
    assert said.read_text().endswith(line)
    assert "Traceback" not in said.read_text()
    replaced = at[0] == "replace" and not at[2]
    assert (path.read_bytes() == old) != replaced
    Attribution.load(path)
    left = [name for name in os.listdir(path.parent) if name != "res"]
    assert len(left) == (send == signal.SIGKILL and not replaced)  # only a kill leaves its unfinished file
    assert all(name.startswith(".depass-") for name in left)


def test_writers_of_one_file_do_not_mix_and_change_nothing_of_the_process(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", [bytes([65 + i]) * 100_000 for i in range(4)]
    before = os.umask(0o027)
    try:
        threads = [
            threading.Thread(target=lambda c=content: [write_atomically(path, c) for _ in range(20)])
            for content in contents
        ]
        write_atomically(path, contents[0])
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert path.read_bytes() in contents
        assert path.stat().st_mode & 0o777 == 0o640
        assert os.listdir(tmp_path) == ["file"]
    finally:
        assert os.umask(before) == 0o027


# Evaluations.


def evaluation(folder: str, out: Path, data: Path) -> list[str]:
    data.write_text("".join(json.dumps({"prompt": models.prompt(4 + i % 7, i), "target": 9}) + "\n" for i in range(12)))
    methods = ["--methods", "softmax,random", "--keep-wrong"]
    return ["evaluate", "tokens", "-m", folder, "--data", str(data), "--out", str(out), *methods]


def evaluated(out: Path) -> dict[str, Any]:
    return {row["id"]: row for row in map(json.loads, (out / "rows.jsonl").read_text().splitlines())}


def test_an_evaluation_whose_disk_fills_up_keeps_whole_rows_and_goes_on(folder: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, and evaluations draw figures")
    whole, out, said = tmp_path / "whole", tmp_path / "out", tmp_path / "said"
    arguments = evaluation(folder, whole, tmp_path / "data.jsonl")
    assert dying.run(arguments, said) == 0, said.read_text()
    size = (whole / "rows.jsonl").stat().st_size
    arguments = evaluation(folder, out, tmp_path / "data.jsonl")
    assert dying.run(arguments, said, largest_file=size * 2 // 3) == 1
    assert said.read_text().startswith(f"depass: cannot add a row to {out}/rows.jsonl: ")
    assert said.read_text().count("\n") == 1
    there = evaluated(out)
    assert 0 < len(there) < 12
    assert dying.run(arguments, said) == 0
    assert evaluated(out).items() >= there.items()
    assert evaluated(out).keys() == evaluated(whole).keys()


@pytest.mark.parametrize(
    ("send", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_an_evaluation_with_one_line(
    send: int, code: int, word: str, folder: str, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    arguments = evaluation(folder, out, tmp_path / "data.jsonl")
    assert dying.run(arguments, said, at=("mkdir", 4, True), send=send) == code  # of the folder, then of rows
    kept = f"2 of 12 rows are kept in {out}; run the same command again to resume"
    assert said.read_text() == f"depass: {word}; {kept}\n"
    there = evaluated(out)
    assert len(there) == 2
    (session,) = json.loads((out / "run.json").read_text())["sessions"]
    assert session["seconds"] > 0
    assert dying.run(arguments, said) == 0
    assert evaluated(out).items() >= there.items()
    assert len(evaluated(out)) == 12


def test_the_tests_that_the_document_names_are_there() -> None:
    root = Path(__file__).parents[2]
    there = set(
        re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in root.glob("tests/depass/*.py")), re.M)
    )
    named = set(re.findall(r"`(test_\w+)`", (root / "docs" / "faults.md").read_text()))
    assert len(named) > 30
    assert named <= there


# What was found by reading.


class Pieces:
    """A tokenizer whose token ``i`` is the ``i``th piece of a text's bytes, cut wherever one likes."""

    is_fast = False
    all_special_ids: tuple[int, ...] = ()

    def __init__(self, text: str, sizes: list[int]) -> None:
        whole, self.pieces = text.encode(), list[bytes]()
        for size in sizes:
            self.pieces.append(whole[:size])
            whole = whole[size:]
        assert not whole

    def decode(self, ids: list[int], **_: Any) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("สวัสดีครับ", [2, *[3] * 9, 1]), ("สวัสดีครับ", [1] * 30), ("a cat \ufffd", [6, 1, 1, 1]), ("\ufffd cat", [3, 4])],
)
def test_tokens_that_end_inside_a_character_lose_none(text: str, sizes: list[int], dp: DePass) -> None:
    made = encode(list(range(len(sizes))), Pieces(text, sizes), dp.bound)
    assert made.text == "".join(made.tokens) == text
    assert made.offsets[-1][1] == len(text)


def test_streams_that_are_closed_are_no_traceback() -> None:
    for closed, code in ((">&-", 0), ("2>&-", 0), (">&- 2>&-", 0)):
        command = ["sh", "-c", f'exec "$0" -m depass backends {closed}', sys.executable]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (code, "")
    command = ["sh", "-c", 'exec "$0" -m depass attribute - <&-', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "depass: the prompt is empty; give at least one token\n")


def test_numbers_that_are_too_long_are_one_line(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(["attribute", "x", "-m", folder, "--target", f"id:{'9' * 5000}"], capsys, 2)
    assert "is not a number; write id:1910 or top:5" in said
    assert run("plan", "-m", folder, "--tokens", "9", "--sources", "9" * 5000) == 2
