"""Gradient Interaction Modifications (arXiv 2505.17630) against its formulas, written out, and against other autograd."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from depass import Contrast, DePass, Family, ModelError, Token, TopK, baselines
from depass.models.attention import eager_with_patterns
from depass.models.bind import bind
from depass.models.bound import BoundModel
from depass.models.linearised import linearised
from depass.models.tempered import TemperedSoftmax
from depass.rules import PathWeights

IDS = models.prompt(9)
NAMES = [name for name in models.CONFIGS if name not in models.RECURRENT]  # gim refuses linear attention
TARGET, POSITION = 5, 7  # a position before the last: what lies behind it has no score
interactions = import_module("depass.baselines.tokens")._interactions  # the module's name is a function's too


@pytest.fixture
def doubled(exact: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A function that makes a model in fp64 whose norms and softmax compute in fp64; transformers' compute in fp32."""
    monkeypatch.setattr(functional, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim))
    return lambda name: exact(models.make(name, torch.float64))


def gradient(model: Any) -> Tensor:
    """``[N, D]``: the gradient that the baseline takes of the target's logit, by the embeddings."""
    with interactions(bind(model)):
        return plain_gradient(model)


def plain_gradient(model: Any) -> Tensor:
    """``[N, D]``: the gradient of what the head writes for the target, before factors and a soft cap, by the embeddings."""
    ids, embeddings, logits = torch.tensor([IDS]), model.get_input_embeddings(), list[Tensor]()
    embedded = embeddings(ids).detach().requires_grad_()
    hooks = [
        embeddings.register_forward_hook(lambda _, __, ___: embedded),  # not inputs_embeds: Gemma 4 needs the ids, too
        model.get_output_embeddings().register_forward_hook(lambda _, __, output: logits.append(output)),
    ]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    (found,) = torch.autograd.grad(logits[0][0, POSITION, TARGET], embedded)
    return found[0]


def scores(dp: DePass, **more: Any) -> Tensor:
    (found,) = baselines.tokens(dp, "gim", [IDS], Token(TARGET, POSITION), **more)
    return found.scores[0]


def close(got: Tensor, expected: Tensor, limit: float = 1e-9) -> None:
    assert got.shape == expected.shape
    assert float(expected.abs().max()) > 1e-3
    assert (got - expected).abs().max() <= limit * expected.abs().max()


# --- the formulas, there and back by hand, for a Llama -----------------------------------------------------------------


class ByHand:
    """A Llama of one prompt; no autograd. ``x`` is the stream ``[N, D]``, ``d`` before a name the logit's gradient by it."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.heads, self.groups = self.config.num_attention_heads, self.config.num_key_value_heads
        self.size = model.model.layers[0].self_attn.head_dim
        self.x = model.model.embed_tokens.weight[IDS]
        cos, sin = model.model.rotary_emb(self.x[None], torch.arange(len(IDS))[None])
        self.cos, self.sin = cos[0], sin[0]

    def scale(self, norm: Any, x: Tensor) -> Tensor:
        """What a norm multiplies with; it is a constant on the way back."""
        return norm.weight / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()

    def split(self, x: Tensor, heads: int) -> Tensor:
        """``[H, N, d]``, the heads of keys and values once for each head that reads them."""
        return x.view(len(IDS), heads, self.size).transpose(0, 1).repeat_interleave(self.heads // heads, 0)

    def joined(self, x: Tensor, heads: int) -> Tensor:
        return x.view(heads, -1, len(IDS), self.size).sum(1).transpose(0, 1).reshape(len(IDS), -1)

    def turned(self, x: Tensor, sign: int = 1) -> Tensor:
        """Rotated by position; back with the sign -1."""
        first, second = x.chunk(2, -1)
        return x * self.cos + sign * torch.cat([-second, first], -1) * self.sin

    def attention(self, attn: Any, n: Tensor) -> tuple[Tensor, ...]:
        q = self.turned(self.split(attn.q_proj(n), self.heads))
        k = self.turned(self.split(attn.k_proj(n), self.groups))
        v = self.split(attn.v_proj(n), self.groups)
        future = torch.ones(len(IDS), len(IDS)).triu(1).bool()
        return q, k, v, (q @ k.mT / self.size**0.5).masked_fill(future, -torch.inf)

    def attention_back(self, attn: Any, n: Tensor, d_out: Tensor) -> Tensor:
        q, k, v, s = self.attention(attn, n)
        d_mixed = self.split(d_out @ attn.o_proj.weight, self.heads)
        d_pattern = d_mixed @ v.mT
        p = (s / 2).softmax(-1)  # the temperature
        d_s = p * (d_pattern - (p * d_pattern).sum(-1, keepdim=True)) / self.size**0.5
        d_v = self.joined(s.softmax(-1).mT @ d_mixed, self.groups) / 2
        d_q = self.joined(self.turned(d_s @ k, -1), self.heads) / 4
        d_k = self.joined(self.turned(d_s.mT @ q, -1), self.groups) / 4
        return d_q @ attn.q_proj.weight + d_k @ attn.k_proj.weight + d_v @ attn.v_proj.weight

    def mlp_back(self, mlp: Any, n: Tensor, d_out: Tensor) -> Tensor:
        g, u, d_h = mlp.gate_proj(n), mlp.up_proj(n), d_out @ mlp.down_proj.weight
        sigmoid = g.sigmoid()
        d_g = d_h * u * (sigmoid + g * sigmoid * (1 - sigmoid)) / 2
        return d_g @ mlp.gate_proj.weight + d_h * g * sigmoid / 2 @ mlp.up_proj.weight

    @torch.no_grad()
    def gradient(self) -> Tensor:
        x, kept = self.x, []
        for layer in self.model.model.layers:
            before, n = x, x * self.scale(layer.input_layernorm, x)
            *_, v, s = self.attention(layer.self_attn, n)
            x = x + layer.self_attn.o_proj(self.joined(s.softmax(-1) @ v, self.heads))
            kept.append((layer, before, x))
            n = x * self.scale(layer.post_attention_layernorm, x)
            gated = functional.silu(layer.mlp.gate_proj(n)) * layer.mlp.up_proj(n)
            x = x + layer.mlp.down_proj(gated)
        d_x = torch.zeros_like(x)
        d_x[POSITION] = (self.model.lm_head.weight[TARGET] * self.scale(self.model.model.norm, x))[POSITION]
        for layer, before, middle in reversed(kept):
            for norm, at, part, back in (
                (layer.post_attention_layernorm, middle, layer.mlp, self.mlp_back),
                (layer.input_layernorm, before, layer.self_attn, self.attention_back),
            ):
                scale = self.scale(norm, at)
                d_x = d_x + back(part, at * scale, d_x) * scale
        return d_x


@pytest.mark.parametrize("name", ["llama", "llama-biased", "llama-tied-wide-heads"])
def test_gradients_are_those_of_the_papers_formulas(name: str, doubled: Callable[[str], Any]) -> None:
    model = doubled(name)
    expected = ByHand(model).gradient()
    close(gradient(model), expected)
    product = (expected * model.model.embed_tokens.weight[IDS]).sum(-1).detach()
    close(scores(DePass(model)).double(), product, 1e-6)  # scores are fp32


# --- every family: the modifications put in at other places ------------------------------------------------------------


class Tempered(torch.autograd.Function):
    """A softmax over the last dimension with the Jacobian at temperature 2."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        ctx.save_for_backward(scores)
        return scores.exp() / scores.exp().sum(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        p = (ctx.saved_tensors[0] / 2).exp()
        p = p / p.sum(-1, keepdim=True)
        return torch.einsum("...j,...ji->...i", gradient, torch.diag_embed(p) - p[..., :, None] * p[..., None, :])


def scaled(x: Tensor, weight: float) -> Tensor:
    return weight * x + (1 - weight) * x.detach()


def modified_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (scaled(k, 0.25), scaled(v, 0.5)))
    found = scaled(q, 0.25) @ k.mT * (scaling or q.shape[-1] ** -0.5)
    if options.get("softcap"):
        found = options["softcap"] * (found / options["softcap"]).tanh()
    found = found.masked_fill(mask < 0, -1e4)
    if hasattr(module, "sinks"):  # one more logit of each row, whose share no value gets
        found = torch.cat([found, module.sinks.view(1, -1, 1, 1).expand(*found.shape[:3], 1)], -1)
    pattern = Tempered.apply(found)[..., : k.shape[2]]  # type: ignore[no-untyped-call]
    return (pattern @ v).transpose(1, 2), pattern


def frozen_rms(self: Any, x: Tensor) -> Tensor:
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    weight = getattr(self, "weight", 1) + models.adds_one(self)
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt().detach()  # type: ignore[no-any-return]


def frozen_layer_norm(self: Any, x: Tensor) -> Tensor:
    eps = getattr(self, "eps", getattr(self, "variance_epsilon", 1e-5))  # OLMo's norm has its own in its code
    weight, bias = getattr(self, "weight", 1), getattr(self, "bias", None)
    weight = weight + 1 if "1P" in type(self).__name__ else weight
    x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt().detach() * weight + (0 if bias is None else bias)


@contextmanager
def modified(model: Any) -> Iterator[None]:
    AttentionInterface.register("modified", modified_attention)
    AttentionMaskInterface.register("modified", eager_mask)
    before, model.config._attn_implementation = model.config._attn_implementation, "modified"
    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(module) for module in model.modules()}:
            if kind.__name__.endswith(("RMSNorm", "L2Norm")):
                patch.setattr(kind, "forward", frozen_rms)
            elif "LayerNorm" in kind.__name__:
                patch.setattr(kind, "forward", frozen_layer_norm)
        handles = [
            module.register_forward_hook(lambda _, __, output: scaled(output, 0.5))
            for mlp in model.modules()
            for name in ("gate_up_proj", "input_linear", "gate_proj", "up_proj" if hasattr(mlp, "gate_proj") else "")
            if isinstance(module := getattr(mlp, name, None), torch.nn.Module)  # of a product
        ]
        for path, module in model.named_modules():
            if path.endswith(".experts"):
                handles.append(module.register_forward_pre_hook(of_experts))
            if path.endswith("shared_expert_gate"):
                handles.append(module.register_forward_hook(lambda _, __, output: output.detach()))
            if path.endswith("feed_forward.router"):  # Llama 4's, whose weights multiply the experts' inputs
                handles.append(module.register_forward_hook(lambda _, __, output: tuple(o.detach() for o in output)))
            if hasattr(module, "per_layer_input_gate"):  # Gemma 4's layers, whose per-layer input is a constant
                handles.append(module.register_forward_pre_hook(lambda _, args: (args[0], args[1].detach(), *args[2:])))
        yield
    for handle in handles:
        handle.remove()
    model.config._attn_implementation = before


def of_experts(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What experts read: both factors of their hidden vectors get half of the gradient, the routing gets none."""
    x, *routing = args
    return scaled(x, 0.5), *(each.detach() for each in routing)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_a_model_modified_by_hand(name: str, doubled: Callable[[str], Any]) -> None:
    model = doubled(name)
    with modified(model):
        expected = plain_gradient(model)
    # these rotate queries and keys, or multiply them, in fp32
    close(gradient(model), expected, 1e-6 if name in ("cohere", "codegen") else 1e-9)


def test_gpt2s_other_attention_has_the_same_gradient() -> None:
    upcast, usual = models.make("gpt2-upcast"), models.make("gpt2-upcast", reorder_and_upcast_attn=False)
    close(gradient(upcast), gradient(usual), 1e-5)


@pytest.mark.parametrize("name", [*NAMES, *models.OTHERS])
def test_the_model_computes_what_it_always_does(name: str) -> None:
    model, ids = models.make(name), torch.tensor([IDS])
    with torch.no_grad(), eager_with_patterns(bind(model)):
        expected = model(ids).logits
    with interactions(bind(model)):
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*NAMES, *models.OTHERS])
def test_several_targets_and_prompts_of_every_family(name: str, dtype: torch.dtype) -> None:
    if name in models.OTHERS and dtype != torch.float32:
        pytest.skip("the family's own code refuses other dtypes than fp32")
    dp = DePass(models.make(name, dtype))
    short, target = models.prompt(4), [TopK(2), Contrast(7, 8), Token(TARGET, 2)]
    many = baselines.tokens(dp, "gim", [IDS, short], [target, 5])
    assert [found.scores.shape for found in many] == [(4, len(IDS)), (1, len(short))]
    for found, prompt, alone_target in zip(many, (IDS, short), (target, 5), strict=True):
        assert found.scores.isfinite().all()
        (alone,) = baselines.tokens(dp, "gim", [prompt], [alone_target])
        assert torch.allclose(found.scores, alone.scores, rtol=1e-3, atol=1e-4 if dtype == torch.float32 else 0.5)
    assert not many[0].scores[3, 3:].any()  # behind the target's position


def test_nothing_of_the_model_or_the_thread_is_changed() -> None:
    model = models.make("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    usual = scores_by(model, "input_x_gradient")
    scores(DePass(model))
    assert torch.equal(scores_by(model, "input_x_gradient"), usual)
    assert not torch.equal(scores_by(model, "gim"), usual)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def scores_by(model: Any, name: str) -> Tensor:
    return baselines.tokens(DePass(model), name, [IDS], TARGET)[0].scores


# --- the softmax alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "softmax",
    [
        lambda x: functional.softmax(x, dim=1),
        lambda x: functional.softmax(x, 1, dtype=torch.float64),
        lambda x: functional.softmax(input=x, dim=1),
        lambda x: torch.softmax(x, 1),
        lambda x: torch.special.softmax(x, 1),
        lambda x: x.softmax(1),
        nn.Softmax(1),
    ],
)
def test_every_softmax_has_the_jacobian_at_the_temperature(softmax: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    seed = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    usual = softmax(x)
    with TemperedSoftmax(3) as mode:
        got = softmax(x)
    assert torch.equal(got, usual)
    assert mode.count == 1
    p = (x.detach().double() / 3).softmax(1)
    jacobian = torch.diag_embed(p.mT) - torch.einsum("bis,bjs->bsij", p, p)
    expected = torch.einsum("bsij,bjs->bis", jacobian, seed.double())
    close(torch.autograd.grad(got, x, seed.to(got))[0].double(), expected, 1e-6)


def test_other_threads_have_their_own_softmax() -> None:
    x, found = torch.tensor([0.0, 1.0, 3.0], requires_grad=True), []

    def usual() -> None:
        found.extend(torch.autograd.grad(torch.softmax(x, 0)[0], x))

    usual()
    with TemperedSoftmax(2):
        thread = threading.Thread(target=usual)
        thread.start()
        thread.join()
    assert torch.equal(found[0], found[1])


# --- what is refused ---------------------------------------------------------------------------------------------------


def refused(model: Any, match: str, **options: Any) -> None:
    with pytest.raises(ModelError, match=match):
        scores(DePass(model, **options))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_quantised_weights_are_refused_by_gim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundModel, "is_quantized", True)
    refused(models.make("llama"), "has quantised weights")


def test_streamed_weights_are_refused_by_gim() -> None:
    bound = replace(bind(models.make("llama")), stream_to=torch.device("cuda:0"))
    with pytest.raises(ModelError, match="are streamed to cuda:0"), interactions(bound):
        pass


def test_a_norm_without_an_epsilon_is_refused_by_gim() -> None:
    model = models.make("qwen3")
    model.model.layers[1].self_attn.q_norm = type("ScalelessNorm", (nn.Identity,), {})()
    refused(model, r"q_norm of layer 1 of Qwen3ForCausalLM \(ScalelessNorm\) has no eps")


@pytest.mark.parametrize("name", models.RECURRENT)
def test_linear_attention_is_refused_by_gim(name: str) -> None:
    refused(models.make(name), r"layer \d of .* has linear attention, .* take rule='half', 'up' or 'taylor'")


def test_a_wrong_family_is_refused_by_gim() -> None:
    refused(models.make("llama"), "is not what its depass.Family says", family=Family(gate="mlp.up_proj"))


def test_attention_without_torchs_softmax_is_refused_by_gim(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(x: Tensor, **_: Any) -> Tensor:
        size = (x - x.detach().amax(-1, keepdim=True)).exp()
        return size / size.sum(-1, keepdim=True)

    monkeypatch.setattr(functional, "softmax", own)
    refused(models.make("llama"), "gim changes the gradient of torch's softmax .* called it 0 times in 3 layers")


def test_gim_inside_another_pass_is_refused() -> None:
    dp = DePass(models.make("llama"))
    message = "an attribution is already running in this thread"
    with linearised(dp.bound, PathWeights()), pytest.raises(ModelError, match=message):
        scores(dp)
    scores(dp)


def test_a_hook_that_passes_no_gradient_on_is_named() -> None:
    dp = DePass(models.make("llama"))
    dp.model.model.layers[1].register_forward_hook(lambda _, __, output: output.detach() * 1)
    for name in ("gim", "input_x_gradient"):
        with pytest.raises(ModelError, match=r"does not pass gradients on to its embeddings by every path, .*hook"):
            baselines.tokens(dp, name, [IDS], TARGET)
