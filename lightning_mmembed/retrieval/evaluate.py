"""Retrieval evaluation: rank the union and the local pools for the queries of each task, and score the ranking."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mmembed.encoders.mllm import MLLMEncoder
from lightning_mmembed.metrics import DEFAULT_METRICS, parse_metric, per_query_metrics
from lightning_mmembed.retrieval.embed import VectorStore, encoder_fingerprint
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.results import RetrievalResult, TaskResult, judge
from lightning_mmembed.retrieval.search import exact_search

#: Depth of the rankings that are kept and written as TREC runs.
RUN_DEPTH = 50


def evaluate_task(
    queries: QuerySet,
    query_vectors: Tensor,
    pool: Pool,
    pool_vectors: Tensor,
    metrics: Sequence[str] = DEFAULT_METRICS,
    k: int = RUN_DEPTH,
) -> TaskResult:
    """Rank and score one task over the union pool and, where it has one, its local pool.

    Every labelled positive counts, whether the pool holds it or not; a query without any is scored 0.

    Args:
        queries: The queries.
        query_vectors: ``(Q, D)`` unit vectors.
        pool: The union pool.
        pool_vectors: ``(N, D)`` unit vectors, in the order of the pool.
        metrics: Canonical metric names.
        k: Depth of the rankings; at least the depth of every metric.

    Raises:
        ValueError: If a metric is deeper than ``k``.
    """
    deepest = max(parse_metric(name)[1] for name in metrics)
    if deepest > k:
        raise ValueError(f"k={k} is less than the depth of a metric ({deepest}); raise k")
    subsets = {"union": None, "local": pool.local.get(queries.task.name)}
    searched = {name: mask for name, mask in subsets.items() if name == "union" or mask is not None}
    rankings = exact_search(query_vectors, pool_vectors, k, list(searched.values()))
    n_positives = torch.tensor([len(set(labelled)) for labelled in queries.positives])
    values = {}
    for name, ranking in zip(searched, rankings, strict=True):
        judged = judge(ranking, pool, queries.positives, queries.task.target_modality)
        values[name] = per_query_metrics(*judged, n_positives, metrics)
    return TaskResult(queries, dict(zip(searched, rankings, strict=True)), values)


def evaluate_retrieval(
    encoder: MLLMEncoder,
    pool: Pool,
    query_sets: Sequence[QuerySet],
    store: VectorStore,
    metrics: Sequence[str] = DEFAULT_METRICS,
) -> RetrievalResult:
    """Embed a pool and the queries of all tasks, rank and score; see :func:`evaluate_task`."""
    made_by = encoder_fingerprint(encoder)
    pool_vectors = store.embed(encoder, pool.items, pool.fingerprint, made_by, f"embedding the {pool.name} pool")
    results = {}
    for queries in query_sets:
        vectors = store.embed(
            encoder, queries.queries, queries.fingerprint, made_by, f"embedding queries of {queries.task.name}"
        )
        results[queries.task.name] = evaluate_task(queries, vectors, pool, pool_vectors, metrics)
    return RetrievalResult(pool, results)
