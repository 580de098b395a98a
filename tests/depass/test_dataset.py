"""Dataset runs: every row once, whatever its neighbours and however often the run is ended; faults are one line."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import pickle
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dying
import models
import pytest
import tokens
import torch

from depass import DePass, DePassError, OptionError, cli, runs
from depass.datasets.local import attributed, batch_tokens
from depass.datasets.options import DatasetOptions
from depass.datasets.ray import Worker, _described, _described_row
from depass.datasets.rows import Columns, Row, open_data
from depass.engine import plan
from depass.propagation import needs as memory
from depass.propagation.blocks import blocks_of

arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed, and data sets need it")
parquet = pytest.importorskip("pyarrow.parquet")

COLUMNS = ["id", "tokens", "scores", "target", "target_logit", "conservation_error", "status", "error"]
CHAT = [{"role": "user", "content": "the cat"}]
COUNT, SIZE = 26, 4  # rows of ``data``, and of its shards


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    models.make("llama").save_pretrained(path)
    tokens.make().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def dp(model: str) -> DePass:
    return DePass.from_pretrained(model)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of many lengths, three of which cannot be attributed."""
    rows: list[Any] = [{"id": f"row {i}", "prompt": models.prompt(1 + i * 7 % 30, i)} for i in range(COUNT)]
    rows[3]["prompt"], rows[9]["target"], rows[20] = [], 999, {"id": "row 20"}
    return written(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


@pytest.fixture(scope="module")
def finished(model: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards of a run that nothing ended."""
    out = tmp_path_factory.mktemp("finished")
    assert dying.run(arguments(data, model, out), out / "said") == 0
    return shards(out)


def arguments(data: Path | str, model: str, out: Path, *more: str) -> list[str]:
    return ["attribute-dataset", str(data), "-m", model, "--out", str(out), "--shard-rows", str(SIZE), *more]


def run(data: Path | str, model: str, out: Path, *more: str) -> int:
    try:
        return cli.main(arguments(data, model, out, *more))
    except SystemExit as error:  # argparse
        return int(error.code or 0)


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "rows").glob("*.parquet"))}


def rows(out: Path) -> list[dict[str, Any]]:
    """Read as a user would read them."""
    table = parquet.read_table(out / "rows")
    assert table.column_names == COLUMNS
    found: list[dict[str, Any]] = table.to_pylist()
    return found


def left_behind(out: Path) -> list[str]:
    """Files that a finished or stopped run should not leave."""
    known = {"run.json", "rows", "said"}
    others = [path for path in out.rglob("*") if path.name not in known]
    return [str(path) for path in others if not (path.suffix == ".parquet" and path.stem.isdecimal())]


# What rows say.


def test_a_row_is_its_own_attribution(model: str, dp: DePass, tmp_path: Path) -> None:
    asked: list[tuple[Any, Any]] = [
        ("the cat sat", " cat"), ("the cat", 9), (CHAT, None), ([5, 6, 7, 8], None), ("b" * 40, "the"), ("x", "."),
    ]  # fmt: skip
    data = written(tmp_path / "data.jsonl", [{"prompt": prompt, "target": target} for prompt, target in asked])
    assert run(data, model, tmp_path / "out", "--rule", "linear") == 0
    found = rows(tmp_path / "out")
    assert [row["id"] for row in found] == [str(i) for i in range(len(asked))]
    for row, (prompt, target) in zip(found, asked, strict=True):
        alone = dp.attribute(prompt, target, rule="linear")
        assert (row["status"], row["error"]) == ("ok", None)
        assert row["tokens"] == list(alone.prompt.tokens)
        assert row["target"] == alone.targets[0].label
        size = float(alone.scores.abs().sum())
        torch.testing.assert_close(torch.tensor([row["scores"]]), alone.scores, rtol=0, atol=1e-5 * size)
        assert sum(row["scores"]) == pytest.approx(row["target_logit"], abs=1e-5 * size)
        assert row["conservation_error"] < 1e-5


def test_the_bias_source_and_words_are_among_the_scores(tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    models.make("gpt2").save_pretrained(folder)
    tokens.make().save_pretrained(folder)
    data = written(tmp_path / "data.jsonl", [{"prompt": "the cat sat"}])
    assert run(data, str(folder), out, "--sources", "word") == 0
    (row,) = rows(out)
    assert row["tokens"] == ["bias", "the", " cat", " sat"]
    assert sum(row["scores"]) == pytest.approx(row["target_logit"], rel=1e-4)


def test_every_format_says_the_same(model: str, tmp_path: Path) -> None:
    given: list[tuple[str, Any, str | None]] = [
        ("a", "the cat", " cat"), ("b", 'He said "the, cat"\nand sat', "."), ("c", "the", "id:9"), ("d", "cat", None),
        ("e", CHAT, None), ("f", [5, 6, 7], None),
    ]  # fmt: skip
    as_text = [(i, p if isinstance(p, str) else json.dumps(p), t) for i, p, t in given]
    written(tmp_path / "a.jsonl", [dict(zip(("name", "text", "next"), row, strict=True)) for row in given])
    with (tmp_path / "b.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("name", "text", "next"), *as_text])
    columns = [
        arrow.array(column) for column in zip(*as_text[:5], strict=True)
    ]  # a Parquet column of texts has texts and messages as JSON
    parquet.write_table(arrow.table(columns, names=["name", "text", "next"]), tmp_path / "c.parquet")
    named = ("--prompt-column", "text", "--target-column", "next", "--id-column", "name")
    for name in ("a.jsonl", "b.csv", "c.parquet"):
        assert run(tmp_path / name, model, tmp_path / name[0], *named) == 0
    expected = rows(tmp_path / "a")
    assert [row["id"] for row in expected] == list("abcdef")
    assert {row["status"] for row in expected} == {"ok"}
    assert rows(tmp_path / "b") == expected
    assert shards(tmp_path / "c")["000000000000.parquet"] == shards(tmp_path / "a")["000000000000.parquet"]
    # the last shard of the Parquet file has one prompt, the others' has two
    assert rows(tmp_path / "c")[4]["scores"] == pytest.approx(expected[4]["scores"], rel=1e-3, abs=1e-4)


def test_parquet_keeps_lists_of_ids_and_of_messages(model: str, tmp_path: Path) -> None:
    for name, prompt in (("ids", [5, 6, 7]), ("chat", CHAT)):
        parquet.write_table(arrow.table({"prompt": [prompt, prompt]}), tmp_path / f"{name}.parquet")
        written(tmp_path / f"{name}.jsonl", [{"prompt": prompt}] * 2)
        for kind in ("parquet", "jsonl"):
            assert run(tmp_path / f"{name}.{kind}", model, tmp_path / f"{name}-{kind}") == 0
        assert rows(tmp_path / f"{name}-parquet") == rows(tmp_path / f"{name}-jsonl")


def test_what_the_library_datasets_reads(model: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    given = [{"prompt": "the cat", "target": " sat"}, {"prompt": "the", "target": None}]
    written(tmp_path / "a.jsonl", given)
    datasets.Dataset.from_list(given).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(
        train=datasets.Dataset.from_list(given[:1]), test=datasets.Dataset.from_list(given)
    ).save_to_disk(tmp_path / "two")
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "train.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert run(tmp_path / "a.jsonl", model, tmp_path / "a") == 0
    for name, more in (("one", ()), ("two", ("--split", "test")), ("three", ())):
        assert run(tmp_path / name, model, tmp_path / f"out-{name}", *more) == 0
        assert rows(tmp_path / f"out-{name}") == rows(tmp_path / "a")
        assert run(tmp_path / name, model, tmp_path / f"out-{name}", *more) == 0  # the same data are the same run
    assert run(tmp_path / "one", model, tmp_path / "out", "--prompt-column", "text") == 1
    assert run(tmp_path / "two", model, tmp_path / "out", "--split", "validation") == 1
    assert not (tmp_path / "out").exists()


def test_a_bad_row_is_a_row_with_its_error(model: str, tmp_path: Path) -> None:
    lines: list[tuple[bytes, str | None]] = [
        (b'{"prompt": "the cat"}', None),
        (b'{"prompt": ""}', "the prompt is empty"),
        (b'{"text": "the cat"}', "no 'prompt' in this row"),
        (b'{"prompt": [3, 999]}', "id 999 at position 1 is out of range"),
        (b'{"prompt": [[3], [4]]}', "got a batch"),
        (b'{"prompt": 7}', "a prompt must be text, chat messages or token ids, got int"),
        (b'{"prompt": "x", "target": "cat sat"}', "tokens, not one"),
        (b'{"prompt": "x", "target": 1.5}', "a target must be a token's text or id, got float"),
        (b'{"prompt": "x", "target": ["a", "b"]}', "a target must be a token's text or id, got list"),
        (b'{"prompt": "' + b"x" * 400 + b'"}', "320 positions"),
        (b'{"prompt": "\\ud800"}', "bytes that are not UTF-8"),
        (b'{"prompt": "\xff"}', "line 12 is not valid JSON"),
        (b"[1, 2]", "line 13 is not a JSON object"),
        (b"[" * 100_000, "line 14 is not valid JSON"),
        (b'{"prompt": "x", "target": "\\ud800"}', "bytes that are not UTF-8"),
        (b'{"prompt": "the cat"}', None),
    ]
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(line for line, _ in lines))
    assert run(tmp_path / "data.jsonl", model, tmp_path / "out") == 0
    found = rows(tmp_path / "out")
    assert len(found) == len(lines)
    for number, (row, (_, says)) in enumerate(zip(found, lines, strict=True)):
        assert row["id"] == str(number)
        assert row["status"] == ("ok" if says is None else "error")
        if says is not None:
            assert says in row["error"]
            assert "\n" not in row["error"]
            assert [row[name] for name in COLUMNS[1:6]] == [None] * 5
    assert found[0]["scores"] == pytest.approx(found[-1]["scores"], rel=1e-3, abs=1e-4)


def test_odd_texts_stay_what_they_are(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    odd = ["\x1b[31mthe\x1b[0m", "a\0b", "\u202ethe cat", "😀 the", "the " * 20]
    given = [{"prompt": text, "id": text, "target": text} for text in odd] + [{"prompt": "the", "id": "half \ud83d"}]
    assert run(written(tmp_path / "data.jsonl", given), model, tmp_path / "out") == 0
    assert [row["id"] for row in rows(tmp_path / "out")] == [*odd, "half \\ud83d"]
    out, err = capfd.readouterr()
    assert out.isascii()
    assert "\x1b" not in out
    assert err.splitlines() == ["rows: 6 of 6 in 0:00:00"]


def test_a_csv_row_that_is_not_whole_is_an_error(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        b'prompt,target\r\nthe cat, cat\r\nthe, cat, sat\r\nthe\r\n\r\ncat,\r\n\xff,the\r\n"the cat'
    )
    assert run(tmp_path / "a.csv", model, tmp_path / "out") == 0
    errors = [row["error"] for row in rows(tmp_path / "out")]
    assert errors[0] is errors[3] is None
    assert errors[1] == "line 3 has 3 cells, the header has 2"
    assert errors[2] == "line 4 has 1 cells, the header has 2"
    assert "not UTF-8" in errors[4]
    assert errors[5] == "line 8: unexpected end of data"


# What is refused.


@pytest.mark.parametrize(
    ("content", "more", "code", "says"),
    [
        (b"\n", (), 1, "data.jsonl has no rows"),
        (b'{"text": "x"}', (), 1, "its columns: 'text'; name one of them with --prompt-column"),
        (b'{"prompt": "x"}', ("--target-column", "next"), 1, "has no column 'next'"),
        (b'{"prompt": "x"}', ("--id-column", "name"), 1, "has no column 'name'"),
        (b'{"prompt": "x"}', ("--split", "test"), 2, "leave out --subset and --split"),
        (b'{"prompt": "x"}', ("--shard-rows", "0"), 2, "'0' is not an integer of at least 1"),
        (b'{"prompt": "x"}', ("--batch-tokens", "x"), 2, "'x' is not an integer of at least 1"),
        (b'{"prompt": "x"}', ("--workers", "2"), 2, "need --engine ray; add it, or leave them out"),
        (b'{"prompt": "x"}', ("--sources", "page"), 2, "invalid choice: 'page'"),
        (b'{"prompt": "x"}', ("-m", "/no/such/folder"), 1, "the model path '/no/such/folder' is not a directory"),
        (b'{"prompt": "x"}', ("--out", "/proc/none"), 1, "cannot write into /proc/none"),
        (b'{"prompt": "x"}', ("--temperature", "-1"), 2, "temperature must be a positive number"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    content: bytes, more: tuple[str, ...], code: int, says: str, model: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "data.jsonl").write_bytes(content)
    assert run(tmp_path / "data.jsonl", model, tmp_path / "out", *more) == code
    out, err = capsys.readouterr()
    assert says in err
    assert out == ""
    assert err.count("\n") == 1 or err.startswith("usage:")
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "No such file or directory"),
        ("a.txt", b"the cat", "give a file that ends in .jsonl, .ndjson, .csv, .parquet"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"prompt,target\n", "has no rows"),
        ("a.csv", b'"prompt"x\nthe', "has no header line with column names"),
        ("a.parquet", b"PAR1 and then nothing", "cannot read"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(
    name: str, content: bytes | None, says: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(tmp_path / name, model, tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_truncated_parquet_file_is_one_line(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"prompt": [f"the {i}" for i in range(100)]}), path, row_group_size=20)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert run(path, model, tmp_path / "out") == 1
    assert capsys.readouterr().err.startswith(f"depass: cannot read {path}: ")
    assert not (tmp_path / "out").exists()


def test_a_parquet_file_that_is_broken_further_on_keeps_the_rows_before(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.parquet"
    table = arrow.table({"prompt": [f"the {i}" for i in range(512)]})
    parquet.write_table(table, path, row_group_size=256, use_dictionary=False, compression="snappy")
    begin = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[begin : begin + 60] = b"\xff" * 60
    path.write_bytes(content)
    assert run(path, model, tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert err.startswith(f"depass: cannot read {path}: ")
    assert "256 of 512 rows are kept in" in err
    assert err.count("\n") == 1
    assert len(rows(tmp_path / "out")) == 256
    assert left_behind(tmp_path / "out") == []


def test_a_torn_last_line_is_a_row_with_its_error(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "the"}\n{"prompt": "the ca')
    assert run(tmp_path / "a.jsonl", model, tmp_path / "out") == 0
    assert capsys.readouterr().out.endswith("rows: 1 ok, 1 error\n")
    assert rows(tmp_path / "out")[1]["error"] == "line 2 is not valid JSON; the file ends in the middle of it"


def test_data_that_change_while_they_are_read_are_found_out(tmp_path: Path) -> None:
    data = open_data(str(written(tmp_path / "a.jsonl", [{"prompt": "the"}] * 3)), Columns())
    written(tmp_path / "a.jsonl", [{"prompt": "the"}] * 2)
    with pytest.raises(DePassError, match="changed during the run; do not change it"):
        list(data.read())
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DePassError, match=r"cannot read .*: No such file"):
        list(data.read())


def test_another_run_in_the_folder_must_be_the_same(
    data: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, out = tmp_path / "copy.jsonl", tmp_path / "out"
    copy.write_bytes(data.read_bytes())
    assert run(copy, model, out) == 0
    before, said = shards(out), (out / "run.json").read_bytes()
    assert run(copy, model, out, "--rule", "max") == 2
    assert (
        "rule 'softmax', but this run has 'max'; use the same options, or choose another --out"
        in capsys.readouterr().err
    )
    copy.write_bytes(data.read_bytes() + b'{"prompt": "one more"}\n')
    assert run(copy, model, out) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("{}")
    assert run(copy, model, tmp_path / "other") == 1
    assert (shards(out), (out / "run.json").read_bytes()) == (before, said)


# What ends a run.


def test_a_finished_run_is_left_alone(
    data: Path, model: str, tmp_path: Path, finished: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dying.run(arguments(data, model, tmp_path), tmp_path / "said") == 0
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert run(data, model, tmp_path) == 0
    assert capsys.readouterr().out == f"{COUNT} rows in {tmp_path}/rows: {COUNT - 3} ok, 3 errors\n"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == times
    assert shards(tmp_path) == finished
    said = json.loads((tmp_path / "run.json").read_text())
    assert said["settings"]["rows"] == COUNT
    assert [session["seconds"] is not None for session in said["sessions"]] == [True]


MOMENTS = [(name, number, before) for name in ("fsync", "replace") for number in (1, 2, 4) for before in (True, False)]


@pytest.mark.parametrize("at", MOMENTS, ids=lambda at: f"{'before' if at[2] else 'after'}-{at[0]}-{at[1]}")
def test_a_kill_while_a_file_is_written_loses_nothing(
    at: dying.Moment, data: Path, model: str, finished: dict[str, bytes], tmp_path: Path
) -> None:
    assert dying.run(arguments(data, model, tmp_path), tmp_path / "said", at=at) == -signal.SIGKILL
    there = shards(tmp_path)
    assert there == {name: finished[name] for name in list(finished)[: len(there)]}
    assert len(there) == max(0, at[1] - 1 - (at[2] or at[0] == "fsync"))  # run.json is the first file
    assert dying.run(arguments(data, model, tmp_path), tmp_path / "said") == 0
    assert shards(tmp_path) == finished
    assert left_behind(tmp_path) == []


def test_kills_at_any_moment_lose_nothing(data: Path, model: str, finished: dict[str, bytes], tmp_path: Path) -> None:
    began = time.monotonic()
    assert dying.run(arguments(data, model, tmp_path / "whole"), tmp_path / "said") == 0
    took = time.monotonic() - began
    out, codes = tmp_path / "out", list[int]()
    for part in (0.2, 0.5, 0.6, 0.7, 0.8, 0.9):
        codes.append(dying.run(arguments(data, model, out), tmp_path / "said", after=part * took))
        assert shards(out).items() <= finished.items()  # none torn
    assert codes[0] == -signal.SIGKILL
    assert set(codes) <= {0, -signal.SIGKILL}
    assert dying.run(arguments(data, model, out), tmp_path / "said") == 0
    assert shards(out) == finished  # none lost, none twice
    assert left_behind(out) == []


@pytest.mark.parametrize(
    ("send", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_is_one_line_and_the_run_goes_on_later(
    send: int, code: int, word: str, data: Path, model: str, finished: dict[str, bytes], tmp_path: Path
) -> None:
    for before in (True, False):  # a file has its other name, or has it not
        out = tmp_path / str(before)
        out.mkdir()
        got = dying.run(arguments(data, model, out), out / "said", at=("replace", 3, before), send=send)
        assert got == code
        there = 1 if before else 2  # of the shards; run.json was the first file
        kept = f"{there * SIZE} of {COUNT} rows are kept in {out}; run the same command again to resume"
        assert (out / "said").read_text() == f"depass: {word}; {kept}\n"
        assert len(shards(out)) == there
        assert left_behind(out) == []
        assert dying.run(arguments(data, model, out), out / "said") == 0
        assert shards(out) == finished


def test_the_second_of_two_runs_in_one_folder_is_refused(
    data: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with runs.hold(tmp_path):
        assert run(data, model, tmp_path) == 1
    said = f"depass: another process is using {tmp_path}; wait until it ends, or choose another --out\n"
    assert capsys.readouterr().err == said
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_grows_too_large_is_one_line(
    data: Path, model: str, finished: dict[str, bytes], tmp_path: Path
) -> None:
    largest = max(map(len, finished.values())) - 1
    before = [name for name, content in finished.items() if len(content) <= largest]
    assert dying.run(arguments(data, model, tmp_path), tmp_path / "said", largest_file=largest) == 1
    said = (tmp_path / "said").read_text()
    assert said.startswith(f"depass: cannot write {tmp_path}/rows/")
    assert ": File too large; " in said
    assert said.count("\n") == 1
    assert set(shards(tmp_path)) <= set(before)
    assert left_behind(tmp_path) == []
    assert dying.run(arguments(data, model, tmp_path), tmp_path / "said") == 0
    assert shards(tmp_path) == finished


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_line(
    data: Path, model: str, finished: dict[str, bytes], small_disk: Path, tmp_path: Path
) -> None:
    assert dying.run(arguments(data, model, small_disk), tmp_path / "said") == 1
    said = (tmp_path / "said").read_text()
    assert ": No space left on device; " in said
    assert said.count("\n") == 1
    there = shards(small_disk)
    assert there
    assert there.items() < finished.items()
    assert left_behind(small_disk) == []
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    assert dying.run(arguments(data, model, small_disk), tmp_path / "said") == 0
    assert shards(small_disk) == finished


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot be written, for root neither."""
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    mounted = False
    if os.access(folder, os.W_OK):
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        if not mounted:
            pytest.skip("this user may write everywhere")
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_folder_is_one_line(data: Path, read_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (read_only, read_only / "new"):
        assert run(data, "/no/such/model", out) == 1
        err = capsys.readouterr().err
        assert err.startswith("depass: cannot write ")
        assert str(read_only) in err
        assert err.count("\n") == 1


def test_a_shard_that_was_broken_is_named(
    data: Path, model: str, finished: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dying.run(arguments(data, model, tmp_path), tmp_path / "said") == 0
    broken = tmp_path / "rows" / "000000000008.parquet"
    for content in (finished[broken.name][:-9], finished["000000000024.parquet"]):
        broken.write_bytes(content)
        assert run(data, model, tmp_path) == 1
        err = capsys.readouterr().err
        assert str(broken) in err
        assert err.endswith("delete it and run again\n")
    broken.unlink()
    assert dying.run(arguments(data, model, tmp_path), tmp_path / "said") == 0
    assert shards(tmp_path) == finished


# How it goes.


def test_a_pass_takes_half_of_what_memory_is_free(dp: DePass, monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch_tokens(dp) == 1024

    def taken(count: int) -> int:
        done, _ = plan.rows_and_sources(dp.bound, count, "token")
        cpu = torch.device("cpu")
        return memory.Sizes.of(dp.bound, cpu).needs(done, [count], blocks_of(dp.bound, None, cpu)).total_bytes

    for free, tokens_of_pass in ((taken(1024) * 2, 1024), (taken(1024) * 2 - 1, 512), (taken(128) * 2, 128), (1, 1)):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=free: free)
        assert batch_tokens(dp) == tokens_of_pass


def test_progress_says_rate_and_remaining_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(runs.time, "monotonic", lambda: now)
    with runs.progress("rows", 10_000) as update:
        for done, now in ((1000, 0.0), (1100, 10.0), (1600, 60.0), (1650, 65.0), (9910, 891.0), (10_000, 900.0)):  # noqa: B007
            update(done)
    assert capsys.readouterr().err.splitlines() == [
        "rows: 1,600 of 10,000, 10/s, 0:14:00 left",
        "rows: 9,910 of 10,000, 10/s, 0:00:09 left",
        "rows: 10,000 of 10,000 in 0:15:00",
    ]


BAR = (
    "import time; from depass import runs\n"
    "with runs.progress('rows', 100) as update:\n    update(0); time.sleep(1.2); update(50); time.sleep(.3); update(60)"
)


def test_on_a_terminal_it_is_a_bar() -> None:
    master, slave = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", BAR], stderr=slave, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                chunk = os.read(master, 4096)
            except OSError:  # the other end is closed
                break
            seen += chunk
    os.close(master)
    assert process.returncode == 0
    assert b"60/100" in seen
    assert b"/s, 0:00:0" in seen


# On Ray.


@pytest.fixture
def needs_ray() -> None:
    pytest.importorskip("ray", reason="Ray is not installed")


def same_rows(out: Path, expected: Path) -> None:
    """Each row once and in order, its numbers to rounding: a worker may have another number of threads."""
    ours, theirs = rows(out), rows(expected)
    assert [row["id"] for row in ours] == [row["id"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert (one["status"], one["error"], one["tokens"]) == (other["status"], other["error"], other["tokens"])
        if one["status"] == "ok":
            size = sum(map(abs, other["scores"]))
            assert one["scores"] == pytest.approx(other["scores"], abs=1e-4 * size)


def ray_workers() -> list[int]:
    """Processes of this test's cluster that hold a model."""
    parents, workers = {}, []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                title = (process / "cmdline").read_bytes()
                parents[int(process.name)] = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:  # it has ended
                continue
            if title.startswith(b"ray::") and b"Worker" in title:
                workers.append(int(process.name))

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    return [pid for pid in workers if ours(pid)]


@pytest.mark.usefixtures("needs_ray")
def test_a_worker_that_dies_is_replaced_and_its_rows_come_once(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [{"id": str(i), "prompt": models.prompt(2 + i % 40, i)} for i in range(600)]
    given[7]["prompt"] = []
    data, out, killed = written(tmp_path / "data.jsonl", given), tmp_path / "ray", list[int]()

    def kill() -> None:
        while not shards(out):
            time.sleep(0.01)
        killed.extend(ray_workers())
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    out.mkdir()
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert run(data, model, out, "--engine", "ray", "--batch-tokens", "64") == 0
    killer.join(1)
    assert len(killed) == 1
    assert capsys.readouterr().out.endswith("599 ok, 1 error\n")
    assert left_behind(out) == []
    assert run(data, model, tmp_path / "local", "--batch-tokens", "64") == 0
    same_rows(out, tmp_path / "local")


@pytest.mark.usefixtures("needs_ray")
def test_what_ray_cannot_do_is_one_line(
    data: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, model, tmp_path, "--engine", "ray", "--device", "cuda:1") == 2
    assert "with --engine ray each worker has its own GPU; write cuda" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run(data, model, tmp_path / "a", "--engine", "ray", "--device", "cuda") == 2
        assert "the cluster has 0 GPUs, one per worker" in capsys.readouterr().err
    assert run(data, "/no/such/folder", tmp_path / "b", "--engine", "ray") == 1
    assert "the model path '/no/such/folder' is not a directory" in capsys.readouterr().err


def test_without_ray_the_engine_says_what_to_install(
    data: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(data, model, tmp_path, "--engine", "ray") == 2
    assert "pip install 'depass-kernels[ray]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(data, model, tmp_path) == 1
    assert "pip install 'depass-kernels[data]'" in capsys.readouterr().err


# What was found by reading.


def test_rows_without_a_run_are_not_adopted(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = written(tmp_path / "data.jsonl", [{"prompt": "the"}] * 3)
    assert run(given, model, tmp_path / "out") == 0
    (tmp_path / "out" / "run.json").unlink()
    capsys.readouterr()
    assert run(given, model, tmp_path / "out") == 1
    assert "has no run.json that describes them; give another --out" in capsys.readouterr().err


def test_a_quote_that_is_not_closed_names_the_lines_that_it_takes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt\nthe\n"cat\nsat\nthe\n')
    errors = [row.broken for row in open_data(str(tmp_path / "a.csv"), Columns()).read()]
    assert errors == [None, "lines 3 to 5, one row: unexpected end of data"]


def test_only_a_prompts_cell_is_ids(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,id,target\n"[5, 6]","[1,2]","[1]"\n')
    (row,) = open_data(str(tmp_path / "a.csv"), Columns()).read()
    assert (row.prompt, row.id, row.target) == ([5, 6], "[1,2]", "[1]")


def test_a_saved_data_set_without_splits_has_none(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    datasets.Dataset.from_list([{"prompt": "the"}]).save_to_disk(tmp_path / "saved")
    for given in ({"split": "test"}, {"subset": "a"}):
        with pytest.raises(
            OptionError, match="is a data set without subsets or splits; leave out --subset and --split"
        ):
            open_data(str(tmp_path / "saved"), Columns(), **given)


def test_a_prompt_that_is_nested_too_deep_for_ray_is_a_row_with_its_error() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    assert json.loads(_described_row(Row("a", nested))) == {"id": "a", "broken": "the prompt is nested too deep"}
    whole = {"id": "b", "prompt": [5, 6], "target": 7, "answer": None, "broken": None}
    assert json.loads(_described_row(Row("b", [5, 6], 7))) == whole


def test_a_worker_that_gets_pickled_options_makes_the_shard_that_this_process_makes(model: str, dp: DePass) -> None:
    options = DatasetOptions(
        data="none", out="none", model=model, sources="word", rule="linear", workers=3, batch_tokens=64
    )
    sent = pickle.loads(pickle.dumps(options))
    assert sent == options
    rows = [Row("a", "the cat sat"), Row("b", [5, 6, 7], 9), Row("c", broken="no prompt")]
    first, made = Worker(sent).make(8, _described(rows))
    linear = DePass.from_pretrained(model, rule="linear")
    assert first == 8
    assert made == attributed(linear, rows, "word", 64)
    assert made != attributed(dp, rows, "word", 64)


def test_processes_that_share_memory_share_it_out(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dp = DePass.from_pretrained(model)
    rows, _ = plan.rows_and_sources(dp.bound, 1024, "token")
    blocks = blocks_of(dp.bound, None, dp.bound.device)
    needed = memory.Sizes.of(dp.bound, dp.bound.device).needs(rows, [1024], blocks).total_bytes
    monkeypatch.setattr(memory, "room", lambda bound: 2 * needed)
    assert batch_tokens(dp) == 1024
    assert batch_tokens(dp, 8) < 1024


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(DePassError, match=r"cannot lock .* against other processes: No locks available"),
        runs.hold(tmp_path),
    ):
        pass
