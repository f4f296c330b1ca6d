"""Reads a folder in BEIR's layout.

::

    corpus.jsonl        {"_id": ..., "title": ..., "text": ...}; the title may be absent
    queries.jsonl       {"_id": ..., "text": ...}
    qrels/train.tsv     query-id, corpus-id and score between tabs, with a header; a score of 0 is not relevant
    qrels/dev.tsv       likewise; val.tsv is the same
    qrels/test.tsv
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning_mmembed.data.layout import SPLITS
from lightning_mmembed.data.records import BadRecord, CandidateRecord, Noted, QueryRecord, read_records
from lightning_mmembed.data.texts import TextLayout, joined, plain
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Modality

_SPLIT_NAMES = {"train": "train", "dev": "val", "val": "val", "test": "test"}

_SCHEMA = """
CREATE TABLE documents (name TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID;
CREATE TABLE asked (name TEXT PRIMARY KEY, number INTEGER UNIQUE, text TEXT) WITHOUT ROWID;
CREATE TABLE itself (query INTEGER PRIMARY KEY, document INTEGER);
CREATE TABLE judged (split TEXT, query INTEGER, document INTEGER, grade INTEGER, PRIMARY KEY (split, query, document))
    WITHOUT ROWID;
CREATE TABLE bad (split TEXT, place TEXT, reason TEXT);
"""


class BEIRLayout(TextLayout):
    """A folder in BEIR's layout.

    A document's number is that of its line in ``corpus.jsonl``, a query's of its line in ``queries.jsonl``; the ``_id``
    of both is kept as ``source_id``. Queries that no ``qrels`` file names are left aside. So are training queries
    without a relevant document; in another split such a query counts, as one that nothing can answer.

    A document that has the ``_id`` and the text of a query is the query itself, as in ArguAna: it is left out of the
    query's own rankings, unless it is labelled. One that only shares the ``_id`` stays.

    Args:
        source: The folder.
        **settings: See :class:`~lightning_mmembed.data.texts.TextLayout`.

    Raises:
        UserInputError: If a file is missing or has another name, or a setting cannot be used.
    """

    def __init__(self, source: str | Path, **settings: Any) -> None:
        super().__init__(source, **settings)
        for name in ("corpus.jsonl", "queries.jsonl", "qrels"):
            if not (self.source / name).exists():
                raise UserInputError(f"{self.source / name} is missing; BEIR's layout needs it")
        self.judgements: dict[str, Path] = {}
        for path in sorted((self.source / "qrels").glob("[!.]*")):
            split = _SPLIT_NAMES.get(path.stem) if path.suffix == ".tsv" else None
            if split is None or split in self.judgements:
                raise UserInputError(
                    f"{path} would not be read; write one of train.tsv, dev.tsv and test.tsv for each split, or move "
                    "it away"
                )
            self.judgements[split] = path
        if not self.judgements:
            raise UserInputError(f"{self.source / 'qrels'} holds no file; write train.tsv, dev.tsv or test.tsv")
        for split, share in self.fractions.items():
            if share and (split in self.judgements or "train" not in self.judgements):
                found = ", ".join(path.name for path in self.judgements.values())
                raise UserInputError(
                    f"{split}_fraction={share}: {self.source / 'qrels'} holds {found}; training queries are split, "
                    "where there is no such split"
                )

    def files(self) -> list[Path]:
        """The files of documents, queries and judgements."""
        return [self.source / "corpus.jsonl", self.source / "queries.jsonl", *self.judgements.values()]

    def query_files(self, split: str) -> list[Path]:
        """The judgements of a split: they say which queries it has."""
        return [self.judgements[split]] if split in self.judgements else []

    def pool_files(self) -> Iterator[tuple[str, Path]]:
        """The corpus, as the pool of every split."""
        splits = [split for split in SPLITS if split in self.judgements or self.fractions.get(split)]
        return self.pools(splits, self.source / "corpus.jsonl")

    def candidates(self, path: Path) -> Iterator[CandidateRecord | BadRecord | Noted]:
        """Read the corpus; see :func:`~lightning_mmembed.data.texts.joined`."""
        empty = 0
        for record in read_records(path, self._document):
            empty += isinstance(record, CandidateRecord) and not record.text
            yield record
        if empty:
            yield Noted("documents without text", empty)

    def queries(self, path: Path) -> Iterator[QueryRecord | BadRecord | Noted]:
        """Read the queries of a file of judgements, in the order of ``queries.jsonl``."""
        split = _SPLIT_NAMES[path.stem]
        for place, reason in self._read.execute("SELECT place, reason FROM bad WHERE split = ?", (split,)):
            yield BadRecord(place, reason)
        rows = self._read.execute(
            "SELECT a.number, a.name, a.text, j.document, j.grade, i.document FROM judged j JOIN asked a "
            "ON a.number = j.query LEFT JOIN itself i ON i.query = j.query WHERE j.split = ? ORDER BY 1, 4",
            (split,),
        )
        unanswered = 0
        for (number, name, text, itself), judged in groupby(rows, lambda row: (*row[:3], row[5])):
            relevant = [(self.id_of(document), grade) for _, _, _, document, grade, _ in judged if grade > 0]
            own = self.held_out(text) if split == "train" else split
            if not relevant and own == "train":
                unanswered += 1
                continue
            positives, grades = zip(*relevant, strict=True) if relevant else ((), ())
            ignored = () if itself is None or self.id_of(itself) in positives else (self.id_of(itself),)
            yield QueryRecord(
                *(self.id_of(number), text, None, Modality.TEXT, self.task, positives, ()),
                source_id=name,
                grades=grades,
                ignored=ignored,
                split=own,
            )
        if unanswered:
            yield Noted("training queries without a relevant document", unanswered)
        if path == next(iter(self.judgements.values())):
            left = "SELECT count(*) FROM asked WHERE number NOT IN (SELECT query FROM judged)"
            if count := self._read.execute(left).fetchone()[0]:
                yield Noted("queries without judgements", count)

    @cached_property
    def _read(self) -> Any:
        """All that judgements refer to: ids and numbers of the documents, queries, judgements."""
        db = self.db
        db.executescript(_SCHEMA)
        db.execute("BEGIN")
        first = next(iter(self.judgements))  # bad queries are told with the judgements that are read first
        for record in read_records(self.source / "queries.jsonl", self._query):
            if isinstance(record, BadRecord):
                db.execute("INSERT INTO bad VALUES (?, ?, ?)", (first, record.where, record.reason))
        for _ in read_records(self.source / "corpus.jsonl", self._know):
            pass  # a bad record is told where the corpus is read as a pool
        for split, path in self.judgements.items():
            self._judge(split, path)
        db.execute("COMMIT")
        return db

    def _query(self, number: int, record: Any) -> None:
        name, text = _name(record), joined(None, record["text"])
        if not text:
            raise UserInputError(f"query {name!r} has no text")
        if not self.db.execute("INSERT OR IGNORE INTO asked VALUES (?, ?, ?)", (name, number, text)).rowcount:
            raise UserInputError(f"_id={name!r} stands in an earlier line, too")

    def _know(self, number: int, record: Any) -> None:
        name, text = _name(record), joined(record.get("title"), record.get("text"))
        if not self.db.execute("INSERT OR IGNORE INTO documents VALUES (?, ?)", (name, number)).rowcount:
            return
        same = self.db.execute("SELECT number, text FROM asked WHERE name = ?", (name,)).fetchone()
        if same and plain(same[1]) in (plain(text), plain(record.get("text") or "")):
            self.db.execute("INSERT INTO itself VALUES (?, ?)", (same[0], number))

    def _document(self, number: int, record: Any) -> CandidateRecord:
        name, text = _name(record), joined(record.get("title"), record.get("text"))
        (first,) = self._read.execute("SELECT number FROM documents WHERE name = ?", (name,)).fetchone()
        if first != number:
            raise UserInputError(f"_id={name!r} stands in line {first}, too")
        return CandidateRecord(self.id_of(number), text, None, Modality.TEXT, source_id=name)

    def _judge(self, split: str, path: Path) -> None:
        # Bytes: lines end at \n alone, as everywhere here.
        for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            columns = line.decode("utf-8", "replace").rstrip("\r").split("\t")
            is_header = number == 1 and not re.fullmatch(r"-?\d+", columns[-1])
            if not line.strip() or is_header:
                continue
            problem = self._add_judgement(split, columns)
            if problem:
                self.db.execute("INSERT INTO bad VALUES (?, ?, ?)", (split, f"{path}:{number}", problem))

    def _add_judgement(self, split: str, columns: list[str]) -> str | None:
        """Returns what is wrong with a line."""
        if len(columns) != 3 or not re.fullmatch(r"-?\d+", columns[2]):
            return f"{columns!r} is no judgement; write query-id, corpus-id and a whole number between tabs"
        numbers = []
        for table, name, file in (("asked", columns[0], "queries"), ("documents", columns[1], "corpus")):
            row = self.db.execute(f"SELECT number FROM {table} WHERE name = ?", (name,)).fetchone()
            if row is None:
                return f"{name!r} is not in {file}.jsonl"
            numbers.append(row[0])
        values = (split, *numbers, int(columns[2]))
        if self.db.execute("INSERT OR IGNORE INTO judged VALUES (?, ?, ?, ?)", values).rowcount:
            return None
        where = "split = ? AND query = ? AND document = ? AND grade = ?"
        same = self.db.execute(f"SELECT 1 FROM judged WHERE {where}", values).fetchone()
        return None if same else f"{columns[0]!r} and {columns[1]!r} have another score in an earlier line"


def _name(record: Any) -> str:
    """The ``_id`` of a line; a whole number is taken as its digits."""
    value = record["_id"]
    if type(value) is int:
        return str(value)
    if not isinstance(value, str) or not value or re.search(r"[\t\r\n]", value):
        raise UserInputError(f"_id={value!r} is no id; write a text without tabs and line breaks")
    return value
