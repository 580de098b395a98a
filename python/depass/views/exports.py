"""Converts results to other tools' objects: inseq's and captum's results, and a CircuitsVis figure.

The methods ``res.to_inseq()``, ``res.to_captum()`` and ``res.to_circuitsvis()`` call these functions.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..errors import DePassError
from .drawing import AnyScored, Scored, drawn


def to_captum(res: Scored) -> Any:
    """captum's result for language models: one row per target, one column per source (``rest``, ``bias``,
    ``pattern`` and ``unassigned`` included).

    Raises:
        DePassError: captum is not installed.
    """
    try:
        from captum.attr import LLMAttributionResult
    except ImportError as error:
        raise DePassError(f"to_captum needs captum 0.9 ({error}): pip install 'depass-kernels[captum]'") from error
    return LLMAttributionResult(
        seq_attr=res.scores.sum(0),
        token_attr=res.scores.clone(),
        input_tokens=[source.label for source in res.sources],
        output_tokens=[target.label for target in res.targets],
    )


def to_inseq(res: Scored) -> Any:
    """inseq's result for one sequence. The target logits become the step score ``logit``.

    Raises:
        DePassError: inseq is not installed.
    """
    try:
        from inseq.data import CoarseFeatureAttributionSequenceOutput, FeatureAttributionOutput
        from inseq.utils.typing import TokenWithId
    except ImportError as error:
        raise DePassError(f"to_inseq needs inseq 0.7.1 ({error}): pip install 'depass-kernels[inseq]'") from error
    ids = [
        -1 if source.start is None or source.kind != "token" else res.prompt.ids[source.start] for source in res.sources
    ]
    sequence = CoarseFeatureAttributionSequenceOutput(
        source=[TokenWithId(source.label, number) for source, number in zip(res.sources, ids, strict=True)],
        target=[
            TokenWithId(target.label, target.token_ids[0] if target.kind == "token" else -1) for target in res.targets
        ],
        source_attributions=res.scores.T.clone(),
        step_scores={"logit": res.target_logits.clone()},
        sequence_scores={},
        attr_pos_start=0,
        attr_pos_end=len(res.targets),
    )
    info = {
        "attribution_method": res.settings.method,
        "model_name": res.settings.model,
        "attribution_args": asdict(res.settings),
    }
    return FeatureAttributionOutput(sequence_attributions=[sequence], info=info)


def to_circuitsvis(res: AnyScored) -> Any:
    """CircuitsVis's coloured tokens: point at a target to colour the sources by its scores. ``unassigned`` is left out.

    A notebook displays the object. ``.local_src`` is HTML that needs no network; ``str()`` gives HTML that loads scripts
    from the network.

    Raises:
        DePassError: CircuitsVis is not installed.
    """
    try:
        from circuitsvis.tokens import colored_tokens_multi
    except ImportError as error:
        raise DePassError(
            f"to_circuitsvis needs circuitsvis ({error}): pip install 'depass-kernels[transformer-lens]'"
        ) from error
    res, _ = drawn(res)
    return colored_tokens_multi(
        [source.label for source in res.sources], res.scores.T.contiguous(), [target.label for target in res.targets]
    )
