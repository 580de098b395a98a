"""Components are what the model's own modules put out. Conservation cannot tell: the remainder hides what they lack."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import models
import pytest
import torch
from torch import Tensor

from depass import DePass, Heads, Modules, RoutedExperts
from depass.models.capture import Capture
from depass.models.families import FAMILIES, Family
from depass.models.trace import Trace
from depass.sources.decompose import decompose_components

IDS = models.prompt(6)


class Starts(Capture):
    """The first vectors of a spec's sources, ``[M, N, D]``, by label."""

    def __init__(self, dp: DePass, spec: Any) -> None:
        super().__init__(dp.bound, [IDS], range(spec.layer + 1))
        self.parts = decompose_components(spec, len(IDS), dp.bound)

    def layer(self, index: int, trace: Trace) -> None:
        if index != self.parts.layer:
            return
        layout, sources = self.parts.layout, self.parts.sources
        rows = torch.zeros(layout.rows, trace.stream.shape[1], dtype=torch.float64, device=trace.stream.device)
        self.parts.fill(rows, trace)
        by_position = rows.split(layout.row_start.diff().tolist())
        dense = torch.zeros(len(sources), len(IDS), rows.shape[1], dtype=torch.float64)
        for position, own in enumerate(by_position):
            dense[: len(own), position] = own.cpu()
        self.rows = dict(zip([source.label for source in sources], dense, strict=True))


def starts(dp: DePass, spec: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        run = Starts(dp, spec)
        run.run()
    return run.rows


class Seen:
    """What the modules of a layer got and put out in a plain pass of the model: the last arguments and output of each."""

    def __init__(self, model: Any, layer: Any, paths: Sequence[str]) -> None:
        self.layer = layer
        self.got: dict[str, tuple[Any, ...]] = {}
        self.put: dict[str, Tensor] = {}
        with ExitStack() as stack, torch.no_grad():
            for path in paths:
                hook = layer.get_submodule(path).register_forward_hook(self._hook(path), with_kwargs=True)
                stack.callback(hook.remove)
            model(torch.tensor([IDS], device=model.device), use_cache=False)

    def _hook(self, path: str) -> Any:
        def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.got[path] = (*args, *kwargs.values())
            self.put[path] = flat(output[0] if isinstance(output, tuple) else output)

        return keep

    def normed(self, raw: Tensor, norm: str | None, *parts: Tensor) -> list[Tensor]:
        """The whole output and parts of it after the norm on outputs: its frozen scale and weight, by numbers."""
        if norm is None:
            return [raw, *parts]
        scale = self.put[norm] / raw
        return [self.put[norm], *(part * scale for part in parts)]


def flat(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).double().cpu()


def blocks(family: Family, layer: Any) -> list[str]:
    """The modules whose outputs are added up to the MLP's output."""
    paths = [path for path in (family.experts, family.shared_down) if path is not None and has(layer, path)]
    if family.single and not has(layer, family.down) and not paths:
        return []
    if not paths or family.experts not in paths:
        return [family.down.rpartition(".")[0] or family.down]  # an OPT layer has no module for its MLP
    if family.experts_post_norm is not None and family.shared_post_norm is not None:
        return [family.experts_post_norm, family.shared_post_norm]
    inside = family.experts.rpartition(".")[0]
    return [inside, *(path.rpartition(".")[0] for path in paths[1:] if not path.startswith(f"{inside}."))]


def has(layer: Any, path: str) -> bool:
    return any(name == path for name, _ in layer.named_modules())


def close(got: Tensor, own: Tensor, post_norm: str | None, size: Tensor) -> None:
    # norms compute in fp32 whatever the dtype, and so does the sum of HY-V3's experts and its shared one
    assert (got - own).abs().max() <= (1e-5 if post_norm else 1e-6) * size.abs().max()
    assert own.shape == got.shape


def looked_at(dp: DePass, index: int) -> tuple[Any, Family, Seen, float]:
    model = dp.model
    family = FAMILIES[model.config.model_type]
    layer = model.get_submodule(f"{family.backbone}.{family.layers}")[index]
    experts = [family.experts] if family.experts is not None and has(layer, family.experts) else []
    norms = [
        norm for norm in (family.attention_post_norm, family.mlp_post_norm) if norm is not None and has(layer, norm)
    ]
    norms += [norm for norm in (family.experts_post_norm,) if experts and norm is not None]
    own = [path for module, output, _ in mixing(family, layer) for path in (module, output)]
    paths = [*own, *blocks(family, layer), *experts, *norms]
    factor = getattr(model.config, family.residual_factor) if family.residual_factor else 1.0
    return layer, family, Seen(model, layer, paths), factor


def mixing(family: Family, layer: Any) -> list[tuple[str, str, float]]:
    """The modules that mix positions, their output projections, and what the layer multiplies their outputs by."""
    found = []
    if has(layer, family.output):
        found.append((family.attention, family.output, getattr(layer, "attn_out_multiplier", 1.0)))  # Falcon-H1's
    if has(layer, f"{family.recurrence}.out_proj"):
        found.append(
            (str(family.recurrence), f"{family.recurrence}.out_proj", getattr(layer, "ssm_out_multiplier", 1.0))
        )
    return found


def heads_of(dp: DePass, module: Any) -> int:
    """How many heads a module that mixes positions has."""
    own = next((getattr(module, name) for name in ("num_v_heads", "A_log") if hasattr(module, name)), None)
    return dp.model.config.num_attention_heads if own is None else own if isinstance(own, int) else len(own)


def post_norm(layer: Any, path: str | None) -> str | None:
    there = path is not None and has(layer, path) and not isinstance(layer.get_submodule(path), torch.nn.Identity)
    return path if there else None


@pytest.mark.parametrize("name", models.EVERY)
def test_modules_and_heads_are_what_the_modules_put_out(name: str, device: str) -> None:
    dp = DePass(models.make(name, torch.float64, device))
    for index in range(models.LAYERS):
        compare(dp, index)


def compare(dp: DePass, index: int) -> None:
    layer, family, seen, factor = looked_at(dp, index)
    norm, total, first = post_norm(layer, family.attention_post_norm), torch.zeros(()), 0
    mixers = mixing(family, layer)
    rows = starts(dp, Heads(index)) if mixers else {}
    for module, written_by, outside in mixers:
        removed = parts_of(seen, layer, written_by, heads_of(dp, layer.get_submodule(module)))
        attention, *heads = (part * outside for part in seen.normed(seen.put[module], norm, *removed))
        for head, own in enumerate(heads, start=first):
            close(rows[f"L{index}H{head}"], own * factor, norm, attention)
        total, first = total + attention, first + len(heads)
    assert not mixers or f"L{index}H{first}" not in rows
    modules = blocks(family, layer)
    assert mixers or modules
    if mixers:
        close(starts(dp, Modules(index, "attn"))[f"L{index}.attn"], total * factor, norm, total)
    if modules:
        norm = post_norm(layer, family.mlp_post_norm)
        whole = torch.stack([seen.put[path] for path in modules]).sum(0)
        (mlp,) = seen.normed(whole, norm)
        close(starts(dp, Modules(index, "mlp"))[f"L{index}.mlp"], mlp * factor, norm, mlp)


def parts_of(seen: Seen, layer: Any, written_by: str, count: int) -> list[Tensor]:
    """What each head adds to the output of a projection: what is missing without it."""
    mixed, output = seen.got[written_by][0].detach(), layer.get_submodule(written_by)
    width, removed = mixed.shape[-1] // count, []
    for head in range(count):
        without = mixed.clone()
        without[..., head * width : (head + 1) * width] = 0
        with torch.no_grad():
            removed.append(flat(output(mixed) - output(without)))
    return removed


def alone(module: Any, seen: Seen, family: Family, expert: int) -> tuple[Tensor, Tensor | None, bool]:
    """What an expert puts out ``[N, D]``, what its bias adds to that or None, and whether a position chose it."""
    assert family.experts is not None
    if family.input_router is not None:  # the experts' rows follow one another
        weights = seen.got[family.experts][0].view(len(module.down_proj), len(IDS), -1)
        rows = seen.put[family.experts].view(len(module.down_proj), len(IDS), -1)
        return rows[expert], None, bool(weights[expert].any())
    x, *others = seen.got[family.experts]
    chosen, weight = sorted(others[:2], key=torch.is_floating_point)
    own = torch.where(chosen == expert, weight, 0)
    with torch.no_grad():
        output = flat(module(x, chosen, own))
    bias = flat(own.sum(1, keepdim=True) * module.down_proj_bias[expert]) if module.has_bias else None
    return output, bias, bool((chosen == expert).any())


@pytest.mark.parametrize("name", models.WITH_EXPERTS)
def test_routed_experts_are_what_each_puts_out_alone(name: str, device: str) -> None:
    dp = DePass(models.make(name, torch.float64, device))
    for index in dp.bound.expert_layers:
        layer, family, seen, factor = looked_at(dp, index)
        assert family.experts is not None
        module = layer.get_submodule(family.experts)
        count = len(module.down_proj)
        rows, norm = starts(dp, RoutedExperts(index)), post_norm(layer, family.mlp_post_norm)
        whole = torch.stack([seen.put[path] for path in blocks(family, layer)]).sum(0)
        total = seen.normed(whole, norm)[0] if norm else seen.put[family.experts]
        biases = torch.zeros_like(whole)
        if family.input_router is not None:
            total = seen.put["feed_forward"]
        for expert in range(count):
            own, bias, is_chosen = alone(module, seen, family, expert)
            if bias is not None:
                own, biases = own - bias, biases + bias
            own = seen.normed(seen.put[family.experts], family.experts_post_norm, own)[1]
            own = seen.normed(whole, norm, own)[1]
            close(rows[f"L{index}E{expert}"], own * factor, norm, total)
            assert own.any() == is_chosen
        if "bias" in rows:
            close(rows["bias"], seen.normed(whole, norm, biases)[1] * factor, norm, total)
        assert len(rows) == count + 1 + ("bias" in rows)
