"""A score is one number, and what is known about it before it is computed holds."""

from __future__ import annotations

import math

import numpy as np
import torch

from lightning_mmembed.retrieval.scores import canonical_scores, exact_scores, float32_window


def pairs(count: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(dim)
    return torch.randn(count, dim, generator=generator), torch.randn(count, dim, generator=generator)


def test_a_canonical_score_is_the_inner_product_rounded_to_float32() -> None:
    for dim in (1, 2, 3, 7, 64, 513):
        queries, candidates = pairs(50, dim)
        exact = [
            math.fsum(a * b for a, b in zip(q, c, strict=True))
            for q, c in zip(queries.tolist(), candidates.tolist(), strict=True)
        ]
        np.testing.assert_array_equal(canonical_scores(queries, candidates).numpy(), np.array(exact, np.float32))


def test_a_canonical_score_does_not_depend_on_the_pairs_beside_it() -> None:
    queries, candidates = pairs(301, 129)
    together = canonical_scores(queries, candidates)
    alone = torch.cat([canonical_scores(q, c) for q, c in zip(queries.split(1), candidates.split(1), strict=True)])
    assert torch.equal(together.view(torch.int32), alone.view(torch.int32))


def test_zero_has_no_sign() -> None:
    score = canonical_scores(torch.tensor([[-1.0, -2.0]]), torch.zeros(1, 2))
    assert score.view(torch.int32).tolist() == [0]


def test_float32_products_that_lie_farther_apart_than_the_window_keep_their_order() -> None:
    base, noise = pairs(1000, 96)
    queries = torch.nn.functional.normalize(noise[:20], dim=1)
    # So close together that float32 does mistake their order.
    pool = torch.nn.functional.normalize(base[0] + 3e-7 * base, dim=1)
    fast = queries @ pool.T
    right = canonical_scores(queries.repeat_interleave(1000, 0), pool.repeat(20, 1)).view(20, 1000)
    window = float32_window(queries.double().norm(dim=1), float(pool.norm(dim=1).max()), 96)
    farther = (fast[:, :, None] - fast[:, None, :]).double() > window[:, None, None]
    assert (right[:, :, None] > right[:, None, :])[farther].all()
    wrong = (fast[:, :, None] > fast[:, None, :]) & (right[:, :, None] < right[:, None, :])
    assert wrong.any(), "the pool is not hard enough to show anything"


def test_exact_scores_are_canonical_wherever_they_are_above_the_threshold() -> None:
    queries, pool = pairs(40, 33)
    queries[3] = pool[5] = 0
    pool[::7] = torch.ones(33)
    queries[:10] = torch.tensor([1.0, -1.0, 2.0]).repeat(11)  # products of these and the ones cancel
    queries[10:20, :2] = torch.tensor([2.0**40, -(2.0**40)])  # float64 cannot hold the sums of these and the rest
    right = canonical_scores(queries.repeat_interleave(40, 0), pool.repeat(40, 1)).view(40, 40)
    for threshold in (torch.full((40,), float("-inf")), torch.zeros(40), right.median(1).values):
        found = exact_scores(queries, pool, threshold)
        above = right > threshold[:, None]
        assert torch.equal(found[above].view(torch.int32), right[above].view(torch.int32))
        assert (found[~above] <= threshold[:, None].expand(40, 40)[~above]).all()
