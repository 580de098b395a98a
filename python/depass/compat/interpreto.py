"""interpreto: DePass as one of its attribution explainers for generation.

::

    explainer = DePassExplainer(model, tokenizer, granularity=Granularity.WORD)
    (found,) = explainer("The Colosseum is in", " Rome")
    plot_attributions(found)

Tried with interpreto 0.5.2, whose internals this follows.
"""

from __future__ import annotations

from typing import Any

import torch

from ..api import DePass
from ..errors import DePassError, ModelError, OptionError, PromptError
from ..inputs.targets import Token
from ..results.attribution import Attribution
from . import check_options

try:
    from interpreto import Granularity
    from interpreto.attributions import InferenceModes
    from interpreto.attributions.base import AttributionOutput, GenerationAttributionExplainer
    from interpreto.commons.granularity import GranularityAggregationStrategy
except ImportError as error:
    raise DePassError(
        f"depass.compat.interpreto needs interpreto 0.5.2 ({error}): pip install 'depass-kernels[interpreto]'"
    ) from error


class DePassExplainer(GenerationAttributionExplainer):
    """DePass as an explainer of interpreto: every target token's logit, from one pass.

    Args:
        model: a causal language model. It stays on its device.
        tokenizer: its tokenizer. As with every explainer, interpreto gives both a padding token where they have none.
        granularity: of sources and targets: tokens, words or sentences.
        granularity_aggregation_strategy: how tokens become words or sentences; scores and logits add up, so the default is
            their sum.
        inference_mode: ``InferenceModes.LOGITS``, what DePass adds up to; others are refused.
        options: of :meth:`DePass.attribute`: ``start_layer``, ``stop_layer``, ``mlp_rule``, ``temperature``,
            ``exclude_bos``, ``strict``.

    Attributes:
        results: our own results of the last call, one for each input. They also have what is in no column of interpreto's:
            the share of the model's biases. Their rows add up to the logits.

    Raises:
        ModelError: a model that cannot be attributed, a classifier for one.
        OptionError: another inference mode, or options that ``attribute`` does not have.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        granularity: Granularity = Granularity.DEFAULT,
        granularity_aggregation_strategy: GranularityAggregationStrategy = GranularityAggregationStrategy.SUM,
        inference_mode: Any = InferenceModes.LOGITS,
        **options: Any,
    ) -> None:
        if inference_mode is not InferenceModes.LOGITS:
            name = getattr(inference_mode, "name", inference_mode)
            raise OptionError(f"inference_mode={name}: DePass adds up to logits; there is only InferenceModes.LOGITS")
        check_options("DePassExplainer", options)
        if tokenizer is None:
            raise ModelError("interpreto's inputs are text: give the model's tokenizer")
        self.dp = DePass(model, tokenizer)
        self.options, self.results = options, list[Attribution]()
        super().__init__(
            model,
            tokenizer,
            device=model.device,
            granularity=granularity,
            granularity_aggregation_strategy=granularity_aggregation_strategy,
            inference_mode=inference_mode,
        )

    def explain(self, model_inputs: Any, targets: Any = None) -> list[Any]:
        """What each token of the inputs contributed to each target token's logit.

        Args:
            model_inputs: as for interpreto's explainers: texts, or tokenised ones.
            targets: texts or ids; nothing is generated here.

        Raises:
            OptionError: no targets.
            PromptError: input and target whose ids change when interpreto decodes and encodes them together.

        Returns:
            An ``AttributionOutput`` for each input, ``[t, l]`` in logits; what comes after a target is NaN.
        """
        if targets is None:
            raise OptionError("targets are missing: generate a continuation, and give it as text or ids")
        prepared = self.process_model_inputs(model_inputs)
        joined, wanted = self.process_inputs_to_explain_and_targets(prepared, targets)
        self.results, found = [], []
        for own, inputs, target in zip(prepared, joined, wanted, strict=True):
            ids, new = inputs["input_ids"][0].tolist(), target.tolist()
            expected = own["input_ids"][0].tolist() + new
            if ids != expected:
                raise PromptError(
                    f"interpreto decodes and encodes input and target together, which makes other ids of them: {ids}, not "
                    f"{expected}; give a target that begins with a space and has no special token, if need be as ids"
                )
            length = len(ids) - len(new)
            res = self.dp.attribute(
                ids[:-1], [Token(token, length - 1 + i) for i, token in enumerate(new)], **self.options
            )
            self.results.append(res)
            columns = [i for i, source in enumerate(res.sources) if source.kind == "token"]
            scores = torch.cat([res.scores[:, columns], torch.zeros(len(new), 1)], 1)  # [t, l]
            summed = self.granularity.granularity_score_aggregation(
                contribution=scores,
                granularity_aggregation_strategy=self.granularity_aggregation_strategy,
                inputs=inputs,
                tokenizer=self.tokenizer,
                aggregate_inputs=True,
                aggregate_targets=True,
            )
            task, clean = self.post_processing(summed)
            made = AttributionOutput(
                attributions=clean,
                elements=self.granularity.get_decomposition(inputs, self.tokenizer, return_text=True)[0],
                model_inputs_to_explain=inputs,
                targets=target.cpu(),
                model_task=task,
                granularity=self.granularity,
                granularity_aggregation_strategy=self.granularity_aggregation_strategy,
                inference_mode=self.inference_wrapper.mode,
            )
            found.append(made)
        return found
