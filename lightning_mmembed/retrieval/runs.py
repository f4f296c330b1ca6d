"""Writes what an evaluation found: metrics, TREC runs and the gallery of a report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lightning_mmembed.files import write_atomically
from lightning_mmembed.items import Modality, decode_id
from lightning_mmembed.retrieval.pool import Pool
from lightning_mmembed.retrieval.report import GalleryQuery, GalleryResult
from lightning_mmembed.retrieval.results import RetrievalResult, TaskResult


def write_metrics(path: str | Path, result: RetrievalResult) -> Path:
    """Write ``metrics.json``."""
    return write_atomically(path, json.dumps(result.metrics, indent=1))


def write_runs(directory: str | Path, result: RetrievalResult, name: str) -> list[Path]:
    """Write a six-column TREC run for each task and pool: ``{directory}/{pool}/{task}.run``.

    Args:
        directory: Where to write.
        result: The evaluation.
        name: Name of the run, the last column.
    """
    written = []
    for task, outcome in result.tasks.items():
        for pool, ranking in outcome.rankings.items():
            lines = []
            for qid, rows, scores in zip(outcome.queries.ids.tolist(), ranking.rows, ranking.scores, strict=True):
                kept = rows >= 0
                dids = result.pool.ids[rows[kept]].tolist()
                for rank, (did, score) in enumerate(zip(dids, scores[kept].tolist(), strict=True), 1):
                    lines.append(f"{decode_id(qid)} Q0 {decode_id(did)} {rank} {score:.9g} {name}\n")
            written.append(write_atomically(Path(directory) / pool / f"{task}.run", "".join(lines)))
    return written


def gallery(result: RetrievalResult, queries_per_task: int = 4, results_per_query: int = 5) -> list[GalleryQuery]:
    """Pick queries spread evenly over each task, with their first results over the union pool."""
    shown = []
    for outcome in result.tasks.values():
        picked = np.linspace(0, len(outcome.queries) - 1, min(queries_per_task, len(outcome.queries))).astype(int)
        shown += [_gallery_query(outcome, result.pool, int(i), results_per_query) for i in picked]
    return shown


def _gallery_query(outcome: TaskResult, pool: Pool, i: int, results_per_query: int) -> GalleryQuery:
    query, ranking = outcome.queries.queries[i], outcome.rankings["union"]
    positives = set(outcome.queries.positives[i])
    wanted = outcome.queries.task.target_modality
    results = []
    for row, score in zip(ranking.rows[i, :results_per_query].tolist(), ranking.scores[i].tolist(), strict=False):
        if row < 0:
            break
        candidate, modality = pool.items[row], list(Modality)[int(pool.modalities[row])]
        results.append(
            GalleryResult(
                candidate.did,
                score,
                candidate.item.text,
                _picture(candidate.item.image),
                modality.value,
                int(pool.ids[row]) in positives,
                modality is wanted,
            )
        )
    return GalleryQuery(
        outcome.queries.task.name,
        query.qid,
        query.instruction,
        query.item.text,
        _picture(query.item.image),
        tuple(decode_id(did) for did in sorted(positives)),
        tuple(results),
    )


def _picture(image: object) -> bytes | None:
    return image if isinstance(image, bytes) else None
