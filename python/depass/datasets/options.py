"""The options of a run over a data set, for the command and for Python."""

from __future__ import annotations

from dataclasses import dataclass, field

from .. import rules
from ..arguments import ModelOptions, argument
from ..checks import OF


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(ModelOptions):
    """Which data to attribute, how, and where to write the rows; and the model's options.

    Attributes:
        data: a .jsonl, .csv or .parquet file, or the name or directory of a Hugging Face data set.
        out: the output directory.
        prompt_column: the column with the prompts: texts, chat messages or token ids.
        target_column: the column with the tokens to explain; None: ``target``, if there is such a column.
        answer_column: the column with answers, texts or token ids; None: a target is explained. A row then has the sums over
            the answer's tokens.
        of: what is explained of a token: ``logit``, ``logprob`` or ``contrast``.
        id_column: the column with the rows' ids; None: ``id``, if there is such a column, else the row numbers.
        subset: the configuration of a Hugging Face data set.
        split: the split of a Hugging Face data set; None: ``train``.
        sources: ``token``, ``word``, ``sentence``, or ``message`` of chats.
        language: the language of sentences, as its code.
        rule: the rule by which scores are shared, as text: one of :data:`depass.rules.RULES`, a mixture such as
            ``softmax+half``, or the weights of :class:`depass.PathWeights` such as ``q=0.5,k=0.5``.
        temperature: temperature of the softmax rule.
        shard_rows: rows per output file.
        batch_tokens: tokens per pass; None: 1024, or fewer where memory is short.
        engine: ``local`` for this process, or ``ray`` for workers of a Ray cluster.
        workers: with ``ray``, the number of workers; each loads the model.
        ray_address: address of a running Ray cluster; None: start one on this machine for the run.
    """

    data: str = field(
        metadata=argument(
            "a .jsonl, .csv or .parquet file, or the name or directory of a Hugging Face data set",
            flags=("data",),
            metavar="DATA",
        )
    )
    out: str = field(
        metadata=argument("output directory; run the same command again to resume a stopped run", metavar="DIR"),
    )
    prompt_column: str = field(
        default="prompt",
        metadata=argument(
            "column with the prompts: texts, chat messages or token ids (default: prompt)", metavar="NAME"
        ),
    )
    target_column: str | None = field(
        default=None,
        metadata=argument("column with the tokens to explain (default: target, if there is one)", metavar="NAME"),
    )
    answer_column: str | None = field(
        default=None,
        metadata=argument(
            "column with answers to explain, as sums over their tokens, instead of targets", metavar="NAME"
        ),
    )
    of: str = field(
        default="logit",
        metadata=argument(
            "what is explained of a token: its logit (default), its logprob, or its contrast with the likeliest other token",
            choices=OF,
        ),
    )
    id_column: str | None = field(
        default=None,
        metadata=argument("column with the rows' ids (default: id, if there is one, else row numbers)", metavar="NAME"),
    )
    subset: str | None = field(
        default=None, metadata=argument("configuration of a Hugging Face data set", metavar="NAME")
    )
    split: str | None = field(
        default=None, metadata=argument("split of a Hugging Face data set (default: train)", metavar="NAME")
    )
    sources: str = field(
        default="token",
        metadata=argument(
            "the parts of the prompt to score (default: token)", choices=("token", "word", "sentence", "message")
        ),
    )
    language: str = field(
        default="en", metadata=argument("language of sentences, as its code (default: en)", metavar="CODE")
    )
    rule: str = field(
        default="softmax",
        metadata=argument(
            f"the rule by which scores are shared: {', '.join(rules.RULES)}, or a mixture such as softmax+half "
            "(default: softmax)",
            metavar="RULE",
            check=rules.read,
        ),
    )
    temperature: float = field(default=0.1, metadata=argument("temperature of the softmax rule (default: 0.1)"))
    shard_rows: int = field(
        default=256,
        metadata=argument(
            "rows per output file; a resumed run repeats the rows of the unfinished file (default: 256)",
            metavar="N",
            least=1,
        ),
    )
    batch_tokens: int | None = field(
        default=None,
        metadata=argument("tokens per pass (default: 1024, or fewer where memory is short)", metavar="N", least=1),
    )
    engine: str = field(
        default="local",
        metadata=argument(
            "local: run in this process (default); ray: run on workers of a Ray cluster", choices=("local", "ray")
        ),
    )
    workers: int = field(
        default=1,
        metadata=argument(
            "with --engine ray: number of workers, each with its own copy of the model (default: 1)",
            metavar="N",
            least=1,
        ),
    )
    ray_address: str | None = field(
        default=None,
        metadata=argument(
            "with --engine ray: address of a running cluster (default: start one on this machine for the run)",
            metavar="ADDRESS",
        ),
    )
