"""Turns a dataset in M-BEIR's layout into WebDataset shards, one Parquet index and a manifest.

::

    candidates-00000.tar ...     {did}.json and, where there is a picture, {did}.jpg / .png with its original bytes
    queries-train-00000.tar ...  {qid}.json and the picture, per split
    index.parquet                a row per record: where its bytes lie, modality, task, pools, positives
    instructions.tsv             as in the source
    manifest.json                counts, checksums, records left out and why, fingerprint of the source
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.progress import track

from lightning_mmembed.data.layout import (
    SPLITS,
    TRAIN_POOL,
    BadRecord,
    CandidateRecord,
    MBEIRLayout,
    QueryRecord,
)
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import building_directory, file_sha256, fingerprint, locked
from lightning_mmembed.items import encode_id

log = logging.getLogger(__name__)

FORMAT_VERSION = 1

#: What becomes of a record: the columns of its index row that it decides, its JSON content, the path of its picture.
Sample = tuple[dict[str, Any], dict[str, Any], str | None]
INDEX_FILE, MANIFEST_FILE, INSTRUCTIONS_FILE = "index.parquet", "manifest.json", "instructions.tsv"

INDEX_SCHEMA = pa.schema(
    {
        "split": pa.string(),  # of a query; empty for a candidate
        "id": pa.int64(),  # encode_id(did or qid)
        "shard": pa.int32(),  # position in the manifest's list of shards
        "offset": pa.int64(),
        "size": pa.int32(),
        "image_offset": pa.int64(),
        "image_size": pa.int32(),  # 0 without a picture
        "modality": pa.int8(),  # Modality.code
        "task": pa.string(),  # of a query
        "pools": pa.list_(pa.string()),  # of a candidate
        "positives": pa.list_(pa.int64()),  # of a query
    }
)


def shard_dataset(
    source: str | Path, out: str | Path, *, max_bad_fraction: float = 0.001, samples_per_shard: int = 10000
) -> Path:
    """Write the shards of a dataset, unless those of this very source stand there already.

    Args:
        source: Folder in M-BEIR's layout.
        out: Folder of the shards; stale shards there are replaced, anything else is left alone.
        max_bad_fraction: Share of the records that may be left out because they cannot be used.
        samples_per_shard: Records in a tar file.

    Returns:
        ``out``.

    Raises:
        UserInputError: If the source is no such folder, ``out`` holds something else, or too many records are bad.
    """
    layout, out = MBEIRLayout(source), Path(out)
    made_of = source_fingerprint(layout, max_bad_fraction, samples_per_shard)
    with locked(out):
        manifest = out / MANIFEST_FILE
        if manifest.is_file() and json.loads(manifest.read_text())["fingerprint"] == made_of:
            return out
        if out.exists() and any(out.iterdir()) and not manifest.is_file():
            raise UserInputError(f"shards={str(out)!r} holds other files; give a new or empty folder")
        with building_directory(out) as directory:
            _Writer(layout, directory, samples_per_shard).write(made_of, max_bad_fraction)
    return out


def source_fingerprint(layout: MBEIRLayout, *settings: Any) -> str:
    """Fingerprint of names, sizes and times of a source's files other than pictures, and of the settings."""
    parts = ("query", "cand_pool", "qrels", "instructions")
    files = sorted(p for part in parts for p in (layout.source / part).rglob("*") if p.is_file())
    stats = [(str(p.relative_to(layout.source)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return fingerprint(FORMAT_VERSION, str(layout.source.resolve()), stats, settings)


class _Writer:
    """Holds what one conversion accumulates: shards, index rows, counts and records left out."""

    def __init__(self, layout: MBEIRLayout, directory: Path, samples_per_shard: int) -> None:
        self.layout = layout
        self.directory = directory
        self.samples_per_shard = samples_per_shard
        self.shards: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.bad: list[dict[str, str]] = []
        self.total = 0
        self.unreachable: list[str] = []
        self._pictures: dict[str, str | None] = {}  # path -> why it cannot be used

    def write(self, made_of: str, max_bad_fraction: float) -> None:
        pools = self._read_pools()
        candidates = [(record, sorted(names)) for record, names in pools.values()]
        self._write_shards("candidates", candidates, self._candidate_sample)
        written = {row["id"]: row["pools"] for row in self.rows}
        for split in SPLITS:
            queries = list(self._read_queries(split, written))
            if queries:
                self._write_shards(f"queries-{split}", queries, self._query_sample)
        self._check_bad(max_bad_fraction)
        pq.write_table(pa.Table.from_pylist(self.rows, INDEX_SCHEMA), self.directory / INDEX_FILE)
        shutil.copyfile(self.layout.instructions_file, self.directory / INSTRUCTIONS_FILE)
        manifest = {
            "version": FORMAT_VERSION,
            "fingerprint": made_of,
            "source": str(self.layout.source.resolve()),
            "counts": self._counts(),
            "shards": self.shards,
            "bad_records": self.bad,
            "queries_without_reachable_positive": self.unreachable,
        }
        (self.directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))

    def _counts(self) -> dict[str, dict[str, int]]:
        """Number of candidates in each pool and of queries of each task and split."""
        pools = Counter(name for row in self.rows for name in row["pools"])
        queries = Counter(f"{row['task']}/{row['split']}" for row in self.rows if row["task"])
        return {"pools": dict(pools), "queries": dict(queries)}

    def _good(self, records: Iterable[Any]) -> Iterator[Any]:
        """Count records and keep those that can be used, their pictures included."""
        for record in records:
            self.total += 1
            if isinstance(record, BadRecord):
                self._leave_out(record.where, record.reason)
                continue
            reason = self._picture_problem(record.image)
            if reason is None:
                yield record
            else:
                name = record.qid if isinstance(record, QueryRecord) else record.did
                self._leave_out(name, f"picture {record.image} {reason}")

    def _leave_out(self, where: str, reason: str) -> None:
        entry = {"record": where, "reason": reason}
        if entry not in self.bad:  # a candidate may stand in several pools
            log.warning("left out %s: %s", where, reason)
            self.bad.append(entry)

    def _picture_problem(self, image: str | None) -> str | None:
        if image is None:
            return None
        if image not in self._pictures:
            self._pictures[image] = _picture_problem(self.layout.source / image)
        return self._pictures[image]

    def _read_pools(self) -> dict[int, tuple[CandidateRecord, set[str]]]:
        pools: dict[int, tuple[CandidateRecord, set[str]]] = {}
        files = list(self.layout.pool_files())
        if not any(name == TRAIN_POOL for name, _ in files):
            # A dataset of one's own need not have a training pool: all its candidates are one.
            files += [(TRAIN_POOL, path) for _, path in files]
        for name, path in track(files, "reading pools"):
            for record in self._good(self.layout.candidates(path)):
                first, names = pools.setdefault(encode_id(record.did), (record, set()))
                if record == first:
                    names.add(name)
                else:
                    self._leave_out(f"{path}: {record.did}", "stands elsewhere with other content")
        if not pools:
            raise UserInputError(f"{self.layout.source}/cand_pool holds no candidate that can be used")
        return dict(sorted(pools.items()))

    def _read_queries(self, split: str, pools: dict[int, list[str]]) -> Iterator[QueryRecord]:
        judged = self.layout.qrels(split) if split != "train" else {}
        for path in track(self.layout.query_files(split), f"reading {split} queries"):
            for query in self._good(self.layout.queries(path)):
                positives = judged.get(query.task.name, {}).get(query.qid, query.positives)
                query = QueryRecord(**{**vars(query), "positives": positives})
                if split == "train":
                    reachable = any(TRAIN_POOL in pools.get(encode_id(did), ()) for did in positives)
                else:
                    names = (name for did in positives for name in pools.get(encode_id(did), ()))
                    reachable = any(name.endswith(f"/{split}") for name in names)
                if not reachable and split == "train":
                    self._leave_out(f"{path}: {query.qid}", f"no positive of {list(positives)} is in the training pool")
                    continue
                if not reachable:  # it counts, as a query that no retriever can answer
                    log.warning("%s query %s: no positive is in a pool of its split; it scores 0", split, query.qid)
                    self.unreachable.append(f"{split} {query.qid}")
                yield query

    def _write_shards(self, kind: str, records: list[Any], sample: Any) -> None:
        starts = range(0, len(records), self.samples_per_shard)
        for number, start in enumerate(track(starts, f"writing {kind}")):
            path = self.directory / f"{kind}-{number:05d}.tar"
            split = kind.partition("-")[2]
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for record in records[start : start + self.samples_per_shard]:
                    row, content, image = sample(record)
                    key = f"{row['id']:016d}"
                    row |= {"split": split, "shard": len(self.shards)}
                    row["offset"], row["size"] = _add(tar, f"{key}.json", json.dumps(content).encode())
                    row["image_offset"], row["image_size"] = 0, 0
                    if image is not None:
                        picture = self.layout.source / image
                        row["image_offset"], row["image_size"] = _add(
                            tar, f"{key}{picture.suffix.lower() or '.img'}", picture.read_bytes()
                        )
                    self.rows.append(row)
            self.shards.append({"file": path.name, "sha256": file_sha256(path), "size": path.stat().st_size})

    @staticmethod
    def _candidate_sample(pair: tuple[CandidateRecord, list[str]]) -> Sample:
        record, pools = pair
        row = {"id": encode_id(record.did), "modality": record.modality.code, "task": "", "pools": pools}
        row["positives"] = []
        return row, {"did": record.did, "txt": record.text, "modality": record.modality.value}, record.image

    @staticmethod
    def _query_sample(record: QueryRecord) -> Sample:
        content = {
            "qid": record.qid,
            "query_txt": record.text,
            "query_modality": record.modality.value,
            "task_id": record.task.task_id,
            "pos_cand_list": record.positives,
            "neg_cand_list": record.negatives,
        }
        row = {
            "id": encode_id(record.qid),
            "modality": record.modality.code,
            "task": record.task.name,
            "pools": [],
            "positives": [encode_id(did) for did in record.positives],
        }
        return row, content, record.image

    def _check_bad(self, limit: float) -> None:
        share = len(self.bad) / max(1, self.total)
        if share > limit:
            first = "; ".join(f"{b['record']}: {b['reason']}" for b in self.bad[:5])
            raise UserInputError(
                f"{len(self.bad)} of {self.total} records of {self.layout.source} cannot be used ({share:.2%}, "
                f"max_bad_fraction={limit:.2%}): {first}. Mend them, or raise max_bad_fraction to leave them out"
            )


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """Add a file to a tar; returns where its bytes begin, and their number."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    padded = -len(data) % tarfile.BLOCKSIZE + len(data)
    return tar.offset - padded, len(data)


def _picture_problem(path: Path) -> str | None:
    if not path.is_file():
        return "is missing"
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # PIL raises many kinds of errors on broken files
        return f"cannot be decoded ({error})"
    return None
