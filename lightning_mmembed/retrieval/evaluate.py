"""Retrieval evaluation: rank the union and the local pools for the queries of each task, and score the ranking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor

from lightning_mmembed.distributed import ALONE, Processes
from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.metrics import DEFAULT_METRICS, parse_metric
from lightning_mmembed.retrieval.embed import VectorStore
from lightning_mmembed.retrieval.pool import Pool, QuerySet, most_ignored
from lightning_mmembed.retrieval.results import RUN_DEPTH, RetrievalResult, score_task
from lightning_mmembed.retrieval.search import EXACT, Ranking, SearchSettings, rows_of, search_pool
from lightning_mmembed.retrieval.vectors import Vectors


def evaluate_vectors(
    pool: Pool,
    pool_vectors: Tensor | Vectors,
    query_sets: Sequence[QuerySet],
    query_vectors: Sequence[Tensor | Vectors],
    metrics: Sequence[str] = DEFAULT_METRICS,
    k: int = RUN_DEPTH,
    search: SearchSettings = EXACT,
    processes: Processes = ALONE,
    heartbeat: Callable[[], object] = lambda: None,
) -> RetrievalResult:
    """Rank and score all tasks over the union pool and, where they have one, their local pool.

    Every labelled positive counts, whether the pool holds it or not; a query without any is scored 0. The vectors of
    the pool are read once for all tasks. Each process ranks its share of the queries; all get the same result.

    Args:
        pool: The union pool.
        pool_vectors: ``(N, D)`` unit vectors, in the order of the pool.
        query_sets: The queries, a set a task.
        query_vectors: For each set ``(Q, D)`` unit vectors.
        metrics: Canonical metric names.
        k: Depth of the rankings; at least the depth of every metric.
        search: How to search.
        processes: Those that share out the queries.
        heartbeat: Called after every block of the pool that was searched.

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
    subsets = [list(where.values()) for where in pools]
    deeper = k + most_ignored(query_sets)
    rankings, info = _search(query_vectors, subsets, pool_vectors, deeper, search, processes, heartbeat)
    results = {}
    for queries, where, found in zip(query_sets, pools, rankings, strict=True):
        results[queries.task.name] = score_task(queries, pool, dict(zip(where, found, strict=True)), metrics, k)
    return RetrievalResult(pool, results, search_info=info)


def _search(
    queries: Sequence[Tensor | Vectors],
    subsets: Sequence[Sequence[Tensor | None]],
    pool: Tensor | Vectors,
    k: int,
    settings: SearchSettings,
    processes: Processes,
    heartbeat: Callable[[], object],
) -> tuple[list[list[Ranking]], dict[str, Any]]:
    if settings.backend == "ivf":
        from lightning_mmembed.retrieval.faiss_search import ivf_search

        found = None
        if processes.rank == 0:  # alone: an index of the pool for each process would take that many times the memory
            whole = [rows_of(some, slice(0, len(some))) for some in queries]
            found = ivf_search(list(zip(whole, subsets, strict=True)), pool, k, settings)
        return cast(tuple[list[list[Ranking]], dict[str, Any]], processes.broadcast(found))
    shares = [rows_of(some, processes.share(len(some))) for some in queries]
    rankings = search_pool(list(zip(shares, subsets, strict=True)), pool, k, settings, heartbeat)
    gather = processes.gather
    return [[Ranking(gather(some.scores), gather(some.rows)) for some in lists] for lists in rankings], {}


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

    The processes of the store share out all of it. The search runs where the encoder is, unless ``search`` names a
    device. ``made_by`` is the fingerprint of the encoder, which takes reading all its weights.
    """
    pool_vectors, query_vectors = store.embed_pool(encoder, pool, made_by, query_sets)
    return evaluate_vectors(
        pool,
        pool_vectors,
        query_sets,
        query_vectors,
        metrics,
        search=search.on(encoder.device),
        processes=store.processes,
        heartbeat=store.heartbeat,
    )
