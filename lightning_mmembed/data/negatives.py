"""Mined hard negatives on disk: one Parquet file a version, written by the miner, drawn from by the training stream."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lightning_mmembed.data.instructions import draw
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import replacing
from lightning_mmembed.items import decode_id
from lightning_mmembed.mining_rule import KINDS as KINDS

#: The share of the wrong modality among the drawn negatives: a number; a number for each epoch, of which the last goes
#: on; or from ``start`` in the first epoch by equal steps to ``end`` in the last of so many ``epochs``. All epochs of a
#: run count, those without negatives too.
Share = float | Sequence[float] | Mapping[str, float]

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


def read_columns(path: str | Path) -> dict[str, np.ndarray]:
    """The columns of :data:`SCHEMA` of a file of negatives, each ``(N,)``, in the order of the file."""
    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in SCHEMA.names}


class MinedNegatives:
    """Reads a version of mined negatives, or several files that belong together.

    Args:
        path: What :func:`write_negatives` wrote; several files such as one for each of the datasets that are mixed.

    Raises:
        UserInputError: If there is no such file.

    Attributes:
        made_of: What the first file was mined with.
        audit: What was counted then.
    """

    def __init__(self, path: str | Path | Sequence[str | Path]) -> None:
        self.paths = [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]
        for one in self.paths:
            if not one.is_file():
                raise UserInputError(
                    f"negatives={str(one)!r} is missing; mine again, or give the file of another version"
                )
        tables = [pq.read_table(one) for one in self.paths]
        metadata = [table.schema.metadata or {} for table in tables]
        self._made_of = [json.loads(some.get(b"made_of", b"{}")) for some in metadata]
        self.made_of: dict[str, Any] = self._made_of[0]
        self.audit: dict[str, Any] = json.loads(metadata[0].get(b"audit", b"{}"))
        table = pa.concat_tables(table.replace_schema_metadata() for table in tables)
        columns = {name: table[name].to_numpy() for name in ("qid", "kind", "did")}
        order = np.lexsort((columns["kind"], columns["qid"]))
        self._qid, self._kind, self._did = (columns[name][order] for name in ("qid", "kind", "did"))

    def check_pool(self, *pools: str) -> None:
        """Refuse negatives that were mined in another pool.

        Args:
            *pools: Fingerprints of the pool and of what it is made of.

        Raises:
            UserInputError: If the fingerprint of a file's pool is none of them.
        """
        for path, made_of in zip(self.paths, self._made_of, strict=True):
            if made_of.get("pool") in pools:
                continue
            raise UserInputError(
                f"negatives={str(path)!r} were mined in another dataset, in a pool that cannot be used here, "
                "or before the shards were made anew; mine again"
            )

    def of(self, qid: int) -> tuple[np.ndarray, ...]:
        """The mined ``did`` of a query, for each of :data:`KINDS`."""
        start, end = np.searchsorted(self._qid, [qid, qid + 1])
        bounds = start + np.searchsorted(self._kind[start:end], np.arange(len(KINDS) + 1))
        return tuple(self._did[bounds[i] : bounds[i + 1]] for i in range(len(KINDS)))


def audit_of(path: str | Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """What was counted when a file was mined with just the same; ``None`` if there is no such file.

    Args:
        path: The file.
        made_of: What it is to be mined with.
    """
    if not Path(path).is_file():
        return None
    metadata = pq.read_schema(path).metadata or {}
    same = json.loads(metadata.get(b"made_of", b"null")) == made_of
    audit: dict[str, Any] | None = json.loads(metadata[b"audit"]) if same else None
    return audit


def check_share(share: Share) -> None:
    """Refuse a share that is none.

    Raises:
        UserInputError: If a number is not from 0 to 1, an entry is missing, or there is no last epoch.
    """
    message = f"wrong_modality_share={share!r} cannot be used: "
    if isinstance(share, Mapping):
        if set(share) != {"start", "end", "epochs"}:
            raise UserInputError(f"{message}write start, end and epochs, such as {{start: 1.0, end: 0.5, epochs: 8}}")
        if not (_is_number(share["epochs"]) and share["epochs"] >= 1):
            raise UserInputError(
                f"{message}epochs={share['epochs']} has no last epoch, as with trainer.max_epochs=-1; say after how "
                "many epochs end is reached, such as data.wrong_modality_share.epochs=8"
            )
        numbers = [share["start"], share["end"]]
    else:
        numbers = list(share) if isinstance(share, Sequence) else [share]
    if not numbers or not all(_is_number(number) and 0 <= number <= 1 for number in numbers):
        raise UserInputError(f"{message}a share is from 0 to 1")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def share_at(share: Share, epoch: int) -> float:
    """The share of the wrong modality in an epoch, a pure function of its arguments.

    Args:
        share: One number or a curriculum (:data:`Share`).
        epoch: The epoch, from 0.

    Example:
        >>> [share_at([1.0, 0.7], epoch) for epoch in range(3)]
        [1.0, 0.7, 0.7]
        >>> [share_at({"start": 1.0, "end": 0.5, "epochs": 3}, epoch) for epoch in range(4)]
        [1.0, 0.75, 0.5, 0.5]
    """
    if isinstance(share, Mapping):
        passed = min(1.0, epoch / max(1, share["epochs"] - 1))
        return (1 - passed) * share["start"] + passed * share["end"]
    return share[min(epoch, len(share) - 1)] if isinstance(share, Sequence) else share


def draw_negatives(
    mined: MinedNegatives | None,
    pool: np.ndarray,
    qid: int,
    positives: Sequence[int],
    n: int,
    seed: int,
    epoch: int,
    share: Share = 0.5,
) -> list[int]:
    """Draw the negatives of a query, a pure function of its arguments.

    Each is drawn from the wrong modality or from all other kinds together, by default with equal chance (the paper's
    triplets), and none comes twice while another is left. Where one of the two is empty or has run out the other is
    used; where nothing was mined, any candidate of the pool that is no labelled positive: the number of negatives is
    the same for every query, which a gather across processes needs.

    Args:
        mined: The mined negatives.
        pool: ``(N,)`` ids of the training pool.
        qid: The query.
        positives: Ids of its labelled positives.
        n: How many to draw.
        seed: Seed of the run.
        epoch: The epoch.
        share: Of the wrong modality, where there are others, too. With a larger share the first draw of the wrong
            modality stays as it was, and some of the others become such.

    Returns:
        ``n`` ids, none of them a labelled positive.
    """
    wrong_modality, *others = mined.of(qid) if mined is not None else [np.array([], dtype=np.int64)] * len(KINDS)
    groups = [group for group in (wrong_modality, np.concatenate(others)) if len(group)]
    drawn: list[int] = []
    for i in range(n):
        if groups:
            drawn.append(_draw_mined(groups, share_at(share, epoch), drawn, (seed, epoch), (qid, i)))
        else:
            drawn.append(_draw_any(pool, positives, drawn, (seed, epoch), (qid, i)))
    return drawn


def _draw_mined(
    groups: list[np.ndarray], share: float, drawn: list[int], run: tuple[int, int], place: tuple[int, int]
) -> int:
    """One of the wrong modality or of the others; of those that are left where it has been drawn before."""
    first = _chance(*run, "kind", *place) < share

    def one_of(some: list[np.ndarray], *more: object) -> int:
        group = some[0] if first else some[-1]
        return int(group[draw(len(group), *run, "negative", *place, *more)])

    did = one_of(groups)
    if did not in drawn:
        return did
    left = [group[~np.isin(group, drawn)] for group in groups]
    return one_of([group for group in left if len(group)] or groups, "again")


def _draw_any(
    pool: np.ndarray, positives: Sequence[int], drawn: list[int], run: tuple[int, int], place: tuple[int, int]
) -> int:
    """Any candidate that is no labelled positive; one that has not been drawn, where there is one."""
    for attempt in range(len(pool)):
        did = int(pool[draw(len(pool), *run, "random", *place, attempt)])
        if did not in positives and did not in drawn:
            return did
    free = pool[~np.isin(pool, positives)]  # a small pool, most of it positives or drawn
    if not len(free):
        raise UserInputError(
            f"query {decode_id(place[0])}: every candidate of the training pool is a labelled positive of it"
        )
    left = free[~np.isin(free, drawn)]
    some = left if len(left) else free
    return int(some[draw(len(some), *run, "random", *place)])


def _chance(*key: object) -> float:
    """A number from 0 up to 1, without 1, that depends on the key alone; below a half where ``draw(2, *key)`` is 0."""
    bits = draw(2**53, *key)
    return int(f"{bits:053b}"[::-1], 2) / 2**53
