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
from lightning_mmembed.retrieval.results import POOLS, RetrievalResult, task_groups
from lightning_mmembed.retrieval.significance import paired_bootstrap, paired_differences

METRICS_FILE = "metrics.json"
QUERIES_FILE = "queries.parquet"


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
                "qid": [decode_id(code) for code in outcome.queries.ids.tolist()],
                "n_positives": pa.array([len(set(ids)) for ids in outcome.queries.positives], pa.int32()),
                "headline": outcome.headline(pool).numpy(),
                **{name: values.numpy() for name, values in outcome.values[pool].items()},
                "first_hits": pa.array(outcome.first_hits[pool].tolist(), pa.list_(pa.int32())),
            }
            tables.append(pa.table(columns))
    with replacing(path) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)
    return Path(path)


@dataclass(frozen=True)
class MeasuredRun:
    """What an evaluation left behind.

    Args:
        directory: Where its files lie.
        metrics: The content of ``metrics.json``.
        queries: By pool and task: ids, headline figures and numbers of labelled positives, each ``(Q,)``.
    """

    directory: Path
    metrics: Mapping[str, Any]
    queries: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]


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
    queries: dict[str, dict[str, Any]] = {}
    for pool in (pool for pool in POOLS if pool in metrics):
        queries[pool] = {}
        for task, row in metrics[pool]["headline"]["tasks"].items():
            rows = table.filter(pc.and_(pc.equal(table["pool"], pool), pc.equal(table["task"], task)))
            columns = tuple(rows[name].to_numpy() for name in ("qid", "headline", "n_positives"))
            if not len(rows) or abs(columns[1].mean() - row["value"]) > 1e-9:
                raise UserInputError(
                    f"compare={str(path)!r}: {METRICS_FILE} and {QUERIES_FILE} disagree on {task} over the {pool} "
                    "pool: they are of different evaluations; evaluate again"
                )
            queries[pool][task] = columns
    return MeasuredRun(directory, metrics, queries)


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
        _refuse_other_data(own, other)
    directories = [run.directory.resolve() for run in (own, *others)]
    names = [path.name for path in directories]
    if len(set(names)) < len(names):
        names = [str(path) for path in directories]
    compared = []
    for pool, mine in own.queries.items():
        compared.append(_row(own, names[0], pool))
        for name, other in zip(names[1:], others, strict=True):
            if pool in other.queries:
                differences = {task: _differences(mine[task], other, pool, task) for task in mine}
                found = paired_bootstrap(differences, task_groups(mine))
                compared.append(_row(other, name, pool, found))
    return compared


def _row(run: MeasuredRun, name: str, pool: str, differences: Mapping[str, Any] | None = None) -> ComparedRun:
    headline = run.metrics[pool]["headline"]
    rows = {**headline["tasks"], **{group: row for group, row in headline.items() if group != "tasks"}}
    values = {key: row["value"] for key, row in rows.items()}
    return ComparedRun(name, pool, values, {k: (row["low"], row["high"]) for k, row in rows.items()}, differences or {})


def _refuse_other_data(own: MeasuredRun, other: MeasuredRun) -> None:
    for name in ("split", "candidates"):
        mine, theirs = (run.metrics["protocol"][name] for run in (own, other))
        if mine != theirs:
            raise UserInputError(f"compare={str(other.directory)!r}: its {name} is {theirs!r}, here it is {mine!r}")
    shared = own.queries.keys() & other.queries.keys()
    if not shared:
        pools = f"the {', '.join(other.queries)} pool, this run over the {', '.join(own.queries)} pool"
        raise UserInputError(f"compare={str(other.directory)!r} is over {pools}; evaluate both over one")
    for pool in shared:
        lonely = sorted(own.queries[pool].keys() ^ other.queries[pool].keys())
        if lonely:
            raise UserInputError(
                f"compare={str(other.directory)!r}: one of the two runs lacks {', '.join(lonely)} over the {pool} "
                "pool; evaluate both on the same tasks"
            )


def _differences(mine: tuple[np.ndarray, ...], other: MeasuredRun, pool: str, task: str) -> np.ndarray:
    qids, values, positives = mine
    their_qids, their_values, their_positives = other.queries[pool][task]
    try:
        relabelled = paired_differences((qids, positives), (their_qids, their_positives))
        difference = paired_differences((qids, values), (their_qids, their_values))
    except ValueError as error:
        raise UserInputError(f"compare={str(other.directory)!r}: {task}: {error}; evaluate both on the same") from None
    if relabelled.any():
        raise UserInputError(
            f"compare={str(other.directory)!r}: {task}: query {qids[relabelled != 0][0]} has other labels there; "
            "evaluate both on the same data"
        )
    return difference
