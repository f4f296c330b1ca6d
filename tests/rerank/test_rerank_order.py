"""What scores do to a ranking, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.rerank import fused, rerank, settled
from lightning_mmembed.rerank.order import mixable


def test_the_head_is_sorted_by_score_and_the_rest_stays_below_in_its_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        ranking, known = [f"0:{n}" for n in rng.permutation(12)], int(rng.integers(0, 13))
        scores = rng.integers(0, 4, known) / 4  # many ties
        ranks = {did: rank for rank, did in enumerate(ranking)}
        expected = sorted(ranking[:known], key=lambda did: (-scores[ranks[did]], ranks[did])) + ranking[known:]
        assert rerank(ranking, scores.tolist()) == expected


def test_a_weight_mixes_the_retrievers_score_in() -> None:
    ranking, scores, retrieval = ["a", "b", "c"], [0.1, 0.2, 0.9], [0.9, 0.8, 0.0]
    assert rerank(ranking, scores, retrieval, weight=0.0) == ["a", "b", "c"]
    assert rerank(ranking, scores, retrieval, weight=0.5) == ["a", "b", "c"]
    assert rerank(ranking, scores, retrieval, weight=1.0) == ["c", "b", "a"]
    np.testing.assert_allclose(fused(scores, retrieval, 0.25), 0.25 * np.array(scores) + 0.75 * np.array(retrieval))


def test_scores_of_any_size_are_brought_to_that_of_a_probability_within_a_head() -> None:
    inf = float("inf")
    heads = torch.tensor([[30.0, 10.0, 5.0], [8.0, 8.0, 8.0], [0.4, 0.2, -inf], [-inf, -inf, -inf]])
    expected = torch.tensor([[1.0, 0.2, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, -inf], [-inf, -inf, -inf]])
    torch.testing.assert_close(mixable(heads), expected)
    cosines = torch.tensor([[1.0005, 0.1], [-0.3, -1.0], [0.2, -inf]])  # rounded vectors may lie beyond 1
    assert mixable(cosines).equal(cosines)
    assert mixable(torch.zeros(0, 3)).shape == (0, 3)


def test_wrong_scores_and_weights_are_named() -> None:
    with pytest.raises(UserInputError, match=r"weight=1\.5 is out of range"):
        rerank(["a"], [0.5], [0.5], weight=1.5)
    with pytest.raises(UserInputError, match=r"weight=0\.5 needs a retrieval score for each of 1 scores; 0 given"):
        rerank(["a"], [0.5], weight=0.5)
    with pytest.raises(UserInputError, match="2 scores are more than the 1 candidates"):
        rerank(["a"], [0.5, 0.5])
    with pytest.raises(UserInputError, match="rank 2 is nan"):
        rerank(["a", "b"], [0.5, float("nan")])


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("top", [1, 2, 3])
def test_what_is_settled_is_what_no_further_score_can_change(weight: float, top: int) -> None:
    rng, seen = np.random.default_rng(top), set()
    for _ in range(200):
        retrieval = sorted((rng.integers(0, 8, 5) / 8).tolist(), reverse=True)
        known = int(rng.integers(1, 5))
        scores = rng.choice([0.0, 0.5, 1.0], known).tolist()
        # The extremes are enough: a place changes by a score that is as high, or as low, as it can be.
        heads = {
            tuple(rerank("abcde", [*scores, *rest], retrieval, weight)[:top])
            for rest in itertools.product([0.0, 1.0], repeat=5 - known)
        }
        got = settled(scores, 5, top, retrieval, weight)
        assert got == (len(heads) == 1 and known >= top) or (not got and known < top)
        if got:
            assert heads == {tuple(rerank("abcde", scores, retrieval, weight)[:top])}
        seen.add(got)
    assert seen == ({True} if weight == 0 and top == 1 else {True, False})


def test_only_certainty_settles_anything_without_the_retrievers_score() -> None:
    assert not settled([0.999, 0.0], depth=3, top=1)
    assert settled([1.0, 0.0], depth=3, top=1)
    assert settled([0.1, 0.2, 0.3], depth=3, top=1)
