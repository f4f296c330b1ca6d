"""The contrastive loss: pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def labelled_positive_mask(positives: Tensor, candidate_ids: Tensor, positive_index: Tensor) -> Tensor:
    """Mark the candidates that must not count as a query's negatives.

    A candidate is left out of a query's denominator when it is any labelled positive of that query: a second copy of
    its positive (the same candidate drawn by another query, or the query itself drawn twice) or another one of its
    positives. The one positive that the loss is asked to rank first stays in.

    Args:
        positives: ``(Q, P)`` integer ids of every labelled positive of each query, padded with -1.
        candidate_ids: ``(C,)`` integer ids of the candidates.
        positive_index: ``(Q,)`` column of each query's positive among the candidates.

    Returns:
        ``(Q, C)`` boolean mask, True where the candidate is to be left out.

    Example:
        >>> import torch
        >>> ids = torch.tensor([7, 8, 7])
        >>> labelled_positive_mask(torch.tensor([[7, -1], [8, -1]]), ids, torch.tensor([0, 1])).tolist()
        [[False, False, True], [False, False, False]]
    """
    mask = torch.zeros(len(positives), len(candidate_ids), dtype=torch.bool, device=positives.device)
    for column in positives.T:  # a (Q, C) comparison for each, never (Q, C, P) at once
        mask |= candidate_ids == column[:, None]
    return mask.scatter(1, positive_index[:, None], False)


def in_batch_accuracy(
    queries: Tensor, candidates: Tensor, positive_index: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Share of the queries whose positive is the nearest of the candidates that are not masked.

    Args:
        queries: ``(Q, D)`` unit vectors.
        candidates: ``(C, D)`` unit vectors.
        positive_index: ``(Q,)`` column of each query's positive.
        mask: ``(Q, C)`` boolean, True where a candidate is left out.

    Returns:
        Scalar from 0 to 1.
    """
    with torch.no_grad():
        nearest = contrastive_logits(queries, candidates, mask, temperature=1.0).argmax(1)
        return (nearest == positive_index).float().mean()


def contrastive_logits(
    queries: Tensor, candidates: Tensor, mask: Tensor | None = None, temperature: float = 0.05
) -> Tensor:
    """Cosine similarities over the temperature, in float32, with the masked candidates at minus infinity.

    Args:
        queries: ``(Q, D)`` unit vectors.
        candidates: ``(C, D)`` unit vectors.
        mask: ``(Q, C)`` boolean, True where a candidate is to be left out.
        temperature: Divides the similarities.

    Returns:
        ``(Q, C)`` logits.
    """
    logits = queries.float() @ candidates.float().T / temperature
    return logits if mask is None else logits.masked_fill(mask, float("-inf"))


def contrastive_loss(
    queries: Tensor,
    candidates: Tensor,
    positive_index: Tensor,
    mask: Tensor | None = None,
    temperature: float = 0.05,
) -> Tensor:
    """Query-to-candidate InfoNCE over every candidate of the batch, positives and mined negatives alike.

    ``-1/Q * sum_i log(exp(q_i . c_i / t) / sum_j exp(q_i . c_j / t))``, the loss of MM-Embed (section 3 of the paper;
    one direction only). The temperature is not stated there; 0.05 is what comparable retrievers use.

    Args:
        queries: ``(Q, D)`` unit vectors.
        candidates: ``(C, D)`` unit vectors of all positives and negatives, in any order.
        positive_index: ``(Q,)`` column of each query's positive.
        mask: ``(Q, C)`` boolean, True where a candidate is left out (:func:`labelled_positive_mask`).
        temperature: Divides the similarities.

    Returns:
        Scalar mean loss, in float32.

    Example:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> round(contrastive_loss(eye, eye, torch.tensor([0, 1]), temperature=1.0).item(), 4)
        0.3133
    """
    return F.cross_entropy(contrastive_logits(queries, candidates, mask, temperature), positive_index)
