"""Rules by name, by path weights and mixed; and the source that balances the sum of rules which credit steering."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor

from depass import (
    Attribution,
    ConservationWarning,
    Contrast,
    DePass,
    Direction,
    Heads,
    Mixture,
    ModelError,
    Modules,
    Neurons,
    OptionError,
    OutputError,
    PathWeights,
    Spans,
    Subspace,
    Sweep,
    TopK,
    rules,
)
from depass.cli.main import main
from depass.datasets.options import DatasetOptions
from depass.engine import linear

OWN = PathWeights(q=0.5, k=-0.25, v=0.75, gate=0.25, up=0.5)
SOURCES: list[Any] = [
    "token", Spans([(1, 3), (4, 9)]), Heads(1, positions=[0, 4]), Neurons(1, ids=[0, 7, 3]), Modules(2, "mlp"),
    Subspace(1, torch.eye(32)[:3]),
]  # fmt: skip
TARGETS = [TopK(2), Contrast(3, 4, position=5), Direction(torch.linspace(-1, 1, 32)), 7]


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name", "shares"),
    [
        ("softmax", "softmax", [1]),
        (PathWeights(gate=0.5, up=0.5), "half", [1]),
        ("gate=0.5, up=0.5", "half", [1]),
        (OWN, "q=0.5,k=-0.25,v=0.75,gate=0.25,up=0.5", [1]),
        ("q=1e20", "q=1e20", [1]),
        ("softmax+half", "softmax+half", [0.5, 0.5]),
        ("softmax + 3*half", "1*softmax+3*half", [0.25, 0.75]),
        ("2*softmax+2*half", "softmax+half", [0.5, 0.5]),
        ("max+q=0.5", "max+q=0.5", [0.5, 0.5]),
        ("steered", "steered", [1 / 3, 2 / 3]),
        (Mixture({"softmax": 0.1, OWN: 0.3}), f"0.1*softmax+0.3*{OWN}", [0.25, 0.75]),
        (Mixture({"relu": 1 / 3, "up": 2 / 3}), "0.3333333333333333*relu+0.6666666666666666*up", [1 / 3, 2 / 3]),
    ],
    ids=str,
)
def test_a_rule_has_one_name_that_reads_as_the_same_rule(given: Any, name: str, shares: list[float]) -> None:
    rule = rules.read(given)
    assert rule.name == name
    assert [part.share for part in rule.parts] == pytest.approx(shares)
    assert rules.read(rule.name) == rule


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("softmx", "unknown rule 'softmx'; choose one of: softmax, .*steered; or a mixture"),
        ("softmax+softmax", "names 'softmax' twice"),
        ("half+gate=0.5,up=0.5", "names 'half' twice"),
        ("softmax+", "unknown rule 'softmax\\+'"),
        ("", "unknown rule ''"),
        ("x*softmax", "'x' is not a number"),
        ("-1*softmax+half", "weight of softmax in a mixture must be a positive number, got -1.0"),
        ("nan*softmax+half", "must be a positive number, got nan"),
        ("q=a", "'a' is not a number"),
        ("q=inf", r"PathWeights\(q=inf\): a weight must be a finite number"),
        ("q=1,q=2", "unknown rule 'q=1,q=2'"),
        ("w=1", "unknown rule 'w=1'"),
        ("steered+half", "unknown rule 'steered\\+half'"),
        (3, "unknown rule 3"),
        (None, "unknown rule None"),
        ({"softmax": 1}, "unknown rule {'softmax': 1}"),
    ],
    ids=str,
)
def test_what_is_no_rule_is_refused(given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rules.read(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs a dict with a weight for each rule"),
        ([("softmax", 1)], "needs a dict"),
        ({"a": 1}, "unknown rule 'a' in a mixture; choose from: softmax, "),
        ({"steered": 1}, "unknown rule 'steered' in a mixture"),
        ({"softmax": 0}, "the weight of softmax in a mixture must be a positive number, got 0"),
        ({"softmax": True}, "must be a positive number, got True"),
        ({"softmax": "1"}, "must be a positive number, got '1'"),
        ({"half": 1, PathWeights(gate=0.5, up=0.5): 1}, "names a rule twice: half, half"),
    ],
    ids=str,
)
def test_what_is_no_mixture_is_refused(given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Mixture(given)


# --- mixtures ---------------------------------------------------------------------------------------------------------

MIXED: list[tuple[Any, dict[Any, float]]] = [
    ("softmax+half", {"softmax": 0.5, "half": 0.5}),
    ("steered", {"softmax": 1 / 3, "steer": 2 / 3}),
    (Mixture({"max": 1, "dual_path": 2, OWN: 1}), {"max": 0.25, "dual_path": 0.5, OWN: 0.25}),
    ("softmax+relu", {"softmax": 0.5, "relu": 0.5}),
    ("half+up", {"half": 0.5, "up": 0.5}),
]


def mean(by_rule: list[tuple[float, Any]], name: str, count: int | None = None) -> Tensor:
    """The weighted mean of a tensor of several results; rules without a balance have fewer columns."""
    return sum(  # type: ignore[return-value]
        (share * getattr(res, name)[..., : count or None] for share, res in by_rule), torch.zeros(())
    )


@pytest.mark.parametrize(
    ("rule", "weights"), MIXED, ids=lambda value: str(value) if not isinstance(value, dict) else ""
)
@pytest.mark.parametrize("name", ["llama-biased", "gpt-neox"])
def test_a_mixture_is_the_mean_of_its_rules(name: str, rule: Any, weights: dict[Any, float]) -> None:
    dp, ids = DePass(models.make(name)), models.prompt(9)
    for sources in SOURCES:
        got = dp.attribute(ids, TARGETS, sources=sources, rule=rule, strict=True)
        own = [(share, dp.attribute(ids, TARGETS, sources=sources, rule=each)) for each, share in weights.items()]
        count = min(len(res.sources) for _, res in own)
        assert got.sources[:count] == own[0][1].sources[:count]
        assert got.targets == own[0][1].targets
        torch.testing.assert_close(got.scores[:, :count], mean(own, "scores", count), rtol=1e-5, atol=1e-5)
        assert float(got.conservation_error.max()) < 1e-5
    for kind in ("heads", "neurons", "modules"):
        swept = dp.sweep(kind, ids, TARGETS, rule=rule, strict=True)  # type: ignore[arg-type]
        each = [(share, dp.sweep(kind, ids, TARGETS, rule=one)) for one, share in weights.items()]  # type: ignore[arg-type]
        for field in ("scores", "rest", "bias", "balance"):
            torch.testing.assert_close(getattr(swept, field), mean(each, field), rtol=1e-5, atol=1e-5)


def test_a_mixture_says_what_it_is_made_of() -> None:
    dp, ids = DePass(models.make("llama")), models.prompt(9)
    settings = dp.attribute(ids, rule="steered").settings
    assert (settings.rule, settings.engine, settings.balance) == ("steered", "forward+backward", "pattern")
    assert "share_hidden" in settings.backends
    assert dp.attribute(ids, rule="half+up").settings.engine == "backward"
    assert dp.attribute(ids, rule="softmax+max").settings.engine == "forward"
    assert DePass(models.make("llama"), rule=Mixture({"softmax": 1, "half": 3})).attribute(ids).settings.rule == (
        "1*softmax+3*half"
    )


def test_every_rule_of_a_mixture_explains_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the first rule found, even where another's logits order them otherwise."""
    dp, ids = DePass(models.make("llama")), models.prompt(9)
    given: list[Any] = []
    scored = linear.scored

    def recorded(engine: Any, cases: Any, *others: Any) -> Any:
        given.extend(cases[0].asked)
        return scored(engine, cases, *others)

    monkeypatch.setattr(linear, "scored", recorded)
    res = dp.attribute(ids, [TopK(3), 7, Direction(torch.ones(32))], rule="softmax+half")
    assert [asked.ids for asked in given] == [target.token_ids for target in res.targets]
    assert all(asked.ids is not None for asked in given)


def test_a_mixture_under_hooks_says_so() -> None:
    model, ids = models.make("llama"), models.prompt(9)
    dp = DePass(model)
    assert dp.attribute(ids, 5, rule="half+softmax").settings.altered is None
    model.model.layers[1].register_forward_hook(lambda _, __, output: output * 1.5)
    for rule in ("half+softmax", "softmax+half"):
        with pytest.warns(ConservationWarning, match="go through this change under the linear rules of the mixture"):
            assert dp.attribute(ids, 5, rule=rule).settings.altered is not None


def test_progress_of_a_sweep_in_groups_only_goes_on() -> None:
    dp, ids = DePass(models.make("llama")), models.prompt(6)
    told: list[tuple[int, int]] = []
    dp.sweep("heads", ids, rule="softmax+half", memory_bytes=33_570_000, progress=lambda *now: told.append(now))
    assert len({of for _, of in told}) == 1
    assert [done for done, _ in told] == list(range(1, told[0][1] + 1))
    assert told[0][1] > 2 * models.LAYERS  # in more than one group


def test_a_mixture_does_not_change_with_the_dict_that_it_was_made_of() -> None:
    weights: dict[Any, float] = {"softmax": 1, "half": 1}
    mixture = Mixture(weights)
    weights["softmax"] = -1
    assert str(mixture) == "softmax+half"
    assert hash(mixture) == hash(Mixture({"softmax": 1, "half": 1}))


@pytest.mark.parametrize("rule", ["1e308*softmax+1e308*half", "1e400*softmax+half"])
def test_weights_without_a_finite_sum_are_refused(rule: str) -> None:
    with pytest.raises(OptionError, match=r"must have a finite sum|must be a positive number, got inf"):
        rules.read(rule)
    with pytest.raises(OptionError, match="a weight must be a finite number"):
        PathWeights(q=10**400)


@pytest.mark.parametrize("how", ["stream_to", "engine", "hook", "inference"])
def test_a_plan_is_of_the_engine_that_runs(how: str) -> None:
    with torch.inference_mode(how == "inference"):
        model = models.make("llama")
    options: dict[str, Any] = {"stream_to": {"stream_to": "cpu"}, "engine": {"engine": "forward"}}.get(how, {})
    dp, ids = DePass(model, **options), models.prompt(20)
    if how == "hook":
        model.model.layers[0].register_forward_hook(lambda _, __, output: output)
    assert dp.plan(20, rule="taylor", measure=False).rows == dp.plan(20, measure=False).rows == 210
    assert dp.attribute(ids, rule="taylor").settings.engine == "forward"
    if how != "hook":
        for call in (lambda: dp.plan(20, rule="half", measure=False), lambda: dp.attribute(ids, rule="half")):
            with pytest.raises((ModelError, OptionError)):
                call()


def test_a_plan_of_a_mixture_takes_the_time_of_all_and_the_memory_of_the_largest() -> None:
    dp = DePass(models.make("llama"))
    softmax, steer, half, mixed = (
        dp.plan(40, rule=rule, measure=False) for rule in ("softmax", "steer", "half", "softmax+steer")
    )
    assert mixed.operations == softmax.operations + steer.operations
    assert mixed.total_bytes == max(softmax.total_bytes, steer.total_bytes)
    assert (mixed.rows, mixed.rule) == (softmax.rows, "softmax+steer")
    assert steer.operations > half.operations  # the pattern's gradient


def test_a_mixture_excludes_the_first_token_in_its_forward_rules() -> None:
    dp, ids = DePass(models.make("llama"), exclude_bos=True, rule="softmax+half"), models.prompt(9)
    got = dp.attribute(ids, 5)
    parts = [dp.attribute(ids, 5, rule="softmax"), dp.attribute(ids, 5, rule="half", exclude_bos=False)]
    torch.testing.assert_close(got.scores, (parts[0].scores + parts[1].scores) / 2, rtol=1e-5, atol=1e-5)
    assert got.settings.exclude_bos
    with pytest.raises(OptionError, match="exclude_bos=True has no effect under rule='half\\+up'"):
        dp.attribute(ids, 5, rule="half+up", exclude_bos=True)


def test_batches_generations_and_progress_take_mixtures() -> None:
    dp, prompts = DePass(models.make("qwen3")), [models.prompt(length, length) for length in (4, 9, 6)]
    for got, ids in zip(dp.attribute_many(prompts, [TopK(2), 7], rule="steered", strict=True), prompts, strict=True):
        assert isinstance(got, Attribution)
        torch.testing.assert_close(
            got.scores, dp.attribute(ids, [TopK(2), 7], rule="steered").scores, rtol=1e-4, atol=1e-5
        )
    assert dp.generate(prompts[0], max_new_tokens=3, rule="softmax+half").attribution.settings.rule == "softmax+half"
    told: list[tuple[int, int]] = []
    dp.attribute(prompts[0], rule="steered", progress=lambda done, of: told.append((done, of)))
    assert told == [(done, 2 * models.LAYERS) for done in range(1, 2 * models.LAYERS + 1)]


def test_the_forward_engine_refuses_what_it_lacks() -> None:
    dp, ids = DePass(models.make("llama"), engine="forward"), models.prompt(5)
    with pytest.raises(OptionError, match="engine='forward' does not have rule='half'"):
        dp.attribute(ids, rule="softmax+half")
    assert dp.attribute(ids, rule="softmax+taylor").settings.engine == "forward"
    with pytest.raises(OptionError, match="rule='softmax\\+half' has no decomposed states"):
        dp.states(ids, rule="softmax+half")


# --- the balance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-biased", "gemma2", "gpt2", "gpt-neox"])
def test_pattern_takes_back_what_was_credited_to_steering(name: str) -> None:
    """It is the measured credit of queries and keys, so the sum of all scores certifies it."""
    dp, ids = DePass(models.make(name), rule="steer"), models.prompt(9)
    for sources in SOURCES:
        res = dp.attribute(ids, TARGETS, sources=sources, strict=True)
        assert (res.sources[-1].kind, res.sources[-1].label) == ("pattern", "pattern")
        torch.testing.assert_close(res.scores.sum(1), res.target_logits, rtol=1e-4, atol=1e-4)
    assert float(dp.attribute(ids, TARGETS).scores[:, -1].abs().max()) > 1e-3
    last = dp.attribute(ids, 5, sources=Modules(models.LAYERS - 1, "mlp"))
    assert float(last.scores[0, -1]) == 0  # no attention behind it


def test_rules_whose_scores_add_up_have_no_balance() -> None:
    dp, ids = DePass(models.make("llama")), models.prompt(9)
    for rule in ("softmax", "taylor", "half", "up", "softmax+half"):
        assert [source.kind for source in dp.attribute(ids, rule=rule).sources] == ["token"] * 9
        assert float(dp.sweep("heads", ids, rule=rule).balance.abs().max()) == 0


def test_what_is_unassigned_is_reported_and_not_drawn(tmp_path: Path) -> None:
    dp, ids = DePass(models.make("llama"), rule="dual_path"), models.prompt(9)
    res = dp.attribute(ids, 5)
    unassigned = float(res.scores[0, -1])
    assert res.sources[-1].kind == "unassigned"
    assert all(source.kind == "token" for source, _ in res.top(20))
    out = io.StringIO()
    res.show(out, width=200)
    assert f"sum of 9 scores {unassigned:+.2f} unassigned (error" in out.getvalue()
    assert "[unassigned]" not in out.getvalue()
    page = res.to_html()
    assert f"unassigned {unassigned:.2f}, conservation error" in page
    assert "[unassigned]" not in page
    res.save(tmp_path / "res.safetensors")
    assert Attribution.load(tmp_path / "res.safetensors").settings.balance == "unassigned"


def test_words_keep_the_balance() -> None:
    dp, ids = DePass(models.make("llama-biased"), rule="steer"), models.prompt(9)
    res = dp.attribute(ids, 5)
    whole = res.aggregate("token")
    assert [source.kind for source in whole.sources] == ["bias", *["span"] * 9, "pattern"]
    torch.testing.assert_close(whole.scores, res.scores)


def test_a_sweep_shows_its_balance(tmp_path: Path) -> None:
    dp, ids = DePass(models.make("llama"), rule="steer"), models.prompt(9)
    swept = dp.sweep("heads", ids, 5)
    out = io.StringIO()
    swept.show(out, width=200)
    assert "4 heads + rest + pattern, in each of 3 layers" in out.getvalue()
    assert "the bias and pattern add up to the target" in swept.to_html()
    swept.save(tmp_path / "sweep.safetensors")
    torch.testing.assert_close(Sweep.load(tmp_path / "sweep.safetensors").balance, swept.balance)


# --- where rules come as text -----------------------------------------------------------------------------------------


def test_commands_take_rules_as_text(capsys: pytest.CaptureFixture[str], smollm2_folder: Any) -> None:
    assert (
        main(["attribute", "The capital of France is", "--target", " Paris", "--rule", "softmax+half", "--json"]) == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said["settings"]["rule"] == "softmax+half"
    assert sum(said["scores"][0]) == pytest.approx(said["target_logits"][0], rel=1e-4)
    for wrong in (["attribute", "a", "--rule", "nothing"], ["attribute-dataset", "x.csv", "--out", "y", "--rule", "nothing"],
                  ["plan", "--tokens", "9", "--rule", "nothing"]):  # fmt: skip
        assert main(wrong) == 2
        assert "unknown rule 'nothing'" in capsys.readouterr().err


def test_options_of_data_sets_take_rules_as_text() -> None:
    assert DatasetOptions(data="x", out="y", rule="1*softmax+3*half").rule == "1*softmax+3*half"
    with pytest.raises(OptionError, match="unknown rule 'nothing'"):
        DatasetOptions(data="x", out="y", rule="nothing")


def test_a_saved_result_with_an_unknown_rule_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    DePass(models.make("llama")).attribute(models.prompt(5), 5).save(tmp_path / "res")
    with safe_open(tmp_path / "res", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["settings"] = metadata["settings"].replace('"softmax"', '"nothing"')
    save_file(tensors, tmp_path / "res", metadata)
    with pytest.raises(OutputError, match="unknown rule 'nothing'"):
        Attribution.load(tmp_path / "res")


# --- dual_path on a real model ----------------------------------------------------------------------------------------


def by_hand(model: Any, ids: list[int], target: int) -> tuple[Tensor, Tensor]:
    """The tokens' dual-path scores ``[N]`` on a Llama, by vectors sent back by hand, and the logit. No autograd.

    The hidden vector splits its vector evenly between gate and up, the attention evenly between values and pattern, and the
    pattern its half evenly between queries and keys (arXiv 2603.19742; AttnLRP, arXiv 2402.05602).
    """
    own, config, n = model.model, model.config, len(ids)
    heads, d = config.num_attention_heads, own.layers[0].self_attn.head_dim
    groups = heads // config.num_key_value_heads
    x = own.embed_tokens.weight[ids]
    cos, sin = (each[0] for each in own.rotary_emb(x[None], torch.arange(n)[None]))
    eps, kept = config.rms_norm_eps, []

    def scale(norm: Any, x: Tensor) -> Tensor:
        return norm.weight * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def turned(x: Tensor, sign: int) -> Tensor:  # [N, d]
        return x * cos + sign * torch.cat([-x[:, d // 2 :], x[:, : d // 2]], -1) * sin

    embedded = x
    for layer in own.layers:
        attention, mlp, parts = layer.self_attn, layer.mlp, []
        first = scale(layer.input_layernorm, x)
        q, k, v = (each(first * x).view(n, -1, d) for each in (attention.q_proj, attention.k_proj, attention.v_proj))
        mixed = []
        for head in range(heads):
            qh, kh, vh = turned(q[:, head], 1), turned(k[:, head // groups], 1), v[:, head // groups]
            scores = (qh @ kh.T * attention.scaling).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
            parts.append((qh, kh, vh, torch.softmax(scores, -1)))
            mixed.append(parts[-1][3] @ vh)
        x = x + attention.o_proj(torch.cat(mixed, -1))
        second = scale(layer.post_attention_layernorm, x)
        gate, up = mlp.gate_proj(second * x), mlp.up_proj(second * x)
        x = x + mlp.down_proj(torch.nn.functional.silu(gate) * up)
        kept.append((first, parts, second, gate, up))
    last = scale(own.norm, x)
    logit = (last * x)[-1] @ model.lm_head.weight[target]
    back = torch.zeros_like(x)
    back[-1] = last[-1] * model.lm_head.weight[target]
    for layer, (first, parts, second, gate, up) in zip(reversed(own.layers), reversed(kept), strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        hidden, act = back @ mlp.down_proj.weight, torch.nn.functional.silu(gate)
        read = (hidden * act / gate * up / 2) @ mlp.gate_proj.weight + (hidden * act / 2) @ mlp.up_proj.weight
        back = back + second * read
        of_mixed, read = (back @ attention.o_proj.weight).view(n, heads, d), torch.zeros_like(back)
        for head, (qh, kh, vh, pattern) in enumerate(parts):
            of_pattern = of_mixed[:, head] @ vh.T / 2
            of_scores = pattern * (of_pattern - (pattern * of_pattern).sum(-1, keepdim=True)) * attention.scaling / 2
            own_rows = slice(head * d, (head + 1) * d)
            shared = slice(head // groups * d, (head // groups + 1) * d)
            read += turned(of_scores @ kh, -1) @ attention.q_proj.weight[own_rows]
            read += turned(of_scores.T @ qh, -1) @ attention.k_proj.weight[shared]
            read += (pattern.T @ of_mixed[:, head] / 2) @ attention.v_proj.weight[shared]
        back = back + first * read
    return (back * embedded).sum(-1), logit


@torch.no_grad()
def test_dual_path_on_smollm2_equals_vectors_sent_back_by_hand(smollm2_dp: Any) -> None:
    dp = smollm2_dp
    ids = dp.tokenizer.encode("The Eiffel Tower stands in the city of")
    (res,) = [dp.attribute(ids, " Paris", rule="dual_path", strict=True)]
    expected, logit = by_hand(dp.model, ids, dp.tokenizer.encode(" Paris")[0])
    assert float(res.target_logits[0]) == pytest.approx(float(logit), rel=1e-4)
    size = float(expected.abs().max())
    torch.testing.assert_close(res.scores[0, :-1].cpu(), expected.float().cpu(), rtol=0, atol=1e-4 * size)
    assert float(res.scores[0, -1]) > 1
