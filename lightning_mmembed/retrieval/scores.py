"""The score of a query and a candidate: one number, whatever computed it and in whichever block.

Matrix products add in an order that depends on their shape, on the library and on the number of threads, so their last
bits differ. They only choose what is scored here: in float64, added in an order that depends on the dimension alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_mmembed.errors import UserInputError

#: Numbers in float64 that are held at a time while pairs are scored: 2 MiB, which the processor's cache holds.
_NUMBERS = 2**18


def pairs_at_a_time(dim: int) -> int:
    """How many pairs of vectors of dimension ``dim`` to score at a time."""
    return max(1, _NUMBERS // max(1, dim))


def canonical_scores(queries: Tensor, candidates: Tensor) -> Tensor:
    """Score pairs: the float64 inner product, added in a fixed order, rounded to float32.

    Args:
        queries: ``(P, D)`` vectors; what is stored counts, as float32.
        candidates: ``(P, D)`` vectors, one for each query.

    Returns:
        ``(P,)`` float32 scores, the same to the bit on every device and for every ``P``.

    Example:
        >>> canonical_scores(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 5.0, 6.0]])).tolist()
        [32.0]
    """
    products = queries.float().double() * candidates.float().double()
    width = products.shape[1]
    while width > 1:
        # Halves are added to halves: single additions, which have one result everywhere, unlike a sum over a row.
        half = (width + 1) // 2
        products[:, : width - half] += products[:, half:width]
        width = half
    return products[:, 0].float() + 0.0  # 0.0 in place of -0.0


def float32_window(query_norms: Tensor, largest_norm: float, dim: int) -> Tensor:
    """How far apart two float32 inner products must lie for their canonical scores to lie in the same order.

    An inner product of ``D`` terms is off by at most ``D u / (1 - D u)`` times the product of the norms, in whatever
    order it is added, with ``u`` half a unit in the last place (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1). That counts twice, and canonical scores may be rounded towards each other.

    Args:
        query_norms: ``(Q,)`` float64 norms of the queries.
        largest_norm: Of the candidates.
        dim: ``D``.

    Returns:
        ``(Q,)`` float64 distances.
    """
    # A twentieth more covers what the norms themselves are off by; the last term, products that underflow.
    return 2.1 * (_gamma(dim, 2.0**-24) + 2.0**-23) * query_norms * largest_norm + 1e-30


def exact_scores(queries: Tensor, candidates: Tensor, threshold: Tensor) -> Tensor:
    """Score all pairs of a block: canonical wherever a score is above the threshold of its query.

    A float64 product settles nearly every score. Where its error leaves two float32 numbers to choose from, and the
    score matters, the pair is scored by :func:`canonical_scores`.

    Args:
        queries: ``(Q, D)`` vectors.
        candidates: ``(N, D)`` vectors.
        threshold: ``(Q,)`` float32; what is not above it need not be exact, and stays not above it.

    Returns:
        ``(Q, N)`` float32 scores.
    """
    wide_queries, wide_candidates = queries.double(), candidates.double()
    products = wide_queries @ wide_candidates.T
    error = 2.1 * _gamma(queries.shape[1], 2.0**-53) * torch.linalg.vector_norm(wide_queries, dim=1)
    errors = error[:, None] * torch.linalg.vector_norm(wide_candidates, dim=1) + 1e-300
    low: Tensor = (products - errors).float() + 0.0
    high = (products + errors).float() + 0.0
    unsure = ((low != high) & (high > threshold[:, None])).nonzero()
    for pairs in unsure.split(pairs_at_a_time(queries.shape[1])):
        query, candidate = pairs.T
        low[query, candidate] = canonical_scores(queries[query], candidates[candidate])
    return low


def finite_norms(vectors: Tensor, name: str, start: int = 0) -> Tensor:
    """The norms of some vectors, ``(N,)``.

    Args:
        vectors: ``(N, D)`` vectors.
        name: What they are, for the message.
        start: Row of the first one, likewise.

    Raises:
        UserInputError: If a vector holds NaN or infinity.
    """
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    if not norms.isfinite().all():
        row = start + int((~norms.isfinite()).nonzero()[0])
        raise UserInputError(
            f"row {row} of the vectors of the {name} holds NaN or infinity, which has no rank; look for NaN in the "
            "loss and in the weights of the encoder, and train with a lower learning rate"
        )
    return norms


def _gamma(dim: int, unit: float) -> float:
    return dim * unit / (1 - dim * unit)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices in float32, and not in TF32 or bfloat16; restores what was allowed before."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        allowed = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)
        return
    switches: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul")]  # noqa: B009
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
