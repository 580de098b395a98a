"""Citations: an answer to a question about documents, attributed to the documents' sentences."""

from __future__ import annotations

from typing import Any

from ..inputs.answer import with_answer
from ..inputs.documents import Question
from ..results.citations import Citations, Document
from ..sources.spans import Sentences, Spans
from .generate import answered, generate
from .passes import Engine
from .request import Options, Progress

GREEDY = {"do_sample": False, "num_beams": 1}


def cite(
    engine: Engine,
    asked: Question,
    answer: Any,
    max_new_tokens: int,
    language: str,
    options: Options,
    progress: Progress | None = None,
) -> Citations:
    """Attribute every sentence of an answer to the sentences of documents; see :meth:`depass.DePass.cite`."""
    bound, tokenizer = engine.bound, engine.tokenizer
    claims = Sentences(language)
    _, passages = asked.passages(claims.language, tokenizer, bound)
    own = [(0, 1)] if options.exclude is True else []  # excluded from the MLPs, it is a source of its own
    ranges = [*own, *((passage.begin, passage.end) for passage in passages)]
    sources = Spans(ranges, labels=[*("first token" for _ in own), *(passage.text for passage in passages)])
    if answer is None:
        made = generate(engine, asked.prompt, max_new_tokens, sources, options, dict(GREEDY), progress, claims)
    else:
        encoded, ids = with_answer(asked.prompt, asked.answer(answer), tokenizer, bound)
        made = answered(engine, encoded, ids, sources, options, progress, claims)
    columns = {source.start: index for index, source in enumerate(made.attribution.sources)}
    documents = tuple(
        Document(title, tuple(columns[passage.begin] for passage in passages if passage.document == number))
        for number, title in enumerate(asked.titles)
    )
    return Citations(made, documents, asked.question, claims.language)
