"""Scores of pairs by a better model, such as a reranker, to distil from: ``mmembed-rerank`` writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lightning_mmembed.errors import UserInputError


class SoftLabels:
    """Reads a file of scores of training queries: ``qid`` and ``did`` (encoded) and ``score``.

    Its metadata tell the ``split`` of the queries: the ids of each split begin anew, so that they cannot.

    Args:
        path: The Parquet file; of a pair that comes twice the first is taken.
        dataset: Fingerprint of the shards that the scores are to be of; one that the file does not tell is taken as it
            is.

    Raises:
        UserInputError: If there is no such file, it lacks a column, or it is of another split or dataset.
    """

    def __init__(self, path: str | Path, dataset: str | None = None) -> None:
        if not Path(path).is_file():
            raise UserInputError(f"soft_labels={str(path)!r} is missing; write it with mmembed-rerank negatives=...")
        try:
            table = pq.read_table(path, columns=["qid", "did", "score"])
        except (pa.ArrowInvalid, ValueError) as error:
            raise UserInputError(
                f"soft_labels={str(path)!r} cannot be read ({error}); it needs the columns qid, did and score"
            ) from error
        facts = table.schema.metadata or {}
        if facts.get(b"split") != b"train":
            told = (
                f"of the {facts[b'split'].decode()} split" if b"split" in facts else "of a split that they do not tell"
            )
            raise UserInputError(
                f"soft_labels={str(path)!r} are {told}; to train with, score training queries: mmembed-rerank "
                "negatives=..., or run=... split=train"
            )
        made_of = facts.get(b"shards")
        if dataset is not None and made_of is not None and made_of.decode() != dataset:
            raise UserInputError(
                f"soft_labels={str(path)!r} are of another dataset, or of shards made anew since; score again"
            )
        qids, dids, scores = (table[name].to_numpy() for name in ("qid", "did", "score"))
        order = np.lexsort((dids, qids))
        self._pairs = np.empty(len(order), dtype=[("qid", np.int64), ("did", np.int64)])
        self._pairs["qid"], self._pairs["did"] = qids[order], dids[order]
        self._scores = scores[order].astype(np.float32)

    def of(self, qids: np.ndarray, dids: np.ndarray) -> np.ndarray:
        """``(N,)`` float32 scores of ``N`` pairs, NaN where there is none."""
        asked = np.empty(len(qids), dtype=self._pairs.dtype)
        asked["qid"], asked["did"] = qids, dids
        places = np.searchsorted(self._pairs, asked)
        found = np.full(len(asked), np.nan, dtype=np.float32)
        inside = places < len(self._pairs)
        known = np.flatnonzero(inside)[self._pairs[places[inside]] == asked[inside]]
        found[known] = self._scores[places[known]]
        return found
