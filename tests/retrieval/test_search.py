"""Exact search gives the order of a full sort, lower rows first among equals, whatever the blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lightning_mmembed.retrieval.search import Ranking, exact_search

N, DIM = 83, 3
RNG = np.random.default_rng(0)
# Small integers: products are exact in any order of addition, and most scores come up many times.
QUERIES = RNG.integers(-2, 3, (13, DIM)).astype(np.float32)
POOL = RNG.integers(-2, 3, (N, DIM)).astype(np.float32)
SUBSETS = {
    "whole": None,
    "half": RNG.random(N) < 0.5,
    "few": RNG.random(N) < 0.05,
    "one": np.arange(N) == N - 1,
    "first rows": np.arange(N) < 20,
    "empty": np.zeros(N, dtype=bool),
}
BLOCKS = list(itertools.product((1, 5, 256), (1, 7, 32, N, 32768), (1, 2, 10, N, N + 20)))


def full_sort(
    queries: np.ndarray, pool: np.ndarray, k: int, subset: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows, padded with minus infinity and -1: by score, then by row, cut after sorting."""
    scores = np.full((len(queries), k), -np.inf)
    rows = np.full((len(queries), k), -1)
    inside = np.arange(len(pool)) if subset is None else np.flatnonzero(subset)
    for i, query in enumerate(queries.astype(np.float64)):
        products = pool[inside].astype(np.float64) @ query
        order = sorted(range(len(inside)), key=lambda j: (-products[j], inside[j]))[:k]
        rows[i, : len(order)], scores[i, : len(order)] = inside[order], products[order]
    return scores, rows


def masks(names: list[str]) -> list[torch.Tensor | None]:
    subsets = (SUBSETS[name] for name in names)
    return [None if subset is None else torch.from_numpy(subset) for subset in subsets]


def search(names: list[str], k: int, query_block: int = 256, pool_block: int = 32768) -> list[Ranking]:
    queries, pool = torch.from_numpy(QUERIES), torch.from_numpy(POOL)
    return exact_search(queries, pool, k, masks(names), query_block=query_block, pool_block=pool_block)


def test_the_random_pool_ties_at_nearly_every_cut() -> None:
    scores, _ = full_sort(QUERIES, POOL, N, None)
    tied = scores[:, 1:] == scores[:, :-1]
    assert tied.mean() > 0.7
    assert tied[:, 9].any()
    assert tied[:, 0].any()


@pytest.mark.parametrize(("query_block", "pool_block", "k"), BLOCKS)
def test_search_equals_a_full_sort_with_ties_by_row(query_block: int, pool_block: int, k: int) -> None:
    for name, ranking in zip(SUBSETS, search(list(SUBSETS), k, query_block, pool_block), strict=True):
        scores, rows = full_sort(QUERIES, POOL, k, SUBSETS[name])
        np.testing.assert_array_equal(ranking.rows.numpy(), rows, err_msg=name)
        np.testing.assert_array_equal(ranking.scores.numpy(), scores, err_msg=name)
        assert (ranking.scores.dtype, ranking.rows.dtype) == (torch.float32, torch.int64)


def test_a_pool_of_equals_is_ranked_by_row() -> None:
    for k, pool_block in itertools.product((1, 3, 50), (1, 4, 1000)):
        ranking = exact_search(torch.ones(2, 4), torch.ones(50, 4), k, pool_block=pool_block)[0]
        assert ranking.rows.tolist() == [list(range(k))] * 2


def test_tied_rows_have_scores_that_are_equal_to_the_bit() -> None:
    ranking = search(["whole"], N, pool_block=7)[0]
    rows = ranking.rows.numpy()
    for query, order, scores in zip(QUERIES, rows, ranking.scores.numpy(), strict=True):
        by_product: dict[float, set[bytes]] = {}
        for row, score in zip(order, scores, strict=True):
            by_product.setdefault(float(POOL[row] @ query), set()).add((score + 0.0).tobytes())
        assert all(len(different) == 1 for different in by_product.values())


def test_several_subsets_in_one_pass_equal_separate_passes() -> None:
    names = list(SUBSETS)
    together = search(names, 15, query_block=4, pool_block=9)
    for name, ranking in zip(names, together, strict=True):
        alone = search([name], 15)[0]
        assert torch.equal(ranking.rows, alone.rows), name
        assert torch.equal(ranking.scores, alone.scores), name


def test_a_subset_equals_a_pool_of_these_rows_alone() -> None:
    inside = np.flatnonzero(SUBSETS["half"])
    alone = exact_search(torch.from_numpy(QUERIES), torch.from_numpy(POOL[inside]), 12)[0]
    np.testing.assert_array_equal(search(["half"], 12, pool_block=9)[0].rows.numpy(), inside[alone.rows.numpy()])


def test_an_empty_subset_or_pool_gives_nothing_but_padding() -> None:
    empty_pool = exact_search(torch.from_numpy(QUERIES), torch.zeros(0, DIM), 4)[0]
    for ranking in (search(["empty"], 4)[0], empty_pool):
        assert ranking.rows.unique().tolist() == [-1]
        assert ranking.scores.unique().tolist() == [float("-inf")]
        assert ranking.rows.shape == (len(QUERIES), 4)


def test_no_query_gives_an_empty_ranking_of_the_same_depth() -> None:
    for ranking in exact_search(torch.zeros(0, DIM), torch.from_numpy(POOL), 4, [None, None]):
        assert ranking.rows.shape == ranking.scores.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pool_of_lower_precision_is_searched_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, pool = torch.randn(6, 32, generator=generator), torch.randn(200, 32, generator=generator).to(dtype)
    low = exact_search(queries, pool, 20, pool_block=64)[0]
    raised = exact_search(queries, pool.float(), 20, pool_block=64)[0]
    assert torch.equal(low.rows, raised.rows)
    assert torch.equal(low.scores, raised.scores)
    expected, _ = full_sort(queries.numpy(), pool.float().numpy(), 20, None)
    np.testing.assert_allclose(low.scores.numpy(), expected, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
def test_faiss_finds_the_same_rows_where_nothing_ties() -> None:
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    queries, pool = (rng.normal(size=(n, 48)).astype(np.float32) for n in (20, 500))
    index = faiss.IndexFlatIP(48)
    index.add(pool)
    scores, rows = index.search(queries, 30)
    ranking = exact_search(torch.from_numpy(queries), torch.from_numpy(pool), 30, query_block=7, pool_block=64)[0]
    np.testing.assert_array_equal(ranking.rows.numpy(), rows)
    np.testing.assert_allclose(ranking.scores.numpy(), scores, rtol=1e-4, atol=1e-4)


def test_queries_and_pool_of_different_width_are_refused() -> None:
    with pytest.raises(ValueError, match="queries have 3 dimensions and the pool 4"):
        exact_search(torch.zeros(1, 3), torch.zeros(1, 4), 1)


@pytest.mark.parametrize("k", [0, -1])
def test_a_depth_below_one_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} must be at least 1"):
        exact_search(torch.zeros(1, 3), torch.zeros(1, 3), k)


@pytest.mark.parametrize(("query_block", "pool_block"), [(1, 512), (1, 1000), (7, 130), (50, 519), (50, 100)])
def test_equal_float_vectors_tie_whatever_the_blocks(query_block: int, pool_block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = torch.nn.functional.normalize(torch.randn(519, 512, generator=generator), dim=1)
    pool[200] = pool[-1] = pool[0]
    queries = torch.nn.functional.normalize(pool[0] + 0.02 * torch.randn(50, 512, generator=generator), dim=1)
    ranking = exact_search(queries, pool, 3, query_block=query_block, pool_block=pool_block)[0]
    assert torch.equal(ranking.rows, torch.tensor([[0, 200, 518]]).expand(50, -1))
    assert torch.equal(ranking.scores[:, :1].expand(-1, 3), ranking.scores)
