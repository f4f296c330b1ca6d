"""Mines hard negatives for the training queries: embed, search, apply the rule, count."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_mmembed.data.negatives import audit_of, write_negatives
from lightning_mmembed.distributed import ALONE, Processes
from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import fingerprint
from lightning_mmembed.mining import PAPER, Rankings, mine_rankings, mined_columns, mining_audit, total_counts
from lightning_mmembed.mining_rule import MiningRule
from lightning_mmembed.retrieval.embed import VectorStore
from lightning_mmembed.retrieval.pool import Pool, QuerySet, most_ignored, padded_ids
from lightning_mmembed.retrieval.results import leave_out
from lightning_mmembed.retrieval.scores import canonical_scores, pairs_at_a_time
from lightning_mmembed.retrieval.search import EXACT, Ranking, SearchSettings, rows_of, search_pool
from lightning_mmembed.retrieval.vectors import Vectors

log = logging.getLogger(__name__)

#: Vectors of a pool, and for each task those of its queries.
PoolAndQueries = tuple[Tensor | Vectors, Sequence[Tensor | Vectors]]


def mine_vectors(
    pool: Pool,
    pool_vectors: Tensor | Vectors,
    query_sets: Sequence[QuerySet],
    query_vectors: Sequence[Tensor | Vectors],
    rule: MiningRule = PAPER,
    search: SearchSettings = EXACT,
    processes: Processes = ALONE,
    check: PoolAndQueries | None = None,
    heartbeat: Callable[[], object] = lambda: None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Mine hard negatives for every query; see :func:`~lightning_mmembed.mining.mine_rankings`.

    Each process mines for its share of the queries; all get what all have found, in the order of the queries. What a
    query ignores, such as the document that it is itself, is taken out of its ranking first.

    Args:
        pool: The pool, such as the training pool.
        pool_vectors: ``(N, D)`` unit vectors, in the order of the pool; they are read once for all tasks.
        query_sets: The training queries, a set a task.
        query_vectors: For each set ``(Q, D)`` unit vectors.
        rule: Which candidates are negatives.
        search: How to search; an approximate search is refused, since the rule goes by ranks.
        processes: Those that share out the queries.
        check: The same vectors by another model, where the rule asks for its scores.
        heartbeat: Called after every block of the pool that was searched.

    Returns:
        A column for each name of the negatives' schema (qid, did, kind, rank, score), and by task an audit
        (:func:`~lightning_mmembed.mining.mining_audit`).
    """
    shares = [processes.share(len(vectors)) for vectors in query_vectors]
    local = [rows_of(vectors, share) for vectors, share in zip(query_vectors, shares, strict=True)]
    requests = [(vectors, (None,)) for vectors in local]
    rankings = search_pool(requests, pool_vectors, rule.k + most_ignored(query_sets), search, heartbeat)
    parts, audit = [], {}
    for i, (queries, (ranking,)) in enumerate(zip(query_sets, rankings, strict=True)):
        others = None if check is None else (check[0], rows_of(check[1][i], shares[i]))
        found = _known(queries, shares[i], pool, ranking, (pool_vectors, local[i]), others, rule)
        kinds, counts = mine_rankings(found, rule)
        columns = _gathered(mined_columns(found, kinds), processes)
        totals = processes.gather(torch.tensor([list(counts.values())])).sum(0).tolist()
        audit[queries.task.name] = mining_audit(dict(zip(counts, totals, strict=True)), columns)
        parts.append(columns)
    names = ("qid", "did", "kind", "rank", "score")
    return {name: np.concatenate([part[name] for part in parts]) for name in names}, audit


def _known(
    queries: QuerySet,
    share: slice,
    pool: Pool,
    ranking: Ranking,
    vectors: tuple[Tensor | Vectors, Tensor],
    others: tuple[Tensor | Vectors, Tensor] | None,
    rule: MiningRule,
) -> Rankings:
    """The rankings of some of a task's queries, with the scores that the rule needs."""
    if queries.ignored is not None:
        ranking = leave_out(ranking, pool.rows_of(queries.ignored[share]))
    rows, labels = ranking.rows[:, : rule.k], queries.positives[share]
    positives = pool.rows_of(labels)
    scores: dict[str, np.ndarray] = {}
    if rule.needs_positive_scores:
        scores["positive_scores"] = _lowest(pair_scores(*vectors, positives))
    if rule.needs_check_scores and others is not None:
        scores["check_scores"] = pair_scores(*others, rows).numpy()
        scores["check_positive_scores"] = _lowest(pair_scores(*others, positives))
    return Rankings(
        queries.ids[share].numpy(),
        torch.where(rows >= 0, pool.ids[rows], -1).numpy(),
        pool.modalities[rows].numpy(),
        ranking.scores[:, : rule.k].numpy(),
        padded_ids(labels).numpy(),
        queries.task.target_modality.code,
        **scores,
    )


def pair_scores(vectors: Tensor | Vectors, queries: Tensor, rows: Tensor) -> Tensor:
    """Scores of some candidates of each query, as the search gives them.

    Args:
        vectors: ``(N, D)`` vectors of the pool.
        queries: ``(Q, D)`` vectors.
        rows: ``(Q, R)`` rows of the pool, -1 for none.

    Returns:
        ``(Q, R)`` float32 scores, NaN for none.
    """
    flat = rows.flatten()
    places = flat.sort(stable=True).indices[int((flat < 0).sum()) :]
    scores = torch.full(flat.shape, float("nan"))
    for some in torch.split(places, 16 * pairs_at_a_time(queries.shape[1])):
        wanted = flat[some]
        candidates = vectors.rows(wanted) if isinstance(vectors, Vectors) else vectors[wanted.to(vectors.device)]
        own = queries[(some // rows.shape[1]).to(queries.device)]
        scores[some] = canonical_scores(own.cpu(), candidates.cpu())
    return scores.reshape(rows.shape)


def _lowest(scores: Tensor) -> np.ndarray:
    """The lowest score of each row, NaN where there is none."""
    filled = torch.cat([scores.nan_to_num(float("inf")), scores.new_full((len(scores), 1), float("inf"))], 1)
    lowest: np.ndarray = filled.amin(1).masked_fill(filled.amin(1).isinf(), float("nan")).numpy()
    return lowest


def _gathered(columns: dict[str, np.ndarray], processes: Processes) -> dict[str, np.ndarray]:
    """The columns of all processes below each other; backends send no integers of 16 bits."""
    names = ("qid", "did", "kind", "rank")
    numbers = torch.from_numpy(np.stack([columns[name].astype(np.int64) for name in names], 1))
    found = dict(zip(names, processes.gather(numbers).numpy().T, strict=True))
    return {**found, "score": processes.gather(torch.from_numpy(columns["score"])).numpy()}


def mine_negatives(
    encoder: Encoder,
    pool: Pool,
    query_sets: Sequence[QuerySet],
    store: VectorStore,
    made_by: str,
    rule: MiningRule = PAPER,
    search: SearchSettings = EXACT,
    check: tuple[Encoder, str] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Embed a pool and the queries of all tasks, and mine; see :func:`mine_vectors`.

    The processes of the store share out all of it. The search runs where the encoder is, unless ``search`` names a
    device.

    Args:
        encoder: What ranks.
        pool: The pool.
        query_sets: The training queries, a set a task.
        store: Where vectors are kept.
        made_by: Fingerprint of the encoder.
        rule: Which candidates are negatives.
        search: How to search.
        check: Another encoder with its fingerprint, where the rule asks for its scores.

    Raises:
        UserInputError: If the rule asks for another encoder and there is none, or the other way round.
    """
    if rule.needs_check_scores != (check is not None):
        problem = "needs a second encoder: give check" if check is None else "has no use for a second encoder"
        raise UserInputError(f"check_margin={rule.check_margin} {problem}")
    pool_vectors, query_vectors = store.embed_pool(encoder, pool, made_by, query_sets)
    others = None if check is None else store.embed_pool(check[0], pool, check[1], query_sets)
    search = search.on(encoder.device)
    shared = (store.processes, others, store.heartbeat)
    return mine_vectors(pool, pool_vectors, query_sets, query_vectors, rule, search, *shared)


def mine_into(
    path: str | Path,
    encoder: Encoder,
    pool: Pool,
    query_sets: Sequence[QuerySet],
    store: VectorStore,
    made_by: str,
    rule: MiningRule = PAPER,
    check: tuple[Encoder, str] | None = None,
) -> dict[str, Any]:
    """Write a file of negatives, unless it was mined with just the same; see :func:`mine_negatives`.

    Args:
        path: The Parquet file.
        encoder: See :func:`mine_negatives`.
        pool: See :func:`mine_negatives`.
        query_sets: See :func:`mine_negatives`.
        store: See :func:`mine_negatives`.
        made_by: See :func:`mine_negatives`.
        rule: See :func:`mine_negatives`.
        check: See :func:`mine_negatives`.

    Returns:
        The audit.
    """
    facts = mining_facts(store, pool, query_sets, made_by, rule, None if check is None else check[1])
    is_first = store.processes.rank == 0
    audit: dict[str, Any] | None = store.processes.broadcast(audit_of(path, facts) if is_first else None)
    if audit is None:
        columns, audit = mine_negatives(encoder, pool, query_sets, store, made_by, rule, check=check)
        if is_first:
            write_negatives(path, columns, facts, audit)
            totals = total_counts(audit)
            log.info("mined %s into %s", totals, path)
            if totals["with_none"] > totals["queries"] / 2:
                log.warning(
                    "the rule finds no negative for %d of %d queries; training draws theirs from the pool at random",
                    totals["with_none"],
                    totals["queries"],
                )
        store.processes.barrier()
    return audit


def mining_facts(
    store: VectorStore,
    pool: Pool,
    query_sets: Sequence[QuerySet],
    made_by: str,
    rule: MiningRule = PAPER,
    check_made_by: str | None = None,
) -> dict[str, Any]:
    """All that mined negatives depend on, to be kept in their file: what was mined with the same is the same.

    Args:
        store: Where vectors are kept; their type and the precision of the passes count.
        pool: The pool.
        query_sets: The queries.
        made_by: Fingerprint of the encoder.
        rule: Which candidates are negatives.
        check_made_by: Fingerprint of the other encoder, where the rule asks for one.

    Returns:
        Values that can be written as JSON.
    """
    return {
        "encoder": made_by,
        "pool": pool.fingerprint,
        "queries": fingerprint(*(queries.fingerprint for queries in query_sets)),
        "vectors": store.folder(pool.fingerprint, made_by).name,
        "rule": rule.to_dict(),
        # Files of a version that checked candidates of every modality are not the same.
        "check": None if check_made_by is None else {"wanted_modality": check_made_by},
    }
