"""Offloaded and quantised models are attributed as what they are, with one layer's weights in memory at a time."""

from __future__ import annotations

import json
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import models
import pytest
import tokens
import torch
from torch import Tensor, nn

from depass import DePass, Heads, Modules, Neurons, OptionError, baselines, masking
from depass.cli.main import main
from depass.engine.plan import make as make_plan
from depass.errors import ModelError
from depass.models import weights
from depass.models.bind import bind
from depass.models.health import blame
from depass.models.loading import empty_model
from depass.models.streaming import weight_bytes

OFFLOADED = ("llama", "llama-biased", "llama-tied-wide-heads", "gemma2", "phi3", "olmo2", "gpt2", "gpt-neox")
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # 4-bit kernels want whole blocks


def saved(folder: Path, name: str, **sizes: Any) -> str:
    models.make(name, **sizes).save_pretrained(folder)
    tokens.make().save_pretrained(folder)
    return str(folder)


# --- offloaded


def all_on_disk_but_the_first_layer(model: Any) -> dict[str, str]:
    bound = bind(model)
    first = {id(module) for module in bound.layers[0].module.modules()}
    blocks = [*(layer.module for layer in bound.layers)]
    inside = {id(module) for block in blocks for module in block.modules()}
    made = {}
    for path, module in model.named_modules():
        whole = any(module is block for block in blocks)
        leaf = id(module) not in inside and not list(module.children()) and list(module.state_dict())
        if whole or leaf:
            made[path] = "cpu" if id(module) in first else "disk"
        elif id(module) not in inside and not list(module.children()):
            made[path] = "cpu"  # nothing but buffers
    return made


@pytest.fixture(scope="module")
def accelerate() -> Any:
    return pytest.importorskip("accelerate", reason="accelerate is not installed (extra: offload)")


@pytest.fixture(scope="module")
def offloaded(accelerate: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By name: a model as it is, and one of which all but the first layer lies on disk."""
    made: dict[str, tuple[DePass, DePass]] = {}

    def get(name: str) -> tuple[DePass, DePass]:
        if name not in made:
            folder = saved(tmp_path_factory.mktemp(name), name)
            where = all_on_disk_but_the_first_layer(models.make(name))
            made[name] = DePass(models.make(name)), DePass.from_pretrained(folder, device_map=where)
        return made[name]

    return get


def absent(model: Any) -> list[str]:
    shared = model.named_parameters(remove_duplicate=False)  # accelerate may part tied weights
    return [path for path, parameter in shared if parameter.is_meta]


@pytest.mark.parametrize("name", OFFLOADED)
def test_offloaded_results_are_the_same(name: str, offloaded: Any) -> None:
    plain, spread = offloaded(name)
    ids, before = models.prompt(17), absent(spread.model)
    assert len(before) > len(list(spread.model.parameters())) / 2
    for work in (
        lambda dp: dp.attribute(ids, [5, 7]).scores,
        lambda dp: dp.attribute(ids, 5, rule="taylor").scores,
        lambda dp: dp.attribute(ids, 5, stop_layer=2).scores,
        lambda dp: dp.attribute(ids, 5, sources=Neurons(1, ids=[0, 3])).scores,
        lambda dp: dp.attribute(ids, 5, sources=Modules(2, "mlp")).scores,
        lambda dp: dp.sweep("heads", ids, 5).scores,
        lambda dp: dp.states(ids, 2).dense(2),
        lambda dp: torch.cat([one.scores for one in dp.attribute_many([ids, ids[:5]], 5)], dim=1),
        lambda dp: dp.generate(ids[:5], max_new_tokens=3).attribution.scores,
    ):
        torch.testing.assert_close(work(spread), work(plain))  # last bits depend on where in memory weights lie
        assert absent(spread.model) == before


def test_baselines_and_masks_work_on_offloaded_models(offloaded: Any) -> None:
    plain, spread = offloaded("llama-biased")
    ids = models.prompt(9)
    for name in ("output_norm", "attribution_patching"):
        found, expected = (baselines.heads(dp, name, ids, 5).scores for dp in (spread, plain))
        torch.testing.assert_close(found, expected)
    results = []
    for dp in (plain, spread):
        with masking.heads(dp, {1: [0, 2]}):
            results.append(dp.attribute(ids, 5).target_logits)
    assert torch.equal(*results)


def test_the_plan_counts_what_is_held_and_what_is_brought(offloaded: Any) -> None:
    plain, spread = offloaded("llama")
    held = sum(p.nbytes for p in spread.model.parameters() if not p.is_meta)
    held += sum(b.nbytes for b in spread.model.buffers())
    largest = max(
        sum(p.nbytes for p in module.parameters(recurse=False) if p.is_meta) for module in spread.model.modules()
    )
    found, whole = spread.plan(9, measure=False), plain.plan(9, measure=False)
    assert found.weights_bytes == held + largest < whole.weights_bytes / 2
    layer = spread.bound.layers[1]
    copies = sum(part.module.weight.nbytes for part in layer.projections)
    assert found.buffer_bytes - whole.buffer_bytes == copies
    assert (found.rows, found.state_bytes, found.operations) == (whole.rows, whole.state_bytes, whole.operations)


def test_weights_without_a_hook_are_refused() -> None:
    meta = models.make("llama")
    meta.model.layers[1].mlp.to("meta")
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.* of LlamaForCausalLM are offloaded, but no hook"):
        DePass(meta)


def test_a_layer_on_two_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.make("llama")
    of, elsewhere = weights.device_of, model.model.layers[1].mlp.down_proj
    monkeypatch.setattr(weights, "device_of", lambda m: torch.device("cuda:1") if m is elsewhere else of(m))
    with pytest.raises(ModelError, match="layer 1 of LlamaForCausalLM is on cpu and cuda:1; give each layer a single"):
        bind(model)


def test_what_excludes_offloading_says_so(offloaded: Any) -> None:
    _, spread = offloaded("llama")
    with pytest.raises(OptionError, match=r"stream_to needs .* is on .*no device \(offloaded\)"):
        DePass(spread.model, stream_to="cpu")
    with pytest.raises(OptionError, match=r"cuda_graphs=True needs an unquantised model on one CUDA device"):
        DePass(spread.model, cuda_graphs=True)


def test_a_map_that_transformers_makes(accelerate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, ids = saved(tmp_path, "llama"), models.prompt(9)
    expected = DePass(models.make("llama")).attribute(ids, 5).scores
    layer = sum(p.nbytes for p in models.make("llama").model.layers[0].parameters())
    dp = DePass.from_pretrained(folder, device_map="auto", max_memory={"cpu": 2 * layer})
    assert absent(dp.model)
    assert torch.equal(dp.attribute(ids, 5).scores, expected)
    assert main(["attribute", "the cat", "-m", folder, "--device-map", "auto", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert main(["attribute", "the cat", "-m", folder, "--json"]) == 0
    assert one["scores"] == json.loads(capsys.readouterr().out)["scores"]


# --- quantised


def bitsandbytes_config(bits: int) -> Any:
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra: quantized)")
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quantized)")
    return f"{bits}bit"


def double_quantised() -> Any:
    from transformers import BitsAndBytesConfig

    bitsandbytes_config(4)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)


def torchao_config(bits: int) -> Any:
    from transformers import TorchAoConfig

    pytest.importorskip("accelerate", reason="accelerate is not installed (extra: quantized)")
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed (extra: quantized)")
    if bits == 8:
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    if bits == 16:
        return TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig())
    granularity = pytest.importorskip("torchao.quantization.granularity", reason="torchao is not installed")
    return TorchAoConfig(quantization.IntxWeightOnlyConfig(torch.int4, granularity=granularity.PerGroup(32)))


# each with how far its parts may miss the model's own logit: fp32 rounding where only weights are rounded, and three times
# half a step of 8 bits where the kernel rounds the activations too (that of 4 bits does on CPUs with bf16 instructions)
KINDS: dict[str, tuple[Any, float]] = {
    "bitsandbytes-4bit": (lambda: bitsandbytes_config(4), 1e-5),
    "bitsandbytes-4bit-double": (double_quantised, 1e-5),
    "bitsandbytes-8bit": (lambda: bitsandbytes_config(8), 3 / 254),
    "torchao-int8": (lambda: torchao_config(8), 1e-5),
    "torchao-int8-dynamic": (lambda: torchao_config(16), 3 / 254),
    "torchao-int4": (lambda: torchao_config(4), 1e-5),
}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By kind: the attributed model, and how far its parts may miss."""
    made: dict[str, tuple[DePass, float]] = {}

    def get(kind: str, name: str = "llama-biased") -> tuple[DePass, float]:
        config, bound = KINDS[kind]
        config = config()
        if kind + name not in made:
            wide = {"n_embd": 64, "n_inner": 128} if name.startswith("gpt2") else WIDE
            dp = DePass.from_pretrained(saved(tmp_path_factory.mktemp(kind), name, **wide), quantization=config)
            rounded = getattr(dp.bound.layers[0].only_mlp.down.module, "support_avx512bf16_for_cpu", False)
            made[kind + name] = dp, 3 / 254 if rounded else bound
        return made[kind + name]

    return get


def by_hand(module: Any) -> Tensor:
    """The weight of a quantised module, from what each format is documented to hold."""
    weight = module.weight
    if type(weight).__name__ == "Params4bit":
        state, packed = weight.quant_state, weight.data.view(torch.uint8).flatten().int()
        if getattr(state, "packing_format_for_cpu", False):  # 32 rows together, the second half of each 64 in high bits
            rows, columns = state.shape
            packed = packed.view(rows // 32, columns // 2, 32)
            codes = torch.cat([packed & 15, packed >> 4], -1).view(rows // 32, columns // 2, 32, 2)
            numbers = state.code[codes.transpose(1, 2).reshape(rows, columns)]
            return numbers * state.absmax.T.float().repeat_interleave(state.blocksize, 1)
        scales = state.absmax
        if state.nested:
            of = state.state2
            scales = (
                of.code[state.absmax.int()] * of.absmax.repeat_interleave(of.blocksize)[: len(scales)] + state.offset
            )
        numbers = state.code[torch.stack([packed >> 4, packed & 15], 1).flatten()]
        return (numbers * scales.repeat_interleave(state.blocksize)[: len(numbers)]).reshape(state.shape)
    if type(weight).__name__ == "Int8Params":
        scales = module.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * scales[:, None] / 127
    scales = weight.scale.reshape(len(weight), -1)
    made: Tensor = weight.qdata.float() * scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    return made


def test_a_weight_that_only_its_kernel_can_read_is_its_product_with_the_identity(
    quantised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dp, _ = quantised("torchao-int8")
    module = dp.bound.layers[0].only_mlp.down.module
    expected, lent = weights.dense(module), weights.lent_bytes(module, torch.float32)
    monkeypatch.setattr(weights, "_is_multiplied", lambda weight: True)
    torch.testing.assert_close(weights.dense(module), expected)
    assert weights.lent_bytes(module, torch.float32) == lent + 4 * module.in_features**2


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_quantised_model_add_up_to_its_own_logit(kind: str, quantised: Any) -> None:
    dp, bound = quantised(kind)
    ids = models.prompt(17)
    with torch.no_grad():
        own = dp.model(torch.tensor([ids])).logits[0, -1, [5, 7]]
    for sources in ("token", Heads(1), Neurons(1), Modules(0, "attn")):
        found = dp.attribute(ids, [5, 7], sources=sources, strict=True)
        exact = max(
            1e-6, bound if weights.rounds_inputs(dp.bound.layers[0].only_mlp.down.module) else 0
        )  # a rounding may turn over
        torch.testing.assert_close(found.target_logits, own, rtol=exact, atol=exact)
        assert float(found.conservation_error.max()) < bound
        assert found.settings.dtype == "float32, quantised"
    assert float(dp.sweep("heads", ids, 5, strict=True).conservation_error.max()) < bound


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_attributed_as_the_dense_one_of_its_weights(kind: str, quantised: Any) -> None:
    dp, bound = quantised(kind)
    dense = models.make("llama-biased", **WIDE)
    changed = 0
    for path, module in dp.model.named_modules():
        if isinstance(module, nn.Linear) and weights.is_packed(module):
            expected = by_hand(module)
            torch.testing.assert_close(weights.dense(module).float(), expected, rtol=1e-5, atol=1e-6)
            dense.get_submodule(path).weight.data.copy_(expected)
            changed += 1
    assert changed == models.LAYERS * 7
    ids = models.prompt(17)
    found, expected = (one.attribute(ids, [5, 7]).scores for one in (dp, DePass(dense)))
    # the sharing's temperature makes ten times as much of a difference in a pre-activation
    assert float((found - expected).norm() / expected.norm()) < 10 * bound


def test_gradients_that_a_kernel_does_not_pass_on_are_refused(quantised: Any) -> None:
    """The kernel for 8-bit activations has no gradient; the residual stream still carries one past it."""
    dp, _ = quantised("torchao-int8-dynamic")
    with pytest.raises(ModelError, match="does not pass gradients on to its embeddings by every path"):
        baselines.tokens(dp, "gradient_norm", [models.prompt(7)], 5)
    with pytest.raises(ModelError, match="by every path"):
        baselines.heads(dp, "attribution_patching", models.prompt(7), 5)


@pytest.mark.parametrize("kind", ["bitsandbytes-4bit", "bitsandbytes-8bit"])
def test_transposed_weights_are_quantised_as_their_transpose(kind: str, quantised: Any) -> None:
    dp, bound = quantised(kind, "gpt2")
    assert float(dp.attribute(models.prompt(17), [5, 7]).conservation_error.max()) < bound


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_s_dense_weights_are_in_memory_at_a_time(
    kind: str, quantised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dp, _ = quantised(kind)
    alive: dict[int, int] = {}
    most, read = [0], weights.dense

    def watched(module: Any, name: str = "weight") -> Tensor | None:
        made = read(module, name)
        if name == "weight" and isinstance(module, nn.Linear) and weights.is_packed(module):
            assert made is not None
            alive[id(made)] = made.nbytes
            weakref.finalize(made, alive.pop, id(made))
            most[0] = max(most[0], sum(alive.values()))
        return made

    monkeypatch.setattr(weights, "dense", watched)
    dp.attribute(models.prompt(17), 5)
    layer = dp.bound.layers[0]
    one = sum(part.module.out_features * part.module.in_features * 4 for part in layer.projections)
    assert 0 < most[0] <= one
    assert sum(weights.lent_bytes(part.module, torch.float32) for part in layer.projections) == one
    assert not alive


def test_the_plan_counts_packed_weights(tmp_path: Path) -> None:
    bitsandbytes_config(4)
    folder, cpu = saved(tmp_path, "llama", **WIDE), torch.device("cpu")
    whole = weight_bytes(bind(models.make("llama", **WIDE)))
    layers = [m for m in models.make("llama", **WIDE).model.layers.modules() if isinstance(m, nn.Linear)]
    dense = sum(m.weight.nbytes for m in layers)
    for quantization, packed in (
        ("8bit", sum(m.weight.numel() + 4 * m.out_features for m in layers)),
        ("4bit", sum(m.weight.numel() // 2 + m.weight.numel() // 16 for m in layers)),
    ):
        bounds = (
            DePass.from_pretrained(folder, quantization=quantization).bound,
            empty_model(folder, None, quantization),
        )
        tables = 4 * 16 * len(layers) if quantization == "4bit" else 0  # of the 16 numbers
        of_loaded, of_shapes = (make_plan(bound, 50, "token", cpu, 10**9, None) for bound in bounds)
        assert of_shapes.weights_bytes == whole - dense + packed
        assert of_shapes.weights_bytes <= of_loaded.weights_bytes <= of_shapes.weights_bytes + tables
        assert of_loaded.buffer_bytes == of_shapes.buffer_bytes
        assert (of_loaded.operations, of_loaded.rows) == (of_shapes.operations, of_shapes.rows)


def test_a_model_saved_quantised_is_loaded_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, ids = bitsandbytes_config(4), models.prompt(9)
    dp = DePass.from_pretrained(saved(tmp_path / "dense", "llama", **WIDE), quantization=config)
    packed = tmp_path / "packed"
    dp.model.save_pretrained(packed)
    tokens.make().save_pretrained(packed)
    torch.testing.assert_close(
        DePass.from_pretrained(packed).attribute(ids, 5).scores, dp.attribute(ids, 5).scores, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(
        OptionError, match=r"quantization='8bit': .* is already quantised by bitsandbytes; leave it out"
    ):
        DePass.from_pretrained(packed, quantization="8bit")
    assert empty_model(packed).is_quantized
    assert main(["attribute", "the cat", "-m", str(tmp_path / "dense"), "--quantization", "4bit", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["dtype"] == "float32, quantised"


def test_a_cpu_s_own_packing_of_4_bits_is_undone() -> None:
    """Some CPUs' first pass packs the weights anew; what it makes can be made anywhere."""
    bitsandbytes_config(4)
    import bitsandbytes

    pack = getattr(bitsandbytes.functional, "_convert_weight_packed_for_cpu", None)
    if pack is None:
        pytest.skip("this version of bitsandbytes packs no weights for a CPU")
    for nested in (False, True):
        module = bitsandbytes.nn.Linear4bit(192, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
                                            compress_statistics=nested)  # fmt: skip
        module = module.to(torch.bfloat16).to("cpu")
        expected = weights.dense(module)
        assert expected is not None
        module.weight.data, module.weight.quant_state = pack(module.weight.data, module.weight.quant_state)
        before = vars(module.weight.quant_state).copy()
        for _ in range(2):
            found = weights.dense(module)
            assert found is not None
            torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=0)  # its scales are bf16
            assert vars(module.weight.quant_state) == before
        assert module.weight.quant_state.packing_format_for_cpu


def test_a_plan_of_quantised_weights_needs_no_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path, "llama", **WIDE)
    assert main(["plan", "-m", folder, "--tokens", "9"]) == 0
    for kind in ("8bit", "4bit"):
        assert main(["plan", "-m", folder, "--tokens", "9", "--quantization", kind]) == 0
    dense, eight, four = (empty_model(folder, None, kind) for kind in (None, "8bit", "4bit"))
    assert weight_bytes(dense) > weight_bytes(eight) > weight_bytes(four)


def test_what_excludes_quantisation_says_so(quantised: Any) -> None:
    dp, _ = quantised("bitsandbytes-8bit")
    with pytest.raises(
        OptionError, match="stream_to needs an unquantised model in host memory, but this model is quantised"
    ):
        DePass(dp.model, stream_to="cpu")


# --- what is not loaded


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_other_quantisations_are_refused_by_name(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(ModelError, match=rf"is quantised by {method}, .* load the original model"):
        DePass.from_pretrained(folder)
    assert main(["plan", "-m", folder, "--tokens", "9"]) == 1
    assert f"is quantised by {method}, whose weights DePass cannot read" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_no_numbers_are_refused_by_name(dtype: torch.dtype) -> None:
    model = models.make("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(torch.zeros(down.weight.shape, dtype=dtype), requires_grad=False)
    said = (
        r"the down projection of layer 1 of LlamaForCausalLM holds torch.* \(Linear, quantised by gptq\); DePass reads"
    )
    with pytest.raises(ModelError, match=said):
        bind(model)
    del down.weight
    with pytest.raises(ModelError, match=r"holds no weight \(Linear, quantised by gptq\)"):
        bind(model)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(ModelError, match=r"only as pytorch_model.bin; a pickle can run .*save_pretrained\(DIRECTORY\)"):
        DePass.from_pretrained(folder)


def test_code_of_a_model_is_not_run_unless_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, ran = saved(tmp_path / "model", "llama"), tmp_path / "ran"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "owncode", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig):\n    model_type = 'owncode'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Own\n"
    )
    says = r"custom code .* does not run that code .*: read it, and if you trust it give trust_remote_code=True"
    with pytest.raises(ModelError, match=says):
        DePass.from_pretrained(folder)
    assert main(["plan", "-m", folder, "--tokens", "9"]) == 1
    assert "does not run that code" in capsys.readouterr().err
    assert not ran.exists()
    assert DePass.from_pretrained(folder, trust_remote_code=True).bound.origin == "inferred"
    assert ran.exists()
    assert main(["plan", "-m", folder, "--tokens", "9", "--trust-remote-code"]) == 1
    assert "unknown model family 'owncode'" in capsys.readouterr().err  # a plan loads no weights to infer it with


@pytest.mark.parametrize(
    ("options", "package", "says"),
    [
        (
            {"device_map": "auto"},
            "accelerate",
            r"device_map='auto' needs accelerate: pip install 'depass-kernels\[offload",
        ),
        ({"quantization": "4bit"}, "bitsandbytes", r"needs bitsandbytes: pip install 'depass-kernels\[quantized"),
    ],
)
def test_a_package_that_is_missing_is_named(
    options: Any, package: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from depass.models import loading

    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == package else "there")
    with pytest.raises(OptionError, match=says):
        DePass.from_pretrained(saved(tmp_path, "llama"), **options)


def test_options_that_there_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path, "llama")
    for given in ("3bit", {"quant_method": "gptq"}, 4):
        with pytest.raises(OptionError, match="quantization must be '8bit' or '4bit', or a transformers config"):
            DePass.from_pretrained(folder, quantization=given)
    with pytest.raises(OptionError, match=r"max_memory=.* needs a device_map over several devices"):
        DePass.from_pretrained(folder, max_memory={"cpu": "1GB"})
    for wrong, says in (
        (["--device-map", "auto", "--stream"], "--device-map auto chooses the devices itself"),
        (["--device-map", "auto", "--device", "cuda"], "--device-map auto chooses the devices itself"),
        (["--quantization", "4bit", "--stream"], "--stream does not support quantized weights"),
        (["--quantization", "2bit"], "invalid choice: '2bit'"),
    ):
        with pytest.raises(SystemExit) if "2bit" in wrong else nullcontext():
            assert main(["attribute", "x", "-m", folder, *wrong]) == 2
        assert says in capsys.readouterr().err


def test_a_map_that_says_where_everything_goes_needs_no_memory(accelerate: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"max_memory=.*has no effect with a dict as device_map"):
        DePass.from_pretrained(saved(tmp_path, "llama"), device_map={"": "cpu"}, max_memory={"cpu": "1GB"})


def test_weights_that_cannot_be_looked_at_are_not_called_finite(offloaded: Any) -> None:
    assert blame(offloaded("llama")[1].bound).startswith(
        "either an offloaded or quantised weight contains NaN or infinity"
    )


def test_a_transposed_weight_of_integers_is_refused() -> None:
    model = models.make("gpt2")
    packed = torch.zeros_like(model.transformer.h[0].attn.c_attn.weight, dtype=torch.uint8)
    model.transformer.h[0].attn.c_attn.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(
        ModelError, match=r"the value projection of layer 0 of GPT2LMHeadModel holds torch.uint8 weights"
    ):
        DePass(model)
