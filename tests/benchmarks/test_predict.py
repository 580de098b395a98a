"""The predictions for GPUs: they are counted from the code as it is, and the committed table holds them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import predict
from benchmarks.__main__ import main
from benchmarks.predict import CARDS, KERNEL_SECONDS, LAUNCH_SECONDS, Kernel, count
from benchmarks.registry import SHAPES, Case, count_rows, floor_operations, random_model
from depass.propagation.blocks import TRAITS

Row = dict[str, Any]
# what torch and transformers launch of their own differs between their versions
OTHERS = ("model", "scoring", "others")


@pytest.fixture(scope="module")
def today() -> list[Row]:
    return predict.predictions()


def of(rows: list[Row], card: str, case: str) -> Row:
    (row,) = (row for row in rows if (row["card"], row["case"]) == (card, case))
    return row


def test_the_committed_table_is_what_the_code_counts_today(today: list[Row]) -> None:
    committed = predict.load()
    assert [(row["card"], row["case"]) for row in committed] == [(row["card"], row["case"]) for row in today]
    again = "python -m benchmarks predict, then report, writes the table anew"
    for old, new in zip(committed, today, strict=True):
        for name in ("rows", "floor_operations", "floor_seconds"):
            assert old[name] == new[name], again
        for name in ("bytes", "operations", "seconds_by_part"):
            assert without_others(old[name]) == without_others(new[name]), again
        for name in ("launches", "device_seconds", "seconds"):
            assert old[name] == pytest.approx(new[name], rel=0.1), again


def without_others(parts: Row) -> Row:
    return {name: number for name, number in parts.items() if name not in OTHERS}


def test_the_products_of_tokens_and_prompts_are_those_of_the_floor(today: list[Row]) -> None:
    for row in today:
        if row["question"] != "heads":
            assert row["operations"]["products"] == row["floor_operations"]


def test_a_few_rows_move_what_a_count_by_hand_gives(today: list[Row]) -> None:
    # 10 tokens, 55 rows, all in one block; of the last layer the 10 rows of the last position go through the MLP
    D, F, layers = 4096, 11008, 32
    moved = of(today, "h100", "tokens/llama-2-7b/bfloat16/10")["bytes"]
    assert moved["mix"] == layers * 55 * 2 * (D + D)  # bf16 in and out
    fp32_in, bf16_out = 4 * F, 2 * F
    assert moved["share"] == sum(rows * (fp32_in + bf16_out) + positions * 2 * F
                                 for rows, positions in [(55, 10)] * (layers - 1) + [(10, 1)])  # fmt: skip
    assert moved["pattern"] == layers * 32 * (10 * 11 // 2) * 2  # of 32 heads, up to the diagonal


def test_the_norm_reads_every_row_twice_a_layer_and_one_block_scatters_none(today: list[Row]) -> None:
    row = of(today, "h100", "tokens/llama-2-7b/bfloat16/256")
    state = 31 * row["rows"] * 4096 * 4  # read and written by each layer but the last
    assert row["bytes"]["normed"] == pytest.approx(
        2 * 1.5 * state, rel=0.05
    )  # read in fp32, written in bf16, twice a layer
    assert row["bytes"].get("scatter", 0) < 0.01 * state  # what the last layer keeps
    assert row["bytes"]["gather"] < 0.01 * state
    assert row["bytes"].get("copies", 0) < 0.01 * state  # the products use the model's own weights


def test_smaller_blocks_change_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("tokens", "tiny", "bfloat16", "32")

    def products_and_scattered() -> tuple[int, int]:
        kernels = count(case, 3)
        products = sum(times for kernel, times in kernels.items() if kernel.part == "products")
        return products, sum(times * dict(kernel.moved).get("scatter", 0) for kernel, times in kernels.items())

    before, scattered = products_and_scattered()
    monkeypatch.setitem(TRAITS, "cuda", replace(TRAITS["cuda"], workspace=1 << 14))
    smaller, still = products_and_scattered()
    assert smaller > before
    assert still == scattered
    monkeypatch.setitem(TRAITS, "cuda", replace(TRAITS["cuda"], workspace=1 << 14, one_block=False))
    several, scattered = products_and_scattered()
    state = 32 * 33 // 2 * SHAPES["tiny"][0] * 4
    assert several > smaller
    assert scattered - still == pytest.approx(2 * 4 * state, rel=0.05)  # read out and written back by two layers


def test_layers_that_were_not_run_count_as_the_second_does() -> None:
    case = Case("tokens", "tiny", "bfloat16", "16")
    few, more, most = (count(case, layers) for layers in (3, 4, 7))
    assert most - few == {kernel: 4 * times for kernel, times in (more - few).items()}
    config = random_model("tiny", "bfloat16", "meta").config
    assert sum(k.operations * n for k, n in few.items() if k.part == "products") == floor_operations(case, config)
    assert count_rows(case, config).state == 136


def test_the_time_is_the_longer_of_the_devices_and_the_hosts() -> None:
    case, config = Case("tokens", "tiny", "bfloat16", "16"), random_model("tiny", "bfloat16", "meta").config
    card = CARDS["h100"]
    copy = Kernel("casts", 0, (("casts", 3 * 10**12),))  # a second of the bandwidth
    product = Kernel("products", 14 * 10**14, (("products", 3 * 10**12), ("weights", 0)))  # two of the operations
    small = Kernel("others", 0, (("others", 1),))
    long = predict.row_of(case, config, {copy: 1, product: 1}, card)
    assert (long["seconds"], long["seconds_by_part"]) == (3.0, {"casts": 1.0, "products": 2.0})
    many = predict.row_of(case, config, {small: 1000}, card)
    assert many["device_seconds"] == pytest.approx(1000 * KERNEL_SECONDS)
    assert many["seconds"] == many["host_seconds"] == pytest.approx(1000 * LAUNCH_SECONDS)


@pytest.mark.parametrize(
    ("gpu", "card"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA RTX A6000", "a6000"), ("NVIDIA H200", None), (None, None)],
)
def test_a_card_is_known_by_its_drivers_name(gpu: str | None, card: str | None) -> None:
    assert predict.card_of(gpu) == card


def test_the_command_writes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "predicted.json"
    monkeypatch.setattr(predict, "PATH", path)
    monkeypatch.setattr(predict, "MODELS", ("tiny",))
    monkeypatch.setattr(predict, "SIZES", {"tokens": ("16", "10")})
    assert main(["predict"]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    rows = json.loads(path.read_text())
    assert [(row["card"], row["size"]) for row in rows] == [
        ("a6000", "10"),
        ("a6000", "16"),
        ("h100", "10"),
        ("h100", "16"),
    ]
