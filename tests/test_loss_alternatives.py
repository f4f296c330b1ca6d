"""Each other loss equals its definition written out in float64, and where it has it sentence-transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from loss_batches import Batch, cross_entropy, random_batch
from torch import Tensor

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.loss_modules import LearnedTemperature, MatryoshkaLoss
from lightning_mmembed.losses import (
    contrastive_logits,
    contrastive_loss,
    distillation_loss,
    hardness_weighted_loss,
    has_teacher,
    labelled_query_mask,
    symmetric_contrastive_loss,
)


def hardness_by_loop(
    batch: Batch, strength: float, mode: str, normalize: bool, weights_of: np.ndarray | None = None
) -> float:
    similarities, out, index, listed = batch.numpy
    frozen = similarities if weights_of is None else weights_of
    weights = np.ones_like(similarities)
    for i, own in enumerate(index):
        drawn = {int(column) for column in listed[i] if column >= 0} - {own}
        columns = [j for j in range(len(weights[i])) if j != own and not out[i, j]]
        if mode == "hard_negatives":
            columns = [j for j in columns if j in drawn]
        if mode == "in_batch_negatives":
            columns = [j for j in columns if j not in drawn]
        if columns:
            raw = np.exp(strength * frozen[i, columns])
            weights[i, columns] = raw / raw.mean() if normalize else raw
    return cross_entropy(similarities / T, out, index, weights)


T = 0.3
MODES = ["all_negatives", "hard_negatives", "in_batch_negatives"]


# --- hardness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(5))
def test_the_hardness_weighted_loss_equals_its_definition(seed: int, mode: str, normalize: bool) -> None:
    batch = random_batch(seed)
    loss = hardness_weighted_loss(*batch.arguments, T, 3.0, mode, normalize, batch.listed)
    assert loss.item() == pytest.approx(hardness_by_loop(batch, 3.0, mode, normalize), rel=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_the_hardness_weighted_loss_is_that_of_constant_weights(mode: str, normalize: bool) -> None:
    batch, step = random_batch(1, grad=True), 1e-6
    loss = hardness_weighted_loss(*batch.arguments, T, 3.0, mode, normalize, batch.listed)
    gradients = torch.autograd.grad(loss, [batch.queries, batch.candidates])
    frozen = batch.numpy[0]
    for vectors, gradient in zip((batch.queries, batch.candidates), gradients, strict=True):
        for place in np.ndindex(*vectors.shape):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    vectors[place] += sign * step
                values.append(hardness_by_loop(batch, 3.0, mode, normalize, frozen))
                with torch.no_grad():
                    vectors[place] -= sign * step
            assert gradient[place].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_strength_of_zero_is_the_contrastive_loss(normalize: bool) -> None:
    for seed in range(5):
        batch = random_batch(seed)
        plain = contrastive_loss(*batch.arguments, T)
        torch.testing.assert_close(hardness_weighted_loss(*batch.arguments, T, 0.0, normalize=normalize), plain)


def test_equally_hard_negatives_are_the_contrastive_loss_whatever_the_strength() -> None:
    queries = torch.eye(3, 4, dtype=torch.float64)
    index = torch.arange(3)
    plain = contrastive_loss(queries, queries, index, temperature=T)
    torch.testing.assert_close(hardness_weighted_loss(queries, queries, index, None, T, 7.0), plain)


def test_a_lone_candidate_costs_nothing_and_has_a_finite_gradient() -> None:
    query = torch.eye(1, 4).requires_grad_()
    loss = hardness_weighted_loss(query, torch.eye(1, 4), torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, query)
    assert loss.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hardness_mode": "hardest"}, "hardness_mode='hardest' is unknown"),
        ({"hardness_strength": -1.0}, "hardness_strength=-1.0 must be 0 or more"),
        ({"hardness_mode": "hard_negatives"}, "needs to know each query's own candidates: listed"),
    ],
)
def test_a_hardness_that_cannot_be_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        hardness_weighted_loss(*random_batch(0).arguments, **settings)


# --- symmetric ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_symmetric_loss_is_the_mean_of_both_directions(seed: int) -> None:
    batch = random_batch(seed)
    similarities, out, index, _ = batch.numpy
    forward = cross_entropy(similarities / T, out, index)
    backward = cross_entropy(similarities[:, index].T / T, batch.query_mask.numpy(), list(range(len(index))))
    assert symmetric_contrastive_loss(*batch.arguments, T).item() == pytest.approx((forward + backward) / 2, rel=1e-12)


def test_without_other_processes_the_four_arguments_of_every_loss_suffice() -> None:
    for seed in range(5):
        batch = random_batch(seed)
        assert batch.query_mask.any()
        given = symmetric_contrastive_loss(
            *batch.arguments, T, batch.queries, torch.arange(len(batch.queries)), batch.query_mask
        )
        assert torch.equal(given, symmetric_contrastive_loss(*batch.arguments, T))


def test_the_symmetric_loss_of_two_processes_is_that_of_one_with_all_queries_and_so_is_its_gradient() -> None:
    batch = random_batch(3, n=6, grad=True)
    whole = symmetric_contrastive_loss(*batch.arguments, T)
    expected = torch.autograd.grad(whole, [batch.queries, batch.candidates])
    total = torch.zeros((), dtype=torch.float64)
    for rows in (torch.arange(2), torch.arange(2, 6)):
        part = symmetric_contrastive_loss(
            batch.queries[rows],
            batch.candidates,
            batch.positive_index[rows],
            batch.mask[rows],
            T,
            all_queries=batch.queries,
            query_index=rows,
            query_mask=batch.query_mask[rows],
        )
        total = total + part * len(rows) / 6
    torch.testing.assert_close(total, whole)
    for found, gradient in zip(torch.autograd.grad(total, [batch.queries, batch.candidates]), expected, strict=True):
        torch.testing.assert_close(found, gradient)


def test_two_queries_of_one_column_are_no_negatives_of_it() -> None:
    queries = torch.nn.functional.normalize(torch.randn(3, 4, dtype=torch.float64), dim=1)
    candidates, index = queries[[2, 0]], torch.tensor([0, 0, 1])
    loss = symmetric_contrastive_loss(queries, candidates, index, None, T)
    similarities = (queries @ candidates.T).numpy()
    out = np.array([[False, True, False], [True, False, False], [False, False, False]])
    forward = cross_entropy(similarities / T, np.zeros((3, 2), dtype=bool), index.tolist())
    backward = cross_entropy(similarities[:, index].T / T, out, [0, 1, 2])
    assert loss.item() == pytest.approx((forward + backward) / 2, rel=1e-12)


def test_the_query_mask_equals_a_loop_and_never_masks_the_query_to_be_ranked_first() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels = [rng.permutation(6)[: rng.integers(1, 4)].tolist() for _ in range(5)]
        rows = rng.permutation(5)[:3]
        chosen = [int(rng.choice(labels[row])) for row in rows]
        padded = torch.tensor([[*own, -1, -1, -1][:3] for own in labels])
        expected = [
            [did in own and j != row for j, own in enumerate(labels)] for did, row in zip(chosen, rows, strict=True)
        ]
        assert labelled_query_mask(padded, torch.tensor(chosen), torch.tensor(rows)).tolist() == expected


def test_some_of_what_other_processes_have_is_refused() -> None:
    batch = random_batch(0)
    with pytest.raises(ValueError, match="give all_queries, query_index and query_mask together"):
        symmetric_contrastive_loss(*batch.arguments, all_queries=batch.queries)


# --- distillation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "teacher"), [(1.0, 1.0), (0.2, 2.0)])
@pytest.mark.parametrize("seed", range(5))
def test_the_distillation_loss_is_the_divergence_written_out(seed: int, student: float, teacher: float) -> None:
    batch = random_batch(seed)
    similarities, out, _, listed = batch.numpy
    expected = 0.0
    for i, row in enumerate(listed):
        places = [place for place, column in enumerate(row) if column >= 0 and not out[i, column]]
        p = np.exp(batch.teacher_scores[i, places].numpy() / teacher)
        q = np.exp(similarities[i, row[places]] / student)
        expected += (p / p.sum() * np.log((p / p.sum()) / (q / q.sum()))).sum() / len(listed)
    loss = distill(batch, student_temperature=student, teacher_temperature=teacher)
    assert loss.item() == pytest.approx(student**2 * expected, rel=1e-10)


def distill(batch: Batch, **settings: float) -> Tensor:
    extra = {"listed": batch.listed, "teacher_scores": batch.teacher_scores}
    return distillation_loss(*batch.arguments, **settings, **extra)


def test_a_student_that_scores_like_its_teacher_costs_nothing_whatever_is_added_to_the_scores() -> None:
    batch = random_batch(0, grad=True)
    scores = (batch.queries @ batch.candidates.T).gather(1, batch.listed.clamp(min=0)).detach()
    batch.teacher_scores = scores + 3.0
    loss = distill(batch, temperature=0.1)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss, batch.queries)[0].abs().max() < 1e-12


def test_padding_may_hold_any_score() -> None:
    batch = random_batch(0)
    before = distill(batch)
    batch.teacher_scores = batch.teacher_scores.masked_fill(batch.listed < 0, 1e6)
    assert torch.equal(distill(batch), before)


def test_a_query_without_candidates_adds_nothing_and_has_no_gradient() -> None:
    batch = random_batch(0, grad=True)
    batch.listed = batch.listed.clone()
    batch.listed[0] = -1
    gradient = torch.autograd.grad(distill(batch), batch.queries)[0]
    assert not gradient[0].any()
    assert gradient.isfinite().all()
    assert gradient[1].any()


def test_a_query_has_a_teacher_where_it_has_a_gradient() -> None:
    batch = random_batch(0, grad=True)
    batch.listed = batch.listed.clone()
    batch.listed[0, 1:] = -1
    batch.mask = batch.mask.clone()
    batch.mask[1, batch.listed[1, 1:3]] = True
    gradient = torch.autograd.grad(distill(batch), batch.queries)[0]
    assert torch.equal(has_teacher(batch.listed, batch.mask), gradient.abs().sum(1) > 0)
    assert has_teacher(batch.listed, batch.mask).tolist() == [False, False, True, True, True]


def test_a_batch_without_a_teacher_is_refused() -> None:
    with pytest.raises(UserInputError, match="needs listed and teacher_scores"):
        distillation_loss(*random_batch(0).arguments)


# --- all of them ----------------------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[..., Tensor]] = {
    "contrastive": contrastive_loss,
    "hardness": lambda *a, **k: hardness_weighted_loss(*a, hardness_strength=2.0),
    "hardness of own": lambda *a, listed, **k: hardness_weighted_loss(
        *a, hardness_strength=2.0, hardness_mode="hard_negatives", listed=listed
    ),
    "symmetric": symmetric_contrastive_loss,
    "distillation": distillation_loss,
    "learned": LearnedTemperature().double(),
    "matryoshka": MatryoshkaLoss(contrastive_loss, [8, 4]),
}


def call(name: str, batch: Batch, queries: Tensor, candidates: Tensor) -> Tensor:
    extra = {}
    if name in ("distillation", "hardness of own"):
        extra["listed"] = batch.listed
    if name == "distillation":
        extra["teacher_scores"] = batch.teacher_scores
    return LOSSES[name](queries, candidates, batch.positive_index, batch.mask, **extra)


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("hardness")])
def test_gradients_equal_finite_differences(name: str) -> None:
    batch = random_batch(1, grad=True)
    assert torch.autograd.gradcheck(lambda q, c: call(name, batch, q, c), (batch.queries, batch.candidates))


def test_the_gradient_of_the_scale_equals_finite_differences() -> None:
    batch, learned = random_batch(1), LearnedTemperature(temperature=0.2).double()

    def loss(log_scale: Tensor) -> Tensor:
        return torch.func.functional_call(learned, {"log_scale": log_scale}, batch.arguments)

    assert torch.autograd.gradcheck(loss, (learned.log_scale.detach().clone().requires_grad_(),), raise_exception=True)


@pytest.mark.parametrize("name", LOSSES)
def test_a_candidate_that_a_query_masks_takes_no_gradient_from_it_and_may_be_anything(name: str) -> None:
    for seed in range(6):
        batch = random_batch(seed, grad=True)
        row = 3
        batch.mask = batch.mask.clone()
        batch.mask[row, [0, 6, int(batch.listed[row, 1])]] = True
        alone = Batch(
            batch.queries[row : row + 1],
            batch.candidates,
            batch.positive_index[row : row + 1],
            batch.mask[row : row + 1],
            batch.query_mask[row : row + 1, row : row + 1],
            batch.listed[row : row + 1],
            batch.teacher_scores[row : row + 1],
        )
        loss = call(name, alone, alone.queries, batch.candidates)
        gradient = torch.autograd.grad(loss, batch.candidates)[0]
        assert not gradient[batch.mask[row]].any()
        changed = batch.candidates.detach().clone()
        changed[batch.mask[row]] = -changed[batch.mask[row]]
        assert torch.equal(call(name, alone, alone.queries, changed), loss)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "symmetric"])
def test_the_mean_over_the_queries_is_the_mean_of_each_alone(name: str) -> None:
    batch = random_batch(0)
    parts = []
    for row in range(5):
        rows = slice(row, row + 1)
        alone = Batch(
            batch.queries[rows],
            batch.candidates,
            batch.positive_index[rows],
            batch.mask[rows],
            batch.query_mask[rows],
            batch.listed[rows],
            batch.teacher_scores[rows],
        )
        parts.append(call(name, alone, alone.queries, alone.candidates))
    torch.testing.assert_close(call(name, batch, batch.queries, batch.candidates), torch.stack(parts).mean())


@pytest.mark.parametrize("name", LOSSES)
def test_a_rotation_of_all_vectors_changes_no_loss_but_matryoshka_s(name: str) -> None:
    batch = random_batch(0)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    before = call(name, batch, batch.queries, batch.candidates)
    after = call(name, batch, batch.queries @ rotation, batch.candidates @ rotation)
    assert torch.allclose(before, after, rtol=1e-9) == (name != "matryoshka")


@pytest.mark.parametrize("name", LOSSES)
def test_under_autocast_a_loss_is_computed_in_float32(name: str) -> None:
    batch = random_batch(0)
    vectors = batch.queries.float(), batch.candidates.float()
    plain = call(name, batch, *vectors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(name, batch, *vectors), plain)
        assert contrastive_logits(*vectors).dtype is torch.float32
    assert plain.dtype is torch.float32 or name == "learned"
