"""DePass as the paper on Dual Path Attribution ran it, in loops: left-padded batches, one element of a chunk at a time.

It reads a Llama, Mistral or Qwen model of transformers by its modules' names, and shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def scale(stream: Tensor) -> Tensor:
    return 1 / (stream.double().pow(2).mean(-1, keepdim=True) + 1e-7).sqrt()


class Run:
    """One pass over a left-padded batch: what the elements' passes freeze."""

    def __init__(self, model: Any, ids: Tensor, mask: Tensor) -> None:
        kept: dict[str, Tensor] = {}
        hooks = []

        def before(name: str) -> Any:
            return lambda _, inputs: kept.__setitem__(name, inputs[0].detach().double())

        for i, layer in enumerate(model.model.layers):
            hooks.append(layer.input_layernorm.register_forward_pre_hook(before(f"attention {i}")))
            hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(before(f"mlp {i}")))
            hooks.append(layer.mlp.down_proj.register_forward_pre_hook(before(f"hidden {i}")))
        hooks.append(model.model.norm.register_forward_pre_hook(before("last")))
        with torch.no_grad():
            out = model(ids, attention_mask=mask, output_attentions=True)
        for hook in hooks:
            hook.remove()
        self.kept, self.patterns = kept, [pattern.double() for pattern in out.attentions]
        self.embeddings = model.model.embed_tokens(ids).detach().double()


def linear(module: Any, x: Tensor) -> Tensor:
    out = x @ module.weight.detach().double().T
    return out if module.bias is None else out + module.bias.detach().double()


def scores(
    model: Any, prompts: Sequence[Sequence[int]], targets: Sequence[int], contexts: Sequence[range], chunk: int
) -> list[dict[int, float]]:
    """For each prompt, its context's scores by position."""
    longest = max(map(len, prompts))
    pads = [longest - len(ids) for ids in prompts]
    ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in zip(pads, prompts, strict=True)])
    run = Run(model, ids, mask)
    row = [(b, pads[b] + t) for b, context in enumerate(contexts) for t in context]
    found: list[dict[int, float]] = [{} for _ in prompts]
    for begin in range(0, len(row), chunk):
        elements = row[begin : begin + chunk]
        for b in sorted({b for b, _ in elements}):
            mine = [t for owner, t in elements if owner == b]
            rest = [t for t in range(pads[b], longest) if t not in mine]
            groups = [[t] for t in mine] + ([rest] if rest else [])
            for t, logit in zip(mine, pushed(model, run, b, groups, targets[b]), strict=False):
                found[b][t - pads[b]] = logit
    return found


def pushed(model: Any, run: Run, b: int, groups: Sequence[Sequence[int]], target: int) -> list[float]:
    """The target's logit of each group of positions of prompt ``b``."""
    states = []
    for group in groups:
        state = torch.zeros_like(run.embeddings[b])
        for t in group:
            state[t] = run.embeddings[b, t]
        states.append(state)
    for i, layer in enumerate(model.model.layers):
        states = [state + attended(layer, run, i, b, state) for state in states]
        gates = []
        for state in states:
            normed = state * scale(run.kept[f"mlp {i}"][b]) * layer.post_attention_layernorm.weight.detach().double()
            gates.append(linear(layer.mlp.gate_proj, normed).exp())
        total = sum(gates)
        hidden = run.kept[f"hidden {i}"][b]
        states = [state + linear(layer.mlp.down_proj, gate / total * hidden)
                  for state, gate in zip(states, gates, strict=True)]  # fmt: skip
    last = scale(run.kept["last"][b, -1]) * model.model.norm.weight.detach().double()
    return [float(linear(model.lm_head, state[-1] * last)[target]) for state in states]


def attended(layer: Any, run: Run, i: int, b: int, state: Tensor) -> Tensor:
    normed = state * scale(run.kept[f"attention {i}"][b]) * layer.input_layernorm.weight.detach().double()
    values, pattern = linear(layer.self_attn.v_proj, normed), run.patterns[i][b]
    width = layer.self_attn.head_dim
    per_group = pattern.shape[0] // (values.shape[-1] // width)
    mixed = [
        pattern[h] @ values[:, (h // per_group) * width : (h // per_group + 1) * width] for h in range(len(pattern))
    ]
    return linear(layer.self_attn.o_proj, torch.cat(mixed, -1))
