"""Generating tokens with the model's own ``generate``, and attributing them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..checks import integer
from ..errors import DePassError, GenerationWarning, MemoryLimitError, OptionError, first_line
from ..inputs.prompt import Prompt, encode
from ..inputs.targets import Token, check
from ..models.bound import BoundModel
from ..models.health import refuse_dropout
from ..models.positions import fresh
from ..results.generation import Generation
from ..sources.spans import Sentences, Spans, token_ranges, unit_ranges
from .attribute import attribute
from .passes import Engine
from .request import Case, Options, Progress, decompose, decomposed_layers

_OURS = (
    "input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids", "return_dict_in_generate",
    "num_return_sequences",
)  # fmt: skip


def generate(
    engine: Engine,
    prompt: Any,
    max_new_tokens: int,
    sources: Any,
    options: Options,
    sampling: dict[str, Any],
    progress: Progress | None = None,
) -> Generation:
    """Generate, then attribute every generated token; see :meth:`depass.DePass.generate`."""
    bound, tokenizer = engine.bound, engine.tokenizer
    refuse_dropout(bound)
    encoded = encode(prompt, tokenizer, bound)
    decompose(bound, tokenizer, encoded, sources, options)  # raises before anything is generated
    new = generated_ids(bound, tokenizer, encoded, max_new_tokens, sampling)
    whole = continued(encoded, new, tokenizer, bound)
    read = continued(encoded, new[:-1], tokenizer, bound)
    parts = decompose(bound, tokenizer, read, sources_of(encoded, read, sources), options)
    targets = [Token(token, len(encoded.ids) - 1 + i) for i, token in enumerate(new)]
    layers = decomposed_layers(parts, options.stop)
    case = Case(read, parts, tuple(check(targets, len(read.ids), layers, tokenizer, bound)))
    _warn_of_switch(bound, len(encoded.ids), len(read.ids))
    (result,) = attribute(engine, [case], options, progress)
    if isinstance(result, DePassError):
        raise result
    tokens = whole.tokens[len(encoded.ids) :]
    return Generation("".join(tokens), tokens, tuple(new), result)


def generated_ids(
    bound: BoundModel, tokenizer: Any, prompt: Prompt, max_new_tokens: int, sampling: dict[str, Any]
) -> list[int]:
    """The ids that the model's own ``generate`` appends to a prompt, at least one.

    Raises:
        OptionError: ``generate`` rejects an option, or the tokens exceed the model's positions.
        MemoryLimitError: there is too little memory.
    """
    if integer("max_new_tokens", max_new_tokens, OptionError) < 1:
        raise OptionError(f"max_new_tokens must be a positive integer, got {max_new_tokens!r}")
    for name in _OURS:
        if name in sampling:
            raise OptionError(
                f"generate({name}=...) is set by DePass, which generates one sequence from one prompt; leave it out"
            )
    length, limit = len(prompt.ids), bound.max_positions
    if limit is not None and length + max_new_tokens > limit:
        raise OptionError(
            f"max_new_tokens={max_new_tokens} and a prompt of {length} tokens exceed the limit of {bound.name}, which has "
            f"{limit} positions; generate fewer"
        )
    sampling = _completed(bound, tokenizer, sampling)
    ids = torch.tensor([prompt.ids], device=bound.input_device)
    try:
        with fresh(bound.backbone, bound.switches):
            sequences = bound.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=False,
                num_return_sequences=1,  # the model's own generation config may ask for more, padded to the longest
                **sampling,
            )
    except Exception as error:  # transformers' and the model's own code may raise anything
        from ..device_memory import asked_bytes

        if asked_bytes(error) is not None:
            raise MemoryLimitError(
                f"out of memory while generating {max_new_tokens} tokens after a prompt of {length} tokens; generate fewer"
            ) from error
        raise OptionError(f"the model's generate rejected these options: {first_line(error)}") from error
    if sequences[0, :length].tolist() != list(prompt.ids):
        raise OptionError(
            f"the model's generate changed the prompt of {length} tokens; leave out the option that does so"
        )
    ids_after: list[int] = sequences[0, length:].tolist()
    return ids_after


def _completed(bound: BoundModel, tokenizer: Any, sampling: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``generate`` with the tokenizer and the padding that some options need.

    Raises:
        OptionError: an option, given or in the model's generation config, changes the prompt.
    """
    config = sampling.get("generation_config") or bound.model.generation_config
    if isinstance(config, Mapping):
        raise OptionError(
            "generation_config must be transformers' GenerationConfig, got a dict; pass its entries as arguments: **config"
        )
    chosen = {name: sampling.get(name, getattr(config, name, None)) for name in ("token_healing", "stop_strings")}
    if chosen["token_healing"]:
        raise OptionError("token_healing changes the last token of the prompt; pass token_healing=False")
    if chosen["stop_strings"] and tokenizer is not None:
        sampling = {"tokenizer": tokenizer, **sampling}
    if getattr(config, "pad_token_id", None) is None:  # nothing is padded, but generate warns without one
        sampling = {"pad_token_id": 0, **sampling}
    return sampling


def _warn_of_switch(bound: BoundModel, prompt: int, last: int) -> None:
    """Warn where the position encoding changed between the first generated token and the last."""
    if bound.regime(prompt) != bound.regime(last):
        switch = next(switch for switch in bound.switches if switch.regime(prompt) != switch.regime(last))
        warnings.warn(
            f"the model's position encoding ({switch.kind}) changes beyond {switch.positions} tokens; the tokens are "
            f"explained by one pass over {last} tokens, whose logits differ from those that earlier tokens were generated "
            "with; for those, generate fewer tokens",
            GenerationWarning, stacklevel=4,
        )  # fmt: skip


def continued(prompt: Prompt, new: Sequence[int], tokenizer: Any, bound: BoundModel) -> Prompt:
    """The prompt followed by new ids; the prompt's own tokens and offsets do not change."""
    whole, length = encode([*prompt.ids, *new], tokenizer, bound, generated=True), len(prompt.ids)
    if prompt.text is None or whole.text is None:
        return whole
    tokens = whole.tokens[length:]
    text, offsets = prompt.text + "".join(tokens), list(prompt.offsets)
    shift = len(prompt.text) - sum(map(len, whole.tokens[:length]))
    offsets += [(begin + shift, end + shift) for begin, end in whole.offsets[length:]]
    special = prompt.special | {index for index in whole.special if index >= length}
    return Prompt((*prompt.ids, *new), (*prompt.tokens, *tokens), text, tuple(offsets), special)


def sources_of(prompt: Prompt, whole: Prompt, sources: Any) -> Any:
    """The given sources of the prompt, and every further token as a separate source."""
    if sources == "token" or not isinstance(sources, (str, Sentences, Spans)):
        return sources
    labels: Sequence[str] | None = None
    if isinstance(sources, Spans):
        ranges, labels = token_ranges(prompt, sources), sources.labels
    else:
        ranges = unit_ranges(prompt, sources)
    if labels is None:
        labels = ["".join(prompt.tokens[begin:end]) for begin, end in ranges]
    further = range(len(prompt.ids), len(whole.ids))
    return Spans([*ranges, *((t, t + 1) for t in further)], labels=[*labels, *(whole.tokens[t] for t in further)])
