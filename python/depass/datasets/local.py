"""Makes a data set's shards one by one in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DePassError
from .options import DatasetOptions
from .rows import Row, load_pyarrow
from .shards import Engine, Shard, Work

if TYPE_CHECKING:
    from ..api import DePass
    from ..results.attribution import Attribution


_MOST_TOKENS = 1024  # of one pass
_LONGEST_ERROR = 500  # characters


def local(dp: DePass, options: DatasetOptions) -> Engine:
    """Makes shards one by one in this process."""
    tokens = options.batch_tokens or batch_tokens(dp)

    def work(shards: Iterator[Shard], tell: Callable[[int], None]) -> Work:
        for first, rows in shards:
            yield first, attributed(dp, rows, options.sources, tokens, tell)

    return work


def batch_tokens(dp: DePass, beside: int = 1) -> int:
    """How many tokens go in one pass: so many that a prompt of them all would take at most half of what memory is free.

    Of that half each of ``beside`` processes that share the memory has an equal part.
    """
    from ..engine.plan import rows_and_sources
    from ..propagation.needs import needs, room

    bound, tokens = dp.bound, _MOST_TOKENS
    free = room(bound)

    def taken(count: int) -> int:
        rows, _ = rows_and_sources(bound, count, "token")
        return needs(bound, rows, [count], dp.engine.workspace_bytes, bound.device).total_bytes

    while tokens > 1 and taken(tokens) > free // (2 * beside):
        tokens //= 2
    return tokens


def attributed(
    dp: DePass, rows: Sequence[Row], sources: str, tokens: int, tell: Callable[[int], None] = lambda done: None
) -> bytes:
    """The rows' Parquet file: ``id``, ``tokens``, ``scores``, ``target``, ``target_logit``, ``conservation_error``,
    ``status`` and ``error`` of each, in order.

    Args:
        dp: the model.
        rows: the prompts; one that is broken or cannot be attributed is a row with its error.
        sources: ``"token"``, ``"word"`` or ``"sentence"``.
        tokens: of one pass, padding included.
        tell: called with the number of rows that are done.
    """
    made = [_failed(row, row.broken) for row in rows]
    whole = [index for index, row in enumerate(rows) if row.broken is None]
    whole.sort(key=lambda index: len(str(rows[index].prompt)))  # prompts of like length need little padding
    found = dp.attribute_many(
        [rows[index].prompt for index in whole],
        targets=[rows[index].target for index in whole],
        sources=sources,
        batch_tokens=tokens,
        errors="return",
    ) if whole else ()  # fmt: skip
    for done, (index, result) in enumerate(zip(whole, found, strict=True), len(rows) - len(whole) + 1):
        made[index] = _failed(rows[index], result) if isinstance(result, DePassError) else _ok(rows[index], result)
        tell(done)
    return _parquet(made)


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


def _failed(row: Row, why: object) -> dict[str, Any]:
    said = _clean(" ".join(str(why).split()))
    if len(said) > _LONGEST_ERROR:
        said = f"{said[:_LONGEST_ERROR]}..."
    return {"id": _clean(row.id), "status": "error", "error": said}


def _clean(text: str) -> str:
    """The text as UTF-8 can hold it, with escapes for halves of characters."""
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
