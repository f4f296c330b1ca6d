"""A learned temperature and cut vectors: losses over losses equal what they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from loss_batches import cross_entropy, random_batch
from omegaconf import OmegaConf

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.loss_modules import LearnedTemperature, MatryoshkaLoss, check_widths
from lightning_mmembed.losses import batch_arguments, contrastive_loss, symmetric_contrastive_loss

# --- learned temperature --------------------------------------------------------------------------------------------


def test_a_learned_temperature_starts_as_the_loss_at_that_temperature_with_the_same_gradients() -> None:
    batch = random_batch(0, grad=True)
    learned = LearnedTemperature(temperature=0.2).double()
    plain = contrastive_loss(*batch.arguments, 0.2)
    loss = learned(*batch.arguments)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    for found, expected in zip(
        torch.autograd.grad(loss, [batch.queries, batch.candidates]),
        torch.autograd.grad(plain, [batch.queries, batch.candidates]),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_scale_follows_its_gradient_to_the_best_temperature() -> None:
    batch = random_batch(4)
    learned = LearnedTemperature(temperature=0.05).double()
    optimizer = torch.optim.SGD(learned.parameters(), lr=0.2)
    for _ in range(500):
        optimizer.zero_grad()
        learned(*batch.arguments).backward()
        optimizer.step()
    losses = {t: contrastive_loss(*batch.arguments, t).item() for t in np.linspace(0.01, 1, 200)}
    assert learned(*batch.arguments).item() == pytest.approx(min(losses.values()), rel=1e-4)


@pytest.mark.parametrize(("pushed", "held"), [(9.0, 0.01), (-9.0, 1.0)])
def test_the_temperature_is_held_between_a_hundredth_and_one_and_comes_back_at_once(pushed: float, held: float) -> None:
    learned = LearnedTemperature()
    with torch.no_grad():
        learned.log_scale.fill_(pushed)
    batch = random_batch(0)
    loss = learned(*batch.arguments)
    torch.testing.assert_close(loss, contrastive_loss(*batch.arguments, held), rtol=1e-4, atol=1e-4)
    loss.backward()
    assert learned.log_scale.grad is not None
    assert learned.log_scale.grad != 0
    assert abs(learned.log_scale.item()) < 4.61


def test_the_learned_scale_is_a_weight_that_a_checkpoint_keeps() -> None:
    learned, other = LearnedTemperature(temperature=0.3), LearnedTemperature(temperature=0.05)
    assert list(learned.state_dict()) == ["log_scale"]
    other.load_state_dict(learned.state_dict())
    assert other.temperature.item() == pytest.approx(0.3)


def test_vectors_without_a_graph_bring_the_scale_its_whole_gradient_once() -> None:
    """As with GradCache: leaves take the gradient of the vectors, and the scale's comes with the same pass."""
    batch = random_batch(2)
    learned = LearnedTemperature(temperature=0.2).double()
    queries, candidates = (v.detach().requires_grad_() for v in (batch.queries, batch.candidates))
    learned(queries, candidates, batch.positive_index, batch.mask).backward()
    step, values = 1e-5, []
    for sign in (1, -1):
        other = LearnedTemperature(temperature=0.2).double()
        with torch.no_grad():
            other.log_scale += sign * step
        values.append(other(*batch.arguments).item())
    assert learned.log_scale.grad is not None
    assert learned.log_scale.grad.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.001, 2.0, float("nan")])
def test_a_temperature_out_of_bounds_is_refused(temperature: float) -> None:
    with pytest.raises(UserInputError, match=rf"temperature={temperature} must lie between 1 / max_scale=100.0 and 1"):
        LearnedTemperature(temperature=temperature)


# --- matryoshka -----------------------------------------------------------------------------------------------------


def test_the_matryoshka_loss_is_the_weighted_sum_over_vectors_cut_and_made_unit_vectors_again() -> None:
    batch = random_batch(0)
    dims, weights = [8, 5, 2], [1.0, 0.5, 2.0]
    expected = 0.0
    for dim, weight in zip(dims, weights, strict=True):
        q, c = (v[:, :dim].numpy() for v in (batch.queries, batch.candidates))
        similarities = (q / np.linalg.norm(q, axis=1)[:, None]) @ (c / np.linalg.norm(c, axis=1)[:, None]).T
        expected += weight * cross_entropy(similarities / 0.05, batch.mask.numpy(), batch.positive_index.tolist())
    loss = MatryoshkaLoss(contrastive_loss, dims, weights)(*batch.arguments)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_the_full_length_alone_is_the_loss_itself() -> None:
    batch = random_batch(0)
    torch.testing.assert_close(
        MatryoshkaLoss(contrastive_loss, [8])(*batch.arguments), contrastive_loss(*batch.arguments)
    )


@pytest.mark.parametrize(("dims", "given"), [([5, 2], 8), ([16, 4], 8), ([128, 64, 32], 4096)])
def test_vectors_of_another_width_than_the_largest_length_are_refused(dims: list[int], given: int) -> None:
    batch, loss = random_batch(0, dim=given), MatryoshkaLoss(contrastive_loss, dims)
    suggested = r"\[4096, 1024, 256\]" if given == 4096 else r"\[8, 2\]"
    message = rf"matryoshka_dims=.*: the largest must be {given}, the width of the vectors.*={suggested}"
    for refused in (lambda: loss(*batch.arguments), lambda: check_widths(LearnedTemperature(loss), given)):
        with pytest.raises(UserInputError, match=message):
            refused()


def test_every_number_of_a_vector_is_trained_and_the_lengths_come_in_any_order() -> None:
    batch = random_batch(0, grad=True)
    loss = MatryoshkaLoss(LearnedTemperature(), [2, 8, 5])
    check_widths(loss, 8)
    check_widths(contrastive_loss, 7)
    gradient = torch.autograd.grad(loss(*batch.arguments), batch.candidates)[0]
    assert (gradient.abs().sum(0) > 0).all()


def test_losses_may_hold_each_other_and_ask_for_what_the_innermost_needs() -> None:
    batch = random_batch(0)
    nested = LearnedTemperature(symmetric_contrastive_loss, temperature=0.2)
    assert batch_arguments(nested) == ("all_queries", "query_index", "query_mask")
    cut = MatryoshkaLoss(nested, [8, 4])
    assert batch_arguments(cut) == ("all_queries", "query_index", "query_mask")
    assert [name for name, _ in cut.named_parameters()] == ["loss.log_scale"]
    extra = {"query_index": torch.arange(5), "query_mask": batch.query_mask}
    given = cut(*batch.arguments, all_queries=batch.queries, **extra)
    torch.testing.assert_close(given, cut(*batch.arguments))


@pytest.mark.parametrize(
    ("dims", "weights", "message"),
    [
        ([], None, r"matryoshka_dims=\[\] must be one length or more"),
        ([4, 0], None, r"matryoshka_dims=\[4, 0\] must be"),
        ([4, 2], [1.0], r"matryoshka_weights=\[1.0\] must be as many"),
    ],
)
def test_lengths_that_cannot_be_are_named(dims: list[int], weights: list[float] | None, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        MatryoshkaLoss(contrastive_loss, dims, weights)(*random_batch(0).arguments)


# --- configuration --------------------------------------------------------------------------------------------------

CONFIGURED = sorted((Path(__file__).parents[1] / "conf" / "loss").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURED, ids=lambda path: path.stem)
def test_each_configured_loss_takes_a_batch_of_unit_vectors(path: Path) -> None:
    loss = instantiate(OmegaConf.load(path))
    batch = random_batch(0, dim=128)
    asked = {"listed": batch.listed, "teacher_scores": batch.teacher_scores}
    extra = {name: value for name, value in asked.items() if name in batch_arguments(loss)}
    value = loss(*batch.arguments, **extra)
    assert value.shape == ()
    assert value.isfinite()
    assert value > 0


def test_the_loss_by_default_is_configured_as_it_always_was() -> None:
    batch = random_batch(0)
    configured = instantiate(OmegaConf.load(CONFIGURED[0].parent / "contrastive.yaml"))
    assert torch.equal(configured(*batch.arguments), contrastive_loss(*batch.arguments))
