"""How often each query comes in an epoch: up-sampling is a rule of the order, nothing is copied on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Task

UPSAMPLE_RULES = ("uniir", "source")

#: Queries of an epoch that UniIR raises its small datasets to (`src/data/mbeir_data_generator.py`, union_up).
UNIIR_TARGETS = {"webqa": 100_000, "edis": 50_000, "nights": 50_000, "fashioniq": 50_000, "cirr": 50_000}


def check_rule(upsample: str | Mapping[str, float] | None, temperature: float | None) -> None:
    """Refuse a rule that says nothing or two things.

    Args:
        upsample: ``"uniir"``, ``"source"``, or factors by dataset or task.
        temperature: At least 1.

    Raises:
        UserInputError: If both are given, or one has no such value.
    """
    if upsample is not None and temperature is not None:
        raise UserInputError(
            f"upsample={upsample!r} and temperature={temperature!r} are two rules for the same thing; leave one out"
        )
    if isinstance(upsample, str) and upsample not in UPSAMPLE_RULES:
        raise UserInputError(
            f"upsample={upsample!r} is unknown; write one of {', '.join(UPSAMPLE_RULES)}, or a factor for each dataset"
        )
    for name, factor in upsample.items() if isinstance(upsample, Mapping) else ():
        if not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
            raise UserInputError(f"upsample: the factor {factor!r} of {name!r} is no number from 0 up; write one")
    if temperature is not None and not (isinstance(temperature, (int, float)) and temperature >= 1):
        raise UserInputError(f"temperature={temperature!r} is no number from 1 up; 1 keeps the sizes as they are")


def resample(groups: np.ndarray, targets: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Draw the queries of an epoch so that none of a group comes more than once more often than another.

    Of a group of ``n`` queries with target ``m`` each comes ``m // n`` times, and ``m % n`` of them, drawn without
    replacement, once more. UniIR draws with replacement, and once for all epochs.

    Args:
        groups: ``(N,)`` integer group of each query.
        targets: ``(G,)`` queries of each group in an epoch; 0 for a group that is empty or left out.
        seed: Seed of the run.
        epoch: The epoch.

    Returns:
        ``(targets.sum(),)`` positions in ``groups``, ascending.

    Example:
        >>> resample(np.array([0, 0, 0, 1]), np.array([3, 2]), seed=0, epoch=0).tolist()
        [0, 1, 2, 3, 3]
    """
    rng = np.random.default_rng([seed, epoch, 1])  # not the stream that orders the epoch
    times = np.zeros(len(groups), dtype=np.int64)
    for group in np.flatnonzero(targets):
        members = np.flatnonzero(groups == group)
        times[members], more = divmod(int(targets[group]), len(members))
        times[rng.choice(members, more, replace=False)] += 1
    return np.repeat(np.arange(len(groups)), times)


def spread(positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put the queries of an epoch in a random order in which the copies of one stand far apart.

    Of ``w`` copies one falls in each ``1 / w`` of the epoch, at the same place within it, so that a batch holds a query
    twice only where the batch is about as large as that.

    Args:
        positions: ``(M,)`` positions with repeats, ascending.
        rng: Where the places come from.

    Returns:
        ``(M,)`` the positions in their order.
    """
    times = np.bincount(positions)
    copy = np.arange(len(positions)) - (np.cumsum(times) - times)[positions]
    places = (copy + rng.random(len(times))[positions]) / times[positions]
    ordered: np.ndarray = positions[np.argsort(places, kind="stable")]
    return ordered


def source_targets(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What :func:`resample` needs for each query to come as often as it stands in the source's file.

    Args:
        weights: ``(N,)`` how often that is.

    Returns:
        The ``(N,)`` groups and the ``(G,)`` targets.

    Raises:
        UserInputError: If every query stands there once.
    """
    if (weights == 1).all():
        raise UserInputError(
            "upsample='source': the source has no up-sampled training file (query/union_train), or none that repeats a "
            "query; write upsample=uniir for UniIR's sizes, or upsample=null"
        )
    counts = np.bincount(weights)
    return weights, np.arange(len(counts)) * counts


def task_targets(
    tasks: np.ndarray, upsample: str | Mapping[str, float] | None = None, temperature: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What :func:`resample` needs for datasets of other sizes; the tasks of a dataset keep their shares of it.

    Args:
        tasks: ``(N,)`` task name of each query.
        upsample: ``"uniir"``, or factors by dataset or task; a task's own wins, and 1 is the factor of all others.
        temperature: Makes the sizes of the datasets proportional to ``n ** (1 / temperature)``, their sum kept.

    Returns:
        The ``(N,)`` groups, one a task, and the ``(G,)`` targets.

    Raises:
        UserInputError: If a factor is of no dataset or task that there is.

    Example:
        >>> task_targets(np.array(["a_task0"] * 18 + ["b_task0"] * 2), temperature=2)[1].tolist()
        [15, 5]
    """
    names, groups, sizes = np.unique(tasks, return_inverse=True, return_counts=True)
    owners = [Task.parse(str(name)).dataset for name in names]
    if isinstance(upsample, Mapping):
        factors = _factors(upsample, names.tolist(), owners)
        return groups, np.rint(factors * sizes).astype(np.int64)
    datasets, dataset_of = np.unique(owners, return_inverse=True)
    totals = np.array([sizes[dataset_of == i].sum() for i in range(len(datasets))])
    if temperature is None:
        wanted = np.maximum(totals, [UNIIR_TARGETS.get(str(name), 0) for name in datasets])
    else:
        wanted = _apportion(int(totals.sum()), totals ** (1 / temperature))
    targets = np.zeros_like(sizes)
    for i, total in enumerate(wanted):
        targets[dataset_of == i] = _apportion(int(total), sizes[dataset_of == i])
    return groups, targets


def _factors(upsample: Mapping[str, float], tasks: list[str], owners: list[str]) -> np.ndarray:
    known = sorted({*tasks, *owners})
    for name in upsample:
        if name not in known:
            raise UserInputError(
                f"upsample: {name!r} is no dataset or task of the training queries; write one of {', '.join(known)}"
            )
    return np.array([upsample.get(task, upsample.get(owner, 1.0)) for task, owner in zip(tasks, owners, strict=True)])


def _apportion(total: int, shares: np.ndarray) -> np.ndarray:
    """Whole numbers in proportion to the shares that sum to ``total``: the largest remainders are rounded up."""
    quotas = total * shares / shares.sum()
    counts: np.ndarray = np.floor(quotas).astype(np.int64)
    counts[np.argsort(counts - quotas, kind="stable")[: total - counts.sum()]] += 1
    return counts
