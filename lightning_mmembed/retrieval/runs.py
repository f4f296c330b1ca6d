"""Writes what an evaluation found: metrics, figures of every query, TREC runs and the gallery of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lightning_mmembed.files import write_atomically
from lightning_mmembed.items import Modality, decode_id
from lightning_mmembed.retrieval.compare import ComparedRun
from lightning_mmembed.retrieval.per_query import (
    METRICS_FILE,
    QUERIES_FILE,
    compare_runs,
    measured,
    read_measured,
    write_queries,
)
from lightning_mmembed.retrieval.pool import Pool
from lightning_mmembed.retrieval.report import GalleryQuery, GalleryResult
from lightning_mmembed.retrieval.results import RetrievalResult, TaskResult, average_prompts
from lightning_mmembed.retrieval.summary import summarise
from lightning_mmembed.retrieval.table import comparison_table, metrics_table


@dataclass(frozen=True)
class Record:
    """What stands in the files of an evaluation.

    Args:
        metrics: The content of ``metrics.json``.
        comparison: For each pool the run itself, then the runs that it is compared with.
    """

    metrics: dict[str, Any]
    comparison: list[ComparedRun]


def record(
    directory: str | Path,
    results: Sequence[RetrievalResult],
    facts: Mapping[str, Any],
    compare: Sequence[str | Path] = (),
) -> Record:
    """Write ``metrics.json``, ``queries.parquet`` and the TREC runs, and print the table.

    Args:
        directory: Where to write; the runs lie below ``runs``, of several prompts in a folder for each, from
            ``prompt_0`` on.
        results: The outcome with each prompt.
        facts: The protocol; ``split``, ``instruction`` and ``system`` are printed, too.
        compare: Run directories of other evaluations to compare with.

    Raises:
        UserInputError: If a run cannot be compared; see :func:`~lightning_mmembed.retrieval.per_query.compare_runs`.
    """
    directory, system = Path(directory), str(facts["system"])
    metrics, averaged = summarise(results, facts), average_prompts(results)
    # First: a run that cannot be compared leaves no half of a record.
    comparison = compare_runs(measured(directory, metrics, averaged), [read_measured(path) for path in compare])
    write_queries(directory / QUERIES_FILE, averaged)
    write_atomically(directory / METRICS_FILE, json.dumps(metrics, indent=1))
    for number, result in enumerate(results):
        write_runs(directory / "runs" / (f"prompt_{number}" if len(results) > 1 else ""), result, system)
    title = f"{system}: {facts['split']}, {facts['instruction']}, union pool of {len(averaged.pool):,}"
    Console().print(metrics_table(metrics, title=title + _approximate(averaged)))
    if compare:
        Console().print(comparison_table(comparison))
    print(f"metrics: {directory / METRICS_FILE}\nfigures of every query: {directory / QUERIES_FILE}")
    print(f"TREC runs: {directory / 'runs'}")
    return Record(metrics, comparison)


def _approximate(result: RetrievalResult) -> str:
    """What a title says of an approximate search."""
    found = result.search_info
    # Not recall@k, which is of the labelled positives.
    return f", approximate: {found['recall']:.1%} of the exact top {found['k']}" if "recall" in found else ""


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
    """Pick queries spread evenly over each task, with their first results over the union pool, where it was ranked."""
    shown = []
    for outcome in (outcome for outcome in result.tasks.values() if "union" in outcome.rankings):
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
