"""The local engine: makes a data set's shards one by one in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..checks import Of, check_of
from ..errors import DePassError
from .options import DatasetOptions
from .rows import Row, load_pyarrow
from .shards import Engine, Shard, Work

if TYPE_CHECKING:
    from ..api import DePass
    from ..results.attribution import Attribution


_MOST_TOKENS = 1024  # tokens of one pass
_LONGEST_ERROR = 500  # characters


def local(dp: DePass, options: DatasetOptions) -> Engine:
    """The engine that makes shards one by one in this process."""
    from ..sources.spans import named  # needs torch

    tokens, sources = options.batch_tokens or batch_tokens(dp), named(options.sources, options.language)
    of = check_of(options.of)

    def work(shards: Iterator[Shard], tell: Callable[[int], None]) -> Work:
        for first, rows in shards:
            yield first, attributed(dp, rows, sources, tokens, of, tell)

    return work


def batch_tokens(dp: DePass, processes: int = 1) -> int:
    """How many tokens go in one pass: one prompt of that length must fit in half of the available memory.

    ``processes`` that share the memory divide that half equally.
    """
    from ..engine.plan import rows_and_sources
    from ..propagation.blocks import blocks_of
    from ..propagation.needs import Sizes, room

    bound, tokens = dp.bound, _MOST_TOKENS
    blocks, sizes = blocks_of(bound, dp.engine.workspace_bytes, bound.device), Sizes.of(bound, bound.device)
    free = room(bound)

    def taken(count: int) -> int:
        rows, _ = rows_and_sources(bound, count, "token")
        return sizes.needs(rows, [count], blocks).total_bytes

    while tokens > 1 and taken(tokens) > free // (2 * processes):
        tokens //= 2
    return tokens


def attributed(
    dp: DePass,
    rows: Sequence[Row],
    sources: Any,
    tokens: int,
    of: Of = "logit",
    tell: Callable[[int], None] = lambda done: None,
) -> bytes:
    """Attribute the rows and return their Parquet file, one record per row, in order.

    Columns: ``id``, ``tokens``, ``scores``, ``target``, ``target_logit``, ``conservation_error``, ``status``, ``error``.

    Args:
        dp: the model.
        rows: the prompts, each with its answer if one has. A row that is broken or cannot be attributed becomes a record
            with its error.
        sources: ``"token"``, ``"word"`` or :class:`depass.Sentences`.
        tokens: tokens of one pass, padding included.
        of: what is explained of a token.
        tell: called with the number of rows that are done.
    """
    records = [_failed(row, row.broken) for row in rows]
    whole = [index for index, row in enumerate(rows) if row.broken is None]
    whole.sort(key=lambda index: len(str(rows[index].prompt)))  # prompts of similar length need little padding
    explained = [rows[index] for index in whole]
    has_answers = any(row.answer is not None for row in explained)
    results = dp.attribute_many(
        [row.prompt for row in explained],
        targets=None if has_answers else [row.target for row in explained],
        answers=[row.answer for row in explained] if has_answers else None,
        by="answer",
        of=of,
        sources=sources,
        batch_tokens=tokens,
        errors="return",
    ) if whole else ()  # fmt: skip
    for done, (index, result) in enumerate(zip(whole, results, strict=True), len(rows) - len(whole) + 1):
        if isinstance(result, DePassError):
            records[index] = _failed(rows[index], result)
        else:
            records[index] = _ok(rows[index], result.total() if has_answers else result)
        tell(done)
    return _parquet(records)


def _ok(row: Row, result: Attribution) -> dict[str, Any]:
    return {
        "id": _clean(row.id),
        "tokens": [_clean(source.label) for source in result.sources],
        "scores": result.scores[0].tolist(),
        "target": _clean(result.targets[0].label),
        "target_logit": float(result.target_logits[0]),
        "conservation_error": float(result.conservation_error[0]),
        "status": "ok",
    }


def _failed(row: Row, reason: object) -> dict[str, Any]:
    message = _clean(" ".join(str(reason).split()))
    if len(message) > _LONGEST_ERROR:
        message = f"{message[:_LONGEST_ERROR]}..."
    return {"id": _clean(row.id), "status": "error", "error": message}


def _clean(text: str) -> str:
    """The text as valid UTF-8, with escapes for lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode()


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    arrow = load_pyarrow()
    schema = arrow.schema(
        {
            "id": arrow.string(),
            "tokens": arrow.list_(arrow.string()),
            "scores": arrow.list_(arrow.float32()),
            "target": arrow.string(),
            "target_logit": arrow.float32(),
            "conservation_error": arrow.float32(),
            "status": arrow.string(),
            "error": arrow.string(),
        }
    )
    sink = arrow.BufferOutputStream()
    arrow.parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content
