"""Tables go between the markers of documents and nowhere else, and their numbers are those of the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest

from benchmarks import experts
from benchmarks.__main__ import main
from benchmarks.machine import BenchmarkError
from benchmarks.ops import LIBRARY, TORCH
from benchmarks.ops import OURS as OURS_OPS
from benchmarks.predict import load
from benchmarks.registry import OURS
from benchmarks.report import NOTHING, TABLES, newest, report
from benchmarks.runner import Row
from depass import DePass
from depass.files import append_row

pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib, of the extra [plots]")

WHERE = {
    "machine": "a-card", "gpu": "A Card", "driver": "1.2", "cpu": "a cpu", "cpu_capability": "AVX2", "threads": 2,
    "torch": "2", "transformers": "5", "commit": "abcdef0123456", "changed": False, "date": "2026-01-02T03:04:05",
    "memory_limit_bytes": None,
}  # fmt: skip


def case_row(method: str, size: int, seconds: float, **more: Any) -> Row:
    row = {
        "what": "case", "case": f"tokens/llama-2-7b/bfloat16/{size}", "question": "tokens", "model": "llama-2-7b",
        "dtype": "bfloat16", "size": str(size), "method": method, "status": "ok", "runs": 3, "seconds_p20": 0.9 * seconds,
        "seconds_p50": seconds, "seconds_p80": 1.1 * seconds, "floor_seconds": 0.1, "share_of_floor": 0.5,
        "plain_forward_seconds": 0.05,
        "beyond_plain_bytes": 3_000_000, **WHERE,
    }  # fmt: skip
    return {**row, **more}


ROWS = [
    case_row(OURS, 16, 9.0),
    case_row(OURS, 16, 0.25),  # newer: the one that counts
    case_row(OURS, 64, 0.5),
    case_row("naive", 16, 2.0),
    case_row("naive", 64, 1.0, status="oom", asked_bytes=69_000_000_000, reason="no"),
]
OP = {
    "what": "op", "op": "mix_values", "model": "llama-2-7b", "backend": "triton", "dtype": "bfloat16", "positions": 256,
    "sizes": "full", "bytes": 10**9, "operations": 10**12, "seconds_p50": 1e-3, "copy_bytes_per_second": 1e12,
    "gemm_operations_per_second": 5e14, "share_of_copy": 1.0, "share_of_gemm": 2.0, **WHERE,
}  # fmt: skip
TEXT = "# Title\n\nmine\n\n<!-- begin {0} -->\nold\n<!-- end {0} -->\n\nmine, too: <!-- begin nothing\n"


def filled(tmp_path: Path, name: str, rows: list[Row]) -> str:
    document = tmp_path / "docs" / "page.md"
    document.parent.mkdir(exist_ok=True)
    document.write_text(TEXT.format(name))
    list(report(rows, [document], tmp_path / "docs" / "figures"))
    text = document.read_text()
    begin, end = TEXT.format(name).split("old\n")
    assert text.startswith(begin)
    assert text.endswith(end)
    return text[len(begin) : len(text) - len(end)]


def test_only_what_is_between_the_markers_changes(tmp_path: Path) -> None:
    table = filled(tmp_path, "tokens", ROWS)
    assert "old" not in table
    assert "**llama-2-7b, random weights, bfloat16**" in table
    assert "| 16 | depass | 250 ms |" in table
    assert "9 s" not in table
    assert "out of memory: asked for 69.0 GB" in table
    assert "A Card (GPU, driver 1.2)" in table
    assert "abcdef0123" in table


def test_a_second_report_changes_nothing(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("".join(TEXT.format(name) for name in TABLES))
    list(report([*ROWS, OP], [document], tmp_path / "figures"))
    once = document.read_text()
    assert "old" not in once
    list(report([*ROWS, OP], [document], tmp_path / "figures"))
    assert document.read_text() == once


def test_the_comparison_shows_each_methods_time_relative_to_ours_and_the_commits_below(tmp_path: Path) -> None:
    table = filled(tmp_path, "comparison", ROWS)
    assert "| `tokens/16` | 250 ms | 8× |" in table
    assert "| `tokens/64` | 500 ms | out of memory |" in table
    last = table.strip().splitlines()[-1]
    assert last.startswith("Measured on A Card (GPU, driver 1.2) with torch 2 and transformers 5, 2026-01-02.")
    assert last.endswith("Commit: abcdef0123.")


def test_the_speed_is_said_in_plain_words(tmp_path: Path) -> None:
    def on_smollm2(question: str, method: str, size: int, seconds: float) -> Row:
        names = {"case": f"{question}/smollm2/float32/{size}", "question": question, "model": "smollm2"}
        return case_row(method, size, seconds, **names, dtype="float32", gpu=None)

    rows = [
        on_smollm2("tokens", OURS, 32, 0.854),
        on_smollm2("tokens", "eager", 32, 1.6),
        on_smollm2("tokens", "input_x_gradient", 32, 0.496),
        on_smollm2("tokens", OURS, 64, 3.0),  # not among the cases that are said
        on_smollm2("heads", OURS, 10, 2.03),
    ]
    assert filled(tmp_path, "speed", rows).strip().splitlines() == [
        "SmolLM2-135M-Instruct, measured on a cpu:",
        "",
        "- A 32-token prompt, fp32, 2 cores: 0.85 s; 1.9 times as fast as plain PyTorch; input × gradient takes 0.5 s",
        "- Every head of every layer, 10-token prompt, fp32, 2 cores: 2 s",
    ]


def test_the_speed_on_a_gpu_names_the_gpu_and_what_plain_pytorch_could_not_do(tmp_path: Path) -> None:
    stopped = {**case_row("eager", 10, 0), "status": "stopped", "seconds_at_least": 300.0}
    del stopped["seconds_p50"]
    rows = [
        case_row(OURS, 10, 0.25),
        stopped,
        case_row(OURS, 128, 0.5),
        case_row("eager", 128, 1.0, status="oom", asked_bytes=69_000_000_000, reason="no"),
    ]
    assert filled(tmp_path, "speed", rows).strip().splitlines() == [
        "llama-2-7b, random weights, measured on A Card:",
        "",
        "- A 10-token prompt, bf16: 0.25 s; more than 1200 times as fast as plain PyTorch",
        "- A 128-token prompt, bf16: 0.5 s; plain PyTorch runs out of memory",
    ]


def test_a_rival_is_held_against_ours_of_the_same_session(tmp_path: Path) -> None:
    rows = [
        case_row(OURS, 16, 1.0, session="first"),
        case_row("naive", 16, 2.0, session="first"),
        case_row(OURS, 16, 0.5, session="second"),
        case_row("eager", 16, 3.0, session="second"),
        case_row("ablation", 16, 9.0, session="third"),
    ]
    assert "/16` | 500 ms | 2× | 6× |  |" in filled(tmp_path, "comparison", rows)


def test_what_was_stopped_says_when(tmp_path: Path) -> None:
    stopped = {**case_row("naive", 64, 0), "status": "stopped", "seconds_at_least": 300.0}
    for missing in ("seconds_p20", "seconds_p50", "seconds_p80", "beyond_plain_bytes"):
        del stopped[missing]
    rows = [case_row(OURS, 16, 0.25), case_row(OURS, 64, 0.5), stopped]
    assert "| naive | over 300 s: stopped |  |  | over 600.00 |" in filled(tmp_path, "tokens", rows)
    assert "| over 600× |" in filled(tmp_path, "comparison", rows)
    alone = [*rows[:2], {**stopped, "session": "another"}]  # with none of ours beside it
    assert "| over 300 s |" in filled(tmp_path, "comparison", alone)
    assert "tokens-a-card" in filled(tmp_path, "figures", rows)


def test_figures_are_drawn_and_linked(tmp_path: Path) -> None:
    table = filled(tmp_path, "figures", [*ROWS, OP])
    for name in ("tokens-a-card-llama-2-7b-bfloat16.png", "roofline-a-card-bfloat16-full.png"):
        assert f"(figures/{name})" in table
        assert (tmp_path / "docs" / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_ops(tmp_path: Path) -> None:
    assert "| mix_values | llama-2-7b, bfloat16, N=256 | triton | 1 ms | 1.0 GB | 100% |" in filled(
        tmp_path, "ops", [OP]
    )


def test_rows_of_an_op_that_is_no_more_are_left_out(tmp_path: Path) -> None:
    assert filled(tmp_path, "ops", [{**OP, "op": "gone"}]).strip() == NOTHING
    assert "gone" not in filled(tmp_path, "ops", [OP, {**OP, "op": "gone"}])


def test_the_librarys_own_products_are_in_the_table_and_not_in_the_roofline(tmp_path: Path) -> None:
    library = [{**OP, "op": op, "backend": TORCH, "operations": 0 if op == "copy" else 10**12} for op in LIBRARY]
    table = filled(tmp_path, "ops", [*library, *({**OP, "op": op} for op in OURS_OPS)])
    for op in (*LIBRARY, *OURS_OPS):
        assert f"| {op} |" in table
    assert filled(tmp_path, "figures", library).strip() == NOTHING


def test_an_op_of_a_card_with_assumed_rates_stands_beside_its_prediction(tmp_path: Path) -> None:
    on_h100 = filled(tmp_path, "ops", [{**OP, "gpu": "NVIDIA H100 80GB HBM3"}])  # 1e12 operations at 700e12 a second
    assert "| share of the GEMM rate | predicted time |" in on_h100
    assert "| 200% | 1.43 ms |" in on_h100
    assert "predicted" not in filled(tmp_path, "ops", [OP])


@pytest.mark.parametrize(("times", "mark"), [(1.3, "off"), (1.2, ""), (0.75, "off")])
def test_a_measured_case_stands_beside_its_prediction_and_is_marked_where_it_is_off(
    tmp_path: Path, times: float, mark: str
) -> None:
    name = "tokens/llama-2-7b/bfloat16/16"
    (predicted,) = (row for row in load() if (row["case"], row["card"]) == (name, "h100"))
    ours = case_row(OURS, 16, times * predicted["seconds"], gpu="NVIDIA H100 80GB HBM3")
    parts = filled(tmp_path, "predicted", [ours, {**OP, "gpu": "NVIDIA H100 80GB HBM3"}]).split("**")
    on_card = {
        title.split(",")[0]: tables for title, tables in zip(parts[1::2], parts[2::2], strict=True) if "2-7b" in title
    }
    assert f" | 50% | {times:.2f} | {mark} |" in on_card["H100"]
    assert on_card["H100"].count("| `tokens/16` |") == 2
    assert on_card["A6000"].count("| `tokens/16` |") == 1
    (line,) = (line for line in on_card["A6000"].splitlines() if line.startswith("| `tokens/16` |"))
    assert line.endswith(" | not measured |")


def test_what_did_not_run_or_is_not_ours_is_no_measurement_of_a_prediction(tmp_path: Path) -> None:
    h100 = {"gpu": "NVIDIA H100 80GB HBM3"}
    rows = [case_row(OURS, 16, 1.0, status="oom", **h100), case_row("naive", 16, 1.0, **h100), case_row(OURS, 16, 1.0)]
    table = filled(tmp_path, "predicted", rows)
    assert table.count("not measured") == len(load())


def test_rows_of_other_kinds_are_ignored() -> None:
    others = [
        {"what": "stage", "name": "ops", "seconds": 3.0, "status": "ok"},
        {"what": "profile", "case": "tokens/llama-2-7b/bfloat16/16", "method": OURS, "status": "ok", **WHERE},
        {"what": "counters", "op": "mix_values", "model": "llama-2-7b", **WHERE},
        {"what": "tests", "code": 0},
    ]
    assert newest([*others, *ROWS, OP, *others]) == newest([*ROWS, OP])


def test_what_has_no_rows_says_so(tmp_path: Path) -> None:
    for name in TABLES:
        if name not in ("tokens", "speed", "comparison", "figures", "predicted"):
            assert filled(tmp_path, name, ROWS).strip() == NOTHING


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no markers", "has no markers"),
        ("<!-- begin tokens -->\n", "has no 'end tokens'"),
        ("<!-- end tokens -->\n", "has no partner"),
        ("<!-- begin tokens -->\n<!-- end heads -->\n", "has no partner"),
        ("<!-- begin cakes -->\n<!-- end cakes -->\n", "unknown table 'cakes'; choose from: speed"),
    ],
)
def test_a_document_without_proper_markers_is_refused_and_none_is_written(tmp_path: Path, text: str, said: str) -> None:
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text(TEXT.format("tokens"))
    bad.write_text(text)
    with pytest.raises(BenchmarkError, match=said):
        list(report(ROWS, [good, bad], tmp_path / "figures"))
    assert good.read_text() == TEXT.format("tokens")
    assert bad.read_text() == text


def test_the_command_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, document = tmp_path / "rows.jsonl", tmp_path / "page.md"
    document.write_text(TEXT.format("tokens"))
    arguments = ["report", str(document), "--results", str(rows), "--figures", str(tmp_path / "figures")]
    assert main(arguments) == 2
    assert "cannot read" in capsys.readouterr().err
    for row in ROWS:
        append_row(rows, row)
    assert main(arguments) == 0
    assert str(document) in capsys.readouterr().out


def test_the_table_of_experts_says_what_was_measured(tmp_path: Path) -> None:
    row = {
        "lengths": [7], "runs": 3, "threads": 1, "measured": [{"method": "half", "length": 7, "experts": 0.3, "dense": 0.2}],
        "commit": "0123456789abcdef", "changed": False, "date": "2026-01-02T03:04:05+0000", "gpu": None, "cpu": "a CPU",
        "cpu_capability": "AVX2", "torch": "2.0", "transformers": "5.0",
    }  # fmt: skip
    (tmp_path / "row.json").write_text(json.dumps(row))
    text = experts.section(tmp_path / "row.json")
    assert "`python -m benchmarks.experts --lengths 7 --runs 3 --threads 1`" in text
    assert "Commit: 0123456789." in text
    assert "| half | 7 | 300 ms | 200 ms | 1.50× |" in text


def test_the_benchmark_of_experts_refuses_scores_that_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    dp = DePass(models.make("llama"))
    monkeypatch.setattr(experts, "SHAPE", {"vocab_size": models.VOCABULARY})
    experts.work(dp, 5, "half")()
    monkeypatch.setattr(experts, "CONSERVATION", -1.0)
    with pytest.raises(SystemExit, match=r"half at 5 tokens misses the logit by .*; nothing was timed"):
        experts.work(dp, 5, "half")
