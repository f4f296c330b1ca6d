"""What is scored to be distilled from: the candidates that a training batch may hold of each query."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_mmembed.data.layout import TRAIN_POOL
from lightning_mmembed.data.negatives import MinedNegatives
from lightning_mmembed.data.shards import Shards
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.rerank.work import Lazy, Work


def work_of_negatives(
    shards: Shards, path: str | Path, tasks: Sequence[str] | None = None, instruction: int = 0
) -> Work:
    """Each training query with its labelled positives, then its mined negatives.

    Args:
        shards: The dataset.
        path: A file of mined negatives.
        tasks: Names of those whose queries it is about; by default all.
        instruction: Which of the prompts every query gets.

    Raises:
        UserInputError: If there is no such file, it was mined in another dataset, or a task has no training queries.
    """
    mined, pool = MinedNegatives(path), shards.pool(TRAIN_POOL)
    mined.check_pool(*shards.pool_fingerprints(TRAIN_POOL))
    sets = shards.query_sets("train", instruction)
    known = [queries.task.name for queries in sets]
    if unknown := [name for name in tasks or () if name not in known]:
        raise UserInputError(f"tasks={unknown} have no training queries; those that have are {', '.join(known)}")
    sets = [queries for queries in sets if tasks is None or queries.task.name in tasks]
    places = [(queries.queries, number) for queries in sets for number in range(len(queries))]
    qids = [qid for queries in sets for qid in queries.ids.tolist()]
    labelled = [positives for queries in sets for positives in queries.positives]
    dids = [
        list(dict.fromkeys([*positives, *(int(did) for part in mined.of(qid) for did in part)]))
        for qid, positives in zip(qids, labelled, strict=True)
    ]
    rows = [[row for row in of_query if row >= 0] for of_query in pool.rows_of(dids).tolist()]
    retrieval = [[0.0] * len(of_query) for of_query in rows]
    return Work(Lazy(len(qids), lambda n: places[n][0][places[n][1]]), qids, pool, rows, retrieval)
