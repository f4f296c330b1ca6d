"""From rankings to hard negatives: the modality-aware rule of MM-Embed (section 3.2 of the paper) and others.

Two kinds of negatives come out of the top ``k`` of one mixed pool by the paper's rule:

* ``wrong_modality`` (C1): another modality than the instruction asks for, ranked above the best labelled positive;
  if no positive is among the top ``k``, every candidate of another modality there.
* ``wrong_content`` (C2): the wanted modality, but ranked below ``k_prime``, where unlabelled positives are rare.

Rules that do not look at modalities find a third kind, ``any_modality``. A labelled positive is of no kind.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_mmembed.mining_rule import ANY_MODALITY, FILTERS, KINDS, MARGINS, RULES, MiningRule, check_band
from lightning_mmembed.mining_rule import WRONG_CONTENT as WRONG_CONTENT
from lightning_mmembed.mining_rule import WRONG_MODALITY as WRONG_MODALITY

#: The number of what is no negative.
NO_KIND = -1

PAPER = MiningRule()

#: Bounds of the bins of the histograms of scores, which are cosines.
SCORE_BOUNDS = tuple(round(-1 + 0.05 * n, 2) for n in range(41))


@dataclass(frozen=True)
class Rankings:
    """The rankings of some queries of one task, and what is known about what they hold.

    Scores of labelled positives are needed for margins only: the lowest of a query's, wherever they are ranked, NaN for
    a query of which none is known.

    Args:
        qids: ``(Q,)`` int64 queries.
        dids: ``(Q, K)`` int64 candidates, best first; -1 past the end of a list.
        modalities: ``(Q, K)`` modality of each candidate, as a number.
        scores: ``(Q, K)`` float32 scores, best first.
        positives: ``(Q, P)`` int64 labelled positives, padded with -1.
        wanted: Number of the modality that the task's instructions ask for.
        positive_scores: ``(Q,)`` float32 scores of the positives.
        check_scores: ``(Q, K)`` scores of the same candidates by another model.
        check_positive_scores: ``(Q,)`` scores of the positives by that model.
    """

    qids: np.ndarray
    dids: np.ndarray
    modalities: np.ndarray
    scores: np.ndarray
    positives: np.ndarray
    wanted: int
    positive_scores: np.ndarray | None = None
    check_scores: np.ndarray | None = None
    check_positive_scores: np.ndarray | None = None


@dataclass(frozen=True)
class HardNegatives:
    """The mined negatives of one query, each a 0-based position in its ranking, best first.

    Args:
        wrong_modality: Positions of the C1 candidates.
        wrong_content: Positions of the C2 candidates.
    """

    wrong_modality: tuple[int, ...]
    wrong_content: tuple[int, ...]


def mine_modality_aware(
    ranking: Sequence[object],
    modalities: Sequence[object],
    positives: Collection[object],
    wanted: object,
    k: int = 50,
    k_prime: int = 45,
) -> HardNegatives:
    """Pick the modality-aware hard negatives out of one query's ranking; :func:`mine_rankings` does it for many.

    Args:
        ranking: ``did`` of the candidates, best first; only the first ``k`` are looked at.
        modalities: Modality of each ranked candidate, in any type that compares with ``wanted``.
        positives: ``did`` of every labelled positive, whatever its dataset.
        wanted: The modality that the instruction asks for.
        k: Depth of the ranking.
        k_prime: Candidates of the wanted modality count as negatives from rank ``k_prime + 1`` on.

    Returns:
        Positions in ``ranking``; no labelled positive is ever among them.

    Raises:
        ValueError: If ``k_prime`` is not between 0 and ``k``.

    Example:
        >>> mine_modality_aware(["a", "b", "c", "d"], ["text", "image", "text", "image"], {"c"}, "image", 4, 3)
        HardNegatives(wrong_modality=(0,), wrong_content=(3,))
    """
    check_band(k, k_prime)
    top = list(ranking[:k])
    is_positive = np.array([[did in positives for did in top]], dtype=bool)
    is_wanted = np.array([[modality == wanted for modality in modalities[: len(top)]]], dtype=bool)
    kinds = _modality_aware(np.ones_like(is_positive), is_positive, is_wanted, k_prime)[0]
    wrong_modality, wrong_content = (np.flatnonzero(kinds == kind).tolist() for kind in (0, 1))
    return HardNegatives(tuple(wrong_modality), tuple(wrong_content))


def mine_rankings(rankings: Rankings, rule: MiningRule = PAPER) -> tuple[np.ndarray, dict[str, int]]:
    """Pick the hard negatives out of the rankings of many queries at once.

    What is picked for a query depends on nothing but that query, so rankings may be cut into parts anywhere.

    Args:
        rankings: The rankings; only the first ``rule.k`` candidates are looked at.
        rule: Which candidates are negatives.

    Returns:
        ``(Q, K)`` int8 positions in :data:`KINDS`, -1 for what is no negative; and counts that may be added up over
        parts: queries, queries with each kind that the rule looks for and with none, labelled positives and those of
        them met among the top ``k``, and candidates that each setting of the rule left out. A candidate that several
        of them leave out counts for the first.

    Raises:
        UserInputError: If the rule needs scores that the rankings lack.
    """
    rule.check_scores_of(rankings)
    dids = rankings.dids[:, : rule.k]
    listed, is_wanted = dids >= 0, rankings.modalities[:, : rule.k] == rankings.wanted
    is_positive = labelled(dids, rankings.positives)
    if RULES[rule.rule] == (ANY_MODALITY,):
        kinds = np.where(listed & ~is_positive, np.int8(KINDS.index(ANY_MODALITY)), np.int8(NO_KIND))
    else:
        kinds = _modality_aware(listed, is_positive, is_wanted, rule.k_prime)
        kinds[~np.isin(kinds, [KINDS.index(name) for name in RULES[rule.rule]])] = NO_KIND
    counts = {"queries": len(dids)}
    left_out = _filter(kinds, rankings, rule)
    if rule.rule == "window":
        kinds[~_between(kinds >= 0, rule.range_min, rule.range_max)] = NO_KIND
    if rule.num_negatives is not None:
        _keep_few(kinds, rankings, rule)
    for name in RULES[rule.rule]:
        counts[f"with_{name}"] = int((kinds == KINDS.index(name)).any(1).sum())
    counts["with_none"] = int((kinds == NO_KIND).all(1).sum())
    counts["positives"] = int((rankings.positives >= 0).sum())
    counts["positives_met"] = int(is_positive.sum())
    padded = np.full(rankings.dids.shape, NO_KIND, dtype=np.int8)
    padded[:, : rule.k] = kinds
    return padded, counts | {f"left_out_by_{name}": number for name, number in left_out.items()}


def mined_columns(rankings: Rankings, kinds: np.ndarray) -> dict[str, np.ndarray]:
    """The negatives of many queries as rows of a table, query by query, kind by kind, best first.

    Args:
        rankings: The rankings.
        kinds: ``(Q, K)`` what :func:`mine_rankings` made of them.

    Returns:
        Columns ``qid``, ``did``, ``kind``, ``rank`` (from 1) and ``score``, each ``(N,)``.
    """
    query, place = np.nonzero(kinds >= 0)
    order = np.argsort(query * len(KINDS) + kinds[query, place], kind="stable")
    query, place = query[order], place[order]
    return {
        "qid": rankings.qids[query],
        "did": rankings.dids[query, place],
        "kind": kinds[query, place],
        "rank": (place + 1).astype(np.int16),
        "score": rankings.scores[query, place],
    }


def mining_audit(counts: dict[str, int], columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """What was mined for the queries of a task, in numbers that can be written as JSON.

    Args:
        counts: What :func:`mine_rankings` counted, added up over all parts.
        columns: What :func:`mined_columns` made of all parts.

    Returns:
        The counts; ``share_of_positives_met``, the labelled positives that were ranked among the top ``k`` and taken
        out of the negatives, as a share of all; and ``kinds``, for each kind that was found the number of negatives,
        their mean rank and score, and how many scores lie between each two of :data:`SCORE_BOUNDS`.
    """
    audit: dict[str, Any] = dict(counts)
    audit["share_of_positives_met"] = counts["positives_met"] / max(1, counts["positives"])
    audit["kinds"] = {}
    for kind, name in enumerate(KINDS):
        rank, score = (columns[column][columns["kind"] == kind].astype(float) for column in ("rank", "score"))
        if len(rank):
            audit["kinds"][name] = {
                "negatives": len(rank),
                "mean_rank": round(float(rank.mean()), 4),
                "mean_score": round(float(score.mean()), 4),
                "scores": np.histogram(score.clip(-1, 1), SCORE_BOUNDS)[0].tolist(),
            }
    return audit


def total_counts(audit: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The counts of all tasks together.

    Args:
        audit: By task what :func:`mining_audit` gives; tasks may lack counts that others have.

    Example:
        >>> total_counts({"a_task0": {"queries": 2, "kinds": {}}, "b_task1": {"queries": 3, "with_none": 1}})
        {'queries': 5, 'with_none': 1}
    """
    names = dict.fromkeys(name for task in audit.values() for name, value in task.items() if isinstance(value, int))
    return {name: sum(task.get(name, 0) for task in audit.values()) for name in names}


def labelled(dids: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Which ranked candidates are labelled positives of their query.

    Args:
        dids: ``(Q, K)`` candidates, -1 past the end of a list.
        positives: ``(Q, P)`` labelled positives, padded with -1.

    Returns:
        ``(Q, K)`` booleans.
    """
    found = np.zeros(dids.shape, dtype=bool)
    for column in positives.T:  # a query with many positives does not cost those with few of them
        rows = np.flatnonzero(column >= 0)
        found[rows] |= dids[rows] == column[rows, None]
    return found


def _modality_aware(listed: np.ndarray, is_positive: np.ndarray, is_wanted: np.ndarray, k_prime: int) -> np.ndarray:
    """The rule of the paper: ``(Q, K)`` int8 positions in :data:`KINDS`."""
    positive_above = np.logical_or.accumulate(is_positive, axis=1)
    below = np.arange(is_positive.shape[1]) >= k_prime
    kinds = np.full(is_positive.shape, NO_KIND, dtype=np.int8)
    kinds[listed & ~is_wanted & ~positive_above] = KINDS.index(WRONG_MODALITY)
    kinds[listed & is_wanted & ~is_positive & below] = KINDS.index(WRONG_CONTENT)
    return kinds


def _filter(kinds: np.ndarray, rankings: Rankings, rule: MiningRule) -> dict[str, int]:
    """Take back candidates that a threshold of the rule leaves out; returns how many each of them did."""
    counts = {}
    for name, left_out in FILTERS.items():
        if getattr(rule, name) is not None:
            dropped = (kinds >= 0) & left_out(rankings, getattr(rule, name))[:, : kinds.shape[1]]
            if name in MARGINS:
                dropped &= kinds != KINDS.index(WRONG_MODALITY)
            kinds[dropped] = NO_KIND
            counts[name] = int(dropped.sum())
    return counts


def _between(candidates: np.ndarray, start: int, end: int | None) -> np.ndarray:
    """Of the candidates of each query those from position ``start`` on and before ``end``, not counting others."""
    position = candidates.cumsum(1) - 1
    inside: np.ndarray = candidates & (position >= start)
    return inside if end is None else inside & (position < end)


def _keep_few(kinds: np.ndarray, rankings: Rankings, rule: MiningRule) -> None:
    """Take back all but ``num_negatives`` candidates of each kind of each query."""
    order = np.broadcast_to(np.arange(kinds.shape[1]), kinds.shape)
    if rule.sampling_strategy == "random":
        order = _random_keys(rankings.qids, rankings.dids[:, : kinds.shape[1]], rule.seed).argsort(1, kind="stable")
    shuffled = np.take_along_axis(kinds, order, 1)
    for kind in range(len(KINDS)):
        excess = (shuffled == kind) & ~_between(shuffled == kind, 0, rule.num_negatives)
        shuffled[excess] = NO_KIND
    np.put_along_axis(kinds, order, shuffled, 1)


def _random_keys(qids: np.ndarray, dids: np.ndarray, seed: int) -> np.ndarray:
    """``(Q, K)`` uint64 numbers that depend on the seed, the query and the candidate alone."""
    keys = _mixed(_mixed(_mixed(np.array([[seed]], dtype=np.uint64)) ^ qids.astype(np.uint64)[:, None]))
    return _mixed(keys ^ dids.astype(np.uint64))


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014): every bit of a number depends on every other."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = numbers ^ (numbers >> np.uint64(31))
    return mixed
