"""How sure a figure is: bootstrap intervals over queries, paired tests between two runs, and Holm's adjustment.

Queries are drawn anew with replacement, each task from its own queries (a stratified bootstrap: Efron and Tibshirani,
An Introduction to the Bootstrap, chapters 8 and 13), and averages are unweighted means over the tasks, as in every
M-BEIR table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lightning_mmembed.retrieval.compare import Difference

#: Queries drawn anew this many times: the ends of an interval then vary by about a hundredth of its width.
N_RESAMPLES = 10_000

#: Numbers held at a time while drawing.
_CHUNK = 10**7

# Sums of thirds and the like miss zero by less than this; no difference of hit rates is as small.
_ZERO = 1e-12


def resampled_means(
    values: Mapping[str, np.ndarray], n_resamples: int = N_RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Means of each task over queries that are drawn with replacement.

    Each task has random numbers of its own, so its means do not depend on what other tasks there are.

    Args:
        values: By task, ``(Q,)`` values.
        n_resamples: How often all queries are drawn.
        seed: Of the draws.

    Returns:
        By task, ``(n_resamples,)`` means.
    """
    means = {}
    for task, of_task in values.items():
        # How often each different value is drawn is multinomial: a hit rate needs two numbers, not one a query.
        distinct, counts = np.unique(np.asarray(of_task, dtype=np.float64), return_counts=True)
        n, rng = counts.sum(), np.random.default_rng([seed, *task.encode()])
        step = max(1, _CHUNK // len(distinct))
        sizes = [min(step, n_resamples - start) for start in range(0, n_resamples, step)]
        means[task] = np.concatenate([rng.multinomial(n, counts / n, size) @ distinct / n for size in sizes])
    return means


def bootstrap_interval(
    values: Mapping[str, np.ndarray], n_resamples: int = N_RESAMPLES, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the unweighted mean over tasks; of one task if it is the only one.

    Args:
        values: By task, ``(Q,)`` values.
        n_resamples: How often all queries are drawn.
        level: Share of the drawn means that lies inside.
        seed: Of the draws.

    Returns:
        Its lower and its upper end.

    Example:
        >>> low, high = bootstrap_interval({"mscoco_task0": np.array([1.0] * 50 + [0.0] * 50)})
        >>> round(low, 2), round(high, 2)
        (0.4, 0.6)
    """
    return _interval(_average(resampled_means(values, n_resamples, seed), list(values)), level)


def paired_bootstrap(
    differences: Mapping[str, np.ndarray],
    groups: Mapping[str, Sequence[str]],
    n_resamples: int = N_RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Whether two runs differ over the same queries.

    Args:
        differences: By task, ``(Q,)`` values of one run minus those of the other for the same queries; see
            :func:`paired_differences`.
        groups: By name, tasks that are averaged, too.
        n_resamples: How often all queries are drawn; no p-value is below ``2 / (n_resamples + 1)``.
        level: Of the intervals.
        seed: Of the draws.

    Returns:
        By task and by group: the mean difference, its interval, and its two-sided p-value, which is twice the share
        of the drawn means on the other side of zero. Those of the tasks are adjusted by Holm's method.
    """
    drawn = resampled_means(differences, n_resamples, seed)
    means = {task: np.array([np.mean(values)]) for task, values in differences.items()}
    p = {task: _two_sided(values) for task, values in drawn.items()}
    adjusted = holm(p)
    found = {t: Difference(float(means[t][0]), *_interval(drawn[t], level), p[t], adjusted[t]) for t in p}
    for group, tasks in groups.items():
        average = _average(drawn, tasks)
        value = float(_average(means, tasks)[0])
        found[group] = Difference(value, *_interval(average, level), _two_sided(average), None)
    return found


def paired_differences(first: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Values of another run minus those of the first, query by query, in the order of the first.

    Args:
        first: ``(Q,)`` ids of the queries of one task, each once, and ``(Q,)`` values.
        other: The same of the other run, in any order.

    Raises:
        ValueError: If the two runs have other queries; it names one.

    Example:
        >>> first = np.array(["9:1", "9:2"]), np.array([0.0, 1.0])
        >>> paired_differences(first, (np.array(["9:2", "9:1"]), np.array([1.0, 1.0])))
        array([1., 0.])
    """
    lonely = np.setxor1d(first[0], other[0])
    if len(lonely):
        raise ValueError(f"{len(lonely)} queries, {lonely[0]} among them, are in one of the two runs only")
    order = np.empty(len(first[0]), dtype=np.int64)
    order[np.argsort(first[0])] = np.argsort(other[0])
    difference: np.ndarray = other[1][order] - first[1]
    return difference


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for being several (Holm, 1979): those below a limit are wrong, all together, as seldom as that.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def _average(means: Mapping[str, np.ndarray], tasks: Sequence[str]) -> np.ndarray:
    average: np.ndarray = np.mean([means[task] for task in tasks], axis=0)
    return average


def _interval(means: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _two_sided(means: np.ndarray) -> float:
    fewer = min((means <= _ZERO).sum(), (means >= -_ZERO).sum())
    # One is added to both: the figure that was measured is a draw, too, and no p-value is 0.
    return min(1.0, 2 * (1 + float(fewer)) / (1 + len(means)))
