"""Many prompts in one pass: each result is its own run's, whatever its neighbours, and a bad one harms no other."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import Any

import models
import pytest
import torch

from depass import (
    Attribution,
    ConservationWarning,
    Contrast,
    Custom,
    DePass,
    DePassError,
    Direction,
    Heads,
    Modules,
    OptionError,
    PromptError,
    SourceError,
    Spans,
    TargetError,
    Token,
    TopK,
    engine,
    masking,
)
from depass.engine import batches
from depass.models.packing import Packing

pytestmark = pytest.mark.filterwarnings("ignore::depass.ConservationWarning")


def same(got: Any, expected: Attribution, tolerance: float) -> None:
    assert isinstance(got, Attribution)
    assert (got.sources, got.targets, got.prompt) == (expected.sources, expected.targets, expected.prompt)
    size = float(expected.scores.abs().sum(1).max())
    torch.testing.assert_close(got.scores, expected.scores, rtol=0, atol=tolerance * size)
    torch.testing.assert_close(got.target_logits, expected.target_logits, rtol=0, atol=tolerance * size)


def test_two_hundred_mixes_of_lengths(device: str) -> None:
    dp = DePass(models.make("llama", torch.float64, device))
    prompts = [models.prompt(length, seed) for length in (1, 2, 3, 5, 8, 13, 21) for seed in (0, 1)]
    alone = [dp.attribute(ids, target=[5, TopK(1)]) for ids in prompts]
    chance = random.Random(0)
    for _ in range(200):
        mix = [chance.randrange(len(prompts)) for _ in range(chance.randint(1, 8))]
        batch = dp.attribute_many(
            [prompts[i] for i in mix], [5, TopK(1)], batch_tokens=chance.choice([1, 20, 60, 1000])
        )
        for i, got in zip(mix, batch, strict=True):
            same(got, alone[i], 2e-6)


@pytest.mark.parametrize("rule", ["softmax", "linear", "taylor"])
@pytest.mark.parametrize("name", models.EVERY)
def test_every_family(name: str, rule: str, device: str) -> None:
    dp = DePass(models.make(name, torch.float64, device), rule=rule, engine="forward")
    prompts = [models.prompt(length, length) for length in (4, 17, 1, 9)]
    for ids, got in zip(prompts, dp.attribute_many(prompts, 5, exclude_bos=True), strict=True):
        same(got, dp.attribute(ids, 5, exclude_bos=True), 1e-6)


@pytest.mark.usefixtures("patterns_in_runs")
@pytest.mark.parametrize("name", models.CONFIGS)
def test_prompts_of_a_batch_whose_patterns_have_longer_rows(name: str, device: str) -> None:
    dp = DePass(models.make(name, torch.float64, device))
    prompts = [models.prompt(length, length) for length in (4, 17, 1, 9, 16)]
    for ids, got in zip(prompts, dp.attribute_many(prompts, 5, exclude_bos=True), strict=True):
        same(got, dp.attribute(ids, 5, exclude_bos=True), 1e-6)


@pytest.mark.parametrize("sources", [Heads(1), Modules(0, "mlp"), Spans([(0, 2), (3, 4)])])
def test_every_kind_of_source(sources: Any, device: str) -> None:
    dp = DePass(models.make("gpt2", torch.float64, device))
    prompts = [models.prompt(length, length) for length in (4, 17, 6)]
    for ids, got in zip(prompts, dp.attribute_many(prompts, 5, sources=sources), strict=True):
        same(got, dp.attribute(ids, 5, sources=sources), 2e-6)


def ids_of(given: Any) -> tuple[int, ...]:
    """The ids of a prompt, or of what holds one; () of anything else."""
    given = getattr(given, "prompt", given)
    given = getattr(given, "ids", given)
    return tuple(given) if isinstance(given, (list, tuple)) else ()


@pytest.mark.parametrize("error", [IndexError("out of range"), RuntimeError("odd"), KeyError("x"), TargetError("none")])
@pytest.mark.parametrize(
    "step",
    ["request.encode", "request.decompose", "scores.readouts_in", "scores.scores_of",
     "scores.conservation_error", "scores.settings", "batches.judge"],
)  # fmt: skip
def test_whatever_one_prompt_raises_is_its_own_result(
    step: str, error: Exception, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every step of the third of five prompts, in whatever pass it is."""
    dp = DePass(models.make("llama", torch.float64, device))
    prompts = [models.prompt(5, seed) for seed in range(5)]
    expected, bad = [dp.attribute(ids, 5) for ids in prompts], tuple(prompts[2])
    in_the_pass: list[tuple[int, ...]] = []
    attribute, real = batches.attribute, attrgetter(step)(engine)

    def watched(engine: Any, cases: Any, options: Any) -> Any:
        in_the_pass[:] = [case.prompt.ids for case in cases]
        try:
            return attribute(engine, cases, options)
        finally:
            in_the_pass.clear()

    def broken(*given: Any, **options: Any) -> Any:
        if bad in [*in_the_pass, *map(ids_of, given)]:
            raise error
        return real(*given, **options)

    monkeypatch.setattr(batches, "attribute", watched)
    monkeypatch.setattr(f"depass.engine.{step}", broken)
    results = list(dp.attribute_many(prompts, 5, batch_tokens=1000, errors="return"))
    assert isinstance(results[2], DePassError)
    assert str(error) in str(results[2])
    assert results[2] is error or results[2].__cause__ is error
    for index in (0, 1, 3, 4):
        same(results[index], expected[index], 1e-6)
    with pytest.raises(DePassError, match="prompt 2: "):
        list(dp.attribute_many(prompts, 5, batch_tokens=1000))


def test_targets_of_their_own_and_probes(device: str) -> None:
    dp = DePass(models.make("llama", torch.float64, device))
    prompts = [models.prompt(length, length) for length in (4, 17, 6)]
    asked = [Contrast(5, 6), [TopK(3), Direction(torch.ones(32), layer=2, position=1)], None]
    for ids, target, got in zip(prompts, asked, dp.attribute_many(prompts, targets=asked), strict=True):
        same(got, dp.attribute(ids, target), 2e-6)


def test_text_is_batched_whatever_side_the_tokenizer_pads_on(smollm2_dp: DePass) -> None:
    prompts = ["The Eiffel Tower stands in the city of", "Two plus two is", [{"role": "user", "content": "Hello"}]]
    side = smollm2_dp.tokenizer.padding_side
    try:
        for smollm2_dp.tokenizer.padding_side in ("left", "right"):
            for given, got in zip(prompts, smollm2_dp.attribute_many(prompts), strict=True):
                same(got, smollm2_dp.attribute(given), 1e-4)
    finally:
        smollm2_dp.tokenizer.padding_side = side


def test_prompts_are_taken_as_they_are_needed() -> None:
    dp, taken = DePass(models.make("llama")), []

    def prompts() -> Any:
        for i in range(100):
            taken.append(i)
            yield models.prompt(5, i)

    results = dp.attribute_many(prompts(), 5, batch_tokens=20)
    for _ in range(3):
        next(results)
    assert len(taken) <= 5  # a batch of four, and the one that did not fit


def test_a_bad_prompt_is_named_and_harms_no_other() -> None:
    dp = DePass(models.make("llama"))
    prompts: list[Any] = [models.prompt(1 + i % 9, i) for i in range(100)]
    prompts[41] = [3, 4, 999]
    found = list(dp.attribute_many(prompts, 5, errors="return"))
    assert len(found) == 100
    assert isinstance(found[41], PromptError)
    for i in (0, 40, 42, 99):
        same(found[i], dp.attribute(prompts[i], 5), 1e-5)
    results = dp.attribute_many(prompts, 5, batch_tokens=64)
    came: list[Any] = []
    with pytest.raises(PromptError, match="prompt 41: id 999 at position 2 is out of range"):
        came.extend(results)
    assert len(came) == 41  # those before it have come
    bad = list(dp.attribute_many(prompts[:3], targets=[5, "text", 5], errors="return"))
    assert [type(one) for one in bad] == [Attribution, TargetError, Attribution]


def test_numbers_that_are_not_finite_are_one_prompts_own() -> None:
    its = models.make("llama")
    its.model.embed_tokens.weight.data[50] = float("nan")
    dp = DePass(its)
    found = list(dp.attribute_many([[3, 4], [3, 50, 4], [7, 8, 9]], 5, errors="return"))
    assert [type(one).__name__ for one in found] == ["Attribution", "NonFiniteError", "Attribution"]
    same(found[2], dp.attribute([7, 8, 9], 5), 1e-5)


def test_options_that_no_prompt_could_have_are_refused_at_once() -> None:
    dp = DePass(models.make("llama"))
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "prompts is empty; give at least one"),
        ("one", {}, "prompts must be an iterable of prompts, got str"),
        ([[3]], {"batch_tokens": 0}, "batch_tokens must be a positive integer, got 0"),
        ([[3]], {"errors": "skip"}, "errors must be 'raise' or 'return', got 'skip'"),
        ([[3]], {"target": 5, "targets": [5]}, "not both"),
        ([[3]], {"rule": "no"}, "unknown rule 'no'"),
        ([[3]], {"targets": "ab"}, "targets must be an iterable of targets, got str"),
        ([[3]], {"targets": 5}, "targets must be an iterable of targets, got int"),
    ]
    for prompts, options, says in wrong:
        with pytest.raises(OptionError, match=says):
            dp.attribute_many(prompts, **options)
    with pytest.raises(SourceError, match="unknown unit 'page'"):
        dp.attribute_many([[3]], sources="page")
    with pytest.raises(OptionError, match="prompts is empty; give at least one"):
        list(dp.attribute_many(iter([])))
    with pytest.raises(OptionError, match="targets ends after 1, but prompts has more; give one target per prompt"):
        list(dp.attribute_many([[3], [4]], targets=[5]))


def test_parts_that_do_not_add_up_are_judged_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr("depass.models.bound.BoundModel.tolerance", -1.0)
    dp = DePass(models.make("llama"))
    with pytest.warns(ConservationWarning):
        list(dp.attribute_many([[3, 4]], 5))
    found = list(dp.attribute_many([[3, 4], [5, 6]], 5, strict=True, errors="return"))
    assert [type(one).__name__ for one in found] == ["ConservationError"] * 2


def test_a_prompt_that_stops_the_pass_harms_no_other() -> None:
    dp = DePass(models.make("llama"))
    first, second = models.prompt(5, 0), models.prompt(5, 1)
    parts = dp.states(first, 1).residual[1][None]  # of the first prompt's stream, and of no other's
    found = list(dp.attribute_many([first, second, first], 5, sources=Custom(parts, 1), errors="return"))
    assert [type(one).__name__ for one in found] == ["Attribution", "SourceError", "Attribution"]
    with pytest.raises(SourceError, match="prompt 1: the parts of Custom do not add up to the residual stream"):
        list(dp.attribute_many([first, second, first], 5, sources=Custom(parts, 1)))


def test_what_was_taken_has_its_results_whatever_comes_after() -> None:
    dp = DePass(models.make("llama"))

    def prompts() -> Any:
        yield [3, 4]
        yield [5, 6]
        raise KeyError("the file ends here")

    came: list[Any] = []
    with pytest.raises(KeyError):
        came.extend(one for one in map(came.append, dp.attribute_many(prompts(), 5)) if one)
    assert len(came) == 2
    came.clear()
    with pytest.raises(OptionError, match="targets ends after 2, but prompts has more"):
        came.extend(one for one in map(came.append, dp.attribute_many([[3], [4], [5]], targets=[5, 6])) if one)
    assert len(came) == 2


def test_a_bad_prompt_raises_at_its_turn_and_no_later() -> None:
    dp, taken = DePass(models.make("llama")), []

    def prompts() -> Any:
        for i in range(1000):
            taken.append(i)
            yield [999]

    with pytest.raises(PromptError, match="prompt 0"):
        next(dp.attribute_many(prompts(), 5))
    assert len(taken) == 1
    taken.clear()
    next(dp.attribute_many(prompts(), 5, errors="return", batch_tokens=10))
    assert len(taken) == 11


def test_threads_take_turns() -> None:
    dp = DePass(models.make("llama"))
    prompts = [models.prompt(1 + i % 7, i) for i in range(30)]
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: list(dp.attribute_many(prompts, 5, batch_tokens=20)), range(3)))
    for found in runs[1:]:
        for one, other in zip(runs[0], found, strict=True):
            same(other, one, 1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", models.EVERY)
def test_a_batch_runs_on_as_many_tokens_as_it_has(name: str) -> None:
    """The model sees one row without padding, and its stream is that of each prompt alone."""
    dp = DePass(models.make(name, torch.float64))
    prompts = [models.prompt(length, length) for length in (7, 1, 19, 7, 12)]
    seen: list[torch.Size] = []
    handle = dp.model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    together = list(dp.attribute_many(prompts, 5))
    handle.remove()
    if dp.bound.takes_positions:
        assert seen == [torch.Size([1, sum(map(len, prompts))])]
    else:  # a recurrence does not tell the prompts of one row apart; Llama 4's attention counts positions by itself
        assert name == "llama4" or any(layer.recurrence is not None for layer in dp.bound.layers)
        assert seen == [torch.Size([len(prompts), max(map(len, prompts))])]
    for prompt, found in zip(prompts, together, strict=True):
        own = dp.model(torch.tensor([prompt])).logits[0, -1, 5]
        alone = dp.attribute(prompt, 5)
        cap = getattr(dp.model.config, "final_logit_softcapping", None)
        own = own if cap is None else cap * torch.atanh(own / cap)
        torch.testing.assert_close(found.target_logits[0].double(), own.double(), rtol=1e-5, atol=1e-5)
        # a softmax in fp32 sums longer rows in another order, and sharing by a softmax makes more of it
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-5, atol=1e-5)
        assert found.settings.padded != dp.bound.takes_positions


def test_a_model_that_takes_no_positions_runs_padded_and_the_result_says_so() -> None:
    model, prompts = models.make("llama"), [models.prompt(length) for length in (3, 9, 9)]
    expected = list(DePass(model).attribute_many(prompts, 5))
    own = model.model.forward

    def without_positions(input_ids: Any = None, use_cache: Any = None, return_dict: Any = None) -> Any:
        return own(input_ids=input_ids, use_cache=use_cache, return_dict=return_dict)

    model.model.forward = without_positions
    found = list(DePass(model).attribute_many(prompts, 5))
    assert [result.settings.padded for result in found] == [True] * 3
    assert not next(DePass(model).attribute_many(prompts[1:], 5)).settings.padded  # of one length: nothing is padded
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)


def test_masks_by_prompt_reach_prompts_in_one_row() -> None:
    dp = DePass(models.make("llama"))
    prompts = [models.prompt(length, length) for length in (4, 9, 6)]
    off = torch.zeros(3, models.LAYERS, 4, dtype=torch.bool)
    off[0, 1, 2] = off[2, 0, 0] = off[2, 2, 3] = True
    with masking.heads(dp, off):
        together = list(dp.attribute_many(prompts, 5, strict=True))
    for prompt, mask, found in zip(prompts, off, together, strict=True):
        with masking.heads(dp, mask[None]):
            alone = dp.attribute(prompt, 5, strict=True)
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-5)
    with masking.heads(dp, off[:2]), pytest.raises(OptionError, match="masked has 2 rows, but the batch has"):
        list(dp.attribute_many(prompts, 5))


def test_the_mask_of_a_row_becomes_that_of_padded_prompts() -> None:
    """Families that make their own mask make it for the whole row."""
    packing = Packing([[5, 6], [5, 6, 7], [5]], in_one_row=True)
    lowest = torch.finfo(torch.float32).min
    row = torch.full((1, 1, 6, 6), lowest).triu(1)
    found = packing.mask(row)
    assert found.shape == (3, 1, 3, 3)
    for prompt, length in enumerate(packing.lengths):
        for query in range(length):
            assert (found[prompt, 0, query] == 0).tolist() == [key <= query for key in range(3)]
    assert found.isfinite().all()
    assert packing.mask(row[..., :3, :3]) is not None
    x = torch.arange(6.0).view(1, 1, 6, 1)
    assert packing.spread(x)[:, 0, :, 0].tolist() == [[0, 1, 1], [2, 3, 4], [5, 5, 5]]
    assert torch.equal(packing.gather(packing.spread(x).transpose(1, 2)), x.transpose(1, 2))


def test_the_scores_of_a_pass_are_copied_together(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many prompts and targets there are, the host waits for the device a few times per pass."""
    dp = DePass(models.make("gpt2", torch.float64, device))  # with a bias in the final norm
    prompts = [models.prompt(length, seed) for seed, length in enumerate((5, 9, 7))]
    target = [TopK(3), 5, Contrast(7, 9, position=2), Token(4, position=2), TopK(2, position=1)]
    expected = [dp.attribute(ids, target) for ids in prompts]
    copies: list[int] = []
    real = torch.Tensor.cpu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():  # the layouts' offsets are on the CPU already
            copies.append(tensor.numel())
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    found = list(dp.attribute_many(prompts, target, batch_tokens=1000))
    assert len(copies) == 1
    for one, other in zip(found, expected, strict=True):
        same(one, other, 1e-6)
        assert one.targets == other.targets


def test_a_top_token_does_not_depend_on_other_targets_where_logits_tie(device: str) -> None:
    model = models.make("llama", torch.bfloat16, device)
    with torch.no_grad():
        model.lm_head.weight[10:60] = model.lm_head.weight[10]  # fifty logits are equal
        model.lm_head.weight[10:60] *= 4
    dp = DePass(model)
    prompts = [models.prompt(5, seed) for seed in range(6)]
    targets = [TopK(1), TopK(3), None, TopK(7), TopK(40), TopK(1)]
    found = list(dp.attribute_many(prompts, targets=targets, batch_tokens=1000))
    for res, ids, target in zip(found, prompts, targets, strict=True):
        assert res.targets == dp.attribute(ids, target).targets
