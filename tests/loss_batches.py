"""Batches of a contrastive loss in float64, and its definition term by term."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_mmembed.losses import labelled_positive_mask, labelled_query_mask


@dataclass
class Batch:
    """A batch in float64, with repeated candidates, several positives of a query and two drawn negatives each."""

    queries: Tensor
    candidates: Tensor
    positive_index: Tensor
    mask: Tensor
    query_mask: Tensor
    listed: Tensor
    teacher_scores: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.queries, self.candidates, self.positive_index, self.mask

    @property
    def numpy(self) -> tuple[np.ndarray, np.ndarray, list[int], np.ndarray]:
        similarities = (self.queries @ self.candidates.T).detach().numpy()
        return similarities, self.mask.numpy(), self.positive_index.tolist(), self.listed.numpy()


def random_batch(seed: int, n: int = 5, dim: int = 8, grad: bool = False) -> Batch:
    rng = np.random.default_rng(seed)
    labels = [rng.permutation(9)[: rng.integers(1, 4)].tolist() for _ in range(n)]
    labels[1] = labels[0]  # the same query drawn twice
    chosen = [own[0] for own in labels]
    drawn = [[did for did in rng.permutation(9).tolist() if did not in own][:2] for own in labels]
    ids = chosen + [did for own in drawn for did in own]
    positives = torch.tensor([[*own, -1, -1, -1][:3] for own in labels])
    index = torch.arange(n)
    listed = torch.tensor([[i, n + 2 * i, n + 2 * i + 1, -1] for i in range(n)])
    listed[2, 2] = -1  # one query with a negative less
    vectors = torch.nn.functional.normalize(torch.tensor(rng.normal(size=(n + len(ids), dim))), dim=1)
    return Batch(
        vectors[:n].clone().requires_grad_(grad),
        vectors[n:].clone().requires_grad_(grad),
        index,
        labelled_positive_mask(positives, torch.tensor(ids), index),
        labelled_query_mask(positives, torch.tensor(chosen), index),
        listed,
        torch.tensor(rng.normal(size=listed.shape)),
    )


def cross_entropy(logits: np.ndarray, out: np.ndarray, index: list[int], weights: np.ndarray | None = None) -> float:
    """The mean over the rows, term by term."""
    total = 0.0
    for i, own in enumerate(index):
        terms = np.exp(logits[i]) * (1.0 if weights is None else weights[i])
        total -= np.log(np.exp(logits[i, own]) / terms[~out[i]].sum())
    return total / len(index)
