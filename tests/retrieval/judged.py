"""A pool, queries of four tasks and random rankings of them, for tests of what is made of rankings."""

from __future__ import annotations

import numpy as np
import torch

from lightning_mmembed.items import Task, encode_id
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.results import RetrievalResult, score_task
from lightning_mmembed.retrieval.search import Ranking

#: The dataset id of each task; 1 and 7 are of one domain, 77 is none of M-BEIR's.
TASKS = {"fashion200k_task0": 1, "fashioniq_task7": 7, "nights_task4": 4, "pets_task3": 77}
METRICS = ("hit@1", "hit@5", "recall@5", "mrr@10", "modality@1")
PER_DATASET, DEPTH = 30, 20


def judged_pool() -> Pool:
    """Thirty candidates of each dataset; the local pools hold some of them each."""
    rng = np.random.default_rng(0)
    dids = [f"{dataset}:{n}" for dataset in sorted(TASKS.values()) for n in range(PER_DATASET)]
    modalities = torch.from_numpy(rng.integers(0, 3, len(dids)).astype(np.int8))
    local = {task: torch.from_numpy(rng.random(len(dids)) < 0.5) for task in TASKS}
    return Pool("test", torch.tensor([encode_id(did) for did in dids]), modalities, local, [], "judged")


def judged_queries(task: str, pool: Pool, n: int = 25) -> QuerySet:
    """Positives of any dataset, one or several, a few in no pool, a few named twice."""
    rng = np.random.default_rng(len(task))
    known = [*pool.ids.tolist(), encode_id("9:5"), encode_id(f"{TASKS[task]}:999")]
    positives = [rng.choice(known, rng.integers(1, 9)).tolist() for _ in range(n)]
    qids = torch.tensor([encode_id(f"{TASKS[task]}:{1000 + i}") for i in range(n)])
    return QuerySet(Task.parse(task), qids, positives, [], task)


def judged_result(
    seed: int = 0, pool: Pool | None = None, pools: tuple[str, ...] = ("union", "local")
) -> RetrievalResult:
    """Random rankings; those of the local pools end where the pool ends, and some are empty."""
    rng, pool = np.random.default_rng(seed), pool or judged_pool()
    tasks = {}
    for task in TASKS:
        queries, rankings = judged_queries(task, pool), {}
        for name in pools:
            inside = np.arange(len(pool)) if name == "union" else np.flatnonzero(pool.local[task].numpy())
            rows = np.full((len(queries), DEPTH), -1)
            for row in rows[2:]:
                found = rng.permutation(inside)[:DEPTH]
                row[: len(found)] = found
            rankings[name] = Ranking(torch.from_numpy(-rows.astype(np.float32)), torch.from_numpy(rows))
        tasks[task] = score_task(queries, pool, rankings, METRICS)
    return RetrievalResult(pool, tasks)
