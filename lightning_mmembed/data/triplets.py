"""Reads a file of JSON lines with a query, what answers it and what does not.

==========  ====================================================================
query       ``query`` or ``anchor``: a text
positives   ``positive``, ``positives``, ``pos`` or ``positive_passages``
negatives   ``negative``, ``negatives``, ``neg`` or ``negative_passages``, or
            ``negative_1``, ``negative_2`` and so on, or none
label       1, or 0 where what stands as positive is a negative; or none, as 1
==========  ====================================================================

Positives and negatives are a text or a list of texts; in place of a text, ``{"title": ..., "text": ...}`` may stand.
These are the names of sentence-transformers, FlagEmbedding and Tevatron, and what
``sentence_transformers.util.mine_hard_negatives`` gives as ``triplet``, ``n-tuple`` or ``labeled-pair``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_mmembed.data.layout import SPLITS
from lightning_mmembed.data.records import BadRecord, CandidateRecord, Noted, QueryRecord, read_records
from lightning_mmembed.data.texts import TextLayout, joined
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Modality

QUERY_KEYS = ("query", "anchor")
POSITIVE_KEYS = ("positive", "positives", "pos", "positive_passages")
NEGATIVE_KEYS = ("negative", "negatives", "neg", "negative_passages")
#: Where a line has neither negatives nor a label, some of its positives may be negatives by these.
UNREAD_KEYS = ("labels", "score", "scores")

_SCHEMA = """
CREATE TABLE documents (number INTEGER PRIMARY KEY, hash BLOB UNIQUE, text TEXT);
CREATE TABLE asked (number INTEGER PRIMARY KEY, hash BLOB UNIQUE, text TEXT);
CREATE TABLE links (place INTEGER PRIMARY KEY, query INTEGER, document INTEGER, positive INTEGER);
CREATE INDEX by_query ON links (query);
CREATE TABLE bad (place TEXT, reason TEXT);
"""


class TripletLayout(TextLayout):
    """A file of queries, positives and negatives.

    Equal texts are one document, and equal queries one query with the positives and negatives of all its lines; what is
    positive in one of them is no negative of it. Every document is in the pool. Numbers go by first appearance.

    Args:
        source: The file.
        **settings: See :class:`~lightning_mmembed.data.texts.TextLayout`.

    Raises:
        UserInputError: If there is no such file, or a setting cannot be used.
    """

    gives_negatives = True

    def __init__(self, source: str | Path, **settings: Any) -> None:
        super().__init__(source, **settings)
        if not self.source.is_file():
            raise UserInputError(f"source={str(source)!r} is no file; give a .jsonl of queries and positives")

    def files(self) -> list[Path]:
        """The file."""
        return [self.source]

    def query_files(self, split: str) -> list[Path]:
        """The file, for the training split; a query that is held out says so itself."""
        return [self.source] if split == "train" else []

    def pool_files(self) -> Iterator[tuple[str, Path]]:
        """The file, as the pool of every split."""
        return self.pools([split for split in SPLITS if split == "train" or self.fractions[split]], self.source)

    def candidates(self, path: Path) -> Iterator[CandidateRecord | BadRecord | Noted]:
        """Every text that answers a query or does not, and every line that cannot be used."""
        for place, reason in self._read.execute("SELECT place, reason FROM bad"):
            yield BadRecord(place, reason)
        for number, text in self._read.execute("SELECT number, text FROM documents ORDER BY number"):
            yield CandidateRecord(self.id_of(number), text, None, Modality.TEXT)

    def queries(self, path: Path) -> Iterator[QueryRecord | BadRecord | Noted]:
        """Every query with a positive, in the order of first appearance."""
        both = unanswered = 0
        for number, text in self._read.execute("SELECT number, text FROM asked ORDER BY number"):
            rows = self._read.execute("SELECT document, positive FROM links WHERE query = ? ORDER BY place", (number,))
            documents: dict[int, bool] = {}
            for document, positive in rows:
                both += documents.get(document, positive) != positive
                documents[document] = documents.get(document, False) or bool(positive)
            positives = tuple(self.id_of(document) for document, positive in documents.items() if positive)
            negatives = tuple(self.id_of(document) for document, positive in documents.items() if not positive)
            unanswered += not positives
            if not positives:
                continue
            yield QueryRecord(
                *(self.id_of(number), text, None, Modality.TEXT, self.task, positives, negatives),
                split=self.held_out(text),
            )
        if unanswered:
            yield Noted("queries with negatives alone", unanswered)
        if both:
            yield Noted("texts given as positive and as negative of one query, taken as positive", both)

    @cached_property
    def _read(self) -> Any:
        db = self.db
        db.executescript(_SCHEMA)
        db.execute("BEGIN")
        for record in read_records(self.source, self._add):
            if isinstance(record, BadRecord):
                db.execute("INSERT INTO bad VALUES (?, ?)", (record.where, record.reason))
        db.execute("COMMIT")
        return db

    def _add(self, _: int, record: Any) -> None:
        if not isinstance(record, dict):
            raise UserInputError(f"{record!r} is no object; write one with {QUERY_KEYS[0]} and {POSITIVE_KEYS[0]}")
        queries, positives = (_texts(record, keys) for keys in (QUERY_KEYS, POSITIVE_KEYS))
        negatives = _texts(record, NEGATIVE_KEYS)
        negatives += [text for key in record if re.fullmatch(r"negative_\d+", key) for text in _texts(record, (key,))]
        for found, keys in ((queries, QUERY_KEYS), (positives, POSITIVE_KEYS)):
            if not found:
                raise UserInputError(f"it has none of {', '.join(keys)}; write one")
        if len(queries) > 1:
            raise UserInputError(f"it has {len(queries)} queries; write a line for each")
        if not _is_positive(record, bool(negatives)):
            positives, negatives = [], positives + negatives
        query = self._number("asked", queries[0])
        for texts, positive in ((positives, 1), (negatives, 0)):
            for text in texts:
                row = (query, self._number("documents", text), positive)
                self.db.execute("INSERT INTO links (query, document, positive) VALUES (?, ?, ?)", row)

    def _number(self, table: str, text: str) -> int:
        """The number of a text, from 1."""
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        self.db.execute(f"INSERT OR IGNORE INTO {table} (hash, text) VALUES (?, ?)", (key, text))
        number: int = self.db.execute(f"SELECT number FROM {table} WHERE hash = ?", (key,)).fetchone()[0]
        return number


def _is_positive(record: dict[str, Any], has_negatives: bool) -> bool:
    """Whether what stands as positive is one."""
    label = record.get("label")
    unread = next((key for key in UNREAD_KEYS if record.get(key) is not None), None)
    if unread is not None and label is None and not has_negatives:
        raise UserInputError(
            f"{unread} is not read, and what it makes a negative would be taken for a positive; write positive and "
            "negative, or a line for each text with label 1 or 0 (of mine_hard_negatives: the output_format triplet, "
            "n-tuple or labeled-pair, without output_scores)"
        )
    if label not in (None, 0, 1):
        raise UserInputError(f"label={label!r} is neither 0 nor 1; write 1 for a positive and 0 for a negative")
    return label != 0


def _texts(record: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    """The texts at the first of some keys that there is."""
    key = next((key for key in keys if record.get(key) is not None), None)
    if key is None:
        return []
    value = record[key]
    texts = []
    for entry in value if isinstance(value, list) else [value]:
        text = joined(entry.get("title"), entry.get("text")) if isinstance(entry, dict) else joined(None, entry)
        if not text:
            raise UserInputError(f"{key} holds an empty text")
        texts.append(text)
    return texts
