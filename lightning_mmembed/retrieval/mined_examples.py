"""Some mined negatives with their texts and pictures, for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lightning_mmembed.items import Modality, decode_id
from lightning_mmembed.mining_rule import KINDS
from lightning_mmembed.retrieval.mining_views import MinedQuery
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.report import GalleryQuery, GalleryResult

#: Negatives of each kind that are shown of a query.
_SHOWN = 2


def mined_examples(
    pool: Pool, query_sets: Sequence[QuerySet], columns: Mapping[str, np.ndarray], per_task: int = 1
) -> list[MinedQuery]:
    """Some mined negatives: of each task queries spread evenly over those that have any.

    Args:
        pool: The pool that was mined in.
        query_sets: The queries, a set a task.
        columns: Columns ``qid``, ``did``, ``kind``, ``rank`` and ``score`` of the mined negatives.
        per_task: Queries of a task.
    """
    shown = []
    for queries in query_sets:
        some = np.flatnonzero(np.isin(queries.ids.numpy(), columns["qid"]))
        picked = some[np.linspace(0, len(some) - 1, min(per_task, len(some))).astype(int)]
        shown += [_example(pool, queries, int(i), columns) for i in picked]
    return shown


def _example(pool: Pool, queries: QuerySet, i: int, columns: Mapping[str, np.ndarray]) -> MinedQuery:
    query, wanted = queries.queries[i], queries.task.target_modality
    inside = [row for row in pool.rows_of([queries.positives[i]])[0].tolist() if row >= 0]
    shown = [(_result(pool, row, math.nan, True, wanted), "labelled positive") for row in inside[:1]]
    own = np.flatnonzero(columns["qid"] == int(queries.ids[i]))
    for kind, name in enumerate(KINDS):
        for place in own[columns["kind"][own] == kind][:_SHOWN]:
            row, score = int(pool.rows_of([[int(columns["did"][place])]])), float(columns["score"][place])
            label = f"{name.replace('_', ' ')}, rank {columns['rank'][place]}, score {score:.4f}"
            shown.append((_result(pool, row, score, False, wanted), label))
    labelled = tuple(decode_id(did) for did in sorted(queries.positives[i]))
    picture = query.item.image if isinstance(query.item.image, bytes) else None
    results = tuple(result for result, _ in shown)
    asked = GalleryQuery(queries.task.name, query.qid, query.instruction, query.item.text, picture, labelled, results)
    return MinedQuery(asked, tuple(label for _, label in shown))


def _result(pool: Pool, row: int, score: float, is_positive: bool, wanted: Modality) -> GalleryResult:
    candidate, modality = pool.items[row], list(Modality)[int(pool.modalities[row])]
    picture = candidate.item.image if isinstance(candidate.item.image, bytes) else None
    right = modality is wanted
    return GalleryResult(candidate.did, score, candidate.item.text, picture, modality.value, is_positive, right)
