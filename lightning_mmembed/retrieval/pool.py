"""What is searched and what is asked: a pool of candidates and the queries of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mmembed.items import Candidate, Query, Task


def padded_ids(ids: Sequence[Sequence[int]]) -> Tensor:
    """Lists of ids as one ``(Q, P)`` int64 tensor, padded with -1.

    Example:
        >>> padded_ids([[8], [5, 3]]).tolist()
        [[8, -1], [5, 3]]
    """
    width = max((len(row) for row in ids), default=0)
    rows = [[*row, *[-1] * (width - len(row))] for row in ids]
    return torch.tensor(rows, dtype=torch.long).reshape(len(ids), width)


@dataclass(frozen=True)
class Pool:
    """A mixed-modality pool, in canonical order of its ids.

    Args:
        name: Such as ``"train"`` or ``"test"``.
        ids: ``(N,)`` int64 encoded ``did`` (:func:`~lightning_mmembed.items.encode_id`), ascending.
        modalities: ``(N,)`` int8 :attr:`Modality.code` of each candidate.
        local: For each task the ``(N,)`` boolean mask of its local pool.
        items: The candidates, read when they are asked for.
        fingerprint: Changes whenever the content does.
        sizes: ``(N,)`` int64 bytes of each candidate's text, for batches of like length; ``None`` if not known.
    """

    name: str
    ids: Tensor
    modalities: Tensor
    local: Mapping[str, Tensor]
    items: Sequence[Candidate]
    fingerprint: str
    sizes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def likeness(self) -> tuple[Tensor, ...]:
        """What candidates of one batch should have in common: modality, then size. Nothing if that is not known."""
        return () if self.sizes is None else (self.modalities, self.sizes)

    def rows_of(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Rows of some ids, ``(Q, P)`` for ``Q`` lists of at most ``P``; -1 for padding and for ids not in the pool.

        Example:
            >>> pool = Pool("tiny", torch.tensor([3, 8]), torch.tensor([0, 0]), {}, [], "")
            >>> pool.rows_of([[8], [5, 3]]).tolist()
            [[1, -1], [-1, 0]]
        """
        codes = padded_ids(ids)
        rows = torch.searchsorted(self.ids, codes).clamp(max=max(0, len(self.ids) - 1))
        return torch.where(self.ids[rows] == codes, rows, -1)


@dataclass(frozen=True)
class QuerySet:
    """The queries of one task.

    Args:
        task: The task.
        ids: ``(Q,)`` int64 encoded qids.
        positives: Encoded ``did`` of the labelled positives of each query.
        queries: The queries with their instructions, read when they are asked for.
        fingerprint: Changes whenever the content does.
        sizes: ``(Q,)`` int64 bytes of each query's text, for batches of like length; ``None`` if not known.
        grades: How relevant each of the positives is, from 1; ``None`` where all are alike.
        ignored: Encoded ``did`` of candidates that are left out of each query's rankings, such as the document that a
            query is itself; ``None`` where there is none.
    """

    task: Task
    ids: Tensor
    positives: Sequence[Sequence[int]]
    queries: Sequence[Query]
    fingerprint: str
    sizes: Tensor | None = None
    grades: Sequence[Sequence[int]] | None = None
    ignored: Sequence[Sequence[int]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def likeness(self) -> tuple[Tensor, ...]:
        """What queries of one batch should have in common: size; see :attr:`Pool.likeness`."""
        return () if self.sizes is None else (self.sizes,)


def most_ignored(query_sets: Sequence[QuerySet]) -> int:
    """How many candidates a query ignores at most: so much deeper a search goes, that its rankings keep their depth."""
    return max((len(some) for queries in query_sets for some in queries.ignored or ()), default=0)
