"""Search with FAISS: its flat search as a backend of the exact search, and an approximate search on request."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.retrieval.scan import Best
from lightning_mmembed.retrieval.search import (
    Ranking,
    Request,
    SearchSettings,
    check_requests,
    query_norms,
    rank_rows,
    search_pool,
)
from lightning_mmembed.retrieval.vectors import Vectors

#: Queries that the approximate search is compared with the exact one on.
SAMPLE = 200

#: Vectors for each cell that the cells are trained on; FAISS asks for at least 39.
_TRAIN_PER_CELL = 40


def load_faiss() -> Any:
    """Import FAISS.

    Raises:
        UserInputError: If it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserInputError(
            "the module faiss, which this search backend needs, is not installed; install one of the extras "
            "lightning-mmembed[faiss-cpu] and lightning-mmembed[gpu], or use backend='torch'"
        ) from error
    return faiss


def scan_flat(
    queries: Tensor, block: Tensor, start: int, span: slice, lists: Sequence[tuple[Best, Tensor | None]]
) -> None:
    """Lets FAISS search a block for every list; a :data:`~lightning_mmembed.retrieval.scan.Scan`."""
    faiss = load_faiss()
    rows = torch.arange(start, start + len(block))
    for best, inside in lists:
        part, numbers = (block, rows) if inside is None else (block[inside], rows[inside])
        depth = min(best.scores.shape[1], len(part))
        scores, columns = faiss.knn(queries.numpy(), part.numpy(), depth, metric=faiss.METRIC_INNER_PRODUCT)
        best.merge(span, torch.from_numpy(scores), numbers[torch.from_numpy(columns)])


@torch.no_grad()
def ivf_search(
    requests: Sequence[Request], pool: Tensor | Vectors, k: int, settings: SearchSettings
) -> tuple[list[list[Ranking]], dict[str, Any]]:
    """Rank by an inverted file: approximate, and told how well.

    The pool is divided into ``nlist`` cells and only the ``nprobe`` nearest of a query are searched. What is found
    there is scored and sorted as :func:`~lightning_mmembed.retrieval.search.search_pool` does.

    The index is in memory: ``2 D + 8`` bytes for each candidate, so 46 GB for 5.6 million of 4,096 dimensions, and
    ``160 D nlist`` bytes while it is trained.

    Args:
        requests: Queries ``(Q, D)`` and their subsets; a mask of shape ``(N,)`` is honoured within the cells.
        pool: ``(N, D)`` vectors.
        k: Depth of the rankings; a list that runs out of candidates in the searched cells is padded.
        settings: With ``nlist`` and ``nprobe``.

    Returns:
        The rankings, as of the exact search; and the settings with ``"recall"``, the share of the exact top ``k`` that
        was found for a seeded sample of the queries, over all their subsets.

    Raises:
        ValueError: As :func:`~lightning_mmembed.retrieval.search.search_pool` does.
        UserInputError: Likewise.
    """
    check_requests(requests, pool, k)
    requests = [(queries.cpu(), subsets) for queries, subsets in requests]
    for queries, _ in requests:
        query_norms(queries, settings.query_block)
    exact, picks = _search_sample(requests, pool, k, settings)
    nlist = max(1, min(len(pool), settings.nlist or round(4 * math.sqrt(len(pool)))))
    nprobe = min(nlist, settings.nprobe)
    index = _build(pool, nlist, settings.pool_block)
    rows = [[_probe(index, queries, subset, k, nprobe) for subset in subsets] for queries, subsets in requests]
    rankings = rank_rows(requests, rows, pool, k, settings.pool_block)
    recall = _recall(exact, rankings, picks)
    sampled = sum(len(pick) for pick in picks)
    info = {"backend": "ivf", "nlist": nlist, "nprobe": nprobe, "k": k, "recall": recall, "sampled_queries": sampled}
    return rankings, info


def _build(pool: Tensor | Vectors, nlist: int, pool_block: int) -> Any:
    """An inverted file over the pool, its vectors in float16."""
    faiss = load_faiss()
    dim = pool.shape[1]
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dim), dim, nlist, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    index.cp.min_points_per_centroid = 1  # a warning about a small pool would help nobody: the recall is measured
    generator = torch.Generator().manual_seed(0)
    sample = torch.randperm(len(pool), generator=generator)[: _TRAIN_PER_CELL * nlist].sort().values
    if len(sample):
        index.train((pool.rows(sample) if isinstance(pool, Vectors) else pool[sample]).float().numpy())
    for start in range(0, len(pool), pool_block):
        part = pool.read(start, start + pool_block) if isinstance(pool, Vectors) else pool[start : start + pool_block]
        index.add(part.float().numpy())
    return index


def _probe(index: Any, queries: Tensor, subset: Tensor | None, k: int, nprobe: int) -> Tensor:
    """``(Q, k)`` rows found in the nearest cells, -1 for none."""
    faiss = load_faiss()
    if not index.ntotal or not len(queries):
        return torch.full((len(queries), k), -1)
    selector = None if subset is None else faiss.IDSelectorBitmap(np.packbits(subset.numpy(), bitorder="little"))
    parameters = faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
    return torch.from_numpy(index.search(queries.float().numpy(), k, params=parameters)[1])


def _search_sample(
    requests: Sequence[Request], pool: Tensor | Vectors, k: int, settings: SearchSettings
) -> tuple[list[list[Ranking]], list[Tensor]]:
    """The exact rankings of a seeded sample of the queries, and which these are in each request."""
    owner = torch.repeat_interleave(torch.tensor([len(queries) for queries, _ in requests], dtype=torch.long))
    order = torch.randperm(len(owner), generator=torch.Generator().manual_seed(0))[:SAMPLE].sort().values
    firsts = [int((owner < i).sum()) for i in range(len(requests))]
    picks = [order[owner[order] == i] - first for i, first in enumerate(firsts)]
    sample = [(queries[pick], subsets) for (queries, subsets), pick in zip(requests, picks, strict=True)]
    return search_pool(sample, pool, k, dataclasses.replace(settings, backend="torch")), picks


def _recall(exact: list[list[Ranking]], found: list[list[Ranking]], picks: list[Tensor]) -> float:
    """The share of the exact rankings that was found; 1 if there was nothing to find."""
    there = kept = 0
    for wanted, got, pick in zip(exact, found, picks, strict=True):
        for right, ranking in zip(wanted, got, strict=True):
            for row, other in zip(right.rows, ranking.rows[pick], strict=True):
                there += int((row >= 0).sum())
                kept += int(torch.isin(row[row >= 0], other).sum())
    return kept / there if there else 1.0
