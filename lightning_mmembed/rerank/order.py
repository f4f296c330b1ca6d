"""What scores do to a ranking: pure functions that know nothing of models.

The paper reorders the top 10 by P(True) alone (section on zero-shot reranking); a weight below 1 mixes the score of
the retriever in, as some later work does. Scores that are no cosines are min-max normalised before (:func:`mixable`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from lightning_mmembed.errors import UserInputError

Entry = TypeVar("Entry")

#: The largest cosine of vectors that were rounded to 16 bits.
_COSINE = 1.01


def mixable(heads: Tensor) -> Tensor:
    """Scores of a retriever as they can be mixed with P(True): cosines as they are, others min-max normalised.

    Where any score is beyond -1 to 1, such as those of BM25, each query's run from 0 for the last of its head to 1 for
    the first.

    Args:
        heads: ``(Q, K)`` scores of the candidates that are to be reordered, ``-inf`` past the end of a list.

    Returns:
        ``(Q, K)``, as before past the end of a list.

    Example:
        >>> import torch
        >>> mixable(torch.tensor([[30.0, 15.0, 10.0]])).tolist(), mixable(torch.tensor([[0.5, -0.5]])).tolist()
        ([[1.0, 0.25, 0.0]], [[0.5, -0.5]])
    """
    present = heads.isfinite()
    if not (heads[present].abs() > _COSINE).any():
        return heads
    low = heads.masked_fill(~present, math.inf).amin(1, keepdim=True)
    span = heads.amax(1, keepdim=True) - low
    return ((heads - low) / span.masked_fill(span == 0, 1)).masked_fill(~present, -math.inf)


def fused(scores: Sequence[float], retrieval: Sequence[float] | None = None, weight: float = 1.0) -> list[float]:
    """``weight * P(True) + (1 - weight) * retrieval score``, of each of the first ``len(scores)`` of a ranking.

    Args:
        scores: P(True), in the order of the ranking.
        retrieval: Scores of the retriever, of at least as many; needed where ``weight`` is below 1. They are taken as
            they are; :func:`mixable` brings those of any retriever to a size that can be mixed.
        weight: Of P(True), between 0 and 1; 1 is P(True) alone, as in the paper.

    Raises:
        UserInputError: If ``weight`` is out of range or lacks what it weighs, or a score is NaN or infinite.

    Example:
        >>> fused([0.25, 0.75], [0.5, 0.25], weight=0.5)
        [0.375, 0.5]
    """
    if not 0 <= weight <= 1:
        raise UserInputError(f"weight={weight} is out of range; give a number from 0 (retrieval) to 1 (P(True) alone)")
    if weight < 1 and (retrieval is None or len(retrieval) < len(scores)):
        known = 0 if retrieval is None else len(retrieval)
        raise UserInputError(f"weight={weight} needs a retrieval score for each of {len(scores)} scores; {known} given")
    if weight == 1 or retrieval is None:
        mixed = [float(score) for score in scores]
    else:
        mixed = [weight * p + (1 - weight) * r for p, r in zip(scores, retrieval, strict=False)]
    if not all(math.isfinite(score) for score in mixed):
        position = next(i for i, score in enumerate(mixed) if not math.isfinite(score))
        raise UserInputError(
            f"the score at rank {position + 1} is {mixed[position]}, which has no rank; score it again"
        )
    return mixed


def rerank(
    ranking: Sequence[Entry], scores: Sequence[float], retrieval: Sequence[float] | None = None, weight: float = 1.0
) -> list[Entry]:
    """Reorder the head of a ranking by its scores; what has no score stays below it, in its order.

    Args:
        ranking: Candidates, best first.
        scores: P(True) of the first ones.
        retrieval: See :func:`fused`.
        weight: See :func:`fused`.

    Returns:
        The same candidates. Of equal scores the one that the retriever put first stays first.

    Raises:
        UserInputError: If there are more scores than candidates; see :func:`fused` too.

    Example:
        >>> rerank(["a", "b", "c", "d"], [0.2, 0.9, 0.2])
        ['b', 'a', 'c', 'd']
    """
    if len(scores) > len(ranking):
        raise UserInputError(f"{len(scores)} scores are more than the {len(ranking)} candidates of the ranking")
    mixed = fused(scores, retrieval, weight)
    head = sorted(range(len(mixed)), key=lambda i: -mixed[i])  # stable
    return [*(ranking[i] for i in head), *ranking[len(mixed) :]]


def settled(
    scores: Sequence[float], depth: int, top: int, retrieval: Sequence[float] | None = None, weight: float = 1.0
) -> bool:
    """Whether the first ``top`` places can no longer change, whatever the candidates without a score would get.

    P(True) is at most 1, so no fused score exceeds ``weight + (1 - weight) * retrieval``. That bound is exact: a
    candidate that reaches it stays below an equal one that stood above it. Without retrieval scores (``weight`` 1) the
    bound is 1 for everyone, so that only scores of exactly 1 settle anything.

    Args:
        scores: P(True) of the first ones of a ranking.
        depth: How many of the ranking are to be reordered.
        top: How many places matter, at least 1.
        retrieval: Scores of the retriever, of ``depth`` candidates; needed where ``weight`` is below 1.
        weight: See :func:`fused`.

    Example:
        >>> settled([0.9, 0.1], depth=4, top=1, retrieval=[0.8, 0.7, 0.1, 0.1], weight=0.25)
        True
        >>> settled([0.9, 0.1], depth=4, top=1)
        False
    """
    known = len(scores)
    if known >= depth:
        return True
    if known < top:
        return False
    worst_of_top = sorted(fused(scores, retrieval, weight), reverse=True)[top - 1]
    best = fused([1.0] * depth, retrieval, weight)[known:]
    return worst_of_top >= max(best)
