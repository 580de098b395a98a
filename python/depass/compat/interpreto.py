"""interpreto: DePass as an attribution explainer for generation.

::

    explainer = DePassExplainer(model, tokenizer, granularity=Granularity.WORD)
    (output,) = explainer("The Colosseum is in", " Rome")
    plot_attributions(output)

Tested with interpreto 0.5.2, whose internals it uses.
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
    """DePass as an explainer of interpreto. One pass explains the logits of all target tokens.

    Args:
        model: a causal language model. It stays on its device.
        tokenizer: the model's tokenizer. As for every explainer, interpreto adds a padding token to both if they have none.
        granularity: tokens, words or sentences, for sources and targets.
        granularity_aggregation_strategy: how token scores are combined into words or sentences. The default is the sum,
            because scores and logits add up.
        inference_mode: must be ``InferenceModes.LOGITS``, because DePass scores add up to logits.
        options: options of :meth:`DePass.attribute`: ``start_layer``, ``stop_layer``, ``rule``, ``temperature``,
            ``exclude_bos``, ``strict``.

    Attributes:
        results: the :class:`depass.Attribution` of each input of the last call. Besides interpreto's columns they hold the
            scores of the model's biases. Their rows add up to the logits.

    Raises:
        ModelError: DePass does not support the model, for example a classifier.
        OptionError: another inference mode, or an unknown option.
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
            raise OptionError(f"inference_mode={name}: DePass scores add up to logits; give InferenceModes.LOGITS")
        check_options("DePassExplainer", options)
        if tokenizer is None:
            raise ModelError("interpreto's inputs are text and need a tokenizer; give the model's tokenizer")
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
        """Each input token's contribution to each target token's logit.

        Args:
            model_inputs: texts or tokenised texts, as for interpreto's explainers.
            targets: texts or ids. This explainer generates no targets.

        Raises:
            OptionError: there are no targets.
            PromptError: the ids change when interpreto decodes and encodes an input and its target together.

        Returns:
            An ``AttributionOutput`` per input, ``[t, l]`` in logits. Positions after a target are NaN.
        """
        if targets is None:
            raise OptionError("targets are missing; generate a continuation, and give it as text or ids")
        prepared = self.process_model_inputs(model_inputs)
        joined, target_ids = self.process_inputs_to_explain_and_targets(prepared, targets)
        self.results, outputs = [], []
        for own, inputs, target in zip(prepared, joined, target_ids, strict=True):
            ids, new = inputs["input_ids"][0].tolist(), target.tolist()
            expected = own["input_ids"][0].tolist() + new
            if ids != expected:
                raise PromptError(
                    f"interpreto decodes and encodes input and target together, which changes their ids: {ids}, expected "
                    f"{expected}; give a target that begins with a space and has no special token, or give ids"
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
            output = AttributionOutput(
                attributions=clean,
                elements=self.granularity.get_decomposition(inputs, self.tokenizer, return_text=True)[0],
                model_inputs_to_explain=inputs,
                targets=target.cpu(),
                model_task=task,
                granularity=self.granularity,
                granularity_aggregation_strategy=self.granularity_aggregation_strategy,
                inference_mode=self.inference_wrapper.mode,
            )
            outputs.append(output)
        return outputs
