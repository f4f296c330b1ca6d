"""The rules of mining over many rankings at once equal a loop over each of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.mining import (
    KINDS,
    MiningRule,
    Rankings,
    mine_modality_aware,
    mine_rankings,
    mined_columns,
    mining_audit,
)

THRESHOLDS = {"absolute_margin": 0.1, "relative_margin": 0.2, "max_score": 0.7, "min_score": 0.2, "check_margin": 0.05}


def random_rankings(seed: int, n_queries: int = 40, length: int = 30) -> Rankings:
    """Lists of every length, positives anywhere or nowhere, scores of both signs, some positives' scores unknown."""
    rng = np.random.default_rng(seed)
    dids = np.stack([rng.permutation(1000)[:length] for _ in range(n_queries)])
    dids[np.arange(length) >= rng.choice([0, 1, length // 2, length, length], n_queries)[:, None]] = -1
    shift = rng.choice([0, -0.7], (n_queries, 1))
    scores = -np.sort(-(shift + rng.uniform(-0.3, 1, (n_queries, length))).astype(np.float32), 1)
    positives = rng.integers(0, 1000, (n_queries, 4))
    for row, column in itertools.product(range(n_queries), range(4)):
        if rng.random() < 0.5:
            positives[row, column] = rng.choice(dids[row])  # -1, too
    positive_scores = (shift[:, 0] + rng.uniform(-0.2, 0.9, n_queries)).astype(np.float32)
    positive_scores[rng.random(n_queries) < 0.2] = np.nan
    return Rankings(
        rng.permutation(n_queries) + 10**7,
        dids,
        rng.integers(0, 3, dids.shape).astype(np.int8),
        scores,
        positives,
        1,
        positive_scores,
        rng.random(dids.shape).astype(np.float32),
        rng.random(n_queries).astype(np.float32),
    )


def left_out(rankings: Rankings, rule: MiningRule, row: int, place: int, kind: int) -> str | None:
    """The first setting that leaves a candidate out, in numbers as precise as the scores."""
    score, positive = rankings.scores[row, place], rankings.positive_scores[row]
    if kind == 0:  # above the best positive by its definition
        positive = np.float32(np.nan)
    if rule.absolute_margin is not None and score + np.float32(rule.absolute_margin) > positive:
        return "absolute_margin"
    if rule.relative_margin is not None and score > positive - abs(positive) * np.float32(rule.relative_margin):
        return "relative_margin"
    if rule.max_score is not None and score > np.float32(rule.max_score):
        return "max_score"
    if rule.min_score is not None and score < np.float32(rule.min_score):
        return "min_score"
    if rule.check_margin is not None and rankings.modalities[row, place] == rankings.wanted:
        bound = rankings.check_positive_scores[row] - np.float32(rule.check_margin)
        if rankings.check_scores[row, place] >= bound:
            return "check_margin"
    return None


def mine_by_loop(rankings: Rankings, rule: MiningRule) -> tuple[list[dict[int, int]], dict[str, int]]:
    """For each query the kind of each mined place, best first, before any are drawn; and how many were left out."""
    found, out = [], {name: 0 for name in THRESHOLDS if getattr(rule, name) is not None}
    for row, dids in enumerate(rankings.dids.tolist()):
        positives, kinds, met = set(rankings.positives[row].tolist()) - {-1}, {}, False
        for place, did in enumerate(dids[: rule.k]):
            if did == -1:
                break
            wanted = rankings.modalities[row, place] == rankings.wanted
            met = met or did in positives
            if did in positives:
                continue
            if rule.rule in ("top_k", "window"):
                kinds[place] = 2
            elif not wanted and not met and rule.rule != "wrong_content":
                kinds[place] = 0
            elif wanted and place + 1 > rule.k_prime and rule.rule != "wrong_modality":
                kinds[place] = 1
        for place in list(kinds):
            reason = left_out(rankings, rule, row, place, kinds[place])
            if reason is not None:
                out[reason] += 1
                del kinds[place]
        if rule.rule == "window":
            kinds = dict(list(kinds.items())[rule.range_min : rule.range_max])
        found.append(kinds)
    return found, out


def places(kinds: np.ndarray) -> list[dict[int, int]]:
    return [{int(place): int(row[place]) for place in np.flatnonzero(row >= 0)} for row in kinds]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"rule": "wrong_modality"},
    {"rule": "wrong_content", "k_prime": 5},
    {"rule": "top_k"},
    {"rule": "window", "range_min": 3},
    {"rule": "window", "range_min": 0, "range_max": 5},
    {"rule": "window", "range_min": 2, "range_max": 9},
]
FILTERS = [{}, *({name: value} for name, value in THRESHOLDS.items()), THRESHOLDS]


@pytest.mark.parametrize("filters", FILTERS, ids=lambda filters: "+".join(filters) or "none")
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())) or "paper")
def test_every_rule_equals_a_loop_over_every_ranking(settings: dict[str, Any], filters: dict[str, float]) -> None:
    if settings.get("rule") == "wrong_modality":
        filters = {name: value for name, value in filters.items() if "margin" not in name}
    rule = MiningRule(**{"k": 20, "k_prime": 12, **settings, **filters})
    kept = dropped = 0
    for seed in range(4):
        rankings = random_rankings(seed)
        kinds, counts = mine_rankings(rankings, rule)
        expected, out = mine_by_loop(rankings, rule)
        assert places(kinds) == expected
        assert {name.removeprefix("left_out_by_"): n for name, n in counts.items() if "left_out" in name} == out
        kept, dropped = kept + sum(map(len, expected)), dropped + sum(out.values())
    assert kept or len(filters) > 1
    assert bool(dropped) == bool(filters)


def test_the_paper_s_rule_is_that_of_one_query() -> None:
    rankings = random_rankings(1)
    kinds, _ = mine_rankings(rankings, MiningRule(k=20, k_prime=12))
    for row, dids in enumerate(rankings.dids.tolist()):
        length = (rankings.dids[row] >= 0).sum()
        labelled = set(rankings.positives[row].tolist()) - {-1}
        found = mine_modality_aware(dids[:length], rankings.modalities[row].tolist(), labelled, 1, 20, 12)
        assert np.flatnonzero(kinds[row] == 0).tolist() == list(found.wrong_modality)
        assert np.flatnonzero(kinds[row] == 1).tolist() == list(found.wrong_content)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())) or "paper")
def test_a_labelled_positive_is_of_no_kind_under_any_rule(settings: dict[str, Any]) -> None:
    for seed in range(4):
        rankings = random_rankings(seed)
        kinds, counts = mine_rankings(rankings, MiningRule(**{"k": 20, "k_prime": 12, **settings}))
        met = 0
        for row, labelled in enumerate(rankings.positives):
            positive = np.isin(rankings.dids[row], labelled[labelled >= 0])
            assert (kinds[row][positive] == -1).all()
            met += positive[:20].sum()
        assert counts["positives_met"] == met > 0
        assert (kinds[rankings.dids < 0] == -1).all()
        assert (kinds[:, 20:] == -1).all()


CHECKED = [settings for settings in SETTINGS if settings.get("rule") != "wrong_modality"]


@pytest.mark.parametrize("settings", CHECKED, ids=lambda settings: "-".join(map(str, settings.values())) or "paper")
def test_the_check_by_another_model_leaves_out_no_candidate_of_another_modality(settings: dict[str, Any]) -> None:
    rankings = random_rankings(0)
    biased = dataclasses.replace(rankings, check_scores=np.where(rankings.modalities == 1, -9, 9).astype(np.float32))
    rule = MiningRule(**{"k": 20, "k_prime": 12, **settings})
    kinds, counts = mine_rankings(biased, dataclasses.replace(rule, check_margin=0.0))
    np.testing.assert_array_equal(kinds, mine_rankings(rankings, rule)[0])
    assert counts["left_out_by_check_margin"] == 0


@pytest.mark.parametrize("name", ["absolute_margin", "relative_margin"])
def test_a_margin_leaves_every_candidate_of_the_wrong_modality_above_the_best_positive(name: str) -> None:
    for seed in range(4):
        rankings = random_rankings(seed)
        plain, _ = mine_rankings(rankings, MiningRule(k=20, k_prime=12))
        kinds, _ = mine_rankings(rankings, MiningRule(k=20, k_prime=12, **{name: 0.3}))
        np.testing.assert_array_equal(kinds == 0, plain == 0)
        assert (kinds == 1).sum() < (plain == 1).sum()


def part(rankings: Rankings, rows: slice) -> Rankings:
    values = {field.name: getattr(rankings, field.name) for field in dataclasses.fields(rankings)}
    return Rankings(**{name: value if name == "wanted" else value[rows] for name, value in values.items()})


@pytest.mark.parametrize("strategy", ["top", "random"])
def test_rankings_may_be_cut_into_parts_anywhere_and_the_counts_added_up(strategy: str) -> None:
    rankings = random_rankings(2)
    rule = MiningRule(k=20, k_prime=12, num_negatives=2, sampling_strategy=strategy, **THRESHOLDS)
    kinds, counts = mine_rankings(rankings, rule)
    parts = [mine_rankings(part(rankings, rows), rule) for rows in (slice(0, 7), slice(7, 7), slice(7, None))]
    np.testing.assert_array_equal(np.concatenate([found for found, _ in parts]), kinds)
    assert {name: sum(some[name] for _, some in parts) for name in counts} == counts


def test_the_best_of_each_kind_are_kept() -> None:
    rankings = random_rankings(3)
    every, _ = mine_rankings(rankings, MiningRule(k=20, k_prime=12))
    few, counts = mine_rankings(rankings, MiningRule(k=20, k_prime=12, num_negatives=2))
    for row, all_kinds in zip(few, every, strict=True):
        for kind in (0, 1):
            assert np.flatnonzero(row == kind).tolist() == np.flatnonzero(all_kinds == kind)[:2].tolist()
    assert counts["with_wrong_modality"] == (every == 0).any(1).sum() > 0


def test_random_ones_are_some_of_those_that_the_rule_finds_and_any_with_equal_chance() -> None:
    one = random_rankings(0, n_queries=1, length=12)
    one = dataclasses.replace(one, dids=np.arange(12)[None], positives=np.array([[0, 1]]))
    counts = np.zeros(12)
    for seed in range(2000):
        rule = MiningRule("window", k=12, range_min=2, num_negatives=3, sampling_strategy="random", seed=seed)
        kept = np.flatnonzero(mine_rankings(one, rule)[0][0] == 2)
        assert len(kept) == 3
        counts[kept] += 1
    assert (counts[:4] == 0).all(), "two positives, and the best two of the rest"
    assert (abs(counts[4:] - 750) < 5 * (2000 * 0.375 * 0.625) ** 0.5).all()


def test_what_is_drawn_depends_on_query_candidate_and_seed_alone() -> None:
    rankings = random_rankings(0)
    rule = MiningRule("top_k", k=20, num_negatives=3, sampling_strategy="random", seed=5)
    kinds, _ = mine_rankings(rankings, rule)
    order = np.random.default_rng(0).permutation(len(kinds))
    np.testing.assert_array_equal(mine_rankings(part(rankings, order), rule)[0], kinds[order])  # type: ignore[arg-type]
    assert (mine_rankings(rankings, dataclasses.replace(rule, seed=6))[0] != kinds).any()


def test_an_unknown_score_of_a_positive_leaves_nothing_out() -> None:
    rankings = random_rankings(0)
    unknown = dataclasses.replace(rankings, positive_scores=np.full(len(rankings.qids), np.nan, dtype=np.float32))
    margins = MiningRule(k=20, k_prime=12, absolute_margin=0.5, relative_margin=0.5)
    np.testing.assert_array_equal(
        mine_rankings(unknown, margins)[0], mine_rankings(rankings, MiningRule(k=20, k_prime=12))[0]
    )


# --- columns, audit, settings ---------------------------------------------------------------------------------------


def test_columns_hold_every_mined_candidate_with_its_rank_and_score_query_by_query_and_kind_by_kind() -> None:
    rankings = random_rankings(4)
    kinds, _ = mine_rankings(rankings, MiningRule(k=20, k_prime=12))
    columns = mined_columns(rankings, kinds)
    expected = [
        (
            rankings.qids[row],
            rankings.dids[row, place],
            kind,
            place + 1,
            rankings.scores[row, place],
        )
        for row in range(len(kinds))
        for kind in range(len(KINDS))
        for place in range(kinds.shape[1])
        if kinds[row, place] == kind
    ]
    assert list(zip(*columns.values(), strict=True)) == expected
    assert list(columns) == ["qid", "did", "kind", "rank", "score"]


def test_the_audit_counts_what_the_columns_hold_and_can_be_written_as_json() -> None:
    rankings = random_rankings(5)
    rule = MiningRule(k=20, k_prime=12, max_score=0.8)
    kinds, counts = mine_rankings(rankings, rule)
    audit = json.loads(json.dumps(mining_audit(counts, mined_columns(rankings, kinds))))
    assert {name: audit[name] for name in counts} == counts
    assert audit["queries"] == 40
    assert audit["with_none"] == (kinds == -1).all(1).sum()
    assert audit["positives"] == (rankings.positives >= 0).sum()
    assert audit["share_of_positives_met"] == pytest.approx(audit["positives_met"] / audit["positives"])
    assert set(audit["kinds"]) == {"wrong_modality", "wrong_content"}
    for kind, name in enumerate(audit["kinds"]):
        row, place = np.nonzero(kinds == kind)
        found, scores = audit["kinds"][name], rankings.scores[row, place]
        assert found["negatives"] == len(row) == sum(found["scores"])
        assert found["mean_rank"] == pytest.approx((place + 1).mean(), abs=1e-4)
        assert found["mean_score"] == pytest.approx(scores.mean(), abs=1e-4)
        assert found["scores"][30] == ((scores >= 0.5) & (scores < 0.55)).sum()
    assert audit["left_out_by_max_score"] > 0


def test_the_audit_of_nothing_is_made_of_zeros() -> None:
    nothing = part(random_rankings(5), slice(0, 0))
    kinds, counts = mine_rankings(nothing)
    audit = mining_audit(counts, mined_columns(nothing, kinds))
    assert audit.pop("kinds") == {}
    assert set(audit.values()) == {0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "hardest"}, r"rule='hardest' is unknown; write one of modality_aware, wrong_modality, "),
        ({"k": 0}, r"k=0 is too small"),
        ({"k": 5}, r"k_prime=45 must lie between 0 and k=5"),
        ({"rule": "top_k", "range_min": 3}, r"range_min=3, range_max=None have no effect with rule='top_k'"),
        ({"rule": "window", "range_min": -1}, r"range_min=-1, range_max=None: they must obey 0 <= range_min"),
        ({"rule": "window", "range_min": 9, "range_max": 9}, r"range_min < range_max <= k=50"),
        ({"rule": "window", "range_max": 51}, r"range_min < range_max <= k=50"),
        ({"max_score": float("nan")}, r"max_score=nan must be a finite number"),
        ({"num_negatives": 0}, r"num_negatives=0 is too small; it must be at least 1"),
        ({"sampling_strategy": "best", "num_negatives": 1}, r"sampling_strategy='best' is unknown"),
        ({"sampling_strategy": "random"}, r"without num_negatives"),
        ({"seed": -1}, r"seed=-1 must be"),
        ({"rule": "wrong_modality", "check_margin": 0.0}, r"check_margin=0.0 has no effect with rule='wrong_modality'"),
        ({"rule": "wrong_modality", "relative_margin": 0.1}, r"relative_margin=0.1 has no effect with rule='wrong_mod"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        MiningRule(**settings)


@pytest.mark.parametrize("name", ["absolute_margin", "relative_margin", "check_margin"])
def test_a_rule_without_the_scores_that_it_needs_is_refused(name: str) -> None:
    bare = dataclasses.replace(random_rankings(0), positive_scores=None, check_scores=None, check_positive_scores=None)
    with pytest.raises(UserInputError, match=rf"{name}=0.1.*missing"):
        mine_rankings(bare, MiningRule(**{name: 0.1}))


def test_the_settings_make_the_same_rule_again() -> None:
    rule = MiningRule("window", k=30, range_min=2, range_max=20, relative_margin=0.05)
    assert MiningRule(**json.loads(json.dumps(rule.to_dict()))) == rule
    assert MiningRule(**MiningRule().to_dict()) == MiningRule(k=50, k_prime=45)


def test_a_band_below_the_depth_does_not_matter_to_rules_without_one() -> None:
    assert MiningRule("top_k", k=20).k == 20
