"""Results as other tools' own: inseq's and captum's result objects, and a CircuitsVis figure.

They are reached as ``res.to_inseq()``, ``res.to_captum()`` and ``res.to_circuitsvis()``.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..errors import DePassError
from .drawing import Scored


def to_captum(res: Scored) -> Any:
    """captum's result for language models: a row for each target, a column for each source, ``rest`` and ``bias`` too.

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
    """inseq's result, of one sequence: the sources are its source, the targets its target, the logits a step score.

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
        target=[TokenWithId(one.label, one.token_ids[0] if one.kind == "token" else -1) for one in res.targets],
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


def to_circuitsvis(res: Scored) -> Any:
    """CircuitsVis's coloured tokens: the sources, coloured by the target that is pointed at.

    A notebook shows it. ``.local_src`` is the figure's HTML with all that it needs in it; ``str()`` of it loads scripts from
    the network.

    Raises:
        DePassError: CircuitsVis is not installed.
    """
    try:
        from circuitsvis.tokens import colored_tokens_multi
    except ImportError as error:
        raise DePassError(
            f"to_circuitsvis needs circuitsvis ({error}): pip install 'depass-kernels[transformer-lens]'"
        ) from error
    return colored_tokens_multi(
        [source.label for source in res.sources], res.scores.T.contiguous(), [target.label for target in res.targets]
    )
