"""What a run over a data set is told: the command's arguments, and in Python a dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field

from depass_kernels.names import RULES

from ..arguments import ModelOptions, argument


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(ModelOptions):
    """Which data are attributed, where to and how, beside the model that does it.

    Attributes:
        data: a .jsonl, .csv or .parquet file, or a HuggingFace data set's name or folder.
        out: the folder that the rows go to.
        prompt_column: of texts, chat messages or ids.
        target_column: of tokens to explain; None: ``target``, where there is one.
        id_column: of the rows' names; None: ``id``, where there is one, else their numbers.
        subset: of a HuggingFace data set, its configuration.
        split: of a HuggingFace data set; None: ``train``.
        sources: ``token``, ``word`` or ``sentence``.
        mlp_rule: how MLPs are shared out among the sources, one of :data:`depass_kernels.names.RULES`.
        temperature: of the softmax rule.
        shard_rows: rows of a file.
        batch_tokens: of one pass; None: 1024, or what memory has room for.
        engine: ``local`` for this process, or ``ray`` for workers of a Ray cluster.
        workers: with ``ray``, models at work.
        ray_address: of a cluster that is there; None: one on this machine, for the run.
    """

    data: str = field(
        metadata=argument(
            "a .jsonl, .csv or .parquet file, or a HuggingFace data set's name or folder",
            flags=("data",),
            metavar="DATA",
        )
    )
    out: str = field(
        metadata=argument("where the rows go; a run that was stopped goes on there", metavar="DIR"),
    )
    prompt_column: str = field(
        default="prompt", metadata=argument("texts, chat messages or ids (default: prompt)", metavar="NAME")
    )
    target_column: str | None = field(
        default=None,
        metadata=argument("tokens to explain (default: target, where there is one)", metavar="NAME"),
    )
    id_column: str | None = field(
        default=None,
        metadata=argument("names of the rows (default: id, where there is one, else their numbers)", metavar="NAME"),
    )
    subset: str | None = field(
        default=None, metadata=argument("of a HuggingFace data set: its configuration", metavar="NAME")
    )
    split: str | None = field(
        default=None, metadata=argument("of a HuggingFace data set (default: train)", metavar="NAME")
    )
    sources: str = field(
        default="token", metadata=argument("the parts of the prompt", choices=("token", "word", "sentence"))
    )
    mlp_rule: str = field(
        default="softmax", metadata=argument("how MLPs are shared out among the sources", choices=RULES)
    )
    temperature: float = field(default=0.1, metadata=argument("of the softmax rule (default: 0.1)"))
    shard_rows: int = field(
        default=256,
        metadata=argument(
            "rows of a file; after a stop those of the unfinished one are done again (default: 256)",
            metavar="N",
            least=1,
        ),
    )
    batch_tokens: int | None = field(
        default=None,
        metadata=argument("tokens of one pass (default: 1024, or what memory has room for)", metavar="N", least=1),
    )
    engine: str = field(
        default="local",
        metadata=argument("this process (default), or workers of a Ray cluster", choices=("local", "ray")),
    )
    workers: int = field(
        default=1, metadata=argument("with --engine ray: models at work (default: 1)", metavar="N", least=1)
    )
    ray_address: str | None = field(
        default=None,
        metadata=argument("of a cluster that is there (default: one on this machine, for the run)", metavar="ADDR"),
    )
