"""Retrieval metrics over ranked lists: pure functions of tensors, and a thin torchmetrics shell.

Every metric has one canonical name, ``<measure>@<k>``, used as configuration value, log key, monitor and table head.
M-BEIR's papers say "Recall@k" for what is called ``hit@k`` here (ir_measures' ``Success@k``); ``recall@k`` is the
share of a query's positives that were found. ``recall_reachable@k`` and ``ndcg_reachable@k`` count as labelled only
the positives that the searched pool holds: a local pool of M-BEIR lacks those of another dataset. Of graded judgements
nDCG alone takes the grades; to all others every positive is alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

#: The metrics that are computed unless others are asked for.
DEFAULT_METRICS: tuple[str, ...] = (
    "hit@1",
    "hit@5",
    "hit@10",
    "recall@1",
    "recall@5",
    "recall@10",
    "mrr@10",
    "ndcg@10",
    "modality@1",
)


def hit(relevant: Tensor, k: int) -> Tensor:
    """1 where any of the first ``k`` results is relevant, else 0.

    Args:
        relevant: ``(Q, K)`` boolean, the relevance of each ranked result; past the end of a list it is False.
        k: Depth.

    Returns:
        ``(Q,)`` float64.
    """
    return relevant[:, :k].any(1).double()


def recall(relevant: Tensor, n_positives: Tensor, k: int) -> Tensor:
    """Share of a query's labelled positives among the first ``k`` results; 0 for a query without positives.

    Args:
        relevant: ``(Q, K)`` boolean.
        n_positives: ``(Q,)`` number of labelled positives, whether the pool holds them or not.
        k: Depth.

    Returns:
        ``(Q,)`` float64.
    """
    return relevant[:, :k].sum(1) / n_positives.clamp(min=1).double()


def mrr(relevant: Tensor, k: int) -> Tensor:
    """One over the rank of the first relevant result, 0 if there is none among the first ``k``.

    Args:
        relevant: ``(Q, K)`` boolean.
        k: Depth.

    Returns:
        ``(Q,)`` float64.
    """
    top = relevant[:, :k].double()
    ranks = torch.arange(1, top.shape[1] + 1, dtype=torch.float64, device=top.device)
    return (top / ranks).amax(1) if top.shape[1] else top.sum(1)


def ndcg(relevant: Tensor, n_positives: Tensor, k: int) -> Tensor:
    """Binary-gain nDCG with ``log2(rank + 1)`` discount; the ideal list holds all labelled positives.

    Args:
        relevant: ``(Q, K)`` boolean.
        n_positives: ``(Q,)`` number of labelled positives.
        k: Depth.

    Returns:
        ``(Q,)`` float64, 0 for a query without positives.
    """
    discount = 1 / torch.log2(torch.arange(2, k + 2, dtype=torch.float64, device=relevant.device))
    top = relevant[:, :k].double()
    gain = (top * discount[: top.shape[1]]).sum(1)
    ideal = discount.cumsum(0)[n_positives.clamp(1, k) - 1]
    return torch.where(n_positives > 0, gain / ideal, torch.zeros_like(gain))


def graded_ndcg(gains: Tensor, grades: Tensor, k: int) -> Tensor:
    """Graded nDCG, as trec_eval has it: the gain is the grade itself, the discount ``log2(rank + 1)``.

    Args:
        gains: ``(Q, K)`` grade of each ranked result, 0 where it is not relevant and past the end of a list.
        grades: ``(Q, P)`` grades of the labelled positives, 0 for padding.
        k: Depth.

    Returns:
        ``(Q,)`` float64, 0 for a query without positives; :func:`ndcg` where every grade is 1.

    Example:
        >>> graded_ndcg(torch.tensor([[2, 1]]), torch.tensor([[1, 2]]), 10).tolist()
        [1.0]
    """
    discount = 1 / torch.log2(torch.arange(2, k + 2, dtype=torch.float64, device=gains.device))
    best = grades.sort(1, descending=True).values
    gain, ideal = ((top[:, :k].double() * discount[: top.shape[1]]).sum(1) for top in (gains, best))
    return torch.where(ideal > 0, gain / ideal.where(ideal > 0, 1.0), 0.0)


def modality(right_modality: Tensor, k: int) -> Tensor:
    """Share of the first ``k`` results that have the wanted modality (``k = 1`` is the figure to quote).

    Args:
        right_modality: ``(Q, K)`` boolean; past the end of a list it is False.
        k: Depth.

    Returns:
        ``(Q,)`` float64.
    """
    return right_modality[:, :k].double().mean(1)


def parse_metric(name: str) -> tuple[str, int]:
    """Split a canonical metric name.

    Example:
        >>> parse_metric("ndcg@10")
        ('ndcg', 10)

    Raises:
        ValueError: If the name is none of ``hit, recall, mrr, ndcg, modality, recall_reachable, ndcg_reachable`` with a
            positive depth.
    """
    measure, _, depth = name.partition("@")
    if measure not in _MEASURES or not depth.isdigit() or int(depth) < 1:
        raise ValueError(f"metric={name!r} is unknown; write one of {', '.join(_MEASURES)} with a depth, as 'hit@5'")
    return measure, int(depth)


# From relevance, right modality, numbers of labelled and of reachable positives, and depth to (Q,) values.
_MEASURES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]] = {
    "hit": lambda relevant, right, n, reachable, k: hit(relevant, k),
    "recall": lambda relevant, right, n, reachable, k: recall(relevant, n, k),
    "mrr": lambda relevant, right, n, reachable, k: mrr(relevant, k),
    "ndcg": lambda relevant, right, n, reachable, k: ndcg(relevant, n, k),
    "modality": lambda relevant, right, n, reachable, k: modality(right, k),
    "recall_reachable": lambda relevant, right, n, reachable, k: recall(relevant, reachable, k),
    "ndcg_reachable": lambda relevant, right, n, reachable, k: ndcg(relevant, reachable, k),
}


def per_query_metrics(
    relevant: Tensor,
    right_modality: Tensor,
    n_positives: Tensor,
    names: Sequence[str] = DEFAULT_METRICS,
    n_reachable: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute several metrics for every query.

    Args:
        relevant: ``(Q, K)`` boolean, True where the result at that rank is a labelled positive.
        right_modality: ``(Q, K)`` boolean, True where the result at that rank has the wanted modality.
        n_positives: ``(Q,)`` integer number of labelled positives.
        names: Canonical metric names.
        n_reachable: ``(Q,)`` how many of the labelled positives the searched pool holds; by default all of them.

    Returns:
        For each name a ``(Q,)`` float64 tensor.

    Example:
        >>> relevant = torch.tensor([[False, True], [False, False]])
        >>> per_query_metrics(relevant, relevant, torch.tensor([1, 1]), ["hit@1", "mrr@10"])["mrr@10"].tolist()
        [0.5, 0.0]
    """
    given = (relevant, right_modality, n_positives, n_positives if n_reachable is None else n_reachable)
    parsed = {name: parse_metric(name) for name in names}
    return {name: _MEASURES[measure](*given, k) for name, (measure, k) in parsed.items()}


class RetrievalMean(Metric):
    """Mean of per-query values with two sum states, so that uneven shares of any size synchronise exactly.

    Args:
        **kwargs: Arguments of :class:`torchmetrics.Metric`, such as ``sync_on_compute``.

    Example:
        >>> metric = RetrievalMean()
        >>> metric.update(torch.tensor([1.0, 0.0, 1.0, 1.0]))
        >>> metric.compute().item()
        0.75
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add the ``(Q,)`` values of some queries."""
        self.total += values.double().sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        """Mean over every query seen, NaN if there was none."""
        return self.total / self.count
