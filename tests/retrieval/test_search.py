"""Exact search gives the order of a full sort in float64, lower rows first among equals, whatever the blocks."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.retrieval.search import MARGIN, Ranking, Request, SearchSettings, exact_search, search_pool
from lightning_mmembed.retrieval.vectors import Vectors

pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")

N, QUERIES, BACKENDS = 331, 13, ("torch", "faiss")


def quantised(rng: np.random.Generator, dim: int) -> np.ndarray:
    """Products are exact in any order of addition, and most scores come up many times."""
    return rng.integers(-2, 3, (N, dim)).astype(np.float32)


def normal(rng: np.random.Generator, dim: int) -> np.ndarray:
    return rng.normal(size=(N, dim)).astype(np.float32)


def repeated(rng: np.random.Generator, dim: int) -> np.ndarray:
    """Each vector many times, at places that have nothing in common."""
    return normal(rng, dim)[rng.integers(0, 5, N)]


def zeros(rng: np.random.Generator, dim: int) -> np.ndarray:
    return normal(rng, dim) * (rng.random((N, 1)) < 0.1).astype(np.float32)


def collapsed(rng: np.random.Generator, dim: int) -> np.ndarray:
    """All but one vector: what differs is about what float32 rounds away."""
    return normal(rng, dim)[:1] + 1e-7 * normal(rng, dim)


def ascending(rng: np.random.Generator, dim: int) -> np.ndarray:
    """Every candidate is better than all before it."""
    return np.linspace(0.1, 1, N, dtype=np.float32)[:, None] * np.ones((1, dim), np.float32)


POOLS = (quantised, normal, repeated, zeros, collapsed, ascending)


def subsets_of(rng: np.random.Generator) -> dict[str, np.ndarray | None]:
    return {
        "whole": None,
        "all rows": np.ones(N, dtype=bool),
        "half": rng.random(N) < 0.5,
        "few": rng.random(N) < 0.02,
        "last row": np.arange(N) == N - 1,
        "first rows": np.arange(N) < 100,
        "empty": np.zeros(N, dtype=bool),
    }


def queries_for(pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if pool.min() == pool.astype(int).min():
        return rng.integers(-2, 3, (QUERIES, pool.shape[1])).astype(np.float32)
    return np.abs(rng.normal(size=(QUERIES, pool.shape[1]))).astype(np.float32)


def full_sort(
    queries: np.ndarray, pool: np.ndarray, k: int, subset: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows, padded with minus infinity and -1: by score, then by row, cut after sorting."""
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1)
    inside = np.arange(len(pool)) if subset is None else np.flatnonzero(subset)
    for i, query in enumerate(queries.astype(np.float64)):
        products = (pool[inside].astype(np.float64) @ query).astype(np.float32)
        order = np.lexsort([inside, -products])[:k]
        rows[i, : len(order)], scores[i, : len(order)] = inside[order], products[order]
    return scores, rows


def masks(subsets: dict[str, np.ndarray | None]) -> list[torch.Tensor | None]:
    return [None if subset is None else torch.from_numpy(subset) for subset in subsets.values()]


def same(one: Ranking, other: Ranking) -> bool:
    """Equal to the bit: view as integers, which tell even 0.0 from -0.0."""
    scores = torch.equal(one.scores.view(torch.int32), other.scores.view(torch.int32))
    return scores and torch.equal(one.rows, other.rows)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", POOLS)
@pytest.mark.parametrize("k", [1, 10, N - MARGIN, N, N + 20])
def test_search_equals_a_full_sort_whatever_ties_and_whatever_the_blocks(backend: str, make: object, k: int) -> None:
    rng = np.random.default_rng(0)
    pool, subsets = make(rng, 7), subsets_of(rng)  # type: ignore[operator]
    queries = queries_for(pool, rng)
    expected = {name: full_sort(queries, pool, k, subset) for name, subset in subsets.items()}
    for query_block, pool_block in ((256, 7), (1, 63), (5, 64), (5, 130), (13, N), (256, 32768)):
        settings = SearchSettings(backend, query_block, pool_block)
        found = exact_search(torch.from_numpy(queries), torch.from_numpy(pool), k, masks(subsets), settings)
        for (name, (scores, rows)), ranking in zip(expected.items(), found, strict=True):
            message = f"{name}, {query_block}, {pool_block}"
            np.testing.assert_array_equal(ranking.rows.numpy(), rows, err_msg=message)
            np.testing.assert_array_equal(ranking.scores.numpy(), scores, err_msg=message)
            assert (ranking.scores.dtype, ranking.rows.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("margin", [1, MARGIN])
def test_a_pool_of_many_blocks_is_ranked_as_a_full_sort(
    backend: str, margin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_mmembed.retrieval.search.MARGIN", margin)
    rng = np.random.default_rng(5)
    # Long enough that in most blocks few candidates are better than what is there, and some queries have none.
    pool = rng.normal(size=(60_007, 8)).astype(np.float32)
    pool[rng.integers(0, len(pool), 3000)] = pool[rng.integers(0, len(pool), 3000)]
    queries, half = rng.normal(size=(30, 8)).astype(np.float32), rng.random(len(pool)) < 0.5
    subsets = [None, torch.from_numpy(half)]
    for k, query_block, pool_block in ((1, 7, 1000), (20, 30, 2048)):
        settings = SearchSettings(backend, query_block, pool_block)
        found = exact_search(torch.from_numpy(queries), torch.from_numpy(pool), k, subsets, settings)
        for ranking, subset in zip(found, (None, half), strict=True):
            scores, rows = full_sort(queries, pool, k, subset)
            np.testing.assert_array_equal(ranking.rows.numpy(), rows)
            np.testing.assert_array_equal(ranking.scores.numpy(), scores)


def test_a_pool_of_one_block_or_one_vector_a_block_is_ranked_alike() -> None:
    for make in (quantised, repeated):
        rng = np.random.default_rng(6)
        pool = torch.from_numpy(make(rng, 3))
        (whole,), (single,) = (exact_search(pool[:4], pool, 9, settings=SearchSettings(pool_block=b)) for b in (N, 1))
        assert same(whole, single)


def test_the_pools_tie_at_nearly_every_cut() -> None:
    for make in (quantised, repeated, zeros):
        rng = np.random.default_rng(0)
        pool = make(rng, 7)
        scores, _ = full_sort(queries_for(pool, rng), pool, N, None)
        assert (scores[:, 1:] == scores[:, :-1]).mean() > 0.7, make


@pytest.mark.parametrize("make", POOLS)
def test_scores_and_order_are_the_same_to_the_bit_for_every_backend_block_and_number_of_threads(
    make: object, two_threads: None, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    pool = make(rng, 96).astype(np.float16)  # type: ignore[operator]
    queries, subsets = torch.from_numpy(queries_for(pool, rng)), masks(subsets_of(rng))
    np.save(tmp_path / "0.npy", pool[:200])
    np.save(tmp_path / "1.npy", pool[200:])
    on_disk = Vectors([tmp_path / "0.npy", tmp_path / "1.npy"], 96)
    in_two_threads = exact_search(queries, torch.from_numpy(pool.astype(np.float32)), 20, subsets)
    torch.set_num_threads(1)
    for backend, query_block, pool_block in itertools.product(BACKENDS, (3, 13), (50, 200)):
        settings = SearchSettings(backend, query_block, pool_block)
        found = exact_search(queries, on_disk, 20, subsets, settings)
        assert all(map(same, found, in_two_threads)), settings


def test_requests_in_one_pass_equal_separate_searches() -> None:
    rng = np.random.default_rng(2)
    pool, subsets = torch.from_numpy(quantised(rng, 4)), subsets_of(rng)
    requests: list[Request] = [
        (torch.from_numpy(rng.integers(-2, 3, (count, 4)).astype(np.float32)), some)
        for count, some in ((7, []), (4, masks(subsets)), (0, [None]), (9, [None]), (1, masks(subsets)[2:4]))
    ]
    together = search_pool(requests, pool, 9, SearchSettings(query_block=3, pool_block=64))
    for (queries, some), lists in zip(requests, together, strict=True):
        assert all(map(same, lists, exact_search(queries, pool, 9, some))), len(queries)
        assert len(lists) == len(some)
    assert search_pool([], pool, 9) == []


class Counted(Vectors):
    """Notes how often each row is read, and in how many reads."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        self.reads = [*getattr(self, "reads", []), (start, min(stop, len(self)))]
        return super().read(start, stop)


def test_all_requests_together_read_the_pool_once_and_what_they_found_once_more(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    np.save(tmp_path / "0.npy", normal(rng, 8))
    pool = Counted([tmp_path / "0.npy"], 8)
    requests: list[Request] = [
        (torch.from_numpy(normal(rng, 8)[:20]), [None, torch.from_numpy(rng.random(N) < 0.5)]) for _ in range(3)
    ]
    search_pool(requests, pool, 5, SearchSettings(query_block=4, pool_block=100))
    assert pool.reads[:4] == [(0, 100), (100, 200), (200, 300), (300, N)]
    times = np.zeros(N, dtype=int)
    for start, stop in pool.reads[4:]:
        times[start:stop] += 1
    assert times.max() == 1


def test_a_subset_equals_a_pool_of_these_rows_alone() -> None:
    rng = np.random.default_rng(4)
    pool, inside = quantised(rng, 3), np.flatnonzero(rng.random(N) < 0.3)
    queries = torch.from_numpy(rng.integers(-2, 3, (QUERIES, 3)).astype(np.float32))
    alone = exact_search(queries, torch.from_numpy(pool[inside]), 12)[0]
    mask = torch.zeros(N, dtype=torch.bool)
    mask[inside] = True
    found = exact_search(queries, torch.from_numpy(pool), 12, [mask], SearchSettings(pool_block=100))[0]
    np.testing.assert_array_equal(found.rows.numpy(), inside[alone.rows.numpy()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_subset_or_pool_gives_nothing_but_padding(backend: str) -> None:
    settings = SearchSettings(backend)
    nothing = torch.zeros(9, dtype=torch.bool)
    rankings = [
        exact_search(torch.ones(2, 3), torch.ones(9, 3), 4, [nothing], settings)[0],
        exact_search(torch.ones(2, 3), torch.zeros(0, 3), 4, settings=settings)[0],
        exact_search(torch.ones(2, 3), Vectors([], 3), 4, settings=settings)[0],
    ]
    for ranking in rankings:
        assert ranking.rows.unique().tolist() == [-1]
        assert ranking.scores.unique().tolist() == [float("-inf")]
        assert ranking.rows.shape == (2, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_query_gives_an_empty_ranking_of_the_same_depth(backend: str) -> None:
    for ranking in exact_search(torch.zeros(0, 3), torch.ones(9, 3), 4, [None, None], SearchSettings(backend)):
        assert ranking.rows.shape == ranking.scores.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vectors_of_lower_precision_are_searched_as_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, pool = (torch.randn(n, 32, generator=generator).to(dtype) for n in (6, 200))
    low = exact_search(queries, pool, 20, settings=SearchSettings(pool_block=64))[0]
    assert same(low, exact_search(queries.float(), pool.float(), 20)[0])
    scores, rows = full_sort(queries.float().numpy(), pool.float().numpy(), 20, None)
    np.testing.assert_array_equal(low.rows.numpy(), rows)
    np.testing.assert_array_equal(low.scores.numpy(), scores)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_lower_matmul_precision_changes_nothing_and_is_left_as_it_was(precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, pool = (torch.randn(n, 512, generator=generator) for n in (64, 4096))
    expected = exact_search(queries, pool, 5)[0]
    switches = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        set_to = [switch.fp32_precision for switch in switches]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = exact_search(queries, pool, 5)[0]
        assert [switch.fp32_precision for switch in switches] == set_to
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert same(found, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_vector_that_has_no_rank_is_named(value: float) -> None:
    good, bad = torch.ones(300, 4), torch.ones(300, 4)
    bad[271, 2] = value
    with pytest.raises(UserInputError, match="row 271 of the vectors of the pool holds NaN or infinity"):
        exact_search(good, bad, 3, settings=SearchSettings(pool_block=100))
    with pytest.raises(UserInputError, match="row 271 of the vectors of the queries holds NaN or infinity"):
        exact_search(bad, good, 3, settings=SearchSettings(query_block=100))


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="queries have 3 dimensions and the pool 4"):
        exact_search(torch.zeros(1, 3), torch.zeros(1, 4), 1)
    with pytest.raises(ValueError, match=r"a mask has the shape \(2,\) and the pool 3 rows"):
        exact_search(torch.zeros(1, 4), torch.zeros(3, 4), 1, [torch.ones(2, dtype=torch.bool)])
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k={k} must be at least 1"):
            exact_search(torch.zeros(1, 3), torch.zeros(1, 3), k)


def test_settings_that_cannot_be_used_are_named() -> None:
    with pytest.raises(UserInputError, match="backend='faise' is unknown; use one of torch, faiss, ivf"):
        SearchSettings("faise")
    for name in ("query_block", "pool_block", "nlist", "nprobe"):
        with pytest.raises(UserInputError, match=f"{name}=0 is too small; it must be at least 1"):
            SearchSettings(**{name: 0})
    with pytest.raises(UserInputError, match="backend='ivf' is approximate and cannot be used here"):
        exact_search(torch.zeros(1, 3), torch.zeros(1, 3), 1, settings=SearchSettings("ivf"))


def test_a_device_is_taken_over_unless_one_was_set() -> None:
    assert SearchSettings(query_block=3).on(torch.device("cuda", 1)) == SearchSettings(query_block=3, device="cuda:1")
    assert SearchSettings(device="cpu").on(torch.device("cuda")) == SearchSettings(device="cpu")


PEAKS = """
import sys
import torch
from lightning_mmembed.retrieval.search import SearchSettings, exact_search
from lightning_mmembed.retrieval.vectors import Vectors

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

queries = torch.randn(64, 256)
for count in (2, 40):
    pool = Vectors([sys.argv[1]] * count, 256)
    exact_search(queries, pool, 10, [None, torch.rand(len(pool)) < 0.5], SearchSettings(pool_block=2048))
    print(peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of peak memory")
def test_peak_memory_does_not_grow_with_the_pool(tmp_path: Path) -> None:
    np.save(tmp_path / "part.npy", np.random.default_rng(0).normal(size=(4096, 256)).astype(np.float16))
    output = subprocess.check_output([sys.executable, "-c", PEAKS, str(tmp_path / "part.npy")], text=True)
    small, large = map(float, output.split())
    # 38 parts more are 76 MiB as stored, 152 MiB in float32, and 38 MiB of scores.
    assert large - small < 25


def test_a_heartbeat_follows_every_block_of_the_pool() -> None:
    beats: list[int] = []
    pool = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    search_pool([(pool[:3], (None,))], pool, 5, SearchSettings(pool_block=30), lambda: beats.append(1))
    assert len(beats) == 4
