"""inseq: DePass as its attribution method ``depass``. Importing this module registers it.

::

    import inseq
    import depass.compat.inseq

    model = inseq.load_model(hf_model, "depass", tokenizer=tokenizer)
    out = model.attribute("The Colosseum is in", attributed_fn="logit", outputs="tokens")  # or "layers", "heads"

``python -m depass.compat.inseq attribute -m MODEL -a depass -fn logit -i TEXT`` is inseq's command with the method in it.
Tried with inseq 0.7.1, whose internals this follows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from depass_kernels import SourceLayout

from ..api import DePass
from ..engine import request
from ..engine.scores import judge
from ..engine.sweeps import grouped, sweep
from ..errors import DePassError, OptionError, PromptError, TargetError
from ..inputs.prompt import encode
from ..inputs.targets import Contrast, Token, check
from ..models.bound import BoundModel
from ..models.trace import Trace
from ..propagation.needs import room
from ..sources.components import Heads
from ..sources.decompose import decompose_components
from ..sources.source import Decomposition, Source

try:
    from inseq.attr.feat import InternalsAttributionRegistry
    from inseq.attr.feat.attribution_utils import check_attribute_positions
    from inseq.attr.step_functions import STEP_SCORES_MAP, contrast_logits_diff_fn, logit_fn
    from inseq.data import CoarseFeatureAttributionStepOutput, MultiDimensionalFeatureAttributionStepOutput
    from inseq.utils import get_aligned_idx
    from inseq.utils.typing import InseqAttribution
except ImportError as error:
    raise DePassError(
        f"depass.compat.inseq needs inseq 0.7.1 ({error}): pip install 'depass-kernels[inseq]'"
    ) from error

_OUTPUTS = ("tokens", "layers", "heads")


class _Method(InseqAttribution):
    """What inseq calls with one batch; the arguments of :meth:`attribute` are those that its users may give."""

    def __init__(self, attribution_model: Any) -> None:
        super().__init__(attribution_model)
        self.dp = DePass(attribution_model.model, attribution_model.tokenizer)
        self.start = 1  # the first position that is scored, padding included
        self.rest: list[dict[str, Tensor]] = []  # by sequence and name: [targets], what stands beside the table

    def attribute(
        self,
        inputs: Any,
        additional_forward_args: Any,
        outputs: Literal["tokens", "layers", "heads"] = "tokens",
        start_layer: int = 0,
        mlp_rule: str | None = None,
        temperature: float | None = None,
        exclude_bos: bool | Literal["auto"] | None = None,
    ) -> Any:
        """Attribute every target of a batch of prefixes, each from one pass.

        Args:
            inputs: not used: the ids are in the next.
            additional_forward_args: prefixes' ids ``[B, N]``, last targets, attributed function, mask ``[B, N]``, whether
                embeddings are used, names and values of the attributed function's own arguments.
            outputs: ``"tokens"``: ``[B, N, N]``. ``"layers"``: ``[B, N, N, L]``, the tokens of the stream that enters each
                layer. ``"heads"``: ``[B, N, N, L, H]``, what each head wrote at each position.
            start_layer: see :meth:`DePass.attribute`, as the others.
            mlp_rule: see there.
            temperature: see there.
            exclude_bos: see there.

        Returns:
            A step output of inseq, whose column ``j`` scores token ``j + 1``.
        """
        if outputs not in _OUTPUTS:
            raise OptionError(f"outputs={outputs!r}; there are: {', '.join(_OUTPUTS)}")
        if outputs != "tokens" and start_layer != 0:
            raise OptionError(f"start_layer={start_layer}: outputs={outputs!r} decomposes at every layer; leave it out")
        if outputs == "heads" and exclude_bos:
            raise OptionError(f"exclude_bos={exclude_bos!r}: heads are no tokens; leave it out")
        ids, last, attributed_fn, mask, _, names, *values = additional_forward_args
        asked = _Asked(self.forward_func, attributed_fn, dict(zip(names, values, strict=True)), len(ids))
        options = {"mlp_rule": mlp_rule, "temperature": temperature}
        padded = ids.shape[1]
        tables, self.rest = [], []
        for own, kept, following in zip(ids, mask.bool(), last.flatten().tolist(), strict=True):
            prefix = own[kept].tolist()
            pad = padded - len(prefix)
            if not prefix or bool(kept[:pad].any()):
                raise PromptError("a sequence is not padded on its left; set tokenizer.padding_side = 'left'")
            whole = [*prefix, following]
            first = max(self.start - pad, 1)
            targets = [asked.of(whole[t], t - 1, t + pad) for t in range(first, len(whole))]
            if outputs == "heads":
                scores, beside = _heads(self.dp, prefix, targets, **options)
            elif outputs == "layers":
                scores, beside = _layers(self.dp, prefix, targets, exclude_bos, **options)
            else:
                scores, beside = _tokens(self.dp, prefix, targets, start_layer, exclude_bos, **options)
            table = torch.full((padded, padded, *scores.shape[2:]), math.nan)
            table[pad:, pad + first - 1 :] = scores
            tables.append(table)
            blank = torch.full((padded + 1 - self.start - len(targets),), math.nan)
            self.rest.append({name: torch.cat([blank, row]) for name, row in beside.items()})
        stacked = torch.stack(tables)
        if outputs == "tokens":
            return CoarseFeatureAttributionStepOutput(source_attributions=None, target_attributions=stacked)
        return MultiDimensionalFeatureAttributionStepOutput(
            source_attributions=None, target_attributions=stacked, _num_dimensions=stacked.dim() - 3
        )


class DePassInseqAttribution(InternalsAttributionRegistry):
    """The method ``depass`` of inseq.

    What the model's biases contribute, and with heads the stream without them (``rest``), has no place in inseq's table. It
    stands beside it as step scores, with the logit that a column and these add up to.

    Args:
        attribution_model: inseq's model.

    Raises:
        ModelError: a model that cannot be attributed.
    """

    method_name = "depass"

    def __init__(self, attribution_model: Any) -> None:
        super().__init__(attribution_model)
        self.attribute_batch_ids, self.forward_batch_embeds = True, False
        self.is_final_step_method = True  # one pass for all targets
        self.method = _Method(attribution_model)

    def attribute(self, batch: Any, **options: Any) -> Any:
        """As inseq's own, for functions that DePass adds up to.

        Raises:
            OptionError: an attributed function other than ``logit`` and ``contrast_logits_diff``, or step scores.
        """
        if options.get("step_scores"):
            raise OptionError(
                f"step_scores={options['step_scores']}: depass is done in one pass and makes none; attribute once more with "
                "method='dummy'"
            )
        if options.get("attribute_target"):
            raise OptionError("attribute_target=True: depass always attributes to the whole prefix; leave it out")
        _check_attributed(options["attributed_fn"])
        length = batch.max_generation_length
        self.method.start, _ = check_attribute_positions(
            length, options.get("attr_pos_start"), options.get("attr_pos_end")
        )
        found = super().attribute(batch, **options)
        for sequence, rest in zip(found.sequence_attributions, self.method.rest, strict=True):
            count = sequence.target_attributions.shape[1]
            sequence.step_scores = {name: row[len(row) - count :] for name, row in rest.items()}
        return found

    def attribute_step(self, attribute_fn_main_args: dict[str, Any], attribution_args: dict[str, Any]) -> Any:
        """One batch; see :meth:`_Method.attribute`."""
        return self.method.attribute(**attribute_fn_main_args, **attribution_args)


class _Asked:
    """What is attributed: each target's logit, or the difference from that of the contrastive text's token."""

    def __init__(self, model: Any, attributed_fn: Callable[..., Any], given: dict[str, Any], rows: int) -> None:
        _check_attributed(attributed_fn)
        self.others: list[int] | None = None
        if attributed_fn is logit_fn:
            return
        if given.get("contrast_sources") is not None:
            raise OptionError("contrast_sources are for encoder-decoder models; give contrast_targets")
        if given.get("contrast_force_inputs"):
            raise OptionError("contrast_force_inputs=True: depass contrasts two tokens after one and the same prefix")
        texts = given.get("contrast_targets")
        if texts is None or rows != 1:
            raise OptionError(f"contrast_logits_diff needs contrast_targets and one sequence, got {texts!r} and {rows}")
        special = not given.get("skip_special_tokens", False)
        self.others = model.encode(texts, add_special_tokens=special).input_ids[0].tolist()
        self.alignments = given["contrast_targets_alignments"]
        if self.alignments and isinstance(self.alignments[0], list):
            self.alignments = self.alignments[0]

    def of(self, token: int, position: int, padded: int) -> Token | Contrast:
        """The target ``token`` after ``position``; ``padded`` is its own place in inseq's sequence."""
        if self.others is None:
            return Token(token, position)
        where = get_aligned_idx(padded, self.alignments)
        if not 0 <= where < len(self.others):
            raise TargetError(
                f"no token of contrast_targets is aligned to token {padded}; give contrast_targets_alignments"
            )
        return Contrast(token, self.others[where], position)


def _check_attributed(attributed_fn: Any) -> None:
    if attributed_fn in (logit_fn, contrast_logits_diff_fn):
        return
    names = [name for name, known in STEP_SCORES_MAP.items() if known is attributed_fn]
    name = names[0] if names else getattr(attributed_fn, "__name__", attributed_fn)
    raise OptionError(
        f"attributed_fn={name!r}: depass adds up to logits; give attributed_fn='logit' or 'contrast_logits_diff' (inseq's "
        "default is 'probability')"
    )


def _tokens(
    dp: DePass, ids: Sequence[int], targets: Sequence[Any], layer: int, exclude_bos: Any, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """``[N, targets]``, the scores of the tokens; and what stands beside them, ``[targets]`` each."""
    found = dp.attribute(list(ids), list(targets), start_layer=layer, exclude_bos=exclude_bos, **options)
    bias = found.scores.shape[1] - len(ids)
    beside = {"logit": found.target_logits}
    if bias:
        beside["bias"] = found.scores[:, :bias].sum(1)
    return found.scores[:, bias:].T, beside


def _layers(
    dp: DePass, ids: Sequence[int], targets: Sequence[Any], exclude_bos: Any, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """``[N, targets, L]``, the scores of the tokens of the stream that enters each layer; and what stands beside them."""
    made = [_tokens(dp, ids, targets, layer, exclude_bos, **options) for layer in range(len(dp.bound.layers))]
    beside = {"logit": made[0][1]["logit"]}
    beside |= {f"L{layer}.bias": one["bias"] for layer, (_, one) in enumerate(made) if "bias" in one}
    return torch.stack([scores for scores, _ in made], -1), beside


@torch.no_grad()
def _heads(dp: DePass, ids: Sequence[int], targets: Sequence[Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """``[N, targets, L, H]``, of every layer the scores of what each head wrote at each position; and the rests."""
    bound, made = dp.bound, encode(list(ids), dp.tokenizer, dp.bound)
    asked = check(list(targets), len(ids), range(0), dp.tokenizer, bound)
    chosen = request.options(dp.engine.defaults, bound, exclude_bos=False, **options)
    parts = [[heads_by_position(layer, len(ids), bound)] for layer in range(len(bound.layers))]
    groups = list(grouped(parts, len(ids), max(0, room(bound)) // 2, bound, dp.engine.workspace_bytes))
    found = sweep(dp.engine, made, groups, asked, chosen, "heads")
    judge(found, strict=False, tolerance=bound.tolerance)
    scores = found.scores.reshape(*found.scores.shape[:2], len(ids), bound.num_heads)  # [targets, L, N, H]
    beside = {"logit": found.target_logits}
    for name, rows in (("rest", found.rest), ("bias", found.bias)):
        if name == "rest" or bound.has_bias:
            beside |= {f"L{layer}.{name}": rows[:, layer] for layer in range(len(bound.layers))}
    return scores.permute(2, 0, 1, 3), beside


def heads_by_position(layer: int, length: int, bound: BoundModel) -> Decomposition:
    """:class:`Heads` of a layer, each head's output at each position a source of its own, in the order of the positions.

    Inside its own position's MLP a head's output meets the other heads' and ``rest``; at later positions also those of the
    positions between. All of them, ``rest`` and the bias add up to the stream.
    """
    whole = decompose_components(Heads(layer), length, bound)
    heads = bound.num_heads
    always = whole.sources[:-heads]
    starts = [0] * len(always) + [position for position in range(length) for _ in range(heads)]
    layout = SourceLayout.from_starts(starts, length)
    sources = [
        Source(f"L{layer}H{head}@{position}", "head", position, position + 1, layer, head)
        for position in range(length)
        for head in range(heads)
    ]

    def fill(rows: Tensor, trace: Trace) -> None:
        dense = rows.new_zeros(whole.layout.rows, rows.shape[1])
        whole.fill(dense, trace)
        dense = dense.view(length, len(whole.sources), -1)  # [N, always + H, D]
        for position, begin in enumerate(layout.row_start[:-1].tolist()):
            rows[begin : begin + len(always)] = dense[position, : len(always)]
            own = begin + len(always) + position * heads
            rows[own : own + heads] = dense[position, len(always) :]

    return Decomposition((*always, *sources), layout, False, layer, whole.moment, fill)


def main() -> None:
    """inseq's own command, with the method ``depass`` registered."""
    from inseq.commands.cli import main as run

    try:
        run()
    except DePassError as error:
        print(f"inseq: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
