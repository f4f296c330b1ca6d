"""Reads TREC runs, of any system, and scores them over a pool of one's own."""

from __future__ import annotations

import glob
import gzip
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import read_json
from lightning_mmembed.items import decode_id, encode_id
from lightning_mmembed.metrics import DEFAULT_METRICS, parse_metric
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.results import POOLS, RUN_DEPTH, RetrievalResult, score_task
from lightning_mmembed.retrieval.search import Ranking

log = logging.getLogger(__name__)

#: UniIR writes this dataset id where a pool is smaller than the depth of the ranking.
_PADDING = "-1:"
_LARGEST = float(np.finfo(np.float32).max)

_COLUMNS = ("qids", "dids", "scores", "files", "lines")


@dataclass(frozen=True)
class TrecRun:
    """Lines of one or more files of a run, ordered by query, score descending and ``did`` ascending.

    Args:
        paths: The files.
        tag: The name of the run, its sixth column.
        qids: ``(R,)`` int64 encoded ids.
        dids: ``(R,)`` int64 encoded ids.
        scores: ``(R,)`` float32.
        files: ``(R,)`` positions in ``paths``.
        lines: ``(R,)`` numbers of the lines, from 1.
    """

    paths: tuple[Path, ...]
    tag: str
    qids: np.ndarray
    dids: np.ndarray
    scores: np.ndarray
    files: np.ndarray
    lines: np.ndarray

    def where(self, row: int) -> str:
        """``{file}:{line}`` of a row."""
        return f"{self.paths[self.files[row]]}:{self.lines[row]}"


def read_run(
    *paths: str | Path, depth: int = RUN_DEPTH, left_out: tuple[Sequence[int], Sequence[int]] = ((), ())
) -> TrecRun:
    """Read the files of one run, compressed with gzip where their name ends in ``.gz``.

    A line is ``qid Q0 did rank score tag``; UniIR's seventh column, the task id, and its lines of padding (``-1:...``)
    are skipped. Lines may come in any order: as in trec_eval the score alone decides, in single precision, and the
    rank column is not looked at. Equal scores go by the ``did``, dataset and number ascending.

    Args:
        *paths: The files. One is held in memory at a time; of each only what is kept stays.
        depth: Candidates that are kept for each query.
        left_out: Encoded ids of queries and of candidates that the shards left out; their lines are dropped before
            lists are cut, and a warning tells how many there are.

    Raises:
        UserInputError: If a file is missing, a line is malformed or a (qid, did) comes twice; it names file and line.
    """
    files, tags = tuple(map(Path, paths)), dict[str, None]()
    parts, lost = [], 0
    for number in range(len(files)):
        part = _read_file(files, number, tags)
        _refuse_duplicates(part)
        gone = np.isin(part.qids, left_out[0]) | np.isin(part.dids, left_out[1])
        lost += int(gone.sum())
        parts.append(_best(_select(part, ~gone), depth))
    tag = next(iter(tags), "run") + (f" and {len(tags) - 1} more" if len(tags) > 1 else "")
    if lost:
        log.warning("%d lines of the run %s name a record that the shards left out; they are dropped", lost, tag)
    run = _ordered(files, tag, *(np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS))
    _refuse_duplicates(run)  # over the files
    return _best(run, depth)


def _read_file(files: tuple[Path, ...], number: int, tags: dict[str, None]) -> TrecRun:
    """Every line of one of the files; its tags are added to ``tags``."""
    qids, dids, lines, scores = array("q"), array("q"), array("q"), array("d")
    for line, fields in _lines(files[number]):
        tags[fields[5]] = None
        if not fields[2].startswith(_PADDING):
            qid, did, score = _parsed(fields, f"{files[number]}:{line}")
            for column, value in ((qids, qid), (dids, did), (lines, line)):
                column.append(value)
            scores.append(score)
    read = (np.frombuffer(column, dtype=np.int64) for column in (qids, dids))
    rounded = np.frombuffer(scores).astype(np.float32)
    return _ordered(files, "", *read, rounded, np.full(len(qids), number), np.frombuffer(lines, dtype=np.int64))


def _ordered(files: tuple[Path, ...], tag: str, qids: np.ndarray, dids: np.ndarray, *others: np.ndarray) -> TrecRun:
    order = np.lexsort((dids, -others[0], qids))
    return TrecRun(files, tag, *(column[order] for column in (qids, dids, *others)))


def _select(run: TrecRun, rows: np.ndarray) -> TrecRun:
    return replace(run, **{name: getattr(run, name)[rows] for name in _COLUMNS})


def _best(run: TrecRun, depth: int) -> TrecRun:
    return _select(run, np.arange(len(run.qids)) - np.searchsorted(run.qids, run.qids) < depth)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and fields of every line that is not empty."""
    if not path.is_file():
        raise UserInputError(f"run={str(path)!r} is no file; give a TREC run")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                fields = line.split()
                if len(fields) not in (0, 6, 7):
                    raise UserInputError(
                        f"{path}:{number}: {line.strip()[:80]!r} has {len(fields)} columns; write 'qid Q0 did rank "
                        "score tag'"
                    )
                if fields:
                    yield number, fields
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise UserInputError(f"run={str(path)!r} cannot be read ({error}); it is damaged: copy it again") from None


def _parsed(fields: Sequence[str], where: str) -> tuple[int, int, float]:
    """Encoded qid, encoded did and score of a line."""
    try:
        score = float(fields[4])
    except ValueError:
        score = float("nan")
    if not abs(score) <= _LARGEST:
        raise UserInputError(f"{where}: score={fields[4]!r} is no finite number of single precision; write one")
    try:
        return encode_id(fields[0]), encode_id(fields[2]), score
    except UserInputError as error:
        raise UserInputError(f"{where}: {error}") from None


def _refuse_duplicates(run: TrecRun) -> None:
    order = np.lexsort((run.lines, run.files, run.dids, run.qids))
    qids, dids = run.qids[order], run.dids[order]
    twice = np.flatnonzero((qids[1:] == qids[:-1]) & (dids[1:] == dids[:-1]))
    if len(twice):
        first, second = order[twice[0]], order[twice[0] + 1]
        raise UserInputError(
            f"{run.where(second)}: query {decode_id(int(run.qids[second]))} has did "
            f"{decode_id(int(run.dids[second]))} once more, after {run.where(first)}; keep one of the two"
        )


def score_run(
    runs: Mapping[str, TrecRun],
    pool: Pool,
    query_sets: Sequence[QuerySet],
    metrics: Sequence[str] = DEFAULT_METRICS,
    depth: int = RUN_DEPTH,
) -> RetrievalResult:
    """Score runs as the rankings of an encoder are scored, whatever system they are of.

    A query that is missing from a run has an empty ranking and scores 0; a warning tells how many there are. A task
    of which a run holds no query at all is left out of its pool.

    Args:
        runs: By pool that was searched, ``"union"`` or ``"local"``.
        pool: The union pool.
        query_sets: The queries of the split, a set a task.
        metrics: Canonical metric names.
        depth: Candidates that are kept for each query; at least the depth of every metric.

    Raises:
        UserInputError: If a run holds a qid that is not in the split, or a did that is not in the pool.
        ValueError: If a metric is deeper than ``depth``.
    """
    deepest = max(parse_metric(name)[1] for name in metrics)
    if deepest > depth:
        raise ValueError(f"depth={depth} is less than the depth of a metric ({deepest}); raise depth")
    rankings: dict[str, dict[str, Ranking]] = {queries.task.name: {} for queries in query_sets}
    missing = {}
    for name in (name for name in POOLS if name in runs):
        run = runs[name]
        _refuse_unknown_queries(run, query_sets, pool.name)
        absent = 0
        for queries in query_sets:
            asked = torch.isin(queries.ids, torch.from_numpy(run.qids))
            if not asked.any():
                log.warning("the %s run %s has no query of %s, which is left out", name, run.tag, queries.task.name)
                continue
            absent += int((~asked).sum())
            rankings[queries.task.name][name] = _ranking(run, name, pool, queries, depth)
        if absent:
            log.warning("the %s run %s lacks %d queries, which score 0", name, run.tag, absent)
        missing[f"{name}_queries_missing"] = absent
    scored = {
        queries.task.name: score_task(queries, pool, rankings[queries.task.name], metrics)
        for queries in query_sets
        if rankings[queries.task.name]
    }
    return RetrievalResult(pool, scored, {"backend": "given run", **missing})


def _refuse_unknown_queries(run: TrecRun, query_sets: Sequence[QuerySet], split: str) -> None:
    known = np.concatenate([queries.ids.numpy() for queries in query_sets])
    unknown = np.flatnonzero(~np.isin(run.qids, known))
    if len(unknown):
        raise UserInputError(
            f"{run.where(unknown[0])}: qid={decode_id(int(run.qids[unknown[0]]))!r} is no query of the {split} split; "
            "give a run of this split, or choose the other with split=..."
        )
    if not len(run.qids):
        raise UserInputError(f"run={', '.join(map(str, run.paths))!r} holds no line; give a run with results")


def _ranking(run: TrecRun, name: str, pool: Pool, queries: QuerySet, depth: int) -> Ranking:
    """The ranking of one task: rows of the run are in order already, so its place in a list is a row's rank."""
    ids, by_id = queries.ids.sort()
    mine = np.flatnonzero(np.isin(run.qids, ids.numpy()))
    qids, dids = torch.from_numpy(run.qids[mine]), torch.from_numpy(run.dids[mine])
    rows = torch.searchsorted(pool.ids, dids).clamp(max=len(pool) - 1)
    held, kind = pool.ids[rows] == dids, f"{pool.name} pool"
    if name == "local":
        inside = pool.local.get(queries.task.name, torch.zeros(len(pool), dtype=torch.bool))
        held, kind = held & inside[rows], f"local pool of {queries.task.name}"
    if not held.all():
        wrong = int(mine[int((~held).nonzero()[0])])
        raise UserInputError(
            f"{run.where(wrong)}: did={decode_id(int(run.dids[wrong]))!r} is not in the {kind}; give a run over it"
        )
    rank = torch.arange(len(qids)) - torch.searchsorted(qids, qids)
    kept = rank < depth
    at = (by_id[torch.searchsorted(ids, qids)][kept], rank[kept])
    ranking = Ranking(torch.full((len(ids), depth), float("-inf")), torch.full((len(ids), depth), -1))
    ranking.rows[at], ranking.scores[at] = rows[kept], torch.from_numpy(run.scores[mine])[kept]
    return ranking


def find_runs(run: str | Path, run_pool: str = "union") -> dict[str, list[Path]]:
    """The files that a ``run`` setting means, by the pool that was searched.

    Args:
        run: A file; a pattern such as ``runs/*.run``; or a folder with ``union/*.run`` and ``local/*.run``, or one of
            these, as an evaluation writes it; or the run directory of an evaluation, which has such a ``runs``.
        run_pool: The pool that a file or a pattern's files are over.

    Raises:
        UserInputError: If there is no such file, or ``run_pool`` is unknown.
    """
    if run_pool not in POOLS:
        raise UserInputError(f"run_pool={run_pool!r} is unknown; write one of {', '.join(POOLS)}")
    path = Path(run)
    if path.is_dir():
        within = path if any((path / pool).is_dir() for pool in POOLS) else path / "runs"
        found = {pool: sorted([*within.glob(f"{pool}/*.run"), *within.glob(f"{pool}/*.run.gz")]) for pool in POOLS}
    else:
        # A path that names a file is taken as it is: its name may hold characters of a pattern.
        found = {run_pool: [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(run)))]}
    found = {pool: files for pool, files in found.items() if files}
    if not found:
        raise UserInputError(
            f"run={str(run)!r} is neither a file, nor a pattern that fits one, nor a folder with union/*.run or "
            "local/*.run; give one of these"
        )
    return found


def refuse_other_split(files: Mapping[str, Sequence[Path]], split: str) -> None:
    """Refuse an evaluation's run of another split; ids of queries begin anew in each, so that the lines do not tell.

    Args:
        files: What :func:`find_runs` found. A file that does not lie in a run directory is taken as it is.
        split: The split that is asked for.

    Raises:
        UserInputError: If a run directory's ``metrics.json`` or ``reranking.json`` names another one.
    """
    lying = {folder for paths in files.values() for path in paths for folder in path.resolve().parents[2:4]}
    for directory in sorted(lying):
        metrics, reranking = (read_json(directory / name) or {} for name in ("metrics.json", "reranking.json"))
        found = metrics.get("protocol", reranking).get("split", split)
        if found != split:
            raise UserInputError(
                f"the run in {str(directory)!r} is of the {found} split, as the files there say; give a run of the "
                f"{split} split, or choose the other with split=..."
            )
