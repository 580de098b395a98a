"""captum: DePass as an attribution method for token ids, and for captum's language-model interface.

::

    method = DePassAttribution(dp)
    attributions, delta = method.attribute(ids, target=token, return_convergence_delta=True)
    result = DePassLLMAttribution(method).attribute(TextTokenInput(text, dp.tokenizer), target=" Europe")
    result.plot_token_attr(show=True)

Tested with captum 0.9.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..api import DePass
from ..checks import integer
from ..errors import DePassError, OptionError, PromptError, SourceError, TargetError
from ..inputs.prompt import encode
from ..inputs.targets import Token, TopK
from ..results.attribution import Attribution
from ..sources.source import BESIDE
from ..sources.spans import Spans, token_ranges
from . import check_options

try:
    from captum.attr import Attribution as CaptumAttribution
    from captum.attr import InterpretableInput, LLMAttributionResult, TextTemplateInput, TextTokenInput
    from captum.attr._core.llm_attr import BaseLLMAttribution
except ImportError as error:
    raise DePassError(
        f"depass.compat.captum needs captum 0.9 ({error}): pip install 'depass-kernels[captum]'"
    ) from error

_MARK = 0xF0000  # private-use characters, which no text contains: two of them mark a value's begin and end


class DePassAttribution(CaptumAttribution):
    """DePass as an attribution method of captum. The inputs are token ids.

    Args:
        dp: the model.
        options: options of :meth:`DePass.attribute`: ``start_layer``, ``stop_layer``, ``rule``, ``temperature``,
            ``exclude_bos``, ``strict``.

    Raises:
        OptionError: ``dp`` is not a :class:`DePass`, or an option is unknown.
    """

    def __init__(self, dp: DePass, **options: Any) -> None:
        if not isinstance(dp, DePass):
            raise OptionError(f"dp must be a DePass, got {type(dp).__name__}; DePass(model, tokenizer) makes one")
        check_options("DePassAttribution", options)
        super().__init__(dp.model)
        self.dp, self.options = dp, options

    def attribute(
        self,
        inputs: Tensor,
        target: Any = None,
        *,
        attention_mask: Tensor | None = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Each token's contribution to the logit of its row's target (DePass, section 3).

        Args:
            inputs: ``[B, N]`` token ids.
            target: the next token at the last position: an id, or one id per row (a list or a tensor). Or a pair
                ``(position, id)``, as captum indexes logits ``[B, N, V]``, or one pair per row. None: the model's own next
                token.
            attention_mask: ``[B, N]``, 0 where a row is padded on its left or right. Attributions are 0 there.
            return_convergence_delta: also return the deltas; they cost no extra pass.

        Raises:
            PromptError, TargetError: inputs, mask or targets have a wrong shape; and the errors of
                :meth:`DePass.attribute`.

        Returns:
            Attributions ``[B, N]`` in logits, fp32, on the inputs' device. With deltas, a pair of these and the deltas
            ``[B]``: the sum of the attributions and of what belongs to no input (biases, ``pattern``, ``unassigned``), minus
            the logit.
        """
        rows = self._rows(inputs, target, attention_mask)
        attributions = torch.zeros(inputs.shape)
        deltas = []
        for row, (where, result) in enumerate(rows):
            attributions[row, where] = result.scores[0, _tokens(result)]
            deltas.append(result.scores[0].double().sum() - float(result.target_logits[0]))
        attributions = attributions.to(inputs.device)
        if not return_convergence_delta:
            return attributions
        return attributions, torch.stack(deltas).float().to(inputs.device)

    def has_convergence_delta(self) -> bool:
        """True: the attributions add up to the logit."""
        return True

    def compute_convergence_delta(
        self, attributions: Tensor, inputs: Tensor, target: Any = None, *, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The deltas ``[B]``: the sum of the attributions ``[B, N]`` and of what belongs to no input, minus the logit.

        This runs the decomposition again to get the biases' share; ``return_convergence_delta=True`` does not.

        Raises:
            PromptError, TargetError: as in :meth:`attribute`; or the attributions do not have the inputs' shape.
        """
        if not isinstance(attributions, Tensor) or attributions.shape != inputs.shape:
            raise PromptError(
                f"attributions must be a tensor of the inputs' shape {list(inputs.shape)}, got "
                f"{list(getattr(attributions, 'shape', [])) or type(attributions).__name__}"
            )
        deltas = []
        for given, (_, result) in zip(attributions, self._rows(inputs, target, attention_mask), strict=True):
            beside = sum(float(result.scores[0, i]) for i, source in enumerate(result.sources) if source.kind in BESIDE)
            deltas.append(given.double().sum().cpu() + beside - float(result.target_logits[0]))
        return torch.stack(deltas).float().to(attributions.device)

    def _rows(self, inputs: Tensor, target: Any, mask: Tensor | None) -> list[tuple[slice, Attribution]]:
        """Each row's place in the padded inputs, and its result."""
        floats = isinstance(inputs, Tensor) and (inputs.is_floating_point() or inputs.dtype == torch.bool)
        if not isinstance(inputs, Tensor) or inputs.dim() != 2 or floats or not inputs.numel():
            shape = f" of shape {list(inputs.shape)}" if isinstance(inputs, Tensor) else ""
            raise PromptError(f"inputs must be token ids [B, N], got {getattr(inputs, 'dtype', type(inputs))}{shape}")
        if mask is not None and mask.shape != inputs.shape:
            raise PromptError(
                f"attention_mask must have the inputs' shape {list(inputs.shape)}, got {list(mask.shape)}"
            )
        rows = []
        for row, (ids, captum_target) in enumerate(zip(inputs, _targets(target, inputs), strict=True)):
            where = slice(0, len(ids)) if mask is None else _unpadded(mask[row], row)
            row_target = _shifted(captum_target, where, len(ids))
            rows.append((where, self.dp.attribute(ids[where], row_target, **self.options)))
        return rows


class DePassLLMAttributionResult(LLMAttributionResult):
    """captum's result, with the whole attribution beside it.

    Attributes:
        attribution: the :class:`depass.Attribution`. Besides the columns of ``token_attr`` it holds the scores of earlier
            generated tokens, of the text between a template's values, and of the model's biases. Its rows add up to the
            logits.
    """

    attribution: Attribution

    def __init__(self, attribution: Attribution, **fields: Any) -> None:
        super().__init__(**fields)
        self.attribution = attribution


class DePassLLMAttribution(BaseLLMAttribution):
    """DePass behind captum's interface for language models. One pass attributes all target tokens.

    Args:
        attr_method: DePass as a method of captum.
        tokenizer: default: the tokenizer of ``attr_method``.
        attr_target: must be ``"logit"``, because DePass scores add up to logits. captum's ``"log_prob"`` and ``"prob"``
            are refused.

    Raises:
        OptionError: another method or target, or there is no tokenizer.
    """

    SUPPORTED_METHODS = (DePassAttribution,)
    SUPPORTED_INPUTS = (TextTokenInput, TextTemplateInput)

    def __init__(self, attr_method: DePassAttribution, tokenizer: Any = None, attr_target: str = "logit") -> None:
        if not isinstance(attr_method, DePassAttribution):
            raise OptionError(f"attr_method must be a DePassAttribution, got {type(attr_method).__name__}")
        if attr_target != "logit":
            raise OptionError(f"attr_target={attr_target!r}: DePass scores add up to logits; give attr_target='logit'")
        tokenizer = attr_method.dp.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise OptionError(
                "captum's inputs are text and need a tokenizer; give tokenizer=, or DePass(model, tokenizer)"
            )
        super().__init__(attr_method, tokenizer)
        self.attr_method = attr_method

    def attribute(
        self, inp: InterpretableInput, target: str | Tensor | None = None, *, gen_args: dict[str, Any] | None = None
    ) -> DePassLLMAttributionResult:
        """Each input feature's contribution to the logits of the target's tokens.

        Args:
            inp: a ``TextTokenInput``, whose tokens become the sources; or a ``TextTemplateInput``, whose values become one
                source each, as with :class:`depass.Spans`. The scores of features in one mask group are added up. captum's
                baselines are not used, because DePass perturbs nothing.
            target: text or ids ``[n_out]``; None: the text that the model generates.
            gen_args: arguments of the model's ``generate``, only without a target. Default: captum's.

        Raises:
            OptionError: another kind of input, or ``gen_args`` together with a target.
            TargetError: the target has no tokens.
            SourceError: the template changes its values, so their positions are unknown.

        Returns:
            captum's result: ``token_attr`` ``[n_out, n_in]`` in logits, and ``seq_attr`` ``[n_in]``, its sum over outputs.
        """
        if not isinstance(inp, self.SUPPORTED_INPUTS):
            names = " or ".join(supported.__name__ for supported in self.SUPPORTED_INPUTS)
            raise OptionError(f"inp must be a {names}, got {type(inp).__name__}")
        if target is not None and gen_args is not None:
            raise OptionError("gen_args need generated text, but a target is given; leave out one of the two")
        if target is not None and not isinstance(target, (str, Tensor)):
            raise TargetError(f"target must be text, ids [n_out] or None, got {type(target).__name__}")
        ids = self._format_model_input(inp.to_model_input())["input_ids"][0].tolist()
        new = self._get_target_tokens(inp, target, gen_args=gen_args).flatten().tolist()
        if not new:
            raise TargetError(f"target {target!r} has no token; give at least one")
        features = self._features(inp, ids)
        whole, length = [*ids, *new[:-1]], len(ids)
        sources: Any = "token"
        if isinstance(inp, TextTemplateInput):
            own = [(t, t + 1) for t in range(length, len(whole))]
            sources = Spans([*(span for spans in features for span in spans), *own])
        targets = [Token(token, length - 1 + i) for i, token in enumerate(new)]
        dp = self.attr_method.dp
        attribution = dp.attribute(whole, targets, sources=sources, **self.attr_method.options)
        column = {source.start: i for i, source in enumerate(attribution.sources) if source.start is not None}
        scores = [attribution.scores[:, [column[begin] for begin, _ in spans]].sum(1) for spans in features]
        formatted = inp.format_attr(torch.stack(scores, 1))  # [n_out, n_in]
        return DePassLLMAttributionResult(
            attribution,
            seq_attr=formatted.sum(0),
            token_attr=formatted,
            input_tokens=inp.values,
            output_tokens=[self.tokenizer.decode([token]) for token in new],
            inp=inp,
        )

    def _features(self, inp: Any, ids: list[int]) -> list[list[tuple[int, int]]]:
        """Each interpretable feature's token ranges."""
        if isinstance(inp, TextTokenInput):
            kept = range(len(ids)) if inp.itp_mask is None else inp.itp_mask[0].nonzero().flatten().tolist()
            return [[(t, t + 1)] for t in kept]
        dp = self.attr_method.dp
        prompt = encode(inp.to_model_input(), self.tokenizer, dp.bound)
        if list(prompt.ids) != ids:
            raise SourceError("the tokenizer gives different ids with offsets than without; use a TextTokenInput")
        features: list[list[tuple[int, int]]] = [[] for _ in range(inp.n_itp_features)]
        for value, span in _places(inp):
            feature = value if inp.mask is None else inp.formatted_mask[value]
            features[feature] += token_ranges(prompt, Spans([span], unit="char"))
        return features


def _places(inp: Any) -> list[tuple[int, tuple[int, int]]]:
    """The places of a template's values: ``(value, (begin, end))`` in characters of the text, without empty values.

    Raises:
        SourceError: the template changes its values.
    """
    marked = [f"{chr(_MARK + 2 * i)}{value}{chr(_MARK + 2 * i + 1)}" for i, value in enumerate(inp.values)]
    text = inp.format_fn(**dict(zip(inp.dict_keys, marked, strict=True))) if inp.dict_keys else inp.format_fn(*marked)
    plain: list[str] = []
    places: list[tuple[int, tuple[int, int]]] = []
    begun: dict[int, int] = {}
    for character in text:
        value, ends = divmod(ord(character) - _MARK, 2)
        if not 0 <= value < len(marked):
            plain.append(character)
        elif not ends:
            begun[value] = len(plain)
        elif begun.get(value, len(plain)) < len(plain):
            places.append((value, (begun[value], len(plain))))
    unchanged = all("".join(plain[begin:end]) == inp.values[value] for value, (begin, end) in places)
    if "".join(plain) != inp.to_model_input() or not unchanged:
        raise SourceError("the template changes its values, so their positions are unknown; insert them unchanged")
    return places


def _tokens(result: Attribution) -> list[int]:
    return [i for i, source in enumerate(result.sources) if source.kind == "token"]


def _unpadded(mask: Tensor, row: int) -> slice:
    kept = mask.nonzero().flatten().tolist()
    if not kept or kept != list(range(kept[0], kept[-1] + 1)):
        raise PromptError(f"attention_mask of row {row} must be one run of ones, padded on the left or the right")
    return slice(kept[0], kept[-1] + 1)


def _targets(target: Any, inputs: Tensor) -> Sequence[Any]:
    """One target per row: None, an id, or a pair of position and id."""
    rows = len(inputs)
    if isinstance(target, Tensor):
        target = target.tolist()
    if target is None or isinstance(target, (int, tuple)):
        return [target] * rows
    if not isinstance(target, list) or len(target) not in (1, rows):
        raise TargetError(f"target must be None, an id, a pair (position, id), or a list of {rows}, one per row")
    return target * rows if len(target) == 1 else target


def _shifted(target: Any, where: slice, length: int) -> Token | TopK:
    """A row's target, with its position counted from the row's first token instead of from the padding."""
    if target is None:
        return TopK(1)
    pair = target if isinstance(target, (tuple, list)) else (where.stop - 1, target)
    if len(pair) != 2:
        raise TargetError(f"a target in logits [B, N, V] must be a pair (position, id), got {target!r}")
    given, token = (integer("a target", number, TargetError) for number in pair)
    position = given + length if given < 0 else given
    if not where.start <= position < where.stop:
        raise TargetError(
            f"position {given} of a target is outside of the row's tokens, which are {where.start} to {where.stop - 1}"
        )
    return Token(token, position - where.start)
