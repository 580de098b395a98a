"""inseq: DePass as the attribution method ``depass``. Importing this module registers the method.

::

    import inseq
    import depass.compat.inseq

    model = inseq.load_model(hf_model, "depass", tokenizer=tokenizer)
    out = model.attribute("The Colosseum is in", attributed_fn="logit", outputs="tokens")  # or "layers", "heads"

``python -m depass.compat.inseq attribute -m MODEL -a depass -fn logit -i TEXT`` runs inseq's command with this method.
Tested with inseq 0.7.1, whose internals it uses.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from depass_kernels import SourceLayout

from ..api import DePass
from ..engine import attribute, request
from ..engine.scores import judge
from ..errors import DePassError, OptionError, PromptError, TargetError
from ..inputs.prompt import encode
from ..inputs.targets import Contrast, Token, check
from ..models.bound import BoundModel
from ..models.trace import Trace
from ..propagation.needs import room
from ..sources.components import Heads
from ..sources.decompose import decompose_components
from ..sources.source import BESIDE, Decomposition, Source

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
    """The method that inseq calls with one batch. Users of inseq may give the arguments of :meth:`attribute`."""

    def __init__(self, attribution_model: Any) -> None:
        super().__init__(attribution_model)
        self.dp = DePass(attribution_model.model, attribution_model.tokenizer)
        self.start = 1  # the first position that is scored, padding included
        self.rest: list[dict[str, Tensor]] = []  # by sequence and name: [targets], the scores outside of the table

    def attribute(
        self,
        inputs: Any,
        additional_forward_args: Any,
        outputs: Literal["tokens", "layers", "heads"] = "tokens",
        start_layer: int = 0,
        rule: str | None = None,
        temperature: float | None = None,
        exclude_bos: bool | Literal["auto"] | None = None,
    ) -> Any:
        """Attribute every target of a batch of prefixes, one pass per sequence.

        Args:
            inputs: not used; the ids are in the next argument.
            additional_forward_args: ids of the prefixes ``[B, N]``, last targets, attributed function, mask ``[B, N]``,
                whether embeddings are used, and names and values of the attributed function's own arguments.
            outputs: ``"tokens"``: ``[B, N, N]``. ``"layers"``: ``[B, N, N, L]``, the tokens' states that enter each layer
                as sources. ``"heads"``: ``[B, N, N, L, H]``, each head's output at each position as a source.
            start_layer: see :meth:`DePass.attribute`.
            rule: see :meth:`DePass.attribute`.
            temperature: see :meth:`DePass.attribute`.
            exclude_bos: see :meth:`DePass.attribute`.

        Returns:
            A step output of inseq. Its column ``j`` scores token ``j + 1``.
        """
        if outputs not in _OUTPUTS:
            raise OptionError(f"outputs={outputs!r}: must be one of {', '.join(_OUTPUTS)}")
        if outputs != "tokens" and start_layer != 0:
            raise OptionError(f"start_layer={start_layer}: outputs={outputs!r} decomposes at every layer; leave it out")
        if outputs == "heads" and exclude_bos:
            raise OptionError(f"exclude_bos={exclude_bos!r}: outputs='heads' has no tokens to exclude; leave it out")
        ids, last, attributed_fn, mask, _, names, *values = additional_forward_args
        explained = _Explained(self.forward_func, attributed_fn, dict(zip(names, values, strict=True)), len(ids))
        options = {"rule": rule, "temperature": temperature}
        padded = ids.shape[1]
        tables, self.rest = [], []
        for own, kept, following in zip(ids, mask.bool(), last.flatten().tolist(), strict=True):
            prefix = own[kept].tolist()
            pad = padded - len(prefix)
            if not prefix or bool(kept[:pad].any()):
                raise PromptError("a sequence is not padded on its left; set tokenizer.padding_side = 'left'")
            whole = [*prefix, following]
            first = max(self.start - pad, 1)
            targets = [explained.target(whole[t], t - 1, t + pad) for t in range(first, len(whole))]
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

    inseq's table has no place for the biases' contribution, nor for the remainder (``rest``) of a decomposition into heads.
    They become step scores, together with the logit: a column and its step scores add up to that logit.

    Args:
        attribution_model: inseq's model.

    Raises:
        ModelError: DePass does not support the model.
    """

    method_name = "depass"

    def __init__(self, attribution_model: Any) -> None:
        super().__init__(attribution_model)
        self.attribute_batch_ids, self.forward_batch_embeds = True, False
        self.is_final_step_method = True  # one pass for all targets
        self.method = _Method(attribution_model)

    def attribute(self, batch: Any, **options: Any) -> Any:
        """inseq's ``attribute``, for the functions that DePass scores add up to.

        Raises:
            OptionError: an attributed function other than ``logit`` and ``contrast_logits_diff``, or step scores.
        """
        if options.get("step_scores"):
            raise OptionError(
                f"step_scores={options['step_scores']}: depass takes one pass and computes no step scores; leave them out, "
                "and get them from a second call with method='dummy'"
            )
        if options.get("attribute_target"):
            raise OptionError("attribute_target=True: depass always attributes to the whole prefix; leave it out")
        _check_attributed(options["attributed_fn"])
        length = batch.max_generation_length
        self.method.start, _ = check_attribute_positions(
            length, options.get("attr_pos_start"), options.get("attr_pos_end")
        )
        output = super().attribute(batch, **options)
        for sequence, rest in zip(output.sequence_attributions, self.method.rest, strict=True):
            count = sequence.target_attributions.shape[1]
            sequence.step_scores = {name: row[len(row) - count :] for name, row in rest.items()}
        return output

    def attribute_step(self, attribute_fn_main_args: dict[str, Any], attribution_args: dict[str, Any]) -> Any:
        """Attribute one batch; see :meth:`_Method.attribute`."""
        return self.method.attribute(**attribute_fn_main_args, **attribution_args)


class _Explained:
    """The explained number: each target's logit, or its difference from the logit of the contrastive text's token."""

    def __init__(self, model: Any, attributed_fn: Callable[..., Any], given: dict[str, Any], rows: int) -> None:
        _check_attributed(attributed_fn)
        self.others: list[int] | None = None
        if attributed_fn is logit_fn:
            return
        if given.get("contrast_sources") is not None:
            raise OptionError("contrast_sources are for encoder-decoder models; give contrast_targets")
        if given.get("contrast_force_inputs"):
            raise OptionError(
                "contrast_force_inputs=True: depass contrasts two tokens after the same prefix; leave it out"
            )
        texts = given.get("contrast_targets")
        if texts is None or rows != 1:
            raise OptionError(f"contrast_logits_diff needs contrast_targets and one sequence, got {texts!r} and {rows}")
        special = not given.get("skip_special_tokens", False)
        self.others = model.encode(texts, add_special_tokens=special).input_ids[0].tolist()
        self.alignments = given["contrast_targets_alignments"]
        if self.alignments and isinstance(self.alignments[0], list):
            self.alignments = self.alignments[0]

    def target(self, token: int, position: int, padded: int) -> Token | Contrast:
        """The target ``token`` after ``position``; ``padded`` is the token's own position in inseq's padded sequence."""
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
        f"attributed_fn={name!r}: depass scores add up to logits; give attributed_fn='logit' or 'contrast_logits_diff' "
        "(inseq's default is 'probability')"
    )


def _tokens(
    dp: DePass, ids: Sequence[int], targets: Sequence[Any], layer: int, exclude_bos: Any, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The tokens' scores ``[N, targets]``; and the logits and the scores of ``bias`` and the like, ``[targets]`` each."""
    result = dp.attribute(list(ids), list(targets), start_layer=layer, exclude_bos=exclude_bos, **options)
    kinds, beside = [source.kind for source in result.sources], {"logit": result.target_logits}
    beside |= {kind: result.scores[:, i] for i, kind in enumerate(kinds) if kind in BESIDE}
    return result.scores[:, [i for i, kind in enumerate(kinds) if kind not in BESIDE]].T, beside


def _layers(
    dp: DePass, ids: Sequence[int], targets: Sequence[Any], exclude_bos: Any, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scores ``[N, targets, L]`` of the tokens' states that enter each layer; and the logits and biases' scores."""
    by_layer = [_tokens(dp, ids, targets, layer, exclude_bos, **options) for layer in range(len(dp.bound.layers))]
    beside = {"logit": by_layer[0][1]["logit"]}
    beside |= {f"L{layer}.{kind}": scores for layer, (_, others) in enumerate(by_layer)
               for kind, scores in others.items() if kind in BESIDE}  # fmt: skip
    return torch.stack([scores for scores, _ in by_layer], -1), beside


@torch.no_grad()
def _heads(dp: DePass, ids: Sequence[int], targets: Sequence[Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The scores ``[N, targets, L, H]`` of each head's output at each position; and logits, remainders and biases."""
    bound, prompt = dp.bound, encode(list(ids), dp.tokenizer, dp.bound)
    checked_targets = check(list(targets), len(ids), range(0), dp.tokenizer, bound)
    chosen = request.options(replace(dp.engine.defaults, engine="forward"), bound, exclude_bos=False, **options)
    parts = [[heads_by_position(layer, len(ids), bound)] for layer in range(len(bound.layers))]
    budget = max(0, room(bound)) // 2
    result = attribute.sweep(dp.engine, prompt, parts, checked_targets, chosen, "heads", budget)
    judge(result, strict=False, tolerance=bound.tolerance)
    scores = result.scores.reshape(*result.scores.shape[:2], len(ids), -1)  # [targets, L, N, H]
    beside = {"logit": result.target_logits}
    for name, rows in (("rest", result.rest), ("bias", result.bias)):
        if name == "rest" or bound.has_bias:
            beside |= {f"L{layer}.{name}": rows[:, layer] for layer in range(len(bound.layers))}
    return scores.permute(2, 0, 1, 3), beside


def heads_by_position(layer: int, length: int, bound: BoundModel) -> Decomposition:
    """:class:`Heads` of a layer, with one source for each head at each position, in the order of the positions.

    In its own position's MLP, a head's output shares neurons with the other heads' outputs and the remainder (``rest``); at
    later positions also with the outputs at the positions between. All sources, with ``rest`` and the bias, add up to the
    residual stream.
    """
    whole = decompose_components(Heads(layer), length, bound)
    heads = bound.layers[layer].num_heads
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
    """Run inseq's own command with the method ``depass`` registered."""
    from inseq.commands.cli import main as run

    try:
        run()
    except DePassError as error:
        print(f"inseq: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
