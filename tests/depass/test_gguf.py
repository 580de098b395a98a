"""Models in GGUF files: what is loaded is what the file says, and a file that cannot be loaded is one line."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import tokens
import torch
import transformers

from depass import DePass, ModelError, OptionError, cli
from depass.errors import PromptWarning
from depass.models import gguf_file

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
    pytest.skip("this transformers reads tokenizers of GGUF files wrongly", allow_module_level=True)
import gguf_files  # noqa: E402 - it needs gguf

TEXT = "the cat sat at Dr. 12\n"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    gguf_files.write(path)
    return str(path)


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    """What a command that must fail prints: one line on standard error, and nothing else."""
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("depass: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", gguf_files.MODELS)
def test_a_file_is_the_model_that_it_was_written_from(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = gguf_files.write(path, name)
    dp = DePass.from_pretrained(path)
    for key, weight in dp.model.state_dict().items():  # gemma's norms are stored as 1 + w
        torch.testing.assert_close(weight, model.state_dict()[key], rtol=0, atol=3e-7 if "gemma" in name else 0)
    ids = models.prompt(20)
    torch.testing.assert_close(
        dp.model(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits, rtol=1e-5, atol=1e-4
    )
    assert dp.tokenizer(TEXT)["input_ids"] == tokens.make()(TEXT)["input_ids"]
    result, same = dp.attribute(ids), DePass(model).attribute(ids)
    torch.testing.assert_close(result.scores, same.scores, rtol=1e-4, atol=1e-4)
    assert result.conservation_error.max() < 1e-5
    assert result.settings.model == str(path)
    assert dp.model.config.name_or_path == dp.tokenizer.name_or_path == str(path)


def test_packed_weights_are_unpacked_exactly(tmp_path: Path) -> None:
    packed = gguf.GGMLQuantizationType.Q8_0
    model = gguf_files.write(tmp_path / "x.gguf", kind=packed)
    dp = DePass.from_pretrained(tmp_path / "x.gguf")
    weight = model.model.layers[1].mlp.gate_proj.weight.detach().numpy()
    expected = gguf.dequantize(gguf.quantize(weight, packed), packed)
    assert not np.array_equal(expected, weight)
    np.testing.assert_array_equal(dp.model.model.layers[1].mlp.gate_proj.weight.detach().numpy(), expected)
    assert dp.attribute(TEXT).conservation_error.max() < 1e-5
    assert not dp.bound.is_quantized


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_the_dtype_is_fp32_or_what_is_given(kind: str, tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "x.gguf", kind=gguf.GGMLQuantizationType[kind])
    assert DePass.from_pretrained(tmp_path / "x.gguf").attribute(TEXT).settings.dtype == "float32"
    narrow = DePass.from_pretrained(tmp_path / "x.gguf", dtype=torch.bfloat16)
    assert {weight.dtype for weight in narrow.model.parameters()} == {torch.bfloat16}
    assert narrow.attribute(TEXT).settings.dtype == "bfloat16"


def test_the_chat_template_and_special_tokens_are_the_files(file: str) -> None:
    dp = DePass.from_pretrained(file)
    assert (dp.tokenizer.bos_token, dp.tokenizer.eos_token) == ("<bos>", "<eos>")
    result = dp.attribute([{"role": "the", "content": "cat"}])
    assert result.prompt.tokens[0] == "<bos>"
    assert result.settings.exclude_bos


def test_other_files_beside_it_are_not_read(tmp_path: Path) -> None:
    tokens.byte_level().save_pretrained(tmp_path)
    for name in ("adapter_config.json", "config.json", "generation_config.json"):
        (tmp_path / name).write_text("{")
    gguf_files.write(tmp_path / "model.gguf")
    dp = DePass.from_pretrained(tmp_path / "model.gguf")
    assert dp.tokenizer(TEXT)["input_ids"] == tokens.make()(TEXT)["input_ids"]


def test_a_device_map_spreads_it(file: str) -> None:
    spread, plain = DePass.from_pretrained(file, device_map="auto"), DePass.from_pretrained(file, device_map="cpu")
    torch.testing.assert_close(spread.attribute(TEXT).scores, plain.attribute(TEXT).scores)


def test_the_command_takes_a_file(file: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["attribute", "the cat", "-m", file]) == 0
    out, err = capfd.readouterr()
    assert "after token 2 (' cat')" in out
    assert err == ""
    assert cli.main(["plan", "--tokens", "10", "-m", file]) == 0
    out, err = capfd.readouterr()
    assert out.startswith(f"{file}, float32, on cpu: 10 tokens")
    assert err == ""


# What cannot be loaded.


def written(**options: Any) -> Callable[[Path], object]:
    return lambda path: gguf_files.write(path, **options)


def scaled(writer: Any) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)


def with_factors(writer: Any) -> None:
    writer.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "there is no file '{path}'"),
        (lambda path: path.mkdir(), "there is no file '{path}'"),
        (
            lambda path: path.write_bytes(b""),
            "'{path}' is not a GGUF file; a model is a directory, a GGUF file, or a name",
        ),
        (
            lambda path: path.write_text("{}"),
            "'{path}' is not a GGUF file; a model is a directory, a GGUF file, or a name",
        ),
        (
            lambda path: path.write_bytes(b"GGUF"),
            "the GGUF file '{path}' is truncated or damaged in its header; fetch it",
        ),
        (
            written(architecture="nonsense"),
            "cannot load the model '{path}': GGUF model with architecture nonsense is not supported yet.",
        ),
        (
            written(tokenizer=False),
            "the GGUF file '{path}' has no tokenizer; load the model with transformers (gguf_file=)",
        ),
        (
            written(change=lambda writer: writer.add_uint16("split.count", 3)),
            "'{path}' is one of 3 parts of a model; merge them first",
        ),
        (
            written(without="blk.1.ffn_down.weight"),
            "cannot load the model '{path}': its files lack 1 weight, the first is model.layers.1.mlp.down_proj.weight",
        ),
        (
            written(change=scaled),
            "the GGUF file '{path}' has rope.scaling.type linear, which transformers does not read",
        ),
        (
            written(change=with_factors),
            "the GGUF file '{path}' has rope_freqs.weight, which transformers does not read",
        ),
        (
            written(change=lambda writer: writer.add_sliding_window(5)),
            "the GGUF file '{path}' has attention.sliding_window 5, which transformers does not read",
        ),
    ],
)
def test_a_gguf_file_that_cannot_be_loaded_is_one_line(
    make: Callable[[Path], object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.gguf"
    make(path)
    said = said.format(path=path)
    assert fails(["attribute", "the cat", "-m", str(path)], capsys).startswith(f"depass: {said}")
    if "lack" not in said:  # a plan loads no weights
        planned = fails(["plan", "--tokens", "3", "-m", str(path)], capsys)
        assert planned.startswith(
            f"depass: {said}".replace("cannot load the model", "cannot read the configuration of")
        )


def test_a_family_that_depass_does_not_know_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf_files.write(tmp_path / "x.gguf", architecture="falcon")
    said = fails(["plan", "--tokens", "3", "-m", str(tmp_path / "x.gguf")], capsys)
    assert "falcon" in said


@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_gguf_file_is_named(
    part: float, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = Path(file).read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[: int(part * len(content))])
    said = fails(["attribute", "the cat", "-m", str(tmp_path / "x.gguf")], capsys)
    assert said.startswith(f"depass: the GGUF file '{tmp_path / 'x.gguf'}' is truncated")


def test_whatever_stands_in_a_header_is_a_model_error(file: str, tmp_path: Path) -> None:
    header, content = gguf_file.read("x", file), bytearray(Path(file).read_bytes())
    chosen, refused = random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(chosen.choice((1, 1, 5))):
            damaged[chosen.randrange(4, header.data)] = chosen.choice((0, 1, 127, 255, chosen.randrange(256)))
        (tmp_path / "x.gguf").write_bytes(damaged)
        try:
            gguf_file.read("x", str(tmp_path / "x.gguf"))
        except ModelError:
            refused += 1
    assert refused > 20


def test_a_tensor_of_an_unknown_type_is_named(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(gguf.GGML_QUANT_SIZES, gguf.GGMLQuantizationType.F32)
    with pytest.raises(ModelError, match=r"has a tensor of an unknown type \(.*, type 0\); pip install --upgrade gguf"):
        DePass.from_pretrained(file)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_named_with_the_extra(
    package: str, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = gguf_file.find_spec
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None if name == package else found(name))
    said = fails(["attribute", "the cat", "-m", file], capsys, code=2)
    assert said == f"depass: the GGUF file '{file}' needs {package}: pip install 'depass-kernels[gguf]'\n"


def test_a_transformers_that_reads_tokenizers_wrongly_is_refused(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "_TRANSFORMERS", (99, 1))
    with pytest.raises(OptionError, match=r"needs transformers 99.1 or later, found 5\..*depass-kernels\[gguf\]"):
        DePass.from_pretrained(file)


def test_a_file_takes_no_further_quantization(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(["attribute", "the cat", "-m", file, "--quantization", "4bit"], capsys, code=2)
    assert said.startswith(f"depass: quantization='4bit': '{file}' is a GGUF file")
    said = fails(["plan", "--tokens", "3", "-m", file, "--quantization", "4bit"], capsys, code=2)
    assert said.startswith(f"depass: quantization='4bit': '{file}' is a GGUF file")


def test_a_way_to_split_text_that_transformers_does_not_know_is_warned_about(tmp_path: Path, file: str) -> None:
    gguf_files.write(tmp_path / "x.gguf", change=lambda writer: writer.kv_data[0].update(split("smollm")))
    with pytest.warns(PromptWarning, match="splits text as 'smollm' does, which transformers does not know"):
        DePass.from_pretrained(tmp_path / "x.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)
        DePass.from_pretrained(file)


def split(name: str) -> dict[str, Any]:
    return {"tokenizer.ggml.pre": gguf.gguf_writer.GGUFValue(name, gguf.GGUFValueType.STRING)}


def test_a_directory_of_gguf_files_is_answered_with_a_files_name(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"has no config.json but GGUF files; name one of them: .*x\.gguf"):
        DePass.from_pretrained(tmp_path)
