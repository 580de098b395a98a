"""Random layouts, prompts and model shapes: what holds of every one of them; and runs that repeat themselves bit for bit."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import models
import pytest
import tokens
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Oracle
from torch import Tensor

from depass import Attribution, DePass, Heads, Spans, TopK
from depass.inputs.prompt import encode
from depass_kernels import SourceLayout, backends, mix_values, share_hidden

pytestmark = pytest.mark.filterwarnings("ignore::depass.ConservationWarning")  # the tests judge by themselves

RULES = ("softmax", "max", "relu", "linear", "taylor")


def examples(count: int) -> Any:
    """The same ones every time; how long one takes says nothing."""
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


# Layouts. A staircase is told by when its sources start; everything else is counted out from that.

Stairs = list[tuple[list[int], int, int | None]]  # starts, positions, the excluded source


@st.composite
def staircases(draw: st.DrawFn) -> Stairs:
    made: Stairs = []
    for _ in range(draw(st.integers(1, 4))):
        positions = draw(st.integers(1, 9))
        starts = sorted([0, *draw(st.lists(st.integers(0, positions - 1), max_size=9))])
        made.append((starts, positions, draw(st.none() | st.integers(0, len(starts) - 1))))
    return made


def laid_out(stairs: Stairs) -> SourceLayout:
    return SourceLayout.concat([SourceLayout.from_starts(*one) for one in stairs])


def cells(stairs: Stairs) -> Iterator[tuple[int, int, int, int]]:
    """Staircase, position in it, position over all, source: of every row, in the rows' order."""
    before = 0
    for index, (starts, positions, _) in enumerate(stairs):
        for t in range(positions):
            yield from ((index, t, before + t, m) for m, start in enumerate(starts) if start <= t)
        before += positions


@examples(60)
@given(stairs=staircases(), most=st.integers(1, 40), data=st.data())
def test_a_layout_has_every_reachable_row_once(stairs: Stairs, most: int, data: st.DataObject) -> None:
    layout, rows = laid_out(stairs), list(cells(stairs))
    assert layout.rows == len(rows)
    assert layout.positions == sum(positions for _, positions, _ in stairs)
    for t in range(layout.positions):
        assert [row for row, cell in enumerate(rows) if cell[2] == t] == list(
            range(*layout.row_start[t : t + 2].tolist())
        )
    skipped = [
        -1 if one is None or t <= starts[one] or sum(start <= t for start in starts) == 1 else one
        for starts, positions, one in stairs for t in range(positions)
    ]  # fmt: skip
    assert layout.skipped.tolist() == skipped

    seen: list[int] = []
    for first, last in layout.source_blocks(most):
        block, there = layout.slice_sources(first, last)
        assert block.rows == len(there) <= most or last == first + 1
        assert [rows[row][2] for row in there] == torch.arange(layout.positions).repeat_interleave(
            block.counts
        ).tolist()
        assert {rows[row][3] for row in there} <= set(range(first, last))
        seen += there.tolist()
    assert sorted(seen) == list(range(len(rows)))
    ends = [0]
    for first, last in layout.position_blocks(most):
        part = layout.slice_positions(first, last)
        assert first == ends[-1] < last
        assert part.rows == sum(first <= cell[2] < last for cell in rows) <= most or last == first + 1
        ends.append(last)
    assert ends[-1] == layout.positions

    begins = layout.position_start.tolist()
    picked = [sorted(data.draw(st.sets(st.integers(begin, end - 1), min_size=1))) for begin, end in pairwise(begins)]
    some, there = layout.select_positions([torch.tensor(positions) for positions in picked])
    wanted = {position for positions in picked for position in positions}
    assert there.tolist() == [row for row, cell in enumerate(rows) if cell[2] in wanted]
    assert some.position_start.diff().tolist() == [len(positions) for positions in picked]


@examples(60)
@given(stairs=staircases(), queries=st.integers(1, 5), sources=st.integers(1, 5))
def test_the_pieces_of_mixing_cover_every_row_once_and_all_of_its_keys(
    stairs: Stairs, queries: int, sources: int
) -> None:
    covered: list[tuple[int, int, int]] = []
    for index, source, query, *begins in laid_out(stairs).mix_tiles(queries, sources, torch.device("cpu")).tolist():
        starts, positions, _ = stairs[index]
        assert begins[len(starts) - source :] == [positions] * (source + sources - len(starts))
        for m in range(source, min(source + sources, len(starts))):
            assert begins[m - source] == starts[m]
            covered += [(index, t, m) for t in range(query, min(query + queries, positions)) if t >= starts[m]]
    assert sorted(covered) == sorted((index, t, m) for index, t, _, m in cells(stairs))


@examples(40)
@given(stairs=staircases(), rule=st.sampled_from(RULES[:-1]), columns=st.integers(1, 40), seed=st.integers(0, 999))
def test_shares_add_up_to_the_whole(stairs: Stairs, rule: str, columns: int, seed: int, backend: str) -> None:
    layout, random = laid_out(stairs), torch.Generator().manual_seed(seed)
    gate = torch.randn(layout.rows, columns, generator=random, dtype=torch.float64)
    hidden = torch.randn(layout.positions, columns, generator=random, dtype=torch.float64)
    shared = share_hidden(gate, hidden, layout, rule=rule, backend=backend)
    summed, rows = torch.zeros_like(hidden), list(cells(stairs))
    for row, (index, t, position, m) in enumerate(rows):
        starts, _, excluded = stairs[index]
        if m == excluded and t > starts[m] and sum(start <= t for start in starts) > 1:
            assert not shared[row].any()
        summed[position] += shared[row]
    assert (summed - hidden).abs().max() <= 1e-12 * len(rows)


@examples(40)
@given(stairs=staircases(), heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]), width=st.integers(1, 20),
       seed=st.integers(0, 999))  # fmt: skip
def test_mixed_parts_add_up_to_the_mixed_whole(
    stairs: Stairs, heads: tuple[int, int], width: int, seed: int, backend: str
) -> None:
    layout, random = laid_out(stairs), torch.Generator().manual_seed(seed)
    query_heads, kv_heads = heads
    longest = layout.longest
    pattern = torch.rand(len(stairs), query_heads, longest, longest, generator=random, dtype=torch.float64).tril()
    values = torch.randn(layout.rows, kv_heads * width, generator=random, dtype=torch.float64)
    mixed = mix_values(pattern, values, layout, kv_heads=kv_heads, backend=backend)
    whole = torch.zeros(layout.positions, kv_heads * width, dtype=torch.float64)
    summed = torch.zeros(layout.positions, query_heads * width, dtype=torch.float64)
    for row, (_, _, position, _) in enumerate(cells(stairs)):
        whole[position] += values[row]
        summed[position] += mixed[row]
    for index, (begin, end) in enumerate(pairwise(layout.position_start.tolist())):
        of_heads = whole[begin:end].view(end - begin, kv_heads, width).repeat_interleave(query_heads // kv_heads, 1)
        expected = torch.einsum("hqk,khd->qhd", pattern[index, :, : end - begin, : end - begin], of_heads).flatten(1)
        assert (summed[begin:end] - expected).abs().max() <= 1e-12 * layout.rows


# Model shapes.

NEWER = ("granite", "olmo", "phi", "cohere", "codegen", "bitnet", "qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3",
         "granitemoeshared")  # fmt: skip
SLOW_LOOP = ("llama", "llama-biased", "llama-tied-wide-heads", "mistral", "qwen2", "qwen3", "gpt2", "gpt-neox",
             "gpt-neox-sequential", "olmo2", "gemma2", "phi3", "starcoder2",
             *(name for name in NEWER if name in models.CONFIGS))  # fmt: skip
BIASED = ("llama-biased", "qwen2", "gpt2", "gpt-neox", "gpt-neox-sequential", "starcoder2", "granite", "phi", "cohere",
          "codegen", "qwen2_moe", "gpt_oss", "deepseek_v3")  # fmt: skip
OWN_HEAD_DIM = ("llama", "llama-biased", "llama-tied-wide-heads", "mistral", "qwen3", "gemma2", "gemma3")


@st.composite
def shapes(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A family's sizes: few or many heads, narrow or wide, shallow or deep, with a window or without."""
    heads, layers = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    each = draw(st.sampled_from([8, 16] if name.startswith("gpt-neox") else [4, 6, 8]))  # NeoX rotates a quarter
    each = 4 if name == "phi" else each  # of which it rotates half
    inner = draw(st.integers(1, 24))
    heads = 4 if name == "codegen" else heads  # whose fused weights are in four blocks
    if name in ("gpt2", "codegen"):
        return {"n_embd": heads * each, "n_inner": inner, "n_layer": layers, "n_head": heads}
    made: dict[str, Any] = {
        "hidden_size": heads * each, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([k for k in (1, 2, 3, 4) if heads % k == 0])),
    }  # fmt: skip
    if name == "deepseek_v3":  # whose keys and values have as many heads
        made["num_key_value_heads"] = heads
    if "num_experts_per_tok" in models.CONFIGS[name][1]:
        made["num_experts_per_tok"] = draw(st.integers(1, 3))
        made["moe_intermediate_size" if "moe_intermediate_size" in models.CONFIGS[name][1] else "intermediate_size"] = (
            inner
        )
    if name in OWN_HEAD_DIM:
        made["head_dim"] = draw(st.sampled_from([2, 4, 8]))
    if models.CONFIGS[name][1].get("sliding_window"):
        made["sliding_window"] = draw(st.integers(2, 9))
    if name == "gemma3":
        made["layer_types"] = draw(st.lists(st.sampled_from(["sliding_attention", "full_attention"]),
                                            min_size=layers, max_size=layers))  # fmt: skip
    return made


@st.composite
def spans(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """Some of the pieces that a prompt is cut into, in any order."""
    cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=4))})
    pieces = list(pairwise(cuts))
    return draw(st.lists(st.sampled_from(pieces), min_size=1, unique=True))


@examples(50)
@given(data=st.data())
def test_states_of_random_shapes_are_the_slow_loops(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(SLOW_LOOP))
    its = models.make(name, torch.float64, seed=data.draw(st.integers(0, 99)), **data.draw(shapes(name)))
    ids = data.draw(st.lists(st.integers(3, models.VOCABULARY - 1), min_size=1, max_size=6))
    rule, tau = data.draw(st.sampled_from(RULES)), data.draw(st.sampled_from([0.03, 0.1, 1.0]))
    workspace = data.draw(st.sampled_from([None, 1, 5000]))
    ranges = data.draw(st.just([(t, t + 1) for t in range(len(ids))]) | spans(len(ids)))
    exclude = (0, 1) in ranges and data.draw(st.booleans())

    always = [0] * ((name in BIASED) + (sum(end - begin for begin, end in ranges) < len(ids)))
    owner = [len(always) - 1] * len(ids)  # of every token; the rest's are those that no span takes
    for index, (begin, end) in enumerate(sorted(ranges)):
        owner[begin:end] = [len(always) + index] * (end - begin)
    oracle = Oracle(name, its, ids, [*always, *(begin for begin, _ in sorted(ranges))], owner, name in BIASED)
    expected = oracle.run(rule, tau, len(always) if exclude else None)

    dp = DePass(its, rule=rule, temperature=tau, workspace_bytes=workspace)
    states = dp.states(ids, sources=Spans(ranges), exclude_bos=exclude)
    for layer, rows in enumerate(expected):
        truth = torch.stack([torch.stack(row) for row in rows])
        # taylor divides by totals that may come close to zero; its parts are as large as the state itself is not
        assert (states.dense(layer) - truth).abs().max() <= 1e-9 * max(1.0, float(truth.abs().max()))


@examples(40)
@given(data=st.data())
def test_parts_of_random_shapes_add_up_alone_and_together(data: st.DataObject) -> None:
    # the sizes of a recurrence hang together
    names = [name for name in sorted(models.CONFIGS) if not name.startswith(("qwen3_next", "granitemoehybrid"))]
    name = data.draw(st.sampled_from(names))
    its = models.make(name, torch.float64, seed=data.draw(st.integers(0, 99)), **data.draw(shapes(name)))
    prompts = data.draw(
        st.lists(st.lists(st.integers(3, models.VOCABULARY - 1), min_size=1, max_size=24), min_size=1, max_size=4)
    )
    dp = DePass(
        its, rule=data.draw(st.sampled_from(RULES[:-1])), workspace_bytes=data.draw(st.sampled_from([None, 999]))
    )
    sources = data.draw(st.sampled_from(["token", Heads(0), Spans([(0, 1)])]))
    asked = [TopK(1), data.draw(st.integers(0, models.VOCABULARY - 1))]
    together = dp.attribute_many(
        prompts, asked, sources=sources, batch_tokens=data.draw(st.sampled_from([1, 30, 1000]))
    )
    for ids, found in zip(prompts, together, strict=True):
        alone = dp.attribute(ids, asked, sources=sources)
        with torch.no_grad():
            logits = its(torch.tensor([ids])).logits[0, -1]
        logits = models.uncapped(its, logits)
        for one in (alone, found):
            assert isinstance(one, Attribution)
            size = one.scores.abs().sum(1)
            own = logits[[target.token_ids[0] for target in one.targets]].float()
            assert ((one.target_logits - own).abs() <= 1e-5 * own.abs().clamp(min=1)).all()
            assert ((one.scores.sum(1) - own).abs() <= 1e-5 * size.clamp(min=1)).all()
        assert ((found.scores - alone.scores).abs() <= 1e-5 * size.clamp(min=1)[:, None]).all()  # type: ignore[union-attr]


# Texts.

TOKENIZERS = {
    "byte-level": tokens.byte_level, "without-bos": lambda: tokens.byte_level(bos=False),
    "prefix-space": lambda: tokens.byte_level(prefix_space=True), "byte-fallback": tokens.byte_fallback,
}  # fmt: skip


@cache
def speaking(kind: str) -> DePass:
    return DePass(models.make("llama", vocab_size=400), TOKENIZERS[kind]())


@pytest.mark.parametrize("kind", TOKENIZERS)
@examples(40)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=24))
def test_every_character_of_a_text_belongs_to_one_token(kind: str, text: str) -> None:
    dp = speaking(kind)
    made = encode(text, dp.tokenizer, dp.bound)
    own = [index for index, token in enumerate(made.ids) if index not in made.special]
    assert made.text == text
    assert "".join(made.tokens[index] for index in own) == text
    assert all(0 <= begin <= end <= len(text) for begin, end in made.offsets)
    assert {at for index in own for at in range(*made.offsets[index]) if not text[at].isspace()} == {
        at for at, character in enumerate(text) if not character.isspace()
    }
    for unit in ("word", "sentence"):
        ranges = made.segments(unit)
        assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
        assert ranges[-1][1] == len(made.ids)


# The same again: bit for bit on the same machine with the same backend and number of threads.

AGAIN = """
import sys
sys.path.insert(0, sys.argv[1])
from test_properties import digest, everything
print(digest(everything(sys.argv[2])))
"""


def everything(backend: str) -> list[Tensor]:
    """Scores of every kind of result."""
    found: list[Tensor] = []
    for name in ("llama", "gpt2", "gemma2", "gpt-neox"):
        for dtype in (torch.float32, torch.bfloat16):
            dp, ids = DePass(models.make(name, dtype), backend=backend), models.prompt(33)
            found += [dp.attribute(ids, [TopK(3), 5]).scores, dp.attribute(ids, 5, sources=Spans([(2, 9)])).scores]
            found += [dp.attribute(ids, 5, rule=rule).scores for rule in RULES]
            found += [dp.sweep("heads", ids, 5).scores, dp.attribute(ids, 5, sources=Heads(1)).scores]
            found += [one.scores for one in dp.attribute_many([ids, ids[:7], ids[3:]], 5)]  # type: ignore[union-attr]
            found.append(dp.generate(ids, max_new_tokens=3).attribution.scores)
    return found


def digest(found: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(scores.numpy().tobytes() for scores in found)).hexdigest()


def test_the_same_again_is_the_same_bit_for_bit(backend: str) -> None:
    first = everything(backend)
    clutter = [torch.full((37 * size,), float("nan")) for size in range(1, 60)]  # other addresses, other old contents
    assert digest(everything(backend)) == digest(first)
    del clutter
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-W", "ignore", "-c", AGAIN, os.path.dirname(__file__), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == digest(first)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.skipif(backends.csrc_missing() is not None, reason=str(backends.csrc_missing()))
def test_the_compiled_ops_are_the_same_with_any_number_of_threads() -> None:
    """Each number is summed up by one thread in one order; torch's own sums are cut by their number."""
    layout, random = SourceLayout.tokens(150, always=1, excluded=1), torch.Generator().manual_seed(0)
    gate, hidden = torch.randn(layout.rows, 72, generator=random), torch.randn(150, 72, generator=random)
    pattern = torch.rand(1, 4, 150, 150, generator=random).tril()
    found: dict[int, list[Tensor]] = {}
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found[count] = [share_hidden(gate, hidden, layout, rule=rule, backend="cpu") for rule in RULES[:-1]]
        found[count].append(mix_values(pattern, gate, layout, kv_heads=2, backend="cpu"))
    for count in (2, 3):
        assert all(torch.equal(one, other) for one, other in zip(found[count], found[1], strict=True))


# Between backends and numbers of threads: to rounding. docs/faults.md states these bounds.
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the sum of the scores' sizes


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", [*[*models.CONFIGS][:15], "olmo"])
def test_backends_and_threads_agree_to_a_bound(name: str, dtype: torch.dtype) -> None:
    its = models.make(name, dtype)
    truth = DePass(models.make(name, torch.float64), backend="reference")
    for seed in range(4):
        ids = models.prompt(40, seed)
        expected = truth.attribute(ids, [3, 4, 5])
        for backend in ("reference", "auto"):
            for count in (1, 2):
                torch.set_num_threads(count)
                found = DePass(its, backend=backend).attribute(ids, [3, 4, 5])
                size = expected.scores.abs().sum(1, keepdim=True)
                assert ((found.scores - expected.scores).abs() <= BOUNDS[dtype] * size).all()
