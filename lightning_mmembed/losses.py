"""Losses: pure functions of tensors. Those that hold a loss, or weights of their own, are in ``loss_modules``.

Each takes ``(queries, candidates, positive_index, mask)`` and gives the mean over the queries. What else of a batch a
loss needs it names among its arguments (:data:`BATCH_ARGUMENTS`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mmembed.errors import UserInputError

#: What a loss may ask for beyond the four arguments that all take, each by this name:
#:
#: * ``all_queries``: ``(N, D)`` the queries of all processes, ``query_index``: ``(Q,)`` the row of each query among
#:   them, and ``query_mask``: ``(Q, N)`` boolean of :func:`labelled_query_mask`;
#: * ``listed``: ``(Q, L)`` columns of the candidates that are a query's own, its positive and the negatives that were
#:   drawn for it, padded with -1; and ``teacher_scores``: ``(Q, L)`` what a better model gives these.
BATCH_ARGUMENTS = ("all_queries", "query_index", "query_mask", "listed", "teacher_scores")

HARDNESS_MODES = ("all_negatives", "in_batch_negatives", "hard_negatives")


def batch_arguments(loss: Callable[..., Tensor]) -> tuple[str, ...]:
    """Which of :data:`BATCH_ARGUMENTS` a loss asks for; one that holds another asks for what that one does.

    Example:
        >>> batch_arguments(symmetric_contrastive_loss)
        ('all_queries', 'query_index', 'query_mask')
    """
    held = getattr(loss, "loss", None)
    if held is not None:
        return batch_arguments(held)
    named = inspect.signature(getattr(loss, "forward", loss)).parameters
    return tuple(name for name in BATCH_ARGUMENTS if name in named)


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
    return _labelled(positives, candidate_ids).scatter(1, positive_index[:, None], False)


def labelled_query_mask(positives: Tensor, positive_ids: Tensor, query_index: Tensor) -> Tensor:
    """Mark the queries that must not count as the negatives of a positive, where candidates look for queries.

    A query is left out when the candidate is any labelled positive of it. The one query that the candidate is asked to
    rank first stays in.

    Args:
        positives: ``(N, P)`` integer ids of every labelled positive of each query, padded with -1.
        positive_ids: ``(Q,)`` integer ids of the positives.
        query_index: ``(Q,)`` row of the query that each of them is the positive of.

    Returns:
        ``(Q, N)`` boolean mask, True where the query is to be left out.

    Example:
        >>> positives = torch.tensor([[7, 8], [8, -1]])
        >>> labelled_query_mask(positives, torch.tensor([7, 8]), torch.tensor([0, 1])).tolist()
        [[False, False], [True, False]]
    """
    return _labelled(positives, positive_ids).T.scatter(1, query_index[:, None], False)


def _labelled(positives: Tensor, ids: Tensor) -> Tensor:
    found = torch.zeros(len(positives), len(ids), dtype=torch.bool, device=positives.device)
    for column in positives.T:  # a (Q, C) comparison for each, never (Q, C, P) at once
        found |= ids == column[:, None]
    return found


def has_teacher(listed: Tensor, mask: Tensor) -> Tensor:
    """Mark the queries that :func:`distillation_loss` learns from: those with two candidates or more.

    Args:
        listed: ``(Q, L)`` columns of the candidates of each query that a teacher has scored, padded with -1.
        mask: ``(Q, C)`` boolean, True where a candidate is left out.

    Returns:
        ``(Q,)`` boolean.

    Example:
        >>> has_teacher(torch.tensor([[0, 1], [1, -1]]), torch.zeros(2, 2, dtype=torch.bool)).tolist()
        [True, False]
    """
    return (~_unlisted(listed, mask)).sum(1) > 1


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
    queries: Tensor, candidates: Tensor, mask: Tensor | None = None, temperature: float | Tensor = 0.05
) -> Tensor:
    """Cosine similarities over the temperature, with the masked candidates at minus infinity.

    They are computed in float32 (in float64 where the vectors are), also where autocast would take less.

    Args:
        queries: ``(Q, D)`` unit vectors.
        candidates: ``(C, D)`` unit vectors.
        mask: ``(Q, C)`` boolean, True where a candidate is to be left out.
        temperature: Divides the similarities.

    Returns:
        ``(Q, C)`` logits.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries.to(dtype) @ candidates.to(dtype).T / temperature
    return logits if mask is None else logits.masked_fill(mask, float("-inf"))


def contrastive_loss(
    queries: Tensor,
    candidates: Tensor,
    positive_index: Tensor,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.05,
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
        Scalar mean loss, in float32 (in float64 where the vectors are).

    Example:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> round(contrastive_loss(eye, eye, torch.tensor([0, 1]), temperature=1.0).item(), 4)
        0.3133
    """
    return F.cross_entropy(contrastive_logits(queries, candidates, mask, temperature), positive_index)


def hardness_weighted_loss(
    queries: Tensor,
    candidates: Tensor,
    positive_index: Tensor,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    hardness_strength: float = 1.0,
    hardness_mode: str = "all_negatives",
    normalize: bool = True,
    listed: Tensor | None = None,
) -> Tensor:
    """:func:`contrastive_loss` in whose denominator a negative weighs ``exp(hardness_strength * similarity)``.

    The weights are constants to the gradient. Normalised they have a mean of 1 over the negatives of a query that are
    weighted (Robinson et al., 2021, "Contrastive Learning with Hard Negative Samples"): which of them count changes,
    not how much all do. As they are, they are those of Lan et al. (2025, "LLaVE", equation 5).

    Args:
        queries: ``(Q, D)`` unit vectors.
        candidates: ``(C, D)`` unit vectors.
        positive_index: ``(Q,)`` column of each query's positive.
        mask: ``(Q, C)`` boolean, True where a candidate is left out.
        temperature: Divides the similarities, not the exponents of the weights.
        hardness_strength: 0 for :func:`contrastive_loss`.
        hardness_mode: Which negatives are weighted: ``"all_negatives"``; ``"hard_negatives"``, those drawn for the
            query; or ``"in_batch_negatives"``, all others.
        normalize: Whether the weights have a mean of 1.
        listed: ``(Q, L)`` columns of each query's own candidates, padded with -1; not needed for all negatives.

    Returns:
        Scalar mean loss.

    Raises:
        UserInputError: If a setting cannot be.
    """
    if hardness_mode not in HARDNESS_MODES:
        raise UserInputError(f"hardness_mode={hardness_mode!r} is unknown; write one of {', '.join(HARDNESS_MODES)}")
    if hardness_strength < 0:
        raise UserInputError(f"hardness_strength={hardness_strength} must be 0 or more")
    weighted = torch.ones(len(queries), len(candidates), dtype=torch.bool, device=queries.device)
    if hardness_mode != "all_negatives":
        if listed is None:
            raise UserInputError(f"hardness_mode={hardness_mode!r} needs to know each query's own candidates: listed")
        own = _columns(listed, len(candidates))
        weighted = own if hardness_mode == "hard_negatives" else ~own
    weighted = weighted.scatter(1, positive_index[:, None], False)
    if mask is not None:
        weighted = weighted & ~mask
    similarities = contrastive_logits(queries, candidates, temperature=1.0)
    exponents = hardness_strength * similarities.detach()
    if normalize:
        total = exponents.masked_fill(~weighted, float("-inf")).logsumexp(1, keepdim=True)
        exponents = exponents - total + weighted.sum(1, keepdim=True).to(exponents.dtype).log()
    logits = similarities / temperature + torch.where(weighted, exponents, 0.0)
    logits = logits if mask is None else logits.masked_fill(mask, float("-inf"))
    return F.cross_entropy(logits, positive_index)


def symmetric_contrastive_loss(
    queries: Tensor,
    candidates: Tensor,
    positive_index: Tensor,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    all_queries: Tensor | None = None,
    query_index: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """The mean of :func:`contrastive_loss` and of the same from each query's positive to the queries.

    Where several processes train together, a positive is contrasted with the queries of all of them, so these are to
    be given. Where one trains alone, the four arguments of every loss suffice.

    Args:
        queries: ``(Q, D)`` unit vectors.
        candidates: ``(C, D)`` unit vectors.
        positive_index: ``(Q,)`` column of each query's positive.
        mask: ``(Q, C)`` boolean, True where a candidate is left out of a query's denominator.
        temperature: Divides the similarities.
        all_queries: ``(N, D)`` queries of all processes, with their gradient; by default ``queries``.
        query_index: ``(Q,)`` row of each query among them.
        query_mask: ``(Q, N)`` boolean, True where a query is left out of a positive's denominator
            (:func:`labelled_query_mask`).

    Returns:
        Scalar mean loss.

    Raises:
        ValueError: If only some of the last three arguments are given.
    """
    forward = contrastive_loss(queries, candidates, positive_index, mask, temperature)
    given = [argument is not None for argument in (all_queries, query_index, query_mask)]
    if any(given) != all(given):
        raise ValueError("give all_queries, query_index and query_mask together")
    if all_queries is None or query_index is None:
        all_queries, query_index = queries, torch.arange(len(queries), device=queries.device)
        query_mask = positive_index[:, None] == positive_index
        if mask is not None:
            query_mask = query_mask | mask[:, positive_index].T
        query_mask = query_mask.scatter(1, query_index[:, None], False)
    backward = contrastive_loss(candidates[positive_index], all_queries, query_index, query_mask, temperature)
    return (forward + backward) / 2


def distillation_loss(
    queries: Tensor,
    candidates: Tensor,
    positive_index: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    student_temperature: float | None = None,
    teacher_temperature: float | None = None,
    listed: Tensor | None = None,
    teacher_scores: Tensor | None = None,
) -> Tensor:
    """Divergence of the softmax of the similarities from that of a better model's scores, such as a reranker's.

    ``t_s^2 / Q * sum_i KL(softmax(teacher_i / t_t) || softmax(q_i . c_i. / t_s))`` over each query's own candidates
    (Hinton et al., 2015; Lin et al., 2020, "Distilling Dense Representations for Ranking using Tightly-Coupled
    Teachers").

    Args:
        queries: ``(Q, D)`` unit vectors.
        candidates: ``(C, D)`` unit vectors.
        positive_index: ``(Q,)`` column of each query's positive; not looked at.
        mask: ``(Q, C)`` boolean, True where a candidate is left out.
        temperature: Divides similarities and scores.
        student_temperature: Divides the similarities in its place.
        teacher_temperature: Divides the scores in its place.
        listed: ``(Q, L)`` columns of each query's own candidates, padded with -1.
        teacher_scores: ``(Q, L)`` scores of these; any number where ``listed`` is -1.

    Returns:
        Scalar mean loss. A query with fewer than two candidates adds nothing.

    Raises:
        UserInputError: If the batch brings no scores of a teacher.
    """
    if listed is None or teacher_scores is None:
        raise UserInputError(
            "distillation_loss needs listed and teacher_scores, which the batches do not hold; give "
            "data.soft_labels=<the file of mmembed-rerank soft_labels=...>"
        )
    student_temperature = temperature if student_temperature is None else student_temperature
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    columns = listed.clamp(min=0)
    unlisted = _unlisted(listed, mask)
    student = contrastive_logits(queries, candidates, None, student_temperature).gather(1, columns)
    # The least number in place of minus infinity: a query without candidates must not make NaN of a gradient.
    lowest = torch.finfo(student.dtype).min
    log_student = student.masked_fill(unlisted, lowest).log_softmax(1)
    log_teacher = (teacher_scores.detach().to(student.dtype) / teacher_temperature).masked_fill(unlisted, lowest)
    log_teacher = log_teacher.log_softmax(1)
    terms = (log_teacher.exp() * (log_teacher - log_student)).masked_fill(unlisted, 0.0)
    return terms.sum() * student_temperature**2 / len(queries)


def _unlisted(listed: Tensor, mask: Tensor | None) -> Tensor:
    """``(Q, L)`` booleans, True for padding and for what is masked."""
    return listed < 0 if mask is None else (listed < 0) | mask.gather(1, listed.clamp(min=0))


def _columns(listed: Tensor, n: int) -> Tensor:
    """``(Q, L)`` columns, padded with -1, as ``(Q, n)`` booleans."""
    marked = torch.zeros(len(listed), n + 1, dtype=torch.bool, device=listed.device)
    return marked.scatter(1, listed % (n + 1), True)[:, :n]  # -1 falls into the one that is cut off
