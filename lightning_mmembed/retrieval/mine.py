"""Mines hard negatives for the training queries: embed, search, apply the rule, count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_mmembed.distributed import ALONE, Processes
from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.mining import mine_modality_aware
from lightning_mmembed.retrieval.embed import VectorStore
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.search import EXACT, Ranking, SearchSettings, rows_of, search_pool
from lightning_mmembed.retrieval.vectors import Vectors


def mine_vectors(
    pool: Pool,
    pool_vectors: Tensor | Vectors,
    query_sets: Sequence[QuerySet],
    query_vectors: Sequence[Tensor | Vectors],
    k: int = 50,
    k_prime: int = 45,
    search: SearchSettings = EXACT,
    processes: Processes = ALONE,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Mine modality-aware hard negatives for every query; see :func:`~lightning_mmembed.mining.mine_modality_aware`.

    Each process mines for its share of the queries; all get what all have found, in the order of the queries.

    Args:
        pool: The training pool.
        pool_vectors: ``(N, D)`` unit vectors, in the order of the pool; they are read once for all tasks.
        query_sets: The training queries, a set a task.
        query_vectors: For each set ``(Q, D)`` unit vectors.
        k: Depth of the ranking.
        k_prime: Rank below which candidates of the wanted modality count as negatives.
        search: How to search; an approximate search is refused, since the rule goes by ranks.
        processes: Those that share out the queries.

    Returns:
        A column for each name of the negatives' schema (qid, did, kind, rank, score), and by task an audit: queries,
        queries with a negative of each kind and with none, labelled positives met among the top ``k``.
    """
    shares = [processes.share(len(vectors)) for vectors in query_vectors]
    requests = [(rows_of(vectors, share), (None,)) for vectors, share in zip(query_vectors, shares, strict=True)]
    rankings = search_pool(requests, pool_vectors, k, search)
    numbers, scores, audit = [torch.zeros(0, 4, dtype=torch.long)], [torch.zeros(0)], {}
    for queries, share, (ranking,) in zip(query_sets, shares, rankings, strict=True):
        found, counts = _mine_task(queries, share, pool, ranking, k, k_prime)
        some = torch.tensor([row[:4] for row in found], dtype=torch.long).reshape(len(found), 4)
        numbers.append(processes.gather(some))
        scores.append(processes.gather(torch.tensor([row[4] for row in found])))
        totals = processes.gather(torch.tensor([list(counts.values())])).sum(0)
        audit[queries.task.name] = dict(zip(counts, totals.tolist(), strict=True))
    columns = dict(zip(("qid", "did", "kind", "rank"), torch.cat(numbers).numpy().T, strict=True))
    return {**columns, "score": torch.cat(scores).numpy()}, audit


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

    The processes of the store share out all of it. The search runs where the encoder is, unless ``search`` names a
    device.

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
    pool_vectors, query_vectors = store.embed_pool(encoder, pool, made_by, query_sets)
    search = search.on(encoder.device)
    return mine_vectors(pool, pool_vectors, query_sets, query_vectors, k, k_prime, search, store.processes)


def _mine_task(
    queries: QuerySet, share: slice, pool: Pool, ranking: Ranking, k: int, k_prime: int
) -> tuple[list[tuple[int, int, int, int, float]], dict[str, int]]:
    """The negatives of some of a task's queries, as rows (qid, did, kind, rank, score), and their audit."""
    names = ("queries", "with_wrong_modality", "with_wrong_content", "with_none", "positives_met")
    audit, rows = dict.fromkeys(names, 0), []
    wanted = queries.task.target_modality.code
    ids, modalities = pool.ids[ranking.rows].tolist(), pool.modalities[ranking.rows].tolist()
    depths = (ranking.rows >= 0).sum(1).tolist()
    for i, (qid, labelled) in enumerate(zip(queries.ids[share].tolist(), queries.positives[share], strict=True)):
        positives, top = set(labelled), ids[i][: depths[i]]
        found = mine_modality_aware(top, modalities[i], positives, wanted, k, k_prime)
        for kind, places in enumerate((found.wrong_modality, found.wrong_content)):
            for place in places:
                rows.append((qid, top[place], kind, place + 1, float(ranking.scores[i, place])))
        audit["queries"] += 1
        audit["with_wrong_modality"] += bool(found.wrong_modality)
        audit["with_wrong_content"] += bool(found.wrong_content)
        audit["with_none"] += not (found.wrong_modality or found.wrong_content)
        audit["positives_met"] += len(positives.intersection(top))
    return rows, audit
