"""The figures of every query, beside ``metrics.json``: ``queries.parquet``, and what is compared by them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import replacing
from lightning_mmembed.items import decode_id
from lightning_mmembed.retrieval.compare import ComparedRun
from lightning_mmembed.retrieval.pool import QuerySet
from lightning_mmembed.retrieval.results import POOLS, RetrievalResult, task_groups
from lightning_mmembed.retrieval.significance import paired_bootstrap, paired_differences

METRICS_FILE = "metrics.json"
QUERIES_FILE = "queries.parquet"

#: What two evaluations must share to be compared. One of an earlier version may not tell all of it.
SHARED = ("split", "candidates", "shards")

#: By pool and task: ids of the queries and their numbers of labelled positives, each ``(Q,)``.
Labelled = Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]


def write_queries(path: str | Path, result: RetrievalResult) -> Path:
    """Write the figures of every query.

    A row is a query over a pool: ``pool``, ``task``, ``qid``, ``n_positives`` (labelled), ``headline``, every metric
    by its canonical name, and ``first_hits``: with each prompt the rank of the first positive, 0 if none was ranked.

    Args:
        path: The Parquet file.
        result: The evaluation, averaged over the prompts.
    """
    tables = []
    for pool in POOLS:
        for task, outcome in result.tasks.items():
            if pool not in outcome.values:
                continue
            columns: dict[str, Any] = {
                "pool": [pool] * len(outcome.queries),
                "task": [task] * len(outcome.queries),
                **dict(zip(("qid", "n_positives"), labels_of(outcome.queries), strict=True)),
                "headline": outcome.headline(pool).numpy(),
                **{name: values.numpy() for name, values in outcome.values[pool].items()},
                "first_hits": pa.array(outcome.first_hits[pool].tolist(), pa.list_(pa.int32())),
            }
            tables.append(pa.table(columns))
    with replacing(path) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)
    return Path(path)


def labels_of(queries: QuerySet) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the queries of a task, and how many labelled positives each has: ``(Q,)`` texts and ``(Q,)`` int32."""
    qids = np.array([decode_id(code) for code in queries.ids.tolist()], dtype=object)
    return qids, np.array([len(set(ids)) for ids in queries.positives], dtype=np.int32)


@dataclass(frozen=True)
class MeasuredRun:
    """What an evaluation found.

    Args:
        directory: Where its files lie.
        metrics: The content of ``metrics.json``.
        labelled: What was asked.
        headline: By pool and task: the headline figure of each query, ``(Q,)``.
    """

    directory: Path
    metrics: Mapping[str, Any]
    labelled: Labelled
    headline: Mapping[str, Mapping[str, np.ndarray]]

    @property
    def name(self) -> str:
        """Its folder, which may be no more than a date, with its checkpoint or the system that ran."""
        protocol = self.metrics["protocol"]
        known = Path(protocol["checkpoint"]).name if "checkpoint" in protocol else protocol["system"]
        return f"{self.directory.resolve().name} ({known})"


def measured(directory: str | Path, metrics: Mapping[str, Any], result: RetrievalResult) -> MeasuredRun:
    """An evaluation before it is written.

    Args:
        directory: Where its files will lie.
        metrics: What ``metrics.json`` will hold.
        result: The evaluation, averaged over the prompts.
    """
    tasks = {pool: list(metrics[pool]["headline"]["tasks"]) for pool in POOLS if pool in metrics}
    labels = {task: labels_of(outcome.queries) for task, outcome in result.tasks.items()}
    return MeasuredRun(
        Path(directory),
        metrics,
        {pool: {task: labels[task] for task in names} for pool, names in tasks.items()},
        {pool: {task: result.tasks[task].headline(pool).numpy() for task in names} for pool, names in tasks.items()},
    )


def read_measured(path: str | Path) -> MeasuredRun:
    """Read what an evaluation wrote.

    Args:
        path: Its run directory, or its ``metrics.json``.

    Raises:
        UserInputError: If a file is missing, or the two are not of one evaluation.
    """
    directory = Path(path).parent if Path(path).suffix == ".json" else Path(path)
    for name in (METRICS_FILE, QUERIES_FILE):
        if not (directory / name).is_file():
            raise UserInputError(
                f"compare={str(path)!r}: {directory / name} is missing; give the directory of an evaluation"
            )
    metrics = json.loads((directory / METRICS_FILE).read_text())
    table = pq.read_table(directory / QUERIES_FILE, columns=["pool", "task", "qid", "headline", "n_positives"])
    labelled: dict[str, dict[str, Any]] = {pool: {} for pool in POOLS if pool in metrics}
    headline: dict[str, dict[str, np.ndarray]] = {pool: {} for pool in labelled}
    for pool in labelled:
        for task, row in metrics[pool]["headline"]["tasks"].items():
            rows = table.filter(pc.and_(pc.equal(table["pool"], pool), pc.equal(table["task"], task)))
            values = headline[pool][task] = rows["headline"].to_numpy()
            labelled[pool][task] = (rows["qid"].to_numpy(), rows["n_positives"].to_numpy())
            if not len(rows) or abs(values.mean() - row["value"]) > 1e-9:
                raise UserInputError(
                    f"compare={str(path)!r}: {METRICS_FILE} and {QUERIES_FILE} disagree on {task} over the {pool} "
                    "pool: they are of different evaluations; evaluate again"
                )
    return MeasuredRun(directory, metrics, labelled, headline)


def compare_runs(own: MeasuredRun, others: Sequence[MeasuredRun]) -> list[ComparedRun]:
    """Set other runs beside one's own, over each pool, by their headline figures for the same queries.

    Args:
        own: The run that the others are compared with.
        others: Other runs; over a pool that one of the two lacks they are not compared.

    Returns:
        For each pool the run itself, then the others with their differences to it.

    Raises:
        UserInputError: If another run is of another split, pool or queries, or shares no pool.
    """
    for other in others:
        refuse_other_data(own.metrics["protocol"], own.labelled, other)
    names = [run.name for run in (own, *others)]
    if len(set(names)) < len(names):
        names = [str(run.directory.resolve()) for run in (own, *others)]
    compared = []
    for pool, mine in own.headline.items():
        compared.append(_row(own, names[0], pool))
        for name, other in zip(names[1:], others, strict=True):
            if pool in other.headline:
                differences = {task: _differences(own, other, pool, task) for task in mine}
                found = paired_bootstrap(differences, task_groups(mine))
                compared.append(_row(other, name, pool, found))
    return compared


def _row(run: MeasuredRun, name: str, pool: str, differences: Mapping[str, Any] | None = None) -> ComparedRun:
    headline = run.metrics[pool]["headline"]
    rows = {**headline["tasks"], **{group: row for group, row in headline.items() if group != "tasks"}}
    values = {key: row["value"] for key, row in rows.items()}
    return ComparedRun(name, pool, values, {k: (row["low"], row["high"]) for k, row in rows.items()}, differences or {})


def _differences(own: MeasuredRun, other: MeasuredRun, pool: str, task: str) -> np.ndarray:
    mine, theirs = ((run.labelled[pool][task][0], run.headline[pool][task]) for run in (own, other))
    return paired_differences(mine, theirs)


def refuse_other_data(protocol: Mapping[str, Any], labelled: Labelled, other: MeasuredRun) -> None:
    """Refuse to compare with a run of other data; all that it takes is known before anything is embedded.

    Args:
        protocol: What is known here of :data:`SHARED`.
        labelled: What is asked here.
        other: The other run.

    Raises:
        UserInputError: If it is of another split, pool, tasks, queries or labels, or shares no pool.
    """
    theirs = other.metrics["protocol"]
    for name in (name for name in SHARED if name in protocol and name in theirs):
        if protocol[name] != theirs[name]:
            raise UserInputError(
                f"compare={str(other.directory)!r}: its {name} is {theirs[name]!r}, here it is {protocol[name]!r}; "
                "evaluate both on the same data"
            )
    shared = labelled.keys() & other.labelled.keys()
    if not shared:
        pools = f"the {', '.join(other.labelled)} pool, this run over the {', '.join(labelled)} pool"
        raise UserInputError(f"compare={str(other.directory)!r} is over {pools}; evaluate both over one")
    for pool in shared:
        lonely = sorted(labelled[pool].keys() ^ other.labelled[pool].keys())
        if lonely:
            raise UserInputError(
                f"compare={str(other.directory)!r}: one of the two runs lacks {', '.join(lonely)} over the {pool} "
                "pool; evaluate both on the same tasks"
            )
        for task, labels in labelled[pool].items():
            _refuse_other_labels(labels, other, pool, task)


def _refuse_other_labels(labels: tuple[np.ndarray, np.ndarray], other: MeasuredRun, pool: str, task: str) -> None:
    try:
        relabelled = paired_differences(labels, other.labelled[pool][task]) != 0
    except ValueError as error:
        raise UserInputError(f"compare={str(other.directory)!r}: {task}: {error}; evaluate both on the same") from None
    if relabelled.any():
        raise UserInputError(
            f"compare={str(other.directory)!r}: {task}: query {labels[0][relabelled][0]} has other labels there; "
            "evaluate both on the same data"
        )
