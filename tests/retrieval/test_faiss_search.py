"""The approximate search says how much it finds, and what it finds has the scores and the order of the exact one."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Task
from lightning_mmembed.retrieval.evaluate import evaluate_vectors
from lightning_mmembed.retrieval.faiss_search import ivf_search
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.search import Ranking, Request, SearchSettings, search_pool
from lightning_mmembed.retrieval.vectors import Vectors

pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")

K, N = 10, 3000


def world() -> tuple[torch.Tensor, list[Request]]:
    generator = torch.Generator().manual_seed(0)
    pool = torch.nn.functional.normalize(torch.randn(N, 16, generator=generator), dim=1).half()
    pool[500:900] = pool[0]  # ties, many more than the depth
    queries = torch.nn.functional.normalize(pool[:90].float() + 0.1 * torch.randn(90, 16, generator=generator), dim=1)
    half, one = torch.rand(N, generator=generator) < 0.5, torch.arange(N) == 7
    return pool, [(queries[:60], [None, half, one]), (queries[60:], [None])]


def pairs(found: list[list[Ranking]], exact: list[list[Ranking]]) -> list[tuple[Ranking, Ranking]]:
    return [both for a, b in zip(found, exact, strict=True) for both in zip(a, b, strict=True)]


def test_probing_every_cell_finds_what_the_exact_search_finds_but_for_which_of_equals() -> None:
    pool, requests = world()
    found, info = ivf_search(requests, pool, K, SearchSettings("ivf", nlist=20, nprobe=20))
    for ranking, exact in pairs(found, search_pool(requests, pool, K)):
        assert torch.equal(ranking.scores, exact.scores)
    assert (info["nlist"], info["nprobe"], info["k"], info["sampled_queries"]) == (20, 20, K, 90)
    assert 0.9 < info["recall"] <= 1


def test_the_recall_is_the_share_of_the_exact_rankings_that_was_found() -> None:
    pool, requests = world()
    recalls = []
    for nprobe in (1, 4, 16):
        found, info = ivf_search(requests, pool, K, SearchSettings("ivf", nlist=50, nprobe=nprobe))
        there = kept = 0
        for ranking, exact in pairs(found, search_pool(requests, pool, K)):
            for row, right in zip(ranking.rows.tolist(), exact.rows.tolist(), strict=True):
                there += len({r for r in right if r >= 0})
                kept += len({r for r in right if r >= 0} & set(row))
        assert info["recall"] == kept / there
        recalls.append(kept / there)
    assert recalls == sorted(recalls)
    assert 0 < recalls[0] < 0.8


def test_what_is_found_lies_in_the_subset_and_has_canonical_scores_in_canonical_order() -> None:
    pool, requests = world()
    found, _ = ivf_search(requests, pool, K, SearchSettings("ivf", nlist=50, nprobe=3))
    for (queries, subsets), rankings in zip(requests, found, strict=True):
        for subset, ranking in zip(subsets, rankings, strict=True):
            present = ranking.rows >= 0
            if subset is not None:
                assert subset[ranking.rows[present]].all()
            for query, rows, scores in zip(queries, ranking.rows, ranking.scores, strict=True):
                kept = rows[rows >= 0]
                products = (pool[kept].double() @ query.double()).float()
                assert torch.equal(scores[rows >= 0], products)
                order = np.lexsort([kept.numpy(), -products.numpy()])
                assert order.tolist() == list(range(len(kept)))
            assert torch.isneginf(ranking.scores[~present]).all()


def test_the_same_search_finds_the_same_again() -> None:
    pool, requests = world()
    once, again = (ivf_search(requests, pool, K, SearchSettings("ivf", nprobe=2)) for _ in range(2))
    assert once[1] == again[1]
    assert all(torch.equal(a.rows, b.rows) for a, b in pairs(once[0], again[0]))


def test_nothing_to_search_or_to_ask_gives_padding() -> None:
    found, info = ivf_search([(torch.ones(2, 3), [None])], Vectors([], 3), K, SearchSettings("ivf"))
    assert found[0][0].rows.tolist() == [[-1] * K] * 2
    assert info["recall"] == 1
    found, info = ivf_search([(torch.ones(0, 3), [None])], torch.ones(5, 3), K, SearchSettings("ivf"))
    assert found[0][0].rows.shape == (0, K)


def test_an_evaluation_carries_the_recall_of_an_approximate_search_and_nothing_of_an_exact_one() -> None:
    vectors, requests = world()
    pool = Pool("test", torch.arange(N), torch.zeros(N, dtype=torch.int8), {"pets_task0": requests[0][1][1]}, [], "")
    queries, task = requests[0][0], Task("pets", 0)
    sets = [QuerySet(task, torch.arange(60), [[i] for i in range(60)], [], "")]
    settings = SearchSettings("ivf", nlist=50, nprobe=3)
    exact = evaluate_vectors(pool, vectors, sets, [queries])
    found = evaluate_vectors(pool, vectors, sets, [queries], search=settings)
    assert exact.search_info == {}
    assert found.search_info == ivf_search([(queries, requests[0][1][:2])], vectors, 50, settings)[1]
    assert found.metrics["union"]["average"]["hit@5"] <= exact.metrics["union"]["average"]["hit@5"]
    assert set(found.metrics) == {"union", "local"}


def test_without_faiss_the_extras_are_named_and_the_default_search_runs() -> None:
    script = (
        "import sys\nsys.modules['faiss'] = None\nimport torch\n"
        "from lightning_mmembed.errors import UserInputError\n"
        "from lightning_mmembed.retrieval.search import SearchSettings, exact_search\n"
        "print(exact_search(torch.ones(1, 2), torch.ones(3, 2), 2)[0].rows.tolist())\n"
        "try:\n    exact_search(torch.ones(1, 2), torch.ones(3, 2), 2, settings=SearchSettings('faiss'))\n"
        "except UserInputError as error:\n    print(error)\n"
    )
    ranked, message = subprocess.check_output([sys.executable, "-c", script], text=True).splitlines()
    assert ranked == "[[0, 1]]"
    assert "lightning-mmembed[faiss-cpu]" in message
    assert "lightning-mmembed[gpu]" in message


def test_a_query_that_has_no_rank_is_named() -> None:
    with pytest.raises(UserInputError, match="row 1 of the vectors of the queries holds NaN or infinity"):
        ivf_search([(torch.tensor([[1.0], [float("nan")]]), [None])], torch.ones(9, 1), 2, SearchSettings("ivf"))
