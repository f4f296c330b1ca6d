"""On the same numbers the losses and their gradients are those of sentence-transformers, where it has them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("sentence_transformers", minversion="6")

from sentence_transformers.sentence_transformer import losses as theirs
from text_table import features, table_model

from lightning_mmembed.loss_modules import MatryoshkaLoss
from lightning_mmembed.losses import (
    contrastive_loss,
    distillation_loss,
    hardness_weighted_loss,
    symmetric_contrastive_loss,
)

N, DIM = 6, 8
COLUMNS = [[f"{name}{n}" for n in range(N)] for name in ("query", "positive", "first", "second")]
WORDS = [word for column in COLUMNS for word in column]
#: Each query's own columns among the candidates: its positive and two negatives.
LISTED = torch.tensor([[i, N + i, 2 * N + i] for i in range(N)])
TEACHER = torch.tensor(np.random.default_rng(1).normal(size=(N, 3)), dtype=torch.float32)


def unit_table() -> dict[str, np.ndarray]:
    vectors = np.random.default_rng(0).normal(size=(len(WORDS), DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return dict(zip(WORDS, vectors, strict=True))


def check(make: Callable[..., torch.nn.Module], loss: Callable[..., Tensor], labels: Tensor | None = None) -> None:
    """Both losses and their gradients, which are compared where they turn a vector and do not stretch it."""
    model = table_model(unit_table())
    weights = model[0].embedding.weight
    inputs = [features(model, column) for column in COLUMNS]
    expected = make(model)(inputs, torch.zeros(N) if labels is None else labels)
    expected.backward()

    vectors = weights.detach()[1:].clone().requires_grad_()
    queries, candidates = vectors[:N], vectors[N:]
    found = loss(queries, candidates, torch.arange(N), torch.zeros(N, 3 * N, dtype=torch.bool))
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert vectors.grad is not None
    torch.testing.assert_close(tangent(vectors), tangent(weights[1:], weights.grad[1:]), rtol=1e-4, atol=1e-5)


def tangent(vectors: Tensor, gradient: Tensor | None = None) -> Tensor:
    gradient = vectors.grad if gradient is None else gradient
    assert gradient is not None
    along = (gradient * vectors).sum(1, keepdim=True) * vectors
    return (gradient - along).detach()


def test_the_contrastive_loss_is_its_multiple_negatives_ranking_loss() -> None:
    check(theirs.MultipleNegativesRankingLoss, contrastive_loss)


@pytest.mark.parametrize("mode", ["all_negatives", "hard_negatives", "in_batch_negatives"])
@pytest.mark.parametrize("strength", [0.5, 9.0])
def test_weights_that_are_not_normalised_are_its_hardness_modes(mode: str, strength: float) -> None:
    settings = {"hardness_mode": mode, "hardness_strength": strength}
    check(
        lambda model: theirs.MultipleNegativesRankingLoss(model, **settings),
        lambda *batch: hardness_weighted_loss(*batch, normalize=False, listed=LISTED, **settings),
    )


def test_the_symmetric_loss_is_its_ranking_loss_in_both_directions() -> None:
    check(
        lambda model: theirs.MultipleNegativesRankingLoss(
            model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
        ),
        symmetric_contrastive_loss,
    )


@pytest.mark.parametrize(("student", "teacher"), [(1.0, 1.0), (0.2, 2.0)])
def test_the_distillation_loss_is_its_divergence(student: float, teacher: float) -> None:
    settings = {"student_temperature": student, "teacher_temperature": teacher}
    check(
        lambda model: theirs.DistillKLDivLoss(model, **settings),
        lambda *batch: distillation_loss(*batch, listed=LISTED, teacher_scores=TEACHER, **settings),
        TEACHER,
    )


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.25]])
def test_the_matryoshka_loss_is_its_own(weights: list[float] | None) -> None:
    dims = [DIM, 5, 2]
    check(
        lambda model: theirs.MatryoshkaLoss(model, theirs.MultipleNegativesRankingLoss(model), dims, weights),
        MatryoshkaLoss(contrastive_loss, dims, weights),
    )
