"""Scores the heads of many rankings: what it will cost, within a budget, and never a pair twice."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Candidate, Query
from lightning_mmembed.progress import progress_bar
from lightning_mmembed.rerank.order import settled
from lightning_mmembed.rerank.store import ScoreStore
from lightning_mmembed.rerank.zero_shot import ZeroShotReranker

log = logging.getLogger(__name__)

#: How many of each ranking the paper reorders.
DEPTH = 10
#: Queries that an estimate looks for on disk.
_LOOKED_FOR = 200


@dataclass(frozen=True)
class Estimate:
    """What is left to do, extrapolated from a probe.

    Args:
        pairs: Pairs without a score.
        tokens: Positions that the model would compute for them.
        seconds: How long that would take.
    """

    pairs: int
    tokens: int
    seconds: float


@dataclass
class RunScores:
    """What was scored.

    Args:
        scores: For each query P(True) of the first ones of its ranking: as many as were reached.
        scored: Pairs that the model scored.
        found: Pairs whose score was on disk.
        unscored: Pairs that a budget left out.
        settled: Pairs that could not change the places that matter.
        shortened: Candidates whose text was cut.
    """

    scores: list[list[float]]
    scored: int = 0
    found: int = 0
    unscored: int = 0
    settled: int = 0
    shortened: int = 0


@dataclass
class _Run:
    """The rankings of a run and what is known of them."""

    reranker: ZeroShotReranker
    queries: Sequence[Query]
    rankings: Sequence[Sequence[Candidate]]
    store: ScoreStore | None
    result: RunScores = field(default_factory=lambda: RunScores([]))

    def score(self, number: int, start: int, stop: int) -> list[float]:
        """P(True) of some ranks of a ranking, from disk where they are there."""
        query, candidates = self.queries[number], self.rankings[number][start:stop]
        keys = [self.reranker.key(query, candidate) for candidate in candidates] if self.store is not None else []
        known: list[float | None] = [None] * len(candidates)
        if self.store is not None:
            known = [self.store.get(key) for key in keys]
        new = [n for n, score in enumerate(known) if score is None]
        scores = self.reranker.score(query, [candidates[n] for n in new]).tolist()
        if self.store is not None:
            self.store.add([keys[n] for n in new], scores)
        for n, score in zip(new, scores, strict=True):
            known[n] = score
        self.result.scored += len(new)
        self.result.found += len(known) - len(new)
        return [score for score in known if score is not None]

    def missing(self, number: int, depth: int) -> list[int]:
        """The places among the first ones of a ranking that have no score on disk."""
        if self.store is None:
            return list(range(depth))
        query, store, head = self.queries[number], self.store, self.rankings[number][:depth]
        return [n for n, candidate in enumerate(head) if store.get(self.reranker.key(query, candidate)) is None]


def share_out(lengths: Sequence[int], depth: int, max_pairs: int | None = None) -> list[int]:
    """How deep each ranking is scored: rank by rank over all queries, the first two ranks of every query first.

    A single candidate has no other order, so that where pairs are few a ranking gets none or at least two.

    Args:
        lengths: Of the rankings.
        depth: How deep at most.
        max_pairs: The most pairs in all. What is not enough for everyone goes to queries spread evenly over the run.

    Example:
        >>> share_out([10, 1, 10], depth=4, max_pairs=7), share_out([10] * 6, depth=5, max_pairs=10)
        ([4, 0, 3], [2, 2, 2, 2, 0, 2])
    """
    depths = [min(length, depth) for length in lengths]
    if max_pairs is None or max_pairs >= sum(depths):
        return depths
    reached = np.array([of_query if of_query > 1 else 0 for of_query in depths])
    # The most ranks that everyone can have, then the next step for as many as the rest is enough for.
    levels = [*range(depth, 1, -1), 0]
    level = next(rank for rank in levels if np.minimum(reached, rank).sum() <= max_pairs)
    shares, step = np.minimum(reached, level), 1 if level else 2
    waiting = np.flatnonzero(reached > level)
    shares[waiting[_spread(len(waiting), (max_pairs - int(shares.sum())) // step)]] += step
    return [int(share) for share in shares]


def score_run(
    reranker: ZeroShotReranker,
    queries: Sequence[Query],
    rankings: Sequence[Sequence[Candidate]],
    *,
    depth: int = DEPTH,
    store: ScoreStore | None = None,
    max_pairs: int | None = None,
    max_seconds: float | None = None,
    top: int | None = None,
    retrieval: Sequence[Sequence[float]] | None = None,
    weight: float = 1.0,
    show_progress: bool = True,
) -> RunScores:
    """Score the heads of rankings, for :func:`~lightning_mmembed.rerank.order.rerank`.

    A budget goes rank by rank over all queries, so that everyone's first ranks come before anyone's later ones.
    ``max_pairs`` is shared out before it starts. With ``max_seconds`` or ``top`` there are several rounds, to rank 2,
    4, 8 ... of every query; each computes anew what the candidates of a query share.

    Args:
        reranker: The model.
        queries: Each with its task, whose wording is used.
        rankings: The candidates of each query, best first; only their numbers are asked for at once.
        depth: How many of each ranking to score; the paper's 10 by default.
        store: Where scores are kept. A pair that has one there is not scored again.
        max_pairs: The most pairs, those with a score on disk counted, so that a run that was killed and started again
            ends as one that was not.
        max_seconds: Ends once so long has passed, after the query that is being scored.
        top: How many places matter: a query is left once they are settled
            (:func:`~lightning_mmembed.rerank.order.settled`). That hardly ever happens with ``weight`` 1.
        retrieval: Scores of the retriever for each ranking; needed where ``top`` is given and ``weight`` is below 1.
        weight: Of P(True) in the fused score; matters to ``top`` alone.
        show_progress: Show a progress bar with an ETA.

    Raises:
        UserInputError: If a number is out of range, or a pair cannot be scored; what was scored is kept in ``store``.
    """
    _check(queries, rankings, depth=depth, max_pairs=max_pairs, max_seconds=max_seconds, top=top)
    lengths = [min(len(ranking), depth) for ranking in rankings]
    depths = share_out(lengths, depth, max_pairs)
    run = _Run(reranker, queries, rankings, store, RunScores([[] for _ in queries]))
    result, shortened, begin, left = run.result, reranker.shortened, time.monotonic(), set[int]()
    rounds = [depth] if max_seconds is None and top is None else _rounds(depth)
    try:
        with progress_bar(show_progress) as progress:
            bar = progress.add_task("reranking", total=sum(depths))
            for rank, number in ((rank, number) for rank in rounds for number in range(len(queries))):
                done, goal = len(result.scores[number]), min(rank, depths[number])
                if done >= goal or number in left:
                    continue
                if max_seconds is not None and time.monotonic() - begin >= max_seconds:
                    break
                result.scores[number] += run.score(number, done, goal)
                own = None if retrieval is None else retrieval[number][: lengths[number]]
                if top is not None and settled(result.scores[number], lengths[number], top, own, weight):
                    left.add(number)
                progress.advance(bar, goal - done)
    finally:
        if store is not None:
            store.flush()
    result.shortened = reranker.shortened - shortened
    missing = [length - len(scores) for length, scores in zip(lengths, result.scores, strict=True)]
    result.settled = sum(missing[number] for number in left)
    result.unscored = sum(missing) - result.settled
    _log(result, reranker.processor.max_length)
    return result


def estimate(
    reranker: ZeroShotReranker,
    queries: Sequence[Query],
    rankings: Sequence[Sequence[Candidate]],
    *,
    depth: int = DEPTH,
    store: ScoreStore | None = None,
    max_pairs: int | None = None,
    probe: int = 3,
    probe_depth: int | None = None,
) -> Estimate:
    """What a run would cost, from scoring a few queries that are spread evenly over it.

    Args:
        reranker: The model.
        queries: See :func:`score_run`.
        rankings: See :func:`score_run`.
        depth: See :func:`score_run`.
        store: What it holds costs nothing, of which 200 queries tell; the scores of the probe are kept there too.
        max_pairs: See :func:`score_run`.
        probe: Queries that are timed, after one that warms up.
        probe_depth: How many candidates of each of them, by default all. Of few the estimate is too high: the fewer
            share what is computed once for a query, the more a pair costs.
    """
    _check(queries, rankings, depth=depth, max_pairs=max_pairs, probe=probe, probe_depth=probe_depth)
    depths = share_out([len(ranking) for ranking in rankings], depth, max_pairs)
    run = _Run(reranker, queries, rankings, store)
    sample = _spread(len(queries), _LOOKED_FOR)
    missing = {number: run.missing(number, depths[number]) for number in sample}
    looked_at = sum(depths[number] for number in sample)
    left = round(sum(depths) * sum(map(len, missing.values())) / looked_at) if looked_at else 0
    todo = [number for number, places in missing.items() if places]
    picked = [todo[n] for n in _spread(len(todo), probe + 1)]
    timed = [0, 0, 0.0]
    for first, number in zip([True] + [False] * len(picked), picked, strict=False):
        before, tokens, begin = run.result.scored, reranker.tokens, time.perf_counter()
        first_place = missing[number][0]
        run.score(number, first_place, min(depths[number], first_place + (probe_depth or depth)))
        if len(picked) == 1 or not first:
            timed[0] += run.result.scored - before
            timed[1] += reranker.tokens - tokens
            timed[2] += time.perf_counter() - begin
    if store is not None:
        store.flush()
        left -= run.result.scored
    share = left / timed[0] if timed[0] else 0.0
    return Estimate(left, round(share * timed[1]), share * timed[2])


def _spread(count: int, most: int) -> list[int]:
    """At most so many numbers below ``count``, spread evenly from the first to the last."""
    numbers: list[int] = np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()
    return numbers


def _rounds(depth: int) -> list[int]:
    ranks = [2]
    while ranks[-1] < depth:
        ranks.append(2 * ranks[-1])
    return [min(rank, depth) for rank in ranks]


def _check(queries: Sequence[Query], rankings: Sequence[Sequence[Candidate]], **numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < (0 if name.startswith("max_") else 1):
            raise UserInputError(f"{name}={value} is too small; give a larger number, or leave it out")
    if len(queries) != len(rankings):
        raise UserInputError(f"{len(queries)} queries have {len(rankings)} rankings; give one for each")


def _log(result: RunScores, max_length: int) -> None:
    if result.shortened:
        log.warning("the texts of %d candidates were cut to max_length=%d", result.shortened, max_length)
    if result.unscored:
        log.warning("the budget left %d pairs unscored; they stay below what was scored", result.unscored)
    log.info("%d pairs scored, %d scores found on disk", result.scored, result.found)
