"""Drawing mined negatives: today's draws stay what they are, and a share moves them from one kind to the others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from lightning_mmembed.data.instructions import draw
from lightning_mmembed.data.negatives import (
    KINDS,
    MinedNegatives,
    Share,
    check_share,
    draw_negatives,
    share_at,
    write_negatives,
)
from lightning_mmembed.errors import UserInputError

POOL = np.arange(300)
EACH = {0: range(100, 107), 1: range(200, 205), 2: range(50, 59)}


def write(path: Path, kinds_of: dict[int, tuple[int, ...]]) -> MinedNegatives:
    """A file in which each query has all negatives of some kinds, in an order that says nothing."""
    rows = [(qid, did, kind) for qid, kinds in kinds_of.items() for kind in kinds for did in EACH[kind]]
    order = np.random.default_rng(0).permutation(len(rows))
    qid, did, kind = np.array(rows, dtype=np.int64)[order].T
    columns = {
        "qid": qid,
        "did": did,
        "kind": kind.astype(np.int8),
        "rank": np.ones(len(rows), dtype=np.int16),
        "score": np.zeros(len(rows), dtype=np.float32),
    }
    return MinedNegatives(write_negatives(path, columns, {}, {}))


@pytest.fixture
def mined(tmp_path: Path) -> MinedNegatives:
    """Queries 1 and 2 have both modality-aware kinds, 3 and 4 one each, 5 any modality, 6 nothing; 7 to 9 mix them."""
    kinds_of = {1: (0, 1), 2: (0, 1), 3: (0,), 4: (1,), 5: (2,), 7: (0, 1, 2), 8: (1, 2), 9: (0, 2)}
    return write(tmp_path / "mined.parquet", kinds_of)


def draws(mined: MinedNegatives, qid: int, share: Share, epochs: int = 400) -> list[int]:
    return [did for epoch in range(epochs) for did in draw_negatives(mined, POOL, qid, [], 3, 7, epoch, share)]


@pytest.mark.parametrize("qid", [1, 2, 3, 4])
def test_by_default_each_draw_takes_one_of_the_kinds_that_are_there_by_the_key_s_remainder(
    mined: MinedNegatives, qid: int
) -> None:
    kinds = [part for part in mined.of(qid) if len(part)]
    for seed in range(3):
        for epoch in range(100):
            part = kinds[draw(len(kinds), seed, epoch, "kind", qid, 0)]
            expected = part[draw(len(part), seed, epoch, "negative", qid, 0)]
            assert draw_negatives(mined, POOL, qid, [], 1, seed, epoch) == [expected]


def test_the_draws_of_a_seed_are_pinned(tmp_path: Path) -> None:
    """A resumed run draws what the run before it would have drawn, whatever version of the package either has."""
    rows = np.array([(1, 100 + n, n % 2) for n in range(9)], dtype=np.int64)
    columns = {
        "qid": rows[:, 0],
        "did": rows[:, 1],
        "kind": rows[:, 2].astype(np.int8),
        "rank": np.arange(1, 10, dtype=np.int16),
        "score": np.zeros(9, dtype=np.float32),
    }
    mined = MinedNegatives(write_negatives(tmp_path / "pinned.parquet", columns, {}, {}))
    assert [draw_negatives(mined, POOL, 1, [], 2, 0, epoch) for epoch in range(4)] == [
        [107, 106],
        [100, 101],
        [103, 100],
        [103, 106],
    ]
    assert draw_negatives(mined, POOL, 6, [], 3, 0, 0) == [221, 12, 293]


@pytest.mark.parametrize(
    ("qid", "pinned"),
    [
        (1, [101, 101, 101, 204, 204, 204, 102, 102, 102, 201, 201, 104]),
        (2, [102, 102, 102, 202, 202, 101, 100, 100, 100, 202, 202, 103]),
        (3, [105, 105, 105, 102, 102, 102, 102, 102, 102, 104, 104, 104]),
        (4, [203, 203, 203, 202, 202, 202, 203, 203, 203, 203, 203, 203]),
        (5, [50, 50, 50, 53, 53, 53, 51, 51, 51, 56, 56, 56]),
        (6, [256, 256, 256, 47, 47, 47, 42, 42, 42, 187, 187, 187]),
    ],
)
def test_the_draws_of_one_negative_a_query_are_pinned_at_every_share(
    tmp_path: Path, qid: int, pinned: list[int]
) -> None:
    mined = write(tmp_path / "pinned.parquet", {1: (0, 1), 2: (0, 1), 3: (0,), 4: (1,), 5: (2,)})
    keys = [(epoch, share) for epoch in range(4) for share in (0.2, 0.5, 0.9)]
    assert [draw_negatives(mined, POOL, qid, [], 1, 3, epoch, share) for epoch, share in keys] == [[n] for n in pinned]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("qid", [1, 7, 9])
def test_a_share_is_the_share_of_the_wrong_modality_among_the_drawn(
    mined: MinedNegatives, qid: int, share: float
) -> None:
    drawn = draws(mined, qid, share)
    wrong_modality = sum(100 <= did < 200 for did in drawn)
    assert abs(wrong_modality - share * len(drawn)) <= 5 * (len(drawn) * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(("qid", "others"), [(7, (1, 2)), (8, (1, 2)), (9, (2,))])
@pytest.mark.parametrize("share", [0.0, 0.7])
def test_all_other_kinds_together_are_drawn_alike_beside_the_wrong_modality(
    mined: MinedNegatives, qid: int, others: tuple[int, ...], share: float
) -> None:
    expected_of = [did for kind in others for did in EACH[kind]]
    counts = Counter(did for did in draws(mined, qid, share) if not 100 <= did < 200)
    assert set(counts) == set(expected_of)
    expected = counts.total() / len(expected_of)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_a_larger_share_only_turns_the_wrong_content_into_the_wrong_modality(mined: MinedNegatives) -> None:
    for epoch in range(400):
        (fewer,), (more,) = (draw_negatives(mined, POOL, 1, [], 1, 7, epoch, share) for share in (0.3, 0.6))
        assert more == fewer or (fewer >= 200 and more < 200)
    assert draws(mined, 1, 0.3) != draws(mined, 1, 0.6)


@pytest.mark.parametrize("qid", range(1, 10))
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_negative_of_a_query_comes_twice_while_another_is_left(
    mined: MinedNegatives, qid: int, share: float
) -> None:
    there = sum(map(len, mined.of(qid))) or 12
    pool = np.arange(there + 2)  # two are positives
    for n in (2, there - 1, there):
        for epoch in range(20):
            assert len(set(draw_negatives(mined, pool, qid, [0, 5], n, 7, epoch, share))) == n
    again = draw_negatives(mined, pool, qid, [0, 5], there + 3, 7, 0, share)
    assert (len(again), len(set(again))) == (there + 3, there), "as many for every query, however few there are"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_kind_that_has_run_out_is_as_one_that_is_empty(mined: MinedNegatives, share: float) -> None:
    wanted, other = (EACH[0], EACH[1]) if share else (EACH[1], EACH[0])
    for epoch in range(20):
        drawn = draw_negatives(mined, POOL, 1, [], len(wanted) + 2, 7, epoch, share)
        assert set(drawn[: len(wanted)]) == set(wanted)
        assert set(drawn[len(wanted) :]) < set(other)


def test_the_second_of_two_negatives_is_any_of_those_that_are_left(mined: MinedNegatives) -> None:
    pairs = [draw_negatives(mined, POOL, 4, [], 2, 7, epoch) for epoch in range(2000)]
    counts = Counter(map(tuple, pairs))
    assert len(counts) == 5 * 4
    assert all(abs(count - 100) < 50 for count in counts.values())


def test_what_two_files_hold_of_one_query_is_drawn_once(tmp_path: Path) -> None:
    for name, kinds in (("a", {1: (0, 1)}), ("b", {1: (1, 2)})):
        write(tmp_path / name, kinds)
    both = MinedNegatives([tmp_path / "a", tmp_path / "b"])
    drawn = draw_negatives(both, POOL, 1, [], 21, 7, 0)
    assert sorted(drawn) == sorted(did for part in EACH.values() for did in part)


@pytest.mark.parametrize(("qid", "kind"), [(3, 0), (4, 1), (5, 2)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_where_there_is_one_kind_it_is_drawn_alike_whatever_the_share(
    mined: MinedNegatives, qid: int, kind: int, share: float
) -> None:
    counts, expected = Counter(draws(mined, qid, share)), 1200 / len(EACH[kind])
    assert set(counts) == set(EACH[kind])
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_negatives_of_any_modality_are_read_beside_those_of_files_that_know_two_kinds(mined: MinedNegatives) -> None:
    assert KINDS[:2] == ("wrong_modality", "wrong_content"), "numbers in files that exist"
    found = {qid: tuple(sorted(part.tolist()) for part in mined.of(qid)) for qid in range(1, 7)}
    first, second, third = (list(EACH[kind]) for kind in (0, 1, 2))
    assert found == {
        1: (first, second, []),
        2: (first, second, []),
        3: (first, [], []),
        4: ([], second, []),
        5: ([], [], third),
        6: ([], [], []),
    }


def test_a_curriculum_draws_in_each_epoch_what_its_share_draws(mined: MinedNegatives) -> None:
    for share in ([1.0, 0.25, 0.0], {"start": 1.0, "end": 0.0, "epochs": 5}):
        for epoch in range(8):
            expected = draw_negatives(mined, POOL, 1, [], 9, 0, epoch, share_at(share, epoch))
            assert draw_negatives(mined, POOL, 1, [], 9, 0, epoch, share) == expected


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.3, [0.3] * 6),
        ([0.9, 0.6], [0.9, 0.6, 0.6, 0.6, 0.6, 0.6]),
        ({"start": 1.0, "end": 0.0, "epochs": 5}, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ({"start": 0.2, "end": 0.4, "epochs": 2}, [0.2, 0.4, 0.4, 0.4, 0.4, 0.4]),
        ({"start": 0.7, "end": 0.7, "epochs": 3}, [0.7] * 6),
        ({"start": 0.7, "end": 0.2, "epochs": 1}, [0.7] + [0.2] * 5),
    ],
    ids=str,
)
def test_the_share_of_an_epoch_is_as_written_and_stays_at_the_last(share: Share, expected: list[float]) -> None:
    read = OmegaConf.create({"share": share}).share  # as a configuration gives it
    for given in (share, read):
        check_share(given)
        assert [share_at(given, epoch) for epoch in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "share",
    [
        -0.1,
        1.1,
        float("nan"),
        [],
        [0.5, 2.0],
        {"start": 0.5, "end": 0.5},
        {"start": 0.5, "end": 0.5, "epochs": 0},
        {"start": 0.5, "end": 1.5, "epochs": 4},
        {"start": 0.5, "end": 0.5, "epochs": 4, "step": 1},
        {"start": None, "end": 0.5, "epochs": 4},
        None,
        [0.5, None],
        "0.5",
    ],
    ids=str,
)
def test_a_share_that_is_none_is_named(share: Any) -> None:
    with pytest.raises(UserInputError, match=r"wrong_modality_share=.* cannot be used: "):
        check_share(share)


@pytest.mark.parametrize("epochs", [-1, None, 0, float("inf")])
def test_a_curriculum_without_a_last_epoch_says_what_to_give(epochs: Any) -> None:
    with pytest.raises(UserInputError, match=rf"epochs={epochs} has no last epoch.*wrong_modality_share\.epochs=8"):
        check_share({"start": 1.0, "end": 0.5, "epochs": epochs})
