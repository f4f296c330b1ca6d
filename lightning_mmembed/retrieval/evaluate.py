"""Retrieval evaluation: rank the union and the local pools for the queries of each task, and score the ranking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.metrics import DEFAULT_METRICS, parse_metric
from lightning_mmembed.retrieval.embed import VectorStore
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.results import RUN_DEPTH, RetrievalResult, score_task
from lightning_mmembed.retrieval.search import EXACT, Ranking, Request, SearchSettings, search_pool
from lightning_mmembed.retrieval.vectors import Vectors


def evaluate_vectors(
    pool: Pool,
    pool_vectors: Tensor | Vectors,
    query_sets: Sequence[QuerySet],
    query_vectors: Sequence[Tensor],
    metrics: Sequence[str] = DEFAULT_METRICS,
    k: int = RUN_DEPTH,
    search: SearchSettings = EXACT,
) -> RetrievalResult:
    """Rank and score all tasks over the union pool and, where they have one, their local pool.

    Every labelled positive counts, whether the pool holds it or not; a query without any is scored 0. The vectors of
    the pool are read once for all tasks.

    Args:
        pool: The union pool.
        pool_vectors: ``(N, D)`` unit vectors, in the order of the pool.
        query_sets: The queries, a set a task.
        query_vectors: For each set ``(Q, D)`` unit vectors.
        metrics: Canonical metric names.
        k: Depth of the rankings; at least the depth of every metric.
        search: How to search.

    Returns:
        The rankings and values of every task; ``search_info`` holds the measured recall of an approximate search.

    Raises:
        ValueError: If a metric is deeper than ``k``.
    """
    deepest = max(parse_metric(name)[1] for name in metrics)
    if deepest > k:
        raise ValueError(f"k={k} is less than the depth of a metric ({deepest}); raise k")
    pools: list[dict[str, Tensor | None]] = []
    for queries in query_sets:
        local = pool.local.get(queries.task.name)
        pools.append({"union": None} if local is None else {"union": None, "local": local})
    requests = [(vectors, list(subsets.values())) for vectors, subsets in zip(query_vectors, pools, strict=True)]
    rankings, info = _search(requests, pool_vectors, k, search)
    results = {}
    for queries, subsets, found in zip(query_sets, pools, rankings, strict=True):
        results[queries.task.name] = score_task(queries, pool, dict(zip(subsets, found, strict=True)), metrics)
    return RetrievalResult(pool, results, search_info=info)


def _search(
    requests: Sequence[Request], pool: Tensor | Vectors, k: int, settings: SearchSettings
) -> tuple[list[list[Ranking]], dict[str, Any]]:
    if settings.backend == "ivf":
        from lightning_mmembed.retrieval.faiss_search import ivf_search

        return ivf_search(requests, pool, k, settings)
    return search_pool(requests, pool, k, settings), {}


def evaluate_retrieval(
    encoder: Encoder,
    pool: Pool,
    query_sets: Sequence[QuerySet],
    store: VectorStore,
    made_by: str,
    metrics: Sequence[str] = DEFAULT_METRICS,
    search: SearchSettings = EXACT,
) -> RetrievalResult:
    """Embed a pool and the queries of all tasks, rank and score; see :func:`evaluate_vectors`.

    The search runs where the encoder is, unless ``search`` names a device. ``made_by`` is the fingerprint of the
    encoder, which takes reading all its weights.
    """
    pool_vectors = store.embed_pool(encoder, pool, made_by)
    query_vectors = [store.embed_queries(encoder, queries, made_by) for queries in query_sets]
    search = search.on(encoder.device)
    return evaluate_vectors(pool, pool_vectors, query_sets, query_vectors, metrics, search=search)
