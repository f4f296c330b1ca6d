"""The contrastive loss equals its definition, and a labelled positive is never one of its negatives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lightning_mmembed.losses import contrastive_logits, contrastive_loss, labelled_positive_mask


@dataclass(frozen=True)
class Case:
    """A training batch, as ids and unit vectors."""

    query_ids: list[int]
    positives: list[list[int]]
    candidate_ids: list[int]
    positive_index: list[int]
    queries: np.ndarray
    candidates: np.ndarray

    @property
    def mask(self) -> torch.Tensor:
        width = max(len(labelled) for labelled in self.positives)
        padded = [[*labelled, *[-1] * (width - len(labelled))] for labelled in self.positives]
        index = torch.tensor(self.positive_index)
        return labelled_positive_mask(torch.tensor(padded), torch.tensor(self.candidate_ids), index)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def random_case(seed: int) -> Case:
    """Few queries and few candidates, so that both come up several times, with several positives for a query."""
    rng = np.random.default_rng(seed)
    n_queries, n_ids, dim = int(rng.integers(1, 9)), int(rng.integers(4, 12)), 6
    labels = [rng.permutation(n_ids)[: rng.integers(1, 4)].tolist() for _ in range(5)]
    query_vectors, candidate_vectors = unit(rng.normal(size=(5, dim))), unit(rng.normal(size=(n_ids, dim)))
    drawn = rng.integers(0, 5, n_queries).tolist()  # with repetition: the same query may be drawn twice
    chosen = [int(rng.choice(labels[q])) for q in drawn]
    negatives = [int(rng.integers(n_ids)) for _ in range(n_queries * int(rng.integers(0, 3)))]
    ids = chosen + negatives
    order = rng.permutation(len(ids))
    ids = [ids[i] for i in order]
    index = [int(np.flatnonzero(order == i)[0]) for i in range(n_queries)]
    return Case(drawn, [labels[q] for q in drawn], ids, index, query_vectors[drawn], candidate_vectors[ids])


CASES = [random_case(seed) for seed in range(40)]


def mask_by_loop(case: Case) -> list[list[bool]]:
    return [
        [candidate in labelled and j != own for j, candidate in enumerate(case.candidate_ids)]
        for labelled, own in zip(case.positives, case.positive_index, strict=True)
    ]


def loss_by_loop(case: Case, temperature: float) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss and its gradients in float64, term by term."""
    queries, candidates = case.queries, case.candidates
    mask = mask_by_loop(case)
    loss, grad_queries, grad_candidates = 0.0, np.zeros_like(queries), np.zeros_like(candidates)
    n = len(queries)
    for i in range(n):
        weights = {}
        for j in range(len(candidates)):
            if not mask[i][j]:
                weights[j] = math.exp(float(np.dot(queries[i], candidates[j])) / temperature)
        total, own = sum(weights.values()), case.positive_index[i]
        loss -= math.log(weights[own] / total) / n
        for j, weight in weights.items():
            slope = (weight / total - (j == own)) / (n * temperature)
            grad_queries[i] += slope * candidates[j]
            grad_candidates[j] += slope * queries[i]
    return loss, grad_queries, grad_candidates


def loss_and_gradients(
    case: Case, candidates: np.ndarray | None = None, temperature: float = 0.05
) -> tuple[float, np.ndarray, np.ndarray]:
    q = torch.tensor(case.queries, dtype=torch.float32, requires_grad=True)
    c = torch.tensor(case.candidates if candidates is None else candidates, dtype=torch.float32, requires_grad=True)
    loss = contrastive_loss(q, c, torch.tensor(case.positive_index), case.mask, temperature)
    loss.backward()
    assert q.grad is not None
    assert c.grad is not None
    return loss.item(), q.grad.numpy(), c.grad.numpy()


def test_the_random_cases_hold_every_kind_of_repetition() -> None:
    assert any(len(set(case.query_ids)) < len(case.query_ids) for case in CASES)
    assert any(len(set(case.candidate_ids)) < len(case.candidate_ids) for case in CASES)
    assert any(len(labelled) > 1 for case in CASES for labelled in case.positives)
    second = [set(labelled[1:]) & set(case.candidate_ids) for case in CASES for labelled in case.positives]
    assert any(second)


@pytest.mark.parametrize("seed", range(40))
def test_the_mask_equals_a_loop_over_every_query_and_candidate(seed: int) -> None:
    assert CASES[seed].mask.tolist() == mask_by_loop(CASES[seed])


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("seed", range(40))
def test_loss_and_gradients_equal_a_double_loop_in_float64(seed: int, temperature: float) -> None:
    loss, grad_queries, grad_candidates = loss_and_gradients(CASES[seed], temperature=temperature)
    expected_loss, expected_queries, expected_candidates = loss_by_loop(CASES[seed], temperature)
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(grad_queries, expected_queries, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grad_candidates, expected_candidates, rtol=1e-4, atol=1e-4)


def test_a_labelled_positive_never_enters_the_denominator_as_a_negative() -> None:
    """Its vector may be anything: neither the loss nor a gradient of the queries that it is a positive of changes."""
    seen = 0
    for case in CASES:
        for column in range(len(case.candidate_ids)):
            masked = np.array([row[column] for row in mask_by_loop(case)])
            if not masked.any():
                continue
            changed = case.candidates.copy()
            changed[column] = -changed[column] + 0.3
            _, before, _ = loss_and_gradients(case)
            _, after, _ = loss_and_gradients(case, changed)
            np.testing.assert_array_equal(after[masked], before[masked])
            seen += 1
            if masked.all():
                loss_before, _, others_before = loss_and_gradients(case)
                loss_after, _, others_after = loss_and_gradients(case, changed)
                assert loss_after == loss_before
                np.testing.assert_array_equal(others_after, others_before)
                np.testing.assert_array_equal(others_after[column], 0)
    assert seen > 20


def test_a_candidate_that_every_query_masks_changes_neither_the_loss_nor_any_gradient() -> None:
    rng = np.random.default_rng(1)
    vectors = unit(rng.normal(size=(5, 6)))
    # Query 1 drawn twice, with two positives: 10 is drawn for it both times, 11 came in by another way.
    case = Case([1, 1], [[10, 11], [10, 11]], [10, 10, 11, 12], [0, 1], vectors[[0, 0]], vectors[[1, 1, 2, 3]])
    assert case.mask.tolist() == [[False, True, True, False], [True, False, True, False]]
    loss, grad_queries, grad_candidates = loss_and_gradients(case)
    for replacement in (-case.candidates[2], 100 * case.queries[0]):
        candidates = case.candidates.copy()
        candidates[2] = replacement
        other = loss_and_gradients(case, candidates)
        assert other[0] == loss
        np.testing.assert_array_equal(other[1], grad_queries)
        np.testing.assert_array_equal(other[2], grad_candidates)
    np.testing.assert_array_equal(grad_candidates[2], 0)


def test_the_positive_to_be_ranked_first_is_never_masked() -> None:
    for case in CASES:
        assert not case.mask.gather(1, torch.tensor(case.positive_index)[:, None]).any()
        assert math.isfinite(loss_and_gradients(case)[0])


def test_padding_masks_nothing_and_the_order_of_labels_does_not_matter() -> None:
    ids, index = torch.tensor([3, 4, 3, 5]), torch.tensor([0])
    expected = [[False, True, True, False]]
    for labels in ([3, 4], [4, 3], [-1, 4, -1, 3], [3, 4, 99]):
        assert labelled_positive_mask(torch.tensor([labels]), ids, index).tolist() == expected


@pytest.mark.parametrize("seed", range(10))
def test_the_order_of_the_candidates_does_not_matter(seed: int) -> None:
    case = CASES[seed]
    order = np.random.default_rng(seed).permutation(len(case.candidate_ids))
    place = np.argsort(order)
    shuffled = Case(
        case.query_ids,
        case.positives,
        [case.candidate_ids[i] for i in order],
        [int(place[i]) for i in case.positive_index],
        case.queries,
        case.candidates[order],
    )
    loss, grad_queries, grad_candidates = loss_and_gradients(case)
    other_loss, other_queries, other_candidates = loss_and_gradients(shuffled)
    assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(other_queries, grad_queries, atol=1e-5)
    np.testing.assert_allclose(other_candidates, grad_candidates[order], atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_halving_the_similarities_equals_doubling_the_temperature(seed: int) -> None:
    case = CASES[seed]
    q, c, index = torch.tensor(case.queries).float(), torch.tensor(case.candidates).float(), case.positive_index
    halved = contrastive_loss(q / 2, c, torch.tensor(index), case.mask, 0.1)
    doubled = contrastive_loss(q, c, torch.tensor(index), case.mask, 0.2)
    torch.testing.assert_close(halved, doubled)


def test_the_temperature_divides_the_similarities_and_is_a_twentieth_by_default() -> None:
    q, c = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    torch.testing.assert_close(contrastive_logits(q, c, temperature=0.5), torch.tensor([[1.2, 0.0]]))
    torch.testing.assert_close(contrastive_logits(q, c), torch.tensor([[12.0, 0.0]]))
    expected = math.log1p(math.exp(-12.0))
    assert contrastive_loss(q, c, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-2)


def test_the_loss_of_bfloat16_vectors_is_computed_in_float32() -> None:
    case = CASES[3]
    q, c = torch.tensor(case.queries).bfloat16(), torch.tensor(case.candidates).bfloat16()
    index = torch.tensor(case.positive_index)
    low = contrastive_loss(q, c, index, case.mask)
    assert low.dtype is torch.float32
    assert torch.equal(low, contrastive_loss(q.float(), c.float(), index, case.mask))
    # Not merely cast at the end: similarities in bfloat16 are off by more than this.
    rounded = torch.nn.functional.cross_entropy(((q @ c.T).float() / 0.05).masked_fill(case.mask, -math.inf), index)
    assert abs(low.item() - rounded.item()) > 1e-4
