"""The rule of modality-aware hard negatives equals a loop that spells it out, and never picks a labelled positive."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from lightning_mmembed.mining import HardNegatives, mine_modality_aware

MODALITIES = ("text", "image", "image,text")


@dataclass(frozen=True)
class Case:
    """One query's ranking."""

    ranking: list[str]
    modalities: list[str]
    positives: set[str]
    wanted: str
    k: int
    k_prime: int

    def mine(self) -> HardNegatives:
        return mine_modality_aware(self.ranking, self.modalities, self.positives, self.wanted, self.k, self.k_prime)


def random_case(seed: int) -> Case:
    """Rankings from empty to longer than k, with positives above, inside and below the band, or nowhere."""
    rng = random.Random(seed)
    k = rng.choice([1, 5, 20, 50])
    ranking = [f"{rng.randrange(10)}:{n}" for n in range(rng.choice([0, 1, k // 2, k, k + 10]))]
    rng.shuffle(ranking)
    positives = set(rng.sample(ranking, min(len(ranking), rng.choice([0, 1, 1, 2, 5])))) | {"7:654321"}
    return Case(
        ranking,
        [rng.choice(MODALITIES) for _ in ranking],
        positives,
        rng.choice(MODALITIES),
        k,
        rng.choice([0, k // 2, k - 1, k]),
    )


CASES = [random_case(seed) for seed in range(400)]


def mine_by_loop(case: Case) -> tuple[list[int], list[int]]:
    wrong_modality, wrong_content = [], []
    positive_seen = False
    for place, (did, modality) in enumerate(zip(case.ranking, case.modalities, strict=True)):
        rank = place + 1
        if rank > case.k:
            break
        if did in case.positives:
            positive_seen = True
            continue
        if modality != case.wanted and not positive_seen:
            wrong_modality.append(place)
        if modality == case.wanted and rank > case.k_prime:
            wrong_content.append(place)
    return wrong_modality, wrong_content


def test_the_rule_equals_a_loop_over_the_ranking() -> None:
    for case in CASES:
        found = case.mine()
        assert (list(found.wrong_modality), list(found.wrong_content)) == mine_by_loop(case), case


def test_the_random_cases_reach_every_branch_of_the_rule() -> None:
    found = [(bool(first), bool(second)) for first, second in map(mine_by_loop, CASES)]
    assert set(found) == {(False, False), (False, True), (True, False), (True, True)}
    band = [set(case.ranking[case.k_prime : case.k]) & case.positives for case in CASES]
    assert any(band), "a positive inside the band"
    assert any(not set(case.ranking[: case.k]) & case.positives for case in CASES), "no positive in reach"
    assert any(len(case.ranking) > case.k for case in CASES)
    assert any(0 < len(case.ranking) < case.k_prime for case in CASES)


def test_a_labelled_positive_is_never_mined() -> None:
    for case in CASES:
        found = case.mine()
        assert not {case.ranking[i] for i in (*found.wrong_modality, *found.wrong_content)} & case.positives


def test_a_positive_of_the_wrong_modality_bounds_the_wrong_modality_too_and_is_not_mined() -> None:
    found = mine_modality_aware(["a", "b", "c", "d"], ["text"] * 4, {"b", "c"}, "image", k=4, k_prime=2)
    assert found == HardNegatives((0,), ())


def test_the_best_ranked_positive_is_the_bound_whichever_is_named_first() -> None:
    ranking, modalities = ["a", "b", "c", "d", "e"], ["text", "image", "text", "image", "text"]
    for positives in (["d", "b"], ["b", "d"], {"b", "d"}, ("b", "d", "elsewhere")):
        assert mine_modality_aware(ranking, modalities, positives, "image").wrong_modality == (0,)


def test_without_a_positive_in_reach_every_candidate_of_another_modality_there_is_mined() -> None:
    ranking, modalities = ["a", "b", "c", "positive"], ["text", "image", "text", "image"]
    assert mine_modality_aware(ranking, modalities, {"positive"}, "image", k=3, k_prime=3).wrong_modality == (0, 2)


def test_wrong_content_does_not_depend_on_where_the_positive_stands() -> None:
    dids = [f"0:{n}" for n in range(50)]
    expected = {place: tuple(i for i in range(45, 50) if i != place) for place in range(50)}
    for place, band in expected.items():
        assert mine_modality_aware(dids, ["image"] * 50, {dids[place]}, "image").wrong_content == band


@pytest.mark.parametrize("length", [0, 1, 44, 45])
def test_a_ranking_that_ends_above_the_band_has_no_wrong_content(length: int) -> None:
    dids = [f"0:{n}" for n in range(length)]
    assert mine_modality_aware(dids, ["image"] * length, {"1:1"}, "image") == HardNegatives((), ())


def test_both_kinds_are_empty_where_only_the_right_modality_stands_above_the_band() -> None:
    dids = [f"0:{n}" for n in range(50)]
    modalities = ["image"] * 45 + ["text"] * 5
    assert mine_modality_aware(dids, modalities, {dids[0]}, "image") == HardNegatives((), ())


def test_what_lies_below_k_is_not_looked_at() -> None:
    for case in CASES:
        longer = Case(
            [*case.ranking[: case.k], *(f"99:{n}" for n in range(5))],
            [*case.modalities[: case.k], *MODALITIES, *MODALITIES[:2]],
            case.positives | {"99:3"},
            case.wanted,
            case.k,
            case.k_prime,
        )
        if len(case.ranking) >= case.k:
            assert longer.mine() == case.mine()


@pytest.mark.parametrize(("k", "k_prime"), [(50, 51), (50, -1), (0, 1), (5, 45)])
def test_a_band_outside_the_ranking_is_refused_with_both_numbers(k: int, k_prime: int) -> None:
    with pytest.raises(ValueError, match=rf"k_prime={k_prime} must lie between 0 and k={k}"):
        mine_modality_aware([], [], set(), "image", k=k, k_prime=k_prime)
