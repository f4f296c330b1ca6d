"""Scores the blocks of a pool as they pass by, and keeps the best candidates so far of every query."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mmembed.retrieval.scores import exact_scores

#: Columns of a block whose maximum is compared with the threshold of a query; blocks are as wide as a multiple of it.
CHUNK = 64

#: Share of the chunks above which a whole block is sorted, in place of those chunks.
_CROWDED = 1 / 4


class Best:
    """The ``depth`` best candidates of each query among those offered so far, by scores that are nearly right.

    Blocks come in ascending order of their rows, so a candidate only counts if it is better than all but the best:
    what ties with the last one has a higher row.

    Args:
        queries: Number of queries.
        depth: How many to keep.
        device: Where.
    """

    def __init__(self, queries: int, depth: int, device: torch.device) -> None:
        self.scores = torch.full((queries, depth), float("-inf"), device=device)
        self.rows = torch.full((queries, depth), -1, device=device)

    def offer(self, span: slice, scores: Tensor, rows: Tensor) -> None:
        """Offer a block of candidates.

        Args:
            span: The ``q`` queries that were scored.
            scores: ``(q, C)`` scores, ``C`` a multiple of :data:`CHUNK`; minus infinity where there is no candidate.
            rows: ``(C,)`` their rows, above all rows offered before.
        """
        threshold = self.scores[span, -1:]
        chunks = scores.view(len(scores), -1, CHUNK)
        query, chunk = (chunks.amax(2) > threshold).nonzero().T
        if len(query) > _CROWDED * chunks.shape[0] * chunks.shape[1]:
            values, columns = scores.topk(min(self.scores.shape[1], scores.shape[1]), dim=1)
            self.merge(span, values, rows[columns])
            return
        values = chunks[query, chunk]
        place, column = (values > threshold[query]).nonzero().T
        query, rows = query[place], rows[chunk[place] * CHUNK + column]
        # One list for each query, as long as the longest: the queries are in order, so a place in a list is a distance
        # from where the query begins.
        counts = torch.bincount(query, minlength=len(scores))
        position = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
        shape = (len(scores), int(counts.max()))
        better, better_rows = scores.new_full(shape, float("-inf")), rows.new_full(shape, -1)
        better[query, position], better_rows[query, position] = values[place, column], rows
        self.merge(span, better, better_rows)

    def merge(self, span: slice, scores: Tensor, rows: Tensor) -> None:
        """Take in lists of candidates of their own for each query.

        Args:
            span: The ``q`` queries.
            scores: ``(q, C)`` scores, minus infinity where there is no candidate.
            rows: ``(q, C)`` their rows, -1 where there is none.
        """
        if not scores.shape[1]:
            return
        merged, merged_rows = torch.cat([self.scores[span], scores], 1), torch.cat([self.rows[span], rows], 1)
        self.scores[span], order = merged.topk(self.scores.shape[1], dim=1)
        self.rows[span] = merged_rows.gather(1, order)


class ExactBest(Best):
    """As :class:`Best`, by scores that are right: of equal ones the lower row is kept, and stands first."""

    def offer(self, span: slice, scores: Tensor, rows: Tensor) -> None:
        """Offer a block of candidates, as many as you like; see :meth:`Best.offer`."""
        better = (scores > self.scores[span, -1:]).any(1).nonzero().squeeze(1)
        if not len(better):
            return
        columns = _stable_topk(scores[better], self.scores.shape[1])
        at = torch.arange(len(self.scores), device=better.device)[span][better]
        merged = torch.cat([self.scores[at], scores[better].gather(1, columns)], 1)
        merged_rows = torch.cat([self.rows[at], rows[columns]], 1)
        # Both halves are in order of (score, row) and the first has the lower rows: a stable sort keeps that order.
        order = merged.argsort(dim=1, descending=True, stable=True)[:, : self.scores.shape[1]]
        self.scores[at], self.rows[at] = merged.gather(1, order), merged_rows.gather(1, order)


def _stable_topk(scores: Tensor, k: int) -> Tensor:
    """Columns of the ``k`` highest scores, by score descending, then column ascending."""
    k = min(k, scores.shape[1])
    values, columns = scores.topk(k, dim=1)
    # topk is free to choose among equal scores at the cut-off: rows where it had a choice are sorted in full.
    ambiguous = (scores >= values[:, -1:]).sum(1) > k
    if ambiguous.any():
        columns[ambiguous] = scores[ambiguous].argsort(dim=1, descending=True, stable=True)[:, :k]
    columns = columns.sort(dim=1).values
    order = scores.gather(1, columns).argsort(dim=1, descending=True, stable=True)
    return columns.gather(1, order)


#: Offers a block to lists: queries, block, its first row, which queries, and for each list the columns of the block
#: that its subset holds (``None``: all).
Scan = Callable[[Tensor, Tensor, int, slice, Sequence[tuple[Best, Tensor | None]]], None]


class TorchScan:
    """Scores a block with one matrix product, and offers it to every list; a :data:`Scan`."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def __call__(
        self, queries: Tensor, block: Tensor, start: int, span: slice, lists: Sequence[tuple[Best, Tensor | None]]
    ) -> None:
        """Score and offer."""
        shape = (len(queries), _padded(len(block)))
        if self._buffer.numel() < shape[0] * shape[1]:
            self._buffer = torch.empty(shape[0] * shape[1], device=block.device)
        scores = self._buffer[: shape[0] * shape[1]].view(shape)
        torch.mm(queries, block.T, out=scores[:, : len(block)])
        scores[:, len(block) :] = float("-inf")
        rows = torch.arange(start, start + len(block), device=block.device)
        for best, inside in lists:
            if inside is None:
                best.offer(span, scores, F.pad(rows, (0, shape[1] - len(rows)), value=-1))
            else:
                some = scores.new_full((shape[0], _padded(len(inside))), float("-inf"))
                some[:, : len(inside)] = scores[:, inside]
                best.offer(span, some, F.pad(rows[inside], (0, some.shape[1] - len(inside)), value=-1))


def _padded(width: int) -> int:
    return width + -width % CHUNK


def scan_exactly(
    queries: Tensor, block: Tensor, start: int, span: slice, lists: Sequence[tuple[Best, Tensor | None]]
) -> None:
    """Scores a block canonically, and offers it to every list; a :data:`Scan`."""
    rows = torch.arange(start, start + len(block), device=block.device)
    for best, inside in lists:
        part, numbers = (block, rows) if inside is None else (block[inside], rows[inside])
        best.offer(span, exact_scores(queries, part, best.scores[span, -1]), numbers)
