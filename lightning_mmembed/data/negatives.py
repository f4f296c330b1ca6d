"""Mined hard negatives on disk: one Parquet file a version, written by the miner, drawn from by the training stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lightning_mmembed.data.instructions import draw
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import replacing
from lightning_mmembed.items import decode_id
from lightning_mmembed.mining import WRONG_CONTENT, WRONG_MODALITY

KINDS = (WRONG_MODALITY, WRONG_CONTENT)

SCHEMA = pa.schema(
    {
        "qid": pa.int64(),  # encode_id(qid) of a training query
        "did": pa.int64(),
        "kind": pa.int8(),  # position in KINDS
        "rank": pa.int16(),  # 1-based, in the ranking it was mined from
        "score": pa.float32(),
    }
)


def write_negatives(path: str | Path, rows: dict[str, Any], made_of: dict[str, Any], audit: dict[str, Any]) -> Path:
    """Write a version of mined negatives.

    Args:
        path: The Parquet file.
        rows: A column for each name of :data:`SCHEMA`.
        made_of: What they were mined with: fingerprints of the ``encoder`` and the ``pool``, and the settings.
        audit: What was counted while mining, kept in the file's metadata.
    """
    metadata = {"made_of": json.dumps(made_of), "audit": json.dumps(audit)}
    table = pa.table(rows, schema=SCHEMA).replace_schema_metadata(metadata)
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
    return Path(path)


class MinedNegatives:
    """Reads a version of mined negatives.

    Args:
        path: What :func:`write_negatives` wrote.

    Raises:
        UserInputError: If there is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserInputError(f"negatives={str(path)!r} is missing; mine again, or give the file of another version")
        table = pq.read_table(self.path)
        metadata = table.schema.metadata or {}
        self.made_of: dict[str, Any] = json.loads(metadata.get(b"made_of", b"{}"))
        self.audit: dict[str, Any] = json.loads(metadata.get(b"audit", b"{}"))
        columns = {name: table[name].to_numpy() for name in ("qid", "kind", "did")}
        order = np.lexsort((columns["kind"], columns["qid"]))
        self._qid, self._kind, self._did = (columns[name][order] for name in ("qid", "kind", "did"))

    def check_pool(self, pool: str) -> None:
        """Refuse negatives that were mined in another pool.

        Raises:
            UserInputError: If the fingerprint of the pool is another.
        """
        if self.made_of.get("pool") != pool:
            raise UserInputError(
                f"negatives={str(self.path)!r} were mined in another dataset, or before its shards were made anew; "
                "mine again"
            )

    def of(self, qid: int) -> tuple[np.ndarray, np.ndarray]:
        """The mined ``did`` of a query: those of the wrong modality, those of the wrong content."""
        start, end = np.searchsorted(self._qid, [qid, qid + 1])
        middle = start + np.searchsorted(self._kind[start:end], 1)
        return self._did[start:middle], self._did[middle:end]


def draw_negatives(
    mined: MinedNegatives | None, pool: np.ndarray, qid: int, positives: Sequence[int], n: int, seed: int, epoch: int
) -> list[int]:
    """Draw the negatives of a query, a pure function of its arguments.

    Each is drawn from the two mined kinds with equal chance (the paper's triplets). Where one kind is empty the other
    is used; where both are, any candidate of the pool that is no labelled positive: the number of negatives is the
    same for every query, which a gather across processes needs.

    Args:
        mined: The mined negatives.
        pool: ``(N,)`` ids of the training pool.
        qid: The query.
        positives: Ids of its labelled positives.
        n: How many to draw.
        seed: Seed of the run.
        epoch: The epoch.

    Returns:
        ``n`` ids, none of them a labelled positive.
    """
    kinds = [part for part in (mined.of(qid) if mined is not None else ()) if len(part)]
    drawn = []
    for i in range(n):
        if kinds:
            part = kinds[draw(len(kinds), seed, epoch, "kind", qid, i)]
            drawn.append(int(part[draw(len(part), seed, epoch, "negative", qid, i)]))
            continue
        for attempt in range(len(pool)):
            did = int(pool[draw(len(pool), seed, epoch, "random", qid, i, attempt)])
            if did not in positives:
                drawn.append(did)
                break
        else:  # a small pool, most of it positives
            free = pool[~np.isin(pool, positives)]
            if not len(free):
                raise UserInputError(
                    f"query {decode_id(qid)}: every candidate of the training pool is a labelled positive of it"
                )
            drawn.append(int(free[draw(len(free), seed, epoch, "random", qid, i)]))
    return drawn
