"""Linear rules by one backward pass: the same numbers as the forward engine, a slow loop, and other formulations."""

from __future__ import annotations

import gc
import itertools
import math
import sys
import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
import transformers as tf
from everything import Everything, everything
from gemma4_oracle import LinearGemma4Oracle, LinearLlama4Oracle
from linear_oracle import LinearOracle
from torch import Tensor, nn
from torch.nn import functional

from depass import (
    Contrast,
    DePass,
    Direction,
    Family,
    Heads,
    ModelError,
    Modules,
    Neurons,
    OptionError,
    SourceError,
    Spans,
    Subspace,
    Token,
    TopK,
    masking,
)
from depass.engine import request, scores
from depass.engine.backward import Backward, LayerGradients, StreamGradient
from depass.inputs.targets import check
from depass.models import query_blocks
from depass.models.attention import eager_with_patterns
from depass.models.bind import bind
from depass.models.bound import BoundModel
from depass.models.families import QWEN2_MOE, SHARED
from depass.models.linearised import linearised
from depass.rules import LINEAR as RULES
from depass.rules import PathWeights

pytestmark = pytest.mark.filterwarnings("ignore::depass.ConservationWarning")  # the tests judge by themselves

LENGTH = 9
TARGETS = [TopK(2), 5, Contrast(7, 9), TopK(1, position=3), Direction(torch.linspace(-1, 1, 32))]
OWN = PathWeights(q=-0.5, k=2.0, v=0.25, gate=0.75, up=1.0)
OF_MLP = PathWeights(gate=0.75, up=1.0)  # such weights are defined for linear attention too
WHOLE = ("taylor", "half", "up")  # the rules that add up
GATED = ("llama", "llama-biased", "qwen2", "gemma2", "olmo2", "phi3")
WITH_LOOP = ("gpt2", "gpt-neox", "gpt-neox-sequential", "starcoder2", "granite", "olmo", "phi", "cohere", "codegen")
OWN_LOOP = {"gemma4": LinearGemma4Oracle, "gemma4-experts": LinearGemma4Oracle, "llama4": LinearLlama4Oracle}
ROUTED = [
    name
    for name in ("qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoeshared", "gemma4-experts", "llama4")
    if name in models.CONFIGS
]
# What computes in fp32 whatever the model's dtype: the products of CodeGen's and GPT-J's queries and keys; Llama 4's
# rotations and router; the others' routers; the sum of hy_v3's experts and the MLP beside them; the sinks of granite_swa
# and granitemoe_swa; recurrences.
SINKS_IN_FP32 = ("granite_swa", "granitemoe_swa")
SUMS_IN_FP32 = ("hy_v3",)
COMPUTES_IN_FP32 = (
    "codegen", "gptj", "afmoe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe",
    "glm4_moe_lite", "solar_open", "llama4", *SUMS_IN_FP32, *SINKS_IN_FP32, *models.RECURRENT,
)  # fmt: skip


def allowed(names: Iterable[str], rules: Iterable[str]) -> list[tuple[str, str]]:
    """The models and the linear rules that are defined for them."""
    rules = list(rules)
    return [(name, rule) for name in names for rule in rules if models.takes(name, RULES[rule])]


def asked(bound: BoundModel, ids: list[int], target: Any = 5, first: int = 0) -> Any:
    return check(target, len(ids), range(first, len(bound.layers) + 1), None, bound)


def scored(model: Any, ids: list[int], rule: str | PathWeights, target: Any = 5, **options: Any) -> Everything:
    bound = bind(model)
    weights = RULES[rule] if isinstance(rule, str) else rule
    (one,) = everything(bound, [ids], [asked(bound, ids, target)], weights, **options)
    return one


def forward_scores(
    dp: DePass, ids: list[int], target: Any, sources: Any = "token", **options: Any
) -> tuple[Tensor, list[str]]:
    """The forward engine's scores ``[T, M]`` in the state's dtype, for the taylor rule, and the sources' kinds."""
    chosen = request.options(dp.engine.defaults, dp.bound, **{"rule": "taylor", "exclude_bos": False, **options})
    case = request.case(dp.bound, None, ids, target, sources, chosen)
    with torch.no_grad():
        done = scores._ProbedPass(dp.engine, [case], chosen, None)
        done.run()
        (readouts,) = scores.readouts_in(done, [case.asked])
        flat = [readout for of_target in readouts for readout in of_target]
        (of_readouts,) = scores.scores_of(done, [flat], [len(case.parts.sources)])
        remaining, rows = iter(of_readouts), []
        for j, (one, of_target) in enumerate(zip(case.asked, readouts, strict=True)):
            if one.layer is not None:
                rows.append(scores._padded(done.probes[0, j][0], len(case.parts.sources)))
            rows += [next(remaining) for _ in of_target]
    return torch.stack(rows), [source.kind for source in case.parts.sources]


def split(rows: Tensor, kinds: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """The scores of the bias source ``[T]``, of the remainder ``[T]``, and of the others ``[T, M]``."""
    zero = rows.new_zeros(len(rows))
    bias = rows[:, kinds.index("bias")] if "bias" in kinds else zero
    rest = rows[:, kinds.index("rest")] if "rest" in kinds else zero
    return bias, rest, rows[:, [i for i, kind in enumerate(kinds) if kind not in ("bias", "rest")]]


def close(got: Tensor, expected: Tensor, limit: float) -> None:
    assert got.shape == expected.shape
    if got.numel():
        assert (got - expected).abs().max() <= limit * expected.abs().max().clamp(min=1.0)


def equal(got: Everything, expected: Everything, limit: float = 0.0) -> None:
    pairs = [
        (getattr(got, name), getattr(expected, name)) for name in ("tokens", "biases", "balance", "heads", "modules")
    ]
    pairs += list(zip(got.neurons, expected.neurons, strict=True))
    pairs += list(zip(got.experts, expected.experts, strict=True))
    pairs += [(got.rest[parts], expected.rest[parts]) for parts in got.rest]
    pairs += [(got.bias[parts], expected.bias[parts]) for parts in got.bias]
    pairs += [(got.balances[parts], expected.balances[parts]) for parts in got.balances]
    for mine, theirs in pairs:
        close(mine, theirs, limit)
    assert [one.target for one in got.readouts] == [one.target for one in expected.readouts]


# --- the model's own numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rule"), allowed([*models.EVERY, *models.OTHERS], RULES))
def test_the_linearised_model_computes_what_the_captured_one_does(name: str, rule: str) -> None:
    model = models.make(name)
    bound, ids = bind(model), torch.tensor([models.prompt(LENGTH)])
    with torch.no_grad(), eager_with_patterns(bound):
        expected = model(ids).logits
    with linearised(bound, RULES[rule]):
        assert torch.equal(model(ids).logits, expected)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("name", models.EVERY)
def test_logits_are_the_forward_engines(name: str) -> None:
    model = models.make(name)
    ids, target = models.prompt(LENGTH), [TopK(3), Token(5, position=2)]
    result = DePass(model).attribute(ids, target)
    one = scored(model, ids, "half", target)
    assert [readout.target for readout in one.readouts] == list(result.targets)
    assert torch.equal(torch.tensor([readout.logit for readout in one.readouts]), result.target_logits)


# --- taylor: the forward engine is the oracle -------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.EVERY)
def test_taylor_tokens_are_the_forward_engines(name: str, exact: Any) -> None:
    model, ids = exact(models.make(name, torch.float64)), models.prompt(LENGTH)
    one, dp = scored(model, ids, "taylor", TARGETS), DePass(model)
    limit = 1e-6 if name in SINKS_IN_FP32 + SUMS_IN_FP32 else 1e-9
    for start in range(models.LAYERS):
        bias, _, tokens = split(*forward_scores(dp, ids, TARGETS, start_layer=start))
        close(one.tokens[:, start], tokens, limit)
        close(one.biases[:, start], bias, limit)


@pytest.mark.parametrize("name", models.EVERY)
def test_taylor_components_are_the_forward_engines(name: str, exact: Any) -> None:
    model, ids = exact(models.make(name, torch.float64)), models.prompt(LENGTH)
    one, dp = scored(model, ids, "taylor", TARGETS), DePass(model)
    limit = 1e-6 if name in SINKS_IN_FP32 + SUMS_IN_FP32 else 1e-9
    for layer in range(models.LAYERS):
        cases = {
            "heads": (Heads(layer), one.heads[:, layer, : dp.bound.layers[layer].num_heads]),
            "neurons": (Neurons(layer), one.neurons[layer]),
            "attn": (Modules(layer, "attn"), one.modules[:, layer, :1]),
            "mlp": (Modules(layer, "mlp"), one.modules[:, layer, 1:]),
        }
        cases = {parts: case for parts, case in cases.items() if models.holds(dp.bound, case[0])}
        for parts, (spec, got) in cases.items():
            bias, rest, own = split(*forward_scores(dp, ids, TARGETS, spec))
            close(got, own, limit)
            close(one.rest[parts][:, layer], rest, limit)
            close(one.bias[parts][:, layer], bias, limit)


@pytest.mark.parametrize("name", models.EVERY)
def test_taylor_is_the_forward_engines_in_fp32(name: str) -> None:
    model, ids = models.make(name), models.prompt(LENGTH)
    one, dp = scored(model, ids, "taylor", TARGETS), DePass(model)
    bias, _, tokens = split(*forward_scores(dp, ids, TARGETS))
    limit = 1e-5 * tokens.abs().sum(-1).max()  # taylor's quotients are as large as a gate is near zero
    assert (one.tokens[:, 0] - tokens).abs().max() <= limit
    assert (one.biases[:, 0] - bias).abs().max() <= limit


@pytest.mark.parametrize("name", ["llama-biased", "gpt2", "gpt-neox", "gemma2", "gpt_oss", "deepseek_v3"])
def test_later_start_and_earlier_stop_layers(name: str, exact: Any) -> None:
    model, ids = exact(models.make(name, torch.float64)), models.prompt(LENGTH)
    dp = DePass(model)
    for start, stop in [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]:
        one = scored(model, ids, "taylor", TARGETS, start=start, stop=stop)
        bias, _, tokens = split(*forward_scores(dp, ids, TARGETS, start_layer=start, stop_layer=stop))
        close(one.tokens[:, 0], tokens, 1e-9)
        close(one.biases[:, 0], bias, 1e-9)
        _, rest, heads = split(*forward_scores(dp, ids, TARGETS, Heads(start), stop_layer=stop))
        close(one.heads[:, 0], heads, 1e-9)
        close(one.rest["heads"][:, 0], rest, 1e-9)
        assert one.tokens.shape[1] == stop - start + 1


@pytest.mark.parametrize("name", ["llama", "llama-biased", "gpt2", "gpt-neox", "gemma3", "gpt_oss", "qwen2_moe"])
def test_probes_of_inner_layers(name: str, exact: Any) -> None:
    model, ids = exact(models.make(name, torch.float64)), models.prompt(LENGTH)
    dp, generator = DePass(model), torch.Generator().manual_seed(3)
    probes: list[Any] = [
        Direction(torch.randn(32, generator=generator), position, layer=layer, intercept=0.5)
        for layer, position in [(0, 4), (1, -1), (2, 3), (3, -1)]
    ]
    target = [5, *probes, Token(7, position=4)]
    for at_once in (1, 2, None):
        one = scored(model, ids, "taylor", target, at_once=at_once)
        bias, _, tokens = split(*forward_scores(dp, ids, target))
        close(one.tokens[:, 0], tokens, 1e-9)
        close(one.biases[:, 0], bias, 1e-9)
        logits = torch.tensor([readout.logit for readout in one.readouts], dtype=torch.float64)
        close(one.tokens[:, 0].sum(-1) + one.biases[:, 0], logits, 1e-9)
        _, rest, heads = split(*forward_scores(dp, ids, target[3:], Heads(1)))
        close(one.heads[3:, 1], heads, 1e-9)
        close(one.rest["heads"][3:, 1], rest, 1e-9)
        assert one.tokens[2, 2:].abs().max() == 0  # behind the probe of layer 1
        assert one.heads[2, 1:].abs().max() == 0
        assert one.heads[2, 0].abs().max() > 0
    assert one.readouts[1].target.intercept == 0.5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_positions_of_components(name: str, exact: Any) -> None:
    """Fewer positions: sums over those of a layer's scores by position."""
    model, ids = exact(models.make(name, torch.float64)), models.prompt(LENGTH)
    bound, dp, chosen = bind(model), DePass(model), [2, 5, 8]
    some = torch.tensor([position in chosen for position in range(LENGTH)])
    found: dict[str, Tensor] = {}

    class Read(Backward):
        def layer(self, gradients: LayerGradients) -> None:
            if gradients.layer == 1:
                found["heads"] = gradients.heads()[:, some].sum(1)
                found["neurons"] = gradients.neurons(some)[:, 0]
                found["attn"] = gradients.attention()[:, some].sum(1, keepdim=True)
                found["mlp"] = gradients.mlp()[:, some].sum(1, keepdim=True)

    Read(bound, [ids], [asked(bound, ids, TARGETS)], RULES["taylor"]).run()
    specs = {"heads": Heads(1, positions=chosen), "neurons": Neurons(1, positions=chosen)}
    specs |= {"attn": Modules(1, "attn", chosen), "mlp": Modules(1, "mlp", chosen)}  # type: ignore[dict-item]
    for parts, spec in specs.items():
        close(found[parts], split(*forward_scores(dp, ids, TARGETS, spec))[2], 1e-9)


@pytest.mark.parametrize("name", ["llama-biased", "gemma2", "gpt-neox"])
def test_any_part_of_the_stream_scores_its_product_with_the_gradient(name: str, exact: Any) -> None:
    """Subspaces, parts of one's own and spans are the forward engine's."""
    model, ids = exact(models.make(name, torch.float64)), models.prompt(LENGTH)
    bound, dp, generator = bind(model), DePass(model), torch.Generator().manual_seed(1)
    basis, part = (torch.randn(shape, generator=generator).double() for shape in [(3, 32), (1, LENGTH, 32)])
    span = torch.linalg.qr(basis.T).Q
    found: dict[str, Tensor] = {}

    class Read(Backward):
        def stream(self, gradient: StreamGradient) -> None:
            if gradient.layer == 1:
                x, G = gradient.x, gradient.gradient
                found["subspace"] = (G * (x @ span @ span.T)).sum((1, 2))[:, None]
                found["part"] = (G * part[0]).sum((1, 2))[:, None]
                by_token = gradient.scores()
                found["spans"] = torch.stack([by_token[:, 1:3].sum(1), by_token[:, 4:9].sum(1)], 1)

    Read(bound, [ids], [asked(bound, ids, TARGETS)], RULES["taylor"]).run()
    spans = Spans([(1, 3), (4, 9)])
    for name_of, sources, start in [
        ("subspace", Subspace(1, basis=basis), 0), ("part", Subspace(1, parts=part), 0), ("spans", spans, 1),
    ]:  # fmt: skip
        close(found[name_of], split(*forward_scores(dp, ids, TARGETS, sources, start_layer=start))[2], 1e-9)


# --- half and up: a slow loop is the oracle ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", WHOLE)
@pytest.mark.parametrize(
    "name", [name for name in (*GATED, *WITH_LOOP, *ROUTED, "bitnet", "gemma4") if name in models.CONFIGS]
)
def test_tokens_agree_with_a_slow_loop(name: str, rule: str, exact: Any) -> None:
    model, ids = exact(models.make(name, torch.float64)), models.prompt(7)
    bias = bind(model).has_bias
    owner = [t + bias for t in range(7)]
    oracle = OWN_LOOP.get(name, LinearOracle)(name, model, ids, [0] * (7 + bias), owner, bias)
    states = oracle.weigh(RULES[rule].gate, RULES[rule].up).run("", 0.0, None)
    one = scored(model, ids, rule, [5, Token(7, position=4)])
    for row, (position, token) in enumerate([(6, 5), (4, 7)]):
        expected = oracle.scores(states[-1], position, token)
        close(one.tokens[row, 0], expected[int(bias) :], 1e-9)
        close(one.biases[row, 0], expected[0] if bias else expected.new_zeros(()), 1e-9)


@pytest.mark.parametrize("rule", ["half", "up"])
@pytest.mark.parametrize("name", ["llama", "olmo2", "phi3"])
def test_neurons_agree_with_a_slow_loop(name: str, rule: str, exact: Any) -> None:
    model, ids, layer = exact(models.make(name, torch.float64)), models.prompt(7), 1
    oracle = LinearOracle(name, model, ids, [0] * 4, [], False).weigh(RULES[rule].gate, RULES[rule].up)
    paths, chosen = oracle.paths(layer), [3, 17, 40]
    hidden, weight = oracle.captured[paths["d"] + ":in"], oracle.module(paths["d"]).weight.detach()
    parts = [[hidden[t, f] * weight[:, f] for t in range(7)] for f in chosen]
    if paths["mp"] is not None:
        parts = [[oracle.normed(paths["mp"], x, t, False).detach() for t, x in enumerate(row)] for row in parts]
    whole = oracle.streams[layer + 1][0]
    parts.append([whole[t] - sum(row[t] for row in parts) for t in range(7)])
    expected = oracle.scores(oracle.on(parts, layer + 1)[-1], 6, 5)
    one = scored(model, ids, rule)
    close(one.neurons[layer][0, chosen], expected[:3], 1e-9)
    close(one.rest["neurons"][0, layer] + one.neurons[layer][0].sum(), expected.sum(), 1e-9)


# --- experts ----------------------------------------------------------------------------------------------------------


def outputs_of_experts(model: Any, ids: list[int], layer: int) -> Tensor:
    """What each expert of a layer adds to the stream, without its bias: ``[E, N, D]``, from the module's own forward."""
    experts, block, kept = bind(model).layers[layer].experts, model.model.layers[layer], list[Any]()
    assert experts is not None
    behind = [getattr(block, "layer_scalar", 1.0)]  # Gemma 4's factors: this one and those of two frozen norms
    norms = [getattr(block, f"post_feedforward_layernorm{end}", None) for end in ("_2", "")]
    handles = [
        norm.register_forward_hook(lambda _, args, output: behind.append((output / args[0])[0]))
        for norm in norms
        if norm is not None
    ]
    handles.append(experts.module.register_forward_pre_hook(lambda _, args: kept.append(args)))
    with torch.no_grad():
        model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        ((x, *routing),) = kept
        if not routing:  # Llama 4: one expert's rows after another's, which the router's weights multiply already
            return experts.module(x).view(experts.count, len(ids), -1)
        chosen, weight = routing
        outputs = []
        for expert in range(experts.count):
            own = weight * (chosen == expert)
            output = experts.module(x, chosen, own)
            if experts.has_bias:
                output = output - own.sum(1, keepdim=True) * experts.module.down_proj_bias[expert]
            outputs.append(math.prod(behind, start=experts.factor * output))
    return torch.stack(outputs)


@pytest.mark.parametrize("name", ROUTED)
def test_taylor_experts_are_the_forward_engines_parts_of_the_stream(name: str, exact: Any) -> None:
    """An expert's output, from the module's own forward, as a part of the stream behind its layer."""
    model, ids = exact(models.make(name, torch.float64)), models.prompt(LENGTH)
    one, dp = scored(model, ids, "taylor", TARGETS), DePass(model)
    for layer in range(models.LAYERS - 1):
        if one.experts[layer].shape[1] == 0:
            continue
        parts = outputs_of_experts(model, ids, layer)
        assert (parts.abs().amax((1, 2)) > 0).sum() >= 2
        _, rest, own = split(*forward_scores(dp, ids, TARGETS, Subspace(layer + 1, parts=parts)))
        close(one.experts[layer], own, 1e-9)
        close(one.tokens[:, layer + 1].sum(1) - own.sum(1), rest, 1e-9)


@pytest.mark.parametrize("rule", ["half", "up"])
@pytest.mark.parametrize("name", ROUTED)
def test_experts_agree_with_a_slow_loop(name: str, rule: str, exact: Any) -> None:
    model, ids = exact(models.make(name, torch.float64)), models.prompt(7)
    layer = 0 if name in ("qwen3_moe", "llama4") else 1  # their layer 1 has no experts
    has_bias = bind(model).has_bias
    oracle = OWN_LOOP.get(name, LinearOracle)(name, model, ids, [0] * 2, [], has_bias)
    oracle.weigh(RULES[rule].gate, RULES[rule].up)
    parts, one = outputs_of_experts(model, ids, layer), scored(model, ids, rule)
    for expert, part in enumerate(parts):
        stream = [[torch.zeros_like(row) for row in part], list(part)]  # the bias source comes first
        stream.append(list(oracle.streams[layer + 1][0] - part))
        stream = stream if has_bias else stream[1:]
        expected = oracle.scores(oracle.on(stream, layer + 1)[-1], 6, 5)
        close(one.experts[layer][0, expert], expected[int(has_bias)], 1e-9)


@pytest.mark.parametrize("rule", WHOLE)
def test_clamped_gates_and_ups_agree_with_a_slow_loop(rule: str, exact: Any) -> None:
    """What gpt_oss clamps passes no gradient on to the up projection, and belongs to the biases."""
    model, ids = exact(models.make("gpt_oss", torch.float64, swiglu_limit=2.0)), models.prompt(7)
    for layer in model.model.layers:
        layer.mlp.experts.gate_up_proj.data *= 4
    oracle = LinearOracle("gpt_oss", model, ids, [0] * 8, list(range(1, 8)), True)
    states = oracle.weigh(RULES[rule].gate, RULES[rule].up).run("", 0.0, None)
    one, expected = scored(model, ids, rule), oracle.scores(states[-1], 6, 5)
    close(one.tokens[0, 0], expected[1:], 1e-9)
    close(one.biases[0, 0], expected[0], 1e-9)
    must_add_up(one, 1e-9)


@pytest.mark.parametrize("rule", ["half", OWN])
def test_positions_that_chose_no_expert(rule: Any, exact: Any) -> None:
    """Some routers say so by a number that no expert has."""
    model, ids = exact(models.make("qwen3_moe", torch.float64)), models.prompt(LENGTH)
    experts = model.model.layers[2].mlp.experts
    for chosen_nowhere in (slice(2, 5), slice(None)):

        def without(_: Any, args: Any, where: slice = chosen_nowhere) -> Any:
            x, chosen, weight = args
            chosen = chosen.clone()
            chosen[where] = 6
            return x, chosen, weight

        handle = experts.register_forward_pre_hook(without)
        one = scored(model, ids, rule, [5, 7])
        handle.remove()
        must_add_up(one, 1e-9)
        assert (one.experts[2].abs().max() == 0) == (chosen_nowhere == slice(None))


def test_a_hook_on_the_experts_that_gradients_go_through(exact: Any) -> None:
    model, ids = exact(models.make("gpt_oss", torch.float64)), models.prompt(LENGTH)
    handle = model.model.layers[1].mlp.experts.register_forward_hook(lambda _, args, output: 1.5 * output)
    must_add_up(scored(model, ids, "half"), 1e-9)
    handle.remove()


@pytest.mark.parametrize("name", ROUTED)
def test_routers_and_sigmoids_are_frozen(name: str) -> None:
    model, ids = models.make(name), torch.tensor([models.prompt(LENGTH)])
    ends = ("mlp.gate", "mlp.router", "sparse_moe.router", "shared_expert_gate", "router.proj", "feed_forward.router")
    frozen = [module.weight for path, module in model.named_modules() if path.endswith(ends)]
    assert frozen
    first = next(layer.experts.module for layer in bind(model).layers if layer.experts is not None).down_proj
    assert torch.autograd.grad(model(ids).logits[0, -1, 5], frozen, allow_unused=True)[0] is not None
    with linearised(bind(model), RULES["dual_path"]):
        logit = model(ids).logits[0, -1, 5]
        assert torch.autograd.grad(logit, [*frozen, first], allow_unused=True) == (None,) * (len(frozen) + 1)


_GATED = {
    **models.SIZES, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "layer_types": ["full_attention"] * models.LAYERS,
}  # fmt: skip
_NEXT: Any = ("Qwen3Next", {**_GATED, "shared_expert_intermediate_size": 32}, replace(
    QWEN2_MOE, norm="rms_plus_one", mix_gate="self_attn.q_proj", mix_gate_rows="second_of_head"
))  # fmt: skip
_AFMOE: Any = ("Afmoe", {**_GATED, "num_dense_layers": 1, "num_shared_experts": 1}, replace(
    SHARED, attention_post_norm="post_attention_layernorm", mlp_norm="pre_mlp_layernorm",
    mlp_post_norm="post_mlp_layernorm", mix_gate="self_attn.gate_proj",
))  # fmt: skip


@pytest.mark.parametrize(("prefix", "sizes", "family"), [_NEXT, _AFMOE], ids=["with the queries", "by itself"])
def test_gates_on_what_the_heads_mix_are_frozen(prefix: str, sizes: dict[str, Any], family: Family) -> None:
    if not hasattr(tf, f"{prefix}ForCausalLM"):
        pytest.skip(f"transformers {tf.__version__} does not have {prefix}")
    config = getattr(tf, f"{prefix}Config")(**sizes)
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(tf, f"{prefix}ForCausalLM")(config).double().eval()
        models.fill(model, family)
    bound, dp, ids = bind(model, family), DePass(model, family=family), models.prompt(LENGTH)
    (one,) = everything(bound, [ids], [asked(bound, ids, TARGETS)], RULES["taylor"])
    close(one.tokens[:, 0], split(*forward_scores(dp, ids, TARGETS))[2], 1e-9)
    close(one.heads[:, 1], split(*forward_scores(dp, ids, TARGETS, Heads(1)))[2], 1e-9)
    for rule in ("half", "dual_path", OWN):
        must_add_up(everything(bound, [ids], [asked(bound, ids, TARGETS)], RULES.get(rule, rule))[0], 1e-6)


def test_neurons_of_experts_and_experts_of_an_mlp_are_refused() -> None:
    bound, ids, refused = bind(models.make("qwen3_moe")), models.prompt(LENGTH), dict[int, str]()

    class Read(Backward):
        def layer(self, gradients: LayerGradients) -> None:
            wrong = gradients.neurons if gradients.layer != 1 else gradients.experts
            with pytest.raises(SourceError) as caught:
                wrong()
            refused[gradients.layer] = str(caught.value)

    Read(bound, [ids], [asked(bound, ids)], RULES["half"]).run()
    assert "layer 2 of Qwen3MoeForCausalLM has routed experts" in refused[2]
    assert "take experts instead: RoutedExperts(2) or sweep('experts')" in refused[2]
    assert "layer 1 of Qwen3MoeForCausalLM has no routed experts; take its neurons: Neurons(1)" in refused[1]


def test_experts_at_some_positions_are_sums_over_those(exact: Any) -> None:
    model, prompts = exact(models.make("granitemoeshared", torch.float64)), lengths_of("granitemoeshared")
    bound, some = bind(model), torch.arange(27) % 3 == 1
    found = dict[str, Tensor]()

    class Read(Backward):
        def layer(self, gradients: LayerGradients) -> None:
            if gradients.layer == 1:
                found["some"], found["others"] = gradients.experts(some), gradients.experts(~some)
                found["all"] = gradients.experts()

    for made in (bound, replace(bound, takes_positions=False)):
        Read(made, prompts, [asked(bound, ids, 5) for ids in prompts], RULES["half"]).run()
        assert found["all"].shape == (1, 4, 4)
        close(found["some"] + found["others"], found["all"], 1e-12)
        assert found["some"][0, :3].abs().amax() > 0
        assert found["some"][0, 3].abs().max() == 0  # the last prompt's only position is number 26


# --- steer and dual_path: autograd in the published way is the oracle -------------------------------------------------


def halved(x: Tensor, by: float) -> Tensor:
    """``x`` with ``by`` of its gradient, as the published code of AttnLRP divides gradients."""
    return x * by + (x * (1 - by)).detach()


class Handmade:
    """Tokens, heads and neurons of one prompt by plain autograd: the products' rules of AttnLRP, written for Llama's kin.

    The product of pattern and values halves both (or leaves the values whole), that of queries and keys halves both,
    and so does that of gate and up; the activation keeps the ratio of its output and input; norms keep their scale.
    """

    def __init__(self, model: Any, ids: list[int], values: float) -> None:
        self.model, self.config, self.values, self.N = model, model.config, values, len(ids)
        self.plus_one = "Gemma" in type(model).__name__
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        x = embedded = hidden[0][0].clone().requires_grad_()
        self.cos, self.sin = (each[0] for each in model.model.rotary_emb(x[None], torch.arange(self.N)[None]))
        heads, neurons = [], []
        for layer in model.model.layers:
            mixed = self.mixed(layer.self_attn, self.normed(layer.input_layernorm, x))
            x = x + self.written(layer, "post_attention_layernorm", layer.self_attn.o_proj(mixed))
            norm = layer.pre_feedforward_layernorm if self.plus_one else layer.post_attention_layernorm
            gate, up = layer.mlp.gate_proj(self.normed(norm, x)), layer.mlp.up_proj(self.normed(norm, x))
            act = functional.gelu(gate, approximate="tanh") if self.plus_one else functional.silu(gate)
            hidden_vector = halved(gate * (act / gate).detach(), 0.5) * halved(up, 0.5)
            x = x + self.written(layer, "post_feedforward_layernorm", layer.mlp.down_proj(hidden_vector))
            heads.append(mixed)
            neurons.append(hidden_vector)
        logit = (self.normed(model.model.norm, x) @ model.lm_head.weight.T)[-1, 5]
        parts, L = [embedded, *heads, *neurons], len(heads)
        gradients = torch.autograd.grad(logit, parts)
        by = [(gradient * own).detach() for gradient, own in zip(gradients, parts, strict=True)]
        self.tokens, self.logit = by[0].sum(-1), logit.detach()
        heads_of = [each.view(self.N, self.config.num_attention_heads, -1).sum((0, 2)) for each in by[1 : L + 1]]
        self.heads, self.neurons = torch.stack(heads_of), torch.stack([each.sum(0) for each in by[L + 1 :]])

    def normed(self, norm: Any, x: Tensor) -> Tensor:
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps).detach()
        return (norm.weight + self.plus_one) * x * scale  # type: ignore[no-any-return]

    def written(self, layer: Any, post_norm: str, output: Tensor) -> Tensor:
        return self.normed(getattr(layer, post_norm), output) if self.plus_one else output

    def mixed(self, attention: Any, read: Tensor) -> Tensor:
        H, K, N, d = self.config.num_attention_heads, self.config.num_key_value_heads, self.N, attention.head_dim
        q, k = attention.q_proj(read).view(N, H, d), attention.k_proj(read).view(N, K, d)
        if hasattr(attention, "q_norm"):
            q, k = self.normed(attention.q_norm, q), self.normed(attention.k_norm, k)
        q, k = self.rotated(q), self.rotated(k).repeat_interleave(H // K, 0)
        v = attention.v_proj(read).view(N, K, d).transpose(0, 1).repeat_interleave(H // K, 0)
        logits = halved(q, 0.5) @ halved(k, 0.5).transpose(1, 2) * attention.scaling
        cap = getattr(self.config, "attn_logit_softcapping", None)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        distance = torch.arange(N)[:, None] - torch.arange(N)
        window = getattr(attention, "sliding_window", getattr(self.config, "sliding_window", None)) or N
        logits = logits.masked_fill((distance < 0) | (distance >= window), -torch.inf)
        pattern = torch.softmax(logits, -1, dtype=torch.float32).to(v)
        return (halved(pattern, 0.5) @ halved(v, self.values)).transpose(0, 1).reshape(N, H * d)

    def rotated(self, x: Tensor) -> Tensor:
        x, d = x.transpose(0, 1), x.shape[-1]
        turned = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
        return x * self.cos + turned * self.sin


@pytest.mark.parametrize(("rule", "values"), [("dual_path", 0.5), ("steer", 1.0)])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2"])
def test_steering_agrees_with_the_published_way(name: str, rule: str, values: float, exact: Any) -> None:
    """With sliding windows, norms on queries and keys, and soft caps, too."""
    model, ids = exact(models.make(name, torch.float64)), models.prompt(LENGTH)
    expected, one = Handmade(model, ids, values), scored(model, ids, rule)
    assert one.readouts[0].logit == pytest.approx(float(expected.logit), abs=1e-6)
    close(one.tokens[0, 0], expected.tokens, 1e-6)  # the softmax, and with it its gradient, is an fp32 one
    close(one.heads[0], expected.heads, 1e-6)
    close(torch.stack(one.neurons)[:, 0], expected.neurons, 1e-6)
    close(one.balance[0, 0], expected.logit - expected.tokens.sum(), 1e-6)
    assert abs(float(one.balance[0, 0])) > 1e-2


def test_what_the_rules_leave_over_has_a_name() -> None:
    assert {name: weights.balance for name, weights in RULES.items()} == {
        "taylor": None, "half": None, "up": None, "steer": "pattern", "dual_path": "unassigned",
    }  # fmt: skip
    assert [name for name, weights in RULES.items() if weights.steers] == ["steer", "dual_path"]
    assert PathWeights(gate=0.5).balance == PathWeights(v=0.5).balance == "unassigned"
    assert PathWeights(gate=0.1, up=0.9).balance is None


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", True, None])
def test_weights_that_are_no_numbers_are_refused(value: Any) -> None:
    with pytest.raises(OptionError, match=rf"PathWeights\(up={value!r}\): a weight must be a finite number"):
        PathWeights(up=value)


# --- the sum ----------------------------------------------------------------------------------------------------------


ADDING_UP = [
    (name, rule)
    for name in models.EVERY
    for rule in (*RULES, OF_MLP if name in models.RECURRENT else OWN)
    if (name in models.CONFIGS or rule not in RULES or rule == "half") and models.takes(name, RULES.get(rule, rule))
]


@pytest.mark.parametrize(("name", "rule"), ADDING_UP, ids=str)
def test_scores_add_up_at_the_input_of_every_layer(name: str, rule: str, exact: Any) -> None:
    model, ids = models.make(name, torch.float64), models.prompt(LENGTH)
    if name in models.NORMS_IN_FP32:
        must_add_up(scored(model, ids, rule, TARGETS), 1e-6)
    weights = RULES.get(rule, rule)
    of_queries = ("cohere", "cohere2", "deepseek_v2", "ernie4_5", "ernie4_5_moe", "cohere2_moe", "llama4")
    in_fp32 = name in (*SUMS_IN_FP32, *models.RECURRENT) or (weights.steers and name in of_queries)
    must_add_up(scored(exact(model), ids, rule, TARGETS), 1e-6 if in_fp32 else 1e-9)
    must_add_up(scored(models.make(name), ids, rule, TARGETS), 1e-5)


def must_add_up(one: Everything, limit: float) -> None:
    logits = torch.tensor([readout.logit for readout in one.readouts], dtype=torch.float64)
    size = one.tokens.double().abs().sum(-1).clamp(min=1.0)
    assert ((one.tokens.double().sum(-1) + one.biases + one.balance - logits[:, None]).abs() <= limit * size).all()
    layers = size[:, :-1]
    for parts, own in {
        "heads": one.heads.sum(-1),
        "attn": one.modules[..., 0],
        "neurons": torch.stack([neurons.sum(-1) for neurons in one.neurons], 1),
        "experts": torch.stack([experts.sum(-1) for experts in one.experts], 1),
        "mlp": one.modules[..., 1],
    }.items():
        total = own.double() + one.rest[parts] + one.bias[parts] + one.balances[parts]  # type: ignore[index]
        here = torch.tensor(one.has[parts])  # type: ignore[index]
        assert ((total - logits[:, None]).abs() <= 10 * limit * layers)[:, here].all()


def test_masked_parts_score_zero_and_the_others_add_up(exact: Any) -> None:
    model, ids = exact(models.make("llama-biased", torch.float64)), models.prompt(LENGTH)
    with masking.heads(model, {0: [1], 2: [0, 3]}), masking.neurons(model, {1: [4, 5]}):
        with torch.no_grad():
            own = model(torch.tensor([ids])).logits[0, -1, 5]
        one = scored(model, ids, "half")
    assert one.readouts[0].logit == pytest.approx(float(own), rel=1e-12)
    must_add_up(one, 1e-9)
    assert one.heads[0, 2, [0, 3]].abs().max() == 0
    assert one.neurons[1][0, [4, 5]].abs().max() == 0
    assert one.heads[0, 2, [1, 2]].abs().min() > 0


class Softer(nn.Module):
    """An activation function with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.weight * x)


def test_an_ungated_mlp_carries_everything_even_where_its_activation_has_weights(exact: Any) -> None:
    model, ids = models.make("gpt2", torch.float64), models.prompt(LENGTH)
    for block in model.transformer.h:
        block.mlp.act = Softer()
    expected = scored(model, ids, "taylor")
    must_add_up(expected, 1e-9)
    equal(scored(model, ids, "half"), expected)
    equal(scored(model, ids, "up"), expected)


def test_a_gate_of_exactly_zero_carries_nothing(exact: Any) -> None:
    model, ids = exact(models.make("llama", torch.float64)), models.prompt(LENGTH)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[7] = 0
    one = scored(model, ids, "half")
    must_add_up(one, 1e-9)  # silu(0) is 0, and so is the neuron
    assert one.neurons[1][0, 7] == 0
    assert one.tokens.isfinite().all()


# --- how it runs ------------------------------------------------------------------------------------------------------


def lengths_of(name: str) -> list[list[int]]:
    return [models.prompt(length, seed) for seed, length in enumerate((LENGTH, 3, 14, 1))]


@pytest.fixture
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax in the model's dtype; transformers' attention takes it in fp32.

    On some CPUs the fp32 exponentials of a short row and of a long one differ in the last bit.
    """
    own = nn.functional.softmax

    def softmax(x: Tensor, *arguments: Any, dtype: Any = None, **named: Any) -> Tensor:
        return own(x, *arguments, dtype=None if x.dtype == torch.float64 else dtype, **named)

    monkeypatch.setattr(nn.functional, "softmax", softmax)


@pytest.mark.parametrize(("name", "rule"), allowed(models.EVERY, ["half", "dual_path"]))
def test_prompts_of_a_batch_score_as_each_does_alone(name: str, rule: str, exact: Any, exact_softmax: None) -> None:
    """In one row, and padded."""
    model, prompts = exact(models.make(name, torch.float64)), lengths_of(name)
    bound = bind(model)
    target: list[Any] = [[TopK(2), 5], 7, [Contrast(5, 7), Token(9, position=3), 8], 5]
    each = [asked(bound, ids, one) for ids, one in zip(prompts, target, strict=True)]
    alone = [everything(bound, [ids], [one], RULES[rule])[0] for ids, one in zip(prompts, each, strict=True)]
    for made in (bound, replace(bound, takes_positions=False)):
        for got, expected in zip(everything(made, prompts, each, RULES[rule]), alone, strict=True):
            limit = 1e-7 if rule == "dual_path" else 1e-9
            equal(got, expected, 1e-6 if name in COMPUTES_IN_FP32 else limit)


@pytest.mark.parametrize(("name", "rule"), allowed(models.CONFIGS, ["taylor", "dual_path"]))
def test_layers_that_run_again_give_the_same(name: str, rule: str) -> None:
    model, prompts = models.make(name), lengths_of(name)
    bound = bind(model)
    each = [asked(bound, ids, [5, 7]) for ids in prompts]
    kept = everything(bound, prompts, each, RULES[rule])
    for got, expected in zip(everything(bound, prompts, each, RULES[rule], recompute=True), kept, strict=True):
        equal(got, expected)


@pytest.mark.parametrize(("name", "rule"), allowed([*models.CONFIGS, "windowed"], ["half", "dual_path"]))
def test_attention_by_blocks_of_queries_gives_the_same(name: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.make("mistral", sliding_window=3) if name == "windowed" else models.make(name)
    prompts = [models.prompt(length, length) for length in (9, 4, 7)]
    bound = bind(model)
    each = [asked(bound, ids, [5, 7, 9]) for ids in prompts]
    padded = replace(bound, takes_positions=False)
    whole = [everything(made, prompts, each, RULES[rule]) for made in (bound, padded)]
    monkeypatch.setattr(query_blocks, "BLOCK_BYTES", 4 * 3 * bound.most_heads * 9 * 2)  # two queries of the batch
    for made, expected in zip((bound, padded), whole, strict=True):
        for recompute in (False, True):
            got = everything(made, prompts, each, RULES[rule], recompute=recompute)
            for mine, theirs in zip(got, expected, strict=True):
                equal(mine, theirs, 1e-5)
                logits = [one.logit for one in theirs.readouts]
                assert [one.logit for one in mine.readouts] == pytest.approx(logits, rel=1e-4, abs=1e-5)


def test_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [query_blocks.queries_at_once(cpu, 9, n) for n in (10, 682, 683, 2048, 1 << 20)] == [10, 682, 640, 192, 1]
    assert query_blocks.queries_at_once(cuda, 9, 2048) == 2048
    monkeypatch.setattr(query_blocks, "BLOCK_BYTES", 4 * 4 * 9 * 2)
    taken, model, ids = [], models.make("llama"), models.prompt(9)
    eager = sys.modules[type(model).__module__].eager_attention_forward

    def noted(module: nn.Module, query: Tensor, key: Tensor, *others: Any, **options: Any) -> Any:
        taken.append((query.shape[2], key.shape[2]))
        return eager(module, query, key, *others, **options)

    monkeypatch.setattr(sys.modules[type(model).__module__], "eager_attention_forward", noted)
    scored(model, ids, "half")
    forth, back = [(2, 9)] * 4 + [(1, 9)], [(2, 2), (2, 4), (2, 6), (2, 8), (1, 9)]
    assert taken[models.LAYERS :] == forth * models.LAYERS + back * models.LAYERS


@pytest.mark.parametrize("recompute", [False, True])
def test_targets_together_or_one_after_another(recompute: bool, exact: Any) -> None:
    model, ids = exact(models.make("qwen3", torch.float64)), models.prompt(LENGTH)
    expected = scored(model, ids, "steer", TARGETS, at_once=1)
    for at_once in (2, 4, None):
        equal(scored(model, ids, "steer", TARGETS, at_once=at_once, recompute=recompute), expected, 1e-7)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_position_encodings_that_depend_on_the_length(kind: str, recompute: bool) -> None:
    scaling: dict[str, Any] = {"rope_type": "dynamic", "factor": 4.0}
    others: dict[str, Any] = {"max_position_embeddings": 12, "rope_scaling": scaling}
    if kind == "longrope":
        scaling = {"type": kind, "rope_type": kind, "short_factor": [1.0] * 4, "long_factor": [4.0, 7.0, 10.0, 20.0]}
        scaling["original_max_position_embeddings"] = 12
        others = {"rope_scaling": scaling, "original_max_position_embeddings": 12, "max_position_embeddings": 64}

    def make() -> Any:
        return models.make("phi3" if kind == "longrope" else "llama", **others)

    used = make()
    with torch.no_grad():
        used(torch.tensor([models.prompt(30)]))  # a dynamic encoding remembers this
    for length in (20, 7):
        ids = models.prompt(length)
        one = scored(used, ids, "half", recompute=recompute)
        with torch.no_grad():
            own = float(make()(torch.tensor([ids])).logits[0, -1, 5])
        assert one.readouts[0].logit == pytest.approx(own, rel=1e-5)
        equal(one, scored(make(), ids, "half"))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["llama-biased", "granitemoeshared"])
def test_a_layer_is_dropped_before_the_next_one_is_read(name: str, recompute: bool) -> None:
    model, ids = models.make(name, num_hidden_layers=6), models.prompt(LENGTH)
    bound, held = bind(model), list[int]()

    def held_bytes() -> int:
        found = {each.data_ptr(): each.untyped_storage().nbytes() for each in gc.get_objects() if type(each) is Tensor}
        return sum(found.values())

    class Read(Backward):
        def layer(self, gradients: LayerGradients) -> None:
            held.append(held_bytes())

    run = Read(bound, [ids], [asked(bound, ids, [5, 7])], RULES["half"], recompute=recompute)
    run.run()
    assert len(held) == 6
    growth = [later - earlier for earlier, later in itertools.pairwise(held)]
    assert max(growth) <= (64 if recompute else -1000)  # a vector of the stream has 128 bytes
    del held[:]
    run.run()
    assert held_bytes() < held[-1]


def test_streams_arrive_from_the_last_to_the_first() -> None:
    bound, ids, seen = bind(models.make("llama")), models.prompt(LENGTH), list[tuple[str, int]]()

    class Read(Backward):
        def stream(self, gradient: StreamGradient) -> None:
            seen.append(("stream", gradient.layer))
            assert gradient.x.shape == (LENGTH, 32)
            assert gradient.gradient.shape == (1, LENGTH, 32)

        def layer(self, gradients: LayerGradients) -> None:
            seen.append(("layer", gradients.layer))

    Read(bound, [ids], [asked(bound, ids)], RULES["half"], start=1).run()
    assert seen == [("stream", 3), ("layer", 2), ("stream", 2), ("layer", 1), ("stream", 1)]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_bf16_is_near_fp32(name: str) -> None:
    model, ids = models.make(name, torch.bfloat16), models.prompt(LENGTH)
    for rule in RULES:
        one, expected = scored(model, ids, rule), scored(models.make(name, torch.bfloat16).float(), ids, rule)
        assert one.tokens.dtype == torch.float32
        for got, wanted in ((one.tokens[:, 0], expected.tokens[:, 0]), (one.heads, expected.heads)):
            assert (got - wanted).norm() <= 5e-2 * wanted.norm()


def test_a_callers_autocast_touches_the_models_pass_alone() -> None:
    model, ids = models.make("llama"), models.prompt(LENGTH)
    expected = scored(model, ids, "half")
    with torch.autocast("cpu", torch.bfloat16):
        one, again = scored(model, ids, "half"), scored(model, ids, "half", recompute=True)
    assert not torch.equal(one.tokens, expected.tokens)
    close(one.tokens[:, 0], expected.tokens[:, 0], 5e-2)
    equal(again, one)


def test_scores_are_products_in_the_states_dtype() -> None:
    """Whatever a caller's autocast is."""
    bound, ids, called = bind(models.make("llama-biased")), models.prompt(LENGTH), list[int]()

    class Read(Backward):
        def stream(self, gradient: StreamGradient) -> None:
            close(gradient.scores(), (gradient.gradient.double() * gradient.x).sum(-1).float(), 1e-6)

        def layer(self, gradients: LayerGradients) -> None:
            of_mixed, of_hidden = gradients.of_mixed[0].double(), gradients.of_hidden.double()
            heads = (of_mixed * gradients.mixed[0]).unflatten(-1, (4, -1)).sum(-1)
            close(gradients.heads(), heads.float(), 1e-6)
            close(gradients.neurons()[:, 0], (of_hidden * gradients.hidden).sum(1).float(), 1e-6)
            called.append(gradients.layer)

    with torch.autocast("cpu", torch.bfloat16):
        Read(bound, [ids], [asked(bound, ids, [5, 7])], RULES["half"]).run()
    assert called == [2, 1, 0]


def test_targets_are_left_out_behind_their_probe() -> None:
    bound, ids = bind(models.make("llama")), models.prompt(LENGTH)
    target, seen = [Direction(torch.ones(32), layer=1), 5, Direction(torch.ones(32), layer=0)], dict[str, Any]()

    class Read(Backward):
        def stream(self, gradient: StreamGradient) -> None:
            seen[f"stream {gradient.layer}"] = gradient.targets

        def layer(self, gradients: LayerGradients) -> None:
            seen[f"layer {gradients.layer}"] = gradients.targets

    Read(bound, [ids], [asked(bound, ids, target)], RULES["half"]).run()
    assert seen == {
        "stream 3": [1], "layer 2": [1], "stream 2": [1], "layer 1": [1], "stream 1": [0, 1], "layer 0": [0, 1],
        "stream 0": [0, 1, 2],
    }  # fmt: skip


def test_layers_that_are_not_gone_through_build_no_graph() -> None:
    model, ids, graphs = models.make("llama"), models.prompt(LENGTH), list[bool]()
    bound = bind(model)
    handles = [
        layer.self_attn.q_proj.register_forward_hook(lambda _, args, output: graphs.append(output.requires_grad))
        for layer in model.model.layers
    ]
    Backward(bound, [ids], [asked(bound, ids)], RULES["steer"], start=1, stop=2).run()
    for handle in handles:
        handle.remove()
    assert graphs[-models.LAYERS :] == [False, True, False]  # after the check's


# --- the model is left alone ------------------------------------------------------------------------------------------


def hooks(model: Any) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("mode", ["plain", "frozen", "inference_mode", "no_grad"])
@pytest.mark.parametrize("name", ["llama-biased", "gpt_oss", "qwen2_moe"])
def test_parameters_get_no_gradients_and_keep_their_flags(name: str, mode: str) -> None:
    model, ids = models.make(name), models.prompt(LENGTH)
    expected = scored(model, ids, "steer")
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(mode != "frozen" and index % 3 > 0)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    context = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}.get(mode, torch.enable_grad)
    with context():
        equal(scored(model, ids, "steer"), expected)
    batch = [ids, ids[:4]]
    with context():
        bound = bind(model)
        everything(bound, batch, [asked(bound, one) for one in batch], RULES["steer"])
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks(model) == 0
    assert torch.is_grad_enabled()


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


def test_after_an_error_in_a_callback_or_the_model_everything_is_as_it_was() -> None:
    model, ids = models.make("llama"), models.prompt(LENGTH)
    bound = bind(model)

    class Stops(Backward):
        def layer(self, gradients: LayerGradients) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stops(bound, [ids], [asked(bound, ids)], RULES["half"]).run()
    own, model.model.layers[1].mlp.act_fn = model.model.layers[1].mlp.act_fn, Broken()
    with pytest.raises(KeyboardInterrupt):
        everything(bound, [ids], [asked(bound, ids)], RULES["half"])
    model.model.layers[1].mlp.act_fn = own
    assert hooks(model) == 0
    assert torch.is_grad_enabled()
    assert model.config._attn_implementation == "eager"
    must_add_up(scored(model, ids, "half"), 1e-5)


def test_other_threads_run_and_train_the_model_meanwhile() -> None:
    model, ids, other = models.make("llama"), models.prompt(LENGTH), torch.tensor([models.prompt(LENGTH, 1)])
    expected = scored(model, ids, "half", recompute=True)
    weights = [layer.mlp.down_proj.weight for layer in model.model.layers]

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(other, labels=other).loss, weights))

    wanted, failed, end = gradients(), list[BaseException](), threading.Event()

    def trains() -> None:
        try:
            while not end.is_set():
                for got, one in zip(gradients(), wanted, strict=True):
                    close(got, one, 1e-6)
        except BaseException as error:
            failed.append(error)

    thread, before = threading.Thread(target=trains), sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    thread.start()
    try:
        for _ in range(15):
            equal(scored(model, ids, "half", recompute=True), expected, 1e-6)
    finally:
        end.set()
        thread.join()
        sys.setswitchinterval(before)
    assert not failed


def test_two_threads_take_turns() -> None:
    model, prompts = models.make("gpt2"), [models.prompt(LENGTH, seed) for seed in range(2)]
    expected, failed = [scored(model, ids, "half") for ids in prompts], list[BaseException]()

    def runs(index: int) -> None:
        try:
            for _ in range(5):
                equal(scored(model, prompts[index], "half"), expected[index], 1e-6)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=runs, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(model: Any, match: str, bound: BoundModel | None = None) -> None:
    bound, ids, before = bound or bind(model), models.prompt(LENGTH), hooks(model)
    with pytest.raises(ModelError, match=match):
        everything(bound, [ids], [asked(bound, ids)], RULES["half"])
    assert hooks(model) == before


@pytest.mark.parametrize("weights", [PathWeights(q=0.5), PathWeights(k=0.5), PathWeights(v=0.5)], ids=str)
@pytest.mark.parametrize("name", models.RECURRENT)
def test_weights_of_queries_keys_and_values_are_refused_for_linear_attention(name: str, weights: PathWeights) -> None:
    model = models.make(name)
    with pytest.raises(ModelError, match=r"has linear attention, .* take rule='half', 'up' or 'taylor'"):
        scored(model, models.prompt(LENGTH), weights)
    assert hooks(model) == 0


def test_dropout_at_work_is_refused() -> None:
    refused(models.make("gpt2").train(), "training mode with dropout")


def test_gradient_checkpointing_at_work_is_refused() -> None:
    model = models.make("llama")
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch()  # by its newer name, if it has one
    must_add_up(scored(model, models.prompt(LENGTH), "half"), 1e-5)  # it does nothing in eval mode
    refused(model.train(), "is in training mode with gradient checkpointing, .* call model.eval")


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = models.make("llama")
    refused(
        model, r"were made in torch.inference_mode\(\), where autograd cannot use them; load the model outside of it"
    )


def test_offloaded_weights_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = models.make("llama")
    accelerate.cpu_offload(model, torch.device("cpu"))
    refused(model, "are offloaded, so they are gone when the backward pass needs them")


def test_quantised_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.make("llama")
    monkeypatch.setattr(BoundModel, "is_quantized", True)
    refused(model, "LlamaForCausalLM has quantised weights, .*; load the unquantised weights")


def test_streamed_weights_are_refused() -> None:
    model = models.make("llama")
    refused(model, "are streamed to cuda:0", replace(bind(model), stream_to=torch.device("cuda:0")))


def test_norms_that_cannot_be_frozen_are_refused() -> None:
    class ScalelessNorm(nn.Module):
        eps = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    class OtherNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x / x.abs().amax(-1, keepdim=True)

    model = models.make("qwen3")
    model.model.layers[1].self_attn.q_norm = ScalelessNorm()
    bound = bind(model)
    Backward(bound, [models.prompt(LENGTH)], [asked(bound, models.prompt(LENGTH))], RULES["steer"]).run()
    del ScalelessNorm.eps
    refused(model, r"self_attn.q_norm of layer 1 of Qwen3ForCausalLM \(ScalelessNorm\) has no eps")
    model.model.layers[1].self_attn.q_norm = OtherNorm()
    refused(
        model, r"self_attn.q_norm of layer 1 of Qwen3ForCausalLM \(OtherNorm\) does not compute what a rms norm does"
    )


def test_a_family_that_says_something_else_is_refused() -> None:
    model = models.make("llama")
    wrong = bind(model, Family(gate="mlp.up_proj"))
    refused(model, "is not what its depass.Family says.* correct the family", wrong)


def test_hooks_that_change_the_model_are_named() -> None:
    model, ids = models.make("llama"), models.prompt(LENGTH)
    bound = bind(model)
    run = Backward(bound, [ids], [asked(bound, ids)], RULES["half"])
    run.run()
    assert run.altered == {}
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, args, output: output * 2)
    run = Backward(bound, [ids], [asked(bound, ids)], RULES["half"])
    run.run()
    handle.remove()
    assert "model.layers.1.mlp.down_proj has a forward hook" in run.altered[0]


@pytest.mark.parametrize("inner", ["attribute", "backward", "model"])
def test_a_pass_inside_a_pass_is_refused(inner: str) -> None:
    model, ids = models.make("llama"), models.prompt(LENGTH)
    dp = DePass(model)

    class Nested(Backward):
        def layer(self, gradients: LayerGradients) -> None:
            if inner == "attribute":
                dp.attribute(ids, 5)
            elif inner == "backward":
                scored(model, ids, "half")
            else:
                model(torch.tensor([ids]))

    message = "a callback ran LlamaForCausalLM while" if inner == "model" else "already running in this thread"
    with pytest.raises(ModelError, match=message):
        Nested(dp.bound, [ids], [asked(dp.bound, ids)], RULES["half"]).run()
    assert hooks(model) == 0


def test_the_linearised_model_cannot_be_attributed() -> None:
    model, ids = models.make("llama"), models.prompt(LENGTH)
    dp = DePass(model)
    with (
        linearised(dp.bound, RULES["half"]),
        pytest.raises(ModelError, match="an attribution is already running in this thread"),
    ):
        dp.attribute(ids, 5)
    dp.attribute(ids, 5, strict=True)


def test_gradients_of_the_linearised_model_are_the_passes() -> None:
    """The context manager alone, over the whole model at once, with the caller's own autograd."""
    model, ids = models.make("llama"), models.prompt(LENGTH)
    for rule in RULES:
        with linearised(bind(model), RULES[rule]):
            embedded = model.model.embed_tokens(torch.tensor([ids])).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(model(inputs_embeds=embedded).logits[0, -1, 5], embedded)
        close((gradient * embedded.detach()).sum(-1), scored(model, ids, rule).tokens[:, 0], 1e-5)
