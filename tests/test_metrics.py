"""Every metric equals that of ir_measures (which asks trec_eval's own code), and every share of queries counts once."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import ir_measures
import pytest
import torch
from ir_measures import RR, R, Success, nDCG

from lightning_mmembed.metrics import DEFAULT_METRICS, RetrievalMean, parse_metric, per_query_metrics

DEPTHS = (1, 2, 3, 5, 10, 20)
KNOWN = "hit, recall, mrr, ndcg, modality, recall_reachable, ndcg_reachable"
ORACLES = {"hit": Success, "recall": R, "mrr": RR, "ndcg": nDCG}


@dataclass(frozen=True)
class Rankings:
    """Random rankings with their labels and the modality of each result."""

    ranked: list[list[str]]
    positives: list[set[str]]
    right: list[list[bool]]
    width: int

    @property
    def relevant(self) -> torch.Tensor:
        rows = [[did in labels for did in row] for row, labels in zip(self.ranked, self.positives, strict=True)]
        return self._padded(rows)

    @property
    def right_modality(self) -> torch.Tensor:
        return self._padded(self.right)

    @property
    def n_positives(self) -> torch.Tensor:
        return torch.tensor([len(labels) for labels in self.positives])

    def _padded(self, rows: Sequence[Sequence[bool]]) -> torch.Tensor:
        return torch.tensor([[*row, *[False] * (self.width - len(row))] for row in rows])


def random_rankings(seed: int) -> Rankings:
    """Lists from empty to 20 long; positives in them and outside of them, from none to 14."""
    rng = random.Random(seed)
    dids = [f"d{n}" for n in range(30)]
    ranked = [rng.sample(dids, rng.choice([0, 1, 2, 4, 9, 20, 20])) for _ in range(60)]
    positives = [set(rng.sample(dids, rng.choice([0, 1, 1, 1, 2, 3, 14]))) for _ in ranked]
    return Rankings(ranked, positives, [[rng.random() < 0.6 for _ in row] for row in ranked], 20)


def ask_ir_measures(rankings: Rankings, measure: ir_measures.Measure) -> list[float]:
    """By its rank, not by a score: trec_eval breaks ties of scores by the document's name."""
    qrels = {f"q{i}": dict.fromkeys(labels, 1) for i, labels in enumerate(rankings.positives) if labels}
    run = {f"q{i}": {did: -float(rank) for rank, did in enumerate(row)} for i, row in enumerate(rankings.ranked) if row}
    found = {m.query_id: m.value for m in ir_measures.iter_calc([measure], qrels, run)}
    return [found.get(f"q{i}", 0.0) for i in range(len(rankings.ranked))]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("measure", ORACLES)
def test_every_metric_equals_that_of_ir_measures_for_every_query(measure: str, seed: int) -> None:
    rankings = random_rankings(seed)
    names = [f"{measure}@{k}" for k in DEPTHS]
    values = per_query_metrics(rankings.relevant, rankings.right_modality, rankings.n_positives, names)
    for k in DEPTHS:
        expected = ask_ir_measures(rankings, ORACLES[measure] @ k)
        assert values[f"{measure}@{k}"].tolist() == pytest.approx(expected, abs=1e-12), f"{measure}@{k}"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("measure", ["recall", "ndcg"])
def test_metrics_over_reachable_positives_equal_those_of_ir_measures_with_the_others_unlabelled(
    measure: str, seed: int
) -> None:
    rankings = random_rankings(seed)
    rng = random.Random(seed)
    pools = [{*row, *rng.sample([f"d{n}" for n in range(30)], 10)} for row in rankings.ranked]
    reachable = [labels & pool for labels, pool in zip(rankings.positives, pools, strict=True)]
    restricted = dataclasses.replace(rankings, positives=reachable)
    n_reachable = torch.tensor([len(labels) for labels in reachable])
    assert (n_reachable < rankings.n_positives).any()
    assert ((n_reachable == 0) & (rankings.n_positives > 0)).any()
    names = [f"{measure}_reachable@{k}" for k in DEPTHS]
    values = per_query_metrics(
        rankings.relevant, rankings.right_modality, rankings.n_positives, names, n_reachable=n_reachable
    )
    for k in DEPTHS:
        expected = ask_ir_measures(restricted, ORACLES[measure] @ k)
        assert values[f"{measure}_reachable@{k}"].tolist() == pytest.approx(expected, abs=1e-12)


def test_positives_are_all_reachable_unless_it_is_said_otherwise() -> None:
    rankings = random_rankings(0)
    names = ["recall@5", "recall_reachable@5", "ndcg@10", "ndcg_reachable@10"]
    values = per_query_metrics(rankings.relevant, rankings.right_modality, rankings.n_positives, names)
    assert torch.equal(values["recall@5"], values["recall_reachable@5"])
    assert torch.equal(values["ndcg@10"], values["ndcg_reachable@10"])


def test_the_random_rankings_hold_the_cases_that_definitions_differ_in() -> None:
    rankings = random_rankings(0)
    rows = list(zip(rankings.ranked, rankings.positives, strict=True))
    assert any(row and not labels for row, labels in rows), "a query without positives"
    assert any(labels - set(row) and labels & set(row) for row, labels in rows), "a positive outside the list"
    assert any(len(row) == 2 and labels & set(row) for row, labels in rows), "a list shorter than k"
    assert any(len(labels) > 10 for _, labels in rows), "more positives than k"


@pytest.mark.parametrize("k", DEPTHS)
def test_modality_is_the_share_of_the_first_k_places_that_hold_the_wanted_one(k: int) -> None:
    for seed in range(4):
        rankings = random_rankings(seed)
        values = per_query_metrics(rankings.relevant, rankings.right_modality, rankings.n_positives, [f"modality@{k}"])
        expected = []
        for row in rankings.right:
            right = 0
            for place in range(k):
                right += place < len(row) and row[place]
            expected.append(right / k)
        assert values[f"modality@{k}"].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", [n for n in DEFAULT_METRICS if not n.startswith("modality")])
def test_a_matrix_narrower_than_k_scores_as_one_that_is_padded(name: str) -> None:
    rankings = random_rankings(1)
    relevant, right, n = rankings.relevant[:, :4], rankings.right_modality[:, :4], rankings.n_positives
    padding = torch.zeros(len(relevant), 16, dtype=torch.bool)
    narrow = per_query_metrics(relevant, right, n, [name])[name]
    wide = per_query_metrics(torch.cat([relevant, padding], 1), torch.cat([right, padding], 1), n, [name])[name]
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize("name", DEFAULT_METRICS)
def test_a_query_without_positives_scores_zero_and_no_query_at_all_scores_nothing(name: str) -> None:
    nothing = torch.zeros(2, 10, dtype=torch.bool)
    assert per_query_metrics(nothing, nothing, torch.tensor([0, 3]), [name])[name].tolist() == [0.0, 0.0]
    assert per_query_metrics(nothing[:0], nothing[:0], torch.tensor([], dtype=torch.long), [name])[name].shape == (0,)


def test_a_value_depends_on_its_own_query_alone() -> None:
    rankings = random_rankings(2)
    relevant, right, n = rankings.relevant, rankings.right_modality, rankings.n_positives
    together = per_query_metrics(relevant, right, n)
    for i in (0, 7, 59):
        alone = per_query_metrics(relevant[i : i + 1], right[i : i + 1], n[i : i + 1])
        assert {name: value.item() for name, value in alone.items()} == {k: v[i].item() for k, v in together.items()}


@pytest.mark.parametrize(
    "name",
    ["", "hit", "hit@", "hit@0", "hit@-1", "hit@five", "hit@1.5", "hit@5@10", "Hit@5", "hits@5", "r@5", "@5", "map@10"],
)
def test_a_bad_metric_name_is_refused_with_the_known_ones(name: str) -> None:
    message = f"metric={name!r} is unknown; write one of {KNOWN} with a depth"
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_metric(name)


@pytest.mark.parametrize("name", DEFAULT_METRICS)
def test_every_default_metric_has_a_name_that_is_read_back(name: str) -> None:
    measure, k = parse_metric(name)
    assert f"{measure}@{k}" == name


@pytest.mark.parametrize("sizes", [(1, 7, 100), (0, 3), (3, 0), (0, 0, 5), (33, 33, 34)])
def test_uneven_shares_merge_to_the_mean_over_all_queries_an_empty_share_included(sizes: tuple[int, ...]) -> None:
    values = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = [RetrievalMean() for _ in sizes]
    for share, part in zip(shares, values.split(list(sizes)), strict=True):
        share.update(part)
    merged, *others = shares
    for other in others:
        merged.merge_state(other)
    assert merged.compute().item() == pytest.approx(sum(values.tolist()) / len(values), abs=1e-12)


def test_updates_of_any_size_give_the_mean_and_a_reset_forgets_them() -> None:
    metric = RetrievalMean()
    for size in (1, 0, 4):
        metric.update(torch.full((size,), float(size)))
    assert metric.compute().item() == pytest.approx(17 / 5)
    metric.reset()
    metric.update(torch.tensor([0.25]))
    assert metric.compute().item() == 0.25


def test_the_sum_does_not_lose_small_values_beside_many_others() -> None:
    metric = RetrievalMean()
    metric.update(torch.ones(2**25, dtype=torch.float32))
    metric.update(torch.tensor([1.0]))
    assert metric.compute().item() == 1.0
    assert metric.total.item() == 2**25 + 1
