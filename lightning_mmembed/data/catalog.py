"""What a conversion has read so far, in an SQLite file: it outlives a kill and is never held in memory."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from lightning_mmembed.data.layout import SPLITS, dataset_of
from lightning_mmembed.data.records import BadRecord, CandidateRecord, Layout, Noted, QueryRecord
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import decode_id, encode_id
from lightning_mmembed.mining_rule import KINDS, WRONG_CONTENT

_SCHEMA = """
BEGIN;
CREATE TABLE done (step TEXT PRIMARY KEY);
CREATE TABLE pools (number INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE pictures (
    number INTEGER PRIMARY KEY, path TEXT UNIQUE, shard INTEGER, place INTEGER, size INTEGER, problem TEXT);
CREATE TABLE candidates (id INTEGER PRIMARY KEY, text TEXT, picture INTEGER, modality INTEGER);
CREATE TABLE members (id INTEGER, pool INTEGER, PRIMARY KEY (id, pool)) WITHOUT ROWID;
CREATE TABLE queries (
    number INTEGER PRIMARY KEY, split TEXT, id INTEGER, task TEXT, text TEXT, picture INTEGER, modality INTEGER,
    positives TEXT, negatives TEXT, weight INTEGER, UNIQUE (split, id));
CREATE TABLE bad (number INTEGER PRIMARY KEY, record TEXT, reason TEXT, UNIQUE (record, reason));
CREATE TABLE unreachable (number INTEGER PRIMARY KEY, record TEXT);
COMMIT;
"""

# Of sources that have ids of their own; apart, so that a conversion which an earlier version began can go on.
_MORE = """
CREATE TABLE IF NOT EXISTS sources (
    split TEXT, id INTEGER, name TEXT, grades TEXT, ignored TEXT, PRIMARY KEY (split, id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS noted (what TEXT PRIMARY KEY, number INTEGER);
"""


class Catalog:
    """The records of a source and where their pictures lie.

    Args:
        path: The SQLite file; made if it is absent.
        layout: The source.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.layout = layout
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.execute("PRAGMA synchronous = NORMAL")
        self.db.execute("PRAGMA cache_size = -131072")  # KiB: all the memory it takes
        if not self.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'done'").fetchone():
            self.db.executescript(_SCHEMA)
        self.db.executescript(_MORE)

    def close(self) -> None:
        """Close the file."""
        self.db.close()

    def read(self, progress: Progress) -> None:
        """Read every file of the source, each whole or not at all."""
        pools: dict[Path, list[str]] = {}
        for name, path in self.layout.pool_files():
            pools.setdefault(path, []).append(name)
        steps: list[tuple[str, Path, Callable[[Path], Iterator[None]]]]
        read: Callable[[Path], Iterator[None]]
        steps = [(str(path), path, partial(self._read_pool, names=names)) for path, names in pools.items()]
        upsampled = self.layout.upsampled_files()
        for split in SPLITS:
            # Where there is an up-sampled file, it alone says how often a query counts.
            weight = 0 if split == "train" and upsampled else 1
            read = partial(self._read_queries, split=split, weight=weight)
            for path in self.layout.query_files(split):  # which may be a pool file, too
                steps.append((f"queries of {path}" if path in pools else str(path), path, read))
        steps += [(str(path), path, partial(self._read_queries, split="train", weight=1)) for path in upsampled]
        bar = progress.add_task("reading records", total=None)
        for step, path, read in steps:
            if self.is_done(step):
                continue
            progress.update(bar, description=f"reading {path.name}")
            with self._transaction(step):
                for _ in read(path):
                    progress.advance(bar)
        progress.remove_task(bar)

    def settle(self, max_bad_fraction: float) -> None:
        """Leave out what cannot be used: records whose picture cannot, training queries that nothing can answer.

        Raises:
            UserInputError: If that is too much; nothing is left out then.
        """
        if self.is_done("settled"):
            return
        broken = "picture IN (SELECT number FROM pictures WHERE problem IS NOT NULL)"
        named = {"candidates": "name(t.id)", "queries": "t.split || ' ' || name(t.id)"}
        with self._transaction("settled"):
            self.db.create_function("name", 1, decode_id)
            for table, record in named.items():
                self.db.execute(
                    f"INSERT OR IGNORE INTO bad (record, reason) SELECT {record}, 'picture ' || p.path || ' ' || "
                    f"p.problem FROM {table} t JOIN pictures p ON p.number = t.picture WHERE p.problem IS NOT NULL "
                    "ORDER BY t.rowid"
                )
            self.db.execute(f"DELETE FROM members WHERE id IN (SELECT id FROM candidates WHERE {broken})")
            for table in named:
                self.db.execute(f"DELETE FROM {table} WHERE {broken}")
            for split in SPLITS:
                self._settle_split(split)
            self.check_bad(max_bad_fraction)

    def forget_broken_pictures(self) -> None:
        """Let the next run read broken pictures again, with those of the same shard: they may be mended by then."""
        again = "shard IN (SELECT shard FROM pictures WHERE problem IS NOT NULL)"
        self.db.execute(f"UPDATE pictures SET shard = NULL WHERE {again}")
        self.db.execute("UPDATE pictures SET problem = NULL")
        self.db.execute("DELETE FROM done WHERE step = 'pictures'")

    def _settle_split(self, split: str) -> None:
        pools = "name = 'train'" if split == "train" else f"name LIKE '%/{split}'"
        lost = f"""FROM queries q WHERE split = '{split}' AND NOT EXISTS (
            SELECT 1 FROM json_each(q.positives) e JOIN members m ON m.id = e.value
            WHERE m.pool IN (SELECT number FROM pools WHERE {pools}))"""
        if split == "train":
            self.db.execute(
                "INSERT OR IGNORE INTO bad (record, reason) SELECT 'train ' || name(q.id), 'no positive of ' || "
                "coalesce((SELECT group_concat(name(e.value)) FROM json_each(q.positives) e), 'none') || "
                "' is in the training pool' " + lost
            )
            self.db.execute(f"DELETE FROM queries WHERE number IN (SELECT number {lost})")
        else:  # it counts, as a query that no retriever can answer
            self.db.execute(f"INSERT INTO unreachable (record) SELECT '{split} ' || name(q.id) {lost} ORDER BY number")

    def check_bad(self, limit: float) -> None:
        """Refuse a source with too many records that cannot be used.

        Raises:
            UserInputError: If their share is above ``limit``.
        """
        bad = self.count("bad")
        total = bad + self.count("candidates") + self.count("queries")
        share = bad / max(1, total)
        if share > limit:
            rows = self.db.execute("SELECT record, reason FROM bad ORDER BY number LIMIT 5")
            first = "; ".join(f"{record}: {reason}" for record, reason in rows)
            raise UserInputError(
                f"{bad} of {total} records of {self.layout.source} cannot be used ({share:.2%}, "
                f"max_bad_fraction={limit:.2%}): {first}. Mend them, or raise max_bad_fraction to leave them out"
            )

    def is_done(self, step: str) -> bool:
        """Whether a step has been finished."""
        return self.db.execute("SELECT 1 FROM done WHERE step = ?", (step,)).fetchone() is not None

    def finish(self, step: str) -> None:
        """Record that a step has been finished."""
        self.db.execute("INSERT OR IGNORE INTO done VALUES (?)", (step,))

    def count(self, table: str, where: str = "1") -> int:
        """Rows of a table."""
        rows: int = self.db.execute(f"SELECT count(*) FROM {table} WHERE {where}").fetchone()[0]
        return rows

    def pool_names(self) -> list[str]:
        """The pools, in the order of their numbers."""
        return [name for (name,) in self.db.execute("SELECT name FROM pools ORDER BY number")]

    def given_negatives(self) -> dict[str, Any]:
        """The negatives that training queries name, by column of their file: of the wrong content, without scores."""
        found = self.db.execute(
            "SELECT q.id, e.value, e.key FROM queries q, json_each(q.negatives) e WHERE q.split = 'train' ORDER BY 1, 3"
        )
        rows = np.fromiter((value for qid, did, place in found for value in (qid, encode_id(did), place + 1)), np.int64)
        qids, dids, ranks = rows.reshape(-1, 3).T
        kinds = np.full(len(qids), KINDS.index(WRONG_CONTENT), dtype=np.int8)
        scores = np.full(len(qids), np.nan, dtype=np.float32)
        return {"qid": qids, "did": dids, "kind": kinds, "rank": ranks.astype(np.int16), "score": scores}

    @contextlib.contextmanager
    def _transaction(self, step: str) -> Iterator[None]:
        """Do a step whole or not at all."""
        self.db.execute("BEGIN")
        try:
            yield
        except BaseException:
            if self.db.in_transaction:  # a full disk has ended it
                self.db.execute("ROLLBACK")
            raise
        self.finish(step)
        self.db.execute("COMMIT")

    def _read_pool(self, path: Path, names: list[str]) -> Iterator[None]:
        pools = []
        for name in names:
            self.db.execute("INSERT OR IGNORE INTO pools (name) VALUES (?)", (name,))
            pools.append(self.db.execute("SELECT number FROM pools WHERE name = ?", (name,)).fetchone()[0])
        for record in self.layout.candidates(path):
            yield
            if isinstance(record, Noted | BadRecord):
                self._put_aside(record)
            elif not self._add_candidate(record):
                self._leave_out(f"{path}: {record.did}", "stands elsewhere with other content")
            else:
                code = encode_id(record.did)
                self._add_source("", code, record.source_id)
                self.db.executemany("INSERT OR IGNORE INTO members VALUES (?, ?)", [(code, pool) for pool in pools])

    def _add_candidate(self, record: CandidateRecord) -> bool:
        """Add a candidate; False if one with its id and other content is there."""
        row = (encode_id(record.did), record.text, self._picture(record.image), record.modality.code)
        if self.db.execute("INSERT OR IGNORE INTO candidates VALUES (?, ?, ?, ?)", row).rowcount:
            return True
        same = "SELECT 1 FROM candidates WHERE id = ? AND text = ? AND picture IS ? AND modality = ?"
        return self.db.execute(same, row).fetchone() is not None

    def _read_queries(self, path: Path, split: str, weight: int) -> Iterator[None]:
        dataset = dataset_of(path)
        judged = self.layout.qrels(split, dataset) if split != "train" else {}
        for record in self.layout.queries(path):
            yield
            if isinstance(record, Noted | BadRecord):
                self._put_aside(record)
                continue
            of_task, of_dataset = judged.get(record.task.name, {}), judged.get(dataset, {})
            positives = of_task.get(record.qid) or of_dataset.get(record.qid, record.positives)
            if not self._add_query(record, record.split or split, positives, weight):
                self._leave_out(f"{path}: {record.qid}", "stands elsewhere with other content")
                continue
            ignored = [encode_id(did) for did in record.ignored]
            self._add_source(
                record.split or split, encode_id(record.qid), record.source_id, list(record.grades), ignored
            )

    def _add_query(self, record: QueryRecord, split: str, positives: tuple[str, ...], weight: int) -> bool:
        row = (
            *(split, encode_id(record.qid), record.text, self._picture(record.image), record.modality.code),
            json.dumps([encode_id(did) for did in positives]),
        )
        columns = "split, id, text, picture, modality, positives"
        added = self.db.execute(
            f"INSERT OR IGNORE INTO queries ({columns}, task, negatives, weight) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)",
            (*row, record.task.name, json.dumps(record.negatives)),
        )
        if not added.rowcount:
            same = "split = ? AND id = ? AND text = ? AND picture IS ? AND modality = ? AND positives = ?"
            if self.db.execute(f"SELECT 1 FROM queries WHERE {same}", row).fetchone() is None:
                return False
        self.db.execute("UPDATE queries SET weight = weight + ? WHERE split = ? AND id = ?", (weight, *row[:2]))
        return True

    def _picture(self, path: str | None) -> int | None:
        if path is None:
            return None
        self.db.execute("INSERT OR IGNORE INTO pictures (path) VALUES (?)", (path,))
        number: int = self.db.execute("SELECT number FROM pictures WHERE path = ?", (path,)).fetchone()[0]
        return number

    def _add_source(
        self, split: str, code: int, name: str, grades: list[int] | None = None, ignored: list[int] | None = None
    ) -> None:
        if name:
            row = (split, code, name, json.dumps(grades or []), json.dumps(ignored or []))
            self.db.execute("INSERT OR IGNORE INTO sources VALUES (?, ?, ?, ?, ?)", row)

    def _put_aside(self, record: BadRecord | Noted) -> None:
        if isinstance(record, BadRecord):
            self._leave_out(record.where, record.reason)
        else:
            self.db.execute("INSERT OR REPLACE INTO noted VALUES (?, ?)", (record.what, record.number))

    def _leave_out(self, record: str, reason: str) -> None:
        self.db.execute("INSERT OR IGNORE INTO bad (record, reason) VALUES (?, ?)", (record, reason))
