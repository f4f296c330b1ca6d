"""What is scored: queries with their candidates, and the scores as they are kept to distil from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lightning_mmembed.files import replacing
from lightning_mmembed.items import Candidate, Query
from lightning_mmembed.rerank.order import mixable
from lightning_mmembed.retrieval.pool import Pool
from lightning_mmembed.retrieval.results import RetrievalResult

#: Columns of a file of scores; ids are encoded (:func:`~lightning_mmembed.items.encode_id`).
SCHEMA = pa.schema({"qid": pa.int64(), "did": pa.int64(), "score": pa.float32()})


@dataclass(frozen=True)
class Work:
    """Queries with the candidates that are to be scored, best first: each query once, whatever pools ranked it.

    Args:
        queries: ``Q`` queries, read when they are asked for.
        qids: ``(Q,)`` encoded ids.
        pool: Where candidates are.
        rows: Of each query the rows of its candidates in the pool.
        retrieval: Scores of the retriever for them (:func:`~lightning_mmembed.rerank.order.mixable`).
    """

    queries: Sequence[Query]
    qids: Sequence[int]
    pool: Pool
    rows: Sequence[Sequence[int]]
    retrieval: Sequence[Sequence[float]]

    @property
    def rankings(self) -> list[Sequence[Candidate]]:
        """The candidates of each query, read when they are asked for."""
        return [Lazy(len(rows), reader(self.pool.items, rows)) for rows in self.rows]

    def part(self, which: slice, depths: Sequence[int]) -> Work:
        """Some of the queries, with so many candidates each."""
        numbers = range(len(self.qids))[which]
        return Work(
            Lazy(len(numbers), reader(self.queries, numbers)),
            [self.qids[n] for n in numbers],
            self.pool,
            [self.rows[n][: depths[n]] for n in numbers],
            [self.retrieval[n][: depths[n]] for n in numbers],
        )


def work_of(result: RetrievalResult, tasks: Sequence[str], depth: int) -> Work:
    """The heads of the rankings of some tasks; of a query over two pools what either ranks, rank by rank.

    The first two ranks of a pool follow each other: the first alone has no other order.
    """
    queries, qids, rows, retrieval = list[tuple[str, int]](), list[int](), list[list[int]](), list[list[float]]()
    for name in tasks:
        outcome = result.tasks[name]
        heads = [(r.rows[:, :depth].tolist(), mixable(r.scores[:, :depth]).tolist()) for r in outcome.rankings.values()]
        for number, qid in enumerate(outcome.queries.ids.tolist()):
            ranked = [list(zip(of_rows[number], scores[number], strict=True)) for of_rows, scores in heads]
            in_turn = zip_longest(*(of_pool[2:] for of_pool in ranked))
            found = chain(*(of_pool[:2] for of_pool in ranked), *in_turn)
            pairs = [pair for pair in found if pair is not None and pair[0] >= 0]
            first = {row: score for row, score in reversed(pairs)}
            order = list(dict.fromkeys(row for row, _ in pairs))
            queries.append((name, number))
            qids.append(qid)
            rows.append(order)
            retrieval.append([first[row] for row in order])

    def read(index: int) -> Query:
        name, number = queries[index]
        query: Query = result.tasks[name].queries.queries[number]
        return query

    return Work(Lazy(len(queries), read), qids, result.pool, rows, retrieval)


def scored_pairs(work: Work, scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """``(N, 2)`` encoded qid and did of every pair that has a score, and ``(N,)`` their scores."""
    pairs = [
        (qid, row, score)
        for qid, rows, of_query in zip(work.qids, work.rows, scores, strict=True)
        for row, score in known_scores(rows, of_query).items()
    ]
    dids = work.pool.ids[torch.tensor([row for _, row, _ in pairs], dtype=torch.long)].numpy()
    ids = np.stack([np.array([qid for qid, _, _ in pairs], dtype=np.int64), dids], 1)
    return ids, np.array([score for _, _, score in pairs], dtype=np.float32)


def write_scores(path: str | Path, rows: np.ndarray, scores: np.ndarray, facts: dict[str, str]) -> Path:
    """Write scores as soft labels to distil from: ``qid``, ``did`` (encoded) and ``score``, in order of the ids.

    Args:
        path: The Parquet file.
        rows: ``(N, 2)`` encoded qid and did.
        scores: ``(N,)`` P(True).
        facts: What they were made with, kept in the file's metadata: the ``split`` of the queries, and others.
    """
    order = np.lexsort((rows[:, 1], rows[:, 0]))
    table = pa.table([rows[order, 0], rows[order, 1], scores[order]], schema=SCHEMA).replace_schema_metadata(facts)
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
    return Path(path)


def known_scores(rows: Sequence[int], scores: Tensor) -> dict[int, float]:
    """From a row to its score, of those that have one."""
    return {row: score for row, score in zip(rows, scores.tolist(), strict=False) if score == score}


class Lazy(Sequence[Any]):
    """Entries that are read when they are asked for."""

    def __init__(self, length: int, read: Callable[[int], Any]) -> None:
        self._length, self._read = length, read

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._read(n) for n in range(self._length)[index]]
        return self._read(range(self._length)[index])

    def __iter__(self) -> Iterator[Any]:
        return (self._read(n) for n in range(self._length))


def reader(entries: Sequence[Any], numbers: Sequence[int]) -> Callable[[int], Any]:
    """What reads some of the entries by their place among them."""
    return lambda index: entries[numbers[index]]
