"""A plan says what a run takes, from shapes alone, and what cannot fit is refused with it before any work is done."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch

from depass import (
    DePass,
    Heads,
    MemoryLimitError,
    MemoryLimitWarning,
    ModelError,
    Neurons,
    OptionError,
    RoutedExperts,
    Spans,
    Token,
)
from depass.cli.main import main
from depass.models.bind import bind
from depass.models.bound import Layer
from depass.models.loading import empty_model
from depass.propagation import mlp, propagate
from depass.propagation import needs as memory
from depass.propagation.blocks import TRAITS, neurons_at_once

MEASURED = """
import sys, torch
from depass import DePass
from depass.engine import linear

def read(what):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1])

dp = DePass.from_pretrained(dtype=torch.float32)
for parameter in dp.model.parameters():
    parameter.sum()  # weights are read from the file when they are first used
n, rule, room = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
weights = dp.plan(n, measure=False).weights_bytes
linear.room = lambda bound: room
plan = dp.plan(n, rule=rule, budget_bytes=weights + room, measure=False)
if rule != "softmax":
    dp.attribute([5, 6, 7], rule=rule)  # checks the layers, once per model
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
loaded = read("VmRSS")
start = 27 if rule == "softmax" else 0  # no layer of a decomposition takes more than another
dp.attribute(torch.randint(100, 40_000, (n,)), target=5, rule=rule, start_layer=start)
print(plan.total_bytes, read("VmHWM") - loaded + plan.weights_bytes)
"""


@pytest.mark.parametrize(
    ("neurons", "fit", "expected"),
    [(11008, 6095, 6016), (14336, 4680, 4608), (11008, 11008, 11008), (11008, 99999, 11008), (300, 128, 128),
     (300, 127, 120), (300, 8, 8), (300, 7, 7), (300, 0, 1), (5, 4, 4)],
)  # fmt: skip
def test_blocks_of_neurons_begin_where_products_are_fast(neurons: int, fit: int, expected: int) -> None:
    assert neurons_at_once(neurons, fit) == expected


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("tokens", "rule", "room"),
    [(48, "softmax", 1 << 34), (384, "softmax", 1 << 34), (512, "half", 1 << 34), (1024, "steer", 1 << 30)],
)  # fmt: skip
def test_memory_is_what_was_planned(tokens: int, rule: str, room: int, smollm2_folder: Path) -> None:
    # the C library would keep freed blocks of up to 32 MB, more or fewer of them from run to run; a plan counts tensors
    returned = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-c", MEASURED, str(tokens), rule, str(room)]
    done = subprocess.run(command, env=returned, capture_output=True, text=True, check=True)
    planned, measured = (int(number) for number in done.stdout.split())
    assert abs(planned - measured) <= 0.1 * measured


ESTIMATED = """
import sys, torch
from depass import DePass
from depass.engine import linear
from depass.engine.linear_memory import linear_needs
from depass.rules import LINEAR

def read(what):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1])

n, rule, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dp, targets = DePass.from_pretrained(dtype=torch.float32), list(range(5, 5 + count))
for parameter in dp.model.parameters():
    parameter.sum()  # weights are read from the file when they are first used
linear.recomputes = lambda *_: True
dp.attribute([5, 6, 7], targets, rule=rule)  # checks the layers, once per model
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
loaded = read("VmRSS")
dp.attribute(torch.randint(100, 40_000, (n,)), targets, rule=rule)
needed = linear_needs(dp.bound, [n], len(dp.bound.layers), count, LINEAR[rule])
print(needed.total(1), read("VmHWM") - loaded)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize("rule", ["steer", "half"])
def test_memory_of_several_targets_is_what_was_estimated(rule: str, smollm2_folder: Path) -> None:
    """Besides the weights. The product library keeps some buffers of its own, so the bounds are wider."""
    returned = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-c", ESTIMATED, "512", rule, "8"]
    done = subprocess.run(command, env=returned, capture_output=True, text=True, check=True)
    estimated, measured = (int(number) for number in done.stdout.split())
    assert 0.75 * measured <= estimated <= 1.3 * measured


def test_targets_cost_a_backward_pass_each_and_a_decomposed_state_nothing() -> None:
    dp = DePass(models.make("llama"))
    for rule, grows in (("half", True), ("softmax", False)):
        one, two, five = (dp.plan(40, rule=rule, targets=count, measure=False) for count in (1, 2, 5))
        assert (two.operations > one.operations) == grows
        assert five.operations - one.operations == 4 * (two.operations - one.operations)
        assert (five.total_bytes > one.total_bytes) == grows
    with pytest.raises(OptionError, match="targets must be positive, got 0"):
        dp.plan(40, targets=0)


def operations_of_a_row(layer: Layer) -> tuple[int, int]:
    """The operations of a row in a layer: for its values, and for the output projection and the MLP."""
    own = [mixer for mixer in layer.mixers if mixer.values_of is None]  # the others take what an earlier layer computed
    read = [part for mixer in own for part in (mixer.latent, mixer.value) if part is not None]
    values, others = [part.weight for part in read], [mixer.output.weight for mixer in layer.mixers]
    if layer.mlp is not None:
        others += [layer.mlp.gate.weight, layer.mlp.down.weight]
    if layer.experts is not None:  # those that the row's position chose
        read = layer.experts.read()
        others += [part for expert in range(layer.experts.chosen) for part in (read.gates[expert], read.down(expert))]
    return 2 * sum(weight.numel() for weight in values), 2 * sum(weight.numel() for weight in others)


@pytest.mark.parametrize("name", models.EVERY)
def test_rows_and_operations_are_those_of_a_run(name: str) -> None:
    dp, ids = DePass(models.make(name)), models.prompt(9)
    numbers, layers = range(models.LAYERS), dp.bound.layers
    dense = [index for index in numbers if layers[index].experts is None and layers[index].mlp is not None]
    given: list[tuple[Any, Any]] = [("token", "token"), (3, Spans([(0, 3), (3, 6), (6, 9)])),
                                    ("heads", Heads(max(numbers, key=lambda index: layers[index].num_heads)))]  # fmt: skip
    if dense:
        given.append(("neurons", Neurons(max(dense, key=lambda index: layers[index].neurons))))
    for planned, sources in given:
        layout = dp.states(ids, models.LAYERS, sources=sources).layout
        plan = dp.plan(9, sources=planned, measure=False)
        assert (plan.rows, plan.sources) == (layout.rows, layout.most)
        assert plan.state_bytes == layout.rows * 32 * 4
        each = [operations_of_a_row(layer) for layer in layers]
        everywhere = sum(map(sum, each)) - each[-1][1]  # behind the last attention, the last position's rows alone
        assert plan.operations == plan.rows * everywhere + plan.sources * each[-1][1]


@pytest.mark.parametrize("name", models.WITH_EXPERTS)
def test_experts_are_planned_as_if_the_first_position_chose_them_all(name: str) -> None:
    dp, ids = DePass(models.make(name)), models.prompt(9)
    layer, bias = dp.bound.expert_layers[0], int(dp.bound.has_bias)
    count = max(len(dp.bound.layers[index].experts.read().tensors["down_proj"]) for index in dp.bound.expert_layers)
    plan = dp.plan(9, sources="experts", measure=False)
    assert (plan.rows, plan.sources) == (9 * (count + 1 + bias), count + 1 + bias)
    found = dp.states(ids, models.LAYERS, sources=RoutedExperts(layer)).layout
    assert found.rows <= plan.rows
    assert found.most <= plan.sources


def test_layers_that_lack_the_sources_are_named() -> None:
    with pytest.raises(OptionError, match=r"sources='experts' of a plan: .* has no experts"):
        DePass(models.make("llama")).plan(9, sources="experts", measure=False)
    with pytest.raises(OptionError, match=r"sources='neurons' of a plan: .* has experts in every layer.*'experts'"):
        DePass(models.make("gpt_oss")).plan(9, sources="neurons", measure=False)


def test_a_way_back_counts_each_layers_own_heads() -> None:
    """A layer of linear attention has other heads than a layer of attention has."""
    dp = DePass(models.make("qwen3_next"))
    widths = [mixer.output.weight.shape[1] for layer in dp.bound.layers for mixer in layer.mixers]
    mixed = sum(widths)
    assert mixed != models.LAYERS * widths[0]
    # products with weights grow with the tokens, those with patterns with their square: two on the way there, one back
    one, two = (dp.plan(tokens, rule="half", measure=False).operations for tokens in (8, 16))
    assert two - 2 * one == 3 * 2 * mixed * (16**2 - 2 * 8**2)


def test_a_model_of_shapes_alone_plans_the_same(tmp_path: Path) -> None:
    its = models.make("llama")
    its.config.save_pretrained(tmp_path)
    from_shapes = empty_model(tmp_path, torch.float32)
    assert all(parameter.is_meta for parameter in from_shapes.model.parameters())
    from depass.engine.plan import make

    cpu = torch.device("cpu")
    plans = [make(bound, 50, "token", cpu, 10**9, None) for bound in (from_shapes, bind(its))]
    assert (plans[0].total_bytes, plans[0].rows, plans[0].largest) == (
        plans[1].total_bytes,
        plans[1].rows,
        plans[1].largest,
    )
    with pytest.raises(ModelError, match="offloaded"):
        bind(from_shapes.model)
    with pytest.raises(ModelError, match="cannot read the configuration of '/nowhere'"):
        empty_model("/nowhere")


@pytest.mark.parametrize("sources", ["token", "heads", "neurons", 4])
def test_the_largest_prompt_fits_and_one_more_token_does_not(sources: Any) -> None:
    dp = DePass(models.make("llama"), workspace_bytes=1 << 16)
    budget = dp.plan(100, sources=sources, measure=False).total_bytes
    plan = dp.plan(100, sources=sources, budget_bytes=budget, measure=False)
    assert plan.fits
    assert plan.largest >= 100
    assert dp.plan(plan.largest, sources=sources, budget_bytes=budget, measure=False).fits
    assert not dp.plan(plan.largest + 1, sources=sources, budget_bytes=budget, measure=False).fits
    assert dp.plan(1, sources=sources, budget_bytes=1, measure=False).largest == 0


def test_what_cannot_fit_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    dp = DePass(models.make("llama"))
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    says = r"45 rows for 9 tokens need .* weights \(state 0.0 MB, .*\), 0.0 MB are available.*`depass plan`"
    with pytest.raises(MemoryLimitError, match=says):
        dp.attribute(models.prompt(9))


LIMITED = """
import resource, torch
from depass import DePass, MemoryLimitError
from transformers import LlamaConfig, LlamaForCausalLM

def limit(bytes):
    size = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])
    resource.setrlimit(resource.RLIMIT_AS, (size + bytes, resource.RLIM_INFINITY))

config = LlamaConfig(hidden_size=512, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, vocab_size=99)
dp = DePass(LlamaForCausalLM(config).eval())
dp.attribute([3] * 9, 5)
limit(100_000_000)  # the state of 300 tokens takes 92 MB, with its blocks more than that
try:
    dp.attribute([3] * 30, 5)
    print("done")
    dp.attribute([3] * 300, 5)
except MemoryLimitError as error:
    print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit is set by what /proc says is held")
def test_a_limit_of_the_process_is_seen() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)
    assert re.search(
        r"done\n.*rows for 300 tokens need .* besides the model's weights .* are available", done.stdout
    ), done.stdout + done.stderr


def memory_runs_out(monkeypatch: pytest.MonkeyPatch, rows: int) -> list[int]:
    """The sharing of more rows than that ends as an allocation that fails does; how many it was asked for, every time."""
    asked: list[int] = []
    shared = mlp.share_hidden

    def failing(gate: Any, hidden: Any, layout: Any, **options: Any) -> Any:
        asked.append(layout.rows)
        if layout.rows > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return shared(gate, hidden, layout, **options)

    monkeypatch.setattr(mlp, "share_hidden", failing)
    return asked


@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
def test_out_of_memory_is_answered_with_smaller_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dp, ids = DePass(models.make(name), workspace_bytes=1 << 18), models.prompt(40)
    expected, heads = dp.attribute(ids, 5), dp.sweep("heads", ids, 5)
    asked = memory_runs_out(monkeypatch, 100)
    with pytest.warns(
        MemoryLimitWarning, match=r"while allocating 3.22 GB; retrying with blocks of 0.0 MB instead of 0.3 MB"
    ):
        found = dp.attribute(ids, 5)
    assert max(asked) > 100 >= asked[-1]
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
    with pytest.warns(MemoryLimitWarning):
        torch.testing.assert_close(dp.sweep("heads", ids, 5).scores, heads.scores, rtol=1e-5, atol=1e-6)
    memory_runs_out(monkeypatch, 1)
    with (
        pytest.warns(MemoryLimitWarning),
        pytest.raises(MemoryLimitError, match=r"out of memory twice, .* (820|860) rows for 40"),
    ):
        dp.attribute(ids, 5)


def test_other_errors_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    dp = DePass(models.make("llama"))

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(mlp, "share_hidden", failing)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        dp.attribute(models.prompt(9))


@pytest.mark.parametrize("name", ["llama", "llama-biased", "gpt2", "gpt-neox", "gemma2"])
@pytest.mark.parametrize("workspace", [None, 1 << 12])
def test_the_last_layer_moves_only_what_is_read(
    name: str, workspace: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dp, ids = DePass(models.make(name), workspace_bytes=workspace), models.prompt(23)
    everywhere = dp.attribute(ids, [Token(5, position=position) for position in range(23)])
    counts = dp.states(ids, models.LAYERS).layout.counts
    rows = memory_runs_out(monkeypatch, 10**9)
    for asked in ([22], [0], [7, 3, 7]):
        rows.clear()
        found = dp.attribute(ids, [Token(5, position=position) for position in asked])
        torch.testing.assert_close(found.scores, everywhere.scores[asked], rtol=1e-5, atol=1e-6)
        last = int(counts[sorted(set(asked))].sum())
        if workspace is None:  # one block a layer
            assert rows == [int(counts.sum())] * (models.LAYERS - 1) + [last]
    sweep = dp.sweep("heads", ids, Token(5, position=7))
    single = [
        dp.attribute(ids, Token(5, position=7), sources=Heads(layer)).scores[0, -4:] for layer in range(models.LAYERS)
    ]
    torch.testing.assert_close(sweep.scores[0], torch.stack(single), rtol=1e-5, atol=1e-6)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 64,
              "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", "-m", str(tmp_path), "--tokens", "512", "--budget", "1GB"]) == 0
    said = capsys.readouterr().out
    assert "512 tokens, 512 sources" in said
    assert "131,328" in said
    assert "fits into 1.00 GB" in said
    assert main(["plan", "-m", str(tmp_path), "--tokens", "512", "--budget", "900KB", "--sources", "8"]) == 0
    assert "does NOT fit into 0.9 MB" in capsys.readouterr().out
    for wrong, says in (
        (["--tokens", "0"], "tokens must be positive, got 0"),
        (["--tokens", "5", "--budget", "4x"], "'4x' is not a size in bytes; write it as 48GB"),
        (["--tokens", "5", "--sources", "page"], "unknown sources 'page' of a plan"),
        (["--tokens", "99999"], "at most 2048, the positions of"),
    ):
        assert main(["plan", "-m", str(tmp_path), *wrong]) == 2
        assert says in capsys.readouterr().err


def test_sources_that_there_are_not() -> None:
    dp = DePass(models.make("llama"))
    with pytest.raises(OptionError, match="sources must be an integer"):
        dp.plan(5, sources=[1], measure=False)
    with pytest.raises(OptionError, match="sources must be at least one span, got 0"):
        dp.plan(5, sources=0, measure=False)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-neox"])
def test_the_attention_takes_one_block_where_the_device_gains_and_the_budget_allows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dp, ids = DePass(models.make(name)), models.prompt(40)
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], workspace=1 << 14))
    expected, several = dp.attribute(ids, 5), dp.plan(40, measure=False)
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], one_block=True))
    one = dp.plan(40, measure=False)
    assert several.source_block_rows < several.rows == one.source_block_rows == one.rows
    assert several.total_bytes < one.total_bytes
    assert dp.plan(40, budget_bytes=one.total_bytes - 1, measure=False).total_bytes == several.total_bytes
    torch.testing.assert_close(dp.attribute(ids, 5).scores, expected.scores, rtol=1e-5, atol=1e-6)
    blocks: list[int] = []
    mixed = propagate.mix_values
    monkeypatch.setattr(
        propagate, "mix_values", lambda p, v, layout, **kw: (blocks.append(layout.rows), mixed(p, v, layout, **kw))[1]
    )
    dp.attribute(ids, 5)
    assert blocks == [one.rows] * models.LAYERS
