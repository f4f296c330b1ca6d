"""Intervals and p-values equal those of every possible resample, and hold as often as they say."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from lightning_mmembed.retrieval.significance import (
    bootstrap_interval,
    holm,
    paired_bootstrap,
    paired_differences,
    resampled_means,
)

SMALL = {
    "a": np.array([0.0, 1.0, 1.0, 0.25]),
    "b": np.array([1.0, 0.0, 0.5]),
}
DIFFERENCES = {
    "a": np.array([1.0, 1.0, 0.0, 1.0, -1.0]),
    "b": np.array([0.0, 0.0, 0.0]),
    "c": np.array([0.1, 0.2, -0.3, 0.2]),  # thrice 0.1 and once -0.3 miss zero by a rounding error
}


def every_resample(values: np.ndarray) -> np.ndarray:
    """The mean of each of the ``n ** n`` equally likely draws."""
    return np.array([np.mean(drawn) for drawn in itertools.product(values, repeat=len(values))])


def every_average(values: dict[str, np.ndarray]) -> np.ndarray:
    """The average over tasks of each draw of all tasks."""
    sums = np.zeros(1)
    for of_task in values.values():
        sums = np.add.outer(sums, every_resample(of_task)).ravel()
    return sums / len(values)


def quantile_bounds(means: np.ndarray, level: float, slack: float = 0.004) -> list[tuple[float, float]]:
    """Between which values each end of the interval lies, for draws that miss the probabilities by a little."""
    ends = ((1 - level) / 2, (1 + level) / 2)
    return [
        (
            float(np.quantile(means, end - slack, method="lower")),
            float(np.quantile(means, end + slack, method="higher")),
        )
        for end in ends
    ]


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("tasks", ["a", "b", "ab"])
def test_an_interval_has_the_quantiles_of_all_possible_resamples(tasks: str, level: float) -> None:
    values = {task: SMALL[task] for task in tasks}
    found = bootstrap_interval(values, n_resamples=100_000, level=level)
    for end, (low, high) in zip(found, quantile_bounds(every_average(values), level), strict=True):
        assert low - 1e-12 <= end <= high + 1e-12


def test_drawn_means_are_distributed_as_all_possible_resamples() -> None:
    means = resampled_means(SMALL, 200_000)
    for task, values in SMALL.items():
        exact, exact_counts = np.unique(every_resample(values).round(9), return_counts=True)
        found, counts = np.unique(means[task].round(9), return_counts=True)
        np.testing.assert_array_equal(found, exact)
        np.testing.assert_allclose(counts / counts.sum(), exact_counts / exact_counts.sum(), atol=0.004)


def test_tasks_are_drawn_independently_of_each_other() -> None:
    values = np.arange(40) % 2 * 1.0
    means = resampled_means({"a": values, "b": values}, 20_000)
    assert abs(np.corrcoef(means["a"], means["b"])[0, 1]) < 0.03


def test_many_different_values_are_drawn_in_pieces_with_the_same_result_for_every_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lightning_mmembed.retrieval import significance

    values = {"a": np.random.default_rng(0).random(200), "b": np.array([0.0, 1.0])}
    whole = resampled_means(values, 1000)
    monkeypatch.setattr(significance, "_CHUNK", 1500)
    pieces = resampled_means(values, 1000)
    for task, means in whole.items():
        assert means.shape == (1000,)
        np.testing.assert_allclose(pieces[task], means, atol=1e-12)
    assert whole["a"].std() == pytest.approx(values["a"].std() / 200**0.5, rel=0.1)


def test_an_interval_is_repeatable_and_does_not_depend_on_what_other_tasks_there_are() -> None:
    alone = resampled_means({"a": SMALL["a"]}, 500)["a"]
    np.testing.assert_array_equal(resampled_means(SMALL, 500)["a"], alone)
    np.testing.assert_array_equal(resampled_means(dict(reversed(SMALL.items())), 500)["a"], alone)
    assert not np.array_equal(resampled_means(SMALL, 500, seed=1)["a"], alone)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, truth = np.random.default_rng(0), {"a": 0.3, "b": 0.6, "c": 0.8}
    sizes, covered, trials = {"a": 400, "b": 150, "c": 250}, 0, 600
    for trial in range(trials):
        values = {task: (rng.random(sizes[task]) < share) * 1.0 for task, share in truth.items()}
        low, high = bootstrap_interval(values, n_resamples=1000, seed=trial)
        covered += low <= np.mean(list(truth.values())) <= high
    # Three standard errors of a share of 0.95 among 600.
    assert abs(covered / trials - 0.95) < 3 * (0.95 * 0.05 / trials) ** 0.5


# --- two runs


def test_a_p_value_is_twice_the_share_of_all_resamples_beyond_zero() -> None:
    found = paired_bootstrap(DIFFERENCES, {"average": list("abc"), "some": list("ac")}, n_resamples=100_000)
    exact = {task: every_resample(values) for task, values in DIFFERENCES.items()}
    exact["average"] = every_average(DIFFERENCES)
    exact["some"] = every_average({task: DIFFERENCES[task] for task in "ac"})
    for name, means in exact.items():
        share = min((means < 1e-9).mean(), (means > -1e-9).mean())
        assert found[name].p == pytest.approx(min(1.0, 2 * share), abs=0.01), name
        assert found[name].value == pytest.approx(means.mean(), abs=1e-9), name
        for end, (low, high) in zip((found[name].low, found[name].high), quantile_bounds(means, 0.95), strict=True):
            assert low - 1e-9 <= end <= high + 1e-9, name
    assert found["b"].p == 1


def test_only_the_p_values_of_tasks_are_adjusted() -> None:
    found = paired_bootstrap(DIFFERENCES, {"average": list("abc")}, n_resamples=1000)
    assert {task: found[task].p_holm for task in "abc"} == holm({task: found[task].p for task in "abc"})
    assert found["average"].p_holm is None


def test_exchanging_the_two_runs_changes_the_sign_alone() -> None:
    groups = {"average": list("abc")}
    there = paired_bootstrap(DIFFERENCES, groups, 50_000)
    back = paired_bootstrap({task: -values for task, values in DIFFERENCES.items()}, groups, 50_000)
    for name, difference in there.items():
        assert back[name].value == pytest.approx(-difference.value)
        assert back[name].p == pytest.approx(difference.p, abs=0.02)


def test_no_p_value_is_zero() -> None:
    found = paired_bootstrap({"a": np.ones(30)}, {}, n_resamples=999)
    assert found["a"].p == pytest.approx(2 / 1000)


def test_runs_that_do_not_differ_are_told_apart_as_seldom_as_the_level_says() -> None:
    rng, trials, wrong = np.random.default_rng(0), 500, 0
    for trial in range(trials):
        hits = rng.random((2, 300)) < 0.4
        wrong += paired_bootstrap({"a": hits[0] * 1.0 - hits[1]}, {}, 1000, seed=trial)["a"].p < 0.05
    assert abs(wrong / trials - 0.05) < 3 * (0.95 * 0.05 / trials) ** 0.5


def test_queries_are_paired_by_their_id_in_any_order() -> None:
    rng = np.random.default_rng(0)
    qids = np.array([f"9:{n}" for n in range(50)])
    first, other = rng.random(50), rng.random(50)
    order, again = rng.permutation(50), rng.permutation(50)
    found = paired_differences((qids[order], first[order]), (qids[again], other[again]))
    np.testing.assert_array_equal(found, (other - first)[order])


def test_runs_over_other_queries_are_refused_with_the_name_of_one() -> None:
    first = np.array(["9:1", "9:2"]), np.zeros(2)
    with pytest.raises(ValueError, match="1 queries, 9:3 among them, are in one of the two runs only"):
        paired_differences(first, (np.array(["9:1", "9:2", "9:3"]), np.zeros(3)))
    with pytest.raises(ValueError, match="2 queries, 9:2 among them"):
        paired_differences(first, (np.array(["9:1", "9:7"]), np.zeros(2)))


# --- Holm


def naive_holm(p_values: list[float]) -> list[float]:
    """The lowest level at which the step-down procedure rejects each hypothesis, by trying levels."""
    adjusted = [1.0] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for level in np.linspace(0, 1, 2001)[::-1]:
        for step, i in enumerate(order):
            if p_values[i] > level / (len(p_values) - step):
                break
            adjusted[i] = float(level)
    return adjusted


@pytest.mark.parametrize("seed", range(5))
def test_adjusted_p_values_are_the_levels_at_which_holms_procedure_rejects(seed: int) -> None:
    rng = random.Random(seed)
    p_values = [rng.choice([0.0005, 0.003, 0.02, 0.2, 1.0]) * rng.random() for _ in range(8)] + [0.01, 0.01]
    found = holm({str(i): p for i, p in enumerate(p_values)})
    assert list(found) == [str(i) for i in range(10)]
    # The naive levels come in steps of 0.0005, from above.
    for p, ours, naive in zip(p_values, found.values(), naive_holm(p_values), strict=True):
        assert p <= ours <= 1
        assert naive - 0.0005 - 1e-9 <= ours <= naive + 1e-9


def test_adjusting_nothing_or_one_p_value_changes_nothing() -> None:
    assert holm({}) == {}
    assert holm({"a": 0.3}) == {"a": 0.3}
