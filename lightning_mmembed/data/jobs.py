"""The work of a conversion that several processes share: each job writes one shard."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import DataLoader, Dataset

from lightning_mmembed.data.pictures import extracted_picture, picture_problem
from lightning_mmembed.data.tars import IndexedTar
from lightning_mmembed.files import replacing
from lightning_mmembed.items import Modality, decode_id

INDEX_SCHEMA = pa.schema(
    {
        "split": pa.string(),  # of a query; empty for a candidate
        "id": pa.int64(),  # encode_id(did or qid)
        "shard": pa.int32(),  # position in the manifest's list of shards
        "offset": pa.int64(),
        "size": pa.int32(),
        "image_shard": pa.int32(),  # -1 without a picture
        "image_offset": pa.int64(),
        "image_size": pa.int32(),  # 0 without a picture
        "modality": pa.int8(),  # Modality.code
        "task": pa.string(),  # of a query
        "pools": pa.list_(pa.int16()),  # of a candidate: positions in the manifest's counts of pools
        "positives": pa.list_(pa.int64()),  # of a query
        "weight": pa.int32(),  # of a query: how often it stands in the source's up-sampled file, or in its own
    }
)

#: The index of a source that has ids of its own.
SOURCE_INDEX_SCHEMA = pa.unify_schemas(
    [
        INDEX_SCHEMA,
        pa.schema(
            {
                "source_id": pa.string(),  # what the source calls it
                "grades": pa.list_(pa.int32()),  # of a query: of each of its positives, from 1
                "ignored": pa.list_(pa.int64()),  # of a query: candidates that its rankings leave out
            }
        ),
    ]
)


@dataclass(frozen=True)
class PictureJob:
    """A shard of pictures: number, path and, where they come from an archive, bytes of each."""

    shard: int
    pictures: list[tuple[int, str, bytes | None]]


@dataclass(frozen=True)
class RecordJob:
    """A shard of records: position among all shards, name, split, first and last key, number of records."""

    shard: int
    name: str
    split: str
    first: int
    last: int
    count: int


class ShardJobs(Dataset[Any]):
    """Does a job and returns its outcome, or the error that stopped it.

    Args:
        directory: Where shards are written, and under ``work`` the index rows of each shard of records.
        database: The catalog.
        source: Where extracted pictures lie.
        schema: Of the index.
    """

    def __init__(self, directory: Path, database: Path, source: Path, schema: pa.Schema = INDEX_SCHEMA) -> None:
        self.directory, self.database, self.source, self.schema = directory, database, source, schema

    def __getitem__(self, job: PictureJob | RecordJob) -> Any:
        try:
            return self._write_pictures(job) if isinstance(job, PictureJob) else self._write_records(job)
        except (OSError, sqlite3.OperationalError) as error:  # returned: of one that a worker raises a text is left
            return error

    def _write_pictures(self, job: PictureJob) -> list[tuple[int, int | None, int | None, str | None, int]]:
        """Returns (shard, offset, size, problem, number) of each picture."""
        places: list[tuple[int, int | None, int | None, str | None, int]] = []
        with replacing(self.directory / f"images-{job.shard:05d}.tar") as path, IndexedTar(path) as tar:
            for number, name, data in job.pictures:
                if data is None:
                    data = extracted_picture(self.source, name)
                problem = picture_problem(data)
                if problem is None and data is not None:
                    places.append((job.shard, tar.add(name, data), len(data), None, number))
                else:
                    places.append((job.shard, None, None, problem, number))
        return places

    def _write_records(self, job: RecordJob) -> int:
        """Returns the number of records."""
        db = sqlite3.connect(f"{self.database.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        sample = _query_sample if job.split else _candidate_sample
        rows = []
        try:
            with replacing(self.directory / f"{job.name}.tar") as path, IndexedTar(path) as tar:
                for found in db.execute(_QUERIES if job.split else _CANDIDATES, job.__dict__):
                    row, content = sample(*found[4:])
                    shard, offset, size, image = found[:4]
                    key = re.sub(r"\D", "-", content["qid" if job.split else "did"])
                    data = json.dumps(content | {"query_img_path" if job.split else "img_path": image}).encode()
                    place = {"shard": job.shard, "offset": tar.add(f"{key}.json", data), "size": len(data)}
                    place |= {"image_shard": -1 if image is None else shard, "image_offset": offset or 0}
                    rows.append({**row, **place, "image_size": size or 0, "split": job.split})
        finally:
            db.close()
        with replacing(self.directory / "work" / f"{job.name}.parquet") as path:
            pq.write_table(pa.Table.from_pylist(rows, self.schema), path)
        return len(rows)


_PICTURE = "p.shard, p.place, p.size, p.path"
_CANDIDATES = f"""
SELECT {_PICTURE}, c.id, c.text, c.modality, (SELECT group_concat(pool) FROM members m WHERE m.id = c.id), s.name
FROM candidates c LEFT JOIN pictures p ON p.number = c.picture LEFT JOIN sources s ON s.split = '' AND s.id = c.id
WHERE c.id BETWEEN :first AND :last ORDER BY c.id"""
_QUERIES = f"""
SELECT {_PICTURE}, q.id, q.text, q.modality, q.task, q.positives, q.negatives, q.weight, s.name, s.grades, s.ignored
FROM queries q LEFT JOIN pictures p ON p.number = q.picture LEFT JOIN sources s ON s.split = q.split AND s.id = q.id
WHERE q.number BETWEEN :first AND :last AND q.split = :split ORDER BY q.number"""

#: What becomes of a record: the columns of its index row that it decides, and its JSON content.
_Sample = tuple[dict[str, Any], dict[str, Any]]


def _candidate_sample(code: int, text: str, modality: int, pools: str, source_id: str | None) -> _Sample:
    numbers = sorted(int(number) - 1 for number in pools.split(","))
    row = {"id": code, "modality": modality, "task": "", "pools": numbers, "positives": [], "weight": 0}
    content = {"did": decode_id(code), "txt": text, "modality": list(Modality)[modality].value}
    if source_id is None:
        return row, content
    return row | {"source_id": source_id}, content | {"source_id": source_id}


def _query_sample(
    code: int,
    text: str,
    modality: int,
    task: str,
    positives: str,
    negatives: str,
    weight: int,
    source_id: str | None,
    grades: str | None,
    ignored: str | None,
) -> _Sample:
    ids = json.loads(positives)
    row = {"id": code, "modality": modality, "task": task, "pools": [], "positives": ids, "weight": weight}
    content = {
        "qid": decode_id(code),
        "query_txt": text,
        "query_modality": list(Modality)[modality].value,
        "task_id": int(task.rpartition("_task")[2]),
        "pos_cand_list": [decode_id(did) for did in ids],
        "neg_cand_list": json.loads(negatives),
    }
    if source_id is None:
        return row, content
    more = {"source_id": source_id, "grades": json.loads(grades or "[]")}
    return row | more | {"ignored": json.loads(ignored or "[]")}, content | more


def usable_cores() -> int:
    """Processes that a conversion uses unless told: a core each, of those that this process may use; at most 8.

    One process unpacks an archive and reads the records, which more than that do not wait for.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def run_jobs(jobs: ShardJobs, todo: Iterable[PictureJob | RecordJob], num_workers: int) -> Iterator[Any]:
    """Do jobs in this process or in others, a few ahead; their outcomes come in order.

    Workers of a DataLoader end when this process does, however it ends.

    Raises:
        OSError: The first that a job returned.
        sqlite3.OperationalError: Likewise.
    """
    loader: DataLoader[Any] = DataLoader(
        jobs,
        batch_size=None,
        sampler=todo,
        num_workers=num_workers,
        collate_fn=_same,
        prefetch_factor=1 if num_workers else None,  # a job brings the pictures of an archive with it, in memory
    )
    for outcome in loader:
        if isinstance(outcome, Exception):
            raise outcome
        yield outcome


def _same(outcome: Any) -> Any:
    return outcome
