"""Mines hard negatives for the training queries: embed, search, apply the rule, count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.mining import mine_modality_aware
from lightning_mmembed.retrieval.embed import VectorStore
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.search import EXACT, Ranking, SearchSettings, search_pool
from lightning_mmembed.retrieval.vectors import Vectors


def mine_vectors(
    pool: Pool,
    pool_vectors: Tensor | Vectors,
    query_sets: Sequence[QuerySet],
    query_vectors: Sequence[Tensor],
    k: int = 50,
    k_prime: int = 45,
    search: SearchSettings = EXACT,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Mine modality-aware hard negatives for every query; see :func:`~lightning_mmembed.mining.mine_modality_aware`.

    Args:
        pool: The training pool.
        pool_vectors: ``(N, D)`` unit vectors, in the order of the pool; they are read once for all tasks.
        query_sets: The training queries, a set a task.
        query_vectors: For each set ``(Q, D)`` unit vectors.
        k: Depth of the ranking.
        k_prime: Rank below which candidates of the wanted modality count as negatives.
        search: How to search; an approximate search is refused, since the rule goes by ranks.

    Returns:
        A column for each name of the negatives' schema (qid, did, kind, rank, score), and by task an audit: queries,
        queries with a negative of each kind and with none, labelled positives met among the top ``k``.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("qid", "did", "kind", "rank", "score")}
    audit = {}
    rankings = search_pool([(vectors, (None,)) for vectors in query_vectors], pool_vectors, k, search)
    for queries, (ranking,) in zip(query_sets, rankings, strict=True):
        audit[queries.task.name] = _mine_task(queries, pool, ranking, k, k_prime, columns)
    return {name: np.array(values) for name, values in columns.items()}, audit


def mine_negatives(
    encoder: Encoder,
    pool: Pool,
    query_sets: Sequence[QuerySet],
    store: VectorStore,
    made_by: str,
    k: int = 50,
    k_prime: int = 45,
    search: SearchSettings = EXACT,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Embed a pool and the queries of all tasks, and mine; see :func:`mine_vectors`.

    The search runs where the encoder is, unless ``search`` names a device.

    Args:
        encoder: What ranks.
        pool: The training pool.
        query_sets: The training queries, a set a task.
        store: Where vectors are kept.
        made_by: Fingerprint of the encoder.
        k: Depth of the ranking.
        k_prime: Rank below which candidates of the wanted modality count as negatives.
        search: How to search.
    """
    pool_vectors = store.embed_pool(encoder, pool, made_by)
    query_vectors = [store.embed_queries(encoder, queries, made_by) for queries in query_sets]
    search = search.on(encoder.device)
    return mine_vectors(pool, pool_vectors, query_sets, query_vectors, k, k_prime, search)


def _mine_task(
    queries: QuerySet, pool: Pool, ranking: Ranking, k: int, k_prime: int, columns: dict[str, list[Any]]
) -> dict[str, int]:
    """Add the negatives of one task's queries to the columns; returns its audit."""
    names = ("queries", "with_wrong_modality", "with_wrong_content", "with_none", "positives_met")
    audit = dict.fromkeys(names, 0)
    wanted = queries.task.target_modality.code
    ids, modalities = pool.ids[ranking.rows].tolist(), pool.modalities[ranking.rows].tolist()
    depths = (ranking.rows >= 0).sum(1).tolist()
    for i, (qid, labelled) in enumerate(zip(queries.ids.tolist(), queries.positives, strict=True)):
        positives, top = set(labelled), ids[i][: depths[i]]
        found = mine_modality_aware(top, modalities[i], positives, wanted, k, k_prime)
        for kind, places in enumerate((found.wrong_modality, found.wrong_content)):
            for place in places:
                row = (qid, top[place], kind, place + 1, float(ranking.scores[i, place]))
                for column, value in zip(columns.values(), row, strict=True):
                    column.append(value)
        audit["queries"] += 1
        audit["with_wrong_modality"] += bool(found.wrong_modality)
        audit["with_wrong_content"] += bool(found.wrong_content)
        audit["with_none"] += not (found.wrong_modality or found.wrong_content)
        audit["positives_met"] += len(positives.intersection(top))
    return audit
