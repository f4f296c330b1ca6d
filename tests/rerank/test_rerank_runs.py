"""Runs over many rankings: budgets, what is kept on disk, what it will cost."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from rerank_worlds import CANDIDATES, PROMPTS, QUERIES

from lightning_mmembed import Candidate, Item, ZeroShotReranker
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.rerank import ScoreStore, estimate, score_run, zero_shot
from lightning_mmembed.rerank.runs import share_out

ALL = list(QUERIES.values())
RANKINGS = [CANDIDATES, CANDIDATES[::-1], CANDIDATES[:3]]
PAIRS = 13


def stored(directory: Path) -> ScoreStore:
    return ScoreStore(directory, seconds=0)


def test_each_head_gets_the_scores_of_its_pairs(reranker: ZeroShotReranker) -> None:
    result = score_run(reranker, ALL, RANKINGS, depth=4, show_progress=False)
    assert [len(scores) for scores in result.scores] == [4, 4, 3]
    assert (result.scored, result.found, result.unscored) == (11, 0, 0)
    for query, ranking, scores in zip(ALL, RANKINGS, result.scores, strict=True):
        np.testing.assert_allclose(scores, reranker.score(query, ranking[:4]), atol=1e-5)


def test_an_empty_ranking_has_no_scores(reranker: ZeroShotReranker) -> None:
    assert score_run(reranker, ALL[:1], [[]], show_progress=False).scores == [[]]
    assert score_run(reranker, [], [], show_progress=False).scores == []


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_no_pair_is_scored_twice(reranker: ZeroShotReranker, tmp_path: Path) -> None:
    with stored(tmp_path) as store:
        first = score_run(reranker, ALL, RANKINGS, depth=2, store=store, show_progress=False)
    assert (first.scored, first.found) == (6, 0)
    reranker.pairs = 0
    with stored(tmp_path) as store:
        second = score_run(reranker, ALL, RANKINGS, store=store, show_progress=False)
    assert (second.scored, second.found, reranker.pairs) == (PAIRS - 6, 6, PAIRS - 6)
    with stored(tmp_path) as store:
        third = score_run(reranker, ALL, RANKINGS, store=store, show_progress=False)
    assert (third.scored, third.found, reranker.pairs) == (0, PAIRS, PAIRS - 6)
    assert third.scores == second.scores
    fresh = score_run(reranker, ALL, RANKINGS, show_progress=False)
    for kept, new in zip(third.scores, fresh.scores, strict=True):
        np.testing.assert_allclose(kept, new, atol=1e-5)


def test_a_score_belongs_to_weights_wording_labels_instruction_query_and_candidate(
    answering_checkpoint: Callable[[str], Path],
) -> None:
    path, query, candidate = answering_checkpoint("qwen2_5_vl"), ALL[2], CANDIDATES[2]

    def loaded(**options: object) -> ZeroShotReranker:
        return ZeroShotReranker.from_pretrained(path, **{"prompts": PROMPTS, **options})

    reranker = loaded()
    key = reranker.key(query, candidate)
    assert loaded().key(replace(query, qid="7:7"), replace(candidate, did="8:8")) == key
    assert loaded(prompts={**PROMPTS, "task6": "{query} or {candidate}"}).key(query, candidate) == key
    changed = loaded()
    next(changed.model.parameters()).data.view(-1)[0] += 1
    configured = loaded()
    configured.model.config.text_config.rms_norm_eps = 1e-3
    others = [
        changed.key(query, candidate),
        configured.key(query, candidate),
        loaded(labels=("False", "True")).key(query, candidate),
        loaded(prompts={"cirr_task7": "{query} or {candidate}"}).key(query, candidate),
        loaded(max_length=300).key(query, candidate),
        reranker.key(query, candidate, "oven_task6"),
        reranker.key(replace(query, instruction="Find it."), candidate),
        reranker.key(replace(query, item=ALL[1].item), candidate),
        reranker.key(query, CANDIDATES[3]),
        reranker.key(query, replace(candidate, item=Item(candidate.item.text, CANDIDATES[1].item.image))),
        reranker.key(query, replace(candidate, item=Item(candidate.item.text))),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_a_score_belongs_neither_to_a_folder_nor_to_a_way_to_attend(
    answering_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = answering_checkpoint("qwen2_5_vl")
    shutil.copytree(path, tmp_path / "copy")
    one = ZeroShotReranker.from_pretrained(path, prompts=PROMPTS, attn_implementation="sdpa")
    other = ZeroShotReranker.from_pretrained(tmp_path / "copy", prompts=PROMPTS, attn_implementation="eager")
    assert one.fingerprint == other.fingerprint


def test_a_score_belongs_to_the_version_of_transformers(
    reranker: ZeroShotReranker, answering_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ZeroShotReranker.from_pretrained(answering_checkpoint("qwen2_5_vl"), prompts=PROMPTS)
    monkeypatch.setattr(zero_shot, "version", lambda name: "7.7" if name == "transformers" else version(name))
    assert other.fingerprint != (monkeypatch.undo() or reranker.fingerprint)


def test_a_part_that_was_cut_short_is_left_aside(
    reranker: ZeroShotReranker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with stored(tmp_path) as store:
        score_run(reranker, ALL, RANKINGS, store=store, show_progress=False)
    parts = sorted(tmp_path.glob("part-*.npy"))
    assert len(parts) == len(ALL)
    parts[1].write_bytes(parts[1].read_bytes()[:-5])
    parts[2].write_bytes(b"")
    with caplog.at_level(logging.WARNING), stored(tmp_path) as store:
        assert len(store) == len(CANDIDATES)
        assert score_run(reranker, ALL, RANKINGS, store=store, show_progress=False).found == len(CANDIDATES)
    assert str(parts[1]) in caplog.text


def test_what_was_scored_before_an_error_is_kept(reranker: ZeroShotReranker, tmp_path: Path) -> None:
    broken = [CANDIDATES[:2], [Candidate(Item(image=b"broken"), "2:8")]]
    store = ScoreStore(tmp_path, seconds=3600)
    with pytest.raises(UserInputError, match="2:8"):
        score_run(reranker, ALL[:2], broken, store=store, show_progress=False)
    assert len(ScoreStore(tmp_path)) == 2


SCORES = """
    import sys
    sys.path[:0] = sys.argv[3:]
    from rerank_worlds import CANDIDATES, PROMPTS, QUERIES
    from lightning_mmembed import ZeroShotReranker
    from lightning_mmembed.rerank import ScoreStore, score_run

    class Counting(ScoreStore):
        def add(self, keys, scores):
            super().add(keys, scores)
            print(*keys, flush=True)

    reranker = ZeroShotReranker.from_pretrained(sys.argv[1], prompts=PROMPTS)
    queries = list(QUERIES.values()) * 20
    from dataclasses import replace
    queries = [replace(query, instruction=f"{number}") for number, query in enumerate(queries)]
    with Counting(sys.argv[2], seconds=0) as store:
        score_run(reranker, queries, [CANDIDATES] * len(queries), store=store, show_progress=False)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_scores_nothing_twice_when_it_is_started_again(
    answering_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", textwrap.dedent(SCORES), str(answering_checkpoint("qwen2_5_vl")), str(tmp_path)]
    command += [str(here), str(here.parents[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = []
    for number in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            if number == 0:
                printed += [next(lines) for _ in range(10)]
                process.send_signal(signal.SIGKILL)
            printed += list(lines)  # what was written before the kill is in the pipe still
    keys = [key for line in printed for key in line.split()]
    assert len(keys) == len(set(keys))
    assert len(ScoreStore(tmp_path)) == 60 * len(CANDIDATES)
    # The kill may have come between what was written and its line.
    assert 59 * len(CANDIDATES) <= len(keys) <= 60 * len(CANDIDATES)


# --- budgets --------------------------------------------------------------------------------------------------------


def test_pairs_are_shared_out_rank_by_rank_and_no_head_of_one_candidate_is_made() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths, depth = rng.integers(0, 12, 6).tolist(), int(rng.integers(1, 11))
        budget = int(rng.integers(0, 70))
        whole, shares = [min(length, depth) for length in lengths], share_out(lengths, depth, budget)
        if budget >= sum(whole):
            assert shares == whole
            continue
        assert sum(shares) <= budget
        assert all(share != 1 and share <= most for share, most in zip(shares, whole, strict=True))
        deeper = {share: 2 if share == 0 else share + 1 for share in shares}
        unfinished = [share for share, most in zip(shares, whole, strict=True) if deeper[share] <= most]
        if unfinished:
            lowest = min(unfinished)
            assert max(shares) <= deeper[lowest], "nobody is two ranks ahead of one who could have more"
            assert budget - sum(shares) < deeper[lowest] - lowest, "nothing is left that somebody could have"
    assert share_out([10, 1, 10], 4) == [4, 1, 4]


def test_what_is_left_of_a_budget_goes_to_queries_all_over_the_run() -> None:
    for budget, parts in ((100, 10), (230, 3)):
        shares = np.array(share_out([10] * 100, 10, budget))
        assert shares.sum() == budget
        sums = shares[: 100 // parts * parts].reshape(parts, -1).sum(1)
        assert sums.max() - sums.min() <= 2


def test_a_budget_of_pairs_goes_to_the_first_ranks_and_counts_what_is_on_disk(
    reranker: ZeroShotReranker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), stored(tmp_path) as store:
        for scored in (8, 0):
            result = score_run(reranker, ALL, RANKINGS, store=store, max_pairs=8, show_progress=False)
            assert [len(scores) for scores in result.scores] == [3, 2, 3]
            assert (result.scored, result.found, result.unscored) == (scored, 8 - scored, PAIRS - 8)
    assert "the budget left 5 pairs unscored" in caplog.text
    assert score_run(reranker, ALL, RANKINGS, max_pairs=0, show_progress=False).scores == [[], [], []]


def test_time_is_spent_on_the_first_ranks_of_every_query_first(
    reranker: ZeroShotReranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, clock = reranker.score, iter(range(100))
    asked = []

    def timed(query: object, candidates: list[Candidate], task: object = None) -> object:
        asked.append((query, len(candidates)))
        return score(query, candidates, task)  # type: ignore[arg-type]

    monkeypatch.setattr(reranker, "score", timed)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    # One second before each query of a round: three rank 2, and the first one rank 4.
    result = score_run(reranker, ALL, RANKINGS, max_seconds=5, show_progress=False)
    assert [len(scores) for scores in result.scores] == [4, 2, 2]
    assert asked == [(ALL[0], 2), (ALL[1], 2), (ALL[2], 2), (ALL[0], 2)]
    assert result.unscored == PAIRS - 8


def test_a_query_is_left_once_its_places_are_settled(reranker: ZeroShotReranker) -> None:
    retrieval = [[0.9, 0.8, -0.9, -0.9, -0.9], [0.5] * 5, [0.5] * 3]
    options = {"retrieval": retrieval, "weight": 0.1, "show_progress": False}
    result = score_run(reranker, ALL, RANKINGS, top=1, **options)
    assert [len(scores) for scores in result.scores] == [2, 5, 3]
    assert (result.settled, result.unscored) == (3, 0)


# --- costs ----------------------------------------------------------------------------------------------------------


def test_an_estimate_counts_pairs_and_tokens_of_what_is_left(reranker: ZeroShotReranker, tmp_path: Path) -> None:
    queries, rankings = [ALL[0]] * 8, [CANDIDATES] * 8
    found = estimate(reranker, queries, rankings, depth=4, max_pairs=30)
    before = reranker.tokens
    score_run(reranker, queries, rankings, depth=4, max_pairs=30, show_progress=False)
    assert found.pairs == 30
    assert found.tokens == pytest.approx(reranker.tokens - before, rel=0.1)
    assert found.seconds > 0
    with stored(tmp_path) as store:
        probed = estimate(reranker, ALL, RANKINGS, store=store, probe=1)
        assert probed.pairs == PAIRS - len(store)
        assert score_run(reranker, ALL, RANKINGS, store=store, show_progress=False).scored == probed.pairs
        assert estimate(reranker, ALL, RANKINGS, store=store).pairs == 0


def test_wrong_numbers_are_named(reranker: ZeroShotReranker) -> None:
    for name, value in (("depth", 0), ("max_pairs", -1), ("max_seconds", -1.0), ("top", 0)):
        with pytest.raises(UserInputError, match=f"{name}={value} is too small"):
            score_run(reranker, ALL, RANKINGS, **{name: value})
    with pytest.raises(UserInputError, match="3 queries have 2 rankings"):
        score_run(reranker, ALL, RANKINGS[:2])
