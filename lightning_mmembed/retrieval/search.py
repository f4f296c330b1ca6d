"""Exact inner-product search in blocks, with one fixed order of ties.

One pass over the pool in float32 finds the best candidates of every query and some more. What lies within the error of
float32 of the best ``k`` is scored again (:mod:`~lightning_mmembed.retrieval.scores`) and sorted. A query for which
that error reaches past everything that was kept, because very many candidates nearly tie, is searched once more in
float64. So scores and order depend on nothing but the vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mmembed.errors import UserInputError, refuse_below_one
from lightning_mmembed.retrieval.scan import Best, ExactBest, Scan, TorchScan, scan_exactly
from lightning_mmembed.retrieval.scores import (
    canonical_scores,
    finite_norms,
    float32_window,
    full_float32,
    pairs_at_a_time,
)
from lightning_mmembed.retrieval.vectors import Vectors

BACKENDS = ("torch", "faiss", "ivf")

#: How many more candidates than asked for the float32 pass keeps.
MARGIN = 32

#: Queries, and what they search: ``None`` for the whole pool, or a boolean mask of its rows.
Request = tuple[Tensor, Sequence[Tensor | None]]


@dataclass(frozen=True)
class Ranking:
    """The best candidates of each query, best first.

    Args:
        scores: ``(Q, K)`` float32 inner products, minus infinity past the end of a list.
        rows: ``(Q, K)`` int64 rows of the pool, -1 past the end of a list.
    """

    scores: Tensor
    rows: Tensor


@dataclass(frozen=True)
class SearchSettings:
    """How a pool is searched. Only ``"ivf"`` changes what is found.

    Args:
        backend: ``"torch"``; ``"faiss"``, the flat search of FAISS, on the CPU; or ``"ivf"``, approximate, see
            :func:`~lightning_mmembed.retrieval.faiss_search.ivf_search`; of several processes the first one alone then
            searches.
        query_block: Queries that are scored at a time. Memory is needed for ``query_block * pool_block`` scores.
        pool_block: Candidates that are read and scored at a time.
        device: Where torch computes; by default where the queries are.
        nlist: For ``"ivf"``: number of cells; by default four times the square root of the size of the pool.
        nprobe: For ``"ivf"``: number of cells that are searched.

    Raises:
        UserInputError: If ``backend`` is unknown, or a number below 1.
    """

    backend: str = "torch"
    query_block: int = 1024
    pool_block: int = 8192
    device: str | None = None
    nlist: int | None = None
    nprobe: int = 32

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UserInputError(f"backend={self.backend!r} is unknown; use one of {', '.join(BACKENDS)}")
        refuse_below_one(query_block=self.query_block, pool_block=self.pool_block, nlist=self.nlist, nprobe=self.nprobe)

    def on(self, device: torch.device) -> SearchSettings:
        """The same, on a device unless one was set."""
        return self if self.device else dataclasses.replace(self, device=str(device))


EXACT = SearchSettings()


def exact_search(
    queries: Tensor,
    pool: Tensor | Vectors,
    k: int,
    subsets: Sequence[Tensor | None] = (None,),
    settings: SearchSettings = EXACT,
) -> list[Ranking]:
    """Rank the pool for every query by inner product; :func:`search_pool` for one request.

    Example:
        >>> pool = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> exact_search(torch.tensor([[1.0, 0.0]]), pool, 2)[0].rows.tolist()
        [[0, 2]]
    """
    return search_pool([(queries, subsets)], pool, k, settings)[0]


@torch.no_grad()
def search_pool(
    requests: Sequence[Request],
    pool: Tensor | Vectors,
    k: int,
    settings: SearchSettings = EXACT,
    heartbeat: Callable[[], object] = lambda: None,
) -> list[list[Ranking]]:
    """Rank the pool by inner product for many sets of queries, over the whole pool and parts of it, in one pass.

    A score is the float64 inner product of the stored vectors, rounded to float32. Ties are broken by the row, the
    lower first; with a pool in canonical order of its ids (dataset, number) that is the order in which every figure of
    this package is given. Both are the same to the bit for every backend, device, block size and number of threads.

    The vectors of the pool are read block by block, and those of the candidates found once more; how much memory that
    needs does not depend on the size of the pool.

    Args:
        requests: Queries ``(Q, D)`` and their subsets: ``None`` for the whole pool, or a boolean mask of shape
            ``(N,)``.
        pool: ``(N, D)`` vectors. Vectors of lower precision than float32 are raised to it, block by block.
        k: Depth of the rankings; a list that runs out of candidates is padded.
        settings: Backend, block sizes and device.
        heartbeat: Called after every block of the pool.

    Returns:
        For each request one :class:`Ranking` for each subset, of depth ``k``, on the CPU.

    Raises:
        ValueError: If the dimensions of queries and pool differ, a mask has another length than the pool, or ``k`` is
            below 1.
        UserInputError: If a vector holds NaN or infinity, or the backend cannot be used.
    """
    check_requests(requests, pool, k)
    scan = _scan_of(settings)
    device = device_of(requests, settings)
    requests = [(queries.to(device), subsets) for queries, subsets in requests]
    norms = [query_norms(queries, settings.query_block) for queries, _ in requests]
    with full_float32():
        found, largest = _pass(requests, pool, k + MARGIN, settings, scan, Best, heartbeat)
        shortlists, unsettled = [], []
        for norm, lists in zip(norms, found, strict=True):
            window = float32_window(norm, largest, pool.shape[1])
            pairs = [_shortlist(best, k, window) for best in lists]
            shortlists.append([rows for rows, _ in pairs])
            unsettled.append([queries for _, queries in pairs])
        rankings = rank_rows(requests, shortlists, pool, k, settings.pool_block)
        _search_again(requests, unsettled, pool, k, rankings, settings, heartbeat)
    return rankings


def rows_of(queries: Tensor | Vectors, rows: slice) -> Tensor:
    """Neighbouring rows of queries in memory or on disk."""
    return queries.read(rows.start, rows.stop) if isinstance(queries, Vectors) else queries[rows]


def query_norms(queries: Tensor, block: int) -> Tensor:
    """``(Q,)`` float64 norms of the queries.

    Raises:
        UserInputError: If a query holds NaN or infinity.
    """
    starts = range(0, len(queries), block)
    norms = [finite_norms(queries[start : start + block].double(), "queries", start) for start in starts]
    return torch.cat(norms) if norms else queries.new_zeros(0, dtype=torch.float64)


def check_requests(requests: Sequence[Request], pool: Tensor | Vectors, k: int) -> None:
    """Raise a ValueError if requests, pool and depth do not fit together."""
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    for queries, subsets in requests:
        if queries.shape[1] != pool.shape[1]:
            raise ValueError(f"queries have {queries.shape[1]} dimensions and the pool {pool.shape[1]}")
        for subset in subsets:
            if subset is not None and subset.shape != (len(pool),):
                raise ValueError(f"a mask has the shape {tuple(subset.shape)} and the pool {len(pool)} rows")


def _scan_of(settings: SearchSettings) -> Scan:
    if settings.backend == "torch":
        return TorchScan()
    if settings.backend == "faiss":
        from lightning_mmembed.retrieval.faiss_search import scan_flat

        return scan_flat
    raise UserInputError(f"backend={settings.backend!r} is approximate and cannot be used here; use torch or faiss")


def device_of(requests: Sequence[Request], settings: SearchSettings) -> torch.device:
    """Where to compute: FAISS needs its vectors on the CPU, and MPS has no float64."""
    first = requests[0][0].device if requests else torch.device("cpu")
    device = torch.device(settings.device) if settings.device else first
    return torch.device("cpu") if settings.backend != "torch" or device.type == "mps" else device


def _pass(
    requests: Sequence[Request],
    pool: Tensor | Vectors,
    depth: int,
    settings: SearchSettings,
    scan: Scan,
    kind: type[Best],
    heartbeat: Callable[[], object],
) -> tuple[list[list[Best]], float]:
    """Offer every block of the pool to every list; also gives the largest norm in the pool."""
    device = requests[0][0].device if requests else torch.device("cpu")
    found = [[kind(len(queries), depth, device) for _ in subsets] for queries, subsets in requests]
    largest = 0.0
    for start, block in _blocks(pool, settings.pool_block, device):
        largest = max(largest, float(finite_norms(block, "pool", start).max()))
        for (queries, subsets), lists in zip(requests, found, strict=True):
            held = [(best, _inside(subset, start, block)) for best, subset in zip(lists, subsets, strict=True)]
            held = [(best, inside) for best, inside in held if inside is None or len(inside)]
            for first in range(0, len(queries) if held else 0, settings.query_block):
                part = queries[first : first + settings.query_block].float()
                scan(part, block, start, slice(first, first + len(part)), held)
        heartbeat()
    return found, largest


def _blocks(pool: Tensor | Vectors, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """The first row of every block and its vectors in float32, which the next block may overwrite."""
    buffer = torch.empty(min(size, len(pool)), pool.shape[1], device=device)
    for start in range(0, len(pool), size):
        block = buffer[: len(pool) - start]
        if isinstance(pool, Vectors):
            pool.copy_to(block, start)
        else:
            block = pool[start : start + size].to(device, torch.float32)
        yield start, block


def _inside(subset: Tensor | None, start: int, block: Tensor) -> Tensor | None:
    """The columns of a block that a subset holds; ``None`` means all."""
    if subset is None:
        return None
    inside = subset[start : start + len(block)].nonzero().squeeze(1).to(block.device)
    return None if len(inside) == len(block) else inside


def _shortlist(best: Best, k: int, window: Tensor) -> tuple[Tensor, Tensor]:
    """What may be among the best ``k``.

    Args:
        best: What the float32 pass kept.
        k: Depth of the ranking.
        window: ``(Q,)`` how far below the ``k``-th score a candidate may lie and still belong above it.

    Returns:
        ``(Q, K)`` rows, -1 for none; and ``(U,)`` the queries that all of their list may not be enough for.
    """
    near = best.scores >= (best.scores[:, k - 1].double() - window)[:, None]
    unsettled = near[:, -1] & (best.rows[:, -1] >= 0)
    return best.rows.masked_fill(~near | unsettled[:, None], -1), unsettled.nonzero().squeeze(1)


# --- canonical scores -----------------------------------------------------------------------------------------------


def rank_rows(
    requests: Sequence[Request], shortlists: Sequence[Sequence[Tensor]], pool: Tensor | Vectors, k: int, pool_block: int
) -> list[list[Ranking]]:
    """Score given candidates as :func:`search_pool` does and sort them, reading the pool once for all of them.

    Args:
        requests: The queries.
        shortlists: For each request and subset ``(Q, K)`` rows of the pool, -1 for none.
        pool: ``(N, D)`` vectors.
        k: Depth of the rankings.
        pool_block: Most candidates that are read at a time.
    """
    lists = [_Pairs(requests[i][0], rows) for i, some in enumerate(shortlists) for rows in some]
    for start in range(0, len(pool), pool_block):
        pieces = [pairs.of_rows(start, start + pool_block) for pairs in lists]
        if any(len(rows) for _, rows in pieces):
            wanted: Tensor = torch.cat([rows for _, rows in pieces]).unique()  # type: ignore[no-untyped-call]
            vectors = pool.rows(wanted) if isinstance(pool, Vectors) else pool[wanted.to(pool.device)]
            vectors = vectors.to(wanted.device)
            for pairs, (places, rows) in zip(lists, pieces, strict=True):
                pairs.score(places, vectors, torch.searchsorted(wanted, rows))
    ranked = iter([pairs.ranking(k) for pairs in lists])
    return [[next(ranked) for _ in some] for some in shortlists]


class _Pairs:
    """The queries and candidates of one list that are to be scored, by row of the pool."""

    def __init__(self, queries: Tensor, rows: Tensor) -> None:
        self._queries, self._rows = queries, rows
        self._scores = torch.full(rows.shape, float("-inf"), device=rows.device)
        flat = rows.flatten()
        places = (flat >= 0).nonzero().squeeze(1)
        self._sorted, order = flat[places].sort()
        self._places = places[order]

    def of_rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Places in the flat list of the candidates from row ``start`` to ``stop``, and their rows."""
        low, high = torch.searchsorted(self._sorted, self._sorted.new_tensor([start, stop])).tolist()
        return self._places[low:high], self._sorted[low:high]

    def score(self, places: Tensor, vectors: Tensor, numbers: Tensor) -> None:
        """Score the pairs at these places, each with a vector of the given number."""
        size = pairs_at_a_time(vectors.shape[1])
        for some, number in zip(torch.split(places, size), torch.split(numbers, size), strict=True):
            queries = self._queries[some // self._rows.shape[1]]
            self._scores.view(-1)[some] = canonical_scores(queries, vectors[number])

    def ranking(self, k: int) -> Ranking:
        """The best ``k`` of each query by score descending, then row ascending."""
        rows, by_row = self._rows.sort(dim=1)
        scores, order = self._scores.gather(1, by_row).sort(dim=1, descending=True, stable=True)
        scores, rows = scores[:, :k], rows.gather(1, order)[:, :k]
        missing = (0, k - scores.shape[1])
        return Ranking(F.pad(scores, missing, value=float("-inf")).cpu(), F.pad(rows, missing, value=-1).cpu())


def _search_again(
    requests: Sequence[Request],
    unsettled: Sequence[Sequence[Tensor]],
    pool: Tensor | Vectors,
    k: int,
    rankings: list[list[Ranking]],
    settings: SearchSettings,
    heartbeat: Callable[[], object],
) -> None:
    """Rank the pool for the queries that are not settled, by canonical scores alone, and put that in their rankings."""
    left = [(i, j, queries) for i, some in enumerate(unsettled) for j, queries in enumerate(some) if len(queries)]
    if not left:
        return
    again = [(requests[i][0][queries], [requests[i][1][j]]) for i, j, queries in left]
    # Twice as wide numbers, and several of them for each score.
    smaller = dataclasses.replace(settings, query_block=max(1, settings.query_block // 4))
    found, _ = _pass(again, pool, k, smaller, scan_exactly, ExactBest, heartbeat)
    for (i, j, queries), (best,) in zip(left, found, strict=True):
        rankings[i][j].scores[queries.cpu()] = best.scores.cpu()
        rankings[i][j].rows[queries.cpu()] = best.rows.cpu()
