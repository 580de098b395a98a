"""The questions that :mod:`depass.models.infer` asks about a layer's attention, one a function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from .bound import Projection
from .families import MixGateRows, ValueRows
from .trial import Attention, Call, InferenceError, LayerTrial, close, same


@dataclass
class AttentionAnswers:
    """What the trial pass says about the attention of the first layer, with the names of a family's fields."""

    attention: str
    value: Call
    value_rows: ValueRows
    output: Call
    attention_norm: Call | None
    attention_post_norm: Call | None
    latent: Call | None = None
    latent_norm: Call | None = None
    mix_gate: Call | None = None
    mix_gate_rows: MixGateRows = "all"
    mix_norm: Call | None = None
    sinks: str | None = None


def ask(layer: LayerTrial, config: Any) -> AttentionAnswers:
    """Answer the questions about the attention.

    Raises:
        InferenceError: one of them has no answer.
    """
    seen, path = _attention(layer)
    _refuse_heads_by_layer(config)
    heads = config.num_attention_heads
    value, value_rows = _value(layer, seen.values, heads)
    before, latent = layer.norm_before(value), None
    if before is not None:
        latent = _latent(layer, before)
    attention_norm = before if latent is None else layer.norm_before(latent)
    answers = AttentionAnswers(path, value, value_rows, value, attention_norm, None, latent)
    answers.latent_norm = None if latent is None else before
    _ask_of_the_mix(answers, layer, seen.output, heads)
    answers.attention_post_norm = next((norm for norm in layer.norms if same(norm.read, answers.output.written)), None)
    answers.sinks = _sinks(seen, path)
    return answers


def _refuse_heads_by_layer(config: Any) -> None:
    try:
        _ = config.num_attention_heads
    except Exception as error:  # a config with numbers for each layer raises more than AttributeError
        raise InferenceError("its config has no num_attention_heads that holds for all layers") from error


def _attention(layer: LayerTrial) -> tuple[Attention, str]:
    """Which module calls the attention function? With the call."""
    if not layer.attention:
        raise InferenceError(f"{layer.name} does not call transformers' AttentionInterface")
    if len(layer.attention) > 1:
        raise InferenceError(f"{layer.name} calls transformers' AttentionInterface {len(layer.attention)} times")
    seen = layer.attention[0]
    return seen, next(path for path, each in layer.whole.module.named_modules() if each is seen.module)


def _value(layer: LayerTrial, values: Tensor, heads: int) -> tuple[Call, ValueRows]:
    """Which projection writes the values, and in which of its rows?"""
    for call in layer.linears:
        for rows in get_args(ValueRows):
            if same(_columns(call.written, rows, values.shape[1], heads), values):
                return call, rows
    raise InferenceError("no projection's output holds the values that the attention function gets")


def _columns(written: Tensor, rows: str, width: int, heads: int) -> Tensor | None:
    """The columns ``[P, width]`` of a fused projection's output, or None where it has another width."""
    whole = written.shape[1]
    fits = {
        "all": width == whole,
        "last": width < whole,
        "end_of_head": width < whole and width % heads == 0 and whole % heads == 0,
    }
    if not fits.get(rows, 3 * width == whole and width % max(heads, 4) == 0):
        return None
    named = {"last": f"last:{width}", "end_of_head": f"end_of_head:{width // heads}"}
    return Projection(None, named.get(rows, rows), heads).select_output(written)


def _latent(layer: LayerTrial, norm: Call) -> Call | None:
    """Of which projection are the first outputs what the norm before the values reads? None where it reads the stream."""
    width = norm.read.shape[1]
    return next((call for call in layer.linears if same(call.written[:, :width], norm.read)), None)


def _ask_of_the_mix(answers: AttentionAnswers, layer: LayerTrial, mixed: Tensor, heads: int) -> None:
    """Which projection reads the attention's output, or its product with a gate, or what a norm makes of it?"""
    norms = [(norm.written, norm) for norm in layer.norms if same(norm.read, mixed)]
    outputs = [call for call in layer.linears if call.written.shape == layer.whole.read.shape]
    for read, norm in [(mixed, None), *norms]:
        answers.output = next((call for call in outputs if same(call.read, read)), answers.output)
        if answers.output is not answers.value:
            answers.mix_norm = norm
            return
    for gated, gate, rows in _gated(layer, mixed, heads):
        for call in outputs:
            if close(gated, call.read):
                answers.output, answers.mix_gate, answers.mix_gate_rows = call, gate, rows
                return
    raise InferenceError(
        "no projection reads the output of the attention function as it is, after a norm, or times the sigmoid of a "
        "projection"
    )


def _gated(layer: LayerTrial, mixed: Tensor, heads: int) -> Iterator[tuple[Tensor, Call, MixGateRows]]:
    """The products of the attention's output and the sigmoids of projections, with each number or each head gated."""
    width = mixed.shape[1]
    for call in layer.linears:
        for rows in get_args(MixGateRows):
            wanted = (width, heads) if rows == "all" else (2 * width, 2 * heads)
            if call.written.shape[1] in wanted:
                gate = Projection(None, rows, heads).select_output(call.written).sigmoid()
                yield mixed * gate.repeat_interleave(width // gate.shape[1], 1), call, rows


def _sinks(seen: Attention, path: str) -> str | None:
    """Do attention sinks scale what the heads mix? The check compares how."""
    if close(seen.product, seen.output):
        return None
    if any(name == "sinks" for name, _ in seen.module.named_parameters(recurse=False)):
        return f"{path}.sinks"
    return None  # the check says what differs
