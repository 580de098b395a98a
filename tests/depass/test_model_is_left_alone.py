"""Whatever happens, the model is afterwards as it was: no hooks, its own attention implementation, the same weights."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import models
import pytest
import torch

from depass import ConservationError, ConservationWarning, DePass, ModelError, NonFiniteError
from depass.models import attention
from depass.models.trace import Trace
from depass.propagation.propagate import Propagation


def hooks(model: Any) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.fixture(params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest, device: str) -> Any:
    made = models.make("llama", device=device)
    made.config._attn_implementation = request.param
    before = {name: weight.clone() for name, weight in made.named_parameters()}
    yield made
    assert hooks(made) == 0
    assert not attention.at_work
    assert made.config._attn_implementation == request.param
    for name, weight in made.named_parameters():
        assert torch.equal(weight, before[name])
    assert torch.is_grad_enabled()


def test_after_a_run(model: Any) -> None:
    res = DePass(model).attribute(models.prompt(9))
    assert not res.scores.requires_grad
    with torch.no_grad():
        own = model(torch.tensor([models.prompt(9)], device=model.device)).logits[0, -1].max()
    assert res.target_logits[0].item() == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", [name for name in ("qwen2_moe", "gpt_oss", "deepseek_v3") if name in models.CONFIGS])
def test_experts_keep_their_implementation_and_their_numbers(name: str, implementation: str, device: str) -> None:
    """No function for experts is registered: the model's own runs, whichever it is, and its logits stay bit for bit."""
    its, ids = models.make(name, device=device), models.prompt(9)
    its.config._experts_implementation = implementation
    batch = torch.tensor([ids], device=its.device)
    with torch.no_grad():
        before = its(batch).logits
        found = DePass(its).attribute(ids, 5, strict=True)
        assert torch.equal(its(batch).logits, before)
    assert found.target_logits[0].item() == pytest.approx(before[0, -1, 5].item(), rel=1e-4)
    assert its.config._experts_implementation == implementation
    assert hooks(its) == 0
    assert not attention.at_work


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_after_an_exception_in_any_layer(model: Any, interruption: type[BaseException], layer: int) -> None:
    def stop(done: int, of: int) -> None:
        if done == layer:
            raise interruption

    with pytest.raises(interruption):
        DePass(model).attribute(models.prompt(9), progress=stop)


def test_after_an_exception_in_the_models_own_code(model: Any) -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    whole, model.model.layers[1].mlp.act_fn = model.model.layers[1].mlp.act_fn, Broken()
    with pytest.raises(KeyboardInterrupt):
        DePass(model).attribute(models.prompt(9))
    model.model.layers[1].mlp.act_fn = whole


def test_nothing_of_a_layer_outlives_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, kept = Propagation.attention, []

    def attention(self: Propagation, index: int, trace: Trace, *rest: Any) -> None:
        assert not [ref for ref in kept if ref() is not None]
        kept.extend(weakref.ref(tensor) for tensor in (trace.mixers[0].pattern, trace.hidden, *trace.scales.values()))
        whole(self, index, trace, *rest)

    monkeypatch.setattr(Propagation, "attention", attention)
    DePass(model, rule="taylor", engine="forward").attribute(models.prompt(9))
    assert len(kept) == 4 * models.LAYERS
    assert not [ref for ref in kept if ref() is not None]


def test_threads_take_turns(model: Any) -> None:
    dp = DePass(model)
    expected = dp.attribute(models.prompt(9)).scores
    with ThreadPoolExecutor(3) as pool:
        for res in pool.map(lambda _: dp.attribute(models.prompt(9)), range(12)):
            assert torch.equal(res.scores, expected)


def test_an_attribution_inside_of_another_is_refused(model: Any) -> None:
    dp = DePass(model)
    with pytest.raises(ModelError, match="already running in this thread"):
        dp.attribute(models.prompt(9), progress=lambda *_: dp.attribute(models.prompt(9)) and None)


def test_a_run_of_the_model_by_a_callback_is_refused(model: Any) -> None:
    with pytest.raises(ModelError, match=r"a callback .* after layer 0; run the model after the attribution"):
        DePass(model).attribute(
            models.prompt(9), progress=lambda *_: model(torch.tensor([[1, 2]], device=model.device))
        )


def test_generating_waits_for_another_threads_attribution(model: Any) -> None:
    dp, ids = DePass(model), models.prompt(9)
    expected, begun, seen = dp.attribute(ids, 5).scores, threading.Event(), list[bool]()

    def slow(done: int, _: int) -> None:
        begun.set()
        seen.append(other.done())
        time.sleep(0.05)

    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(lambda: begun.wait() and dp.generate(ids, max_new_tokens=2))
        assert torch.equal(pool.submit(dp.attribute, ids, 5, progress=slow).result().scores, expected)
        assert other.result()
    assert not any(seen)


def test_a_model_in_training_mode_with_dropout_is_refused(device: str) -> None:
    made = models.make("gpt2", device=device).train()
    with pytest.raises(ModelError, match=r"training mode with dropout.*call model.eval\(\)"):
        DePass(made).attribute(models.prompt(4))
    without = models.make("llama", device=device).train()
    assert DePass(without).attribute(models.prompt(4)).conservation_error.max() < 1e-5
    without.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ModelError, match="training mode"):
        DePass(without).attribute(models.prompt(4))
    without.training = False  # the layers still drop
    with pytest.raises(ModelError, match="training mode"):
        DePass(without).attribute(models.prompt(4))
    functional = models.make("starcoder2", device=device).train()
    functional.model.layers[1].mlp.residual_dropout = 0.1
    with pytest.raises(ModelError, match="training mode"):
        DePass(functional).attribute(models.prompt(4))


def test_logits_that_are_not_finite_are_refused(model: Any) -> None:
    broken = models.make("llama", device=str(model.device))
    broken.lm_head.weight.data[7] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the model's own logits are not finite \(nan for '7'\)"):
        DePass(broken).attribute(models.prompt(4), target=[5, 7])
    broken.model.layers[1].mlp.down_proj.weight.data[:] = float("inf")
    with pytest.raises(NonFiniteError):
        DePass(broken).attribute(models.prompt(4), target=5)
    with pytest.raises(NonFiniteError, match="the state at the input of layer 2 is not finite"):
        DePass(broken).states(models.prompt(4), 2)


def test_parts_that_do_not_add_up_warn_or_raise(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depass.models.bound.BoundModel.tolerance", 1e-12)
    dp = DePass(model)
    with pytest.warns(ConservationWarning, match="miss the logit by"):
        dp.attribute(models.prompt(30), target=list(range(20)))
    with pytest.raises(ConservationError, match="miss the logit by"):
        dp.attribute(models.prompt(30), target=list(range(20)), strict=True)


def test_the_progress_counts_layers(model: Any) -> None:
    seen: list[tuple[int, int]] = []
    DePass(model).attribute(models.prompt(4), start_layer=1, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 2), (2, 2)]


KINDS = ("llama", "gpt-neox", "qwen3_moe", "granitemoehybrid", "falcon_h1", "gemma4")


@pytest.mark.parametrize("rule", ["softmax", "half"])
@pytest.mark.parametrize("name", [name for name in KINDS if models.runs(name)])
def test_a_pass_leaves_nothing_for_the_garbage_collector(name: str, rule: str) -> None:
    """A cycle of references would keep a pass's state until the collector runs, beside that of the next pass."""
    dp, ids = DePass(models.make(name), rule=rule), models.prompt(6)
    dp.attribute(ids)  # the first run checks the model
    gc.collect()
    gc.disable()
    try:
        dp.attribute(ids)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found = {type(each).__qualname__ for each in gc.garbage if type(each).__module__.startswith("depass")}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not found
