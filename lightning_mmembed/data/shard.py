"""Turns a dataset, in M-BEIR's layout or of texts alone, into WebDataset shards, a Parquet index and a manifest.

::

    images-00000.tar ...         every picture once, under its name in the source, with its original bytes
    candidates-00000.tar ...     {did}.json, in canonical order of the ids
    queries-train-00000.tar ...  {qid}.json, per split
    index.parquet                a row per record: where it and its picture lie, modality, task, pools, positives
    instructions.tsv             as in the source
    negatives.parquet            the negatives that a text-to-text source gives, where it does
    manifest.json                counts, checksums, records left out and why, fingerprints

Memory does not grow with the dataset: what is read goes to an SQLite file, and a shard is written at a time. A run that
was killed goes on at the first missing shard.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_mmembed.data.catalog import Catalog
from lightning_mmembed.data.instructions import Instructions
from lightning_mmembed.data.jobs import (
    INDEX_SCHEMA,
    SOURCE_INDEX_SCHEMA,
    PictureJob,
    RecordJob,
    ShardJobs,
    run_jobs,
)
from lightning_mmembed.data.layout import SPLITS, TRAIN_POOL, MBEIRLayout, read_instructions
from lightning_mmembed.data.manifest import (
    FORMAT_VERSION,
    INDEX_FILE,
    INSTRUCTIONS_FILE,
    MANIFEST_FILE,
    NEGATIVES_FILE,
    finished_manifest,
    has_mended_pictures,
    source_fingerprint,
)
from lightning_mmembed.data.negatives import write_negatives
from lightning_mmembed.data.pictures import archive_beside, archive_parts, stream_archive
from lightning_mmembed.data.places import is_url
from lightning_mmembed.data.records import Layout
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import file_sha256, fingerprint, locked, replacing, resumable, write_atomically
from lightning_mmembed.items import Modality, Task, dataset_number, decode_id
from lightning_mmembed.progress import progress_bar

log = logging.getLogger(__name__)

#: Pictures in a shard, and bytes after which one that is filled from an archive is closed: it is held in memory.
PICTURES_PER_SHARD, PICTURE_BYTES_PER_SHARD = 2000, 64 << 20


def shard_dataset(
    source: str | Path | Layout,
    out: str | Path,
    *,
    archive: str | None = None,
    max_bad_fraction: float = 0.001,
    samples_per_shard: int = 10000,
    num_workers: int = 0,
    show_progress: bool = True,
) -> Path:
    """Write the shards of a dataset, unless those of this very source stand there already.

    Args:
        source: Folder in M-BEIR's layout, or a source in another, such as a
            :class:`~lightning_mmembed.data.beir.BEIRLayout`.
        out: Folder of the shards; stale shards there are replaced, anything else is left alone.
        archive: The picture archive, or a pattern of its parts, read as one stream without extracting it; by default
            the source's folder ``mbeir_images``, and where that is absent ``mbeir_images.tar.gz`` or its parts in the
            source.
        max_bad_fraction: Share of the records that may be left out because they cannot be used.
        samples_per_shard: Records in a tar file.
        num_workers: Processes that check pictures and write shards; 0 for none beside this one.
        show_progress: Show a progress bar with rate and ETA.

    Returns:
        ``out``.

    Raises:
        UserInputError: If the source is no such folder or incomplete, ``out`` holds something else, too many records
            are bad, or the disk is full. What was finished is kept for the next run over the same source; a part of
            the archive that was fetched anew makes it another source.
    """
    if is_url(out):
        raise UserInputError(
            f"out={str(out)!r} is a URL: write to a folder, copy it there, then read it with data.source=null"
        )
    layout: Layout = MBEIRLayout(source) if isinstance(source, str | Path) else source
    out = Path(out)
    with layout.open_prompts() as file:
        prompts = Instructions(read_instructions(file))
    parts = archive_parts(layout, archive) if isinstance(layout, MBEIRLayout) else []
    records, content = source_fingerprint(layout, []), source_fingerprint(layout, parts, samples_per_shard)
    made_of = fingerprint(records, content, max_bad_fraction)
    with locked(out), resumable(out):
        old = out.with_name(f".{out.name}.old.tmp")  # of a run that was killed as it was done
        shutil.rmtree(old, ignore_errors=True)
        finished = finished_manifest(out)
        if finished and finished.get("made_of") == made_of and not has_mended_pictures(finished, layout):
            log.info("%s was already made from this source", out)
            return out
        if out.exists() and any(out.iterdir()) and not finished:
            raise UserInputError(f"shards={str(out)!r} holds other files; give a new or empty folder")
        building = out.with_name(f".{out.name}.building")
        if (finished_manifest(building) or {}).get("made_of") != made_of:
            _start(building, content)
            conversion = _Conversion(layout, building, parts, samples_per_shard, num_workers, show_progress)
            conversion.run({"made_of": made_of, "records": records}, max_bad_fraction, prompts)
        _publish(building, out, old)
    return out


def _start(building: Path, content: str) -> None:
    """Keep what an earlier run of the same conversion finished, and nothing else."""
    note = building / "work" / "made_of"
    if not note.is_file() or note.read_text() != content:
        shutil.rmtree(building, ignore_errors=True)
        write_atomically(note, content)
    for leftover in (*building.glob(".*.tmp"), *(building / "work").glob(".*.tmp")):  # of a run that was killed
        leftover.unlink()


def _publish(building: Path, out: Path, old: Path) -> None:
    """Put finished shards in the place of what is at ``out``."""
    shutil.rmtree(building / "work", ignore_errors=True)
    if out.exists():  # moved away whole: deleting it in place could be cut short and leave a part of it
        out.rename(old)
    building.rename(out)
    shutil.rmtree(old, ignore_errors=True)


class _Conversion:
    """One conversion: reads the records, then writes pictures, records and manifest."""

    def __init__(
        self,
        layout: Layout,
        directory: Path,
        parts: list[Path],
        samples_per_shard: int,
        num_workers: int,
        show_progress: bool,
    ) -> None:
        self.layout, self.directory, self.parts = layout, directory, parts
        self.samples_per_shard, self.num_workers = samples_per_shard, num_workers
        self.progress = progress_bar(show_progress)
        self.database = directory / "work" / "catalog.sqlite"
        self.catalog = Catalog(self.database, layout)

    def run(self, made_of: dict[str, str], max_bad_fraction: float, prompts: Instructions) -> None:
        try:
            with self.progress:
                self.catalog.read(self.progress)
                if not self.catalog.count("candidates"):
                    self.catalog.check_bad(max_bad_fraction)  # where there were some it tells more
                    raise UserInputError(f"{self.layout.source} holds no candidate that can be used")
                self._check_pools()
                self._check_prompts(prompts)
                self.catalog.check_bad(max_bad_fraction)
                self._write_pictures()
                self._settle(max_bad_fraction)
                jobs = list(self._record_jobs())
                self._write_records(jobs)
            self._finish(jobs, made_of)
        finally:
            self.catalog.close()

    def _settle(self, max_bad_fraction: float) -> None:
        try:
            self.catalog.settle(max_bad_fraction)
        except UserInputError as error:
            if self.parts or not isinstance(self.layout, MBEIRLayout):
                raise
            self.catalog.forget_broken_pictures()
            unread = archive_beside(self.layout)
            if not unread:
                raise
            raise UserInputError(
                f"{error}. Pictures were read from {self.layout.source / 'mbeir_images'}, not from {unread[0]}: if the "
                "folder is not all of the archive, remove it, or give archive="
            ) from error

    def _check_pools(self) -> None:
        pools = set(self.catalog.pool_names())
        rows = self.catalog.db.execute("SELECT DISTINCT task || '/' || split FROM queries WHERE split != 'train'")
        missing = sorted({name for (name,) in rows} - pools)
        if missing:
            task = missing[0].partition("/")[0]
            raise UserInputError(
                f"{self.layout.source} has queries but no local pool for {', '.join(missing)}: "
                f"cand_pool/local/mbeir_{task}_cand_pool.jsonl is missing; fetch or write it"
            )

    def _check_prompts(self, prompts: Instructions) -> None:
        """Refuse queries that no instruction is there for, before hours are spent on their pictures."""
        self.catalog.db.create_function("dataset", 1, dataset_number)
        kinds = self.catalog.db.execute("SELECT min(id), modality, task FROM queries GROUP BY dataset(id), 2, 3")
        missing = []
        for code, modality, task in kinds:
            try:
                prompts.choices(decode_id(code), list(Modality)[modality], Task.parse(task))
            except UserInputError as error:
                missing.append(str(error))
        if missing:
            lacking = "\n  ".join(missing)
            raise UserInputError(f"{self.layout.source}: query_instructions.tsv lacks lines:\n  {lacking}")

    def _write_pictures(self) -> None:
        """Write every picture that a record names, and note where it lies or why it cannot be used."""
        db = self.catalog.db
        if self.catalog.is_done("pictures"):
            return
        total = self.catalog.count("pictures")
        bar = self.progress.add_task("writing pictures", total=total)
        written = {shard for (shard,) in db.execute("SELECT DISTINCT shard FROM pictures WHERE shard IS NOT NULL")}
        jobs = (job for job in self._picture_jobs() if job.shard not in written)
        self.progress.advance(bar, self.catalog.count("pictures", "shard IS NOT NULL"))
        for places in run_jobs(ShardJobs(self.directory, self.database, self.layout.source), jobs, self.num_workers):
            db.execute("BEGIN")
            db.executemany("UPDATE pictures SET shard = ?, place = ?, size = ?, problem = ? WHERE number = ?", places)
            db.execute("COMMIT")
            self.progress.advance(bar, len(places))
        missing = "is missing from the archive" if self.parts else "is missing"
        db.execute("UPDATE pictures SET problem = ? WHERE shard IS NULL", (missing,))
        self.catalog.finish("pictures")
        self.progress.remove_task(bar)

    def _picture_jobs(self) -> Iterator[PictureJob]:
        """The shards of pictures: in order of first mention from a folder, in its own order from an archive."""
        if self.parts:
            yield from self._archive_jobs()
            return
        some = "SELECT number, path, NULL FROM pictures WHERE number > ? AND number <= ? ORDER BY number"
        for shard, start in enumerate(range(0, self.catalog.count("pictures"), PICTURES_PER_SHARD)):
            yield PictureJob(shard, self.catalog.db.execute(some, (start, start + PICTURES_PER_SHARD)).fetchall())

    def _archive_jobs(self) -> Iterator[PictureJob]:
        db = self.catalog.db
        total, shard, size = self.catalog.count("pictures"), 0, 0
        taken = bytearray(total + 1)
        batch: list[tuple[int, str, bytes | None]] = []
        for path, data in stream_archive(self.parts) if total else ():
            row = db.execute("SELECT number FROM pictures WHERE path = ?", (path,)).fetchone()
            if row is None or taken[row[0]]:
                continue
            taken[row[0]] = 1
            batch.append((row[0], path, data))
            size += len(data)
            if len(batch) == PICTURES_PER_SHARD or size >= PICTURE_BYTES_PER_SHARD:
                yield PictureJob(shard, batch)
                batch, size, shard = [], 0, shard + 1
        if batch:
            yield PictureJob(shard, batch)

    def _record_jobs(self) -> Iterator[RecordJob]:
        """The shards of records, each a range of ids or of numbers."""
        shard = self.catalog.db.execute("SELECT coalesce(max(shard) + 1, 0) FROM pictures").fetchone()[0]
        ranges = [("candidates", "", "SELECT id FROM candidates ORDER BY id")]
        ranges += [
            (f"queries-{split}", split, f"SELECT number FROM queries WHERE split = '{split}' ORDER BY number")
            for split in SPLITS
        ]
        for kind, split, query in ranges:
            keys = (key for (key,) in self.catalog.db.execute(query))
            for number, chunk in enumerate(_chunks(keys, self.samples_per_shard)):
                yield RecordJob(shard, f"{kind}-{number:05d}", split, *chunk)
                shard += 1

    def _write_records(self, jobs: list[RecordJob]) -> None:
        work = self.directory / "work"
        bar = self.progress.add_task("writing records", total=sum(job.count for job in jobs))
        done = {job for job in jobs if (work / f"{job.name}.parquet").is_file()}
        self.progress.advance(bar, sum(job.count for job in done))
        todo = (job for job in jobs if job not in done)
        writer = ShardJobs(self.directory, self.database, self.layout.source, self._index_schema())
        for count in run_jobs(writer, todo, self.num_workers):
            self.progress.advance(bar, count)
        self.progress.remove_task(bar)

    def _finish(self, jobs: list[RecordJob], made_of: dict[str, str]) -> None:
        """Write index and manifest; the manifest comes last and makes the shards whole."""
        pools = dict.fromkeys(self.catalog.pool_names(), 0)
        schema = self._index_schema()
        with replacing(self.directory / INDEX_FILE) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for job in jobs:
                writer.write_table(pq.read_table(self.directory / "work" / f"{job.name}.parquet"))
        db = self.catalog.db
        counted = "SELECT name, count(*) FROM members JOIN pools ON number = pool GROUP BY pool ORDER BY pool"
        pools |= dict(db.execute(counted).fetchall())
        queries = dict(db.execute("SELECT task || '/' || split, count(*) FROM queries GROUP BY split, task").fetchall())
        n_images = db.execute("SELECT coalesce(max(shard) + 1, 0) FROM pictures").fetchone()[0]
        names = [f"images-{number:05d}.tar" for number in range(n_images)] + [f"{job.name}.tar" for job in jobs]
        shards = [
            {"file": name, "sha256": file_sha256(self.directory / name), "size": (self.directory / name).stat().st_size}
            for name in names
        ]
        with self.layout.open_prompts() as file:
            write_atomically(self.directory / INSTRUCTIONS_FILE, file.read())
        others = [file_sha256(self.directory / name) for name in (INDEX_FILE, INSTRUCTIONS_FILE)]
        manifest: dict[str, Any] = {
            "version": FORMAT_VERSION,
            **made_of,  # of which source, with the settings and without: they tell whether the shards are stale
            "fingerprint": fingerprint(shards, others),  # of the content: what vectors and negatives are known by
            "source": str(self.layout.source.resolve()),
            "archive": [part.name for part in self.parts],
            "counts": {"candidates": self.catalog.count("candidates"), "pools": pools, "queries": queries},
            "shards": shards,
            "bad_records": [
                {"record": record, "reason": reason}
                for record, reason in db.execute("SELECT record, reason FROM bad ORDER BY number")
            ],
            "broken_pictures": [
                path for (path,) in db.execute("SELECT path FROM pictures WHERE problem IS NOT NULL ORDER BY number")
            ],
            "queries_without_reachable_positive": [
                record for (record,) in db.execute("SELECT record FROM unreachable ORDER BY number")
            ],
            "noted": dict(db.execute("SELECT what, number FROM noted ORDER BY rowid").fetchall()),
        }
        self._write_negatives(manifest["fingerprint"])
        write_atomically(self.directory / MANIFEST_FILE, json.dumps(manifest, indent=1))

    def _index_schema(self) -> pa.Schema:
        return SOURCE_INDEX_SCHEMA if self.catalog.count("sources") else INDEX_SCHEMA

    def _write_negatives(self, content: str) -> None:
        """Write the negatives that the source gives like those that are mined: a training run can start with them."""
        columns = self.catalog.given_negatives() if self.layout.gives_negatives else {}
        if count := len(columns.get("qid", ())):
            made_of = {"source": str(self.layout.source.resolve()), "pool": f"{content}/{TRAIN_POOL}"}
            write_negatives(self.directory / NEGATIVES_FILE, columns, made_of, {"given": count})


def _chunks(keys: Iterable[int], size: int) -> Iterator[tuple[int, int, int]]:
    """First key, last key and number of keys of every chunk."""
    keys = iter(keys)
    while chunk := list(islice(keys, size)):
        yield chunk[0], chunk[-1], len(chunk)
