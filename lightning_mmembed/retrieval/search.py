"""Exact inner-product search in blocks, with one fixed order of ties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Blocks of the pool are padded to a multiple of this width.
_WIDTH = 64


@dataclass(frozen=True)
class Ranking:
    """The best candidates of each query, best first.

    Args:
        scores: ``(Q, K)`` float32 inner products, minus infinity past the end of a list.
        rows: ``(Q, K)`` int64 rows of the pool, -1 past the end of a list.
    """

    scores: Tensor
    rows: Tensor


def exact_search(
    queries: Tensor,
    pool: Tensor,
    k: int,
    subsets: Sequence[Tensor | None] = (None,),
    *,
    query_block: int = 256,
    pool_block: int = 32768,
) -> list[Ranking]:
    """Rank the pool for every query by inner product, over the whole pool and parts of it in one pass.

    Ties are broken by the row, the lower first; with a pool in canonical order of its ids (dataset, number) that is
    the order in which every figure of this package is given. Never more than ``query_block * pool_block`` scores are
    held at a time.

    Args:
        queries: ``(Q, D)`` vectors; those of lower precision are raised to float32.
        pool: ``(N, D)`` vectors, likewise, block by block.
        k: Depth of the ranking; a list that runs out of candidates is padded.
        subsets: What to search: ``None`` for the whole pool, or a boolean mask of shape ``(N,)``.
        query_block: Queries per block.
        pool_block: Candidates per block.

    Returns:
        One :class:`Ranking` for each subset, each of depth ``k``.

    Raises:
        ValueError: If the dimensions of queries and pool differ or ``k`` is below 1.

    Example:
        >>> pool = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> exact_search(torch.tensor([[1.0, 0.0]]), pool, 2)[0].rows.tolist()
        [[0, 2]]
    """
    if queries.shape[1] != pool.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} dimensions and the pool {pool.shape[1]}")
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    blocks = [_search_block(block.float(), pool, k, subsets, pool_block) for block in torch.split(queries, query_block)]
    if not blocks:
        empty = Ranking(queries.new_zeros(0, k, dtype=torch.float32), queries.new_zeros(0, k, dtype=torch.long))
        return [empty for _ in subsets]
    return [
        Ranking(torch.cat([b[i].scores for b in blocks]), torch.cat([b[i].rows for b in blocks]))
        for i in range(len(subsets))
    ]


def _search_block(
    queries: Tensor, pool: Tensor, k: int, subsets: Sequence[Tensor | None], pool_block: int
) -> list[Ranking]:
    shape = (len(queries), k)
    best = [
        Ranking(queries.new_full(shape, float("-inf")), torch.full(shape, -1, device=queries.device)) for _ in subsets
    ]
    # Every product has one shape: matrix libraries sum in an order that depends on it, and equal vectors would then
    # score differently in the last bit, in a short last block say, and no longer tie.
    width = min(pool_block, len(pool)) + -min(pool_block, len(pool)) % _WIDTH
    for start in range(0, len(pool), pool_block):
        part = pool[start : start + pool_block].float()
        scores = (queries @ F.pad(part, (0, 0, 0, width - len(part))).T)[:, : len(part)]
        rows = torch.arange(start, start + len(part), device=scores.device)
        for i, subset in enumerate(subsets):
            inside = None if subset is None else subset[start : start + pool_block].nonzero().squeeze(1)
            part = scores if inside is None else scores[:, inside]
            best[i] = _merge(best[i], part, rows if inside is None else rows[inside], k)
    return best


def _merge(best: Ranking, scores: Tensor, rows: Tensor, k: int) -> Ranking:
    """Merge a block of later rows into the running top ``k``."""
    if not len(rows):
        return best
    columns = _stable_topk(scores, k)
    all_scores = torch.cat([best.scores, scores.gather(1, columns)], 1)
    all_rows = torch.cat([best.rows, rows[columns]], 1)
    # Both halves are in order of (score, row) and the rows of the first are lower, so a stable sort keeps the order.
    order = all_scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return Ranking(all_scores.gather(1, order), all_rows.gather(1, order))


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
